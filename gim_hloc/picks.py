"""Frames for a reconstruction: the sharpest of every stretch of time that shows motion."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from gim_hloc.errors import OutputError
from gim_hloc.files import write_atomic
from gim_hloc.lock import FolderLock
from gim_hloc.options import FramesOptions
from gim_hloc.videos import Frame, FrameSource, frame_file, time_between, warn_of_damage

_COLUMNS = ("file", "index", "time_s", "sharpness", "motion")
_ALIKE = 30  # grey levels by which the surroundings of a tracked corner differ at most
_PICKED_FPS = 2.0  # frames a second that a reconstruction gets by default
_SHARPNESS_SIZE = 960  # px: long side at which sharpness is judged
_MOTION_SIZE = 480  # px: long side at which motion is measured


@dataclass(frozen=True, kw_only=True)
class Picked:
    """One chosen frame."""

    path: Path
    index: int  # in display order
    time: float  # s after the first frame
    sharpness: float  # variance of the Laplacian of the gray image in [0, 255]
    motion: float  # since the frame chosen before, share of the long side; nan for the first


@dataclass(kw_only=True)
class PickReport:
    """What `pick_frames` did."""

    frames: list[Picked] = field(default_factory=list)
    buckets: int = 0  # time buckets with frames
    still: int = 0  # buckets left out for lack of motion
    damaged: int = 0  # see `FrameSource`


def choose_frames(
    source: FrameSource,
    options: FramesOptions,
    path_of: Callable[[int], Path],
    report: PickReport,
    *,
    progress: bool = False,
) -> Iterator[tuple[Picked, bytes]]:
    """The sharpest frame of every time bucket, leaving out those without motion.

    A bucket whose sharpest frame moved less than ``min_motion`` since the last chosen one gives
    none: reconstruction gains nothing from views of one place.

    Args:
        source: the video.
        options: which frames, and how they are stored.
        path_of: index of a frame -> path of its image, which is not written here.
        report: of what was done so far, filled in.
        progress: show a progress bar.

    Yields:
        The frames and the content of their files.

    Raises:
        InputError: the range is empty, or the video cannot be read.
    """
    start, end, width, buckets = _buckets(source, options)
    inside = np.flatnonzero((source.times >= start) & (source.times <= end))

    def bucket_of(frame: Frame) -> int:
        return min(buckets - 1, int((frame.time - start) / width + 1e-9))

    bar = tqdm(
        source.read(inside.tolist()),
        total=len(inside),
        desc="frames",
        unit="frame",
        disable=None if progress else True,
    )
    chosen: np.ndarray | None = None  # the last one, to measure motion from
    for _, frames in itertools.groupby(bar, bucket_of):
        judged = ((measure_sharpness(frame.gray(_SHARPNESS_SIZE)), frame) for frame in frames)
        sharpness, frame = max(judged, key=lambda pair: pair[0])
        report.buckets += 1
        gray = frame.gray(_MOTION_SIZE)
        motion = math.nan if chosen is None else measure_motion(chosen, gray)
        if motion < options.min_motion:
            report.still += 1
            continue
        chosen = gray
        picked = Picked(
            path=path_of(frame.index),
            index=frame.index,
            time=frame.time,
            sharpness=sharpness,
            motion=motion,
        )
        report.frames.append(picked)
        yield picked, frame_file(frame.rgb(), options)
    report.damaged = source.damaged
    warn_of_damage(source)


def pick_frames(
    source: FrameSource,
    out: str | os.PathLike[str],
    options: FramesOptions,
    *,
    prefix: str = "frame",
    progress: bool = False,
) -> PickReport:
    """Write chosen frames (see `choose_frames`) into a folder that may hold others.

    Beside the images, ``frames.csv`` lists file, index, time, sharpness and motion. Frames of the
    same video that an earlier run has listed there and this one does not choose are deleted; those
    of other videos stay.

    Files are ``<prefix>_<index>.jpg`` or ``.png`` in the folder ``out``, which is made if needed.

    Raises:
        InputError: the range is empty, or the video cannot be read.
        LockedError: another run writes to the folder.
        OutputError: the folder cannot be written, or has a ``frames.csv`` of something else.
    """
    _buckets(source, options)  # an empty range is refused before the folder is made
    out = Path(out)
    report = PickReport()
    with FolderLock(out):
        listing = _Listing(out / "frames.csv", prefix)
        name = f"{prefix}_{{:06d}}.{options.format}"
        chosen = choose_frames(
            source, options, lambda index: out / name.format(index), report, progress=progress
        )
        for picked, content in chosen:
            listing.add(picked)
            try:
                write_atomic(picked.path, content)
            except OSError as error:
                raise OutputError(f"{picked.path} cannot be written: {error}.") from error
        listing.finish(report.frames)
    return report


def _buckets(source: FrameSource, options: FramesOptions) -> tuple[float, float, float, int]:
    """Start, end and width of the time buckets in seconds, and their number."""
    duration = float(source.times[-1])
    start, end = 0.0, 0.0
    if duration > 0:
        start, end = time_between(duration, options.start, options.end)
    # The last frame is shown for a while too: otherwise it would have a bucket of its own.
    shown = end - start + 1 / source.fps
    fps = options.fps or _PICKED_FPS
    buckets = options.num or max(1, math.ceil(shown * fps - 1e-6))
    if options.num is None and options.max_frames is not None and buckets > options.max_frames:
        return start, end, shown / options.max_frames, options.max_frames
    return start, end, shown / buckets if options.num else 1 / fps, buckets


def measure_sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian of a gray image (H, W) uint8: comparable within one scene only."""
    return float(cv2.Laplacian(gray, cv2.CV_32F).var())


def measure_motion(before: np.ndarray, after: np.ndarray) -> float:
    """Median displacement of corners between two gray images, as a share of the long side.

    Corners are tracked there and back by pyramidal Lucas-Kanade. Where fewer than a fifth of them
    survive, the view has changed beyond what that can follow: 1.

    Args:
        before: (H, W) uint8.
        after: of the same size.
    """
    corners = cv2.goodFeaturesToTrack(before, 400, 0.01, 5)
    if corners is None or len(corners) < 8:
        # Nothing to track: compare the images as a whole.
        return float(np.abs(before.astype(np.float32) - after).mean() > 2.0)
    window = {"winSize": (21, 21), "maxLevel": 4}
    there, good, error = cv2.calcOpticalFlowPyrLK(before, after, corners, None, **window)  # type: ignore[call-overload]
    back, good_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **window)  # type: ignore[call-overload]
    closed = np.linalg.norm((back - corners).reshape(-1, 2), axis=1) < 1.0
    alike = error.ravel() < _ALIKE
    kept = (good.ravel() == 1) & (good_back.ravel() == 1) & closed & alike
    if kept.sum() < len(corners) / 5:
        return 1.0
    shift = np.linalg.norm((there - corners).reshape(-1, 2)[kept], axis=1)
    return float(np.median(shift) / max(before.shape))


def frames_csv(frames: Sequence[Picked]) -> str:
    """Content of a ``frames.csv``: file, index, time, sharpness and motion."""
    return _csv([_COLUMNS, *map(_row, frames)])


def _row(frame: Picked) -> list[str]:
    motion = "" if math.isnan(frame.motion) else f"{frame.motion:.5f}"
    numbers = [str(frame.index), f"{frame.time:.6f}", f"{frame.sharpness:.2f}", motion]
    return [frame.path.name, *numbers]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class _Listing:
    """The file ``frames.csv``: frames of this run, and of other videos in the same folder.

    What an earlier run on the same video has listed stays until the end of this one.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self._path = path
        mine = re.compile(rf"{re.escape(prefix)}_\d+\.(jpg|png)")
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = list(csv.reader(file))
            if rows[:1] != [list(_COLUMNS)]:
                raise OutputError(
                    f"{path} is no list of gim-video, which would be replaced: move it away, or "
                    "choose another folder."
                )
            rows = [row for row in rows if len(row) == len(_COLUMNS)]
        self._others = [r for r in rows[1:] if not mine.fullmatch(r[0])]
        self._before = [r for r in rows[1:] if mine.fullmatch(r[0])]
        self._write([*self._others, *self._before])

    def add(self, frame: Picked) -> None:
        """List a frame before it is written: what is listed is ours, all else the user's."""
        if frame.path.exists() and frame.path.name not in {row[0] for row in self._before}:
            raise OutputError(
                f"{frame.path} is in the way and no frame of gim-video: move it away, or choose "
                "another folder."
            )
        try:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                file.write(_csv([_row(frame)]))
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error}.") from error

    def finish(self, frames: Sequence[Picked]) -> None:
        """List these frames, and delete those of an earlier run that are not among them."""
        kept = {frame.path.name for frame in frames}
        for name in {row[0] for row in self._before} - kept:
            (self._path.parent / name).unlink(missing_ok=True)
        self._write([*self._others, *map(_row, frames)])

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        try:
            write_atomic(self._path, _csv([_COLUMNS, *rows]))
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error}.") from error
