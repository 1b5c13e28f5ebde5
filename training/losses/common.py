"""What the losses of dense matchers share: frames, means per sample, flow read at points.

Letters: B samples, h and w the cells of a scale, H and W the pixels of the network's images, L
labels. Every loss is one number per sample, (B,); a batch's is their mean. A batch of two is thus
the same as two accumulated batches of one, which a mean over the pixels of all samples is not.

Normalised coordinates run from -1 to 1 between the *edges* of an image: u = 2 (x + 0.5) / W - 1
with x in pixels whose integers are centres, the frame in which networks sample features. The
published trainings normalise targets and labels by 2 x / (W - 1) - 1 instead, between the centres
of the outermost pixels, which is up to half a pixel beside what the networks predict. Here one
frame is used everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gim_hloc.geometry.warp import cell_centres

Scales = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Stride -> flow (B, 2, h, w), normalised targets x, y, and certainty logits (B, 1, h, w)."""


class Truth(NamedTuple):
    """Where the cells of one scale lie in the other image.

    Attributes:
        flow: (B, 2, h, w) normalised; finite everywhere, true where ``valid``.
        valid: (B, h, w) bool.
    """

    flow: torch.Tensor
    valid: torch.Tensor


class Labels(NamedTuple):
    """Known correspondences.

    Attributes:
        here: (B, L, 2) normalised places in image 0.
        there: (B, L, 2) in image 1.
        used: (B, L) bool, False in padding.
    """

    here: torch.Tensor
    there: torch.Tensor
    used: torch.Tensor


def normalise(xy: torch.Tensor, box: tuple[int, int]) -> torch.Tensor:
    """Normalised coordinates of pixels (..., 2) in a (width, height) box."""
    return (2 * xy + 1) / xy.new_tensor(box) - 1


def to_pixels(uv: torch.Tensor, box: tuple[int, int]) -> torch.Tensor:
    """Inverse of ``normalise``."""
    return ((uv + 1) * uv.new_tensor(box) - 1) / 2


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean (B,) over the masked entries of (B, ...); 0 where a sample has none."""
    values, mask = values.flatten(1), mask.flatten(1)
    total = torch.where(mask, values, torch.zeros_like(values)).sum(1)
    return total / mask.sum(1).clamp(min=1)


def certainty_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy (B,) of logits (B, 1, h, w) over all cells.

    -t ln s(x) - (1 - t) ln (1 - s(x)) with the target t (B, h, w), a bool.
    """
    logits = logits[:, 0]
    every = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return every.flatten(1).mean(1)


def squared_error(flow: torch.Tensor, truth: Truth) -> torch.Tensor:
    """Squared normalised distances (B, h, w) of flow (B, 2, h, w) to the truth."""
    return (flow - truth.flow).square().sum(1)


def distance(squared: torch.Tensor) -> torch.Tensor:
    """Square root with slope 0 at 0, where the distance of two points has none."""
    positive = squared > 0
    return torch.where(positive, squared, torch.ones_like(squared)).sqrt() * positive


def within_reach(truth: Truth, flow: torch.Tensor, coarse: Truth, limit: float) -> torch.Tensor:
    """Valid cells (B, h, w) of a scale that the scale before it brought near enough.

    A refiner sees a window around the place that it is given. Where the truth is beyond it, there
    is nothing to learn from, and the certainty should say so. Where the coarser cell has no truth,
    nothing says how near it is, and the cell is left out.

    Args:
        truth: of this scale.
        flow: (B, 2, h', w') of the scale before.
        coarse: truth of that scale.
        limit: normalised distance that is too far.
    """
    squared = squared_error(flow.detach(), coarse)
    near = (squared < limit**2) & coarse.valid
    size = (truth.valid.shape[-2], truth.valid.shape[-1])
    return truth.valid & (
        F.interpolate(near[:, None].float(), size, mode="nearest-exact")[:, 0] > 0
    )


def flow_at(flow: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Flow (B, 2, h, w) at normalised points (B, L, 2), as (B, L, 2).

    Interpolated is how far points move; outside the centres of the outermost cells the nearest
    cells' movement is continued. Between cell centres this is bilinear interpolation of the flow.
    """
    start = cell_centres(*flow.shape[-2:], device=flow.device, dtype=flow.dtype).permute(2, 0, 1)
    return uv + read_at(flow - start, uv)


def read_at(maps: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Values (B, L, C) of maps (B, C, h, w) at normalised points (B, L, 2), bilinear."""
    grid = uv[:, None].to(maps.dtype)
    read = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return read[:, :, 0].transpose(1, 2)
