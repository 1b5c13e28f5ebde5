"""Dump files: the per-pair results of one matcher on one set, in the reference's name and format.

A dump is a text file with a header line and one line per pair, sorted by identifier, ten columns
separated by one blank, numbers as Python's ``repr`` writes them, so that both these tools and the
reference's read it. A pair without an estimated pose is a line like any other, its errors ``inf``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import write_atomic

Unit = Literal["deg", "px"]

HEADER = "identifiers covisible0 covisible1 R_errs t_errs t_errs2 Bef.Prec Bef.Num Aft.Prec Aft.Num"
# Of homographies, whose errors are no angles: this and the reference's tools refuse to mix them.
HEADERS: dict[Unit, str] = {
    "deg": HEADER,
    "px": HEADER.replace("R_errs t_errs t_errs2", "corner_px corner_px corner_px"),
}
_COLUMNS = len(HEADER.split())
# First token of every name: results of a test, not of training.
_MARK = "[T]"
_SAMPLE = re.compile(r"-limit\d+-seed\d+$")


@dataclass(frozen=True, kw_only=True)
class DumpRecord:
    """The result of one pair."""

    identifier: str  # scene#name0#name1, without blanks
    covisible0: float  # overlap from the label, share of image 0
    covisible1: float  # the same of image 1
    rotation_error: float = math.inf  # degrees; inf without a pose
    translation_error: float = math.inf  # degrees, folded to [0, 90]; inf without a pose
    translation_distance: float = math.inf  # after rescaling to the true length, data units
    precision_before: float = 0.0  # share of correct matches among all
    correct_before: int = 0  # number of correct matches
    precision_after: float = 0.0  # share of correct matches among RANSAC's inliers
    correct_after: int = 0  # number of correct matches among them

    @classmethod
    def judged(
        cls,
        identifier: str,
        covisible: tuple[float, float],
        errors: tuple[float, float, float],
        correct: np.ndarray,
        inliers: np.ndarray,
    ) -> DumpRecord:
        """The record of a pair of which correct matches (M,) and inliers (M,), bool, are known."""
        before, after, kept = int(correct.sum()), int((correct & inliers).sum()), int(inliers.sum())
        return cls(
            identifier=identifier,
            covisible0=covisible[0],
            covisible1=covisible[1],
            rotation_error=errors[0],
            translation_error=errors[1],
            translation_distance=errors[2],
            precision_before=before / len(correct) if len(correct) else 0.0,
            correct_before=before,
            precision_after=after / kept if kept else 0.0,
            correct_after=after,
        )

    @property
    def failed(self) -> bool:
        """Whether no pose was estimated: an error is infinite or not a number."""
        return not (math.isfinite(self.rotation_error) and math.isfinite(self.translation_error))

    @property
    def pose_error(self) -> float:
        """Larger of the two angles in degrees, 180 for a failure: what AUC judges."""
        return 180.0 if self.failed else max(self.rotation_error, self.translation_error)

    @property
    def scene(self) -> str:
        """What stands before the first ``#`` of the identifier."""
        return self.identifier.split("#", 1)[0]


@dataclass(frozen=True, kw_only=True)
class Dump:
    """One dump file.

    Attributes:
        matcher: second token of the file's name, e.g. ``gim_dkm``.
        dataset: third token, e.g. ``GTA-SfM``.
        version: last token without ``.txt``, e.g. ``100h``.
        records: the lines in the file's order, duplicates included.
        unit: of the errors: degrees of poses, or pixels of homographies' corners in all three
            columns of errors.
        path: the file, None for a dump that was never read.
    """

    matcher: str
    dataset: str
    version: str
    records: tuple[DumpRecord, ...]
    unit: Unit = "deg"
    path: Path | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sample(self) -> bool:
        """Whether the version says that these are some pairs of a set, drawn by ``--limit``."""
        return _SAMPLE.search(self.version) is not None

    @cached_property
    def unique(self) -> tuple[DumpRecord, ...]:
        """The records with the first occurrence of each identifier, as the analysis takes them."""
        first: dict[str, DumpRecord] = {}
        for record in self.records:
            first.setdefault(record.identifier, record)
        return tuple(first.values())

    @cached_property
    def identifiers(self) -> tuple[str, ...]:
        """First column in the file's order, duplicates included."""
        return tuple(record.identifier for record in self.records)

    @cached_property
    def pose_errors(self) -> np.ndarray:
        """(N,) pose errors in degrees of ``unique``, 180 for failures."""
        return np.array([record.pose_error for record in self.unique], dtype=np.float64)

    @property
    def failures(self) -> int:
        """Number of pairs of ``unique`` without a pose."""
        return sum(record.failed for record in self.unique)


def dump_name(matcher: str, dataset: str, version: str) -> str:
    """The file name of a dump.

    Args:
        matcher: name of the matcher (the reference: of its weights).
        dataset: name of the set as dumps write it (``Multi-FoV``, not ``MultiFoV``).
        version: of weights or options, e.g. ``100h``.

    Raises:
        InputError: a part is empty or holds a blank or a slash: tools could not read it back.
    """
    for part in (matcher, dataset, version):
        if not part or "/" in part or any(character.isspace() for character in part):
            raise InputError(
                f"{part!r} cannot stand in the name of a dump: it must have a character at least "
                "and no blanks or slashes."
            )
    return f"{_MARK} {matcher} {dataset:>15} {version}.txt"


def parse_dump_name(name: str) -> tuple[str, str, str] | None:
    """Return (matcher, dataset, version) of a dump's file name, None for another file's."""
    if not name.endswith(".txt"):
        return None
    parts = name.removesuffix(".txt").split()
    if len(parts) != 4 or parts[0] != _MARK:
        return None
    return parts[1], parts[2], parts[3]


def write_line(record: DumpRecord) -> str:
    """The line of one pair, without a line end.

    Raises:
        InputError: the identifier has blanks and could not be read back.
    """
    if not record.identifier or any(character.isspace() for character in record.identifier):
        raise InputError(f"The identifier {record.identifier!r} holds a blank or is empty.")
    # float() and int(): NumPy's scalars would write their type's name.
    numbers = (
        repr(float(record.covisible0)),
        repr(float(record.covisible1)),
        repr(float(record.rotation_error)),
        repr(float(record.translation_error)),
        repr(float(record.translation_distance)),
        repr(float(record.precision_before)),
        repr(int(record.correct_before)),
        repr(float(record.precision_after)),
        repr(int(record.correct_after)),
    )
    return " ".join((record.identifier, *numbers))


def parse_line(line: str) -> DumpRecord:
    """Read the line of one pair.

    Raises:
        ValueError: not ten columns, or a column that should be a number is none.
    """
    parts = line.split()
    if len(parts) != _COLUMNS:
        raise ValueError(f"{len(parts)} columns instead of {_COLUMNS}")
    values = [float(part) for part in parts[1:]]
    counts = (values[6], values[8])
    if not all(math.isfinite(count) and count >= 0 and count == int(count) for count in counts):
        raise ValueError(f"{parts[7]} or {parts[9]} is not a number of matches")
    return DumpRecord(
        identifier=parts[0],
        covisible0=values[0],
        covisible1=values[1],
        rotation_error=values[2],
        translation_error=values[3],
        translation_distance=values[4],
        precision_before=values[5],
        correct_before=int(counts[0]),
        precision_after=values[7],
        correct_after=int(counts[1]),
    )


def read_dump(path: str | os.PathLike[str]) -> Dump:
    """Read a dump.

    Raises:
        InputError: the file cannot be read, is no dump by its name or header, or has a line that is
            not one of a dump; the message names file and line.
    """
    path = Path(path)
    named = parse_dump_name(path.name)
    if named is None:
        raise InputError(
            f"{path} is not named like a dump ('{_MARK} <matcher> <set> <version>.txt')."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a dump: it is no text in UTF-8.") from error
    lines = text.splitlines()
    first = lines[0].split() if lines else []
    unit = next((unit for unit, header in HEADERS.items() if first == header.split()), None)
    if unit is None:
        raise InputError(f"{path} is not a dump: its first line is not '{HEADER}'.")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            records.append(parse_line(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}.") from error
    matcher, dataset, version = named
    return Dump(
        matcher=matcher,
        dataset=dataset,
        version=version,
        records=tuple(records),
        unit=unit,
        path=path,
    )


def read_pose_dump(path: str | os.PathLike[str]) -> Dump:
    """Read a dump whose errors are angles.

    Raises:
        InputError: as `read_dump`, or the dump is of homographies.
    """
    dump = read_dump(path)
    if dump.unit != "deg":
        raise InputError(
            f"{path} holds corner errors of homographies in pixels, no angles: their figures are "
            "in the results.md that gim-zeb pairs wrote."
        )
    return dump


def write_dump(folder: str | os.PathLike[str], dump: Dump) -> Path:
    """Write a dump under its name, complete or not at all.

    Lines are sorted by identifier; of repeated identifiers the last record is kept, as the
    reference does.

    Args:
        folder: made if it does not exist.
        dump: what to write; its ``path`` is not used.

    Returns:
        The file.

    Raises:
        InputError: a name or an identifier that could not be read back.
    """
    folder = Path(folder)
    path = folder / dump_name(dump.matcher, dump.dataset, dump.version)
    content = format_dump(dump.records, dump.unit)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


def format_dump(records: Iterable[DumpRecord], unit: Unit = "deg") -> str:
    """The text of a dump file: header and sorted lines, the last of equal identifiers."""
    last = {record.identifier: record for record in records}
    lines = [write_line(last[identifier]) for identifier in sorted(last)]
    return "\n".join([HEADERS[unit], *lines]) + "\n"
