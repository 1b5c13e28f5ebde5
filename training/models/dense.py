"""What DKM and RoMa share in training: truth on their grids, labels, matches, checkpoints."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc import weights
from gim_hloc.geometry.sampling import balanced_sample
from gim_hloc.geometry.seeds import pair_seed
from gim_hloc.geometry.warp import cell_centres, normalised_frame, transform
from gim_hloc.matchers.dense import matchable
from gim_hloc.networks.dense import attenuated_certainty
from gim_hloc.options import Count, options
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points
from gim_hloc.training.losses.common import Labels, Scales, Truth, normalise, to_pixels
from gim_hloc.training.models.base import Match, TrainingModel
from gim_hloc.training.models.seeds import sample_seeds

logger = logging.getLogger(__name__)

_THRESHOLD = 0.05  # certainties above it count as 1 when matches are drawn
_ENCODER_RATE = 0.05  # of the learning rate


@options
class DenseOptions:
    """What DKM and RoMa have in common beside their widths."""

    labels: Count = 2048
    """At most so many labels of a sample count, drawn at random."""
    draw: Literal["threshold", "balanced"] = "threshold"
    """How validation draws matches. threshold: one direction at the size of the batch, by
    certainty, as the published one does. balanced: as the matcher, both directions and evenly."""
    num_matches: Count = 5000
    """Matches drawn in validation, per sample."""
    upsample_size: tuple[Count, Count] | None = None
    """(height, width) of the second pass of "balanced"; None leaves it out."""
    recompute: bool = False
    """Compute features again for the gradients instead of keeping them: a third more time, a
    fraction of the memory."""


class DenseTraining(TrainingModel):
    """A dense matcher and its losses."""

    encoder_file: str  # weights that training starts from

    def __init__(self, name: str, network: Any, options: DenseOptions) -> None:
        super().__init__()
        self.name = name
        self.network: Any = network
        self.options = options
        reset_convolutions(network.encoder)

    @abstractmethod
    def predict(self, batch: PairBatch) -> tuple[Scales, Any]:
        """Flow and certainty of all strides, and what else the losses need."""

    @abstractmethod
    def losses(
        self, scales: Scales, more: Any, truth: Mapping[int, Truth], batch: PairBatch
    ) -> dict[str, torch.Tensor]:
        """Parts (B,) whose sum is the loss of samples with depth."""

    @abstractmethod
    def label_losses(
        self, scales: Scales, more: Any, labels: Labels
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Parts (B,) whose sum is the loss of samples with labels, and others for the log."""

    @abstractmethod
    def both_ways(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow (2, B, h, w, 2) and certainty (2, B, h, w) as the matcher computes them."""

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``.

        A sample with depth and labels has the mean of both losses. Parts: ``depth_flow``,
        ``label_flow`` and so on, which add up to the loss; ``error_px``, mean distance of the
        finest flow to the truth where there is depth, in network pixels; those with ``log_`` in
        front are not part of the loss.
        """
        scales, more = self.predict(batch)
        truth = {
            stride: depth_truth(batch, (flow.shape[-2], flow.shape[-1]))
            for stride, (flow, _) in scales.items()
        }
        kinds = batch.has_depth.float() + batch.has_labels.float()
        parts = {
            f"depth_{key}": value * batch.has_depth / kinds.clamp(min=1)
            for key, value in self.losses(scales, more, truth, batch).items()
        }
        logged: dict[str, torch.Tensor] = {}
        if batch.labels.shape[1]:
            counted, also = self.label_losses(scales, more, self._labels(batch))
            for key, value in counted.items():
                parts[f"label_{key}"] = value * batch.has_labels / kinds.clamp(min=1)
            logged = {f"log_label_{key}": value.mean().detach() for key, value in also.items()}
        total = torch.stack([value.mean() for value in parts.values()]).sum()
        logged |= {key: value.mean().detach() for key, value in parts.items()}
        logged["error_px"] = _pixel_error(scales, truth, batch)
        return {"loss": total, **logged}

    def _labels(self, batch: PairBatch) -> Labels:
        """Normalised labels, at most ``self.options.labels`` of each sample."""
        rows, used = _first(batch.labels, batch.label_count, batch.has_labels)
        if rows.shape[1] > self.options.labels:
            order = torch.stack(
                [
                    _drawn(int(count), rows.shape[1], seed)
                    for count, seed in zip(
                        batch.label_count.tolist(), sample_seeds(batch), strict=True
                    )
                ]
            )[:, : self.options.labels].to(rows.device)
            rows = rows.gather(1, order[..., None].expand(-1, -1, 4))
            used = used.gather(1, order)
        return Labels(
            normalise(rows[..., :2], batch.box), normalise(rows[..., 2:], batch.box), used
        )

    @torch.no_grad()
    def match(self, batch: PairBatch, *, seed: int = 0) -> list[Match]:
        """See ``TrainingModel``; how is the option ``draw``."""
        was = self.training
        self.eval()
        try:
            if self.options.draw == "balanced":
                flows, certainties = self.both_ways(batch)
            else:
                scales, _ = self.predict(batch)
                flow, certainty = scales[min(scales)]
                certainty = attenuated_certainty(certainty, scales[16][1])
                flows, certainties = flow.permute(0, 2, 3, 1)[None], certainty[None, :, 0]
        finally:
            self.train(was)
        size = (certainties.shape[-2], certainties.shape[-1])
        valid = [_nearest(v, size) for v in (batch.valid0, batch.valid1)]
        grid = cell_centres(*size, device=flows.device)
        width, height = batch.box
        frame = normalised_frame(width, height, np.eye(2, 3))
        found = []
        for index, names in enumerate(batch.names):
            rows, seen = [], []
            for direction, (flow, certainty) in enumerate(
                zip(flows[:, index], certainties[:, index], strict=True)
            ):
                here, there = valid[direction][index], valid[1 - direction][index]
                kept, allowed = matchable(flow, here, there)
                ends = (grid, kept) if direction == 0 else (kept, grid)
                rows.append(torch.cat(ends, -1).reshape(-1, 4))
                seen.append((certainty * allowed).reshape(-1))
            matches, scores = torch.cat(rows), torch.cat(seen).float()
            own = pair_seed(seed, *names)
            if self.options.draw == "balanced":
                chosen = balanced_sample(
                    matches, scores, self.options.num_matches, threshold=_THRESHOLD, seed=own
                )
            else:
                chosen = threshold_sample(scores, self.options.num_matches, seed=own)
            matches, scores = matches[chosen], scores[chosen]
            found.append(
                (transform(frame, matches[:, :2]), transform(frame, matches[:, 2:]), scores)
            )
        return found

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """The encoder at a twentieth of the learning rate, and the rest."""
        encoder = list(self.network.encoder.parameters())
        return [(_ENCODER_RATE, encoder), (1.0, list(self.network.decoder.parameters()))]

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``: ``model.`` before the network's names."""
        return {f"model.{key}": value.detach() for key, value in self.network.state_dict().items()}

    def load_checkpoint(self, state: Mapping[str, torch.Tensor]) -> None:
        """See ``TrainingModel``."""
        self._load(state, "the checkpoint")

    def _load(self, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
        plain = weights.unwrap(self.name.removeprefix("gim_"), state)
        weights.load_into(self.network, plain, path=path)

    def initialise(self, path: Path | None) -> None:
        """Start from ImageNet's encoder, or go on from a checkpoint of this network.

        Args:
            path: the encoder's weights as torchvision publishes them (``encoder_file``), or a file
                with all of this network's weights.
        """
        if path is None:
            logger.warning(
                "The encoder of %s starts from random numbers. ImageNet's weights (%s) serve "
                "better.",
                self.name,
                self.encoder_file,
            )
            return
        state = weights.load_state_dict(path)
        if weights.recognise(state) == weights.recognise(self.network.state_dict()):
            self._load(state, path)
            return
        encoder, part = self.encoder_part(state)
        counters = [key for key in encoder.state_dict() if key.endswith("num_batches_tracked")]
        weights.load_into(encoder, part, path=path, optional=counters)

    @abstractmethod
    def encoder_part(
        self, state: Mapping[str, torch.Tensor]
    ) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The module that torchvision's weights belong to, and these under its names."""


@torch.no_grad()
def depth_truth(batch: PairBatch, size: tuple[int, int]) -> Truth:
    """Where the centres of (height, width) cells that tile the images 0 lie in the images 1."""
    grid = cell_centres(*size, device=batch.image0.device).view(1, -1, 2)
    xy = to_pixels(grid, batch.box).expand(len(batch), -1, -1)
    there, valid = warp_points(batch, xy, source=0, lookup="nearest")
    flow = normalise(there, batch.box).transpose(1, 2).unflatten(2, size)
    return Truth(flow, valid.unflatten(1, size))


@torch.no_grad()
def _pixel_error(scales: Scales, truth: Mapping[int, Truth], batch: PairBatch) -> torch.Tensor:
    finest = min(scales)
    extent = truth[finest].flow.new_tensor(batch.box).view(1, 2, 1, 1) / 2
    off = ((scales[finest][0] - truth[finest].flow) * extent).norm(dim=1)
    valid = truth[finest].valid
    return torch.where(valid, off, torch.zeros_like(off)).sum() / valid.sum().clamp(min=1)


def _first(
    rows: torch.Tensor, count: torch.Tensor, present: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and (B, L) bool which of them are labels."""
    used = torch.arange(rows.shape[1], device=rows.device) < count[:, None]
    return rows, used & present[:, None]


def _drawn(count: int, length: int, seed: int) -> torch.Tensor:
    """The first ``count`` of ``length`` indices in random order, then the rest."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator), torch.arange(count, length)])


def _nearest(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(mask.shape[-2:]) == size:
        return mask
    return F.interpolate(mask[:, None].float(), size, mode="nearest-exact")[:, 0] > 0


def threshold_sample(
    certainty: torch.Tensor, number: int, *, threshold: float = _THRESHOLD, seed: int = 0
) -> torch.Tensor:
    """Draw cells by certainty (``threshold`` of DKM).

    Args:
        certainty: (N,); cells of certainty 0 are never drawn.
        number: of cells wanted.
        threshold: certainties above it count as 1.
        seed: of the draw.

    Returns:
        (M,) int64, M <= ``number``.
    """
    generator = torch.Generator(certainty.device).manual_seed(seed)
    chance = torch.where(certainty > threshold, torch.ones_like(certainty), certainty)
    possible = int((chance > 0).sum())
    if possible == 0:
        return torch.empty(0, dtype=torch.long, device=certainty.device)
    return torch.multinomial(chance, min(number, possible), generator=generator)


def reset_convolutions(module: nn.Module) -> None:
    """Kaiming's start values, as torchvision's encoders have them before they see ImageNet."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
