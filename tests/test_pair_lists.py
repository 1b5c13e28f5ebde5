"""Lists of pairs of others' formats, judged with a matcher that knows the answer; bad inputs."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zeb_oracle import (
    PLANE,
    SIZE,
    K,
    Oracle,
    fresh,
    numbers,
    pose,
    project,
    relative,
)

from gim_hloc.cli.zeb import main
from gim_hloc.errors import InputError
from gim_hloc.evaluation import pair_lists, protocol
from gim_hloc.evaluation.dumps import read_dump
from gim_hloc.evaluation.fundamental import (
    FundamentalProtocol,
    fundamental_inliers,
    fundamental_scales,
)
from gim_hloc.evaluation.options import PairOptions
from gim_hloc.evaluation.pair_formats import detect_format, read_list
from gim_hloc.evaluation.pair_lists import ListPairs, Resize, parse_resize
from gim_hloc.evaluation.pair_set import PosedPair
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.protocol import Protocol
from gim_hloc.types import ImageOptions

NAME = "pair_oracle"


def plane_homography(i: int, j: int) -> np.ndarray:
    """Of the plane z = 6 between two cameras."""
    maps = [K @ np.column_stack([p[:3, 0], p[:3, 1], 6 * p[:3, 2] + p[:3, 3]])
            for p in (pose(i), pose(j))]  # fmt: skip
    H = maps[1] @ np.linalg.inv(maps[0])
    return H / H[2, 2]


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    return fresh(monkeypatch, NAME)


def make_image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """Red counts columns, green rows: every pixel says where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(path)
    return path


def superglue_line(i: int, j: int, turn0: int = 0, turn1: int = 0) -> str:
    return f"i{i}.png i{j}.png {turn0} {turn1} {numbers(K, K, relative(i, j))}"


@pytest.fixture
def superglue(tmp_path: Path) -> Path:
    for i in range(4):
        make_image(tmp_path / f"i{i}.png")
    path = tmp_path / "list.txt"
    path.write_text("\n".join(superglue_line(i, i + 1) for i in range(3)) + "\n")
    return path


def objects(items: list[Any]) -> np.ndarray:
    """An array of objects as LoFTR's files have them, also where the items are arrays."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def write_megadepth(folder: Path, stem: str, **changes: Any) -> Path:
    """A scene file in LoFTR's layout, with a hole in its list of images as theirs have."""
    arrays = {
        "image_paths": objects([None, *(f"Undistorted_SfM/{stem}/images/i{i}.jpg"
                                        for i in range(1, 4))]),
        "depth_paths": objects([None] * 4),
        "intrinsics": objects([None, K, K, K]),
        "poses": objects([None, *(pose(i) for i in range(1, 4))]),
        "pair_infos": objects([((1, 2), 0.31, np.array([[1.0, 2.0]])), ((2, 3), 0.2, [])]),
        **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.npz"
    np.savez(path, **arrays)
    for i in range(1, 4):
        make_image(folder.parent / "images" / f"Undistorted_SfM/{stem}/images/i{i}.jpg")
    return path


def write_scannet(folder: Path, **changes: Any) -> Path:
    arrays = {
        "name": np.array([[707, 0, 1, 2], [708, 1, 1, 3]]),
        "rel_pose": np.stack([relative(1, 2)[:3].ravel(), relative(1, 3)[:3].ravel()]),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "test.npz", **arrays)
    np.savez(folder / "intrinsics.npz", scene0707_00=K, scene0708_01=K)
    for scene, frames in (("scene0707_00", (1, 2)), ("scene0708_01", (1, 3))):
        for frame in frames:
            make_image(folder / "scannet_test_1500" / scene / "color" / f"{frame}.jpg")
    return folder / "test.npz"


def write_homographies(folder: Path) -> Path:
    for scene in ("v_one", "i_two"):
        for i in range(1, 4):
            make_image(folder / scene / f"{i}.ppm")
            if i > 1:
                H = plane_homography(1, i)
                (folder / scene / f"H_1_{i}").write_text(
                    "\n".join(numbers(row) for row in H) + "\n"
                )
    return folder


def judged(path: Path, tmp_path: Path, **options: Any) -> pair_lists.PairReport:
    defaults: dict[str, Any] = {"matchers": (NAME,), "samples": 50}
    return pair_lists.evaluate(path, tmp_path / "out", PairOptions(**{**defaults, **options}))


def errors(report: pair_lists.PairReport) -> list[float]:
    return [record.pose_error for record in report.run.results[0].records]


# ------------------------------------------------------------------------------------- posed lists


def test_superglue_list(superglue: Path, tmp_path: Path) -> None:
    assert detect_format(superglue) == "superglue"
    report = judged(superglue, tmp_path)
    assert report.exit_code == 0
    assert max(errors(report)) < 0.05
    [row] = report.rows
    assert row.thresholds == (5, 10, 20)
    assert min(row.auc) > 0.99
    assert (row.pairs, row.failures, row.matches) == (3, 0, 200)
    assert row.precision_before == 1
    assert row.interval[0][0] <= row.auc[0] <= row.interval[0][1]
    assert sorted(Oracle.encoded) == ["i0.png", "i1.png", "i2.png", "i3.png"]  # each once
    assert set(Oracle.shown.values()) == {SIZE}


def test_dump_and_tables_are_written(superglue: Path, tmp_path: Path) -> None:
    report = judged(superglue, tmp_path)
    [result] = report.run.results
    assert result.dump is not None
    dump = read_dump(result.dump)
    assert (dump.matcher, dump.dataset) == (NAME, "list")
    assert dump.identifiers[0] == "list#i0.png#i1.png"
    folder = tmp_path / "out" / "results" / "list"
    content = json.loads((folder / "results.json").read_text())
    assert content["rows"][0]["auc"] == list(report.rows[0].auc)
    with (folder / "pairs.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image1"] for row in rows] == ["i1.png", "i2.png", "i3.png"]
    assert all(float(row["rotation_error_deg"]) < 0.05 for row in rows)
    assert "AUC@5°" in (folder / "results.md").read_text()
    assert "auc@5_low" in (folder / "results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(("turn0", "turn1"), [(1, 0), (0, 2), (3, 1), (2, 3)])
def test_turned_images_give_the_same_pose(
    superglue: Path, tmp_path: Path, turn0: int, turn1: int
) -> None:
    superglue.write_text(superglue_line(0, 2, turn0, turn1))
    report = judged(superglue, tmp_path)
    assert errors(report)[0] < 0.05
    shown = {Oracle.shown[key] for key in Oracle.encoded}
    assert (SIZE[::-1] in shown) == (1 in (turn0 % 2, turn1 % 2))


@pytest.mark.parametrize("turns", range(4))
def test_turned_image_is_what_rot90_makes_and_maps_back(tmp_path: Path, turns: int) -> None:
    make_image(tmp_path / "i0.png")
    make_image(tmp_path / "i1.png")
    path = tmp_path / "list.txt"
    path.write_text(superglue_line(0, 1, turns, 0))
    pair_set = ListPairs.of(read_list(path), Resize())
    image = pair_set.image(pair_set.pairs[0].image0, ImageOptions(max_size=None))
    pixels = np.rint(image.image.numpy() * 255).transpose(1, 2, 0)
    stored = np.asarray(Image.open(tmp_path / "i0.png"))
    np.testing.assert_array_equal(pixels, np.rot90(stored, turns))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    back = np.stack([x, y], -1) @ image.to_original[:, :2].T + image.to_original[:, 2]
    np.testing.assert_allclose(back, pixels[..., :2], atol=1e-9)
    # The reading for lists without truth turns the same way.
    own = ListPairs.of(read_list(path), Resize(own=True))
    other = own.image(own.pairs[0].image0, ImageOptions(max_size=None))
    torch.testing.assert_close(other.image, image.image)
    np.testing.assert_allclose(other.to_original, image.to_original)


def test_turning_k_and_pose_instead_gives_the_same_errors() -> None:
    """K and pose of the turned camera with turned matches: the other way to honour a turn."""
    wrong = relative(0, 3).copy()
    tilt = 0.05
    wrong[:3, :3] = (
        np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)],
                  [0, math.sin(tilt), math.cos(tilt)]]) @ wrong[:3, :3]
    )  # fmt: skip
    settings = Protocol()
    plain = protocol.evaluate_pair(
        project(0), project(3), K, K, wrong, settings, identifier="a#b#c"
    )
    assert plain.rotation_error == pytest.approx(math.degrees(tilt), abs=0.05)
    # A quarter turn counter-clockwise of image 0: x' = y, y' = W - 1 - x.
    turned = np.column_stack([project(0)[:, 1], SIZE[0] - 1 - project(0)[:, 0]])
    turned_K = np.array([[K[1, 1], 0, K[1, 2]], [0, K[0, 0], SIZE[0] - 1 - K[0, 2]], [0, 0, 1]])
    camera = np.eye(4)
    camera[:2, :2] = [[0, 1], [-1, 0]]
    again = protocol.evaluate_pair(
        turned, project(3), turned_K, K, wrong @ np.linalg.inv(camera), settings,
        identifier="a#b#c",
    )  # fmt: skip
    assert again.rotation_error == pytest.approx(plain.rotation_error, abs=0.02)
    assert again.translation_error == pytest.approx(plain.translation_error, abs=0.05)


def test_megadepth_scene_files(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    for stem in ("0015_0.1_0.3", "0022_0.1_0.3"):
        write_megadepth(folder, stem)
    listed = folder / "megadepth_test_1500.txt"
    listed.write_text("0015_0.1_0.3\n0022_0.1_0.3.npz\n")  # both spellings exist
    for path, count in ((listed, 4), (folder, 4), (folder / "0015_0.1_0.3.npz", 2)):
        assert detect_format(path) == "megadepth"
        found = read_list(path, images=tmp_path / "images")
        assert len(found.pairs) == count
        assert not found.bad
    first = found.pairs[0]
    assert isinstance(first, PosedPair)
    assert first.identifier == (
        "0015_0.1_0.3#Undistorted_SfM/0015_0.1_0.3/images/i1.jpg"
        "#Undistorted_SfM/0015_0.1_0.3/images/i2.jpg"
    )
    assert first.covisible0 == 0.31
    np.testing.assert_allclose(first.T_0to1, relative(1, 2), atol=1e-12)
    report = judged(listed, tmp_path, images=tmp_path / "images")
    assert max(errors(report)) < 0.05
    assert len(errors(report)) == 4


def test_scannet_list(tmp_path: Path) -> None:
    path = write_scannet(tmp_path / "s")
    assert detect_format(path) == detect_format(path.parent) == "scannet"
    listed = path.with_name("scannet_test.txt")
    listed.write_text("test.npz\n")
    assert detect_format(listed) == "scannet"
    found = read_list(path)
    assert [pair.identifier for pair in found.pairs] == [
        "scene0707_00#scene0707_00/color/1.jpg#scene0707_00/color/2.jpg",
        "scene0708_01#scene0708_01/color/1.jpg#scene0708_01/color/3.jpg",
    ]
    assert found.calibrated_size == (640, 480)
    # These images are smaller than ScanNet's, and so is what their K is for.
    report = judged(path, tmp_path, k_size="64x48")
    assert max(errors(report)) < 0.05
    assert set(Oracle.shown.values()) == {(640, 480)}


def test_k_for_another_size_is_scaled_and_a_stray_one_is_told(
    superglue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = K.copy()
    half[:2] *= 10
    half[:2, 2] += 4.5  # ten times the size, pixel centres at integers
    superglue.write_text(f"i0.png i2.png 0 0 {numbers(half, half, relative(0, 2))}")
    assert errors(judged(superglue, tmp_path, k_size="640x480"))[0] < 0.05
    assert "principal point" not in caplog.text
    judged(superglue, tmp_path)
    assert "principal point" in caplog.text


# ------------------------------------------------------------------------------------ homographies


@pytest.mark.parametrize("estimator", ["gim", "poselib"])
def test_homography_folders(tmp_path: Path, oracle: type[Oracle], estimator: Any) -> None:
    if estimator == "poselib":
        pytest.importorskip("poselib")
    oracle.scene = PLANE
    folder = write_homographies(tmp_path / "hpatches")
    assert detect_format(folder) == "homography"
    report = judged(folder, tmp_path, protocols=(estimator,))
    [row] = report.rows
    assert row.thresholds == (1, 3, 5, 10, 20)
    assert row.pairs == 4
    assert min(row.auc) > 0.9
    assert row.accuracy == (1, 1, 1, 1, 1)
    assert max(errors(report)) < 0.1
    names = [pair.identifier for pair in read_list(folder).pairs]
    assert names[0] == "i_two#i_two/1.ppm#i_two/2.ppm"


def test_pixels_of_homographies_do_not_pass_for_degrees(
    tmp_path: Path, oracle: type[Oracle], capsys: pytest.CaptureFixture[str]
) -> None:
    oracle.scene = PLANE
    [result] = judged(write_homographies(tmp_path / "planes"), tmp_path).run.results
    assert result.dump is not None
    assert read_dump(result.dump).unit == "px"
    assert result.dump.read_text().split()[3:6] == ["corner_px"] * 3
    folder = str(result.dump.parent)
    assert main(["check", folder]) == 0
    assert "Good planes: 1 file, 4 pairs" in capsys.readouterr().out
    assert main(["table", folder]) == 2
    assert "corner errors of homographies in pixels" in capsys.readouterr().err
    # Beside a dump of poses of the same name it is left out, and the exit code says so.
    text_of_poses = result.dump.read_text().replace(
        "corner_px corner_px corner_px", "R_errs t_errs t_errs2"
    )
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / result.dump.name).write_text(text_of_poses)
    assert main(["table", folder, str(tmp_path / "poses")]) == 1
    both = capsys.readouterr()
    assert "AUC@5°" in both.out
    assert "in pixels" in both.err
    assert main(["check", folder, str(tmp_path / "poses")]) == 1
    assert "errors in deg against px" in capsys.readouterr().out


def test_oxford_names_and_other_thresholds(tmp_path: Path, oracle: type[Oracle]) -> None:
    oracle.scene = PLANE
    folder = tmp_path / "graf"
    for i in (1, 3):
        make_image(folder / f"img{i}.png")
    (folder / "H1to3p").write_text(numbers(plane_homography(1, 3)))
    report = judged(folder, tmp_path, thresholds=(5, 10, 20))
    assert report.rows[0].thresholds == (5, 10, 20)
    assert errors(report)[0] < 0.1
    (folder / "H1to3p").write_text(numbers(plane_homography(3, 1)))
    # A corrected list is judged anew without matching again.
    Oracle.encoded.clear()
    report = judged(folder, tmp_path)
    assert errors(report)[0] > 1
    assert not Oracle.encoded


# ----------------------------------------------------------------------------------- without truth


def test_pairs_without_truth_are_counted_and_drawn(tmp_path: Path) -> None:
    for name in ("a b", "c"):  # a blank in a name
        make_image(tmp_path / "pairs" / name / "0.jpg")
        make_image(tmp_path / "pairs" / name / "1.jpg")
    assert detect_format(tmp_path / "pairs") == "pairs"
    report = judged(tmp_path / "pairs", tmp_path)
    [row] = report.rows
    assert (row.matches, row.failures, row.auc) == (200, 0, ())
    assert row.inliers > 190
    assert report.run.results[0].dump is None  # nothing that could be taken for poses
    assert set(Oracle.shown.values()) == {(32, 24)}  # the matcher's own size
    folder = tmp_path / "out" / "results" / "pairs"
    page = (folder / "index.html").read_text()
    for shown in re.findall(r'(?:src|href)="([^#"]+)"', page):
        assert (folder / shown).is_file()
    assert page.count("<img") == 2
    assert "200 matches" in page


def test_both_estimators_count_inliers_among_wrong_matches() -> None:
    pytest.importorskip("poselib")
    points1 = project(3)
    points1[:60] = np.random.default_rng(1).uniform((0, 0), SIZE, (60, 2))
    scale = 40  # long sides beyond 1600 px: thresholds grow with the image
    prediction = Prediction(
        points0=scale * project(0), points1=scale * points1,
        scores=np.ones(200), size0=(64 * scale, 48 * scale), size1=(64 * scale, 48 * scale),
    )  # fmt: skip
    for estimator in ("gim", "poselib"):
        settings = FundamentalProtocol(estimator=estimator)  # type: ignore[arg-type]
        inliers = fundamental_inliers(prediction, settings)
        assert inliers[60:].all()
        assert inliers[:60].mean() < 0.1
    assert fundamental_scales(prediction) == (1.6, 1.6)


def test_list_of_names_and_a_pair_of_one_image(superglue: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("# comment\ni0.png i1.png\ni2.png i2.png\ni0.png i3.png 0 1\n")
    assert detect_format(path) == "pairs"
    report = judged(path, tmp_path, pictures=False)
    assert report.exit_code == 0
    assert report.rows[0].pairs == 3
    assert "i3.png turned by 90 degrees" in Oracle.encoded


# ------------------------------------------------------------------------------ resuming, sizes


def test_resume_matches_nothing_again_and_gives_the_same(superglue: Path, tmp_path: Path) -> None:
    first = judged(superglue, tmp_path)
    Oracle.encoded.clear()
    again = judged(superglue, tmp_path)
    assert again.rows == first.rows
    assert not Oracle.encoded
    judged(superglue, tmp_path, resize="32")
    assert len(Oracle.encoded) == 4  # another size is another prediction


def test_another_list_shares_the_folder(superglue: Path, tmp_path: Path) -> None:
    judged(superglue, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(superglue_line(0, 3))
    assert judged(other, tmp_path).rows[0].pairs == 1


def test_repeated_pairs_count_once_and_limits_draw(
    superglue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    superglue.write_text("\n".join([*superglue.read_text().splitlines(), superglue_line(0, 1)]))
    assert judged(superglue, tmp_path).rows[0].pairs == 3
    assert "more than once" in caplog.text
    assert judged(superglue, tmp_path, limit=2).rows[0].pairs == 2


@pytest.mark.parametrize(
    ("given", "size", "shown"),
    [
        ("stored", (100, 60), (96, 56)),
        ("50", (100, 60), (48, 24)),
        ("1200", (100, 60), (96, 56)),
        ("640x480", (100, 60), (640, 480)),
    ],
)
def test_sizes(given: str, size: tuple[int, int], shown: tuple[int, int]) -> None:
    resize = parse_resize(given)
    assert resize.target(size) == shown
    assert resize.name == given


@pytest.mark.parametrize("given", ["", "x", "640x", "1x2x3", "-5", "0x480"])
def test_sizes_that_are_none(given: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_resize(given)


# --------------------------------------------------------------------------------------- bad inputs


def command(path: Path, out: Path, *more: str) -> int:
    """Exit code."""
    given = ["pairs", str(path), "--out", str(out), "--matchers", NAME, "--samples", "0", *more]
    try:
        return main(given)
    except SystemExit as left:  # wrong options
        return int(left.code or 0)


def spoil(line: str, **tokens: str) -> str:
    parts = line.split()
    for place, value in tokens.items():
        parts[int(place[1:])] = value
    return " ".join(parts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("i0.png i2.png 0 0 1.0", "5 tokens instead of 38"),
        (superglue_line(0, 2) + " 1", "39 tokens instead of 38"),
        (spoil(superglue_line(0, 2), t4="0.0"), "K0 is singular"),
        (spoil(superglue_line(0, 2), t13="nan"), "K1 is not finite"),
        (spoil(superglue_line(0, 2), t25="nan"), "pose is not finite"),
        (spoil(superglue_line(0, 2), t9="x"), "not a number"),
        (spoil(superglue_line(0, 2), t2="90"), "quarter turns"),
        (spoil(superglue_line(0, 2), t1="gone7.png"), "gone7.png"),
    ],
)
def test_a_bad_line_is_named_and_counts_as_failed(
    superglue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    superglue.write_text(f"{superglue_line(0, 1)}\n{line}\n{superglue_line(2, 3)}\n")
    assert command(superglue, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "line 2" in captured.err or "gone7" in captured.err
    content = json.loads((tmp_path / "out/results/list/results.json").read_text())
    [row] = content["rows"]
    assert (row["pairs"], row["failures"]) == (3, 1)
    assert row["auc"][0] == pytest.approx(2 / 3, abs=0.01)
    assert len(content["problems"]) == 1


def test_damaged_image_is_named(
    superglue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "i3.png").write_bytes(b"no image")
    assert command(superglue, tmp_path / "out") == 1
    assert "i3.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thresholds", "5", "0"], "threshold 0.0 is not in (0, 180] degrees"),
        (["--samples", "-1"], "samples is -1"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_options_that_cannot_be_stop_before_work(
    superglue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert command(superglue, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not Oracle.encoded
    folder = write_homographies(tmp_path / "planes")
    with pytest.raises(InputError, match="pixels"):
        judged(folder, tmp_path, thresholds=(200.0,))


def test_images_are_looked_for_by_all_names_not_by_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data" / "list.txt"
    for i in (1, 2, 3):  # the first image of the list is missing
        make_image(path.parent / "images" / f"i{i}.png")
    path.write_text("\n".join(superglue_line(i, i + 1) for i in range(3)))
    assert command(path, tmp_path / "out") == 1
    [row] = json.loads((tmp_path / "out/results/list/results.json").read_text())["rows"]
    assert (row["pairs"], row["failures"]) == (3, 1)
    # All of them missing is no list of failures but a wrong folder.
    (path.parent / "images").rename(tmp_path / "elsewhere")
    assert command(path, tmp_path / "none") == 2
    assert "None of the 4 images" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert command(path, tmp_path / "none", "--images", str(path.parent)) == 2
    assert "--images" in capsys.readouterr().err
    assert command(path, tmp_path / "some", "--images", str(tmp_path / "elsewhere")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_folders_whose_names_are_no_text(tmp_path: Path, oracle: type[Oracle]) -> None:
    oracle.scene = PLANE
    folder = tmp_path / "planes"
    for name in (b"one\xff", b"one\xfe"):
        scene = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        for i in (1, 2):
            make_image(scene / f"{i}.png")
        (scene / "H_1_2").write_text(numbers(plane_homography(1, 2)))
    report = judged(folder, tmp_path)
    assert report.rows[0].pairs == 2
    assert report.rows[0].auc[1] > 0.9
    identifiers = [record.identifier for record in report.run.results[0].records]
    assert identifiers[0] == "one%FE#one%FE/1.png#one%FE/2.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("H_1_3", "1 0 0 0 1 0 1 0 0", "singular"),
        ("H_1_3", "1 0 0 0 1 0 0 0", "8 numbers instead of 9"),
        ("H_1_3", "1 0 0 0 1 0 0 0 nan", "not finite"),
        ("H_1_3", "one", "matrix"),
        ("H_1_9", "1 0 0 0 1 0 0 0 1", "no image 9"),
    ],
)
def test_bad_homographies_are_named(
    tmp_path: Path,
    oracle: type[Oracle],
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    message: str,
) -> None:
    oracle.scene = PLANE
    folder = write_homographies(tmp_path / "h")
    (folder / "v_one" / name).write_text(content)
    assert command(folder, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"v_one/{name}" in error


class _Harm:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_malicious_scene_file_is_refused_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes"
    write_megadepth(folder, "0015")
    canary = tmp_path / "canary"
    bad = write_megadepth(folder, "0022", pair_infos=objects([_Harm(canary)]))
    with np.load(bad, allow_pickle=True) as arrays:
        arrays["pair_infos"]
    assert canary.exists()  # the file does harm where it is unpickled
    canary.unlink()
    images = ["--images", str(tmp_path / "images")]
    assert command(folder, tmp_path / "out", *images) == 1
    assert "0022.npz" in capsys.readouterr().err
    assert not canary.exists()
    content = json.loads((tmp_path / "out/results/scenes/results.json").read_text())
    assert content["rows"][0]["pairs"] == 2
    assert command(bad, tmp_path / "out2", *images) == 2  # alone, nothing is left
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair_infos": objects([((1, 9), 0.3, None), ((1, 2), 0.3, None)])}, "not among"),
        ({"pair_infos": objects([((0, 2), 0.3, None), ((1, 2), 0.3, None)])}, "has no path"),
        ({"pair_infos": objects(["x", ((1, 2), 0.3, None)])}, "not ((index"),
        ({"intrinsics": objects([None, K, K, None])}, "K of image 3"),
        ({"intrinsics": objects([None, K, K, np.zeros((3, 3))])}, "singular"),
        ({"poses": objects([None, pose(1), pose(2), pose(3) * np.nan])}, "not finite"),
    ],
)
def test_bad_entries_of_a_scene_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, message: str
) -> None:
    path = write_megadepth(tmp_path / "scenes", "0015", **changes)
    assert command(path, tmp_path / "out", "--images", str(tmp_path / "images")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "0015.npz, pair" in error


def test_bad_entries_of_a_scannet_list_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poses = np.stack([relative(1, 2)[:3].ravel(), np.full(12, np.nan)])
    path = write_scannet(tmp_path / "s", rel_pose=poses)
    assert command(path, tmp_path / "out", "--k-size", "64x48") == 1
    assert "test.npz, pair 1" in capsys.readouterr().err
    np.savez(path.with_name("intrinsics.npz"), scene0707_00=K)
    assert command(path, tmp_path / "out", "--k-size", "64x48") == 1
    assert "no K of scene0708_01" in capsys.readouterr().err


def test_input_that_is_no_list_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, a=np.arange(3))
    harmful = tmp_path / "harmful.npz"
    canary = tmp_path / "canary"
    np.savez(harmful, name=objects([_Harm(canary)]), rel_pose=np.zeros((1, 12)))
    raw = tmp_path / "raw.npz"
    raw.write_bytes(pickle.dumps(_Harm(canary)))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    short = tmp_path / "short.txt"
    short.write_text("a.png b.png 0 0 1.0\n")
    misshaped = tmp_path / "m" / "test.npz"
    misshaped.parent.mkdir()
    np.savez(misshaped, name=np.zeros((2, 3), int), rel_pose=np.zeros((2, 12)))
    lonely = tmp_path / "l" / "test.npz"
    lonely.parent.mkdir()
    np.savez(lonely, name=np.zeros((1, 4), int), rel_pose=np.zeros((1, 12)))  # no intrinsics.npz
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for path in (
        foreign, harmful, raw, empty, binary, short, misshaped, lonely, nothing, tmp_path / "gone",
    ):  # fmt: skip
        assert command(path, tmp_path / "out") == 2, path
        error = capsys.readouterr().err
        assert path.name in error
        assert "Traceback" not in error
    assert not canary.exists()
    assert command(short, tmp_path / "out", "--images", str(tmp_path / "gone")) == 2
    assert command(short, tmp_path / "out", "--format", "odd") == 2
    assert command(short, tmp_path / "out", "--k-size", "5") == 2


def test_a_folder_without_its_second_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image(tmp_path / "pairs" / "a" / "0.jpg")
    make_image(tmp_path / "pairs" / "a" / "1.jpg")
    make_image(tmp_path / "pairs" / "b" / "0.jpg")
    assert command(tmp_path / "pairs", tmp_path / "out") == 1
    assert "no image 1" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- real lists


def test_the_real_lists_are_read(data: Path) -> None:
    pairs = data / "pairs"
    scannet = read_list(pairs / "scannet" / "scannet_sample_pairs_with_gt.txt")
    assert (scannet.format, len(scannet.pairs), scannet.bad) == ("superglue", 15, ())
    assert scannet.root == pairs / "scannet" / "images"
    strecha = read_list(pairs / "strecha" / "pairs_with_gt.txt", images=data)
    assert (strecha.format, len(strecha.pairs), strecha.bad) == ("superglue", 72, ())
    graf = read_list(pairs / "homography")
    assert [pair.image1 for pair in graf.pairs] == ["graf/img2.png", "graf/img3.png"]
    assert len(read_list(pairs / "hard").pairs) == 10
    tourists = read_list(pairs / "phototourism" / "phototourism_sample_pairs.txt")
    assert (tourists.format, len(tourists.pairs)) == ("pairs", 7)


def test_sift_on_the_real_homographies(data: Path, tmp_path: Path) -> None:
    """Only the truth of the same images, in the right direction and frame, is met to a pixel."""
    report = judged(data / "pairs" / "homography", tmp_path, matchers=("sift",))
    assert max(errors(report)) < 3
    assert report.rows[0].accuracy[2] > 0.7
