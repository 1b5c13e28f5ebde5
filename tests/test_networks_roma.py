"""RoMa, DINOv2 and VGG: names of weights, positions, classes to flow, batches, gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import nn

from gim_hloc.geometry.warp import cell_centres
from gim_hloc.networks.dense import resize
from gim_hloc.networks.dinov2 import DINOv2, resize_positions
from gim_hloc.networks.roma import RoMa, RoMaConfig, flow_of_classes
from gim_hloc.networks.vgg import VGG19, conv_norm

TINY = RoMaConfig(
    tokens=32,
    vgg=(4, 6, 8, 10),
    projected={16: 16, 8: 12, 4: 10, 2: 6, 1: 5},
    displacement={16: 4, 8: 4, 4: 4, 2: 4, 1: 3},
    radius={16: 2, 8: 1, 4: 1},
    position=16,
    blocks=2,
    anchors=8,
)


def tiny() -> tuple[RoMa, DINOv2]:
    """Both networks with few channels and random weights and statistics."""
    torch.manual_seed(0)
    roma, dinov2 = RoMa(TINY), DINOv2(dim=32, depth=2, heads=4, side=6)
    for name, value in [*roma.state_dict().items(), *dinov2.state_dict().items()]:
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "cls_token", "pos_embed")):
            value.normal_(std=0.3)
        elif name.endswith("gamma"):
            value.fill_(0.5)
    return roma.eval(), dinov2.eval()


@pytest.fixture(scope="module")
def networks() -> tuple[RoMa, DINOv2]:
    return tiny()


@pytest.mark.parametrize(
    ("file", "network", "prefix"),
    [("gim_roma", RoMa, "model."), ("dinov2_vitl14", DINOv2, "")],
)
def test_names_and_shapes_are_those_of_the_checkpoint(file, network, prefix) -> None:
    path = SHARED / "parity" / f"{file}.keys.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    published = json.loads(path.read_text())
    with torch.device("meta"):
        state = network().state_dict()
    ours = {
        prefix + name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in state.items()
    }
    assert ours == published


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75."""
    x = np.abs(x)
    inner = (1.25 * x - 2.25) * x * x + 1
    outer = ((-0.75 * x + 3.75) * x - 6) * x + 3
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def cubic_matrix(size: int, side: int) -> np.ndarray:
    """(size, side) weights of resizing; positions follow the factor (size + 0.1) / side."""
    at = (np.arange(size) + 0.5) * side / (size + 0.1) - 0.5
    matrix = np.zeros((size, side))
    for step in range(-1, 3):
        source = np.floor(at) + step
        index = source.clip(0, side - 1).astype(int)
        np.add.at(matrix, (np.arange(size), index), cubic(at - source))
    return matrix


def test_positions_are_resized_with_the_published_offset() -> None:
    side, height, width = 37, 20, 31
    table = torch.randn(1, side * side, 3, generator=torch.Generator().manual_seed(1))
    grid = table[0].double().view(side, side, 3).numpy()
    expected = np.einsum(
        "ia,jb,abc->ijc", cubic_matrix(height, side), cubic_matrix(width, side), grid
    )
    resized = resize_positions(table, height, width)
    assert resized.shape == (1, height * width, 3)
    np.testing.assert_allclose(resized[0].view(height, width, 3).numpy(), expected, atol=2e-5)
    # The plain resize to a size is another one, by far more than rounding.
    plain = nn.functional.interpolate(
        table.view(1, side, side, 3).permute(0, 3, 1, 2), (height, width), mode="bicubic"
    )
    assert (plain[0].permute(1, 2, 0) - resized[0].view(height, width, 3)).abs().max() > 0.01


def test_positions_of_the_trained_size_stay() -> None:
    table = torch.randn(1, 37 * 37, 2)
    assert resize_positions(table, 37, 37) is table


def test_tokens_are_those_of_their_patch() -> None:
    # Without position and without attention between tokens, each token sees its patch only.
    _, dinov2 = tiny()
    with torch.no_grad():
        dinov2.pos_embed.zero_()
        for block in dinov2.blocks:
            block.attn.proj.weight.zero_()
        image = torch.rand(1, 3, 42, 56)
        before = dinov2(image)
        image[:, :, 14:28, 28:42] = torch.rand(1, 3, 14, 14)
        changed = (dinov2(image) - before).abs().amax(1)[0] > 1e-6
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 2] = True
    assert before.shape == (1, 32, 3, 4)
    assert torch.equal(changed, expected)


def flow_at(logits: dict[int, float], side: int = 64) -> list[float]:
    """Flow of a single cell with these logits and -50 elsewhere."""
    values = torch.full((1, side * side, 1, 1), -50.0)
    for index, value in logits.items():
        values[0, index] = value
    return flow_of_classes(values)[0, :, 0, 0].tolist()


def anchor(index: int, side: int = 64) -> np.ndarray:
    """Normalised (x, y) of a class."""
    return np.array([(2 * (index % side) + 1) / side - 1, (2 * (index // side) + 1) / side - 1])


def test_a_sharp_peak_is_the_centre_of_its_cell() -> None:
    for index in (64 * 30 + 20, 0, 63, 64 * 63, 64 * 64 - 1):
        np.testing.assert_allclose(flow_at({index: 10.0}), anchor(index), atol=1e-6)


def test_flow_is_the_mean_of_the_best_class_and_its_neighbours() -> None:
    m = 64 * 30 + 20
    logits = {m: 2.0, m - 1: 1.0, m + 1: 0.5, m - 64: 1.5, m + 64: -1.0, m + 2: 1.9}
    five = [m, m - 1, m + 1, m - 64, m + 64]
    weights = np.exp([logits[i] for i in five])
    expected = weights @ np.array([anchor(i) for i in five]) / weights.sum()
    np.testing.assert_allclose(flow_at(logits), expected, atol=1e-6)


def test_neighbours_beyond_the_list_of_classes_are_its_ends() -> None:
    # Of class 0 the neighbours at -1 and -64 are class 0 again, which so counts three times.
    weights = np.array([3 * np.exp(1.0), np.exp(0.5), np.exp(0.2)])
    expected = weights @ np.array([anchor(0), anchor(1), anchor(64)]) / weights.sum()
    np.testing.assert_allclose(flow_at({0: 1.0, 1: 0.5, 64: 0.2}), expected, atol=1e-6)


def test_neighbours_follow_the_list_over_the_side_border() -> None:
    m = 64 * 10  # first column; in the list its left neighbour ends the row above
    weights = np.exp([1.0, 0.9])
    expected = weights @ np.array([anchor(m), anchor(m - 1)]) / weights.sum()
    np.testing.assert_allclose(flow_at({m: 1.0, m - 1: 0.9}), expected, atol=1e-6)


def test_folded_convolution_equals_the_two_layers() -> None:
    network = VGG19((3, 4, 5, 6)).eval()
    conv, norm = network.layers[0], network.layers[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        np.testing.assert_allclose(
            conv_norm(conv, norm, x).numpy(), norm(conv(x)).numpy(), atol=1e-5
        )


def encoded(networks: tuple[RoMa, DINOv2], images: torch.Tensor, fine: bool = True):
    roma, dinov2 = networks
    small = nn.functional.interpolate(images, (112, 126), mode="bilinear")
    return roma.encode(dinov2(small), small, images if fine else None)


@torch.inference_mode()
def test_many_pairs_give_what_single_pairs_give(networks) -> None:
    images = torch.rand(4, 3, 168, 190, generator=torch.Generator().manual_seed(2))
    roma = networks[0]
    together = encoded(networks, images)
    single = [encoded(networks, image[None]) for image in images]
    for name, value in together.items():
        for index in range(4):
            torch.testing.assert_close(value[index], single[index][name][0], atol=1e-4, rtol=1e-4)
    batch = [{name: value[half] for name, value in together.items()} for half in ([0, 1], [2, 3])]
    flow, certainty = roma.match(*batch, scale_factors=(1.0, 1.5))
    assert flow.shape == (2, 2, 168, 190, 2)
    assert certainty.shape == (2, 2, 168, 190)
    for index in range(2):
        one = roma.match(single[index], single[index + 2], scale_factors=(1.0, 1.5))
        torch.testing.assert_close(flow[:, index], one[0][:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(certainty[:, index], one[1][:, 0], atol=1e-4, rtol=1e-4)
    # Directions trade places with the images.
    other = roma.match(single[2], single[0], scale_factors=(1.0, 1.5))
    torch.testing.assert_close(other[0][0, 0], flow[1, 0], atol=1e-4, rtol=1e-4)
    # Were the flow the same everywhere, the comparisons above would show nothing.
    assert (flow[0, 0] - flow[0, 1]).abs().amax() > 0.05


@torch.inference_mode()
def test_the_scale_factor_enters_the_pass_that_it_is_for(networks) -> None:
    images = torch.rand(2, 3, 168, 190, generator=torch.Generator().manual_seed(3))
    a, b = (encoded(networks, image[None]) for image in images)
    seen: list[float] = []
    hooks = [
        refiner.register_forward_hook(
            lambda *call: seen.append(call[2]["displacement_scale"]), with_kwargs=True
        )
        for refiner in networks[0].decoder.conv_refiner.values()
    ]
    networks[0].match(a, b, scale_factors=(1.0, 2.0))
    for hook in hooks:
        hook.remove()
    assert seen == [1.25] * 5 + [2.5] * 4


@torch.inference_mode()
def test_without_second_pass_the_first_is_the_result(networks) -> None:
    images = torch.rand(2, 3, 168, 190, generator=torch.Generator().manual_seed(4))
    a, b = (encoded(networks, image[None], fine=False) for image in images)
    flows: list[torch.Tensor] = []
    refiner = networks[0].decoder.conv_refiner["8"]
    hook = refiner.register_forward_hook(lambda *call: flows.append(call[1][2]))
    networks[0].match(*(encoded(networks, image[None]) for image in images))
    hook.remove()
    flow, certainty = networks[0].match(a, b)
    assert flow.shape == (2, 1, 112, 126, 2)
    assert certainty.shape == (2, 1, 112, 126)
    # The second pass starts from it.
    torch.testing.assert_close(
        resize(flow[:, 0].permute(0, 3, 1, 2), flows[1].shape[-2:]), flows[1]
    )


def test_gradients_reach_every_weight() -> None:
    roma, dinov2 = tiny()
    roma.train()
    images = torch.rand(2, 3, 112, 126, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        tokens = dinov2(images)
    a, b = (roma.encode(tokens[i : i + 1], images[i : i + 1], images[i : i + 1]) for i in (0, 1))
    flow, certainty = roma.match(a, b)
    target = cell_centres(112, 126)
    ((flow - target).square().mean() + certainty.mean()).backward()
    without = [name for name, value in roma.named_parameters() if value.grad is None]
    assert not without
    assert all(value.grad.isfinite().all() for value in roma.parameters())
