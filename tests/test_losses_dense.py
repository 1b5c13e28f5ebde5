"""Losses of DKM and RoMa: by hand, by a slow transcription, by finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_scene import make_pairs, true_positions

from gim_hloc.geometry.warp import cell_centres
from gim_hloc.training.batch import collate
from gim_hloc.training.losses import common, dkm, roma
from gim_hloc.training.losses.common import Labels, Truth
from gim_hloc.training.models.dense import depth_truth

LN2 = math.log(2)


def random_case(*strides: int, batch: int = 2, size: int = 32, seed: int = 0):
    """Predictions near the truth, and the truth with holes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    scales, truth = {}, {}
    for stride in strides:
        cells = (size // stride, size // stride)
        flow = 2 * torch.rand(batch, 2, *cells, generator=generator, dtype=torch.float64) - 1
        off = torch.randn(batch, 2, *cells, generator=generator, dtype=torch.float64)
        valid = torch.rand(batch, *cells, generator=generator) < 0.7
        # Errors about as large as what is within reach.
        predicted = flow + 0.01 * stride * off
        certainty = torch.randn(batch, 1, *cells, generator=generator, dtype=torch.float64)
        scales[stride] = predicted.requires_grad_(), certainty.requires_grad_()
        truth[stride] = Truth(flow, valid)
    return scales, truth


def random_labels(count: int, batch: int = 2, seed: int = 0) -> Labels:
    generator = torch.Generator().manual_seed(seed)
    uv = 1.8 * torch.rand(batch, count, 4, generator=generator, dtype=torch.float64) - 0.9
    used = torch.arange(count) < torch.tensor([[count], [count - 2]])[:batch]
    return Labels(uv[..., :2], uv[..., 2:], used)


# ------------------------------------------------------------------------------------------ frames


def test_normalised_frame_is_that_of_sampling() -> None:
    box = (12, 8)
    x = torch.arange(12.0).expand(8, 12)
    y = torch.arange(8.0)[:, None].expand(8, 12)
    xy = torch.tensor([[[3.25, 5.5], [0.0, 0.0], [11.0, 7.0]]])
    read = common.read_at(torch.stack([x, y])[None], common.normalise(xy, box))
    torch.testing.assert_close(read, xy)
    torch.testing.assert_close(common.to_pixels(common.normalise(xy, box), box), xy)
    edges = common.normalise(torch.tensor([[-0.5, -0.5], [11.5, 7.5]]), box)
    assert edges.tolist() == [[-1, -1], [1, 1]]


def test_flow_between_cells() -> None:
    # A shift is read exactly everywhere, also outside the outermost centres.
    flow = cell_centres(4, 6).permute(2, 0, 1)[None] + torch.tensor([0.3, -0.2]).view(1, 2, 1, 1)
    points = torch.tensor([[[-0.99, -0.97], [0.1, 0.2], [0.98, 0.5]]])
    torch.testing.assert_close(
        common.flow_at(flow, points), points + torch.tensor([0.3, -0.2]), atol=1e-6, rtol=0
    )
    # Half way between two cells, the mean of both.
    flow = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    middle = (cell_centres(4, 6)[1, 2] + cell_centres(4, 6)[1, 3]) / 2
    expected = (flow[0, :, 1, 2] + flow[0, :, 1, 3]) / 2
    torch.testing.assert_close(common.flow_at(flow, middle[None, None])[0, 0], expected)


@pytest.mark.parametrize("stride", [1, 4, 8, 16])
def test_truth_on_the_grid_is_the_scene_s(stride: int) -> None:
    box = (96, 64)
    samples = make_pairs(2, box)
    truth = depth_truth(collate(samples), (64 // stride, 96 // stride))
    cells = common.to_pixels(cell_centres(64 // stride, 96 // stride).view(-1, 2), box)
    for index, sample in enumerate(samples):
        there = common.to_pixels(truth.flow[index].flatten(1).T, box)
        error = (there - true_positions(sample, cells)).norm(dim=1)
        error = error[truth.valid[index].flatten()]
        assert truth.valid[index].double().mean() > 0.4
        # Depth is that of the nearest pixel: up to half a pixel away on the wall, which matters
        # little, and across the disc's edge, where interpolation is wrong instead.
        assert error.quantile(0.9) < 0.2
        if stride == 1:  # cells are pixels
            assert error.max() < 1e-3


# --------------------------------------------------------------------------------------------- DKM


def test_dkm_by_hand() -> None:
    # Stride 16, two cells: errors 0.5 (3-4-5) and 0.1, the second cell invalid.
    flow = torch.tensor([[[[0.3, 0.1]], [[0.4, 0.0]]]])
    truth = {16: Truth(torch.zeros(1, 2, 1, 2), torch.tensor([[[True, False]]]))}
    certainty = torch.tensor([[[[0.0, 2.0]]]])
    parts = dkm.depth_loss({16: (flow, certainty)}, truth, torch.tensor([True]))
    assert parts["flow"].item() == pytest.approx(0.5)
    expected = 0.01 * (LN2 + 2 + math.log1p(math.exp(-2))) / 2
    assert parts["certainty"].item() == pytest.approx(expected)
    # ScanNet teaches no certainty.
    parts = dkm.depth_loss({16: (flow, certainty)}, truth, torch.tensor([False]))
    assert parts["certainty"].item() == 0
    assert parts["flow"].item() == pytest.approx(0.5)


def slow_losses(scales, truth, rule: str) -> tuple[list[float], list[float]]:
    """Both terms of every sample, cell by cell with plain numbers."""
    flows, certainties = [], []
    for index in range(2):
        flow_total = certainty_total = 0.0
        before: dict[tuple[int, int], float] = {}
        for stride in sorted(scales, reverse=True):
            flow, logits = (x[index].detach().numpy() for x in scales[stride])
            wanted, valid = truth[stride].flow[index].numpy(), truth[stride].valid[index].numpy()
            height, width = valid.shape
            costs, entropies, errors = [], [], {}
            for y in range(height):
                for x in range(width):
                    error = math.hypot(*(flow[:, y, x] - wanted[:, y, x]))
                    seen = bool(valid[y, x])
                    errors[y, x] = error if seen else math.inf
                    far = 4 if rule == "dkm" or stride < 4 else 8
                    limit = 2 / 512 * far * stride
                    if stride <= 8 and before and before[y // 2, x // 2] >= limit:
                        seen = False
                    if seen and rule == "dkm":
                        costs.append(error)
                    elif seen:
                        c = 1e-4 * stride
                        costs.append(c**0.5 * ((error / c) ** 2 + 1) ** 0.25)
                    sigma = 1 / (1 + math.exp(-logits[0, y, x]))
                    entropies.append(-math.log(sigma if seen else 1 - sigma))
            flow_total += float(np.mean(costs)) if costs else 0.0
            certainty_total += 0.01 * float(np.mean(entropies))
            before = errors
        flows.append(flow_total)
        certainties.append(certainty_total)
    return flows, certainties


@pytest.mark.parametrize("seed", range(3))
def test_dkm_against_a_slow_transcription(seed: int) -> None:
    scales, truth = random_case(16, 8, 4, 2, 1, seed=seed)
    parts = dkm.depth_loss(scales, truth, torch.tensor([True, True]))
    flows, certainties = slow_losses(scales, truth, "dkm")
    assert parts["flow"].tolist() == pytest.approx(flows)
    assert parts["certainty"].tolist() == pytest.approx(certainties)


def test_reach_leaves_some_cells_out_and_some_in() -> None:
    scales, truth = random_case(16, 8)
    limit = dkm.REACH * 8
    kept = common.within_reach(truth[8], scales[16][0], truth[16], limit)
    assert 0 < kept.sum() < truth[8].valid.sum()
    assert limit == pytest.approx(2 / 512 * 4 * 8)


def test_dkm_labels_by_hand() -> None:
    # Two scales that both say "the same place"; labels moved by 3-4-5 and padding that is ignored.
    flow = cell_centres(2, 2).permute(2, 0, 1)[None]
    scales = {
        32: (flow, torch.zeros(1, 1, 2, 2)),
        16: (flow + torch.tensor([0.03, 0.04]).view(1, 2, 1, 1), torch.zeros(1, 1, 2, 2)),
    }
    here = torch.tensor([[[0.1, 0.2], [-0.4, 0.3], [0.9, 0.9]]])
    there = here + torch.tensor([0.03, 0.04])
    parts = dkm.label_loss(scales, Labels(here, there, torch.tensor([[True, True, False]])))
    assert parts["flow"].item() == pytest.approx(0.05, abs=1e-6)
    assert parts["certainty"].item() == pytest.approx(2 * LN2)


# -------------------------------------------------------------------------------------------- RoMa


def test_robust_by_hand() -> None:
    squared = torch.tensor([0.0, (3e-4) ** 2, 1.0], dtype=torch.float64)
    expected = [0.01, 0.01 * 10**0.25, 1.0]
    assert roma.robust(squared, 1).tolist() == pytest.approx(expected, rel=1e-4)
    assert roma.robust(squared[:1], 16).item() == pytest.approx((16e-4) ** 0.5)


def test_nearest_anchor_against_all_distances() -> None:
    uv = 2 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) - 1
    anchors = cell_centres(8, 8).view(-1, 2)
    assert torch.equal(roma.nearest_anchor(uv, 8), torch.cdist(uv, anchors).argmin(1))
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    assert roma.nearest_anchor(ends, 8).tolist() == [0, 63]


@pytest.mark.parametrize("seed", range(3))
def test_roma_against_a_slow_transcription(seed: int) -> None:
    scales, truth = random_case(16, 8, 4, 2, 1, seed=seed)
    logits = torch.randn(2, 16, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    certainty = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(9 + seed)).double()
    parts = roma.depth_loss(scales, (logits, certainty), truth)
    flows, certainties = slow_losses(scales, truth, "roma")
    assert parts["flow"].tolist() == pytest.approx(flows)
    for index in range(2):
        entropies, coarse = [], []
        for y in range(2):
            for x in range(2):
                seen = bool(truth[16].valid[index, y, x])
                sigma = 1 / (1 + math.exp(-float(certainty[index, 0, y, x])))
                coarse.append(-math.log(sigma if seen else 1 - sigma))
                if seen:
                    u, v = truth[16].flow[index, :, y, x].tolist()
                    anchor = int((v + 1) * 2) * 4 + int((u + 1) * 2)
                    values = logits[index, :, y, x].exp()
                    entropies.append(-math.log(values[anchor] / values.sum()))
        assert parts["classes"][index].item() == pytest.approx(np.mean(entropies or [0]))
        expected = certainties[index] + 0.01 * np.mean(coarse)
        assert parts["certainty"][index].item() == pytest.approx(expected)


def test_roma_labels_by_hand() -> None:
    flow = cell_centres(2, 2).permute(2, 0, 1)[None]
    scales = {16: (flow, torch.zeros(1, 1, 2, 2)), 8: (flow, torch.zeros(1, 1, 2, 2))}
    logits = torch.zeros(1, 4, 2, 2)
    logits[0, 3] = math.log(5)  # exp: 1, 1, 1, 5 everywhere
    here = torch.tensor([[[0.5, 0.5], [0.7, -0.2], [0.0, 0.0]]])
    there = torch.tensor([[[0.5, 0.5], [0.7, -0.2], [9.0, 9.0]]])
    labels = Labels(here, there, torch.tensor([[True, True, False]]))
    parts = roma.label_loss(scales, logits, labels)
    # Anchors 3 and 1, with probabilities 5/8 and 1/8; errors 0.
    expected = -(math.log(5 / 8) + math.log(1 / 8)) / 2
    assert parts["classes"].item() == pytest.approx(expected)
    assert parts["flow"].item() == pytest.approx((16e-4) ** 0.5 + (8e-4) ** 0.5, rel=1e-5)


# -------------------------------------------------------------------------------------------- both


def all_parts(scales, truth, labels, logits, certainty) -> dict[str, dict[str, torch.Tensor]]:
    batch = len(logits)
    return {
        "dkm": dkm.depth_loss(scales, truth, torch.ones(batch, dtype=torch.bool)),
        "dkm labels": {"flow": dkm.label_loss(scales, labels)["flow"]},
        "roma": roma.depth_loss(scales, (logits, certainty), truth),
        "roma labels": roma.label_loss(scales, logits, labels),
    }


def coarse_case(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(batch, 16, 2, 2, generator=generator, dtype=torch.float64)
    certainty = torch.randn(batch, 1, 2, 2, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), certainty.requires_grad_()


@pytest.mark.parametrize("loss", ["dkm", "dkm labels", "roma", "roma labels"])
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    scales, truth = random_case(16, 8, batch=1)
    labels = random_labels(3, batch=1)
    inputs = [*(x for pair in scales.values() for x in pair), *coarse_case(1)]

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        given = {16: tensors[:2], 8: tensors[2:4]}
        return torch.stack(list(all_parts(given, truth, labels, *tensors[4:])[loss].values()))

    assert torch.autograd.gradcheck(value, inputs, eps=1e-7, atol=1e-5)


def test_a_batch_is_the_mean_of_its_samples() -> None:
    scales, truth = random_case(16, 8, 4)
    labels, coarse = random_labels(6), coarse_case()
    # Samples with different numbers of valid cells, where a mean over all cells would differ.
    truth[4].valid[1, :, 3:] = False
    whole = all_parts(scales, truth, labels, *coarse)
    for index in range(2):
        one = slice(index, index + 1)
        single = all_parts(
            {s: (flow[one], logits[one]) for s, (flow, logits) in scales.items()},
            {s: Truth(t.flow[one], t.valid[one]) for s, t in truth.items()},
            Labels(*(x[one] for x in labels)),
            *(x[one] for x in coarse),
        )
        for name, parts in single.items():
            for key, value in parts.items():
                torch.testing.assert_close(value[0], whole[name][key][index])


def test_nothing_valid_is_zero_with_gradients() -> None:
    scales, truth = random_case(16, 8)
    for part in truth.values():
        part.valid[:] = False
    labels = random_labels(4)
    labels.used[:] = False
    parts = all_parts(scales, truth, labels, *coarse_case())
    flows = torch.stack([p["flow"] for p in parts.values()])
    assert flows.abs().max() == 0
    (slope,) = torch.autograd.grad(flows.sum(), scales[8][0])
    assert slope.abs().max() == 0


def test_exact_flow_has_no_slope() -> None:
    truth = {16: Truth(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))}
    flow = torch.zeros(1, 2, 2, 2, requires_grad=True)
    parts = dkm.depth_loss({16: (flow, torch.zeros(1, 1, 2, 2))}, truth, torch.tensor([True]))
    parts["flow"].sum().backward()
    assert parts["flow"].item() == 0
    assert flow.grad is not None
    assert flow.grad.abs().max() == 0


def test_labels_do_not_teach_certainty() -> None:
    scales, _ = random_case(16, 8)
    parts = dkm.label_loss(scales, random_labels(4))
    total = parts["flow"].sum() + parts["certainty"].sum()
    flow, certainty = torch.autograd.grad(total, scales[8], allow_unused=True)
    assert flow.abs().max() > 0
    assert certainty is None
