"""``gim-view MODEL``: a model in the browser."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gim_hloc.cli import common
from gim_hloc.pipelines.options import ViewOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(ViewOptions, args=common.prog(argv), prog="gim-view")
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: ViewOptions) -> int:
    from gim_hloc.pipelines.view import view

    viewer = view(options)
    if options.record is None:
        sys.stdout.write(f"{viewer.address}   (Ctrl-C ends it)\n")
        sys.stdout.flush()
        viewer.follow()
    return 0


if __name__ == "__main__":
    sys.exit(main())
