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
from gim_hloc.options import options, select
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.losses.common import Labels, Scales, Truth
from gim_hloc.training.losses.dkm import depth_loss, label_loss
from gim_hloc.training.models.dense import DenseOptions, DenseTraining

WITHOUT_CERTAINTY = ("scannet",)  # data sets whose depth has holes where matches are right


@options
class DKMOptions(DenseOptions, DKMConfig):
    """DKM to be trained; the defaults are the published network and training."""


class DKMTraining(DenseTraining):
    """DKM and its losses; see ``DenseTraining``."""

    options_type = DKMOptions
    encoder_file = "resnet50-0676ba61.pth"

    def __init__(self, name: str, options: DKMOptions) -> None:
        super().__init__(name, DKM(select(DKMConfig, options)), options)

    def predict(self, batch: PairBatch) -> tuple[Scales, Any]:
        """See ``DenseTraining``."""
        images = batch.image0, batch.image1
        recompute = self.options.recompute and torch.is_grad_enabled()
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
        sizes = {"size": batch.box[::-1], "upsample_size": self.options.upsample_size}
        a, b = (self.network.encode(image, **sizes) for image in (batch.image0, batch.image1))
        flow, certainty = self.network.match(a, b)
        return flow, certainty

    def encoder_part(
        self, state: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """See ``DenseTraining``."""
        part = {key: value for key, value in state.items() if not key.startswith("fc.")}
        return self.network.encoder.net, part
