"""A small model and pairs in memory, and a run with them as a process of its own.

``python training_driver.py OUT key=value ...`` or the same under torchrun. Values are settings of
the run; ``kill_at``, ``signal`` and ``dump`` are the driver's own.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gim_hloc.options import build
from gim_hloc.training import logs
from gim_hloc.training.batch import PairBatch, PairSample
from gim_hloc.training.config import TrainConfig
from gim_hloc.training.loader import PairData
from gim_hloc.training.models.base import Match, TrainingModel

BOX = (16, 8)


def read_table(folder: Path) -> dict[str, dict[int, float]]:
    """What a run logged: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    with open(folder / logs.TABLE, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    return found


class Pairs:
    """Random images; image 1 is image 0 moved by whole pixels, which the labels say.

    Keys are (index, seed): the seed adds noise, as an augmentation would.
    """

    def __init__(self, count: int, *, poison: tuple[int, ...] = ()) -> None:
        self.count = count
        self.poison = poison

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> PairSample:
        index, seed = key
        width, height = BOX
        content = torch.Generator().manual_seed(index)
        image0 = torch.rand(3, height, width, generator=content)
        shift = int(torch.randint(1, 4, (1,), generator=content))
        image1 = image0.roll(shift, dims=-1)
        noise = torch.Generator().manual_seed(seed)
        image0 = image0 + 0.01 * torch.rand(image0.shape, generator=noise)
        if index in self.poison:
            image0 = image0 * float("nan")
        valid = torch.ones(height, width, dtype=torch.bool)
        x = torch.arange(width - shift).float()
        labels = torch.stack([x, x * 0 + 4, x + shift, x * 0 + 4], 1)
        eye = torch.eye(3, dtype=torch.float64)
        return PairSample(
            image0=image0, image1=image1, valid0=valid, valid1=valid, to_original0=eye,
            to_original1=eye, size0=BOX, size1=BOX, dataset="memory",
            names=(f"{index}a", f"{index}b"), labels=labels,
        )  # fmt: skip


def make_data(count: int = 12, *, valid: int = 5, poison: tuple[int, ...] = ()) -> PairData:
    def keys(epoch: int, rank: int, world: int) -> list[tuple[int, int]]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [(index, 1000 * epoch + index) for index in order][rank::world]

    return PairData(
        train=Pairs(count, poison=poison),
        keys=keys,
        valid=Pairs(valid),
        valid_keys=[(index, 0) for index in range(valid)],
    )


class Shift(TrainingModel):
    """Tells by how many pixels image 1 is moved, badly."""

    name = "shift"

    def __init__(self, *, norm: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.Tanh()
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)

    def predict(self, batch: PairBatch) -> torch.Tensor:
        features = self.encoder(torch.cat([batch.image0, batch.image1], 1)).mean((2, 3))
        predicted: torch.Tensor = self.head(self.drop(features))[:, 0]
        return predicted

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        target = batch.labels[:, 0, 2] - batch.labels[:, 0, 0]
        loss = (self.predict(batch) - target).square().mean()
        return {"loss": loss, "square": loss.detach()}

    @torch.no_grad()
    def match(self, batch: PairBatch, *, seed: int = 0) -> list[Match]:
        training = self.training
        self.eval()
        shift = self.predict(batch)
        self.train(training)
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(len(batch), 40, generator=generator).to(shift.device) * (BOX[0] - 1)
        points = torch.stack([x, torch.full_like(x, 4.0)], -1)
        moved = points + torch.stack([shift, shift * 0], -1)[:, None]
        return [(a, b, torch.ones(len(a))) for a, b in zip(points, moved, strict=True)]

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(0.1, list(self.encoder.parameters())), (1.0, list(self.head.parameters()))]

    def checkpoint(self) -> dict[str, torch.Tensor]:
        return {f"model.{k}": v for k, v in self.state_dict().items()}

    def load_checkpoint(self, state: Mapping[str, torch.Tensor]) -> None:
        self.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})

    def initialise(self, path: Path | None) -> None:
        pass


def make_config(**changes: Any) -> TrainConfig:
    """A run of 4 epochs of 12 pairs with settings like ``optimiser.lr`` changed."""
    nested: dict[str, Any] = {}
    defaults: dict[str, Any] = {
        "model": "shift", "epochs": 4, "data.workers": 0, "data.box": list(BOX),
        "optimiser.lr": 0.05, "optimiser.min_lr": 0.001, "optimiser.canonical_batch": 4,
        "runtime.accelerator": "cpu", "runtime.devices": "1", "log.every": 1, "log.save_every": 2,
        "log.pictures_every": 0, "log.tensorboard": False,
    }  # fmt: skip
    for name, value in (defaults | changes).items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return build(TrainConfig, nested, where="the test")


class Interrupted(Pairs):
    """Sends the process a signal when its n-th sample is asked for."""

    def __init__(self, count: int, at: int, number: int) -> None:
        super().__init__(count)
        self.left, self.number = at, number

    def __getitem__(self, key: tuple[int, int]) -> PairSample:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(key)


def main(arguments: list[str]) -> int:
    from gim_hloc.training.trainer import train

    torch.set_num_threads(1)
    given = {k: yaml.safe_load(v) for k, v in (a.split("=", 1) for a in arguments[1:])}
    at, number = given.pop("kill_at", 0), getattr(signal, given.pop("signal", "SIGTERM"))
    rank = given.pop("kill_rank", None)
    norm, dropout = given.pop("norm", True), given.pop("dropout", 0.1)
    data = make_data()
    if at and (rank is None or str(rank) == os.environ["RANK"]):
        data = dataclasses.replace(data, train=Interrupted(12, at, number))
    report = train(
        make_config(**given),
        Path(arguments[0]),
        build=lambda _: Shift(norm=norm, dropout=dropout),
        data=lambda _: data,
    )
    return 0 if report.interrupted is None else 128 + report.interrupted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
