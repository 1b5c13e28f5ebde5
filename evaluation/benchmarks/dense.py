"""Depth maps against exact depth: the example room and synthetic scenes.

    python -m gim_hloc.evaluation.benchmarks.dense [room relief faint synthetic] [--work FOLDER]

All are reconstructed and densified as users do. Accuracy is the share of given pixels whose depth
is within 1 % of the true one; completeness the share of pixels with true depth in two views (what
they show is seen by another image, too) that are given. Models are in a unit of their own: the one
that takes their camera centres to the true ones makes depths comparable.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from PIL import Image

from gim_hloc import colmap
from gim_hloc.cli import common
from gim_hloc.colmap import dense
from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks import scene as synthetic
from gim_hloc.evaluation.benchmarks.measure import machine, now, versions
from gim_hloc.geometry import depth
from gim_hloc.options import Quality
from gim_hloc.pipelines.densify import densify
from gim_hloc.pipelines.reconstruct import reconstruct
from gim_hloc.poses import similarity

ROOM = Path(__file__).resolve().parents[2] / "examples" / "room"
_NEAR = 0.01  # relative error of a depth that is right
_SEEN = 0.02  # relative difference below which another view sees the same

SceneName = Literal["room", "relief", "faint", "synthetic"]
_SCENES: tuple[SceneName, ...] = get_args(SceneName)

# Of the images of faint: grey values are kept, drawn to the middle and made noisy.
_CONTRAST, _NOISE = 0.25, 2.0

Truth = Callable[[str, np.ndarray], np.ndarray]
"""Name of an image, pixels (H, W, 2) of it as it is stored, hloc's frame -> depth (H, W)."""


@dataclass(frozen=True, kw_only=True)
class DenseBenchmark:
    """Compare depth maps with the truth."""

    scenes: tyro.conf.Positional[tuple[SceneName, ...]] = _SCENES
    """room: examples/room by the bundled matcher and grey values; relief: the same of a rendered
    surface with boxes, another one than the thresholds were chosen on; faint: its images with a
    quarter of their contrast, and noise; synthetic: warps of a matcher that knows the scene, spoilt
    as those of networks are."""
    room: Path = ROOM
    """Folder of the example room."""
    quality: Quality = "fast"
    """Operating point, and size of the depth maps."""
    views: int = 10
    """Images of each synthetic scene."""
    work: Path | None = None
    """Folder for the runs, which are reused; a temporary one by default."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Depth maps of a run against the truth.

    Attributes:
        accuracy: share of given pixels that are right.
        completeness: share of pixels with true depth in two views that are given.
        views: maps.
        points: of the fused cloud.
        seconds: a view, depth only.
    """

    accuracy: float
    completeness: float
    views: int
    points: int
    seconds: float


def judge(output: Path, truth: Truth, poses: dict[str, Any]) -> tuple[float, float]:
    """Accuracy and completeness of a run's depth maps.

    Args:
        output: folder of the run.
        truth: exact depth.
        poses: true ones by name.

    Raises:
        InputError: images of the truth are not in the model.
    """
    model = colmap.read_model(output)
    moved = similarity(poses, colmap.poses_of(model))
    if moved is None:
        raise InputError(f"{output}: fewer than two images have a true pose.")
    workspace = output / "dense"
    maps, true = {}, {}
    size = max(dense.read_depth(workspace, next(iter(_names(workspace)))).shape)
    for view in dense.dense_views(model, workspace, size=size, neighbours=1):
        maps[view.name] = (view, dense.read_depth(workspace, view.name))
        exact = moved[0] * truth(view.source, view.stored_pixels())
        true[view.name] = torch.from_numpy(np.nan_to_num(1 / exact, posinf=0).astype(np.float32))
    right = given = found = seen = 0
    for name, (view, values) in maps.items():
        others = [(maps[other][0].camera, true[other]) for other in maps if other != name]
        count, _ = depth.agreement(view.camera, true[name], others, tolerance=_SEEN)
        twice = (count >= 1).numpy()
        error = np.abs(values * true[name].numpy() - 1)
        known = (values > 0) & (true[name].numpy() > 0)
        right, given = right + (error[known] < _NEAR).sum(), given + known.sum()
        found, seen = found + (twice & (values > 0)).sum(), seen + twice.sum()
    return float(right / max(1, given)), float(found / max(1, seen))


def _names(workspace: Path) -> list[str]:
    folder = workspace / "stereo" / "depth_maps"
    ending = ".geometric.bin"
    paths = sorted(folder.rglob(f"*{ending}"))
    return [path.relative_to(folder).as_posix().removesuffix(ending) for path in paths]


def room_truth(room: Path) -> Truth:
    """Depth of the example room: PNG files in millimetres."""

    def read(name: str, xy: np.ndarray) -> np.ndarray:
        with Image.open((room / "depth" / name).with_suffix(".png")) as image:
            millimetres = np.asarray(image)
        x, y = np.rint(xy).astype(int).transpose(2, 0, 1)
        height, width = millimetres.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        values = millimetres[y.clip(0, height - 1), x.clip(0, width - 1)] / 1000
        return np.where(inside & (values > 0), values, np.nan)

    return read


def scene_truth(scene: synthetic.Scene) -> Truth:
    """Depth of a synthetic scene: rays cast."""

    def cast(name: str, xy: np.ndarray) -> np.ndarray:
        view = scene.views[name]
        _, found = view.project(scene.points(view, xy.reshape(-1, 2).astype(np.float64)))
        return found.reshape(xy.shape[:2])

    return cast


def of_room(options: DenseBenchmark, work: Path) -> Judgement:
    """The example room by the bundled matcher."""
    output = work / "room"
    reconstruct(options.room / "images", output, quality=options.quality, progress=False)
    poses = colmap.model_cameras(options.room / "gt")
    return _judged(output, room_truth(options.room), poses)


def of_relief(options: DenseBenchmark, work: Path, *, faint: bool = False) -> Judgement:
    """A rendered surface with boxes by the bundled matcher; other seed, size and baselines."""
    name = "faint" if faint else "relief"
    numbers = synthetic.SceneOptions(views=options.views, size=(960, 720), spread_deg=30, seed=1)
    scene, folder = _scene(numbers, work / f"scene-{name}", faint=faint)
    output = work / name
    reconstruct(folder / "images", output, quality=options.quality, progress=False)
    return _judged(output, scene_truth(scene), scene.poses)


def _scene(
    numbers: synthetic.SceneOptions, folder: Path, *, faint: bool = False
) -> tuple[synthetic.Scene, Path]:
    """A scene, and its folder, written where it is not there."""
    scene = synthetic.make_scene(numbers)
    if not (folder / "scene.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            synthetic.write_scene(scene, Path(temporary) / "scene")
            if faint:
                _fade(Path(temporary) / "scene" / "images")
            os.replace(Path(temporary) / "scene", folder)
    return scene, folder


def _fade(images: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(images.iterdir()):
        with Image.open(path) as image:
            values = np.asarray(image, dtype=float)
        faint = 128 + _CONTRAST * (values - 128) + rng.normal(0, _NOISE, values.shape)
        Image.fromarray(np.clip(np.round(faint), 0, 255).astype(np.uint8)).save(path)


def of_faint(options: DenseBenchmark, work: Path) -> Judgement:
    """The same with a quarter of the contrast, and noise."""
    return of_relief(options, work, faint=True)


def of_synthetic(options: DenseBenchmark, work: Path) -> Judgement:
    """A synthetic scene by the warps of a matcher that knows it."""
    synthetic.register()
    output = work / "synthetic"
    scene, folder = _scene(synthetic.SceneOptions(views=options.views), work / "scene")
    reconstruct(
        folder / "images", output, quality=options.quality, progress=False,
        matcher=synthetic.NAME, matcher_options=(f"scene={folder / 'scene.json'}",),
        anchors="sift", refine_keypoints=False, rescue="none",
    )  # fmt: skip
    return _judged(output, scene_truth(scene), scene.poses)


def _judged(output: Path, truth: Truth, poses: dict[str, Any]) -> Judgement:
    result = densify(output, progress=False)
    accuracy, completeness = judge(output, truth, poses)
    return Judgement(
        accuracy=accuracy,
        completeness=completeness,
        views=result.views,
        points=result.points,
        seconds=result.timings["depth"] / max(1, result.views),
    )


def table(rows: Sequence[tuple[str, Judgement]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| Scene | Depth from | Accuracy | Completeness | Seconds a view | Views | Points |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows:
        source = "warps" if name == "synthetic" else "grey values"
        yield (
            f"| {name} | {source} | {row.accuracy:.1%} | {row.completeness:.1%} | "
            f"{row.seconds:.1f} | {row.views} | {row.points} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    options = common.parse(DenseBenchmark, prog="dense", args=common.prog(argv))
    common.configure_logging(quiet=True)
    return common.run(lambda: _run(options))


def _run(options: DenseBenchmark) -> int:
    with tempfile.TemporaryDirectory(prefix="gim-dense-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        ways = {"room": of_room, "relief": of_relief, "faint": of_faint, "synthetic": of_synthetic}
        rows = [(name, ways[name](options, work)) for name in options.scenes]
    used = versions(["torch", "pycolmap"])
    about = ["", now(), f"machine: {machine()}", f"versions: {used}", ""]
    sys.stdout.write("\n".join([*table(rows), *about]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
