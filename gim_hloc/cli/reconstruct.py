"""``gim-reconstruct IMAGES OUTPUT``: from an image folder or a video to a COLMAP model."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gim_hloc.cli import common
from gim_hloc.pipelines.options import ReconstructOptions

_DESCRIPTION = """Turn a folder of images or a video into a COLMAP model, with a report.
A run that was stopped continues with the same command.

Examples:
  gim-reconstruct photos out
  gim-reconstruct phone.mp4 out --export 3dgs
  gim-reconstruct frames out --pairs sequential --quality fast
  gim-reconstruct photos out --matcher gim_roma --intrinsics "PINHOLE,1200,1200,960,540"
  gim-reconstruct --config out/run.yaml photos out --export nerfstudio

Exit codes: 0 a model, 2 wrong input or options, 3 OUTPUT is in use by another run, 4 no model.
Thresholds (verify.*, map.*, refine.*, ...) go into --config FILE.yaml; --help-all shows them.
--list-matchers lists the matchers, --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options, paths, terminal = common.parse_options(
        ReconstructOptions,
        argv,
        prog="gim-reconstruct",
        description=_DESCRIPTION,
        positionals={
            "images": "Folder of images and videos, searched recursively, or a video.",
            "output": "Folder for features, matches, database, sparse/0 and report.html.",
        },
    )
    common.configure_logging(terminal.verbose, terminal.quiet)
    return common.run(lambda: _run(options, paths["images"], paths["output"], terminal))


def _run(options: ReconstructOptions, images: Path, output: Path, terminal: common.Terminal) -> int:
    from gim_hloc.pipelines.outcome import summary_text
    from gim_hloc.pipelines.reconstruct import reconstruct

    gc.freeze()  # what was imported stays: no collection needs to go through it again
    result = reconstruct(images, output, options, progress=terminal.bars)
    if terminal.json:
        sys.stdout.write(json.dumps(result.report or result.estimate) + "\n")
    elif not options.dry_run and not terminal.quiet:
        sys.stdout.write(summary_text(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
