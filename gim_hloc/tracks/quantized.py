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
from typing import Any

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.options import QuantizedOptions
from gim_hloc.tracks.base import Pair, Tracks

Raw = tuple[np.ndarray, np.ndarray, np.ndarray]

_MAX_TABLE = 1 << 25  # bins of the table that nearest keypoints are looked up in


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
            rows0 = images[pair[0]].nearest(keypoints0)
            rows1 = images[pair[1]].nearest(keypoints1)
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


def given(xy: np.ndarray, max_error: float) -> _Image:
    """Keypoints (N, 2) that are there already, for ``assign``; matches move ``max_error`` px."""
    xy = np.asarray(xy, dtype=np.float32).reshape(-1, 2)
    return _Image(xy, xy[:, 0], 0, max_error)


def assign(
    pair: Pair, raw: Raw, keypoints0: _Image, keypoints1: _Image
) -> tuple[np.ndarray, np.ndarray]:
    """Give the matches of a pair to the nearest keypoints, as hloc's ``assign_matches`` does.

    Args:
        pair: names, for messages.
        raw: as in ``quantize``.
        keypoints0: of image 0, see ``given``.
        keypoints1: of image 1.

    Returns:
        (K, 2) int64 rows, no row twice on one side, sorted by the first; and (K,) float32 scores.
    """
    xy0, xy1, scores = _checked(pair, raw)
    return _one_to_one(keypoints0.nearest(xy0), keypoints1.nearest(xy1), scores)


def _checked(pair: Pair, value: Raw) -> Raw:
    keypoints0, keypoints1, scores = (np.asarray(array) for array in value)
    if not len(keypoints0) == len(keypoints1) == len(scores):
        raise InputError(
            f"The matches of {pair[0]} and {pair[1]} have {len(keypoints0)} and {len(keypoints1)} "
            f"ends and {len(scores)} scores."
        )
    return keypoints0.reshape(-1, 2), keypoints1.reshape(-1, 2), scores


class _Image:
    """Keypoints of an image, ready to be searched.

    Args:
        xy: (N, 2) float32.
        scores: (N,).
        pitch: px between the possible places of keypoints, 0 if any is possible.
        reach: px within which nearest keypoints will be asked for.
    """

    def __init__(self, xy: np.ndarray, scores: np.ndarray, pitch: int, reach: float) -> None:
        self.xy, self.scores, self.reach = xy, scores, reach
        self._pitch = pitch
        self._tree: Any = None
        self._bins: np.ndarray | None = None
        if not pitch or not len(xy):
            return
        place = np.round((xy + 0.5) / pitch).astype(np.int64)
        # Twice as many empty bins around as a look-up goes, so that none leaves the table.
        self._steps = int(reach / pitch + 0.5)
        self._origin = place.min(0) - 2 * self._steps - 1
        place -= self._origin
        width, height = place.max(0) + 2 * self._steps + 2
        if width * height > _MAX_TABLE:
            return
        self._limit = np.array([width, height]) - self._steps - 1
        self._width = int(width)
        flat = place[:, 1] * width + place[:, 0]
        self._bins = np.full(width * height, len(xy), np.int32)
        self._bins[flat] = np.arange(len(xy))
        # Two keypoints may share a bin: it belongs to two cells.
        self._shared = np.append(self._bins[flat] != np.arange(len(xy)), False)
        self._shared[self._bins[flat[self._shared[:-1]]]] = True
        self._x, self._y = (np.append(xy[:, k].astype(np.float64), np.inf) for k in (0, 1))

    def nearest(self, xy: np.ndarray) -> np.ndarray:
        """Row of the nearest keypoint to each of (M, 2), -1 beyond ``reach``.

        Keypoints lie on a lattice, so that a few look-ups find the nearest. hloc asks a KD-tree,
        whose choice among equally near ones is its own: those are asked of the tree here too.
        """
        if not len(self.xy) or not len(xy):
            return np.full(len(xy), -1)
        if self._bins is None:
            return self._from_tree(xy)
        home = np.round((xy + 0.5) / self._pitch).astype(np.int64) - self._origin
        home = np.clip(home, self._steps, self._limit)
        base = home[:, 1] * self._width + home[:, 0]
        around = np.arange(-self._steps, self._steps + 1)
        offsets = (around[:, None] * self._width + around).ravel()
        found = self._bins[offsets[:, None] + base]
        x, y = xy[:, 0].astype(np.float64), xy[:, 1].astype(np.float64)
        with np.errstate(invalid="ignore"):
            square = (self._x[found] - x) ** 2
            square += (self._y[found] - y) ** 2
        chosen = square.argmin(axis=0)
        best = np.take_along_axis(found, chosen[None], axis=0)[0].astype(np.int64)
        least = square.min(axis=0)
        near = np.sqrt(least) <= self.reach
        # Equal to the last digits, or on the border of the reach: ask the tree.
        margin = 1e-9 * (1 + least)
        asked = (square <= least + margin).sum(axis=0) > 1
        asked |= self._shared[best]
        asked &= near
        asked |= np.abs(np.sqrt(least) - self.reach) < 1e-9 * (1 + self.reach)
        best[~near] = -1
        rows = np.flatnonzero(asked)
        if len(rows):
            best[rows] = self._from_tree(xy[rows])
        return best

    def _from_tree(self, xy: np.ndarray) -> np.ndarray:
        from scipy.spatial import KDTree

        if self._tree is None:
            self._tree = KDTree(self.xy)
        distance, rows = self._tree.query(xy)
        rows[~(distance <= self.reach)] = -1
        return np.asarray(rows)


def _aggregate(
    xy: np.ndarray, scores: np.ndarray, options: QuantizedOptions
) -> tuple[_Image, np.ndarray]:
    """Keypoints of an image from all its matches, and the cell (M,) of each match."""
    cell_side = max(options.cell_size, options.max_error)
    bin_side = int(options.max_error)
    cell_place, bin_place = _places(xy, cell_side), _places(xy, bin_side)
    cell, first = _numbered(cell_place)
    if bin_side == cell_side:
        bins, bin_first = cell, first
    elif bin_side > 0:
        # A bin is no wider than a cell, so that it touches two at most along each axis: it
        # collects for each of them, told apart by whether their numbers are even.
        bins, bin_first = _numbered(bin_place * 2 + (cell_place & 1))
    else:
        bins, bin_first = _numbered(bin_place)  # places themselves, each in one cell
    total = np.zeros(len(bin_first), scores.dtype)
    np.add.at(total, bins, scores)  # one after the other, as hloc adds them up
    # Of equally good bins of a cell the first to appear; bins are numbered by appearance.
    owner = cell[bin_first]
    order = np.argsort(owner, kind="stable")
    best = order[_first_best(owner[order], total[order])]
    places = _rounded(xy[bin_first[best]], bin_side).astype(np.float32)
    worth = total[best]
    if options.max_keypoints is not None:
        kept = np.argsort(worth)[::-1][: options.max_keypoints]
        places, worth = places[kept], worth[kept]
    return _Image(places.reshape(-1, 2), worth, bin_side, options.max_error), cell


def _places(xy: np.ndarray, side: float) -> np.ndarray:
    """What hloc tells cells apart by: whole numbers (M, 2), or the coordinates for side 0."""
    if side <= 0:
        return xy
    return np.asarray(np.round((xy + 0.5) / side)).astype(np.int64)


def _rounded(xy: np.ndarray, side: float) -> np.ndarray:
    """Coordinates of a cell or bin, as hloc computes them."""
    if side <= 0:
        return xy
    return np.asarray(np.round(np.round((xy + 0.5) / side) * side - 0.5, 2))


def _numbered(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number (M,) of each row's value in the order of first appearance, and that row (N,)."""
    count = len(places)
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if places.dtype == np.int64:
        places = places - places.min(0)
        width, height = (int(v) + 1 for v in places.max(0))
        if width * height <= _MAX_TABLE:
            key = places[:, 1] * width + places[:, 0]
            table = np.empty(width * height, np.int32)  # only what is written is read
            table[key[::-1]] = np.arange(count - 1, -1, -1, dtype=np.int32)
            earliest = table[key]
            first = np.flatnonzero(earliest == np.arange(count))
            number = np.empty(count, np.int64)
            number[first] = np.arange(len(first))
            return number[earliest], first
    _, x = np.unique(places[:, 0], return_inverse=True)
    values, y = np.unique(places[:, 1], return_inverse=True)
    _, first, label = np.unique(x * len(values) + y, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    order = np.argsort(first)
    number[order] = np.arange(len(first))
    return number[label], first[order]


def _first_best(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Positions of the first largest value of each group; the groups lie in a row."""
    if not len(group):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[True], group[1:] != group[:-1]])
    begin = np.flatnonzero(starts)
    number = np.cumsum(starts) - 1
    equal = np.flatnonzero(values == np.maximum.reduceat(values, begin)[number])
    own = number[equal]
    positions: np.ndarray = equal[np.concatenate([[True], own[1:] != own[:-1]])]
    return positions


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
    """Whether each match (M,) is the best of those with its id."""
    # Of equally good ones it is the first in the order that numpy's default sort leaves them in,
    # which is hloc's choice.
    order = np.argsort(ids)
    winner = np.zeros(len(ids), dtype=bool)
    winner[order[_first_best(ids[order], scores[order])]] = True
    return winner
