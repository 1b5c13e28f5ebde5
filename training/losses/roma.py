"""RoMa's losses.

Source: the training of GIM (Shen et al., ICLR 2024), which has its constants from Edstedt et al.,
"RoMa", CVPR 2024. Letters and frames as in ``losses.common``; A is the number
of anchors, a square grid over the other image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from gim_hloc.training.losses.common import (
    Labels,
    Scales,
    Truth,
    certainty_loss,
    flow_at,
    masked_mean,
    read_at,
    squared_error,
    within_reach,
)

CERTAINTY_WEIGHT = 0.01
EXPONENT = 0.5  # a of the robust loss
WIDTH = 1e-4  # its c per stride, normalised distance
LOCAL = 8  # strides up to it learn only what is within reach
REACH = {1: 2 / 512 * 4, 2: 2 / 512 * 4, 4: 2 / 512 * 8, 8: 2 / 512 * 8}  # per stride


def robust(squared: torch.Tensor, stride: int) -> torch.Tensor:
    """c^a ((e / c)^2 + 1)^(a / 2) with a = 0.5 and c = 1e-4 stride, of squared errors e^2.

    Grows as e^2 for small errors and as sqrt(e) for large ones, so that wrong places pull less the
    more wrong they are. Not 0 at 0, but c^a.
    """
    width = WIDTH * stride
    factor: torch.Tensor = width**EXPONENT * (squared / width**2 + 1) ** (EXPONENT / 2)
    return factor


def nearest_anchor(uv: torch.Tensor, side: int) -> torch.Tensor:
    """Index (...,) int64 of the anchor nearest to normalised points (..., 2), row-major.

    Anchors are the centres of side x side cells: the nearest one is that of the cell around it.
    """
    cell = ((uv + 1) / 2 * side).floor().long().clamp(0, side - 1)
    return cell[..., 1] * side + cell[..., 0]


def depth_loss(
    scales: Scales,
    coarse: tuple[torch.Tensor, torch.Tensor],
    truth: Mapping[int, Truth],
) -> dict[str, torch.Tensor]:
    """Loss of samples whose correspondences are known densely.

    With v the valid cells of stride s and, at s <= 8, v without the cells whose flow at the stride
    before was off by 2 / 512 * d s or more (d = 4, 4, 8, 8 at strides 1, 2, 4, 8):

        flow      = sum_s  mean_v rho_s(|flow - truth|)
        certainty = sum_s  0.01 mean_all BCE(certainty, v)
                    + 0.01 mean_all BCE(coarse certainty, v_16)
        classes   = mean_{v_16} cross-entropy(classes, anchor nearest to the truth)

    Args:
        scales: predicted.
        coarse: logits of the anchors (B, A, h, w) and of the certainty (B, 1, h, w), on the cells
            of the coarsest stride.
        truth: by stride.

    Returns:
        "flow", "certainty" and "classes", (B,) each; the first and last are 0 for samples without
        valid cells. Their sum is the loss.
    """
    classes, coarse_certainty = coarse
    coarsest = max(scales)
    at = truth[coarsest]
    side = round(classes.shape[1] ** 0.5)
    target = nearest_anchor(at.flow.permute(0, 2, 3, 1), side)
    entropy = F.cross_entropy(classes, target, reduction="none")
    flow_term = torch.zeros_like(entropy[:, 0, 0])
    certainty_term = CERTAINTY_WEIGHT * certainty_loss(coarse_certainty, at.valid)
    previous: int | None = None
    for stride in sorted(scales, reverse=True):
        flow, certainty = scales[stride]
        valid = truth[stride].valid
        if stride <= LOCAL and previous is not None:
            limit = REACH[stride] * stride
            valid = within_reach(truth[stride], scales[previous][0], truth[previous], limit)
        cost = robust(squared_error(flow, truth[stride]), stride)
        flow_term = flow_term + masked_mean(cost, valid)
        certainty_term = certainty_term + CERTAINTY_WEIGHT * certainty_loss(certainty, valid)
        previous = stride
    return {
        "flow": flow_term,
        "certainty": certainty_term,
        "classes": masked_mean(entropy, at.valid),
    }


def label_loss(scales: Scales, classes: torch.Tensor, labels: Labels) -> dict[str, torch.Tensor]:
    """Loss of samples with labels at single points, as videos give them.

        flow    = sum_s  mean_labels rho_s(|flow(here) - there|)
        classes = mean_labels cross-entropy(classes(here), anchor nearest to there)

    Certainty is not taught, see ``losses.dkm.label_loss``.

    Args:
        scales: predicted.
        classes: logits of the anchors (B, A, h, w).
        labels: known correspondences.

    Returns:
        "flow" and "classes", (B,) each, whose sum is the loss; 0 without labels.
    """
    side = round(classes.shape[1] ** 0.5)
    logits = read_at(classes, labels.here)
    target = nearest_anchor(labels.there, side)
    entropy = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    class_term = masked_mean(entropy, labels.used)
    flow_term = torch.zeros_like(class_term)
    for stride, (flow, _) in scales.items():
        squared = (flow_at(flow, labels.here) - labels.there).square().sum(-1)
        flow_term = flow_term + masked_mean(robust(squared, stride), labels.used)
    return {"flow": flow_term, "classes": class_term}
