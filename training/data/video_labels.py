"""Propagated labels of videos (``gim-video propagate``) with their frames.

Labels are looked for in ``labels``: one h5 file, or a folder with such files or with a folder per
video. The frames of video ``V`` are looked for in ``frames`` (by default beside the labels): the
folder that ``gim-video label`` wrote (``V/video.json``), the video itself (``V.mp4``) or a folder
of its frames in order (``V/``). Frames out of a video file take a jump and some decoding each;
stored frames are much faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.geometry.frames import resize_points
from gim_hloc.images import read_rgb
from gim_hloc.options import options
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.source import PairSource, SourceOptions
from gim_hloc.training.video.folder import VideoFolder
from gim_hloc.training.video.frames import on_grid
from gim_hloc.training.video.propagated import PropagatedStore
from gim_hloc.videos import open_source

_VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


@options
class VideoOptions(SourceOptions):
    """Where labels and frames are. The defaults are those of ``training.md`` §3 (WALK)."""

    labels: Path  # h5 file, or folder of such files
    frames: Path | None = None  # see the module; None: beside the labels
    videos: tuple[str, ...] | None = None  # ids; None: all
    video_list: Path | None = None  # file with an id per line, in place of videos

    AUGMENT: ClassVar[Mapping[str, Any]] = {
        "photometric": "dark",
        "keep_scale": 0.5,
        "zoom0": (0.6, 1.0),
        "zoom1": (1.0, 1.4),
    }


class Frames:
    """Frames of one video by the index that labels use.

    Args:
        path: folder of ``gim-video``, video file, or folder of frames in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbered = (path / "video.json").is_file()
        self._source: Any = None

    def read(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB.

        Raises:
            InputError: the frame is not there or damaged.
        """
        if self._numbered:
            return read_rgb(VideoFolder(self.path).frame_path(index), upright=False)

        if self._source is None:
            self._source = open_source(self.path)
        position = int(on_grid(self._source, [index])[0])
        for frame in self._source.read([position]):
            rgb: np.ndarray = frame.rgb()
            return rgb
        raise InputError(f"{self.path} has no frame {index}.")

    def __getstate__(self) -> dict[str, Any]:
        # Opened again where it is needed: decoders cannot be sent to another process.
        return {**self.__dict__, "_source": None}


class VideoPairs(PairSource):
    """Pairs of frames of videos; each video is a scene."""

    def _take(self, videos: Sequence[str], pairs: Sequence[np.ndarray]) -> None:
        """Keep what there is: names of videos, and of each one (P, 2) frames asked for."""
        self._videos = list(videos)
        self._lengths = np.array([len(p) for p in pairs], dtype=np.int64)
        self._pairs = np.concatenate(
            [np.c_[np.full(len(p), k), p] for k, p in enumerate(pairs)]
        ).astype(np.int64)

    def scene_lengths(self) -> np.ndarray:
        """Pairs of each video."""
        return self._lengths

    def describe(self, index: int) -> str:
        """Video and frames asked for."""
        video, start, target = self._pairs[index]
        return f"{self.name} {self._videos[video]} {start} - {target}"


def wanted_videos(videos: tuple[str, ...] | None, listing: Path | None) -> tuple[str, ...] | None:
    """Ids of the videos to use; None: all.

    Args:
        videos: ids.
        listing: file with an id per line, in place of them.

    Raises:
        InputError: the file cannot be read.
    """
    if listing is None:
        return videos
    return tuple(read_text(listing, "list of videos").split())


class VideoLabels(VideoPairs):
    """Pairs of frames with labels; each video is a scene.

    Raises:
        InputError: no labels, no frames, or a damaged file.
    """

    def __init__(self, options: VideoOptions) -> None:
        super().__init__(options.name or "video", options.augmentation(), options.failures)
        wanted = wanted_videos(options.videos, options.video_list)
        stores: dict[str, PropagatedStore] = {}
        for path in _label_files(Path(options.labels)):
            store = PropagatedStore(path)
            if wanted is None or store.facts.video in wanted:
                if store.facts.video in stores:
                    raise InputError(
                        f"{path} and {stores[store.facts.video].path} hold labels of the same "
                        f"video {store.facts.video}: name the file to use, or move one away."
                    )
                stores[store.facts.video] = store
        missing = [name for name in wanted or () if name not in stores]
        if missing or not stores:
            raise InputError(
                f"{options.labels} holds no propagated labels of "
                f"{', '.join(missing[:10]) or 'any video'}: run `gim-video propagate`."
            )
        self._stores = [stores[name] for name in sorted(stores)]
        self._frames = [Frames(_find_frames(store, options)) for store in self._stores]
        pairs = [store.pairs() for store in self._stores]
        self._take([store.facts.video for store in self._stores], pairs)
        if not len(self._pairs):
            raise InputError(f"{options.labels} holds no pair with labels; all starts failed.")

    def load(self, index: int) -> RawPair:
        """Read labels and the two frames that they belong to."""
        video, start, target = (int(n) for n in self._pairs[index])
        store = self._stores[video]
        labels, (i, j) = store.read(start, target)
        image0, image1 = self._frames[video].read(i), self._frames[video].read(j)
        labels = labels.astype(np.float64)
        for image, columns in ((image0, slice(0, 2)), (image1, slice(2, 4))):
            # Frames may be stored smaller than the labels were made on.
            factor = np.array([image.shape[1], image.shape[0]]) / store.facts.size
            labels[:, columns] = resize_points(labels[:, columns], factor)
        name = store.facts.video
        return RawPair(
            image0=image0, image1=image1, names=(f"{name}/{i}", f"{name}/{j}"), labels=labels
        )


def _label_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist: it should hold propagated labels.")
    # Folders labels/ hold what propagation starts from.
    found = [*path.glob("*.h5"), *(p for p in path.glob("*/*.h5") if p.parent.name != "labels")]
    return sorted(p for p in found if not p.name.startswith("."))


def _find_frames(store: PropagatedStore, options: VideoOptions) -> Path:
    video = store.facts.video
    if options.frames is not None:
        roots = [Path(options.frames)]
        if roots[0].is_file() and roots[0].suffix.lower() in _VIDEOS:
            return roots[0]
    else:
        folder = Path(store.path).parent
        roots = [folder, folder.parent]
    for root in roots:
        for candidate in (root / video, root):
            if (candidate / "video.json").is_file() and (
                candidate.name == video or options.frames is not None
            ):
                return candidate
        for suffix in _VIDEOS:
            if (root / f"{video}{suffix}").is_file():
                return root / f"{video}{suffix}"
        if (root / video).is_dir():
            return root / video
    raise InputError(
        f"The frames of video {video} are neither in {roots[0]} nor in {roots[0] / video}: give "
        "frames."
    )
