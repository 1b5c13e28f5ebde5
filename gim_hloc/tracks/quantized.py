"""Quantised tracks: hloc's way from dense matches to keypoints, vectorised.

Matches are rounded to cells; a cell becomes one keypoint, at the centre of the fine bin that
collected the highest score; the best keypoints of an image stay, and the matches are assigned to
them anew. The result is hloc's (``hloc.match_dense``, v1.5) on the same matches, number by number,
kept for those who compare: ``anchored`` is more accurate.

What makes the result depend on order (cells are numbered as they appear, scores are added up in
float32 one after the other, equal scores are settled by numpy's sort) is done here in the same
order and in the same number format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.tracks.base import Pair, Tracks

Raw = tuple[np.ndarray, np.ndarray, np.ndarray]

_MAX_TABLE = 1 << 25  # bins of the table that nearest keypoints are looked up in


@dataclass(frozen=True, kw_only=True)
class QuantizedOptions:
    """Numbers of hloc's aggregation; GIM's setting."""

    max_error: float = 2.0  # px; its whole part is the side of a bin, and matches move no farther
    cell_size: float = 8  # px, one keypoint a cell; at least max_error is used
    max_keypoints: int | None = 8192  # an image; None keeps all and assigns nothing anew

    def __post_init__(self) -> None:
        if not (self.max_error > 0 and self.cell_size > 0):
            raise InputError(
                f"max_error is {self.max_error} and cell_size {self.cell_size}; both are positive."
            )
        if self.max_keypoints is not None and self.max_keypoints < 1:
            raise InputError(f"max_keypoints is {self.max_keypoints}, it must be positive.")


def quantize(names: Sequence[str], raw: Mapping[Pair, Raw], options: QuantizedOptions) -> Tracks:
    """Turn dense matches into keypoints and matches as hloc does.

    Args:
        names: all images; those without pairs get no keypoints.
        raw: (name0, name1) -> keypoints (M, 2) of both images, stored pixels, hloc's frame, and
            scores (M,). float32, as hloc stores them, or anything else, which is then kept.
        options: see there.

    Returns:
        Tracks whose matches, in hloc's files, are ``matches0`` and ``matching_scores0`` (there as
        float16).
    """
    appearances = Counter(name for pair in raw for name in pair)
    # hloc's order of work, which numbers the cells.
    pairs = sorted(raw, key=lambda pair: (min(appearances[pair[0]], appearances[pair[1]]), pair))
    parts: dict[str, list[tuple[Pair, int]]] = {}
    for pair in pairs:
        for side in (0, 1):
            parts.setdefault(pair[side], []).append((pair, side))
    checked = {pair: _checked(pair, raw[pair]) for pair in pairs}

    images: dict[str, _Image] = {}
    cells: dict[tuple[Pair, int], np.ndarray] = {}
    for name, own in parts.items():
        xy = np.concatenate([checked[pair][side] for pair, side in own])
        scores = np.concatenate([checked[pair][2] for pair, _ in own])
        images[name], cell = _aggregate(xy, scores, options)
        ends = np.cumsum([len(checked[pair][2]) for pair, _ in own])[:-1]
        cells.update(zip(own, np.split(cell, ends), strict=True))

    matches, match_scores = {}, {}
    for pair in raw:
        keypoints0, keypoints1, scores = checked[pair]
        if options.max_keypoints is None:
            rows0, rows1 = cells[pair, 0], cells[pair, 1]
        else:
            rows0 = images[pair[0]].nearest(keypoints0, options.max_error)
            rows1 = images[pair[1]].nearest(keypoints1, options.max_error)
        matches[pair], match_scores[pair] = _one_to_one(rows0, rows1, scores)
    nothing = np.zeros((0, 2), np.float32)
    return Tracks(
        keypoints={name: images[name].xy if name in images else nothing for name in names},
        matches=matches,
        scores=match_scores,
        keypoint_scores={
            name: images[name].scores if name in images else nothing[:, 0] for name in names
        },
    )


def _checked(pair: Pair, value: Raw) -> Raw:
    keypoints0, keypoints1, scores = (np.asarray(array) for array in value)
    if not len(keypoints0) == len(keypoints1) == len(scores):
        raise InputError(
            f"The matches of {pair[0]} and {pair[1]} have {len(keypoints0)} and {len(keypoints1)} "
            f"ends and {len(scores)} scores."
        )
    return keypoints0.reshape(-1, 2), keypoints1.reshape(-1, 2), scores


@dataclass(kw_only=True)
class _Image:
    """Keypoints of an image, ready to be searched."""

    xy: np.ndarray  # (N, 2) float32
    scores: np.ndarray  # (N,)
    pitch: int  # px between the possible places of keypoints, 0 if any is possible
    _tree: Any = field(default=None, repr=False)
    _table: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def nearest(self, xy: np.ndarray, max_error: float) -> np.ndarray:
        """Row of the nearest keypoint to each of (M, 2), -1 beyond ``max_error``.

        Keypoints lie on a lattice, so that a few look-ups find the nearest. hloc asks a KD-tree,
        whose choice among equally near ones is its own: those are asked of the tree here too.
        """
        if not len(self.xy) or not len(xy):
            return np.full(len(xy), -1)
        table = self._lattice()
        if table is None:
            return self._from_tree(xy, max_error)
        bins, doubled = table
        origin = self._origin
        query = xy.astype(np.float64)
        points = self.xy.astype(np.float64)
        home = np.round((query + 0.5) / self.pitch).astype(np.int64) - origin
        reach = int(max_error / self.pitch + 0.5)
        best = np.full(len(xy), -1)
        square = np.full(len(xy), np.inf)
        unsure = np.zeros(len(xy), dtype=bool)
        height, width = bins.shape
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                column, row = home[:, 0] + dx, home[:, 1] + dy
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                found = bins[np.where(inside, row, 0), np.where(inside, column, 0)]
                rows = np.flatnonzero(inside & (found >= 0))
                found = found[rows]
                offset = points[found] - query[rows]
                distance = (offset * offset).sum(1)
                margin = 1e-9 * (1 + distance)
                nearer = distance < square[rows] - margin
                equal = (np.abs(distance - square[rows]) <= margin) | doubled[found]
                unsure[rows] = np.where(
                    nearer,
                    doubled[found],
                    unsure[rows] | (equal & (distance <= square[rows] + margin)),
                )
                best[rows[nearer]] = found[nearer]
                square[rows[nearer]] = distance[nearer]
        near = np.sqrt(square)
        # What the tree would measure could differ in the last digit.
        unsure |= np.abs(near - max_error) < 1e-9 * (1 + max_error)
        best[~(near <= max_error)] = -1
        asked = np.flatnonzero(unsure)
        if len(asked):
            best[asked] = self._from_tree(xy[asked], max_error)
        return best

    def _lattice(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Table (H, W) of the keypoint in each bin, and which keypoints share theirs."""
        if self._table is None and self.pitch:
            place = np.round((self.xy + 0.5) / self.pitch).astype(np.int64)
            self._origin = place.min(0)
            place -= self._origin
            width, height = (int(v) + 1 for v in place.max(0))
            if width * height > _MAX_TABLE:
                self.pitch = 0
                return None
            bins = np.full((height, width), -1, np.int64)
            bins[place[:, 1], place[:, 0]] = np.arange(len(place))
            doubled = np.bincount(place[:, 1] * width + place[:, 0], minlength=width * height) > 1
            self._table = bins, doubled[place[:, 1] * width + place[:, 0]]
        return self._table

    def _from_tree(self, xy: np.ndarray, max_error: float) -> np.ndarray:
        from scipy.spatial import KDTree

        if self._tree is None:
            self._tree = KDTree(self.xy)
        distance, rows = self._tree.query(xy)
        rows[~(distance <= max_error)] = -1
        return np.asarray(rows)


def _aggregate(
    xy: np.ndarray, scores: np.ndarray, options: QuantizedOptions
) -> tuple[_Image, np.ndarray]:
    """Keypoints of an image from all its matches, and the cell (M,) of each match."""
    cell_side = max(options.cell_size, options.max_error)
    bin_side = int(options.max_error)
    cell, first = _numbered(_places(xy, cell_side))
    count = len(first)
    # A bin belongs to its cell: the same place may collect for two neighbouring cells.
    bin_place = _places(xy, bin_side)
    bins, bin_first = _numbered(np.c_[cell, bin_place])
    total = np.zeros(len(bin_first), scores.dtype)
    np.add.at(total, bins, scores)  # one after the other, as hloc adds them up
    owner = cell[bin_first]
    # Of equally good bins of a cell the first to appear; bins are numbered by appearance.
    order = np.lexsort((np.arange(len(total)), -total, owner))
    best = order[np.searchsorted(owner[order], np.arange(count))]
    places = _rounded(xy[bin_first[best]], bin_side).astype(np.float32)
    worth = total[best]
    if options.max_keypoints is not None:
        kept = np.argsort(worth)[::-1][: options.max_keypoints]
        places, worth = places[kept], worth[kept]
    return _Image(xy=places.reshape(-1, 2), scores=worth, pitch=bin_side), cell


def _places(xy: np.ndarray, side: float) -> np.ndarray:
    """What hloc tells cells apart by: whole numbers (M, 2), or the coordinates for side 0."""
    if side <= 0:
        return xy
    return np.asarray(np.round((xy + 0.5) / side))


def _rounded(xy: np.ndarray, side: float) -> np.ndarray:
    """Hloc's coordinates of a cell or bin."""
    if side <= 0:
        return xy
    return np.asarray(np.round(np.round((xy + 0.5) / side) * side - 0.5, 2))


def _numbered(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number (M,) of each row's value in the order of first appearance, and that row (N,)."""
    if not len(places):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key = places[:, 0]
    for column in range(1, places.shape[1]):
        # Numbers of the values so far and of this column's, put together.
        _, upper = np.unique(key, return_inverse=True)
        values, lower = np.unique(places[:, column], return_inverse=True)
        key = upper * len(values) + lower
    _, first, label = np.unique(key, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    order = np.argsort(first)
    number[order] = np.arange(len(first))
    return number[label], first[order]


def _one_to_one(
    rows0: np.ndarray, rows1: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matches (K, 2) that are the best of both ends, sorted by the first, and their scores."""
    valid = (rows0 != -1) & (rows1 != -1)
    ends = np.stack([rows0[valid], rows1[valid]], axis=1).astype(np.int64)
    scores = scores[valid]
    if not len(ends):
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    keep = _best_of_each(ends[:, 0], scores)
    keep &= _best_of_each(ends[:, 1], scores)
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(ends[kept, 0])]
    return ends[kept], scores[kept].astype(np.float32)


def _best_of_each(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Whether each match (M,) is the best of those with its id.

    Of equally good ones it is the first in the order that numpy's default sort leaves them in,
    which is hloc's choice.
    """
    order = np.argsort(ids)
    begin = np.flatnonzero(np.concatenate([[True], np.diff(ids[order]) > 0]))
    sizes = np.diff(np.append(begin, len(ids)))
    top = np.repeat(np.maximum.reduceat(scores[order], begin), sizes)
    equal = np.flatnonzero(scores[order] == top)
    group = np.repeat(np.arange(len(begin)), sizes)[equal]
    winner = np.zeros(len(ids), dtype=bool)
    winner[order[equal[np.unique(group, return_index=True)[1]]]] = True
    return winner
