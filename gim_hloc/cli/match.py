"""``gim-match A B --out DIR``: match two images; coordinates and pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gim_hloc.cli import common
from gim_hloc.options import FitOptions, Quality


@dataclass(frozen=True, kw_only=True)
class _Arguments(common.Licences):
    """Match two images.

    Writes to OUT, with names of the two images and the matcher: ..._matches.npz (csv, h5) with
    coordinates in pixels of the stored files, ..._match.png with the inliers drawn, ..._warp.png
    with B projected onto A. Exit code 0 also when nothing matches; the message says so.
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Image 0."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Image 1."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path()
    """Folder of the results; made if missing."""
    matcher: str = "aliked_lightglue"
    """Name of a matcher; see gim_hloc.matchers.names()."""
    quality: Quality = "base"
    """Operating point of the matcher: image size, number of matches and thresholds together."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    max_size: int | None = None
    """Long side in pixels that the matcher sees, instead of the operating point's."""
    matcher_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Any other option of the matcher, e.g. filter_threshold=0.2."""
    mask0: Path | None = None
    """Mask of A in its stored pixels; black is ignored."""
    mask1: Path | None = None
    """Mask of B."""
    mask_erode: int = 4
    """Keypoints keep this many pixels away from masked ones."""
    format: tuple[Literal["npz", "csv", "h5"], ...] = ("npz",)
    """Formats of the coordinates: npz, csv, h5 (hloc's: a file of features and one of matches)."""
    rotations: Literal["auto", "none"] = "auto"
    """auto: where next to nothing matches, B is tried turned by a quarter, a half, three."""
    pictures: bool = True
    """Draw the matches and the projection."""
    ransac: bool = True
    """Fit a fundamental matrix and a homography; without, all matches are drawn."""
    fit: FitOptions = field(default_factory=FitOptions)
    """Thresholds of these fits."""
    verbose: bool = False
    """Tell more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    arguments = common.parse(_Arguments, prog="gim-match", args=common.prog(argv))
    common.configure_logging(arguments.verbose)
    return common.run(lambda: _run(arguments))


def _run(arguments: _Arguments) -> int:
    from gim_hloc.pipelines.match_pair import match

    options: dict[str, Any] = {}
    if arguments.matcher_options:
        from gim_hloc.matchers.common import parse_matcher_options

        options = parse_matcher_options(arguments.matcher_options)
    if arguments.max_size is not None:
        options["max_size"] = arguments.max_size
    result = match(
        arguments.a,
        arguments.b,
        matcher=arguments.matcher,
        quality=arguments.quality,
        device=arguments.device,
        mask0=arguments.mask0,
        mask1=arguments.mask1,
        mask_erode=arguments.mask_erode,
        rotations=arguments.rotations,
        fit=arguments.fit if arguments.ransac else None,
        **options,
    )
    written = result.save(arguments.out, formats=arguments.format, pictures=arguments.pictures)
    sys.stdout.write(result.summary() + "\n")
    if result.remark is not None:
        sys.stdout.write(result.remark + "\n")
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
