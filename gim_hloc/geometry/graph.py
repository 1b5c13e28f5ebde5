"""Graphs of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def _graph(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> Any:
    from scipy.sparse import coo_array  # slow to import, and help does not need it

    place = {name: index for index, name in enumerate(names)}
    ends = np.array([[place[a], place[b]] for a, b in pairs], dtype=int).reshape(-1, 2)
    shape = (len(names), len(names))
    return coo_array((np.ones(len(ends)), tuple(ends.T)), shape).tocsr()


def hops(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """(N, N) number of pairs on the shortest way between names; infinite where there is none."""
    from scipy.sparse.csgraph import shortest_path

    found: np.ndarray = shortest_path(
        _graph(names, pairs), method="D", directed=False, unweighted=True
    )
    return found


def connected(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Sets of names that pairs connect, largest first, then in the order of the names."""
    from scipy.sparse.csgraph import connected_components

    _, labels = connected_components(_graph(names, pairs), directed=False)
    found: dict[int, set[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        found.setdefault(label, set()).add(name)
    return sorted(found.values(), key=len, reverse=True)
