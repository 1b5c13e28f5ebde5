"""What the training loop asks of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from gim_hloc.training.batch import PairBatch

Match = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(M, 2) and (M, 2) float32 network pixels of both images, (M,) float32 scores."""


class TrainingModel(nn.Module, ABC):
    """A network with its losses, as one module for an optimiser.

    Made of a name and options with random weights (see `initialise` for others).

    Attributes:
        options_type: class of its options, made by `gim_hloc.options.options`.
        name: of the matcher in the registry that reads ``checkpoint()``.
        notes: what the matcher must know about the weights beside their values; they stand in
            checkpoint files under ``gim_hloc.weights.NOTES``.
    """

    options_type: ClassVar[Any]
    name: str
    notes: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Returns:
            "loss": the scalar to differentiate, a mean over samples, so that one batch of two is
            two accumulated batches of one (batch normalisation aside). Everything else is detached
            and for the log. Never NaN: a sample without valid truth adds zero, and every trainable
            parameter gets a gradient all the same, as distributed training wants.
        """

    @abstractmethod
    def match(self, batch: PairBatch, *, seed: int = 0) -> list[Match]:
        """Matches of every sample as this model's matcher draws them at test, without gradients.

        The mode (training or evaluation) of the modules is as before afterwards.

        Args:
            batch: the pairs; truth is not looked at.
            seed: of what is drawn.
        """

    @abstractmethod
    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """(factor on the learning rate, parameters), each trainable parameter once."""

    @abstractmethod
    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Weights in the layout of the published file, ``model.`` and other prefixes included.

        ``gim_hloc.matchers.load`` reads them. Frozen networks that come from a file of their own
        are left out where the published layout leaves them out.
        """

    @abstractmethod
    def load_checkpoint(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights of ``checkpoint()`` or of the published file, strictly.

        Raises:
            WeightsError: names or shapes are not this model's.
        """

    @abstractmethod
    def initialise(self, path: Path | None) -> None:
        """Take over the weights that training starts from.

        Args:
            path: a weight file (ImageNet's encoder, ...; each model says which), or None to start
                from random numbers, with a warning that names the file which would serve better.
        """


def keep_graph(loss: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The same loss, on which every trainable parameter of a module depends (with slope 0)."""
    rest = [p.sum() * 0 for p in module.parameters() if p.requires_grad]
    return loss + torch.stack(rest).sum() if rest else loss
