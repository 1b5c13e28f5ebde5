"""How right labels of a video are, before and after propagation, and how far propagation reaches.

    python -m gim_hloc.evaluation.benchmarks.video_labels room --out room.json
    python -m gim_hloc.evaluation.benchmarks.video_labels orbit --plot orbit.png
    python -m gim_hloc.evaluation.benchmarks.video_labels fox --data ../shared/data

``room`` renders a walk through the example room (needs open3d), where the true place of every label
is known: the depth of the pixel and the poses of both frames carry it over. ``orbit`` goes on an
arc before a wall of that room, from 60 degrees on one side of it to 60 degrees on the other;
``roll`` is the same arc while the camera is turned from landscape to upright; ``approach`` walks up
to a picture until it is nine times as large. These three are made to be too much for matching the
two ends.
``fox`` is a video of a hand-held telephone with reference poses from COLMAP, which tell how far a
label is from its epipolar line, not where on it. All are labelled and propagated as ``gim-video``
does it. The same labellers then match the very pairs of frames that propagation reached, directly,
by the same fit; and, distance by distance, the same pairs are asked of both (``reach``).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks.measure import machine, now, versions
from gim_hloc.files import write_atomic
from gim_hloc.geometry.epipolar import distances, essential_matrix
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.options import to_mapping
from gim_hloc.poses import read_poses
from gim_hloc.training.video.folder import VideoFolder
from gim_hloc.training.video.labels import LabelTask
from gim_hloc.training.video.masks import FrameMasks
from gim_hloc.training.video.options import LabelOptions, PropagationOptions, SamplingOptions
from gim_hloc.training.video.propagated import PropagatedStore
from gim_hloc.training.video.propagation import (
    Propagator,
    StoredLabels,
    propagate_video,
    rounds_by_step,
)
from gim_hloc.training.video.run import label_video
from gim_hloc.training.video.sources import find_source
from gim_hloc.training.video.store import LabelStore

logger = logging.getLogger(__name__)

Error = Callable[[int, int, np.ndarray], np.ndarray]
"""(i, j, labels (n, 4)) -> (n,) distance from the truth in pixels; NaN where there is none."""

_LIMITS = (1.0, 2.0, 5.0)  # px
_ROOM_VIEWS = 240  # of the closed walk: 1.5 degrees a frame
_WALL = 2.6  # m: where the wall with the pictures is
_ORBIT_DEG = 120.0
_ROLL_DEG = 90.0  # on the way
_FAR, _NEAR = 4.8, 0.53  # m before the wall: nine times as large
_EDGE = 0.02  # share by which depths around a point may differ before it counts as an edge


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLabels:
    """Measure labels before and after propagation."""

    scene: tyro.conf.Positional[Literal["room", "orbit", "approach", "roll", "fox"]]
    """room, orbit, approach, roll: rendered, exact truth. fox: real, epipolar truth."""
    labellers: tuple[str, ...] = ("aliked_lightglue", "sift")
    """Names of matchers."""
    frames: int = 41
    """Frames of the video."""
    size: int = 480
    """Long side of the frames in pixels."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Frames between those of a labelled pair."""
    preset: Literal["code", "paper"] = "code"
    """Constants of propagation."""
    min_joined: int | None = None
    """Labels that must survive a join; the preset's by default."""
    apart: tuple[int, ...] = ()
    """Distances in frames at which chains and direct matches are compared; a tenth of the video and
    its multiples by default."""
    zoom: bool = True
    """Also zoom rounds."""
    reach_joined: int = 16
    """Labels that must survive a join in that comparison: few, so that the decay is seen."""
    enough: tuple[int, ...] = (64, 128, 256)
    """Correct labels up to whose last distance the reach of each is told."""
    plot: Path | None = None
    """Picture of that comparison (needs matplotlib)."""
    data: Path = Path("../shared/data")
    """Folder with video/ and fox/."""
    examples: Path = Path("examples")
    """Folder of render_room.py."""
    work: Path = Path(tempfile.gettempdir()) / "gim_hloc_video_labels"
    """Folder of frames and labels, which are kept."""
    out: Path | None = None
    """JSON file of all figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Labels of one kind."""

    kind: str  # e.g. "aliked_lightglue zoom", "propagated", "direct"
    distance: str  # frames between the two of a pair
    pairs: int  # with labels
    of: int  # pairs that were tried
    labels: float  # mean over pairs that were tried
    within: tuple[float, ...]  # share of the labels within 1, 2 and 5 px of the truth
    right: float  # labels within 2 px, mean over pairs that were tried

    def line(self) -> str:
        """A row of a Markdown table."""
        shares = " | ".join(f"{100 * share:.1f}" for share in self.within)
        return (
            f"| {self.kind} | {self.distance} | {self.pairs} / {self.of} | {self.labels:.0f} | "
            f"{shares} | {self.right:.0f} |"
        )


HEADER = (
    "| labels | frames apart | pairs | labels a pair | 1 px, % | 2 px, % | 5 px, % | within 2 px |"
    "\n|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = tyro.cli(
        VideoLabels,
        prog="python -m gim_hloc.evaluation.benchmarks.video_labels",
        args=common.prog(argv),
    )
    common.configure_logging()
    return common.run(lambda: _main(options))


def _main(options: VideoLabels) -> int:
    began = time.perf_counter()
    name = f"{options.scene}-{options.frames}-{options.size}"
    if options.scene != "fox":
        clip, error = render_walk(options, options.work / name)
        sampling = SamplingOptions(gap=1, steps=options.steps, trim=0)
    else:
        clip = options.data / "video" / "fox_from_frames.mp4"
        error = fox_truth(options)
        sampling = SamplingOptions(gap=1, steps=options.steps, trim=0, limit=options.frames)
    rows, chains, reach = measure(clip, options, sampling, error)
    sys.stdout.write("\n".join([HEADER, *(row.line() for row in rows)]) + "\n")
    sys.stdout.write(f"chains: {json.dumps(chains)}\n")
    sys.stdout.write("\n".join(["", *reach_table(reach, options.enough)]) + "\n")
    if options.plot is not None:
        plot_reach(reach, options.plot, options.scene)
    if options.out is not None:
        report = {
            "at": now(),
            "machine": machine(),
            "versions": versions(["torch", "opencv-python-headless", "numpy", "av"]),
            "options": {key: str(v) for key, v in dataclasses.asdict(options).items()},
            "rows": [dataclasses.asdict(row) for row in rows],
            "chains": chains,
            "reach": [dataclasses.asdict(point) for point in reach],
            "seconds": round(time.perf_counter() - began, 1),
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


def measure(
    clip: Path, options: VideoLabels, sampling: SamplingOptions, error: Error
) -> tuple[list[Row], dict[str, Any], list[Reach]]:
    """Label, propagate and match directly; compare all of it with the truth.

    Args:
        clip: video file or folder.
        options: see there.
        sampling: frames and steps.
        error: the truth.

    Returns:
        Rows, figures about the chains, and the comparison distance by distance.
    """
    label_options = LabelOptions(
        **to_mapping(sampling),
        labellers=options.labellers,
        zoom=options.zoom,
        masks="none",
        max_size=options.size,
        format="png",
    )
    report = label_video(
        find_source(str(clip)), options.work / "labels", label_options, progress=True
    )
    folder = report.folder
    rows: list[Row] = []
    stores = folder.stores(options.labellers)
    for store in stores:
        kind = store.info.labeller + (" zoom" if store.info.zoom else "")
        rows += _rows(kind, ((s, i, j, _read(store, i, j)) for s, i, j in _by_step(report)), error)
    rows += _rows(
        "all rounds",
        (
            (s, i, j, np.concatenate([_read(store, i, j) for store in stores]))
            for s, i, j in _by_step(report)
        ),
        error,
    )
    target = folder.root / f"propagated-{options.preset}-{options.min_joined}.h5"
    constants = PropagationOptions(preset=options.preset, min_joined=options.min_joined)
    summary = propagate_video(rounds_by_step(stores), target, constants)
    with PropagatedStore(target) as propagated:
        chained = {}
        for a, b in propagated.pairs().tolist():
            labels, reached = propagated.read(a, b)
            chained[reached] = labels
    distances = sorted(j - i for i, j in chained)
    chains = {
        "starts": len(summary.records),
        "propagated": len(chained),
        "frames reached": _quantiles(distances),
        "labels": _quantiles(sorted(len(labels) for labels in chained.values())),
    }
    pairs = sorted(chained)
    direct = match_directly(folder, options.labellers, pairs)
    bins = _bins(distances)
    for kind, found in (("propagated", chained), *direct.items()):
        rows += _rows(
            kind,
            ((_bin(j - i, bins), i, j, found.get((i, j), _NOTHING)) for i, j in pairs),
            error,
        )
    return rows, chains, _compare_reach(folder, stores, options, error)


_NOTHING = np.zeros((0, 4), np.float32)


def _by_step(report: Any) -> list[tuple[str, int, int]]:
    return [
        (str(j - i), i, j) for i, j in sorted(report.plan.pairs.tolist(), key=lambda p: p[::-1])
    ]


def _read(store: LabelStore, i: int, j: int) -> np.ndarray:
    return store.read(i, j) if store.has(i, j) else _NOTHING


def _rows(kind: str, labels: Iterable[tuple[str, int, int, np.ndarray]], error: Error) -> list[Row]:
    """One row per distance."""
    errors: dict[str, list[np.ndarray]] = defaultdict(list)
    for distance, i, j, rows in labels:
        found = error(i, j, rows)
        errors[distance].append(found[np.isfinite(found)])
    result = []
    for distance in sorted(errors, key=lambda text: int(text.split("-")[0])):
        every = np.concatenate(errors[distance])
        count = len(errors[distance])
        within = tuple(
            float((every <= limit).mean()) if len(every) else float("nan") for limit in _LIMITS
        )
        result.append(
            Row(
                kind=kind,
                distance=distance,
                pairs=sum(len(e) > 0 for e in errors[distance]),
                of=count,
                labels=len(every) / count,
                within=within,
                right=float((every <= 2.0).sum() / count),
            )
        )
    return result


def _quantiles(values: Sequence[float]) -> list[float]:
    """Least, median and largest."""
    return [float(v) for v in np.quantile(values, [0, 0.5, 1])] if len(values) else []


def _bins(distances: Sequence[int]) -> list[tuple[int, int]]:
    """Up to four ranges of distances with about as many pairs each."""
    if not distances:
        return []
    edges = np.unique(np.quantile(distances, [0, 0.25, 0.5, 0.75, 1]).astype(int))
    if len(edges) == 1:
        return [(int(edges[0]), int(edges[0]))]
    lows = [int(edges[0]), *(int(e) + 1 for e in edges[1:-1])]
    return list(zip(lows, (int(e) for e in edges[1:]), strict=True))


def _bin(distance: int, bins: Sequence[tuple[int, int]]) -> str:
    for low, high in bins:
        if low <= distance <= high:
            return f"{low}-{high}"
    return str(distance)


def match_directly(
    folder: VideoFolder, labellers: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    """Match far pairs of frames without any chain, by the fit that ends propagation.

    Args:
        folder: of a labelled video.
        labellers: names of matchers.
        pairs: of frames.

    Returns:
        "direct: <labeller>" and "direct: all" -> pair -> labels.
    """
    info = folder.info
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    pooled: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for name in labellers:
        label = LabelTask(
            labeller=name,
            frames=folder.frames,
            format=info.image_format,
            size=info.size,
            masks=FrameMasks(settings={}),
            options=LabelOptions(fit_px=1.0),
        ).open("auto")
        labels = {pair: rows for pair, rows in label(pairs) if not isinstance(rows, str)}
        found[f"direct: {name}"] = labels
        for pair, rows in labels.items():
            pooled[pair].append(rows)
    found["direct: all"] = {pair: np.concatenate(every) for pair, every in pooled.items()}
    return found


# -------------------------------------------------------------------------------------------- reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """Labels of one kind between the two frames of one pair."""

    kind: str  # "propagated: <labeller>" or "direct: <labeller>", or of "all" together
    start: int  # frame
    apart: int  # frames
    labels: int  # pixels of the first frame that have one
    right: tuple[int, ...]  # of them within 1, 2 and 5 px of the truth


def _compare_reach(
    folder: VideoFolder, stores: Sequence[LabelStore], options: VideoLabels, error: Error
) -> list[Reach]:
    """Chains and direct matches of the same pairs, from near ones to the two ends of the video."""
    pairs = reach_pairs(options)
    kinds = {name: [s for s in stores if s.info.labeller == name] for name in options.labellers}
    if len(kinds) > 1:
        kinds["all"] = list(stores)
    found = {
        f"propagated: {name}": _propagate_pairs(some, folder.info.size, pairs, options)
        for name, some in kinds.items()
    }
    direct = match_directly(folder, options.labellers, pairs)
    found |= {f"direct: {name}": direct[f"direct: {name}"] for name in kinds}
    points = []
    for kind, labels_of in found.items():
        for a, b in pairs:
            labels = _distinct(labels_of.get((a, b), _NOTHING))
            distance = error(a, b, labels)
            right = tuple(int((distance <= limit).sum()) for limit in _LIMITS)
            points.append(Reach(kind=kind, start=a, apart=b - a, labels=len(labels), right=right))
    return points


def _distinct(labels: np.ndarray) -> np.ndarray:
    """One label of every pixel of the first frame: rounds that find the same count once."""
    _, first = np.unique(np.rint(labels[:, :2]), axis=0, return_index=True)
    return labels[np.sort(first)]


def _propagate_pairs(
    stores: Sequence[LabelStore],
    size: tuple[int, int],
    pairs: Sequence[tuple[int, int]],
    options: VideoLabels,
) -> dict[tuple[int, int], np.ndarray]:
    """Labels of those pairs that a chain bridges; one that falls short says nothing about them."""
    by_step = rounds_by_step(stores)
    propagator = Propagator(
        StoredLabels(by_step),
        steps=by_step,
        size=size,
        options=PropagationOptions(
            preset=options.preset, min_joined=options.reach_joined, min_final=8
        ),
    )
    found = {}
    for a, b in pairs:
        result = propagator.run(a, b)
        if result.labels is not None and result.record.reached == (a, b):
            found[a, b] = result.labels
    return found


def reach_pairs(options: VideoLabels) -> list[tuple[int, int]]:
    """One pair a distance: around the middle of an orbit, from the first frame elsewhere.

    An orbit's ends are seen under the same slant then, however far they are apart. The smallest
    step is left out: such a pair is labelled, not propagated.
    """
    last, smallest = options.frames - 1, min(options.steps)
    step = max(1, last // 10)
    pairs = []
    for distance in options.apart or range(step, last + 1, step):
        if not 0 < distance <= last:
            raise InputError(f"apart is {distance}; the video has frames 0 to {last}.")
        if distance <= smallest:
            continue
        start = (last - distance) // 2 if options.scene in ("orbit", "roll") else 0
        pairs.append((start, start + distance))
    return pairs


def reach_table(reach: Sequence[Reach], enough: Sequence[int]) -> list[str]:
    """Markdown: labels within 2 px by distance, and the last distance with enough of them."""
    kinds = list(dict.fromkeys(point.kind for point in reach))
    distances = sorted({point.apart for point in reach})
    lines = [
        "| frames apart | " + " | ".join(f"{kind}: 1 px, 2 px, of" for kind in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    table = {(point.kind, point.apart): point for point in reach}
    for distance in distances:
        points = [table[kind, distance] for kind in kinds]
        cells = (f"{p.right[0]}, {p.right[1]}, {p.labels}" for p in points)
        lines.append(f"| {distance} | " + " | ".join(cells) + " |")
    for number in enough:
        cells = (str(_last_with(reach, kind, number)) for kind in kinds)
        lines.append(f"| last with {number} within 2 px | " + " | ".join(cells) + " |")
    return lines


def _last_with(reach: Sequence[Reach], kind: str, number: int) -> int:
    """Largest distance up to which every pair has so many labels within 2 px; 0 for none."""
    last = 0
    for point in sorted((p for p in reach if p.kind == kind), key=lambda p: p.apart):
        if point.right[1] < number:
            break
        last = point.apart
    return last


def plot_reach(reach: Sequence[Reach], path: Path, scene: str) -> None:
    """Labels within 2 px over the distance, one line a kind.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"--plot needs matplotlib ({error}): pip install matplotlib.") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for kind in dict.fromkeys(point.kind for point in reach):
        points = sorted((p for p in reach if p.kind == kind), key=lambda p: p.apart)
        how, _, name = kind.partition(": ")
        if name not in colours:
            colours[name] = f"C{len(colours)}"
        axes.plot(
            [p.apart for p in points],
            [p.right[1] for p in points],
            "o-" if how == "propagated" else "x:",
            label=kind,
            color=colours[name],
            linewidth=2,
            markersize=5,
        )
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frames apart")
    axes.set_ylabel("labels within 2 px of the truth")
    axes.set_title(scene)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------- room


def render_walk(options: VideoLabels, folder: Path) -> tuple[Path, Error]:
    """Frames of a walk through the example room, rendered once, and their truth.

    Raises:
        InputError: the example or open3d is not there.
    """
    if not (options.examples / "render_room.py").is_file():
        raise InputError(f"{options.examples} has no render_room.py: run from the repository.")
    sys.path.insert(0, str(options.examples))
    try:
        room = importlib.import_module("render_room")
    finally:
        sys.path.remove(str(options.examples))
    width, height = options.size, options.size * 3 // 4
    k = room.intrinsics(width, height)
    poses = camera_poses(room, options.scene, options.frames)
    clip = folder / options.scene
    clip.mkdir(parents=True, exist_ok=True)
    missing = [n for n in range(options.frames) if not (folder / f"{n}.npy").exists()]
    if missing:
        _render(room, k, poses, missing, folder, clip, (width, height))
    depths = [np.load(folder / f"{n}.npy") for n in range(options.frames)]
    # hloc's frame has the centre of the first pixel at 0.
    centred = k.copy()
    centred[:2, 2] -= 0.5

    def error(i: int, j: int, labels: np.ndarray) -> np.ndarray:
        truth = carry(labels[:, :2], depths[i], centred, poses[i], poses[j])
        distance: np.ndarray = np.linalg.norm(labels[:, 2:] - truth, axis=1)
        return distance

    return clip, error


def camera_poses(room: Any, scene: str, frames: int) -> list[np.ndarray]:
    """World-to-camera matrices (3, 4) of a rendered scene, metres."""
    share = np.linspace(0, 1, frames)
    poses: list[np.ndarray]
    if scene == "room":
        poses = room.camera_path(_ROOM_VIEWS)[:frames]
    elif scene == "approach":
        # Each frame is nearer by the same factor.
        distances = _FAR * (_NEAR / _FAR) ** share
        poses = [
            room.look_at((0.15 + 0.07 * d, _WALL - d, 1.6 - 0.02 * d), (0.15, _WALL, 1.6))
            for d in distances
        ]
    else:
        roll = np.radians(_ROLL_DEG) if scene == "roll" else 0.0
        poses = [
            room.look_at(
                (0.6 + 2 * np.sin(a), _WALL - 2 * np.cos(a), 1.5), (0.6, _WALL, 1.5), roll=roll * t
            )
            for a, t in zip(np.radians(_ORBIT_DEG) * (share - 0.5), share - 0.5, strict=True)
        ]
    return poses


def _render(
    room: Any,
    k: np.ndarray,
    poses: Sequence[np.ndarray],
    missing: Sequence[int],
    folder: Path,
    clip: Path,
    size: tuple[int, int],
) -> None:
    from PIL import Image
    from tqdm import tqdm

    try:
        scene = room.build_scene(0)
    except ImportError as error:
        raise InputError(
            f'Rendering needs open3d ({error}): pip install "gim-hloc[render]"'
        ) from error
    for n in tqdm(missing, desc="rendering", disable=None):
        rgb, depth = room.render_view(
            scene, k, poses[n], width=size[0], height=size[1], seed=(0, n)
        )
        Image.fromarray(rgb).save(clip / f"{n:04d}.png")
        np.save(folder / f"{n}.npy", depth.astype(np.float32))


def carry(
    xy: np.ndarray, depth: np.ndarray, k: np.ndarray, pose0: np.ndarray, pose1: np.ndarray
) -> np.ndarray:
    """Where points of one view are in another, by depth and pose.

    Args:
        xy: (n, 2) pixels, hloc's frame.
        depth: (H, W) along the optical axis.
        k: (3, 3), hloc's frame.
        pose0: (3, 4) world to camera.
        pose1: of the other view.

    Returns:
        (n, 2) pixels. Depth is interpolated, except at its edges, where the nearest pixel's counts.
        NaN where there is no depth or the point lies behind the other camera.
    """
    rows, columns = depth.shape
    x, y = xy[:, 0].clip(0, columns - 1), xy[:, 1].clip(0, rows - 1)
    left, top = (np.floor(v).astype(int).clip(0, n - 2) for v, n in ((x, columns), (y, rows)))
    fx, fy = x - left, y - top
    corners = np.stack(
        [depth[top, left], depth[top, left + 1], depth[top + 1, left], depth[top + 1, left + 1]]
    )
    weights = np.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy])
    # On a plane, the inverse of depth is linear in the image.
    with np.errstate(divide="ignore", invalid="ignore"):
        z = 1 / (weights / corners).sum(axis=0)
        edge = corners.max(axis=0) > (1 + _EDGE) * corners.min(axis=0)
    z = np.where(edge, depth[np.rint(y).astype(int), np.rint(x).astype(int)], z)
    rays = np.concatenate([xy, np.ones((len(xy), 1))], axis=1) @ np.linalg.inv(k).T
    known = np.isfinite(z)
    world = (rays * np.where(known, z, 1.0)[:, None] - pose0[:, 3]) @ pose0[:, :3]
    seen = (world @ pose1[:, :3].T + pose1[:, 3]) @ k.T
    with np.errstate(divide="ignore", invalid="ignore"):
        projected: np.ndarray = seen[:, :2] / seen[:, 2:]
    projected[~(known & (seen[:, 2] > 0))] = np.nan
    return projected


# ---------------------------------------------------------------------------------------------- fox


def fox_truth(options: VideoLabels) -> Error:
    """Distance from epipolar lines by the reference poses.

    Raises:
        InputError: the data is not there.
    """
    import cv2

    folder = options.data / "fox"
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: give the data folder (--data).")
    names = sorted(p.name for p in (folder / "images").iterdir())
    poses = read_poses(folder / "gt", names).poses
    line = next(
        text.split()
        for text in (folder / "gt" / "cameras.txt").read_text(encoding="utf-8").splitlines()
        if not text.startswith("#")
    )
    width, height = int(line[2]), int(line[3])
    fx, fy, cx, cy, *distortion = (float(value) for value in line[4:12])
    scale = min(1.0, options.size / max(width, height))
    # COLMAP's origin is the corner of the first pixel, ours its centre.
    k = np.array([[fx * scale, 0, cx * scale - 0.5], [0, fy * scale, cy * scale - 0.5], [0, 0, 1]])

    def error(i: int, j: int, labels: np.ndarray) -> np.ndarray:
        if not len(labels):
            return np.zeros(0)
        (r0, t0), (r1, t1) = (poses[names[n]] for n in (i, j))
        inverse = np.linalg.inv(k)
        essential = essential_matrix(*relative_pose(r0, t0, r1, t1))
        sides = [
            cv2.undistortPoints(
                labels[:, None, columns].astype(np.float64), k, np.array(distortion), P=k
            )[:, 0]
            for columns in (slice(0, 2), slice(2, 4))
        ]
        return np.maximum(*distances(inverse.T @ essential @ inverse, *sides))

    return error


if __name__ == "__main__":
    sys.exit(main())
