"""``gim-video frames | label | propagate | show | run``: from videos to labels for training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError

if TYPE_CHECKING:
    from gim_hloc.training.video.folder import VideoFolder
    from gim_hloc.training.video.run import LabelOptions

logger = logging.getLogger(__name__)

_Video = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")]
_Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Write the sharpest frame of every time bucket, for gim-reconstruct.

    Buckets without motion since the last frame give none. OUT/frames.csv lists the times.
    """

    video: _Video
    """Video file, folder of images, YouTube id or address."""
    out: _Out
    """Folder of the images."""
    fps: float | None = None
    """One frame per bucket of 1/fps seconds; 2 if neither this nor --num is given."""
    num: int | None = None
    """As many buckets of equal length as this."""
    min_motion: float = 0.01
    """Least motion since the frame chosen last, as a share of the long side; 0 takes all."""
    start: float | None = None
    """First moment in seconds."""
    end: float | None = None
    """Last moment in seconds."""
    max_size: int | None = None
    """Reduce the long side to this many pixels."""
    format: Literal["jpg", "png"] = "jpg"
    """Of the images."""
    sequence_fps: float = 30.0
    """Frames per second of a folder of images."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Label pairs of near frames with matchers, in OUT/<video id>.

    Repeating the command does what is missing. Files made with other settings are refused.
    """

    video: _Video
    """Video file, folder of images, YouTube id or address, or a .txt file with one of these a
    line."""
    out: _Out
    """Folder of all videos."""
    labellers: tuple[str, ...] = ()
    """Names of matchers. Default: gim_dkm gim_loftr gim_lightglue sift where their weights are
    here, else aliked_lightglue disk_lightglue sift."""
    zoom: bool = True
    """Also match crops of what both frames show, enlarged alike."""
    zoom_base: str | None = None
    """Labeller whose plain labels say what to crop; the first by default."""
    zoom_box: tuple[int, int] | None = None
    """Height and width in pixels that crops are enlarged to; 900 1600 (SIFT: the frame)."""
    quality: str = "base"
    """Operating point of the labellers."""
    gap: int | None = None
    """Frames between sampled ones; 10 up to 30 frames per second, else 20."""
    steps: tuple[int, ...] | None = None
    """Frames between those of a pair; the gap, twice and four times it."""
    start: float | None = None
    """First moment in seconds. Videos of 15 minutes or more lose 5 at both ends by default."""
    end: float | None = None
    """Last moment in seconds."""
    limit: int | None = None
    """Only so many sampled frames."""
    masks: str = "auto"
    """What labels keep off. auto: people, sky and cars where the segmentation's weights are here;
    segment: always; none; a folder of masks named as the frames; or one image for all frames."""
    static_px: float = 1.0
    """Matches that move less than this are overlays (watermarks)."""
    fit_px: float = 0.5
    """Distance to epipolar lines up to which matches are kept, pixels."""
    max_size: int | None = None
    """Store frames reduced to this long side."""
    format: Literal["jpg", "png"] = "jpg"
    """Of the stored frames."""
    sequence_fps: float = 30.0
    """Frames per second of a folder of images."""
    devices: tuple[str, ...] = ("auto",)
    """One worker a device; the same name twice makes two workers on it."""
    ray: bool = False
    """Start the workers on Ray's cluster."""
    shard: str = "0/1"
    """i/N: the i-th of N parts of every video, from 0. Then once without, to merge."""
    retry_failed: bool = False
    """Try pairs again that have failed."""
    overwrite: bool = False
    """Begin the labels anew."""


@dataclass(frozen=True, kw_only=True)
class Propagate:
    """Chain the labels of near frames to labels of far ones, in OUT/<video id>/propagated.h5.

    Beside it, propagated.csv and propagated.json say what became of every start frame. Repeating
    the command does what is missing.
    """

    out: _Out
    """Folder of all labelled videos, or of one."""
    videos: tuple[str, ...] = ()
    """Only these video ids."""
    labellers: tuple[str, ...] = ()
    """Only the labels of these matchers."""
    preset: Literal["code", "paper"] = "code"
    """Constants of GIM's released code, or of its paper (1024 labels after a join, of points
    closer than a pixel)."""
    require: str = "all"
    """Labelling rounds that must have labelled all pairs around a start: all, any or a number."""
    start_labels_above: int | None = None
    """A start pair must have more labels than this in each of them; 32."""
    join: Literal["pixel", "distance"] | None = None
    """Labels join where their points round to one pixel, or are close to each other."""
    join_distance: float | None = None
    """How close, in pixels; 1."""
    min_joined: int | None = None
    """Labels that must be left after a join; 512 (paper: 1024)."""
    min_final: int | None = None
    """Labels that must be left after the last robust fit; 64."""
    reach: int | None = None
    """Longest chain in largest steps; 1000."""
    fit_px: float | None = None
    """Distance to epipolar lines up to which the last fit keeps labels, pixels; 1."""
    workers: int = 1
    """Processes for each video."""
    memory_mb: int = 1024
    """For sub-chains that are kept, per process; less is slower, the labels are the same."""
    overwrite: bool = False
    """Begin anew."""


@dataclass(frozen=True, kw_only=True)
class Run(Label):
    """Everything in order: label, propagate, show.

    Repeating the command does what is missing.
    """

    preset: Literal["code", "paper"] = "code"
    """Constants of propagation: those of GIM's released code, or of its paper."""
    require: str = "all"
    """Labelling rounds that must have labelled all pairs around a start: all, any or a number."""
    min_joined: int | None = None
    """Labels that must be left after a join; 512 (paper: 1024)."""
    min_final: int | None = None
    """Labels that must be left after the last robust fit; 64."""
    workers: int = 1
    """Processes that propagate."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Draw random propagated pairs, a sheet (HTML) of every video, and what failed with reasons.

    In OUT/<video id>/show: sheet.html, pairs/<i>_<j>.jpg, failures.jpg.
    """

    out: _Out
    """Folder of all labelled videos, or of one."""
    videos: tuple[str, ...] = ()
    """Only these video ids."""
    pairs: int = 10
    """Random pairs of a video."""
    seed: int = 3407
    """Of their choice."""
    lines: int = 150
    """About how many labels of a pair have a line; all have a dot."""
    failures: int = 24
    """Failures on the contact sheet."""
    max_size: tuple[int, int] = (1280, 720)
    """Width and height that frames are reduced to, pixels."""


_Command = (
    Annotated[Frames, tyro.conf.subcommand("frames")]
    | Annotated[Label, tyro.conf.subcommand("label")]
    | Annotated[Propagate, tyro.conf.subcommand("propagate")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Run, tyro.conf.subcommand("run")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    command: Any = common.parse(
        _Command,
        prog="gim-video",
        args=common.prog(argv),
        description="From videos to labels for training.",
    )
    common.configure_logging()
    actions: dict[type, Callable[[Any], int]] = {
        Frames: _frames,
        Label: _label,
        Propagate: _propagate,
        Show: _show,
        Run: _run,
    }
    return common.run(lambda: actions[type(command)](command))


def _frames(command: Frames) -> int:
    from gim_hloc.training.video.frames import PickOptions, open_source, pick_frames
    from gim_hloc.training.video.sources import download, find_source

    options = PickOptions(
        fps=2.0 if command.fps is None and command.num is None else command.fps,
        num=command.num,
        min_motion=command.min_motion,
        start=command.start,
        end=command.end,
        max_size=command.max_size,
        image_format=command.format,
    )
    source = find_source(command.video)
    path = source.path or download(source.id, command.out.parent / "downloads")
    video = open_source(path, fps=command.sequence_fps)
    report = pick_frames(video, command.out, options, prefix=source.id, progress=True)
    sys.stdout.write(
        f"{len(report.frames)} of {len(video.times)} frames written to {command.out}; "
        f"{report.still} of {report.buckets} time buckets left out for lack of motion"
        + (" (--min-motion 0 keeps them)" if report.still else "")
        + f". Next: gim-reconstruct {command.out} OUTPUT\n"
        + "".join(f"{path}: {remark}\n" for remark in video.remarks)
    )
    return 0


def _label_options(command: Label) -> LabelOptions:
    from gim_hloc.training.video.labels import RoundOptions
    from gim_hloc.training.video.masks import MaskOptions
    from gim_hloc.training.video.run import LabelOptions
    from gim_hloc.training.video.sampling import SamplingOptions

    try:
        part, count = (int(value) for value in command.shard.split("/"))
    except ValueError:
        raise InputError(f"--shard is {command.shard!r}; give i/N, for instance 0/4.") from None
    return LabelOptions(
        labellers=command.labellers,
        zoom=command.zoom,
        sampling=SamplingOptions(
            gap=command.gap,
            steps=command.steps,
            start=command.start,
            end=command.end,
            limit=command.limit,
        ),
        rounds=RoundOptions(
            quality=command.quality,
            zoom_base=command.zoom_base,
            zoom_box=command.zoom_box,
            static_px=command.static_px,
            fit_px=command.fit_px,
        ),
        masks=MaskOptions(masks=command.masks),
        max_size=command.max_size,
        image_format=command.format,
        sequence_fps=command.sequence_fps,
        devices=command.devices,
        backend="ray" if command.ray else "processes",
        shard=(part, count),
        retry_failed=command.retry_failed,
        overwrite=command.overwrite,
        progress=True,
    )


def _label(command: Label) -> int:
    done, failed = _label_videos(command)
    if failed:
        count = len(done) + len(failed)
        raise InputError(f"{len(failed)} of {count} videos failed: {', '.join(failed)}.")
    return 0


def _label_videos(command: Label) -> tuple[list[str], list[str]]:
    """Ids of the videos that were labelled and of those that could not be."""
    from gim_hloc.training.video.run import label_video
    from gim_hloc.training.video.sources import find_sources

    options = _label_options(command)
    sources = find_sources([command.video])
    done, failed = [], []
    for source in sources:
        try:
            report = label_video(source, command.out, options)
        except GimError as error:
            # The other videos of a list must not wait for this one.
            if len(sources) == 1:
                raise
            logger.error("%s: %s", source.id, error)
            failed.append(source.id)
            continue
        sys.stdout.write("\n".join(report.lines()) + "\n")
        done.append(source.id)
    return done, failed


def _run(command: Run) -> int:
    if command.shard.rpartition("/")[2] != "1":
        raise InputError(
            f"--shard {command.shard}: propagation needs all labels. Label in shards, then run."
        )
    done, failed = _label_videos(command)
    if done:
        _propagate(
            Propagate(
                out=command.out,
                videos=tuple(done),
                labellers=command.labellers,
                preset=command.preset,
                require=command.require,
                min_joined=command.min_joined,
                min_final=command.min_final,
                workers=command.workers,
                overwrite=command.overwrite,
            )
        )
        _show(Show(out=command.out, videos=tuple(done)))
    if failed:
        count = len(done) + len(failed)
        raise InputError(f"{len(failed)} of {count} videos failed: {', '.join(failed)}.")
    return 0


def _chosen_videos(out: Path, ids: Sequence[str]) -> list[VideoFolder]:
    from gim_hloc.training.video.folder import find_videos

    videos = find_videos(out)
    unknown = sorted(set(ids) - {video.id for video in videos})
    if unknown:
        raise InputError(
            f"{out} has no video {', '.join(unknown)}; it has: "
            f"{', '.join(video.id for video in videos)}."
        )
    return [video for video in videos if not ids or video.id in ids]


def _propagate(command: Propagate) -> int:
    from gim_hloc.training.video.propagation import make_options, propagate_folder

    overrides = {
        "start_labels_above": command.start_labels_above,
        "join": command.join,
        "join_distance": command.join_distance,
        "min_joined": command.min_joined,
        "min_final": command.min_final,
        "reach": command.reach,
        "threshold": command.fit_px,
    }
    options = make_options(
        command.preset,
        require=command.require,
        memory_mb=command.memory_mb,
        **{key: value for key, value in overrides.items() if value is not None},
    )
    videos = _chosen_videos(command.out, command.videos)
    failed = []
    for video in videos:
        try:
            summary = propagate_folder(
                video,
                options,
                labellers=command.labellers or None,
                workers=command.workers,
                overwrite=command.overwrite,
                progress=True,
            )
        except GimError as error:
            # The other videos must not wait for this one.
            if len(videos) == 1:
                raise
            logger.error("%s: %s", video.id, error)
            failed.append(video.id)
            continue
        sys.stdout.write(f"{summary.path}\n{summary.path.with_suffix('.csv')}\n")
    if failed:
        raise InputError(f"{len(failed)} of {len(videos)} videos failed: {', '.join(failed)}.")
    return 0


def _show(command: Show) -> int:
    from gim_hloc.training.video.show import ShowOptions, show_folder

    options = ShowOptions(
        pairs=command.pairs,
        seed=command.seed,
        lines=command.lines,
        failures=command.failures,
        max_size=command.max_size,
    )
    videos = _chosen_videos(command.out, command.videos)
    failed = []
    for video in videos:
        try:
            report = show_folder(video, options=options)
        except GimError as error:
            if len(videos) == 1:
                raise
            logger.error("%s: %s", video.id, error)
            failed.append(video.id)
            continue
        sys.stdout.write(
            f"{report.sheet}: {len(report.figures)} pair{'s' * (len(report.figures) != 1)} drawn"
            + (f", failures in {report.contact}" if report.contact else "")
            + "\n"
        )
    if failed:
        raise InputError(f"{len(failed)} of {len(videos)} videos failed: {', '.join(failed)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
