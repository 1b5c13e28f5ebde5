"""Batches of a run: which pairs in which order, from any place in an epoch, and their workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from gim_hloc.errors import InputError
from gim_hloc.training.batch import PairBatch, collate


@dataclass(kw_only=True)
class PairData:
    """What a run learns from and is judged on.

    Attributes:
        train: dataset of ``PairSample``s by key.
        keys: (epoch, rank, world) -> the keys of a process in their order; a function of nothing
            else, with the same number of keys for every process and epoch.
        valid: dataset of ``PairSample``s by key, the same sample whenever asked; None: none.
        valid_keys: its keys, in the order of the set.
    """

    train: Any
    keys: Callable[[int, int, int], Sequence[Hashable]]
    valid: Any = None
    valid_keys: Sequence[Hashable] = ()


class _Batches:
    """Batches of keys, which a loader asks for anew each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Hashable]] = []

    def __iter__(self) -> Iterator[list[Hashable]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class EpochLoader:
    """Training batches of one process.

    Workers live from epoch to epoch. Nothing is drawn here: a sample's randomness comes with its
    key, so that any number of workers, and a start in the middle, give the same batches.

    Args:
        data: the pairs.
        batch_size: pairs of a batch.
        seed: of the workers' own generators, which no sample should need.
        rank: of this process.
        world: processes.
        workers: processes that read; 0: none.
        prefetch: batches that each of them holds ready.
        pin: copy batches to pinned memory, from where a GPU takes them without waiting.
    """

    def __init__(
        self,
        data: PairData,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        prefetch: int,
        pin: bool,
    ) -> None:
        self._data = data
        self._size = batch_size
        self._rank, self._world = rank, world
        self._batches = _Batches()
        self._loader = make_loader(
            data.train,
            self._batches,
            seed=seed,
            workers=workers,
            prefetch=prefetch,
            pin=pin,
            persistent=True,
        )
        self.sizes = [len(batch) for batch in self._epoch(0)]

    def _epoch(self, epoch: int) -> list[list[Hashable]]:
        keys = list(self._data.keys(epoch, self._rank, self._world))
        if not keys:
            raise InputError("The training sources hold no pairs.")
        return [keys[i : i + self._size] for i in range(0, len(keys), self._size)]

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[PairBatch]:
        """Iterate over the batches of an epoch from the ``start``-th on."""
        batches = self._epoch(epoch)
        if [len(batch) for batch in batches] != self.sizes:
            raise InputError(
                f"Epoch {epoch} has {sum(map(len, batches))} pairs and the first had "
                f"{sum(self.sizes)}: the schedule needs epochs of one length."
            )
        self._batches.batches = batches[start:]
        return iter(self._loader)


def validation_loader(
    data: PairData,
    batches: Sequence[Sequence[int]],
    *,
    seed: int,
    workers: int,
    prefetch: int,
    pin: bool,
) -> Iterator[PairBatch]:
    """Iterate over batches of the validation set, given by the indices of their pairs."""
    keys = _Batches()
    keys.batches = [[data.valid_keys[index] for index in batch] for batch in batches]
    loader = make_loader(
        data.valid, keys, seed=seed, workers=workers, prefetch=prefetch, pin=pin, persistent=False
    )
    return iter(loader)


def make_loader(
    dataset: Any,
    batches: Any,
    *,
    seed: int,
    workers: int,
    prefetch: int,
    pin: bool,
    persistent: bool,
) -> DataLoader[Any]:
    """Return a loader of batches of keys."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_start_worker,
        # Its own: an iterator draws a number, and the model's random numbers must not depend on how
        # often an epoch was begun.
        generator=torch.Generator().manual_seed(seed),
    )


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group. The training process
    # finishes its step and stores it; until then it needs its workers, which end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if threaded := _opencv():
        threaded.setNumThreads(0)


def _opencv() -> Any:
    import sys

    return sys.modules.get("cv2")
