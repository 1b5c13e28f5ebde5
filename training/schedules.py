"""Learning rates and batch arithmetic: pure functions of counters.

The step rule is that of the reference's loftr, dkm and roma branches, the epoch rule that of its
glue branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPOCH_DECAY = 10 ** (-1 / 10)
"""Factor a epoch of `epoch_rule`: ten epochs divide the rate by ten."""


def accumulation_steps(canonical: int | None, *, world: int, batch_size: int) -> int:
    """Return how many micro-batches make one optimiser step: ceil(canonical / (world · batch)).

    Args:
        canonical: pairs an optimiser step should see; None: no accumulation.
        world: processes.
        batch_size: pairs of one micro-batch of one process.
    """
    if canonical is None:
        return 1
    return max(1, math.ceil(canonical / (world * batch_size)))


def windows(batches: int, accumulation: int) -> list[int]:
    """Return the micro-batches of each optimiser step of an epoch; the last may have fewer.

    Args:
        batches: micro-batches an epoch of one process.
        accumulation: from `accumulation_steps`.
    """
    full, rest = divmod(batches, accumulation)
    return [accumulation] * full + ([rest] if rest else [])


def step_rule(
    step: int, *, lr: float, min_lr: float, warmup: int, total: int, start: float = 0.1
) -> float:
    """Return the learning rate of an optimiser step: warm-up, then a line down to ``min_lr``.

    With s < W: ``start·LR + (s/W)·(1 - start)·LR``; from there a line with LR at s = W and min_lr
    at s = N: ``(N - s)/N·(B - m) + m`` with ``B = N/(N - W)·(LR - m) + m``.

    Args:
        step: s, optimiser steps taken before this one, from 0.
        lr: LR, reached at the end of the warm-up.
        min_lr: m, reached when all steps are taken.
        warmup: W, optimiser steps.
        total: N, optimiser steps of the whole run.
        start: fraction of ``lr`` that the warm-up begins with.
    """
    if step < warmup:
        return start * lr + step / warmup * (1 - start) * lr
    if step >= total:
        return min_lr
    base = total / (total - warmup) * (lr - min_lr) + min_lr
    return (total - step) / total * (base - min_lr) + min_lr


def epoch_rule(epoch: int, *, lr: float, constant: int = 30, decay: float = EPOCH_DECAY) -> float:
    """Return the learning rate of an epoch: constant, then multiplied by ``decay`` every epoch.

    Args:
        epoch: from 0.
        lr: of the first ``constant`` epochs.
        constant: epochs; the epoch of this number is the first with a smaller rate.
        decay: factor.
    """
    return lr * decay ** max(0, epoch - constant + 1)


def validations_due(step: int, *, steps: int, per_epoch: int) -> int:
    """Return how many of an epoch's validations are due after ``step`` of its optimiser steps.

    They are spread evenly; the last is at the end of the epoch.

    Args:
        step: optimiser steps taken in this epoch.
        steps: optimiser steps of an epoch.
        per_epoch: validations an epoch.
    """
    return sum(step >= math.ceil(k * steps / per_epoch) for k in range(1, per_epoch + 1))


def nearest_multiples(value: int, divisor: int) -> Sequence[int]:
    """Return the multiples of ``divisor`` next to ``value`` that are at least ``divisor``."""
    below = value // divisor * divisor
    return tuple(m for m in (below, below + divisor) if m > 0)
