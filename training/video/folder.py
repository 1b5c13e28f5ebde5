"""Where everything about one video is.

::

    OUT/<video id>/
        video.json              source, size, frame rate, settings of the frames
        frames.csv              frame, time, number in the file: one line per sampled frame
        frames/00000120.jpg     sampled frames; the number counts frames of the video's time grid
        masks/00000120.jpg.png  where labels may be (only with masks), black = left out
        labels/gim_dkm.h5       labels by labeller and round, finished: see `store`
        labels/gim_dkm-zoom.h5
        labels/gim_dkm.cache    what was labelled so far, and with other settings
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.options import ImageFormat
from gim_hloc.training.video.store import LabelStore

logger = logging.getLogger(__name__)

_OURS = ("frames", "frames.csv", "masks", "labels", "show", "propagated.h5")  # without video.json


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What ``video.json`` says of a video."""

    id: str  # also the name of its folder
    source: str  # path, or address
    digest: str  # of the file's packets or the folder's files: tells when another file is meant
    size: tuple[int, int]  # (width, height) of the stored frames, pixels
    fps: float  # mean frame rate by time stamps; frames of the time grid a second
    frames: int  # on the time grid, the whole video
    duration: float  # seconds
    image_format: ImageFormat  # of the stored frames
    quality: int  # of JPEG
    max_size: int | None  # frames were reduced to this long side, pixels

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the content of the stored frames."""
        keys = ("digest", "size", "fps", "image_format", "quality", "max_size")
        return {key: getattr(self, key) for key in keys}


class VideoFolder:
    """Paths and files of one video.

    Args:
        root: ``OUT/<video id>``; need not exist.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.frames = self.root / "frames"
        self.masks = self.root / "masks"
        self.labels = self.root / "labels"

    @property
    def id(self) -> str:
        """The video's id."""
        return self.root.name

    @property
    def info(self) -> VideoInfo:
        """What ``video.json`` says.

        Raises:
            InputError: the file is not there or damaged.
        """
        path = self.root / "video.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return VideoInfo(**{**values, "size": tuple(values["size"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.root} is not the folder of a labelled video ({path.name}: {error})."
            ) from error

    def write_info(self, info: VideoInfo) -> None:
        """Write ``video.json``.

        Raises:
            OutputError: the folder holds frames made with other settings or files that no run
                made, or cannot be written.
        """
        if (self.root / "video.json").exists():
            before = self.info
            different = [k for k, v in info.settings.items() if before.settings[k] != v]
            if different:
                raise OutputError(
                    f"{self.root} holds frames made with other settings ({', '.join(different)}): "
                    "choose another output folder, or delete this one."
                )
        elif found := [name for name in _OURS if (self.root / name).exists()]:
            raise OutputError(
                f"{self.root} holds {', '.join(found)} that gim-video did not make: choose another "
                "output folder, or move them away."
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / "video.json", json.dumps(asdict(info), indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"{self.root} cannot be written: {error}.") from error

    def frame_name(self, index: int) -> str:
        """Name of the image of a frame within ``frames``."""
        return f"{index:08d}.{self.info.image_format}"

    def frame_path(self, index: int) -> Path:
        """Path of the image of a frame."""
        return self.frames / self.frame_name(index)

    def label_path(self, labeller: str, zoom: bool) -> Path:
        """Path of the labels of a labeller."""
        return self.labels / f"{labeller}{'-zoom' if zoom else ''}.h5"

    def label_paths(self) -> list[Path]:
        """Files of finished labels, sorted."""
        return sorted(p for p in self.labels.glob("*.h5") if not p.name.startswith("."))

    def stores(self, labellers: Sequence[str] = ()) -> list[LabelStore]:
        """All finished labels, open for reading.

        Args:
            labellers: only of these; none takes all.

        Raises:
            InputError: there are none, or a file is damaged.
        """
        paths = self.label_paths()
        begun = {path.name.split(".")[0] for path in self.labels.glob("*.cache")}
        unfinished = sorted(begun - {path.stem for path in paths})
        if unfinished:
            logger.warning(
                "%s: %s not finished, and left out. Repeat gim-video label.",
                self.labels,
                f"{', '.join(unfinished)} {'are' if len(unfinished) > 1 else 'is'}",
            )
        stores = [LabelStore(path) for path in paths]
        if labellers:
            stores = [store for store in stores if store.info.labeller in labellers]
        if not stores:
            raise InputError(f"{self.labels} holds no finished labels: gim-video label makes them.")
        return stores


def find_videos(folder: str | os.PathLike[str]) -> list[VideoFolder]:
    """Folders of videos below an output folder, or the folder itself, sorted by id.

    Raises:
        InputError: there are none.
    """
    folder = Path(folder)
    if (folder / "video.json").is_file():
        return [VideoFolder(folder)]
    found = sorted(path.parent for path in folder.glob("*/video.json"))
    if not found:
        raise InputError(f"{folder} holds no labelled video: gim-video label VIDEO {folder} first.")
    return [VideoFolder(path) for path in found]
