"""LightGlue's losses: which keypoint is which, which has no partner, and which layer knows.

Letters: B pairs, M and N keypoints of image 0 and 1, padded to common lengths; ``valid`` tells
keypoints from padding. An assignment (B, M + 1, N + 1) holds logarithms: ln P[i, j] that keypoint i
is keypoint j, and in the last column and row that a keypoint has no partner.

All losses are per pair, (B,): a batch is their mean.

Source: ``training.md`` §5.4; Lindenberger et al., "LightGlue", ICCV 2023, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gim_hloc.geometry.epipolar import mean_distances

UNMATCHED = -1  # a keypoint that surely has no partner
IGNORED = -2  # one of which nothing is known

POSITIVE_PX = 3.0  # partners are closer than this, in both images
NEGATIVE_PX = 5.0  # a keypoint with nothing closer than this has no partner
BALANCE = 0.5  # weight of matched keypoints; the rest is that of unmatched ones


def log_assignment(
    similarity: torch.Tensor,
    matchable0: torch.Tensor,
    matchable1: torch.Tensor,
    valid0: torch.Tensor,
    valid1: torch.Tensor,
) -> torch.Tensor:
    """Assignment of similarities and matchabilities.

    ln P[i, j] = ln softmax_j(s)[i, j] + ln softmax_i(s)[i, j] + ln sigma(z0[i]) + ln sigma(z1[j]),
    ln P[i, N] = ln sigma(-z0[i]), ln P[M, j] = ln sigma(-z1[j]), ln P[M, N] = 0.

    Args:
        similarity: (B, M, N) s.
        matchable0: (B, M) logits z0.
        matchable1: (B, N) logits z1.
        valid0: (B, M) bool. Padding takes no part in a softmax.
        valid1: (B, N) bool.

    Returns:
        (B, M + 1, N + 1) float32 or wider; entries of padding are -1e9.
    """
    with torch.autocast(similarity.device.type, enabled=False):
        dtype = torch.promote_types(similarity.dtype, torch.float32)
        similarity, z0, z1 = (t.to(dtype) for t in (similarity, matchable0, matchable1))
        # Finite, so that rows of padding alone stay free of NaN.
        nothing = -1e9
        by_row = similarity.masked_fill(~valid1[:, None], nothing).logsumexp(2)
        by_column = similarity.masked_fill(~valid0[..., None], nothing).logsumexp(1)
        row = F.logsigmoid(z0) - by_row
        column = F.logsigmoid(z1) - by_column
        inner = 2 * similarity + row[..., None] + column[:, None]
        inner = inner.masked_fill(~(valid0[..., None] & valid1[:, None]), nothing)
        last_column = F.logsigmoid(-z0).masked_fill(~valid0, nothing)
        last_row = F.logsigmoid(-z1).masked_fill(~valid1, nothing)
        upper = torch.cat([inner, last_column[..., None]], 2)
        return torch.cat([upper, F.pad(last_row, (0, 1))[:, None]], 1)


def assignment_loss(
    assignment: torch.Tensor, partner0: torch.Tensor, partner1: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of what is known about keypoints.

    0.5 times the mean of -ln P[i, partner0[i]] over matched keypoints, plus 0.5 times the mean of
    -ln P of having no partner over the unmatched keypoints of both images. A mean of nothing is 0.

    Args:
        assignment: (B, M + 1, N + 1).
        partner0: (B, M) int64, see ``true_partners``.
        partner1: (B, N) int64.

    Returns:
        (B,).
    """
    matched = partner0 >= 0
    at = partner0.clamp(min=0)[..., None]
    positive = -assignment[:, :-1, :-1].gather(2, at)[..., 0]
    loss = BALANCE * _mean(positive, matched)
    dustbin = -torch.cat([assignment[:, :-1, -1], assignment[:, -1, :-1]], 1)
    unmatched = torch.cat([partner0, partner1], 1) == UNMATCHED
    return loss + (1 - BALANCE) * _mean(dustbin, unmatched)


def label_loss(assignment: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mean of -ln P[k, k] over labels, which are the first keypoints of both images.

    Nothing is said about the other keypoints, nor about having no partner.

    Args:
        assignment: (B, M + 1, N + 1).
        count: (B,) number of labels.

    Returns:
        (B,), 0 where there is no label.
    """
    diagonal = -assignment[:, :-1, :-1].diagonal(dim1=1, dim2=2)
    here = torch.arange(diagonal.shape[1], device=count.device)
    return _mean(diagonal, here < count[:, None])


def certainty_loss(
    logits0: torch.Tensor,
    logits1: torch.Tensor,
    now: torch.Tensor,
    final: torch.Tensor,
    valid0: torch.Tensor,
    valid1: torch.Tensor,
) -> torch.Tensor:
    """Does a layer know where its decisions are those of the last layer?

    Binary cross-entropy of a keypoint's certainty against "the best entry of its row (column) of
    the assignment, having no partner included, is the same now and at the end"; the mean over both
    images of the means over keypoints.

    Args:
        logits0: (B, M) of certainty after a layer.
        logits1: (B, N).
        now: (B, M + 1, N + 1) assignment of that layer; no gradient flows into it.
        final: (B, M + 1, N + 1) assignment of the last layer; likewise.
        valid0: (B, M) bool.
        valid1: (B, N) bool.

    Returns:
        (B,).
    """
    now, final = now.detach(), final.detach()
    same0 = now[:, :-1].argmax(2) == final[:, :-1].argmax(2)
    same1 = now[:, :, :-1].argmax(1) == final[:, :, :-1].argmax(1)
    losses = []
    for logits, same, valid in ((logits0, same0, valid0), (logits1, same1, valid1)):
        wide = logits.to(now.dtype)
        entropy = F.binary_cross_entropy_with_logits(wide, same.to(wide), reduction="none")
        losses.append(_mean(entropy, valid))
    return (losses[0] + losses[1]) / 2


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean (B,) of the chosen values (B, K); 0 where none is chosen."""
    kept = torch.where(chosen, values, torch.zeros_like(values))
    return kept.sum(1) / chosen.sum(1).clamp(min=1)


def true_partners(
    xy0: torch.Tensor,
    xy1: torch.Tensor,
    there0: torch.Tensor,
    there1: torch.Tensor,
    *,
    visible0: torch.Tensor,
    visible1: torch.Tensor,
    known0: torch.Tensor,
    known1: torch.Tensor,
    fundamental: torch.Tensor,
    positive: float = POSITIVE_PX,
    negative: float = NEGATIVE_PX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What depth and poses tell about the keypoints of one pair.

    * Partners are each other's nearest by the larger of the distances in both images, and that is
      below ``positive``.
    * With depth, a keypoint has no partner if it arrives farther than ``negative`` from every
      keypoint of the other image.
    * Without depth, if its epipolar distance to every keypoint that is still undecided exceeds
      ``negative``: the mean of the distances to the epipolar lines in both images.
    * Of the rest nothing is known.

    Args:
        xy0: (M, 2) keypoints in network pixels.
        xy1: (N, 2).
        there0: (M, 2) where they lie in image 1; anything where nothing is known.
        there1: (N, 2) where those lie in image 0.
        visible0: (M,) bool, the place is true and inside image 1.
        visible1: (N,) bool.
        known0: (M,) bool, there is depth: ``there0`` means something, if only outside.
        known1: (N,) bool.
        fundamental: (3, 3), x1^T F x0 = 0 in network pixels.
        positive: pixels.
        negative: pixels.

    Returns:
        (M,) and (N,) int64: index of the partner, ``UNMATCHED`` or ``IGNORED``.
    """
    partner0 = torch.full((len(xy0),), IGNORED, dtype=torch.long, device=xy0.device)
    partner1 = torch.full((len(xy1),), IGNORED, dtype=torch.long, device=xy0.device)
    if not len(xy0) or not len(xy1):
        # Depth or not: there is nothing to be matched with.
        return partner0.fill_(UNMATCHED), partner1.fill_(UNMATCHED)
    exact = "donot_use_mm_for_euclid_dist"
    distance0 = torch.cdist(there0, xy1, compute_mode=exact)  # (M, N) in image 1
    distance1 = torch.cdist(xy0, there1, compute_mode=exact)  # (M, N) in image 0
    both = torch.maximum(distance0, distance1)
    both = both.masked_fill(~(visible0[:, None] & visible1), torch.inf)
    nearest0, nearest1 = both.min(1), both.argmin(0)
    here = torch.arange(len(xy0), device=xy0.device)
    mutual = (nearest1[nearest0.indices] == here) & (nearest0.values < positive)
    # Without masks as indices, for each of which a GPU would have to be waited for.
    partner0 = torch.where(mutual, nearest0.indices, partner0)
    there = torch.arange(len(xy1), device=xy0.device)
    chosen = mutual[nearest1] & (nearest0.indices[nearest1] == there)
    partner1 = torch.where(chosen, nearest1, partner1)

    partner0 = partner0.masked_fill(known0 & (distance0.amin(1) > negative), UNMATCHED)
    partner1 = partner1.masked_fill(known1 & (distance1.amin(0) > negative), UNMATCHED)

    undecided = (partner0 == IGNORED)[:, None] & (partner1 == IGNORED)
    epipolar = mean_distances(fundamental, xy0, xy1).masked_fill(~undecided, torch.inf)
    partner0 = partner0.masked_fill(~known0 & (epipolar.amin(1) > negative), UNMATCHED)
    partner1 = partner1.masked_fill(~known1 & (epipolar.amin(0) > negative), UNMATCHED)
    return partner0, partner1
