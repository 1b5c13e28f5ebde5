"""Every image with every other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gim_hloc.pairs.base import Pair


def exhaustive(names: Iterable[str]) -> list[Pair]:
    """Pair every image with every other: N (N - 1) / 2 sorted pairs of the N distinct names."""
    return list(itertools.combinations(sorted(set(names)), 2))
