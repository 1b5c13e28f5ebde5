"""DKM to be trained: ``gim_dkm``.

The network is the one that matches, run in one direction and without its second pass; its losses
are in ``losses.dkm``. Where positions come from, gradients do not go: see
``DKM.match_scales``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gim_hloc.networks.dkm import DKM, DKMConfig
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.losses.common import Labels, Scales, Truth
from gim_hloc.training.losses.dkm import depth_loss, label_loss
from gim_hloc.training.models.dense import DenseTraining, Draw

WITHOUT_CERTAINTY = ("scannet",)  # data sets whose depth has holes where matches are right


class DKMTraining(DenseTraining):
    """DKM and its losses; see ``DenseTraining``."""

    encoder_file = "resnet50-0676ba61.pth"

    def predict(self, batch: PairBatch) -> tuple[Scales, Any]:
        """See ``DenseTraining``."""
        images = batch.image0, batch.image1
        recompute = self.recompute and torch.is_grad_enabled()
        return self.network.match_scales(*images, recompute=recompute), None

    def losses(
        self, scales: Scales, more: Any, truth: Mapping[int, Truth], batch: PairBatch
    ) -> dict[str, torch.Tensor]:
        """See ``DenseTraining``."""
        taught = [name.lower() not in WITHOUT_CERTAINTY for name in batch.dataset]
        with_certainty = torch.tensor(taught, device=batch.image0.device)
        return depth_loss(scales, truth, with_certainty)

    def label_losses(
        self, scales: Scales, more: Any, labels: Labels
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """See ``DenseTraining``."""
        parts = label_loss(scales, labels)
        return {"flow": parts["flow"]}, {"certainty": parts["certainty"]}

    def both_ways(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DenseTraining``."""
        sizes = {"size": batch.box[::-1], "upsample_size": self.upsample_size}
        a, b = (self.network.encode(image, **sizes) for image in (batch.image0, batch.image1))
        flow, certainty = self.network.match(a, b)
        return flow, certainty

    def encoder_part(
        self, state: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """See ``DenseTraining``."""
        part = {key: value for key, value in state.items() if not key.startswith("fc.")}
        return self.network.encoder.net, part


_FULL = DKMConfig()


def build(
    name: str,
    *,
    stem: int = _FULL.stem,
    blocks: tuple[int, ...] = _FULL.blocks,
    projected: int = _FULL.projected,
    reduced: int = _FULL.reduced,
    position: int = _FULL.position,
    context: int = _FULL.context,
    displacement: Mapping[int, int] | None = None,
    radius: Mapping[int, int] | None = None,
    hidden: int = _FULL.hidden,
    labels: int = 2048,
    draw: Draw = "threshold",
    num_matches: int = 5000,
    upsample_size: tuple[int, int] | None = None,
    recompute: bool = False,
) -> DKMTraining:
    """DKM to be trained; the defaults are the published network and training.

    Args:
        name: ``gim_dkm``.
        stem: see ``DKMConfig``, as the next eight.
        blocks: of the encoder's four layers.
        projected: channels.
        reduced: channels.
        position: channels.
        context: channels.
        displacement: channels by stride.
        radius: cells by stride.
        hidden: blocks.
        labels: see ``DenseTraining``, as what follows.
        draw: "threshold" or "balanced".
        num_matches: per sample.
        upsample_size: (height, width) or None.
        recompute: less memory, more time.
    """
    config = DKMConfig(
        stem=stem,
        blocks=tuple(blocks),  # type: ignore[arg-type]
        projected=projected,
        reduced=reduced,
        position=position,
        context=context,
        displacement=by_stride(displacement) or _FULL.displacement,
        radius=by_stride(radius) if radius is not None else _FULL.radius,
        hidden=hidden,
    )
    return DKMTraining(
        name,
        network=DKM(config),
        labels=labels,
        draw=draw,
        num_matches=num_matches,
        upsample_size=upsample_size,
        recompute=recompute,
    )


def by_stride(values: Mapping[Any, int] | None) -> dict[int, int]:
    """Integer keys: configuration files may hold strings."""
    return {int(key): int(value) for key, value in (values or {}).items()}
