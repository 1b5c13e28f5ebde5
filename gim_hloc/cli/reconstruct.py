"""``gim-reconstruct IMAGES OUTPUT``: from an image folder to a COLMAP model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gim_hloc.cli import common
from gim_hloc.colmap import CameraOptions
from gim_hloc.pipelines.outcome import summary_text
from gim_hloc.pipelines.reconstruct import ReconstructOptions, reconstruct


@dataclass(frozen=True, kw_only=True)
class _Arguments(ReconstructOptions):
    """Turn a folder of images into a COLMAP model, with a report.

    A run that was stopped continues with the same command.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, searched recursively."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder for features, matches, database, sparse/0 and report.html."""
    cameras: Annotated[CameraOptions, tyro.conf.arg(name="")] = CameraOptions()
    """How images share cameras, and known intrinsics."""
    quiet: bool = False
    """No progress bars."""
    verbose: bool = False
    """Tell every image and pair."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    arguments = common.parse(
        _Arguments,
        prog="gim-reconstruct",
        args=common.prog(argv),
        config=(tyro.conf.AvoidSubcommands,),
    )
    common.configure_logging(arguments.verbose)
    return common.run(lambda: _run(arguments))


def _run(arguments: _Arguments) -> int:
    fields = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(ReconstructOptions)}
    result = reconstruct(
        arguments.images,
        arguments.output,
        ReconstructOptions(**fields),
        progress=not arguments.quiet,
    )
    if not arguments.dry_run:
        sys.stdout.write(summary_text(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
