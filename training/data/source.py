"""What all sources of training pairs have in common."""

from __future__ import annotations

import itertools
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch.utils.data import Dataset

from gim_hloc.errors import InputError
from gim_hloc.options import build, options
from gim_hloc.training.batch import PairSample
from gim_hloc.training.data.augment import AugmentOptions, RawPair, TooFewLabelsError, make_sample
from gim_hloc.training.data.truth import NoTruthError, likeness, require_truth

logger = logging.getLogger(__name__)

SUBSAMPLING_SEED = 3407  # of every choice of pairs that is made once, ``training.md`` §3
_REPLACEMENTS = 30  # pairs tried in place of one that cannot be used
_LOOKED_AT = 16  # pairs of a source that are looked at before a run
# Median correlation of texture at true matches. Two sets of rooms: 0.73 and 0.84; with inverted
# poses, other axes or depth in another unit 0.09 at most.
_ALIKE = 0.2
_CAUSES = (
    "Likely causes: depth in another unit than the poses, poses the other way round (camera to "
    "world for world to camera) or with other axes, K of images of another size."
)

Split = Literal["train", "validation"]
Key = int | tuple[int, int]


@options
class SourceOptions:
    """What every source is told."""

    box: tuple[int, int] = (640, 640)  # (width, height) of network images, px
    split: Split = "train"  # validation: other pairs where a source has them, no augmentation
    name: str = ""  # of the data set in samples; empty: the type of the source
    augment: Mapping[str, Any] = field(default_factory=dict)  # fields of AugmentOptions to change
    failures: Path | None = None  # file that pairs which could not be used are appended to

    # What a source changes about AugmentOptions' defaults.
    AUGMENT: ClassVar[Mapping[str, Any]] = {}

    def augmentation(self) -> AugmentOptions:
        """How samples of the source are made."""
        for name in ("box", "train"):
            if name in self.augment:
                raise InputError(f"augment has no {name!r}: the source itself decides it.")
        values = {**self.AUGMENT, **self.augment}
        fixed = AugmentOptions(box=self.box, train=self.split == "train")
        return build(AugmentOptions, values, base=fixed, prefix="augment.")


class PairSource(Dataset[PairSample], ABC):
    """Pairs of images of one data set.

    A sample is asked for by ``(index, seed)``: the index says which pair, the seed everything that
    is random about it. The same key gives the same sample in any process. A plain index means seed
    0. A pair that cannot be used (a damaged file, too few labels left, in training no true match)
    is recorded, and another one, which the key decides as well, takes its place; nothing is ever
    missing from a batch.

    Sources may be copied into other processes before and after their first sample; files are opened
    where they are read.

    Attributes:
        name: of the data set, as samples carry it.
        augment: how samples are made.
        failures: (pair, reason) of the pairs that this process could not use.
    """

    def __init__(self, name: str, augment: AugmentOptions, failures: Path | None = None) -> None:
        self.name = name
        self.augment = augment
        self.failures: list[tuple[str, str]] = []
        self._failure_file = failures

    @abstractmethod
    def scene_lengths(self) -> np.ndarray:
        """(S,) int64 number of pairs of each scene; indices count through scene after scene."""

    @abstractmethod
    def load(self, index: int) -> RawPair:
        """Read a pair from its files.

        Raises:
            InputError: the pair cannot be used.
        """

    def describe(self, index: int) -> str:
        """The pair in words, for messages."""
        return f"{self.name} pair {index}"

    def __len__(self) -> int:
        return int(self.scene_lengths().sum())

    def __getitem__(self, key: Key) -> PairSample:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} pairs, there is no {index}")
        last: Exception | None = None
        for attempt in range(_REPLACEMENTS + 1):
            rng = np.random.default_rng([seed, index, attempt])
            try:
                sample = make_sample(self.load(index), self.augment, rng, dataset=self.name)
                if self.augment.train:
                    require_truth(sample)
                return sample
            except (InputError, TooFewLabelsError, NoTruthError) as error:
                last = error
                self._record(index, str(error))
            index = int(rng.integers(len(self)))
        raise InputError(
            f"{_REPLACEMENTS + 1} pairs of {self.name} in a row cannot be used; the last: "
            f"{str(last).rstrip('.')}." + (f" {_CAUSES}" if isinstance(last, NoTruthError) else "")
        )

    def look(self) -> None:
        """Look at some pairs before a run; warn if images differ where their truth is the same.

        Raises:
            InputError: pairs in a row cannot be used.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).round().astype(int))
        samples = [self[index, 0] for index in indices.tolist()]
        alike = [likeness(sample) for sample in samples if sample.depth0 is not None]
        if alike and not np.median(alike) >= _ALIKE:
            logger.warning(
                "%s: at the places that depth and poses call the same, the images of %d pairs look "
                "different (correlation %.2f; 1 where they are the same). %s",
                self.name,
                len(alike),
                np.median(alike),
                _CAUSES,
            )

    def _record(self, index: int, reason: str) -> None:
        pair = self.describe(index)
        if (pair, reason) not in self.failures[-100:]:
            logger.warning("%s is replaced by another pair: %s", pair, reason)
        self.failures.append((pair, reason))
        if self._failure_file is not None:
            line = json.dumps({"source": self.name, "pair": pair, "reason": reason}) + "\n"
            # One write in append mode: lines of several workers do not mix.
            handle = os.open(self._failure_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)


def choose_by_overlap(
    overlap0: np.ndarray,
    overlap1: np.ndarray,
    edges: Sequence[float],
    limit: int,
    *,
    seed: int = SUBSAMPLING_SEED,
) -> np.ndarray:
    """Choose pairs evenly over bins of overlap.

    Args:
        overlap0: (N,) share of image 0 that image 1 sees.
        overlap1: (N,) share of image 1 that image 0 sees.
        edges: of the bins; a pair is in one if both its overlaps are above the lower and not above
            the upper edge.
        limit: largest number of pairs, split over the bins; a bin with fewer leaves its rest.
        seed: of the draw.

    Returns:
        (K,) int64 rows chosen, bin by bin, ascending in each.
    """
    rng = np.random.default_rng(seed)
    share = max(1, limit // (len(edges) - 1))
    chosen = []
    for low, high in itertools.pairwise(edges):
        members = np.flatnonzero(
            (overlap0 > low) & (overlap0 <= high) & (overlap1 > low) & (overlap1 <= high)
        )
        if len(members) > share:
            members = np.sort(rng.choice(members, share, replace=False))
        chosen.append(members)
    return np.concatenate(chosen)[:limit]


def overlap_edges(low: float, high: float, step: float = 0.1) -> list[float]:
    """Edges of bins of overlap: ``low`` and every ``step`` from there, ended by ``high``."""
    if not 0 <= low < high or step <= 0:
        raise InputError(f"Overlaps from {low} to {high} in steps of {step} are no range.")
    count = max(1, round((high - low) / step))
    return [*(round(low + k * step, 9) for k in range(count)), high]


def relative_pose(world_to_0: np.ndarray, world_to_1: np.ndarray, where: str) -> np.ndarray:
    """(4, 4) float64, x1 = T x0.

    Raises:
        InputError: a pose is not finite, as where tracking was lost, or not a rigid motion.
    """
    for pose in (world_to_0, world_to_1):
        if not np.isfinite(pose).all():
            raise InputError(f"{where}: a pose is not known.")
        if abs(np.linalg.det(pose[:3, :3]) - 1) > 1e-2:
            raise InputError(f"{where}: a pose is not a rotation and a translation.")
    result: np.ndarray = world_to_1 @ np.linalg.inv(world_to_0)
    return result
