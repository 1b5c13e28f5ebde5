"""What several methods found of one scene: layers of keypoints and matches, the first one's first.

A layer appends its keypoints to those before it, or matches the keypoints of the first one anew.
Rows that exist never change, so that a model of the first layers stays valid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from gim_hloc.pairs.select import Selection
from gim_hloc.pipelines.correspondences import Correspondences
from gim_hloc.pipelines.matching import Stored
from gim_hloc.pipelines.methods import Method

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

# Keypoints of the first method that a stronger one matches: its time grows with their square.
STRONGEST = 2048


class Layer(Correspondences):
    """Some pairs of a scene, matched by another method than the run's."""

    def __init__(self, first: Correspondences, method: Method) -> None:
        self.first = first
        folder = first.folder.hidden(f"layers/{method.name}-{method.quality}/features.h5").parent
        super().__init__(first.inputs, method, folder)
        self.names: list[str] = []
        self.selection = Selection(pairs=[], mode="", why="", counts={})

    def _open_stores(self) -> None:
        if not self.shared:
            super()._open_stores()
            return
        self.detected = self.features = self.first.detected
        self.raw = self.matches = self._store("matches.h5", "match")
        self.keypoints = self.first.keypoints

    @property
    def shared(self) -> bool:
        """Whether the first method's keypoints are matched, not others."""
        return self.method.shares_keypoints(self.first.method)

    def _stored(self) -> Stored:
        return Stored(self.detected.path, most=STRONGEST if self.shared else None)

    def cover(self, pairs: Iterable[Pair]) -> None:
        """Match these pairs too."""
        every = sorted({*self.selection.pairs, *pairs})
        if every == self.selection.pairs:
            return
        self.selection.pairs[:] = every
        if not self.shared:
            self.names = sorted({name for pair in every for name in pair})
            self.encode()
        self.match()
        if self.linker.detector_free:
            self.link()

    def close(self) -> None:
        """Close the files that are its own."""
        if self.shared:
            self.matches.close()
        else:
            super().close()


class Layers:
    """All layers of a run, in the order in which their keypoints stand in the database."""

    def __init__(self, first: Correspondences) -> None:
        self.all: list[Correspondences] = [first]

    @property
    def first(self) -> Correspondences:
        """That of the run's own method."""
        return self.all[0]

    def of(self, method: Method) -> Layer:
        """The layer of a method beside the first, which may be new."""
        for layer in self.all[1:]:
            if isinstance(layer, Layer) and layer.method.match_settings == method.match_settings:
                return layer
        layer = Layer(self.first, method)
        self.all.append(layer)
        return layer

    def drop(self, layer: Layer) -> None:
        """Forget a layer that gave nothing; its cache stays."""
        self.all.remove(layer)
        layer.close()

    @property
    def pairs(self) -> list[Pair]:
        """Of all layers, sorted."""
        return sorted({pair for layer in self.all for pair in layer.selection.pairs})

    def offset(self, layer: Correspondences, name: str) -> int:
        """Row of an image's keypoints in the database at which those of a layer start."""
        if layer.shared:
            return 0
        before = self.all[: self.all.index(layer)]
        return sum(len(other.keypoints.get(name, ())) for other in before if not other.shared)

    def keypoints(self, name: str) -> np.ndarray:
        """(N, 2) of an image, of all layers."""
        own = [
            layer.keypoints[name]
            for layer in self.all
            if not layer.shared and name in layer.keypoints
        ]
        return own[0] if len(own) == 1 else np.concatenate(own)

    def rows(self, pair: Pair) -> np.ndarray:
        """(M, 2) all matches of a pair, rows of the database."""
        own = [layer for layer in self.all if pair in layer.selection.pairs]
        return np.concatenate([self.shifted(layer, pair, layer.rows(pair)) for layer in own])

    def shifted(self, layer: Correspondences, pair: Pair, rows: np.ndarray) -> np.ndarray:
        """Rows of a layer's keypoints as rows of the database."""
        return rows + np.array([self.offset(layer, name) for name in pair], dtype=rows.dtype)

    def close(self) -> None:
        """Close all files."""
        for layer in self.all:
            layer.close()


__all__ = ["Layer", "Layers"]
