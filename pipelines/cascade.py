"""Stronger matchers where the cheap one is not enough: before mapping, and for what mapping lost.

A cascade matches every pair with its first matcher. Pairs that its verification leaves in doubt go
to the next, which matches the same keypoints; what then still hangs on little goes to the last,
which has keypoints of its own. After mapping, ``Rescue`` does the same for images that no model
holds, or that hang on few points, with the strongest matcher at hand.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gim_hloc.errors import some
from gim_hloc.geometry.graph import connected, hops
from gim_hloc.matchers import registry
from gim_hloc.options import Quality
from gim_hloc.pairs.budget import FAR, JOINTS
from gim_hloc.pairs.select import connectivity_notes
from gim_hloc.pipelines.inputs import Inputs
from gim_hloc.pipelines.layers import Layer, Layers
from gim_hloc.pipelines.methods import Method
from gim_hloc.pipelines.verifying import Verifier

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
Sums = Mapping[Pair, float]  # of confidences

# A pair is clear with so many times the sum that unrelated pairs do not reach, and worth another
# look from this share of it on.
CLEAR, DOUBTFUL = 2.0, 0.5
# An image with fewer clear pairs hangs on little; so many of its likeliest partners are tried.
FEW_PAIRS, PARTNERS = 3, 6
# Rounds in which pairs that wait are given to the weak places of the graph.
ROUNDS = 3
# The least sum of matchers that are not calibrated.
LEAST = 30.0

# Strongest first. What is here, and under no stricter a licence than the run's matcher, is taken;
# on a processor dense ones, which take minutes a pair there, only by runs that are dense anyway.
STRONGEST = (
    "gim_roma", "gim_dkm", "roma_outdoor", "dkm_outdoor", "gim_loftr", "gim_lightglue",
    "aliked_lightglue",
)  # fmt: skip
_FINER: dict[Quality, Quality] = {"fast": "base", "base": "precise", "precise": "precise"}


class Cascade:
    """The steps of a cascade after its first matcher has matched all pairs."""

    def __init__(self, inputs: Inputs, layers: Layers, verifier: Verifier) -> None:
        self.inputs, self.layers, self.verifier = inputs, layers, verifier

    def escalate(self) -> None:
        """Match what is in doubt with the next matchers."""
        self._spend()
        same, other = self.inputs.levels[1:]
        names, first = self.inputs.names, self.layers.first
        sums = _relative(self.verifier.confidences(first), first.method)
        raw = {pair: first.confidence(pair) / _bound(first.method) for pair in sums}
        weak = _weak(names, sums, CLEAR)
        likely = _likely(names, sums, raw, weak, CLEAR)
        sums = self._matched(same, likely | _worth_another_look(names, sums, raw, weak), sums)
        weak = _weak(names, sums, 1.0)
        likely = _likely(names, sums, raw, weak, 1.0)
        stronger = self._matched(other, likely, sums)
        joined = [pair for pair in likely if stronger[pair] >= 1.0]
        self._matched(other, _around(joined, sums), stronger)

    def _spend(self) -> None:
        """Match of the pairs that wait those where the graph of verified ones is weak."""
        first = self.layers.first
        budget = first.selection.budget
        if budget is None:
            return
        names = self.inputs.names
        for _ in range(ROUNDS):
            sums = _relative(self.verifier.confidences(first), first.method)
            pairs = budget.weak([pair for pair, value in sums.items() if value >= 1.0])
            if not pairs:
                break
            first.add_pairs(pairs)
        sums = _relative(self.verifier.confidences(first), first.method)
        first.add_pairs(budget.rest(_weak(names, sums, CLEAR)))
        first.close_pairs(connectivity_notes(names, first.selection.pairs))

    def _matched(self, name: str, pairs: Iterable[Pair], sums: Sums) -> dict[Pair, float]:
        """The sums of the pairs, those with another matcher's in their places where better."""
        pairs = set(pairs)
        if not pairs:
            return dict(sums)
        inputs = self.inputs
        layer = self.layers.of(inputs.method_of(name, inputs.options.quality))
        logger.info("%d pairs go to %s", len(pairs), name)
        layer.cover(pairs)
        found = _relative(self.verifier.confidences(layer), layer.method)
        return {pair: max(value, found.get(pair, 0.0)) for pair, value in sums.items()}


class Rescue:
    """Another attempt at images that a model lacks, or hardly holds, once there is one.

    Attributes:
        method: what they were matched with; None: nothing was done.
        names: images that were tried.
    """

    def __init__(self, inputs: Inputs, layers: Layers, verifier: Verifier) -> None:
        self.inputs, self.layers, self.verifier = inputs, layers, verifier
        self.folder = inputs.folder
        self.method: Method | None = None
        self.names: list[str] = []

    @property
    def wanted(self) -> bool:
        """Whether this run tries at all; nothing is matched for poses that are known."""
        inputs = self.inputs
        return (
            inputs.options.rescue == "auto"
            and inputs.known is None
            and inputs.imported is None
            and inputs.part is None
        )

    def restore(self, key: Callable[[], str]) -> None:
        """Take over what an earlier run matched, if what that rests on is the same.

        Args:
            key: of the model that it was for.
        """
        entry = self.folder.steps.get("rescue")
        if not self.wanted or self.method is not None or entry is None:
            return
        facts = entry["facts"]
        if entry.get("key") != key() or facts.get("method") is None:
            return
        name, quality = facts["method"]
        if registry.missing_weights(name):
            return
        self._cover(self.inputs.method_of(name, quality), [(a, b) for a, b in facts["pairs"]])
        self.names = facts["names"]

    def due(self, key: str) -> bool:
        """Whether it was not tried yet for a model."""
        return self.wanted and self.method is None and self.folder.facts("rescue", key) is None

    def attempt(self, key: str, groups: Sequence[set[str]]) -> bool:
        """Match images outside the largest group anew; whether pairs were verified by it.

        Args:
            key: of the model.
            groups: names of the images of each model that hang together well, largest first.
        """
        lost = sorted(set(self.inputs.names) - (groups[0] if groups else set()))
        method = self._strongest() if lost else None
        pairs = [] if method is None else self._tried(method, lost, groups)
        with self.folder.making("rescue", key) as made:
            made.facts = {"method": None, "pairs": pairs, "names": lost}
            if pairs and method is not None:
                made.facts["method"] = [method.name, method.quality]
        return bool(pairs)

    def _tried(self, method: Method, lost: Sequence[str], groups: Sequence[set[str]]) -> list[Pair]:
        logger.info("Rescue: %s with %s", some(lost), method.name)
        known = self._known()
        alone = set(lost) - set().union(*groups)
        likely = {p for name in alone for p in _partners(name, known)} | _joints(known, groups)
        layer = self._cover(method, likely)
        found = _relative(self.verifier.confidences(layer), method)
        joined = [pair for pair in likely if found.get(pair, 0.0) >= 1.0]
        if not joined:  # nothing of it may reach database or report
            self.layers.drop(layer)
            self.method = None
            return []
        self._cover(method, _around(joined, known))
        self.names = list(lost)
        return layer.selection.pairs

    def told(self, models: Sequence[Any]) -> dict[str, Any] | None:
        """What was rescued, and by what, for the report; None where nothing was tried."""
        if self.method is None:
            return None
        placed = {model.image(i).name for model in models for i in model.reg_image_ids()}
        return {
            "matcher": self.method.name,
            "quality": self.method.quality,
            "images": [name for name in self.names if name in placed],
            "still_missing": [name for name in self.names if name not in placed],
        }

    def _known(self) -> dict[Pair, float]:
        """Verified or not: how likely a pair shows the same, by all that was matched."""
        known: dict[Pair, float] = {}
        for layer in self.layers.all:
            verified = _relative(self.verifier.confidences(layer), layer.method)
            for pair, value in verified.items():
                value += 1e-3 * layer.confidence(pair) / _bound(layer.method)
                known[pair] = max(value, known.get(pair, 0.0))
        return known

    def _cover(self, method: Method, pairs: Iterable[Pair]) -> Layer:
        self.method = method
        layer = self.layers.of(method)
        layer.cover(pairs)
        return layer

    def _strongest(self) -> Method | None:
        """The strongest matcher whose weights are here, under the run's licence or a freer one."""
        inputs = self.inputs
        own, quality = inputs.method.matcher.info, inputs.options.quality
        for name in STRONGEST:
            info = registry.describe(name)
            slow = info.has_warps and not own.has_warps and inputs.matcher.device.type == "cpu"
            if slow or registry.missing_weights(name) or (own.commercial and not info.commercial):
                continue
            tried = [layer.method.name for layer in self.layers.all]
            finer = _FINER[quality] if name in tried or quality == "fast" else quality
            method = inputs.method_of(name, finer)
            if method.match_settings not in [x.method.match_settings for x in self.layers.all]:
                return method
        return None


def _bound(method: Method) -> float:
    return method.min_confidence_sum or LEAST


def _relative(sums: Sums, method: Method) -> dict[Pair, float]:
    """Sums for one that no pair of unrelated images reaches."""
    return {pair: value / _bound(method) for pair, value in sums.items()}


def _weak(names: Sequence[str], sums: Sums, least: float) -> set[str]:
    """Images in few good pairs."""
    counts = Counter(name for pair, value in sums.items() if value >= least for name in pair)
    enough = min(FEW_PAIRS, len(names) - 1)
    return {name for name in names if counts[name] < enough}


def _worth_another_look(names: Sequence[str], sums: Sums, raw: Sums, weak: set[str]) -> set[Pair]:
    """Doubtful pairs of images that hang on little, or that would close a loop."""
    place = {name: index for index, name in enumerate(names)}
    apart = hops(names, [pair for pair, value in sums.items() if value >= CLEAR])
    return {
        (a, b)
        for (a, b), value in sums.items()
        if value < CLEAR
        and raw[a, b] >= DOUBTFUL
        and (weak.intersection((a, b)) or apart[place[a], place[b]] > FAR)
    }


def _likely(names: Sequence[str], sums: Sums, raw: Sums, weak: set[str], least: float) -> set[Pair]:
    """Pairs that are not clear and look best: of weak images, and between groups of others."""
    unclear = {pair: value for pair, value in raw.items() if sums[pair] < CLEAR}
    good = [pair for pair, value in sums.items() if value >= least]
    partners = {p for name in weak for p in _partners(name, unclear)}
    return partners | _joints(unclear, connected(names, good))


def _partners(name: str, values: Sums) -> list[Pair]:
    own = [pair for pair in values if name in pair]
    return sorted(own, key=lambda pair: (-values[pair], pair))[:PARTNERS]


def _joints(values: Sums, groups: Sequence[set[str]]) -> set[Pair]:
    """The likeliest pairs between the largest group and each other one of several images."""
    found: set[Pair] = set()
    for group in groups[1:]:
        across = [
            p for p in values if len(group.intersection(p)) == 1 and groups[0].intersection(p)
        ]
        if len(group) > 1:
            found.update(sorted(across, key=lambda pair: (-values[pair], pair))[:JOINTS])
    return found


def _around(joined: Sequence[Pair], sums: Sums) -> set[Pair]:
    """Good pairs of the images that were joined: the best of each, and those among its partners.

    An image is placed by points that others see: its partners need keypoints of the same matcher
    that match each other.
    """
    good = {pair: value for pair, value in sums.items() if value >= 1.0}
    found: set[Pair] = set()
    for name in {name for pair in joined for name in pair}:
        partners = {n for pair in joined if name in pair for n in pair} - {name}
        among = [pair for pair in good if partners.issuperset(pair)]
        found.update(sorted(among, key=lambda pair: (-good[pair], pair))[:PARTNERS])
        found.update(_partners(name, good)[:2])
    return found


__all__ = ["Cascade", "Rescue"]
