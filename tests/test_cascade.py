"""Stronger matchers for what the first one leaves in doubt, and for what mapping lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_matcher
import h5py
import numpy as np
import pycolmap
import pytest
import torch
from fake_matcher import SCENE, FakeMatcher, write_images
from PIL import Image
from synthetic import INTRINSICS, camera_errors, make_scene

import gim_hloc
from gim_hloc import colmap
from gim_hloc.geometry.graph import connected, hops
from gim_hloc.pairs import read_pairs
from gim_hloc.pipelines import cascade, methods
from gim_hloc.pipelines.reconstruct import ReconstructResult
from gim_hloc.types import ImageData, Matches, SparseEncoding

pytestmark = pytest.mark.usefixtures("no_charts")
LOST = SCENE.names[3:5]  # neighbours: what matches them is across as well as between them


class Forgetful(FakeMatcher):
    """Knows the answer, but not of all images, and not with every keypoint."""

    name = "fake_forgetful"

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        matches = super().match(a, b)
        few = 8 if {a.name, b.name}.intersection(LOST) else len(matches)
        assert matches.indices is not None
        return Matches.from_indices(a, b, matches.indices[:few], matches.scores[:few])


class Careful(Forgetful):
    """Matches the same keypoints, all of them."""

    name = "fake_careful"

    def encode_settings(self) -> dict[str, Any]:
        return {**super().encode_settings(), "matcher": Forgetful.name}

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        return FakeMatcher.match(self, a, b)


class Strong(FakeMatcher):
    """Has keypoints of its own: the points in another order, every fourth left out."""

    name = "fake_strong"

    def encode(self, image: ImageData) -> SparseEncoding:
        found = super().encode(image)
        kept = torch.arange(len(found)).flip(0)
        kept = kept[found.descriptors[kept, 0].int() % 4 != 0]
        return SparseEncoding.make(
            name=found.name, size=found.size, network_size=found.network_size,
            to_original=found.to_original, keypoints=found.keypoints[kept],
            descriptors=found.descriptors[kept], scores=found.scores[kept],
        )  # fmt: skip


# Two places, photographed 8 times each from nearly one spot; 60 of 190 points are seen from both.
PLACES = make_scene(
    images=16, points=190, arc_deg=30, names=[f"{7919 * i**3 % 99991:05x}.jpg" for i in range(16)]
)
for k, name in enumerate(list(PLACES.names)):
    seen = PLACES.points[name] < 125 if k < 8 else PLACES.points[name] >= 65
    PLACES.points[name], PLACES.keypoints[name] = (
        PLACES.points[name][seen],
        PLACES.keypoints[name][seen],
    )


class OfPlaces(FakeMatcher):
    """Knows the answer for two places, with descriptors that retrieval can tell apart."""

    name = "fake_places"

    def encode(self, image: ImageData) -> SparseEncoding:
        self.calls.append(image.name)
        ids = PLACES.points[image.name]
        looks = np.random.default_rng(0).normal(size=(190, 16)).astype(np.float32)
        return SparseEncoding.make(
            name=image.name, size=image.size, network_size=image.network_size,
            to_original=image.to_original, scores=torch.ones(len(ids)),
            keypoints=torch.from_numpy(PLACES.keypoints[image.name]),
            descriptors=torch.from_numpy(looks[ids]),
        )  # fmt: skip

    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        self.calls.append(f"{a.name}|{b.name}")
        indices = torch.from_numpy(PLACES.matches(a.name, b.name).astype(np.int64))
        return Matches.from_indices(a, b, indices, torch.ones(len(indices)))


for kind in (FakeMatcher, Forgetful, Careful, Strong, OfPlaces):
    fake_matcher.register(kind)


@pytest.fixture(autouse=True)
def _levels(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ("fake_forgetful", "fake_careful", "fake_strong")
    monkeypatch.setitem(methods.CASCADES, "cascade", levels)
    monkeypatch.setattr(cascade, "STRONGEST", ("fake_strong",))
    FakeMatcher.calls.clear()


def run(folder: Path, **options: Any) -> ReconstructResult:
    images = folder / "images"
    if not images.is_dir():
        write_images(images)
    fixed = {"intrinsics": INTRINSICS, "refine_keypoints": False, "rotations": "none"}
    output = options.pop("output", folder / "out")
    return gim_hloc.reconstruct(images, output, progress=False, **{**fixed, **options})


def of_places(folder: Path, **options: Any) -> ReconstructResult:
    images = folder / "images"
    if not images.is_dir():
        write_images(images, PLACES)
    return run(folder, rescue="none", pair={"exhaustive_limit": 15}, **options)


def joined(output: Path) -> tuple[int, list[int]]:
    """Pairs of a database, and sizes of the groups that those with inliers connect."""
    pairs = read_pairs(output / "pairs.txt", PLACES.names)
    found = colmap.read_verification(output / "database.db", pairs)
    good = [(pair.name0, pair.name1) for pair in found if pair.inliers]
    assert len(found) == len(pairs)
    return len(pairs), [len(group) for group in connected(PLACES.names, good)]


def matched() -> list[str]:
    return [call for call in FakeMatcher.calls if "|" in call]


def poses(result: ReconstructResult) -> dict[str, Any]:
    return dict(colmap.poses_of(result.model()))


def database_rows(output: Path, name: str) -> np.ndarray:
    with pycolmap.Database.open(output / "database.db") as database:
        image = database.read_image_with_name(name)
        return np.asarray(database.read_keypoints(image.image_id))[:, :2]


def test_what_mapping_lost_is_rescued_into_the_model(tmp_path: Path) -> None:
    without = run(tmp_path, matcher="fake_forgetful", rescue="none", output=tmp_path / "without")
    assert without.registered == len(SCENE.names) - len(LOST)
    before = {n: database_rows(tmp_path / "without", n) for n in SCENE.names}

    result = run(tmp_path, matcher="fake_forgetful")
    assert result.registered == len(SCENE.names)
    rotation, centre = camera_errors(poses(result), SCENE.poses)
    assert max(rotation / 0.01, centre / 1e-3) < 1
    # The first matcher's files are as they were, and its rows come first everywhere.
    with h5py.File(tmp_path / "out" / "features.h5") as file:
        for name in SCENE.names:
            own = file[name]["keypoints"][()]
            rows = database_rows(tmp_path / "out", name)
            np.testing.assert_array_equal(rows[: len(before[name])], before[name])
            np.testing.assert_allclose(own, before[name] - 0.5, atol=1e-4)
            in_model = next(i for i in result.model().images.values() if i.name == name)
            xy = np.array([point.xy for point in in_model.points2D])
            np.testing.assert_allclose(xy, rows)
    rescued = result.report["rescue"]
    assert (rescued["matcher"], rescued["images"]) == ("fake_strong", LOST)
    assert any("fake_strong" in note and LOST[0] in note for note in result.report["notes"])


def test_a_rescue_is_not_made_twice_and_not_where_nothing_is_lost(tmp_path: Path) -> None:
    first = run(tmp_path, matcher="fake_forgetful")
    model = (tmp_path / "out" / "sparse" / "0" / "images.bin").read_bytes()
    FakeMatcher.calls.clear()
    again = run(tmp_path, matcher="fake_forgetful")
    assert FakeMatcher.calls == []
    assert (tmp_path / "out" / "sparse" / "0" / "images.bin").read_bytes() == model
    assert again.report["rescue"] == first.report["rescue"]

    whole = run(tmp_path, matcher="fake", output=tmp_path / "whole")
    assert whole.report["rescue"] is None
    assert not (tmp_path / "whole" / ".run" / "layers").exists()


def test_images_that_show_nothing_of_the_scene_stay_out(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    other = np.random.default_rng(9).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(other).save(tmp_path / "images" / "zz other.png")
    result = run(tmp_path, matcher="fake", camera_mode="image", intrinsics=None)
    assert result.registered == len(SCENE.names)
    status = {row["name"]: row["status"] for row in result.report["images"]}
    assert status["zz other.png"] != "registered"
    assert matched().count(f"{SCENE.names[0]}|zz other.png") == 2  # it was tried
    assert result.report["rescue"] is None
    for row in result.report["images"]:
        assert row["keypoints"] == len(database_rows(tmp_path / "out", row["name"]))
    FakeMatcher.calls.clear()
    again = run(tmp_path, matcher="fake", camera_mode="image", intrinsics=None)
    assert FakeMatcher.calls == []
    assert again.report["rescue"] is None


def test_a_rescue_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match, done = Strong.match, []

    def stopped(self: Strong, a: SparseEncoding, b: SparseEncoding) -> Matches:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(f"{a.name}|{b.name}")
        return match(self, a, b)

    monkeypatch.setattr(Strong, "match", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, matcher="fake_forgetful", threads=1)
    monkeypatch.setattr(Strong, "match", match)
    FakeMatcher.calls.clear()
    result = run(tmp_path, matcher="fake_forgetful", threads=1)
    assert result.registered == len(SCENE.names)
    assert not set(done).intersection(matched())
    whole = run(tmp_path, matcher="fake_forgetful", threads=1, output=tmp_path / "whole")
    for name in SCENE.names:
        np.testing.assert_array_equal(
            database_rows(tmp_path / "out", name), database_rows(tmp_path / "whole", name)
        )
    assert whole.report["pairs"] == result.report["pairs"]


def test_imported_matches_make_no_cascade(tmp_path: Path) -> None:
    run(tmp_path, matcher="fake", rescue="none", output=tmp_path / "first")
    first = tmp_path / "first"
    result = run(
        tmp_path, quality="fast", pairs=str(first / "pairs.txt"), matcher="cascade",
        features=first / "features.h5", matches=first / "matches.h5",
    )  # fmt: skip
    assert result.registered == len(SCENE.names)
    assert result.report["rescue"] is None


def test_a_folder_of_two_places_is_not_matched_anew() -> None:
    places = {name: k % 2 for k, name in enumerate("abcdefgh")}
    pairs = [(a, b) for a in places for b in places if a < b]
    sums = {(a, b): 10.0 * (places[a] == places[b]) for a, b in pairs}
    raw = {pair: value + 0.1 for pair, value in sums.items()}
    weak = cascade._weak(list(places), sums, cascade.CLEAR)
    assert weak == set()
    likely = cascade._likely(list(places), sums, raw, weak, cascade.CLEAR)
    assert len(likely) == cascade.JOINTS
    assert all(places[a] != places[b] for a, b in likely)


def test_a_cascade_asks_the_next_matcher_only_where_there_is_doubt(tmp_path: Path) -> None:
    result = run(tmp_path, matcher="cascade", rescue="none")
    assert result.registered == len(SCENE.names)
    rotation, centre = camera_errors(poses(result), SCENE.poses)
    assert max(rotation / 0.01, centre / 1e-3) < 1
    calls = matched()
    every = len(SCENE.names) * (len(SCENE.names) - 1) // 2
    again = [call for call in set(calls) if calls.count(call) > 1]
    assert len(set(calls)) == every
    assert again
    assert all(set(call.split("|")).intersection(LOST) for call in again)
    # The same keypoints were matched anew: there are no others.
    layers = [path.name for path in (tmp_path / "out" / ".run" / "layers").iterdir()]
    assert layers == ["fake_careful-base"]
    for name in SCENE.names:
        assert len(database_rows(tmp_path / "out", name)) == len(SCENE.keypoints[name])
    FakeMatcher.calls.clear()
    assert run(tmp_path, matcher="cascade", rescue="none").registered == len(SCENE.names)
    assert FakeMatcher.calls == []


def test_a_cascade_goes_on_to_other_keypoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Careful, "match", Forgetful.match)
    result = run(tmp_path, matcher="cascade", rescue="none")
    assert result.registered == len(SCENE.names)
    rotation, centre = camera_errors(poses(result), SCENE.poses)
    assert max(rotation / 0.01, centre / 1e-3) < 1


def test_pairs_go_where_the_graph_is_weak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.CASCADES, "cascade", ("fake_places",) * 3)
    monkeypatch.setattr(sys.modules["gim_hloc.pairs.select"], "FEWEST", 6)
    even, out = tmp_path / "even", tmp_path / "out"
    of_places(tmp_path, matcher="fake_places", stop_after="verify", output=even)
    budget, groups = joined(even)
    assert groups == [8, 8]  # the 6 most similar images are of the same place

    of_places(tmp_path, matcher="cascade", stop_after="rotations")  # as an array of jobs does
    half = read_pairs(out / "pairs.txt", PLACES.names)
    assert set(half) < set(read_pairs(even / "pairs.txt", PLACES.names))
    FakeMatcher.calls.clear()
    result = of_places(tmp_path, matcher="cascade")
    count, groups = joined(out)
    assert (groups, count <= budget) == ([16], True)
    assert len(matched()) == count - len(half)
    assert result.registered == 16
    rotation, centre = camera_errors(poses(result), PLACES.poses)
    assert max(rotation / 0.01, centre / 1e-3) < 1
    selection = result.report["pair_selection"]
    assert sum(selection["counts"].values()) == count
    notes = [note for note in result.report["notes"] if "to join groups of images" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"Of {count} pairs, {len(half)} were chosen before")

    FakeMatcher.calls.clear()
    again = of_places(tmp_path, matcher="cascade")
    assert FakeMatcher.calls == []
    assert again.report["pair_selection"] == selection
    assert again.report["pairs"] == result.report["pairs"]
    assert notes[0] in again.report["notes"]
    # Another verification may find other places weak; what was asked for stays as asked for.
    of_places(tmp_path, matcher="cascade", stop_after="verify", verify={"min_num_inliers": 61})
    assert joined(out)[1] == [8, 8]
    of_places(tmp_path, matcher="cascade", stop_after="pairs", pairs="retrieval")
    assert read_pairs(out / "pairs.txt", PLACES.names) == read_pairs(
        even / "pairs.txt", PLACES.names
    )


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([], [1, 1, 1, 1]), ([("a", "b"), ("c", "b")], [3, 1]), ([("a", "d"), ("b", "c")], [2, 2])],
)
def test_what_pairs_connect(pairs: Sequence[tuple[str, str]], expected: list[int]) -> None:
    assert [len(group) for group in connected(["a", "b", "c", "d"], pairs)] == expected


def test_hops_between_names() -> None:
    every = [(a, b) for a in "abcd" for b in "abcd" if a < b]
    assert hops("abcd", every).tolist() == (1 - np.eye(4)).tolist()
    apart = hops("abcd", [("a", "b"), ("b", "c")])
    assert apart[0].tolist() == [0, 1, 2, np.inf]
