"""Anchored tracks against hloc's quantised ones, on the same exact scene and the same warps.

    python -m gim_hloc.evaluation.benchmarks.tracks [--seed S --views N --sigma 0.5 1.0 --refine]

A synthetic dense matcher gives every pair one warp. ``tracks.quantized`` (hloc's aggregation,
number by number: ``tests/test_tracks_quantized.py``) gets matches drawn from it;
``tracks.anchored`` reads it at anchors and links. Both are judged alike:

* Points: matches farther than 4 px from the true epipolar lines are taken out, the rest joined into
  tracks, triangulated with the true cameras, robustly; observations off by more than 4 px are
  dropped. A point counts with three or more images; its error is its distance from the surface.
* Poses: COLMAP verifies, and maps incrementally with the true intrinsics and no known pose.

Keypoints of tier 1 are simulated (``scene.simulated_keypoints``), so that nothing but the tracks
differs. Processor time is that of aggregation, and of reading and linking; drawing the matches is
counted for nobody.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from gim_hloc import colmap
from gim_hloc.cli import common
from gim_hloc.errors import GimError
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks.measure import machine, now, versions
from gim_hloc.evaluation.benchmarks.scene import (
    Scene,
    SceneOptions,
    SyntheticDense,
    make_scene,
    simulated_keypoints,
)
from gim_hloc.geometry.epipolar import distances, essential_matrix
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.options import RereadOptions, VerifyOptions
from gim_hloc.tracks import anchored, base, quantized
from gim_hloc.tracks.base import Pair, Tracks

GATE_PX = 4.0
CELLS = {
    "cell 8 error 2": quantized.QuantizedOptions(),  # GIM's setting
    "cell 1 error 1": quantized.QuantizedOptions(max_error=1, cell_size=1),  # hloc's for LoFTR
}
"""Settings of hloc's aggregation."""


@dataclass(frozen=True, kw_only=True)
class TracksBenchmark:
    """Compare anchored tracks with hloc's on a synthetic scene."""

    seed: int = 0
    """Of the scene, the noise, the detector and the drawn matches."""
    views: int = 24
    """Images of the scene."""
    pairs: int | None = 115
    """Pairs matched, those of the most similar views."""
    sigma: tuple[float, ...] = (0.5, 1.0)
    """Noise of the warps, px of the images (standard deviation in each axis)."""
    samples: int = 5000
    """Matches drawn per pair for hloc; GIM draws 8192."""
    width: int = 1600
    """Width of the images, px; the height is three quarters of it."""
    grid: tuple[int, int] = (576, 768)
    """(height, width) of the warps."""
    max_keypoints: int = 12288
    """Keypoints an image of anchored tracks; hloc's limit is 8192."""
    refine: bool = False
    """Also refine the anchored model by reading the warps again, and show its poses."""


# ------------------------------------------------------------------------------------- judging


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Points of tracks, see the module."""

    views: np.ndarray  # (P,) images of each point
    error: np.ndarray  # (P,) distance from the surface
    two_view: float  # share of the tracks


def judge(tracks: Tracks, scene: Scene) -> Judgement:
    """Triangulate tracks with the true cameras and compare the points with the true surface."""
    names = list(tracks.keypoints)
    kept = {
        pair: rows[epipolar_error(scene, pair, tracks, rows) <= GATE_PX]
        for pair, rows in tracks.matches.items()
    }
    track, image, row = base.components([len(xy) for xy in tracks.keypoints.values()], names, kept)
    lengths = np.bincount(np.unique(np.stack([track, image]), axis=1)[0])
    order = np.argsort(image, kind="stable")
    track, image, row = track[order], image[order], row[order]
    xy = np.concatenate([tracks.keypoints[name][row[image == i]] for i, name in enumerate(names)])
    xyz, good = triangulate(scene, names, track, image, xy.astype(np.float64))
    seen = np.unique(np.stack([track[good], image[good]]), axis=1)[0]
    views = np.bincount(seen, minlength=len(xyz))
    usable = (views >= 3) & np.isfinite(xyz).all(1)
    return Judgement(
        views=views[usable],
        error=scene.distance(xyz[usable]),
        two_view=float((lengths == 2).mean()) if len(lengths) else math.nan,
    )


def epipolar_error(scene: Scene, pair: Pair, tracks: Tracks, rows: np.ndarray) -> np.ndarray:
    """Distances (M,) in px of matches from the true epipolar lines, the larger of both images'."""
    a, b = (scene.views[name] for name in pair)
    motion = relative_pose(a.rotation, a.translation, b.rotation, b.translation)
    ends = [
        (tracks.keypoints[name][rows[:, k]] - view.principal) / view.focal
        for k, (name, view) in enumerate(zip(pair, (a, b), strict=True))
    ]
    in_a, in_b = distances(essential_matrix(*motion), *ends)
    return np.maximum(in_b * b.focal, in_a * a.focal)


def triangulate(
    scene: Scene, names: Sequence[str], track: np.ndarray, image: np.ndarray, xy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points (T, 3) of tracks, and which observations (K,) lie within ``GATE_PX`` of them.

    Linear start, then Gauss-Newton on reprojection errors under a Cauchy loss of 1 px, then
    without the observations beyond the gate.
    """
    count = int(track.max(initial=-1)) + 1
    poses = [scene.views[name] for name in names]
    rotation = np.array([view.rotation for view in poses])[image]
    translation = np.array([view.translation for view in poses])[image]
    focal = np.array([view.focal for view in poses])[image]
    ray = (xy - np.array([view.principal for view in poses])[image]) / focal[:, None]

    def solve(rows: np.ndarray, right: np.ndarray, weight: np.ndarray) -> np.ndarray:
        normal = np.zeros((count, 3, 3))
        vector = np.zeros((count, 3))
        for i in range(3):
            vector[:, i] = np.bincount(
                track, weight * (rows[:, :, i] * right).sum(1), minlength=count
            )
            for j in range(i, 3):
                normal[:, i, j] = normal[:, j, i] = np.bincount(
                    track, weight * (rows[:, :, i] * rows[:, :, j]).sum(1), minlength=count
                )
        # Points without a usable observation stay where they are.
        normal += np.eye(3) * (1e-9 * np.trace(normal, axis1=1, axis2=2) + 1e-9)[:, None, None]
        return np.asarray(np.linalg.solve(normal, vector[..., None])[..., 0])

    def reproject(xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        local = np.einsum("kij,kj->ki", rotation, xyz[track]) + translation
        depth = local[:, 2]
        safe = np.where(depth > 1e-3, depth, 1e-3)
        seen = local[:, :2] / safe[:, None]
        error = (ray - seen) * focal[:, None]
        jacobian = (rotation[:, :2] - seen[..., None] * rotation[:, 2:]) * (focal / safe)[
            :, None, None
        ]
        norm = np.where(depth > 1e-3, np.linalg.norm(error, axis=1), np.inf)
        return error, jacobian, norm

    xyz = solve(
        rotation[:, :2] - ray[..., None] * rotation[:, 2:],
        ray * translation[:, 2:] - translation[:, :2],
        np.ones(len(track)),
    )
    good = np.ones(len(track), dtype=bool)
    for step in range(14):
        error, jacobian, norm = reproject(xyz)
        if step >= 8:
            good = norm <= GATE_PX
        weight = np.where(np.isfinite(norm), 1 / (1 + np.where(good, norm, 0) ** 2), 0) * good
        xyz = xyz + solve(jacobian, error, weight)
    return xyz, reproject(xyz)[2] <= GATE_PX


# ------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What both ways are given."""

    scene: Scene
    pairs: list[Pair]
    anchors: dict[str, anchored.Anchors]
    readings: dict[Pair, anchored.PairReading]
    drawn: dict[Pair, tuple[np.ndarray, np.ndarray, np.ndarray]]  # ends and scores
    warp: Callable[[str, str], Any]
    read_s: float  # processor seconds of all readings


def prepare(options: TracksBenchmark, sigma: float, *, draw: bool = True) -> Inputs:
    """Make the scene and match all its pairs."""
    size = (options.width, options.width * 3 // 4)
    scene = make_scene(SceneOptions(views=options.views, size=size, seed=options.seed))
    matcher = SyntheticDense.for_scene(
        scene,
        size=options.grid,
        noise_px=sigma,
        num_matches=options.samples,
        noise_seed=options.seed,
        seed=options.seed,
    )
    encodings = {name: matcher.encode(matcher.blank_image(name)) for name in scene.names}
    settings = anchored.AnchoredOptions()
    number = round(2048 * (options.width / 1600) ** 2)
    anchors = {
        name: anchored.make_anchors(size, xy, scores, None, settings)
        for name, (xy, scores) in simulated_keypoints(
            scene, number=number, seed=options.seed
        ).items()
    }
    pairs = scene.pairs(options.pairs)
    readings, drawn, read_s = {}, {}, 0.0
    for a, b in pairs:
        warp = matcher.warp(encodings[a], encodings[b])
        start = time.process_time()
        readings[a, b] = anchored.read_pair(warp, anchors[a], anchors[b], settings)
        read_s += time.process_time() - start
        if draw:
            found = matcher.draw(warp, encodings[a], encodings[b])
            ends = found.keypoints0.numpy(), found.keypoints1.numpy()
            drawn[a, b] = (*ends, found.scores.numpy())
    return Inputs(
        scene=scene,
        pairs=pairs,
        anchors=anchors,
        readings=readings,
        drawn=drawn,
        warp=lambda a, b: matcher.warp(encodings[a], encodings[b]),
        read_s=read_s,
    )


def map_tracks(
    tracks: Tracks, inputs: Inputs, folder: Path, refine: Any = None
) -> sfm.SfmScores | None:
    """Verify and map with COLMAP; None where it finds no model.

    ``refine`` is called with the model and its fixed images before it is judged.
    """
    scene = inputs.scene
    view = scene.views[scene.names[0]]
    principal = (float(x) + 0.5 for x in view.principal)
    camera = colmap.CameraSpec(
        model="PINHOLE",
        width=view.width,
        height=view.height,
        params=(view.focal, view.focal, *principal),
        prior=True,
        given=True,
        names=list(scene.names),
    )
    folder.mkdir(parents=True)
    colmap.build_database(
        folder / "database.db",
        cameras=[camera],
        names=scene.names,
        keypoints=lambda name: tracks.keypoints[name],
        matches=tracks.triples(),
        verify=VerifyOptions(),
    )
    job = colmap.MapJob(
        database=folder / "database.db", cameras=[camera], threads=1, log_dir=folder / "log"
    )
    try:
        model = colmap.run_mapping(job).models[0]
    except GimError:
        return None
    if refine is not None:
        with colmap.colmap_log(job.log_dir):
            refine(model, job.fixed)
    colmap.write_model(model, folder / "sparse" / "0")
    return sfm.evaluate(folder / "sparse" / "0", scene.poses)


def refinement(inputs: Inputs) -> Callable[[Any, set[int]], str]:
    """What ``map_tracks`` calls to read the warps again."""
    return lambda model, fixed: colmap.refine_by_warps(
        model, inputs.warp, inputs.pairs, options=RereadOptions(), fixed=fixed, threads=1
    )


# -------------------------------------------------------------------------------------- report

COLUMNS = (
    *("sigma px", "tracks", "points >= 3 views", "images a point", "two-view tracks", "median mm"),
    *("CPU ms/pair", "kB/pair", "registered", "rotation deg", "centre %", "COLMAP points"),
)


def measured(options: TracksBenchmark, sigma: float, folder: Path) -> list[list[Any]]:
    """Rows of the table at one noise."""
    inputs = prepare(options, sigma)
    count = len(inputs.pairs)

    def row(
        name: str, tracks: Tracks, seconds: float, size: float, refine: Any = None
    ) -> list[Any]:
        judged = judge(tracks, inputs.scene)
        scores = map_tracks(tracks, inputs, folder / f"{sigma} {name}", refine)
        poses = [0, math.nan, math.nan, 0]
        if scores is not None:
            centre = scores.centre_radius_percent.mean
            poses = [scores.registered, scores.rotation.mean, centre, scores.points]
        points = [len(judged.error), judged.views.mean(), judged.two_view]
        error = float(np.median(judged.error)) * 1e3
        return [sigma, name, *points, error, seconds / count * 1e3, size / count / 1e3, *poses]

    rows = []
    raw_bytes = sum(array.nbytes for arrays in inputs.drawn.values() for array in arrays)
    for name, settings in CELLS.items():
        start = time.process_time()
        tracks = quantized.quantize(inputs.scene.names, inputs.drawn, settings)
        seconds = time.process_time() - start
        # hloc also stores matches0 (int32) and scores (float16) up to the last matched keypoint.
        stored = sum(6 * (int(r[:, 0].max(initial=-1)) + 1) for r in tracks.matches.values())
        rows.append(row(f"quantized {name}", tracks, seconds, raw_bytes + stored))
    start = time.process_time()
    linking = anchored.AnchoredOptions(max_keypoints=options.max_keypoints)
    tracks = anchored.link(inputs.scene.names, inputs.anchors, inputs.readings, linking)
    seconds = inputs.read_s + time.process_time() - start
    size = sum(reading.nbytes for reading in inputs.readings.values())
    rows.append(row("anchored", tracks, seconds, size))
    if options.refine:
        rows.append(row("anchored, read again", tracks, seconds, size, refinement(inputs)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    options = tyro.cli(TracksBenchmark, prog="tracks", args=common.prog(argv))
    common.configure_logging()

    def run() -> int:
        torch.set_num_threads(1)  # so that processor time is the time of the work
        used = versions(["gim-hloc", "torch", "numpy", "scipy", "pycolmap"])
        sys.stdout.write(f"date: {now()}\nmachine: {machine()}\nversions: {used}\n\n")
        sys.stdout.write(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n")
        with tempfile.TemporaryDirectory() as folder:
            for sigma in options.sigma:
                for row in measured(options, sigma, Path(folder)):
                    cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
                    sys.stdout.write(f"| {' | '.join(cells)} |\n")
        return 0

    return common.run(run)


if __name__ == "__main__":
    sys.exit(main())
