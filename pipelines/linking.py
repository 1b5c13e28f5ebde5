"""Old names of ``gim_hloc.tracks.linker``, for reconstruct and localize until they use linkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gim_hloc.matchers.registry import choose_detector as choose_describer
from gim_hloc.tracks.anchored import AnchoredOptions, Anchors, PairReading, make_anchors
from gim_hloc.tracks.anchored import link as link_readings
from gim_hloc.tracks.base import Arrays, Pair, Tracks
from gim_hloc.tracks.linker import Anchored, Kind, linker_for
from gim_hloc.tracks.quantized import QuantizedOptions, quantize

__all__ = [
    "choose_describer",
    "confidence",
    "count",
    "link",
    "make_anchors",
    "matches_arrays",
    "reader",
]


def reader(
    matcher: Any, tracks: Kind, anchors: Mapping[str, Anchors], options: AnchoredOptions
) -> Callable[[list[tuple[Any, Any]]], list[Arrays]]:
    """``Linker.reduce``."""
    linker = linker_for(matcher, tracks, anchored=options)
    if isinstance(linker, Anchored):
        linker.anchors = dict(anchors)
    return linker.reduce


def count(arrays: Mapping[str, np.ndarray]) -> int:
    """Length of ``Linker.confidences``."""
    if "matches0" in arrays:
        return int((arrays["matches0"] > -1).sum())
    if "keypoints0" in arrays:
        return len(arrays["keypoints0"])
    return len(PairReading.from_arrays(arrays))


def confidence(arrays: Mapping[str, np.ndarray]) -> float:
    """Sum of ``Linker.confidences``."""
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
    """``Linker.link``."""
    stored = []
    for pair in pairs:
        stored.append((pair, read(pair)))
        progress()
    if tracks == "quantized":
        raw = {p: (a["keypoints0"], a["keypoints1"], a["scores"]) for p, a in stored}
        return quantize(names, raw, quantized)
    readings = [(pair, PairReading.from_arrays(arrays)) for pair, arrays in stored]
    return link_readings(names, anchors(), readings, anchored)


def matches_arrays(tracks: Tracks, pair: Pair) -> Arrays:
    """``Tracks.matches_arrays``."""
    return tracks.matches_arrays(pair)
