"""Real hloc against gim-reconstruct: same images, weights, keypoint budget, pairs and cameras.

    python -m gim_hloc.evaluation.benchmarks.vs_hloc \
        --hloc CHECKOUT --with-hloc TOOL.py --hloc-python PYTHON \
        --images DIR --truth MODEL --intrinsics "PINHOLE,fx,fy,cx,cy" --json result.json

Both programs run as processes of their own, in turn, each from an empty folder, and are measured
from outside; the stage times are what each reports itself. Medians over the rounds are compared.
Exit code 1: time, memory or a pose error missed its bound. 2: a program failed.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.evaluation.benchmarks.measure import BenchmarkError
from gim_hloc.files import json_value

DRIVER = Path(__file__).with_name("_hloc_driver.py")
PACKAGES = ("gim-hloc", "torch", "kornia", "pycolmap", "numpy", "opencv-python-headless", "h5py")
# Rotations twice: after the alignment, and by pairs, since the alignment of two models of the same
# scene can differ by more than their rotations do.
POSES = (
    *("registered", "auc@0.5", "auc@1", "rotation_mean", "pair_rotation_mean"),
    "centre_radius_mean",
)
MAX_TIME_RATIO = 0.67  # ours over hloc's
MAX_MEMORY_RATIO = 1.0
AUC_TOLERANCE = 0.5  # points below hloc's that still count as not worse: RANSAC moves it
ERROR_TOLERANCE = 0.05  # share above hloc's errors, likewise

Numbers = dict[str, float]


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
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every number to this file."""
    rounds: int = 2
    """Runs of each program."""
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
    """Let hloc store keypoints as float16, its default. Off, its poses are at their best."""
    our_args: str = ""
    """More arguments for gim-reconstruct, as one shell-like string."""


def hloc_command(options: BenchmarkOptions, folder: Path) -> list[str | Path]:
    """The command that lets hloc reconstruct into ``folder``."""
    command: list[str | Path] = [options.hloc_python, options.with_hloc, options.hloc, DRIVER]
    command += ["--images", options.images, "--output", folder]
    command += ["--keypoints", str(options.keypoints)]
    command += ["--detection-threshold", str(options.detection_threshold)]
    command += ["--camera-mode", options.camera_mode.upper()]
    if options.intrinsics is not None:
        command += ["--intrinsics", options.intrinsics]
    if options.pairs != "exhaustive":
        command += ["--pairs", options.pairs]
    return command + ["--half"] * options.hloc_half


def our_command(options: BenchmarkOptions, folder: Path) -> list[str | Path]:
    """The command that lets gim-reconstruct do the same."""
    command: list[str | Path] = [sys.executable, "-m", "gim_hloc.cli.reconstruct"]
    command += [options.images, folder, "--matcher", "aliked_lightglue"]
    command += ["--max-keypoints", str(options.keypoints)]
    command += ["--matcher-options", f"detection_threshold={options.detection_threshold}"]
    command += ["--pairs", options.pairs, "--camera-mode", options.camera_mode]
    if options.intrinsics is not None:
        command += ["--intrinsics", options.intrinsics]
    return command + list(shlex.split(options.our_args))


# Program -> its command, where it leaves its model and its times.
PROGRAMS = {
    "hloc": (hloc_command, "sfm", "timings.json"),
    "ours": (our_command, "sparse/0", "report.json"),
}


def run_once(program: str, options: BenchmarkOptions, folder: Path) -> Numbers:
    """Run a program and judge its model: every number by its name in the table."""
    command, model, times = PROGRAMS[program]
    log = folder.with_suffix(".log")
    usage = measure.measured_run(command(options, folder), log=log)
    try:
        timings = json.loads((folder / times).read_text())["timings"]
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"{folder / times} is missing or damaged; see {log}") from error
    scores = sfm.evaluate(folder / model, options.truth)
    return {
        "wall time [s]": usage.wall_s,
        **{f"  {stage} [s]": seconds for stage, seconds in timings.items()},
        "  start and end [s]": usage.wall_s - sum(timings.values()),
        "processor time [s]": usage.cpu_s,
        "peak memory [MiB]": usage.peak_mib,
        **{name: metric.value(scores) for name, metric in sfm.METRICS.items()},
    }


def medians(runs: Sequence[Numbers]) -> Numbers:
    """The median of each number on its own."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


def missed_bounds(theirs: Numbers, ours: Numbers) -> list[str]:
    """One sentence for each bound that is missed."""
    missed = []
    for name, bound in (
        ("wall time [s]", MAX_TIME_RATIO),
        ("peak memory [MiB]", MAX_MEMORY_RATIO),
    ):
        if ours[name] > bound * theirs[name]:
            ratio = ours[name] / theirs[name]
            missed.append(f"{name} is {ratio:.3f} times hloc's, asked for at most {bound:g}")
    for name in POSES:
        metric, limit = sfm.METRICS[name], theirs[name]
        if name.startswith("auc"):
            limit -= AUC_TOLERANCE
        elif not metric.higher_is_better:
            limit *= 1 + ERROR_TOLERANCE
        if not metric.meets(ours[name], limit):
            missed.append(
                f"{name} is {ours[name]:.5g}, hloc's {theirs[name]:.5g}, "
                f"asked for {limit:.5g} or better"
            )
    return missed


def table(theirs: Numbers, ours: Numbers) -> str:
    """The comparison as Markdown, one row a number."""
    lines = ["| | hloc | ours | ours/hloc |", "|---|--:|--:|--:|"]
    for name in dict.fromkeys([*theirs, *ours]):
        a, b = theirs.get(name, 0.0), ours.get(name, 0.0)
        lines.append(f"| {name} | {a:.5g} | {b:.5g} | {f'{b / a:.3f}' if a else ''} |")
    return "\n".join(lines)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    options = tyro.cli(BenchmarkOptions, prog="vs_hloc", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: BenchmarkOptions) -> int:
    for path in (options.hloc, options.with_hloc, options.hloc_python, options.images):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    context: dict[str, Any] = {
        "date": measure.now(),
        "commit": measure.commit(Path(__file__).parent),
        "machine": measure.machine(),
        "versions": measure.versions(PACKAGES),
    }
    for name, value in context.items():
        _print(f"{name}: {value}")
    warm_up(options)
    runs: dict[str, list[Numbers]] = {program: [] for program in PROGRAMS}
    with tempfile.TemporaryDirectory(prefix="vs_hloc-") as folder:
        for number in range(options.rounds):
            for program, found in runs.items():
                found.append(run_once(program, options, Path(folder) / f"{program}-{number}"))
                _print(f"{program} {number}: {found[-1]['wall time [s]']:.1f} s")
    theirs, ours = (medians(found) for found in runs.values())
    missed = missed_bounds(theirs, ours)
    _print(f"\nmedians of {options.rounds} round(s)\n{table(theirs, ours)}")
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        result = {**context, "settings": settings, "missed": missed, "runs": runs}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(json_value(result), indent=1) + "\n")
    for line in missed:
        _print(f"missed: {line}")
    return 1 if missed else 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
