"""Recall of the retrieval: VLAD alone, and its shortlist re-ranked by mutual nearest neighbours.

    python -m gim_hloc.evaluation.benchmarks.retrieval SCENE [SCENE ...] [--neighbours 5]

A scene is a folder with ``images/`` and ``gt/`` (a COLMAP model) or GPS positions in the images.
An image's true neighbours are the nearest cameras, with known poses among those that look the same
way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gim_hloc import colmap, engine, matchers
from gim_hloc import images as image_module
from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks.measure import machine
from gim_hloc.pairs.base import top_k
from gim_hloc.pairs.retrieval import retrieval, vlad
from gim_hloc.pairs.spatial import earth_centred_m
from gim_hloc.pipelines.outcome import versions
from gim_hloc.types import Quality

_MAX_ANGLE_DEG = 30.0  # between viewing directions of neighbours, as in gim-pairs


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Count how many of the true neighbours of each image retrieval finds."""

    scenes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with images/, and gt/ or GPS in the images."""
    matcher: str = "aliked_lightglue"
    """Sparse matcher whose descriptors are used."""
    quality: Quality = "base"
    """Its operating point."""
    neighbours: int = 5
    """Neighbours an image."""


def true_neighbours(centres: np.ndarray, axes: np.ndarray | None, k: int) -> list[set[int]]:
    """The k nearest (N, 3) centres of each, among those of a similar viewing axis (N, 3)."""
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    score = -distance
    if axes is not None:
        score[axes @ axes.T <= np.cos(np.deg2rad(_MAX_ANGLE_DEG))] = -np.inf
    np.fill_diagonal(score, -np.inf)
    return [set(top_k(row, k).tolist()) for row in score]


def recall(
    names: Sequence[str],
    vectors: np.ndarray,
    truth: Sequence[set[int]],
    k: int,
    local: Mapping[str, np.ndarray] | None,
) -> float:
    """Share of true neighbours among the k retrieved for each image."""
    index = {name: i for i, name in enumerate(names)}
    found: list[set[int]] = [set() for _ in names]
    for query, other in retrieval(
        names, vectors, k=k, local=local, database=(names, vectors), database_local=local
    ):
        found[index[query]].add(index[other])
    right = sum(len(a & b) for a, b in zip(found, truth, strict=True))
    return right / max(1, sum(map(len, truth)))


def measure(scene: Path, options: BenchmarkOptions) -> str:
    """One line of the table."""
    image_set = image_module.scan(scene / "images")
    centres, axes, names = _positions(scene, image_set)
    matcher = matchers.load_sparse(options.matcher, quality=options.quality)
    encodings = engine.encode(
        matcher,
        names,
        lambda name: image_module.load(image_set[name], matcher.image_options),
        workers=engine.default_workers(matcher.device, deterministic=False),
    )
    local = {name: encoding.descriptors.cpu().numpy() for name, encoding in encodings}
    return row(
        scene.name, names, local, true_neighbours(centres, axes, options.neighbours), options
    )


def row(
    scene: str,
    names: Sequence[str],
    local: Mapping[str, np.ndarray],
    truth: Sequence[set[int]],
    options: BenchmarkOptions,
) -> str:
    """One line of the table from local descriptors."""
    k = options.neighbours
    vectors = vlad([local[name] for name in names])
    start = time.process_time()
    before = recall(names, vectors, truth, k, None)
    alone, start = time.process_time() - start, time.process_time()
    after = recall(names, vectors, truth, k, local)
    compared = len(names) * min(3 * k, len(names) - 1)
    ms = 1000 * (time.process_time() - start - alone) / compared
    return f"| {scene} | {len(names)} | {before:.2f} | {after:.2f} | {ms:.2f} |"


def _positions(
    scene: Path, image_set: image_module.ImageSet
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Camera centres, viewing axes if known, and names of the images that have them."""
    if (scene / "gt").is_dir():
        cameras = colmap.model_cameras(scene / "gt")
        names = [name for name in image_set.names if name in cameras]
        poses = [cameras[name] for name in names]
        return np.array([-r.T @ t for r, t in poses]), np.array([r[2] for r, _ in poses]), names
    names = [record.name for record in image_set if record.exif.gps is not None]
    if len(names) < 2:
        raise InputError(f"{scene} has neither gt/ nor images with a GPS position.")
    positions = [image_set[name].exif.gps for name in names]
    return np.array([earth_centred_m(*p[:2]) for p in positions if p is not None]), None, names


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(BenchmarkOptions, prog="retrieval", args=common.prog(argv))
    common.configure_logging()

    def work() -> int:
        k = options.neighbours
        print(f"| scene | images | VLAD recall@{k} | re-ranked recall@{k} | processor ms a pair |")
        print("|---|---|---|---|---|")
        for scene in options.scenes:
            print(measure(scene, options), flush=True)
        print(f"\n{machine()}; {versions()}")
        return 0

    return common.run(work)


if __name__ == "__main__":
    sys.exit(main())
