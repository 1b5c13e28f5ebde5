"""RoMa to be trained: ``gim_roma``.

The network is the one that matches, run in one direction and without its second pass; its losses
are in ``losses.roma``. DINOv2 is frozen and stays outside: it is no part of the
checkpoint, its parameters are none of the module's, and no optimiser or process group sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.matchers.roma import DINOV2, check_tokens, load_dinov2
from gim_hloc.networks.dinov2 import HEAD as DINOV2_HEAD
from gim_hloc.networks.dinov2 import PATCH, DINOv2
from gim_hloc.networks.roma import HEAD, RoMa, RoMaConfig
from gim_hloc.options import options, select
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.losses.common import Labels, Scales, Truth
from gim_hloc.training.losses.roma import depth_loss, label_loss
from gim_hloc.training.models.dense import DenseOptions, DenseTraining

_VGG_LAYERS = 40  # of torchvision's ``features`` that are used


@options
class RoMaOptions(DenseOptions, RoMaConfig):
    """RoMa to be trained; the defaults are the published network and training."""

    momentum: float = 0.01
    """Of the running statistics in the refiners. The published one remembers hundreds of steps:
    trainings of a few hundred need 0.1."""
    dinov2: Path | None = None
    """File of DINOv2's weights; None: the published file, where ``weights.locate`` finds it."""
    untrained_dinov2: bool = False
    """A small DINOv2 with fixed random weights instead, for tests and examples."""

    def __post_init__(self) -> None:
        dim = self.position + self.projected[16]
        if dim > HEAD and dim % HEAD:
            raise InputError(
                f"position and the projection at stride 16 have {dim} channels together; above "
                f"{HEAD}, a multiple of {HEAD} is needed."
            )


class RoMaTraining(DenseTraining):
    """RoMa and its losses.

    Raises:
        WeightsError: DINOv2 cannot be had or has another number of channels.
    """

    options_type = RoMaOptions
    encoder_file = "vgg19_bn-c79401a0.pth"

    def __init__(self, name: str, options: RoMaOptions) -> None:
        network = RoMa(select(RoMaConfig, options))
        super().__init__(name, network, options)
        for module in network.decoder.conv_refiner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = options.momentum
        if options.untrained_dinov2:
            dinov2 = _untrained(options.tokens)
        else:
            path = options.dinov2 or weights.locate(DINOV2)
            dinov2 = load_dinov2(weights.load_state_dict(path), path=str(path))
            check_tokens(network, dinov2, path=name)
        # In a tuple, where nn.Module does not find it.
        self._outside = (dinov2.eval().requires_grad_(False),)

    @property
    def dinov2(self) -> DINOv2:
        """The frozen transformer."""
        return self._outside[0]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """DINOv2's (B, C, H / 14, W / 14) of images (B, 3, H, W)."""
        width, height = images.shape[-1], images.shape[-2]
        if width % PATCH or height % PATCH:
            raise InputError(
                f"RoMa is trained on boxes whose sides are multiples of {PATCH} px, not on "
                f"{width} x {height}. Data are cut to multiples of 8: use multiples of 56."
            )
        with torch.no_grad():
            return self.dinov2.to(images.device)(images).detach()

    def predict(self, batch: PairBatch) -> tuple[Scales, Any]:
        """See ``DenseTraining``; more are the classes' logits and their certainty."""
        images = torch.cat([batch.image0, batch.image1])
        recompute = self.options.recompute and torch.is_grad_enabled()
        scales, coarse = self.network.match_scales(self.tokens(images), images, recompute=recompute)
        return scales, coarse

    def losses(
        self, scales: Scales, more: Any, truth: Mapping[int, Truth], batch: PairBatch
    ) -> dict[str, torch.Tensor]:
        """See ``DenseTraining``."""
        return depth_loss(scales, more, truth)

    def label_losses(
        self, scales: Scales, more: Any, labels: Labels
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """See ``DenseTraining``."""
        return label_loss(scales, more[0], labels), {}

    def both_ways(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DenseTraining``."""
        size, factor = self.options.upsample_size, 1.0
        sides = []
        for image in (batch.image0, batch.image1):
            fine = None
            if size is not None:
                fine = nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)
                factor = (size[0] * size[1] / (image.shape[-2] * image.shape[-1])) ** 0.5
            sides.append(self.network.encode(self.tokens(image), image, fine))
        flow, certainty = self.network.match(*sides, scale_factors=(1.0, factor))
        return flow, certainty

    def encoder_part(
        self, state: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """See ``DenseTraining``."""
        prefix = "features."
        part = {
            f"layers.{key.removeprefix(prefix)}": value
            for key, value in state.items()
            if key.startswith(prefix) and int(key.split(".")[1]) < _VGG_LAYERS
        }
        return self.network.encoder["cnn"], part


def _untrained(dim: int) -> DINOv2:
    """A transformer of two blocks whose random weights are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DINOv2(dim=dim, depth=2, heads=max(1, dim // DINOV2_HEAD), side=8)
        with torch.no_grad():
            network.pos_embed.normal_(std=0.3)
            for name, value in network.named_parameters():
                if name.endswith("gamma"):
                    value.fill_(0.5)
    return network
