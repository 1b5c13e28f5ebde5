"""Neighbours in name order, for videos and numbered photographs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import natural_key
from gim_hloc.pairs.base import Pair, best_pairs, canonical
from gim_hloc.pairs.retrieval import cosine_scores, mutual_neighbours


def sequences(names: Iterable[str]) -> dict[str, list[str]]:
    """Split names into sequences: one per sub-folder, in natural order (frame2 before frame10).

    Returns:
        Folder (POSIX path relative to the image root, "." for the root) -> its images in order.
    """
    folders: dict[str, list[str]] = {}
    for name in sorted(set(names), key=natural_key):
        folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    return folders


def sequential(
    names: Iterable[str],
    *,
    window: int = 10,
    quadratic: bool = True,
    loop_every: int = 0,
    loop_neighbours: int = 10,
    descriptors: np.ndarray | None = None,
    local: Mapping[str, np.ndarray] | None = None,
) -> list[Pair]:
    """Pair each image with its followers in its own sequence, and close loops by similarity.

    Each sub-folder is a sequence of its own. Only loop closure connects different sequences.

    Args:
        names: image names; their order does not matter unless ``descriptors`` is given.
        window: image i is paired with i + 1 … i + window.
        quadratic: also pair i with i + 2^n for n = 0 … window - 1: long baselines, and bridges over
            short blurred stretches, for few pairs. These are COLMAP's quadratic offsets; COLMAP 4
            takes them instead of the window, here they come on top of it.
        loop_every: every so many images of a sequence, search similar images among *all* images;
            0 switches it off.
        loop_neighbours: partners found by each such search. Images that are partners already take
            none of these places, so a search cannot return the neighbouring frames only.
        descriptors: (N, D) global descriptors, row i belongs to the i-th name; for loop closure.
        local: name -> (n, D) local descriptors, which make it more reliable; see ``retrieval``.

    Returns:
        Sorted pairs.

    Raises:
        InputError: if ``window`` is below 1, ``loop_every`` is negative, or
            descriptors are missing.
    """
    names = list(names)
    if window < 1:
        raise InputError(f"The window of sequential pairs must be at least 1, not {window}")
    if loop_every < 0:
        raise InputError(f"loop_every must be 0 (off) or positive, not {loop_every}")
    offsets = set(range(1, window + 1))
    folders = sequences(names)
    longest = max((len(sequence) for sequence in folders.values()), default=0)
    if quadratic:
        offsets.update(1 << n for n in range(min(window, longest.bit_length())))
    pairs = canonical(
        pair
        for sequence in folders.values()
        for offset in offsets
        for pair in zip(sequence, sequence[offset:], strict=False)
    )
    if loop_every == 0:
        return pairs
    if descriptors is None:
        raise InputError("Loop closure (loop_every) needs a global descriptor of each image")
    ordered, scores_of = cosine_scores(names, descriptors)
    searching = {name for sequence in folders.values() for name in sequence[::loop_every]}
    rows = np.array([i for i, name in enumerate(ordered) if name in searching], dtype=np.int64)
    rerank = None if local is None else mutual_neighbours(ordered, local)
    loops = best_pairs(ordered, scores_of, loop_neighbours, rows=rows, exclude=pairs, rerank=rerank)
    return canonical([*pairs, *loops])
