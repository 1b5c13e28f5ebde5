"""XFeat's nearest neighbours and XFeat*; keypoints and LighterGlue are in ``test_matchers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_matchers import IDENTITY, as_data, picture, true_fundamental

from gim_hloc import images, matchers
from gim_hloc.hloc_plugin import confs, models
from gim_hloc.matchers import nearest, registry, xfeat

pytestmark = pytest.mark.weights


def unit(count: int, seed: int, width: int = 64) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("counts", [(1300, 700), (3, 1100), (1, 1), (0, 5), (5, 0)])
def test_mutual_nearest_and_rivals(counts: tuple[int, int]) -> None:
    """Blocks change nothing: the whole matrix, sorted, says the same."""
    a, b = unit(counts[0], 0), unit(counts[1], 1)
    index, cosine = nearest.mutual_nearest(a, b)
    whole = (a @ b.T).double()
    if 0 in counts:
        assert index.shape == (0, 2)
        assert cosine.shape == (0,)
        return
    expected = [(i, j) for i, j in enumerate(whole.argmax(1).tolist()) if whole[:, j].argmax() == i]
    assert index.tolist() == [list(pair) for pair in expected]
    assert torch.allclose(cosine.double(), whole[tuple(index.T)], atol=1e-6)
    rival = nearest.rivals(a[index[:, 0]], b, index[:, 1])
    if counts[1] == 1:
        assert nearest.distance(rival).tolist() == [2.0] * len(index)
    else:
        second = whole[index[:, 0]].topk(2).values[:, 1]
        assert torch.allclose(rival.double(), second, atol=1e-6)
    either = rival.maximum(nearest.rivals(b[index[:, 1]], a, index[:, 0]))
    growing = nearest.Nearest(a, b)
    for most in (1, 2, 300, 301, 900, None):
        more = growing.among(most)
        alone = nearest.Nearest(a[:most], b[:most]).among()
        assert torch.equal(more[0], alone[0])
        assert all(
            torch.allclose(one, other, atol=1e-6) for one, other in zip(more, alone, strict=True)
        )
    assert torch.equal(more[0], index)
    assert torch.allclose(more[1], cosine, atol=1e-6)
    assert torch.allclose(more[2], either, atol=1e-6)


def test_equal_descriptors_are_matched_once() -> None:
    a, b = unit(4, 2), unit(4, 3)
    a[1], b[:] = a[0], a[0]
    assert nearest.mutual_nearest(a, b)[0].tolist() == [[0, 0]]


def sparse(descriptors: torch.Tensor) -> matchers.SparseEncoding:
    count = len(descriptors)
    return matchers.SparseEncoding.make(
        name="a", size=(64, 64), network_size=(64, 64), to_original=IDENTITY,
        keypoints=torch.rand(count, 2) * 63, descriptors=descriptors, scores=torch.ones(count),
    )  # fmt: skip


def test_the_ratio_holds_in_both_images() -> None:
    """A repeated thing in either image makes a match unsure; the confidence says how unsure."""
    clear, twin = unit(2, 4)
    other = F.normalize(twin + 0.5 * unit(1, 5)[0], dim=0)
    between = F.normalize(0.52 * twin + 0.48 * other, dim=0)  # ratio 0.92
    one, two = sparse(torch.stack([clear, between])), sparse(torch.stack([clear, twin, other]))
    matcher = matchers.load("xfeat", device="cpu")
    free = matchers.load("xfeat", device="cpu", ratio=1.0)
    for a, b in ((one, two), (two, one)):
        assert matcher.match(a, b).indices.tolist() == [[0, 0]]
        found = free.match(a, b)
        assert found.indices.tolist() == [[0, 0], [1, 1]]
        assert found.scores[0] > 0.99
        assert 0.3 < found.scores[1] < 0.6


def test_a_low_cosine_is_no_match() -> None:
    a, b = unit(50, 7), unit(50, 8)
    assert len(matchers.load("xfeat", device="cpu").match(sparse(a), sparse(b))) == 0


def test_all_keypoints_are_compared_where_the_strongest_leave_it_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    class Counted(nearest.Nearest):
        def among(self, most: int | None = None) -> Any:
            compared.append(most)
            return super().among(most)

    monkeypatch.setattr(xfeat, "Nearest", Counted)
    one, other = unit(3000, 10), unit(3000, 11)
    again = F.normalize(one + 0.02 * unit(3000, 12))
    matcher = matchers.load("xfeat", device="cpu")
    assert len(matcher.match(sparse(one), sparse(other))) < 8
    assert compared == [1024]
    assert len(matcher.match(sparse(one), sparse(again))) == 3000
    assert compared == [1024, 1024, 2048, 3000]
    assert len(matcher.match(sparse(one[:2000]), sparse(again[:50]))) == 50
    assert compared[4:] == [1024, 2048]
    few = torch.cat([again[:10], other[10:]])  # enough for 1024 keypoints, not for 2048
    assert len(matcher.match(sparse(one), sparse(few))) == 10
    assert compared[6:] == [1024, 2048]
    for enough, found in ((1000, 1024), (1500, 2048), (2500, 3000)):
        matcher = matchers.load("xfeat", device="cpu", enough=enough)
        assert len(matcher.match(sparse(one), sparse(again))) == found
    assert matchers.load("xfeat", device="cpu", quality="fast").options.enough == 300


def test_lightglue_leaves_out_what_has_nothing_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = unit(900, 13, 128), unit(900, 14, 128)
    again = F.normalize(one + 0.02 * unit(900, 15, 128))
    matcher = matchers.load("aliked_lightglue", device="cpu")
    asked = []

    def match(pairs: list) -> list:
        asked.append(len(pairs))
        return [(torch.tensor([[0, 0]]), torch.ones(1))] * len(pairs)

    monkeypatch.setattr(matcher.glue, "match", match)
    assert len(matcher.match(sparse(one), sparse(other))) == 0
    assert asked == []
    assert len(matcher.match(sparse(one), sparse(again))) == 1
    everything = matchers.load("aliked_lightglue", quality="precise", device="cpu")
    monkeypatch.setattr(everything.glue, "match", match)
    assert len(everything.match(sparse(one), sparse(other))) == 1
    assert asked == [1, 1]


@pytest.fixture(scope="module")
def star() -> matchers.Matcher:
    return matchers.load("xfeat_star", device="cpu", max_cells=1200)


def test_star_finds_shifts(star: matchers.Matcher) -> None:
    """The network pulls offsets to the middle of the cell, but not to one side.

    Published coordinates of the two images differ by 0.8 to 1.7 px.
    """
    full = picture(512, 400)
    a = star.encode(as_data(full[40:360, 40:456], star))
    medians = []
    for dx, dy in ((0, 0), (3, 5), (-6, 2), (5, -3), (-3, -7), (8, 1), (-11, 9)):
        b = star.encode(as_data(full[40 + dy : 360 + dy, 40 + dx : 456 + dx], star))
        for first, second, sign in ((a, b, -1), (b, a, 1)):
            found = star.match(first, second)
            assert len(found) > 300
            assert found.indices is None
            assert ((found.scores > 0.25) & (found.scores <= 1)).all()
            error = found.keypoints1 - found.keypoints0 - sign * torch.tensor([dx, dy])
            assert error.norm(dim=1).median() < 1.5
            medians.append(sign * error.median(0).values)
            if sign < 0:
                forth = error.median(0).values
        # What is on one side's account changes sign with the order of the images.
        assert (forth + error.median(0).values).abs().max() < 0.4
    assert torch.stack(medians).mean(0).abs().max() < 0.3


def test_keypoints_of_a_reduced_copy_have_no_offset() -> None:
    """As in ``test_matchers``; XFeat is not made for a factor of two."""
    matcher = matchers.load("xfeat", device="cpu")
    big = picture(512, 416)
    small = cv2.resize(big, (384, 312), interpolation=cv2.INTER_AREA)
    to_original = np.array([[4 / 3, 0, 1 / 6], [0, 4 / 3, 1 / 6]])
    a = matcher.encode(as_data(big, matcher))
    b = matcher.encode(as_data(small, matcher, to_original, (512, 416)))
    found = matcher.match(a, b)
    offset = found.keypoints1 - found.keypoints0
    offset = offset[offset.norm(dim=1) < 1.5]
    assert len(offset) > 60
    assert offset.mean(0).abs().max() < 0.15


def test_star_in_the_frame_of_the_file(star: matchers.Matcher) -> None:
    """A copy of half the size gives the stored picture's coordinates, in either place."""
    big = picture(512, 416)
    small = cv2.resize(big, (256, 208), interpolation=cv2.INTER_AREA)
    half = np.array([[2.0, 0, 0.5], [0, 2.0, 0.5]])
    a = star.encode(as_data(big, star))
    b = star.encode(as_data(small, star, half, (512, 416)))
    for first, second in ((a, b), (b, a)):
        found = star.match(first, second)
        error = found.keypoints1 - found.keypoints0
        error = error[error.norm(dim=1) < 4]
        assert len(error) > 60
        assert error.median(0).values.abs().max() < 0.6


def test_star_heeds_masks_and_takes_any_image(star: matchers.Matcher) -> None:
    full = star.encode(as_data(picture(), star))
    mask = np.zeros((192, 256), bool)
    mask[:, 128:] = True
    masked = star.encode(as_data(picture(), star, mask=mask))
    found = star.match(masked, full)
    assert len(found) > 20
    assert (found.keypoints0[:, 0] > 127).all()
    for size in ((1, 1), (3, 40), (33, 31)):
        tiny = as_data(np.random.default_rng(0).random((*size, 3)), star)
        for pair in ((star.encode(tiny), full), (full, star.encode(tiny))):
            assert star.match(*pair).keypoints0.shape[1] == 2
    flat = star.encode(as_data(np.full((96, 160, 3), 0.5, np.float32), star))
    assert len(star.match(flat, full)) < 5


@pytest.mark.parametrize("name", ["gim_hloc_xfeat", "gim_hloc_xfeat_lighterglue"])
def test_hlocs_models_find_what_the_matcher_finds(name: str) -> None:
    full = picture(416, 320)
    crops = [full[:256, 64:384], full[32:288, 32:352]]
    conf = {**confs.MATCH_FEATURES[name]["model"], "device": "cpu"}
    matcher = matchers.load(conf["matcher"], device="cpu", max_keypoints=4096)
    extractor, pairs = models.ExtractorModel(), models.SparseMatcherModel()
    extractor._init({**confs.EXTRACT_FEATURES["gim_hloc_xfeat"]["model"], "device": "cpu"})
    pairs._init(conf)
    data = {}
    for side, crop in enumerate(crops):
        image = torch.from_numpy(crop.transpose(2, 0, 1).copy())[None]
        found = extractor._forward({"image": image})
        data |= {f"{key}{side}": value for key, value in found.items()} | {f"image{side}": image}
    rows = pairs._forward(data)["matches0"][0]
    expected = matcher.match(*(matcher.encode(as_data(crop, matcher)) for crop in crops)).indices
    assert len(expected) > 100
    assert torch.equal(torch.stack([(rows >= 0).nonzero()[:, 0], rows[rows >= 0]], 1), expected)


def test_real_pair_read_at_anchors(data: Path) -> None:
    """XFeat* of two photographs obeys the measured poses."""
    folder = data / "fountain-P11"
    matcher = registry.load("xfeat_star", device="cpu", quality="fast")
    names = ["0004.jpg", "0005.jpg"]
    records = {record.name: record for record in images.scan(folder / "images").images}
    found = matcher.match(
        *(matcher.encode(images.load(records[n], matcher.image_options)) for n in names)
    )
    fundamental = true_fundamental(folder / "gt", *names)
    one = torch.ones(len(found), 1, dtype=torch.float64)
    x0, x1 = (torch.cat([k.double() + 0.5, one], 1) for k in (found.keypoints0, found.keypoints1))
    line = x0 @ fundamental.T
    distance = (x1 * line).sum(1).abs() / line[:, :2].norm(dim=1)
    assert len(found) > 700
    assert distance[distance < 4].median() < 0.6
    assert (distance < 4).double().mean() > 0.8
