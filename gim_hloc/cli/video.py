"""``gim-video frames | label | propagate | show | run``: from videos to labels for training."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError
from gim_hloc.options import WorkOptions, select
from gim_hloc.training.video.options import (
    LabelOptions,
    PropagateOptions,
    PropagationOptions,
    ShowOptions,
    ShowVideosOptions,
    VideoFramesOptions,
    VideoRunOptions,
)

logger = logging.getLogger(__name__)

_DESCRIPTION = """From videos to labels for training.

Examples:
  gim-video frames walk.mp4 images --fps 2
  gim-video run walk.mp4 videos --labellers aliked_lightglue sift
  gim-video label list.txt videos --shard 0/8
  gim-video propagate videos --preset paper --workers 8

Exit codes: 0 done, 2 wrong input or options, or a video of several failed, 3 the folder is in use.
A command that was stopped or killed goes on when it is repeated."""

_VIDEO = "Video file, folder of images, YouTube id or address"
_LISTS = f"{_VIDEO}, or a .txt file with one of these a line."
_VIDEOS = "Folder of all labelled videos, or of one."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    commands = {
        "frames": _frames,
        "label": _label,
        "propagate": _propagate,
        "show": _show,
        "run": _run,
    }
    return common.dispatch(commands, argv, prog="gim-video", description=_DESCRIPTION)


def _parsed(
    kind: type[Any], command: Callable[..., int], argv: Sequence[str], **positionals: str
) -> tuple[Any, dict[str, Any], common.Terminal]:
    options, places, terminal = common.parse_options(
        kind,
        argv,
        prog=f"gim-video {command.__name__.strip('_')}",
        description=inspect.getdoc(command) or "",
        positionals=positionals,
        texts=("video",),
    )
    common.configure_logging(terminal.verbose, terminal.quiet)
    return options, places, terminal


def _frames(argv: Sequence[str]) -> int:
    """Write the sharpest frame of every time bucket, for gim-reconstruct.

    Buckets without motion since the last frame give none. OUT/frames.csv lists the times.
    """
    options, places, terminal = _parsed(
        VideoFramesOptions, _frames, argv, video=f"{_VIDEO}.", out="Folder of the images."
    )

    def work() -> None:
        from gim_hloc.picks import pick_frames
        from gim_hloc.training.video.sources import download, find_source
        from gim_hloc.videos import open_source

        out = places["out"]
        source = find_source(places["video"])
        path = source.path or download(
            source.id, out.parent / "downloads", max_height=options.max_height
        )
        video = open_source(path, fps=options.sequence_fps)
        report = pick_frames(video, out, options, prefix=source.id, progress=terminal.bars)
        _say(
            terminal,
            f"{len(report.frames)} of {len(video.times)} frames written to {out}; "
            f"{report.still} of {report.buckets} time buckets left out for lack of motion"
            + (" (--min-motion 0 keeps them)" if report.still else "")
            + f". Next: gim-reconstruct {out} OUTPUT\n"
            + "".join(f"{path}: {remark}\n" for remark in video.remarks),
            [dataclasses.asdict(frame) for frame in report.frames],
        )

    return common.run(work)


def _label(argv: Sequence[str]) -> int:
    """Label pairs of near frames with matchers, in OUT/<video id>.

    Repeating the command does what is missing. Labels of other settings stand until the new ones
    are complete, and are kept for when the settings come back.
    """
    options, places, terminal = _parsed(
        LabelOptions, _label, argv, video=_LISTS, out="Folder of all videos."
    )

    def work() -> None:
        _check(*_label_videos(places["video"], places["out"], options, terminal))

    return common.run(work)


def _propagate(argv: Sequence[str]) -> int:
    """Chain the labels of near frames to labels of far ones, in OUT/<video id>/propagated.h5.

    Beside it, propagated.csv and propagated.json say what became of every start frame. Repeating
    the command does what is missing.
    """
    options, places, terminal = _parsed(PropagateOptions, _propagate, argv, out=_VIDEOS)
    return common.run(
        lambda: _check(*_propagate_videos(places["out"], options.videos, options, terminal))
    )


def _show(argv: Sequence[str]) -> int:
    """Draw random propagated pairs, a sheet (HTML) of every video, and what failed with reasons.

    In OUT/<video id>/show: sheet.html, pairs/<i>_<j>.jpg, failures.jpg.
    """
    options, places, terminal = _parsed(ShowVideosOptions, _show, argv, out=_VIDEOS)
    return common.run(
        lambda: _check(*_show_videos(places["out"], options.videos, options, terminal))
    )


def _run(argv: Sequence[str]) -> int:
    """Everything in order: label, propagate, show. Repeating the command does what is missing."""
    options, places, terminal = _parsed(
        VideoRunOptions, _run, argv, video=_LISTS, out="Folder of all videos."
    )

    def work() -> None:
        if options.part[1] > 1:
            raise InputError(
                f"--shard {options.shard}: propagation needs all labels. Label in shards, then run."
            )
        out = places["out"]
        done, failed = _label_videos(places["video"], out, select(LabelOptions, options), terminal)
        if done:
            _check(*_propagate_videos(out, done, options, terminal))
            _check(*_show_videos(out, done, ShowOptions(), terminal))
        _check(done, failed)

    return common.run(work)


# ------------------------------------------------------------------------------------------- videos


def _label_videos(
    video: str, out: Path, options: LabelOptions, terminal: common.Terminal
) -> tuple[list[str], list[str]]:
    from gim_hloc.training.video.run import label_video
    from gim_hloc.training.video.sources import find_sources

    def label(source: Any) -> None:
        report = label_video(source, out, options, progress=terminal.bars)
        about = {
            "video": source.id,
            "frames": len(report.plan.frames),
            "pairs": len(report.plan.pairs),
            "rounds": [dataclasses.asdict(one) for one in report.rounds],
            "remarks": report.remarks,
        }
        _say(terminal, "\n".join(report.lines()) + "\n", about)

    return _each(find_sources([video]), label)


def _propagate_videos(
    out: Path,
    ids: Sequence[str],
    options: PropagateOptions | VideoRunOptions,
    terminal: common.Terminal,
) -> tuple[list[str], list[str]]:
    from gim_hloc.training.video.propagation import propagate_folder

    # The processor does all of it.
    where = WorkOptions(engine=options.engine, workers=options.workers, device="cpu").where

    def propagate(video: Any) -> None:
        summary = propagate_folder(
            video,
            select(PropagationOptions, options),
            labellers=options.labellers,
            where=where,
            overwrite=options.overwrite,
            progress=terminal.bars,
        )
        text = f"{summary.path}\n{summary.path.with_suffix('.csv')}\n"
        _say(terminal, text, json.loads(summary.to_json()))

    return _each(_chosen(out, ids), propagate)


def _show_videos(
    out: Path, ids: Sequence[str], options: ShowOptions, terminal: common.Terminal
) -> tuple[list[str], list[str]]:
    from gim_hloc.training.video.show import show_folder

    def show(video: Any) -> None:
        report = show_folder(video, options=options)
        _say(
            terminal,
            f"{report.sheet}: {len(report.figures)} pair{'s' * (len(report.figures) != 1)} drawn"
            + (f", failures in {report.contact}" if report.contact else "")
            + "\n",
            dataclasses.asdict(report),
        )

    return _each(_chosen(out, ids), show)


def _chosen(out: Path, ids: Sequence[str]) -> list[Any]:
    """Folders of videos, of all where none is named."""
    from gim_hloc.training.video.folder import find_videos

    videos = find_videos(out)
    unknown = sorted(set(ids) - {video.id for video in videos})
    if unknown:
        raise InputError(
            f"{out} has no video {', '.join(unknown)}; it has: "
            f"{', '.join(video.id for video in videos)}."
        )
    return [video for video in videos if not ids or video.id in ids]


def _each(videos: Iterable[Any], work: Callable[[Any], None]) -> tuple[list[str], list[str]]:
    """Work on videos, of which one that fails does not hold up others; ids of done and failed."""
    videos = list(videos)
    done, failed = [], []
    for video in videos:
        try:
            work(video)
        except GimError as error:
            if len(videos) == 1:
                raise
            logger.error("%s: %s", video.id, error)
            failed.append(video.id)
        else:
            done.append(video.id)
    return done, failed


def _check(done: Sequence[str], failed: Sequence[str]) -> None:
    if failed:
        count = len(done) + len(failed)
        raise InputError(f"{len(failed)} of {count} videos failed: {', '.join(failed)}.")


def _say(terminal: common.Terminal, text: str, about: Any) -> None:
    """Tell a result: to scripts a line of JSON a video."""
    if terminal.json:
        sys.stdout.write(json.dumps(about, default=str) + "\n")
    elif not terminal.quiet:
        sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
