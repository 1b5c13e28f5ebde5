"""Finding images that are stored turned against the others.

Cameras held sideways often write no EXIF orientation, and learned matchers, unlike SIFT, fail on
images turned by a quarter or more. Such an image hardly matches any other. It is therefore matched
in the three other turns to a few images of larger groups; images that match each other well are
turned alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gim_hloc.geometry.graph import connected

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# A pair with this share of the fewer keypoints matched, or with so many, shows both images the same
# way up. Images below it are only candidates: too high a bound costs time, not correctness.
STRONG_SHARE, STRONG_SUM = 0.15, 200.0
# A turn is believed when it gives so many times the confidence of the image as it is. An image that
# has the least as it is, by the matcher that judges, is not tried in other turns.
BELIEVED_GAIN = 2.5
# The least for matchers that have no bound for a pair of their own.
STRONG_LEAST = 30
BELIEVED_LEAST = 60


# A folder may hold several places. Groups of so many images are places, of which images outside any
# are tried with so many, the largest first; places are tried with the largest alone.
_PLACE, _PLACES = 3, 8


@dataclass(frozen=True, kw_only=True)
class WeakGroup:
    """Images that match each other but hardly a larger group.

    Attributes:
        members: their names.
        links: member -> image of the larger group -> sum of the confidences of their matches.
    """

    members: tuple[str, ...]
    links: Mapping[str, Mapping[str, float]]


def weak_groups(
    names: Sequence[str],
    sums: Mapping[Pair, float],
    keypoints: Mapping[str, int],
    bound: float | None = None,
    share: float = STRONG_SHARE,
) -> list[WeakGroup]:
    """Split images by their strong pairs; each group but the largest, with each larger one.

    Args:
        names: all images.
        sums: pair -> sum of the confidences of its matches.
        keypoints: image -> keypoints; images with fewer than 50 are left alone.
        bound: a sum that pairs of unrelated images do not reach, where the matcher has one.
        share: of the fewer keypoints that a strong pair matches.
    """
    strong = [
        (a, b)
        for (a, b), total in sums.items()
        if total
        >= max(bound or STRONG_LEAST, min(share * min(keypoints[a], keypoints[b]), STRONG_SUM))
    ]
    linked: dict[str, dict[str, float]] = {name: {} for name in names}
    for (a, b), total in sums.items():
        linked[a][b] = linked[b][a] = total
    groups = connected(names, strong)
    found = []
    for k, group in enumerate(groups[1:], 1):
        members = tuple(name for name in names if name in group)
        alone = len(group) < _PLACE
        places = [other for other in groups[1:k] if alone and len(other) >= _PLACE]
        for other in [groups[0], *places][:_PLACES]:
            links = {
                name: {n: total for n, total in linked[name].items() if n in other}
                for name in members
                if keypoints[name] >= 50
            }
            links = {name: partners for name, partners in links.items() if partners}
            if links and len(other) > 1:
                found.append(WeakGroup(members=members, links=links))
    return found


def best_rotation(
    group: WeakGroup,
    confidence: Callable[[str, int, Sequence[str]], float],
    bound: float | None = None,
    *,
    judged_anew: bool = False,
) -> int | None:
    """Quarter turns clockwise that make a group match the larger one; None when none does.

    Args:
        group: of ``weak_groups``.
        confidence: (image, quarter turns, other images) -> sum of the confidences of its matches
            with all of them.
        bound: as for ``weak_groups``; the pairs with the others must reach it on average.
        judged_anew: the confidences are another matcher's than those in the group.
    """
    name = max(sorted(group.links), key=lambda n: sum(group.links[n].values()))
    linked = group.links[name]
    others = sorted(linked, key=lambda n: (-linked[n], n))[:3]
    before = sum(linked[other] for other in others)
    least = bound * len(others) if bound else BELIEVED_LEAST
    if judged_anew:
        before = confidence(name, 0, others)
        if before >= least:
            return 0
    totals: dict[int, float] = {}
    for turn in (1, 2, 3):
        totals[turn] = confidence(name, turn, others)
        logger.debug("%s turned by %d degrees: %.1f", name, 90 * turn, totals[turn])
    best = max(totals, key=lambda turn: totals[turn])
    return best if totals[best] >= max(least, BELIEVED_GAIN * before) else None
