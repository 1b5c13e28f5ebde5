"""Recorded ("golden") arrays of a network, and how far ours are from them.

A folder holds ``*.npz`` (inputs and outputs of the reference under made-up weights),
``MODEL.keys.json`` (names and shapes of each checkpoint) and ``tolerances.json`` (measured limits).
A module of this package makes the arrays of a family of files: ``load`` fills its networks,
``produce`` runs them on a file's inputs, in float32 on the processor.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from . import filled

# First word of a file's name -> module of this package. A network joins with a line and a module.
FAMILIES = {
    "dkm": "dkm",
    "roma": "roma",
    "loftr": "loftr",
    "superpoint": "lightglue",
    "lightglue": "lightglue",
    "semseg": "semseg",
    "xfeat": "xfeat",
    "lighterglue": "xfeat",
}
INPUT = re.compile(r"(image|gray|mask|scale|image_size)[01]?|input")
# Rows of some arrays belong to points, whose order float noise may change where scores are nearly
# equal: (array, its points, number of rows that are no random padding).
ROWS_OF = (
    (re.compile(r"(.*_)descriptors(16)?"), r"\1keypoints", r"\1n_detected"),
    (re.compile(r"descriptors([01])"), r"keypoints\1", ""),
    (re.compile(r"(.*_)match_scores"), r"\1match_points", ""),
    (re.compile(r"(sparse|dense)_(descriptors|scores|scales)([01])"), r"\1_keypoints\3", ""),
)
POINTS = re.compile(r"(.*_)?keypoints[01]?")
MOVED = 0.01  # share of the points that may stand elsewhere in the order


class GoldenError(Exception):
    """A file or folder of recorded arrays cannot be used."""


@dataclass(frozen=True)
class Weights:
    """Weights made by the fill recipe, under the names of a checkpoint: ``weights("gim_dkm")``."""

    folder: Path
    seed: str = filled.SEED

    def __call__(self, model: str) -> dict[str, torch.Tensor]:
        path = self.folder / f"{model}.keys.json"
        if not path.is_file():
            raise GoldenError(f"{path} is missing: the names and shapes of the checkpoint.")
        return filled.fill_state_dict(model, path, self.seed)


class Golden:
    """One file of recorded arrays; ``config`` is what it was recorded with."""

    def __init__(self, path: Path) -> None:
        self.name, self.folder = path.stem, path.parent
        try:
            with np.load(path) as arrays:
                self.arrays = {key: arrays[key] for key in arrays.files}
            self.config: dict[str, Any] = json.loads(str(self.arrays.pop("config", "{}")))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise GoldenError(f"{path} cannot be read as recorded arrays ({error}).") from error
        self.seed = str(self.config.get("seed", filled.SEED))

    @property
    def names(self) -> list[str]:
        return sorted({key.partition("@")[0] for key in self.arrays})

    def has(self, name: str) -> bool:
        """Whether an array was recorded, whole or in part."""
        return name in self.arrays or f"{name}@sub" in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """An array that was recorded whole."""
        if name not in self.arrays:
            raise GoldenError(f"{self.name}.npz does not hold the whole of {name}.")
        return self.arrays[name]

    def recorded(self, name: str) -> tuple[np.ndarray, tuple[int, ...], int | None]:
        """Values, shape of the whole array, and n where only every n-th value was recorded."""
        if name in self.arrays:
            return self.arrays[name], self.arrays[name].shape, None
        step, *shape = (int(value) for value in self.arrays[f"{name}@meta"])
        return self.arrays[f"{name}@sub"], tuple(shape), step

    def sibling(self, name: str) -> Golden:
        """Another file of the same folder, for files that share images."""
        return Golden(self.folder / f"{name}.npz")


@dataclass(frozen=True)
class Row:
    """One array's verdict; ``error`` is the largest difference, or the share of unequal entries."""

    array: str
    state: Literal["ok", "FAIL", "input", "info"]
    note: str = ""
    error: float = float("nan")
    limit: float = float("nan")
    largest: float = float("nan")  # recorded value

    def line(self) -> str:
        """One line of the table under ``HEADER``."""
        numbers = " ".join(f"{number(v):>10}" for v in (self.largest, self.error, self.limit))
        return f"{self.array:32} {numbers} {self.state:>5}  {self.note}".rstrip()


HEADER = f"{'array':32} {'largest':>10} {'error':>10} {'limit':>10}"


def number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"


def tolerances(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured limits of a folder: file -> array -> entry; empty if none were measured."""
    path = folder / "tolerances.json"
    content: dict[str, dict[str, dict[str, Any]]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    return content


def family(path: Path) -> str | None:
    """The module that makes the arrays of a file, if there is one."""
    return FAMILIES.get(path.stem.partition("_")[0])


@functools.lru_cache(maxsize=1)  # networks of a gigabyte: one family at a time
def _networks(module: Any, weights: Weights) -> Any:
    return module.load(weights)


def check_file(path: Path, limits: Mapping[str, Mapping[str, Any]] | None = None) -> list[Row]:
    """Run the network of a golden file and compare everything that the file holds."""
    try:
        golden = Golden(path)
        module = importlib.import_module(f"{__package__}.{family(path)}")
        with torch.no_grad():
            networks = _networks(module, Weights(path.parent, golden.seed))
            produced = module.produce(golden, networks)
    except Exception as error:  # whatever a broken network raises is a failure to report
        return [Row("(all)", "FAIL", f"{type(error).__name__}: {error}")]
    return compare(golden, produced, limits)


def compare(
    golden: Golden,
    produced: Mapping[str, Any],
    limits: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """Compare arrays (tensors or ndarrays, whole) with their recordings, one row each.

    Floating arrays fail when a value (``over``: more than that share of them) is further off than
    ``atol``; without an entry, than 1e-4 of the largest. Integers fail when less than ``agree`` are
    equal, index pairs and lists of mode ``set`` when their intersection over union is less. Mode
    ``info`` is not judged. Rows of keypoints are joined by position. A leading axis of 1 may be
    missing or added.
    """
    arrays = {
        name: value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for name, value in produced.items()
        if golden.has(name)
    }
    return [_judge(golden, name, arrays, (limits or {}).get(name, {})) for name in golden.names]


def _judge(
    golden: Golden, name: str, arrays: Mapping[str, np.ndarray], entry: Mapping[str, Any]
) -> Row:
    values, shape, step = golden.recorded(name)
    mine = arrays.get(name)
    points = _points_of(golden, name)
    if entry.get("mode") == "info" and (mine is None or points is None):
        return Row(name, "info", str(entry.get("why", "not judged")))
    if mine is None:
        if INPUT.fullmatch(name):
            return Row(name, "input")
        return Row(name, "FAIL", "not produced")
    wrong_shape = Row(name, "FAIL", f"shape {mine.shape} instead of {shape}")
    agree = float(entry.get("agree", 1.0))
    integers = values.dtype.kind in "iub"
    index_pairs = integers and len(shape) == 2 and shape[1] == 2 and step is None
    if index_pairs and mine.size % 2:
        return wrong_shape
    if entry.get("mode") == "set" or index_pairs:
        return _agreement(name, _overlap(values, mine), agree, "as a set")

    note, known = "", np.ones(shape, dtype=bool)
    if points is not None:
        if points[0] not in arrays:
            return Row(name, "FAIL", f"needs {points[0]}, which was not produced")
        order = _order(golden[points[0]], arrays[points[0]], points[1])
        mine, known = _line_up(mine, shape, order)
        if not known.any():
            return Row(name, "FAIL", f"no row fits a point of {points[0]}")
        note = f"{len(order)} common points"
    if mine.shape != shape and (1, *mine.shape) != shape and mine.shape != (1, *shape):
        return wrong_shape
    if step is not None:
        mine, known = mine.reshape(-1)[::step], known.reshape(-1)[::step]
    mine = mine.reshape(values.shape)
    if integers:
        return _agreement(name, float((mine == values)[known].mean()) if known.any() else 1, agree)
    row = _difference(name, values[known], mine[known], entry, note)
    if row.state == "FAIL" and POINTS.fullmatch(name) and step is None:
        moved = np.mean([a != b for a, b in zip(_rows(values), _rows(mine), strict=True)])
        if moved <= MOVED and _overlap(values, mine) == 1:
            return Row(name, "ok", f"{moved:.2g} of the points elsewhere in the order")
    return row


def _agreement(name: str, share: float, limit: float, note: str = "") -> Row:
    return Row(name, "ok" if share >= limit else "FAIL", note, 1 - share, 1 - limit)


def _difference(
    name: str, values: np.ndarray, mine: np.ndarray, entry: Mapping[str, Any], note: str
) -> Row:
    values, mine = values.astype(np.float64), mine.astype(np.float64)
    if not values.size:
        return Row(name, "ok", note or "empty")
    difference = np.abs(values - mine)
    difference[np.isnan(difference)] = np.inf  # a NaN is never within a limit
    difference[values == mine] = 0.0  # equal infinities
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    limit = float(entry.get("atol", 1e-4 * largest))
    over = float((difference > limit).mean())
    if over:
        note = f"{note} {over:.2g} of the values over the limit".strip()
    state: Any = "ok" if over <= float(entry.get("over", 0.0)) else "FAIL"
    return Row(name, state, note, float(difference.max()), limit, largest)


def _rows(points: np.ndarray) -> list[tuple[float, ...]]:
    """Rows of a list of points, to 1/100 pixel."""
    return [tuple(row) for row in np.round(points.reshape(-1, points.shape[-1]), 2).tolist()]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of rows."""
    theirs, ours = set(_rows(a)), set(_rows(b))
    return len(theirs & ours) / max(1, len(theirs | ours))


def _points_of(golden: Golden, name: str) -> tuple[str, int | None] | None:
    """The list of points whose order an array has, and how many of its rows count."""
    for pattern, points, count in ROWS_OF:
        match = pattern.fullmatch(name)
        if match and golden.has(match.expand(points)):
            counter = match.expand(count)
            rows = int(golden[counter]) if counter and golden.has(counter) else None
            return match.expand(points), rows
    return None


def _order(theirs: np.ndarray, ours: np.ndarray, count: int | None) -> np.ndarray:
    """Rows (K, 2) of the same points in both lists; ``count`` of theirs are looked at."""
    row = {point: index for index, point in enumerate(_rows(ours))}
    pairs = [(i, row[point]) for i, point in enumerate(_rows(theirs)[:count]) if point in row]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _line_up(
    mine: np.ndarray, shape: Sequence[int], order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Our rows in the recorded order and shape, and where they are known."""
    width = tuple(shape[2:] if shape[0] == 1 else shape[1:])
    lined = np.zeros(shape, mine.dtype).reshape(-1, *width)
    known = np.zeros(lined.shape, dtype=bool)
    if mine.shape[mine.ndim - len(width) :] == width:
        rows = mine.reshape(-1, *width)
        order = order[order[:, 1] < len(rows)]
        lined[order[:, 0]], known[order[:, 0]] = rows[order[:, 1]], True
    return lined.reshape(shape), known.reshape(shape)
