"""Reading the warps again once a model exists.

A track's observation in an image comes from one reading, or few. With a model, every point can be
projected into all images that see it, and the warps from there to an image all say where the point
lies in it: as many readings as the image has neighbours that see the point. Their mean is more
accurate than each, and images that no track had reached yet are found.

Here are the readings and their mean; ``gim_hloc.colmap.refine_by_warps`` applies them to a model
and adjusts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gim_hloc.geometry.warp import Warp
from gim_hloc.options import RereadOptions
from gim_hloc.tracks.anchored import pixel_unit, read_warp
from gim_hloc.tracks.base import Pair

_COMPACT = 1 << 23  # rows held before they are added up


@dataclass(kw_only=True)
class Positions:
    """Where the warps say that points lie; one row for each point and image, sorted by both.

    Attributes:
        point: (K,) int64 index of the point.
        image: (K,) int64 index of the image.
        xy_px: (K, 2) float64 stored pixels, hloc's frame; NaN where no reading is near enough.
        agreeing: (K,) int64 readings in the mean.
        against: (K,) int64 readings farther than ``max_shift_px`` from the projected point.
    """

    point: np.ndarray
    image: np.ndarray
    xy_px: np.ndarray
    agreeing: np.ndarray
    against: np.ndarray


def read_again(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    seen: Sequence[np.ndarray],
    project: Callable[[int, np.ndarray], np.ndarray],
    pairs: Sequence[Pair],
    warp: Callable[[str, str], Warp],
    options: RereadOptions,
    progress: Callable[[], None] | None = None,
) -> Positions:
    """Read all warps at the projected points and average what they say of each image.

    The mean is weighted by certainty and by nearness to the projected point (Cauchy), so that one
    pass over the warps is enough and each is asked for once.

    Args:
        names: images.
        sizes: their (width, height).
        seen: for each image the indices of the points observed in it.
        project: (index of an image, indices (N,) of points) -> (N, 2) stored pixels, hloc's frame,
            NaN where a point lies behind the camera or outside the image.
        pairs: whose warps are asked for; pairs of other images are passed over.
        warp: (name, name) -> the warp between them.
        options: see there.
        progress: called after each pair.
    """
    index = {name: i for i, name in enumerate(names)}
    sums = _Sums(len(names))
    for a, b in pairs:
        if a in index and b in index:
            found = warp(a, b)
            for there, here, other in (
                (found, index[a], index[b]),
                (found.swapped(), index[b], index[a]),
            ):
                _read_into(sums, there, here, other, sizes, seen[here], project, options)
        if progress is not None:
            progress()
    return sums.positions()


def _read_into(
    sums: _Sums,
    warp: Warp,
    here: int,
    other: int,
    sizes: Sequence[tuple[int, int]],
    points: np.ndarray,
    project: Callable[[int, np.ndarray], np.ndarray],
    options: RereadOptions,
) -> None:
    """Read the points of image ``here`` and add up where they lie in ``other``."""
    points = np.asarray(points, dtype=np.int64)
    start, expected = project(here, points), project(other, points)
    usable = np.isfinite(start).all(1) & np.isfinite(expected).all(1)
    points, start, expected = points[usable], start[usable], expected[usable]
    if not len(points):
        return
    at = torch.from_numpy(start.astype(np.float32))
    xy, certainty, cycle = (
        part.cpu().numpy() for part in read_warp(warp, at, symmetric=options.symmetric)
    )
    good = (certainty >= options.min_certainty) & (cycle <= options.max_cycle_px)
    points, xy, expected, certainty = points[good], xy[good], expected[good], certainty[good]
    shift = np.linalg.norm(xy - expected, axis=1) / pixel_unit(sizes[other])
    near = shift <= options.max_shift_px
    weight = certainty.astype(np.float64) / (1 + (shift / options.scale_px) ** 2) * near
    sums.add(points, other, weight, np.where(near[:, None], xy, 0.0), near)


class _Sums:
    """Weighted sums by point and image, added up now and then to bound the memory."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows = 0

    def add(
        self, points: np.ndarray, image: int, weight: np.ndarray, xy: np.ndarray, near: np.ndarray
    ) -> None:
        key = points * self._images + image
        self._parts.append((key, np.c_[weight, weight[:, None] * xy, near, ~near]))
        self._rows += len(key)
        if self._rows > _COMPACT:
            self._compact()
            self._rows = 0

    def _compact(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros((0, 5))
        keys, group = np.unique(
            np.concatenate([key for key, _ in self._parts]), return_inverse=True
        )
        values = np.concatenate([value for _, value in self._parts])
        summed = np.stack([np.bincount(group, values[:, k], len(keys)) for k in range(5)], 1)
        self._parts = [(keys, summed)]
        return self._parts[0]

    def positions(self) -> Positions:
        keys, values = self._compact()
        weight = np.where(values[:, 0] > 0, values[:, 0], np.nan)
        return Positions(
            point=keys // self._images,
            image=keys % self._images,
            xy_px=values[:, 1:3] / weight[:, None],
            agreeing=np.round(values[:, 3]).astype(np.int64),
            against=np.round(values[:, 4]).astype(np.int64),
        )
