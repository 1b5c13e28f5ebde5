"""Labels of pairs of near frames: a matcher's matches, filtered and fitted.

A *plain* round matches whole frames, each of which is encoded once for all its pairs. A *zoom*
round takes, for every pair, the bounding boxes of the labels that a plain round found, enlarges
both crops to the same box and matches them: what both frames see is then seen at a common, larger
scale. Labels of all rounds are in pixels of the frames, in hloc's frame; the reference pools
pixel-centre and pixel-corner coordinates.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import torch

from gim_hloc import engine, images, weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.images import ImageRecord
from gim_hloc.matchers import Loader, registry
from gim_hloc.options import ImageFormat
from gim_hloc.tolerant import TolerantMatcher, Unusable
from gim_hloc.training.video.fit import epipolar_inliers
from gim_hloc.training.video.masks import FrameMasks
from gim_hloc.training.video.options import (
    CleaningOptions,
    LabellerOptions,
    LabelOptions,
)
from gim_hloc.types import ImageData, Matcher, Matches, Quality

logger = logging.getLogger(__name__)

Crop: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom (exclusive), pixels of the frame."""
Item: TypeAlias = tuple[int, int] | tuple[int, int, Crop, Crop]
"""A pair of frames; in zoom rounds with what is compared of them."""

ERROR = "error:"
"""In reasons that say nothing about the pair, which is tried again."""

PAPER = ("gim_dkm", "gim_loftr", "gim_lightglue", "sift")
FREE = ("aliked_lightglue", "disk_lightglue", "sift")
ZOOM_BOX = (900, 1600)  # (height, width) px

_STEP = 8  # px: sides of enlarged crops are multiples of it
_FIT_CONFIDENCE = 0.999999  # of the fundamental matrix
_FIT_ITERATIONS = 100_000
_FEWEST = 8  # matches without which no fundamental matrix is fitted
# What GIM's video labels set beyond its operating points. SIFT: one keypoint per 64 pixels of the
# frame at nearly any contrast, no limit on the distance.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "gim_dkm": {"pad": False, "num_matches": 5000},
    "gim_loftr": {"max_size": None},
    "gim_lightglue": {"max_size": 1920, "max_keypoints": 2048, "filter_threshold": 0.1},
    "sift": {"max_size": None, "contrast_threshold": 1e-5, "max_distance": 2.0},
}
_SIFT_PIXELS = 64  # pixels of a frame per SIFT keypoint at most


def default_labellers() -> tuple[str, ...]:
    """The paper's labellers where their checkpoints are on this machine, else free ones."""
    missing = []
    for name in PAPER:
        for file in registry.describe(name).checkpoint:
            try:
                weights.locate(file, download=False)
            except WeightsError:
                missing.append(file)
    if not missing:
        return PAPER
    logger.info(
        "Labellers: %s. For the paper's (%s), %s would be needed: gim-weights download.",
        *(", ".join(FREE), ", ".join(PAPER), ", ".join(missing)),
    )
    return FREE


def labeller(name: str, quality: Quality, size: tuple[int, int]) -> Loader:
    """How a matcher is made that labels frames of ``size`` (width, height), px.

    Raises:
        InputError: unknown name.
    """
    overrides = dict(_OVERRIDES.get(name, {}))
    if name == "sift":
        overrides["max_keypoints"] = max(2048, size[0] * size[1] // _SIFT_PIXELS)
    return Loader(name, quality, overrides)


# ------------------------------------------------------------------------------------------ filters


def clean(
    points0: np.ndarray,
    points1: np.ndarray,
    options: CleaningOptions,
    *,
    mask0: np.ndarray | None = None,
    mask1: np.ndarray | None = None,
) -> tuple[np.ndarray, str | None]:
    """Turn matches into labels: without overlays, off the masks, on one epipolar geometry.

    Args:
        points0: (M, 2) pixels of frame 0, hloc's frame.
        points1: (M, 2) in frame 1.
        options: see there.
        mask0: (H, W) bool, True where labels may be; or None.
        mask1: the same for frame 1.

    Returns:
        (n, 4) float32 labels, and None or why there are none. Overlays (watermarks, a dashboard)
        are told in pixels of the frames in zoom rounds too; the reference compares pixels of two
        different crops there, which finds none.
    """
    labels = np.concatenate([points0, points1], axis=1).astype(np.float32)
    labels = labels[np.isfinite(labels).all(axis=1)]
    found = len(labels)
    moved = np.abs(labels[:, 2:] - labels[:, :2]) >= options.static_px
    labels = labels[moved.any(axis=1)]
    still = found - len(labels)
    for mask, columns in ((mask0, slice(0, 2)), (mask1, slice(2, 4))):
        if mask is not None:
            labels = labels[_inside(mask, labels[:, columns])]
    nothing = labels[:0]
    if len(labels) < _FEWEST:
        return nothing, f"{found} matches, {still} of them still, {len(labels)} left"
    inside = epipolar_inliers(
        labels,
        threshold=options.fit_px,
        confidence=_FIT_CONFIDENCE,
        max_iterations=_FIT_ITERATIONS,
    )
    kept = labels[inside]
    if len(kept) < options.min_labels:
        return nothing, f"{len(labels)} matches, {len(kept)} on one epipolar geometry"
    return kept, None


def _inside(mask: np.ndarray, xy: np.ndarray) -> np.ndarray:
    rows, columns = mask.shape
    x = np.rint(xy[:, 0]).astype(np.int64).clip(0, columns - 1)
    y = np.rint(xy[:, 1]).astype(np.int64).clip(0, rows - 1)
    allowed: np.ndarray = mask[y, x]
    return allowed


# ------------------------------------------------------------------------------------------- zooms


def crop_box(xy: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (exclusive) of the pixels that hold points and the next ones.

    Args:
        xy: (n, 2) points in hloc's frame, n > 0.
        size: (width, height) of the frame.
    """
    low = np.floor(xy.min(axis=0)).astype(int)
    high = np.ceil(xy.max(axis=0)).astype(int) + 1
    left, top = (int(v) for v in np.clip(low, 0, np.array(size) - 1))
    right, bottom = (int(v) for v in np.minimum(high, size))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def zoomed_size(width: int, height: int, box: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a crop that was enlarged to fit in a box (height, width).

    Sides are rounded, then cut to multiples of 8, at least 8.
    """
    scale = min(box[0] / height, box[1] / width)
    sides = (max(_STEP, round(side * scale) // _STEP * _STEP) for side in (width, height))
    return tuple(sides)  # type: ignore[return-value]


def zoom_box(labeller: str, size: tuple[int, int], options: LabellerOptions) -> tuple[int, int]:
    """(height, width) of the box that crops are enlarged to.

    By default that of the reference: the frame for SIFT, 900 x 1600 for networks; upright for
    upright frames and no larger than the frame, which the reference's 1080p never is.
    """
    if options.zoom_box is not None:
        return options.zoom_box
    width, height = size
    if labeller == "sift":
        return height, width
    rows, columns = ZOOM_BOX if width >= height else ZOOM_BOX[::-1]
    return min(rows, height), min(columns, width)


def zoomed_image(
    rgb: np.ndarray,
    crop: tuple[int, int, int, int],
    box: tuple[int, int],
    options: Any,
    *,
    name: str,
    mask: np.ndarray | None = None,
) -> Any:
    """A crop as a matcher sees it, resized once.

    Args:
        rgb: (H, W, 3) uint8, the frame.
        crop: of `crop_box`.
        box: (height, width) to enlarge to, px.
        options: the matcher's ``ImageOptions``; its ``max_size`` holds for the crop.
        name: of the crop.
        mask: (H, W) bool of the frame, or None.

    Returns:
        ``ImageData`` whose ``to_original`` leads to pixels of the whole frame.
    """
    left, top, right, bottom = crop
    cut: np.ndarray = rgb[top:bottom, left:right]
    width, height = zoomed_size(right - left, bottom - top, box)
    width, height = images.network_size(width, height, options)
    if options.grayscale:
        cut = cv2.cvtColor(cut, cv2.COLOR_RGB2GRAY)
    # Enlarging by areas repeats pixels, so that is left to the cubic kernel.
    shrinks = width <= right - left and height <= bottom - top
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    enlarged = cv2.resize(cut.astype(np.float32), (width, height), interpolation=kernel)
    resized = enlarged.reshape(height, width, -1).clip(0, 255) / np.float32(255)
    x, y = (right - left) / width, (bottom - top) / height
    allowed = None
    if mask is not None:
        part: np.ndarray = mask[top:bottom, left:right].astype(np.uint8)
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        allowed = torch.from_numpy(part.astype(bool))
    return ImageData(
        image=torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))),
        name=name,
        size=(rgb.shape[1], rgb.shape[0]),
        to_original=np.array([[x, 0.0, left + x / 2 - 0.5], [0.0, y, top + y / 2 - 0.5]]),
        mask=allowed,
    )


# ------------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True, kw_only=True)
class SettingsTask:
    """Name of a labeller -> what decides its labels on a worker's device, JSON-able.

    See ``workers.Task``. Frames, masks and crops decide too.
    """

    loader: Loader
    options: LabelOptions

    def open(self, device: str) -> Callable[[Sequence[str]], Iterator[tuple[str, dict[str, Any]]]]:
        """Load the matcher."""
        matcher, options = self.loader.load(device), self.options

        def settings(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
            for name in names:
                yield (
                    name,
                    {
                        "encode": matcher.encode_settings(),
                        "match": matcher.match_settings(),
                        "static_px": options.static_px,
                        "fit": [options.fit_px, _FIT_CONFIDENCE, _FIT_ITERATIONS],
                        "min_labels": options.min_labels,
                    },
                )

        return settings


@dataclass(frozen=True, kw_only=True)
class LabelTask:
    """One labeller in one round: pairs of frames -> (n, 4) labels, or why there are none.

    See ``workers.Task``. Pairs of one chunk share the encodings of their frames.
    """

    loader: Loader
    frames: Path  # folder of the stored frames
    format: ImageFormat  # of them
    size: tuple[int, int]  # (width, height) of them, pixels
    masks: FrameMasks
    options: LabelOptions

    def open(self, device: str) -> Callable[[Sequence[Item]], Iterator[tuple[Item, Any]]]:
        """Load the matcher."""
        return _Labeller(self, self.loader.load(device)).label


class _Labeller:
    """A `LabelTask` at work."""

    def __init__(self, task: LabelTask, matcher: Matcher) -> None:
        self.task, self.matcher = task, matcher
        self.box = zoom_box(matcher.info.name, task.size, task.options)
        # A frame is in at most six pairs, which follow each other.
        self._mask = functools.lru_cache(maxsize=16)(self._load_mask)
        self._rgb = functools.lru_cache(maxsize=8)(self._load_rgb)

    def label(self, items: Sequence[Item]) -> Iterator[tuple[Item, np.ndarray | str]]:
        """Label pairs, which share the encodings of whole frames."""
        named = {self._names(item): item for item in items}
        views: dict[str, tuple[int, Crop | None]] = {}
        for names, item in named.items():
            crops = item[2:] or (None, None)
            views |= {
                n: (frame, crop) for n, frame, crop in zip(names, item[:2], crops, strict=True)
            }
        device, options = self.matcher.device, self.task.options
        threads = min(engine.default_workers(device, False), torch.get_num_threads())
        tolerant = TolerantMatcher(self.matcher, f"{ERROR} ")
        for names, found in engine.match(
            tolerant,
            list(named),
            lambda name: self._read(name, *views[name]),
            tolerant.match,
            batch_size=options.batch_size or (1 if device.type == "cpu" else 4),
            workers=options.threads or threads,
            cache_gb=options.cache_gb,
        ):
            item = named[names]
            yield item, found if isinstance(found, str) else self._clean(item, found)

    @staticmethod
    def _names(item: Item) -> tuple[str, str]:
        """What a pair encodes: two frames, or two crops that no other pair has."""
        i, j = item[:2]
        if len(item) == 2:
            return f"{i:08d}", f"{j:08d}"
        return f"{i:08d}_{j:08d}/0", f"{i:08d}_{j:08d}/1"

    def _record(self, frame: int) -> ImageRecord:
        return frame_record(self.task.frames / f"{frame:08d}.{self.task.format}", self.task.size)

    def _read(self, name: str, frame: int, crop: Crop | None) -> ImageData | Unusable:
        options, mask = self.matcher.image_options, self._mask(frame)
        try:
            if crop is None:
                image = images.load(self._record(frame), options, mask=mask)
            else:
                rgb = self._rgb(frame)
                image = zoomed_image(rgb, crop, self.box, options, name=name, mask=mask)
        except InputError as error:
            return Unusable(f"{ERROR} {error}")
        if image.mask is not None and not image.mask.any():
            return Unusable(f"{image.name} is masked as a whole")
        return image

    def _load_rgb(self, frame: int) -> np.ndarray:
        return images.read_rgb(self._record(frame), upright=False)

    def _load_mask(self, frame: int) -> np.ndarray | None:
        return self.task.masks.load(self._record(frame))

    def _clean(self, item: Item, found: Matches) -> np.ndarray | str:
        points = (found.keypoints0.cpu().numpy(), found.keypoints1.cpu().numpy())
        mask0, mask1 = (self._mask(frame) for frame in item[:2])
        labels, reason = clean(*points, self.task.options, mask0=mask0, mask1=mask1)
        return reason or labels


def frame_record(path: Path, size: tuple[int, int]) -> ImageRecord:
    """The record of a stored frame, which was written by us: nothing to inspect."""
    return ImageRecord(name=path.name, path=path, width=size[0], height=size[1], sha256="")
