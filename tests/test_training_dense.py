"""Training DKM and RoMa: truth that is missing, batches, memory, checkpoints, learning by heart."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import SHARED
from training_scene import make_pairs, overfit_set, share_within

from gim_hloc import matchers
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers import ImageData
from gim_hloc.networks.dkm import DKM, DKMConfig
from gim_hloc.networks.roma import RoMa, RoMaConfig
from gim_hloc.training.batch import PairBatch, collate
from gim_hloc.training.models import build_model
from gim_hloc.training.models.dense import DenseTraining, threshold_sample
from gim_hloc.training.models.roma import RoMaTraining

TINY = {name: tiny_models.TINY[name] for name in ("gim_dkm", "gim_roma")}
BOX = {name: tiny_models.box(name) for name in TINY}
both = pytest.mark.parametrize("name", sorted(TINY))


def tiny(name: str, seed: int = 0, **options) -> DenseTraining:
    torch.manual_seed(seed)
    model = build_model(name, **{**TINY[name], **options})
    assert isinstance(model, DenseTraining)
    return model


def gradients(model: DenseTraining, batch: PairBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch)["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@both
def test_samples_without_truth_add_zero(name: str) -> None:
    (sample,) = make_pairs(1, BOX[name])
    batch = collate([dataclasses.replace(sample, depth0=None, depth1=None)])
    model = tiny(name)
    assert model(batch)["loss"].item() == 0
    # Distributed training waits for every parameter's gradient.
    assert all(g.abs().max() == 0 for g in gradients(model, batch).values())


@both
def test_what_a_sample_has_decides_its_parts(name: str) -> None:
    (depth,) = make_pairs(1, BOX[name])
    (label,) = make_pairs(1, BOX[name], labels=True)
    model = tiny(name).eval()
    with_depth, with_labels = model(collate([depth])), model(collate([label]))
    combined = model(collate([dataclasses.replace(depth, labels=label.labels)]))
    assert with_depth["depth_flow"] > 0
    assert "label_flow" not in with_depth
    assert with_labels["depth_flow"] == 0
    assert with_labels["label_flow"] > 0
    torch.testing.assert_close(
        combined["loss"], (with_depth["loss"] + with_labels["loss"]) / 2, atol=1e-6, rtol=1e-5
    )
    parts = [v for k, v in combined.items() if k.startswith(("depth_", "label_"))]
    torch.testing.assert_close(torch.stack(parts).sum(), combined["loss"].detach())
    assert all(not v.requires_grad for k, v in combined.items() if k != "loss")


@both
def test_a_batch_is_its_samples_accumulated(name: str) -> None:
    depth = make_pairs(1, BOX[name])
    labels = make_pairs(1, BOX[name], labels=True, seed=1)
    model = tiny(name).eval()  # batch normalisation aside
    whole = gradients(model, collate(depth + labels))
    single = [gradients(model, collate(samples)) for samples in (depth, labels)]
    for key, value in whole.items():
        expected = (single[0][key] + single[1][key]) / 2
        assert (value - expected).norm() <= 1e-3 * expected.norm() + 1e-6, key


@both
def test_recomputed_features_change_nothing(name: str) -> None:
    batch = collate(make_pairs(2, BOX[name]))
    kept, again = tiny(name).train(), tiny(name, recompute=True).train()
    for model in (kept, again):
        gradients(model, batch)
    for (key, value), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, msg=lambda m, k=key: f"{k}: {m}")
    # Running statistics have seen the batch once.
    for (key, value), other in zip(kept.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(value, other), key


@both
def test_half_precision(name: str) -> None:
    batch = collate(make_pairs(1, BOX[name]) + make_pairs(1, BOX[name], labels=True))
    model = tiny(name)
    plain = model(batch)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(plain, rel=0.1)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_positions_pass_no_gradients_on() -> None:
    # The loss of stride 1 alone moves nothing that decides the flow at stride 2.
    sample = collate(make_pairs(1, BOX["gim_dkm"]))
    network = tiny("gim_dkm").network
    flow, _ = network.match_scales(sample.image0, sample.image1)[1]
    flow.sum().backward()
    moved = {key for key, p in network.named_parameters() if p.grad is not None}
    assert any(key.startswith("decoder.conv_refiner.1.") for key in moved)
    assert not any(key.startswith(("decoder.conv_refiner.2.", "decoder.gps")) for key in moved)


def test_scannet_teaches_dkm_no_certainty() -> None:
    (sample,) = make_pairs(1, BOX["gim_dkm"])
    model = tiny("gim_dkm").eval()
    taught = model(collate([sample]))
    indoors = model(collate([dataclasses.replace(sample, dataset="ScanNet")]))
    assert taught["depth_certainty"] > 0
    assert indoors["depth_certainty"] == 0
    assert indoors["depth_flow"] == taught["depth_flow"]


@both
def test_labels_beyond_the_limit_are_drawn_by_sample(name: str) -> None:
    few, many = make_pairs(2, BOX[name], labels=True)
    few = dataclasses.replace(few, labels=few.labels[:50])
    model = tiny(name, labels=100).eval()
    rows = [model._labels(collate(s)) for s in ([few], [many], [few, many])]
    assert [int(r.used.sum()) for r in rows] == [50, 100, 150]
    # The same draw, whatever else is in the batch.
    assert torch.equal(rows[2].there[1], rows[1].there[0])
    assert torch.equal(
        rows[2].there[0][rows[2].used[0]].unique(dim=0), rows[0].there[0].unique(dim=0)
    )
    known = many.labels
    box = torch.tensor(BOX[name] * 2)
    expected = {tuple(r) for r in ((2 * known + 1) / box - 1).round(decimals=4).tolist()}
    drawn = torch.cat([rows[1].here[0], rows[1].there[0]], 1).round(decimals=4).tolist()
    assert {tuple(r) for r in drawn} <= expected


# ----------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("name", "network"), [("gim_dkm", DKM), ("gim_roma", RoMa)])
def test_checkpoint_has_the_published_names(name: str, network: type) -> None:
    path = SHARED / "parity" / f"{name}.keys.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    published = {key: shape for key, (shape, _) in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        full = network()
    model = tiny(name)
    model.network = full
    assert {key: list(value.shape) for key, value in model.checkpoint().items()} == published


@both
def test_widths_are_read_from_shapes(name: str) -> None:
    model = tiny(name)
    state = {k.removeprefix("model."): v for k, v in model.checkpoint().items()}
    kind = DKMConfig if name == "gim_dkm" else RoMaConfig
    assert kind.of(state) == model.network.config
    with torch.device("meta"):
        full = (DKM if name == "gim_dkm" else RoMa)()
    assert kind.of(full.state_dict()) == kind()
    assert kind.of({}) == kind()


def test_dinov2_stays_outside() -> None:
    model = tiny("gim_roma")
    assert isinstance(model, RoMaTraining)
    inside = {id(p) for p in model.parameters()}
    assert not inside & {id(p) for p in model.dinov2.parameters()}
    assert not any(p.requires_grad for p in model.dinov2.parameters())
    model.train()
    assert not model.dinov2.training
    # Fixed: another process has the same.
    other = tiny("gim_roma", seed=1)
    assert isinstance(other, RoMaTraining)
    for key, value in model.dinov2.state_dict().items():
        assert torch.equal(value, other.dinov2.state_dict()[key])


@both
def test_parameter_groups(name: str) -> None:
    model = tiny(name)
    (slow, encoder), (one, rest) = model.parameter_groups()
    assert (slow, one) == (0.05, 1.0)
    names = {id(p): key for key, p in model.named_parameters()}
    assert all(names[id(p)].startswith("network.encoder.") for p in encoder)
    assert sorted(map(id, encoder + rest)) == sorted(names)


@both
def test_checkpoint_is_taken_over_strictly(name: str) -> None:
    model, other = tiny(name), tiny(name, seed=1)
    state = model.checkpoint()
    assert all(key.startswith("model.") for key in state)
    other.load_checkpoint(state)
    assert all(torch.equal(value, other.checkpoint()[key]) for key, value in state.items())
    state.popitem()
    with pytest.raises(WeightsError, match="missing"):
        other.load_checkpoint(state)


@both
def test_start_from_imagenet(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = tiny(name, seed=1), tiny(name)
    encoder = source.network.encoder["cnn"] if name == "gim_roma" else source.network.encoder.net
    heads = {"classifier.0.weight": torch.zeros(2)}
    if name == "gim_dkm":
        heads = {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
    # Old torchvision files lack the counters of batches.
    published = {
        re.sub(r"^layers\.", "features.", key): value
        for key, value in encoder.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    if name == "gim_roma":
        heads["features.40.weight"] = torch.zeros(2)
    torch.save({**published, **heads}, tmp_path / "encoder.pth")
    before = {k: v.clone() for k, v in model.checkpoint().items()}
    model.initialise(tmp_path / "encoder.pth")
    for key, value in model.checkpoint().items():
        if value.dim() > 1:
            wanted = source.checkpoint() if ".encoder." in key else before
            assert torch.equal(value, wanted[key]), key
    torch.save({"state_dict": source.checkpoint()}, tmp_path / "whole.ckpt")
    model.initialise(tmp_path / "whole.ckpt")
    for key, value in model.checkpoint().items():
        assert torch.equal(value, source.checkpoint()[key])
    with caplog.at_level(logging.WARNING):
        model.initialise(None)
    assert model.encoder_file in caplog.text


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="Did you mean 'hidden'"):
        build_model("gim_dkm", hiden=2)
    with pytest.raises(InputError, match="Did you mean 'gim_dkm'"):
        build_model("gim_dmk")
    with pytest.raises(InputError, match="multiple of 128"):
        build_model("gim_roma", position=100)
    with pytest.raises(InputError, match="balanced"):
        tiny("gim_dkm", draw="random")
    with pytest.raises(InputError, match="multiples of 56"):
        tiny("gim_roma")(collate(make_pairs(1, (128, 96))))


# ----------------------------------------------------------------------------------------- matches


def test_threshold_sample() -> None:
    certainty = torch.tensor([0.9, 0.0, 0.06, 0.04, 0.0, 1.0])
    assert sorted(threshold_sample(certainty, 10).tolist()) == [0, 2, 3, 5]
    assert threshold_sample(torch.zeros(4), 10).tolist() == []
    draws = torch.stack([threshold_sample(certainty, 1, seed=s) for s in range(400)])
    counts = torch.bincount(draws.flatten(), minlength=6)
    # Above the threshold all count as 1.
    assert counts[[0, 2, 5]].min() > 90
    assert counts[3] < 40


@both
@pytest.mark.parametrize("draw", ["threshold", "balanced"])
def test_matches_of_a_batch(name: str, draw: str) -> None:
    first, second = make_pairs(2, BOX[name])
    second.valid0[:, 60:] = False
    second.valid1[60:] = False
    model = tiny(name, draw=draw, num_matches=200).train()
    found = model.match(collate([first, second]))
    assert model.training
    assert model.network.training
    (alone,) = model.match(collate([first]))
    for ours, theirs in zip(found[0], alone, strict=True):
        assert ours.shape[0] == 200
        assert not ours.requires_grad
        if draw == "threshold":
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    xy0, xy1, scores = found[1]
    assert xy0[:, 0].max() <= 59.5
    assert xy1[:, 1].max() <= 59.5
    assert scores.min() > 0
    again = model.match(collate([first, second]))[1]
    assert all(torch.equal(x, y) for x, y in zip(found[1], again, strict=True))
    assert not torch.equal(model.match(collate([first, second]), seed=1)[1][0], xy0)


def image_data(image: torch.Tensor, name: str) -> ImageData:
    size = (image.shape[-1], image.shape[-2])
    return ImageData(image=image, name=name, size=size, to_original=np.eye(2, 3))


def save(model: DenseTraining, folder: Path) -> None:
    """Weights where ``matchers.load`` finds them."""
    file, *others = matchers.describe(model.name).checkpoint
    torch.save({"state_dict": model.checkpoint()}, folder / file)
    if isinstance(model, RoMaTraining):
        torch.save(model.dinov2.state_dict(), folder / others[0])


def assert_matcher_agrees(model: DenseTraining, folder: Path, fine: tuple[int, int] | None) -> None:
    """A saved model, loaded by name, gives the numbers of the model in evaluation."""
    model.options = dataclasses.replace(
        model.options, draw="balanced", upsample_size=fine, num_matches=500
    )
    save(model, folder)
    (sample,) = make_pairs(1, BOX[model.name])
    options = {"size": BOX[model.name][::-1], "upsample_size": fine, "pad": False}
    matcher = matchers.load(model.name, device="cpu", num_matches=500, **options)
    images = zip((sample.image0, sample.image1), sample.names, strict=True)
    a, b = (matcher.encode(image_data(image, file)) for image, file in images)
    warp = matcher.warp(a, b)  # type: ignore[attr-defined]
    with torch.no_grad():
        flow, certainty = model.eval().both_ways(collate([sample]))
    for direction, ours in enumerate((warp.flow0, warp.flow1)):
        torch.testing.assert_close(ours, flow[direction, 0].clamp(-1, 1), atol=1e-4, rtol=1e-4)
    inside = (flow[0, 0].abs() <= 1).all(-1)
    assert inside.any()
    seen = torch.where(warp.certainty0 > 0, certainty[0, 0], torch.zeros(()))
    torch.testing.assert_close(warp.certainty0, seen, atol=1e-4, rtol=1e-4)
    found = matcher.match(a, b)
    ((xy0, xy1, scores),) = model.match(collate([sample]))
    assert len(found) == len(scores) > 0
    # Numbers differ in the last digits (order of memory), which may change single draws.
    same = ((found.keypoints0 - xy0).abs().amax(1) < 0.01) & (
        (found.keypoints1 - xy1).abs().amax(1) < 0.01
    )
    assert same.double().mean() > 0.95
    torch.testing.assert_close(found.scores[same], scores[same], atol=1e-4, rtol=1e-4)


@both
@pytest.mark.parametrize("fine", [None, (120, 160)])
def test_the_matcher_gives_the_numbers_of_the_model(
    name: str, fine: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    model = tiny(name).train()
    with torch.no_grad():  # running statistics other than the first ones
        model(collate(make_pairs(2, BOX[name])))
    assert_matcher_agrees(model, tmp_path, fine)


def test_another_dinov2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    save(tiny("gim_roma"), tmp_path)
    other = tiny("gim_roma", tokens=128)
    assert isinstance(other, RoMaTraining)
    torch.save(other.dinov2.state_dict(), tmp_path / "dinov2_vitl14_pretrain.pth")
    with pytest.raises(WeightsError, match="64 channels"):
        matchers.load("gim_roma", device="cpu")


# ------------------------------------------------------------------------------- learning by heart


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "steps"), [("gim_dkm", 4, 180), ("gim_roma", 2, 200)])
def test_eight_pairs_are_learnt(
    name: str, size: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From random numbers; the total loss in evaluation, before and after."""
    monkeypatch.setenv("GIM_HLOC_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    model = tiny(name, num_matches=1000)
    pairs = overfit_set(BOX[name])
    whole = collate(pairs)

    def measure() -> tuple[float, float]:
        model.eval()
        with torch.no_grad():
            loss = model(whole)["loss"].item()
        shares = [
            share_within(sample, xy0, xy1)
            for sample, (xy0, xy1, _) in zip(pairs, model.match(whole), strict=True)
        ]
        model.train()
        return loss, sum(shares) / len(shares)

    loss_before, share_before = measure()
    # One rate for all: an encoder that starts from random numbers has to learn as the rest.
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps, pct_start=0.1
    )
    batches = [collate(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    first_loss = None
    for step in range(steps):
        optimiser.zero_grad()
        loss = model(batches[step % len(batches)])["loss"]
        first_loss = loss.item() if first_loss is None else first_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        schedule.step()
    loss_after, share_after = measure()
    assert share_before < 0.02
    assert share_after >= 0.8
    assert loss_after <= loss_before / 10
    assert first_loss is not None
    assert loss.item() <= first_loss / 10
    assert_matcher_agrees(model, tmp_path, None)
