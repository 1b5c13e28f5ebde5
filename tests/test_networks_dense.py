"""What DKM and RoMa share, against plain formulations of the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gim_hloc.networks import dense
from gim_hloc.networks.dense import (
    ConvRefiner,
    GaussianProcess,
    attenuated_certainty,
    local_correlation,
    refine,
    resize,
    start_flow,
    warp_features,
)


def plain_correlation(a, b, flow, radius):
    """One grid_sample per place of the window, offsets in normalised coordinates."""
    _, channels, height, width = a.shape
    side = 2 * radius + 1
    down = torch.linspace(-2 * radius / height, 2 * radius / height, side)
    right = torch.linspace(-2 * radius / width, 2 * radius / width, side)
    places = []
    for y in down:
        for x in right:
            grid = flow.permute(0, 2, 3, 1) + torch.stack([x, y])
            sampled = F.grid_sample(b, grid, mode="bilinear", align_corners=False)
            places.append((a * sampled).sum(1) / channels**0.5)
    return torch.stack(places, 1)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two pairs of maps, 7 x 12, and targets inside, at the borders and far outside."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, 16, 7, 12, generator=generator) for _ in range(2))
    flow = torch.rand(2, 2, 7, 12, generator=generator) * 3 - 1.5
    flow[0, :, 0, 0], flow[1, :, 1, 1] = 50.0, -50.0
    flow[0, :, 2] = start_flow(1, (7, 12), a.device)[0, :, 2]  # exactly on pixels
    return a, b, flow


@pytest.mark.parametrize("radius", [1, 2, 7])
@pytest.mark.parametrize("budget", [1, 4 << 20])
def test_correlation_equals_sampling_each_place(maps, radius, budget, monkeypatch) -> None:
    monkeypatch.setitem(dense._GATHER_BYTES, "cpu", budget)  # one position, or all, at a time
    found = local_correlation(*maps, radius)
    expected = plain_correlation(*maps, radius)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_correlation_of_a_shifted_map_peaks_at_the_shift() -> None:
    a = F.normalize(torch.randn(1, 64, 9, 14, generator=torch.Generator().manual_seed(0)), dim=1)
    b = torch.roll(a, (2, -1), dims=(2, 3))  # what is at (y, x) in a is at (y + 2, x - 1) in b
    found = local_correlation(a, b, start_flow(1, (9, 14), a.device), 3)
    inner = found[:, :, 3:-3, 3:-3]
    assert (inner.argmax(1) == (3 + 2) * 7 + (3 - 1)).all()


def test_targets_that_are_no_numbers_find_nothing(maps) -> None:
    a, b, flow = maps
    flow[0, 0, 0, 0], flow[0, 1, 0, 1], flow[0, 1, 0, 2] = math.nan, math.inf, -math.inf
    found = local_correlation(a, b, flow, 2)
    assert found.isfinite().all()
    assert (found[0, :, 0, :3] == 0).all()


def test_correlation_and_its_gradient_for_training(maps) -> None:
    a, b, flow = maps
    gradients = []
    for function in (local_correlation, plain_correlation):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        (function(x, y, flow, 2) ** 2).sum().backward()
        gradients.append((x.grad, y.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_warping_in_half_precision_keeps_positions_exact() -> None:
    # 1000 columns: positions in float16 would be half a pixel off.
    waves = torch.sin(torch.arange(1000) / 2).expand(1, 8, 3, 1000).contiguous()
    flow = start_flow(1, (3, 1000), waves.device) * 0.9
    with torch.inference_mode():
        exact, half = warp_features(waves, flow), warp_features(waves.half(), flow)
    assert half.dtype == torch.float16
    assert (exact - half.float()).abs().max() < 2e-3


def random_refiner(**options) -> ConvRefiner:
    torch.manual_seed(1)
    refiner = ConvRefiner(features=16, embedding=5, hidden=3, **options)
    with torch.no_grad():
        for name, value in refiner.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.3)
    return refiner.eval()


@pytest.mark.parametrize("options", [{"radius": 2}, {"multiplier": 2}])
@pytest.mark.parametrize("stripe", [1, 4 << 20])
def test_refiner_in_folded_blocks_of_rows_equals_its_layers(
    maps, options, stripe, monkeypatch
) -> None:
    monkeypatch.setattr(dense, "_STRIPE_BYTES", stripe)  # one row, or all, at a time
    refiner = random_refiner(**options)
    layers = refiner(*maps)  # gradients are on: plain layers
    with torch.inference_mode():
        folded = refiner(*maps)
    for found, expected in zip(folded, layers, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert expected.std() > 1e-3
    assert layers[0].shape == (2, 2, 7, 12)
    assert layers[1].shape == (2, 1, 7, 12)


def test_refiner_on_other_devices_takes_maps_whole(maps) -> None:
    refiner = random_refiner(radius=1)
    with torch.inference_mode():
        x = torch.cat(refiner._inputs(*maps, 1.0), 1)
        folded = refiner.folded(torch.float32)
        filled = F.pad(x.permute(0, 2, 3, 1), (0, len(folded.blocks[0].depthwise) - x.shape[1]))
        for block in folded.blocks:
            filled = dense._whole(filled, block)
        expected = refiner.hidden_blocks(refiner.block1(x))
    found = filled[..., : x.shape[1]].permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (filled[..., x.shape[1] :] == 0).all()


def test_refiner_orders_its_output_as_the_checkpoint_does(maps) -> None:
    dkm, roma = random_refiner(), random_refiner(certainty_first=False)
    with torch.inference_mode():
        flow, certainty = dkm(*maps)
        flow_roma, certainty_roma = roma(*maps)
    torch.testing.assert_close(
        torch.cat([certainty, flow], 1), torch.cat([flow_roma, certainty_roma], 1)
    )


def test_displacements_are_those_from_the_own_cell_times_the_scale(maps) -> None:
    refiner = random_refiner()
    a, b, flow = maps
    with torch.inference_mode():
        embedded = refiner._inputs(a, b, flow, 2.0)[2]
        still = refiner._inputs(a, b, start_flow(2, (7, 12), a.device), 2.0)[2]
    weight, bias = refiner.disp_emb.weight[..., 0, 0], refiner.disp_emb.bias
    moved = flow[1, :, 4, 5] - torch.tensor([2 * 5.5 / 12 - 1, 2 * 4.5 / 7 - 1])
    torch.testing.assert_close(embedded[1, :, 4, 5], weight @ (2 * moved) + bias)
    torch.testing.assert_close(still[0, :, 3, 3], bias)


@pytest.mark.parametrize("change", ["train", "load"])
def test_folded_weights_follow_changes(maps, change) -> None:
    refiner = random_refiner()
    with torch.inference_mode():
        before = refiner(*maps)[0]
    if change == "train":
        refiner.train()
        optimiser = torch.optim.SGD(refiner.parameters(), lr=0.1)
        sum(x.square().mean() for x in refiner(*maps)).backward()
        optimiser.step()
        refiner.eval()
    else:
        refiner.load_state_dict({k: v * 2 for k, v in refiner.state_dict().items()})
    expected = refiner(*maps)[0]
    with torch.inference_mode():
        after = refiner(*maps)[0]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 1e-4


def test_refiner_in_bfloat16_computes_near_the_same(maps) -> None:
    refiner = random_refiner(radius=2)
    a, b, flow = maps
    with torch.inference_mode():
        exact = refiner(a, b, flow)[0]
        rough = refiner(a.bfloat16(), b.bfloat16(), flow)[0]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_gaussian_process_is_the_posterior_mean_of_its_formula() -> None:
    torch.manual_seed(0)
    process = GaussianProcess(6)
    a, b = torch.randn(2, 3, 8, 4, 5)
    found = process(a, b).detach()
    alone = process(a[1:2], b[1:2], process.factor(b[1:2])).detach()
    torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=1e-5)

    def kernel(x, y):
        cosine = x @ y.T / (np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1) + 1e-6)
        return np.exp((cosine - 1) / 0.2)

    weight = process.pos_conv.weight.detach().double().numpy()[..., 0, 0]
    bias = process.pos_conv.bias.detach().double().numpy()
    columns, rows = np.meshgrid(np.arange(5), np.arange(4))
    places = np.stack([(2 * columns + 1) / 5 - 1, (2 * rows + 1) / 4 - 1], -1).reshape(-1, 2)
    basis = np.cos(8 * np.pi * (places @ weight.T + bias))
    for i in range(3):
        x, y = (f[i].double().numpy().reshape(8, -1).T for f in (a, b))
        mean = kernel(x, y) @ np.linalg.solve(kernel(y, y) + 0.1 * np.eye(20), basis)
        np.testing.assert_allclose(found[i].numpy().reshape(6, -1).T, mean, atol=2e-5)


def test_gaussian_process_can_be_trained() -> None:
    process = GaussianProcess(4)
    a, b = (torch.randn(1, 8, 3, 3).requires_grad_() for _ in range(2))
    process(a, b).square().sum().backward()
    assert a.grad.abs().max() > 0
    assert b.grad.abs().max() > 0


def test_certainty_is_raised_where_the_coarse_scale_doubted() -> None:
    fine = torch.zeros(1, 1, 4, 4)
    coarse = torch.tensor([[-4.0, 6.0], [-4.0, 6.0]])[None, None]
    found = attenuated_certainty(fine, coarse)[0, 0]
    assert found[0, 0] == pytest.approx(1 / (1 + math.exp(-2)))  # half of -4 is taken off
    assert found[0, 3] == 0.5  # confident coarse logits change nothing


def test_corrections_are_in_eighths_of_the_stride() -> None:
    # A correction of 4 at stride 8 moves the target by 4 px of the full resolution.
    flow = start_flow(1, (6, 10), torch.device("cpu"))
    delta = torch.tensor([4.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 6, 10)
    moved = refine(flow, delta, stride=8, size=(48, 80)) - flow
    torch.testing.assert_close(moved[0, 0], torch.full((6, 10), 4 * 2 / 80))
    torch.testing.assert_close(moved[0, 1], torch.full((6, 10), 2 * 2 / 48))


def test_resizing_aligns_edges() -> None:
    grid = start_flow(1, (6, 9), torch.device("cpu"))
    larger = resize(grid, (12, 18))
    expected = start_flow(1, (12, 18), torch.device("cpu"))
    torch.testing.assert_close(larger[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert resize(grid, (6, 9)) is grid


def test_every_refiner_is_compiled() -> None:
    """PyTorch compiles a function for eight shapes; the largest of nine ran as it stood."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    with torch.device("meta"), torch.inference_mode():
        for features in range(9):
            refiner = ConvRefiner(features=1 + features, embedding=4, hidden=0).eval()
            refiner.compile(backend=backend)
            folded = refiner.folded(torch.float32)
            for height in (4, 8):
                refiner._run(torch.zeros(1, height, 4, folded.out.shape[1]), folded.blocks)
    torch._dynamo.reset()
    assert len(compiled) == 18
