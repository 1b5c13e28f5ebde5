"""The viewer: what it shows of a model, what clicks find, and that it follows a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

from gim_hloc import colmap
from gim_hloc.errors import GimError, InputError
from gim_hloc.pipelines.options import ViewOptions
from gim_hloc.pipelines.run import SNAPSHOTS
from gim_hloc.pipelines.view import Viewer, nearest_to_ray, newest_model, read_scene

IMAGES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic model with photographs beside it."""
    folder = tmp_path_factory.mktemp("view")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig, options.num_points3D = 1, IMAGES, 100
    made = pycolmap.synthesize_dataset(options)
    (folder / "sparse").mkdir()
    made.write(folder / "sparse")
    for number, image in enumerate(made.images.values()):
        camera = made.cameras[image.camera_id]
        path = folder / "images" / image.name
        path.parent.mkdir(exist_ok=True, parents=True)
        grey = np.full((camera.height, camera.width, 3), 40 * number, np.uint8)
        cv2.imwrite(str(path), grey)
    return folder


@pytest.fixture
def viewer(model: Path) -> Iterator[Viewer]:
    pytest.importorskip("viser", reason="the extra view is not installed")
    shown = Viewer(ViewOptions(model=model, images=model / "images", port=8190))
    yield shown
    shown.server.stop()


def test_a_scene_holds_what_the_model_does(model: Path) -> None:
    read = colmap.read_model(model)
    scene = read_scene(read)
    assert (
        len(scene.points.ids) == read.num_points3D() == len(scene.xyz) == len(scene.points.errors)
    )
    image = next(iter(read.images.values()))
    np.testing.assert_allclose(scene.centre(image.name), image.projection_center(), atol=1e-9)
    near = scene.neighbours(image.name)
    own = {p.point3D_id for p in image.get_observation_points2D()}
    for name, count in near:
        other = next(i for i in read.images.values() if i.name == name)
        assert count == len(own & {p.point3D_id for p in other.get_observation_points2D()})
    assert [count for _, count in near] == sorted((c for _, c in near), reverse=True)
    for kind in ("colour", "error", "track length"):
        assert scene.colours(kind).shape == (len(scene.points.ids), 3)


def test_a_click_takes_the_point_in_front() -> None:
    xyz = np.array([[0, 0, 5], [0, 0, 9], [1, 0, 5], [0, 0, -2]], float)
    origin, forward = np.zeros(3), np.array([0.0, 0.0, 1.0])
    assert nearest_to_ray(xyz, origin, forward) == 0
    towards = np.array([1.0, 0.0, 5.0]) / np.sqrt(26)
    assert nearest_to_ray(xyz, origin, towards) == 2
    assert nearest_to_ray(xyz, origin, np.array([0.0, 1.0, 0.0])) is None
    assert nearest_to_ray(np.zeros((0, 3)), origin, forward) is None


def test_a_camera_and_a_distance_are_shown(viewer: Viewer) -> None:
    scene = viewer.shown[0].scene
    assert len(viewer.shown[0].frusta) == IMAGES
    name = next(iter(scene.views))
    viewer.choose(name)
    assert name in viewer.about.content
    assert viewer.panel.visible
    assert viewer.matches.visible
    assert len(viewer.neighbour.options) == IMAGES - 1
    frusta = viewer.shown[0].frusta
    first, second = frusta[name], frusta[list(scene.views)[1]]
    chosen, usual = np.array(first.color), np.array(second.color)
    assert not np.array_equal(chosen, usual)
    viewer.choose(list(scene.views)[1])
    np.testing.assert_array_equal(first.color, usual)
    np.testing.assert_array_equal(second.color, chosen)
    assert frusta[name] is first, "frusta are made anew, thumbnails and all"
    cloud = viewer.shown[0].points
    viewer.colour.value = "error"
    viewer._recolour()
    assert viewer.shown[0].points is cloud, "places are sent anew"
    np.testing.assert_array_equal(cloud.colors, scene.colours("error"))
    for row in (3, 7):
        origin = scene.xyz[row] + np.array([0.0, 0.0, 1e-3])
        viewer.mark(origin, scene.xyz[row] - origin)
    distance = np.linalg.norm(scene.xyz[3] - scene.xyz[7])
    assert f"**{distance:.4f}**" in viewer.distance.content
    assert "gim-export" in viewer.distance.content


def test_a_video_that_cannot_be_written_is_an_error(viewer: Viewer, tmp_path: Path) -> None:
    with pytest.raises(GimError, match=r"Cannot write|needs Chromium"):
        viewer.record(tmp_path / "missing" / "turn.mp4", frames=1)


def test_a_growing_model_is_followed(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("viser", reason="the extra view is not installed")
    with pytest.raises(InputError, match="no COLMAP model yet"):
        newest_model(tmp_path)
    (tmp_path / SNAPSHOTS / "1").mkdir(parents=True)
    read = colmap.read_model(model)
    read.write(tmp_path / SNAPSHOTS / "1")
    shown = Viewer(ViewOptions(model=tmp_path, port=8191))
    try:
        assert not shown.refresh()
        (tmp_path / "sparse" / "0").mkdir(parents=True)
        for point in list(read.point3D_ids())[:10]:
            read.delete_point3D(point)
        read.write(tmp_path / "sparse" / "0")
        later = (tmp_path / "sparse" / "0" / "points3D.bin").stat().st_mtime + 5
        os.utime(tmp_path / "sparse" / "0" / "points3D.bin", (later, later))
        assert shown.refresh()
        assert len(shown.shown[0].scene.points.ids) == read.num_points3D()
    finally:
        shown.server.stop()


def test_a_second_model_is_moved_onto_the_first(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("viser", reason="the extra view is not installed")
    other = colmap.read_model(model)
    other.transform(pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.array([9.0, 1.0, 2.0])))
    other.write(tmp_path)
    shown = Viewer(ViewOptions(model=model, compare=tmp_path, port=8192))
    try:
        first, second = (one.scene for one in shown.shown)
        np.testing.assert_allclose(second.xyz, first.xyz, atol=1e-6)
        np.testing.assert_array_equal(shown.second.position, 0)
        shown.beside.value = True
        shown._place()
        moved = second.xyz + shown.second.position
        right = shown.second.position / np.linalg.norm(shown.second.position)
        assert np.median(moved @ right) > np.quantile(first.xyz @ right, 0.98)
        assert abs(right @ first.up) < 1e-6
    finally:
        shown.server.stop()
