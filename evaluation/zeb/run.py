"""Matchers over the sets of an unpacked ZEB (`gim_hloc.evaluation.run`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc.evaluation import protocol
from gim_hloc.evaluation.dumps import DumpRecord
from gim_hloc.evaluation.options import RunOptions
from gim_hloc.evaluation.pair_set import PairSet, PosedPair
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.protocol import Protocol
from gim_hloc.evaluation.run import RunReport, evaluate
from gim_hloc.evaluation.zeb.datasets import (
    find_root,
    find_set,
    network_sizes,
    prepare_image,
    present_sets,
    read_labels,
)
from gim_hloc.evaluation.zeb.sets import ZebSet
from gim_hloc.geometry.frames import resize_points
from gim_hloc.types import ImageData, ImageOptions

# What the reference's test sets, where it differs from the ``base`` operating point here; other
# matchers run at their operating point.
_REFERENCE_OPTIONS: dict[str, dict[str, Any]] = {
    "gim_dkm": {"size": (660, 880), "upsample_size": (1152, 1536), "pad": False,
                "num_matches": 5000},
    "gim_roma": {"size": (672, 672), "upsample_size": (1344, 1344), "pad": False,
                 "num_matches": 5000},
    "gim_loftr": {"max_size": None, "border_rule": "mask"},
    "gim_lightglue": {"max_size": None, "max_keypoints": 2048, "detection_threshold": 0.0,
                      "nms_radius": 3, "filter_threshold": 0.1},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ZebPairs(PairSet):
    """The pairs of a set of ZEB."""

    zeb_set: ZebSet

    @classmethod
    def read(cls, root: Path, zeb_set: ZebSet) -> ZebPairs:
        """All pairs of a set; ``InputError`` where it is not there or has no label."""
        labels = read_labels(root, zeb_set)
        return cls(
            name=zeb_set.name,
            root=root,
            dump_name=zeb_set.dump_name,
            pairs=labels.pairs,
            bad=labels.bad,
            zeb_set=zeb_set,
        )

    @property
    def shown(self) -> list[Any]:
        """The set's rule."""
        return ["zeb", self.zeb_set.img_size, self.zeb_set.padded_size]

    def path(self, name: str) -> Path:
        """In the set's folder."""
        return self.root / self.zeb_set.folder / name

    def image(self, name: str, options: ImageOptions) -> ImageData:
        """By the set's rule."""
        return prepare_image(self.path(name), self.zeb_set, options)

    def judge(self, pair: PosedPair, matches: Prediction, protocol_: Protocol) -> DumpRecord:
        """By the relative pose."""
        points0, points1 = (p.astype(np.float64) for p in (matches.points0, matches.points1))
        if protocol_.padded_slip:
            points0 = slip(points0, matches.size0, self.zeb_set)
            points1 = slip(points1, matches.size1, self.zeb_set)
        return protocol.evaluate_pair(
            points0,
            points1,
            *pair.truth(),
            protocol_,
            identifier=pair.identifier,
            covisible=(pair.covisible0, pair.covisible1),
        )


def run(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: RunOptions,
    *,
    progress: bool = False,
) -> RunReport:
    """Run matchers over the sets of an unpacked ZEB.

    Args:
        folder: with ``zeb/`` in it, or ``zeb/`` itself.
        output: see `gim_hloc.evaluation.run`.
        options: what to run.
        progress: show bars.

    Raises:
        InputError: no set is there, an unknown name, a set without labels.
        GimError: as `gim_hloc.evaluation.run.evaluate` has it.
    """
    root = find_root(Path(folder).resolve())  # workers may have another working directory
    named = {entry.name: entry for entry in (find_set(name, root) for name in options.sets)}
    sets = list(named.values()) or present_sets(root)
    return evaluate(
        [ZebPairs.read(root, zeb_set).sample(options) for zeb_set in sets],
        output,
        options,
        [
            replace(Protocol.make(name), padded_slip=options.padded_slip)
            for name in options.protocols
        ],
        matcher_options=reference_options,
        progress=progress,
    )


def reference_options(matcher: str) -> dict[str, Any]:
    """The options that the reference's test sets for a matcher; none for other matchers."""
    return dict(_REFERENCE_OPTIONS.get(matcher, {}))


def slip(points: np.ndarray, size: tuple[int, int], zeb_set: ZebSet) -> np.ndarray:
    """Move correct coordinates to where the reference puts them on a padded set.

    It multiplies the coordinate in [0, 1] of the padded frame by the size of the original image.

    Args:
        points: (M, 2) original pixels, hloc's frame.
        size: (width, height) of the original image.
        zeb_set: the set, padded or not.
    """
    resized, padded = network_sizes(size, zeb_set)
    ratio = np.array(resized, dtype=np.float64) / np.array(padded)
    return resize_points(points, ratio)
