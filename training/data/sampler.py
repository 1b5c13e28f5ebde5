"""Which pairs an epoch shows, in which order, to which process.

The plan of ``training.md`` §3: of each source ``maxlen`` pairs an epoch, small ones repeated, large
ones thinned so that big scenes do not drown small ones; then one pair of each source in turn. The
plan of an epoch depends on the seed and the epoch alone and is dealt out to the processes, so that
any number of them sees the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from gim_hloc.errors import InputError

FIRST_SEED = 3407  # of the first epoch; later ones use their number
_SCENE_POWER = 0.75

SampleKey = tuple[int, int, int]


class BalancedSampler(Sampler[SampleKey]):
    """Yields ``(source, index, seed)`` for a ``MixtureDataset``.

    Within a source: fewer pairs than ``maxlen``: all, and random ones again; more: drawn without
    repetition with weight 1 / (pairs of the scene)^0.75. Sources take turns; with different
    ``maxlen`` they are spread evenly over the epoch.

    The plan is made when an epoch begins. A run that was interrupted goes on after ``start``
    samples: ``len`` and iteration are then what is left.

    Args:
        scene_lengths: of each source, pairs of each of its scenes.
        maxlen: pairs of each source an epoch, over all processes; a multiple of ``world``.
        rank: of this process.
        world: number of processes.
        seed: of the first epoch.
        resample: draw anew each epoch; False repeats the first epoch's plan.

    Raises:
        InputError: an empty source, or numbers that do not fit.
    """

    def __init__(
        self,
        scene_lengths: Sequence[np.ndarray],
        maxlen: Sequence[int],
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = FIRST_SEED,
        resample: bool = True,
    ) -> None:
        if len(maxlen) != len(scene_lengths):
            raise InputError(
                f"There are {len(scene_lengths)} sources and {len(maxlen)} numbers in maxlen: give "
                "one for each."
            )
        for k, (lengths, number) in enumerate(zip(scene_lengths, maxlen, strict=True)):
            if not np.sum(lengths):
                raise InputError(f"Source {k} has no pairs.")
            if number < 1 or number % world:
                nearest = max(1, round(number / world)) * world
                raise InputError(
                    f"maxlen is {number} for source {k}; with {world} processes it must be a "
                    f"positive multiple of {world}, such as {nearest}."
                )
        if not 0 <= rank < world:
            raise InputError(f"Rank {rank} of {world} does not exist: they count from 0.")
        self._lengths = [np.asarray(lengths, dtype=np.int64) for lengths in scene_lengths]
        self._maxlen = list(maxlen)
        self.rank = rank
        self.world = world
        self.seed = seed
        self.resample = resample
        self.epoch = 0
        self.start = 0

    @property
    def epoch_length(self) -> int:
        """Samples of a whole epoch in this process."""
        return sum(self._maxlen) // self.world

    def __len__(self) -> int:
        return self.epoch_length - self.start

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its samples this process has had already."""
        if not 0 <= start <= self.epoch_length:
            raise InputError(f"An epoch has {self.epoch_length} samples, none is after {start}.")
        self.epoch = epoch
        self.start = start

    def state_dict(self, consumed: int = 0) -> dict[str, int]:
        """Where the run is.

        Args:
            consumed: samples of this process that were trained on since ``set_epoch``. The sampler
                cannot know: loaders ask for samples ahead of time.
        """
        return {"epoch": self.epoch, "start": self.start + consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.set_epoch(int(state["epoch"]), int(state["start"]))

    def __iter__(self) -> Iterator[SampleKey]:
        for row in self.plan()[self.start :].tolist():
            yield tuple(row)

    def plan(self) -> np.ndarray:
        """(N, 3) int64 source, index, seed of all samples of this process in the epoch."""
        epoch = self.epoch if self.resample else 0
        parts, places = [], []
        for source, (lengths, number) in enumerate(zip(self._lengths, self._maxlen, strict=True)):
            base = self.seed if epoch == 0 else epoch
            rng = np.random.default_rng([base, epoch, source])
            chosen = _choose(lengths, number, rng)
            # A pair that is repeated is augmented differently each time, and in each epoch.
            seeds = np.random.default_rng([base, self.epoch, source, 1]).integers(
                2**62, size=number
            )
            rows = np.stack([np.full(number, source), chosen, seeds], 1)[self.rank :: self.world]
            parts.append(rows)
            places.append((np.arange(len(rows)) + 0.5) / len(rows))
        order = np.argsort(np.concatenate(places), kind="stable")
        plan: np.ndarray = np.concatenate(parts)[order]
        return plan


def _choose(lengths: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    total = int(lengths.sum())
    if total <= number:
        extra = rng.integers(total, size=number - total)
        return rng.permutation(np.concatenate([np.arange(total), extra]))
    # The smallest of exponential variables with these rates: a weighted draw without replacement
    # (Efraimidis and Spirakis 2006).
    rates = np.repeat(np.maximum(lengths, 1) ** -_SCENE_POWER, lengths)
    arrival = rng.standard_exponential(total) / rates
    return rng.permutation(np.argpartition(arrival, number)[:number])


class FixedSampler(Sampler[SampleKey]):
    """The same pairs in the same order each time: for validation.

    Args:
        lengths: pairs of each source.
        number: largest number of each; drawn with seed 3407 where there are more.
        rank: of this process.
        world: number of processes; the first ones may have one pair more.
        seed: of the draw.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        number: int = 1000,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = FIRST_SEED,
    ) -> None:
        keys: list[SampleKey] = []
        for source, length in enumerate(lengths):
            rng = np.random.default_rng([seed, source])
            drawn = rng.permutation(length)[:number] if length > number else np.arange(length)
            keys += [(source, int(index), seed) for index in np.sort(drawn)]
        self.keys = keys[rank::world]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[SampleKey]:
        return iter(self.keys)
