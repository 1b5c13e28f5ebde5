"""``gim-export OUTPUT --to FORMAT...``: models of a finished run for other programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.options import to_mapping
from gim_hloc.pipelines.options import HandoverOptions

_DESCRIPTION = """Write the models of a finished run for other programs, below OUTPUT/export.
Nothing is computed again; what a format cannot hold is said.

Examples:
  gim-export out --to 3dgs --num-downscales 3
  gim-export out --to nerfstudio openmvs metashape

Exit codes: 0 written, 2 wrong input or options, 3 OUTPUT is in use by a run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options, paths, terminal = common.parse_options(
        HandoverOptions,
        argv,
        prog="gim-export",
        description=_DESCRIPTION,
        positionals={"output": "Output folder of gim-reconstruct."},
    )
    common.configure_logging(terminal.verbose, terminal.quiet)
    return common.run(lambda: _run(options, paths, terminal))


def _run(options: HandoverOptions, paths: Mapping[str, Path], terminal: common.Terminal) -> int:
    from gim_hloc.pipelines.exports import export

    result = export(paths["output"], options, progress=terminal.bars)
    if terminal.json:
        sys.stdout.write(json.dumps(to_mapping(result)) + "\n")
    elif not terminal.quiet:
        tops = dict.fromkeys("/".join(name.split("/")[:3]) for name in result.files)
        sys.stdout.write("".join(f"{result.output / name}\n" for name in tops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
