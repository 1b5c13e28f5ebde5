"""How much faster propagation is than its description in plain Python, on the same labels.

    python -m gim_hloc.evaluation.benchmarks.propagation

A camera moves through made-up points; several labellers give noisy, incomplete labels of pairs at
three steps. Both ways do every start, last robust fit included, in one process, in turn, by
processor time; their labels must be the same to the bit.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

import numpy as np
import tyro
from tqdm import tqdm

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks._slow_propagation import SlowPropagation, as_rows
from gim_hloc.evaluation.benchmarks.measure import machine, now, versions
from gim_hloc.training.video.options import PropagationOptions
from gim_hloc.training.video.propagation import Propagator, find_starts

#: Times faster than plain Python that must be reached.
LEAST_GAIN = 20.0

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PropagationBenchmark:
    """Time propagation against its description in plain Python."""

    frames: int = 200
    """Sampled frames."""
    labels: int = 5000
    """Labels of a pair, all rounds together."""
    rounds: int = 4
    """Labelling rounds that they come from."""
    starts: int | None = None
    """Only so many starts, evenly spread; the fast way keeps less between them then."""
    seed: int = 0
    """Of the made-up scene."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUpVideo:
    """Points that a moving camera sees, and where it sees each of them.

    Attributes:
        size: (width, height) of the frames in pixels.
        steps: of the labels.
        indices: frame indices.
        tracks: (frames, points, 2) float64 true pixels, NaN where a point is not seen.
        labels: pair -> one array (n, 4) float32 per round.
    """

    size: tuple[int, int]
    steps: tuple[int, ...]
    indices: tuple[int, ...]
    tracks: np.ndarray
    labels: dict[Pair, list[np.ndarray]]

    def counts(self) -> dict[int, list[dict[Pair, int]]]:
        """Step -> for each round, number of labels of its pairs."""
        rounds = max(len(arrays) for arrays in self.labels.values())
        return {
            step: [
                {
                    pair: len(arrays[k])
                    for pair, arrays in self.labels.items()
                    if pair[1] - pair[0] == step
                }
                for k in range(rounds)
            ]
            for step in self.steps
        }


def made_up_video(
    *,
    frames: int,
    labels: int,
    rounds: int,
    seed: int,
    size: tuple[int, int] = (1920, 1080),
    noise_px: float = 0.15,
) -> MadeUpVideo:
    """Make labels of a camera that walks sideways past points, turning.

    Args:
        frames: sampled every 10 indices; pairs are 10, 20 and 40 apart.
        labels: of a pair, all rounds together; fewer where fewer points are seen in both frames.
        rounds: that these are divided among.
        seed: of points, noise and choice.
        size: (width, height) of the frames in pixels.
        noise_px: standard deviation of every coordinate of a label.
    """
    generator = np.random.default_rng(seed)
    width, height = size
    focal, gap, steps = 0.8 * width, 10, (10, 20, 40)
    walk = np.linspace(0.0, 0.02 * frames, frames)  # metres
    turn = 0.15 * np.sin(np.linspace(0, 0.03 * frames, frames))  # radians
    # As many points as fill a view about 1.3 times as densely as there are labels.
    depth = generator.uniform(4, 12, int(labels * 1.3 * (1 + walk[-1] / 8)))
    spread = 1.4 * depth * width / focal / 2
    x = generator.uniform(-spread, spread + walk[-1])
    y = generator.uniform(-1.0, 1.0, len(depth)) * depth * height / focal / 2
    tracks = np.empty((frames, len(depth), 2))
    for k in range(frames):
        c, s = np.cos(turn[k]), np.sin(turn[k])
        x0 = x - walk[k]
        xc, zc = c * x0 - s * depth, s * x0 + c * depth
        with np.errstate(divide="ignore", invalid="ignore"):
            u = focal * xc / zc + width / 2 - 0.5
            v = focal * y / zc + height / 2 - 0.5
        seen = (zc > 1) & (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
        tracks[k] = np.where(seen[:, None], np.stack([u, v], axis=1), np.nan)
    indices = tuple(gap * k for k in range(frames))
    found: dict[Pair, list[np.ndarray]] = {}
    for step in steps:
        for k in range(frames - step // gap):
            first, second = tracks[k], tracks[k + step // gap]
            both = np.flatnonzero(np.isfinite(first[:, 0]) & np.isfinite(second[:, 0]))
            chosen = generator.permutation(both)[:labels]
            rows = np.concatenate([first[chosen], second[chosen]], axis=1)
            rows = rows + generator.normal(0, noise_px, rows.shape)
            limit = np.array([width - 1, height - 1] * 2)
            rows = np.clip(rows, 0, limit).astype(np.float32)
            found[indices[k], indices[k] + step] = np.array_split(rows, rounds)
    return MadeUpVideo(size=size, steps=steps, indices=indices, tracks=tracks, labels=found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Processor seconds of the two ways over the same starts."""

    starts: int
    made: int  # starts with labels
    labels: float  # median of a start with labels
    distance: float  # median frames from one end to the other, of those
    fast_s: float
    slow_s: float
    differing: int  # starts whose labels are not the same

    @property
    def gain(self) -> float:
        """How many times faster the fast way is."""
        return self.slow_s / self.fast_s


def compare(video: MadeUpVideo, starts: Sequence[Pair], *, progress: bool = False) -> Comparison:
    """Do the same starts in both ways."""
    slow = SlowPropagation(width=video.size[0], steps=video.steps)
    rows = as_rows(video.labels)
    began = time.process_time()
    propagator = Propagator(
        video.labels, steps=video.steps, size=video.size, options=PropagationOptions()
    )
    results = [propagator.run(*pair) for pair in starts]
    fast_s = time.process_time() - began
    slow_s, differing = 0.0, 0
    for pair, result in zip(tqdm(starts, unit="start", disable=not progress), results, strict=True):
        began = time.process_time()
        found = slow.run(rows, *pair)
        slow_s += time.process_time() - began
        if found is None or result.labels is None:
            differing += (found is None) != (result.labels is None)
        else:
            same = found[1:] == result.record.reached and np.array_equal(found[0], result.labels)
            differing += not same
    made = [r.record for r in results if r.labels is not None]
    return Comparison(
        starts=len(starts),
        made=len(made),
        labels=float(np.median([r.count for r in made])) if made else 0.0,
        distance=float(np.median([r.distance for r in made])) if made else 0.0,
        fast_s=fast_s,
        slow_s=slow_s,
        differing=differing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(PropagationBenchmark, args=common.prog(argv), description=__doc__)
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: PropagationBenchmark) -> int:
    video = made_up_video(
        frames=options.frames, labels=options.labels, rounds=options.rounds, seed=options.seed
    )
    starts = find_starts(video.counts(), PropagationOptions())
    if options.starts is not None:
        chosen = np.linspace(0, len(starts) - 1, min(options.starts, len(starts)))
        starts = [starts[k] for k in np.unique(chosen.astype(int))]
    if not starts:
        raise InputError("No start frame: give more frames or labels.")
    sys.stdout.write(
        f"date: {now()}\nmachine: {machine()}\nversions: {versions(['numpy', 'h5py'])}\n"
    )
    result = compare(video, starts, progress=True)
    sys.stdout.write(
        f"{options.frames} frames, {options.labels} labels a pair in {options.rounds} rounds: "
        f"{result.made} of {result.starts} starts propagated, median {result.labels:.0f} labels "
        f"over {result.distance:.0f} frames\n"
        f"processor time: plain Python {result.slow_s:.1f} s, propagation {result.fast_s:.2f} s: "
        f"{result.gain:.0f} times faster; "
        f"{result.starts - result.differing} of {result.starts} starts the same\n"
    )
    if result.differing or result.gain < LEAST_GAIN:
        sys.stdout.write(f"MISSED: the same labels, {LEAST_GAIN:.0f} times faster\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
