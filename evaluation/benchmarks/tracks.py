"""Anchored tracks against hloc's quantised ones, on the same exact scene and the same warps.

    python -m gim_hloc.evaluation.benchmarks.tracks [--seed S --views N --sigma 0.5 1.0]
        [--hloc CHECKOUT --with-hloc TOOL.py --hloc-python PYTHON]

A synthetic dense matcher gives every pair one warp. hloc gets matches drawn from it by
``DenseMatcher.draw``, aggregates them and assigns them; ours reads it at anchors and links. Both
are then judged alike:

* Points: matches farther than 4 px from the *true* epipolar lines are taken out (which no real
  verification could do as well, for both alike), the rest joined into tracks, triangulated with
  the true cameras, robustly; observations off by more than 4 px are dropped. A point counts with
  three or more images; its error is its distance from the true surface.
* Poses: COLMAP verifies, and maps incrementally with the true intrinsics and no known pose.

The keypoints of tier 1 are simulated (``synthetic_dense.simulated_keypoints``: 60 % repeatable,
0.5 px noise, 20 % clutter), so that nothing but the tracks differs and the noise of every part is
known; ``--detector none`` leaves anchors to the grid alone. Time of hloc is that of its two steps
alone, ours that of reading and linking; drawing the matches, which only hloc's way needs, is
counted for nobody and shown in a column of its own.

Without a checkout of hloc the comparison is with ``tracks.quantized``, which gives hloc's result
(``tests/test_tracks_quantized.py``); the bounds on time, which need hloc, are then not judged.
Exit code 1 means that a bound was missed, 2 that a program failed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from gim_hloc import colmap
from gim_hloc.cli import common
from gim_hloc.errors import GimError, InputError
from gim_hloc.evaluation import sfm, synthetic_dense
from gim_hloc.evaluation.benchmarks import measure
from gim_hloc.evaluation.synthetic_dense import Scene, SceneOptions, SyntheticDense
from gim_hloc.geometry.epipolar import distances, essential_matrix
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.options import RereadOptions, VerifyOptions
from gim_hloc.tracks import anchored, base, quantized
from gim_hloc.tracks.base import Pair, Tracks

DRIVER = Path(__file__).with_name("_hloc_tracks_driver.py")
PACKAGES = ("gim-hloc", "torch", "numpy", "scipy", "pycolmap")
GATE_PX = 4.0
CELLS = {
    "cell 8 error 2": quantized.QuantizedOptions(),  # GIM's setting
    "cell 1 error 1": quantized.QuantizedOptions(max_error=1, cell_size=1),  # hloc's for LoFTR
}
"""Settings of hloc's aggregation."""

Raw = dict[Pair, tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Compare anchored tracks with hloc's on a synthetic scene."""

    seed: int = 0
    """Of the scene, the noise, the detector and the drawn matches."""
    views: int = 24
    """Images of the scene."""
    pairs: int | None = 115
    """Pairs matched, those of the most similar views; scaled with the views unless given."""
    sigma: tuple[float, ...] = (0.5, 1.0)
    """Noise of the warps, px of the images (standard deviation in each axis)."""
    outliers: float = 0.05
    """Share of the blocks of a warp that point elsewhere."""
    wrong: float = 0.0
    """Share of larger blocks that both directions shift alike, with full certainty."""
    samples: int = 5000
    """Matches drawn per pair for hloc; GIM draws 8192."""
    detector: Literal["simulated", "none"] = "simulated"
    """Keypoints of tier 1."""
    width: int = 1600
    """Width of the images, px; the height is three quarters of it."""
    grid: tuple[int, int] = (576, 768)
    """(height, width) of the warps."""
    max_keypoints: int = 12288
    """Keypoints an image of anchored tracks, gim-reconstruct's default; hloc's limit is 8192."""
    mapping: bool = True
    """Let COLMAP map, too."""
    refine: bool = False
    """Also refine the anchored model by reading the warps again, and show its poses."""
    hloc: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Checkout of cvg/Hierarchical-Localization; GIM_HLOC_HLOC_CHECKOUT without."""
    with_hloc: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Script that runs another with hloc importable; GIM_HLOC_WITH_HLOC without."""
    hloc_python: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Python of hloc's environment; GIM_HLOC_HLOC_PYTHON without."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every number to this file."""

    min_points_ratio: float = 5.0
    """Bound: points of three or more images, ours over hloc's with cell 8."""
    max_error_ratio: float = 0.5
    """Bound: median 3D error, ours over hloc's with cell 8."""
    max_two_view_share: float = 0.2
    """Bound: share of our tracks that have two images."""
    max_time_ratio: float = 0.2
    """Bound: processor time per pair, ours over hloc's."""
    max_bytes_ratio: float = 0.4
    """Bound: bytes stored per pair, ours over hloc's."""
    max_pose_ratio: float = 0.5
    """Bound: mean rotation and centre error, ours over quantised tracks'."""
    max_quantized_time_ratio: float = 0.1
    """Bound: processor time of ``quantized`` over hloc's for the same result."""


@dataclass(kw_only=True)
class Row:
    """One method on one scene. Numbers that were not measured are NaN."""

    method: str
    sigma: float
    points: int = 0  # of three or more images
    length: float = math.nan  # mean images of these points
    two_view: float = math.nan  # share of the tracks
    within: float = math.nan  # share of points with an error of at most two pixels' size
    median_mm: float = math.nan
    ms: float = math.nan  # processor time per pair
    kb: float = math.nan  # stored per pair
    registered: int = -1
    rotation_deg: float = math.nan  # mean
    centre_percent: float = math.nan  # mean, of the scene's radius
    mapped_points: int = -1


@dataclass(kw_only=True)
class Judgement:
    """Points of tracks, see the module."""

    xyz: np.ndarray  # (P, 3)
    views: np.ndarray  # (P,) images of each point
    error: np.ndarray  # (P,) distance from the surface
    two_view: float


# ------------------------------------------------------------------------------------- judging


def judge(tracks: Tracks, scene: Scene) -> Judgement:
    """Triangulate tracks with the true cameras and compare the points with the true surface."""
    names = list(tracks.keypoints)
    kept = {
        pair: rows[epipolar_error(scene, pair, tracks, rows) <= GATE_PX]
        for pair, rows in tracks.matches.items()
    }
    counts = [len(tracks.keypoints[name]) for name in names]
    track, image, row = base.components(counts, names, kept)
    lengths = np.zeros(0, np.int64)
    if len(track):
        both = np.unique(np.stack([track, image]), axis=1)
        lengths = np.bincount(both[0])
    xy = (
        np.concatenate([tracks.keypoints[names[i]][row[image == i]] for i in range(len(names))])
        if len(track)
        else np.zeros((0, 2))
    )
    order = np.argsort(image, kind="stable")
    track, image = track[order], image[order]
    xyz, good = triangulate(scene, names, track, image, xy.astype(np.float64))
    both = np.unique(np.stack([track[good], image[good]]), axis=1)
    views = np.bincount(both[0], minlength=len(xyz))
    usable = (views >= 3) & np.isfinite(xyz).all(1)
    return Judgement(
        xyz=xyz[usable],
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


@dataclass(kw_only=True)
class Inputs:
    """What both sides are given, and what making it took (processor seconds per pair)."""

    scene: Scene
    pairs: list[Pair]
    anchors: dict[str, anchored.Anchors]
    readings: dict[Pair, anchored.PairReading]
    raw: Raw
    warp: Callable[[str, str], Any] = field(repr=False)
    seconds: dict[str, float]


def prepare(options: BenchmarkOptions, sigma: float, *, draw: bool = True) -> Inputs:
    """Make the scene and match all its pairs."""
    size = (options.width, options.width * 3 // 4)
    scene = synthetic_dense.make_scene(
        SceneOptions(views=options.views, size=size, seed=options.seed)
    )
    count = options.pairs
    if count is not None and options.views != 24:
        count = round(count * options.views / 24)
    pairs = scene.pairs(count)
    matcher = SyntheticDense.for_scene(
        scene,
        size=options.grid,
        noise_px=sigma,
        outlier_share=options.outliers,
        wrong_share=options.wrong,
        num_matches=options.samples,
        noise_seed=options.seed,
        seed=options.seed,
    )
    encodings = {name: matcher.encode(matcher.blank_image(name)) for name in scene.names}
    settings = anchored.AnchoredOptions()
    if options.detector == "simulated":
        number = round(2048 * (options.width / 1600) ** 2)
        keypoints = synthetic_dense.simulated_keypoints(scene, number=number, seed=options.seed)
    else:
        nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.float32)
        keypoints = dict.fromkeys(scene.names, nothing)
    anchors = {
        name: anchored.make_anchors(size, xy, scores, None, settings)
        for name, (xy, scores) in keypoints.items()
    }
    seconds = dict.fromkeys(("warp", "read", "draw"), 0.0)
    readings, raw = {}, {}
    for a, b in pairs:
        with _Clock(seconds, "warp"):
            warp = matcher.warp(encodings[a], encodings[b])
        with _Clock(seconds, "read"):
            readings[a, b] = anchored.read_pair(warp, anchors[a], anchors[b], settings)
        if draw:
            with _Clock(seconds, "draw"):
                found = matcher.draw(warp, encodings[a], encodings[b])
            raw[a, b] = tuple(
                tensor.numpy() for tensor in (found.keypoints0, found.keypoints1, found.scores)
            )
    return Inputs(
        scene=scene,
        pairs=pairs,
        anchors=anchors,
        readings=readings,
        raw=raw,
        warp=lambda a, b: matcher.warp(encodings[a], encodings[b]),
        seconds={name: value / len(pairs) for name, value in seconds.items()},
    )


class _Clock:
    """Adds the processor time of a block to ``into[name]``."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.begin = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = self.into.get(self.name, 0.0) + time.process_time() - self.begin


def write_raw(raw: Raw, path: Path) -> None:
    """Write matches as hloc's ``match_dense`` leaves them for the aggregation."""
    import h5py

    with h5py.File(path, "w") as file:
        for (a, b), arrays in raw.items():
            group = file.create_group(_key(a, b))
            for name, array in zip(("keypoints0", "keypoints1", "scores"), arrays, strict=True):
                group.create_dataset(name, data=array)


def _key(a: str, b: str) -> str:
    return f"{a.replace('/', '-')}/{b.replace('/', '-')}"


def quantize_files(
    names: Sequence[str], pairs: Sequence[Pair], matches: Path, options: quantized.QuantizedOptions
) -> Tracks:
    """``quantized`` with the reading and writing that hloc's time holds, too."""
    import h5py

    with h5py.File(matches, "a") as file:
        raw = {
            (a, b): tuple(group[name][:] for name in ("keypoints0", "keypoints1", "scores"))
            for a, b in pairs
            for group in [file[_key(a, b)]]
        }
        tracks = quantized.quantize(names, raw, options)
        for (a, b), rows in tracks.matches.items():
            matches0 = np.full(int(rows[:, 0].max(initial=-1)) + 1, -1, np.int32)
            scores0 = np.zeros(len(matches0), np.float16)
            matches0[rows[:, 0]], scores0[rows[:, 0]] = rows[:, 1], tracks.scores[a, b]
            group = file[_key(a, b)]
            group.create_dataset("matches0", data=matches0)
            group.create_dataset("matching_scores0", data=scores0)
    return tracks


def read_hloc(folder: Path, names: Sequence[str], pairs: Sequence[Pair]) -> tuple[Tracks, float]:
    """What hloc left, and the bytes per pair of its match file's arrays."""
    import h5py

    keypoints, values = {}, {}
    with h5py.File(folder / "features.h5") as file:
        for name in names:
            found = name in file
            keypoints[name] = np.zeros((0, 2), np.float32)
            values[name] = np.zeros(0, np.float32)
            if found:
                keypoints[name] = file[name]["keypoints"][:].reshape(-1, 2)
                values[name] = file[name]["score"][:]
    matches, scores, size = {}, {}, 0
    with h5py.File(folder / "matches.h5") as file:
        for a, b in pairs:
            group = file[_key(a, b)]
            size += sum(dataset.nbytes for dataset in group.values())
            matches0 = group["matches0"][:]
            rows = np.flatnonzero(matches0 >= 0)
            matches[a, b] = np.stack([rows, matches0[rows]], 1).astype(np.int64)
            scores[a, b] = group["matching_scores0"][:][rows].astype(np.float32)
    tracks = Tracks(keypoints=keypoints, matches=matches, scores=scores, keypoint_scores=values)
    return tracks, size / max(1, len(pairs))


def run_hloc(
    options: BenchmarkOptions, inputs: Inputs, folder: Path
) -> dict[str, tuple[Tracks, float, float]]:
    """Let the real hloc aggregate in all ways of ``CELLS``.

    Returns:
        key of ``CELLS`` -> its tracks, processor seconds per pair, bytes per pair.

    Raises:
        BenchmarkError: it failed.
    """
    write_raw(inputs.raw, folder / "raw.h5")
    (folder / "pairs.txt").write_text("\n".join(f"{a} {b}" for a, b in inputs.pairs))
    paths = hloc_paths(options)
    command: list[str | Path] = [paths["python"], paths["tool"], paths["checkout"], DRIVER]
    settings = {cell: f"{v.cell_size:g}:{v.max_error:g}" for cell, v in CELLS.items()}
    command += [folder / "raw.h5", folder / "pairs.txt", folder / "hloc", "8192"]
    command += settings.values()
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    measure.measured_run(command, log=folder / "hloc.log", environment=environment)
    result = json.loads((folder / "hloc" / "timings.json").read_text())
    _say("hloc: " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    found = {}
    for cell, setting in settings.items():
        tracks, size = read_hloc(
            folder / "hloc" / setting.replace(":", "-"), inputs.scene.names, inputs.pairs
        )
        found[cell] = (tracks, result["seconds"][setting] / len(inputs.pairs), size)
    return found


def hloc_paths(options: BenchmarkOptions) -> dict[str, Path]:
    """Checkout, tool and Python of hloc, from the options or the environment; empty without."""
    given = {
        "checkout": options.hloc or os.environ.get("GIM_HLOC_HLOC_CHECKOUT"),
        "tool": options.with_hloc or os.environ.get("GIM_HLOC_WITH_HLOC"),
        "python": options.hloc_python or os.environ.get("GIM_HLOC_HLOC_PYTHON"),
    }
    if not given["checkout"]:
        return {}
    missing = [name for name, value in given.items() if not value or not Path(value).exists()]
    if missing:
        raise InputError(
            "To run hloc, give --hloc, --with-hloc and --hloc-python (or the environment variables "
            f"of their help) and let them exist; missing: {', '.join(missing)}."
        )
    return {name: Path(str(value)) for name, value in given.items()}


def poses(row: Row, tracks: Tracks, inputs: Inputs, folder: Path, refine: Any = None) -> None:
    """Verify and map with COLMAP, and put the errors into ``row``."""
    names = inputs.scene.names
    view = inputs.scene.views[names[0]]
    principal = view.principal + 0.5
    camera = colmap.CameraSpec(
        model="PINHOLE",
        width=view.width,
        height=view.height,
        params=(view.focal, view.focal, float(principal[0]), float(principal[1])),
        prior=True,
        given=True,
        names=list(names),
    )
    folder.mkdir(parents=True)
    colmap.build_database(
        folder / "database.db",
        cameras=[camera],
        names=names,
        keypoints=lambda name: tracks.keypoints[name],
        matches=tracks.triples(),
        verify=VerifyOptions(),
    )
    try:
        job = colmap.MapJob(
            database=folder / "database.db", cameras=[camera], threads=1, log_dir=folder / "log"
        )
        models = colmap.run_mapping(job).models
    except GimError as error:
        _say(f"{row.method}: {error}")
        row.registered = 0
        return
    if refine is not None:
        with colmap.colmap_log(job.log_dir):
            refine(models[0], job.fixed)
    colmap.write_model(models[0], folder / "sparse" / "0")
    scores = sfm.evaluate(folder / "sparse" / "0", inputs.scene.poses)
    row.registered = scores.registered
    row.rotation_deg = scores.rotation.mean
    row.centre_percent = scores.centre_radius_percent.mean
    row.mapped_points = scores.points


def measure_sigma(options: BenchmarkOptions, sigma: float, folder: Path) -> list[Row]:
    """All methods at one noise."""
    inputs = prepare(options, sigma)
    scene, names, pairs = inputs.scene, inputs.scene.names, inputs.pairs
    _say(
        f"sigma {sigma:g} px, {len(names)} views, {len(pairs)} pairs: "
        + ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in inputs.seconds.items())
        + " of processor time per pair"
    )
    rows: list[Row] = []
    per_pair = 1e3 / len(pairs)

    def add(method: str, tracks: Tracks, ms: float, size: float, mapped: bool) -> Row:
        judged = judge(tracks, scene)
        row = Row(
            method=method,
            sigma=sigma,
            points=len(judged.error),
            length=float(judged.views.mean()) if len(judged.views) else math.nan,
            two_view=judged.two_view,
            within=float((judged.error <= 0.005).mean()) if len(judged.error) else math.nan,
            median_mm=float(np.median(judged.error)) * 1e3 if len(judged.error) else math.nan,
            ms=ms,
            kb=size / 1e3,
        )
        if mapped and options.mapping:
            poses(row, tracks, inputs, folder / f"{sigma:g} {method}".replace(" ", "-"))
        rows.append(row)
        _say("  " + line(row))
        return row

    theirs = {}
    work = folder / f"hloc-{sigma:g}"
    work.mkdir()
    if hloc_paths(options):
        theirs = run_hloc(options, inputs, work)
    for cell, values in CELLS.items():
        write_raw(inputs.raw, work / "ours.h5")
        clock: dict[str, float] = {}
        with _Clock(clock, "quantize"):
            ours = quantize_files(names, pairs, work / "ours.h5", values)
        if theirs:
            tracks, seconds, size = theirs[cell]
            if not same(tracks, ours):
                raise measure.BenchmarkError(f"quantized differs from hloc ({cell})")
            row = add(f"hloc {cell}", tracks, seconds * 1e3, size, True)
            rows.append(dataclasses.replace(row, method=f"quantized {cell}"))
        else:
            add(f"quantized {cell}", ours, math.nan, _raw_bytes(inputs.raw, ours), True)
        rows[-1].ms = clock["quantize"] * per_pair
        if theirs:
            _say("  " + line(rows[-1]))

    size = float(np.mean([reading.nbytes for reading in inputs.readings.values()]))
    clock = {}
    with _Clock(clock, "link"):
        linking = anchored.AnchoredOptions(max_keypoints=options.max_keypoints)
        tracks = anchored.link(names, inputs.anchors, inputs.readings, linking)
    ms = inputs.seconds["read"] * 1e3 + clock["link"] * per_pair
    row = add("anchored", tracks, ms, size, True)
    if options.refine and options.mapping:
        rows.append(dataclasses.replace(row, method=f"{row.method} refined"))
        poses(rows[-1], tracks, inputs, folder / f"{sigma:g}-refined", _refinement(inputs))
        _say("  " + line(rows[-1]))
    return rows


def _refinement(inputs: Inputs) -> Callable[[Any, set[int]], str]:
    return lambda model, fixed: colmap.refine_by_warps(
        model, inputs.warp, inputs.pairs, options=RereadOptions(), fixed=fixed, threads=1
    )


def _raw_bytes(raw: Raw, tracks: Tracks) -> float:
    """Bytes per pair that hloc would store."""
    total = sum(array.nbytes for arrays in raw.values() for array in arrays)
    total += sum(6 * (int(rows[:, 0].max(initial=-1)) + 1) for rows in tracks.matches.values())
    return total / len(raw)


def same(theirs: Tracks, ours: Tracks) -> bool:
    """Whether ``quantized`` gave what hloc's files hold."""
    return all(
        np.array_equal(theirs.keypoints[name], ours.keypoints[name])
        and np.array_equal(theirs.keypoint_scores[name], ours.keypoint_scores[name])
        for name in theirs.keypoints
    ) and all(
        np.array_equal(rows, ours.matches[pair])
        and np.array_equal(theirs.scores[pair], ours.scores[pair].astype(np.float16))
        for pair, rows in theirs.matches.items()
    )


# -------------------------------------------------------------------------------------- report

HEADER = (
    "| sigma px | method | points >= 3 views | images a point | two-view tracks | <= 5 mm | "
    "median mm | CPU ms/pair | kB/pair | registered | rotation deg | centre % | COLMAP points |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """One row of the table."""

    def show(value: float, form: str, empty: bool = False) -> str:
        return (
            "" if empty or (isinstance(value, float) and math.isnan(value)) else f"{value:{form}}"
        )

    return (
        f"| {row.sigma:g} | {row.method} | {row.points} | {show(row.length, '.1f')} | "
        f"{show(row.two_view, '.1%')} | {show(row.within, '.1%')} | {show(row.median_mm, '.2f')} | "
        f"{show(row.ms, '.1f')} | {show(row.kb, '.1f')} | "
        f"{show(row.registered, 'd', row.registered < 0)} | {show(row.rotation_deg, '.4f')} | "
        f"{show(row.centre_percent, '.4f')} | "
        f"{show(row.mapped_points, 'd', row.mapped_points < 0)} |"
    )


def missed_bounds(rows: Sequence[Row], options: BenchmarkOptions) -> list[str]:
    """One sentence for each bound that is missed."""
    missed = []
    for sigma in dict.fromkeys(row.sigma for row in rows):
        found: Mapping[str, Row] = {row.method: row for row in rows if row.sigma == sigma}
        real = any(method.startswith("hloc") for method in found)
        ours = found["anchored"]

        def at_most(
            label: str, value: float, bound: float, theirs: float = 1, at: float = sigma
        ) -> None:
            if not value <= bound * theirs:
                missed.append(
                    f"sigma {at:g}: {label} is {value:.4g}, asked for at most {bound:g}"
                    + ("" if theirs == 1 else f" x {theirs:.4g}")
                )

        for cell in CELLS:
            theirs = found[f"{'hloc' if real else 'quantized'} {cell}"]
            if not ours.points >= options.min_points_ratio * theirs.points:
                missed.append(
                    f"sigma {sigma:g}: {ours.points} points against {theirs.points} of "
                    f"{theirs.method}, asked for at least {options.min_points_ratio:g} times"
                )
            at_most(
                f"median error, {cell},", ours.median_mm, options.max_error_ratio, theirs.median_mm
            )
            at_most(f"bytes per pair, {cell},", ours.kb, options.max_bytes_ratio, theirs.kb)
            if real:
                at_most(f"time per pair, {cell},", ours.ms, options.max_time_ratio, theirs.ms)
                own = found[f"quantized {cell}"].ms
                bound = options.max_quantized_time_ratio
                at_most(f"time of quantized, {cell},", own, bound, theirs.ms)
            if options.mapping:
                at_most_pose(at_most, cell, ours, theirs, options)
        at_most("share of two-view tracks", ours.two_view, options.max_two_view_share)
        if options.mapping and ours.registered != options.views:
            missed.append(
                f"sigma {sigma:g}: {ours.registered} of {options.views} images registered"
            )
    return missed


def at_most_pose(
    at_most: Callable[..., None], cell: str, ours: Row, theirs: Row, options: BenchmarkOptions
) -> None:
    """Compare poses with a model of as many images; a smaller one is no yardstick."""
    if theirs.registered < options.views:
        return
    for label, name in (("rotation", "rotation_deg"), ("centre", "centre_percent")):
        at_most(
            f"{label} error, {cell},",
            getattr(ours, name),
            options.max_pose_ratio,
            getattr(theirs, name),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    options = tyro.cli(BenchmarkOptions, prog="tracks", args=common.prog(argv))
    common.configure_logging()
    return common.run(lambda: _run(options))


def _run(options: BenchmarkOptions) -> int:
    if options.views < 4 or not options.sigma:
        raise InputError("Give at least 4 views and one sigma.")
    context = {
        "date": measure.now(),
        "commit": measure.commit(Path(__file__).parent),
        "machine": measure.machine(),
        "versions": measure.versions(PACKAGES),
    }
    for name, value in context.items():
        _say(f"{name}: {value}")
    if not hloc_paths(options):
        _say("no hloc: compared with quantized, which gives its result; times are not judged")
    rows: list[Row] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so that processor time is the time of the work
    try:
        with tempfile.TemporaryDirectory() as folder:
            for sigma in options.sigma:
                rows += measure_sigma(options, sigma, Path(folder))
    finally:
        torch.set_num_threads(before)
    _say("\n" + HEADER + "\n" + "\n".join(map(line, rows)))
    missed = missed_bounds(rows, options)
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        result = {**context, "settings": settings, "missed": missed, "rows": list(map(vars, rows))}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(sfm.plain(result), indent=1) + "\n")
    for sentence in missed:
        _say("missed: " + sentence)
    _say("every bound is met" if not missed else f"{len(missed)} bounds are missed")
    return 1 if missed else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
