"""Batches of a run: which pairs in which order, from any place in an epoch, and their workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gim_hloc.errors import GimError, InputError
from gim_hloc.training.batch import PairBatch, PairSample, collate
from gim_hloc.training.config import TrainConfig


@dataclass(kw_only=True)
class PairData:
    """What a run learns from and is judged on.

    Attributes:
        train: dataset of ``PairSample``s by key.
        keys: (epoch, rank, world) -> the keys of a process in their order, or an array with a key a
            row; a function of nothing else, with the same number of keys for every process and
            epoch.
        valid: dataset of ``PairSample``s by key, the same sample whenever asked; None: none.
        valid_keys: its keys, in the order of the set.
    """

    train: Any
    keys: Callable[[int, int, int], Sequence[Hashable] | np.ndarray]
    valid: Any = None
    valid_keys: Sequence[Hashable] = ()


class _Batches:
    """Batches of keys, which a loader asks for anew each epoch.

    Args:
        size: keys of a batch; the last may have fewer.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.keys: Sequence[Hashable] | np.ndarray = ()
        self.start = 0  # batches to leave out

    def __iter__(self) -> Iterator[list[Hashable]]:
        for first in range(self.start * self._size, len(self.keys), self._size):
            rows = self.keys[first : first + self._size]
            # An epoch of the published trainings has millions of keys: tuples are made when needed.
            yield [tuple(row) for row in rows.tolist()] if isinstance(rows, np.ndarray) else [*rows]

    def __len__(self) -> int:
        return -(-len(self.keys) // self._size) - self.start


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
        self._batches = _Batches(batch_size)
        self._loader = make_loader(
            data.train,
            self._batches,
            seed=seed,
            workers=workers,
            prefetch=prefetch,
            pin=pin,
            persistent=True,
        )
        count = len(self._keys(0))
        self.batches = -(-count // batch_size)
        self._count = count

    def _keys(self, epoch: int) -> Sequence[Hashable] | np.ndarray:
        keys = self._data.keys(epoch, self._rank, self._world)
        if not len(keys):
            raise InputError("The training sources hold no pairs.")
        return keys

    def pairs(self, first: int, count: int) -> int:
        """Return the pairs of ``count`` batches of an epoch from the ``first``-th on."""
        return min((first + count) * self._size, self._count) - first * self._size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[PairBatch]:
        """Iterate over the batches of an epoch from the ``start``-th on."""
        keys = self._keys(epoch)
        if len(keys) != self._count:
            raise InputError(
                f"Epoch {epoch} has {len(keys)} pairs and the first had {self._count}: a "
                "schedule needs epochs of one length."
            )
        self._batches.keys, self._batches.start = keys, start
        return _raised(self._loader)


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
    keys = [[data.valid_keys[index] for index in batch] for batch in batches]
    loader = make_loader(
        data.valid, keys, seed=seed, workers=workers, prefetch=prefetch, pin=pin, persistent=False
    )
    return _raised(loader)


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
        _Told(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_start_worker,
        # Its own: an iterator draws a number, and the model's random numbers must not depend on how
        # often an epoch was begun.
        generator=torch.Generator().manual_seed(seed),
    )


class _Told(Dataset[Any]):
    """A data set that returns its errors: raised in a worker, they arrive as a traceback."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Hashable) -> PairSample | GimError:
        try:
            sample: PairSample = self._dataset[key]
        except GimError as error:
            return error
        return sample


def _collate(samples: Sequence[Any]) -> PairBatch | GimError:
    errors = [sample for sample in samples if isinstance(sample, GimError)]
    return errors[0] if errors else collate(samples)


def _raised(batches: Iterable[PairBatch | GimError]) -> Iterator[PairBatch]:
    for batch in batches:
        if isinstance(batch, GimError):
            raise batch
        yield batch


def _start_worker(worker: int) -> None:
    from gim_hloc.training.data.mixture import init_worker

    init_worker(worker)
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group. The training process
    # finishes its step and stores it; until then it needs its workers, which end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------ sources


def source_settings(
    config: TrainConfig, source: Mapping[str, Any], *, split: str
) -> dict[str, Any]:
    """Return a source's settings: its own, before those of its type, before the run's.

    Args:
        config: with the images' box and ``data.defaults``.
        source: an entry of ``data.train`` or ``data.valid``.
        split: "train" or "validation".
    """
    usual = config.data.defaults.get(str(source.get("type")), {})
    box = config.data.box
    if split == "validation" and config.data.valid_box is not None:
        box = config.data.valid_box
    settings = {"box": box, "split": split, **usual, **source}
    augment = {**usual.get("augment", {}), **source.get("augment", {})}
    return settings | ({"augment": augment} if augment else {})


def open_sources(config: TrainConfig, *, failures: Path | None = None) -> PairData:
    """Open the sources that the settings name.

    Args:
        config: the run.
        failures: file that pairs which cannot be used are noted in.

    Raises:
        InputError: no source is named, or one cannot be opened.
    """
    from gim_hloc.training.data import build_source
    from gim_hloc.training.data.mixture import HeldSamples, MixtureDataset
    from gim_hloc.training.data.sampler import BalancedSampler, FixedSampler

    if not config.data.train:
        raise InputError("There is nothing to learn from: name sources with --data FILE.")

    def open_all(sources: Sequence[Mapping[str, Any]], split: str) -> Any:
        noted = {} if failures is None else {"failures": failures}
        return MixtureDataset(
            [build_source({**noted, **source_settings(config, s, split=split)}) for s in sources]
        )

    train = open_all(config.data.train, "train")
    for source in train.sources:
        source.look()
    lengths = train.scene_lengths()

    def keys(epoch: int, rank: int, world: int) -> np.ndarray:
        largest = max(int(np.sum(scenes)) for scenes in lengths)
        given = config.data.maxlen or (max(1, largest // world) * world,)
        sampler = BalancedSampler(
            lengths,
            given * len(lengths) if len(given) == 1 else given,
            rank=rank,
            world=world,
            seed=config.seed,
            resample=config.data.resample,
        )
        # The seeds of augmentations go by the epoch: other ones would never be found in memory.
        sampler.set_epoch(0 if config.data.hold else epoch)
        return sampler.plan()

    data = PairData(train=HeldSamples(train) if config.data.hold else train, keys=keys)
    if config.data.valid:
        data.valid = open_all(config.data.valid, "validation")
        counts = [len(source) for source in data.valid.sources]
        number = max(counts) if config.data.valid_pairs is None else config.data.valid_pairs
        data.valid_keys = FixedSampler(counts, max(1, number), seed=config.seed).keys
    return data
