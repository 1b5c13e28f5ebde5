"""Pairs are judged by the sum of their inliers' confidences, on scenes whose truth is known."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import fake_matcher
import h5py
import numpy as np
import pycolmap
import pytest
from fake_matcher import SCENE, FakeMatcher, write_images
from synthetic import INTRINSICS, Scene, make_scene

import gim_hloc
from gim_hloc import colmap, matchers
from gim_hloc.errors import InputError, MappingError
from gim_hloc.options import CameraOptions, VerifyOptions
from gim_hloc.pipelines.outcome import confidence_sums
from gim_hloc.pipelines.reconstruct import ReconstructResult
from gim_hloc.types import Matches, SparseEncoding

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")


def two_places() -> tuple[Scene, list[tuple[str, str, np.ndarray, np.ndarray]]]:
    """Three images each of two places: true matches are sure (3/4), and between the places two
    images of the same point cloud pass for each other with 1/16: what facade doubles do."""
    place, other = (
        make_scene(images=3, points=300, seed=seed, names=[f"{letter}{i}.jpg" for i in range(3)])
        for seed, letter in ((0, "a"), (0, "b"))
    )
    scene = place.beside(other, 0)
    entries = [
        (a, b, rows, np.full(len(rows), 3 / 4 if a[0] == b[0] else 1 / 16, np.float32))
        for a, b, rows in scene.all_matches()
    ]
    return scene, entries


def build(scene: Scene, path: Path, entries: Any, **options: Any) -> list[colmap.PairVerification]:
    cameras, _ = colmap.assign_cameras(scene.records(), CameraOptions(intrinsics=INTRINSICS))
    poses = options.pop("poses", None)
    return colmap.build_database(
        path,
        cameras=cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        matches=entries,
        verify=VerifyOptions(**options),
        poses=poses,
        threads=2,
    )


def test_unrelated_places_do_not_verify_and_the_reused_database_knows_why(tmp_path: Path) -> None:
    scene, entries = two_places()
    verified = build(scene, tmp_path / "database.db", entries, min_confidence_sum=40)
    for pair, (_, _, rows, scores) in zip(verified, entries, strict=True):
        same = pair.name0[0] == pair.name1[0]
        assert (pair.inliers > 0, pair.doubtful) == (same, not same)
        assert pair.confidence is not None
        if same:
            assert pair.confidence == 0.75 * pair.inliers >= 40
        else:
            assert pair.confidence == scores.sum() < 40
            assert len(rows) >= 15
    assert colmap.read_verification(tmp_path / "database.db", scene.pairs()) == verified
    # with the count alone the places are one
    counted = build(scene, tmp_path / "count.db", entries)
    assert all(pair.inliers > 250 and not pair.doubtful for pair in counted)
    assert [p.confidence for p in counted] == [
        p.inliers * float(entry[3][0]) for p, entry in zip(counted, entries, strict=True)
    ]


def test_confidences_of_outliers_do_not_count(tmp_path: Path) -> None:
    scene, entries = two_places()
    a, b, rows, _ = entries[0]
    rng = np.random.default_rng(0)
    wrong = np.stack([rng.permutation(len(rows)), rng.permutation(len(rows))], 1)[:100]
    both = np.concatenate([rows, wrong])
    scores = np.r_[np.full(len(rows), 1 / 16), np.ones(100)].astype(np.float32)
    (pair,) = build(scene, tmp_path / "d.db", [(a, b, both, scores)], min_confidence_sum=50)
    assert scores.sum() > 100
    assert (pair.inliers, pair.doubtful) == (0, True)
    # some wrong matches fit the epipolar lines by chance
    assert 0.95 * len(rows) / 16 < pair.confidence < len(rows) / 16 + 20  # type: ignore[operator]


def test_hopeless_pairs_cost_no_estimation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, entries = two_places()
    estimated: list[int] = []
    real = pycolmap.estimate_two_view_geometry

    def estimate(*args: Any) -> Any:
        estimated.append(len(args[4]))
        return real(*args)

    monkeypatch.setattr(pycolmap, "estimate_two_view_geometry", estimate)
    build(scene, tmp_path / "d.db", entries, min_confidence_sum=40)
    assert len(estimated) == sum(a[0] == b[0] for a, b, *_ in entries) == 6


def test_too_few_matches_are_not_called_doubtful(tmp_path: Path) -> None:
    scene, entries = two_places()
    a, b, rows, scores = entries[0]
    cut = [(a, b, rows[:10], scores[:10]), (a, entries[1][1], rows[:0], scores[:0])]
    verified = build(scene, tmp_path / "d.db", cut, min_confidence_sum=40)
    assert [(p.inliers, p.doubtful, p.confidence) for p in verified] == [
        (0, False, 7.5), (0, False, 0.0),
    ]  # fmt: skip


def test_matches_without_scores_keep_the_count(tmp_path: Path) -> None:
    scene, entries = two_places()
    bare = [(a, b, rows) for a, b, rows, _ in entries[:2]]
    verified = build(scene, tmp_path / "d.db", bare, min_confidence_sum=1e6)
    assert all(p.inliers > 250 and p.confidence is None and not p.doubtful for p in verified)
    assert colmap.read_verification(tmp_path / "d.db", [e[:2] for e in bare]) == verified


def test_known_poses_decide_alone(tmp_path: Path) -> None:
    scene, entries = two_places()
    known = {name: scene.poses[name] for name in ("a0.jpg", "a1.jpg", "b0.jpg")}
    verified = build(scene, tmp_path / "d.db", entries, min_confidence_sum=1e6, poses=known)
    for pair in verified:
        both = pair.name0 in known and pair.name1 in known
        assert (pair.inliers > 0) == both
        assert pair.doubtful == (not both)


def test_a_pairs_seed_is_its_own_whatever_is_skipped(tmp_path: Path) -> None:
    scene = make_scene(images=4, points=200, noise_px=1.5)
    rng = np.random.default_rng(0)
    entries = []
    for i, (a, b, rows) in enumerate(scene.all_matches()):
        wrong = np.stack([rng.permutation(len(rows)), rng.permutation(len(rows))], 1)
        rows = np.concatenate([rows, wrong])
        entries.append((a, b, rows, np.full(len(rows), 0.01 if i in (1, 2) else 1.0, np.float32)))
    build(scene, tmp_path / "all.db", entries)
    build(scene, tmp_path / "some.db", entries, min_confidence_sum=40)
    kept = [e[:2] for i, e in enumerate(entries) if i not in (1, 2)]
    for one, other in zip(
        colmap.inlier_matches(tmp_path / "all.db", kept),
        colmap.inlier_matches(tmp_path / "some.db", kept),
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_bound_below_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"verify.min_confidence_sum is -1"):
        VerifyOptions(min_confidence_sum=-1)


# --------------------------------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("confidence") / "images")


def run(images: Path, output: Path, **options: Any) -> ReconstructResult:
    FakeMatcher.calls.clear()
    fixed = {"matcher": "fake", "rescue": "none", "deterministic": True}
    options = {**fixed, "refine_keypoints": False, **options}
    return gim_hloc.reconstruct(images, output, progress=False, **options)


def test_the_matchers_own_number_holds_unless_the_user_sets_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = FakeMatcher.match

    def match(self: FakeMatcher, a: SparseEncoding, b: SparseEncoding) -> Matches:
        found = sure(self, a, b)
        scale = 1 / 4 if SCENE.names[-1] in (a.name, b.name) else 1
        return dataclasses.replace(found, scores=scale * found.scores)

    monkeypatch.setattr(FakeMatcher, "match", match)
    run(images, tmp_path / "o")
    first = json.loads((tmp_path / "o" / "report.json").read_text())
    sums = first["confidence_sums"]
    assert sums["bound"] is None
    assert "one folder with photographs of two places" in sums["advice"]
    expected = [p["inliers"] / (4 if p["name1"] == SCENE.names[-1] else 1) for p in first["pairs"]]
    assert [p["confidence_sum"] for p in first["pairs"]] == expected
    quantiles = np.quantile(expected, sums["quantiles"])
    assert sums["verified"]["values"] == pytest.approx(quantiles, abs=0.051)  # one decimal

    entry = matchers.registry._entries["fake"]
    info = dataclasses.replace(entry.info, min_confidence_sum={"base": 100.0, "fast": 0.0})
    monkeypatch.setitem(matchers.registry._entries, "fake", dataclasses.replace(entry, info=info))
    run(images, tmp_path / "o")
    assert FakeMatcher.calls == []  # the database is made again, the matches are not
    second = json.loads((tmp_path / "o" / "report.json").read_text())
    kept = [p for p in second["pairs"] if p["inliers"]]
    assert kept == [p for p in first["pairs"] if p["name1"] != SCENE.names[-1]]
    assert second["confidence_sums"]["doubtful_pairs"] == 6
    (note,) = [n for n in second["notes"] if "too little confidence" in n]
    assert note.startswith("6 of 21 pairs")
    page = (tmp_path / "o" / "report.html").read_text()
    assert html.escape(note) in page
    assert "at least 100" in page
    (left,) = [r for r in second["images"] if r["status"] != "registered"]
    assert (left["name"], left["status"]) == (SCENE.names[-1], "no_verified_matches")
    assert "confidence" in left["reason"]

    run(images, tmp_path / "o")  # all reused: the report still knows
    third = json.loads((tmp_path / "o" / "report.json").read_text())
    assert third["pairs"] == second["pairs"]
    assert third["notes"] == second["notes"]

    run(images, tmp_path / "o", verify=VerifyOptions(min_confidence_sum=0))
    assert FakeMatcher.calls == []
    assert json.loads((tmp_path / "o" / "report.json").read_text())["pairs"] == first["pairs"]


def test_nothing_is_left_of_a_folder_without_any_confident_pair(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(MappingError, match="Nothing matched"):
        run(images, tmp_path / "o", verify=VerifyOptions(min_confidence_sum=1e6))
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert {r["status"] for r in report["images"]} == {"no_verified_matches"}
    assert all("confidence" in r["reason"] for r in report["images"])


def test_imported_matches_count_unless_the_user_sets_a_bound(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "own")
    for name in ("scored", "bare"):
        with (
            h5py.File(tmp_path / "own" / "matches.h5") as source,
            h5py.File(tmp_path / f"{name}.h5", "w") as file,
        ):

            def copy(path: str, item: Any, file: Any = file, name: str = name) -> None:
                if path.endswith("matches0"):
                    file[path] = item[()]
                elif path.endswith("matching_scores0") and name == "scored":
                    file[path] = item[()] / 16

            source.visititems(copy)
    imported = {
        "features": tmp_path / "own" / "features.h5",
        "pairs": str(tmp_path / "own" / "pairs.txt"),
    }
    bare = run(images, tmp_path / "bare", matches=tmp_path / "bare.h5", **imported)
    assert all(p["inliers"] and p["confidence_sum"] == p["inliers"] for p in bare.report["pairs"])
    assert "1 where it has none" in bare.report["confidence_sums"]["meaning"]
    scored = {"matches": tmp_path / "scored.h5", **imported}
    free = run(images, tmp_path / "scored", **scored)
    assert all(p["confidence_sum"] == p["inliers"] / 16 for p in free.report["pairs"])
    verify = VerifyOptions(min_confidence_sum=len(SCENE.points[SCENE.names[0]]) / 16 + 1)
    with pytest.raises(MappingError):
        run(images, tmp_path / "scored", verify=verify, **scored)


def test_quantiles_of_verified_and_dropped_pairs() -> None:
    def pair(confidence: float | None, inliers: int) -> colmap.PairVerification:
        return colmap.PairVerification(
            name0="a", name1="b", matches=99, inliers=inliers, confidence=confidence,
            doubtful=confidence == 20,
        )  # fmt: skip

    assert confidence_sums([pair(None, 50)], None, "") is None
    sums = confidence_sums([pair(float(c), 50) for c in range(40, 61)] + [pair(20, 0)], 30, "")
    assert sums is not None
    assert sums["verified"] == {"pairs": 21, "values": [40, 41, 45, 50, 55, 59, 60]}
    assert sums["dropped"] == {"pairs": 1, "values": [20] * 7}
    assert (sums["doubtful_pairs"], sums["advice"]) == (1, None)
