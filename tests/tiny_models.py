"""Small configurations of the six models that can be trained, and runs with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from training_driver import make_config
from training_scene import make_pairs, overfit_set

from gim_hloc.training.batch import PairSample
from gim_hloc.training.loader import PairData
from gim_hloc.training.models import build_model
from gim_hloc.training.models.base import TrainingModel
from gim_hloc.training.trainer import TrainReport, train

_RADIUS = {16: 2, 8: 2, 4: 2}
_DISPLACEMENT = {16: 16, 8: 8, 4: 8, 2: 4, 1: 4}
_GLUE: dict[str, Any] = {
    "keypoints": 256, "layers": 2, "dim": 64, "heads": 2, "detection_threshold": 0.0,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gim_dkm": {
        "stem": 16,
        "blocks": (1, 1, 1, 1),
        "projected": 64,
        "reduced": 32,
        "position": 64,
        "context": 64,
        "displacement": _DISPLACEMENT,
        "radius": _RADIUS,
        "hidden": 2,
    },
    "gim_roma": {
        "tokens": 64,
        "vgg": (12, 16, 24, 32),
        "projected": {16: 64, 8: 32, 4: 24, 2: 12, 1: 6},
        "displacement": _DISPLACEMENT,
        "radius": _RADIUS,
        "position": 64,
        "blocks": 2,
        "anchors": 16,
        "hidden": 2,
        "momentum": 0.1,
        "untrained_dinov2": True,
    },
    "gim_loftr": {
        "encoder": 8, "blocks": (1, 1, 1), "coarse": 64, "middle": 24, "fine": 16, "layers": 4,
        "fine_share": 0.4, "fine_truth": 40,
    },
    "gim_lightglue": {**_GLUE, "detector": "random"},
    "aliked_lightglue": _GLUE,
    "disk_lightglue": _GLUE,
}  # fmt: skip
BOX = {"gim_roma": (112, 112)}  # (width, height), px; else:
USUAL_BOX = (128, 96)
DETECTOR_FILES = {"aliked_lightglue": "aliked-n16.pth", "disk_lightglue": "disk-depth-save.pth"}


def box(name: str) -> tuple[int, int]:
    """(width, height) in pixels of a model's small images."""
    return BOX.get(name, USUAL_BOX)


class _Samples:
    """Pairs in memory; sends the process SIGTERM when the n-th is asked for."""

    def __init__(self, samples: list[PairSample], stop_at: int) -> None:
        self.samples, self.left = samples, stop_at

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> PairSample:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.samples[key[0]]


def run(name: str, folder: Path, *, stop_at: int = 0, **changes: Any) -> TrainReport:
    """Train on eight pairs, four with depth and four with labels; optimiser steps of four pairs."""
    samples = overfit_set(box(name))[:4] + make_pairs(8, box(name), labels=True)[4:]

    def keys(epoch: int, rank: int, world: int) -> list[tuple[int, int]]:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [(index, epoch) for index in order][rank::world]

    data = PairData(train=_Samples(samples, stop_at), keys=keys)
    settings = {"model": name, "data.box": list(box(name)), "optimiser.lr": 1e-3, "epochs": 2}

    def build(_: Any) -> TrainingModel:
        return build_model(name, **TINY[name])

    return train(make_config(**{**settings, **changes}), folder, build=build, data=lambda _: data)


def train_alone(name: str, folder: Path, changes: Mapping[str, Any]) -> int:
    """The same as all that a process does; its exit code."""
    torch.set_num_threads(1)
    return 0 if run(name, folder, **changes).finished else 1
