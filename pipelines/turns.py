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

import numpy as np

from gim_hloc.errors import InputError

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# A pair with this share of the fewer keypoints matched shows both images the same way up. Images
# below it are only candidates, so too high a share costs time, not correctness.
STRONG_SHARE = 0.15
STRONG_LEAST = 30  # matches
# A turn is believed when it gives so many matches, and so many times those of the image as it is.
BELIEVED_LEAST = 60
BELIEVED_GAIN = 2.5


@dataclass(frozen=True, kw_only=True)
class WeakGroup:
    """Images that match each other but hardly the largest group.

    Attributes:
        members: their names.
        links: member -> image of the largest group -> matches, for the pairs between the two.
    """

    members: tuple[str, ...]
    links: Mapping[str, Mapping[str, int]]


def weak_groups(
    names: Sequence[str], counts: Mapping[Pair, int], keypoints: Mapping[str, int]
) -> list[WeakGroup]:
    """Split images by their strong pairs and return all groups but the largest.

    Args:
        names: all images.
        counts: pair -> matches.
        keypoints: image -> keypoints; images with fewer than 50 are left alone.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    index = {name: i for i, name in enumerate(names)}
    strong = [
        (index[a], index[b])
        for (a, b), count in counts.items()
        if count >= max(STRONG_LEAST, STRONG_SHARE * min(keypoints[a], keypoints[b]))
    ]
    rows, columns = np.array(strong, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names)))
    _, label = connected_components(graph, directed=False)
    main = int(np.bincount(label).argmax())
    if (label == main).sum() < 2:
        return []
    links: dict[int, dict[str, dict[str, int]]] = {}
    for (a, b), count in counts.items():
        for name, other in ((a, b), (b, a)):
            group = int(label[index[name]])
            if group != main and label[index[other]] == main and keypoints[name] >= 50:
                links.setdefault(group, {}).setdefault(name, {})[other] = count
    return [
        WeakGroup(
            members=tuple(names[int(i)] for i in np.flatnonzero(label == group)),
            links=links[group],
        )
        for group in sorted(links)
    ]


def best_turn(group: WeakGroup, count_matches: Callable[[str, int, Sequence[str]], int]) -> int:
    """Quarter turns clockwise that make a group match the largest one; 0 when none does.

    Args:
        group: of ``weak_groups``.
        count_matches: (image, quarter turns, other images) -> matches with all of them;
            ``InputError`` for an image that cannot be turned.
    """
    name = max(sorted(group.links), key=lambda n: sum(group.links[n].values()))
    linked = group.links[name]
    others = sorted(linked, key=lambda n: (-linked[n], n))[:3]
    before = sum(linked[other] for other in others)
    totals: dict[int, int] = {}
    try:
        for turn in (1, 2, 3):
            totals[turn] = count_matches(name, turn, others)
            logger.debug("%s turned by %d degrees: %d matches", name, 90 * turn, totals[turn])
    except InputError:  # stored mirrored
        return 0
    best = max(totals, key=lambda turn: totals[turn])
    return best if totals[best] >= max(BELIEVED_LEAST, BELIEVED_GAIN * before) else 0
