"""``gim-weights list | download | path | verify``: the trained weights of the matchers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gim_hloc import weights
from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError, WeightsError
from gim_hloc.weights import WeightFile

if TYPE_CHECKING:
    from gim_hloc.weight_checks import Verdict

_Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the known weight files, their licences, and where each one is."""

    names: _Names = ()
    """Only these files, or the files of these matchers."""
    json: bool = False
    """Print JSON, with all addresses."""


@dataclass(frozen=True, kw_only=True)
class Download(common.Licences):
    """Fetch weight files that no folder has yet. A download that was broken off continues."""

    names: _Names
    """File names, or names of matchers for all of their files."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Locate:
    """Show the folders that are searched, in this order, or where files are."""

    names: _Names = ()
    """File names, or names of matchers for all of their files."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check weight files: by their hash where one is published, else names and shapes.

    Nothing in a file is executed. Exit code 1 when a file is not what it should be.
    """

    names: _Names
    """Paths of files, file names, or names of matchers."""
    json: bool = False
    """Print JSON."""


_Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Download, tyro.conf.subcommand("download")]
    | Annotated[Locate, tyro.conf.subcommand("path")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    command: Any = common.parse(
        _Command,
        prog="gim-weights",
        args=common.prog(argv),
        description="The trained weights of the matchers.",
    )
    common.configure_logging()
    actions: dict[type, Callable[[Any], int]] = {
        List: _list,
        Download: _download,
        Locate: _path,
        Verify: _verify,
    }
    return common.run(lambda: actions[type(command)](command))


def _files(names: Sequence[str]) -> list[WeightFile]:
    """The files of names, which may be files, aliases or matchers; each once.

    Raises:
        WeightsError: nothing of that name is known.
    """
    if not names:
        raise InputError("Give names of weight files or matchers; gim-weights list shows them.")
    found: dict[str, WeightFile] = {}
    for name in names:
        file = weights.find(name)
        of_matcher = [known for known in weights.known() if name in known.used_by]
        if file is None and not of_matcher:
            users = sorted({user for known in weights.known() for user in known.used_by})
            raise WeightsError(
                f"No weight file and no matcher with weights is named {name!r}. "
                f"Files: gim-weights list. Matchers: {', '.join(users)}."
            )
        for one in [file] if file is not None else of_matcher:
            found[one.name] = one
    return list(found.values())


def _where(file: WeightFile) -> Path | None:
    try:
        return weights.locate(file.name, download=False)
    except WeightsError:
        return None


def _list(command: List) -> int:
    files = _files(command.names) if command.names else weights.known()
    places = {file.name: _where(file) for file in files}
    if command.json:
        rows = [
            dataclasses.asdict(file)
            | {"path": str(places[file.name]) if places[file.name] else None}
            for file in files
        ]
        _print_json(rows)
        return 0
    table = [["file", "used by", "MB", "licence", "commercial", "where"]]
    for file in files:
        bytes_ = file.size or file.about
        exact = "" if file.size else "~"
        table.append(
            [
                file.name,
                ", ".join(file.used_by),
                f"{exact}{bytes_ / 1e6:.1f}" if bytes_ else "?",
                file.licence,
                "yes" if file.commercial else "no",
                str(places[file.name] or "missing"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    return 0


def _download(command: Download) -> int:
    failed: list[str] = []
    rows = []
    for file in _files(command.names):
        row: dict[str, Any] = {"name": file.name, "path": None, "error": None}
        rows.append(row)
        try:
            path = _where(file)
            row["present"] = path is not None
            if path is None:
                if not file.commercial:
                    sys.stderr.write(f"{file.name}: licence {file.licence}\n")
                path = weights.locate(file.name)
            row["path"] = str(path)
        except GimError as error:
            row["error"] = str(error)
            failed.append(str(error))
        if not command.json and row["path"]:
            was = "already there" if row["present"] else "downloaded"
            sys.stdout.write(f"{file.name}: {was}, {row['path']}\n")
    if command.json:
        _print_json(rows)
    if failed:
        raise WeightsError("\n\n".join(failed))
    return 0


def _path(command: Locate) -> int:
    if not command.names:
        folders = weights.search_folders()
        if command.json:
            _print_json([str(folder) for folder in folders])
        else:
            sys.stdout.write("".join(f"{folder}\n" for folder in folders))
        return 0
    paths = {file.name: weights.locate(file.name, download=False) for file in _files(command.names)}
    if command.json:
        _print_json({name: str(path) for name, path in paths.items()})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in paths.values()))
    return 0


def _verify(command: Verify) -> int:
    from gim_hloc import weight_checks

    if not command.names:
        raise InputError("Give paths or names of weight files; gim-weights list shows names.")
    verdicts: list[Verdict] = []
    for name in command.names:
        if Path(name).is_file():
            verdicts.append(weight_checks.verify(Path(name)))
            continue
        for file in _files([name]):
            path = weights.locate(file.name, download=False)
            verdicts.append(weight_checks.verify(path, file))
    if command.json:
        _print_json([dataclasses.asdict(v) | {"path": str(v.path)} for v in verdicts])
    else:
        words = {True: "good", False: "BAD", None: "unknown"}
        for verdict in verdicts:
            sys.stdout.write(f"{words[verdict.good]}: {verdict.path}: {verdict.detail}\n")
    return 1 if any(verdict.good is False for verdict in verdicts) else 0


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
