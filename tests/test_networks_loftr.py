"""LoFTR's parts against plain definitions, and the whole against kornia's LoFTR."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import filled

from gim_hloc.matchers.loftr import make_network
from gim_hloc.networks import loftr
from gim_hloc.networks.loftr import Cells, Features, LoFTR


@functools.lru_cache(maxsize=1)
def network() -> LoFTR:
    model = LoFTR()
    keys = {
        f"model.{key}": [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in model.state_dict().items()
    }
    state = filled.fill_state_dict("gim_loftr", keys)
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    return model.eval().requires_grad_(False)


def pattern(height: int, width: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(
        1, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed)
    )
    return F.interpolate(noise, scale_factor=8, mode="bicubic")[..., :height, :width].clamp(0, 1)


def dense_matches(
    x0: torch.Tensor,
    x1: torch.Tensor,
    threshold: float,
    mask0: torch.Tensor | None = None,
    mask1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64: rows (pair, cell 0, cell 1) and confidences."""
    similarity = loftr.similarities(x0.double(), x1.double())
    if mask0 is not None and mask1 is not None:
        similarity = similarity.masked_fill(~(mask0[:, :, None] & mask1[:, None]), -1e9)
    confidence = similarity.softmax(1) * similarity.softmax(2)
    keep = confidence > threshold
    keep &= confidence == confidence.amax(1, keepdim=True)
    keep &= confidence == confidence.amax(2, keepdim=True)
    return keep.nonzero(), confidence[keep]


def related(batch: int, length: int, size: int, scale: float, seed: int = 0) -> Any:
    """Features of which many rows have a partner."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(batch, length, 256, generator=generator) * scale
    x1 = torch.randn(batch, size, 256, generator=generator) * scale
    common = min(length, size) * 2 // 3
    order = torch.randperm(size, generator=generator)[:common]
    x1[:, order] = x0[:, :common] + x1[:, order] * 0.7
    return x0, x1


@pytest.mark.parametrize("scale", [0.8, 1.3, 4.0])  # the last one needs the exact way
@pytest.mark.parametrize("block", [1, 40_000, None])
@pytest.mark.parametrize("masks", [False, True])
def test_matching_in_blocks_is_dual_softmax(scale: float, block: int | None, masks: bool) -> None:
    x0, x1 = related(2, 90, 70, scale)
    mask0 = mask1 = None
    if masks:
        mask0 = torch.ones(2, 90, dtype=torch.bool)
        mask1 = torch.ones(2, 70, dtype=torch.bool)
        mask0[0, 10:40], mask1[1, 5:60], mask0[1, :16] = False, False, False
        x0[~mask0] *= 30  # what lies outside must not matter, even where it would overflow
    for threshold in (0.2, 0.01):
        rows, confidence = dense_matches(x0, x1, threshold, mask0, mask1)
        cells = loftr.mutual_matches(x0, x1, threshold, mask0=mask0, mask1=mask1, block_bytes=block)
        assert len(rows) > 5
        assert torch.equal(torch.stack(cells[:3], 1), rows)
        assert torch.allclose(cells.confidence.double(), confidence, atol=2e-4 * max(1, scale))


def test_rows_of_very_different_size_share_a_block() -> None:
    """A column's sum has terms of rows whose own maximum is e^100 times as large."""
    x0, x1 = related(1, 60, 60, 1.0)
    x0[:, 45:] *= 15
    rows, confidence = dense_matches(x0, x1, 0.1)
    for block in (1, None):  # between blocks, and inside one
        cells = loftr.mutual_matches(x0, x1, 0.1, block_bytes=block)
        assert torch.equal(torch.stack(cells[:3], 1), rows)
        assert torch.allclose(cells.confidence.double(), confidence, atol=2e-4)


def test_equal_partners_give_one_match() -> None:
    x0, x1 = related(1, 30, 30, 1.0)
    x1 = torch.cat([x1, x1], 1)  # every partner twice: confidence 1/2 each
    cells = loftr.mutual_matches(x0, x1, 0.2)
    assert len(cells.index0) == len(set(cells.index0.tolist())) >= 15
    single = loftr.mutual_matches(x0, x1[:, :30], 0.2)
    partner = dict(zip(single.index0.tolist(), single.index1.tolist(), strict=True))
    for here, there in zip(cells.index0.tolist(), cells.index1.tolist(), strict=True):
        assert partner[here] == there % 30


def test_nothing_to_match() -> None:
    x0, x1 = torch.zeros(1, 40, 256), torch.zeros(1, 40, 256)
    assert len(loftr.mutual_matches(x0, x1, 0.2).batch) == 0
    none = torch.zeros(1, 40, dtype=torch.bool)
    x0, x1 = related(1, 40, 40, 1.0)
    assert len(loftr.mutual_matches(x0, x1, 0.2, mask0=none).batch) == 0
    assert len(loftr.mutual_matches(x0, x1, 0.2, mask1=none).batch) == 0
    x0, x1 = related(1, 2, 3, 1.0)
    assert len(loftr.mutual_matches(x0, x1, 0.2, mask1=none[:, :3]).batch) == 0


def test_positions() -> None:
    published = loftr.positions(5, 300, "published")
    corrected = loftr.positions(5, 300, "corrected")
    assert published.shape == (256, 5, 300)  # beyond the 256 cells of the original's table
    for table, step in ((published, 1.0), (corrected, math.log(10000) / 128)):
        for m in (0, 1, 7, 63):
            w = math.exp(-2 * m * step)
            x, y = 280, 3  # counted from 1
            got = table[4 * m : 4 * m + 4, y - 1, x - 1].tolist()
            expected = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
            assert got == pytest.approx(expected, abs=2e-5)
    assert not torch.allclose(published[4], corrected[4], atol=0.1)


def test_windows_are_those_of_unfold() -> None:
    fine = torch.rand(2, 16, 4 * 6, 4 * 5)
    windows = F.unfold(fine, 5, padding=2, stride=4).view(2, 16, 25, -1)
    batch, index = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 29, 13, 4])
    got = loftr._windows(fine.permute(0, 2, 3, 1), batch, index, (6, 5))
    for row in range(4):
        assert torch.equal(got[row], windows[batch[row], :, :, index[row]].T)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (-2, 1), (2, -2)])
def test_the_heat_map_points_to_where_the_centre_went(dx: int, dy: int) -> None:
    windows0 = torch.randn(1, 25, 128, generator=torch.Generator().manual_seed(1))
    windows1 = torch.randn(1, 25, 128, generator=torch.Generator().manual_seed(2)) * 0.1
    windows1[0, (dy + 2) * 5 + dx + 2] = windows0[0, 12] * 20
    x, y, deviation = loftr.window_expectation(windows0, windows1)[0].tolist()
    assert (x * 2, y * 2) == pytest.approx((dx, dy), abs=1e-3)
    assert deviation < 0.02


def test_offsets_are_fine_cells_of_two_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    a = network().encode(pattern(96, 128))
    offset = torch.tensor([0.5, -1.0, 0.1])
    monkeypatch.setattr(network(), "refine", lambda *args: offset.repeat(len(args[4].batch), 1))
    found = network().match(a, a)
    assert len(found.xy0) > 20
    assert torch.equal(found.xy1 - found.xy0, torch.tensor([[2.0, -4.0]]).expand(len(found.xy0), 2))
    column, row = found.cells.index0 % 16, found.cells.index0 // 16
    assert torch.equal(found.xy0, torch.stack([column, row], 1) * 8.0)
    scale = torch.tensor([[2.0, 3.0]])
    scaled = network().match(a, a, scale0=scale, scale1=scale * 2)
    assert torch.equal(scaled.xy0, found.xy0 * scale[0])
    assert torch.equal(scaled.xy1, found.xy1 * scale[0] * 2)


def test_an_image_matches_itself_in_place_and_its_shift_shifted() -> None:
    wide = pattern(112, 160)
    a = network().encode(wide[..., :96, :128])
    found = network().match(a, a)
    assert torch.equal(found.cells.index0, found.cells.index1)
    b = network().encode(wide[..., 8:104, 16:144])
    found = network().match(a, b)
    inner = (found.xy0 >= 32).all(1) & (found.xy0[:, 0] < 96) & (found.xy0[:, 1] < 64)
    coarse = loftr.cell_xy(found.cells.index1, b.grid) - found.xy0
    assert inner.sum() > 10
    right = (coarse == torch.tensor([-16.0, -8.0])).all(1)[inner].float().mean()
    assert right > 0.8


def test_a_batch_gives_what_its_pairs_give() -> None:
    images = [pattern(96, 128, seed) for seed in range(3)]
    others = [F.pad(image, (0, 16, 0, 0), mode="reflect") for image in images]
    encoded = [network().encode(image) for image in images]
    singles = [
        network().match(a, network().encode(b)) for a, b in zip(encoded, others, strict=True)
    ]
    together = network().match(loftr.stack(encoded), network().encode(torch.cat(others)))
    assert sum(len(single.xy0) for single in singles) == len(together.xy0) > 60
    for pair, single in enumerate(singles):
        mine = together.cells.batch == pair
        assert torch.equal(together.xy0[mine], single.xy0)
        assert torch.allclose(together.xy1[mine], single.xy1, atol=1e-3)
        assert torch.allclose(together.cells.confidence[mine], single.cells.confidence, atol=1e-3)


def test_borders() -> None:
    grid = (8, 10)
    every = torch.arange(80)
    cells = Cells(torch.zeros(80, dtype=torch.long), every, every, torch.ones(80))
    mask = torch.zeros(1, 8, 10, dtype=torch.bool)
    mask[:, :7, :9] = True
    mask[:, 0, 3:6] = False  # a hole does not matter while another row is whole
    plain = Features(torch.zeros(1, 80, 256), torch.zeros(1, 32, 40, 128), grid)
    masked = plain._replace(mask=mask.flatten(1))

    def kept(a: Features, b: Features, rule: loftr.BorderRule) -> set[tuple[int, int]]:
        index = loftr.drop_border(cells, a, b, 2, rule).index0
        return {(int(i) // 10, int(i) % 10) for i in index}

    inner = {(row, column) for row in range(2, 6) for column in range(2, 8)}
    assert kept(plain, plain, "grid") == kept(masked, masked, "grid") == inner
    shorter = {(row, column) for row in range(2, 5) for column in range(2, 7)}
    assert kept(masked, plain, "mask") == kept(plain, masked, "mask") == shorter


def test_masked_cells_neither_match_nor_attend() -> None:
    a_image, b_image = pattern(96, 128), pattern(96, 128)
    mask = torch.ones(1, 12, 16, dtype=torch.bool)
    mask[:, :, 8:] = False
    a = network().encode(a_image, mask)
    changed = a_image.clone()
    a_found = network().match(a, network().encode(b_image))
    assert len(a_found.xy0) > 10
    assert (a_found.cells.index0 % 16 < 8).all()
    assert (a_found.cells.index1 % 16 < 10).all()
    # Tokens of masked cells are not read by the others.
    tokens = a.tokens.clone()
    tokens[:, ~mask.flatten()] += 5.0
    again = network().match(a._replace(tokens=tokens), network().encode(b_image))
    assert torch.equal(again.xy0, a_found.xy0)
    assert torch.allclose(again.xy1, a_found.xy1, atol=1e-3)
    assert torch.equal(changed, a_image)


def test_many_matches_are_refined_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a = network().encode(pattern(96, 128))
    whole = network().match(a, a)
    monkeypatch.setitem(loftr._FINE_CHUNK, "cpu", 7)
    parts = network().match(a, a)
    assert torch.allclose(parts.xy1, whole.xy1, atol=1e-4)


def test_gradients_reach_every_weight() -> None:
    """The parts that training uses are differentiable; matching alone is not."""
    model = copy.deepcopy(network()).requires_grad_(True)
    image = pattern(64, 64)
    a, b = model.encode(image), model.encode(image.flip(3))
    x0, x1 = model.transform(a, b)
    confidence = loftr.similarities(x0, x1).softmax(1)
    zero = torch.zeros(3, dtype=torch.long)
    cells = Cells(zero, zero, zero, torch.ones(3))
    loss = confidence.square().sum() + model.refine(a, b, x0, x1, cells).square().sum()
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_the_published_network_is_kornias() -> None:
    from kornia.feature import LoFTR as Published
    from kornia.feature.loftr.loftr import default_cfg

    config: Any = copy.deepcopy(default_cfg)
    config["match_coarse"]["thr"] = 1e-6
    torch.manual_seed(0)
    theirs = Published(pretrained=None, config=config).eval()
    ours = make_network("loftr_outdoor").eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the published ones
    image0 = pattern(96, 128)[:, :1]
    image1 = pattern(112, 136, seed=0)[:, :1]
    with torch.no_grad():
        expected = theirs({"image0": image0, "image1": image1})
        found = ours.match(ours.encode(image0), ours.encode(image1), threshold=1e-6)
    assert len(expected["keypoints0"]) > 3
    assert torch.equal(found.xy0, expected["keypoints0"])
    assert torch.allclose(found.xy1, expected["keypoints1"], atol=1e-3)
    assert torch.allclose(found.cells.confidence, expected["confidence"], atol=1e-4)
