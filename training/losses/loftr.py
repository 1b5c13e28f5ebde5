"""LoFTR's losses: coarse cells by a focal loss on true pairs only, fine positions by distance.

Letters: L and S coarse cells of image 0 and 1 (video labels count as further cells), C channels,
P true pairs, W windows of the fine stage. All functions are about one pair of images; a batch is
the mean over its pairs.

Source: ``training.md`` §5.1; Sun et al., "LoFTR", CVPR 2021, section 3.5.
"""

from __future__ import annotations

import torch

from gim_hloc.networks.loftr import TEMPERATURE

ALPHA = 0.25  # weight of the focal loss on positives
GAMMA = 2.0  # exponent of the focal loss
FLOOR = 1e-6  # confidences are kept this far from 0 and 1


def log_confidence(
    x0: torch.Tensor,
    x1: torch.Tensor,
    index0: torch.Tensor,
    index1: torch.Tensor,
    *,
    mask0: torch.Tensor | None = None,
    mask1: torch.Tensor | None = None,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Logarithms of the dual-softmax confidences of given pairs of cells.

    ln P_ij = 2 s_ij - ln sum_k exp s_ik - ln sum_k exp s_kj with s = x0 . x1 / (C temperature),
    the sums over valid cells. Only these entries leave the matrix of similarities: the matrix of
    confidences and its gradient, several times 0.5 GB at 840 px, are never made.

    Args:
        x0: (L, C) transformed coarse features.
        x1: (S, C).
        index0: (P,) int64 cells of image 0.
        index1: (P,) int64 cells of image 1.
        mask0: (L,) bool, True where a cell takes part; None: all do, which saves a copy of the
            matrix.
        mask1: (S,) the same.
        temperature: of the softmax.

    Returns:
        (P,) float32, or float64 for such features.
    """
    with torch.autocast(x0.device.type, enabled=False):
        dtype = torch.promote_types(x0.dtype, torch.float32)
        similarity = (x0.to(dtype) / (x0.shape[1] * temperature)) @ x1.to(dtype).T
        rows = similarity
        if mask1 is not None:
            rows = similarity.masked_fill(~mask1, -torch.inf)
        columns = similarity
        if mask0 is not None:
            columns = similarity.masked_fill(~mask0[:, None], -torch.inf)
        by_row, by_column = rows.logsumexp(1), columns.logsumexp(0)
        return 2 * similarity[index0, index1] - by_row[index0] - by_column[index1]


def focal_loss(log_confidence: torch.Tensor) -> torch.Tensor:
    """Mean of -0.25 (1 - P)^2 ln P over true pairs; 0 if there is none.

    P is clamped to [1e-6, 1 - 1e-6], beyond which there is no gradient. Wrong pairs do not enter:
    the softmaxes push them down.

    Args:
        log_confidence: (P,) ln P, see ``log_confidence``.
    """
    if not len(log_confidence):
        return log_confidence.sum()
    confidence = log_confidence.exp().clamp(FLOOR, 1 - FLOOR)
    return (-ALPHA * (1 - confidence) ** GAMMA * confidence.log()).mean()


def fine_loss(expectation: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Squared distance of the heat maps' means to the truth, where the truth is in the window.

    Mean of w ||mean - target||^2 over windows with |target|_inf < 1, where w is 1 / deviation over
    its mean of all windows, without gradient: sharp heat maps count more. 0 if no window has its
    truth inside.

    Args:
        expectation: (W, 3) mean x, y in half windows and standard deviation, of
            ``gim_hloc.networks.loftr.window_expectation``.
        target: (W, 2) true x, y in half windows.
        valid: (W,) bool, False where the target means nothing.
    """
    inside = valid & (target.abs().amax(1) < 1)
    certainty = 1 / expectation[:, 2].detach().clamp(min=1e-10)
    weight = certainty / certainty.mean()
    # Multiplied and not chosen: how many they are is known on the device alone.
    true = torch.where(inside[:, None], target, expectation[:, :2].detach())
    error = (expectation[:, :2] - true).square().sum(1)
    return (weight * error).sum() / inside.sum().clamp(min=1)
