"""Pairs that wait for what others show: some are chosen where the verified graph is weak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from gim_hloc.geometry.graph import connected, hops
from gim_hloc.pairs.base import Pair, best_of, canonical, ranked_pairs
from gim_hloc.pairs.retrieval import cosine_scores, mutual_neighbours

_JOINTS = 4  # pairs a round between a group of images and all others
_FAR = 3  # pairs of images that verified pairs connect over more than so many steps close loops
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
        exclude: Iterable[Pair] = (),
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
        self._chosen = {*exclude, *self.first}
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

    def rest(self, names: Collection[str]) -> list[Pair]:
        """All partners of these images."""
        own = (p for p, (place, _) in self._ranked.items() if place < self._k)
        return self._take("few", (p for p in own if p[0] in names or p[1] in names))

    def _take(self, why: str, pairs: Iterable[Pair]) -> list[Pair]:
        taken = [pair for pair in pairs if pair not in self._chosen][: self.left]
        self._chosen.update(taken)
        self.left -= len(taken)
        self.taken[why] += len(taken)
        return taken

    def _joints(self, groups: Sequence[set[str]]) -> list[Pair]:
        """The likeliest pairs between each group but the largest and all other images.

        In rounds, that is Borůvka's spanning tree.
        """
        count, size = self._count, len(self._names)
        place = {name: i for i, name in enumerate(self._names)}
        found: list[Pair] = []
        for group in groups[1:]:
            rows = np.array(sorted(place[name] for name in group))
            scores = self._scores_of(rows)
            scores[:, rows] = -np.inf
            for a, b in self._chosen:
                if (a in group) != (b in group):
                    inside, outside = (place[a], place[b]) if a in group else (place[b], place[a])
                    scores[np.searchsorted(rows, inside), outside] = -np.inf

            def mutual(flat: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
                assert count is not None
                ends = zip(rows[flat // size].tolist(), flat % size, strict=True)
                return np.array([count(i, np.array([j]))[0] for i, j in ends])

            best = best_of(scores.ravel(), _JOINTS, mutual if count else None)
            found += [(self._names[rows[f // size]], self._names[f % size]) for f in best.tolist()]
        return canonical(found)

    def _loops(self, apart: np.ndarray) -> list[Pair]:
        """The likeliest pairs that are far apart in the graph, each image in one at most."""
        place = {name: i for i, name in enumerate(self._names)}
        found: list[Pair] = []
        busy: set[str] = set()
        for a, b in sorted(self._ranked, key=lambda pair: (-self._ranked[pair][1], pair)):
            far = _FAR < apart[place[a], place[b]] < np.inf
            if far and (a, b) not in self._chosen and not busy.intersection((a, b)):
                found.append((a, b))
                busy.update((a, b))
        return found[: max(_JOINTS, len(self._names) // _LOOPS)]
