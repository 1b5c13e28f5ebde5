"""Reading the warps again at the points of a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.evaluation import sfm
from gim_hloc.evaluation.benchmarks import tracks as benchmark
from gim_hloc.evaluation.benchmarks.scene import Scene, SceneOptions, SyntheticDense, make_scene
from gim_hloc.geometry.warp import Warp, cell_centres, normalised_frame
from gim_hloc.options import RereadOptions
from gim_hloc.tracks import anchored
from gim_hloc.tracks.base import Tracks
from gim_hloc.tracks.refine import read_again

SIZE = (320, 240)
NAMES = ["a", "b", "c", "d"]
SHIFTS = np.array([[0.0, 0.0], [6.25, 2.5], [-4.0, 5.5], [3.75, -7.0]])


def warp_between(i: int, j: int, error: tuple[float, float] = (0, 0)) -> Warp:
    """The warp between two shifted copies of a plane, off by ``error`` px in image j."""
    width, height = SIZE
    frame = normalised_frame(width, height, np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    grid = cell_centres(height // 4, width // 4)
    move = torch.tensor((SHIFTS[j] - SHIFTS[i] + error) * 2 / SIZE).float()
    flows = grid + move, grid - move
    seen = [(flow.abs() <= 1).all(-1).float() for flow in flows]
    return Warp(
        flow0=flows[0],
        flow1=flows[1],
        certainty0=seen[0],
        certainty1=seen[1],
        frame0=frame,
        frame1=frame,
    )


POINTS = np.random.default_rng(0).uniform(40, [280, 200], (50, 2))
ALL = np.arange(50)


def project(image: int, points: np.ndarray) -> np.ndarray:
    return POINTS[points] + SHIFTS[image]


def again(**changes: Any) -> Any:
    values = {
        "names": NAMES,
        "sizes": [SIZE] * 4,
        "seen": [ALL] * 4,
        "project": project,
        "pairs": list(itertools.combinations(NAMES, 2)),
        "warp": lambda a, b: warp_between(NAMES.index(a), NAMES.index(b)),
        "options": RereadOptions(),
        **changes,
    }
    return read_again(**values)


def test_exact_warps_confirm_the_projections() -> None:
    found = again()
    assert len(found.point) == 200
    for image in range(4):
        mine = found.image == image
        np.testing.assert_array_equal(found.point[mine], ALL)
        np.testing.assert_allclose(found.xy_px[mine], project(image, ALL), atol=0.01)
    assert (found.agreeing == 3).all()
    assert (found.against == 0).all()


def test_images_that_see_nothing_are_found() -> None:
    seen = [ALL, ALL[:30], ALL[:0], ALL[:10]]
    found = again(seen=seen, pairs=[("a", "b"), ("a", "c"), ("b", "c")])
    in_c = found.image == 2
    np.testing.assert_array_equal(found.point[in_c], ALL)
    np.testing.assert_array_equal(found.agreeing[in_c], [2] * 30 + [1] * 20)
    assert not (found.image == 3).any()  # no warp ends there
    assert set(found.point[found.image == 0]) == set(range(30))


def test_mean_is_robust_and_weighted_by_certainty() -> None:
    errors = {("a", "d"): (0.4, 0.0), ("b", "d"): (-0.2, 0.0), ("c", "d"): (20.0, 0.0)}
    faint = {("b", "d")}

    def warp(a: str, b: str) -> Warp:
        result = warp_between(NAMES.index(a), NAMES.index(b), errors.get((a, b), (0, 0)))
        if (a, b) in faint:
            result.certainty0 *= 0.5
            result.certainty1 *= 0.5
        return result

    found = again(warp=warp)
    mine = found.image == 3
    assert (found.agreeing[mine] == 2).all()
    assert (found.against[mine] == 1).all()
    w = np.array([1 / (1 + 0.16), 0.5 / (1 + 0.04)])
    expected = (w * [0.4, -0.2]).sum() / w.sum()
    offset = found.xy_px[mine] - project(3, ALL)
    np.testing.assert_allclose(offset, [[expected, 0]] * 50, atol=0.01)


def test_what_all_warps_deny_has_no_position() -> None:
    def wrong(image: int, points: np.ndarray) -> np.ndarray:
        """The model puts the points of d ten pixels off."""
        return project(image, points) + (10 if image == 3 else 0)

    found = again(project=wrong)
    mine = found.image == 3
    assert np.isnan(found.xy_px[mine]).all()
    assert (found.agreeing[mine] == 0).all()
    assert (found.against[mine] == 3).all()


def test_order_memory_and_strange_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = again()
    pairs = list(itertools.combinations(NAMES, 2))
    calls = []
    monkeypatch.setattr("gim_hloc.tracks.refine._COMPACT", 60)
    found = again(pairs=[*pairs[::-1], ("a", "gone")], progress=lambda: calls.append(1))
    assert len(calls) == 7
    for name in ("point", "image", "agreeing", "against"):
        np.testing.assert_array_equal(getattr(reference, name), getattr(found, name))
    np.testing.assert_allclose(reference.xy_px, found.xy_px, atol=1e-9)
    empty = again(pairs=[])
    assert len(empty.point) == len(empty.xy_px) == 0


def test_points_behind_or_outside_are_not_read() -> None:
    def partly(image: int, points: np.ndarray) -> np.ndarray:
        xy = project(image, points)
        xy[points >= 20] = np.nan
        return xy

    found = again(project=partly)
    assert found.point.max() == 19
    for wrong in ({"rounds": -1}, {"min_readings": 0}, {"max_shift_px": 0}):
        with pytest.raises(InputError):
            RereadOptions(**wrong)


# ---------------------------------------------------------------------------------- with a model


def inputs(seed: int, sigma: float, views: int = 6) -> benchmark.Inputs:
    options = benchmark.TracksBenchmark(
        views=views, pairs=None, width=640, grid=(120, 160), seed=seed
    )
    return benchmark.prepare(options, sigma, draw=False)


def mapped(tracks: Tracks, given: benchmark.Inputs, folder: Path, refine: Any) -> sfm.SfmScores:
    scores = benchmark.map_tracks(tracks, given, folder, refine)
    assert scores is not None
    assert scores.registered == len(given.scene.views)
    return scores


def spoil(tracks: Tracks) -> None:
    """Move all keypoints by about a pixel and lose a quarter of them."""
    rng = np.random.default_rng(0)
    kept = {}
    for name, xy in tracks.keypoints.items():
        tracks.keypoints[name] = (xy + rng.normal(0, 1, xy.shape)).astype(np.float32)
        kept[name] = rng.random(len(xy)) < 0.75
    for (a, b), rows in tracks.matches.items():
        tracks.matches[a, b] = rows[kept[a][rows[:, 0]] & kept[b][rows[:, 1]]]


def test_poor_observations_are_repaired(tmp_path: Path) -> None:
    """Keypoints off by a pixel, and many of them lost: the warps still know better."""
    given = inputs(0, 0.2)
    options = anchored.AnchoredOptions(max_keypoints=250)
    tracks = anchored.link(given.scene.names, given.anchors, given.readings, options)
    spoil(tracks)
    sentences = []

    def refine(model: Any, fixed: set[int]) -> str:
        before = colmap.statistics(model)
        sentence = colmap.refine_by_warps(
            model, given.warp, given.pairs, options=RereadOptions(), fixed=fixed, threads=1
        )
        after = colmap.statistics(model)
        assert after["mean_track_length"] > before["mean_track_length"] + 0.3
        assert after["mean_reprojection_error_px"] < 0.5 * before["mean_reprojection_error_px"]
        assert after["points"] > 0.9 * before["points"]
        for point in model.points3D.values():
            images = [element.image_id for element in point.track.elements]
            assert len(images) == len(set(images))
        sentences.append(sentence)
        return sentence

    before = mapped(tracks, given, tmp_path / "before", None)
    after = mapped(tracks, given, tmp_path / "after", refine)
    assert after.rotation.mean < 0.4 * before.rotation.mean
    assert after.centre_radius_percent.mean < 0.4 * before.centre_radius_percent.mean
    assert sentences[0].startswith("refined by the warps: ")
    # What was added is in the file, too.
    model = colmap.read_model(tmp_path / "after")
    assert model.num_reg_images() == 6
    assert sfm.evaluate(tmp_path / "after", given.scene.poses).registered == 6


def test_a_model_that_the_warps_deny_is_left_alone(tmp_path: Path) -> None:
    given = inputs(1, 0.2, views=4)
    options = anchored.AnchoredOptions(max_keypoints=200)
    tracks = anchored.link(given.scene.names, given.anchors, given.readings, options)
    other = make_scene(SceneOptions(views=4, size=(640, 480), seed=99))
    matcher = SyntheticDense.for_scene(other, size=(120, 160))
    encodings = {name: matcher.encode(matcher.blank_image(name)) for name in other.names}
    found = []

    def refine(model: Any, fixed: set[int]) -> str:
        poses = [np.asarray(model.image(i).cam_from_world().matrix()) for i in range(1, 5)]
        counts = colmap.statistics(model)
        sentence = colmap.refine_by_warps(
            model,
            lambda a, b: matcher.warp(encodings[a], encodings[b]),
            given.pairs,
            options=RereadOptions(max_shift_px=2.0),
            fixed=fixed,
            threads=1,
        )
        for index, pose in enumerate(poses, 1):
            np.testing.assert_array_equal(model.image(index).cam_from_world().matrix(), pose)
        assert colmap.statistics(model) == pytest.approx(counts)
        found.append(sentence)
        return sentence

    mapped(tracks, given, tmp_path / "run", refine)
    assert found[0].startswith("kept as it was")


@pytest.mark.slow
def test_pose_error_falls_on_scenes_with_few_points(tmp_path: Path) -> None:
    """Mean over scenes: few points of noisy warps, read again from all images at once."""
    errors = []
    for seed in range(6):
        given = inputs(seed, 0.8, views=8)
        options = anchored.AnchoredOptions(max_keypoints=150)
        tracks = anchored.link(given.scene.names, given.anchors, given.readings, options)
        scores = [
            mapped(tracks, given, tmp_path / f"{seed}-{k}", refine)
            for k, refine in enumerate((None, benchmark.refinement(given)))
        ]
        errors.append([(s.rotation.mean, s.centre_radius_percent.mean) for s in scores])
    before, after = np.mean(errors, axis=0)
    assert (after < 0.95 * before).all(), (before, after)


def test_scene_is_the_one_measured() -> None:
    """The helper's scene is seen by all its views, so that nothing above is empty."""
    given = inputs(0, 0.2)
    assert isinstance(given.scene, Scene)
    assert len(given.pairs) == 15
    assert min(len(reading) for reading in given.readings.values()) > 200
