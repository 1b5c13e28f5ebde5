"""The numbers we judge by, against values known by hand, by construction and by other formulas."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pose_cameras import SIMILARITY, moved, random_cameras, shifted, turn
from scipy.spatial.transform import Rotation

from gim_hloc.cli import eval_sfm
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm

SHARED = Path(__file__).parents[2] / "shared"


class TestEvaluate:
    def test_a_moved_truth_has_no_error(self) -> None:
        truth = random_cameras(6)
        scores = sfm.evaluate(moved(truth, SIMILARITY), truth)
        assert (scores.registered, scores.total, scores.extra) == (6, 6, 0)
        assert scores.rotation.max == pytest.approx(0, abs=1e-10)
        assert scores.centre.max == pytest.approx(0, abs=1e-10)
        assert list(scores.auc.values()) == pytest.approx([100] * 4)

    def test_sizes_of_the_scene(self) -> None:
        # Centres at the corners of a 3 x 4 rectangle: 2.5 from the middle, 5 across.
        corners = [(0.0, 0, 0), (3, 0, 0), (3, 4, 0), (0, 4, 0)]
        truth = {f"{i}": (np.eye(3), -np.array(corner)) for i, corner in enumerate(corners)}
        scores = sfm.evaluate(truth, truth)
        assert scores.radius == pytest.approx(2.5)
        assert scores.extent == pytest.approx(5)
        assert scores.centre.times(2) == sfm.Spread(
            median=scores.centre.median * 2, mean=scores.centre.mean * 2, max=scores.centre.max * 2
        )

    def test_centre_errors_are_in_truth_units_and_percent(self) -> None:
        truth = random_cameras(8)
        model = dict(truth)
        error = np.array([0.3, 0.0, 0.4])
        model["03.jpg"] = shifted(model["03.jpg"], error)
        scores = sfm.evaluate(moved(model, SIMILARITY), truth, robust=True)
        by_name = {image.name: image for image in scores.images}
        assert by_name["03.jpg"].centre == pytest.approx(0.5)
        assert by_name["04.jpg"].centre == pytest.approx(0, abs=1e-9)
        assert scores.centre.max == pytest.approx(0.5)
        assert scores.centre.mean == pytest.approx(0.5 / 8)
        assert scores.centre_radius_percent.max == pytest.approx(100 * 0.5 / scores.radius)
        assert scores.centre_extent_percent.max == pytest.approx(100 * 0.5 / scores.extent)
        # Least squares on all cameras shares the error of one with the others.
        assert sfm.evaluate(model, truth).images[4].centre > 0.01

    def test_rotation_errors(self) -> None:
        truth = random_cameras(5)
        model = dict(truth)
        rotation, translation = model["02.jpg"]
        centre = -rotation.T @ translation
        model["02.jpg"] = (turn(1.5) @ rotation, -turn(1.5) @ rotation @ centre)
        scores = sfm.evaluate(moved(model, SIMILARITY), truth)
        assert scores.rotation.max == pytest.approx(1.5)
        assert scores.rotation.mean == pytest.approx(0.3)
        assert scores.rotation.median == pytest.approx(0, abs=1e-9)
        assert scores.pair_rotation.max == pytest.approx(1.5)
        assert scores.pair_rotation.mean == pytest.approx(1.5 * 4 / 10)
        assert scores.pair_direction.median == pytest.approx(0, abs=1e-9)
        # The error shows in the four pairs of that image, out of ten.
        assert sum(error > 1.4 for error in scores.pair_errors) == 4

    def test_missing_images_are_failures_of_their_pairs(self) -> None:
        truth = random_cameras(5)
        model = {name: camera for name, camera in truth.items() if name != "00.jpg"}
        scores = sfm.evaluate(model, truth)
        assert (scores.registered, scores.registered_percent) == (4, 80)
        assert list(scores.auc.values()) == pytest.approx([60] * 4)  # 6 of 10 pairs
        assert scores.pair_rotation.max == pytest.approx(0, abs=1e-9)  # of the six
        assert scores.centre.max == pytest.approx(0, abs=1e-9)
        assert math.isnan(scores.images[0].centre)
        assert not scores.images[0].registered

    def test_images_beyond_the_truth_are_counted_and_not_judged(self) -> None:
        truth = random_cameras(4)
        model = {**truth, "more.jpg": (turn(90), np.ones(3))}
        scores = sfm.evaluate(model, truth)
        assert (scores.registered, scores.extra) == (4, 1)
        assert scores.centre.max == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("kept", [0, 1])
    def test_too_few_images_to_align_give_nan_and_no_auc(self, kept: int) -> None:
        truth = random_cameras(4)
        scores = sfm.evaluate(dict(list(truth.items())[:kept]), truth)
        assert scores.registered == kept
        assert math.isnan(scores.rotation.mean)
        assert math.isnan(scores.centre.max)
        assert list(scores.auc.values()) == [0] * 4
        assert sfm.missed_bounds(scores, {"centre_mean": 100.0})  # NaN keeps no bound
        assert json.loads(json.dumps(scores.as_dict(), allow_nan=False))["centre_mean"] is None

    def test_another_scene_is_an_error(self) -> None:
        truth = random_cameras(3)
        with pytest.raises(InputError, match="another scene"):
            sfm.evaluate({"x.png": truth["00.jpg"]}, truth)
        with pytest.raises(InputError, match="two or more"):
            sfm.evaluate(truth, {"00.jpg": truth["00.jpg"]})


class TestNames:
    def test_name_then_suffix_then_folder(self) -> None:
        found = sfm.match_names(
            ["a/1.png", "images/2.jpg", "3.jpg", "3.png"], ["a/1.jpg", "2.jpg", "3.jpg"]
        )
        assert found == {"a/1.jpg": "a/1.png", "2.jpg": "images/2.jpg", "3.jpg": "3.jpg"}

    def test_ambiguous_stems_are_left_alone(self) -> None:
        assert sfm.match_names(["left/1.jpg", "right/1.jpg"], ["1.jpg"]) == {}
        assert sfm.match_names(["1.png"], ["1.jpg", "1.tif"]) == {}


class TestBounds:
    def test_parse(self) -> None:
        assert sfm.parse_bounds(" auc@1=90, centre=0.06,") == {
            "auc@1": 90.0,
            "centre_radius_mean": 0.06,
        }
        for wrong in ("auc@2=90", "auc@1", "auc@1=high"):
            with pytest.raises(InputError):
                sfm.parse_bounds(wrong)

    def test_direction(self) -> None:
        scores = sfm.evaluate(random_cameras(4), random_cameras(4))
        assert sfm.missed_bounds(scores, {"auc@1": 99.0, "rotation_max": 0.1}) == []
        assert len(sfm.missed_bounds(scores, {"registered": 5, "rotation_max": -1})) == 2


def write_model(folder: Path, cameras: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Write a COLMAP text model with one point that the first two images see."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text("1 PINHOLE 100 80 90 90 50 40\n")
    lines = []
    for number, (name, (rotation, translation)) in enumerate(sorted(cameras.items()), start=1):
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        values = " ".join(f"{v:.17g}" for v in (w, x, y, z, *translation))
        observed = "10 10 1" if number <= 2 else ""
        lines += [f"{number} {values} 1 {name}", observed]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text("1 0 0 5 255 255 255 0.25 1 0 2 0\n")
    return folder


class TestCommand:
    @pytest.fixture
    def truth(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "truth", random_cameras(5))

    def test_table_files_and_other_models(
        self, tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "run"
        write_model(output / "sparse" / "0", moved(random_cameras(5), SIMILARITY))
        write_model(output / "sparse" / "1", dict(list(random_cameras(5).items())[:2]))
        files = {kind: tmp_path / "out" / f"result.{kind}" for kind in ("json", "csv", "png")}
        code = eval_sfm.main(
            [
                *(str(output), str(truth), str(truth)),
                *("--json", str(files["json"]), "--csv", str(files["csv"])),
                *("--plot", str(files["png"]), "--per-image", "--bounds", "auc@0.5=99,centre=1e-6"),
            ]
        )
        printed = capsys.readouterr().out
        assert code == 0
        assert "it also holds 1 (2 images)" in printed
        assert printed.count("5/5") == 2
        assert "04.jpg" in printed
        first, second = json.loads(files["json"].read_text())
        assert first["registered"] == second["registered"] == 5
        assert first["points"] == 1
        assert first["track_length"] == 2
        assert len(first["images"]) == 5
        with files["csv"].open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["model"] for row in rows] == [str(output), str(truth)]
        assert float(rows[0]["auc@1"]) == pytest.approx(100)
        assert files["png"].read_bytes().startswith(b"\x89PNG")

    def test_missed_bound_is_exit_code_1(
        self, tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cameras = random_cameras(5)
        cameras["01.jpg"] = shifted(cameras["01.jpg"], np.array([0.0, 0.5, 0.0]))
        model = write_model(tmp_path / "model", cameras)
        assert eval_sfm.main([str(model), str(truth), "--bounds", "auc@1=99"]) == 1
        assert "missed: " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere", "TRUTH"], "nowhere"),
            (["TRUTH"], "two folders"),
            (["TRUTH", "TRUTH", "--bounds", "speed=1"], "unknown bound 'speed'"),
            (["TRUTH", "TRUTH", "--plot", "picture.unknown"], "cannot write"),
        ],
    )
    def test_wrong_input_is_one_message_and_exit_code_2(
        self,
        truth: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        code = eval_sfm.main([str(truth) if part == "TRUTH" else part for part in arguments])
        assert code == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
class TestRealTruth:
    def test_measured_scene_against_itself(self) -> None:
        path = SHARED / "data" / "fountain-P11" / "gt"
        scores = sfm.evaluate(path, path)
        assert scores.total == scores.registered == 11
        assert scores.points == 0
        assert math.isnan(scores.reprojection_px)
        assert scores.extent == pytest.approx(14.819, abs=1e-3)
        assert scores.radius == pytest.approx(4.671, abs=1e-3)
        assert scores.rotation.max < 1e-6
