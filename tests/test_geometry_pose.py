"""Angles, relative poses, AUC and similarities against values known by hand and other formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pose_cameras import SIMILARITY, moved, random_cameras, turn
from scipy.spatial.transform import Rotation

from gim_hloc.errors import InputError
from gim_hloc.geometry import pose


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
