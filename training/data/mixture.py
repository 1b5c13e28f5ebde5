"""Several sources as one data set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from torch.utils.data import Dataset

from gim_hloc.errors import InputError
from gim_hloc.training.batch import PairSample
from gim_hloc.training.data.source import PairSource


class MixtureDataset(Dataset[PairSample]):
    """Sources side by side; a sample is asked for by ``(source, index, seed)``.

    Args:
        sources: all for the same box.

    Raises:
        InputError: no source, or different boxes.
    """

    def __init__(self, sources: Sequence[PairSource]) -> None:
        if not sources:
            raise InputError("There is no source of training data.")
        boxes = {source.augment.network_box for source in sources}
        if len(boxes) > 1:
            raise InputError(f"The sources have different boxes: {sorted(boxes)}. Give one to all.")
        self.sources = list(sources)

    def scene_lengths(self) -> list[np.ndarray]:
        """Pairs of each scene, of each source: what ``BalancedSampler`` needs."""
        return [source.scene_lengths() for source in self.sources]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, key: tuple[int, int, int]) -> PairSample:
        source, index, seed = key
        return self.sources[source][index, seed]


class HeldSamples(Dataset[PairSample]):
    """A data set whose samples stay in memory once they were asked for.

    Args:
        dataset: with keys that can be compared; the same key is the same sample.
    """

    def __init__(self, dataset: Dataset[PairSample]) -> None:
        self._dataset = dataset
        self._held: dict[Hashable, PairSample] = {}

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Hashable) -> PairSample:
        if key not in self._held:
            self._held[key] = self._dataset[key]  # type: ignore[index]
        return self._held[key]


def init_worker(worker: int) -> None:
    """``worker_init_fn`` of loaders: one thread each, or workers fight for the cores."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
