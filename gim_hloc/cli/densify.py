"""``gim-densify OUTPUT``: depth maps, a dense cloud and a mesh of a finished run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.options import to_mapping
from gim_hloc.pipelines.options import DensifyOptions

_DESCRIPTION = """Find depth maps for the images of a finished reconstruction, and fuse them into a
dense cloud: OUTPUT/dense, COLMAP's workspace. Needs no GPU.
A run that was stopped continues with the same command.

Examples:
  gim-densify out
  gim-densify out --depth-size 1600 --mesh

Exit codes: 0 a cloud, 2 wrong input or options, 3 OUTPUT is in use by another run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options, paths, terminal = common.parse_options(
        DensifyOptions,
        argv,
        prog="gim-densify",
        description=_DESCRIPTION,
        positionals={"output": "Output folder of gim-reconstruct."},
    )
    common.configure_logging(terminal.verbose, terminal.quiet)
    return common.run(lambda: _run(options, paths["output"], terminal))


def _run(options: DensifyOptions, output: Path, terminal: common.Terminal) -> int:
    from gim_hloc.pipelines.densify import densify, summary_text

    result = densify(output, options, progress=terminal.bars)
    if terminal.json:
        sys.stdout.write(json.dumps(to_mapping(dataclasses.asdict(result))) + "\n")
    elif not terminal.quiet:
        sys.stdout.write(summary_text(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
