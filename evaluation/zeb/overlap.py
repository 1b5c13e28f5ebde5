"""How much of an image another one sees, of all pairs of a set of posed pinhole images.

With points: the image is cut into 16x16 cells; of each cell that has points, the share of those
that fall inside the other image, are not behind what is seen there and are not looked at from more
than 80 degrees away; the mean over the cells. So places full of points do not count for more than
others, and tracks that the model's matcher broke count as seen. Without points the same, of a grid
of pixels at assumed depths: a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from gim_hloc.errors import InputError
from gim_hloc.geometry.pose import camera_centres

logger = logging.getLogger(__name__)

_CELLS = 16  # of an image, in x and in y, over which the overlap is averaged
_DEPTH_CELLS = 32  # of the coarse depth map that tells what is hidden
_HIDDEN = 1.1  # a point is hidden if it is this many times as far as all that is seen around it
_FACING = float(np.cos(np.radians(80.0)))
_POINTS = (64, 1024)  # fewest and most points of an image that are projected into the others
_PROJECTIONS = 4e8  # at most, about, before fewer points are taken
_DEPTH_STEPS = 5
_BLOCK = 1 << 20  # projections at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Cameras:
    """N pinhole cameras, pixels in hloc's frame."""

    K: np.ndarray  # (N, 3, 3)
    size: np.ndarray  # (N, 2) width, height
    rotation: np.ndarray  # (N, 3, 3) world to camera
    translation: np.ndarray  # (N, 3)

    def __len__(self) -> int:
        return len(self.K)

    @property
    def centres(self) -> np.ndarray:
        """(N, 3) in the world."""
        return camera_centres(self.rotation, self.translation)

    def project(
        self, points: np.ndarray, rows: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (M, 3) in some of the cameras.

        Returns:
            Pixels (n, M, 2), depths (n, M), and which lie in the image and before the camera.
        """
        local = np.einsum("nij,mj->nmi", self.rotation[rows], points)
        local += self.translation[rows, None]
        depth, K = local[..., 2], self.K[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            xy = local[..., :2] / depth[..., None]
            xy = xy * K[:, None, [0, 1], [0, 1]] + K[:, None, :2, 2]
            inside = (xy >= -0.5).all(-1) & (xy <= self.size[rows, None] - 0.5).all(-1)
        return xy, depth, inside & (depth > 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clouds:
    """What each image shows.

    Attributes:
        points: per image (M, 3) in the world.
        weights: per image (M,), of sum 1; empty where the image shows nothing.
        ids: per image (M,) rows of ``seen``; None for assumed points.
        seen: (N, P) sparse matrix, which image has which point as an observation; or None.
        farthest: (N, D, D) largest depth seen in and around a cell of the image, 0 for none; None:
            nothing is known to hide anything.
    """

    points: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    ids: Sequence[np.ndarray] | None = None
    seen: Any = None
    farthest: np.ndarray | None = None


def overlaps(cameras: Cameras, clouds: Clouds, *, progress: bool = False) -> np.ndarray:
    """The overlap (N, N) of all pairs, the mean of both directions."""
    count = len(cameras)
    result = np.zeros((count, count))
    centres = cameras.centres
    step = max(1, _BLOCK // _POINTS[1])
    for i in tqdm(range(count), desc="Overlaps", unit="image", disable=not progress):
        points, weights = clouds.points[i], clouds.weights[i]
        if not len(points):
            continue
        rays = points - centres[i]
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            xy, depth, visible = cameras.project(points, rows)
            others = points - centres[rows, None]
            cosine = np.einsum("nmi,mi->nm", others, rays)
            visible &= cosine > _FACING * np.linalg.norm(others, axis=-1)
            if clouds.farthest is not None:
                relative = np.where(visible[..., None], xy + 0.5, 0.0) / cameras.size[rows, None]
                column, row = _cells(relative, _DEPTH_CELLS).transpose(2, 0, 1)
                limit = clouds.farthest[rows][np.arange(len(xy))[:, None], row, column]
                visible &= (limit == 0) | (depth <= _HIDDEN * limit)
            if clouds.seen is not None and clouds.ids is not None:
                visible |= clouds.seen[rows][:, clouds.ids[i]].toarray()
            result[i, rows] = visible @ weights
    return (result + result.T) / 2


def _cells(relative: np.ndarray, count: int) -> np.ndarray:
    """Cells of places (..., 2) in [0, 1] of an image that is cut into count x count."""
    return np.clip((relative * count).astype(int), 0, count - 1)


def observed_clouds(
    cameras: Cameras, observed: Sequence[np.ndarray], positions: np.ndarray
) -> Clouds:
    """What each image shows of a model's points.

    Args:
        cameras: of the images.
        observed: per image rows of ``positions``, each once.
        positions: (P, 3) of all points.
    """
    from scipy.sparse import csc_matrix

    count = len(cameras)
    most = int(np.clip(_PROJECTIONS / count**2, *_POINTS))
    points, weights, ids = [], [], []
    farthest = np.zeros((count, _DEPTH_CELLS, _DEPTH_CELLS))
    for i, known in enumerate(observed):
        xy, depth, kept = (v[0] for v in cameras.project(positions[known], slice(i, i + 1)))
        # Undistortion cuts the frame: some observations lie outside of it.
        known, relative = known[kept], (xy[kept] + 0.5) / cameras.size[i]
        column, row = _cells(relative, _DEPTH_CELLS).T
        np.maximum.at(farthest[i], (row, column), depth[kept])
        if len(known) > most:
            chosen = np.linspace(0, len(known) - 1, most).astype(int)
            known, relative = known[chosen], relative[chosen]
        column, row = _cells(relative, _CELLS).T
        _, inverse, numbers = np.unique(
            row * _CELLS + column, return_inverse=True, return_counts=True
        )
        points.append(positions[known])
        weights.append(1.0 / numbers[inverse] / max(len(numbers), 1))
        ids.append(known)
    blind = sum(not len(own) for own in points)
    if blind:
        logger.warning("%d images see no point of the model and are in no pair.", blind)
    rows = np.repeat(np.arange(count), list(map(len, observed)))
    marks = (np.ones(len(rows), dtype=bool), (rows, np.concatenate(observed)))
    return Clouds(
        points=points,
        weights=weights,
        ids=ids,
        seen=csc_matrix(marks, shape=(count, len(positions))),
        farthest=_spread(farthest),
    )


def _spread(cells: np.ndarray) -> np.ndarray:
    """The largest value of each cell and its eight neighbours, (N, D, D)."""
    from scipy.ndimage import maximum_filter

    largest: np.ndarray = maximum_filter(cells, size=(1, 3, 3), mode="constant")
    return largest


def assumed_clouds(cameras: Cameras, depth: tuple[float, float] | None, model: str) -> Clouds:
    """A grid of pixels of each image at depths where something may be.

    Args:
        cameras: of the images.
        depth: nearest and farthest; None: about where the cameras look.
        model: what to call it in a message.

    Raises:
        InputError: the cameras do not look at one place.
    """
    if depth is not None:
        ranges = np.tile(np.array(depth, dtype=np.float64), (len(cameras), 1))
    else:
        ranges = _looked_at(cameras, model)[:, None] * np.array([0.7, 1.4])
    fractions = (np.arange(_CELLS) + 0.5) / _CELLS
    grid = np.stack(np.meshgrid(fractions, fractions), axis=-1).reshape(-1, 2)
    points = []
    for i in range(len(cameras)):
        K = cameras.K[i]
        xy = (grid * cameras.size[i] - 0.5 - K[:2, 2]) / K[[0, 1], [0, 1]]
        rays = np.column_stack([xy, np.ones(len(xy))])
        steps = np.geomspace(float(ranges[i, 0]), float(ranges[i, 1]), _DEPTH_STEPS)
        local = (rays[None] * steps[:, None, None]).reshape(-1, 3)
        points.append((local - cameras.translation[i]) @ cameras.rotation[i])
    weight = np.full(len(points[0]), 1 / len(points[0]))
    return Clouds(points=points, weights=[weight] * len(points))


def _looked_at(cameras: Cameras, model: str) -> np.ndarray:
    """Depth (N,) of the place nearest to all optical axes."""
    axes, centres = cameras.rotation[:, 2], cameras.centres
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    place = np.linalg.lstsq(across.sum(0), np.einsum("nij,nj->i", across, centres), rcond=None)[0]
    _, depth, inside = (values[:, 0] for values in cameras.project(place[None]))
    if inside.sum() < len(cameras) / 2:
        raise InputError(
            f"{model} has no points, and its cameras do not look at one place that would tell how "
            "far the scene is. Give the scene's depths (--depth NEAR FAR, in the model's unit), or "
            "triangulate points first: gim-reconstruct IMAGES OUTPUT --poses MODEL."
        )
    return np.where(inside, depth, np.median(depth[inside]))
