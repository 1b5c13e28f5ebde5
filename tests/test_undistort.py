"""Undistorted images show what their pinhole model says, whatever format they came in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from PIL import Image

from gim_hloc import colmap, images
from gim_hloc.colmap import dense
from gim_hloc.colmap.export import export_model
from gim_hloc.errors import InputError
from gim_hloc.images import read_rgb

LOADER = Path(__file__).parents[2] / "shared" / "cases" / "like_3dgs.py"
WIDTH, HEIGHT = 240, 180
CAMERAS = {
    "SIMPLE_RADIAL": [210.0, 126.0, 85.0, -0.08],
    "OPENCV": [210.0, 214.0, 118.5, 93.2, 0.05, -0.02, 0.001, -0.002],
    "PINHOLE": [210.0, 214.0, 126.4, 85.0],
    "SIMPLE_PINHOLE": [210.0, 120.0, 90.0],
    "OPENCV_FISHEYE": [150.0, 150.0, 120.0, 90.0, 0.02, 0.0, 0.0, 0.0],
}
POINTS = np.array([[0.1, 0.05, 2.0], [-0.3, 0.2, 3.0], [0.2, -0.25, 2.5], [0.0, 0.0, 2.0]])


def seen(rays: np.ndarray) -> np.ndarray:
    """Colours (..., 3) that lie behind rays (..., 2) with z = 1."""
    x, y = 9 * rays[..., 0], 9 * rays[..., 1]
    waves = [np.sin(x) * np.cos(y), np.sin(x + 2 * y), np.cos(2 * x - y)]
    return np.rint(128 + 100 * np.stack(waves, -1)).astype(np.uint8)


def pixels(width: int, height: int) -> np.ndarray:
    """(H, W, 2) pixel centres, COLMAP's frame."""
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)


def photograph(camera: pycolmap.Camera) -> np.ndarray:
    grid = pixels(camera.width, camera.height)
    return seen(np.asarray(camera.cam_from_img(grid.reshape(-1, 2))).reshape(*grid.shape[:2], -1))


def make(folder: Path, model: str, names: tuple[str, ...], params: Any = None) -> Any:
    """Photographs of one camera at the origin, and their model."""
    camera = pycolmap.Camera(
        model=model, width=WIDTH, height=HEIGHT, params=params or CAMERAS[model], camera_id=1
    )
    result = pycolmap.Reconstruction()
    result.add_camera_with_trivial_rig(camera)
    colours = photograph(camera)
    for i, name in enumerate(names, start=1):
        xy = np.asarray(camera.img_from_cam(POINTS))
        image = pycolmap.Image(name, xy, 1, i)
        result.add_image_with_trivial_frame(image, pycolmap.Rigid3d())
        save(folder / name, colours)
    for row, xyz in enumerate(POINTS):
        track = pycolmap.Track()
        for i in range(1, len(names) + 1):
            track.add_element(i, row)
        result.add_point3D(xyz, track, np.array([9, 8, 7], np.uint8))
    return result


def save(path: Path, array: np.ndarray, *, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, options = Image.fromarray(array), {}
    if path.suffix == ".heic":
        pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        pillow_heif.from_pillow(image).save(path, quality=98)
        return
    if path.suffix == ".webp":
        options = {"lossless": True}
    elif path.suffix == ".jpg":
        options = {"quality": 98, "subsampling": 0}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))


def check_written(result: Any, folder: Path) -> None:
    """Every pixel and every keypoint lies where the pinhole camera puts it."""
    for index in result.reg_image_ids():
        view = result.image(index)
        camera = result.camera(view.camera_id)
        assert camera.model_name == "PINHOLE"
        with Image.open(folder / view.name) as file:
            found = np.asarray(file)
            assert file.getexif().get(0x0112, 1) == 1
        assert found.shape == (camera.height, camera.width, 3)
        fx, fy, cx, cy = camera.params
        rays = (pixels(camera.width, camera.height) - (cx, cy)) / (fx, fy)
        assert psnr(found[3:-3, 3:-3], seen(rays)[3:-3, 3:-3]) > 36, view.name
        for point in view.points2D:
            xyz = result.points3D[point.point3D_id].xyz
            np.testing.assert_allclose(view.project_point(xyz), point.xy, atol=1e-3)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("model", CAMERAS)
def test_pixels_and_keypoints_lie_where_the_pinhole_camera_puts_them(tmp_path, model, centred):
    made = make(tmp_path / "in", model, ("a.png", "cam 1/b.jpg"))
    result, notes = colmap.undistort(tmp_path / "in", made, tmp_path / "out", centred=centred)
    check_written(result, tmp_path / "out")
    (camera,) = result.cameras.values()
    if centred:
        assert list(camera.params[2:]) == [camera.width / 2, camera.height / 2]
    assert not any("other names" in note for note in notes)
    (source,) = made.cameras.values()
    assert source.model_name == model  # the given model stays


def test_without_distortion_the_pixels_stay(tmp_path):
    made = make(tmp_path / "in", "SIMPLE_PINHOLE", ("a.png",))
    colmap.undistort(tmp_path / "in", made, tmp_path / "out", centred=True)
    assert np.array_equal(read_rgb(tmp_path / "in/a.png"), read_rgb(tmp_path / "out/a.png"))


def test_the_frame_is_colmaps(tmp_path):
    made = make(tmp_path / "in", "SIMPLE_RADIAL", ("a.png",))
    made_folder = tmp_path / "model"
    made_folder.mkdir()
    made.write_binary(made_folder)
    pycolmap.undistort_images(tmp_path / "theirs", made_folder, tmp_path / "in")
    result, _ = colmap.undistort(tmp_path / "in", made, tmp_path / "ours")
    theirs = pycolmap.Reconstruction(tmp_path / "theirs" / "sparse")
    assert str(theirs.cameras[1]) == str(result.cameras[1])
    for a, b in zip(theirs.image(1).points2D, result.image(1).points2D, strict=True):
        np.testing.assert_allclose(a.xy, b.xy, atol=1e-6)
    pictures = [read_rgb(tmp_path / name) for name in ("theirs/images/a.png", "ours/a.png")]
    assert psnr(*(picture[2:-2, 2:-2] for picture in pictures)) > 34


ODD = ("a.heic", "a.jpg", "a.webp", "deep/a.tif", "ü/雪 1.webp", "x.bmp")


def test_3dgs_reads_what_is_exported_of_any_format(tmp_path):
    made = make(tmp_path / "in", "SIMPLE_RADIAL", ODD)
    notes = export_model(made, tmp_path / "e", formats=("3dgs",), images=tmp_path / "in")
    folder = tmp_path / "e" / "3dgs"
    result = pycolmap.Reconstruction(folder / "sparse" / "0")
    written = {result.image(i).name for i in result.reg_image_ids()}
    assert written == {path.name for path in (folder / "images").iterdir()}
    assert len(written) == len(ODD)
    assert all(name.isascii() and "/" not in name for name in written)
    assert "a.jpg" in written  # a name that needs no change is not changed for another's sake
    check_written(result, folder / "images")
    assert any("5 images have other names there, 5 of them converted" in note for note in notes)
    if LOADER.is_file():
        done = subprocess.run(
            [sys.executable, str(LOADER), str(folder)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == [
            "cameras accepted",
            f"images {len(ODD)} not found by base name: [] names it cannot decode: [] "
            "same base name: 0",
        ]


def test_3dgs_start_points_have_normals(tmp_path):
    made = make(tmp_path / "in", "PINHOLE", ("a.png",))
    export_model(made, tmp_path / "e", formats=("3dgs",), images=tmp_path / "in")
    data = (tmp_path / "e/3dgs/sparse/0/points3D.ply").read_bytes()
    head, body = data.split(b"end_header\n")
    names = [line.split()[-1].decode() for line in head.splitlines() if b"property" in line]
    assert names == ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
    rows = np.frombuffer(body, [*((n, "<f4") for n in names[:6]), *((n, "u1") for n in names[6:])])
    np.testing.assert_allclose(np.stack([rows[a] for a in "xyz"], 1), POINTS, atol=1e-6)
    assert rows["red"].tolist() == [9] * len(POINTS)


def test_turned_images_stay_as_stored_and_are_counted(tmp_path):
    made = make(tmp_path / "in", "SIMPLE_RADIAL", ("a.jpg", "b.png"))
    with Image.open(tmp_path / "in/a.jpg") as image:
        stored = np.asarray(image)
    for name in ("a.jpg", "b.png"):
        save(tmp_path / "in" / name, stored, orientation=6)
    result, notes = colmap.undistort(tmp_path / "in", made, tmp_path / "out")
    check_written(result, tmp_path / "out")
    assert any(note.startswith("2 images lost their EXIF orientation") for note in notes)


def test_a_cut_frame_is_told(tmp_path):
    made = make(tmp_path / "in", "PINHOLE", ("a.png",), [210.0, 210.0, 90.0, 90.0])
    result, notes = colmap.undistort(tmp_path / "in", made, tmp_path / "out", centred=True)
    assert (result.cameras[1].width, result.cameras[1].height) == (180, 180)
    assert any("cut from 240 x 180 to 180 x 180" in note for note in notes)
    outside = make(tmp_path / "in", "PINHOLE", ("a.png",), [210.0, 210.0, 250.0, 90.0])
    with pytest.raises(InputError, match="not inside the image"):
        colmap.undistort(tmp_path / "in", outside, tmp_path / "out", centred=True)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_names_that_leave_the_image_root_are_refused(tmp_path, name):
    made = make(tmp_path / "in", "PINHOLE", ("a.png",))
    save(tmp_path / "secret.png", photograph(made.cameras[1]))
    made.image(1).name = name
    with pytest.raises(InputError, match="secret"):
        colmap.undistort(tmp_path / "in", made, tmp_path / "out" / "images")
    assert not (tmp_path / "out").exists()


def test_missing_images_are_an_error(tmp_path, monkeypatch):
    made = make(tmp_path / "in", "SIMPLE_RADIAL", ("a.png", "b.png"))

    def write() -> None:
        export_model(made, tmp_path / "out", formats=("3dgs",), images=tmp_path / "in")

    (tmp_path / "in/b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png"):
        write()
    save(tmp_path / "in/b.png", np.zeros((HEIGHT, WIDTH // 2, 3), np.uint8))
    with pytest.raises(InputError, match=r"b\.png has 120 x 180 pixels, its camera"):
        write()
    # Deleted while others are being read.
    read = images.read_stored

    def gone(path: Path) -> Any:
        (tmp_path / "in/b.png").unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(sys.modules["gim_hloc.colmap.undistort"], "read_stored", gone)
    with pytest.raises(InputError, match=r"b\.png cannot be read"):
        write()
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_dense_workspace_of_colmap(tmp_path):
    made = make(tmp_path / "in", "SIMPLE_RADIAL", ("a.webp", "cam/b.jpg"))
    flat, said = colmap.undistort(tmp_path / "in", made, tmp_path / "out" / "images")
    dense.write_workspace(flat, tmp_path / "out", neighbours=6)
    names = ["a.jpg", "cam/b.jpg"]
    result = pycolmap.Reconstruction(tmp_path / "out" / "sparse")
    assert sorted(result.image(i).name for i in result.reg_image_ids()) == names
    check_written(result, tmp_path / "out" / "images")
    stereo = tmp_path / "out" / "stereo"
    assert (stereo / "fusion.cfg").read_text().split() == names
    assert (stereo / "depth_maps" / "cam").is_dir()
    assert any("1 images have other names there, 1 of them converted" in s for s in said)


def test_nerfstudio_paths_lead_to_the_images_through_links(tmp_path):
    made = make(tmp_path / "disk/a/b/photos", "PINHOLE", ("a.png", "c d/é.png"))
    (tmp_path / "images").symlink_to(tmp_path / "disk/a/b/photos")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere/deep")
    target = tmp_path / "out" / "export" / "0"
    export_model(made, target, formats=("nerfstudio",), images=tmp_path / "images")
    target /= "nerfstudio"
    frames = json.loads((target / "transforms.json").read_text(encoding="utf-8"))["frames"]
    assert len(frames) == 2
    for frame in frames:
        assert (target / frame["file_path"]).is_symlink()
        assert (target / frame["file_path"]).is_file()


def test_bundler_and_nvm_say_how_far_points_move(tmp_path):
    made = make(tmp_path / "in", "PINHOLE", ("a b.png",), [210.0, 214.0, 126.0, 82.0])
    bundler, nvm = export_model(made, tmp_path / "e", formats=("bundler", "nvm"))
    off = np.hypot(126 - 120, 82 - 90)
    for note in (bundler, nvm):
        assert f"({off:.2f} px)" in note
        assert "fx and fy" in note
    lines = (tmp_path / "e/bundle.out").read_text().splitlines()
    focal = float(lines[2].split()[0])
    rotation = np.array([line.split() for line in lines[3:6]], float)
    shift = np.array(lines[6].split(), float)
    moved = []
    for index in range(len(POINTS)):
        at = 7 + 3 * index
        x, y, z = rotation @ np.array(lines[at].split(), float) + shift
        drawn = WIDTH / 2 - focal * x / z, HEIGHT / 2 + focal * y / z
        key = int(lines[at + 2].split()[2])
        moved.append(np.linalg.norm(drawn - made.image(1).point2D(key).xy))
    assert max(moved) == pytest.approx(off, abs=0.6)  # the rest is fx and fy


def test_nvm_says_what_its_one_radial_term_loses(tmp_path):
    made = make(tmp_path / "in", "RADIAL", ("a.png",), [210.0, 120.0, 90.0, -0.05, 0.02])
    assert export_model(made, tmp_path / "e", formats=("bundler",)) == []
    (note,) = export_model(made, tmp_path / "e", formats=("nvm",))
    assert "one radial term" in note
