"""DKM's losses.

Source: the training of GIM (Shen et al., ICLR 2024), which has its constants from Edstedt et al.,
"DKM", CVPR 2023. Letters and frames as in ``losses.common``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gim_hloc.training.losses.common import (
    Labels,
    Scales,
    Truth,
    certainty_loss,
    distance,
    flow_at,
    masked_mean,
    read_at,
    squared_error,
    within_reach,
)

CERTAINTY_WEIGHT = 0.01
LOCAL = 8  # strides up to it learn only what is within reach
REACH = 2 / 512 * 4  # normalised distance per stride that is too far for a refiner


def depth_loss(
    scales: Scales, truth: Mapping[int, Truth], with_certainty: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Loss of samples whose correspondences are known densely.

    Over strides s from coarse to fine, with v the valid cells and, at s <= 8, v without the cells
    whose flow at the stride before was off by 2 / 512 * 4 s or more:

        flow      = sum_s  mean_v |flow - truth|
        certainty = sum_s  0.01 mean_all BCE(certainty, v)

    Args:
        scales: predicted.
        truth: by stride.
        with_certainty: (B,) bool, samples that have the second term. ScanNet's do not: its depth
            has holes where matches are right.

    Returns:
        "flow" and "certainty", (B,) each; 0 for samples without valid cells and without the second
        term. Their sum is the loss.
    """
    flow_term, certainty_term = _zeros(scales), _zeros(scales)
    previous: int | None = None
    for stride in sorted(scales, reverse=True):
        flow, certainty = scales[stride]
        valid = truth[stride].valid
        if stride <= LOCAL and previous is not None:
            valid = within_reach(
                truth[stride], scales[previous][0], truth[previous], REACH * stride
            )
        flow_term = flow_term + masked_mean(distance(squared_error(flow, truth[stride])), valid)
        certainty_term = certainty_term + CERTAINTY_WEIGHT * certainty_loss(certainty, valid)
        previous = stride
    return {"flow": flow_term, "certainty": certainty_term * with_certainty}


def label_loss(scales: Scales, labels: Labels) -> dict[str, torch.Tensor]:
    """Loss of samples with labels at single points, as videos give them.

        flow = sum_s  mean_labels |flow(here) - there|

    Nothing is said about places without labels, and nothing about certainty: labels exist where
    other matchers succeeded, so that "certain" is all they could teach.

    Args:
        scales: predicted.
        labels: known correspondences.

    Returns:
        "flow" (B,), the loss, and "certainty" (B,), for the log only and without gradient: sum_s of
        the mean cross-entropy of the certainty at labels towards 1. Both 0 without labels.
    """
    flow_term, certainty_term = _zeros(scales), _zeros(scales)
    for flow, certainty in scales.values():
        squared = (flow_at(flow, labels.here) - labels.there).square().sum(-1)
        flow_term = flow_term + masked_mean(distance(squared), labels.used)
        doubt = torch.nn.functional.softplus(-read_at(certainty.detach(), labels.here)[..., 0])
        certainty_term = certainty_term + masked_mean(doubt, labels.used)
    return {"flow": flow_term, "certainty": certainty_term}


def _zeros(scales: Scales) -> torch.Tensor:
    flow, _ = next(iter(scales.values()))
    return flow.new_zeros(len(flow))
