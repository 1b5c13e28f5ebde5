"""Exports, read back by the rules of the programs that they are for.

Each must draw the model's points where the model draws them.
"""

from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycolmap
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from synthetic import make_scene
from test_undistort import photograph, pixels, psnr, save, seen

from gim_hloc import colmap
from gim_hloc.colmap.dense import write_workspace
from gim_hloc.colmap.export import export_model
from gim_hloc.errors import InputError
from gim_hloc.options import TargetOptions

WIDTH, HEIGHT = 240, 180
CAMERAS = {
    "SIMPLE_PINHOLE": [212.0, 126.4, 85.0],
    "PINHOLE": [210.0, 214.0, 126.4, 85.0],
    "RADIAL": [210.0, 121.5, 88.2, -0.08, 0.01],
    "OPENCV": [210.0, 214.0, 118.5, 93.2, 0.05, -0.02, 0.003, -0.002],
    "OPENCV_FISHEYE": [150.0, 152.0, 121.0, 88.0, 0.02, -0.01, 0.004, 0.001],
}
NAMES = ("a.jpg", "cam 1/b.png", "cam 1/ü c.jpg", "d.jpg")


def build(*models: str, names: tuple[str, ...] = NAMES, folder: Path | None = None) -> Any:
    """An exact model: cameras on an arc, one model after the other; photographs where asked for.

    The photographs show a pattern that belongs to the directions of each camera.
    """
    scene = make_scene(images=len(names), points=60, arc_deg=40, names=sorted(names))
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-1.5, 1.5, (60, 3))
    result = pycolmap.Reconstruction()
    for number, model in enumerate(models, 1):
        camera = pycolmap.Camera(
            model=model, width=WIDTH, height=HEIGHT, params=CAMERAS[model], camera_id=number
        )
        result.add_camera_with_trivial_rig(camera)
    tracks = [pycolmap.Track() for _ in xyz]
    for number, name in enumerate(scene.names, 1):
        camera = result.camera((number - 1) % len(models) + 1)
        rotation, translation = scene.poses[name]
        xy = np.asarray(camera.img_from_cam(xyz @ rotation.T + translation))
        inside = np.flatnonzero(((xy > 0) & (xy < (WIDTH, HEIGHT))).all(1))
        for row, point in enumerate(inside):
            tracks[point].add_element(number, row)
        image = pycolmap.Image(name, xy[inside], camera.camera_id, number)
        pose = pycolmap.Rigid3d(np.column_stack([rotation, translation]))
        result.add_image_with_trivial_frame(image, pose)
        if folder is not None:
            save(folder / name, photograph(camera))
    for point, track in zip(xyz, tracks, strict=True):
        if track.length():
            result.add_point3D(point, track, rng.integers(0, 256, 3).astype(np.uint8))
    return result


def observed(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image -> points (N, 3) and where the model draws them (N, 2), COLMAP's frame."""
    found = {}
    for index in model.reg_image_ids():
        image = model.image(index)
        xyz = np.array([model.point3D(p.point3D_id).xyz for p in image.points2D if p.has_point3D()])
        found[image.name] = xyz, np.array([image.project_point(x) for x in xyz])
    return found


def camera_of(model: Any, name: str) -> Any:
    return next(i for i in map(model.image, model.reg_image_ids()) if i.name == name).camera


def assert_drawn(drawn: dict[str, np.ndarray], model: Any, *, part: bool = False) -> None:
    """The same points in the same places, to 0.01 px, in all images or a part of them."""
    truth = observed(model)
    assert part or drawn.keys() == truth.keys()
    for name, xy in drawn.items():
        np.testing.assert_allclose(xy, truth[name][1], atol=0.01, err_msg=name)


def flat(name: str) -> str:
    """The name of an image where folders and blanks are not wanted."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def as_stored(xy: np.ndarray, pinhole: np.ndarray, camera: Any) -> np.ndarray:
    """Pixels of an undistorted image (by its fx, fy, cx, cy) in the image as stored."""
    rays = (xy - pinhole[2:]) / pinhole[:2]
    return np.asarray(camera.img_from_cam(np.column_stack([rays, np.ones(len(rays))])))


# ---------------------------------------------------------------------------------- photogrammetry


def test_bundler(tmp_path: Path) -> None:
    made = build("RADIAL")
    (note,) = export_model(made, tmp_path, formats=("bundler",))
    assert "middle of the image as principal point" in note
    lines = (tmp_path / "bundle.out").read_text().splitlines()
    names = (tmp_path / "list.txt").read_text().splitlines()
    drawn = {}
    for number, name in enumerate(names):
        rows = [np.array(line.split(), float) for line in lines[2 + 5 * number :][:5]]
        f, k1, k2 = rows[0]
        x, y, z = np.array(rows[1:4]) @ observed(made)[name][0].T + rows[4][:, None]
        x, y = -x / z, -y / z  # it looks along -z, y up
        scaled = f * (1 + k1 * (x**2 + y**2) + k2 * (x**2 + y**2) ** 2)
        camera = camera_of(made, name)
        middle = (camera.principal_point_x, camera.principal_point_y)
        drawn[name] = np.column_stack([scaled * x, -scaled * y]) + middle
    assert_drawn(drawn, made)


def test_nvm(tmp_path: Path) -> None:
    made = build("SIMPLE_PINHOLE")
    (note,) = export_model(made, tmp_path, formats=("nvm",))
    assert "middle of the image as principal point" in note
    lines = (tmp_path / "model.nvm").read_text().splitlines()
    drawn = {}
    for line in lines[3 : 3 + int(lines[2])]:
        name, numbers = line.split("\t")
        f, w, x, y, z, *rest = map(float, numbers.split())
        rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
        name = name.replace('"', " ")
        p = (observed(made)[name][0] - rest[:3]) @ rotation.T
        camera = camera_of(made, name)
        middle = (camera.principal_point_x, camera.principal_point_y)
        drawn[name] = f * p[:, :2] / p[:, 2:] + middle
    assert_drawn(drawn, made)


def test_text_and_points(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    made = build("OPENCV")
    assert export_model(made, tmp_path, formats=("txt", "ply")) == []
    drawn = {name: xy for name, (_, xy) in observed(pycolmap.Reconstruction(tmp_path)).items()}
    # COLMAP's own reader ends a name at its first blank.
    assert_drawn({n: drawn[n.partition(" ")[0]] for n in ("a.jpg", "d.jpg")}, made, part=True)
    cloud = trimesh.load(tmp_path / "points.ply")
    points = [made.points3D[i] for i in sorted(made.point3D_ids())]
    np.testing.assert_allclose(cloud.vertices, [p.xyz for p in points], atol=1e-6)
    assert np.asarray(cloud.colors)[:, :3].tolist() == [p.color.tolist() for p in points]


class Stream:
    """A file of OpenMVS's interface, version 1."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:4] == b"MVSI"
        assert struct.unpack("<2I", self.data[4:12]) == (1, 0)
        self.at = 12

    def take(self, layout: str) -> Any:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values if len(values) > 1 else values[0]

    def text(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def listed(self, read: Any) -> list[Any]:
        return [read() for _ in range(self.take("Q"))]


def test_openmvs(tmp_path: Path) -> None:
    made = build("OPENCV", "RADIAL", folder=tmp_path / "in")
    notes = export_model(made, tmp_path / "e", formats=("openmvs",), images=tmp_path / "in")
    assert any("other names" in note for note in notes)  # folders are written into names
    s = Stream(tmp_path / "e/openmvs/scene.mvs")

    def lens() -> Any:
        s.text()
        size = s.take("2I")
        k, r, c = (np.array(s.take("9d")).reshape(3, 3), np.array(s.take("9d")), s.take("3d"))
        assert r.tolist() == np.eye(3).ravel().tolist()
        assert c == (0, 0, 0)
        return size, k

    def pose() -> Any:
        return np.array(s.take("9d")).reshape(3, 3), np.array(s.take("3d"))

    platforms = s.listed(lambda: (s.text(), s.listed(lens), s.listed(pose)))
    images = s.listed(lambda: (s.text(), *s.take("3I")))
    vertices = s.listed(lambda: (np.array(s.take("3f")), s.listed(lambda: s.take("If"))))
    assert s.listed(lambda: s.take("3f")) == []
    colours = s.listed(lambda: s.take("3B"))
    assert [s.take("Q") for _ in range(3)] == [0, 0, 0]
    assert s.at == len(s.data)

    points = {p.track.length(): p for p in made.points3D.values()}
    assert len(vertices) == len(colours) == made.num_points3D()
    first = made.points3D[min(made.point3D_ids())]
    assert colours[0] == tuple(first.color[::-1])
    assert len(vertices[0][1]) == first.track.length() > 0, points
    drawn = {}
    originals = {f"images/{flat(name)}": name for name in observed(made)}
    for path, platform, lens_id, pose_id in images:
        name = originals[path]
        (size, k), (rotation, centre) = (
            platforms[platform][1][lens_id],
            platforms[platform][2][pose_id],
        )
        with Image.open(tmp_path / "e/openmvs" / path) as file:
            assert file.size == size
        xyz, _ = observed(made)[name]
        p = (xyz - centre) @ rotation.T @ k.T
        xy = p[:, :2] / p[:, 2:] + 0.5  # integers are centres of pixels
        pinhole = np.array([k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5])
        drawn[name] = as_stored(xy, pinhole, camera_of(made, name))
    assert_drawn(drawn, made)


@pytest.mark.parametrize("model", CAMERAS)
def test_metashape(tmp_path: Path, model: str) -> None:
    made = build(model, names=("a.jpg", "b.jpg", "c.jpg"))
    assert export_model(made, tmp_path, formats=("metashape",)) == []
    chunk = ET.parse(tmp_path / "cameras.xml").getroot()[0]
    (sensor,) = chunk.iter("sensor")
    calibration = sensor.find("calibration")
    assert calibration is not None
    value = {e.tag: float(e.text or 0) for e in calibration if e.text and e.text.strip()}
    names = ("f", "cx", "cy", "b1", "k1", "k2", "k3", "k4", "p1", "p2")
    f, cx, cy, b1, k1, k2, k3, k4, p1, p2 = (value.get(name, 0.0) for name in names)
    drawn = {}
    for camera in chunk.iter("camera"):
        name = f"{camera.get('label')}.jpg"
        pose = np.array((camera.findtext("transform") or "").split(), float).reshape(4, 4)
        xyz, _ = observed(made)[name]
        x, y, z = ((xyz - pose[:3, 3]) @ pose[:3, :3]).T
        x, y = x / z, y / z
        if sensor.get("type") == "fisheye":
            r = np.hypot(x, y)
            x, y = x * np.arctan(r) / r, y * np.arctan(r) / r
        r2 = x**2 + y**2
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + k4 * r2**4
        u = x * radial + p1 * (r2 + 2 * x**2) + 2 * p2 * x * y
        v = y * radial + p2 * (r2 + 2 * y**2) + 2 * p1 * x * y
        drawn[name] = np.column_stack([WIDTH / 2 + cx + u * f + u * b1, HEIGHT / 2 + cy + v * f])
    assert_drawn(drawn, made)


def test_metashape_says_which_labels_are_not_unique(tmp_path: Path) -> None:
    made = build("PINHOLE", names=("a/1.jpg", "b/1.jpg"))
    (note,) = export_model(made, tmp_path, formats=("metashape",))
    assert "such as 1" in note


def test_realityscan(tmp_path: Path) -> None:
    made = build("RADIAL", folder=tmp_path / "in")
    assert (
        export_model(made, tmp_path / "e", formats=("realityscan",), images=tmp_path / "in") == []
    )
    folder = tmp_path / "e/realityscan"
    drawn = {}
    for name, (xyz, _) in observed(made).items():
        assert (folder / flat(name)).is_file()
        (about,) = ET.parse((folder / flat(name)).with_suffix(".xmp")).getroot()[0]
        xcr = "{http://www.capturingreality.com/ns/xcr/1.1#}"
        value = {key.removeprefix(xcr): text for key, text in about.attrib.items()}
        lists = {e.tag.removeprefix(xcr): np.array((e.text or "").split(), float) for e in about}
        rotation = lists["Rotation"].reshape(3, 3)
        x, y, z = rotation @ (xyz - lists["Position"]).T
        side = max(WIDTH, HEIGHT)
        f = float(value["FocalLength35mm"]) * side / 36
        cx = WIDTH / 2 + float(value["PrincipalPointU"]) * side
        cy = HEIGHT / 2 + float(value["PrincipalPointV"]) * side
        r2 = (x / z) ** 2 + (y / z) ** 2
        k1, k2, k3 = lists["DistortionCoeficients"]
        radial = f * (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3)
        drawn[name] = np.column_stack([cx + x / z * radial, cy + y / z * radial])
    assert_drawn(drawn, made)
    (note,) = export_model(build("OPENCV"), tmp_path / "f", formats=("realityscan",))
    assert "OPENCV" in note
    assert not (tmp_path / "f/realityscan").exists()
    (note,) = export_model(
        build("PINHOLE", folder=tmp_path / "in"), tmp_path / "g",
        formats=("realityscan",), images=tmp_path / "in",
    )  # fmt: skip
    assert "fx and fy became their mean" in note
    assert "principal" not in note


# ------------------------------------------------------------------------------------------ glTF


def test_glb(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    made = build("PINHOLE", "RADIAL")
    (note,) = export_model(made, tmp_path, formats=("glb",))
    assert "middle of the image" in note
    scene = trimesh.load(tmp_path / "model.glb")
    (cloud,) = (g for g in scene.geometry.values() if isinstance(g, trimesh.PointCloud))
    points = [made.points3D[i] for i in sorted(made.point3D_ids())]
    np.testing.assert_allclose(cloud.vertices, [p.xyz * (1, -1, -1) for p in points], atol=1e-6)
    assert np.asarray(cloud.colors)[:, :3].tolist() == [p.color.tolist() for p in points]
    data = (tmp_path / "model.glb").read_bytes()
    content = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])
    for node in (node for node in content["nodes"] if "camera" in node):
        lens = content["cameras"][node["camera"]]["perspective"]
        pose = np.array(node["matrix"]).reshape(4, 4).T
        xyz, xy = observed(made)[node["name"]]
        x, y, z = ((xyz * (1, -1, -1) - pose[:3, 3]) @ pose[:3, :3]).T
        assert (z < 0).all()  # a camera looks along -z, y up
        half = np.tan(lens["yfov"] / 2)
        camera = camera_of(made, node["name"])
        if camera.model_name == "PINHOLE":  # else distorted
            middle = np.array([WIDTH, HEIGHT]) / 2
            drawn = np.column_stack([x / -z / half / lens["aspectRatio"], -y / -z / half])
            offset = np.array([camera.principal_point_x, camera.principal_point_y]) - middle
            np.testing.assert_allclose(drawn * middle + middle + offset, xy, atol=0.01)


# ------------------------------------------------------------------------------- radiance fields


def mask_of(name: str) -> np.ndarray | None:
    """The left half of an image does not count; d.jpg has no mask."""
    keep = np.ones((HEIGHT, WIDTH), bool)
    keep[:, : WIDTH // 2] = False
    return None if name == "d.jpg" else keep


def check_3dgs(folder: Path, made: Any) -> Any:
    """By the rules of the reference loader: PINHOLE, field of view only, images by base names."""
    result = pycolmap.Reconstruction(folder / "sparse/0")
    assert result.num_reg_images() == made.num_reg_images()
    drawn = {}
    for index in result.reg_image_ids():
        image, camera = result.image(index), result.image(index).camera
        assert camera.model_name == "PINHOLE"
        with Image.open(folder / "images" / PurePosixPath(image.name).name) as file:
            found = np.asarray(file)
            assert file.getexif().get(0x0112, 1) == 1
        assert found.shape == (camera.height, camera.width, 3)
        fx, fy = camera.params[:2]
        pinhole = np.array([fx, fy, camera.width / 2, camera.height / 2])
        rays = (pixels(camera.width, camera.height) - pinhole[2:]) / pinhole[:2]
        assert psnr(found[3:-3, 3:-3], seen(rays)[3:-3, 3:-3]) > 34, image.name
        stored = made.image(index)
        xyz, _ = observed(made)[stored.name]
        view = np.asarray(image.cam_from_world().matrix()) @ np.vstack([xyz.T, np.ones(len(xyz))])
        xy = (view[:2] / view[2]).T * pinhole[:2] + pinhole[2:]
        drawn[stored.name] = as_stored(xy, pinhole, stored.camera)
    assert_drawn(drawn, made)
    return result


@pytest.mark.parametrize("kind", ["heic", "turned", "masked", "two cameras"])
def test_3dgs_of(kind: str, tmp_path: Path) -> None:
    names = ("a.heic", "b.HEIC".lower(), "c/a.heic") if kind == "heic" else NAMES
    models = ("OPENCV", "RADIAL") if kind == "two cameras" else ("OPENCV",)
    made = build(*models, names=names, folder=tmp_path / "in")
    if kind == "turned":
        for name in names:
            with Image.open(tmp_path / "in" / name) as image:
                stored = np.asarray(image)
            save(tmp_path / "in" / name, stored, orientation=6)
    notes = export_model(
        made, tmp_path / "e", formats=("3dgs",), images=tmp_path / "in",
        mask=mask_of if kind == "masked" else None, options=TargetOptions(num_downscales=2),
    )  # fmt: skip
    folder = tmp_path / "e/3dgs"
    result = check_3dgs(folder, made)
    assert any("lost their EXIF orientation" in note for note in notes) == (kind == "turned")
    assert len(result.cameras) == len(models)
    for factor in (2, 4):
        for image in map(result.image, result.reg_image_ids()):
            camera = image.camera
            with Image.open(folder / f"images_{factor}" / image.name) as file:
                assert file.size == (camera.width // factor, camera.height // factor)
    assert (folder / "masks").exists() == (folder / "masks_2").exists() == (kind == "masked")
    if kind != "masked":
        return
    for image in map(result.image, result.reg_image_ids()):
        with Image.open((folder / "masks" / image.name).with_suffix(".png")) as file:
            keep = np.asarray(file)
        camera = image.camera
        assert keep.shape == (camera.height, camera.width)
        grid = pixels(camera.width, camera.height).reshape(-1, 2)
        x = as_stored(grid, np.array(camera.params), made.image(image.image_id).camera)[:, 0]
        if made.image(image.image_id).name != "d.jpg":
            sure = np.abs(x - WIDTH / 2) > 1
            inside = (x > 1) & (x < WIDTH - 1)
            wanted = (x > WIDTH / 2)[sure & inside]
            assert ((keep.ravel() > 0)[sure & inside] == wanted).mean() > 0.999


def test_dense_maps_and_points_go_with_3dgs(tmp_path: Path) -> None:
    made = build("OPENCV", folder=tmp_path / "in")
    images, dense = tmp_path / "in", tmp_path / "dense"
    with pytest.raises(InputError, match="--dense-points wants the dense cloud"):
        export_model(
            made, tmp_path / "e", formats=("3dgs",), images=images,
            options=TargetOptions(dense_points=1000),
        )  # fmt: skip
    # The dense model as COLMAP leaves it: a plane z = 5 in front of every camera.
    flat, _ = colmap.undistort(images, made, dense / "images")
    write_workspace(flat, dense, neighbours=6)
    workspace = pycolmap.Reconstruction(dense / "sparse")
    views = [workspace.image(i) for i in sorted(workspace.reg_image_ids())]
    for number, view in enumerate(views[:-1]):
        depth = np.full((view.camera.height, view.camera.width), 5.0 + number, np.float32)
        depth[:20] = 0
        path = dense / "stereo/depth_maps" / f"{view.name}.geometric.bin"
        pycolmap.DepthMap.from_array(depth, 1.0, 9.0).write(path)
    cloud = pycolmap.Reconstruction()
    far = np.random.default_rng(1).uniform(50, 60, (2000, 3))
    for xyz in far:
        cloud.add_point3D(xyz, pycolmap.Track(), np.array([1, 2, 3], np.uint8))
    cloud.export_PLY(str(dense / "dense.ply"))
    (note,) = [
        note
        for note in export_model(
            made, tmp_path / "e", formats=("3dgs",), images=images, dense=dense,
            options=TargetOptions(dense_points=1000),
        )
        if "depth" in note
    ]  # fmt: skip
    assert "1 images have no depth map" in note
    folder = tmp_path / "e/3dgs"
    result = check_3dgs(folder, made)
    assert result.num_points3D() == 1000
    assert (
        sum(p.track.length() == 0 for p in result.points3D.values()) == 1000 - made.num_points3D()
    )
    params = json.loads((folder / "sparse/0/depth_params.json").read_text())
    assert len(params) == len(views) - 1
    for number, view in enumerate(views[:-1]):
        image = result.image(view.image_id)
        stem = image.name.rpartition(".")[0]
        with Image.open(folder / "depths" / f"{stem}.png") as file:
            values = np.asarray(file).astype(float)
        inverse = values / 2**16 * params[stem]["scale"] + params[stem]["offset"]
        assert inverse.shape == (image.camera.height, image.camera.width)
        assert inverse[-5, 50] == pytest.approx(1 / (5 + number), rel=1e-3)
        assert values[0, 50] == 0


def test_nerfstudio(tmp_path: Path) -> None:
    """By the rules of its data parser: frames, masks for all or none, copies by base name."""
    made = build("OPENCV", "RADIAL", folder=tmp_path / "in")
    with Image.open(tmp_path / "in/cam 1/b.png") as file:
        file.convert("P").save(tmp_path / "in/cam 1/b.png")  # not what nerfstudio reads
    notes = export_model(
        made, tmp_path / "e", formats=("nerfstudio",), images=tmp_path / "in", mask=mask_of,
        options=TargetOptions(num_downscales=1),
    )  # fmt: skip
    assert notes == []
    folder = tmp_path / "e/nerfstudio"
    content = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))
    world = np.vstack([content["applied_transform"], [0, 0, 0, 1]])
    drawn = {}
    for frame in content["frames"]:
        name = frame["file_path"].removeprefix("images/")
        path = folder / frame["file_path"]
        with Image.open(path) as image, Image.open(folder / frame["mask_path"]) as mask:
            assert image.mode == "RGB"
            assert image.size == mask.size == (frame["w"], frame["h"])
            assert np.asarray(mask)[5, 5] == (255 if name == "d.jpg" else 0)
        assert path.is_symlink() == (name != "cam 1/b.png")
        for kind, base in (("images", path.name), ("masks", Path(frame["mask_path"]).name)):
            with Image.open(folder / f"{kind}_2" / base) as small:
                assert small.size == (WIDTH // 2, HEIGHT // 2)
        pose = np.array(frame["transform_matrix"])
        xyz, _ = observed(made)[name]
        p = np.linalg.inv(pose) @ world @ np.vstack([xyz.T, np.ones(len(xyz))])
        x, y = p[0] / -p[2], -p[1] / -p[2]
        r2 = x**2 + y**2
        k1, k2, p1, p2 = (frame.get(k, 0.0) for k in ("k1", "k2", "p1", "p2"))
        u = x * (1 + k1 * r2 + k2 * r2**2) + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
        v = y * (1 + k1 * r2 + k2 * r2**2) + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
        drawn[name] = np.column_stack(
            [frame["fl_x"] * u + frame["cx"], frame["fl_y"] * v + frame["cy"]]
        )
    assert_drawn(drawn, made)
    assert (folder / content["ply_file_path"]).is_file()


def test_nerfstudio_images_of_one_base_name_keep_apart(tmp_path: Path) -> None:
    made = build("PINHOLE", names=("a/1.jpg", "b/1.jpg"), folder=tmp_path / "in")
    (note,) = export_model(made, tmp_path, formats=("nerfstudio",), images=tmp_path / "in")
    assert "a/1.jpg: a_1.jpg" in note
    assert (tmp_path / "nerfstudio/images/b_1.jpg").is_file()
