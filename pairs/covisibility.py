"""Images that see the same points of an existing model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.pairs.base import Pair, best_pairs


def covisibility(
    observations: Mapping[str, Sequence[int] | np.ndarray], *, k: int = 20, min_shared: int = 1
) -> list[Pair]:
    """Pair each image with the k others that share the most 3D points with it.

    Args:
        observations: name -> ids of the 3D points seen. Repeated ids count once; ids of
            "no point" (-1, or the greatest uint64, as COLMAP writes it) are ignored.
        k: partners per image.
        min_shared: least number of shared points of a pair.

    Returns:
        Sorted pairs.

    Raises:
        InputError: if ``k`` or ``min_shared`` is below 1.
    """
    from scipy import sparse

    if k < 1 or min_shared < 1:
        raise InputError(
            "Covisibility pairs need at least 1 neighbour and 1 shared point, "
            f"not {k} and {min_shared}"
        )
    if not observations:
        return []
    names = sorted(observations)
    # As int64 both forms of "no point" are -1.
    seen = [np.unique(np.asarray(observations[name]).astype(np.int64)) for name in names]
    seen = [ids[ids >= 0] for ids in seen]
    rows = np.repeat(np.arange(len(names)), [len(ids) for ids in seen])
    _, columns = np.unique(np.concatenate(seen), return_inverse=True)
    shape = (len(names), int(columns.max(initial=-1)) + 1)
    sees = sparse.csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)

    def scores_of(block: np.ndarray) -> np.ndarray:
        shared = (sees[block] @ sees.T).toarray()
        return np.where(shared >= min_shared, shared.astype(np.float64), -np.inf)

    return best_pairs(names, scores_of, k)
