"""``gim-zeb``: matchers on the Zero-shot Evaluation Benchmark and on other lists of pairs."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    backend: Literal["processes", "ray"] = "processes"
    """Workers are processes here, or tasks on the cluster that Ray is connected to."""
    shard: str = "0/1"
    """i/N: the i-th of N parts of every set, from 0."""
    resume: bool = True
    """Go on with what the output folder holds; --no-resume refuses a folder that holds results."""


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
    set: str
    """Name of the set: a folder name, and none of ZEB's twelve."""
    scene: str | None = None
    """Name of the scene; that of the set by default."""
    min_overlap: float = 0.1
    """Smallest overlap of a pair, the share of an image that the other sees."""
    max_overlap: float = 1.0
    """Largest."""
    pairs_per_bin: int = 50
    """Pairs drawn from each tenth of overlap; 0 takes all."""
    max_size: int | None = None
    """Reduce images to this long side, px."""
    depth: tuple[float, float] | None = None
    """NEAR FAR of the scene in the model's unit, for models without points."""
    seed: int = 0
    """Of the draw."""
    add: bool = False
    """Add a scene to a set that exists."""


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


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Run and judge matchers on a list of pairs: poses, homographies, or nothing known.

    Formats: SuperGlue's text files, LoFTR's scene files of MegaDepth and list of ScanNet,
    homographies (HPatches, Oxford), pairs without ground truth. Exit code 1: a part of the list
    could not be used; 2: nothing could.
    """

    list: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIST")]
    """File or folder of one of the formats."""
    out: Path
    """Folder of predictions, evaluations, dumps and results; several lists may share it."""
    matchers: tuple[str, ...]
    """Names of matchers."""
    images: Path | None = None
    """Folder that image names are relative to; by default looked for around the list."""
    format: str | None = None
    """superglue, megadepth, scannet, homography or pairs; by default found out."""
    name: str | None = None
    """Of the set in results; by default that of the list."""
    protocols: tuple[str, ...] = ("gim",)
    """gim (OpenCV) and poselib (needs gim-hloc[zeb])."""
    threshold_px: float | None = None
    """Of RANSAC: 0.5 (gim) or 1 (poselib) for poses, 3 for homographies, 1 without truth."""
    resize: str | None = None
    """stored, matcher (its own size), a long side such as 1200, or 640x480. By default 1200 for
    megadepth, 640x480 for scannet, matcher for pairs, stored for the others."""
    k_size: str | None = None
    """WxH of the images that K is for, where these are not the stored ones; RANSAC's threshold
    counts their pixels."""
    intrinsics: Path | None = None
    """K of ScanNet's scenes; by default intrinsics.npz beside the list."""
    short_side: int | None = None
    """Count errors of homographies in pixels of images with this short side, such as 480."""
    thresholds: tuple[float, ...] = ()
    """Of AUC: by default 5 10 20 degrees, or 1 3 5 10 20 px for homographies."""
    samples: int = 1000
    """Bootstrap resamplings for the 95 % interval; 0 leaves it out."""
    quality: str = "base"
    """Operating point of the matchers."""
    limit: int | None = None
    """Pairs, drawn at random."""
    seed: int = 0
    """Of that draw and of the bootstrap."""
    devices: tuple[str, ...] = ("auto",)
    """One worker a device; the same name twice makes two workers on it."""
    backend: Literal["processes", "ray"] = "processes"
    """Workers are processes here, or tasks on the cluster that Ray is connected to."""
    shard: str = "0/1"
    """i/N: the i-th of N parts of the list, from 0; the last to end writes the results."""
    resume: bool = True
    """Go on with what the output folder holds; --no-resume refuses a folder that holds results."""
    pictures: bool = True
    """Draw the pairs of a list without truth."""


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
    count: int = 10
    """Pairs of a list."""
    limit: float = 20.0
    """Degrees at which errors are cut when matchers are compared."""
    run: Path | None = None
    """Output folder of gim-zeb run with the matches; by default the one that a dump lies in."""


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


def _make(command: Make) -> int:
    from gim_hloc.evaluation.zeb.make import MakeOptions, make_set

    options = MakeOptions(
        name=command.set,
        scene=command.scene,
        min_overlap=command.min_overlap,
        max_overlap=command.max_overlap,
        pairs_per_bin=command.pairs_per_bin or None,
        max_size=command.max_size,
        depth=command.depth,
        seed=command.seed,
        add=command.add,
        progress=True,
    )
    made = make_set(command.model, command.images, command.out, options)
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
    from gim_hloc.evaluation.zeb.protocol import make_protocol
    from gim_hloc.evaluation.zeb.run import RunOptions, run, run_workers

    options = RunOptions(
        matchers=command.matchers,
        sets=command.sets,
        protocols=tuple(
            make_protocol(name, padded_slip=command.padded_slip) for name in command.protocols
        ),
        quality=command.quality,
        limit=command.limit,
        seed=command.seed,
        shard=_shard(command.shard),
        resume=command.resume,
        progress=True,
    )
    if len(command.devices) > 1 or command.backend == "ray":
        report = run_workers(
            command.folder, command.out, options, command.devices, backend=command.backend
        )
    else:
        options = dataclasses.replace(options, device=(*command.devices, "auto")[0])
        report = run(command.folder, command.out, options)
    _tell(report)
    return report.exit_code


def _shard(text: str) -> tuple[int, int]:
    try:
        part, count = (int(value) for value in text.split("/"))
    except ValueError:
        raise InputError(f"--shard is {text!r}; give i/N, for instance 0/4.") from None
    return part, count


def _tell(report: RunReport) -> None:
    for sentence in report.lost:
        logger.error("%s", sentence)
    for result in report.results:
        sys.stdout.write(
            f"{result.matcher} on {result.dataset} ({result.protocol}): {result.evaluated} of "
            f"{result.pairs} pairs, {result.failures} failed"
            + (f", {result.dump}" if result.dump else "")
            + "\n"
        )
    for name, seconds in report.by_matcher.items():
        parts = ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items())
        sys.stdout.write(
            f"{name}: {parts}; {report.outside_of(name):.1%} outside matcher and RANSAC\n"
        )
    sys.stdout.write(
        f"{report.matched} pairs matched, {report.encoded} images encoded in "
        f"{report.seconds['total']:.1f} s, {report.outside:.1%} of it outside matchers and RANSAC"
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
    from gim_hloc.evaluation.zeb import plots, table

    options = table.TableOptions(thresholds=command.thresholds, published=command.published)
    made = table.make_table(command.dumps, options)
    table.check_formats(made, command.out)
    if not command.out:
        sys.stdout.write(table.to_markdown(made) + "\n")
    for path in command.out:
        sys.stdout.write(f"{table.write_table(made, path)}\n")
    if command.plots is not None:
        for path in plots.write_plots(made, command.plots):
            sys.stdout.write(f"{path}\n")
    return 1 if made.problems else 0


def _pairs(command: Pairs) -> int:
    from gim_hloc.evaluation import _pair_pages, pair_lists

    options = pair_lists.PairOptions(
        matchers=command.matchers,
        protocols=command.protocols,  # type: ignore[arg-type]
        threshold=command.threshold_px,
        resize=None if command.resize is None else pair_lists.parse_resize(command.resize),
        short_side=command.short_side,
        thresholds=command.thresholds,
        samples=command.samples,
        quality=command.quality,
        limit=command.limit,
        seed=command.seed,
        devices=command.devices,
        backend=command.backend,
        shard=_shard(command.shard),
        resume=command.resume,
        pictures=command.pictures,
        progress=True,
    )
    size = None if command.k_size is None else pair_lists.parse_resize(command.k_size).exact
    if command.k_size is not None and size is None:
        raise InputError(f"--k-size is {command.k_size!r}; give WxH, for instance 640x480.")
    report = pair_lists.evaluate(
        command.list,
        command.out,
        options,
        images=command.images,
        format=command.format,
        name=command.name,
        intrinsics=command.intrinsics,
        calibrated_size=size,
    )
    for problem in report.lost:  # those of pairs were told when they came
        logger.warning("%s", problem)
    run = report.run
    for sentence in run.lost:
        logger.error("%s", sentence)
    if report.rows:
        sys.stdout.write(_pair_pages.to_markdown(report))
    for result in run.results:
        if result.evaluated < result.pairs:
            sys.stdout.write(
                f"{result.matcher} ({result.protocol}): {result.evaluated} of {result.pairs} "
                "pairs; results are written when all are judged\n"
            )
    for path in report.files:
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(
        f"{report.pair_list.format}, a list of {len(report.pair_list)} pairs; {run.matched} "
        f"matched and {run.encoded} images encoded in {run.seconds['total']:.1f} s\n"
    )
    return report.exit_code


def _worst(command: Worst) -> int:
    from gim_hloc.evaluation.zeb.pictures import PictureOptions, draw_worst

    report = draw_worst(
        command.folder,
        command.dumps,
        command.out,
        matchers=command.matchers,
        sets=command.sets,
        run=command.run,
        options=PictureOptions(count=command.count, limit=command.limit),
    )
    for entry in report.lists:
        sys.stdout.write(f"{entry.dataset}: {entry.title}: {len(entry.files)} pairs\n")
    sys.stdout.write(f"{report.index}: {report.pictures} pictures\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
