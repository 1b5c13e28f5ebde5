"""Depth maps, clouds and meshes of scenes whose depth is known exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest
import torch
import yaml
from PIL import Image

from gim_hloc import colmap, draw, images
from gim_hloc.cli import densify as command
from gim_hloc.colmap import dense
from gim_hloc.colmap.target import read_ply
from gim_hloc.errors import InputError, OutputError
from gim_hloc.evaluation.benchmarks.dense import judge, scene_truth
from gim_hloc.evaluation.benchmarks.scene import (
    Scene,
    SceneOptions,
    load_scene,
    make_scene,
    register,
    write_scene,
)
from gim_hloc.geometry import depth, stereo
from gim_hloc.options import to_mapping
from gim_hloc.pipelines import densify as pipeline
from gim_hloc.pipelines import previews
from gim_hloc.pipelines.densify import densify
from gim_hloc.pipelines.options import ReconstructOptions
from gim_hloc.pipelines.run import RunFolder, keep_scan

register()
SIZE = (160, 120)


# ---------------------------------------------------------------------------------------- geometry


def camera(x: float = 0.0, turn: float = 0.0) -> depth.Pinhole:
    c, s = np.cos(turn), np.sin(turn)
    rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return depth.Pinhole(
        width=64,
        height=48,
        calibration=np.array([[60.0, 0, 31.5], [0, 60.0, 23.5], [0, 0, 1]]),
        rotation=rotation,
        translation=-rotation @ [x, 0, 0],
    )


NORMAL = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])


def plane(view: depth.Pinhole) -> torch.Tensor:
    """Inverse depth of the plane NORMAL . X = -4 of the world."""
    normal, shift = view.rotation @ NORMAL, -4 + (view.rotation @ NORMAL) @ view.translation
    grid = depth.pixels(view.height, view.width).reshape(3, -1).double().numpy()
    rays = np.linalg.inv(view.calibration) @ grid
    return torch.from_numpy((normal @ rays / shift).reshape(view.height, view.width)).float()


def test_a_resized_camera_sees_the_same_picture() -> None:
    whole = camera(0.2, 0.1)
    half = whole.resized(32, 24)
    xyz = np.array([[0.3, -0.2, 3.0], [-0.5, 0.4, 5.0]])
    assert np.allclose((whole.project(xyz)[0] + 0.5) / 2, half.project(xyz)[0] + 0.5)


def test_normals_of_a_plane() -> None:
    view = camera(0.3, 0.2)
    found = depth.normals(view, plane(view))
    assert found.shape == (3, 48, 64)
    expected = torch.from_numpy(view.rotation @ NORMAL).float()[:, None, None]
    assert (found[:, 3:-3, 3:-3] - expected).abs().max() < 2e-3
    empty = depth.normals(view, torch.zeros(48, 64))
    assert (empty == 0).all()


def test_views_agree_on_a_plane_and_not_on_what_is_wrong() -> None:
    a, b, c = camera(), camera(0.5, 0.05), camera(-0.5)
    wrong = plane(a).clone()
    wrong[:10] *= 1.05
    others = [(view, plane(view)) for view in (b, c)]
    count, mean = depth.agreement(a, wrong, others, tolerance=0.01)
    assert (count[:10] == 0).all()
    assert (count[12:, 25:40] == 2).all()
    assert (mean[12:, 25:40] / plane(a)[12:, 25:40] - 1).abs().max() < 1e-3
    nothing = [(view, torch.zeros(48, 64)) for view in (b, c)]
    assert (depth.agreement(a, plane(a), nothing, tolerance=0.01)[0] == 0).all()


def test_depth_of_true_places_is_exact_and_outliers_lose() -> None:
    a, others = camera(), [camera(0.5), camera(-0.4, 0.1), camera(0.2, -0.1)]
    inverse, weight, speed = [], [], []
    for number, other in enumerate(others):
        start, shift = depth.bases(a, [other], "cpu")
        there = (start + plane(a) * shift)[0]
        places = there[:2] / there[2]
        if number == 0:
            places[0, :20] += 8  # along the epipolar line
        found, off = depth.triangulate(a, other, places)
        assert off[20:].max() < 1e-3
        inverse.append(found)
        weight.append(torch.full_like(found, 0.9))
        speed.append(depth.speed(a, other, found))
    assert (inverse[1] / plane(a) - 1).abs().max() < 1e-3
    mean, support = depth.consensus(
        torch.stack(inverse), torch.stack(weight), torch.stack(speed), tolerance_px=1.0
    )
    assert (mean / plane(a) - 1).abs().max() < 1e-3
    assert torch.allclose(support[:20], torch.tensor(0.9))
    assert torch.allclose(support[20:], torch.tensor(1.8))


def test_places_off_the_epipolar_line_are_known() -> None:
    a, b = camera(), camera(0.5)
    start, shift = depth.bases(a, [b], "cpu")
    there = (start + plane(a) * shift)[0]
    places = there[:2] / there[2] + torch.tensor([0.0, 3.0])[:, None, None]
    assert (depth.triangulate(a, b, places)[1] - 3).abs().max() < 1e-3


def test_small_patches_are_left_out() -> None:
    inverse = torch.full((40, 40), 0.2)
    inverse[5:9, 5:9] = 0.5
    inverse[20:32, 20:32] = 0.5
    kept = depth.without_speckles(inverse, 30)
    assert (kept[5:9, 5:9] == 0).all()
    assert (kept[20:32, 20:32] == 0.5).all()
    assert kept[0, 0] == 0.2


# ------------------------------------------------------------------------------------ grey values


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of a scene and its truth."""
    folder = tmp_path_factory.mktemp("scene")
    scene = make_scene(SceneOptions(views=8, size=SIZE, spread_deg=18, boxes=3))
    scene.views = {name: scene.views[name] for name in scene.names[:4]}  # of one row
    write_scene(scene, folder)
    return folder


def true_model(scene: Scene) -> Any:
    """COLMAP's model of a scene: true poses, points where each view's pixels lie."""
    rng = np.random.default_rng(0)
    names = scene.names
    first = scene.views[names[0]]
    result = pycolmap.Reconstruction()
    params = [first.focal, *(first.principal + 0.5)]
    size = {"width": first.width, "height": first.height}
    result.add_camera_with_trivial_rig(
        pycolmap.Camera(model="SIMPLE_PINHOLE", params=params, camera_id=1, **size)
    )
    xyz = np.concatenate(
        [scene.points(v, rng.uniform(0, SIZE, (60, 2))) for v in scene.views.values()]
    )
    xyz = xyz[np.isfinite(xyz).all(1)]
    seen = {name: scene.visible(scene.views[name], xyz) for name in names}
    tracks: list[Any] = [pycolmap.Track() for _ in xyz]
    for number, name in enumerate(names, 1):
        view = scene.views[name]
        rows = np.flatnonzero(seen[name])
        image = pycolmap.Image(name, view.project(xyz[rows])[0] + 0.5, 1, number)
        pose = pycolmap.Rigid3d(np.column_stack([view.rotation, view.translation]))
        result.add_image_with_trivial_frame(image, pose)
        for place, row in enumerate(rows):
            tracks[row].add_element(number, place)
    for point, track in zip(xyz, tracks, strict=True):
        if track.length() >= 2:
            result.add_point3D(point, track, np.array([90, 90, 90], np.uint8))
    return result


def write_run(place: Path, output: Path, **options: Any) -> Path:
    """OUTPUT as gim-reconstruct leaves it, with the true model."""
    settings = ReconstructOptions(**{"matcher": "xfeat", "quality": "fast", **options})
    folder = RunFolder(output, "reconstruct", makes=["sparse/[0-9]*/*.bin"])
    folder.about = {"images": str(place / "images"), "options": to_mapping(settings)}
    with folder:
        with folder.making("refine", "the true model") as made:
            colmap.write_models(
                [true_model(load_scene(place / "scene.json"))], made.path / "sparse"
            )
        keep_scan(folder, images.scan(place / "images", progress=False))
        folder.save()
    return output


def judged(place: Path, output: Path) -> tuple[float, float]:
    scene = load_scene(place / "scene.json")
    return judge(output, scene_truth(scene), scene.poses)


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A densified run."""
    output = write_run(place, tmp_path_factory.mktemp("run") / "out")
    result = densify(output, progress=False)
    assert result.views == 4
    assert result.points > 1000
    return output


def names_of(output: Path) -> list[str]:
    return (output / "dense/stereo/fusion.cfg").read_text().split()


def test_grey_values_give_true_depth(place: Path, done: Path) -> None:
    accuracy, completeness = judged(place, done)
    assert accuracy > 0.9
    assert completeness > 0.7


def test_workspace_is_colmaps(done: Path) -> None:
    workspace = done / "dense"
    model = pycolmap.Reconstruction(workspace / "sparse")
    names = names_of(done)
    assert sorted(model.image(i).name for i in model.reg_image_ids()) == names
    lines = (workspace / "stereo/patch-match.cfg").read_text().splitlines()
    assert lines[::2] == names
    assert all(
        set(line.split(", ")) <= set(names) - {name}
        for name, line in zip(lines[::2], lines[1::2], strict=True)
    )
    for name in names:
        maps = []
        for kind, reader in (("depth", pycolmap.DepthMap), ("normal", pycolmap.NormalMap)):
            found = reader()
            found.read(workspace / f"stereo/{kind}_maps/{name}.geometric.bin")
            maps.append(found)
        assert (maps[0].width, maps[0].height) == SIZE
        assert (maps[1].width, maps[1].height) == SIZE
        assert np.array_equal(maps[0].to_array(), dense.read_depth(workspace, name))
    header = (workspace / "dense.ply").read_bytes()[:400]
    assert all(f"property float {axis}".encode() in header for axis in ("x", "nx"))
    assert b"property uchar red" in header
    assert (workspace / "dense.ply.vis").is_file()
    state = yaml.safe_load((done / "run.yaml").read_text())
    assert "dense/dense.ply" in state["files"]
    assert state["options"]["matcher"] == "xfeat"  # what the run said of itself stays
    assert state["images"]


def test_a_page_shows_views_and_the_cloud(done: Path) -> None:
    text = (done / "dense/dense.html").read_text()
    assert all(name in text for name in names_of(done))
    assert text.count("<img") == 3 * 4
    facts = previews.dense_facts(yaml.safe_load((done / "run.yaml").read_text())["steps"])
    assert facts is not None
    assert facts["views"] == 4
    assert f"{facts['points']:,} points of 4 depth maps" in text
    # A camera sees of the cloud what its photograph shows.
    xyz, rgb = read_ply(done / "dense/dense.ply")
    assert len(xyz) == facts["points"]
    name = names_of(done)[1]
    view = dense.pinholes(done / "dense", max(SIZE))[name]
    cloud = np.zeros((*SIZE[::-1], 3), np.uint8)
    draw.draw_cloud(cloud, *view.project(xyz), rgb)
    photograph = images.read_rgb(done / "dense/images" / name, upright=False)
    drawn = cloud.any(axis=2)
    assert drawn.mean() > 0.2
    assert np.median(np.abs(cloud[drawn].astype(int) - photograph[drawn])) < 10


def count_searches(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[float]:
    """Depth ranges of the views that are searched for; a fault after some of them."""
    seen: list[float] = []
    plain = stereo.depth_of

    def depth_of(view: Any, others: Any, near_far: Any, start: Any) -> Any:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(near_far[0])
        return plain(view, others, near_far, start)

    monkeypatch.setattr(stereo, "depth_of", depth_of)
    monkeypatch.setattr(pipeline.engine, "default_workers", lambda *_: 1)
    return seen


def test_what_is_done_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = done / "dense/dense.ply"
    before = cloud.stat().st_mtime_ns
    seen = count_searches(monkeypatch)
    densify(done, progress=False)
    assert not seen
    assert cloud.stat().st_mtime_ns == before
    cloud.unlink()  # made again of the maps that are there
    densify(done, progress=False)
    assert not seen
    assert cloud.is_file()


def test_a_stopped_run_goes_on_with_the_views_that_are_missing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write_run(place, tmp_path / "out")
    seen = count_searches(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        densify(output, progress=False, depth_size=80)
    assert not (output / "dense/dense.ply").exists()
    monkeypatch.undo()
    again = count_searches(monkeypatch)
    densify(output, progress=False, depth_size=80)
    assert len(again) == 2
    assert not set(seen) & set(again)
    assert len(names_of(output)) == 4
    # Another size is another search; the first one is kept.
    densify(output, progress=False, depth_size=64)
    assert len(again) == 6
    densify(output, progress=False, depth_size=80)
    assert len(again) == 6
    assert dense.read_depth(output / "dense", names_of(output)[0]).shape == (60, 80)


def test_shards_are_one_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_run(place, tmp_path / "out")
    with pytest.raises(InputError, match="--stop-after undistort instead of --shard first"):
        densify(output, progress=False, depth_size=80, shard="0/2")
    densify(output, progress=False, depth_size=80, stop_after="undistort")
    seen = count_searches(monkeypatch)
    for number in range(2):
        result = densify(output, progress=False, depth_size=80, shard=f"{number}/2")
        assert result.cloud is None
        assert len(seen) == 2 * (number + 1)
    densify(output, progress=False, depth_size=80)
    assert len(seen) == 4
    assert not list((output / ".run").glob("*-of-*/*"))
    whole = write_run(place, tmp_path / "whole")
    densify(whole, progress=False, depth_size=80)
    for name in names_of(output):
        one, other = (dense.read_depth(out / "dense", name) for out in (output, whole))
        assert np.array_equal(one, other)
        assert (one > 0).any()


def seen_by(cloud: Path, index: int) -> np.ndarray:
    """Points (N, 3) of a cloud that an image sees."""
    body = cloud.read_bytes().split(b"end_header\n", 1)[1]
    xyz = np.frombuffer(body, "3<f4,3<f4,3u1")["f0"]
    numbers = np.frombuffer(Path(f"{cloud}.vis").read_bytes()[8:], "<u4").tolist()
    rows, place = [], 0
    for row in range(len(xyz)):
        count = numbers[place]
        if index in numbers[place + 1 : place + 1 + count]:
            rows.append(row)
        place += 1 + count
    return xyz[rows]


def test_masks_leave_no_depth(place: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    keep = np.full(SIZE[::-1], 255, np.uint8)
    keep[:, : SIZE[0] // 2] = 0
    scene = load_scene(place / "scene.json")
    masked = scene.names[1]
    cv2.imwrite(str(masks / f"{masked}.png"), keep)
    output = write_run(place, tmp_path / "out", masks=masks)
    densify(output, progress=False)
    depths = dense.read_depth(output / "dense", masked)
    assert (depths[:, : SIZE[0] // 2 - 1] == 0).all()
    assert (depths[:, SIZE[0] // 2 + 12 :] > 0).mean() > 0.5
    seen = seen_by(output / "dense/dense.ply", names_of(output).index(masked))
    xy, _ = scene.views[masked].project(seen)  # the run has the true poses
    assert len(xy) > 1000
    assert xy[:, 0].min() > SIZE[0] // 2 - 3
    accuracy, _ = judged(place, output)
    assert accuracy > 0.9


def test_warps_give_true_depth(place: Path, tmp_path: Path) -> None:
    options = {
        "matcher": "synthetic_dense",
        "matcher_options": (f"scene={place / 'scene.json'}", "size=[120, 160]", "noise_px=0.1"),
    }
    output = write_run(place, tmp_path / "out", **options)
    densify(output, progress=False, stop_after="undistort")
    densify(output, progress=False, shard="0/2")  # the rest is done by the whole run
    densify(output, progress=False)
    accuracy, completeness = judged(place, output)
    assert accuracy > 0.95
    assert completeness > 0.8
    assert not list((output / ".run").rglob("*warps.cache"))


def test_mesh(place: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimesh = pytest.importorskip("trimesh")
    monkeypatch.setattr(dense, "_POISSON_DEPTH", 6)  # fewer cells, seconds less
    result = densify(done, progress=False, mesh=True)
    assert result.mesh is not None
    surface = trimesh.load(result.mesh)
    assert len(surface.faces) > 100
    assert surface.visual.kind == "vertex"
    # In the scene's own unit: the run has the true poses.
    distance = load_scene(place / "scene.json").distance(np.asarray(surface.vertices))
    assert np.median(distance) < 0.02
    turned = trimesh.load(result.mesh.with_suffix(".glb"), force="mesh")
    assert np.allclose(turned.bounds[:, 0], surface.bounds[:, 0], atol=1e-4)


# -------------------------------------------------------------------------------------- bad inputs


def no_run(place: Path, output: Path) -> dict[str, Any]:
    output.mkdir()
    return {}


def unfinished(place: Path, output: Path) -> dict[str, Any]:
    write_run(place, output)
    shutil.rmtree(output / "sparse")
    with RunFolder(output, "reconstruct") as folder:
        folder.drop("refine")
        folder.save()
    return {}


def images_gone(place: Path, output: Path) -> dict[str, Any]:
    write_run(place, output)
    return {"images": output / "nowhere"}


def image_gone(place: Path, output: Path) -> dict[str, Any]:
    copy = output.parent / "copy"
    shutil.copytree(place, copy)
    write_run(copy, output)
    next((copy / "images").iterdir()).unlink()
    return {}


def other_size(place: Path, output: Path) -> dict[str, Any]:
    copy = output.parent / "copy"
    shutil.copytree(place, copy)
    write_run(copy, output)
    path = sorted((copy / "images").iterdir())[0]
    Image.new("RGB", (80, 60)).save(path)
    return {}


def no_warps(place: Path, output: Path) -> dict[str, Any]:
    write_run(place, output)
    return {"depth_from": "warps"}


def in_the_way(place: Path, output: Path) -> dict[str, Any]:
    write_run(place, output)
    (output / "dense").mkdir()
    (output / "dense/mine.txt").write_text("keep this")
    return {}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_run, "is no output of gim-reconstruct"),
        (unfinished, "no finished model: repeat the command"),
        (images_gone, "nowhere"),
        (image_gone, "Not found in .*view_"),
        (other_size, "80 x 60"),
        (no_warps, "needs a run of a dense matcher"),
        (in_the_way, "mine.txt"),
    ],
)
def test_bad_inputs_are_named(
    spoil: Callable[[Path, Path], dict[str, Any]],
    said: str,
    place: Path,
    tmp_path: Path,
) -> None:
    options = spoil(place, tmp_path / "out")
    with pytest.raises((InputError, OutputError), match=said):
        densify(tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out/dense/dense.ply").exists()


def test_command(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(done), "--quiet", "--json"]) == 0
    assert '"points"' in capsys.readouterr().out
    assert command.main([str(done / "nothing"), "--quiet"]) == 2
    assert "is no output of gim-reconstruct" in capsys.readouterr().err
