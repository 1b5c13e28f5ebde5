"""Finding images that are stored turned against the others.

Cameras held sideways often write no EXIF orientation, and learned matchers, unlike SIFT, fail on
images turned by a quarter or more. Such an image hardly matches any other. It is therefore matched
in the three other turns to a few images of the largest group; images that match each other well
are turned alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gim_hloc.geometry.graph import connected

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# A pair with this share of the fewer keypoints matched shows both images the same way up. Images
# below it are only candidates, so too high a share costs time, not correctness.
STRONG_SHARE = 0.15
# A turn is believed when it gives so many times the confidence of the image as it is.
BELIEVED_GAIN = 2.5
# The least for matchers that have no bound for a pair of their own.
STRONG_LEAST = 30
BELIEVED_LEAST = 60


@dataclass(frozen=True, kw_only=True)
class WeakGroup:
    """Images that match each other but hardly the largest group.

    Attributes:
        members: their names.
        links: member -> image of the largest group -> sum of the confidences of their matches.
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
    """Split images by their strong pairs and return all groups but the largest.

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
        if total >= max(bound or STRONG_LEAST, share * min(keypoints[a], keypoints[b]))
    ]
    main, *others = connected(names, strong)
    if len(main) < 2:
        return []
    group_of = {name: k for k, group in enumerate(others) for name in group}
    links: dict[int, dict[str, dict[str, float]]] = {}
    for (a, b), total in sums.items():
        for name, other in ((a, b), (b, a)):
            if name in group_of and other in main and keypoints[name] >= 50:
                links.setdefault(group_of[name], {}).setdefault(name, {})[other] = total
    return [
        WeakGroup(members=tuple(n for n in names if n in others[k]), links=links[k])
        for k in sorted(links)
    ]


def best_rotation(
    group: WeakGroup,
    confidence: Callable[[str, int, Sequence[str]], float],
    bound: float | None = None,
    *,
    judged_anew: bool = False,
) -> int:
    """Quarter turns clockwise that make a group match the largest one; 0 when none does.

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
    if judged_anew:
        before = confidence(name, 0, others)
    least = bound * len(others) if bound else BELIEVED_LEAST
    totals: dict[int, float] = {}
    for turn in (1, 2, 3):
        totals[turn] = confidence(name, turn, others)
        logger.debug("%s turned by %d degrees: %.1f", name, 90 * turn, totals[turn])
    best = max(totals, key=lambda turn: totals[turn])
    return best if totals[best] >= max(least, BELIEVED_GAIN * before) else 0
