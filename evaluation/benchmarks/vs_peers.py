"""gim-reconstruct against the tools that users have: processor seconds and poses, in one run.

    python -m gim_hloc.evaluation.benchmarks.vs_peers SCENE [SCENE ...] \
        [--runs cascade:fast aliked_lightglue:base] [--peers "NAME=COMMAND" ...] [--json FILE]

A scene is a folder with ``images/`` and, for errors, ``gt/`` (a COLMAP model, whose cameras are
given to all). Every program is a process of its own that starts from an empty folder, in
turn, and is measured from outside. ``sift`` is COLMAP's own SIFT with 8,192 features, all pairs,
its incremental mapper. COMMAND is any other: {images}, {out} and {intrinsics} are filled in, and a
COLMAP model has to lie below {out} when it ends.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import tyro

from gim_hloc import colmap
from gim_hloc import images as image_module
from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation import gps, sfm
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.files import json_value

PACKAGES = ("gim-hloc", "torch", "pycolmap", "numpy")
_SIFT = [sys.executable, "-m", "gim_hloc.evaluation.benchmarks._sift", "{images}", "{out}"]
_POSES = ("auc@0.5", "auc@1", "pair_rotation_mean")
_HEADER = (
    "| scene | program | registered | AUC@0.5° | AUC@1° | rotation ° | GPS m | processor s | "
    "of the first | wall s | MiB |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)

Command = list[str | Path]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Compare programs on the same images; the first one is what the others are measured by."""

    scenes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with images/ and, for pose errors, gt/."""
    runs: tuple[str, ...] = ("cascade:fast", "aliked_lightglue:base")
    """MATCHER:QUALITY of gim-reconstruct."""
    peers: tuple[str, ...] = ()
    """NAME=COMMAND of other programs."""
    sift: bool = True
    """Run COLMAP's SIFT first."""
    intrinsics: Literal["given", "guessed"] = "given"
    """Whether all are given the cameras of gt/."""
    rounds: int = 1
    """Runs of each program; the least processor time of each counts."""
    counts: tuple[int, ...] = ()
    """Take so many images, spread over the scene, one comparison each; by default all."""
    megapixels: tuple[float, ...] = ()
    """Resize images to so many, one comparison each; by default as they are."""
    our_args: str = ""
    """More arguments for gim-reconstruct, as one shell-like string."""
    keep: Path | None = None
    """Keep the runs here; a temporary folder otherwise."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every number to this file."""


def programs(options: BenchmarkOptions) -> dict[str, list[str]]:
    """Name -> command with places to fill in.

    Raises:
        InputError: an entry of ``runs`` or ``peers`` that is none.
    """
    found = {"sift": list(map(str, _SIFT))} if options.sift else {}
    for run in options.runs:
        matcher, colon, quality = run.rpartition(":")
        if not colon:
            raise InputError(f"--runs {run}: give MATCHER:QUALITY, like cascade:fast")
        ours = [sys.executable, "-m", "gim_hloc.cli.reconstruct", "{images}", "{out}"]
        ours += ["--matcher", matcher, "--quality", quality, "--pairs", "exhaustive"]
        found[run] = [*ours, *shlex.split(options.our_args)]
    for peer in options.peers:
        name, equals, command = peer.partition("=")
        if not equals:
            raise InputError(f"--peers {peer}: give NAME=COMMAND")
        found[name] = shlex.split(command)
    return found


def filled(command: Sequence[str], images: Path, out: Path, intrinsics: str | None) -> Command:
    """The command of one run; who is ours or SIFT takes intrinsics as an option."""
    parts = [part.format(images=images, out=out, intrinsics=intrinsics or "") for part in command]
    ours = command[0] == sys.executable
    return [*parts, *(["--intrinsics", intrinsics] if ours and intrinsics else [])]


def prepared(images: Path, folder: Path, count: int | None, megapixels: float | None) -> Path:
    """The images themselves, or a folder of so many, resized."""
    if count is None and megapixels is None:
        return images
    records = image_module.scan(images).images
    count = min(count or len(records), len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    for record in chosen:
        target = folder / record.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if megapixels is None:
            shutil.copyfile(record.path, target)
            continue
        scale = (megapixels * 1e6 / (record.width * record.height)) ** 0.5
        size = round(record.width * scale), round(record.height * scale)
        image = cv2.cvtColor(image_module.read_rgb(record, upright=False), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(target), cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return folder


def judged(out: Path, images: Path, truth: Path | None) -> dict[str, float]:
    """Figures of the largest model below a folder, by poses and GPS where there are any."""
    records = image_module.scan(images).images
    total = len(records)
    models = sorted(
        {
            path.parent
            for path in out.rglob("images.*")
            # Hidden folders hold what a program had before it was done, like our mapped models.
            if path.suffix in (".bin", ".txt") and path.relative_to(out).parts[0][0] != "."
        },
        key=lambda path: (-colmap.model_statistics(path)["images"], path),
    )
    if not models:
        return {"total": total, "registered": 0}
    found = {"total": total, "registered": colmap.model_statistics(models[0])["images"]}
    fixes = {r.name: r.exif.gps for r in records if r.exif.gps is not None}
    if truth is not None:
        scores = sfm.evaluate(models[0], truth)
        found |= {name: sfm.METRICS[name].value(scores) for name in _POSES}
    elif fixes:
        found["gps"] = gps.evaluate(colmap.model_cameras(models[0]), fixes).rmse
    return found


def compare(scene: Path, options: BenchmarkOptions, work: Path) -> Iterator[dict[str, Any]]:
    """Run all programs on one scene, in turn, for each number and size of images."""
    truth = scene / "gt" if (scene / "gt").is_dir() else None
    given = str(scene / "gt" / "cameras.txt") if truth and options.intrinsics == "given" else None
    sizes = itertools.product(options.counts or (None,), options.megapixels or (None,))
    for count, megapixels in sizes:
        part = work / f"{count or 'all'}-{megapixels or 'stored'}"
        images = prepared(scene / "images", part / "images", count, megapixels)
        # Resized images have other cameras than the truth's.
        intrinsics = given if megapixels is None else None
        runs: dict[str, list[measure.Usage]] = {}
        found: dict[str, dict[str, float]] = {}
        for round_, (name, command) in itertools.product(
            range(options.rounds), programs(options).items()
        ):
            out = part / f"{name.replace(':', '-')}-{round_}"
            usage = measure.measured_run(
                filled(command, images, out, intrinsics), log=out.with_suffix(".log")
            )
            runs.setdefault(name, []).append(usage)
            found[name] = judged(out, images, truth)
        for name, usages in runs.items():
            yield {
                "scene": scene.name,
                "program": name,
                "megapixels": megapixels,
                "cpu_s": min(usage.cpu_s for usage in usages),
                "wall_s": min(usage.wall_s for usage in usages),
                "peak_mib": max(usage.peak_mib for usage in usages),
                **found[name],
            }


def line(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """One row of the table."""
    size = f" at {row['megapixels']:g} MP" if row["megapixels"] else ""
    figures = (
        *(
            (f"{row[name]:.{2 if name in _POSES[:2] else 3}f}" if name in row else "")
            for name in _POSES
        ),
        f"{row['gps']:.1f}" if "gps" in row else "",
        f"{row['cpu_s']:.1f}",
        f"{row['cpu_s'] / first['cpu_s']:.2f}",
        f"{row['wall_s']:.1f}",
        f"{row['peak_mib']:.0f}",
    )
    registered = f"{row['registered']:.0f} of {row['total']}"
    return "| " + " | ".join((row["scene"] + size, row["program"], registered, *figures)) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(BenchmarkOptions, prog="vs_peers", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: BenchmarkOptions) -> int:
    programs(options)  # names of programs are checked before the first one runs
    for scene in options.scenes:
        if not (scene / "images").is_dir():
            raise InputError(f"{scene} has no folder images/: give folders of scenes")
    context = {
        "date": measure.now(),
        "commit": measure.commit(Path(__file__).parent),
        "machine": measure.machine(),
        "versions": measure.versions(PACKAGES),
    }
    for name, value in context.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write(_HEADER + "\n")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vs_peers-") as folder:
        for scene in options.scenes:
            first: dict[str, Any] = {}
            for row in compare(scene, options, (options.keep or Path(folder)) / scene.name):
                if not first or (row["total"], row["megapixels"]) != first["size"]:
                    first = {**row, "size": (row["total"], row["megapixels"])}
                rows.append(row)
                sys.stdout.write(line(row, first) + "\n")
                sys.stdout.flush()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(json_value({**context, "rows": rows}), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
