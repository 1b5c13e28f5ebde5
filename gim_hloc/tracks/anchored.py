"""Anchored tracks: points fixed in every image before any pair is matched.

A dense matcher says where *any* point of one image lies in another. Drawing random points in every
pair gives tracks of two images, which COLMAP throws away; rounding them to a grid so that they
meet costs accuracy. Here points are chosen per image (``make_anchors``), every warp is read at them
(``read_pair``), and tracks are linked by the index of the anchor (``link``). No coordinate is ever
rounded.

Tier 1 anchors are a detector's keypoints, tier 2 a grid where there are none. Linking has two
steps. *Guided*: where the reading of a tier 1 anchor hits a tier 1 anchor of the other image and
the other way round, both are the same point of the scene; these matches join into tracks, which
then reach into the images where the detector missed the point. *Star*: every anchor left over
proposes a track of itself and its readings in the neighbour images; proposals are taken by the
number of images, and each takes with it the anchors it runs over.

Pixels named in the options are pixels of an image whose long side is at most ``REFERENCE_SIDE``;
in larger images they grow along, since the error of a warp is set by the size the network sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gim_hloc.errors import InputError
from gim_hloc.geometry.warp import Warp, inverse, read_grid, transform
from gim_hloc.options import AnchoredOptions
from gim_hloc.tracks.base import Pair, Tracks

REFERENCE_SIDE = 1600
_STEP = 64  # parts of a pixel that a stored target is given in
_RANGE = 1 << 20  # values of a stored coordinate
_MARGIN = 1024  # stored coordinates begin this many steps left of the image


# -------------------------------------------------------------------------------------- anchors


@dataclass(kw_only=True)
class Anchors:
    """Points of one image that all its pairs are read at.

    Attributes:
        xy_px: (A, 2) float32 stored pixels, hloc's frame; tier 1 first.
        tier: (A,) uint8, 1 for keypoints, 2 for the grid.
        size: (width, height) of the stored image.
        mask: (H, W) bool, True where points are allowed (margin included), or None.
    """

    xy_px: np.ndarray
    tier: np.ndarray
    size: tuple[int, int]
    mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.xy_px)

    @property
    def unit(self) -> float:
        """Stored pixels that a pixel of the options stands for here."""
        return pixel_unit(self.size)

    def allows(self, xy_px: np.ndarray) -> np.ndarray:
        """Whether points (N, 2) lie in the image and not on its mask."""
        width, height = self.size
        inside = (xy_px >= -0.5).all(1) & (xy_px[:, 0] < width - 0.5) & (xy_px[:, 1] < height - 0.5)
        if self.mask is not None:
            inside[inside] = _at(self.mask, xy_px[inside])
        return np.asarray(inside)


def pixel_unit(size: tuple[int, int]) -> float:
    """Stored pixels that a pixel of the options stands for in an image of a (width, height)."""
    return max(1.0, max(size) / REFERENCE_SIDE)


def make_anchors(
    size: tuple[int, int],
    keypoints: np.ndarray,
    scores: np.ndarray | None,
    mask: np.ndarray | None,
    options: AnchoredOptions,
) -> Anchors:
    """Fix the anchors of an image.

    Args:
        size: (width, height) of the stored image.
        keypoints: (N, 2) of a detector, stored pixels, hloc's frame; may be empty.
        scores: (N,) of the detector, or None; the stronger of two keypoints at one place stays.
        mask: (H, W) bool over stored pixels, True where points are allowed, or None.
        options: see there.

    Raises:
        InputError: the mask has another size.
    """
    width, height = size
    unit = pixel_unit(size)
    if mask is not None:
        if mask.shape != (height, width):
            raise InputError(
                f"The mask is {mask.shape[1]}x{mask.shape[0]}, its image {width}x{height}."
            )
        mask = _eroded(np.asarray(mask, dtype=bool), options.mask_margin_px * unit)
    anchors = Anchors(
        xy_px=np.zeros((0, 2), np.float32), tier=np.zeros(0, np.uint8), size=size, mask=mask
    )
    xy = np.asarray(keypoints, dtype=np.float32).reshape(-1, 2)
    if scores is not None:
        xy = xy[np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]
    xy = xy[anchors.allows(xy)]
    # Some detectors give one place several times (orientations); a point is one anchor.
    _, first = np.unique(np.floor(xy * 2).astype(np.int64), axis=0, return_index=True)
    xy = xy[np.sort(first)]
    grid = _grid(size, options.grid_px * unit, xy)
    grid = grid[anchors.allows(grid)]
    anchors.xy_px = np.concatenate([xy, grid])
    anchors.tier = np.repeat(np.array([1, 2], np.uint8), [len(xy), len(grid)])
    return anchors


def _grid(size: tuple[int, int], spacing: float, taken: np.ndarray) -> np.ndarray:
    """Centres (N, 2) of the square cells that hold none of ``taken``."""
    if spacing == 0:
        return np.zeros((0, 2), np.float32)
    columns, rows = (max(1, round(side / spacing)) for side in size)
    pitch = np.array([size[0] / columns, size[1] / rows])
    cell = np.clip(((taken + 0.5) / pitch).astype(np.int64), 0, [columns - 1, rows - 1])
    free = np.ones((rows, columns), dtype=bool)
    free[cell[:, 1], cell[:, 0]] = False
    row, column = np.nonzero(free)
    centres = (np.stack([column, row], 1) + 0.5) * pitch - 0.5
    return centres.astype(np.float32)


def _at(mask: np.ndarray, xy_px: np.ndarray) -> np.ndarray:
    """Values of the pixels that points (N, 2) inside the image fall on."""
    pixel = np.floor(xy_px + 0.5).astype(np.int64)
    values: np.ndarray = mask[pixel[:, 1], pixel[:, 0]]
    return values


def _eroded(mask: np.ndarray, radius: float) -> np.ndarray:
    """Take a square of ``radius`` off the allowed area; the image's border takes nothing."""
    from scipy.ndimage import minimum_filter1d

    side = 2 * int(np.ceil(radius)) + 1
    if radius <= 0 or mask.all():
        return mask
    values = mask.astype(np.uint8)
    for axis in (0, 1):
        values = minimum_filter1d(values, side, axis=axis, mode="nearest")
    return values.astype(bool)


# ------------------------------------------------------------------------------------- readings


@dataclass(kw_only=True)
class PairReading:
    """Where the anchors of two images lie in each other, as small as it gets.

    For each direction: a bit for every anchor (was it read?), and for the read ones the target as
    20-bit fixed point, 1/64 px a step, and the certainty as 1/255: 6 bytes a reading and a bit an
    anchor. A step of 1/64 px rounds by 0.0045 px (standard deviation), a fiftieth of the best
    matchers' noise; its range is 16384 px, beyond which the step doubles.

    Attributes:
        read0, read1: packed bits over the anchors of image 0 and 1.
        low0, low1: (M, 2) uint16 the lower bits of the targets.
        high0, high1: (M,) uint8 the upper four of x, then of y.
        certainty0, certainty1: (M,) uint8.
        meta: (4,) int32: anchors of image 0, of image 1, steps a pixel in image 0, in image 1.
    """

    read0: np.ndarray
    low0: np.ndarray
    high0: np.ndarray
    certainty0: np.ndarray
    read1: np.ndarray
    low1: np.ndarray
    high1: np.ndarray
    certainty1: np.ndarray
    meta: np.ndarray

    def __len__(self) -> int:
        """Number of readings, both directions together."""
        return len(self.certainty0) + len(self.certainty1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a store."""
        return dict(vars(self))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PairReading:
        """Undo ``to_arrays``; other entries of ``arrays`` are passed over."""
        return cls(**{name: np.asarray(arrays[name]) for name in cls.__dataclass_fields__})

    @classmethod
    def pack(
        cls,
        anchors0: Anchors,
        anchors1: Anchors,
        from0: tuple[np.ndarray, np.ndarray, np.ndarray],
        from1: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> PairReading:
        """Store readings.

        Args:
            anchors0: of image 0.
            anchors1: of image 1.
            from0: (A,) bool which anchors of image 0 were read, their (M, 2) targets in image 1,
                stored pixels, and (M,) certainties in [0, 1].
            from1: the same the other way round.
        """
        steps = [_steps(anchors0.size), _steps(anchors1.size)]
        parts: dict[str, np.ndarray] = {}
        for index, (read, xy, certainty) in enumerate((from0, from1)):
            # Steps are powers of two: the product is exact in single precision.
            scaled = np.rint(xy.astype(np.float32) * np.float32(steps[1 - index])) + _MARGIN
            value = scaled.clip(0, _RANGE - 1).astype(np.int32)
            parts[f"read{index}"] = np.packbits(read)
            parts[f"low{index}"] = (value & 0xFFFF).astype(np.uint16)
            parts[f"high{index}"] = (value[:, 0] >> 16 | value[:, 1] >> 16 << 4).astype(np.uint8)
            parts[f"certainty{index}"] = np.round(certainty * 255).astype(np.uint8)
        meta = np.array([len(anchors0), len(anchors1), *steps], np.int32)
        return cls(**parts, meta=meta)

    def direction(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Readings from one image into the other.

        Args:
            image: 0 or 1, the image whose anchors were read.

        Returns:
            (M,) int64 indices of anchors, (M, 2) float32 stored pixels of the other image, and
            (M,) float32 certainties.
        """
        low, high, read, certainty = (
            getattr(self, f"{name}{image}") for name in ("low", "high", "read", "certainty")
        )
        index = np.flatnonzero(np.unpackbits(read, count=int(self.meta[image])))
        upper = np.stack([high & 15, high >> 4], 1).astype(np.int32) << 16
        value = (low + upper - _MARGIN).astype(np.float32)
        return index, value / np.float32(self.meta[3 - image]), certainty.astype(np.float32) / 255


def _steps(size: tuple[int, int]) -> int:
    """Steps a pixel of a stored target: fewer in images beyond the range of 20 bits."""
    steps = _STEP
    while steps > 1 and max(size) * steps + 2 * _MARGIN >= _RANGE:
        steps //= 2
    return steps


def read_pair(
    warp: Warp, anchors0: Anchors, anchors1: Anchors, options: AnchoredOptions
) -> PairReading:
    """Read both directions of a warp at the anchors, on the warp's device.

    Args:
        warp: of the pair (0, 1).
        anchors0: of image 0.
        anchors1: of image 1.
        options: see there.
    """
    results = []
    for there, here, other in ((warp, anchors0, anchors1), (warp.swapped(), anchors1, anchors0)):
        xy, certainty, cycle = read_warp(there, here.xy_px, symmetric=options.symmetric)
        good = (certainty >= options.min_certainty) & (cycle <= options.max_cycle_px)
        # One transfer to the processor for each direction.
        rows = torch.cat([xy, certainty[:, None], good[:, None].float()], 1).cpu().numpy()
        read = rows[:, 3] > 0
        read[read] = other.allows(rows[read, :2])
        results.append((read, rows[read, :2], rows[read, 2]))
    return PairReading.pack(anchors0, anchors1, *results)


def read_warp(
    warp: Warp, xy_px: np.ndarray | torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read a warp at points of image 0.

    With ``symmetric`` a point goes where the warp carries it after half of what is missing from
    there and back has been put right. To first order this is the mean of the warp and of the
    inverse of its reverse, two estimates of one thing.

    Returns:
        (N, 2) stored pixels of image 1, (N,) certainties, (N,) cycle errors in cells; float32, on
        the warp's device. The certainty is 0 beyond the outermost cell centres of both grids,
        where nothing can be interpolated.
    """
    uv = transform(inverse(warp.frame0), torch.as_tensor(xy_px, device=warp.flow0.device))
    there = read_grid(warp.flow0, uv)
    missing = uv - read_grid(warp.flow1, there)
    height, width = warp.flow0.shape[:2]
    cycle = (missing * uv.new_tensor([width / 2, height / 2])).norm(dim=1)
    inside = _between_centres(uv, warp.flow0) & _between_centres(there, warp.flow1)
    certainty = read_grid(warp.certainty0[..., None], uv)[:, 0]
    target = read_grid(warp.flow0, uv + missing / 2) if symmetric else there
    return transform(warp.frame1, target), torch.where(inside, certainty, 0.0), cycle


def _between_centres(uv: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    height, width = grid.shape[:2]
    limit = uv.new_tensor([1 - 1 / width, 1 - 1 / height]) + 1e-6
    return (uv.abs() <= limit).all(1)


def read_matches(
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    scores: np.ndarray,
    anchors0: Anchors,
    anchors1: Anchors,
    options: AnchoredOptions,
) -> PairReading:
    """Carry the matches of a semi-dense matcher over to the anchors.

    The matches around an anchor are fitted by an affine map, which is read at the anchor: exact
    wherever the motion is affine. Anchors that lie between too few matches are not read.

    Args:
        keypoints0: (M, 2) stored pixels of image 0, hloc's frame.
        keypoints1: (M, 2) the same in image 1.
        scores: (M,) in [0, 1].
        anchors0: of image 0.
        anchors1: of image 1.
        options: ``max_cycle_px`` counts eighths of the distance between matches: pixels of the
            network, whose matches lie 8 px apart.
    """
    ends = [np.asarray(k, dtype=np.float64).reshape(-1, 2) for k in (keypoints0, keypoints1)]
    weights = np.asarray(scores, dtype=np.float64)
    empty = (np.zeros((0, 2), np.float32), np.zeros(0, np.float32))
    if len(weights) < _LocalFit.least:
        results = [(np.zeros(len(a), bool), *empty) for a in (anchors0, anchors1)]
        return PairReading.pack(anchors0, anchors1, *results)
    fits = [_LocalFit(ends[0], ends[1], weights), _LocalFit(ends[1], ends[0], weights)]
    results = []
    for index, (here, other) in enumerate(((anchors0, anchors1), (anchors1, anchors0))):
        xy, certainty, read = fits[index](here.xy_px.astype(np.float64))
        back, _, returned = fits[1 - index](np.where(read[:, None], xy, 0.0))
        limit = options.max_cycle_px * max(1.0, fits[index].spacing / 8)
        read &= returned & (np.linalg.norm(back - here.xy_px, axis=1) <= limit)
        read &= certainty >= options.min_certainty
        read[read] = other.allows(xy[read])
        results.append((read, xy[read], certainty[read]))
    return PairReading.pack(anchors0, anchors1, *results)


class _LocalFit:
    """Affine maps fitted to the matches around a point."""

    least = 5  # matches of a fit
    most = 9

    def __init__(self, source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> None:
        from scipy.spatial import KDTree

        self.source, self.target, self.weights = source, target, weights
        self.tree = KDTree(source)
        nearest = self.tree.query(source, k=2)[0][:, 1]
        self.spacing = float(np.median(nearest))

    def __call__(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets (N, 2), certainties (N,), and whether there was enough to fit (N,)."""
        reach = 2.6 * self.spacing
        distance, near = self.tree.query(
            xy, k=min(self.most, len(self.source)), distance_upper_bound=max(reach, 1e-3)
        )
        found = np.isfinite(distance)
        # Matches on one side only would be extrapolated from: the nearest must be a neighbour.
        read = (found.sum(1) >= self.least) & (distance[:, 0] <= 1.2 * self.spacing)
        near = np.where(found, near, 0)
        weight = np.where(found, self.weights[near].clip(1e-3), 0.0)
        weight *= np.exp(-0.5 * (np.where(found, distance, 0) / max(self.spacing, 1e-3)) ** 2)
        offset = (self.source[near] - xy[:, None]) / max(self.spacing, 1e-3)
        targets = self.target[near]
        # Wrong matches must not bend the fit: at first by how far each moves from the median
        # motion, then by how far it lies from the fit. An affine motion is fitted exactly by
        # whatever weights.
        motion = np.where(found[..., None], targets - self.source[near], np.nan)
        with np.errstate(invalid="ignore"):
            odd = np.linalg.norm(motion - _nanmedian(motion)[:, None], axis=2)
        for step in range(4):
            scale = _nanmedian(np.where(found, odd, np.nan)[..., None])[:, 0]
            tolerance = (3 if step == 0 else 2) * scale + 0.05
            trust = 1 / (1 + (np.where(found, odd, 0) / tolerance[:, None]) ** 2) ** 2
            affine = self._solve(offset, targets, weight * trust)
            odd = np.linalg.norm(_apply(offset, affine) - targets, axis=2)
        weight = weight * trust
        total = weight.sum(1)
        certainty = (weight * self.weights[near]).sum(1) / np.maximum(total, 1e-12)
        return affine[:, 0], certainty, read & np.isfinite(affine[:, 0]).all(1)

    @staticmethod
    def _solve(offset: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """(N, 3, 2): constant, derivative by x, derivative by y."""
        design = np.concatenate([np.ones((*offset.shape[:2], 1)), offset], axis=2)
        weighted = design * weight[..., None]
        normal = np.einsum("nki,nkj->nij", weighted, design)
        # A trace of damping for matches on a line; it pulls towards the similarity of no motion.
        normal += np.eye(3) * (1e-9 * weight.sum(1).clip(1e-12))[:, None, None]
        centre = target[:, :1]
        right = np.einsum("nki,nkj->nij", weighted, target - centre)
        solution: np.ndarray = np.linalg.solve(normal, right)
        solution[:, 0] += centre[:, 0]
        return solution


def _nanmedian(values: np.ndarray) -> np.ndarray:
    """Medians (N, D) over the middle axis, 0 where there is no value."""
    ordered = np.sort(values, axis=1)  # NaN last
    count = np.isfinite(values[..., 0]).sum(1)
    row = np.arange(len(values))
    low = ordered[row, np.maximum(count - 1, 0) // 2]
    high = ordered[row, np.minimum(count // 2, np.maximum(count - 1, 0))]
    return np.where((count > 0)[:, None], (low + high) / 2, 0.0)


def _apply(offset: np.ndarray, affine: np.ndarray) -> np.ndarray:
    moved: np.ndarray = affine[:, None, 0] + np.einsum("nki,nij->nkj", offset, affine[:, 1:])
    return moved


# -------------------------------------------------------------------------------------- linking


@dataclass(kw_only=True)
class _Table:
    """All readings of a scene in a row, sorted by pair, and the anchors of all images in a row."""

    image: np.ndarray  # (N,) int32 image of each anchor
    xy: np.ndarray  # (N, 2) float32
    tier: np.ndarray  # (N,) uint8
    start: np.ndarray  # (V + 1,) first anchor of each image
    source: np.ndarray  # (R,) int32 anchor
    into: np.ndarray  # (R,) int32 image of the target
    target: np.ndarray  # (R, 2) float32
    certainty: np.ndarray  # (R,) float32
    unit: np.ndarray  # (V,) float32 see ``Anchors.unit``


@dataclass(kw_only=True)
class _Observations:
    """Observations of proposed tracks."""

    track: np.ndarray  # (K,) int64
    image: np.ndarray  # (K,) int32
    xy: np.ndarray  # (K, 2) float32
    score: np.ndarray  # (K,) float32

    def __getitem__(self, rows: np.ndarray) -> _Observations:
        return _Observations(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def join(cls, parts: Sequence[_Observations]) -> _Observations:
        return cls(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in cls.__dataclass_fields__
            }
        )


def link(
    names: Sequence[str],
    anchors: Mapping[str, Anchors],
    readings: Mapping[Pair, PairReading] | Iterable[tuple[Pair, PairReading]],
    options: AnchoredOptions,
    max_keypoints: int | None = None,
) -> Tracks:
    """Link the readings of all pairs into tracks.

    The result depends neither on the order of names nor on that of the readings, and a track never
    has two observations in one image. Matches are written for every pair of ``readings`` whose
    images see a track, whether or not the warp between them did: COLMAP starts tracks from direct
    matches only, and verifies them.

    Args:
        names: all images; those without readings get no keypoints.
        anchors: by name, at least of the images with readings.
        readings: by pair; read once.
        options: see there.
        max_keypoints: an image, instead of the options'.

    Raises:
        InputError: a reading does not fit its anchors.
    """
    ordered = sorted(names)
    given = list(readings.items()) if isinstance(readings, Mapping) else list(readings)
    given.sort(key=lambda item: item[0])
    table = _tabulate(ordered, anchors, given)
    near = _near_anchors(table, options.merge_px)
    observations, taken = _guided(table, near, options)
    stars = _stars(table, near, taken, int(observations.track.max(initial=-1)) + 1)
    joined = _Observations.join([observations, stars])
    limit = options.max_keypoints if max_keypoints is None else max_keypoints
    return _write(names, ordered, [pair for pair, _ in given], joined, limit)


def _tabulate(
    names: list[str],
    anchors: Mapping[str, Anchors],
    given: list[tuple[Pair, PairReading]],
) -> _Table:
    index = {name: i for i, name in enumerate(names)}
    count = np.array([len(anchors[name]) if name in anchors else 0 for name in names], np.int64)
    start = np.concatenate([[0], np.cumsum(count)])
    present = [anchors[name] for name in names if name in anchors]
    source, into, target, certainty = [], [], [], []
    for pair, reading in given:
        ends = [index[name] for name in pair]
        if tuple(reading.meta[:2]) != tuple(count[ends]):
            raise InputError(
                f"The reading of {pair[0]} and {pair[1]} is of {tuple(map(int, reading.meta[:2]))} "
                f"anchors, but the images have {tuple(map(int, count[ends]))}."
            )
        for direction in (0, 1):
            rows, xy, certain = reading.direction(direction)
            source.append((rows + start[ends[direction]]).astype(np.int32))
            into.append(np.full(len(rows), ends[1 - direction], np.int32))
            target.append(xy)
            certainty.append(certain)
    return _Table(
        image=np.repeat(np.arange(len(names), dtype=np.int32), count),
        xy=_joined([a.xy_px for a in present], (0, 2), np.float32),
        tier=_joined([a.tier for a in present], (0,), np.uint8),
        start=start,
        source=_joined(source, (0,), np.int32),
        into=_joined(into, (0,), np.int32),
        target=_joined(target, (0, 2), np.float32),
        certainty=_joined(certainty, (0,), np.float32),
        unit=np.array([anchors[n].unit if n in anchors else 1.0 for n in names], np.float32),
    )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(empty, dtype)


@dataclass(kw_only=True)
class _Near:
    """Readings that end near an anchor of their image, sorted by reading."""

    reading: np.ndarray  # (P,) int64
    anchor: np.ndarray  # (P,) int64
    distance: np.ndarray  # (P,) float32 px of the options


def _near_anchors(table: _Table, radius: float) -> _Near:
    """All anchors within ``radius`` of each target."""
    order = np.argsort(table.into, kind="stable")
    bounds = np.searchsorted(table.into[order], np.arange(len(table.unit) + 1))
    parts = []
    for image, unit in enumerate(table.unit):
        rows = order[bounds[image] : bounds[image + 1]]
        first, last = table.start[image], table.start[image + 1]
        query, found, distance = within(
            table.xy[first:last], table.target[rows], float(radius * unit)
        )
        parts.append((rows[query], found + first, distance / unit))
    reading, anchor, distance = (
        np.concatenate([part[k] for part in parts]) if parts else np.zeros(0, np.int64)
        for k in range(3)
    )
    order = _order(reading * max(1, len(table.image)) + anchor)
    return _Near(
        reading=reading[order],
        anchor=anchor[order],
        distance=distance[order].astype(np.float32),
    )


def within(
    points: np.ndarray, queries: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a query (Q, 2) and a point (P, 2) no farther than ``radius`` from each other.

    Every point is entered into the up to four cells of side 2 x radius that its disc touches, so
    that a query looks into its own cell only.

    Returns:
        indices of queries, indices of points, and distances (K,).
    """
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    if not len(points) or not len(queries):
        return nothing
    side = 2 * radius
    low = points.min(0) - side
    columns = int((points[:, 0].max() - low[0]) / side) + 3
    total = columns * (int((points[:, 1].max() - low[1]) / side) + 3)
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * (radius * (1 + 1e-6))
    cell = np.floor((points[:, None] + corners - low) / side).astype(np.int64)
    key = (cell[..., 1] * columns + cell[..., 0]).ravel()
    # A disc that lies in one column of cells enters each of them twice.
    entries = np.unique(key * len(points) + np.repeat(np.arange(len(points)), 4))
    owner, entered = entries % len(points), entries // len(points)
    begin = np.searchsorted(entered, np.arange(total + 1))
    # By column: NumPy is slow along an axis of two.
    column, row = (np.floor((queries[:, axis] - low[axis]) / side) for axis in (0, 1))
    possible = (column >= 0) & (row >= 0) & (column < columns) & (row < total // columns)
    column, row = (np.where(possible, part, 0).astype(np.int64) for part in (column, row))
    home = row * columns + column
    position, end = begin[home], begin[home + 1]
    query = np.flatnonzero(possible & (position < end))
    position, end = position[query], end[query]
    results: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        alive = position < end
        query, position, end = query[alive], position[alive], end[alive]
        if not len(query):
            break
        point = owner[position]
        distance = _length(queries.take(query, 0) - points.take(point, 0))
        good = distance <= radius
        results.append((query[good], point[good], distance[good]))
        position = position + 1
    if not results:
        return nothing
    return tuple(np.concatenate([r[k] for r in results]) for k in range(3))  # type: ignore[return-value]


def _length(xy: np.ndarray) -> np.ndarray:
    """Lengths (N,) of vectors (N, 2). NumPy's norm sums each row by itself, which is slow."""
    x, y = xy[:, 0], xy[:, 1]
    length: np.ndarray = np.sqrt(x * x + y * y)
    return length


def _guided(
    table: _Table, near: _Near, options: AnchoredOptions
) -> tuple[_Observations, np.ndarray]:
    """Tracks of keypoints, and which anchors (N,) they use up."""
    taken = np.zeros(len(table.image), dtype=bool)
    empty = _Observations(
        track=np.zeros(0, np.int64),
        image=np.zeros(0, np.int32),
        xy=np.zeros((0, 2), np.float32),
        score=np.zeros(0, np.float32),
    )
    if not options.guided:
        return empty, taken
    edges, strength = _mutual(table, near)
    label = _conflict_free(edges, strength, table.image)
    size = np.bincount(label, minlength=1) if len(label) else np.zeros(1, np.int64)
    member = size[label] > 1
    if not member.any():
        return empty, taken
    # Tracks in the order of their first anchor.
    members = np.flatnonzero(member)
    _, first, track = np.unique(label[members], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    track_of = np.full(len(table.image), -1, np.int64)
    track_of[members] = rank[track]

    rows = np.flatnonzero(member[table.source])
    observations = _average(table, track_of, members, rows, options)
    # An anchor that a track runs over is no point of its own.
    order = np.argsort(observations.image, kind="stable")
    bounds = np.searchsorted(observations.image[order], np.arange(len(table.unit) + 1))
    for image, unit in enumerate(table.unit):
        first_anchor, last_anchor = table.start[image], table.start[image + 1]
        _, found, _ = within(
            table.xy[first_anchor:last_anchor],
            observations.xy[order[bounds[image] : bounds[image + 1]]],
            float(options.merge_px * unit),
        )
        taken[found + first_anchor] = True
    taken[members] = True
    return observations, taken


def _mutual(table: _Table, near: _Near) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (E, 2) of keypoints that are each other's nearest, and how sure that is (E,)."""
    rows = np.flatnonzero(
        (table.tier[table.source[near.reading]] == 1) & (table.tier[near.anchor] == 1)
    )
    reading, anchor, distance = near.reading[rows], near.anchor[rows], near.distance[rows]
    best = _nearest(reading, distance)
    source, found = table.source[reading[best]].astype(np.int64), anchor[best]
    sure = table.certainty[reading[best]] - 0.25 * distance[best]
    count = len(table.image)
    forward = source < found
    key = np.where(forward, source * count + found, found * count + source)
    # A key that occurs in both directions is mutual.
    order = _order(2 * key + forward)
    key, forward, sure = key[order], forward[order], sure[order]
    twice = np.flatnonzero((key[1:] == key[:-1]) & (forward[1:] != forward[:-1]))
    edges = np.stack([key[twice] // count, key[twice] % count], 1)
    return edges, sure[twice] + sure[twice + 1]


def _order(key: np.ndarray) -> np.ndarray:
    """Stable order of int64 keys >= 0. NumPy sorts numbers much faster than indices."""
    count = len(key)
    if not count or int(key.max()) >= (1 << 62) // count:
        return np.argsort(key, kind="stable")
    numbered = key * count + np.arange(count)
    numbered.sort()
    order: np.ndarray = numbered % count
    return order


def _starts(key: np.ndarray) -> np.ndarray:
    """Rows at which the groups of a sorted key begin."""
    if not len(key):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))


def _nearest(key: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The row of the smallest distance, the first of several, in each group of a sorted key."""
    begin = _starts(key)
    if not len(begin):
        return begin
    size = np.diff(np.append(begin, len(key)))
    least = np.flatnonzero(distance == np.repeat(np.minimum.reduceat(distance, begin), size))
    return least[_starts(key[least])]


def _conflict_free(edges: np.ndarray, strength: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Label (N,) of each anchor's track: components of the edges with one anchor an image."""
    # Where a component has two anchors in an image, its edges are taken again, the surest first,
    # leaving out those that would join two anchors of an image.
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(image)
    if not len(edges):
        return np.arange(count)
    graph = coo_matrix((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), (count, count))
    total, label = connected_components(graph, directed=False)
    label = label.astype(np.int64)
    key = np.sort(label * (int(image.max()) + 1) + image)
    doubled = np.unique(key[1:][key[1:] == key[:-1]] // (int(image.max()) + 1))
    bad = np.zeros(total, dtype=bool)
    bad[doubled] = True
    rows = np.flatnonzero(bad[label[edges[:, 0]]])
    rows = rows[np.lexsort((edges[rows, 1], edges[rows, 0], -np.round(strength[rows], 4)))]
    parent: dict[int, int] = {}
    images: dict[int, set[int]] = {}

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    nodes = np.unique(edges[rows])
    for node, own in zip(nodes.tolist(), image[nodes].tolist(), strict=True):
        parent[node], images[node] = node, {own}
    for a, b in edges[rows].tolist():
        ra, rb = root(a), root(b)
        if ra == rb or images[ra] & images[rb]:
            continue
        if len(images[ra]) < len(images[rb]):
            ra, rb = rb, ra
        parent[rb] = ra
        images[ra] |= images.pop(rb)
    # New labels beyond the old ones; the smallest anchor names its track.
    label[nodes] = total + np.array([root(node) for node in nodes.tolist()], np.int64)
    return np.unique(label, return_inverse=True)[1]


def _average(
    table: _Table,
    track_of: np.ndarray,
    members: np.ndarray,
    rows: np.ndarray,
    options: AnchoredOptions,
) -> _Observations:
    """Observations of keypoint tracks: members, and the places their readings agree on."""
    # In an image where the detector found the point, its position and the readings of the other
    # members are averaged, weighted by how much each scatters in this scene. In an image where it
    # did not, the readings alone give the position.
    views = len(table.unit)
    track, into = track_of[table.source[rows]], table.into[rows].astype(np.int64)
    key = track * views + into
    order = _order(key)
    rows, key = rows[order], key[order]
    unit = table.unit[table.into[rows]]
    begin = _starts(key)
    groups = key[begin]
    group = np.repeat(np.arange(len(begin)), np.diff(np.append(begin, len(key))))
    own_key = track_of[members] * views + table.image[members]
    own_order = np.argsort(own_key)
    slot = np.searchsorted(own_key[own_order], groups)
    slot = np.minimum(slot, len(own_key) - 1)
    has_own = own_key[own_order][slot] == groups
    own_xy = table.xy[members][own_order][slot].astype(np.float64)

    target = table.target.take(rows, 0).astype(np.float64)
    middle = own_xy.copy()
    lone = ~has_own[group]
    middle[~has_own] = _medians(table.target[rows[lone]], group[lone])
    residual = _length(target - middle.take(group, 0)) / unit
    good = residual <= options.max_spread_px
    certainty = table.certainty[rows].astype(np.float64) * good
    total = np.bincount(group, certainty, len(groups))
    agreeing = np.bincount(group, good, len(groups))
    mean = (
        np.stack([np.bincount(group, certainty * target[:, k], len(groups)) for k in (0, 1)], 1)
        / np.maximum(total, 1e-9)[:, None]
    )

    share = _reading_share(target, unit, mean, own_xy, good, group, agreeing, has_own)
    weight = share * agreeing
    blend = (own_xy + weight[:, None] * mean) / (1 + weight)[:, None]
    xy = np.where(has_own[:, None], np.where(agreeing[:, None] > 0, blend, own_xy), mean)
    keep = has_own | (total > 0)
    # Members that nothing was read into still are observations.
    alone = np.setdiff1d(np.arange(len(own_key)), own_order[slot[has_own]], assume_unique=True)
    score = total / np.maximum(agreeing, 1)
    return _Observations(
        track=np.concatenate([groups[keep] // views, own_key[alone] // views]),
        image=np.concatenate([groups[keep] % views, own_key[alone] % views]).astype(np.int32),
        xy=np.concatenate([xy[keep], table.xy[members][alone]]).astype(np.float32),
        score=np.concatenate([score[keep], np.zeros(len(alone))]).astype(np.float32),
    )


def _medians(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Medians (G, 2), float64, by axis of values (R, 2), float32, of a sorted group."""
    begin = _starts(group)
    end = np.append(begin[1:], len(values))
    result = np.empty((len(begin), 2))
    for axis in (0, 1):
        # Group and value in one number: the bits of floats are in their order, but for the sign.
        bits = np.ascontiguousarray(values[:, axis], np.float32).view(np.int32).astype(np.int64)
        ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (group.astype(np.int64) << 32)
        ordered.sort()
        bits = (ordered - (group.astype(np.int64) << 32)).astype(np.int32)
        number = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32).astype(np.float64)
        result[:, axis] = (number[(begin + end - 1) // 2] + number[(begin + end) // 2]) / 2
    return result


def _reading_share(
    target: np.ndarray,
    unit: np.ndarray,
    mean: np.ndarray,
    own_xy: np.ndarray,
    good: np.ndarray,
    group: np.ndarray,
    agreeing: np.ndarray,
    has_own: np.ndarray,
) -> float:
    """Weight of one reading against a detector's position of weight 1."""
    # Readings of a point scatter around each other by the warp's noise and that of the keypoints
    # they start from; they scatter around the detector's position by its noise in addition. The
    # difference is what the detector's position is worth.
    usable = good & has_own[group] & (agreeing[group] >= 3)
    if usable.sum() < 30:
        return 0.0
    g = group[usable]
    around_mean = ((target[usable] - mean[g]) / unit[usable, None]) ** 2
    # A mean of n values takes up a share 1 / n of their variance.
    summed = around_mean[:, 0] + around_mean[:, 1]
    readings = np.median(summed * agreeing[g] / (agreeing[g] - 1))
    from_own = ((target[usable] - own_xy[g]) / unit[usable, None]) ** 2
    around_own = np.median(from_own[:, 0] + from_own[:, 1])
    return float(np.clip((around_own - readings) / max(readings, 1e-12), 0.0, 1.0))


def _stars(table: _Table, near: _Near, taken: np.ndarray, first_track: int) -> _Observations:
    """Tracks of single anchors and their readings."""
    views = len(table.unit)
    rows = np.flatnonzero(~taken[table.source])
    # Pairs given in both orders give two readings of one thing: the surer one is it.
    key = table.source[rows].astype(np.int64) * views + table.into[rows]
    order = np.lexsort((-table.certainty[rows], key))
    rows, key = rows[order], key[order]
    rows = rows[np.concatenate([[True], key[1:] != key[:-1]])] if len(rows) else rows
    source = table.source[rows].astype(np.int64)
    count = np.bincount(source, minlength=len(taken))
    sure = np.bincount(source, table.certainty[rows], minlength=len(taken))
    anchors = np.flatnonzero(count)
    rank = np.full(len(taken), len(taken), np.int64)
    order = np.lexsort((anchors, -np.round(sure[anchors], 3), table.tier[anchors], -count[anchors]))
    rank[anchors[order]] = np.arange(len(anchors))

    used = np.zeros(len(table.source), dtype=bool)
    used[rows] = True
    edge = used[near.reading] & ~taken[near.anchor]
    a, b = table.source[near.reading[edge]].astype(np.int64), near.anchor[edge]
    chosen = _greedy(a, b, rank, rank < len(taken))

    keep = chosen[source]
    rows, source = rows[keep], source[keep]
    centres = np.flatnonzero(chosen)
    track_of = np.full(len(taken), -1, np.int64)
    track_of[centres[np.argsort(rank[centres])]] = first_track + np.arange(len(centres))
    return _Observations(
        track=np.concatenate([track_of[centres], track_of[source]]),
        image=np.concatenate([table.image[centres], table.into[rows]]).astype(np.int32),
        xy=np.concatenate([table.xy[centres], table.target[rows]]),
        score=np.concatenate([sure[centres] / count[centres], table.certainty[rows]]).astype(
            np.float32
        ),
    )


def _greedy(a: np.ndarray, b: np.ndarray, rank: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Choose nodes by rank, the smallest first, each taking out the nodes joined to it."""
    # All nodes that come before everything they are joined to are chosen at once, until none is
    # left: the result of going one by one, in a few passes.
    chosen = np.zeros(len(wanted), dtype=bool)
    waiting = wanted.copy()
    last = len(rank)
    while True:
        alive = waiting[a] & waiting[b]
        a, b = a[alive], b[alive]
        if not len(a):
            chosen |= waiting
            return chosen
        first = np.full(len(rank), last, np.int64)
        np.minimum.at(first, a, rank[b])
        np.minimum.at(first, b, rank[a])
        now = waiting & (rank < first)
        chosen |= now
        waiting &= ~now
        waiting[b[now[a]]] = False
        waiting[a[now[b]]] = False


def _write(
    names: Sequence[str],
    ordered: list[str],
    pairs: list[Pair],
    observations: _Observations,
    limit: int | None,
) -> Tracks:
    """Number the keypoints of every image and match those of one track."""
    views = len(ordered)
    observations = _long_enough(observations)
    if limit is not None:
        observations = _long_enough(_limited(observations, limit, views))
    order = _by_worth(observations)
    length = np.bincount(observations.track)[observations.track] if len(order) else np.zeros(0)
    _, first = np.unique(observations.track[order], return_index=True)
    # Tracks numbered by worth, so that keypoints are the strongest first and sorted by track.
    number = np.zeros(int(observations.track.max(initial=-1)) + 1, np.int64)
    number[observations.track[order][np.sort(first)]] = np.arange(len(first))
    track = number[observations.track]
    order = np.lexsort((track, observations.image))
    bounds = np.searchsorted(observations.image[order], np.arange(views + 1))
    rows_of = {name: order[bounds[index] : bounds[index + 1]] for index, name in enumerate(ordered)}
    matches, scores = {}, {}
    for a, b in pairs:
        _, rows0, rows1 = np.intersect1d(
            track[rows_of[a]], track[rows_of[b]], assume_unique=True, return_indices=True
        )
        matches[a, b] = np.stack([rows0, rows1], 1).astype(np.int64)
        scores[a, b] = np.minimum(
            observations.score[rows_of[a][rows0]], observations.score[rows_of[b][rows1]]
        )
    return Tracks(
        keypoints={name: observations.xy[rows_of[name]] for name in names},
        matches=matches,
        scores=scores,
        keypoint_scores={
            name: (length[rows_of[name]] + observations.score[rows_of[name]]).astype(np.float32)
            for name in names
        },
        lengths=np.bincount(track).astype(np.int64) if len(track) else np.zeros(0, np.int64),
    )


def _limited(observations: _Observations, limit: int, views: int) -> _Observations:
    """The best tracks that fit into ``limit`` keypoints an image."""
    # Tracks are taken by worth, some at a time. One that would lose more than half of its images to
    # the limit, or all but two, is left out as a whole: cutting each image on its own would leave
    # many stumps.
    if not len(observations.track) or np.bincount(observations.image).max() <= limit:
        return observations
    order = _by_worth(observations)
    track = observations.track[order]
    number = np.cumsum(np.concatenate([[0], track[1:] != track[:-1]]))
    room = np.full(views, limit, np.int64)
    kept = []
    chunk = max(64, limit // 8)
    bounds = np.searchsorted(number, np.arange(0, number[-1] + 1 + chunk, chunk))
    for begin, end in itertools.pairwise(bounds):
        rows, own = order[begin:end], number[begin:end] - number[begin]
        fits = room[observations.image[rows]] > _place_in_image(observations.image[rows])
        left, full = np.bincount(own, fits), np.bincount(own)
        fits &= (left >= np.minimum(full, np.maximum(3, full / 2)))[own]
        room -= np.bincount(observations.image[rows[fits]], minlength=views)
        kept.append(rows[fits])
    return observations[np.sort(np.concatenate(kept))]


def _place_in_image(image: np.ndarray) -> np.ndarray:
    """How many of the entries (K,) before each name the same image."""
    order = np.argsort(image, kind="stable")
    counts = np.bincount(image)
    place = np.empty(len(image), np.int64)
    place[order] = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def _long_enough(observations: _Observations) -> _Observations:
    """Without the tracks of a single image."""
    if not len(observations.track):
        return observations
    return observations[np.bincount(observations.track)[observations.track] >= 2]


def _by_worth(observations: _Observations) -> np.ndarray:
    """Order of observations by their track: long ones first, then sure ones."""
    if not len(observations.track):
        return np.zeros(0, np.int64)
    length = np.bincount(observations.track)
    sure = np.bincount(observations.track, observations.score) / np.maximum(length, 1)
    track = observations.track
    order: np.ndarray = np.lexsort((track, -np.round(sure[track], 3), -length[track]))
    return order
