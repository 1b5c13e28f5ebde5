"""Check that the dumps of one set hold the same pairs in the same order, and all of ZEB's.

Results on different pairs cannot be compared. The reference asks for four sets by names that
its own dumps do not have, so it never checks them and calls them good; here a set without a dump is
bad, and so is a dump that repeats a pair or has another number of them than ZEB's set, unless its
version says that it is a sample (``--limit``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import Dump, read_dump
from gim_hloc.evaluation.zeb.sets import NAMES, SETS, set_folder


@dataclass(frozen=True, kw_only=True)
class SetCheck:
    """What the dumps of one set are found to be."""

    name: str  # of the set, as in file names
    files: tuple[Path, ...]  # its dumps, sorted by name; the first is the one compared with
    pairs: int  # of the first readable dump
    problems: tuple[str, ...]  # one line for each deviating, short or unreadable file

    @property
    def good(self) -> bool:
        """Whether there is a dump and all of them agree."""
        return not self.problems

    def lines(self) -> list[str]:
        """The line that starts with Good or Bad, and one for each deviating file."""
        verdict = "Good" if self.good else "Bad "
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return [
            f"{verdict} {self.name}: {files}, {self.pairs} pairs",
            *(f"     {problem}" for problem in self.problems),
        ]


def check_dumps(
    paths: Iterable[str | os.PathLike[str]], *, sets: Sequence[str] | None = None
) -> list[SetCheck]:
    """Compare the pairs of all dumps of each set.

    Args:
        paths: dumps, or folders of them (`find_dumps`).
        sets: names of sets; by default ZEB's twelve and any other set found, or only the others
            where no dump is of one of the twelve.

    Raises:
        InputError: a path does not exist.
    """
    found: dict[str, list[Path]] = {}
    for path in find_dumps(paths):
        # Not parse_dump_name: a file with a wrong name is to be reported, under its set if it
        # tells one.
        parts = path.name.removesuffix(".txt").split()
        found.setdefault(parts[2] if len(parts) > 2 else path.name, []).append(path)
    if sets is None:
        sets = [*(NAMES if set(found) & set(NAMES) else ()), *sorted(set(found) - set(NAMES))]
    else:
        by_folder = {entry.folder: entry.dump_name for entry in SETS}
        sets = [by_folder.get(set_folder(name), name) for name in sets]
    return [_check_set(name, found.get(name, [])) for name in sets]


def find_dumps(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The dumps among files and folders, each once, sorted by name within a folder.

    A file given by name is taken as it is. Of a folder, files ``*.txt`` whose name holds ``]`` are
    taken, not those of its subfolders. A file named twice, however it is spelt, is one.

    Raises:
        InputError: a path does not exist, or a folder holds no dump.
    """
    found: dict[Path, Path] = {}  # where it really is -> as it was named
    for path in map(Path, paths):
        if path.is_dir():
            dumps = sorted(file for file in path.glob("[!.]*.txt") if "]" in file.name)
            if not dumps:
                raise InputError(f"{path} holds no dump: no file named like '[T] … .txt'.")
            for dump in dumps:
                found.setdefault(dump.resolve(), dump)
        elif path.exists():
            found.setdefault(path.resolve(), path)
        else:
            raise InputError(f"{path} does not exist: give dump files or folders of them.")
    return list(found.values())


def exit_code(checks: Iterable[SetCheck]) -> int:
    """0 where all sets are good, else 1."""
    return 0 if all(check.good for check in checks) else 1


def _check_set(name: str, files: list[Path]) -> SetCheck:
    if not files:
        return SetCheck(name=name, files=(), pairs=0, problems=("no dump of this set",))
    expected: tuple[str, ...] | None = None
    first, unit = "", ""
    problems = []
    for path in files:
        try:
            dump = read_dump(path)
        except InputError as error:
            problems.append(str(error))
            continue
        identifiers = dump.identifiers
        if expected is None:
            expected, first, unit = identifiers, path.name, dump.unit
        elif dump.unit != unit:
            problems.append(f"{path.name}: errors in {dump.unit} against {unit} ({first})")
        elif identifiers != expected:
            problems.append(f"{path.name}: {_deviation(identifiers, expected)} ({first})")
        if doubt := _doubt(dump):
            problems.append(f"{path.name}: {doubt}")
    return SetCheck(
        name=name, files=tuple(files), pairs=len(expected or ()), problems=tuple(problems)
    )


def _doubt(dump: Dump) -> str:
    """Say in words why a dump is not one of a whole set; empty if nothing speaks against it."""
    if repeated := len(dump) - len(dump.unique):
        return f"{repeated} lines repeat a pair"
    whole = next((entry.pairs for entry in SETS if entry.dump_name == dump.dataset), None)
    if whole is None or dump.sample or len(dump) == whole:
        return ""
    return f"{len(dump)} pairs, ZEB's {dump.dataset} has {whole}: cut off, or not ZEB's set"


def _deviation(identifiers: tuple[str, ...], expected: tuple[str, ...]) -> str:
    """Say in words where two different lists of identifiers part."""
    both = zip_longest(identifiers, expected)
    place = next(index for index, (here, there) in enumerate(both) if here != there)
    parts = [f"{len(identifiers)} pairs against {len(expected)}"]
    if missing := len(set(expected) - set(identifiers)):
        parts.append(f"{missing} missing")
    if foreign := len(set(identifiers) - set(expected)):
        parts.append(f"{foreign} not in the other")
    here, there = (
        repr(names[place]) if place < len(names) else "the end" for names in (identifiers, expected)
    )
    # The header is line 1.
    parts.append(f"line {place + 2} is {here} instead of {there}")
    return ", ".join(parts)
