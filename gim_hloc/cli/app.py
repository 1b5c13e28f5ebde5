"""``gim-app``: matching and reconstruction as a web page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gim_hloc.cli import common
from gim_hloc.pipelines.options import AppOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(AppOptions, args=common.prog(argv), prog="gim-app")
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: AppOptions) -> int:
    from gim_hloc.pipelines.app import served

    with served(options) as (address, page):
        sys.stdout.write(f"{address}   (Ctrl-C ends it)\n")
        sys.stdout.flush()
        page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
