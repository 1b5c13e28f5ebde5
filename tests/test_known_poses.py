"""Known poses (COLMAP, nerfstudio, TUM), and keypoints and matches from hloc's files."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import fake_matcher
import h5py
import numpy as np
import pytest
from fake_matcher import SCENE, FakeMatcher, write_images
from scipy.spatial.transform import Rotation
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, camera_errors, write_cameras

import gim_hloc
from gim_hloc import colmap, store
from gim_hloc.cli.reconstruct import main
from gim_hloc.errors import InputError, MappingError
from gim_hloc.pipelines.reconstruct import ReconstructResult
from gim_hloc.poses import Pose, match_names, read_poses

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
NAMES = SCENE.names
PARAMS = (FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("known") / "images")


def run(images: Path, output: Path, **options: Any) -> ReconstructResult:
    FakeMatcher.calls.clear()
    options = {"matcher": "fake", "deterministic": True, "refine_keypoints": False, **options}
    return gim_hloc.reconstruct(images, output, progress=False, **options)


def centre(pose: Pose) -> np.ndarray:
    return -pose[0].T @ pose[1]


def disturbed(degrees: float = 0.4, shift: float = 0.02) -> dict[str, Pose]:
    """The true poses, turned and moved at random."""
    rng = np.random.default_rng(1)
    result = {}
    for name, pose in SCENE.poses.items():
        turn = Rotation.from_rotvec(np.deg2rad(degrees) * rng.normal(size=3)).as_matrix() @ pose[0]
        result[name] = (turn, -turn @ (centre(pose) + shift * rng.normal(size=3)))
    return result


def write_nerfstudio(path: Path, poses: dict[str, Pose], *, per_frame: bool = False) -> Path:
    """transforms.json by its definition: columns are the camera's right, up and backwards."""
    fx, fy, cx, cy = PARAMS
    intrinsics = {"w": WIDTH, "h": HEIGHT, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
    frames = []
    for name, pose in poses.items():
        right, down, ahead = pose[0]
        matrix = np.eye(4)
        matrix[:3] = np.column_stack([right, -down, -ahead, centre(pose)])
        frame: dict[str, Any] = {
            "file_path": f"./images/{name}",
            "transform_matrix": matrix.tolist(),
        }
        frames.append({**frame, **intrinsics} if per_frame else frame)
    content: dict[str, Any] = {"camera_model": "OPENCV", "frames": frames}
    path.write_text(json.dumps(content if per_frame else {**content, **intrinsics}))
    return path


def write_tum(path: Path, poses: list[Pose], times: list[float]) -> Path:
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for time, pose in zip(times, poses, strict=True):
        quaternion = Rotation.from_matrix(pose[0].T).as_quat()  # camera to world; x, y, z, w
        values = " ".join(f"{value:.17g}" for value in (*centre(pose), *quaternion))
        lines.append(f"{time} {values}")
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_poses(found: dict[str, Pose], expected: dict[str, Pose], tolerance: float) -> None:
    for name, pose in expected.items():
        assert np.abs(found[name][0] - pose[0]).max() < tolerance, name
        assert np.abs(found[name][1] - pose[1]).max() < tolerance, name


# ------------------------------------------------------------------------------------- pose files


@pytest.mark.parametrize("kind", ["colmap", "nerfstudio", "per_frame", "tum"])
def test_every_format_gives_the_same_poses(kind: str, tmp_path: Path) -> None:
    if kind == "colmap":
        path = write_cameras(SCENE.poses, tmp_path / "model")
    elif kind == "tum":
        path = write_tum(tmp_path / "t.txt", [SCENE.poses[n] for n in NAMES], [*range(len(NAMES))])
    else:
        path = write_nerfstudio(
            tmp_path / "transforms.json", SCENE.poses, per_frame=kind == "per_frame"
        )
    found = read_poses(path, NAMES)
    assert sorted(found.poses) == NAMES
    assert_poses(found.poses, SCENE.poses, 1e-12)
    if kind == "tum":
        assert found.cameras == {}
    else:
        specs = [found.cameras[name] for name in NAMES]
        assert {(s.model, s.width, s.height, s.params) for s in specs} == {
            ("PINHOLE", WIDTH, HEIGHT, PARAMS)
        }


def test_nerfstudio_undoes_our_export(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", intrinsics=INTRINSICS, export=("nerfstudio",))
    found = read_poses(tmp_path / "out/export/0/nerfstudio/transforms.json", NAMES)
    model = colmap.model_cameras(tmp_path / "out")
    rotation, distance = camera_errors(found.poses, model)
    assert rotation < 1e-4
    assert distance < 1e-9
    # Its folder will do as well, and lens distortion chooses the camera.
    content = json.loads((tmp_path / "out/export/0/nerfstudio/transforms.json").read_text())
    for key, expected in (("k1", "OPENCV"), ("k3", "FULL_OPENCV")):
        (tmp_path / "transforms.json").write_text(json.dumps({**content, key: 0.1}))
        cameras = read_poses(tmp_path, NAMES).cameras
        assert {c.model for c in cameras.values()} == {expected}


def test_camera_angle_gives_the_focal_length(tmp_path: Path) -> None:
    path = write_nerfstudio(tmp_path / "a.json", SCENE.poses)
    content = json.loads(path.read_text())
    for key in ("w", "h", "fl_x", "fl_y", "cx", "cy"):
        del content[key]
    content["camera_angle_x"] = 2 * np.arctan(0.5 * WIDTH / FOCAL)
    for frame in content["frames"]:  # as in NeRF's synthetic scenes: no suffix
        frame["file_path"] = frame["file_path"].removesuffix(".jpg")
    path.write_text(json.dumps(content))
    found = read_poses(path, NAMES, dict.fromkeys(NAMES, (WIDTH, HEIGHT)))
    assert sorted(found.cameras) == NAMES
    np.testing.assert_allclose(found.cameras[NAMES[0]].params, PARAMS, rtol=1e-12)


@pytest.mark.parametrize(
    ("names", "times", "expected"),
    [
        (["rgb/1305031102.175304.png", "rgb/1305031102.211214.png"], [0.175, 0.2111], "timestamps"),
        (["1403636579763555584.png", "1403636579813555456.png"], [0.763556, 0.813555], "1e-09"),
        (["b.png", "a.png"], [5.0, 4.0], "in order"),
        (["f10.png", "f9.png"], [0.1, 0.2], "in order"),
    ],
)
def test_timestamps_are_matched_to_names_or_in_order(
    names: list[str], times: list[float], expected: str, tmp_path: Path
) -> None:
    base = 1305031102 if names[0].startswith("rgb") else 1403636579 if names[0][0] == "1" else 0
    poses = [SCENE.poses[NAMES[0]], SCENE.poses[NAMES[1]]]
    found = read_poses(write_tum(tmp_path / "t.txt", poses, [base + t for t in times]), names)
    assert expected in found.notes[0]
    first = {"b.png": 0, "f10.png": 1}.get(names[0], 0)
    assert_poses(found.poses, {names[0]: poses[first], names[1]: poses[1 - first]}, 1e-9)


def test_counts_that_differ_are_not_matched_in_order(tmp_path: Path) -> None:
    path = write_tum(tmp_path / "t.txt", [SCENE.poses[n] for n in NAMES], [*range(7)])
    with pytest.raises(InputError, match="7 poses for 2 images"):
        read_poses(path, ["a.png", "b.png"])


def test_names_are_matched_by_the_end_of_their_path() -> None:
    names = ["a/0001.jpg", "b/0001.jpg", "0002.jpg"]
    given = ["./images/a/0001.jpg", "0001.jpg", "x\\images\\0002.png", "0002", "nothing.jpg"]
    assert match_names(given, names) == {
        "./images/a/0001.jpg": "a/0001.jpg",
        "x\\images\\0002.png": "0002.jpg",
        "0002": "0002.jpg",
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "1 2 3\n", "line 1: expected 'timestamp"),
        ("t.txt", "0 0 0 0 0 0 0 2\n", "quaternion has length 2"),
        ("t.txt", "# nothing\n", "holds no pose"),
        ("t.json", "{}", "not a transforms.json"),
        ("t.json", '{"frames": [{"file_path": "a"}]}', "transform_matrix is missing"),
        (
            "t.json",
            json.dumps({"frames": [{"file_path": NAMES[0],
                                    "transform_matrix": np.diag([2, 2, 2, 1]).tolist()}]}),
            "no rotation",
        ),
        (
            "t.json",
            json.dumps({"frames": [{"file_path": "other.jpg",
                                    "transform_matrix": np.eye(4).tolist()}]}),
            "holds no pose of any of the 7 images",
        ),
    ],
)  # fmt: skip
def test_unusable_pose_files_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_poses(tmp_path / name, NAMES)
    with pytest.raises(InputError, match="There are no poses"):
        read_poses(tmp_path / "missing.txt", NAMES)


# ------------------------------------------------------------------------------------ whole runs


def test_fixed_poses_stay_to_the_bit(images: Path, tmp_path: Path) -> None:
    path = write_nerfstudio(tmp_path / "transforms.json", SCENE.poses)
    result = run(images, tmp_path / "out", model=path, refine_keypoints=True)
    assert result.registered == len(NAMES)
    assert_poses(colmap.model_cameras(tmp_path / "out"), SCENE.poses, 1e-14)
    summary = result.report["summary"]
    assert summary["points"] > 125
    assert summary["mean_reprojection_error_px"] < 1e-3
    assert result.report["settings"]["mapper_used"] == "known poses, fixed"
    # Intrinsics came from the file, and were not moved.
    assert result.report["models"][0]["cameras"][0]["params"] == list(PARAMS)
    # The same again computes nothing; other poses do.
    before = (tmp_path / "out/sparse/0/images.bin").stat().st_mtime_ns
    run(images, tmp_path / "out", model=path, refine_keypoints=True)
    assert FakeMatcher.calls == []
    assert (tmp_path / "out/sparse/0/images.bin").stat().st_mtime_ns == before
    write_nerfstudio(path, disturbed(0.01, 0.001))
    again = run(images, tmp_path / "out", model=path, refine_keypoints=True)
    assert FakeMatcher.calls == []
    assert again.report["summary"]["mean_reprojection_error_px"] > 1e-3


def test_verification_uses_the_known_poses(images: Path, tmp_path: Path) -> None:
    """One image's pose is wrong: its matches fail, although they agree with each other."""
    poses = dict(SCENE.poses)
    rotation, translation = poses[NAMES[3]]
    turn = Rotation.from_euler("x", 3, degrees=True).as_matrix()  # about 37 px up
    poses[NAMES[3]] = (turn @ rotation, turn @ translation)
    result = run(images, tmp_path / "out", model=write_cameras(poses, tmp_path / "model"))
    for row in result.report["pairs"]:
        wrong = NAMES[3] in (row["name0"], row["name1"])
        assert (row["inliers"] > 0.9 * row["matches"]) is not wrong, row
        assert row["matches"] > 100


def test_refined_poses_are_exact_and_in_the_given_world(images: Path, tmp_path: Path) -> None:
    given = disturbed()
    result = run(
        images, tmp_path / "out", model=write_cameras(given, tmp_path / "model"), poses="refine"
    )
    assert result.registered == len(NAMES)
    found = colmap.model_cameras(tmp_path / "out")
    rotation, distance = camera_errors(found, SCENE.poses)
    assert rotation < 0.02
    assert distance < 1e-3
    # The given poses have errors of 0.02; seven of them fix the world better than each by itself.
    shifts = [np.linalg.norm(centre(found[n]) - centre(SCENE.poses[n])) for n in NAMES]
    assert max(shifts) < 0.06
    assert result.report["summary"]["mean_reprojection_error_px"] < 0.01


def test_priors_give_world_and_scale(images: Path, tmp_path: Path) -> None:
    given = disturbed(0.0, 0.005)
    poses = {name: given[name] for name in NAMES[1:]}  # positions suffice, and one may be missing
    path = write_tum(tmp_path / "t.txt", list(poses.values()), [*range(1, 7)])
    result = run(images, tmp_path / "out", model=path, poses="prior", intrinsics=INTRINSICS)
    assert result.registered == len(NAMES)
    found = colmap.model_cameras(tmp_path / "out")
    shifts = [np.linalg.norm(centre(found[n]) - centre(SCENE.poses[n])) for n in NAMES]
    assert max(shifts) < 0.03  # of a radius of 6
    assert any(NAMES[0] in note and "no pose" in note for note in result.report["notes"])


def test_images_without_a_pose_are_registered_or_left_out(images: Path, tmp_path: Path) -> None:
    poses = {name: SCENE.poses[name] for name in NAMES if name not in (NAMES[2], NAMES[5])}
    path = write_cameras(poses, tmp_path / "model")
    result = run(images, tmp_path / "out", model=path, intrinsics=INTRINSICS)
    assert result.registered == len(NAMES)
    found = colmap.model_cameras(tmp_path / "out")
    assert_poses(found, poses, 1e-14)
    assert_poses(found, SCENE.poses, 2e-3)
    assert any("registered by the mapper" in n and NAMES[2] in n for n in result.report["notes"])
    left = run(images, tmp_path / "left", model=path, missing_poses="leave-out")
    assert left.registered == len(poses)
    status = {row["name"]: row["status"] for row in left.report["images"]}
    assert status[NAMES[2]] == status[NAMES[5]] == "no_pose"


def test_wrong_convention_is_suspected(images: Path, tmp_path: Path) -> None:
    inverted = {name: (r.T, centre((r, t))) for name, (r, t) in SCENE.poses.items()}
    path = write_cameras(inverted, tmp_path / "model")
    with contextlib.suppress(MappingError):  # a few matches agree by chance
        run(images, tmp_path / "out", model=path)
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert any("agree with the known poses" in note for note in report["notes"])


def test_pairs_from_the_known_poses(images: Path, tmp_path: Path) -> None:
    path = write_cameras(SCENE.poses, tmp_path / "model")
    result = run(
        images, tmp_path / "out", model=path, pairs="poses",
        pair=gim_hloc.pairs.PairOptions(neighbours=2),
    )  # fmt: skip
    assert result.report["pair_selection"]["mode"] == "poses"
    assert result.report["summary"]["pairs"] < 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poses": "refine"}, "needs known poses"),
        ({"features": Path("f.h5")}, "needs --matches"),
        ({"matches": Path("f.h5")}, "needs --features"),
        ({"features": Path("f.h5"), "matches": Path("f.h5")}, "--pairs FILE"),
        ({"model": Path("no"), "poses": "prior", "mapper": "global"}, "incremental mapper only"),
        ({"model": Path("no")}, "There are no poses at no"),
        ({"model": Path("no"), "extend": Path("no")}, "without --model"),
    ],
)
def test_options_that_contradict(
    options: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- hloc's files


def write_hloc(
    folder: Path, *, half: bool = False, old_keys: bool = False, reverse: bool = False
) -> tuple[Path, Path, Path]:
    """Files as hloc writes them, by their definition; names without blanks."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: f"cam/{i}.jpg" if i < 4 else f"{i}.jpg" for i, name in enumerate(NAMES)}
    features, matches = folder / "feats.h5", folder / "matches.h5"
    with h5py.File(features, "w") as file:
        for name, short in plain.items():
            keypoints = SCENE.keypoints[name]
            file[f"{short}/keypoints"] = keypoints.astype(np.float16 if half else np.float32)
            file[f"{short}/image_size"] = np.array([WIDTH, HEIGHT])
    pairs = []
    with h5py.File(matches, "w") as file:
        for a, b, rows in SCENE.all_matches():
            pairs.append(f"{plain[a]} {plain[b]}")
            if reverse:
                a, b, rows = b, a, rows[:, ::-1]
            matches0 = np.full(len(SCENE.keypoints[a]), -1, np.int16)
            matches0[rows[:, 0]] = rows[:, 1]
            separator = "_" if old_keys else "/"
            key = plain[a].replace("/", "-") + separator + plain[b].replace("/", "-")
            file[f"{key}/matches0"] = matches0
            if not reverse:
                file[f"{key}/matching_scores0"] = np.ones(len(matches0), np.float16)
    (folder / "pairs.txt").write_text("\n".join(pairs))  # hloc writes no last line end
    return features, matches, folder / "pairs.txt"


@pytest.fixture(scope="session")
def plain_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures under the names that ``write_hloc`` uses."""
    root = tmp_path_factory.mktemp("plain")
    (root / "cam").mkdir()
    for i, name in enumerate(NAMES):
        shutil.copy(images / name, root / (f"cam/{i}.jpg" if i < 4 else f"{i}.jpg"))
    return root


def imported(images: Path, output: Path, files: tuple[Path, Path, Path], **options: Any) -> Any:
    features, matches, pairs = files
    return run(
        images, output, features=features, matches=matches, pairs=str(pairs),
        intrinsics=INTRINSICS, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "form", [{}, {"half": True}, {"old_keys": True}, {"reverse": True}], ids=str
)
def test_hlocs_files_give_a_model(
    form: dict[str, bool], plain_images: Path, tmp_path: Path
) -> None:
    files = write_hloc(tmp_path, **form)
    result = imported(plain_images, tmp_path / "out", files, rotations="auto")
    assert result.registered == len(NAMES)
    assert FakeMatcher.calls == []
    truth = {
        (f"cam/{i}.jpg" if i < 4 else f"{i}.jpg"): SCENE.poses[name] for i, name in enumerate(NAMES)
    }
    rotation, distance = camera_errors(colmap.model_cameras(tmp_path / "out"), truth)
    rough = form.get("half", False)
    assert rotation < (0.1 if rough else 0.02)
    assert distance < (5e-3 if rough else 1e-3)
    assert any("half precision" in n for n in result.report["notes"]) == rough
    rows, _ = store.read_matches(tmp_path / "out/matches.h5", "cam/0.jpg", "5.jpg")
    assert set(map(tuple, rows.tolist())) == set(
        map(tuple, SCENE.matches(NAMES[0], NAMES[5]).tolist())
    )


def test_hlocs_files_with_known_poses(plain_images: Path, tmp_path: Path) -> None:
    poses = {
        (f"cam/{i}.jpg" if i < 4 else f"{i}.jpg"): SCENE.poses[name] for i, name in enumerate(NAMES)
    }
    model = write_cameras(poses, tmp_path / "model")
    result = imported(plain_images, tmp_path / "out", write_hloc(tmp_path), model=model)
    assert_poses(colmap.model_cameras(tmp_path / "out"), poses, 1e-14)
    assert result.report["summary"]["points"] > 125


def test_what_hlocs_files_lack_is_named(plain_images: Path, tmp_path: Path) -> None:
    features, matches, pairs = files = write_hloc(tmp_path)
    with h5py.File(matches, "a") as file:
        del file["4.jpg/5.jpg"]
    with pytest.raises(InputError, match=r"no matches of 1 of 21 pairs.*4\.jpg 5\.jpg"):
        imported(plain_images, tmp_path / "out", files)
    with h5py.File(matches, "a") as file:
        file["4.jpg/5.jpg/matches0"] = np.full(150, 4000)
    with pytest.raises(InputError, match="another file of features"):
        imported(plain_images, tmp_path / "out", files)
    with h5py.File(features, "a") as file:
        file["6.jpg/image_size"][...] = [WIDTH * 2, HEIGHT * 2]
    with pytest.raises(InputError, match=r"6\.jpg: keypoints of an image of 1600x1200"):
        imported(plain_images, tmp_path / "out", files)
    with h5py.File(features, "a") as file:
        del file["cam/2.jpg"]
    with pytest.raises(InputError, match=r"no keypoints of 1 of 7 images: cam/2\.jpg"):
        imported(plain_images, tmp_path / "out", files)
    with pytest.raises(InputError, match="no h5 file"):
        imported(plain_images, tmp_path / "out", (pairs, matches, pairs))
    with pytest.raises(InputError, match="There is no file of features"):
        imported(plain_images, tmp_path / "out", (tmp_path / "no.h5", matches, pairs))


def test_commands_take_the_new_flags(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_cameras(SCENE.poses, tmp_path / "model")
    code = main([
        str(images), str(tmp_path / "out"), "--matcher", "fake", "--model", str(model), "--poses",
        "fixed", "--missing-poses", "leave-out", "--deterministic",
        "--no-refine-keypoints",
    ])  # fmt: skip
    assert code == 0
    assert "7 of 7 images registered" in capsys.readouterr().out
    assert main([str(images), str(tmp_path / "out2"), "--model", str(tmp_path / "no")]) == 2
    assert "There are no poses" in capsys.readouterr().err
