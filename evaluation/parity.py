"""Do our networks give the reference's numbers? Compares them with recorded ("golden") arrays.

    python -m gim_hloc.evaluation.parity FOLDER [--files PATTERN ...] [--no-arrays]

A folder holds ``*.npz`` (inputs and outputs of the reference under made-up weights),
``MODEL.keys.json`` (names and shapes of each checkpoint, see ``filled``) and, if limits were
measured, ``tolerances.json``. Each file's network is filled, run on the file's inputs in float32
on the processor, and every array that the file holds is compared. The exit code is 1 when an array
is outside its tolerance or cannot be produced.
"""

from __future__ import annotations

import fnmatch
import gc
import importlib
import json
import logging
import re
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError
from gim_hloc.evaluation import filled

logger = logging.getLogger(__name__)

Produced = Mapping[str, Any]
"""Name of a golden array -> tensor or ndarray, whole."""
State = Literal["ok", "FAIL", "input", "info"]

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
"""First word of a file's name -> family; its producer is ``_parity_FAMILY.produce``."""

_INPUT = re.compile(r"(image|gray|mask|scale|image_size)[01]?|input")
# Lists of points whose order float noise may change where scores are nearly equal, and arrays whose
# rows belong to such points: (pattern of the array, its points, number of rows that are no random
# padding).
_POINTS = re.compile(r"(.*_)?keypoints[01]?")
_ROWS_OF = (
    (re.compile(r"(.*_)descriptors(16)?"), r"\1keypoints", r"\1n_detected"),
    (re.compile(r"descriptors([01])"), r"keypoints\1", ""),
    (re.compile(r"(.*_)match_scores"), r"\1match_points", ""),
    (re.compile(r"(sparse|dense)_(descriptors|scores|scales)([01])"), r"\1_keypoints\3", ""),
)
_MOVED = 0.01  # share of the points that may stand elsewhere in the order


@dataclass(frozen=True)
class Weights:
    """Weights made by the fill recipe for the checkpoints that a folder describes."""

    folder: Path
    seed: str = filled.SEED

    def __call__(self, model: str) -> dict[str, torch.Tensor]:
        """Filled state dict of a network, under the checkpoint's own names.

        Raises:
            InputError: the folder has no ``MODEL.keys.json``.
        """
        path = self.folder / f"{model}.keys.json"
        if not path.is_file():
            raise InputError(f"{path} is missing: the names and shapes of the checkpoint.")
        return filled.fill_state_dict(model, path, self.seed)


class Golden:
    """One file of recorded arrays.

    Attributes:
        name: file name without its ending.
        folder: where it lies.
        config: what the recording was made with.
        seed: of weights and made-up inputs.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.folder = path.stem, path.parent
        try:
            with np.load(path) as arrays:
                self._arrays = {key: arrays[key] for key in arrays.files}
            self.config: dict[str, Any] = json.loads(str(self._arrays.pop("config", "{}")))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as recorded arrays ({error}).") from error

        self.seed = str(self.config.get("seed", filled.SEED))

    @property
    def names(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted({key.partition("@")[0] for key in self._arrays})

    def has(self, name: str) -> bool:
        """Whether an array was recorded, whole or in part."""
        return name in self._arrays or f"{name}@sub" in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """An array that was recorded whole.

        Raises:
            InputError: the file lacks it, or holds a part of its values only.
        """
        if name not in self._arrays:
            held = "a part of" if self.has(name) else "no"
            raise InputError(f"{self.name}.npz holds {held} {name}.")
        return self._arrays[name]

    def recorded(self, name: str) -> tuple[np.ndarray, tuple[int, ...], int | None]:
        """What is known of an array.

        Returns:
            values, the shape of the whole array, and, where only every n-th value (in C order)
            was recorded, n.
        """
        if name in self._arrays:
            return self._arrays[name], self._arrays[name].shape, None
        step, *shape = (int(value) for value in self._arrays[f"{name}@meta"])
        return self._arrays[f"{name}@sub"], tuple(shape), step

    def sibling(self, name: str) -> Golden:
        """Another file of the same folder, for files that share images."""
        return Golden(self.folder / f"{name}.npz")


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far one array is from its recording.

    Errors are NaN where they mean nothing. ``agreement`` is the share of equal entries (of
    integers, and of the rows of lists without an order).
    """

    array: str
    state: State
    largest: float = float("nan")  # recorded value, absolute
    absolute: float = float("nan")  # largest difference
    relative: float = float("nan")  # largest difference, of the value; tiny values count as 1/1000
    limit: float = float("nan")  # of ``absolute``, or the lowest ``agreement``
    agreement: float | None = None
    note: str = ""

    def line(self) -> str:
        """One line of the table."""
        if self.agreement is not None:
            numbers = f"{'':>11} {'agree':>10} {self.agreement:>10.5f} {self.limit:>10.4g}"
        else:
            values = (self.absolute, self.relative, self.limit)
            numbers = f"{_number(self.largest):>11} " + " ".join(
                f"{_number(v):>10}" for v in values
            )
        return f"{self.array:32} {numbers} {self.state:>5}  {self.note}".rstrip()


HEADER = f"{'array':32} {'largest':>11} {'max abs':>10} {'max rel':>10} {'limit':>10} {'':>5}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"


def tolerances(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured limits of a folder's arrays: file -> array -> entry. Empty if none were measured.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "tolerances.json"
    if not path.is_file():
        return {}
    try:
        content: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from error
    return content


def compare(
    golden: Golden, produced: Produced, limits: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """Compare arrays with their recordings, whatever was recorded and not produced included.

    Floating arrays fail when a value (where the entry has ``over``: more than that share of the
    values) is further off than ``atol``; without an entry, than 1e-4 of the largest recorded value.
    Integers and booleans fail when less than ``agree`` of them are equal (lists of index pairs:
    intersection over union). Entries of mode ``set`` are lists of points without an order, those of
    mode ``info`` are not judged. Rows that belong to keypoints are joined with them by position and
    always judged. A leading axis of 1 may be missing or added.

    Args:
        golden: the recordings.
        produced: our arrays, whole.
        limits: entries by array.
    """
    limits = limits or {}
    arrays = {name: _numpy(value) for name, value in produced.items() if golden.has(name)}
    return [_judge(golden, name, arrays, limits.get(name, {})) for name in golden.names]


def _numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _judge(
    golden: Golden, name: str, arrays: Mapping[str, np.ndarray], entry: Mapping[str, Any]
) -> Row:
    values, shape, step = golden.recorded(name)
    mine = arrays.get(name)
    points = _points_of(golden, name)
    if entry.get("mode") == "info" and (mine is None or points is None):
        return Row(array=name, state="info", note=str(entry.get("why", "not judged")))
    if mine is None:
        if _INPUT.fullmatch(name):
            return Row(array=name, state="input")
        return Row(array=name, state="FAIL", note="not produced")
    limit = float(entry.get("agree", 1.0))
    if entry.get("mode") == "set":
        return _agreement(name, _overlap(_rows(values), _rows(mine)), limit, "as a set of points")
    if values.dtype.kind in "iub" and len(shape) == 2 and shape[1] == 2 and step is None:
        if mine.size % 2:
            return _wrong_shape(name, mine.shape, shape)
        return _agreement(name, _overlap(_rows(values), _rows(mine)), limit, "as a set of pairs")
    note, known = "", np.ones(shape, dtype=bool)
    if points is not None:
        if points[0] not in arrays:
            return Row(array=name, state="FAIL", note=f"needs {points[0]}, which was not produced")
        order = _order(golden[points[0]], arrays[points[0]], points[1])
        mine, known = _line_up(mine, shape, order)
        if not known.any():
            return Row(array=name, state="FAIL", note=f"no row fits a point of {points[0]}")
        note = f"{len(order)} common points"
    fitted = _fit(mine, shape)
    if fitted is None:
        return _wrong_shape(name, mine.shape, shape)
    if step is not None:
        fitted, known = fitted.reshape(-1)[::step], known.reshape(-1)[::step]
    values, fitted = values[known], fitted[known]
    if values.dtype.kind in "iub":
        agreement = float((fitted == values).mean()) if values.size else 1.0
        return _agreement(name, agreement, limit)
    row = _difference(name, values, fitted, entry, note)
    if row.state == "FAIL" and _POINTS.fullmatch(name) and step is None:
        theirs, ours = _rows(golden[name]), _rows(mine)
        moved = np.mean([a != b for a, b in zip(theirs, ours, strict=True)])
        if moved <= _MOVED and set(theirs) == set(ours):
            note = f"{moved:.2g} of the points elsewhere in the order"
            return _agreement(name, 1.0, 1.0, note)
    return row


def _agreement(name: str, agreement: float, limit: float, note: str = "") -> Row:
    state: State = "ok" if agreement >= limit else "FAIL"
    return Row(array=name, state=state, agreement=agreement, limit=limit, note=note)


def _wrong_shape(name: str, mine: Sequence[int], shape: Sequence[int]) -> Row:
    note = f"shape {tuple(mine)} instead of {tuple(shape)}"
    return Row(array=name, state="FAIL", note=note)


def _difference(
    name: str, values: np.ndarray, mine: np.ndarray, entry: Mapping[str, Any], note: str = ""
) -> Row:
    values, mine = values.astype(np.float64), mine.astype(np.float64)
    if not values.size:
        return Row(array=name, state="ok", note=note or "empty")
    difference = np.abs(values - mine)
    difference[np.isnan(difference)] = np.inf  # a NaN is never within a limit
    difference[values == mine] = 0.0  # equal infinities
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    limit = float(entry.get("atol", 1e-4 * largest))
    over = float((difference > limit).mean())
    size = np.where(np.isfinite(values), np.abs(values), largest)
    relative = difference / np.maximum(size, 1e-3 * largest + 1e-30)
    if over:
        note = f"{note}{', ' if note else ''}{over:.2g} of the values over the limit"
    return Row(
        array=name,
        state="ok" if over <= float(entry.get("over", 0.0)) else "FAIL",
        largest=largest,
        absolute=float(difference.max()),
        relative=float(relative.max()),
        limit=limit,
        note=note,
    )


def _fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in the recorded shape, a leading axis of 1 added or taken off, or None."""
    for candidate in (array, array[None]):
        if candidate.shape == shape:
            return candidate
    return array[0] if array.shape == (1, *shape) else None


def _rows(points: np.ndarray) -> list[tuple[float, ...]]:
    """Rows of a list of points, to 1/100 pixel."""
    return [tuple(row) for row in np.round(points.reshape(-1, points.shape[-1]), 2).tolist()]


def _overlap(a: Sequence[tuple[float, ...]], b: Sequence[tuple[float, ...]]) -> float:
    """Intersection over union."""
    return len(set(a) & set(b)) / max(1, len(set(a) | set(b)))


def _points_of(golden: Golden, name: str) -> tuple[str, int | None] | None:
    """The list of points whose order an array has, and how many of its rows count."""
    for pattern, points, count in _ROWS_OF:
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
    mine: np.ndarray, shape: tuple[int, ...], order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Our rows in the recorded order, in the recorded shape, and where they are known."""
    width = shape[2:] if shape[:1] == (1,) else shape[1:]
    rows = mine.reshape(-1, *width) if mine.size % max(1, int(np.prod(width))) == 0 else mine[:0]
    lined = np.zeros((int(np.prod(shape)) // max(1, int(np.prod(width))), *width), mine.dtype)
    known = np.zeros(lined.shape, dtype=bool)
    order = order[order[:, 1] < len(rows)]
    if rows.shape[1:] == lined.shape[1:]:
        lined[order[:, 0]], known[order[:, 0]] = rows[order[:, 1]], True
    return lined.reshape(shape), known.reshape(shape)


def family_of(name: str) -> str:
    """Family of a golden file.

    Raises:
        InputError: the name begins with none that is known.
    """
    family = FAMILIES.get(name.partition("_")[0])
    if family is None:
        known = ", ".join(f"{word}_" for word in FAMILIES)
        raise InputError(f"{name}.npz belongs to no known family; names begin with {known}.")
    return family


def check_file(path: Path, limits: Mapping[str, Mapping[str, Any]] | None = None) -> list[Row]:
    """Run the network of one golden file and compare everything that it holds.

    Args:
        path: the file.
        limits: entries of ``tolerances`` for this file.

    Returns:
        One row an array; a producer that fails gives a single failed row that says why.
    """
    try:
        golden = Golden(path)
        module = importlib.import_module(f"gim_hloc.evaluation._parity_{family_of(golden.name)}")
        with torch.no_grad():
            produced = module.produce(golden, Weights(path.parent, golden.seed))
    except GimError as error:
        return [Row(array="(all)", state="FAIL", note=str(error))]
    except Exception as error:  # whatever a broken network raises is a failure to report
        logger.debug("%s", path.stem, exc_info=True)
        return [Row(array="(all)", state="FAIL", note=f"{type(error).__name__}: {error}")]
    return compare(golden, produced, limits)


def release(family: str) -> None:
    """Forget what a family's producer keeps between files (networks of a gigabyte)."""
    module = sys.modules.get(f"gim_hloc.evaluation._parity_{family}")
    for value in list(vars(module).values()) if module else ():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()


def golden_files(folder: Path, patterns: Sequence[str] = ("*",)) -> list[Path]:
    """The folder's golden files whose names (without ending) match a pattern, sorted.

    Raises:
        InputError: no such folder, nothing in it, or nothing that matches.
    """
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist.")
    everything = sorted(folder.glob("*.npz"))
    if not everything:
        raise InputError(f"{folder} holds no golden files (*.npz).")
    chosen = [
        path
        for path in everything
        if any(fnmatch.fnmatch(path.stem, pattern.removesuffix(".npz")) for pattern in patterns)
    ]
    if not chosen:
        raise InputError(f"No golden file of {folder} matches {' or '.join(patterns)}.")
    return chosen


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Compare our networks with the reference's recorded numbers, array by array."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Golden files (*.npz), MODEL.keys.json and tolerances.json."""
    files: tuple[str, ...] = field(default=("*",))
    """Only these files: names or patterns such as "loftr_*"."""
    arrays: bool = True
    """One line an array; otherwise only failures and one line a file."""
    verbose: bool = False
    """Tell what a network that failed was doing."""


def run(options: ParityOptions) -> int:
    """Check a folder and print the tables; 1 if anything failed."""
    paths = golden_files(options.folder, options.files)
    if not any(options.folder.glob("*.keys.json")):
        raise InputError(
            f"{options.folder} holds no MODEL.keys.json, so no network can be filled: golden "
            "files and the layouts of their checkpoints belong together."
        )
    limits = tolerances(options.folder)
    if not limits:
        logger.warning(
            "%s has no tolerances.json: 1e-4 of each array's largest value counts.", options.folder
        )
    bad: list[str] = []
    for number, path in enumerate(paths, 1):
        logger.info("%d/%d %s ...", number, len(paths), path.stem)
        start = time.perf_counter()
        rows = check_file(path, limits.get(path.stem))
        failed = [row for row in rows if row.state == "FAIL"]
        shown = rows if options.arrays else failed
        if shown:
            sys.stdout.write("\n".join(["", path.stem, HEADER, *(row.line() for row in shown), ""]))
        judged = sum(row.state in ("ok", "FAIL") for row in rows)
        verdict = f"{len(failed)} FAILED" if failed else "all within their limits"
        seconds = time.perf_counter() - start
        sys.stdout.write(f"{path.stem}: {judged} arrays judged, {verdict} ({seconds:.1f} s)\n")
        sys.stdout.flush()
        if failed:
            bad.append(path.stem)
        word = path.stem.partition("_")[0]
        if number == len(paths) or paths[number].stem.partition("_")[0] != word:
            release(FAMILIES.get(word, ""))
    total = f"{len(paths)} file{'s' if len(paths) > 1 else ''}"
    sys.stdout.write(f"\n{total}: " + (f"failed in {', '.join(bad)}\n" if bad else "all agree\n"))
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = tyro.cli(
        ParityOptions,
        prog="python -m gim_hloc.evaluation.parity",
        args=common.prog(argv),
    )
    common.configure_logging(options.verbose)
    return common.run(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
