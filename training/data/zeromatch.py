"""Propagated labels as GIM's own pipeline stores them, so that such folders need not be made anew.

Below ``root`` (``data/ZeroMatch`` there)::

    propagate/<rounds and constants>/<video>/<a>_<b>.npy   float32 rows: i, j, i, j; then
                                                           x0, y0, x1, y1 in frame pixels
    propagate/<rounds and constants>/<video>/bad_pairs.txt lines "a b": pairs to leave out
    image_1080p/<video>/<i>.png                            frames, red and blue exchanged
    video_1080p/<video>.mp4                                where the frames are not there

The name of a file says which frames were asked for, its first row which the labels belong to. Frame
``i`` is what a decoder gives from ``i / F`` seconds on, ``F`` being the frame rate rounded *down*.
Our own labels (type ``video``) count frames and pixels otherwise, see ``docs/videos.md``; theirs
pool labels that differ by half a pixel, which nothing in the files can undo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.images import read_rgb
from gim_hloc.options import options
from gim_hloc.pickles import read_npz
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.source import SourceOptions
from gim_hloc.training.data.video_labels import VideoOptions, VideoPairs, wanted_videos
from gim_hloc.videos import open_source

_NAME = re.compile(r"(\d+)_(\d+)\.npy")
_LATE = 1e-6  # s: rounding of a time stamp


@options
class ZeroMatchOptions(SourceOptions):
    """Where labels and frames are."""

    root: Path  # folder with propagate/, image_1080p/, video_1080p/
    labels: Path | None = None  # folder of the videos' labels; None: the only one in propagate/
    frames: Path | None = None  # None: root/image_1080p, or root/video_1080p
    exchanged: bool = True  # stored frames have red and blue exchanged, as GIM's pipeline writes
    # them; false for frames that look right
    videos: tuple[str, ...] | None = None  # ids; None: all
    video_list: Path | None = None  # file with an id per line, in place of videos

    AUGMENT: ClassVar[Mapping[str, Any]] = VideoOptions.AUGMENT


class ZeroMatch(VideoPairs):
    """Pairs of frames with labels; each video is a scene.

    Raises:
        InputError: no labels or no frames.
    """

    def __init__(self, options: ZeroMatchOptions) -> None:
        super().__init__(options.name or "zeromatch", options.augmentation(), options.failures)
        root = Path(options.root)
        labels = Path(options.labels) if options.labels is not None else _only_folder(root)
        if not labels.is_dir():
            raise InputError(f"{labels} does not exist: it should hold a folder of labels a video.")
        wanted = wanted_videos(options.videos, options.video_list)
        there = sorted(p.name for p in labels.iterdir() if p.is_dir())
        missing = [name for name in wanted or () if name not in there]
        if missing:
            raise InputError(f"{labels} has no labels of the videos {', '.join(missing[:10])}.")
        self._folders: list[Path] = []
        self._frames: list[_Frames] = []
        pairs = []
        for name in sorted(set(wanted)) if wanted is not None else there:
            found = _pairs(labels / name)
            if not len(found):
                continue
            pairs.append(found)
            self._folders.append(labels / name)
            self._frames.append(_find_frames(root, name, options))
        if not pairs:
            raise InputError(f"{labels} holds no labels: <video>/<a>_<b>.npy was looked for.")
        self._take([folder.name for folder in self._folders], pairs)

    def load(self, index: int) -> RawPair:
        """Read labels and the two frames that they belong to."""
        video, a, b = (int(n) for n in self._pairs[index])
        folder, frames = self._folders[video], self._frames[video]
        labels, (i, j) = read_labels(folder / f"{a}_{b}.npy")
        image0, image1 = frames.read(i), frames.read(j)
        for image, points in ((image0, labels[:, :2]), (image1, labels[:, 2:])):
            rows, columns = image.shape[:2]
            if (points < -1).any() or (points > (columns, rows)).any():
                raise InputError(
                    f"{folder / f'{a}_{b}.npy'} has labels outside its frames of {columns} x {rows}"
                    f" pixels in {frames.path}: they are of frames of another size."
                )
        names = (f"{folder.name}/{i}", f"{folder.name}/{j}")
        return RawPair(image0=image0, image1=image1, names=names, labels=labels)


def read_labels(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """One file of propagated labels; nothing in it is ever unpickled.

    Args:
        path: ``<a>_<b>.npy``.

    Returns:
        (n, 4) float64 x0, y0, x1, y1 in frame pixels, and the frames (i, j) they belong to.

    Raises:
        InputError: missing, damaged, or something else.
    """
    try:
        rows = read_npz(path).get("")
    except InputError as error:
        raise InputError(f"The labels {path} cannot be read: {error}") from None
    if rows is None or rows.dtype.hasobject:
        raise InputError(f"The labels {path} cannot be read: they are not one array of numbers.")
    if rows.dtype.kind not in "fiu" or rows.ndim != 2 or rows.shape[1] != 4 or len(rows) < 2:
        raise InputError(f"{path} does not hold rows of four numbers: frames, then labels.")
    rows = rows.astype(np.float64)
    i, j = rows[0, :2]
    if not np.isfinite(rows).all() or (rows[0] % 1).any() or i < 0 or j <= i:
        raise InputError(f"{path} does not begin with its two frames, or holds no numbers.")
    if (rows[0, 2:] != rows[0, :2]).any():
        raise InputError(f"{path} does not begin with its two frames, each named twice.")
    return rows[1:], (int(i), int(j))


class _Frames:
    """Frames of one video: stored images, or the video itself."""

    def __init__(self, path: Path, exchanged: bool) -> None:
        self.path = path
        self._exchanged = exchanged
        self._source: Any = None

    def read(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB."""
        if self.path.is_dir():
            rgb = read_rgb(self.path / f"{index}.png", upright=False)
            return np.ascontiguousarray(rgb[:, :, ::-1]) if self._exchanged else rgb

        if self._source is None:
            self._source = open_source(self.path)
        times, per_second = self._source.times, max(1, int(self._source.fps))
        position = int(np.searchsorted(times, index / per_second - _LATE))
        for frame in self._source.read([position]) if position < len(times) else ():
            decoded: np.ndarray = frame.rgb()
            return decoded
        raise InputError(f"{self.path} ends before frame {index}.")

    def __getstate__(self) -> dict[str, Any]:
        # Opened again where it is needed: decoders cannot be sent to another process.
        return {**self.__dict__, "_source": None}


def _only_folder(root: Path) -> Path:
    """The folder in ``propagate/``, whose name says rounds and constants."""
    parent = root / "propagate"
    found = sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        names = "; ".join(p.name for p in found)
        raise InputError(f"{parent} holds several sets of labels: give one as labels. {names}")
    raise InputError(f"{parent} holds no labels: give their folder as labels.")


def _pairs(folder: Path) -> np.ndarray:
    """(P, 2) frames asked for, sorted, without those of ``bad_pairs.txt``."""
    found = {(int(m[1]), int(m[2])) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))}
    listing = folder / "bad_pairs.txt"
    if listing.is_file():
        # Workers append to it without a lock: a torn line names no pair.
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            if len(words) == 2 and all(word.isdecimal() for word in words):
                found.discard((int(words[0]), int(words[1])))
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def _find_frames(root: Path, video: str, options: ZeroMatchOptions) -> _Frames:
    if options.frames is not None:
        places = [Path(options.frames) / video, Path(options.frames) / f"{video}.mp4"]
    else:
        places = [root / "image_1080p" / video, root / "video_1080p" / f"{video}.mp4"]
    for place in places:
        if place.exists():
            return _Frames(place, options.exchanged)
    raise InputError(
        f"The frames of video {video} are neither in {places[0]} nor in {places[1]}: give frames."
    )
