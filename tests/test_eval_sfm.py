"""The numbers we judge by, against values known by hand, by construction and by other formulas."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from gim_hloc.cli import eval_sfm
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm
from gim_hloc.geometry import pose

SHARED = Path(__file__).parents[2] / "shared"


def turn(degrees: float, axis: tuple[float, float, float] = (0, 0, 1)) -> np.ndarray:
    direction = np.array(axis) / np.linalg.norm(axis)
    return Rotation.from_rotvec(np.radians(degrees) * direction).as_matrix()


def random_cameras(count: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    rotations = Rotation.random(count, random_state=seed).as_matrix()
    return {
        f"{index:02d}.jpg": (rotations[index], generator.normal(size=3)) for index in range(count)
    }


def moved(
    cameras: dict[str, tuple[np.ndarray, np.ndarray]], similarity: pose.Similarity
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same cameras in the world ``similarity(x)``."""
    result = {}
    for name, (rotation, translation) in cameras.items():
        centre = similarity(-rotation.T @ translation)
        turned = rotation @ similarity.rotation.T
        result[name] = (turned, -turned @ centre)
    return result


def shifted(camera: tuple[np.ndarray, np.ndarray], by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The camera with its centre moved."""
    rotation, translation = camera
    return rotation, translation - rotation @ by


SIMILARITY = pose.Similarity(
    scale=2.5, rotation=turn(77, (1, 2, 3)), translation=np.array([4.0, -5.0, 6.0])
)


class TestAngles:
    @pytest.mark.parametrize("degrees", [0.0, 1e-9, 1e-4, 0.5, 90.0, 179.9999, 180.0])
    def test_rotation_angle(self, degrees: float) -> None:
        found = pose.rotation_angle_deg(turn(degrees, (1, -2, 0.5)))
        assert found == pytest.approx(degrees, rel=1e-6, abs=1e-13)

    def test_tiny_angles_survive_where_arccos_loses_them(self) -> None:
        tiny = turn(1e-7)
        arccos = np.degrees(np.arccos(np.clip((np.trace(tiny) - 1) / 2, -1, 1)))
        assert arccos == 0.0
        assert pose.rotation_angle_deg(tiny) == pytest.approx(1e-7, rel=1e-6)

    def test_rotation_error_is_relative_and_symmetric(self) -> None:
        a, b = turn(20), turn(50)
        assert pose.rotation_error_deg(a, b) == pytest.approx(30)
        assert pose.rotation_error_deg(b, a) == pytest.approx(30)

    @pytest.mark.parametrize(
        ("estimate", "truth", "known", "folded"),
        [
            ((2, 0, 0), (1, 0, 0), 0, 0),
            ((0, 3, 0), (1, 0, 0), 90, 90),
            ((-1, 0, 0), (5, 0, 0), 180, 0),
            ((-1, 1, 0), (1, 0, 0), 135, 45),
            ((0, 0, 0), (1, 0, 0), 180, 90),
            ((1, 0, 0), (0, 0, 0), 0, 0),
        ],
    )
    def test_direction_error(
        self,
        estimate: tuple[int, ...],
        truth: tuple[int, ...],
        known: float,
        folded: float,
    ) -> None:
        a, b = np.array(estimate), np.array(truth)
        assert pose.direction_error_deg(a, b) == pytest.approx(known)
        assert pose.direction_error_deg(a, b, sign_known=False) == pytest.approx(folded)


class TestRelativePose:
    def test_takes_points_of_one_camera_to_the_other(self) -> None:
        (r0, t0), (r1, t1) = random_cameras(2).values()
        point = np.array([0.3, -0.2, 5.0])
        rotation, translation = pose.relative_pose(r0, t0, r1, t1)
        assert rotation @ (r0 @ point + t0) + translation == pytest.approx(r1 @ point + t1)

    def test_world_frame_and_scale_do_not_matter(self) -> None:
        cameras = random_cameras(6)
        other = moved(cameras, SIMILARITY)
        stack = [np.array(part) for part in zip(*cameras.values(), strict=True)]
        stack_other = [np.array(part) for part in zip(*other.values(), strict=True)]
        pairs, rotation, direction = pose.relative_pose_errors(*stack_other, *stack)
        assert pairs.tolist() == [[i, j] for i in range(6) for j in range(i + 1, 6)]
        assert rotation == pytest.approx(0, abs=1e-10)
        assert direction == pytest.approx(0, abs=1e-10)

    def test_known_errors_and_missing_images(self) -> None:
        # Cameras side by side, looking the same way: relative translation is along x.
        rotations = np.repeat(np.eye(3)[None], 3, axis=0)
        true_t = np.array([[0.0, 0, 0], [-1, 0, 0], [-2, 0, 0]])
        estimate_r = np.array([np.eye(3), turn(2.0), np.full((3, 3), np.nan)])
        estimate_t = np.array([[0, 0, 0], turn(3.0) @ [-1, 0, 0], [np.nan] * 3])
        _, rotation, direction = pose.relative_pose_errors(
            estimate_r, estimate_t, rotations, true_t
        )
        assert rotation[0] == pytest.approx(2.0)
        assert direction[0] == pytest.approx(3.0)
        assert np.isinf(rotation[1:]).all()
        assert np.isinf(direction[1:]).all()


def superglue_auc(errors: list[float], threshold: float) -> float:
    """The formula as SuperGlue's repository words it, with NumPy's interpolation as integrator."""
    ordered = np.sort(np.array(errors))
    recall = (np.arange(len(ordered)) + 1) / len(ordered)
    recall, ordered = np.r_[0.0, recall], np.r_[0.0, ordered]
    last = np.searchsorted(ordered, threshold)
    y = np.r_[recall[:last], recall[last - 1]]
    x = np.r_[ordered[:last], threshold]
    return sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1)) / threshold


class TestAuc:
    def test_by_hand(self) -> None:
        # One error of 1 below 2: triangle of 1 x 1 / 2, then a step of 1 x 1, over 2.
        assert pose.auc([1.0], [2.0]) == pytest.approx([0.75])
        # Half fails: polyline (0,0) (1,.5), level to 2.
        assert pose.auc([1.0, math.inf], [2.0]) == pytest.approx([0.375])
        # An error equal to the threshold does not count.
        assert pose.auc([2.0], [2.0]) == [0.0]

    def test_extremes(self) -> None:
        assert pose.auc([0.0, 0.0], [0.5, 5.0]) == [1.0, 1.0]
        assert pose.auc([math.inf, math.nan], [0.5, 5.0]) == [0.0, 0.0]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.floats(0, 20) | st.just(math.inf), min_size=1, max_size=40),
        st.sampled_from([0.5, 1.0, 3.0, 5.0, 10.0]),
    )
    def test_is_superglues(self, errors: list[float], threshold: float) -> None:
        assert pose.auc(errors, [threshold])[0] == pytest.approx(superglue_auc(errors, threshold))

    def test_refuses_nothing_and_nonsense(self) -> None:
        with pytest.raises(InputError):
            pose.auc([], [1.0])
        with pytest.raises(InputError):
            pose.auc([1.0], [0.0])


class TestSimilarity:
    def test_umeyama_finds_the_map(self) -> None:
        points = np.random.default_rng(1).normal(size=(7, 3))
        found = pose.umeyama(points, SIMILARITY(points))
        assert found.scale == pytest.approx(2.5)
        assert found.rotation == pytest.approx(SIMILARITY.rotation)
        assert found.translation == pytest.approx(SIMILARITY.translation)

    def test_umeyama_never_mirrors(self) -> None:
        points = np.random.default_rng(2).normal(size=(7, 3))
        found = pose.umeyama(points, points * [1, 1, -1])
        assert np.linalg.det(found.rotation) == pytest.approx(1)
        assert found.rotation @ found.rotation.T == pytest.approx(np.eye(3), abs=1e-12)

    def test_umeyama_handles_a_plane(self) -> None:
        points = np.random.default_rng(3).normal(size=(6, 3)) * [1, 1, 0]
        found = pose.umeyama(points, SIMILARITY(points))
        assert found(points) == pytest.approx(SIMILARITY(points))

    def test_umeyama_is_the_least_squares_optimum(self) -> None:
        generator = np.random.default_rng(4)
        points = generator.normal(size=(9, 3))
        target = SIMILARITY(points) + 0.1 * generator.normal(size=(9, 3))
        found = pose.umeyama(points, target)
        best = ((found(points) - target) ** 2).sum()
        for step in generator.normal(scale=1e-3, size=(50, 7)):
            nearby = pose.Similarity(
                scale=found.scale * (1 + step[0]),
                rotation=Rotation.from_rotvec(step[1:4]).as_matrix() @ found.rotation,
                translation=found.translation + step[4:],
            )
            assert ((nearby(points) - target) ** 2).sum() >= best

    @pytest.mark.parametrize("count", [8, 30])  # all triples, and a sample of them
    def test_robust_fit_ignores_wrong_cameras(self, count: int) -> None:
        generator = np.random.default_rng(5)
        points = generator.normal(size=(count, 3))
        target = SIMILARITY(points) + 1e-4 * generator.normal(size=(count, 3))
        target[: count // 4] += 10
        good = np.arange(count) >= count // 4
        robust = pose.robust_umeyama(points, target)
        assert np.abs(robust(points) - target)[good].max() < 1e-3
        assert np.abs(pose.umeyama(points, target)(points) - target)[good].max() > 1

    def test_points_on_a_line_are_refused(self) -> None:
        line = np.arange(5)[:, None] * np.array([[1.0, 2.0, 3.0]])
        for fit in (pose.umeyama, pose.robust_umeyama):
            with pytest.raises(InputError, match="line"):
                fit(line, SIMILARITY(line))

    @pytest.mark.parametrize("count", [2, 5])
    def test_cameras_on_a_line_are_turned_by_their_orientations(self, count: int) -> None:
        rotations = np.array([r for r, _ in random_cameras(count).values()])
        centres = np.arange(count)[:, None] * np.array([[1.0, 2.0, 3.0]])
        true = pose.align_cameras(
            rotations, centres, rotations @ SIMILARITY.rotation.T, SIMILARITY(centres)
        )
        assert true.scale == pytest.approx(2.5)
        assert true.rotation == pytest.approx(SIMILARITY.rotation)
        assert true(centres) == pytest.approx(SIMILARITY(centres))


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
