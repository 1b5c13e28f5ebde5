"""How the benchmark of mixed folders judges models, and that it says so when places are joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_matcher
import numpy as np
import pytest
import torch
from fake_matcher import FakeMatcher
from PIL import Image
from synthetic import HEIGHT, WIDTH, make_scene

from gim_hloc.colmap import PairVerification
from gim_hloc.evaluation.benchmarks import mixed
from gim_hloc.types import ImageData, Matches, SparseEncoding

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")


def test_models_that_join_places_and_lost_images_are_counted() -> None:
    alone = {"a/1", "a/2", "a/3", "b/1", "b/2"}
    right = mixed.judge([{"a/1", "a/2", "a/3"}, {"b/1", "b/2"}], alone)
    assert right == mixed.Judgement(0, frozenset())
    joined = mixed.judge([{"a/1", "a/2", "b/1"}, {"a/3", "b/2"}, {"a/1", "a/2"}], alone)
    assert joined == mixed.Judgement(2, frozenset())
    # more than alone is no loss, and what alone gives no model cannot be lost
    assert mixed.judge([{"a/1", "a/2", "a/9"}], alone).lost == {"a/3", "b/1", "b/2"}
    assert mixed.judge([], alone).lost == alone


def test_mixes_are_the_same_every_time() -> None:
    found = list(mixed.mixes(["d", "a", "c", "b"], (2, 4), (0, 1, 2)))
    assert found == list(mixed.mixes(["a", "b", "c", "d"], (2, 4), (0, 1, 2)))
    assert [seed for seed, _ in found] == [0, 1, 2, 0, 1, 2]
    assert [len(set(places)) for _, places in found] == [2, 2, 2, 4, 4, 4]


def test_sums_are_told_apart_by_place() -> None:
    pairs = [
        PairVerification(name0="a/1", name1="a/2", matches=99, inliers=95, confidence=90.0),
        PairVerification(name0="a/1", name1="b/x/2", matches=30, inliers=0, confidence=3.0),
    ]
    assert mixed.spread(pairs) == {"related": [90.0], "unrelated": [3.0]}


@pytest.mark.slow
def test_a_bound_that_joins_places_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Places that look alike point by point, between which the matcher is unsure."""
    scene = make_scene(images=4, points=200, names=[f"{i}.jpg" for i in range(4)])
    folders = {"fountain-P11": tmp_path / "s", "cyprus": tmp_path / "s", "room": tmp_path}
    for number, (place, root) in enumerate(folders.items()):
        folder = root / place / "images"
        folder.mkdir(parents=True)
        for i, name in enumerate(scene.names):
            rng = np.random.default_rng(10 * number + i)
            pixels = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
            Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(folder / name)
    monkeypatch.setattr(mixed, "_PLACES", ("fountain-P11", "cyprus"))

    def encode(self: FakeMatcher, image: ImageData) -> SparseEncoding:
        place, name = image.name.split("/")
        ids = torch.from_numpy(scene.points[name])
        descriptors = torch.zeros(len(ids), 16)
        descriptors[:, 0] = ids.float()
        descriptors[:, 1] = float(["room", "cyprus", "fountain-P11"].index(place))
        return SparseEncoding.make(
            name=image.name, size=image.size, network_size=image.network_size,
            to_original=image.to_original, keypoints=torch.from_numpy(scene.keypoints[name]),
            descriptors=descriptors, scores=torch.ones(len(ids)),
        )  # fmt: skip

    sure = FakeMatcher.match

    def match(self: FakeMatcher, a: SparseEncoding, b: SparseEncoding) -> Matches:
        found = sure(self, a, b)
        same = a.descriptors[0, 1] == b.descriptors[0, 1]
        return Matches.from_indices(a, b, found.indices, found.scores * (1 if same else 1 / 16))  # type: ignore[arg-type]

    monkeypatch.setattr(FakeMatcher, "encode", encode)
    monkeypatch.setattr(FakeMatcher, "match", match)

    def run(bound: float) -> tuple[int, list[list[str]]]:
        arguments: list[Any] = [
            "--room", tmp_path / "room", "--shared", tmp_path / "s", "--work", tmp_path / "w",
            "--matchers", "fake", "--mappers", "incremental", "--sizes", 2, 3, "--seeds", 0,
            "--min-confidence-sum", bound,
        ]  # fmt: skip
        code = mixed.main([str(a) for a in arguments])
        lines = capsys.readouterr().out.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| fake")]
        return code, rows

    code, rows = run(50)
    related, unrelated = rows[:2]
    assert related[2:4] == ["18 related", "200.0"]
    assert unrelated[2] == "48 unrelated"
    assert unrelated[-1] == "12.5"
    assert rows[2:] == [
        ["fake", "incremental", "2", "1", "2", "0", "0"],
        ["fake", "incremental", "3", "1", "3", "0", "0"],
    ]
    assert code == 0
    code, rows = run(1)  # what the count of inliers alone does
    assert [row[5] for row in rows[2:]] == ["1", "1"]
    assert code == 1
