"""Nearest neighbours among descriptors, in blocks that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_ROWS = 128  # of a block of similarities


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
    if min(len(descriptors0), len(descriptors1)) == 0:
        return torch.empty(0, 2, dtype=torch.long, device=descriptors0.device), descriptors0[:0, 0]
    best1 = descriptors0.new_full((len(descriptors1),), -torch.inf)
    found = []
    for _, similarity in _similarities(descriptors0, descriptors1):
        index = _argmax(similarity)
        found.append((similarity.gather(1, index[:, None])[:, 0], index))
        best1 = torch.maximum(best1, similarity.amax(0))
    best0, nearest = (torch.cat(part) for part in zip(*found, strict=True))
    rows = (best0 == best1[nearest]).nonzero()[:, 0]
    first = torch.full_like(best1, len(best0), dtype=torch.long)
    first.scatter_reduce_(0, nearest[rows], rows, reduce="amin")
    rows = rows[first[nearest[rows]] == rows]
    return torch.stack([rows, nearest[rows]], 1), best0[rows]


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
