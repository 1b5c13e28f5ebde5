"""``gim-zeb``: matchers on the Zero-shot Evaluation Benchmark and on other lists of pairs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gim_hloc.cli import common
from gim_hloc.evaluation.options import (
    MakeOptions,
    PairOptions,
    PictureOptions,
    RunOptions,
    TableOptions,
)

if TYPE_CHECKING:
    from gim_hloc.evaluation.run import RunReport

logger = logging.getLogger(__name__)

_Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
_Dumps = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DUMPS")]
_Flags = tyro.conf.OmitArgPrefixes


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
class Run(common.Licences):
    """Run matchers over the sets that are there and write the reference's dump files.

    The same command goes on with what OUT holds. Exit code 1: pairs that could not be used count as
    failed; 3: another run works in OUT.
    """

    folder: _Folder
    """Folder with zeb/ in it, or zeb/ itself."""
    out: Path
    """Folder of matches and dumps."""
    evaluation: Annotated[RunOptions, _Flags]


@dataclass(frozen=True, kw_only=True)
class Make:
    """Make a set in ZEB's format from a COLMAP model with poses.

    Pairs are drawn by overlap. Exit code 1 where images could not be used; the rest is made.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """COLMAP model, text or binary, or the output of gim-reconstruct; it may have no points."""
    images: Annotated[Path, tyro.conf.Positional]
    """Folder of the images."""
    out: Annotated[Path, tyro.conf.Positional]
    """The set becomes OUT/zeb/<set>."""
    pairs: Annotated[MakeOptions, _Flags]


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
    out: tuple[Path, ...] = ()
    """Files to write: .md, .csv, .xlsx or .html. Without any, Markdown is printed."""
    plots: Path | None = None
    """Folder for bars and cumulative error curves."""
    table: Annotated[TableOptions, _Flags] = field(default_factory=TableOptions)


@dataclass(frozen=True, kw_only=True)
class Pairs(common.Licences):
    """Run and judge matchers on a list of pairs: poses, homographies, or nothing known.

    Formats: SuperGlue's text files, LoFTR's scene files of MegaDepth and list of ScanNet,
    homographies (HPatches, Oxford), pairs without ground truth. Exit code 1: a part of the list
    could not be used; 2: nothing could; 3: another run works in OUT.
    """

    list: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIST")]
    """File or folder of one of the formats."""
    out: Path
    """Folder of matches, dumps and results; several lists may share it."""
    evaluation: Annotated[PairOptions, _Flags]


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Draw the worst pairs of one or two matchers, and those on which two differ most.

    Writes OUT/index.html and a picture a pair. Exit code 1 where a pair could not be drawn.
    """

    folder: _Folder
    """Folder with zeb/ in it, or zeb/ itself."""
    dumps: _Dumps
    """Dump files of gim-zeb run or folders of them; one or two a set, see --matchers."""
    out: Path
    """Folder of the pictures."""
    matchers: tuple[str, ...] = ()
    """Only these one or two."""
    sets: tuple[str, ...] = ()
    """Only these sets."""
    run: Path | None = None
    """Output folder of gim-zeb run with the matches; by default the one that a dump lies in."""
    pictures: Annotated[PictureOptions, _Flags] = field(default_factory=PictureOptions)


_Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Make, tyro.conf.subcommand("make")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Worst, tyro.conf.subcommand("worst")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    command: Any = common.parse(
        _Command,
        prog="gim-zeb",
        args=common.prog(argv),
        description="Matchers on the Zero-shot Evaluation Benchmark.",
    )
    common.configure_logging()
    actions: dict[type, Callable[[Any], int]] = {
        Data: _data,
        Make: _make,
        Run: _run,
        Check: _check,
        Table: _table,
        Worst: _worst,
        Pairs: _pairs,
    }
    return common.run(lambda: actions[type(command)](command))


def _data(command: Data) -> int:
    from gim_hloc.evaluation.zeb import archives, datasets

    if command.unpack:
        files = archives.unpack(command.unpack, command.folder)
        sys.stdout.write(f"{len(files)} files unpacked into {command.folder}\n")
    found = datasets.verify(
        command.folder,
        sets=command.sets or None,
        decode=command.decode,
        progress=sys.stderr.isatty(),
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


def _make(command: Make) -> int:
    from gim_hloc.evaluation.zeb.make import make_set

    made = make_set(
        command.model, command.images, command.out, command.pairs, progress=sys.stderr.isatty()
    )
    for part in made.bins:
        sys.stdout.write(
            f"overlap {part.low:.1f} to {part.high:.1f}: {part.taken} of {part.found} pairs\n"
        )
    source = "the model's points" if made.from_points else "the poses and assumed depths"
    sys.stdout.write(
        f"{made.folder}: {made.pairs} pairs of {made.images} images, overlaps from {source}"
        + (f"; {len(made.problems)} images left out" if made.problems else "")
        + "\n"
    )
    return 1 if made.problems else 0


def _run(command: Run) -> int:
    from gim_hloc.evaluation.zeb.run import run

    report = run(command.folder, command.out, command.evaluation, progress=sys.stderr.isatty())
    for result in report.results:
        sys.stdout.write(
            f"{result.matcher} on {result.dataset} ({result.protocol}): {result.evaluated} of "
            f"{result.pairs} pairs, {result.failures} failed"
            + (f", {result.dump}" if result.dump else "")
            + "\n"
        )
    _tell(report)
    return report.exit_code


def _tell(report: RunReport) -> None:
    seconds = {name: f"{report.seconds[name]:.1f} s" for name in ("match", "judge", "total")}
    sys.stdout.write(
        f"{report.matched} pairs matched in {seconds['match']}, judged in {seconds['judge']}; "
        f"{seconds['total']} in all"
        + (f"; {len(report.problems)} problems, named above" if report.problems else "")
        + "\n"
    )


def _check(command: Check) -> int:
    from gim_hloc.evaluation.zeb.check import check_dumps, exit_code

    checks = check_dumps(command.dumps, sets=command.sets or None)
    for check in checks:
        sys.stdout.write("\n".join(check.lines()) + "\n")
    return exit_code(checks)


def _table(command: Table) -> int:
    from gim_hloc.evaluation.zeb import table

    made = table.make_table(command.dumps, command.table)
    for path in table.write_tables(made, command.out):
        sys.stdout.write(f"{path}\n")
    if not command.out:
        sys.stdout.write(table.to_markdown(made) + "\n")
    if command.plots is not None:
        from gim_hloc.evaluation.zeb import plots

        for path in plots.write_plots(made, command.plots):
            sys.stdout.write(f"{path}\n")
    return 1 if made.problems else 0


def _pairs(command: Pairs) -> int:
    from gim_hloc.evaluation import _pair_pages, pair_lists

    report = pair_lists.evaluate(
        command.list, command.out, command.evaluation, progress=sys.stderr.isatty()
    )
    for problem in report.lost:  # those of pairs were told when they came
        logger.warning("%s", problem)
    if report.rows:
        sys.stdout.write(_pair_pages.to_markdown(report))
    for result in report.run.results:
        if result.evaluated < result.pairs:
            sys.stdout.write(
                f"{result.matcher} ({result.protocol}): {result.evaluated} of {result.pairs} "
                "pairs; the same command without --shard writes the results\n"
            )
    for path in report.files:
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(f"{report.pair_list.format}, a list of {len(report.pair_list)} pairs; ")
    _tell(report.run)
    return report.exit_code


def _worst(command: Worst) -> int:
    from gim_hloc.evaluation.zeb.pictures import draw_worst

    report = draw_worst(
        command.folder,
        command.dumps,
        command.out,
        matchers=command.matchers,
        sets=command.sets,
        run=command.run,
        options=command.pictures,
    )
    for entry in report.lists:
        sys.stdout.write(f"{entry.dataset}: {entry.title}: {len(entry.files)} pairs\n")
    sys.stdout.write(f"{report.index}: {report.pictures} pictures\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
