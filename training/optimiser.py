"""Optimiser steps that take effect, or leave no trace if something is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gim_hloc.errors import InputError
from gim_hloc.training.checkpoints import Progress
from gim_hloc.training.config import TrainConfig

if TYPE_CHECKING:
    from gim_hloc.training.models.base import TrainingModel


def make_optimiser(
    config: TrainConfig, model: TrainingModel, *, fused: bool
) -> torch.optim.Optimizer:
    """Return the optimiser of a model's parameter groups, with learning rate 0.

    Raises:
        InputError: the groups do not hold every trainable parameter exactly once.
    """
    groups = [
        {"params": list(parameters), "factor": float(factor)}
        for factor, parameters in model.parameter_groups()
    ]
    groups = [group for group in groups if group["params"]]
    grouped = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise InputError(
            f"The parameter groups of {model.name} hold {len(grouped)} parameters, of which "
            f"{len(set(grouped))} differ; its trainable ones are {len(trainable)}."
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimiser.name]
    return kind(
        groups, lr=0.0, weight_decay=config.optimiser.weight_decay, fused=True if fused else None
    )


class Statistics:
    """Running statistics of batch normalisations, to put them back after a step that was skipped.

    The forward pass changes them: without this, one bad batch would leave NaN in them for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        """Remember them."""
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    def restore(self, bad: torch.Tensor | None = None) -> None:
        """Put them back, or only if ``bad`` (on their device, not read) is not zero."""
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept if bad is None else torch.where(bad > 0, kept, live))


class Step:
    """Clips, checks and applies gradients; a step that is not finite leaves everything as it was.

    On CUDA nothing is read back: the fused optimiser is told on the device whether to act, and the
    counts are read when something is logged.
    """

    def __init__(
        self,
        model: TrainingModel,
        optimiser: torch.optim.Optimizer,
        *,
        clip: float,
        device: torch.device,
    ) -> None:
        self.optimiser = optimiser
        self.statistics = Statistics(model)
        self._parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self._clip = clip if clip > 0 else float("inf")
        self._on_device = bool(optimiser.param_groups[0].get("fused")) and device.type == "cuda"
        # Skipped in all, skipped in a row, and the most of those since the counts were last read.
        self._counts = torch.zeros(3, device=device)
        self.norm = torch.zeros((), device=device)

    def restore(self, progress: Progress) -> None:
        """Set the counts."""
        row = float(progress.bad_in_row)
        self._counts = torch.tensor([progress.skipped, row, row], device=self._counts.device)

    def apply(self, lr: float) -> None:
        """Take an optimiser step with the gradients that are there, and drop them."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["factor"] * lr
        self.norm = nn.utils.clip_grad_norm_(self._parameters, self._clip).detach()
        bad = (~torch.isfinite(self.norm)).float()
        if self._on_device:
            self.optimiser.grad_scale = None  # type: ignore[attr-defined]
            self.optimiser.found_inf = bad  # type: ignore[attr-defined]
            self.optimiser.step()
            self.statistics.restore(bad)
        elif bool(bad):
            self.statistics.restore()
        else:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        total, row, most = self._counts.unbind()
        row = (row + bad) * bad
        self._counts = torch.stack([total + bad, row, torch.maximum(most, row)])

    def read(self, progress: Progress) -> int:
        """Bring the counts of a run up to date; returns the longest row since the last time."""
        total, row, most = (int(v) for v in self._counts.tolist())
        progress.skipped, progress.bad_in_row = total, row
        self._counts[2] = self._counts[1]
        return most


def scale_loss(loss: torch.Tensor, share: float) -> torch.Tensor:
    """Return the loss times its share of an optimiser step; not finite: NaN gradients everywhere.

    So that every process of a distributed run skips the step, and none needs to read a loss.
    """
    nan = torch.full_like(loss.detach(), float("nan"))
    factor = torch.where(torch.isfinite(loss.detach()), torch.full_like(nan, share), nan)
    return loss * factor
