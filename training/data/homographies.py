"""Pairs from single images: one photograph seen twice, as if it were a poster.

Image 1 is image 0 under another crop, another zoom and a homography. Both are made from the same
original pixels, so that the truth is the identity there: it is given as a plane at depth 1 without
motion, which is exact at every pixel, or as labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.images import SUFFIXES, read_rgb
from gim_hloc.options import Count, options
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.source import SUBSAMPLING_SEED, PairSource, SourceOptions


@options
class HomographyOptions(SourceOptions):
    """Which images, and how the truth is told."""

    root: Path  # folder of images, searched at any depth
    truth: Literal["depth", "labels"] = "depth"  # for losses of depth data, or of videos
    labels: Count = 4096  # points of a pair where the truth is labels

    AUGMENT: ClassVar[Mapping[str, Any]] = {
        "photometric": "dark",
        "homography": 1.0,
        "keep_scale": 0.2,
    }


class Homographies(PairSource):
    """One pair per image.

    Raises:
        InputError: there are no images.
    """

    def __init__(self, options: HomographyOptions) -> None:
        super().__init__(options.name or "homography", options.augmentation(), options.failures)
        self._root = Path(options.root)
        self._truth = options.truth
        self._labels = options.labels
        self._paths = sorted(
            path
            for path in self._root.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not self._paths:
            raise InputError(f"{self._root} holds no images.")

    def scene_lengths(self) -> np.ndarray:
        """All images are one scene."""
        return np.array([len(self._paths)], dtype=np.int64)

    def describe(self, index: int) -> str:
        """Name of the image."""
        return f"{self.name} {self._paths[index].relative_to(self._root).as_posix()}"

    def load(self, index: int) -> RawPair:
        """Read the image; both images of the pair are the same one."""
        image = read_rgb(self._paths[index], upright=False)
        height, width = image.shape[:2]
        name = self._paths[index].relative_to(self._root).as_posix()
        pair = RawPair(image0=image, image1=image, names=(name, name))
        if self._truth == "depth":
            pair.depth0 = pair.depth1 = np.ones((height, width), np.float32)
            return pair
        rng = np.random.default_rng([SUBSAMPLING_SEED, index])
        xy = rng.uniform(0, 1, (self._labels, 2)) * [width - 1, height - 1]
        pair.labels = np.concatenate([xy, xy], 1)
        return pair
