"""Homographies: corner error, matching accuracy, both estimators, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gim_hloc.errors import InputError
from gim_hloc.evaluation import homography
from gim_hloc.evaluation.homography import HomographyProtocol

SIZE = (640, 480)
H = np.array([[0.9, 0.12, 14.0], [-0.08, 1.05, 22.0], [1.5e-4, -6e-5, 1.0]])
CENTRE = np.array([319.5, 239.5])
ESTIMATORS = ["gim", "poselib"]


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest) -> str:
    if request.param == "poselib":
        pytest.importorskip("poselib")
    return str(request.param)


def mates(matrix: np.ndarray, count: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(seed).uniform((0, 0), SIZE, (count, 2))
    homogeneous = np.hstack([points, np.ones((count, 1))]) @ matrix.T
    return points, homogeneous[:, :2] / homogeneous[:, 2:]


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def test_corner_error_of_known_changes() -> None:
    assert homography.corner_error(H, H, SIZE) == 0
    assert homography.corner_error(-3 * H, H, SIZE) == pytest.approx(0, abs=1e-9)  # same map
    assert homography.corner_error(shift(3, 4) @ H, H, SIZE) == pytest.approx(5)
    # Twice as large about the centre of the first pixel: corners move by 0, 639, 479, both.
    double = np.diag([2.0, 2.0, 1.0])
    expected = (0 + 639 + 479 + math.hypot(639, 479)) / 4
    assert homography.corner_error(double, np.eye(3), SIZE) == pytest.approx(expected)


def test_corners_are_centres_of_pixels() -> None:
    np.testing.assert_array_equal(homography.corners((3, 2)), [[0, 0], [2, 0], [2, 1], [0, 1]])


def test_what_lies_beyond_the_horizon_is_nowhere() -> None:
    tilted = np.array([[1.0, 0, 0], [0, 1, 0], [-1 / 400, 0, 1]])  # horizon at x = 400
    found = homography.transfer(
        tilted, np.array([[0.0, 0.0], [399.0, 5.0], [401.0, 5.0]]), front=np.array([100.0, 100.0])
    )
    assert np.isfinite(found[:2]).all()
    assert np.isinf(found[2]).all()
    assert math.isinf(homography.corner_error(tilted, np.eye(3), SIZE))


def test_both_estimators_find_the_homography_among_wrong_matches(estimator: str) -> None:
    points0, points1 = mates(H, 100)
    points1[::3] = np.random.default_rng(1).uniform((0, 0), SIZE, points1[::3].shape)
    record = homography.evaluate_pair(
        points0, points1, H, SIZE, SIZE, HomographyProtocol.make(estimator), identifier="s#a#b"
    )
    assert record.rotation_error < 0.05
    assert record.rotation_error == record.translation_error == record.translation_distance
    assert record.correct_before == record.correct_after == 66
    assert record.precision_before == pytest.approx(0.66)
    assert record.precision_after == pytest.approx(1)


def test_direction_is_from_image_0_to_image_1(estimator: str) -> None:
    points0, points1 = mates(H)
    record = homography.evaluate_pair(
        points0, points1, np.linalg.inv(H), SIZE, SIZE, HomographyProtocol.make(estimator),
        identifier="s#a#b",
    )  # fmt: skip
    assert record.rotation_error > 20
    assert record.correct_before == 0


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_matches_are_a_failure(estimator: str, count: int) -> None:
    points0, points1 = mates(H, count)
    record = homography.evaluate_pair(
        points0, points1, H, SIZE, SIZE, HomographyProtocol.make(estimator), identifier="s#a#b"
    )
    assert record.failed
    assert (record.correct_before, record.correct_after) == (count, 0)
    assert (record.precision_before, record.precision_after) == (float(count > 0), 0.0)


def test_matches_on_one_spot_are_a_failure_and_no_crash(estimator: str) -> None:
    spot = np.full((30, 2), 100.0)
    record = homography.evaluate_pair(
        spot, spot, H, SIZE, SIZE, HomographyProtocol.make(estimator), identifier="s#a#b"
    )
    assert record.rotation_error > 1 or record.failed


def test_short_side_counts_pixels_of_a_smaller_image(estimator: str) -> None:
    big = (2 * SIZE[0], 2 * SIZE[1])
    resize = np.array([[2.0, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])  # pixel centres at integers
    truth = resize @ H @ np.linalg.inv(resize)
    points0, points1 = mates(shift(3, 4) @ H)  # off by 5 px at 480, by 10 px as stored
    points0, points1 = 2 * points0 + 0.5, 2 * points1 + 0.5
    for short_side, expected in ((None, 10), (480, 5)):
        record = homography.evaluate_pair(
            points0, points1, truth, big, big,
            HomographyProtocol.make(estimator, short_side=short_side), identifier="s#a#b",
        )  # fmt: skip
        assert record.rotation_error == pytest.approx(expected, abs=0.05)


def test_accuracy_is_a_mean_over_pairs_and_empty_pairs_count() -> None:
    distances = [np.array([0.5, 2.0, 4.0, 30.0]), np.array([0.5]), np.empty(0)]
    assert homography.accuracy(distances, (1, 3, 5)) == pytest.approx(
        [(0.25 + 1) / 3, (0.5 + 1) / 3, (0.75 + 1) / 3]
    )
    with pytest.raises(InputError, match="no pairs"):
        homography.accuracy([], (1,))


def test_protocols_have_names_and_refuse_nonsense() -> None:
    assert HomographyProtocol.make("gim").name == "gim-homography-3px"
    assert HomographyProtocol.make("gim", threshold=1.5, short_side=480).name == (
        "gim-homography-1.5px-side480"
    )
    with pytest.raises(InputError, match="magsac"):
        HomographyProtocol.make("magsac")
    with pytest.raises(InputError, match="threshold"):
        HomographyProtocol.make("gim", threshold=0)
