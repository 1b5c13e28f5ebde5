"""Anchored tracks, on warps whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError
from gim_hloc.evaluation.benchmarks.scene import (
    Scene,
    SceneOptions,
    SyntheticDense,
    make_scene,
    simulated_keypoints,
)
from gim_hloc.geometry.warp import Warp, cell_centres, normalised_frame
from gim_hloc.tracks import anchored
from gim_hloc.tracks.anchored import (
    AnchoredOptions,
    Anchors,
    PairReading,
    link,
    make_anchors,
    read_matches,
    read_pair,
    within,
)
from gim_hloc.tracks.base import Pair, Tracks

SIZE = (320, 240)
IDENTITY = np.array([[1.0, 0, 0], [0, 1.0, 0]])


def warp_of(a: np.ndarray, *, size: tuple[int, int] = SIZE, cells: int = 4) -> Warp:
    """The warp p -> A p of a (2, 3) affine map of pixels, and back."""
    width, height = size
    frame = normalised_frame(width, height, IDENTITY)
    inverse = np.linalg.inv(np.vstack([frame, [0, 0, 1]]))
    flows, certainties = [], []
    for m in (a, np.linalg.inv(np.vstack([a, [0, 0, 1]]))[:2]):
        full = inverse @ np.vstack([m, [0, 0, 1]]) @ np.vstack([frame, [0, 0, 1]])
        grid = cell_centres(height // cells, width // cells, dtype=torch.float64).numpy()
        flow = grid @ full[:2, :2].T + full[:2, 2]
        certainties.append(torch.from_numpy((np.abs(flow) <= 1).all(-1)).float())
        flows.append(torch.from_numpy(flow).float())
    return Warp(
        flow0=flows[0],
        flow1=flows[1],
        certainty0=certainties[0],
        certainty1=certainties[1],
        frame0=frame,
        frame1=frame,
    )


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1.0, y]])


def keypoints(seed: int, count: int = 60, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(10, np.array(size) - 11.0, (count, 2)).astype("f4")


def no_twins(tracks: Tracks) -> None:
    """No track has two observations in an image, no keypoint two partners in one."""
    track, image, _ = tracks.observations()
    assert len(np.unique(track * (int(image.max(initial=0)) + 1) + image)) == len(track)
    for rows in tracks.matches.values():
        assert len(np.unique(rows[:, 0])) == len(np.unique(rows[:, 1])) == len(rows)


# -------------------------------------------------------------------------------------- anchors


def test_anchors_are_keypoints_and_a_grid_around_them() -> None:
    xy = keypoints(0)
    anchors = make_anchors(SIZE, xy, None, None, AnchoredOptions())
    first = anchors.xy_px[anchors.tier == 1]
    grid = anchors.xy_px[anchors.tier == 2]
    np.testing.assert_array_equal(first, xy)
    assert (np.diff(anchors.tier.astype(int)) >= 0).all()
    cells = np.floor((np.concatenate([first, grid]) + 0.5) / (np.array(SIZE) / [13, 10]))
    assert len(np.unique(cells, axis=0)) == 130  # every cell has an anchor
    assert not set(map(tuple, np.unique(cells[len(first) :], axis=0))) & set(
        map(tuple, cells[: len(first)])
    )
    none = make_anchors(SIZE, xy, None, None, AnchoredOptions(grid_px=0))
    assert (none.tier == 1).all()


def test_stronger_keypoint_of_one_place_stays() -> None:
    xy = np.array([[50.1, 60.1], [50.2, 60.2], [100.0, 100.0]], np.float32)
    anchors = make_anchors(SIZE, xy, np.array([0.1, 0.9, 0.5]), None, AnchoredOptions(grid_px=0))
    np.testing.assert_array_equal(anchors.xy_px, xy[[1, 2]])


def test_no_anchor_on_or_beside_the_mask_or_outside() -> None:
    mask = np.ones(SIZE[::-1], bool)
    mask[100:150, 80:200] = False
    xy = np.concatenate([keypoints(1, 400), [[-3, 50], [50, 239.6], [319.4, 5], [98.0, 152.0]]])
    options = AnchoredOptions(mask_margin_px=4)
    anchors = make_anchors(SIZE, xy, None, mask, options)
    x, y = np.round(anchors.xy_px).astype(int).T
    assert mask[y, x].all()
    beside = (x > 80 - 4) & (x < 200 + 3) & (y > 100 - 4) & (y < 150 + 3)
    assert not beside.any()
    assert (anchors.xy_px[:, 0] > 315).any()  # the image's border takes no margin
    assert len(anchors) > 200
    with pytest.raises(InputError, match="240x320, its image 320x240"):
        make_anchors(SIZE, xy, None, mask.T, options)


def test_pixels_of_the_options_grow_with_large_images() -> None:
    small = make_anchors((1600, 1200), np.zeros((0, 2)), None, None, AnchoredOptions())
    large = make_anchors((6400, 4800), np.zeros((0, 2)), None, None, AnchoredOptions())
    assert len(small) == len(large)
    assert (small.unit, large.unit) == (1.0, 4.0)
    np.testing.assert_allclose(large.xy_px + 0.5, 4 * (small.xy_px + 0.5), rtol=1e-5)


# ------------------------------------------------------------------------------------- readings


@pytest.mark.parametrize("symmetric", [False, True])
def test_reads_an_affine_warp_exactly(symmetric: bool) -> None:
    motion = np.array([[0.95, 0.08, 6.3], [-0.06, 1.03, -4.7]])
    options = AnchoredOptions(symmetric=symmetric)
    a, b = (make_anchors(SIZE, keypoints(seed), None, None, options) for seed in (0, 1))
    reading = read_pair(warp_of(motion), a, b, options)
    back = np.linalg.inv(np.vstack([motion, [0, 0, 1]]))[:2]
    for direction, (anchors, m) in enumerate(((a, motion), (b, back))):
        index, xy, certainty = reading.direction(direction)
        expected = anchors.xy_px @ m[:, :2].T + m[:, 2]
        inside = (expected > 6).all(1) & (expected < np.array(SIZE) - 7).all(1)
        inside &= (anchors.xy_px > 4).all(1) & (anchors.xy_px < np.array(SIZE) - 5).all(1)
        assert set(np.flatnonzero(inside)) <= set(index)
        sure = np.isin(index, np.flatnonzero(inside))
        np.testing.assert_allclose(xy[sure], expected[index[sure]], atol=0.02)
        np.testing.assert_allclose(certainty[sure], 1, atol=1 / 255)


def test_symmetric_reading_is_the_mean_of_both_directions() -> None:
    """The reverse is off by one pixel: half of it is the forward warp's share."""
    warp = warp_of(shift(5, 0))
    warp.flow1 = warp.flow1 + torch.tensor([2 / SIZE[0], 0.0])
    options = AnchoredOptions(grid_px=16)
    anchors = make_anchors(SIZE, np.zeros((0, 2)), None, None, options)
    for symmetric, expected in ((False, 5.0), (True, 4.5)):
        reading = read_pair(warp, anchors, anchors, AnchoredOptions(symmetric=symmetric))
        index, xy, _ = reading.direction(0)
        middle = np.abs(anchors.xy_px[index] - np.array(SIZE) / 2).max(1) < 80
        np.testing.assert_allclose(
            (xy - anchors.xy_px[index])[middle], [[expected, 0]] * middle.sum(), atol=0.02
        )


def test_no_reading_from_or_onto_a_mask_or_against_the_cycle() -> None:
    options = AnchoredOptions()
    mask = np.ones(SIZE[::-1], bool)
    mask[:, 200:] = False
    plain = make_anchors(SIZE, keypoints(0, 300), None, None, options)
    masked = make_anchors(SIZE, keypoints(1, 300), None, mask, options)
    reading = read_pair(warp_of(shift(30, 0)), plain, masked, options)
    index, xy, _ = reading.direction(0)
    assert len(index) > 100
    assert (xy[:, 0] < 200 - 4).all()
    index, _, _ = reading.direction(1)
    assert (masked.xy_px[index, 0] < 200 - 4).all()
    wrong = warp_of(shift(30, 0))
    wrong.flow1[:, :40] += 0.2  # the left half of image 1 comes back elsewhere
    reading = read_pair(wrong, plain, plain, options)
    _, xy, _ = reading.direction(0)
    assert len(xy) > 50
    assert (xy[:, 0] > 155).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([(320, 240), (4000, 3000), (15000, 11000), (30000, 200)]),
)
def test_storage_keeps_what_matters(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    anchors = [
        Anchors(
            xy_px=rng.uniform(0, size, (n, 2)).astype(np.float32),
            tier=np.ones(n, np.uint8),
            size=size,
        )
        for n in rng.integers(0, 70, 2)
    ]
    parts = []
    for here in anchors:
        read = rng.random(len(here)) < 0.5
        xy = rng.uniform(-0.5, np.array(size) - 0.5, (int(read.sum()), 2)).astype(np.float32)
        parts.append((read, xy, rng.random(len(xy), np.float32)))
    packed = PairReading.pack(*anchors, *parts)
    again = PairReading.from_arrays({**packed.to_arrays(), "other": np.zeros(3)})
    assert len(again) == sum(int(read.sum()) for read, _, _ in parts)
    assert packed.nbytes <= 6 * len(again) + sum((len(a) + 7) // 8 for a in anchors) + 16
    step = 1 / 64 if max(size) < 16000 else 1 / 32
    for direction, (read, xy, certainty) in enumerate(parts):
        index, found, sure = again.direction(direction)
        np.testing.assert_array_equal(index, np.flatnonzero(read))
        # Half a step, and float32's own spacing at 30000 px.
        np.testing.assert_allclose(found, xy, atol=step / 2 + 0.003)
        np.testing.assert_allclose(sure, certainty, atol=0.51 / 255)


def semidense(motion: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matches at every 8th pixel of the first image, as LoFTR gives them."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(4, 320, 8), np.arange(4, 240, 8)), -1).reshape(-1, 2)
    target = grid @ motion[:, :2].T + motion[:, 2]
    keep = (
        (target > 0).all(1) & (target < np.array(SIZE) - 1).all(1) & (rng.random(len(grid)) > 0.1)
    )
    return grid[keep].astype("f4"), target[keep].astype("f4"), np.full(keep.sum(), 0.8, "f4")


def test_semidense_transfer_is_exact_for_affine_motion() -> None:
    motion = np.array([[0.9, 0.15, 12.0], [-0.2, 1.1, 20.0]])
    options = AnchoredOptions()
    a, b = (make_anchors(SIZE, keypoints(seed), None, None, options) for seed in (0, 1))
    reading = read_matches(*semidense(motion), a, b, options)
    back = np.linalg.inv(np.vstack([motion, [0, 0, 1]]))[:2]
    for direction, (anchors, m) in enumerate(((a, motion), (b, back))):
        index, xy, certainty = reading.direction(direction)
        expected = anchors.xy_px @ m[:, :2].T + m[:, 2]
        inside = (expected > 12).all(1) & (expected < np.array(SIZE) - 13).all(1)
        assert np.isin(np.flatnonzero(inside), index).mean() > 0.95
        np.testing.assert_allclose(xy, expected[index], atol=0.02)
        np.testing.assert_allclose(certainty, 0.8, atol=0.01)


def test_semidense_outliers_do_not_bend_the_fit() -> None:
    source, target, scores = semidense(shift(7.25, -3.5))
    rng = np.random.default_rng(0)
    wrong = rng.random(len(source)) < 0.06
    target[wrong] += rng.uniform(-60, 60, (wrong.sum(), 2)).astype("f4")
    options = AnchoredOptions()
    anchors = make_anchors(SIZE, keypoints(0, 200), None, None, options)
    index, xy, _ = read_matches(source, target, scores, anchors, anchors, options).direction(0)
    error = np.linalg.norm(xy - anchors.xy_px[index] - [7.25, -3.5], axis=1)
    assert len(index) > 180
    assert (error < 0.05).mean() > 0.97
    assert np.quantile(error, 0.99) < 2


def test_semidense_does_not_reach_beyond_its_matches() -> None:
    source, target, scores = semidense(shift(0, 0))
    left = source[:, 0] < 150
    options = AnchoredOptions()
    anchors = make_anchors(SIZE, np.zeros((0, 2)), None, None, options)
    reading = read_matches(source[left], target[left], scores[left], anchors, anchors, options)
    index, _, _ = reading.direction(0)
    assert anchors.xy_px[index, 0].max() < 150 + 10
    assert len(index) > 40
    for count in (0, 3):
        few = read_matches(
            source[:count], target[:count], scores[:count], anchors, anchors, options
        )
        assert len(few) == 0


# -------------------------------------------------------------------------------------- linking


def chain(
    shifts: list[tuple[float, float]], detected: list[np.ndarray], options: AnchoredOptions
) -> tuple[list[str], dict[str, Anchors], dict[Pair, PairReading]]:
    """Images that are shifted copies of one plane, all pairs matched exactly."""
    names = [f"{index}.jpg" for index in range(len(shifts))]
    anchors = {
        name: make_anchors(SIZE, xy, None, None, options)
        for name, xy in zip(names, detected, strict=True)
    }
    readings = {}
    for i, j in itertools.combinations(range(len(names)), 2):
        motion = shift(*np.subtract(shifts[j], shifts[i]))
        readings[names[i], names[j]] = read_pair(
            warp_of(motion), anchors[names[i]], anchors[names[j]], options
        )
    return names, anchors, readings


SHIFTS = [(0.0, 0.0), (6.5, 2.25), (-4.0, 5.5), (3.75, -7.0), (10.0, 4.0)]


def offsets(tracks: Tracks, shifts: list[tuple[float, float]]) -> np.ndarray:
    """Distances of matches from the true motion, all pairs together."""
    errors = []
    for (a, b), rows in tracks.matches.items():
        motion = np.subtract(shifts[int(b[0])], shifts[int(a[0])])
        moved = tracks.keypoints[a][rows[:, 0]] + motion
        errors.append(np.linalg.norm(tracks.keypoints[b][rows[:, 1]] - moved, axis=1))
    return np.concatenate(errors)


def test_exact_warps_give_full_tracks_without_error() -> None:
    points = keypoints(0, 80) * 0.7 + 40
    detected = [points + np.float32(s) for s in SHIFTS]
    names, anchors, readings = chain(SHIFTS, detected, AnchoredOptions())
    tracks = link(names, anchors, readings, AnchoredOptions())
    no_twins(tracks)
    # Each detected point is one track of all images, at the detector's places.
    histogram = tracks.histogram()
    assert histogram[5] >= 80
    for name, xy in zip(names, detected, strict=True):
        distance = np.linalg.norm(tracks.keypoints[name][:, None] - xy, axis=2)
        assert ((distance < 0.05).sum(0) == 1).all()
    assert offsets(tracks, SHIFTS).max() < 0.06
    assert tracks.statistics()["two_view_share"] < 0.1


def test_a_missed_detection_is_filled_in_by_the_warp() -> None:
    points = keypoints(0, 40) * 0.6 + 50
    detected = [points + np.float32(s) for s in SHIFTS]
    detected[2] = np.zeros((0, 2), np.float32)
    options = AnchoredOptions(grid_px=0)
    names, anchors, readings = chain(SHIFTS, detected, options)
    tracks = link(names, anchors, readings, options)
    assert tracks.histogram() == {5: 40}
    assert offsets(tracks, SHIFTS).max() < 0.06


def test_readings_and_detections_are_averaged() -> None:
    """Detections off by half a pixel, exact warps: the tracks are nearer than the detections."""
    rng = np.random.default_rng(0)
    points = keypoints(0, 150) * 0.6 + 50
    noise = [rng.normal(0, 0.5, points.shape) for _ in SHIFTS]
    detected = [
        (points + np.float32(s) + n).astype("f4") for s, n in zip(SHIFTS, noise, strict=True)
    ]
    options = AnchoredOptions(grid_px=0, merge_px=3)
    names, anchors, readings = chain(SHIFTS, detected, options)
    tracks = link(names, anchors, readings, options)
    no_twins(tracks)
    alone = np.median(np.linalg.norm(noise[1] - noise[0], axis=1))
    assert np.median(offsets(tracks, SHIFTS)) < 0.4 * alone
    assert tracks.histogram()[5] > 100


def test_stars_without_any_detection() -> None:
    names, anchors, readings = chain(SHIFTS, [np.zeros((0, 2))] * 5, AnchoredOptions())
    tracks = link(names, anchors, readings, AnchoredOptions())
    no_twins(tracks)
    assert offsets(tracks, SHIFTS).max() < 0.06
    assert len(tracks) > 130
    assert (tracks.track_lengths() == 5).mean() > 0.8


def test_identity_consumes_the_other_images_anchors() -> None:
    """All images are one: every grid anchor is a single track of all of them."""
    still = [(0.0, 0.0)] * 4
    names, anchors, readings = chain(still, [np.zeros((0, 2))] * 4, AnchoredOptions())
    tracks = link(names, anchors, readings, AnchoredOptions())
    assert tracks.histogram() == {4: len(anchors[names[0]])}


def test_unrounded() -> None:
    names, anchors, readings = chain(
        [(0.0, 0.0), (3.337, 1.219)], [np.zeros((0, 2))] * 2, AnchoredOptions()
    )
    tracks = link(names, anchors, readings, AnchoredOptions())
    rows = tracks.matches[names[0], names[1]]
    moved = tracks.keypoints[names[1]][rows[:, 1]] - tracks.keypoints[names[0]][rows[:, 0]]
    np.testing.assert_allclose(moved, np.tile([3.337, 1.219], (len(rows), 1)), atol=0.012)


def test_conflicting_chains_never_join_two_points_of_an_image() -> None:
    """Pairs of keypoints 3 px apart; warps off by a pixel and more confuse them."""
    rng = np.random.default_rng(5)
    points = keypoints(0, 60) * 0.6 + 50
    points = np.concatenate([points, points + np.array([2.2, 0])]).astype("f4")
    options = AnchoredOptions(grid_px=0, merge_px=3, max_cycle_px=9)
    names = [f"{i}.jpg" for i in range(6)]
    anchors = {
        name: make_anchors(SIZE, points + rng.normal(0, 0.5, points.shape), None, None, options)
        for name in names
    }
    readings = {
        pair: read_pair(
            warp_of(shift(*rng.uniform(-1.4, 1.4, 2))), anchors[pair[0]], anchors[pair[1]], options
        )
        for pair in itertools.combinations(names, 2)
    }
    tracks = link(names, anchors, readings, options)
    no_twins(tracks)
    assert tracks.histogram().get(6, 0) > 30


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(SceneOptions(views=8, size=(640, 480)))


@pytest.fixture(scope="module")
def noisy(scene: Scene) -> tuple[dict[str, Anchors], dict[Pair, PairReading]]:
    """Everything that goes wrong, on a scene with occlusion."""
    return read_scene(scene, noise_px=0.5, outlier_share=0.05)


def read_scene(
    scene: Scene, **options: float
) -> tuple[dict[str, Anchors], dict[Pair, PairReading]]:
    matcher = SyntheticDense.for_scene(scene, size=(240, 320), **options)
    values = AnchoredOptions()
    found = simulated_keypoints(scene, number=500, noise_px=0.4)
    anchors = {name: make_anchors((640, 480), *found[name], None, values) for name in scene.names}
    encodings = {name: matcher.encode(matcher.blank_image(name)) for name in scene.names}
    readings = {
        (a, b): read_pair(matcher.warp(encodings[a], encodings[b]), anchors[a], anchors[b], values)
        for a, b in scene.pairs(16)
    }
    return anchors, readings


def true_errors(scene: Scene, tracks: Tracks) -> np.ndarray:
    """Distances of matches from where the scene puts them; infinite where it is not seen."""
    errors = []
    for (a, b), rows in tracks.matches.items():
        target = scene.true_position(a, b, tracks.keypoints[a][rows[:, 0]])
        error = np.linalg.norm(tracks.keypoints[b][rows[:, 1]] - target, axis=1)
        errors.append(np.nan_to_num(error, nan=np.inf))
    return np.concatenate(errors)


def test_outliers_and_occlusion_are_rejected(
    scene: Scene, noisy: tuple[dict[str, Anchors], dict[Pair, PairReading]]
) -> None:
    tracks = link(scene.names, *noisy, AnchoredOptions())
    no_twins(tracks)
    errors = true_errors(scene, tracks)
    assert (errors > 4).mean() < 0.06  # 5 % of the blocks of each direction, 2 % of the regions
    assert np.median(errors) < 0.75
    statistics = tracks.statistics()
    assert statistics["two_view_share"] < 0.25
    assert statistics["mean_track_length"] > 3.5
    # Only images of the scene's pairs are matched, in their order.
    assert list(tracks.matches) == sorted(noisy[1])


def test_nothing_depends_on_order(
    scene: Scene, noisy: tuple[dict[str, Anchors], dict[Pair, PairReading]]
) -> None:
    anchors, readings = noisy
    tracks = link(scene.names, anchors, readings, AnchoredOptions(), max_keypoints=400)
    rng = np.random.default_rng(1)
    names = list(rng.permutation(scene.names))
    pairs = [list(readings)[k] for k in rng.permutation(len(readings))]
    shuffled = {name: anchors[name] for name in names}
    again = link(
        names, shuffled, ((p, readings[p]) for p in pairs), AnchoredOptions(), max_keypoints=400
    )
    assert list(again.keypoints) == names
    for name in names:
        np.testing.assert_array_equal(tracks.keypoints[name], again.keypoints[name])
        assert len(again.keypoints[name]) <= 400
    for pair in pairs:
        np.testing.assert_array_equal(tracks.matches[pair], again.matches[pair])
        np.testing.assert_array_equal(tracks.scores[pair], again.scores[pair])


def test_the_limit_keeps_long_tracks_whole(
    scene: Scene, noisy: tuple[dict[str, Anchors], dict[Pair, PairReading]]
) -> None:
    everything = link(scene.names, *noisy, AnchoredOptions(max_keypoints=None))
    limited = link(scene.names, *noisy, AnchoredOptions(max_keypoints=300))
    assert min(map(len, everything.keypoints.values())) > 500
    assert max(map(len, limited.keypoints.values())) <= 300
    assert np.mean([len(k) for k in limited.keypoints.values()]) > 200
    assert limited.track_lengths().mean() > everything.track_lengths().mean()
    assert limited.statistics()["two_view_share"] < 0.1
    worst = {name: values.min() for name, values in limited.keypoint_scores.items()}
    assert min(worst.values()) >= 2
    for values in limited.keypoint_scores.values():
        assert (np.diff(values) <= 1).all()  # the strongest first, up to the score within a track


def test_bad_input_is_told_and_nothing_is_no_failure() -> None:
    options = AnchoredOptions()
    names, anchors, readings = chain(SHIFTS[:2], [keypoints(0)] * 2, options)
    other = make_anchors(SIZE, keypoints(0, 7), None, None, options)
    with pytest.raises(InputError, match=r"0\.jpg and 1\.jpg"):
        link(names, {**anchors, "1.jpg": other}, readings, options)
    empty = link(["a", "b"], {}, {}, options)
    assert empty.histogram() == {}
    assert empty.keypoints["a"].shape == (0, 2)
    blank = warp_of(shift(0, 0))
    blank.certainty0 *= 0
    blank.certainty1 *= 0
    nothing = read_pair(blank, anchors["0.jpg"], anchors["1.jpg"], options)
    assert len(nothing) == 0
    tracks = link(names, anchors, {("0.jpg", "1.jpg"): nothing}, options)
    assert tracks.matches["0.jpg", "1.jpg"].shape == (0, 2)
    for wrong in ({"grid_px": 2}, {"merge_px": 0}, {"max_keypoints": 0}):
        with pytest.raises(InputError):
            AnchoredOptions(**wrong)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.floats(0.3, 40))
def test_within_finds_all_pairs(seed: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 100, (int(rng.integers(0, 60)), 2)).astype(np.float32)
    queries = rng.uniform(-20, 120, (int(rng.integers(0, 60)), 2)).astype(np.float32)
    query, point, distance = within(points, queries, radius)
    every = np.linalg.norm(queries[:, None] - points[None], axis=2)
    expected = np.argwhere(every <= radius)
    found = np.stack([query, point], 1)
    np.testing.assert_array_equal(found[np.lexsort((point, query))], expected)
    np.testing.assert_allclose(distance, every[query, point], rtol=1e-6)


def test_quick_ways_to_sort_agree_with_plain_ones() -> None:
    rng = np.random.default_rng(0)
    for key in (
        rng.integers(0, 50, 1000),
        rng.integers(0, 50, 1000) + (1 << 61),  # numbers too large to be numbered
        np.zeros(0, np.int64),
    ):
        np.testing.assert_array_equal(anchored._order(key), np.argsort(key, kind="stable"))
    group = np.sort(rng.integers(0, 60, 400))
    values = rng.normal(0, 100, (400, 2)).astype(np.float32)  # of both signs
    values[:5] = -0.0
    plain = [np.median(values[group == g].astype(np.float64), axis=0) for g in np.unique(group)]
    np.testing.assert_array_equal(anchored._medians(values, group), plain)
    distance = rng.integers(0, 4, 400).astype(np.float32)  # ties: the first counts
    plain_rows = [np.flatnonzero(group == g)[distance[group == g].argmin()] for g in set(group)]
    np.testing.assert_array_equal(anchored._nearest(group, distance), sorted(plain_rows))
    assert not len(anchored._nearest(group[:0], distance[:0]))
