"""Nearest neighbours among descriptors, in blocks that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_ROWS = 256  # of a block of similarities


def mutual_nearest(
    descriptors0: torch.Tensor, descriptors1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of which each is the other's nearest; of equally near ones the first.

    Args:
        descriptors0: (M, D).
        descriptors1: (N, D).

    Returns:
        indices (K, 2) int64 and dot products (K,), ordered by the index in image 0.
    """
    index, similarity, _ = Nearest(descriptors0, descriptors1).among()
    return index, similarity


class Nearest:
    """Mutual nearest neighbours among the first rows of both, for more and more of them.

    Each product is made and looked at once. Of a row its nearest and the value of the next one are
    kept, of a column the best value that is no row's nearest.

    Args:
        descriptors0: (M, D).
        descriptors1: (N, D).
    """

    def __init__(self, descriptors0: torch.Tensor, descriptors1: torch.Tensor) -> None:
        self._ends = descriptors0, descriptors1
        self._seen = 0, 0
        self._best = descriptors0.new_full((len(descriptors0),), -torch.inf)
        self._second = self._best.clone()
        self._nearest = torch.zeros_like(self._best, dtype=torch.long)
        self._below = descriptors1.new_full((len(descriptors1),), -torch.inf)

    def among(self, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs of which each is the other's nearest, among the first rows of both.

        Args:
            most: so many rows, no fewer than in the call before; None: all.

        Returns:
            indices (K, 2) int64 and dot products (K,), ordered by the index in image 0, and (K,)
            the larger dot product of either with another.
        """
        old0, old1 = self._seen
        new0, new1 = self._seen = len(self._best[:most]), len(self._below[:most])
        self._look(slice(0, old0), slice(old1, new1))
        self._look(slice(old0, new0), slice(0, new1))
        return self._mutual(new0, new1)

    def _look(self, rows: slice, columns: slice) -> None:
        one, other = self._ends[0][rows], self._ends[1][columns]
        if not len(one) or not len(other):
            return
        for block, similarity in _similarities(one, other):
            index = _argmax(similarity)[:, None]
            best = similarity.gather(1, index)
            similarity.scatter_(1, index, -torch.inf)
            self._below[columns] = torch.maximum(self._below[columns], similarity.amax(0))
            here = slice(rows.start + block.start, rows.start + block.start + len(best))
            self._take(here, index[:, 0] + columns.start, best[:, 0], similarity.amax(1))

    def _take(
        self, rows: slice, index: torch.Tensor, best: torch.Tensor, second: torch.Tensor
    ) -> None:
        """Rows' nearest among some columns, where other columns may have been looked at before."""
        before, was = self._best[rows], self._nearest[rows]
        nearer = best > before
        lost = torch.where(nearer, was, index)
        self._below.scatter_reduce_(0, lost, before.minimum(best), "amax")
        self._second[rows] = self._second[rows].maximum(second).maximum(before.minimum(best))
        self._nearest[rows] = torch.where(nearer, index, was)
        self._best[rows] = before.maximum(best)

    def _mutual(self, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not m or not n:
            nothing = self._best[:0]
            return nothing.new_empty((0, 2), dtype=torch.long), nothing, nothing
        best, nearest, below = self._best[:m], self._nearest[:m], self._below[:n].clone()
        claimed = torch.full_like(below, -torch.inf).scatter_reduce(0, nearest, best, "amax")
        rows = ((best == claimed[nearest]) & (best >= below[nearest])).nonzero()[:, 0]
        first = torch.full_like(below, m, dtype=torch.long)
        first.scatter_reduce_(0, nearest[rows], rows, reduce="amin")
        rows = rows[first[nearest[rows]] == rows]
        below.scatter_reduce_(0, nearest, best.index_fill(0, rows, -torch.inf), "amax")
        columns = nearest[rows]
        rival = self._second[rows].maximum(below[columns])
        return torch.stack([rows, columns], 1), best[rows], rival


def ratio(cosine: torch.Tensor, rival: torch.Tensor) -> torch.Tensor:
    """Distance of unit vectors over that of the nearer rival."""
    return distance(cosine) / distance(rival).clamp(min=1e-6)


def rivals(
    descriptors: torch.Tensor,
    others: torch.Tensor,
    nearest: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dot products (K,) with the nearest but one.

    Args:
        descriptors: (K, D).
        others: (N, D) of the other image.
        nearest: (K,) rows of ``others`` that are no rivals.
        places: (N,) number of the place of each of ``others``: none at the nearest one's place is
            a rival. None: each is a place of its own.
    """
    if len(descriptors) == 0:
        return descriptors.new_empty(0)
    found = []
    for rows, similarity in _similarities(descriptors, others):
        taken = nearest[rows]
        if places is None:
            similarity.scatter_(1, taken[:, None], -torch.inf)
        else:
            similarity.masked_fill_(places[None] == places[taken][:, None], -torch.inf)
        found.append(similarity.amax(1))
    return torch.cat(found)


def _similarities(
    descriptors0: torch.Tensor, descriptors1: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the first, and their dot products with all of the second, valid until the next."""
    # One memory for all blocks: the pages of a new one cost more than the product.
    memory = descriptors0.new_empty(_ROWS, len(descriptors1))
    for start in range(0, len(descriptors0), _ROWS):
        block = descriptors0[start : start + _ROWS]
        yield (
            slice(start, start + _ROWS),
            torch.mm(block, descriptors1.T, out=memory[: len(block)]),
        )


def _argmax(similarity: torch.Tensor) -> torch.Tensor:
    """Column (M,) of the first maximum of each row."""
    if similarity.device.type != "cpu":
        return similarity.argmax(1)
    return torch.from_numpy(similarity.numpy().argmax(1))  # ten times as fast as torch's


def distance(cosine: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of unit vectors, at most 2 (where there is no rival)."""
    return (2 - 2 * cosine.clamp(-1, 1)).sqrt()
