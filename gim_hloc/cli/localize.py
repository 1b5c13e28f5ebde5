"""``gim-localize MAP QUERIES OUTPUT``: poses of images in an existing model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.pipelines.options import LocalizeOptions

_DESCRIPTION = """Find the poses of images in an existing model.

Examples:
  gim-localize out photos/new poses
  gim-localize out photos/new poses --pairs retrieval --neighbours 10
  gim-localize colmap/sparse/0 photos/new poses --features feats.h5 --matcher disk_lightglue

Exit codes: 0 at least one query has a pose, 2 wrong input or options, 3 OUTPUT is in use, 4 none
has. --list-matchers lists the matchers, --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options, paths, terminal = common.parse_options(
        LocalizeOptions,
        argv,
        prog="gim-localize",
        description=_DESCRIPTION,
        positionals={
            "map": "Output folder of gim-reconstruct, or a COLMAP model (then with --features).",
            "queries": "Folder of images, searched recursively.",
            "output": "Folder for poses.txt, sparse/ (map and queries), report.txt, report.json.",
        },
    )
    common.configure_logging(terminal.verbose, terminal.quiet)
    return common.run(lambda: _run(options, paths, terminal))


def _run(options: LocalizeOptions, paths: Mapping[str, Path], terminal: common.Terminal) -> int:
    from gim_hloc.pipelines.localize import localize, summary_text

    result = localize(
        paths["map"], paths["queries"], paths["output"], options, progress=terminal.bars
    )
    if terminal.json:
        sys.stdout.write(json.dumps(result.report) + "\n")
    elif not terminal.quiet:
        sys.stdout.write(summary_text(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
