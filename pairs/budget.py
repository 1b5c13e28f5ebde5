"""Pairs that wait for what others show: some are chosen where the verified graph is weak."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from gim_hloc.geometry.graph import connected, hops
from gim_hloc.pairs.base import Pair, canonical, ranked_pairs, shortlist
from gim_hloc.pairs.retrieval import cosine_scores, mutual_neighbours

JOINTS = 4  # likeliest pairs that are tried between a group of images and others
FAR = 3  # pairs of images that verified pairs connect over more than so many steps close loops
_LOOPS = 8  # one such pair a round for so many images


class Budget:
    """The pairs of each image with the k most similar ones: half of them first, the others later.

    Args:
        names: N image names.
        descriptors: (N, D) global descriptors; see ``retrieval``.
        k: partners per image.
        min_score: least cosine similarity of a pair; None accepts every value.
        exclude: pairs that are chosen already.
        local: name -> (n, D) local descriptors, strongest first.

    Attributes:
        first: pairs of each image with the first half of its partners.
        left: so many more may be taken, until there are as many as with all k partners.
        taken: what for -> pairs.
    """

    def __init__(
        self,
        names: Sequence[str],
        descriptors: np.ndarray,
        *,
        k: int,
        min_score: float | None = None,
        exclude: Collection[Pair] = (),
        local: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._k = k
        self._names, self._scores_of = cosine_scores(names, descriptors, min_score=min_score)
        self._count = None if local is None else mutual_neighbours(self._names, local)
        self._ranked = ranked_pairs(
            self._names, self._scores_of, k, exclude=exclude, rerank=self._count
        )
        self.first = [pair for pair, (place, _) in self._ranked.items() if place < (k + 1) // 2]
        self.left = sum(place < k for place, _ in self._ranked.values()) - len(self.first)
        self.taken: Counter[str] = Counter()
        self._place = {name: i for i, name in enumerate(self._names)}
        self._partners: dict[str, set[str]] = {name: set() for name in self._names}
        self._settle(itertools.chain(exclude, self.first))
        self._tried: list[Pair] = []  # loops of the last round

    def weak(self, verified: Collection[Pair]) -> list[Pair]:
        """Pairs to be tried next; none: all images hang together, and no loop is open.

        Args:
            verified: of all that were chosen.
        """
        groups = connected(self._names, verified)
        joints = self._take("joints", self._joints(groups))
        if self._tried and 2 * len(set(verified).intersection(self._tried)) < len(self._tried):
            return joints  # what is far apart looks alike only
        self._tried = self._take("loops", self._loops(hops(self._names, verified)))
        return [*joints, *self._tried]

    def rest(self, names: set[str]) -> list[Pair]:
        """All partners of these images."""
        near = (pair for pair, (place, _) in self._ranked.items() if place < self._k)
        return self._take("few", (pair for pair in near if not names.isdisjoint(pair)))

    def _take(self, why: str, pairs: Iterable[Pair]) -> list[Pair]:
        taken = [pair for pair in pairs if pair[1] not in self._partners[pair[0]]][: self.left]
        self._settle(taken)
        self.left -= len(taken)
        self.taken[why] += len(taken)
        return taken

    def _settle(self, pairs: Iterable[Pair]) -> None:
        for a, b in pairs:
            self._partners[a].add(b)
            self._partners[b].add(a)

    def _joints(self, groups: Sequence[set[str]]) -> list[Pair]:
        """The likeliest pairs between each group but the largest and all other images.

        In rounds, that is Borůvka's spanning tree.
        """
        found: list[Pair] = []
        for group in groups[1:]:
            rows = np.array(sorted(self._place[name] for name in group))
            scores = self._scores_of(rows)
            scores[:, rows] = -np.inf
            for row, own in zip(rows.tolist(), scores, strict=True):
                own[[self._place[name] for name in self._partners[self._names[row]]]] = -np.inf
            inside, others = np.divmod(shortlist(scores.ravel(), JOINTS)[0], len(self._names))
            ends = list(zip(rows[inside].tolist(), others.tolist(), strict=True))
            if (count := self._count) is not None:
                ends.sort(key=lambda pair: -count(pair[0], np.array(pair[1:]))[0])
            found += [(self._names[i], self._names[j]) for i, j in ends[:JOINTS]]
        return canonical(found)

    def _loops(self, apart: np.ndarray) -> list[Pair]:
        """The likeliest pairs that are far apart in the graph, each image in one at most."""
        place = self._place
        found: list[Pair] = []
        busy: set[str] = set()
        for a, b in sorted(self._ranked, key=lambda pair: (-self._ranked[pair][1], pair)):
            far = FAR < apart[place[a], place[b]] < np.inf
            if far and b not in self._partners[a] and not busy.intersection((a, b)):
                found.append((a, b))
                busy.update((a, b))
        return found[: max(JOINTS, len(self._names) // _LOOPS)]
