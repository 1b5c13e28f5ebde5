"""Pairs from images with known poses and depth: what RGB-D folders and COLMAP models share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.images import open_stored, read_rgb
from gim_hloc.options import options
from gim_hloc.training.data.augment import RawPair
from gim_hloc.training.data.depth_maps import MILLIMETRES, read_depth
from gim_hloc.training.data.source import (
    PairSource,
    SourceOptions,
    choose_by_overlap,
    overlap_edges,
    relative_pose,
)

logger = logging.getLogger(__name__)

_GRID = 16  # points along the long side of an image that overlap is measured with
_AGREEMENT = 0.1  # relative difference of depth of points that both images see


@options
class PosedOptions(SourceOptions):
    """Which pairs of posed images."""

    overlap: tuple[float, float] = (0.1, 0.7)  # of pairs, in both directions
    overlap_step: float = 0.1  # width of the bins that pairs are chosen from evenly
    max_pairs: int = 10000  # of a scene
    depth_scale: float = MILLIMETRES  # unit of the poses per step of 16-bit depth images

    AUGMENT: ClassVar[Mapping[str, Any]] = {"photometric": "dark"}


@dataclass(frozen=True, kw_only=True)
class View:
    """One image with all that is known about it.

    Attributes:
        name: for messages.
        image: file.
        depth: file.
        K: (3, 3) intrinsics on the image's pixels, hloc's frame.
        world_to_camera: (4, 4).
        size: (width, height) that ``K`` is for; None: the image's own.
    """

    name: str
    image: Path
    depth: Path
    K: np.ndarray
    world_to_camera: np.ndarray
    size: tuple[int, int] | None = None


def scale_intrinsics(K: np.ndarray, size: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Intrinsics (3, 3) of a resized image, hloc's frame before and after."""
    scaled = np.array(K, dtype=np.float64)
    for axis in (0, 1):
        factor = target[axis] / size[axis]
        scaled[axis] *= factor
        scaled[axis, 2] += (factor - 1) / 2
    return scaled


def read_view(view: View, depth_scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (h, w, 3) uint8, depth (h, w) float32 and intrinsics, all on the pixels of the depth.

    The image is brought to the size of the depth map, because depth cannot be interpolated across
    edges.
    """
    import cv2

    image = read_rgb(view.image, upright=False)
    depth = read_depth(view.depth, scale=depth_scale)
    target = (depth.shape[1], depth.shape[0])
    size = (image.shape[1], image.shape[0])
    K = scale_intrinsics(view.K, view.size or size, target)
    if target != size:
        shrinking = target[0] <= size[0] and target[1] <= size[1]
        image = cv2.resize(
            image, target, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        )
    return image, depth, K


class ViewPairs(PairSource):
    """Pairs of views with depth and poses. Subclasses choose them when they are made."""

    _views: list[View]
    _pairs: np.ndarray  # (P, 2) rows of the views, scene after scene
    _lengths: np.ndarray  # (S,) pairs of each scene
    _depth_scale: float = 1.0  # of depth files without a unit of their own, see ``read_view``

    def scene_lengths(self) -> np.ndarray:
        """Pairs of each scene."""
        return self._lengths

    def describe(self, index: int) -> str:
        """Names of both images."""
        i, j = self._pairs[index]
        return f"{self.name} {self._views[i].name} - {self._views[j].name}"

    def load(self, index: int) -> RawPair:
        """Read images, depth and poses."""
        view0, view1 = (self._views[k] for k in self._pairs[index])
        image0, depth0, k0 = read_view(view0, self._depth_scale)
        image1, depth1, k1 = read_view(view1, self._depth_scale)
        return RawPair(
            image0=image0,
            image1=image1,
            names=(view0.name, view1.name),
            depth0=depth0,
            depth1=depth1,
            K0=k0,
            K1=k1,
            T_0to1=relative_pose(
                view0.world_to_camera, view1.world_to_camera, self.describe(index)
            ),
        )


class PosedViews(ViewPairs):
    """Pairs of views of several scenes that overlap enough.

    Args:
        scenes: views of each scene.
        options: which pairs.
        kind: name of the data set where the options give none.

    Raises:
        InputError: no pair overlaps as asked.
    """

    def __init__(
        self, scenes: Mapping[str, Sequence[View]], options: PosedOptions, kind: str
    ) -> None:
        super().__init__(options.name or kind, options.augmentation(), options.failures)
        self._views: list[View] = []
        self._depth_scale = options.depth_scale
        pairs, lengths = [], []
        for views in scenes.values():
            overlap = view_overlaps(views, options.depth_scale)
            i, j = np.triu_indices(len(views), 1)
            least = np.minimum(overlap[i, j], overlap[j, i])
            # Both directions must be in the range; the lesser one decides the bin.
            least[np.maximum(overlap[i, j], overlap[j, i]) > options.overlap[1]] = -1
            edges = overlap_edges(*options.overlap, options.overlap_step)
            chosen = choose_by_overlap(least, least, edges, options.max_pairs)
            pairs.append(np.stack([i[chosen], j[chosen]], 1) + len(self._views))
            lengths.append(len(chosen))
            self._views.extend(views)
        self._pairs = np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)
        self._lengths = np.array(lengths, dtype=np.int64)
        if not len(self._pairs):
            raise InputError(
                f"No two of the {len(self._views)} images of {', '.join(scenes) or self.name} "
                f"overlap between {options.overlap[0]} and {options.overlap[1]}."
            )


def view_overlaps(views: Sequence[View], depth_scale: float) -> np.ndarray:
    """Share of the points of each view that each other view sees, by a coarse grid of depth.

    Returns:
        (N, N) float32: row i, column j: the share of view i's points that view j shows unhidden. 0
        for views without a pose, and for those whose files are damaged, with a warning.
    """
    from tqdm import tqdm

    grids: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int], int]] = {}
    for i, view in enumerate(tqdm(views, desc="depth", leave=False, disable=len(views) < 100)):
        try:
            depth = read_depth(view.depth, scale=depth_scale)
            size = view.size or _stored_size(view.image)
        except InputError as error:
            logger.warning("%s is left out: %s", view.name, error)
            continue
        height, width = depth.shape
        step = max(1, max(width, height) // _GRID)
        y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step]
        K = scale_intrinsics(view.K, size, (width, height))
        grids[i] = (depth[y, x], np.stack([x, y], -1).reshape(-1, 2), K, (width, height), step)
    overlap = np.zeros((len(views), len(views)), dtype=np.float32)
    for i, (depth, xy, K, _, _) in grids.items():
        z = depth.reshape(-1)
        usable = np.isfinite(z) & (z > 0)
        pose = views[i].world_to_camera
        if not usable.any() or not np.isfinite(pose).all():
            continue
        local = np.c_[xy[usable], np.ones(usable.sum())] @ np.linalg.inv(K).T * z[usable, None]
        to_world = np.linalg.inv(pose)
        world = local @ to_world[:3, :3].T + to_world[:3, 3]
        for j, (other, _, K1, (width, height), step) in grids.items():
            pose = views[j].world_to_camera
            if i == j or not np.isfinite(pose).all():
                continue
            moved = world @ pose[:3, :3].T + pose[:3, 3]
            front = moved[:, 2] > 1e-6
            projected = (moved[front] @ K1.T)[:, :2] / moved[front, 2:]
            inside = ((projected > -0.5) & (projected < [width - 0.5, height - 0.5])).all(1)
            cell = np.rint((projected[inside] - step // 2) / step).astype(int)
            cell = cell.clip(0, [other.shape[1] - 1, other.shape[0] - 1])
            there = other[cell[:, 1], cell[:, 0]]
            expected = moved[front, 2][inside]
            # A cell may look past an edge; a wide tolerance, as nothing is measured with this.
            seen = np.abs(there - expected) < _AGREEMENT * expected
            overlap[i, j] = seen.sum() / len(z)
    return overlap


def _stored_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, which is not decoded.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        image = open_stored(path.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"The image {path} cannot be read: {error}.") from None
    return image.width, image.height
