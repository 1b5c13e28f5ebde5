"""The benchmark of tracks: how it judges, and that it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gim_hloc.evaluation.benchmarks import tracks as benchmark
from gim_hloc.evaluation.benchmarks.scene import Scene, SceneOptions, make_scene
from gim_hloc.tracks.base import Tracks


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(SceneOptions(views=5, size=(640, 480)))


def true_tracks(scene: Scene, count: int = 300, noise: float = 0.0) -> Tracks:
    """Keypoints and matches of surface points, as a perfect matcher would give them."""
    rng = np.random.default_rng(0)
    first = scene.views[scene.names[0]]
    xyz = scene.points(first, rng.uniform(0, [639, 479], (count, 2)))
    xyz = xyz[np.isfinite(xyz).all(1)]
    points, keypoints = {}, {}
    for name, view in scene.views.items():
        points[name] = np.flatnonzero(scene.visible(view, xyz))
        xy, _ = view.project(xyz[points[name]])
        keypoints[name] = (xy + rng.normal(0, noise, xy.shape)).astype(np.float32)
    matches = {}
    for a, b in scene.pairs():
        _, rows0, rows1 = np.intersect1d(points[a], points[b], return_indices=True)
        matches[a, b] = np.stack([rows0, rows1], 1)
    scores = {pair: np.ones(len(rows), np.float32) for pair, rows in matches.items()}
    values = {name: np.ones(len(xy), np.float32) for name, xy in keypoints.items()}
    return Tracks(keypoints=keypoints, matches=matches, scores=scores, keypoint_scores=values)


def test_error_grows_with_the_noise_from_nothing(scene: Scene) -> None:
    tracks = true_tracks(scene)
    judged = benchmark.judge(tracks, scene)
    assert len(judged.error) > 200
    assert judged.error.max() < 1e-5  # float32 keypoints
    lengths = tracks.track_lengths()
    assert (np.sort(judged.views) == np.sort(lengths[lengths >= 3])).all()
    assert judged.two_view == pytest.approx((lengths == 2).mean())
    medians = [
        np.median(benchmark.judge(true_tracks(scene, noise=noise), scene).error)
        for noise in (0.1, 0.4)
    ]
    assert medians[1] == pytest.approx(4 * medians[0], rel=0.3)


def test_wrong_matches_are_taken_out_or_gated(scene: Scene) -> None:
    tracks = true_tracks(scene)
    clean = benchmark.judge(tracks, scene)
    pair = next(iter(tracks.matches))
    rows = tracks.matches[pair]
    assert benchmark.epipolar_error(scene, pair, tracks, rows).max() < 1e-3
    shuffled = np.stack([rows[:, 0], np.roll(rows[:, 1], 1)], 1)
    assert (benchmark.epipolar_error(scene, pair, tracks, shuffled) > 4).mean() > 0.8
    # One observation far along its epipolar line: dropped by the gate, its point unharmed.
    tracks.keypoints[scene.names[2]] = tracks.keypoints[scene.names[2]] + np.float32(30)
    spoilt = benchmark.judge(tracks, scene)
    assert len(spoilt.error) > 0.7 * len(clean.error)
    assert np.median(spoilt.error) < 1e-5


def test_anchored_tracks_are_more_and_better(tmp_path: Path) -> None:
    options = benchmark.TracksBenchmark(
        views=6, pairs=None, width=640, grid=(120, 160), samples=400, max_keypoints=600
    )
    rows = benchmark.measured(options, 0.5, tmp_path)
    quantized, _, anchored = (dict(zip(benchmark.COLUMNS, row, strict=True)) for row in rows)
    assert anchored["points >= 3 views"] > quantized["points >= 3 views"]
    assert anchored["median mm"] < 0.5 * quantized["median mm"]
    assert anchored["two-view tracks"] < quantized["two-view tracks"]
    assert anchored["kB/pair"] < quantized["kB/pair"]
    assert anchored["registered"] == 6
