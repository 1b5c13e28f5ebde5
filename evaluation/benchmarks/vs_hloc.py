"""Real hloc against gim-reconstruct: same images, weights, keypoint budget, pairs and cameras.

    python -m gim_hloc.evaluation.benchmarks.vs_hloc \
        --hloc CHECKOUT --with-hloc TOOL.py --hloc-python PYTHON \
        --images DIR --truth MODEL --intrinsics "PINHOLE,fx,fy,cx,cy" --json result.json

Both programs run as processes of their own, in turn, each from an empty folder, and are measured
from outside; the stage times are what each reports itself. Medians over the rounds are compared.
Exit code 1 means that a bound was missed, 2 that a program failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.evaluation.benchmarks.measure import BenchmarkError, Usage

DRIVER = Path(__file__).with_name("_hloc_driver.py")
STAGES = ("scan", "encode", "pairs", "match", "verify", "map", "refine", "export", "report")
PACKAGES = ("gim-hloc", "torch", "kornia", "pycolmap", "numpy", "opencv-python-headless", "h5py")
POSE_METRICS = (
    "registered",
    "auc@0.5",
    "auc@1",
    "auc@3",
    "auc@5",
    "pair_rotation_mean",
    "pair_direction_mean",
    "rotation_mean",
    "centre_radius_mean",
    "centre_extent_mean",
    "points",
    "track_length",
    "reprojection",
)
JUDGED = (
    "registered",
    "auc@0.5",
    "auc@1",
    "rotation_mean",
    "pair_rotation_mean",
    "centre_radius_mean",
)
"""The pose errors that must not be worse. Rotations twice: after the alignment, and by pairs, since
the alignment of two models of the same scene can differ by more than their rotations do."""

Tool = Literal["hloc", "ours"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Run hloc and gim-reconstruct in turn and compare time, memory and pose error."""

    hloc: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Checkout of cvg/Hierarchical-Localization."""
    with_hloc: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Script that runs another script with hloc importable: FILE CHECKOUT SCRIPT [ARGUMENT ...]."""
    hloc_python: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Python of hloc's own environment."""
    images: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Image folder for both."""
    truth: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """COLMAP model of the true poses."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder to keep all runs in; must be new or empty. Without it they are deleted."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every number to this file."""
    rounds: int = 2
    """Runs of each program."""
    warm_up: bool = True
    """Load both programs' libraries and the images once before the first run."""
    keypoints: int = 2048
    """Keypoint budget per image."""
    detection_threshold: float = 0.2
    """Lowest ALIKED score of a keypoint; 0.2 is the default of both."""
    pairs: str = "exhaustive"
    """exhaustive, or a pair file for both."""
    intrinsics: str | None = None
    """MODEL,p0,p1,... of the one camera; kept fixed by both. Without it both guess and refine."""
    camera_mode: Literal["single", "auto"] = "single"
    """How images share cameras, for both."""
    hloc_half: bool = False
    """Let hloc store keypoints as float16, as its notebooks do. Off, its poses are at their
    best."""
    our_args: str = ""
    """More arguments for gim-reconstruct, as one shell-like string."""
    our_command: str = ""
    """Program to run as gim-reconstruct, as one shell-like string; this environment's without."""
    max_time_ratio: float = 0.67
    """Bound: our total wall time over hloc's."""
    max_memory_ratio: float = 1.0
    """Bound: our peak memory over hloc's, of all processes together and of the largest one."""
    auc_tolerance: float = 0.5
    """AUC points below hloc's that still count as not worse: RANSAC moves it between runs."""
    error_tolerance: float = 0.05
    """Share above hloc's rotation and centre error that still counts as not worse."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one program."""

    tool: Tool
    round: int
    usage: Usage
    timings: dict[str, float]  # stage -> seconds, plus "start and end", what no stage accounts for
    scores: sfm.SfmScores
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Medians of one program's runs, each number on its own."""

    usage: Usage
    timings: dict[str, float]
    pose: dict[str, float]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Summary:
        """Summarise runs of one program."""
        stages = dict.fromkeys(stage for run in runs for stage in run.timings)
        return cls(
            usage=measure.median_usage([run.usage for run in runs]),
            timings={
                stage: statistics.median(run.timings.get(stage, 0.0) for run in runs)
                for stage in stages
            },
            pose={
                name: statistics.median(sfm.METRICS[name].value(run.scores) for run in runs)
                for name in POSE_METRICS
            },
        )


def hloc_command(options: BenchmarkOptions, folder: Path) -> list[str | Path]:
    """Return the command that lets hloc reconstruct into ``folder``."""
    command: list[str | Path] = [options.hloc_python, options.with_hloc, options.hloc, DRIVER]
    command += ["--images", options.images, "--output", folder]
    command += ["--keypoints", str(options.keypoints)]
    command += ["--detection-threshold", str(options.detection_threshold)]
    command += ["--camera-mode", options.camera_mode.upper()]
    if options.intrinsics is not None:
        command += ["--intrinsics", options.intrinsics]
    if options.pairs != "exhaustive":
        command += ["--pairs", options.pairs]
    if options.hloc_half:
        command += ["--half"]
    return command


def our_command(options: BenchmarkOptions, folder: Path) -> list[str | Path]:
    """Return the command that lets gim-reconstruct do the same."""
    command: list[str | Path] = [sys.executable, "-m", "gim_hloc.cli.reconstruct"]
    if options.our_command:
        command = list(shlex.split(options.our_command))
    command += [options.images, folder, "--matcher", "aliked_lightglue"]
    command += ["--max-keypoints", str(options.keypoints)]
    command += ["--matcher-options", f"detection_threshold={options.detection_threshold}"]
    command += ["--pairs", options.pairs, "--camera-mode", options.camera_mode]
    if options.intrinsics is not None:
        command += ["--intrinsics", options.intrinsics]
    return command + list(shlex.split(options.our_args))


def run_hloc(options: BenchmarkOptions, folder: Path, number: int) -> Run:
    """Run hloc once and judge its model.

    Raises:
        BenchmarkError: it failed or left no model.
    """
    log = folder.with_suffix(".log")
    usage = measure.measured_run(hloc_command(options, folder), log=log)
    result = _read_json(folder / "timings.json", log)
    return Run(
        tool="hloc",
        round=number,
        usage=usage,
        timings=_with_rest(result["timings"], usage),
        scores=sfm.evaluate(folder / "sfm", options.truth, name=f"hloc {number}"),
        versions=result["versions"],
    )


def run_ours(options: BenchmarkOptions, folder: Path, number: int) -> Run:
    """Run gim-reconstruct once and judge its model.

    Raises:
        BenchmarkError: it failed or left no model.
    """
    log = folder.with_suffix(".log")
    usage = measure.measured_run(our_command(options, folder), log=log)
    result = _read_json(folder / "report.json", log)
    return Run(
        tool="ours",
        round=number,
        usage=usage,
        timings=_with_rest(result["timings"], usage),
        scores=sfm.evaluate(folder, options.truth, name=f"ours {number}"),
        versions=measure.versions(PACKAGES),
    )


def warm_up(options: BenchmarkOptions) -> None:
    """Read what both programs will read, so that no run pays for a cold disk cache."""
    for file in options.images.rglob("*"):
        if file.is_file():
            file.read_bytes()
    for python in (options.hloc_python, Path(sys.executable)):
        subprocess.run(
            [python, "-c", "import torch, cv2, h5py, scipy, kornia, pycolmap"],
            capture_output=True,
            check=False,
        )


def compare(runs: Sequence[Run], options: BenchmarkOptions) -> tuple[Summary, Summary, list[str]]:
    """Return hloc's medians, ours, and one sentence for each bound that ours miss."""
    theirs = Summary.of([run for run in runs if run.tool == "hloc"])
    ours = Summary.of([run for run in runs if run.tool == "ours"])
    missed = []
    for label, field, bound in (
        ("wall time", "wall_s", options.max_time_ratio),
        ("peak memory of all processes", "peak_tree_mib", options.max_memory_ratio),
        ("peak memory of the largest process", "peak_rss_mib", options.max_memory_ratio),
    ):
        value = ratio(getattr(ours.usage, field), getattr(theirs.usage, field))
        if value > bound:
            missed.append(f"{label} is {value:.3f} times hloc's, asked for at most {bound:g}")
    for name in JUDGED:
        limit = pose_limit(name, theirs.pose[name], options)
        if not sfm.METRICS[name].meets(ours.pose[name], limit):
            missed.append(
                f"{name} is {ours.pose[name]:.5g}, hloc's {theirs.pose[name]:.5g}, "
                f"asked for {limit:.5g} or better"
            )
    return theirs, ours, missed


def pose_limit(name: str, theirs: float, options: BenchmarkOptions) -> float:
    """Return the worst value of a pose metric that counts as not worse than hloc's."""
    if name.startswith("auc"):
        return theirs - options.auc_tolerance
    if sfm.METRICS[name].higher_is_better:
        return theirs
    return theirs * (1 + options.error_tolerance)


def table(theirs: Summary, ours: Summary) -> str:
    """Return the comparison, one row a number, with ratios ours / hloc."""
    rows = [("", "hloc", "ours", "ours/hloc")]

    def add(label: str, a: float, b: float, form: str) -> None:
        rows.append((label, format(a, form), format(b, form), format(ratio(b, a), ".3f")))

    add("wall time, total [s]", theirs.usage.wall_s, ours.usage.wall_s, ".2f")
    for stage in (*STAGES, "start and end"):
        a, b = theirs.timings.get(stage, 0.0), ours.timings.get(stage, 0.0)
        if a or b:
            add(f"  {stage}", a, b, ".2f")
    add("processor time [s]", theirs.usage.cpu_s, ours.usage.cpu_s, ".2f")
    add("peak memory, all processes [MiB]", *_pair(theirs, ours, "peak_tree_mib"), ".0f")
    add("peak memory, largest process [MiB]", *_pair(theirs, ours, "peak_rss_mib"), ".0f")
    for name in POSE_METRICS:
        unit = sfm.METRICS[name].unit
        add(f"{name} [{unit}]" if unit else name, theirs.pose[name], ours.pose[name], ".5g")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def ratio(ours: float, theirs: float) -> float:
    """Return ours / theirs; NaN where that says nothing."""
    return ours / theirs if theirs else math.nan


def benchmark(options: BenchmarkOptions, folder: Path) -> list[Run]:
    """Run both programs in turn: hloc, ours, hloc, ours, ...

    Args:
        options: what to run.
        folder: new or empty folder for all runs.
    """
    if options.warm_up:
        warm_up(options)
    runs: list[Run] = []
    for number in range(options.rounds):
        for run_one, tool in ((run_hloc, "hloc"), (run_ours, "ours")):
            run = run_one(options, folder / f"{tool}-{number}", number)
            auc, seconds = run.scores.auc[1.0], run.usage.wall_s
            _say(f"{tool} {number}: {seconds:.1f} s, {run.scores.registered} images, {auc:.2f} %")
            runs.append(run)
    return runs


def result_dict(
    options: BenchmarkOptions,
    context: Mapping[str, Any],
    runs: Sequence[Run],
    comparison: tuple[Summary, Summary, list[str]],
) -> dict[str, Any]:
    """Return every number as JSON can hold it."""
    theirs, ours, missed = comparison
    return sfm.plain(
        {
            **context,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "missed": missed,
            "hloc": dataclasses.asdict(theirs),
            "ours": dataclasses.asdict(ours),
            "wall_ratio": ratio(ours.usage.wall_s, theirs.usage.wall_s),
            "runs": [
                {
                    "tool": run.tool,
                    "round": run.round,
                    "versions": run.versions,
                    "usage": dataclasses.asdict(run.usage),
                    "timings": run.timings,
                    "scores": run.scores.as_dict(),
                }
                for run in runs
            ],
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    options = tyro.cli(BenchmarkOptions, prog="vs_hloc", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: BenchmarkOptions) -> int:
    for path in (options.hloc, options.with_hloc, options.hloc_python, options.images):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    if options.rounds < 1:
        raise InputError(f"rounds is {options.rounds}, it must be positive")
    context = {
        "date": measure.now(),
        "commit": measure.commit(Path(__file__).parent),
        "machine": measure.machine(),
    }
    for name, value in context.items():
        _say(f"{name}: {value}")
    with _folder(options.output) as folder:
        runs = benchmark(options, folder)
    for tool in ("hloc", "ours"):
        found = next(run.versions for run in runs if run.tool == tool)
        _say(f"{tool}: " + ", ".join(f"{name} {version}" for name, version in found.items()))
    comparison = compare(runs, options)
    theirs, ours, missed = comparison
    _say(f"\nmedians of {options.rounds} round(s)\n{table(theirs, ours)}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result_dict(options, context, runs, comparison), indent=1)
        options.json.write_text(text + "\n")
    for line in missed:
        _say(f"missed: {line}")
    return 1 if missed else 0


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="vs_hloc-") as temporary:
            yield Path(temporary)
        return
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        # A finished run in it would be resumed, and its time measured as ours.
        raise InputError(f"{path} is not empty: give a new folder for the runs")
    yield path


def _read_json(path: Path, log: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is missing or damaged ({error}); see {log}") from error
    if "timings" not in content:
        raise BenchmarkError(f"{path} holds no timings; see {log}")
    return content


def _with_rest(timings: Mapping[str, float], usage: Usage) -> dict[str, float]:
    rest = max(usage.wall_s - sum(timings.values()), 0.0)
    return {**timings, "start and end": rest}


def _pair(theirs: Summary, ours: Summary, field: str) -> tuple[float, float]:
    return getattr(theirs.usage, field), getattr(ours.usage, field)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
