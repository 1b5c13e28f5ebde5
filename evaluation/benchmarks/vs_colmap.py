"""COLMAP's own SIFT pipeline against gim-reconstruct, on scenes with measured poses.

    python -m gim_hloc.evaluation.benchmarks.vs_colmap SCENE [SCENE ...] [--quality base]

A scene is a folder with ``images/`` and, for errors, ``gt/`` (a COLMAP model whose intrinsics both
sides are given). Both match all pairs and map incrementally.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from gim_hloc import colmap
from gim_hloc import images as image_module
from gim_hloc.cli import common
from gim_hloc.clock import Stopwatch
from gim_hloc.evaluation.benchmarks.measure import machine
from gim_hloc.evaluation.sfm import evaluate
from gim_hloc.options import CameraOptions
from gim_hloc.pipelines.outcome import versions
from gim_hloc.pipelines.reconstruct import reconstruct
from gim_hloc.types import Quality

logger = logging.getLogger(__name__)

_HEADER = (
    "| scene | method | images | AUC@0.5 | AUC@1 | rotation ° | centre % radius | % extent | "
    "points | track | px | s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Compare COLMAP's SIFT with gim-reconstruct on the same images and intrinsics."""

    scenes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with images/ and, for pose errors, gt/."""
    matchers: tuple[str, ...] = ("aliked_lightglue",)
    """Matchers of gim-reconstruct to run."""
    quality: Quality = "base"
    """Their operating point."""
    max_features: int = 8192
    """COLMAP's SIFT features an image."""
    work: Path | None = field(default=None)
    """Where to keep the runs; a temporary folder otherwise."""


def row(
    scene: str, method: str, model: Path, truth: Path | None, total: int, seconds: float
) -> str:
    """One line of the table."""
    statistics = colmap.model_statistics(model)
    if truth is None:
        errors = ["-"] * 5
    else:
        scores = evaluate(model, truth)
        errors = [
            f"{scores.auc[0.5]:.1f}",
            f"{scores.auc[1.0]:.1f}",
            f"{scores.rotation.mean:.3f}",
            f"{scores.centre_radius_percent.mean:.3f}",
            f"{scores.centre_extent_percent.mean:.3f}",
        ]
    cells = [
        scene,
        method,
        f"{statistics['images']:.0f}/{total}",
        *errors,
        f"{statistics['points']:.0f}",
        f"{statistics['mean_track_length']:.1f}",
        f"{statistics['mean_reprojection_error_px']:.2f}",
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def compare(scene: Path, options: BenchmarkOptions, work: Path) -> list[str]:
    """Run both on one scene."""
    truth = scene / "gt" if (scene / "gt").is_dir() else None
    intrinsics = str(truth / "cameras.txt") if truth else None
    image_set = image_module.scan(scene / "images")
    cameras, _ = colmap.assign_cameras(image_set.images, CameraOptions(intrinsics=intrinsics))
    total = len(image_set.images)
    lines = []
    watch = Stopwatch()
    models = colmap.sift_baseline(
        scene / "images",
        work / "colmap",
        cameras=cameras,
        max_features=options.max_features,
        log_dir=work / "logs",
    )
    seconds = watch.seconds
    path = colmap.write_models(models, work / "colmap" / "sparse")[0]
    lines.append(row(scene.name, "COLMAP SIFT", path, truth, total, seconds))
    for matcher in options.matchers:
        watch = Stopwatch()
        result = reconstruct(
            scene / "images",
            work / matcher,
            matcher=matcher,
            quality=options.quality,
            intrinsics=intrinsics,
            pairs="exhaustive",
            progress=False,
        )
        name = f"{matcher} {options.quality}"
        lines.append(row(scene.name, name, result.models[0], truth, total, watch.seconds))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(BenchmarkOptions, args=common.prog(argv))
    common.configure_logging()

    def run() -> int:
        sys.stdout.write(f"machine: {machine()}\nversions: {versions()}\n{_HEADER}\n")
        for scene in options.scenes:
            with tempfile.TemporaryDirectory() as folder:
                work = (options.work or Path(folder)) / scene.name
                for line in compare(scene, options, work):
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()
        return 0

    return common.run(run)


if __name__ == "__main__":
    sys.exit(main())
