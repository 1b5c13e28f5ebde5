"""Propagation as it is described, sentence by sentence, in plain Python, and labels to chain.

The fast one is held against it. Nothing is kept between starts and every join is a dict. Shares no
code with `training.video`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Pair = tuple[int, int]
Row = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class SlowPropagation:
    """The algorithm with its constants.

    ``faults`` repeats what the reference does wrong: a segment without labels is passed over, so
    that points of different frames are joined and a chain that begins late carries the frame asked
    for.
    """

    width: int
    steps: tuple[int, ...]
    filter_matches: int = 32
    linked_matches: int = 512
    final_matches: int = 64
    reach: int = 1000
    faults: bool = False

    def starts(self, rounds: Mapping[int, Sequence[Mapping[Pair, int]]]) -> list[Pair]:
        """Frames to start from, for three steps; ``rounds``: step -> number of matches of pairs."""
        s1, s2, s3 = self.steps
        sets3 = [{p for p, n in r.items() if n > self.filter_matches} for r in rounds[s3]]
        i3 = set.intersection(*sets3)
        i2 = set.intersection(*[{p for p, n in r.items() if n} for r in rounds[s2]])
        i1 = set.intersection(*[{p for p, n in r.items() if n} for r in rounds[s1]])
        if not i3:
            return []
        start3, start2, start1 = ({a for a, _ in pairs} for pairs in (i3, i2, i1))
        kept = []
        for a, _ in sorted(i3):
            if a + s3 not in start3 or a not in start2 or a + s2 not in start2:
                continue
            if any(frame not in start1 for frame in (a, a + s1, a + 2 * s1, a + 3 * s1)):
                continue
            b = max(min(a + self.reach * s3, max(j for _, j in i3)), min(start3))
            if b - a >= s3:
                kept.append((a, b))
        return kept

    def link(self, left: Sequence[Row], right: Sequence[Row]) -> list[Row]:
        """Join two labels; empty on failure."""
        by_pixel0: dict[int, int] = {}
        for index, (_, _, x, y) in enumerate(left):
            by_pixel0[round(x) + round(y) * self.width] = index
        by_pixel1: dict[int, int] = {}
        for index, (x, y, _, _) in enumerate(right):
            by_pixel1[round(x) + round(y) * self.width] = index
        joins = set()
        for pixel, index in by_pixel0.items():
            if pixel in by_pixel1:
                joins.add((index, by_pixel1[pixel]))
        if len(joins) < self.linked_matches:
            return []
        return [(*left[i][:2], *right[j][2:]) for i, j in sorted(joins)]  # type: ignore[misc]

    def propagate(
        self, base: Mapping[Pair, Sequence[Row]], a: int, b: int, steps: Sequence[int]
    ) -> tuple[list[Row], int, int] | None:
        """The chain from a towards b: rows and the frames that it reaches."""
        s = steps[-1]
        waypoints = [a]
        while waypoints[-1] + s <= b:
            waypoints.append(waypoints[-1] + s)
        if waypoints[-1] != b:
            waypoints.append(b)
        segments = list(itertools.pairwise(waypoints))
        current: list[Row] = []
        begin, reached = a, a
        while segments:
            p, q = segments.pop(0)
            candidate: list[Row] = []
            if q - p == s:
                candidate += base.get((p, q), [])
            if len(steps) > 1:
                smaller = self.propagate(base, p, q, steps[:-1])
                if smaller is not None and smaller[1:] == (p, q):
                    candidate += smaller[0]
            if not candidate:
                if not self.faults and current:
                    break
                continue
            if not current:
                current, reached = candidate, q
                begin = a if self.faults else p
                continue
            joined = self.link(current, candidate)
            if joined:
                current, reached = joined, q
            else:
                shortened = (p, q - steps[0])
                segments = [shortened] if shortened[1] > shortened[0] else []
        return (current, begin, reached) if current else None

    def chain(
        self, base: Mapping[Pair, Sequence[Row]], a: int, b: int
    ) -> tuple[list[Row], int, int] | None:
        """The chain of a start, before the last fit."""
        s1, s2, s3 = self.steps
        found = self.propagate(base, a, b, [s1, s2, s3])
        if found is not None and found[2] - found[1] == s3:
            found = self.propagate(base, found[1], found[2], [s1, s2])
            if found is not None and found[2] - found[1] == s2:
                found = self.propagate(base, found[1], found[2], [s1])
        return found

    def run(
        self, base: Mapping[Pair, Sequence[Row]], a: int, b: int
    ) -> tuple[np.ndarray, int, int] | None:
        """Labels of a start; None where it fails."""
        found = self.chain(base, a, b)
        if found is None:
            return None
        rows, i, j = np.array(found[0], dtype=np.float32), found[1], found[2]
        if len(rows) < 8:
            return None
        mask = None
        # OpenCV's MAGSAC raises errors on some labels; its older estimator does not.
        for method in (cv2.USAC_MAGSAC, cv2.RANSAC):
            points0, points1 = rows[:, :2].astype(np.float64), rows[:, 2:].astype(np.float64)
            try:
                _, mask = cv2.findFundamentalMat(points0, points1, method, 1.0, 0.999999, 1000)
            except cv2.error:
                continue
            break
        if mask is None:
            return None
        rows = rows[mask.ravel() == 1]
        if len(rows) < self.final_matches or j - i == self.steps[0]:
            return None
        return rows, i, j


def as_rows(labels: Mapping[Pair, Sequence[np.ndarray]]) -> dict[Pair, list[Row]]:
    """Pool the arrays of every pair as plain rows."""
    return {
        pair: [tuple(row) for array in arrays for row in np.asarray(array, np.float32).tolist()]
        for pair, arrays in labels.items()
    }


@dataclass(frozen=True, kw_only=True)
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
    """Labels of a camera that walks sideways past points, turning; a frame is 10 indices."""
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
