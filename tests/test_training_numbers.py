"""The numbers of the published trainings: a table of its own, independent of the presets' code.

Rows and names are those of the description that the trainings were written from (§ numbers below);
what a number does is tested elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gim_hloc.training.config import TrainConfig
from gim_hloc.training.data import source_options
from gim_hloc.training.data.augment import AugmentOptions
from gim_hloc.training.loader import source_settings
from gim_hloc.training.losses import dkm, lightglue, loftr, roma
from gim_hloc.training.presets import preset

MODELS = ("gim_loftr", "gim_dkm", "gim_roma", "gim_lightglue")

# §1, §2, §6: setting -> value of loftr, dkm, roma, glue.
TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    "epochs": (10, 10, 370, 50),
    "data.maxlen": ((938240,), (938240,), (25600,), (938240,)),
    "data.box": ((840, 840), (896, 672), (672, 672), (1024, 1024)),
    "data.batch_size": (1, 1, 1, 1),
    "data.valid_batch_size": (2, 2, 2, 2),
    "data.valid_pairs": (1000, 1000, 1000, 1000),
    "data.resample": (True, True, True, True),
    "optimiser.name": ("adamw", "adamw", "adamw", "adam"),
    "optimiser.weight_decay": (0.1, 0.01, 0.01, 0.0),
    "optimiser.lr": (0.001, 0.0008, 0.0008, 0.0001),
    "optimiser.rule": ("step", "step", "step", "epoch"),
    "optimiser.canonical_batch": (64, 120, 120, None),
    "optimiser.clip_norm": (0.5, 0.5, 0.5, 0.5),
    "validation.per_epoch": (1, 5, 1, 5),
    "validation.before": (None, None, None, True),
    "validation.threshold": (0.5, 0.5, 0.5, 0.5),
    "validation.confidence": (0.999999, 0.999999, 0.999999, 0.999999),
    "validation.keep": (5, 5, 5, 5),
    "runtime.precision": ("32", "32", "32", "32"),
    "runtime.sync_batchnorm": (True, True, True, True),
    "log.every": (30, 30, 30, 30),
    "seed": (3407, 3407, 3407, 3407),
    "initial": (
        Path("resnet50-0676ba61.pth"),
        Path("resnet50-0676ba61.pth"),
        Path("vgg19_bn-c79401a0.pth"),
        Path("superpoint_lightglue.pth"),
    ),
}


def _value(config: TrainConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", TABLE)
def test_settings(name: str) -> None:
    found = tuple(_value(preset(f"paper-{model}"), name) for model in MODELS)
    assert found == TABLE[name]


def test_the_files_that_trainings_start_from_are_known() -> None:
    from gim_hloc import weights

    for model in (*MODELS, "aliked_lightglue", "disk_lightglue"):
        assert weights.find(str(preset(f"paper-{model}").initial)) is not None


def test_validation_images() -> None:
    boxes = {"gim_loftr": (840, 840), "gim_dkm": (896, 672), "gim_roma": (672, 672)}
    for model, box in {**boxes, "gim_lightglue": (1280, 1280)}.items():
        config = preset(f"paper-{model}")
        source = {"type": "megadepth", "root": "r"}
        assert tuple(source_settings(config, source, split="validation")["box"]) == box


def test_learning_rates_of_40_gpus() -> None:
    """§2: loftr by the step rule, glue by the epoch rule; accumulation 2, 3, 3, none."""
    from gim_hloc.training.trainer import learning_rate, make_plan

    for model, batches, accumulation in (
        ("gim_loftr", 3 * 23456, 2),
        ("gim_dkm", 3 * 23456, 3),
        ("gim_roma", 3 * 640, 3),
        ("gim_lightglue", 3 * 23456, 1),
    ):
        config = preset(f"paper-{model}")
        plan = make_plan(config, batches=batches, world=40)
        assert plan.accumulation == accumulation
        assert plan.steps_per_epoch == math.ceil(batches / accumulation)
        if model == "gim_lightglue":
            rates = [learning_rate(config, plan, step=0, epoch=e) for e in (0, 29, 30, 39, 49)]
            decayed = [1e-4, 1e-4, 1e-4 * 10**-0.1, 1e-5, 1e-6]
            assert rates == pytest.approx(decayed, rel=1e-9)
            continue
        n1, n = plan.steps_per_epoch, plan.steps_per_epoch * config.epochs
        high, low = config.optimiser.lr, {"gim_loftr": 5e-5}.get(model, 1e-4)
        b = n / (n - n1) * (high - low) + low
        for step in (0, 1, n1 // 2, n1, n1 + 7, n // 2, n - 1):
            warm = 0.1 * high + step / n1 * 0.9 * high
            expected = warm if step < n1 else (n - step) / n * (b - low) + low
            assert learning_rate(config, plan, step=step, epoch=0) == pytest.approx(expected)


def test_parameter_groups() -> None:
    """§2: encoders at 0.1 (loftr) and 0.05 (dkm, roma) of the rate, SuperPoint at none."""
    from gim_hloc.training.models import build_model

    tiny: dict[str, dict[str, Any]] = {
        "gim_loftr": {"encoder": 8, "blocks": [1, 1, 1], "coarse": 32, "middle": 24, "fine": 16,
                      "layers": 2},
        "gim_dkm": {"stem": 4, "blocks": [1, 1, 1, 1]},
        "gim_lightglue": {"detector": "random", "layers": 1, "dim": 32},
    }  # fmt: skip
    words = {"gim_loftr": ("encode.", 0.1), "gim_dkm": ("encoder.", 0.05)}
    for model, options in tiny.items():
        network = build_model(model, **options)
        factor = {id(p): f for f, group in network.parameter_groups() for p in group}
        word, share = words.get(model, ("no such", 1.0))
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        for name, parameter in network.named_parameters():
            if name in trained:
                assert factor.pop(id(parameter)) == (share if word in name else 1.0), name
        assert not factor
        assert any(word in name for name in trained) == (model in words)
        assert not any(name.startswith("detector.") for name in trained)


def test_roma_has_the_encoders_of_dkm() -> None:
    from gim_hloc.training.models.dense import _ENCODER_RATE

    assert _ENCODER_RATE == 0.05  # used by both; its groups are tested with dkm's


def test_augmentation() -> None:
    """§3: of each source under each training."""
    common = {
        "photometric_probability": 0.5, "homography": 0.9, "homography_offset": 0.25,
        "rotation_deg": 180.0, "flip_horizontal": 0.0, "flip_vertical": 0.0, "min_labels": 64,
        "tries": 30, "max_labels": None,
    }  # fmt: skip
    scan = {"gim_loftr": 0.2, "gim_roma": 0.2, "gim_dkm": 0.5, "gim_lightglue": 0.5}
    for model in MODELS:
        config = preset(f"paper-{model}")
        for kind, path, keep, zooms, style in (
            ("megadepth", "root", 0.5, ((0.6, 1.4), (0.6, 1.4)), "dark"),
            ("scannet", "root", scan[model], ((0.6, 1.4), (0.6, 1.4)), "none"),
            ("video", "labels", 0.5, ((0.6, 1.0), (1.0, 1.4)), "dark"),
        ):
            settings = source_settings(config, {"type": kind, path: "p"}, split="train")
            found = source_options(settings).augmentation()
            assert (found.keep_scale, found.photometric) == (keep, style)
            assert (found.zoom0, found.zoom1) == zooms
            assert {name: getattr(found, name) for name in common} == common
            assert found.box == config.data.box
    assert AugmentOptions(box=(843, 679)).network_box == (840, 672)  # floored to multiples of 8


def test_dark_recipe() -> None:
    """§3: probabilities, in order, and the ranges that strengths are drawn from."""
    from gim_hloc.training.data import photometric as p

    recipe = p.RECIPES["dark"]
    assert [chance for chance, _, _ in recipe] == [0.75, 0.1, 0.2, 0.1, 0.1]
    steps = [p.brightness_contrast, p.blur, p.motion_blur, p.gamma, p.value_shift]
    assert [step for _, step, _ in recipe] == steps
    ranges = {
        name: bounds for _, _, ranges in recipe[:1] + recipe[3:] for name, bounds in ranges.items()
    }
    assert ranges == {
        "brightness": (-0.6, 0.0),
        "contrast": (-0.5, 0.3),
        "exponent": (0.15, 0.65),
        "shift": (-100 / 255, -40 / 255),
    }
    # Kernels of 3 to 9 and of 3 to 25 pixels, odd.
    assert (recipe[1][2]["reach"], recipe[2][2]["reach"]) == ((1, 4), (1, 12))
    image, rng = torch.zeros(3, 64, 64), np.random.default_rng(0)
    reaches = [p._draw(*recipe[1][2]["reach"], rng) for _ in range(100)]
    assert {p._size(image, reach) for reach in reaches} == {3, 5, 7, 9}
    assert p._size(torch.zeros(3, 20, 64), 12) == 19  # no kernel is larger than the image


def test_losses() -> None:
    """§5."""
    from gim_hloc.networks.loftr import TEMPERATURE
    from gim_hloc.training.data import truth

    assert (loftr.ALPHA, loftr.GAMMA, loftr.FLOOR, TEMPERATURE) == (0.25, 2, 1e-6, 0.1)
    assert (dkm.CERTAINTY_WEIGHT, dkm.LOCAL, dkm.REACH) == (0.01, 8, 2 / 512 * 4)
    assert (roma.CERTAINTY_WEIGHT, roma.LOCAL) == (0.01, 8)
    assert (roma.EXPONENT, roma.WIDTH) == (0.5, 1e-4)
    assert {s: reach * 512 / 2 for s, reach in roma.REACH.items()} == {1: 4, 2: 4, 4: 8, 8: 8}
    assert (lightglue.POSITIVE_PX, lightglue.NEGATIVE_PX, lightglue.BALANCE) == (3, 5, 0.5)
    assert (truth.CONSISTENCY, truth.MIN_DEPTH) == (0.2, 1e-4)


def test_models() -> None:
    """§5: 2048 labels; loftr's windows; SuperPoint with 2048 points, nms 3, threshold 0."""
    from gim_hloc.matchers.registry import operating_point
    from gim_hloc.training.models import model_options

    usual = {model: model_options(model, {}) for model in MODELS}
    loftr, dkm, roma = usual["gim_loftr"], usual["gim_dkm"], usual["gim_roma"]
    assert loftr.labels == dkm.labels == roma.labels == 2048
    assert dkm.num_matches == roma.num_matches == 5000
    assert dkm.draw == roma.draw == "threshold"
    assert (loftr.fine_share, loftr.fine_truth, loftr.positional) == (0.3, 100, "corrected")
    assert usual["gim_lightglue"].layers == 9
    assert preset("paper-gim_lightglue").model_options == {
        "keypoints": 2048,
        "recompute": True,
    }
    point = operating_point("gim_lightglue")
    assert (point.nms_radius, point.detection_threshold) == (3, 0.0)


def test_sampling() -> None:
    """§3: seed 3407, weights 1 / pairs^0.75, bins of overlap."""
    from gim_hloc.training.data import sampler, source

    assert (sampler.FIRST_SEED, sampler._SCENE_POWER, source.SUBSAMPLING_SEED) == (3407, 0.75, 3407)
    edges = [0.01, 0.11, 0.21, 0.31, 0.41, 0.51, 0.61, 0.7]
    assert source.overlap_edges(0.01, 0.7) == pytest.approx(edges)
    assert source.overlap_edges(0, 0.7) == pytest.approx([k / 10 for k in range(8)])
