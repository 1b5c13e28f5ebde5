"""What a run tells: a table of numbers, TensorBoard, pictures, speed and memory."""

from __future__ import annotations

import csv
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gim_hloc import draw
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from gim_hloc.training.batch import PairBatch
    from gim_hloc.training.models.base import Match

logger = logging.getLogger(__name__)

TABLE = "metrics.csv"
PICTURES = "pictures"
_BOARD = "tensorboard"
_HEADER = ["step", "name", "value"]


class Logs:
    """Numbers and pictures of a run, in its folder.

    ``metrics.csv`` (step, name, value) is always written; TensorBoard's files where it is installed
    and wanted. A run that goes on first takes back what was logged after the step it goes on from.

    Args:
        folder: of the run.
        step: optimiser steps taken so far.
        tensorboard: write TensorBoard's files, too.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = True) -> None:
        self.folder = folder
        self._path = folder / TABLE
        self._take_back(step)
        self._board = self._open_board(step) if tensorboard else None

    def _take_back(self, step: int) -> None:
        rows = [_HEADER]
        if self._path.exists():
            with open(self._path, newline="", encoding="utf-8") as file:
                # A line that a killed process left unfinished has no number in it.
                rows += [r for r in csv.reader(file) if _is_row(r) and int(r[0]) <= step]
        write_atomic(self._path, "".join(",".join(row) + "\n" for row in rows))

    def _open_board(self, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info(
                "TensorBoard is not installed (pip install tensorboard): numbers go to %s only.",
                self._path,
            )
            return None
        return SummaryWriter(str(self.folder / _BOARD), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [step, name, f"{value:.9g}"] for name, value in values.items()
            )
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> Path:
        """Store a picture (H, W, 3) uint8 RGB as PNG and in TensorBoard; returns the PNG."""
        folder = self.folder / PICTURES
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:07d}_{name}.png"
        write_atomic(path, draw.encode(picture, ".png"))
        if self._board is not None:
            self._board.add_image(f"pictures/{name}", picture, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Write what is still in memory."""
        if self._board is not None:
            self._board.close()


def _is_row(row: Sequence[str]) -> bool:
    if len(row) != len(_HEADER) or not row[0].isdigit():
        return False
    try:
        float(row[2])
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------- running numbers


class Means:
    """Sums of losses that stay on their device until someone asks: no step waits for the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the scalars of one micro-batch."""
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                continue
            value = value.detach().reshape(()).float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, tuple[float, int]]:
        """Return (sum, count) of every name and start over; reads the device once."""
        if not self._sums:
            return {}
        # A model may count some things on the processor.
        device = next(iter(self._sums.values())).device
        sums = torch.stack([value.to(device) for value in self._sums.values()]).tolist()
        found = {
            name: (total, self._counts[name]) for name, total in zip(self._sums, sums, strict=True)
        }
        self._sums, self._counts = {}, {}
        return found


def merge_means(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Return the means over the processes of what `Means.take` gave each."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for part in parts:
        for name, (total, count) in part.items():
            sums[name] = sums.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + count
    return {name: sums[name] / counts[name] for name in sums}


class Clock:
    """Pairs a second and the share of time that was spent waiting for data."""

    def __init__(self) -> None:
        self.total = 0.0
        self.waited = 0.0
        self.pairs = 0
        self._since = time.perf_counter()
        self._marks = (0.0, 0)

    def wait(self, seconds: float) -> None:
        """Count a wait for the next batch."""
        self.waited += seconds

    def lap(self) -> tuple[float, float]:
        """Return (pairs a second, share of waiting) since the last lap."""
        elapsed = time.perf_counter() - self._since
        waited, pairs = self.waited - self._marks[0], self.pairs - self._marks[1]
        self.total += elapsed
        self._since = time.perf_counter()
        self._marks = (self.waited, self.pairs)
        return (pairs / elapsed, waited / elapsed) if elapsed > 0 else (0.0, 0.0)

    def pause(self) -> None:
        """Start the next lap now: what happened since the last one was no training."""
        now = time.perf_counter()
        self._since = now
        self._marks = (self.waited, self.pairs)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: of the GPU, or of the process on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ----------------------------------------------------------------------------------------- pictures


def draw_matches(
    batch: PairBatch, index: int, match: Match, errors: np.ndarray | None, *, limit: int = 400
) -> np.ndarray:
    """Draw the matches of one pair: green below 1 px of error, red from 5 px on, grey if unknown.

    Args:
        batch: with the pair.
        index: of the pair in the batch.
        match: its matches, network pixels.
        errors: (M,) pixels, NaN where the truth is not known; None: nowhere.
        limit: matches drawn at most, evenly over the scores.
    """
    points0, points1, scores = (t.detach().float().cpu().numpy() for t in match)
    known = np.full(len(points0), np.nan) if errors is None else np.asarray(errors, np.float64)
    rows = np.linspace(0, len(scores) - 1, min(limit, len(scores))).astype(int)
    chosen = np.argsort(-scores, kind="stable")[rows]
    # The worst on top: they are what one looks for.
    chosen = chosen[np.argsort(np.nan_to_num(known[chosen], nan=-1.0), kind="stable")]
    picture = draw.draw_matches(
        [draw.from_tensor(image[index]) for image in (batch.image0, batch.image1)],
        [points0[chosen], points1[chosen]],
        draw.error_colours(known[chosen], 1.0, 5.0),
        lines=len(chosen),
        radius=2,
        opacity=1.0,
    )
    judged = known[~np.isnan(known)]
    counts = f"{len(known)} matches"
    if len(judged):
        counts += f", {float((judged < 3).mean()):.0%} of {len(judged)} within 3 px"
    pair = f"{batch.dataset[index]}: {' - '.join(batch.names[index])}"
    return draw.caption(picture, [pair, counts])


def processors() -> int:
    """Return the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
