"""Linkers: from what a matcher says about pairs to keypoints and matches of a scene.

``prepare`` takes what is known of each image; ``reduce`` matches some pairs and gives of each the
few arrays that are stored; ``link`` makes keypoints and matches of all that was stored. Callers do
not ask what kind a matcher is: ``linker_for`` does.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.options import AnchoredOptions, QuantizedOptions
from gim_hloc.tracks.anchored import Anchors, PairReading, make_anchors, read_matches, read_pair
from gim_hloc.tracks.anchored import link as link_readings
from gim_hloc.tracks.base import Arrays, Pair, Tracks, matches0_arrays
from gim_hloc.tracks.quantized import Raw, quantize
from gim_hloc.types import Matcher, Matches

Kind = Literal["anchored", "quantized"]
Encodings = list[tuple[Any, Any]]  # of the matcher's kind


@dataclass(kw_only=True)
class ImagePoints:
    """What is known of an image before its pairs are matched.

    Attributes:
        name: POSIX path relative to the image root.
        size: (width, height) of the stored image.
        keypoints: (N, 2) of a detector, stored pixels, hloc's frame; may be empty.
        scores: (N,) of the detector, or None.
        mask: (H, W) bool over stored pixels, True where points are allowed, or None.
        fixed: the image has these keypoints and gets no others.
    """

    name: str
    size: tuple[int, int]
    keypoints: np.ndarray
    scores: np.ndarray | None = None
    mask: np.ndarray | None = None
    fixed: bool = False


class Linker(ABC):
    """What linkers share.

    A worker process makes its own from the arguments of ``linker_for``, with a matcher of its own,
    and prepares it for the images of its pairs.

    Attributes:
        matcher: what matches.
        detector_free: whether linking gives the keypoints, not the matcher's encodings.
    """

    matcher: Matcher
    detector_free = True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides stored arrays beside ``prepare``'s images, flat, JSON-able."""

    @abstractmethod
    def prepare(self, images: Iterable[ImagePoints]) -> None:
        """Take what is known of images, before pairs of them are reduced or linked."""

    @abstractmethod
    def reduce(self, encodings: Encodings) -> list[Arrays]:
        """Match some pairs and give the arrays to store of each; from any number of threads."""

    @abstractmethod
    def confidences(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """(M,) confidences in [0, 1] of a stored pair's matches."""

    @abstractmethod
    def points(self, pair: Pair, arrays: Mapping[str, np.ndarray], at: int | None = None) -> Raw:
        """Matches of a stored pair by coordinates.

        Args:
            pair: names, both prepared.
            arrays: stored of it.
            at: only what was read at the anchors of image 0 or 1, where the linker has such.

        Returns:
            (M, 2) and (M, 2) stored pixels, hloc's frame, and (M,) scores.
        """

    def link(
        self,
        names: Sequence[str],
        pairs: Sequence[Pair],
        read: Callable[[Pair], Arrays],
        progress: Callable[[], Any] = lambda: None,
    ) -> Tracks:
        """Keypoints and matches of a scene.

        Args:
            names: all images, prepared.
            pairs: all pairs.
            read: pair -> its stored arrays.
            progress: called once a pair.
        """

        def stored() -> Iterator[tuple[Pair, Arrays]]:
            for pair in pairs:
                yield pair, read(pair)
                progress()

        return self._link(names, stored())

    @abstractmethod
    def _link(self, names: Sequence[str], stored: Iterator[tuple[Pair, Arrays]]) -> Tracks: ...


def linker_for(
    matcher: Matcher,
    tracks: Kind = "anchored",
    *,
    anchored: AnchoredOptions | None = None,
    quantized: QuantizedOptions | None = None,
) -> Linker:
    """The linker of a matcher.

    Args:
        matcher: with keypoints or not.
        tracks: how matches of a matcher without keypoints become such.
        anchored: numbers of anchored tracks.
        quantized: numbers of quantised tracks.
    """
    kind = matcher.info.kind
    if kind == "sparse":
        return Indexed(matcher)
    if tracks == "quantized":
        return Quantized(matcher, quantized or QuantizedOptions())
    makes = Anchored if kind == "dense" else AnchoredMatches
    return makes(matcher, anchored or AnchoredOptions())


class Indexed(Linker):
    """Matches of the matcher's own keypoints, by index: nothing is left to be linked."""

    detector_free = False

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.images: dict[str, ImagePoints] = {}

    def settings(self) -> dict[str, Any]:
        """See ``Linker``."""
        return _prefixed("match", self.matcher.match_settings())

    def prepare(self, images: Iterable[ImagePoints]) -> None:
        """See ``Linker``."""
        self.images |= {image.name: image for image in images}

    def reduce(self, encodings: Encodings) -> list[Arrays]:
        """``matches0`` and ``matching_scores0`` of each pair, as hloc has them."""
        reduced = []
        for found, (a, _) in zip(self.matcher.match_batch(encodings), encodings, strict=True):
            if found.indices is None:
                raise InputError(
                    f"{self.matcher.info.name} is registered as sparse, but its matches have no "
                    "indices of keypoints."
                )
            rows, scores = found.indices.cpu().numpy(), found.scores.cpu().numpy()
            reduced.append(matches0_arrays(rows, scores, len(a)))
        return reduced

    def confidences(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Linker``."""
        found: np.ndarray = arrays["matching_scores0"][arrays["matches0"] > -1]
        return found

    def points(self, pair: Pair, arrays: Mapping[str, np.ndarray], at: int | None = None) -> Raw:
        """See ``Linker``."""
        rows = _rows(arrays)
        ends = [self.images[name].keypoints[rows[:, k]] for k, name in enumerate(pair)]
        return ends[0], ends[1], self.confidences(arrays)

    def _link(self, names: Sequence[str], stored: Iterator[tuple[Pair, Arrays]]) -> Tracks:
        """Every keypoint stays, matched or not."""
        found = dict(stored)
        images = {name: self.images[name] for name in names}
        return Tracks(
            keypoints={name: image.keypoints for name, image in images.items()},
            matches={pair: _rows(arrays) for pair, arrays in found.items()},
            scores={p: self.confidences(a).astype(np.float32) for p, a in found.items()},
            keypoint_scores={
                name: np.ones(len(image.keypoints), np.float32)
                if image.scores is None
                else image.scores
                for name, image in images.items()
            },
        )


class Anchored(Linker):
    """Tracks of anchors, which warps are read at (``tracks.anchored``)."""

    def __init__(self, matcher: Matcher, options: AnchoredOptions) -> None:
        self.matcher, self.options = matcher, options
        self.anchors: dict[str, Anchors] = {}

    def settings(self) -> dict[str, Any]:
        """See ``Linker``."""
        return _detector_free_settings(self.matcher, "anchored", self.options)

    def prepare(self, images: Iterable[ImagePoints]) -> None:
        """Fix the anchors of images: keypoints and a grid around them."""
        for image in images:
            if image.fixed:
                tier = np.ones(len(image.keypoints), np.uint8)
                found = Anchors(xy_px=image.keypoints, tier=tier, size=image.size, mask=image.mask)
            else:
                found = make_anchors(
                    image.size, image.keypoints, image.scores, image.mask, self.options
                )
            self.anchors[image.name] = found

    def reduce(self, encodings: Encodings) -> list[Arrays]:
        """Readings of each pair (``PairReading.to_arrays``)."""
        ends = [(self.anchors[a.name], self.anchors[b.name]) for a, b in encodings]
        return [reading.to_arrays() for reading in self._readings(encodings, ends)]

    def _readings(
        self, encodings: Encodings, ends: Sequence[tuple[Anchors, Anchors]]
    ) -> list[PairReading]:
        warps = self.matcher.warp_batch(encodings)
        return [read_pair(w, *pair, self.options) for w, pair in zip(warps, ends, strict=True)]

    def confidences(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Linker``; of both directions."""
        reading = PairReading.from_arrays(arrays)
        return np.concatenate([reading.certainty0, reading.certainty1]) / np.float64(255)

    def points(self, pair: Pair, arrays: Mapping[str, np.ndarray], at: int | None = None) -> Raw:
        """See ``Linker``; those read at the anchors of image 0 first."""
        reading = PairReading.from_arrays(arrays)
        parts: list[Raw] = []
        for image in (0, 1) if at is None else (at,):
            index, there, scores = reading.direction(image)
            here = self.anchors[pair[image]].xy_px[index]
            parts.append((here, there, scores) if image == 0 else (there, here, scores))
        xy0, xy1, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        return xy0, xy1, scores

    def _link(self, names: Sequence[str], stored: Iterator[tuple[Pair, Arrays]]) -> Tracks:
        readings = ((pair, PairReading.from_arrays(arrays)) for pair, arrays in stored)
        return link_readings(names, self.anchors, readings, self.options)


class AnchoredMatches(Anchored):
    """Tracks of anchors, which semi-dense matches are carried over to."""

    def _readings(
        self, encodings: Encodings, ends: Sequence[tuple[Anchors, Anchors]]
    ) -> list[PairReading]:
        matches = self.matcher.match_batch(encodings)
        return [
            read_matches(*_coordinates(found), *pair, self.options)
            for found, pair in zip(matches, ends, strict=True)
        ]


class Quantized(Linker):
    """hloc's aggregation on a grid (``tracks.quantized``).

    Args:
        matcher: what matches.
        options: numbers of the aggregation.
        match: encodings of some pairs -> their matches, instead of the matcher's ``match_batch``.
    """

    def __init__(
        self,
        matcher: Matcher,
        options: QuantizedOptions,
        match: Callable[[Encodings], list[Matches]] | None = None,
    ) -> None:
        self.matcher, self.options = matcher, options
        self._match = match or matcher.match_batch

    def settings(self) -> dict[str, Any]:
        """See ``Linker``."""
        return _detector_free_settings(self.matcher, "quantized", self.options)

    def prepare(self, images: Iterable[ImagePoints]) -> None:
        """Nothing is needed of images."""

    def reduce(self, encodings: Encodings) -> list[Arrays]:
        """``keypoints0``, ``keypoints1`` and ``scores`` of each pair's matches."""
        names = ("keypoints0", "keypoints1", "scores")
        return [
            dict(zip(names, _coordinates(found), strict=True)) for found in self._match(encodings)
        ]

    def confidences(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Linker``."""
        return arrays["scores"]

    def points(self, pair: Pair, arrays: Mapping[str, np.ndarray], at: int | None = None) -> Raw:
        """See ``Linker``."""
        return arrays["keypoints0"], arrays["keypoints1"], arrays["scores"]

    def _link(self, names: Sequence[str], stored: Iterator[tuple[Pair, Arrays]]) -> Tracks:
        return quantize(names, {p: self.points(p, arrays) for p, arrays in stored}, self.options)


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _detector_free_settings(
    matcher: Matcher, tracks: Kind, options: AnchoredOptions | QuantizedOptions
) -> dict[str, Any]:
    return {
        **_prefixed("match", matcher.match_settings()),
        **_prefixed("warp", matcher.encode_settings()),
        "tracks": tracks,
        **_prefixed("tracks", dataclasses.asdict(options)),
    }


def _rows(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(M, 2) int64 rows of both images' keypoints."""
    rows0 = np.flatnonzero(arrays["matches0"] > -1)
    return np.stack([rows0, arrays["matches0"][rows0].astype(np.int64)], axis=1)


def _coordinates(found: Matches) -> Raw:
    return found.keypoints0.numpy(), found.keypoints1.numpy(), found.scores.numpy()
