"""Options of ``gim-zeb``: its flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro
from pydantic import Field

from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.sets import check_set_name
from gim_hloc.options import Count, CountOrNone, Positive, Quality, Share, WorkOptions, options
from gim_hloc.workers import parse_shard

Estimator = Literal["gim", "poselib"]
Format = Literal["superglue", "megadepth", "scannet", "homography", "pairs"]  # of pair lists

SEPARATOR = "-"  # between scene and image in the files of sets that are made here
_SCENE = re.compile(r"[\w.+]+")


@options
class EvaluationOptions(WorkOptions):
    """What is run and judged, whatever the pairs are."""

    matchers: tuple[str, ...]
    """Names of matchers."""
    protocols: tuple[Estimator, ...] = ("gim",)
    """gim (OpenCV, as the reference) and poselib (needs gim-hloc[zeb])."""
    quality: Quality = "base"
    """Operating point of matchers that the reference does not set."""
    version: str | None = None
    """Last token of the names of dumps; by default the quality."""
    limit: Count | None = None
    """Pairs of a set, drawn at random."""
    seed: CountOrNone = 0
    """Of that draw, and of the bootstrap."""
    batch_size: CountOrNone = 0
    """Pairs a network call; 0: 1 on a processor, 4 on a GPU."""
    cache_gb: Positive | None = None
    """Memory for encodings, 10^9 bytes."""
    shard: str | None = None
    """i/N: only the i-th of N parts of every set, from 0. The command without it takes over what
    such jobs did, does what is left, and writes the results."""

    @pydantic.field_validator("matchers", "protocols")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("No matcher or no protocol was named.")
        return tuple(dict.fromkeys(value))

    def __post_init__(self) -> None:
        _ = self.part  # refuses what is none

    @property
    def part(self) -> tuple[int, int]:
        """Index of the shard, from 0, and their number."""
        return (0, 1) if self.shard is None else parse_shard(self.shard)

    @property
    def dump_version(self) -> str:
        """Last token of dump names. A run on some of the pairs must not pass for one on all."""
        version = self.version or self.quality
        return version if self.limit is None else f"{version}-limit{self.limit}-seed{self.seed}"


@options
class RunOptions(EvaluationOptions):
    """How matchers are run over ZEB."""

    sets: tuple[str, ...] = ()
    """Only these sets."""
    padded_slip: bool = False
    """Repeat the reference's slip in the coordinates of padded sets."""


@options
class PairOptions(EvaluationOptions):
    """How matchers are run over a list of pairs."""

    images: Path | None = None
    """Folder that image names are relative to; by default looked for around the list."""
    format: Format | None = None
    """Of the list; by default found out."""
    name: str | None = None
    """Of the set in results; by default that of the list."""
    intrinsics: Path | None = None
    """K of ScanNet's scenes; by default intrinsics.npz beside the list."""
    k_size: str | None = None
    """WxH of the images that K is for, where these are not the stored ones; RANSAC's threshold
    counts their pixels."""
    threshold_px: Positive | None = None
    """Of RANSAC: 0.5 (gim) or 1 (poselib) for poses, 3 for homographies, 1 without truth."""
    resize: str | None = None
    """stored, matcher (its own size), a long side such as 1200, or 640x480. By default 1200 for
    megadepth, 640x480 for scannet, matcher for pairs, stored for the others."""
    short_side: Count | None = None
    """Count errors of homographies in pixels of images with this short side, such as 480."""
    thresholds: tuple[float, ...] = ()
    """Of AUC: by default 5 10 20 degrees, or 1 3 5 10 20 px for homographies."""
    samples: CountOrNone = 1000
    """Bootstrap resamplings for the 95 % interval; 0 leaves it out."""
    pictures: bool = True
    """Draw the pairs of a list without truth."""


@options
class MakeOptions:
    """Which pairs a set has, and how they are stored."""

    name: Annotated[str, tyro.conf.arg(name="set")]
    """Name of the set: a folder name, and none of ZEB's twelve."""
    scene: str | None = None
    """Name of the scene; that of the set by default."""
    min_overlap: Share = 0.1
    """Smallest overlap of a pair, the share of an image that the other sees."""
    max_overlap: Share = 1.0
    """Largest."""
    pairs_per_bin: CountOrNone = 50
    """Pairs drawn from each tenth of overlap; 0 takes all."""
    max_size: Annotated[int, Field(ge=8)] | None = None
    """Reduce images to this long side, px."""
    depth: tuple[Positive, Positive] | None = None
    """NEAR FAR of the scene in the model's unit, for models without points; by default about where
    the cameras look."""
    seed: CountOrNone = 0
    """Of the draw."""
    add: bool = False
    """Add a scene to a set that exists."""

    def __post_init__(self) -> None:
        check_set_name(self.name)
        if not _SCENE.fullmatch(self.scene_name):
            raise InputError(
                f"{self.scene!r} cannot be the name of a scene: letters, digits and _ . + can."
            )
        if self.min_overlap >= self.max_overlap:
            raise InputError(
                f"Overlaps from {self.min_overlap:g} to {self.max_overlap:g} are no range."
            )
        if self.depth is not None and self.depth[0] > self.depth[1]:
            raise InputError(f"Depths from {self.depth[0]:g} to {self.depth[1]:g} are no range.")

    @property
    def scene_name(self) -> str:
        """What files and identifiers start with; it must not hold the separator."""
        return self.name.replace(SEPARATOR, "_") if self.scene is None else self.scene


@options
class TableOptions:
    """What a table holds."""

    thresholds: tuple[float, ...] = (5.0, 10.0, 20.0)
    """Degrees of AUC; the first ranks the rows."""
    published: bool = True
    """Show the published rows (AUC@5 only) beside the dumps'."""
    bootstrap: CountOrNone = 1000
    """Resamplings of the pairs for the interval; 0 leaves it out."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the interval."""
    seed: CountOrNone = 0
    """Of the bootstrap."""


@options
class PictureOptions:
    """Which pairs are drawn, and how large."""

    count: Count = 10
    """Pairs of a list."""
    limit: Positive = 20.0
    """Degrees at which errors are cut when matchers are compared."""
    side: Annotated[int, Field(ge=32)] = 560
    """px of an image's long side in a picture."""
    lines: CountOrNone = 200
    """Matches drawn of a matcher at most; more would hide the images."""
