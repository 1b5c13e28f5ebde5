"""What a run tells: a table of numbers, TensorBoard, pictures, speed and memory."""

from __future__ import annotations

import csv
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from gim_hloc.training.batch import PairBatch
    from gim_hloc.training.models.base import Match

logger = logging.getLogger(__name__)

TABLE = "metrics.csv"
PICTURES = "pictures"
_BOARD = "tensorboard"
_HEADER = ["step", "name", "value"]

# Errors in pixels, and the colours (RGB) of matches below them; above the last, and unknown.
_COLOURS = ((1.0, (40, 200, 60)), (3.0, (170, 220, 40)), (5.0, (255, 170, 30)))
_WRONG = (230, 40, 40)
_UNKNOWN = (90, 140, 255)


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
        import cv2

        folder = self.folder / PICTURES
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:07d}_{name}.png"
        encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1]
        write_atomic(path, encoded.tobytes())
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


def read_table(folder: Path) -> dict[str, dict[int, float]]:
    """Return what a run logged: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    with open(folder / TABLE, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            if _is_row(row):
                found.setdefault(row[1], {})[int(row[0])] = float(row[2])
    return found


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
    batch: PairBatch,
    index: int,
    match: Match,
    errors: np.ndarray | None,
    *,
    limit: int = 400,
    caption: str = "",
) -> np.ndarray:
    """Draw the matches of one pair, coloured by their error.

    Args:
        batch: with the pair.
        index: of the pair in the batch.
        match: its matches, network pixels.
        errors: (M,) pixels, NaN where the truth is not known; None: nowhere.
        limit: matches drawn at most, evenly over the scores.
        caption: written below.

    Returns:
        (H, W, 3) uint8 RGB: green below 1 px, yellow below 3, orange below 5, red above, blue where
        unknown.
    """
    import cv2

    left, right = (_rgb(image[index]) for image in (batch.image0, batch.image1))
    gap = np.full((left.shape[0], 4, 3), 255, np.uint8)
    canvas = np.ascontiguousarray(np.hstack([left, gap, right]))
    points0, points1, scores = (t.detach().float().cpu().numpy() for t in match)
    known = np.full(len(points0), np.nan) if errors is None else np.asarray(errors, np.float64)
    chosen = np.argsort(-scores, kind="stable")
    if len(chosen) > limit:
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).astype(int)]
    # The worst on top: they are what one looks for.
    chosen = chosen[np.argsort(np.nan_to_num(known[chosen], nan=-1.0), kind="stable")]
    shift = 8  # 1/256 px
    for i in chosen:
        ends = [
            tuple(round(float(v) * 2**shift) for v in (x + offset, y))
            for (x, y), offset in ((points0[i], 0), (points1[i], left.shape[1] + gap.shape[1]))
        ]
        colour = _colour(float(known[i]))
        cv2.line(canvas, ends[0], ends[1], colour, 1, cv2.LINE_AA, shift)
        for end in ends:
            cv2.circle(canvas, end, 2 << shift, colour, -1, cv2.LINE_AA, shift)
    line = caption or f"{batch.dataset[index]}: {' - '.join(batch.names[index])}"
    return _with_caption(canvas, f"{line}   {_share(known)}")


def _rgb(image: torch.Tensor) -> np.ndarray:
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def _colour(error: float) -> tuple[int, int, int]:
    if math.isnan(error):
        return _UNKNOWN
    return next((colour for limit, colour in _COLOURS if error < limit), _WRONG)


def _share(errors: np.ndarray) -> str:
    known = errors[~np.isnan(errors)]
    if not len(known):
        return f"{len(errors)} matches"
    return f"{len(errors)} matches, {float((known < 3).mean()):.0%} of {len(known)} within 3 px"


def _with_caption(canvas: np.ndarray, text: str) -> np.ndarray:
    import cv2

    strip = np.full((18, canvas.shape[1], 3), 255, np.uint8)
    text = text.encode("ascii", "replace").decode()
    scale = min(0.4, 0.4 * canvas.shape[1] / max(1, 7 * len(text)))
    cv2.putText(strip, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([canvas, strip])


def processors() -> int:
    """Return the processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
