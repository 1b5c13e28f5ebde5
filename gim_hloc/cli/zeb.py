"""``gim-zeb data | run | check | table``: matchers on the Zero-shot Evaluation Benchmark."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError

if TYPE_CHECKING:
    from gim_hloc.evaluation.zeb.run import RunReport

logger = logging.getLogger(__name__)

_Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
_Dumps = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DUMPS")]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Verify an unpacked ZEB: sets, numbers of pairs, unreadable files.

    Exit code 1 unless all twelve sets (or those named by --sets) are complete.
    """

    folder: _Folder
    """Folder with zeb/ in it, or zeb/ itself."""
    unpack: tuple[Path, ...] = ()
    """Archives to unpack into DIR first; nothing is written outside of it."""
    sets: tuple[str, ...] = ()
    """Only these sets."""
    decode: bool = True
    """Decode every image once instead of only looking whether it exists."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run matchers over the sets that are there and write the reference's dump files."""

    folder: _Folder
    """Folder with zeb/ in it, or zeb/ itself."""
    out: Path
    """Folder of predictions, evaluations and dumps."""
    matchers: tuple[str, ...]
    """Names of matchers."""
    sets: tuple[str, ...] = ()
    """Only these sets."""
    protocols: tuple[str, ...] = ("gim",)
    """gim (OpenCV's RANSAC at 0.5 px, as the reference) and poselib (needs gim-hloc[zeb])."""
    padded_slip: bool = False
    """Repeat the reference's slip in the coordinates of padded sets."""
    quality: str = "base"
    """Operating point of matchers that the reference does not set."""
    limit: int | None = None
    """Pairs a set, drawn at random."""
    seed: int = 0
    """Of that draw."""
    devices: tuple[str, ...] = ("auto",)
    """One worker a device; the same name twice makes two workers on it."""
    shard: str = "0/1"
    """i/N: the i-th of N parts of every set, from 0."""
    resume: bool = False
    """Go on with what the output folder holds."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check that dumps have the right names and the same pairs: a Good or Bad line for each set."""

    dumps: _Dumps
    """Dump files or folders of them."""
    sets: tuple[str, ...] = ()
    """Only these sets; all twelve by default."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Tables of AUC, failures, precision and matches from dumps."""

    dumps: _Dumps
    """Dump files or folders of them."""
    thresholds: tuple[float, ...] = (5.0, 10.0, 20.0)
    """Degrees of AUC; the first ranks the rows."""
    out: tuple[Path, ...] = ()
    """Files to write: .md, .csv, .xlsx or .html. Without any, Markdown is printed."""
    plots: Path | None = None
    """Folder for bars, radar and cumulative error curves."""
    published: bool = True
    """Show the published rows too."""


_Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Table, tyro.conf.subcommand("table")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    command: Any = tyro.cli(
        _Command,  # type: ignore[arg-type]
        prog="gim-zeb",
        args=common.prog(argv),
        description="Matchers on the Zero-shot Evaluation Benchmark.",
    )
    common.configure_logging()
    actions: dict[type, Callable[[Any], int]] = {
        Data: _data,
        Run: _run,
        Check: _check,
        Table: _table,
    }
    return common.run(lambda: actions[type(command)](command))


def _data(command: Data) -> int:
    from gim_hloc.evaluation.zeb import datasets

    if command.unpack:
        files = datasets.unpack(command.unpack, command.folder)
        sys.stdout.write(f"{len(files)} files unpacked into {command.folder}\n")
    found = datasets.verify(
        command.folder, sets=command.sets or None, decode=command.decode, progress=True
    )
    for entry in found.sets:
        zeb_set = entry.zeb_set
        state = "complete" if entry.complete else "missing" if not entry.present else "differs"
        sys.stdout.write(
            f"{state:<9} {zeb_set.name}: {entry.pairs} of {zeb_set.pairs} pairs, {entry.scenes} of "
            f"{zeb_set.scenes} scenes, {entry.images} images\n"
        )
        for problem in entry.problems:
            sys.stdout.write(f"          {problem}\n")
    return 0 if found.complete else 1


def _run(command: Run) -> int:
    from gim_hloc.evaluation.zeb.protocol import make_protocol
    from gim_hloc.evaluation.zeb.run import RunOptions, run, run_workers

    try:
        part, count = (int(value) for value in command.shard.split("/"))
    except ValueError:
        raise InputError(f"--shard is {command.shard!r}; give i/N, for instance 0/4.") from None
    options = RunOptions(
        matchers=command.matchers,
        sets=command.sets,
        protocols=tuple(
            make_protocol(name, padded_slip=command.padded_slip) for name in command.protocols
        ),
        quality=command.quality,
        limit=command.limit,
        seed=command.seed,
        shard=(part, count),
        resume=command.resume,
        progress=True,
    )
    if len(command.devices) > 1:
        report = run_workers(command.folder, command.out, options, command.devices)
    else:
        options = dataclasses.replace(options, device=(*command.devices, "auto")[0])
        report = run(command.folder, command.out, options)
    _tell(report)
    return report.exit_code


def _tell(report: RunReport) -> None:
    for problem in report.problems:
        logger.warning("%s", problem)
    for result in report.results:
        sys.stdout.write(
            f"{result.matcher} on {result.dataset} ({result.protocol}): {result.evaluated} of "
            f"{result.pairs} pairs, {result.failures} failed"
            + (f", {result.dump}" if result.dump else "")
            + "\n"
        )
    parts = ", ".join(f"{key} {value:.1f} s" for key, value in report.seconds.items())
    sys.stdout.write(
        f"{report.matched} pairs matched, {report.encoded} images encoded; {parts}; "
        f"{report.outside:.0%} outside matchers and RANSAC\n"
    )


def _check(command: Check) -> int:
    from gim_hloc.evaluation.zeb.check import check_dumps, exit_code

    checks = check_dumps(command.dumps, sets=command.sets or None)
    for check in checks:
        sys.stdout.write("\n".join(check.lines()) + "\n")
    return exit_code(checks)


def _table(command: Table) -> int:
    from gim_hloc.evaluation.zeb import plots, table

    options = table.TableOptions(thresholds=command.thresholds, published=command.published)
    made = table.make_table(command.dumps, options)
    for problem in made.problems:
        logger.warning("%s", problem)
    if not command.out:
        sys.stdout.write(table.to_markdown(made) + "\n")
    for path in command.out:
        sys.stdout.write(f"{table.write_table(made, path)}\n")
    if command.plots is not None:
        for path in plots.write_plots(made, command.plots):
            sys.stdout.write(f"{path}\n")
    return 1 if made.problems else 0


if __name__ == "__main__":
    sys.exit(main())
