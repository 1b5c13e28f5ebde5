"""Localising images in a model, and adding images to it, on scenes whose truth is known."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fake_matcher
import h5py
import numpy as np
import pytest
import synthetic
import test_hloc_interop
from fake_matcher import FakeMatcher, write_images
from PIL import Image
from scipy.spatial.transform import Rotation
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, write_cameras
from test_reconstruct_dense import SEMIDENSE

import gim_hloc
from gim_hloc import colmap, workers
from gim_hloc.cli.localize import main
from gim_hloc.errors import InputError, MappingError
from gim_hloc.evaluation.benchmarks import scene as synthetic_dense
from gim_hloc.evaluation.benchmarks.scene import (
    SceneOptions,
    load_scene,
    make_scene,
    write_scene,
)
from gim_hloc.pipelines.localize import LocalizeResult, merge_readings, quaternion
from gim_hloc.poses import Pose
from gim_hloc.tracks.anchored import AnchoredOptions

fake_matcher.register()
synthetic_dense.register()
pytestmark = pytest.mark.usefixtures("no_charts", "rays_cast_once")
hloc = test_hloc_interop.hloc  # the fixture
SCENE = synthetic.make_scene(images=8, points=300)
QUERIES = [SCENE.names[2], SCENE.names[5]]
MAPPED = [name for name in SCENE.names if name not in QUERIES]


def error(found: Pose, true: Pose) -> tuple[float, float]:
    """Rotation in degrees, and distance of the centres."""
    cosine = (np.trace(found[0].T @ true[0]) - 1) / 2
    shift = found[0].T @ found[1] - true[0].T @ true[1]
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), float(np.linalg.norm(shift))


@pytest.fixture(scope="module", autouse=True)
def _more_points() -> Iterator[None]:
    """For statistics; the matcher that knows the answer knows this scene."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_matcher, "SCENE", SCENE)
        yield


@pytest.fixture(scope="module")
def place(_more_points: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``all``: pictures of the scene, ``old`` and ``new``: parts, ``map``: a run on ``old``."""
    root = tmp_path_factory.mktemp("place")
    write_images(root / "all", SCENE)
    for folder, names in (("old", MAPPED), ("new", QUERIES)):
        (root / folder).mkdir()
        for name in names:
            shutil.copy(root / "all" / name, root / folder / name)
    truth = write_cameras({n: SCENE.poses[n] for n in MAPPED}, root / "truth")
    gim_hloc.reconstruct(
        root / "old", root / "map", matcher="fake", model=truth, deterministic=True, progress=False,
        refine_keypoints=False, max_size=None,
    )  # fmt: skip
    return root


def times(folder: Path) -> dict[Path, int]:
    """When each file was written, but COLMAP's log, whose last lines may come late."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "logs" not in p.parts}


def run(place: Path, output: Path, queries: Path | None = None, **options: Any) -> LocalizeResult:
    FakeMatcher.calls.clear()
    return gim_hloc.localize(
        place / "map", queries or place / "new", output, progress=False, threads=1, **options
    )


# ----------------------------------------------------------------------------------- whole runs


def test_poses_are_true_and_nothing_of_the_map_is_computed_again(
    place: Path, tmp_path: Path
) -> None:
    before = times(place / "map")
    result = run(place, tmp_path / "out")
    assert result.localized == 2
    for name in QUERIES:
        rotation, centre = error(result.queries[name].pose, SCENE.poses[name])  # type: ignore[arg-type]
        assert rotation < 1e-3
        assert centre < 1e-4
        assert result.queries[name].intrinsics == "map"
        assert result.queries[name].inliers > 250
        assert {r for r, _ in result.queries[name].references} == set(MAPPED)
    encoded = [call for call in FakeMatcher.calls if "|" not in call]
    matched = [call for call in FakeMatcher.calls if "|" in call]
    assert sorted(encoded) == QUERIES  # not one image of the map
    assert len(matched) == len(QUERIES) * len(MAPPED)
    assert times(place / "map") == before
    for name in ("poses.txt", "report.txt", "report.json", "pairs.txt", "features.h5", "log.txt"):
        assert (tmp_path / "out" / name).is_file(), name
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="pair-data">')[1].split("</script>")[0])
    assert len(data["pairs"]) == 3 * len(QUERIES)  # the best images of the map of each
    for query, reference, inliers, matches, outliers, code in data["pairs"]:
        name, other = data["names"][query], data["names"][reference].removesuffix(" (map)")
        assert other in dict(result.queries[name].references)
        assert 100 < inliers <= matches
        size = np.array([WIDTH, HEIGHT] * 2)
        xy = np.frombuffer(base64.b64decode(code), "<u2").reshape(-1, 4)[outliers:] / 65535 * size
        for side, image in ((xy[:, :2], name), (xy[:, 2:], other)):  # at true keypoints
            distance = np.linalg.norm(side[:, None] - 0.5 - SCENE.keypoints[image], axis=2).min(1)
            assert distance.max() < 0.1


def test_outputs_agree_with_each_other(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out")
    lines = (tmp_path / "out/poses.txt").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(" ", 7)[0] for line in lines] == QUERIES
    model = colmap.read_model(tmp_path / "out")
    old = colmap.read_model(place / "map")
    assert model.num_reg_images() == len(SCENE.names)
    assert model.num_points3D() == old.num_points3D()
    found = colmap.model_cameras(tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["queries"]}
    views = colmap.map_views(model)
    for line, name in zip(lines, QUERIES, strict=True):
        qw, qx, qy, qz, *translation = map(float, line.rsplit(" ", 7)[1:])
        pose = result.queries[name].pose
        assert pose is not None
        np.testing.assert_allclose([qw, qx, qy, qz], quaternion(pose[0]), atol=1e-12)
        np.testing.assert_allclose(translation, pose[1])
        np.testing.assert_allclose(found[name][0], pose[0], atol=1e-9)
        np.testing.assert_allclose(rows[name]["center"], result.queries[name].center)
        # Observations of the model are keypoints of the file, and see the right points.
        np.testing.assert_allclose(views[name].xy_px, SCENE.keypoints[name], atol=1e-3)
        assert (views[name].points >= 0).sum() == result.queries[name].inliers
    assert model.compute_mean_reprojection_error() < 0.01
    table = (tmp_path / "out/report.txt").read_text(encoding="utf-8")
    assert all(name in table for name in QUERIES)


def test_same_command_again_computes_nothing(place: Path, tmp_path: Path) -> None:
    first = run(place, tmp_path / "out")
    again = run(place, tmp_path / "out")
    assert FakeMatcher.calls == []
    assert set(again.report["counts"].values()) == {0}
    for name in QUERIES:
        np.testing.assert_array_equal(again.queries[name].pose[0], first.queries[name].pose[0])  # type: ignore[index]
    # Another bound redoes the poses only; another query is one more.
    third = run(place, tmp_path / "out", max_error=5.0)
    assert FakeMatcher.calls == []
    assert third.report["counts"]["queries_located_now"] == 2
    queries = tmp_path / "more"
    shutil.copytree(place / "new", queries)
    shutil.copy(place / "all" / MAPPED[1], queries)
    fourth = run(place, tmp_path / "out", queries, max_error=5.0)
    assert [call for call in FakeMatcher.calls if "|" not in call] == [MAPPED[1]]
    assert fourth.report["counts"]["queries_located_now"] == 1
    # A query may have the name of an image of the map.
    assert fourth.localized == 3
    assert f"query/{MAPPED[1]}" in colmap.model_cameras(tmp_path / "out")


def test_mirrored_and_masked_queries_are_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "new", tmp_path / "queries")
    exif = Image.Exif()
    exif[0x0112] = 7
    with Image.open(place / "new" / QUERIES[0]) as image:
        image.save(tmp_path / "queries" / "m.jpg", exif=exif)
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "queries" / f"{QUERIES[1]}.png")
    result = run(place, tmp_path / "out", tmp_path / "queries", masks=tmp_path / "queries")
    assert result.localized == 1
    assert result.queries["m.jpg"].status == "mirrored"
    assert "leaves nothing of it" in result.queries[QUERIES[1]].reason


def test_a_localizer_works_in_this_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the map is looked at twice, and no process starts."""
    positions, processes = Mock(wraps=colmap.point_positions), Mock()
    monkeypatch.setattr(colmap, "point_positions", positions)
    monkeypatch.setattr(workers, "_processes", processes)
    options = {"intrinsics": INTRINSICS, "devices": ("cpu", "cpu"), "threads": 1}
    with contextlib.closing(gim_hloc.Localizer(place / "map", **options)) as localizer:
        for name in QUERIES:
            found = localizer.localize(place / "new" / name)
            assert found.intrinsics == "given"
            assert found.name == name
            assert error(found.pose, SCENE.poses[name])[1] < 1e-4  # type: ignore[arg-type]
        camera = f"SIMPLE_PINHOLE,{FOCAL + 1},{WIDTH / 2},{HEIGHT / 2}"
        other = localizer.localize(place / "new" / QUERIES[0], camera)
        assert other.camera is not None
        assert other.camera.params[0] == FOCAL + 1
        with pytest.raises(InputError, match="query is 40x30 px; that is too small"):
            localizer.localize(np.zeros((30, 40, 3), np.uint8))
    assert positions.call_count == 1
    processes.assert_not_called()


@pytest.mark.parametrize(
    "option",
    [{"step": "match"}, {"shard": "0/2"}, {"start": "match"}, {"overwrite": True}, {"prune": True}],
)
def test_a_localizer_has_no_steps(place: Path, option: Any) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} is for runs with an output folder"):
        gim_hloc.Localizer(place / "map", **option)


@pytest.fixture
def corridor(place: Path, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A map in which image i sees points 25 i to 25 i + 150, and its images by number."""
    root = tmp_path / "corridor"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for i, name in enumerate(SCENE.names):
            seen = (SCENE.points[name] >= 25 * i) & (SCENE.points[name] < 25 * i + 150)
            patch.setitem(SCENE.keypoints, name, SCENE.keypoints[name][seen])
            patch.setitem(SCENE.points, name, SCENE.points[name][seen])
        gim_hloc.reconstruct(
            place / "old", root / "map", matcher="fake", model=place / "truth",
            deterministic=True, progress=False, refine_keypoints=False,
        )  # fmt: skip
        (root / "new").symlink_to(place / "new")
        yield root, SCENE.names


def pairs_of(output: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (output / "pairs.txt").read_text(encoding="utf-8").splitlines():
        query, reference = line.split("\t")
        found.setdefault(query, []).append(reference)
    return found


def test_retrieval_finds_what_looks_alike(corridor: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = corridor
    result = run(root, tmp_path / "out", pairs="retrieval", neighbours=2)
    assert result.localized == 2
    for i in (2, 5):
        chosen = {names.index(name) for name in pairs_of(tmp_path / "out")[names[i]]}
        assert len(chosen) == 2
        assert chosen & {i - 1, i + 1}
        assert chosen <= set(range(i - 2, i + 3))
    stored = (tmp_path / "out/retrieval.npz").stat().st_mtime_ns
    run(root, tmp_path / "out", pairs="retrieval", neighbours=1)
    assert (tmp_path / "out/retrieval.npz").stat().st_mtime_ns == stored
    # From 21 images on it is what auto means; the map is small enough for all pairs.
    assert run(root, tmp_path / "auto").report["pairs"] == "exhaustive"


def test_covisibility_adds_what_sees_the_same_points(
    corridor: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = corridor
    monkeypatch.setattr("gim_hloc.pipelines.localize._COVISIBLE_SEEDS", 1)
    result = run(root, tmp_path / "out", pairs="covisibility", neighbours=3)
    assert result.localized == 2
    for i in (2, 5):
        chosen = {names.index(name) for name in pairs_of(tmp_path / "out")[names[i]]}
        assert len(chosen) == 3
        assert chosen & {i - 1, i + 1}
        assert chosen <= set(range(i - 3, i + 4))


def test_pairs_from_a_list(place: Path, tmp_path: Path) -> None:
    lines = [f"{q}\t{m}" for q in QUERIES for m in MAPPED[:2]]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    result = run(place, tmp_path / "out", pairs=str(tmp_path / "list.txt"))
    assert result.localized == 2
    assert {r for r, _ in result.queries[QUERIES[0]].references} == set(MAPPED[:2])


def test_clusters_are_tried_one_by_one(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", cluster=True)
    assert result.localized == 2
    assert result.queries[QUERIES[0]].inliers > 250


def test_intrinsics_given_and_estimated(place: Path, tmp_path: Path) -> None:
    given = run(place, tmp_path / "given", intrinsics=INTRINSICS)
    assert given.queries[QUERIES[0]].intrinsics == "given"
    guessed = run(place, tmp_path / "guessed", camera="estimate")
    for name in QUERIES:
        query = guessed.queries[name]
        assert query.intrinsics == "estimated"
        assert query.camera is not None
        assert query.camera.model == "SIMPLE_RADIAL"
        assert abs(query.camera.params[0] - FOCAL) < 1  # the guess is 960
        rotation, centre = error(query.pose, SCENE.poses[name])  # type: ignore[arg-type]
        assert rotation < 0.02
        assert centre < 0.01
    # Wrong ones given are kept, and show.
    wrong = run(place, tmp_path / "wrong", intrinsics="PINHOLE,800,800,400,300")
    query = wrong.queries[QUERIES[0]]
    assert query.camera is not None
    assert query.camera.params[0] == 800
    assert query.error_px is None or query.error_px > 0.5


def noisy(monkeypatch: pytest.MonkeyPatch, names: list[str], sigma: float) -> None:
    """Keypoints of some images that are off, so that each says something else of its camera."""
    for i, name in enumerate(names):
        xy = SCENE.keypoints[name]
        off = np.random.default_rng(i).normal(0, sigma, xy.shape).astype(np.float32)
        monkeypatch.setitem(SCENE.keypoints, name, xy + off)


def test_one_focal_length_of_several_queries(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy(monkeypatch, SCENE.names, 2.0)
    apart = run(place, tmp_path / "apart", place / "all", camera="estimate")
    assert {q.intrinsics for q in apart.queries.values()} == {"estimated"}
    focal = np.array([q.camera.params[0] for q in apart.queries.values()])  # type: ignore[union-attr]
    together = run(place, tmp_path / "out", place / "all", camera="estimate", camera_mode="single")
    assert together.localized == len(SCENE.names)
    assert {q.intrinsics for q in together.queries.values()} == {"shared"}
    (shared,) = {q.camera.params[0] for q in together.queries.values()}  # type: ignore[union-attr]
    assert abs(shared - FOCAL) < 0.7 * np.abs(focal - FOCAL).mean()
    assert abs(shared - FOCAL) < 0.005 * FOCAL < np.abs(focal - FOCAL).max()

    def centres(result: LocalizeResult) -> float:
        return float(np.mean([error(q.pose, SCENE.poses[n])[1] for n, q in result.queries.items()]))  # type: ignore[arg-type]

    assert centres(together) < 0.7 * centres(apart)
    assert "estimated together" in (tmp_path / "out/report.txt").read_text(encoding="utf-8")
    assert len(colmap.read_model(tmp_path / "out").cameras) == 2  # the map's and the queries'
    # The same again computes nothing; neither does one camera a folder, which is the same.
    again = run(place, tmp_path / "out", place / "all", camera="estimate", camera_mode="folder")
    assert set(again.report["counts"].values()) == {0}
    # What is known is not estimated, and one query has nobody to share with.
    known = run(place, tmp_path / "known", camera_mode="single")
    assert {q.intrinsics for q in known.queries.values()} == {"map"}
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(place / "new" / QUERIES[0], single)
    alone = run(place, tmp_path / "alone", single, camera="estimate", camera_mode="auto")
    assert alone.queries[QUERIES[0]].intrinsics == "estimated"


def test_a_shared_camera_has_one_size(place: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries"
    shutil.copytree(place / "new", queries)
    Image.new("RGB", (200, 100)).save(queries / "small.png")
    with pytest.raises(InputError, match="Images of one camera have one size"):
        run(place, tmp_path / "out", queries, camera="estimate", camera_mode="single")


def test_exif_is_refined(place: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries"
    queries.mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[41989] = 29  # mm on 36 x 24 film: 670 px, the truth is 700
    Image.open(place / "new" / QUERIES[0]).save(queries / QUERIES[0], exif=exif)
    result = run(place, tmp_path / "out", queries, camera="exif")
    query = result.queries[QUERIES[0]]
    assert query.intrinsics == "exif"
    assert query.camera is not None
    assert abs(query.camera.params[0] - FOCAL) < 1
    # EXIF that contradicts the map's camera is another camera; 29 mm does not.
    assert run(place, tmp_path / "auto", queries).queries[QUERIES[0]].intrinsics == "map"
    exif.get_ifd(0x8769)[41989] = 60
    Image.open(place / "new" / QUERIES[0]).save(queries / QUERIES[0], exif=exif)
    assert run(place, tmp_path / "zoom", queries).queries[QUERIES[0]].intrinsics == "exif"


def test_a_run_that_finds_no_pose_leaves_those_of_the_run_before(
    place: Path, tmp_path: Path
) -> None:
    run(place, tmp_path / "out")
    kept = {
        p: p.read_bytes()
        for p in [tmp_path / "out/poses.txt", *(tmp_path / "out/sparse").iterdir()]
    }
    with pytest.raises(MappingError):
        run(place, tmp_path / "out", min_inliers=1000)
    assert {path: path.read_bytes() for path in kept} == kept
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["model"] is None
    assert any("still those of the run before" in note for note in report["notes"])


def test_failures_are_explained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries"
    shutil.copytree(place / "new", queries)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(queries / "blank.png")
    (queries / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    result = run(place, tmp_path / "out", queries)
    assert result.localized == 2
    status = {name: query.status for name, query in result.queries.items()}
    assert status["blank.png"] == "no_features"
    assert status["broken.jpg"] == "unreadable"
    assert "failed: no keypoints" in (tmp_path / "out/report.txt").read_text(encoding="utf-8")
    # None: exit code 4, and the table is there.
    for name in QUERIES:
        (queries / name).unlink()
    code = main([str(place / "map"), str(queries), str(tmp_path / "none"), "--quiet"])
    assert code == 4
    assert "None of the 1 queries could be localised" in capsys.readouterr().err
    assert (tmp_path / "none/report.txt").is_file()
    with pytest.raises(MappingError):
        run(place, tmp_path / "few", min_inliers=1000)
    assert "1000 are asked for" in (tmp_path / "few/report.txt").read_text(encoding="utf-8")
    with pytest.raises(MappingError):
        run(place, tmp_path / "few", min_inlier_ratio=1.1)
    assert "110% are asked for" in (tmp_path / "few/report.txt").read_text(encoding="utf-8")


def test_bad_inputs_are_one_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "no", place / "new"), "There is no map"),
        ((tmp_path / "empty", place / "new"), "holds no COLMAP model"),
        ((place / "truth", place / "new"), "no 3D points"),
        ((place / "map", tmp_path / "no"), "no folder of queries"),
        ((place / "map", tmp_path / "empty"), "0 usable images"),
        ((place / "map/sparse/0", place / "new"), "give --matcher"),
    ):
        with pytest.raises(InputError, match=message):
            gim_hloc.localize(*arguments, out, progress=False)
    for options, message in (
        ({"pairs": "nope"}, "--pairs nope"),
        ({"nope": 1}, "no setting 'nope'"),
        ({"matcher": "sift"}, "not those of sift"),
        ({"camera_model": "NOPE"}, "Unknown camera model"),
        ({"min_inliers": 2}, "at least 4"),
    ):
        with pytest.raises(InputError, match=message):
            run(place, out, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must not be the map"):
        run(place, place / "map")
    assert not out.exists()


def test_any_colmap_model_with_features_is_a_map(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "map/sparse/0", tmp_path / "model")
    with h5py.File(place / "map/features.h5") as ours, h5py.File(tmp_path / "f.h5", "w") as plain:
        for name in MAPPED:  # what hloc has: no scores, no attributes
            for key in ("keypoints", "descriptors"):
                plain[f"{name}/{key}"] = ours[name][key][()]
    options: dict[str, Any] = {"matcher": "fake", "progress": False}
    result = gim_hloc.localize(
        tmp_path / "model", place / "new", tmp_path / "out", features=tmp_path / "f.h5", **options
    )
    assert result.localized == 2
    assert error(result.queries[QUERIES[0]].pose, SCENE.poses[QUERIES[0]])[0] < 1e-3  # type: ignore[arg-type]
    with h5py.File(tmp_path / "f.h5", "a") as plain:
        plain[f"{MAPPED[0]}/keypoints"][...] += 100
    with pytest.raises(InputError, match="made from other features"):
        gim_hloc.localize(
            tmp_path / "model", place / "new", tmp_path / "out2", features=tmp_path / "f.h5",
            **options,
        )  # fmt: skip


def test_the_command_prints_a_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([
        str(place / "map"), str(place / "new"), str(tmp_path / "out"), "--pairs", "exhaustive",
        "--intrinsics", INTRINSICS,
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "2 of 2 queries localised" in out
    assert all(name in out for name in QUERIES)


def test_readings_are_merged_by_their_median() -> None:
    which = np.array([0, 0, 0, 1, 1, 2])
    xy = np.array([[1.0, 1], [3, 1], [90, 1], [0, 0], [50, 0], [7, 8]])
    score = np.array([1.0, 3, 1, 0.2, 0.9, 0.5])
    places, used = merge_readings(which, xy, score, 3.0, 3)
    np.testing.assert_allclose(places, [[2.5, 1], [50, 0], [7, 8]])
    assert used.tolist() == [True, True, False, False, True, True]


# -------------------------------------------------------------------------------------- dense


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene with ``images`` and true ``poses`` of four views, and two more in ``new``."""
    root = tmp_path_factory.mktemp("rendered")
    scene = make_scene(SceneOptions(views=6, size=(320, 240)))
    write_scene(scene, root)
    queries = [scene.names[2], scene.names[3]]
    (root / "new").mkdir()
    for name in queries:
        shutil.move(root / "images" / name, root / "new" / name)
    poses = {n: p for n, p in scene.poses.items() if n not in queries}
    write_cameras(poses, root / "poses", "SIMPLE_PINHOLE,280,160,120", (320, 240))
    return root


def knows(rendered: Path) -> tuple[str, str]:
    return (f"scene={rendered / 'scene.json'}", "size=[120, 160]", "noise_px=0.2")


def check_rendered(result: LocalizeResult, rendered: Path) -> None:
    scene = load_scene(rendered / "scene.json")
    for path in (rendered / "new").iterdir():
        rotation, centre = error(result.queries[path.name].pose, scene.poses[path.name])  # type: ignore[arg-type]
        assert rotation < 0.25  # 1.2 px
        assert centre < 0.02


@pytest.mark.parametrize("matcher", [synthetic_dense.NAME, SEMIDENSE])
def test_dense_matcher_is_read_at_the_maps_keypoints(
    matcher: str, rendered: Path, tmp_path: Path
) -> None:
    gim_hloc.reconstruct(
        rendered / "images", tmp_path / "map", matcher=matcher, quality="fast",
        anchors="sift", model=rendered / "poses", deterministic=True, refine_keypoints=False,
        max_keypoints=400, anchored=AnchoredOptions(grid_px=40), matcher_options=knows(rendered),
        progress=False,
    )  # fmt: skip
    for turn in range(2):
        result = gim_hloc.localize(
            tmp_path / "map", rendered / "new", tmp_path / "out", progress=False, neighbours=3,
            pairs="retrieval",
        )  # fmt: skip
        assert result.localized == 2
        assert result.report["counts"]["pairs_matched_now"] == (0 if turn else 6)
    assert set(result.report["counts"].values()) == {0}
    check_rendered(result, rendered)
    model = colmap.read_model(tmp_path / "out")
    assert model.num_reg_images() == 6


def test_semidense_matcher_in_a_map_of_keypoints(rendered: Path, tmp_path: Path) -> None:
    """Another matcher than the map's; a query whose EXIF says that it is stored turned."""
    gim_hloc.reconstruct(
        rendered / "images", tmp_path / "map", matcher="sift", model=rendered / "poses",
        deterministic=True, refine_keypoints=False, progress=False,
    )  # fmt: skip
    queries = tmp_path / "new"
    shutil.copytree(rendered / "new", queries)
    first, second = sorted(queries.iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6
    # The matcher looks at the name of an image and at its frame, not at what it shows.
    Image.open(first).save(first, exif=exif)
    options: dict[str, Any] = {
        "matcher": SEMIDENSE, "matcher_options": knows(rendered), "progress": False, "threads": 2,
    }  # fmt: skip
    result = gim_hloc.localize(tmp_path / "map", queries, tmp_path / "out", **options)
    check_rendered(result, rendered)
    views = colmap.map_views(colmap.read_model(tmp_path / "out"))
    for name in (first.name, second.name):
        assert (views[name].points >= 0).sum() == result.queries[name].inliers > 100
    with pytest.raises(InputError, match="give --images"):
        gim_hloc.localize(tmp_path / "map/sparse/0", queries, tmp_path / "bare", **options)
    again = gim_hloc.localize(
        tmp_path / "map/sparse/0", queries, tmp_path / "bare", images=rendered / "images", **options
    )
    for name, query in result.queries.items():
        np.testing.assert_allclose(again.queries[name].pose[1], query.pose[1], atol=1e-9)  # type: ignore[index]


# ----------------------------------------------------------------------------- adding to a model


def extend(place: Path, output: Path, **options: Any) -> Any:
    FakeMatcher.calls.clear()
    return gim_hloc.reconstruct(
        place / "new", output, extend=place / "map", deterministic=True, progress=False,
        **{"refine_keypoints": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("poses", ["fixed", "refine"])
def test_images_are_added_to_a_model(poses: str, place: Path, tmp_path: Path) -> None:
    before = times(place / "map")
    result = extend(place, tmp_path / "out", poses=poses)
    assert result.registered == len(SCENE.names)
    assert sorted(c for c in FakeMatcher.calls if "|" not in c) == QUERIES
    matched = [call.split("|") for call in FakeMatcher.calls if "|" in call]
    assert len(matched) == len(QUERIES) * len(MAPPED) + 1  # and the new ones with each other
    found = colmap.model_cameras(tmp_path / "out")
    old = colmap.model_cameras(place / "map")
    for name in SCENE.names:
        rotation, centre = error(found[name], SCENE.poses[name])
        assert rotation < 1e-2
        assert centre < 2e-3
    if poses == "fixed":
        for name in MAPPED:
            assert np.abs(found[name][1] - old[name][1]).max() < 1e-14
    statistics = colmap.model_statistics(tmp_path / "out")
    assert statistics["mean_track_length"] > 7.5  # new images see the old points
    assert len(colmap.read_model(tmp_path / "out").cameras) == 1  # shared with the map
    assert times(place / "map") == before
    # All images stand in one folder, and the result is a map again.
    assert sorted(p.name for p in (tmp_path / "out/images").iterdir()) == SCENE.names
    again = extend(place, tmp_path / "out", poses=poses)
    assert FakeMatcher.calls == []
    assert again.report["summary"]["points"] == result.report["summary"]["points"]
    if poses == "fixed":
        located = gim_hloc.localize(
            tmp_path / "out", place / "new", tmp_path / "loc", progress=False, threads=1
        )
        assert located.localized == 2
        extend(place, tmp_path / "out", overwrite=True)
        assert sorted(c for c in FakeMatcher.calls if "|" not in c) == QUERIES  # not the map's


def test_extending_goes_on_from_the_whole_folder(place: Path, tmp_path: Path) -> None:
    """IMAGES may hold the map's images too."""
    FakeMatcher.calls.clear()
    result = gim_hloc.reconstruct(
        place / "all", tmp_path / "out", extend=place / "map", progress=False,
        deterministic=True, refine_keypoints=False,
    )  # fmt: skip
    assert result.registered == len(SCENE.names)
    assert sorted(c for c in FakeMatcher.calls if "|" not in c) == QUERIES


def test_what_cannot_be_extended(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was made with fake"):
        extend(place, tmp_path / "out", matcher="sift")
    with pytest.raises(InputError, match="give another folder"):
        extend(place, place / "map")
    with pytest.raises(InputError, match="holds no image that"):
        gim_hloc.reconstruct(place / "old", tmp_path / "out", extend=place / "map", progress=False)
    with pytest.raises(InputError, match=r"there is no run\.yaml"):
        gim_hloc.reconstruct(
            place / "new", tmp_path / "out", extend=place / "map/sparse/0", progress=False
        )
    clash = tmp_path / "clash"
    clash.mkdir()
    shutil.copy(place / "new" / QUERIES[0], clash / MAPPED[0])
    with pytest.raises(InputError, match="is another image than"):
        gim_hloc.reconstruct(clash, tmp_path / "out", extend=place / "map", progress=False)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- real photographs

FOUNTAIN_K = "PINHOLE,919.826667,921.836562,506.896667,335.767202"
LEFT_OUT = ("0003.jpg", "0007.jpg")

LOCALIZE_SFM = """
import sys
from pathlib import Path
from hloc import localize_sfm
model, queries, pairs, features, matches, results = map(Path, sys.argv[1:])
localize_sfm.main(model, queries, pairs, features, matches, results)
"""


@pytest.fixture(scope="module")
def fountain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of nine photographs in the world of the truth, and the other two localised in it."""
    truth = data / "fountain-P11"
    root = tmp_path_factory.mktemp("fountain")
    for folder in ("old", "new"):
        (root / folder).mkdir()
    for path in sorted((truth / "images").glob("*.jpg")):
        shutil.copy(path, root / ("new" if path.name in LEFT_OUT else "old"))
    gim_hloc.reconstruct(
        root / "old", root / "map", model=truth / "gt", quality="fast", progress=False
    )
    gim_hloc.localize(
        root / "map", root / "new", root / "out", intrinsics=FOUNTAIN_K, progress=False
    )
    return root


def check_fountain(found: dict[str, Pose], truth: dict[str, Pose]) -> None:
    centres = np.array([-r.T @ t for r, t in truth.values()])
    radius = np.linalg.norm(centres - centres.mean(0), axis=1).mean()
    assert sorted(found) == list(LEFT_OUT)
    for name, pose in found.items():
        rotation, centre = error(pose, truth[name])
        assert rotation <= 0.2, name
        assert centre <= 0.003 * radius, name


def read_poses_txt(path: Path) -> dict[str, Pose]:
    found = {}
    for line in path.read_text().splitlines():
        name, *values = line.split()
        w, x, y, z, *translation = map(float, values)
        rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
        found[name] = (rotation, np.array(translation))
    return found


@pytest.mark.slow
@pytest.mark.weights
def test_photographs_are_localised_exactly(fountain: Path, data: Path) -> None:
    truth = colmap.model_cameras(data / "fountain-P11" / "gt")
    check_fountain(read_poses_txt(fountain / "out/poses.txt"), truth)
    # Unknown intrinsics: looser, and still the place.
    result = gim_hloc.localize(
        fountain / "map", fountain / "new", fountain / "estimated", camera="estimate",
        progress=False,
    )  # fmt: skip
    for name in LEFT_OUT:
        rotation, _ = error(result.queries[name].pose, truth[name])  # type: ignore[arg-type]
        assert rotation < 1
        camera = result.queries[name].camera
        assert camera is not None
        assert abs(camera.params[0] / 920 - 1) < 0.02


@pytest.mark.slow
@pytest.mark.weights
def test_photographs_that_are_stored_turned_are_found(
    fountain: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    name = LEFT_OUT[1]
    picture = Image.open(fountain / "new" / name).transpose(Image.Transpose.ROTATE_90)
    picture.save(tmp_path / "new" / name, quality=95)  # counter-clockwise; no EXIF
    # Stored x, y are upright y and width - x.
    _, fx, fy, cx, cy = FOUNTAIN_K.split(",")
    turned = f"PINHOLE,{fy},{fx},{cy},{1024 - float(cx)}"
    options: dict[str, Any] = {"intrinsics": turned, "progress": False}
    result = gim_hloc.localize(fountain / "map", tmp_path / "new", tmp_path / "out", **options)
    quarter = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    rotation, translation = colmap.model_cameras(data / "fountain-P11" / "gt")[name]
    found = result.queries[name].pose
    assert found is not None
    angle, centre = error(found, (quarter @ rotation, quarter @ translation))
    assert angle < 0.2
    assert centre < 0.05
    assert result.report["queries"][0]["rotated_degrees"] == 90
    again = gim_hloc.localize(fountain / "map", tmp_path / "new", tmp_path / "out", **options)
    assert set(again.report["counts"].values()) == {0}


@pytest.mark.slow
@pytest.mark.weights
def test_photographs_are_added_exactly(fountain: Path, data: Path) -> None:
    truth = colmap.model_cameras(data / "fountain-P11" / "gt")
    result = gim_hloc.reconstruct(
        fountain / "new", fountain / "extended", extend=fountain / "map", progress=False
    )
    assert result.registered == 11
    found = colmap.model_cameras(fountain / "extended")
    check_fountain({name: found[name] for name in LEFT_OUT}, truth)
    assert max(np.abs(found[n][1] - truth[n][1]).max() for n in truth if n not in LEFT_OUT) < 1e-9


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.hloc
def test_hlocs_localize_sfm_takes_our_files(
    hloc: test_hloc_interop.RealHloc, fountain: Path, data: Path, tmp_path: Path
) -> None:
    script = tmp_path / "localize_sfm.py"
    script.write_text(LOCALIZE_SFM)
    model, *params = FOUNTAIN_K.split(",")
    lines = [f"{name} {model} 1024 683 {' '.join(params)}" for name in LEFT_OUT]
    (tmp_path / "queries.txt").write_text("\n".join(lines) + "\n")
    out = fountain / "out"
    hloc.run(
        script, fountain / "map/sparse/0", tmp_path / "queries.txt", out / "pairs.txt",
        out / "features.h5", out / "matches.h5", tmp_path / "results.txt",
    )  # fmt: skip
    theirs = read_poses_txt(tmp_path / "results.txt")
    check_fountain(theirs, colmap.model_cameras(data / "fountain-P11" / "gt"))
    for name, pose in read_poses_txt(out / "poses.txt").items():
        rotation, _ = error(theirs[name], pose)
        assert rotation < 0.02
