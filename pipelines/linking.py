"""From pairs of a matcher without keypoints to keypoints and matches of a scene.

Per pair, the warp (dense) or the matches (semi-dense) are read at the anchors of both images at
once, so that only the readings are stored; tracks are then linked over the whole scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gim_hloc.tracks import anchored as anchored_tracks
from gim_hloc.tracks.anchored import (
    AnchoredOptions,
    Anchors,
    PairReading,
    make_anchors,
    read_matches,
    read_pair,
)
from gim_hloc.tracks.base import Tracks
from gim_hloc.tracks.quantized import QuantizedOptions, quantize

Pair = tuple[str, str]
Kind = Literal["anchored", "quantized"]
Arrays = dict[str, np.ndarray]

__all__ = [
    "choose_describer",
    "confidence",
    "count",
    "link",
    "make_anchors",
    "matches_arrays",
    "reader",
]


def choose_describer(name: str) -> str:
    """Name of the sparse matcher that gives anchors: the one asked for, or what works here."""
    if name != "auto":
        return name
    from gim_hloc.matchers.registry import missing_weights

    return "sift" if missing_weights("aliked_lightglue") else "aliked_lightglue"


def reader(
    matcher: Any, tracks: Kind, anchors: Mapping[str, Anchors], options: AnchoredOptions
) -> Callable[[list[tuple[Any, Any]]], list[Arrays]]:
    """Work on some pairs of encodings: match them and return the arrays to store of each.

    Args:
        matcher: dense or semi-dense.
        tracks: what the arrays are for.
        anchors: of every image (``anchored`` only).
        options: numbers of anchored tracks.
    """

    def raw(pairs: list[tuple[Any, Any]]) -> list[Arrays]:
        return [
            {
                "keypoints0": found.keypoints0.numpy(),
                "keypoints1": found.keypoints1.numpy(),
                "scores": found.scores.numpy(),
            }
            for found in matcher.match_batch(pairs)
        ]

    def dense(pairs: list[tuple[Any, Any]]) -> list[Arrays]:
        return [
            read_pair(warp, anchors[a.name], anchors[b.name], options).to_arrays()
            for warp, (a, b) in zip(matcher.warp_batch(pairs), pairs, strict=True)
        ]

    def semidense(pairs: list[tuple[Any, Any]]) -> list[Arrays]:
        return [
            read_matches(
                found.keypoints0.numpy(),
                found.keypoints1.numpy(),
                found.scores.numpy(),
                anchors[a.name],
                anchors[b.name],
                options,
            ).to_arrays()
            for found, (a, b) in zip(matcher.match_batch(pairs), pairs, strict=True)
        ]

    if tracks == "quantized":
        return raw
    return dense if matcher.info.kind == "dense" else semidense


def count(arrays: Mapping[str, np.ndarray]) -> int:
    """Number of matches of a stored pair, whichever matcher it is from."""
    if "matches0" in arrays:
        return int((arrays["matches0"] > -1).sum())
    if "keypoints0" in arrays:
        return len(arrays["keypoints0"])
    return len(PairReading.from_arrays(arrays))


def confidence(arrays: Mapping[str, np.ndarray]) -> float:
    """Sum of the confidences of a stored pair's matches, whichever matcher it is from."""
    for name in ("matching_scores0", "scores"):
        if name in arrays:
            return float(arrays[name].sum(dtype=np.float64))
    reading = PairReading.from_arrays(arrays)
    return float(
        sum(c.sum(dtype=np.float64) for c in (reading.certainty0, reading.certainty1)) / 255
    )


def link(
    names: Sequence[str],
    anchors: Callable[[], Mapping[str, Anchors]],
    pairs: Sequence[Pair],
    read: Callable[[Pair], Arrays],
    tracks: Kind,
    *,
    anchored: AnchoredOptions,
    quantized: QuantizedOptions,
    progress: Callable[[], Any] = lambda: None,
) -> Tracks:
    """Link what was stored of all pairs into tracks.

    Args:
        names: all images.
        anchors: gives the anchors of every image; called for anchored tracks only.
        pairs: all pairs.
        read: pair -> its stored arrays.
        tracks: which way.
        anchored: numbers of anchored tracks.
        quantized: numbers of quantised tracks.
        progress: called once per pair.
    """

    def stored() -> Iterator[tuple[Pair, Arrays]]:
        for pair in pairs:
            yield pair, read(pair)
            progress()

    if tracks == "quantized":
        raw = {p: (a["keypoints0"], a["keypoints1"], a["scores"]) for p, a in stored()}
        return quantize(names, raw, quantized)
    readings = ((pair, PairReading.from_arrays(arrays)) for pair, arrays in stored())
    return anchored_tracks.link(names, anchors(), readings, anchored)


def matches_arrays(tracks: Tracks, pair: Pair) -> Arrays:
    """``matches0`` and ``matching_scores0`` of a pair in hloc's layout."""
    matches0 = np.full(len(tracks.keypoints[pair[0]]), -1, dtype=np.int32)
    scores0 = np.zeros(len(matches0), dtype=np.float16)
    rows = tracks.matches.get(pair)
    if rows is not None and len(rows):
        matches0[rows[:, 0]] = rows[:, 1]
        scores0[rows[:, 0]] = tracks.scores[pair]
    return {"matches0": matches0, "matching_scores0": scores0}
