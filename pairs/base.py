"""What every way of choosing pairs shares: the pair type, its order and the k best partners."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

Pair = tuple[str, str]  # image names, name0 < name1 in plain string order

_SHORTLIST = 3  # candidates a place that a dearer score chooses among
_SCORE_ROWS = 512  # rows of a score matrix held at once: 20 MB at 10 000 images


def canonical(pairs: Iterable[Pair]) -> list[Pair]:
    """Order the two names of each pair, drop duplicates (also reversed ones) and sort.

    Raises:
        ValueError: if an image is paired with itself.
    """
    unique = {(a, b) if a < b else (b, a) for a, b in pairs}
    for a, b in unique:
        if a == b:
            raise ValueError(f"Image '{a}' is paired with itself")
    return sorted(unique)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, sorted; duplicates are an error because rows of arrays belong to them.

    Raises:
        ValueError: if a name occurs twice.
    """
    ordered = sorted(names)
    for a, b in itertools.pairwise(ordered):
        if a == b:
            raise ValueError(f"Image name '{a}' occurs twice")
    return ordered


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest scores (N,), best first, the earlier index first among equals.

    Entries of minus infinity are never chosen, so fewer than k may come back.
    """
    candidates = np.flatnonzero(scores > -np.inf)
    if k <= 0 or len(candidates) == 0:
        return candidates[:0]
    values = scores[candidates]
    if len(candidates) > k:
        # Keep everything equal to the k-th value: argpartition alone would choose among equals by
        # chance, and the result would depend on the order of the input.
        kth = np.partition(values, len(values) - k)[len(values) - k]
        candidates = candidates[values >= kth]
        values = scores[candidates]
    best: np.ndarray = candidates[np.argsort(-values, kind="stable")[:k]]
    return best


def shortlist(
    scores: np.ndarray, k: int, rerank: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the 3 k best, as ``top_k``, and their scores.

    Args:
        scores: (N,) scores.
        k: how many are wanted in the end.
        rerank: gives better scores of some indices (n,); it orders the 3 k that ``scores`` puts
            first, whose order decides among equals.
    """
    found = top_k(scores, _SHORTLIST * k)
    if rerank is None:
        return found, scores[found]
    better = rerank(found)
    order = np.argsort(-better, kind="stable")
    return found[order], better[order]


def best_of(
    scores: np.ndarray, k: int, rerank: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Indices of the k best of a ``shortlist``."""
    return shortlist(scores, k, rerank)[0][:k]


def ranked_pairs(
    names: Sequence[str],
    scores_of: Callable[[np.ndarray], np.ndarray],
    k: int,
    *,
    rows: np.ndarray | None = None,
    exclude: Iterable[Pair] = (),
    rerank: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> dict[Pair, tuple[int, float]]:
    """Pair each image with the 3 k others of its shortlist.

    Args:
        names: N sorted, distinct names.
        scores_of: given row indices (B,), returns a new array of scores (B, N); minus infinity
            forbids a pair.
        k: partners per image that are wanted in the end.
        rows: the images that choose partners; all if None.
        exclude: pairs that are settled already and take none of the k places.
        rerank: (row, indices) -> better scores of these images for it; see ``shortlist``.

    Returns:
        Sorted pairs, each with its place on the list of one of its images, from 0 and the better
        one of two, and its score likewise.
    """
    index = {name: i for i, name in enumerate(names)}
    settled: dict[int, list[int]] = {}
    for a, b in exclude:
        i, j = index.get(a), index.get(b)
        if i is not None and j is not None:
            settled.setdefault(i, []).append(j)
            settled.setdefault(j, []).append(i)
    if rows is None:
        rows = np.arange(len(names))
    ranked: dict[tuple[int, int], tuple[int, float]] = {}
    for start in range(0, len(rows), _SCORE_ROWS):
        block_rows = rows[start : start + _SCORE_ROWS]
        for i, scores in zip(block_rows.tolist(), scores_of(block_rows), strict=True):
            scores[i] = -np.inf
            scores[settled.get(i, [])] = -np.inf
            found = shortlist(scores, k, partial(rerank, i) if rerank is not None else None)
            for place, (j, score) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
                pair = (i, j) if i < j else (j, i)
                other = ranked.get(pair, (place, score))
                ranked[pair] = min(place, other[0]), max(score, other[1])
    # Names are sorted, so index order is name order.
    return {(names[i], names[j]): ranked[i, j] for i, j in sorted(ranked)}


def best_pairs(
    names: Sequence[str], scores_of: Callable[[np.ndarray], np.ndarray], k: int, **how: Any
) -> list[Pair]:
    """Pair each image with the k others of the highest score; see ``ranked_pairs``.

    An image may get more, when others choose it.
    """
    ranked = ranked_pairs(names, scores_of, k, **how)
    return [pair for pair, (place, _) in ranked.items() if place < k]
