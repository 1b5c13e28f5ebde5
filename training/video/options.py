"""What ``gim-video`` can be told. Each field is a flag of its commands.

The base classes are the groups of ``--help``. Nothing here imports torch, OpenCV or PyAV.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from gim_hloc.errors import InputError
from gim_hloc.options import (
    Count,
    CountOrNone,
    FrameFileOptions,
    FramesOptions,
    MatcherName,
    NotNegative,
    Positive,
    Quality,
    Side,
    TuningOptions,
    WorkOptions,
    options,
)
from gim_hloc.workers import parse_shard

FINAL_CONFIDENCE = 0.999999  # of the fit that ends propagation
FINAL_ITERATIONS = 1000


@options
class SourceOptions:
    """How a video is read."""

    sequence_fps: Positive = 30.0
    """Frames per second of a folder of images."""
    max_height: Count = 1080
    """Rows of downloaded videos at most."""


@options
class VideoFramesOptions(FramesOptions, SourceOptions):
    """What ``gim-video frames`` can be told."""


# ------------------------------------------------------------------------------------------- labels


@options
class LabellerOptions:
    """What labels pairs of near frames."""

    labellers: tuple[MatcherName, ...] = ()
    """Names of matchers. Default: gim_dkm gim_loftr gim_lightglue sift where their weights are
    here, else aliked_lightglue disk_lightglue sift."""
    quality: Quality = "base"
    """Operating point of the labellers."""
    zoom: bool = True
    """Also match crops of what both frames show, enlarged alike."""
    zoom_base: MatcherName | None = None
    """Labeller whose plain labels say what to crop; the first by default."""
    zoom_box: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] | None = None
    """Height and width in pixels that crops are enlarged to; 900 1600 (SIFT: the frame)."""

    @pydantic.field_validator("labellers")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"A labeller was named twice: {', '.join(names)}.")
        return names


@options
class SamplingOptions:
    """Which frames are looked at, and which of them are paired; the defaults are GIM's."""

    gap: Count | None = None
    """Frames between sampled ones; 10 up to 30 frames per second, else 20."""
    steps: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Frames between those of a pair; the gap, twice and four times it."""
    start: float | None = None
    """First moment in seconds; --trim by default."""
    end: float | None = None
    """Last moment in seconds."""
    trim: NotNegative = 300.0
    """Seconds that videos of three times that length lose at both ends (titles, credits)."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Only so many sampled frames."""


@options
class CleaningOptions:
    """Which matches become labels; the defaults are GIM's."""

    static_px: NotNegative = 1.0
    """Matches that move less than this in x and in y are overlays (watermarks); 0 keeps them."""
    fit_px: Positive = 0.5
    """Distance to epipolar lines (MAGSAC) up to which matches are kept, pixels."""
    min_labels: Count = 1
    """Pairs with fewer are noted as failed."""


@options
class MaskOptions:
    """What labels keep off."""

    masks: str = "auto"
    """auto: people, sky and cars where the segmentation's weights are here; segment: always; none;
    a folder of masks named as the frames; or one image for all frames."""
    mask_erode: CountOrNone = 4
    """Labels keep this many pixels away from masked ones."""


@options
class RoundOptions:
    """How a round of a labeller is run."""

    shard: str | None = None
    """i/N: only the i-th of N parts of every video, from 0. The command without it takes over what
    such jobs did, does what is left, and writes the labels."""
    retry_failed: bool = False
    """Try pairs again that have failed."""
    overwrite: bool = False
    """Begin anew."""

    def __post_init__(self) -> None:
        if self.part[1] > 1 and self.overwrite:
            raise InputError("A shard cannot begin anew what other shards are working on.")

    @property
    def part(self) -> tuple[int, int]:
        """Index of the shard, from 0, and their number."""
        return (0, 1) if self.shard is None else parse_shard(self.shard)


@options
class LabelOptions(
    LabellerOptions,
    SamplingOptions,
    CleaningOptions,
    MaskOptions,
    FrameFileOptions,
    SourceOptions,
    RoundOptions,
    WorkOptions,
    TuningOptions,
):
    """What ``gim-video label`` can be told."""


# -------------------------------------------------------------------------------------- propagation


@options
class PropagationOptions:
    """The constants of propagation."""

    preset: Literal["code", "paper"] = "code"
    """Constants of GIM's released code, or of its paper (1024 labels after a join, of points
    closer than a pixel)."""
    require: str = "all"
    """Labelling rounds that must have labelled all pairs around a start: all, any or a number."""
    start_labels_above: CountOrNone = 32
    """A start pair must have more labels than this in each of them."""
    join: Literal["pixel", "distance"] | None = None
    """Labels join where their points round to one pixel, or are nearest and close to each other.
    By default as the preset says: pixel (paper: distance)."""
    join_distance: Positive = 1.0
    """How close, in pixels."""
    min_joined: Count | None = None
    """Labels that must be left after a join, else the chain is shortened; 512 (paper: 1024)."""
    min_final: CountOrNone = 64
    """Labels that must be left after the last robust fit."""
    final_px: Positive = 1.0
    """Distance to epipolar lines (MAGSAC) up to which the last fit keeps labels, pixels."""
    reach: Count = 1000
    """Longest chain in largest steps."""
    memory_mb: CountOrNone = 1024
    """For sub-chains that are kept, per worker; less is slower, the labels are the same."""

    @pydantic.field_validator("require")
    @classmethod
    def _rounds(cls, value: str) -> str:
        if value not in ("all", "any") and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"require is {value!r}; it must be all, any or a positive number.")
        return value

    @property
    def by_distance(self) -> bool:
        """Whether labels join where points are close, instead of in one pixel."""
        return (self.join or ("distance" if self.preset == "paper" else "pixel")) == "distance"

    @property
    def fewest_joined(self) -> int:
        """Labels that must be left after a join."""
        return self.min_joined or (1024 if self.preset == "paper" else 512)

    def required(self, rounds: int) -> int:
        """How many of ``rounds`` labelling rounds must have a pair."""
        if self.require == "all":
            return rounds
        return 1 if self.require == "any" else int(self.require)

    def settings(self) -> dict[str, Any]:
        """What decides the labels, JSON-able."""
        return {
            "join": "distance" if self.by_distance else "pixel",
            "join_distance": self.join_distance,
            "start_labels_above": self.start_labels_above,
            "min_joined": self.fewest_joined,
            "min_final": self.min_final,
            "reach": self.reach,
            "require": self.require,
            "threshold": self.final_px,
            "confidence": FINAL_CONFIDENCE,
            "max_iterations": FINAL_ITERATIONS,
        }


@options
class ChoiceOptions:
    """Which labels."""

    videos: tuple[str, ...] = ()
    """Only these video ids."""
    labellers: tuple[str, ...] = ()
    """Only the labels of these matchers."""


@options
class PropagateOptions(ChoiceOptions, PropagationOptions):
    """What ``gim-video propagate`` can be told."""

    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: workers on the cluster of Ray, which sees the same folders."""
    workers: CountOrNone = 0
    """Worker processes for each video, or workers on Ray; the labels are the same."""
    overwrite: bool = False
    """Begin anew."""


@options
class VideoRunOptions(
    LabellerOptions,
    SamplingOptions,
    CleaningOptions,
    MaskOptions,
    FrameFileOptions,
    SourceOptions,
    PropagationOptions,
    RoundOptions,
    WorkOptions,
    TuningOptions,
):
    """What ``gim-video run`` can be told."""


@options
class ShowOptions:
    """What is drawn."""

    pairs: CountOrNone = 10
    """Random pairs of a video."""
    seed: CountOrNone = 3407
    """Of their choice."""
    lines: CountOrNone = 150
    """About how many labels of a pair have a line; all have a dot."""
    failures: CountOrNone = 24
    """Failures on the contact sheet."""
    max_size: tuple[Side, Side] = (1280, 720)
    """Width and height that frames are reduced to, pixels."""


@options
class ShowVideosOptions(ShowOptions):
    """What ``gim-video show`` can be told."""

    videos: tuple[str, ...] = ()
    """Only these video ids."""
