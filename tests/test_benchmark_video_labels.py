"""The benchmark of video labels: its truth is true, and its figures are those of the labels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks import video_labels
from gim_hloc.evaluation.benchmarks.video_labels import (
    VideoLabels,
    carry,
    fox_truth,
    render_walk,
)

WIDTH, HEIGHT = 160, 120
K = np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]])


def pose(angle: float, shift: tuple[float, float, float]) -> np.ndarray:
    turn = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    return np.concatenate([turn, np.array(shift)[:, None]], axis=1)


def plane_depth(world_to_camera: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """Depth of the plane normal . X = offset through the centres of the pixels."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(K).T
    turn, shift = world_to_camera[:, :3], world_to_camera[:, 3]
    n = turn @ normal
    depth: np.ndarray = (offset + n @ shift) / (rays @ n)
    return depth


def test_points_of_a_slanted_plane_are_carried_exactly() -> None:
    normal, offset = np.array([0.3, -0.2, 1.0]), 5.0
    first, second = pose(0.05, (0.1, 0, 0.2)), pose(-0.1, (-0.5, 0.2, 0.1))
    depth = plane_depth(first, normal, offset)
    xy = np.random.default_rng(0).uniform((0, 0), (WIDTH - 1, HEIGHT - 1), (200, 2))
    there = carry(xy, depth, K, first, second)
    # By the homography of the plane, from the definition.
    turn = second[:, :3] @ first[:, :3].T
    shift = second[:, 3] - turn @ first[:, 3]
    n = first[:, :3] @ normal
    distance = offset + n @ first[:, 3]
    homography = K @ (turn + np.outer(shift, n) / distance) @ np.linalg.inv(K)
    expected = np.concatenate([xy, np.ones((200, 1))], axis=1) @ homography.T
    np.testing.assert_allclose(there, expected[:, :2] / expected[:, 2:], atol=1e-6)
    back = carry(there, plane_depth(second, normal, offset), K, second, first)
    inside = (there >= 0).all(1) & (there <= (WIDTH - 1, HEIGHT - 1)).all(1)
    np.testing.assert_allclose(back[inside], xy[inside], atol=1e-6)


def test_edges_are_not_blended() -> None:
    depth = np.full((HEIGHT, WIDTH), 2.0)
    depth[:, 80:] = 8.0
    first, second = pose(0, (0, 0, 0)), pose(0, (-0.4, 0, 0))
    there = carry(np.array([[79.3, 50.0], [79.7, 50.0]]), depth, K, first, second)
    np.testing.assert_allclose(there, [[79.3 - 30, 50], [79.7 - 7.5, 50]], atol=1e-9)
    depth[:] = np.inf
    assert np.isnan(carry(np.array([[5.0, 5.0]]), depth, K, first, second)).all()


def test_figures() -> None:
    labels = np.zeros((4, 4), np.float32)
    labels[:, 2] = (0.5, 1.5, 4.0, 100.0)

    def error(i: int, j: int, rows: np.ndarray) -> np.ndarray:
        return np.abs(rows[:, 2]).astype(np.float64)

    nothing = np.zeros((0, 4), np.float32)
    (row,) = video_labels._rows("x", [("2", 0, 2, labels), ("2", 1, 3, nothing)], error)
    assert (row.pairs, row.of, row.labels) == (1, 2, 2.0)
    assert row.within == (0.25, 0.5, 0.75)
    assert row.right == 1.0
    assert row.line() == "| x | 2 | 1 / 2 | 2 | 25.0 | 50.0 | 75.0 | 1 |"
    assert video_labels._bins([4, 4, 4]) == [(4, 4)]
    bins = video_labels._bins(list(range(4, 41)))
    assert bins[0][0] == 4
    assert bins[-1][1] == 40
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bins))


def test_distances_that_are_compared() -> None:
    """An orbit's pairs lie about its middle; the smallest step is no chain."""
    orbit = VideoLabels(scene="orbit", frames=13, steps=(1, 2, 4), apart=(1, 2, 5, 12))
    assert video_labels.reach_pairs(orbit) == [(5, 7), (3, 8), (0, 12)]
    walk = VideoLabels(scene="approach", frames=41)
    assert video_labels.reach_pairs(walk) == [(0, d) for d in range(4, 41, 4)]
    with pytest.raises(InputError, match="apart is 13"):
        video_labels.reach_pairs(VideoLabels(scene="approach", frames=13, apart=(13,)))


def test_the_last_distance_with_enough_labels(tmp_path: Path) -> None:
    points = [
        video_labels.Reach(kind=kind, start=0, apart=d, labels=99, right=(n, n, n))
        for kind, counts in (("propagated: x", (90, 70, 64)), ("direct: x", (80, 0, 64)))
        for d, n in zip((2, 4, 6), counts, strict=True)
    ]
    table = video_labels.reach_table(points, (64, 90, 91))
    assert (
        table[0] == "| frames apart | propagated: x: 1 px, 2 px, of | direct: x: 1 px, 2 px, of |"
    )
    assert table[2] == "| 2 | 90, 90, 99 | 80, 80, 99 |"
    # What direct matching finds by chance beyond its end does not count.
    assert table[5:] == [
        "| last with 64 within 2 px | 6 | 2 |",
        "| last with 90 within 2 px | 2 | 0 |",
        "| last with 91 within 2 px | 0 | 0 |",
    ]
    pytest.importorskip("matplotlib")
    video_labels.plot_reach(points, tmp_path / "new" / "plot.png", "orbit")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_one_pixel_count_once() -> None:
    labels = np.array([[5.4, 7, 1, 1], [4.6, 7.3, 2, 2], [6, 7, 3, 3]], np.float32)
    assert video_labels._distinct(labels).tolist() == labels[[0, 2]].tolist()
    assert len(video_labels._distinct(labels[:0])) == 0


@pytest.mark.parametrize("scene", ["orbit", "approach", "roll"])
def test_walks_that_are_too_much_for_direct_matching(
    scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 degrees about a wall, a quarter turn too, nine times as large: the wall stays in view."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    room = pytest.importorskip("render_room")
    poses = video_labels.camera_poses(room, scene, 41)
    first, last = poses[0], poses[-1]
    angle = np.degrees(np.arccos(first[2, :3] @ last[2, :3]))
    assert angle == pytest.approx(0 if scene == "approach" else 120, abs=4)
    rolls = [np.degrees(np.arctan2(pose[0, 2], -pose[1, 2])) for pose in (first, last)]
    assert abs(rolls[1] - rolls[0]) == pytest.approx(90 if scene == "roll" else 0, abs=0.1)
    away = [2.6 + (pose[:, :3].T @ pose[:, 3])[1] for pose in (first, last)]  # before the wall, m
    assert away[0] / away[1] == pytest.approx(9 if scene == "approach" else 1, rel=0.02)
    for pose in poses:
        forward = pose[2, :3]
        centre = -pose[:, :3].T @ pose[:, 3]
        hit = centre + forward * (2.6 - centre[1]) / forward[1]
        assert abs(hit[0] - 0.6) < 0.6
        assert abs(hit[2] - 1.55) < 0.15


def test_the_reference_poses_of_the_fox_are_its_truth(data: Path) -> None:
    """SIFT matches of neighbours lie on the epipolar lines, those of a wrong frame do not."""
    import cv2

    error = fox_truth(VideoLabels(scene="fox", size=960, data=data))
    photos = sorted((data / "fox" / "images").iterdir())
    grays = [cv2.imread(str(photos[n]), cv2.IMREAD_GRAYSCALE) for n in (10, 13)]
    detector = cv2.SIFT_create(2000, enable_precise_upscale=True)
    (k0, d0), (k1, d1) = (detector.detectAndCompute(gray, None) for gray in grays)
    found = cv2.BFMatcher().knnMatch(d0, d1, k=2)
    good = [a for a, b in found if a.distance < 0.7 * b.distance]
    labels = np.array([(*k0[m.queryIdx].pt, *k1[m.trainIdx].pt) for m in good], np.float32)
    assert len(labels) > 100
    assert np.median(error(10, 13, labels)) < 0.5
    assert np.median(error(10, 30, labels)) > 5


@pytest.mark.parametrize("scene", ["room", "fox"])
def test_missing_data_is_named(scene: str, tmp_path: Path) -> None:
    options = VideoLabels(scene=scene, data=tmp_path, examples=tmp_path, work=tmp_path)  # type: ignore[arg-type]
    prepare = fox_truth if scene == "fox" else lambda o: render_walk(o, tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        prepare(options)
