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
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.losses.common import Labels, Scales, Truth
from gim_hloc.training.losses.roma import depth_loss, label_loss
from gim_hloc.training.models.dense import DenseTraining, Draw
from gim_hloc.training.models.dkm import by_stride

_VGG_LAYERS = 40  # of torchvision's ``features`` that are used


class RoMaTraining(DenseTraining):
    """RoMa and its losses.

    Args:
        name: of the matcher in the registry.
        dinov2: gives the coarse features, frozen.
        **options: see ``DenseTraining``.
    """

    encoder_file = "vgg19_bn-c79401a0.pth"

    def __init__(self, name: str, *, dinov2: DINOv2, **options: Any) -> None:
        super().__init__(name, **options)
        # In a tuple, where nn.Module does not find it.
        self._outside = (dinov2.eval().requires_grad_(False),)

    @property
    def dinov2(self) -> DINOv2:
        """The frozen transformer."""
        return self._outside[0]

    def dinov2_checkpoint(self) -> dict[str, torch.Tensor]:
        """Its weights in the layout of Meta's file, which ``matchers.load`` reads beside ours."""
        return dict(self.dinov2.state_dict())

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
        recompute = self.recompute and torch.is_grad_enabled()
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
        sides = []
        for image in (batch.image0, batch.image1):
            fine = None
            if self.upsample_size is not None:
                fine = nn.functional.interpolate(
                    image, self.upsample_size, mode="bilinear", align_corners=False
                )
            sides.append(self.network.encode(self.tokens(image), image, fine))
        factor = 1.0
        if self.upsample_size is not None:
            width, height = batch.box
            factor = (self.upsample_size[0] * self.upsample_size[1] / (width * height)) ** 0.5
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


_FULL = RoMaConfig()


def build(
    name: str,
    *,
    tokens: int = _FULL.tokens,
    vgg: tuple[int, ...] = _FULL.vgg,
    projected: Mapping[int, int] | None = None,
    displacement: Mapping[int, int] | None = None,
    radius: Mapping[int, int] | None = None,
    position: int = _FULL.position,
    blocks: int = _FULL.blocks,
    anchors: int = _FULL.anchors,
    hidden: int = _FULL.hidden,
    momentum: float = 0.01,
    dinov2: str | Path | None = None,
    untrained_dinov2: bool = False,
    labels: int = 2048,
    draw: Draw = "threshold",
    num_matches: int = 5000,
    upsample_size: tuple[int, int] | None = None,
    recompute: bool = False,
) -> RoMaTraining:
    """RoMa to be trained; the defaults are the published network and training.

    Args:
        name: ``gim_roma``.
        tokens: channels of DINOv2; see ``RoMaConfig``, as the next eight.
        vgg: channels of the encoder at strides 1, 2, 4 and 8.
        projected: channels by stride.
        displacement: channels by stride.
        radius: cells by stride.
        position: channels.
        blocks: of the coarse transformer.
        anchors: on a side of the grid of classes.
        hidden: blocks of a refiner after its first.
        momentum: of the running statistics in the refiners. The published one remembers hundreds of
            steps: trainings of a few hundred need 0.1.
        dinov2: file of its weights; None: the published file, wherever ``weights.locate`` finds it.
        untrained_dinov2: a small one with fixed random weights instead, for tests and examples
            without weight files; ``RoMaTraining.dinov2_checkpoint`` gives its weights.
        labels: see ``DenseTraining``, as what follows.
        draw: "threshold" or "balanced".
        num_matches: per sample.
        upsample_size: (height, width) or None.
        recompute: less memory, more time.

    Raises:
        InputError: sizes that the network cannot have.
        WeightsError: DINOv2 cannot be had or has another number of channels.
    """
    projected = by_stride(projected) or dict(_FULL.projected)
    dim = position + projected[16]
    if dim > HEAD and dim % HEAD:
        raise InputError(
            f"position and the projection at stride 16 have {dim} channels together; above {HEAD}, "
            f"a multiple of {HEAD} is needed."
        )
    config = RoMaConfig(
        tokens=tokens,
        vgg=tuple(vgg),  # type: ignore[arg-type]
        projected=projected,
        displacement=by_stride(displacement) or _FULL.displacement,
        radius=by_stride(radius) if radius is not None else _FULL.radius,
        position=position,
        blocks=blocks,
        heads=max(1, dim // HEAD),
        anchors=anchors,
        hidden=hidden,
    )
    network = RoMa(config)
    for module in network.decoder.conv_refiner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    if untrained_dinov2:
        transformer = _untrained(tokens)
    else:
        path = weights.locate(DINOV2) if dinov2 is None else Path(dinov2)
        transformer = load_dinov2(weights.load_state_dict(path), path=str(path))
        check_tokens(network, transformer, path=name)
    return RoMaTraining(
        name,
        dinov2=transformer,
        network=network,
        labels=labels,
        draw=draw,
        num_matches=num_matches,
        upsample_size=upsample_size,
        recompute=recompute,
    )


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
