"""The pipeline from folder to model: files, resuming, reasons, errors.

Most cases run with a matcher that knows the answer (``fake_matcher``), so that they are exact and
fast; real photographs follow in ``test_real_scenes``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import fake_matcher
import faults
import h5py
import numpy as np
import pytest
import yaml
from fake_matcher import SCENE, FakeMatcher, write_images
from PIL import Image
from synthetic import FOCAL, HEIGHT, INTRINSICS, WIDTH, camera_errors, make_scene

import gim_hloc
from gim_hloc import colmap, store
from gim_hloc.cli.reconstruct import main
from gim_hloc.errors import InputError, LockedError, MappingError, OutputError
from gim_hloc.lock import FolderLock
from gim_hloc.options import MapOptions
from gim_hloc.pairs import read_pairs
from gim_hloc.pipelines import exports
from gim_hloc.pipelines.reconstruct import ReconstructResult

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
NAMES = SCENE.names
PAIRS = len(NAMES) * (len(NAMES) - 1) // 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ReconstructResult:
    """A run of ``images`` beside its output, that tests go on from in copies."""
    folder = tmp_path_factory.mktemp("whole")
    return run(write_images(folder / "images"), folder / "out")


@pytest.fixture
def images(whole: ReconstructResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.output.with_name("images"), tmp_path / "images"))


@pytest.fixture
def finished(whole: ReconstructResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.output, tmp_path / "out", symlinks=True))


def run(images: Path, output: Path, **options: Any) -> ReconstructResult:
    FakeMatcher.calls.clear()
    fixed = {"matcher": "fake", "rescue": "none", "intrinsics": INTRINSICS, "deterministic": True}
    options = {**fixed, **options}
    return gim_hloc.reconstruct(images, output, progress=False, **options)


def encoded() -> list[str]:
    return sorted(call for call in FakeMatcher.calls if "|" not in call)


def matched() -> list[str]:
    return sorted(call for call in FakeMatcher.calls if "|" in call)


def status(result: ReconstructResult) -> dict[str, str]:
    return {row["name"]: row["status"] for row in result.report["images"]}


# ----------------------------------------------------------------------------------- whole runs


def test_an_image_that_is_gone_when_it_is_exported_costs_the_export_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = exports.export_model

    def late(*args: Any, **options: Any) -> list[str]:
        (images / NAMES[0]).rename(tmp_path / "away")
        return export(*args, **options)

    monkeypatch.setattr(exports, "export_model", late)
    with pytest.raises(InputError, match=re.escape(NAMES[0])):
        run(images, tmp_path / "out", export=("3dgs",))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["registered"] == len(NAMES)
    assert any(NAMES[0] in note for note in report["notes"])
    monkeypatch.undo()
    (tmp_path / "away").rename(images / NAMES[0])
    assert run(images, tmp_path / "out", export=("3dgs",)).registered == len(NAMES)
    assert FakeMatcher.calls == []
    written = tmp_path / "out" / "export" / "0" / "3dgs"
    assert len(list((written / "images").iterdir())) == len(NAMES)
    assert colmap.read_model(written / "sparse" / "0").num_reg_images() == len(NAMES)
    assert colmap.read_model(tmp_path / "out" / "sparse" / "0").num_reg_images() == len(NAMES)


def test_what_patches_did_not_confirm_does_not_move_the_intrinsics(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def refine(model: Any, *_: Any, **__: Any) -> colmap.Refined:
        """Find every third observation 3 px off, and take it from its track."""
        original = copy.deepcopy(model)
        taken.append(original.compute_num_observations())
        for image_id in model.reg_image_ids():
            image = model.image(image_id)
            for row, point in enumerate(image.points2D):
                if row % 3 == 0 and point.has_point3D():
                    point.xy += [3, 0]
                    model.delete_observation(image_id, row)
        return colmap.Refined(sentence="refined", original=original, scales=np.ones(len(NAMES)))

    monkeypatch.setattr(colmap, "refine_tracks", refine)
    result = run(images, tmp_path / "out", intrinsics=None)
    model = result.model()
    assert list(model.camera(1).params[:3]) == pytest.approx(
        [FOCAL, WIDTH / 2, HEIGHT / 2], abs=0.1
    )
    assert model.compute_num_observations() == taken[0]  # they are back
    assert any("given back" in note for note in result.report["notes"])


def test_whole_run_gives_true_poses_and_all_files(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(images, output)
    assert result.registered == len(NAMES)
    rotation, centre = camera_errors(colmap.model_cameras(output), SCENE.poses)
    assert rotation < 0.02
    assert centre < 1e-3
    assert encoded() == NAMES  # once per image
    assert len(matched()) == PAIRS
    for name in (
        "run.yaml",
        "pairs.txt",
        "features.h5",
        "matches.h5",
        "database.db",
        "report.html",
        "report.json",
        "log.txt",
        "sparse/0/images.bin",
        "export/0/points.ply",
    ):
        assert (output / name).is_file(), name
    assert not [p for p in output.rglob("*") if p.name.endswith((".tmp", "-wal", "-shm"))]
    summary = result.report["summary"]
    assert summary["pairs"] == summary["pairs_verified"] == PAIRS
    assert summary["mean_reprojection_error_px"] < 0.01
    assert read_pairs(output / "pairs.txt") == SCENE.pairs()
    assert result.model().num_reg_images() == len(NAMES)
    # hloc's layout, read as hloc reads it
    with h5py.File(output / "features.h5") as file:
        assert np.array_equal(file[NAMES[0]]["keypoints"][()], SCENE.keypoints[NAMES[0]])
    rows, _ = store.read_matches(output / "matches.h5", NAMES[0], NAMES[1])
    assert set(map(tuple, rows.tolist())) == set(map(tuple, SCENE.matches(*NAMES[:2]).tolist()))


def test_report_counts_observations_and_says_which_cameras_moved(
    whole: ReconstructResult, images: Path, finished: Path
) -> None:
    result = whole
    errors = result.report["reprojection_errors"]
    assert sum(errors["counts"]) == result.model().compute_num_observations()
    mean = np.dot(errors["counts"], np.add(errors["edges"][1:], errors["edges"][:-1]) / 2)
    truth = np.average(
        [r["mean_reprojection_error_px"] for r in result.report["images"]],
        weights=[r["points"] for r in result.report["images"]],
    )
    assert mean / sum(errors["counts"]) == pytest.approx(truth, abs=0.05)  # half a column
    (camera,) = result.report["models"][0]["cameras"]
    assert camera["refined"] is False  # its intrinsics are given
    moved = run(images, finished, refine_intrinsics="all")
    (camera,) = moved.report["models"][0]["cameras"]
    assert camera["refined"] is True


def test_same_command_again_computes_nothing(
    whole: ReconstructResult, images: Path, finished: Path
) -> None:
    before = (finished / "sparse/0/images.bin").stat().st_mtime_ns
    second = run(images, finished)
    assert FakeMatcher.calls == []
    assert (finished / "sparse/0/images.bin").stat().st_mtime_ns == before
    for key in ("registered", "points", "pairs_verified", "mean_reprojection_error_px"):
        assert second.report["summary"][key] == whole.report["summary"][key]
    assert second.report["pairs"] == whole.report["pairs"]


def test_changed_image_redoes_only_what_depends_on_it(images: Path, finished: Path) -> None:
    Image.new("RGB", (800, 600), (3, 4, 5)).save(images / NAMES[2])
    result = run(images, finished)
    assert encoded() == [NAMES[2]]
    assert len(matched()) == len(NAMES) - 1
    assert all(NAMES[2] in pair for pair in matched())
    assert result.registered == len(NAMES)


def test_added_image_keeps_the_rest(images: Path, tmp_path: Path) -> None:
    last = images / NAMES[-1]
    kept = last.read_bytes()
    last.unlink()
    assert run(images, tmp_path / "out").registered == len(NAMES) - 1
    last.write_bytes(kept)
    assert run(images, tmp_path / "out").registered == len(NAMES)
    assert encoded() == [NAMES[-1]]
    assert len(matched()) == len(NAMES) - 1


def test_changed_settings_reuse_nothing(
    images: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gim_hloc")
    run(images, finished, matcher_options=("version=1",))
    assert encoded() == NAMES
    assert len(matched()) == PAIRS
    assert "encode.version changed" in caplog.text


def test_mapping_options_redo_mapping_only(images: Path, finished: Path) -> None:
    before = (finished / "sparse/0/images.bin").stat().st_mtime_ns
    run(images, finished, map=MapOptions(init_min_tri_angle=8.0))
    assert FakeMatcher.calls == []
    assert (finished / "sparse/0/images.bin").stat().st_mtime_ns != before


def test_notes_of_a_reused_model_are_told_again(tmp_path: Path, monkeypatch) -> None:
    narrow = make_scene(images=4, arc_deg=3)  # no first pair at COLMAP's thresholds
    monkeypatch.setattr(fake_matcher, "SCENE", narrow)
    images = write_images(tmp_path / "images", narrow)
    for again in (False, True):
        result = run(images, tmp_path / "out")
        assert bool(FakeMatcher.calls) != again
        assert sum("relaxed" in note for note in result.report["notes"]) == 1


def test_overwrite_starts_over_and_keeps_other_files(images: Path, finished: Path) -> None:
    (finished / "notes of mine.txt").write_text("keep")
    run(images, finished, overwrite=True)
    log = (finished / "log.txt").read_text()
    assert log.count("run started") == 1
    assert NAMES[0] in log
    assert encoded() == NAMES
    assert (finished / "notes of mine.txt").read_text() == "keep"


def test_deterministic_runs_are_equal(images: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(images, tmp_path / name, export=("txt",))
    first, second = ((tmp_path / n / "export/0/images.txt").read_text() for n in "ab")
    assert first == second


def test_several_workers_give_the_same_files(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "one", export=("txt",))
    run(images, tmp_path / "many", export=("txt",), threads=4)
    first, second = ((tmp_path / n / "export/0/images.txt").read_text() for n in ("one", "many"))
    assert first == second


def test_dry_run_estimates_and_writes_nothing(images: Path, tmp_path: Path) -> None:
    result = run(images, tmp_path / "out", dry_run=True)
    assert result.estimate["pairs"] == PAIRS
    assert result.estimate["pairs_exact"]
    assert result.estimate["disk_bytes"] > 0
    assert not (tmp_path / "out").exists()
    assert 0 < len(encoded()) < len(NAMES)


def test_images_without_the_intrinsics_that_others_have_are_named(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    intrinsics = tmp_path / "intrinsics.txt"
    intrinsics.write_text(
        f"{NAMES[0].replace(' ', '?')} SIMPLE_PINHOLE {WIDTH} {HEIGHT} {FOCAL} 400 300\n"
    )
    run(images, tmp_path / "out", dry_run=True, camera_mode="auto", intrinsics=str(intrinsics))
    assert f"names no camera for {len(NAMES) - 1} of {len(NAMES)} images" in caplog.text


def test_run_yaml_records_settings(whole: ReconstructResult) -> None:
    recorded = yaml.safe_load((whole.output / "run.yaml").read_text())
    assert recorded["options"]["matcher"] == "fake"
    assert recorded["versions"]["pycolmap"] == colmap.version()
    assert recorded["timings"]["match"] >= 0


# ------------------------------------------------------------------------------- bad input, why


def test_bad_images_are_named_with_their_reason(images: Path, tmp_path: Path) -> None:
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("no picture")
    Image.new("RGB", (40, 400)).save(images / "tiny.png")
    shutil.copy(images / NAMES[0], images / "z copy.jpg")
    Image.new("RGB", (800, 600)).save(images / "blank.png")  # no keypoints, not in the scene
    result = run(images, tmp_path / "out", camera_mode="auto", intrinsics=None)
    assert result.registered == len(NAMES)
    assert status(result) == {
        **dict.fromkeys(NAMES, "registered"),
        "empty.jpg": "empty",
        "text.png": "unreadable",
        "tiny.png": "tiny",
        "z copy.jpg": "duplicate",
        "blank.png": "no_features",
    }
    reasons = {row["name"]: row["reason"] for row in result.report["images"]}
    assert NAMES[0] in reasons["z copy.jpg"]
    assert "40" in reasons["tiny.png"]


def test_fewer_than_two_images_write_nothing_over(images: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in sorted(finished.rglob("*"))}
    for name in NAMES[1:]:
        (images / name).write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        run(images, finished, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in sorted(finished.rglob("*"))} == before


def test_images_without_pairs_or_matches_say_so(images: Path, tmp_path: Path) -> None:
    Image.effect_noise((800, 600), 50).convert("RGB").save(images / "zz.png")
    listed = [p for p in SCENE.pairs() if NAMES[6] not in p]
    pairs = tmp_path / "my pairs.txt"
    pairs.write_text("".join(f"{a}\t{b}\n" for a, b in [*listed, (NAMES[0], "zz.png")]))
    result = run(images, tmp_path / "out", pairs=str(pairs))
    assert result.registered == 6
    assert status(result)[NAMES[6]] == "no_pairs"
    assert status(result)["zz.png"] == "no_features"


def test_nothing_matches_is_reported(images: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    for i in range(3):  # images outside the scene have no keypoints
        far.mkdir(exist_ok=True)
        Image.effect_noise((800, 600), 50 + i).convert("RGB").save(far / f"{i}.png")
    with pytest.raises(MappingError, match="no pair"):
        run(far, tmp_path / "out")
    report = (tmp_path / "out/report.json").read_text()
    assert '"registered": 0' in report
    assert (tmp_path / "out/report.html").exists()


def test_masks_drop_keypoints(images: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.full((600, 800), 255, np.uint8)
    mask[:, :400] = 0
    Image.fromarray(mask).save(masks / f"{NAMES[0]}.png")
    run(images, tmp_path / "out", masks=masks, mask_erode=4)
    with h5py.File(tmp_path / "out/features.h5") as file:
        kept = file[NAMES[0]]["keypoints"][()]
        assert len(file[NAMES[1]]["keypoints"]) == len(SCENE.keypoints[NAMES[1]])
    expected = SCENE.keypoints[NAMES[0]]
    assert 0 < len(kept) < len(expected)
    assert kept[:, 0].min() > 402
    assert len(kept) >= (expected[:, 0] > 405).sum()
    # another mask: its image is encoded again, the others are not
    mask[:] = 255
    Image.fromarray(mask).save(masks / f"{NAMES[0]}.png")
    run(images, tmp_path / "out", masks=masks, mask_erode=4)
    assert encoded() == [NAMES[0]]


def test_masks_beside_the_images(images: Path, tmp_path: Path) -> None:
    mask = np.full((600, 800), 255, np.uint8)
    mask[:, :400] = 0
    Image.fromarray(mask).save(images / f"{NAMES[0]}.png")
    result = run(images, tmp_path / "out", masks=images / ".", mask_erode=0)
    assert result.registered == len(NAMES)
    with h5py.File(tmp_path / "out/features.h5") as file:
        assert file[NAMES[0]]["keypoints"][:, 0].min() > 399


def test_masks_that_leave_nothing_are_named_as_the_cause(images: Path, tmp_path: Path) -> None:
    for name in NAMES:
        path = tmp_path / "masks" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (800, 600)).save(path)
    with pytest.raises(MappingError, match=r"image 00 é\.jpg\.png leaves nothing of it"):
        run(images, tmp_path / "out", masks=tmp_path / "masks")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all("black is what is ignored" in row["reason"] for row in report["images"])


@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_mirrored_images_are_left_out_by_name(
    images: Path, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(images / NAMES[3]) as image:
        image.save(images / NAMES[3], exif=exif)
    result = run(images, tmp_path / "out")
    assert result.registered == len(NAMES) - 1
    (row,) = [row for row in result.report["images"] if row["name"] == NAMES[3]]
    assert row["status"] == "mirrored"
    assert f"EXIF orientation {orientation}" in row["reason"]


@pytest.mark.slow
@pytest.mark.weights
def test_turned_images_are_found_and_matched_upright(room: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    turns = {"b.png": Image.Transpose.ROTATE_180, "d.png": Image.Transpose.ROTATE_90}
    for name, number in zip("abcde", range(1, 6), strict=True):
        picture = Image.open(room / "images" / f"room_00{number}.jpg").resize((480, 360))
        file = f"{name}.png"  # no EXIF
        if file in turns:
            picture = picture.transpose(turns[file])
        picture.save(images / file)
    options: dict[str, Any] = {"quality": "fast", "max_keypoints": 512, "progress": False}
    result = gim_hloc.reconstruct(images, tmp_path / "out", **options)
    found = {
        r["name"]: r["rotated_degrees"] for r in result.report["images"] if "rotated_degrees" in r
    }
    assert found == {"b.png": 180, "d.png": 90}  # clockwise, to show them upright again
    assert result.registered == 5
    again = gim_hloc.reconstruct(images, tmp_path / "out", **options)
    assert set(again.report["counts"].values()) == {0}
    assert again.report["summary"]["points"] == result.report["summary"]["points"]
    for name in "de":
        (images / f"{name}.png").unlink()
    plain = gim_hloc.reconstruct(images, tmp_path / "none", rotations="none", **options)
    assert plain.registered < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matcher": "nope"}, "Unknown matcher"),
        ({"pairs": "nope"}, "nope"),
        ({"camera_model": "NOPE"}, "Unknown camera model"),
        ({"intrinsics": "PINHOLE,1"}, "takes 4 parameters"),
        ({"nope": 1}, "no setting 'nope'"),
        ({"matcher_options": ("nope",)}, "NAME=VALUE"),
        ({"export": ("dxf",)}, "export.0 is 'dxf'; it must be 'txt', 'ply'"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
        ({"mask_erode": -5}, "mask_erode is -5; it must be at least 0"),
        ({"cache_gb": float("nan")}, "cache_gb is nan; it must be finite"),
        ({"masks": Path("no/such/folder")}, "no/such/folder"),
    ],
)
def test_bad_options_are_found_before_any_work(
    images: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert FakeMatcher.calls == []


def test_what_no_run_made_is_not_replaced(images: Path, tmp_path: Path) -> None:
    scene = tmp_path / "scene"  # as many data sets are: images/ and a model in sparse/
    (scene / "sparse" / "0").mkdir(parents=True)
    model = scene / "sparse" / "0" / "cameras.txt"
    model.write_text("truth")
    (scene / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds sparse/0/cameras\.txt, which no run made"):
            run(images, scene, overwrite=overwrite)
    assert model.read_text() == "truth"
    assert FakeMatcher.calls == []
    shutil.rmtree(scene / "sparse")
    run(images, scene)
    run(images, scene, overwrite=True)
    assert (scene / "notes.txt").read_text() == "mine"
    state = (scene / "run.yaml").read_text()
    (scene / "run.yaml").write_text(state.replace("command: reconstruct", "command: localize"))
    with pytest.raises(OutputError, match="output of gim-localize: choose another"):
        run(images, scene)


def test_colliding_names_stay_apart(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    for old, new in ((NAMES[0], "a/b.jpg"), (NAMES[1], "a-b.jpg")):
        (images / new).parent.mkdir(exist_ok=True)
        (images / old).rename(images / new)
        SCENE.keypoints[new], SCENE.points[new] = SCENE.keypoints[old], SCENE.points[old]
    result = run(images, tmp_path / "out")
    assert result.registered == len(NAMES)
    assert any("a/b.jpg" in note for note in result.report["notes"])
    rows, _ = store.read_matches(tmp_path / "out/matches.h5", "a-b.jpg", NAMES[2])
    assert set(map(tuple, rows.tolist())) == set(map(tuple, SCENE.matches(*NAMES[1:3]).tolist()))
    rows, _ = store.read_matches(tmp_path / "out/matches.h5", "a/b.jpg", NAMES[2])
    expected = SCENE.matches(NAMES[0], NAMES[2])
    assert set(map(tuple, rows.tolist())) == set(map(tuple, expected.tolist()))


# --------------------------------------------------------------------------- killed, locked, CLI


def test_second_run_on_one_output_stops(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with FolderLock(output):
        with pytest.raises(LockedError, match="Another run"):
            run(images, output)
        arguments = ["reconstruct", str(images), str(output), "--matcher", "fake"]
        code, said = faults.run(arguments, tmp_path / "log")
    assert code == 3
    assert f"process {os.getpid()}" in said
    assert "Traceback" not in said


def test_cli_errors_have_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 2
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_cli_flags_reach_the_options(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([
        str(images), str(tmp_path / "out"), "--matcher", "fake", "--pairs", "sequential",
        "--pair.window", "2", "--pair.no-quadratic", "--camera-mode", "single", "--intrinsics",
        INTRINSICS, "--export", "txt", "nerfstudio", "--deterministic",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert f"{len(NAMES)} of {len(NAMES)} images registered" in out
    assert len(read_pairs(tmp_path / "out/pairs.txt")) == 2 * len(NAMES) - 3
    assert (tmp_path / "out/export/0/nerfstudio/transforms.json").exists()


def test_dense_model_goes_with_its_model(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(images, output, dense=True, depth_size=64)
    assert "dense" in result.report["timings"]
    maps = output / "dense/stereo/depth_maps"
    assert len(list(maps.glob("*.geometric.bin"))) == len(NAMES)
    assert not any("dense" in note for note in result.report["notes"])
    (images / NAMES[0]).unlink()
    run(images, output)
    assert not (output / "dense").exists()
