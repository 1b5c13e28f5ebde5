"""Files that users bring: read right, or refused by name. No image is matched here."""

from __future__ import annotations

import json
import shutil
import struct
import unicodedata
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pycolmap
import pytest
from synthetic import HEIGHT, WIDTH, make_scene, write_cameras
from test_known_poses import PARAMS, assert_poses, write_nerfstudio, write_tum

from gim_hloc import colmap, matchers
from gim_hloc.colmap.undistort import undistort
from gim_hloc.errors import InputError
from gim_hloc.hloc_plugin import match_dense
from gim_hloc.images import Exif, ImageRecord
from gim_hloc.options import CameraOptions, VerifyOptions
from gim_hloc.pairs.files import read_pairs
from gim_hloc.pairs.retrieval import read_global_descriptors
from gim_hloc.pipelines.imported import ImportedMatcher
from gim_hloc.pipelines.localize import _stored_vlad
from gim_hloc.poses import match_names, read_poses
from gim_hloc.store import H5Store, read_matches
from gim_hloc.training.data.depth_maps import read_depth
from gim_hloc.training.data.zeromatch import read_labels

SCENE = make_scene(points=20)
NAMES = SCENE.names
COMPOSED, SPLIT = (unicodedata.normalize(form, "für.jpg") for form in ("NFC", "NFD"))


def record(name: str, width: int = WIDTH, height: int = HEIGHT) -> ImageRecord:
    return ImageRecord(
        name=name, path=Path(name), width=width, height=height, sha256=name, exif=Exif()
    )


def given(intrinsics: Path | str, *names: str, **size: int) -> dict[str, Any]:
    """Image name -> parameters of the camera that it was given."""
    cameras, _ = colmap.assign_cameras(
        [record(name, **size) for name in names], CameraOptions(intrinsics=str(intrinsics))
    )
    return {name: c.params for c in cameras if c.given for name in c.names}


# ------------------------------------------------------------------------------------ intrinsics


def test_a_camera_may_be_longer_than_a_file_name() -> None:
    params = [647.12345678901234] * 2 + [400.12345678901234, 300.12345678901234]
    params += [-0.018671841117506566] * 8
    text = "FULL_OPENCV," + ",".join(repr(p) for p in params)
    assert len(text) > 255
    assert given(text, "a.jpg") == {"a.jpg": tuple(params)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cameras.txt", "1 PINHOLE 1600 1200 9 9 8 6\n2 PINHOLE 1200 1600 9 9 6 8\n",
         "Its cameras are of 1600x1200, 1200x1600"),
        ("q.txt", "query/a.jpg PINHOLE 800 600 5 5 4 3\n", "first line is for 'query/a.jpg'"),
        ("my.txt", "1 PINHOLE 800 600 5 5 4 3\n", "has the name cameras.txt"),
    ],
)  # fmt: skip
def test_intrinsics_that_fit_no_image(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"names no camera of the 2 images \(first: a.jpg") as e:
        given(tmp_path / name, "a.jpg", "b.jpg")
    assert message in str(e.value)


def test_names_win_over_globs(tmp_path: Path) -> None:
    path = tmp_path / "k.txt"
    lines = [f"{head} PINHOLE 800 600 {f} {f} 400 300\n" for head, f in (
        ("IMG*", 500), ("IMG[1].jpg", 501), ("IMG[2].jpg", 502), (SPLIT, 503), ("[a-c].jpg", 504),
    )]  # fmt: skip
    path.write_text("".join(lines), encoding="utf-8")
    names = ("IMG[1].jpg", "IMG[2].jpg", "IMG1.jpg", COMPOSED, "b.jpg", "d.jpg")
    assert {name: params[0] for name, params in given(path, *names).items()} == {
        "IMG[1].jpg": 501, "IMG[2].jpg": 502, "IMG1.jpg": 500, COMPOSED: 503, "b.jpg": 504,
    }  # fmt: skip


def test_cameras_of_a_binary_model(tmp_path: Path) -> None:
    model = colmap.read_model(write_cameras(SCENE.poses, tmp_path / "text"))
    folder = tmp_path / "run" / "sparse" / "0"
    folder.mkdir(parents=True)
    model.write(folder)
    expected = dict.fromkeys(NAMES, PARAMS)
    for path in (folder / "cameras.bin", folder, tmp_path / "run", tmp_path / "text"):
        assert given(path, *NAMES) == expected
    # Which of two cameras an image has is in images.bin.
    other = pycolmap.Camera(
        model="OPENCV", width=WIDTH, height=HEIGHT, params=[*PARAMS, 0.1, 0, 0, 0], camera_id=7
    )
    model.add_camera_with_trivial_rig(other)
    extra = pycolmap.Image(name="new.jpg", camera_id=7, image_id=99)
    model.add_image_with_trivial_frame(extra, pycolmap.Rigid3d())
    model.write(folder)
    found = given(folder, NAMES[0], "new.jpg")
    assert found == {NAMES[0]: PARAMS, "new.jpg": (*PARAMS, 0.1, 0, 0, 0)}
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds no cameras.bin or cameras.txt"):
        given(tmp_path / "none", "a.jpg")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("PINHOLE 800 600 700 700 900 300", r"principal point \(900, 300\) lies outside"),
        ("PINHOLE 800 600 700 700 400 -1", "principal point"),
        ("SIMPLE_RADIAL 800 600 700 400 601 0", "principal point"),
        ("PINHOLE 800 600 0 700 400 300", "positive"),
        ("PINHOLE 800 600 -700 700 400 300", "positive"),
        ("PINHOLE 800 600 nan 700 400 300", "finite"),
        ("PINHOLE 800 600 inf 700 400 300", "finite"),
        ("PINHOLE 800 600 0.9 0.9 0.5 0.5", "pixels, not in shares"),
        ("PINHOLE -800 600 700 700 0 0", "-800x600"),
        ("PINHOLE 800 0 700 700 400 0", "800x0"),
        ("PINHOLE 800.5 600 700 700 400 300", "expected 'CAMERA_ID MODEL"),
        ("PINHOLE 800 600 700", "takes 4 parameters"),
    ],
)
def test_absurd_cameras_are_refused_by_line(params: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "k.txt"
    path.write_text(f"# mine\n\n*.jpg {params}\n")
    with pytest.raises(InputError, match=message) as e:
        given(path, "a.jpg")
    assert str(e.value).startswith(f"{path}, line 3: ")


def test_a_principal_point_outside_every_image() -> None:
    with pytest.raises(InputError, match=r"principal point \(1000, 300\) lies outside"):
        given("PINHOLE,700,700,1000,300", "a.jpg")
    with pytest.raises(InputError, match="outside the image of 800x600"):
        given("SIMPLE_RADIAL,700,400,3000,0", "a.jpg")


# ----------------------------------------------------------------------------------------- poses


@pytest.mark.parametrize(
    ("stamps", "numbers"),
    [
        (range(8), range(1, 9)),  # lines counted from 0, names from 1
        (range(1, 9), range(8)),
        (range(0, 80, 10), range(1, 9)),
        ([0, 1, 2, 3, 5, 6, 7, 8], range(8)),
    ],
)
def test_trajectories_counted_from_another_start_go_in_order(
    stamps: Any, numbers: Any, tmp_path: Path
) -> None:
    poses = [SCENE.poses[name] for name in NAMES]
    names = [f"frame_{number:05d}.jpg" for number in numbers]
    found = read_poses(write_tum(tmp_path / "t.txt", poses, list(stamps)), names)
    assert_poses(found.poses, dict(zip(names, poses, strict=True)), 1e-9)
    assert "in order" in found.notes[0]


def test_trajectories_that_may_be_shifted_are_refused(tmp_path: Path) -> None:
    poses = [SCENE.poses[name] for name in NAMES]
    path = write_tum(tmp_path / "t.txt", poses, [*range(8)])
    # One image fewer, from 1: line 0 has none, and line 7 the number of the last.
    with pytest.raises(InputError, match=r"8 poses for 9 images.*7 fit"):
        read_poses(path, [f"{i:04d}.jpg" for i in range(1, 10)])
    times = [1305031102.0 + 0.1 * i for i in range(8)]
    path = write_tum(tmp_path / "t.txt", poses, times)
    with pytest.raises(InputError, match="fit the names of 7 images, and not in order"):
        read_poses(path, [f"{time + 0.1:.6f}.png" for time in times])
    # Some lines for some images is what trajectories of keyframes are.
    path = write_tum(tmp_path / "t.txt", poses[:3], [2, 5, 7])
    found = read_poses(path, [f"{i:04d}.jpg" for i in range(1, 9)])
    expected = {"0002.jpg": poses[0], "0005.jpg": poses[1], "0007.jpg": poses[2]}
    assert sorted(found.poses) == sorted(expected)
    assert_poses(found.poses, expected, 1e-9)


def test_images_txt_with_one_line_an_image(tmp_path: Path) -> None:
    for count in (len(NAMES), len(NAMES) - 1, 1):
        folder = write_cameras({n: SCENE.poses[n] for n in NAMES[:count]}, tmp_path / f"m{count}")
        path = folder / "images.txt"
        path.write_text("".join(line + "\n" for line in path.read_text().split("\n") if line))
        found = read_poses(folder, NAMES)
        assert sorted(found.poses) == NAMES[:count]
        assert_poses(found.poses, {n: SCENE.poses[n] for n in NAMES[:count]}, 1e-12)
        # Without the size to go by, the list beside the cameras must be right.
        with (folder / "cameras.txt").open("a") as file:
            file.write(f"2 PINHOLE {WIDTH} {HEIGHT} 9 9 8 6\n")
        assert given(folder / "cameras.txt", *NAMES[:count]) == dict.fromkeys(NAMES[:count], PARAMS)


def test_images_txt_without_the_last_empty_line(tmp_path: Path) -> None:
    folder = write_cameras({n: SCENE.poses[n] for n in NAMES}, tmp_path / "m")
    path = folder / "images.txt"
    path.write_text(path.read_text().rstrip("\n") + "\n")
    assert_poses(read_poses(folder, NAMES).poses, {n: SCENE.poses[n] for n in NAMES}, 1e-12)


def test_images_txt_keeps_observations_and_blanks_in_names(tmp_path: Path) -> None:
    folder = write_cameras({"a b 3.jpg": SCENE.poses[NAMES[0]]}, tmp_path / "m")
    lines = (folder / "images.txt").read_text().split("\n")
    second = lines[0].replace("1 ", "2 ", 1).replace("a b 3.jpg", "12")
    lines[1] = "10.5 20.5 -1 30 40 -1"
    (folder / "images.txt").write_text("\n".join([lines[0], lines[1], second]))
    model = colmap.read_model(folder)
    assert {model.image(i).name: len(model.image(i).points2D) for i in (1, 2)} == {
        "a b 3.jpg": 2, "12": 0,
    }  # fmt: skip


@pytest.mark.parametrize("length", [0.9, 1.05, 2.0, 0.0, float("nan")])
def test_quaternions_of_another_length(length: float, tmp_path: Path) -> None:
    folder = write_cameras(SCENE.poses, tmp_path / "m")
    lines = (folder / "images.txt").read_text().split("\n")
    fields = lines[2].split()
    fields[1:5] = [repr(float(value) * length) for value in fields[1:5]]
    (folder / "images.txt").write_text("\n".join([*lines[:2], " ".join(fields), *lines[3:]]))
    with pytest.raises(InputError, match=r"images\.txt, line 3: the quaternion has length"):
        read_poses(folder, NAMES)
    path = write_tum(tmp_path / "t.txt", [SCENE.poses[n] for n in NAMES], [*range(8)])
    lines = path.read_text().split("\n")
    fields = lines[4].split()
    fields[4:] = [repr(float(value) * length) for value in fields[4:]]
    path.write_text("\n".join([*lines[:4], " ".join(fields), *lines[5:]]))
    with pytest.raises(InputError, match=r"line 5: (the quaternion has length|expected)"):
        read_poses(path, NAMES)


def test_rounded_quaternions_are_read(tmp_path: Path) -> None:
    path = write_tum(tmp_path / "t.txt", [SCENE.poses[n] for n in NAMES], [*range(8)])
    lines = path.read_text().split("\n")
    rounded = [" ".join(f"{float(v):.4f}" for v in line.split()) for line in lines[1:] if line]
    path.write_text("\n".join(rounded))
    assert_poses(read_poses(path, NAMES).poses, SCENE.poses, 2e-3)


def nerfstudio(tmp_path: Path, shared: dict[str, Any], frame: dict[str, Any]) -> Any:
    """The camera that a transforms.json gives its first image."""
    path = write_nerfstudio(tmp_path / "transforms.json", SCENE.poses)
    content = json.loads(path.read_text()) | shared
    content["frames"][0] |= frame
    path.write_text(json.dumps(content))
    return read_poses(path, NAMES).cameras[NAMES[0]]


FISHEYE = {"camera_model": "OPENCV_FISHEYE"}


@pytest.mark.parametrize(
    ("shared", "frame", "model", "distortion"),
    [
        ({"k1": 0.1, "k2": 0.2, "p1": 0.01, "p2": 0.02}, {}, "OPENCV", (0.1, 0.2, 0.01, 0.02)),
        # nerfstudio's order is k1, k2, k3, k4, p1, p2.
        ({"distortion_params": [0.1, 0.2, 0, 0, 0.01, 0.02]}, {}, "OPENCV", (0.1, 0.2, 0.01, 0.02)),
        ({"k1": 9, "distortion_params": [0.1, 0, 0, 0, 0, 0]}, {}, "OPENCV", (0.1, 0, 0, 0)),
        ({"distortion_params": [0.1, 0.2, 0.3, 0, 0.01, 0.02]}, {}, "FULL_OPENCV",
         (0.1, 0.2, 0.01, 0.02, 0.3, 0, 0, 0)),
        ({**FISHEYE, "k1": 0.1, "k2": 0.2, "k3": 0.3, "k4": 0.4}, {}, "OPENCV_FISHEYE",
         (0.1, 0.2, 0.3, 0.4)),
        ({**FISHEYE, "distortion_params": [0.1, 0.2, 0.3, 0.4, 0, 0]}, {}, "OPENCV_FISHEYE",
         (0.1, 0.2, 0.3, 0.4)),
        ({"camera_model": "FULL_OPENCV", "k3": 0.3, "k4": 0.4, "k6": 0.6}, {}, "FULL_OPENCV",
         (0, 0, 0, 0, 0.3, 0.4, 0, 0.6)),
        # What a frame says counts before the file, and is not mixed with it.
        ({"k1": 0.1, "k2": 0.2}, {"k1": 0.5}, "OPENCV", (0.5, 0, 0, 0)),
        ({"k1": 0.1}, {"distortion_params": [0.3, 0, 0, 0, 0, 0]}, "OPENCV", (0.3, 0, 0, 0)),
        ({"distortion_params": [0.3, 0, 0, 0, 0, 0]}, {"k1": 0.5}, "OPENCV", (0.5, 0, 0, 0)),
        ({"k1": 0.1}, FISHEYE, "OPENCV_FISHEYE", (0.1, 0, 0, 0)),
    ],
)  # fmt: skip
def test_nerfstudios_distortion(
    shared: dict[str, Any], frame: dict[str, Any], model: str, distortion: Any, tmp_path: Path
) -> None:
    camera = nerfstudio(tmp_path, shared, frame)
    assert (camera.model, camera.params) == (model, (*PARAMS, *distortion))


def test_nerfstudios_intrinsics_of_a_frame(tmp_path: Path) -> None:
    camera = nerfstudio(tmp_path, {}, {"fl_x": 650, "cx": 390, "cy": 310})
    assert camera.params == (650, 650, 390, 310)
    angle = 2 * np.arctan(0.5 * WIDTH / 555)
    camera = nerfstudio(tmp_path, {}, {"camera_angle_x": angle})  # not the file's fl_x
    np.testing.assert_allclose(camera.params[:2], (555, 555))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"k4": 0.1}, "k4, k5 or k6"),  # COLMAP's k4 divides
        ({"distortion_params": [0, 0, 0, 0.1, 0, 0]}, "k4, k5 or k6"),
        ({"distortion_params": [0.1, 0.2, 0.01, 0.02]}, "distortion_params are not"),
        ({"distortion_params": 5}, "distortion_params are not"),
        ({"k1": "x"}, "k1 is not a number"),
        ({"k1": 10**400}, "k1 is not a number"),
        ({"fl_x": 0}, "focal lengths positive"),
        ({"cx": 2 * WIDTH}, "principal point"),
        ({"w": -800}, "no size"),
        ({"w": float("nan")}, "no size"),
        ({"camera_model": "EQUIRECTANGULAR"}, "has no COLMAP camera"),
        ({"frames": 5}, "not a transforms.json with frames"),
        ({"frames": None}, "not a transforms.json with frames"),
        ({"frames": {"a": 1}}, "not a transforms.json with frames"),
        ({"frames": [5]}, "frame 1: file_path or transform_matrix"),
        ({"frames": [{"file_path": "a", "transform_matrix": [[10**400]]}]}, "frame 1"),
    ],
)
def test_nerfstudio_files_that_mean_nothing(
    shared: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_nerfstudio(tmp_path / "transforms.json", SCENE.poses)
    path.write_text(json.dumps(json.loads(path.read_text()) | shared))
    with pytest.raises(InputError, match=message) as e:
        read_poses(path, NAMES)
    assert str(path) in str(e.value)
    assert len(str(e.value)) < 500


def test_names_in_another_unicode_form(tmp_path: Path) -> None:
    assert COMPOSED != SPLIT
    assert match_names([SPLIT], [COMPOSED]) == {SPLIT: COMPOSED}
    assert match_names([f"images/{COMPOSED}"], [f"a/{SPLIT}"]) == {
        f"images/{COMPOSED}": f"a/{SPLIT}"
    }
    # Both forms are there: each is itself.
    assert match_names([SPLIT, COMPOSED], [COMPOSED, SPLIT]) == {SPLIT: SPLIT, COMPOSED: COMPOSED}
    assert match_names([f"x/{COMPOSED}"], [COMPOSED, SPLIT]) == {}
    (tmp_path / "p.txt").write_text(f"a.jpg {SPLIT}\n", encoding="utf-8")
    assert read_pairs(tmp_path / "p.txt", ["a.jpg", COMPOSED]) == [("a.jpg", COMPOSED)]
    with pytest.raises(InputError, match="not in the image folder"):
        read_pairs(tmp_path / "p.txt", ["a.jpg", "fur.jpg"])


# ---------------------------------------------------------------------------- files that are none


def hostile(path: Path, kind: str) -> Path:
    """A file of a user that is not what it should be."""
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "nested":
        path.write_text("[" * 100_000)
    else:
        path.write_bytes(
            {"empty": b"", "zeros": b"\0" * 100, "not UTF-8": b"\xff\x00\xfe\x81"}[kind]
        )
    return path


KINDS = ["empty", "zeros", "not UTF-8", "folder", "device", "link to itself", "nested"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_poses_intrinsics_or_pairs(kind: str, tmp_path: Path) -> None:
    for name in ("t.txt", "t.json"):
        with pytest.raises(InputError, match=r"t\.(txt|json)"):
            read_poses(hostile(tmp_path / name, kind), NAMES)
    with pytest.raises(InputError, match=r"k\.txt"):
        given(hostile(tmp_path / "k.txt", kind), "a.jpg")
    pairs = hostile(tmp_path / "p.txt", kind)
    if kind == "empty":
        assert read_pairs(pairs, ["a"]) == []
    else:
        with pytest.raises(InputError, match=r"p\.txt"):
            read_pairs(pairs, ["a"])
    model = write_cameras(SCENE.poses, tmp_path / "m")
    (model / "images.txt").unlink()
    hostile(model / "images.txt", kind)
    with pytest.raises(InputError, match="m"):
        read_poses(model, NAMES)


# --------------------------------------------------------------------------------- COLMAP's files


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binary model with points, written by COLMAP."""
    folder = tmp_path_factory.mktemp("binary")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_points3D = 20
    pycolmap.set_random_seed(0)
    pycolmap.synthesize_dataset(options).write(folder)
    return folder


def test_a_whole_binary_model_is_read(binary: Path) -> None:
    assert colmap.read_model(binary).num_points3D() == 20


@pytest.mark.parametrize("name", ["cameras", "rigs", "frames", "images", "points3D"])
@pytest.mark.parametrize("left", [0, 4, 0.5, -1])
def test_a_binary_file_that_is_cut(name: str, left: float, binary: Path, tmp_path: Path) -> None:
    """COLMAP reads some of them without end, and others without a word."""
    shutil.copytree(binary, tmp_path / "m")
    path = tmp_path / "m" / f"{name}.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left == 0.5 else int(left)])
    with pytest.raises(InputError, match=rf"{name}\.bin is cut off or damaged"):
        colmap.read_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["cameras", "rigs", "frames", "images", "points3D"])
@pytest.mark.parametrize("count", [10**6, 10**15, 2**64 - 1])
def test_a_count_beyond_the_file(name: str, count: int, binary: Path, tmp_path: Path) -> None:
    shutil.copytree(binary, tmp_path / "m")
    path = tmp_path / "m" / f"{name}.bin"
    path.write_bytes(struct.pack("<Q", count) + path.read_bytes()[8:])
    with pytest.raises(InputError, match=rf"{name}\.bin"):
        colmap.read_model(tmp_path / "m")


def test_the_case_that_was_read_without_end() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "cases" / "faults" / "trunc_points3D"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    with pytest.raises(InputError, match=r"points3D\.bin is cut off"):
        colmap.read_model(folder)


def test_quaternions_in_binary_models(binary: Path, tmp_path: Path) -> None:
    shutil.copytree(binary, tmp_path / "m")
    path = tmp_path / "m" / "frames.bin"
    data = bytearray(path.read_bytes())
    struct.pack_into("<4d", data, 16, 2.0, 0.0, 0.0, 0.0)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"frames\.bin, frame \d+: the quaternion has length 2"):
        colmap.read_model(tmp_path / "m")
    # Models from before frames.bin have poses in images.bin.
    for name in ("frames.bin", "rigs.bin"):
        (tmp_path / "m" / name).unlink()
    colmap.read_model(tmp_path / "m")
    path = tmp_path / "m" / "images.bin"
    data = bytearray(path.read_bytes())
    struct.pack_into("<4d", data, 12, 0.5, 0.0, 0.0, 0.0)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"images\.bin, image \d+ .*has length 0.5"):
        colmap.read_model(tmp_path / "m")


def test_frames_of_another_model(binary: Path, tmp_path: Path) -> None:
    pycolmap.Reconstruction(binary).write_text(tmp_path)
    lines = (tmp_path / "images.txt").read_text().split("\n")
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    (tmp_path / "images.txt").write_text("\n".join(lines[:first] + lines[first + 2 :]))
    with pytest.raises(InputError, match="is not a readable COLMAP model"):
        colmap.read_model(tmp_path)


# ------------------------------------------------------------------------------------- h5 files


@pytest.fixture
def hlocs(tmp_path: Path) -> tuple[Path, Path, list[tuple[str, str]]]:
    """Features and matches of three images in hloc's layout."""
    return write_h5(tmp_path / "f.h5", tmp_path / "m.h5")


def write_h5(features: Path, matches: Path) -> tuple[Path, Path, list[tuple[str, str]]]:
    pairs = [("a.jpg", "b.jpg"), ("a.jpg", "c.jpg")]
    rng = np.random.default_rng(0)
    with h5py.File(features, "w") as file:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            file[f"{name}/keypoints"] = rng.uniform(0, 500, (2000, 2)).astype(np.float32)
    with h5py.File(matches, "w") as file:
        for a, b in pairs:
            file[f"{a}/{b}/matches0"] = np.r_[np.arange(50), np.full(1950, -1)].astype(np.int16)
            file[f"{a}/{b}/matching_scores0"] = np.ones(2000, np.float16)
    return features, matches, pairs


def take_over(hlocs: tuple[Path, Path, list[tuple[str, str]]], out: Path) -> dict[str, int]:
    """What ``--features --matches`` reads: pair -> matches."""
    features, matches, pairs = hlocs
    stores = [H5Store(out / name, {}) for name in ("of.h5", "om.h5")]
    records = {name: record(name) for name in ("a.jpg", "b.jpg", "c.jpg")}
    ImportedMatcher(features, matches).take_over(records, pairs, *stores)
    found = {f"{a} {b}": len(read_matches(matches, a, b)[0]) for a, b in pairs}
    for store in stores:
        store.close()
    return found


def replace(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = value


def test_hlocs_files_are_taken_over(hlocs: Any, tmp_path: Path) -> None:
    assert take_over(hlocs, tmp_path) == {"a.jpg b.jpg": 50, "a.jpg c.jpg": 50}


@pytest.mark.parametrize(
    ("matches0", "message"),
    [
        ([5000] * 3, "another file of features"),
        ([2**32] * 3, "another file of features"),  # 0 in 32 bits
        ([2**40 + 1] * 3, "another file of features"),
        (np.arange(2001), "another file of features"),
        (np.array([1.0, np.nan]), "matches0 are no row numbers"),
        (np.zeros((5, 1), int), "matches0 are no row numbers"),
        (np.array([b"x"]), "holds no numbers"),
        (np.arange(10), "10 matches0 and .*matching_scores0"),
    ],
)
def test_rows_beyond_the_keypoints(matches0: Any, message: str, hlocs: Any, tmp_path: Path) -> None:
    replace(hlocs[1], "a.jpg/c.jpg/matches0", matches0)
    if "scores" not in message:
        with h5py.File(hlocs[1], "a") as file:
            del file["a.jpg/c.jpg/matching_scores0"]
    with pytest.raises(InputError, match=message) as e:
        take_over(hlocs, tmp_path)
    assert "m.h5" in str(e.value)
    assert "c.jpg" in str(e.value)


def test_rows_beyond_the_keypoints_never_reach_colmap(tmp_path: Path) -> None:
    """COLMAP reads what lies behind the keypoints, and crashes."""
    cameras, _ = colmap.assign_cameras([record("a"), record("b")], CameraOptions())
    for rows in ([[0, 10]], [[2**31, 3]]):
        with pytest.raises(
            InputError, match=r"matches of a and b name keypoints .* with 10 and 10"
        ):
            colmap.build_database(
                tmp_path / "d.db",
                cameras=cameras,
                names=["a", "b"],
                keypoints=lambda name: np.zeros((10, 2), np.float32),
                matches=[("a", "b", np.array(rows * 20))],
                verify=VerifyOptions(),
            )


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        (np.full((5, 2), np.nan), "not finite"),
        (np.zeros((3, 4, 5)), "not finite"),
        (np.zeros(5), "not finite"),
        (np.array([b"abc"]), "holds no numbers"),
        (np.full((5, 2), 9999.0), "Were they computed on other files"),
    ],
)
def test_keypoints_that_are_none(keypoints: Any, message: str, hlocs: Any, tmp_path: Path) -> None:
    replace(hlocs[0], "b.jpg/keypoints", keypoints)
    with pytest.raises(InputError, match=message) as e:
        take_over(hlocs, tmp_path)
    assert "f.h5, b.jpg" in str(e.value)


def put_outside(file: h5py.File, key: str, other: Path, how: str) -> None:
    """Let a dataset be that of another file."""
    if how == "external link":
        file[key] = h5py.ExternalLink(str(other), "/k")
    elif how == "link to a link":
        file["x"] = h5py.ExternalLink(str(other), "/k")
        file[key] = h5py.SoftLink("/x")
    elif how == "group behind a link":
        file[key.rpartition("/")[0]] = h5py.ExternalLink(str(other), "/g")
    elif how == "virtual":
        layout = h5py.VirtualLayout(shape=(5, 2), dtype="f4")
        layout[:] = h5py.VirtualSource(str(other), "k", shape=(5, 2))
        file.create_virtual_dataset(key, layout)
    else:  # its bytes are those of any file
        file.create_dataset(key, (5, 2), "f4", external=[(str(other), 0, 40)])


HOW = ["external link", "link to a link", "group behind a link", "virtual", "raw bytes"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reader", ["features", "matches", "retrieval", "reference"])
def test_nothing_outside_an_h5_file_is_read(
    how: str, reader: str, hlocs: Any, tmp_path: Path
) -> None:
    other = tmp_path / "secret.h5"
    with h5py.File(other, "w") as file:
        file["k"] = np.full((5, 2), 7, np.float32)
        for name in ("keypoints", "matches0", "global_descriptor"):
            file[f"g/{name}"] = file["k"]
    path, key = hlocs[0], "b.jpg/keypoints"
    if reader == "matches":
        path, key = hlocs[1], "a.jpg/c.jpg/matches0"
    elif reader == "retrieval":
        key = "b.jpg/global_descriptor"
    with h5py.File(path, "a") as file:
        del file[key.rpartition("/")[0]]
        put_outside(file, key, other, how)
    read: Any = {
        "retrieval": lambda: read_global_descriptors(path, ["b.jpg"]),
        "reference": lambda: match_dense._keypoints([path], ["b.jpg"]),
    }.get(reader, lambda: take_over(hlocs, tmp_path))
    with pytest.raises(InputError, match=r"another file|other files"):
        read()


def test_links_within_a_file_are_followed(hlocs: Any, tmp_path: Path) -> None:
    with h5py.File(hlocs[0], "a") as file:
        file.move("b.jpg/keypoints", "elsewhere")
        file["b.jpg/keypoints"] = h5py.SoftLink("/elsewhere")
    assert take_over(hlocs, tmp_path)["a.jpg b.jpg"] == 50
    with h5py.File(hlocs[0], "a") as file:
        del file["b.jpg"]
        file["b.jpg"] = h5py.SoftLink("/b.jpg")
    with pytest.raises(InputError, match=r"f\.h5, b\.jpg/keypoints cannot be read"):
        take_over(hlocs, tmp_path)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_arrays_that_a_file_cannot_hold(
    compression: str | None, hlocs: Any, tmp_path: Path
) -> None:
    """80 GB that were never written: HDF5 would make them of zeros."""
    with h5py.File(hlocs[0], "a") as file:
        del file["b.jpg/keypoints"]
        file.create_dataset(
            "b.jpg/keypoints", (10**10, 2), "f4", chunks=(10**6, 2), compression=compression
        )
    with pytest.raises(InputError, match=r"b\.jpg/keypoints declares 80000000000 bytes"):
        take_over(hlocs, tmp_path)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95])
def test_cut_files_of_hloc(which: int, share: float, hlocs: Any, tmp_path: Path) -> None:
    data = hlocs[which].read_bytes()
    hlocs[which].write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=f"{'fm'[which]}.h5 is (cut off|not a readable h5 file)"):
        take_over(hlocs, tmp_path)


@pytest.mark.parametrize("which", [0, 1])
def test_flipped_bytes_are_an_error_or_numbers(which: int, hlocs: Any, tmp_path: Path) -> None:
    """No damage is a traceback; what happens to be read is rows and places that are there."""
    data = hlocs[which].read_bytes()
    rng = np.random.default_rng(which)
    refused = 0
    for trial in range(60):
        damaged = bytearray(data)
        for at in rng.integers(8, len(data) if trial % 2 else 4096, 8):
            damaged[at] ^= 1 << int(rng.integers(8))
        hlocs[which].write_bytes(damaged)
        out = tmp_path / str(trial)
        out.mkdir()
        try:
            take_over(hlocs, out)
        except InputError:
            refused += 1
    assert 10 < refused < 60


# -------------------------------------------------------------------------- numbers and names


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_names_that_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """A model is somebody's file: what it names is neither read nor written elsewhere."""
    poses = {name: SCENE.poses[NAMES[0]], "b.jpg": SCENE.poses[NAMES[1]]}
    model = write_cameras(poses, tmp_path / "in" / "model")
    (tmp_path / "in" / "images").mkdir()
    with pytest.raises(InputError, match="is not a path relative to"):
        undistort(tmp_path / "in" / "images", colmap.read_model(model), tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out").exists()
    with pytest.raises(InputError, match="leads out of the image folder"):
        colmap.map_views(colmap.read_model(model))
    # To give poses it may have any name.
    assert read_poses(model, ["secret.jpg", "b.jpg"]).poses.keys() == {"secret.jpg", "b.jpg"}


def npy(shape: str, data: bytes = b"") -> bytes:
    """An .npy file that declares a shape and holds some bytes."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize("shape", ["(1000000000, 4)", "(10000000000000, 4)"])
@pytest.mark.parametrize("reader", [read_labels, read_depth])
def test_numbers_that_an_npy_declares_but_does_not_hold(
    shape: str, reader: Any, tmp_path: Path
) -> None:
    path = tmp_path / "0_1.npy"
    path.write_bytes(npy(shape, b"\0" * 64))
    with pytest.raises(InputError, match=r"0_1\.npy"):
        reader(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + b"\0" * 50, b"x" * 100, npy("(3,)")])
def test_a_damaged_retrieval_file_is_made_again(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "retrieval.npz"
    path.write_bytes(data)
    assert _stored_vlad(path, "stamp") == (None, None)
    np.savez(path, stamp="stamp", centres=np.eye(2), rows=np.eye(3))
    centres, rows = _stored_vlad(path, "stamp")
    np.testing.assert_array_equal(centres, np.eye(2))
    np.testing.assert_array_equal(rows, np.eye(3))
    assert _stored_vlad(path, "other") == (None, None)


def test_descriptors_of_another_width() -> None:
    matcher = matchers.load("sift", device="cpu")
    matcher.info.check_descriptors(128, "f.h5")
    with pytest.raises(InputError, match=r"f\.h5: the descriptors have 256 numbers, .* sift 128"):
        matcher.info.check_descriptors(256, "f.h5")
