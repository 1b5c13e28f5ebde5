"""The seam to COLMAP, on scenes whose poses, points and matches are known exactly."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycolmap
import pytest
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, Scene, camera_errors, make_scene, record

from gim_hloc import colmap
from gim_hloc.colmap.export import export_model
from gim_hloc.errors import InputError, MappingError
from gim_hloc.options import CameraOptions, MapOptions, VerifyOptions
from gim_hloc.tracks.photometric import PhotometricOptions


def build(scene: Scene, folder: Path, *, threads: int = 1, **camera: object):
    cameras, _ = colmap.assign_cameras(scene.records(), CameraOptions(**camera))  # type: ignore[arg-type]
    verified = colmap.build_database(
        folder / "database.db",
        cameras=cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        matches=scene.all_matches(),
        verify=VerifyOptions(),
        threads=threads,
    )
    return cameras, verified


class Run(NamedTuple):
    paths: list[Path]
    notes: list[str]


def run(scene: Scene, folder: Path, *, mapper: colmap.Mapper = "incremental", **camera: object):
    cameras, _ = build(scene, folder, **camera)
    job = colmap.MapJob(
        database=folder / "database.db",
        cameras=cameras,
        mapper=mapper,
        threads=1,
        log_dir=folder / "logs",
    )
    mapped = colmap.run_mapping(job)
    return Run(colmap.write_models(mapped.models, folder / "sparse"), mapped.notes)


# -------------------------------------------------------------------------------------- database


def test_database_holds_what_colmap_expects(tmp_path: Path) -> None:
    scene = make_scene(images=3)
    _, verified = build(scene, tmp_path, intrinsics=INTRINSICS)
    with pycolmap.Database.open(tmp_path / "database.db") as db:
        images = {image.name: image for image in db.read_all_images()}
        assert sorted(images) == scene.names
        assert db.num_cameras() == 1
        assert db.num_rigs() == 1
        assert db.num_frames() == 3
        camera = db.read_camera(1)
        assert camera.has_prior_focal_length
        assert list(camera.params) == [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]
        for name in scene.names:
            stored = db.read_keypoints(images[name].image_id)
            # the one place where hloc's frame becomes COLMAP's
            assert np.array_equal(stored[:, :2], scene.keypoints[name] + np.float32(0.5))
        for a, b, rows in scene.all_matches():
            assert np.array_equal(db.read_matches(images[a].image_id, images[b].image_id), rows)
        inliers = db.read_two_view_geometry(1, 2).inlier_matches
    assert verified[0].matches == len(scene.matches(*scene.names[:2]))
    assert verified[0].inliers == len(inliers) > 0.95 * verified[0].matches
    assert not (tmp_path / "database.db.tmp").exists()
    assert colmap.read_verification(tmp_path / "database.db", scene.pairs()) == verified


def test_verification_removes_outliers_and_hopeless_pairs(tmp_path: Path) -> None:
    scene = make_scene(images=3, points=300)
    a, b, c = scene.names
    rng = np.random.default_rng(0)
    good = scene.matches(a, b)
    wrong = np.stack([rng.permutation(len(good)), rng.permutation(len(good))], 1)[:150]
    nonsense = np.stack([rng.permutation(30), rng.permutation(30)], 1)
    cameras, _ = colmap.assign_cameras(scene.records(), CameraOptions(intrinsics=INTRINSICS))
    verified = colmap.build_database(
        tmp_path / "database.db",
        cameras=cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        matches=[(a, b, np.concatenate([good, wrong])), (a, c, nonsense), (b, c, good[:0])],
        verify=VerifyOptions(),
    )
    assert 0.95 * len(good) <= verified[0].inliers <= 1.1 * len(good)
    assert [v.inliers for v in verified[1:]] == [0, 0]
    rows = colmap.inlier_matches(tmp_path / "database.db", [(a, b), (a, c), (b, c)])
    assert [len(r) for r in rows] == [v.inliers for v in verified]
    true = set(map(tuple, good.tolist()))
    assert sum(tuple(r) in true for r in rows[0].tolist()) > 0.95 * len(rows[0])


def test_verification_does_not_depend_on_threads(tmp_path: Path) -> None:
    scene = make_scene(images=5, noise_px=1.0, points=150)
    for name, threads in (("one", 1), ("many", 4)):
        (tmp_path / name).mkdir()
        build(scene, tmp_path / name, threads=threads)
    one, many = (
        colmap.inlier_matches(tmp_path / n / "database.db", scene.pairs()) for n in ("one", "many")
    )
    assert all(np.array_equal(x, y) for x, y in zip(one, many, strict=True))


# --------------------------------------------------------------------------------------- mapping


@pytest.mark.parametrize("mapper", ["incremental", "global", "hierarchical"])
def test_exact_scene_gives_exact_poses(tmp_path: Path, mapper: colmap.Mapper) -> None:
    scene = make_scene(images=8)
    if mapper == "hierarchical" and not hasattr(pycolmap, "hierarchical_mapping"):
        with pytest.raises(InputError, match="needs pycolmap"):
            run(scene, tmp_path, mapper=mapper, intrinsics=INTRINSICS)
        return
    result = run(scene, tmp_path, mapper=mapper, intrinsics=INTRINSICS)
    poses = colmap.model_cameras(result.paths[0])
    assert sorted(poses) == scene.names
    rotation, centre = camera_errors(poses, scene.poses)
    assert rotation < 0.02
    assert centre < 1e-3
    statistics = colmap.model_statistics(result.paths[0])
    # half a pixel of offset between keypoints and camera would show here
    assert statistics["mean_reprojection_error_px"] < 0.01
    assert statistics["points"] > 300
    camera = colmap.read_model(result.paths[0]).cameras[1]
    assert list(camera.params) == [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]  # given: not refined


@pytest.mark.parametrize("mapper", ["incremental", "hierarchical"])
def test_wrong_matches_and_an_image_without_any_leave_poses_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapper: colmap.Mapper
) -> None:
    if mapper == "hierarchical" and not hasattr(pycolmap, "hierarchical_mapping"):
        pytest.skip("this pycolmap has no hierarchical mapper")
    scene = make_scene(images=7, points=2500, noise_px=0.3)
    # Wrong matches join tracks of points far from each other.
    rows = {(a, b): rows for a, b, rows in scene.all_matches() if b != scene.names[-1]}
    (a, b), *_ = rows
    wrong = np.stack([rows[a, b][:50, 0], rows[a, b][50:100, 1]], axis=1)
    monkeypatch.setattr(
        scene, "all_matches", lambda: [(*p, np.concatenate([r, wrong]) if p == (a, b) else r)
                                       for p, r in rows.items()],
    )  # fmt: skip
    result = run(scene, tmp_path, mapper=mapper, intrinsics=INTRINSICS)
    model = colmap.read_model(result.paths[0])
    assert model.num_reg_images() == model.num_images() == 6
    assert model.num_points3D() > 2400
    rotation, centre = camera_errors(colmap.model_cameras(result.paths[0]), scene.poses)
    assert rotation < 0.02
    assert centre < 1e-3
    assert list(model.cameras[1].params) == [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]


def test_unknown_camera_is_refined_towards_the_truth(tmp_path: Path) -> None:
    scene = make_scene(images=10, noise_px=0.3, points=600)
    result = run(scene, tmp_path)
    model = colmap.read_model(result.paths[0])
    assert model.num_reg_images() == 10
    assert abs(model.cameras[1].mean_focal_length() - FOCAL) < 0.02 * FOCAL
    rotation, centre = camera_errors(colmap.model_cameras(result.paths[0]), scene.poses)
    assert rotation < 0.3
    assert centre < 0.01


@pytest.mark.parametrize("mapper", ["incremental", "global"])
def test_given_cameras_stay_and_guessed_ones_move(tmp_path: Path, mapper: colmap.Mapper) -> None:
    names = [f"{'given' if i % 2 else 'guessed'}/{i}.jpg" for i in range(12)]
    scene = make_scene(images=12, noise_px=0.2, points=500, names=sorted(names))
    rules = tmp_path / "cameras of mine.txt"
    given = f"PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}"
    rules.write_text(f"given/* {given}\n")
    result = run(scene, tmp_path, mapper=mapper, intrinsics=str(rules), camera_mode="folder")
    model = colmap.read_model(result.paths[0])
    assert model.num_reg_images() == 12
    cameras = {c["model"]: c["params"] for c in colmap.cameras_of(model)}
    assert cameras["PINHOLE"] == [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]
    assert cameras["SIMPLE_RADIAL"][0] == pytest.approx(FOCAL, rel=0.02)  # guessed at 960
    assert camera_errors(colmap.model_cameras(result.paths[0]), scene.poses)[0] < 0.3


def test_one_thread_and_a_seed_give_the_same_model_twice(tmp_path: Path) -> None:
    scene = make_scene(images=6, noise_px=0.5)
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        result = run(scene, tmp_path / name)
        colmap.read_model(result.paths[0]).write_text(tmp_path / name)
        texts.append((tmp_path / name / "images.txt").read_text())
    assert texts[0] == texts[1]


def test_two_images_give_a_model_with_points(tmp_path: Path) -> None:
    scene = make_scene(images=2, arc_deg=25)
    result = run(scene, tmp_path, intrinsics=INTRINSICS)
    assert colmap.model_statistics(result.paths[0])["points"] > 200


def test_narrow_baseline_is_retried_and_said(tmp_path: Path) -> None:
    scene = make_scene(images=4, arc_deg=3)  # COLMAP stops at 4 degrees
    result = run(scene, tmp_path, intrinsics=INTRINSICS)
    assert any("relaxed" in note for note in result.notes)
    poses = colmap.model_cameras(result.paths[0])
    assert len(poses) == 4
    assert camera_errors(poses, scene.poses)[0] < 0.1


def test_no_matches_is_a_mapping_error(tmp_path: Path) -> None:
    scene = make_scene(images=3)
    for name in scene.names:  # no point is seen twice
        scene.points[name] = scene.points[name] + 1000 * (1 + scene.names.index(name))
    with pytest.raises(MappingError, match="match graph"):
        run(scene, tmp_path)
    assert (tmp_path / "database.db").exists()
    assert not (tmp_path / "sparse.tmp").exists()


def test_separate_scenes_give_models_largest_first(tmp_path: Path) -> None:
    one, two = (
        make_scene(images=n, seed=n, names=[f"{n}-{i}.jpg" for i in range(n)]) for n in (4, 7)
    )
    result = run(one.beside(two), tmp_path, intrinsics=INTRINSICS)
    assert [len(colmap.model_cameras(p)) for p in result.paths] == [7, 4]
    assert [p.name for p in result.paths] == ["0", "1"]


def test_points_get_the_colour_of_their_pixels(tmp_path: Path) -> None:
    scene = make_scene(images=4)
    cameras, _ = build(scene, tmp_path, intrinsics=INTRINSICS)
    pictures = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pictures[:, : WIDTH // 2] = (200, 10, 30)

    def colours(name: str) -> np.ndarray:
        if name == scene.names[0]:
            raise OSError("gone")  # must not lose the model
        return pictures

    job = colmap.MapJob(database=tmp_path / "database.db", cameras=cameras, threads=1)
    model = colmap.run_mapping(job).models[0]
    colmap.extract_colours(model, colours)
    checked = 0
    for point in model.points3D.values():
        views = [
            model.image(e.image_id)
            for e in point.track.elements
            if model.image(e.image_id).name != scene.names[0]
        ]
        left = [v.project_point(point.xyz)[0] < WIDTH / 2 - 2 for v in views]
        right = [v.project_point(point.xyz)[0] > WIDTH / 2 + 2 for v in views]
        if views and (all(left) or all(right)):
            assert tuple(point.color) == ((200, 10, 30) if left[0] else (0, 0, 0))
            checked += 1
    assert checked > 50


# --------------------------------------------------------------------------------------- cameras


def groups(records: list, **options: object) -> list[list[str]]:
    return [c.names for c in colmap.assign_cameras(records, CameraOptions(**options))[0]]  # type: ignore[arg-type]


def test_auto_groups_by_size_and_exif_camera() -> None:
    records = [
        record("a/1.jpg", make="X", model="P", focal_mm=4.2),
        record("a/2.jpg", make="X", model="P", focal_mm=4.2, orientation=6),
        record("b/3.jpg", make="X", model="P", focal_mm=7.0),  # zoomed
        record("b/4.jpg", make="Y", model="Q", focal_mm=4.2),
        record("b/5.jpg", width=400, make="X", model="P", focal_mm=4.2),
    ]
    assert groups(records) == [["a/1.jpg", "a/2.jpg"], ["b/3.jpg"], ["b/4.jpg"], ["b/5.jpg"]]
    assert groups(records[:4], camera_mode="folder") == [
        ["a/1.jpg", "a/2.jpg"],
        ["b/3.jpg", "b/4.jpg"],
    ]
    assert groups(records[:4], camera_mode="single") == [[r.name for r in records[:4]]]
    assert groups(records, camera_mode="image") == [[r.name] for r in records]
    with pytest.raises(InputError, match="400x600"):
        groups(records, camera_mode="single")


def test_implausible_exif_is_named_once_for_all_images_that_have_it():
    records = [record(f"{i}.jpg", focal_35mm=1.0) for i in range(3)]
    (camera,), (note,) = colmap.assign_cameras(records, CameraOptions())
    assert not camera.prior
    assert camera.params[0] == 1.2 * WIDTH
    assert note.startswith("The focal length in EXIF of 0.jpg and 2 more is implausible")
    assert "1 mm on 35 mm film" in note


def test_exif_focal_is_a_prior_and_a_guess_is_not() -> None:
    known, guessed = colmap.assign_cameras(
        [record("a.jpg", focal_35mm=35.0), record("b.jpg", width=400)], CameraOptions()
    )[0]
    assert known.prior
    assert known.params[0] == pytest.approx(WIDTH, rel=0.05)  # 35 mm on 36 mm film
    assert not guessed.prior
    assert guessed.params[0] == pytest.approx(1.2 * HEIGHT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PINHOLE,1,2,3", "takes 4 parameters"),
        ("PINHOLES,1,2,3,4", "Unknown camera model"),
        ("PINHOLE,a,2,3,4", "expected MODEL"),
        ("PINHOLE,nan,2,3,4", "finite"),
        ("PINHOLE,-5,2,3,4", "positive"),
        ("no/such/file", "neither a file nor"),
    ],
)
def test_bad_intrinsics_are_explained(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        colmap.assign_cameras([record("a.jpg")], CameraOptions(intrinsics=text))


def test_intrinsics_text_with_blanks() -> None:
    spec = colmap.assign_cameras([record("a.jpg")], CameraOptions(intrinsics="PINHOLE 1, 2,3 4"))
    assert spec[0][0].params == (1, 2, 3, 4)


@pytest.fixture
def camera_file(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "cameras.txt") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_colmap_camera_file(camera_file: Callable[..., str]) -> None:
    images = [record("a.jpg"), record("b.jpg", width=400)]
    path = camera_file("# comment\n1 PINHOLE 800 600 1 2 3 4\n2 SIMPLE_RADIAL 400 600 5 6 7 0.1\n")
    cameras, notes = colmap.assign_cameras(images, CameraOptions(intrinsics=path))
    assert [(c.model, c.params) for c in cameras] == [
        ("PINHOLE", (1, 2, 3, 4)),
        ("SIMPLE_RADIAL", (5, 6, 7, 0.1)),
    ]
    assert not notes
    camera_file("1 PINHOLE 800 600 1 2 3 4\n2 PINHOLE 800 600 5 6 7 8\n")
    with pytest.raises(InputError, match=r"no images\.txt"):
        colmap.assign_cameras(images[:1], CameraOptions(intrinsics=path))
    camera_file("1 1 0 0 0 0 0 0 2 a.jpg\n\n", "images.txt")
    chosen = colmap.assign_cameras(images[:1], CameraOptions(intrinsics=path))[0]
    assert chosen[0].params == (5, 6, 7, 8)


def test_glob_camera_file(camera_file: Callable[..., str]) -> None:
    images = [record("cam0/a.jpg"), record("cam1/a b.jpg"), record("else.jpg")]
    path = camera_file(
        "cam0/*.jpg PINHOLE 800 600 1 2 3 4\ncam1/a b.jpg\tPINHOLE 800 600 5 6 7 8\n", "cams.txt"
    )
    cameras, notes = colmap.assign_cameras(images, CameraOptions(intrinsics=path))
    assert [(c.names, c.given) for c in cameras] == [
        (["cam0/a.jpg"], True),
        (["cam1/a b.jpg"], True),
        (["else.jpg"], False),
    ]
    assert "1 of 3" in notes[0]
    for text, message in (
        ("cam0/* PINHOLE 80 60 1 2 3 4", "80x60"),
        ("cam0/* PINHOLE 800", "line 1"),
        ("# nothing", "holds no camera"),
    ):
        path = camera_file(text, "cams.txt")
        with pytest.raises(InputError, match=message):
            colmap.assign_cameras(images, CameraOptions(intrinsics=path))


def test_one_given_intrinsics_for_two_sizes_is_refused() -> None:
    with pytest.raises(InputError, match="2 sizes"):
        colmap.assign_cameras(
            [record("a.jpg"), record("b.jpg", width=400)], CameraOptions(intrinsics=INTRINSICS)
        )


# --------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    scene = make_scene(images=4)
    camera = f"SIMPLE_RADIAL,{FOCAL},{WIDTH / 2},{HEIGHT / 2},0.0"
    result = run(scene, folder, intrinsics=camera)
    loaded = colmap.read_model(result.paths[0])
    notes = export_model(
        loaded, folder / "export",
        formats=("txt", "ply", "nvm", "bundler"), images=folder / "images",
    )  # fmt: skip
    assert notes == []
    return loaded, folder / "export"


def observations(model) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(image name, observation) -> its pixel (corner origin) and its 3D point."""
    return {
        (image.name, i): (p.xy, model.points3D[p.point3D_id].xyz)
        for image in model.images.values()
        for i, p in enumerate(image.points2D)
        if p.has_point3D()
    }


def test_text_export_reads_back(model) -> None:
    loaded, folder = model
    again = pycolmap.Reconstruction(folder)
    assert again.num_points3D() == loaded.num_points3D()


def test_ply_export(model) -> None:
    loaded, folder = model
    raw = (folder / "points.ply").read_bytes()
    header, body = raw.split(b"end_header\n", 1)
    assert f"element vertex {loaded.num_points3D()}".encode() in header
    vertices = np.frombuffer(body, "<f4,<f4,<f4,u1,u1,u1")
    first = loaded.points3D[min(loaded.point3D_ids())].xyz
    assert np.allclose([vertices[0][i] for i in range(3)], first, atol=1e-5)


def test_bundler_export_reprojects(model) -> None:
    loaded, folder = model
    tokens = iter((folder / "bundle.out").read_text().split("\n", 1)[1].split())
    cameras, points = int(next(tokens)), int(next(tokens))
    views = []
    for _ in range(cameras):
        f, _, _ = (float(next(tokens)) for _ in range(3))
        rotation = np.array([float(next(tokens)) for _ in range(9)]).reshape(3, 3)
        views.append((f, rotation, np.array([float(next(tokens)) for _ in range(3)])))
    assert (folder / "list.txt").read_text().splitlines() == sorted(
        i.name for i in loaded.images.values()
    )
    errors = []
    for _ in range(points):
        xyz = np.array([float(next(tokens)) for _ in range(3)])
        [next(tokens) for _ in range(3)]
        for _ in range(int(next(tokens))):
            view, _, x, y = (float(next(tokens)) for _ in range(4))
            f, rotation, translation = views[int(view)]
            p = rotation @ xyz + translation
            errors.append(np.hypot(*(-f * p[:2] / p[2] - [x, y])))
    assert len(errors) == len(observations(loaded))
    assert max(errors) < 0.05


def test_nvm_export_reprojects(model) -> None:
    loaded, folder = model
    lines = (folder / "model.nvm").read_text().splitlines()
    assert lines[0] == "NVM_V3"
    count = int(lines[2])
    views = []
    for line in lines[3 : 3 + count]:
        _, numbers = line.split("\t")
        f, w, x, y, z, cx, cy, cz, *_ = (float(v) for v in numbers.split())
        rotation = pycolmap.Rotation3d(np.array([x, y, z, w])).matrix()
        views.append((f, rotation, np.array([cx, cy, cz])))
    errors = []
    for line in lines[5 + count : 5 + count + int(lines[4 + count])]:
        numbers = [float(v) for v in line.split()]
        xyz = np.array(numbers[:3])
        for view, _, u, v in np.reshape(numbers[7:], (-1, 4)):
            f, rotation, centre = views[int(view)]
            p = rotation @ (xyz - centre)
            errors.append(np.hypot(*(f * p[:2] / p[2] - [u, v])))
    assert len(errors) == len(observations(loaded))
    assert max(errors) < 0.05


def test_formats_that_cannot_hold_a_camera_say_so(tmp_path: Path) -> None:
    scene = make_scene(images=3, arc_deg=50)
    camera = f"OPENCV,{FOCAL},{FOCAL},{WIDTH / 2},{HEIGHT / 2},0,0,0,0"
    result = run(scene, tmp_path, intrinsics=camera)
    notes = export_model(
        colmap.read_model(result.paths[0]), tmp_path / "e", formats=("nvm", "bundler")
    )
    assert len(notes) == 2
    assert all("OPENCV" in note for note in notes)
    assert not (tmp_path / "e" / "bundle.out").exists()


def test_formats_with_one_focal_length_say_what_becomes_of_two(tmp_path: Path) -> None:
    scene = make_scene(images=3, arc_deg=50)
    camera = f"PINHOLE,{FOCAL - 1},{FOCAL + 1},{WIDTH / 2},{HEIGHT / 2}"
    result = run(scene, tmp_path, intrinsics=camera)
    loaded = colmap.read_model(result.paths[0])
    notes = export_model(loaded, tmp_path / "e", formats=("nvm", "bundler"))
    # The focal lengths are 1 px off their mean, at most at half the image's longer side.
    expected = f"fx and fy became their mean ({WIDTH / 2 / (FOCAL - 1):.2f} px)"
    assert [note.split()[0] for note in notes] == ["model.nvm", "bundle.out"]
    assert all(expected in note for note in notes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VerifyOptions(max_error=-1), r"verify.max_error is -1; it must be above 0\."),
        (lambda: VerifyOptions(confidence=2), r"verify.confidence is 2; it must be at most 1\."),
        (lambda: MapOptions(init_min_num_inliers=0), "map.init_min_num_inliers is 0"),
        (lambda: PhotometricOptions(radius=0), "refine.radius is 0; it must be at least 1"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_importing_pycolmap_leaves_sigterm_as_it_was() -> None:
    script = (
        "import os, signal, sys{}; import gim_hloc.colmap; "
        "os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(5)"
    )
    handler = "; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    for before, code in (("", -signal.SIGTERM), (handler, 7)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(before)], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (code, "")


def test_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no COLMAP model"):
        colmap.read_model(tmp_path)
