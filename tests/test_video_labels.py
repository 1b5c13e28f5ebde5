"""Labelling rounds: filters, zooms, runs that stop and go on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gim_hloc import matchers
from gim_hloc.cli.video import main
from gim_hloc.errors import GimError, InputError, LockedError, OutputError
from gim_hloc.lock import FolderLock
from gim_hloc.matchers import registry
from gim_hloc.training.video.folder import VideoFolder
from gim_hloc.training.video.labels import (
    clean,
    crop_box,
    default_labellers,
    labeller,
    zoom_box,
    zoomed_image,
    zoomed_size,
)
from gim_hloc.training.video.masks import prepare_masks
from gim_hloc.training.video.options import (
    CleaningOptions,
    LabellerOptions,
    LabelOptions,
    MaskOptions,
)
from gim_hloc.training.video.propagated import PropagatedStore
from gim_hloc.training.video.run import LabelReport, label_video
from gim_hloc.training.video.sources import find_source
from gim_hloc.training.video.store import LabelStore, StoreInfo
from gim_hloc.types import ImageData, ImageOptions, MatcherInfo, Matches, SparseEncoding

WIDTH, HEIGHT = 200, 150
FAKE = "fake_labeller"
SPEED = np.array([3.0, 1.0])  # px the view moves over the world per frame; nearer things twice


# ------------------------------------------------------------------------------- a scene with truth


def near(world: np.ndarray) -> np.ndarray:
    """Which points of the world (N, 2) lie nearer: they move twice as fast."""
    nearer: np.ndarray = (world[:, 0] // 20 + world[:, 1] // 20) % 3 == 0
    return nearer


class FakeLabeller:
    """Sees lattice points of a made-up world through the moving view; knows frames by name."""

    encoded: list[str] = []  # noqa: RUF012 - shared on purpose, tests clear it
    fail_on: set[tuple[int, int]] = set()  # noqa: RUF012

    def __init__(self, version: int = 0) -> None:
        self.info = registry.describe(FAKE)
        self.version = version
        self.image_options = ImageOptions(max_size=None)
        self.device = torch.device("cpu")

    def encode_settings(self) -> dict[str, Any]:
        return {"matcher": FAKE, "version": self.version}

    def match_settings(self) -> dict[str, Any]:
        return {"matcher": FAKE}

    def encode(self, image: ImageData) -> SparseEncoding:
        self.encoded.append(image.name)
        pair, _, side = image.name.removesuffix(".png").partition("/")
        frame = int(pair.split("_")[int(side or 0)])
        x, y = np.meshgrid(np.arange(-300, 600, 7.0), np.arange(-300, 600, 7.0))
        world = np.stack([x.ravel(), y.ravel()], axis=1)
        seen = world - SPEED * frame * np.where(near(world), 2, 1)[:, None]
        columns, rows = image.network_size
        network = (seen - image.to_original[:, 2]) / image.to_original[[0, 1], [0, 1]]
        inside = (network >= 0).all(1) & (network[:, 0] <= columns - 1)
        inside &= network[:, 1] <= rows - 1
        if image.mask is not None:
            at = np.rint(network[inside]).astype(int)
            inside[np.flatnonzero(inside)] = image.mask.numpy()[at[:, 1], at[:, 0]]
        descriptors = torch.zeros(int(inside.sum()), 16)
        descriptors[:, 0] = torch.from_numpy(world[inside, 0] / 7 + 64)
        descriptors[:, 1] = torch.from_numpy(world[inside, 1] / 7 + 64)
        return SparseEncoding.make(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            keypoints=torch.from_numpy(seen[inside]).float(),
            descriptors=descriptors,
            scores=torch.ones(len(descriptors)),
        )

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        if (a.name, b.name) in {(f"{i:08d}.png", f"{j:08d}.png") for i, j in self.fail_on}:
            raise ArithmeticError("no answer")
        codes = [(e.descriptors[:, 0].double() * 1000 + e.descriptors[:, 1]) for e in (a, b)]
        _, rows_a, rows_b = np.intersect1d(
            codes[0].numpy(), codes[1].numpy(), assume_unique=True, return_indices=True
        )
        indices = torch.from_numpy(np.stack([rows_a, rows_b], axis=1))
        return Matches.from_indices(a, b, indices, torch.ones(len(indices)))

    def match_batch(self, pairs: list[tuple[SparseEncoding, SparseEncoding]]) -> list[Matches]:
        return [self.match(a, b) for a, b in pairs]


@pytest.fixture
def fake() -> Iterator[type[FakeLabeller]]:
    info = MatcherInfo(
        name=FAKE,
        kind="sparse",
        checkpoint=(),
        licence="none",
        commercial=True,
        colour="rgb",
        summary="knows",
    )
    registry.register(FAKE, lambda **_: FakeLabeller(), info)
    FakeLabeller.encoded.clear()
    FakeLabeller.fail_on.clear()
    yield FakeLabeller
    del registry._entries[FAKE]


def textured(count: int, folder: Path, *, overlay: bool = False) -> Path:
    """A view that glides over two textured planes; frame n is n.png."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    planes = []
    for scale in (5, 7):
        noise = generator.uniform(0, 255, (100, 160, 3)).astype(np.float32)
        size = (160 * scale, 100 * scale)
        planes.append(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC).clip(0, 255))
    for n in range(count):
        view = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for plane, speed, rows in (
            (planes[0], 1, slice(0, HEIGHT // 2)),
            (planes[1], 2, slice(HEIGHT // 2, HEIGHT)),
        ):
            x, y = (SPEED * speed * n).astype(int)
            view[rows] = plane[y : y + HEIGHT, x : x + WIDTH][rows]
        if overlay:
            view[20:60, 60:140] = planes[1][400:440, 400:480]
        Image.fromarray(view).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return textured(24, tmp_path_factory.mktemp("clip") / "clip")


def errors(store: LabelStore, i: int, j: int) -> np.ndarray:
    """Distance of labels from the truth in pixels, for `textured`."""
    labels = store.read(i, j).astype(np.float64)
    speed = np.where(labels[:, 1] < HEIGHT / 2, 1, 2)[:, None]
    truth = labels[:, :2] - SPEED * speed * (j - i)
    distance: np.ndarray = np.linalg.norm(labels[:, 2:] - truth, axis=1)
    return distance


def small(**changes: Any) -> LabelOptions:
    values: dict[str, Any] = {
        "labellers": (FAKE,),
        "gap": 2,
        "steps": (2, 4, 8),
        "masks": "none",
        "format": "png",
    }
    return LabelOptions(**{**values, **changes})


def run(clip: Path, out: Path, options: LabelOptions) -> LabelReport:
    return label_video(find_source(str(clip)), out, options)


def stored(folder: VideoFolder) -> dict[str, Any]:
    """All labels and failures of a video."""
    found: dict[str, Any] = {}
    for path in folder.label_paths():
        with LabelStore(path) as store:
            for i, j in store.pairs().tolist():
                found[f"{path.name} {i} {j}"] = store.read(i, j).tobytes()
            for i, j, reason in store.failures():
                found[f"{path.name} {i} {j}"] = reason
    return found


# ------------------------------------------------------------------------------------------ filters


def two_views(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exact projections of random points in two cameras."""
    generator = np.random.default_rng(seed)
    points = generator.uniform((-2, -1.5, 4), (2, 1.5, 8), (count, 3))
    angle = 0.1
    turn = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    other = points @ turn.T + np.array([0.8, 0.1, 0.2])
    return tuple(400 * p[:, :2] / p[:, 2:] + (320, 240) for p in (points, other))  # type: ignore[return-value]


def test_outliers_overlays_and_masked_points_go() -> None:
    good0, good1 = two_views(300)
    generator = np.random.default_rng(1)
    wild0, wild1 = generator.uniform(0, 480, (2, 100, 2))
    logo0 = generator.uniform(20, 60, (40, 2))
    logo1 = logo0 + generator.uniform(-0.9, 0.9, (40, 2))
    labels, reason = clean(
        np.concatenate([good0, wild0, logo0]),
        np.concatenate([good1, wild1, logo1]),
        CleaningOptions(),
    )
    assert reason is None
    assert labels.dtype == np.float32
    kept = {tuple(row) for row in labels.tolist()}
    good = {tuple(row) for row in np.hstack([good0, good1]).astype(np.float32).tolist()}
    logo = {tuple(row) for row in np.hstack([logo0, logo1]).astype(np.float32).tolist()}
    assert len(kept & good) == 300
    assert not kept & logo
    assert len(kept - good) < 5  # wild ones that lie on their epipolar line by chance

    mask = np.ones((480, 640), bool)
    mask[:, :320] = False
    for side in ("mask0", "mask1"):
        masked, _ = clean(good0, good1, CleaningOptions(), **{side: mask})
        points = masked[:, :2] if side == "mask0" else masked[:, 2:]
        expected = (np.rint(good0 if side == "mask0" else good1)[:, 0] >= 320).sum()
        assert len(masked) == expected
        assert points[:, 0].min() >= 319.5


def test_movement_in_one_direction_is_no_overlay() -> None:
    good0, good1 = two_views(100)
    good1 = good0 + np.array([0.0, 5.0])
    assert len(clean(good0, good1, CleaningOptions())[0]) == 100
    labels, reason = clean(good0, good0 + 0.5, CleaningOptions())
    assert len(labels) == 0
    assert reason == "100 matches, 100 of them still, 0 left"
    assert len(clean(good0, good0 + 0.5, CleaningOptions(static_px=0))[0]) > 90


def test_failures_have_reasons() -> None:
    good0, good1 = two_views(6)
    assert clean(good0, good1, CleaningOptions())[1] == "6 matches, 0 of them still, 6 left"
    good0, good1 = two_views(50)
    labels, reason = clean(good0, good1, CleaningOptions(min_labels=60))
    assert len(labels) == 0
    assert reason == "50 matches, 50 on one epipolar geometry"
    bad = np.full((50, 2), np.nan)
    assert clean(bad, good1, CleaningOptions())[1] == "0 matches, 0 of them still, 0 left"


def test_the_fit_is_the_same_every_time() -> None:
    good0, good1 = two_views(200)
    generator = np.random.default_rng(2)
    wild0, wild1 = generator.uniform(0, 480, (2, 150, 2))
    first, second = np.concatenate([good0, wild0]), np.concatenate([good1, wild1])
    reference, _ = clean(first, second, CleaningOptions())
    for _ in range(3):
        clean(second, first, CleaningOptions())  # something in between
        again, _ = clean(first, second, CleaningOptions())
        np.testing.assert_array_equal(again, reference)


# -------------------------------------------------------------------------------------------- zooms


@pytest.mark.parametrize(
    ("width", "height", "box", "expected"),
    [
        (1920, 1080, (900, 1600), (1600, 896)),
        (300, 200, (900, 1600), (1344, 896)),  # 1350 x 900, cut to multiples of 8
        (100, 400, (900, 1600), (224, 896)),
        (3, 500, (900, 1600), (8, 896)),
    ],
)
def test_zoomed_sizes(
    width: int, height: int, box: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert zoomed_size(width, height, box) == expected


@given(
    st.lists(
        st.tuples(st.floats(-0.5, 99.5), st.floats(-0.5, 79.5)).map(list), min_size=1, max_size=9
    )
)
@settings(max_examples=60, deadline=None)
def test_crops_hold_their_points(points: list[list[float]]) -> None:
    xy = np.array(points)
    left, top, right, bottom = crop_box(xy, (100, 80))
    assert 0 <= left < right <= 100
    assert 0 <= top < bottom <= 80
    inner = xy.clip(0, [99, 79])
    assert (inner >= [left, top]).all()
    assert (inner <= [right - 1, bottom - 1]).all()
    assert left >= np.floor(inner[:, 0].min())
    assert right - 1 <= np.ceil(inner[:, 0].max())


def test_boxes() -> None:
    options = LabellerOptions()
    assert zoom_box("gim_dkm", (1920, 1080), options) == (900, 1600)
    assert zoom_box("gim_dkm", (1080, 1920), options) == (1600, 900)
    assert zoom_box("gim_dkm", (640, 360), options) == (360, 640)
    assert zoom_box("sift", (1920, 1080), options) == (1080, 1920)
    assert zoom_box("sift", (1920, 1080), LabellerOptions(zoom_box=(480, 640))) == (480, 640)


@pytest.mark.parametrize("crop", [(10, 20, 90, 80), (0, 0, 160, 120), (33, 7, 64, 119)])
@pytest.mark.parametrize("box", [(400, 640), (96, 128)])
def test_zoomed_pixels_know_where_they_come_from(
    crop: tuple[int, int, int, int], box: tuple[int, int]
) -> None:
    """In an image whose grey levels are coordinates, every pixel says its own place."""
    x, y = np.meshgrid(np.arange(160.0), np.arange(120.0))
    rgb = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    image = zoomed_image(rgb, crop, box, ImageOptions(max_size=None), name="x")
    seen = image.image.numpy() * 255
    rows, columns = seen.shape[1:]
    u, v = np.meshgrid(np.arange(columns), np.arange(rows))
    points = np.stack([u, v], axis=-1) @ image.to_original[:, :2].T + image.to_original[:, 2]
    # At the borders of the crop, the kernel repeats pixels.
    margin = 4 * int(np.ceil(max(columns / (crop[2] - crop[0]), 1)))
    inner = (slice(margin, -margin), slice(margin, -margin))
    for k in (0, 1):
        # Cubic weights ripple on slopes; a wrong frame would shift them all.
        difference = (seen[k] - points[..., k])[inner]
        assert np.abs(difference).max() < 0.15
        assert abs(np.median(difference)) < 0.02
    assert image.size == (160, 120)


# ------------------------------------------------------------------------------------------- rounds


def test_every_frame_is_encoded_once(clip: Path, tmp_path: Path, fake: type[FakeLabeller]) -> None:
    report = run(clip, tmp_path, small())
    plan = report.plan
    assert plan.frames.tolist() == list(range(0, 24, 2))
    plain = Counter(name for name in fake.encoded if "/" not in name)
    assert plain == Counter(f"{n:08d}.png" for n in range(0, 24, 2))
    zoomed = Counter(name for name in fake.encoded if "/" in name)
    assert set(zoomed.values()) == {1}
    assert len(zoomed) == 2 * len(plan.pairs)
    assert [(r.zoom, r.tried, r.pairs, r.failed) for r in report.rounds] == [
        (zoom, len(plan.pairs), len(plan.pairs), 0) for zoom in (False, True)
    ]
    with LabelStore(report.folder.label_path(FAKE, False)) as store:
        np.testing.assert_array_equal(store.pairs(), sorted(plan.pairs.tolist()))
        assert replace(store.info, settings={}) == StoreInfo(
            video="clip",
            labeller=FAKE,
            zoom=False,
            steps=(2, 4, 8),
            size=(WIDTH, HEIGHT),
            fps=30.0,
            gap=2,
        )
    assert (report.folder.root / "frames.csv").read_text().splitlines()[3] == "4,4,0.133333"
    assert any("12 frames 2 apart" in line for line in report.lines())


def test_labels_are_the_truth(clip: Path, tmp_path: Path) -> None:
    """SIFT on frames whose motion is known, whole and zoomed, half a pixel anywhere would show."""
    options = small(labellers=("sift",), gap=4, steps=(4, 8), limit=4, zoom_box=(300, 400))
    report = run(clip, tmp_path, options)
    for zoom in (False, True):
        with LabelStore(report.folder.label_path("sift", zoom)) as store:
            assert len(store.pairs()) == 5, store.failures()
            for i, j in store.pairs().tolist():
                distance = errors(store, i, j)
                assert len(distance) > 100
                assert np.median(distance) < 0.15
                labels = store.read(i, j)
                near_labels = labels[labels[:, 1] > HEIGHT / 2 + 8]
                shift = np.median(near_labels[:, 2:] - near_labels[:, :2], axis=0)
                np.testing.assert_allclose(shift, -2 * SPEED * (j - i), atol=0.05)


def test_overlays_are_told_in_frame_pixels(tmp_path: Path) -> None:
    """A logo that stays is no label, also where crops of two frames are compared."""
    clip = textured(9, tmp_path / "news", overlay=True)
    found = {}
    for static in (0.0, 1.0):
        options = small(
            labellers=("sift",),
            gap=4,
            steps=(4,),
            static_px=static,
        )
        report = run(clip, tmp_path / str(static), options)
        for zoom in (False, True):
            with LabelStore(report.folder.label_path("sift", zoom)) as store:
                labels = store.read(0, 4)
            still = (np.abs(labels[:, 2:] - labels[:, :2]) < 1).all(axis=1)
            found[static, zoom] = int(still.sum())
    assert found[0.0, False] > 3
    assert found[0.0, True] > 3
    assert found[1.0, False] == found[1.0, True] == 0


def test_masked_frames_give_no_labels_there(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller]
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for n in range(0, 24, 2):
        keep = np.full((HEIGHT, WIDTH), 255, np.uint8)
        keep[:, : WIDTH // 2] = 0
        if n == 6:
            keep[:] = 0
        Image.fromarray(keep).save(masks / f"{n:08d}.png.png")
    options = small(masks=str(masks), mask_erode=2)
    report = run(clip, tmp_path / "out", options)
    for zoom in (False, True):
        with LabelStore(report.folder.label_path(FAKE, zoom)) as store:
            for i, j in store.pairs().tolist():
                assert 6 not in (i, j)
                assert store.read(i, j)[:, [0, 2]].min() >= WIDTH // 2 + 1.5
            reasons = {(i, j): why for i, j, why in store.failures()}
            assert set(reasons) == {p for p in map(tuple, report.plan.pairs.tolist()) if 6 in p}
            assert all("00000006.png is masked as a whole" in why for why in reasons.values())
    # Other masks are other settings, and one may serve all frames.
    report = run(clip, tmp_path / "out", small())
    with LabelStore(report.folder.label_path(FAKE, False)) as store:
        assert store.read(4, 6)[:, 0].min() < WIDTH // 4
    single = small(masks=str(masks / "00000000.png.png"), mask_erode=2)
    other = run(clip, tmp_path / "single", single)
    with LabelStore(other.folder.label_path(FAKE, False)) as store:
        assert store.read(4, 6)[:, [0, 2]].min() >= WIDTH // 2 + 1.5
    with pytest.raises(InputError, match="--masks"):
        prepare_masks([], tmp_path, MaskOptions(masks=str(tmp_path / "nothing")))
    # One that does not fit is told before the labels that are there are begun anew.
    before = stored(other.folder)
    (masks / "odd").mkdir()
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(masks / "odd" / "00000004.png.png")
    for odd in (masks / "odd", masks / "odd" / "00000004.png.png"):
        options = small(masks=str(odd), overwrite=True)
        with pytest.raises(InputError, match="9 x 9"):
            run(clip, tmp_path / "single", options)
    assert stored(other.folder) == before


def test_zoom_rounds_follow_their_base(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller]
) -> None:
    fake.fail_on = {(4, 8)}
    report = run(clip, tmp_path, small(steps=(4,)))
    with LabelStore(report.folder.label_path(FAKE, True)) as store:
        ((i, j, why),) = store.failures()
        assert (i, j) == (4, 8)
        assert why.startswith(f"no plain labels of {FAKE}: error: cannot be matched (")
        assert "ArithmeticError: no answer" in why
    report = run(clip, tmp_path, small(labellers=("sift", FAKE), steps=(4,), zoom_base=FAKE))
    with LabelStore(report.folder.label_path("sift", True)) as store:
        assert "no plain labels" in {(i, j): why for i, j, why in store.failures()}[4, 8]
        assert store.info.settings["zoom_base"] == FAKE
        assert [0, 4] in store.pairs().tolist()
    with pytest.raises(InputError, match="not among the labellers"):
        run(clip, tmp_path, small(zoom_base="gim_dkm"))


def test_failures_stay_and_errors_are_tried_again(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller]
) -> None:
    fake.fail_on = {(0, 2), (10, 18)}
    # Pairs far apart have fewer common points: those fail by what they are.
    first = run(clip, tmp_path, small(zoom=False, min_labels=540))
    (plain,) = first.rounds
    assert 2 < plain.failed < len(first.plan.pairs)
    assert plain.pairs + plain.failed == len(first.plan.pairs)
    fake.fail_on = set()
    fake.encoded.clear()
    second = run(clip, tmp_path, small(zoom=False, min_labels=540))
    assert sorted(fake.encoded) == [f"{n:08d}.png" for n in (0, 2, 10, 18)]
    assert [r.tried for r in second.rounds] == [2]
    again = run(clip, tmp_path, small(zoom=False, min_labels=540, retry_failed=True))
    assert again.rounds == [replace(second.rounds[0], tried=second.rounds[0].failed)]


def test_a_broken_labeller_stops_the_run(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller]
) -> None:
    fake.fail_on = {(i, j) for i in range(24) for j in range(24)}
    with pytest.raises(GimError, match=r"20 pairs in a row.*no answer"):
        run(clip, tmp_path, small(zoom=False))
    fake.fail_on = set()
    report = run(clip, tmp_path, small(zoom=False))
    assert [(r.pairs, r.failed) for r in report.rounds] == [(len(report.plan.pairs), 0)]


def test_other_settings_do_not_mix(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are labelled anew; going back costs nothing."""
    first = run(clip, tmp_path, small(steps=(2,)))
    before = stored(first.folder)
    count = len(first.plan.pairs)
    with pytest.raises(OutputError, match="max_size"):
        run(clip, tmp_path, small(steps=(2,), max_size=100))
    other = run(clip, tmp_path, small(steps=(2,), static_px=20.0))
    assert [r.tried for r in other.rounds] == [count, count]
    assert stored(other.folder) != before
    with monkeypatch.context() as patch:
        entry = replace(registry._entries[FAKE], factory=lambda **_: FakeLabeller(version=2))
        patch.setitem(registry._entries, FAKE, entry)
        assert [r.tried for r in run(clip, tmp_path, small(steps=(2,))).rounds] == [count, count]
    fake.encoded.clear()
    back = run(clip, tmp_path, small(steps=(2,)))
    assert [r.tried for r in back.rounds] == [0, 0]
    assert fake.encoded == []
    assert stored(back.folder) == before
    anew = run(clip, tmp_path, small(steps=(2,), overwrite=True))
    assert [r.tried for r in anew.rounds] == [count, count]
    assert stored(anew.folder) == before
    # More pairs of the same video are no other settings.
    report = run(clip, tmp_path, small(steps=(2, 16)))
    assert [r.tried for r in report.rounds] == [4, 4]
    with LabelStore(report.folder.label_path(FAKE, False)) as store:
        assert store.info.steps == (2, 16)


def test_shards_together_are_the_whole(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller]
) -> None:
    whole = run(clip, tmp_path / "whole", small())
    tried = 0
    for i in (2, 0, 1):
        report = run(clip, tmp_path / "parts", small(shard=f"{i}/3"))
        tried += report.rounds[0].tried
    assert tried == len(whole.plan.pairs)
    assert not report.folder.label_path(FAKE, False).exists()
    fake.encoded.clear()
    merged = run(clip, tmp_path / "parts", small())
    assert fake.encoded == []
    assert stored(merged.folder) == stored(whole.folder)
    names = sorted(p.name for p in merged.folder.labels.iterdir())
    kinds = (FAKE, f"{FAKE}-zoom")
    assert names == sorted(f"{kind}.{ending}" for kind in kinds for ending in ("cache", "h5"))
    # What is finished is not done again by shards.
    again = run(clip, tmp_path / "parts", small(shard="0/2"))
    assert [r.tried for r in again.rounds] == [0, 0]


def test_runs_do_not_meet(clip: Path, tmp_path: Path, fake: type[FakeLabeller]) -> None:
    root = tmp_path / "clip"
    with FolderLock(root):
        for options in (small(), small(shard="0/2")):
            with pytest.raises(LockedError, match=str(root)):
                run(clip, tmp_path, options)
    with FolderLock(root, "shard-0-of-2"):
        for options in (small(), small(shard="0/2")):
            with pytest.raises(LockedError, match=str(root)):
                run(clip, tmp_path, options)
        assert run(clip, tmp_path, small(shard="1/2")).rounds[0].tried > 0


@pytest.mark.parametrize(
    "values",
    [
        {"shard": "2/2"},
        {"shard": "0/2", "overwrite": True},
        {"gap": 0},
        {"steps": ()},
        {"zoom_box": (8, 800)},
        {"labellers": ("sift", "sift")},
    ],
)
def test_bad_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LabelOptions(**values)


def test_labellers_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gim_hloc import weights

    monkeypatch.setattr(weights, "locate", lambda name, download=True: tmp_path / name)
    assert default_labellers() == ("gim_dkm", "gim_loftr", "gim_lightglue", "sift")

    def absent(name: str, download: bool = True) -> Path:
        assert not download
        raise matchers_error(name)

    monkeypatch.setattr(weights, "locate", absent)
    assert default_labellers() == ("aliked_lightglue", "disk_lightglue", "sift")


def matchers_error(name: str) -> Exception:
    from gim_hloc.errors import WeightsError

    return WeightsError(name)


def test_sift_is_the_papers() -> None:
    matcher = labeller("sift", "base", (1920, 1080)).load("cpu")
    assert matcher.options.max_keypoints == 32400
    assert matcher.options.contrast_threshold == 1e-5
    assert matcher.options.ratio == 0.8
    assert isinstance(matcher, matchers.Matcher)


# ----------------------------------------------------------------------------------- killed workers


def _count_records(folder: VideoFolder) -> int:
    """Pairs that are kept, without a writer: a run is at work."""
    total = 0
    for path in folder.labels.glob("*.cache"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as file:
            total += file.execute("SELECT count(*) FROM entries").fetchone()[0]
    return total


def test_killed_and_resumed_equals_uninterrupted(clip: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second round; then the same again."""
    options = small(labellers=("sift",), steps=(2, 4))
    whole = run(clip, tmp_path / "whole", options)
    total = 2 * len(whole.plan.pairs)
    command = [
        *("label", str(clip), str(tmp_path / "killed")),
        *("--labellers", "sift", "--gap", "2", "--steps", "2", "4"),
        *("--masks", "none", "--format", "png"),
    ]
    folder = VideoFolder(tmp_path / "killed" / "clip")
    enough = len(whole.plan.pairs) + 3
    process = forked.start(main, command)
    give_up = time.monotonic() + 300
    while process.exitcode is None and time.monotonic() < give_up:
        if folder.labels.is_dir() and _count_records(folder) >= enough:
            process.kill()
        time.sleep(0.01)
    assert process.exitcode == -signal.SIGKILL
    before = _count_records(folder)
    assert enough <= before < total
    resumed = run(clip, tmp_path / "killed", options)
    assert sum(r.tried for r in resumed.rounds) == total - before
    assert stored(resumed.folder) == stored(whole.folder)
    assert [(r.pairs, r.labels, r.failed) for r in resumed.rounds] == [
        (r.pairs, r.labels, r.failed) for r in whole.rounds
    ]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_give_the_same(clip: Path, tmp_path: Path) -> None:
    options = small(labellers=("sift",), zoom=False)
    whole = run(clip, tmp_path / "whole", options)
    folder = VideoFolder(tmp_path / "two" / "clip")
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            children = multiprocessing.active_children()
            if children and _count_records(folder) >= 3:
                pid = children[0].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    report = run(clip, tmp_path / "two", replace(options, devices=("cpu", "cpu")))
    watcher.join(timeout=1)
    assert killed
    assert stored(report.folder) == stored(whole.folder)


@pytest.mark.slow
def test_workers_on_ray_give_the_same(clip: Path, tmp_path: Path) -> None:
    """Also where folders are given relative to another working folder than the workers'."""
    ray = pytest.importorskip("ray")
    options = small(labellers=("sift",))
    whole = run(clip, tmp_path / "whole", options)
    try:
        with contextlib.chdir(tmp_path):
            report = run(clip, Path("ray"), replace(options, engine="ray", workers=2))
            assert stored(report.folder) == stored(whole.folder)
    finally:
        ray.shutdown()


# -------------------------------------------------------------------------------------- the command


def test_command_frames(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frames", str(clip), str(tmp_path / "images"), "--num", "4"]) == 0
    assert "4 of 24 frames" in capsys.readouterr().out
    assert len(list((tmp_path / "images").glob("clip_*.jpg"))) == 4
    both = ["frames", str(clip), str(tmp_path), "--num", "4", "--fps", "1"]
    with pytest.raises(SystemExit) as left:
        main(both)
    assert left.value.code == 2
    assert "either fps or num" in capsys.readouterr().err


def test_command_label(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller], capsys: pytest.CaptureFixture[str]
) -> None:
    """A list goes on after a video that fails, and says which."""
    listing = tmp_path / "list.txt"
    empty = tmp_path / "empty"
    empty.mkdir()
    listing.write_text(f"{empty}\n{clip}\n")
    out = tmp_path / "out"
    arguments = ["label", str(listing), str(out), "--labellers", FAKE, "--gap", "2", "--no-zoom"]
    arguments += ["--format", "png"]
    assert main([*arguments, "--masks", "none"]) == 2
    told = capsys.readouterr()
    assert "1 of 2 videos failed: empty" in told.err
    assert f"{FAKE}: 29 pairs labelled" in told.out
    assert len(VideoFolder(out / "clip").stores()) == 1
    # For scripts, a line of JSON a video.
    assert main(["label", str(clip), *arguments[2:], "--masks", "none", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["video"], told["rounds"][0]["pairs"], told["rounds"][0]["tried"]) == (
        "clip",
        29,
        0,
    )
    with FolderLock(out / "clip"):
        assert main(["label", str(clip), *arguments[2:], "--masks", "none"]) == 3
        assert main(["propagate", str(out)]) == 3
    with FolderLock(tmp_path / "images"):
        assert main(["frames", str(clip), str(tmp_path / "images")]) == 3
    assert capsys.readouterr().err.count("Another run is working in") == 3
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--shard", "half"])
    assert left.value.code == 2
    assert "--shard is 'half'" in capsys.readouterr().err


def test_command_run(
    clip: Path, tmp_path: Path, fake: type[FakeLabeller], capsys: pytest.CaptureFixture[str]
) -> None:
    """From a clip to propagated labels and pictures; then nothing is left to do."""
    arguments = ["run", str(clip), str(tmp_path), "--labellers", FAKE, "--gap", "2", "--masks"]
    arguments += ["none", "--format", "png", "--min-joined", "20"]
    assert main(arguments) == 0
    folder = VideoFolder(tmp_path / "clip")
    with PropagatedStore(folder.root / "propagated.h5") as store:
        assert len(store) > 0
        for start, target in store.pairs().tolist():
            labels, (i, j) = store.read(start, target)
            steps = (labels[:, 2:] - labels[:, :2]) / (SPEED * (i - j))
            # Planes of speed 1 and 2; this world is transparent, so that points of both may meet in
            # one pixel of a frame and be exchanged there.
            assert np.isclose(steps, np.rint(steps), atol=1e-3).all(axis=1).mean() > 0.9
    assert (folder.root / "show" / "sheet.html").is_file()
    fake.encoded.clear()
    assert main(arguments) == 0
    assert fake.encoded == []
    assert main([*arguments, "--min-final", "100000"]) == 0
    with PropagatedStore(folder.root / "propagated.h5") as store:
        assert len(store) == 0
        assert "100000 are needed" in store.failures()[0][2]
    assert main([*arguments, "--shard", "0/2"]) == 2
    assert "all labels" in capsys.readouterr().err
