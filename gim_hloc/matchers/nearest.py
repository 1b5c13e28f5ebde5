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
    index, similarity, _ = mutual_nearest_but_one(descriptors0, descriptors1)
    return index, similarity


def mutual_nearest_but_one(
    descriptors0: torch.Tensor, descriptors1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``mutual_nearest``, and (K,) the larger dot product of either with another.

    Each product is looked at once: of a column, what is no row's nearest comes from the blocks, and
    the rest from the rows' nearest.
    """
    if min(len(descriptors0), len(descriptors1)) == 0:
        nothing = descriptors0.new_empty(0)
        return torch.empty(0, 2, dtype=torch.long, device=nothing.device), nothing, nothing
    below = descriptors0.new_full((len(descriptors1),), -torch.inf)
    found = []
    for _, similarity in _similarities(descriptors0, descriptors1):
        index = _argmax(similarity)[:, None]
        best = similarity.gather(1, index)
        similarity.scatter_(1, index, -torch.inf)
        found.append((index[:, 0], best[:, 0], similarity.amax(1)))
        below = torch.maximum(below, similarity.amax(0))
    nearest, best0, second0 = (torch.cat(part) for part in zip(*found, strict=True))
    claimed = torch.full_like(below, -torch.inf).scatter_reduce(0, nearest, best0, "amax")
    rows = ((best0 == claimed[nearest]) & (best0 >= below[nearest])).nonzero()[:, 0]
    first = torch.full_like(below, len(best0), dtype=torch.long)
    first.scatter_reduce_(0, nearest[rows], rows, reduce="amin")
    rows = rows[first[nearest[rows]] == rows]
    others = best0.index_fill(0, rows, -torch.inf)
    below.scatter_reduce_(0, nearest, others, "amax")
    columns = nearest[rows]
    return torch.stack([rows, columns], 1), best0[rows], second0[rows].maximum(below[columns])


def mutual_nearest_ratios(
    descriptors0: torch.Tensor, descriptors1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mutual_nearest`` of unit vectors, and (K,) the distance over that of the nearer rival."""
    index, cosine, rival = mutual_nearest_but_one(descriptors0, descriptors1)
    return index, cosine, distance(cosine) / distance(rival).clamp(min=1e-6)


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
