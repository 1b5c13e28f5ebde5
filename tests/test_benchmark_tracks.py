"""The benchmark of tracks: how it judges, and that it runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gim_hloc.evaluation.benchmarks import tracks as benchmark
from gim_hloc.evaluation.benchmarks.tracks import CELLS, BenchmarkOptions, Row
from gim_hloc.evaluation.synthetic_dense import Scene, SceneOptions, make_scene
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
    return Tracks(
        keypoints=keypoints,
        matches=matches,
        scores={pair: np.ones(len(rows), np.float32) for pair, rows in matches.items()},
        keypoint_scores={name: np.ones(len(xy), np.float32) for name, xy in keypoints.items()},
    )


def test_true_tracks_have_no_error(scene: Scene) -> None:
    tracks = true_tracks(scene)
    judged = benchmark.judge(tracks, scene)
    assert len(judged.error) > 200
    assert judged.error.max() < 1e-5  # float32 keypoints
    lengths = tracks.track_lengths()
    assert (np.sort(judged.views) == np.sort(lengths[lengths >= 3])).all()
    assert judged.two_view == pytest.approx((lengths == 2).mean())


def test_error_grows_with_the_noise(scene: Scene) -> None:
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
    error = benchmark.epipolar_error(scene, pair, tracks, rows)
    assert error.max() < 1e-3
    shuffled = np.stack([rows[:, 0], np.roll(rows[:, 1], 1)], 1)
    assert (benchmark.epipolar_error(scene, pair, tracks, shuffled) > 4).mean() > 0.8
    # One observation far along its epipolar line: dropped by the gate, its point unharmed.
    name = scene.names[2]
    tracks.keypoints[name] = tracks.keypoints[name] + np.float32(30)
    spoilt = benchmark.judge(tracks, scene)
    assert len(spoilt.error) > 0.7 * len(clean.error)
    assert np.median(spoilt.error) < 1e-5


def rows_of(options: BenchmarkOptions, *, real: bool) -> dict[str, Row]:
    """Rows that meet every bound."""
    theirs = Row(
        method="",
        sigma=0.5,
        points=1000,
        two_view=0.9,
        median_mm=4.0,
        ms=100.0,
        kb=100.0,
        registered=options.views,
        rotation_deg=0.02,
        centre_percent=0.04,
    )
    ours = dataclasses.replace(
        theirs,
        points=5000,
        two_view=0.2,
        median_mm=2.0,
        ms=20.0,
        kb=40.0,
        rotation_deg=0.01,
        centre_percent=0.02,
    )
    rows = {}
    for cell in CELLS:
        if real:
            rows[f"hloc {cell}"] = dataclasses.replace(theirs)
        rows[f"quantized {cell}"] = dataclasses.replace(theirs, ms=10.0)
    rows["anchored"] = dataclasses.replace(ours)
    for method, row in rows.items():
        row.method = method
    return rows


@pytest.mark.parametrize("real", [True, False])
def test_bounds(real: bool) -> None:
    options = BenchmarkOptions()
    assert benchmark.missed_bounds(list(rows_of(options, real=real).values()), options) == []
    broken = [
        ("anchored", "points", 4999, 2),
        ("anchored", "median_mm", 2.01, 2),
        ("anchored", "two_view", 0.21, 1),
        ("anchored", "kb", 41.0, 2),
        ("anchored", "registered", 23, 1),
        ("anchored", "rotation_deg", 0.011, 2),
        ("anchored", "centre_percent", float("nan"), 2),
        ("anchored", "ms", 21.0, 2 * real),  # without hloc there is no time to compare with
        ("quantized cell 8 error 2", "ms", 10.5, int(real)),
    ]
    for method, name, value, count in broken:
        rows = rows_of(options, real=real)
        setattr(rows[method], name, value)
        missed = benchmark.missed_bounds(list(rows.values()), options)
        assert len(missed) == count, (method, name, missed)


def test_poses_of_a_smaller_model_are_no_yardstick() -> None:
    options = BenchmarkOptions()
    rows = rows_of(options, real=True)
    rows["hloc cell 1 error 1"].registered = 2
    rows["hloc cell 1 error 1"].rotation_deg = 1e-6
    assert benchmark.missed_bounds(list(rows.values()), options) == []


def test_table_shows_what_was_measured() -> None:
    text = benchmark.line(Row(method="a method", sigma=0.5, points=7, median_mm=1.234))
    assert text.startswith("| 0.5 | a method | 7 |")
    assert "1.23" in text
    assert "nan" not in text
    assert text.count("|") == benchmark.HEADER.splitlines()[0].count("|")


def test_runs_without_hloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CHECKOUT", "PYTHON"):
        monkeypatch.delenv(f"GIM_HLOC_HLOC_{name}", raising=False)
    small = ["--views", "6", "--pairs", "40", "--width", "640", "--grid", "120", "160"]
    small += ["--samples", "400", "--sigma", "0.5", "--max-keypoints", "600"]
    loose = ["--min-points-ratio", "0.5", "--max-pose-ratio", "5", "--max-two-view-share", "0.5"]
    code = benchmark.main([*small, *loose, "--json", str(tmp_path / "out" / "result.json")])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "no hloc" in printed
    assert "every bound is met" in printed
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["missed"] == []
    assert {"date", "machine", "versions"} <= set(result)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["anchored"]["points"] > rows["quantized cell 8 error 2"]["points"]
    assert rows["anchored"]["registered"] == 6
    assert rows["anchored"]["median_mm"] < 0.5 * rows["quantized cell 8 error 2"]["median_mm"]
    code = benchmark.main([*small, "--no-mapping", "--min-points-ratio", "1000"])
    assert code == 1
    assert "missed: sigma 0.5" in capsys.readouterr().out


def test_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = benchmark.main(["--hloc", str(tmp_path), "--with-hloc", str(tmp_path / "nothing.py")])
    assert code == 2
    assert "missing: tool" in capsys.readouterr().err
