"""``gim-localize MAP QUERIES OUTPUT``: poses of images in an existing model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gim_hloc.cli import common
from gim_hloc.pipelines.localize import LocalizeOptions, localize, summary_text


@dataclass(frozen=True, kw_only=True)
class _Arguments(LocalizeOptions):
    """Find the poses of images in an existing model.

    Exit code 0 when at least one query is localised, 4 when none is.
    """

    map: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MAP")]
    """Output folder of gim-reconstruct, or a COLMAP model (then with --features)."""
    queries: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QUERIES")]
    """Folder of images, searched recursively."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder for poses.txt, sparse/ (map and queries), report.txt and report.json."""
    quiet: bool = False
    """No progress bars."""
    verbose: bool = False
    """Tell every query."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    arguments = common.parse(
        _Arguments,
        prog="gim-localize",
        args=common.prog(argv),
        config=(tyro.conf.AvoidSubcommands,),
    )
    common.configure_logging(arguments.verbose)
    return common.run(lambda: _run(arguments))


def _run(arguments: _Arguments) -> int:
    fields = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(LocalizeOptions)}
    result = localize(
        arguments.map,
        arguments.queries,
        arguments.output,
        LocalizeOptions(**fields),
        progress=not arguments.quiet,
    )
    sys.stdout.write(summary_text(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
