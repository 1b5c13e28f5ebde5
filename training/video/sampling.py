"""Which frames of a video are looked at, and which of them are paired.

Frames are counted on the video's *time grid*: frame ``n`` is what is shown ``n / fps`` seconds
after the first frame, ``fps`` being the frame rate by time stamps. Where frames are evenly spaced,
``n`` is the number of the frame in display order; where they are not, the grid still is even in
time. The reference counts in the frame rate rounded down, decides in the one rounded up, and so
drifts by 3 % at 29.97 frames a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.training.video.options import SamplingOptions
from gim_hloc.videos import time_between

SLOW_FPS = 30  # up to this rounded frame rate, frames are 10 apart, else 20
_SHORTEST = 3  # videos of fewer trims than this are used whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Frames and pairs of one video.

    Attributes:
        gap: frames between sampled ones.
        steps: frames between those of a pair, ascending.
        frames: (K,) int64 sampled frames on the time grid.
        pairs: (P, 2) int64, by first frame, then by step. Pairs overlap where a step exceeds gap.
    """

    gap: int
    steps: tuple[int, ...]
    frames: np.ndarray
    pairs: np.ndarray


def make_plan(fps: float, frames: int, options: SamplingOptions) -> Plan:
    """Choose frames and pairs.

    Sampled frames are multiples of the gap whatever the range, so that runs on different ranges of
    a video share frames and labels.

    Args:
        fps: frames per second on the time grid.
        frames: number of frames on the grid.
        options: see there.

    Raises:
        InputError: the range is empty, or a step is no multiple of the gap.
    """
    gap = options.gap or (10 if round(fps) <= SLOW_FPS else 20)
    steps = tuple(sorted(set(options.steps or (gap, 2 * gap, 4 * gap))))
    if any(step % gap for step in steps):
        raise InputError(f"The steps {steps} must be multiples of the gap, {gap} frames.")
    start, end = time_range((frames - 1) / fps, options)
    slack = 1e-6  # of a frame: ends that are meant to be frames must not fall beside them
    first = gap * math.ceil(max(0.0, start * fps - slack) / gap)
    last = min(frames - 1, math.floor(end * fps + slack))
    chosen = np.arange(first, last + 1, gap, dtype=np.int64)[: options.limit]
    if len(chosen) < 2:
        raise InputError(
            f"From {start:g} s to {end:g} s, {len(chosen)} frames {gap} apart at {fps:g} frames/s: "
            "two make a pair. Take a longer range or a smaller gap."
        )
    return Plan(gap=gap, steps=steps, frames=chosen, pairs=make_pairs(chosen, gap, steps))


def make_pairs(frames: np.ndarray, gap: int, steps: Sequence[int]) -> np.ndarray:
    """(P, 2) pairs of sampled frames that lie a step apart, by first frame, then by step."""
    lengths = [step // gap for step in steps]
    pairs = [
        (frames[k], frames[k + length])
        for k in range(len(frames))
        for length in lengths
        if k + length < len(frames)
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def time_range(duration: float, options: SamplingOptions) -> tuple[float, float]:
    """First and last moment in seconds.

    Args:
        duration: time of the last frame after the first, s.
        options: see there.

    Raises:
        InputError: nothing is left.
    """
    trim = options.trim if duration >= _SHORTEST * options.trim else 0.0
    start = trim if options.start is None else options.start
    end = duration - trim if options.end is None else options.end
    return time_between(duration, start, end)
