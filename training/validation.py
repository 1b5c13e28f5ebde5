"""Judging a model on a held set: poses from its matches, and the errors of the matches themselves.

Poses are estimated as ``gim-zeb`` does (OpenCV's essential matrix by RANSAC), with the confidence
of the reference's validation. Figures do not depend on how many processes share the work: batches
are the same for any number of them, what a model draws is seeded by the batch, and every figure is
computed from the gathered numbers of all pairs in the order of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gim_hloc.evaluation.metrics import auc, pose_errors
from gim_hloc.evaluation.protocol import Protocol, evaluate_pair
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points

if TYPE_CHECKING:
    from gim_hloc.training.models.base import Match, TrainingModel

POSE_THRESHOLDS = (5.0, 10.0, 20.0)
"""Degrees of the AUCs."""

ERROR_THRESHOLDS = (1.0, 3.0, 5.0)
"""Network pixels."""

LABEL_RADIUS = 4.0
"""Network pixels: the nearest match within it is compared with a label."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """What one pair's matches are worth.

    Attributes:
        index: of the pair in the validation set.
        matches: number of them.
        pose_error: degrees, the larger of rotation and direction; 180 without a pose; NaN where the
            true pose is not known.
        precision: share of matches within 5e-4 of the true epipolar lines; NaN likewise.
        judged: matches (with depth) or labels (without) that have an error.
        within: how many of them are within 1, 3 and 5 px.
        offered: matches with depth, or labels: what ``judged`` is a part of.
    """

    index: int
    matches: int
    pose_error: float
    precision: float
    judged: int
    within: tuple[int, ...]
    offered: int


def make_protocol(threshold: float, confidence: float, max_iterations: int) -> Protocol:
    """Return the protocol of the reference's validation, by default 0.5 px and 0.999999."""
    return Protocol.make(
        "gim", threshold=threshold, confidence=confidence, max_iterations=max_iterations
    )


def batch_indices(count: int, batch_size: int, *, rank: int, world: int) -> list[list[int]]:
    """Return the batches of one process: every ``world``-th of those of the whole set.

    Args:
        count: pairs of the set.
        batch_size: pairs of a batch; the last may have fewer.
        rank: of this process.
        world: processes.
    """
    batches = [
        list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)
    ]
    return batches[rank::world]


# ------------------------------------------------------------------------------------------- errors


def match_errors(batch: PairBatch, index: int, match: Match) -> np.ndarray | None:
    """Return the error of each match of a pair in network pixels of image 1.

    Args:
        batch: with the pair.
        index: of the pair in the batch.
        match: its matches.

    Returns:
        (M,) float64: distance to where depth and pose put the point of image 0, NaN where they do
        not know; None for pairs without depth.
    """
    if not bool(batch.has_depth[index]):
        return None

    points0, points1, _ = match
    if not len(points0):
        return np.zeros(0)
    single = select(batch, index)
    place, valid = warp_points(single, points0[None].float(), source=0)
    error = (place[0] - points1).norm(dim=1).double()
    return torch.where(valid[0], error, math.nan).cpu().numpy()


def label_errors(batch: PairBatch, index: int, match: Match) -> np.ndarray:
    """Return the error at each label of a pair that has a match nearby.

    A matcher is free to choose its points: the match nearest to a label in image 0, within
    ``LABEL_RADIUS``, is moved by the difference there and compared in image 1. Two places a few
    pixels apart do not move exactly alike, so errors below a pixel mean little.

    Args:
        batch: with the pair.
        index: of the pair in the batch.
        match: its matches.

    Returns:
        (L,) float64 network pixels, NaN at labels without a match nearby.
    """
    labels = batch.labels[index, : int(batch.label_count[index])].double().cpu().numpy()
    errors = np.full(len(labels), math.nan)
    points0, points1 = (t.double().cpu().numpy() for t in match[:2])
    if not len(points0) or not len(labels):
        return errors
    from scipy.spatial import cKDTree

    distance, nearest = cKDTree(points0).query(labels[:, :2], distance_upper_bound=LABEL_RADIUS)
    near = np.isfinite(distance)
    chosen = nearest[near]
    moved = points1[chosen] + labels[near, :2] - points0[chosen]
    errors[near] = np.linalg.norm(moved - labels[near, 2:], axis=1)
    return errors


def select(batch: PairBatch, index: int) -> PairBatch:
    """Return one pair of a batch as a batch."""
    values: dict[str, Any] = {}
    for name, value in vars(batch).items():
        values[name] = value[index : index + 1]
    return PairBatch(**values)


def has_pose(batch: PairBatch, index: int) -> bool:
    """Tell whether a pair has a true pose that can be judged.

    Neither pairs without a pose (identity) nor cameras in one place have a direction of motion.
    """
    return bool(batch.T_0to1[index, :3, 3].any())


def to_original(points: torch.Tensor, transform: torch.Tensor) -> np.ndarray:
    """Return network pixels (M, 2) as original pixels by a homography (3, 3), float64."""
    homogeneous = torch.cat([points.double(), torch.ones_like(points[:, :1]).double()], 1)
    mapped = homogeneous @ transform.double().T
    return (mapped[:, :2] / mapped[:, 2:]).cpu().numpy()


def judge(
    batch: PairBatch, match: Match, position: int, index: int, protocol: Protocol
) -> PairResult:
    """Judge the matches of one pair.

    Args:
        batch: with the pair.
        match: its matches, network pixels.
        position: of the pair in the batch.
        index: of the pair in the set.
        protocol: how a pose is estimated.
    """
    pose_error = precision = math.nan
    if has_pose(batch, position):
        record = evaluate_pair(
            to_original(match[0], batch.to_original0[position]),
            to_original(match[1], batch.to_original1[position]),
            batch.K0[position].double().cpu().numpy(),
            batch.K1[position].double().cpu().numpy(),
            batch.T_0to1[position].double().cpu().numpy(),
            protocol,
            identifier=str(index),
        )
        (pose_error,) = pose_errors(
            np.array([record.rotation_error]), np.array([record.translation_error])
        )
        precision = record.precision_before
    errors = match_errors(batch, position, match)
    if errors is None:
        errors = label_errors(batch, position, match)
    known = errors[~np.isnan(errors)]
    return PairResult(
        index=index,
        matches=len(match[0]),
        pose_error=float(pose_error),
        precision=float(precision),
        judged=len(known),
        within=tuple(int((known < limit).sum()) for limit in ERROR_THRESHOLDS),
        offered=len(errors),
    )


def summarise(results: Iterable[PairResult]) -> dict[str, float]:
    """Return the figures of a validation from the results of all its pairs.

    Returns:
        ``auc@5``, ``auc@10``, ``auc@20`` and ``precision`` (mean over pairs) where poses are known;
        ``within@1px``, ``@3px``, ``@5px`` (over all judged matches or labels) and ``judged`` (the
        share of matches or labels that had an error) where depth or labels are; ``matches`` (mean a
        pair) and ``pairs``. Shares are in [0, 1].
    """
    ordered = sorted(results, key=lambda r: r.index)
    figures: dict[str, float] = {}
    posed = [r for r in ordered if not math.isnan(r.pose_error)]
    if posed:
        values = auc([r.pose_error for r in posed], POSE_THRESHOLDS)
        figures |= {f"auc@{t:g}": v for t, v in zip(POSE_THRESHOLDS, values, strict=True)}
        figures["precision"] = math.fsum(r.precision for r in posed) / len(posed)
    judged = sum(r.judged for r in ordered)
    offered = sum(r.offered for r in ordered)
    if offered:
        for place, limit in enumerate(ERROR_THRESHOLDS):
            count = sum(r.within[place] for r in ordered)
            figures[f"within@{limit:g}px"] = count / judged if judged else 0.0
        figures["judged"] = judged / offered
    if ordered:
        figures["matches"] = math.fsum(r.matches for r in ordered) / len(ordered)
    figures["pairs"] = float(len(ordered))
    return figures


def monitored(figures: Mapping[str, float]) -> tuple[str, float]:
    """Return the figure that ranks checkpoints: AUC@5°, without poses the share within 3 px.

    The latter is over what could have been judged: a model that matches less does not gain by it.
    """
    if "auc@5" in figures:
        return "auc@5", figures["auc@5"]
    if "within@3px" in figures:
        return "within@3px", figures["within@3px"] * figures["judged"]
    return "", math.nan


# --------------------------------------------------------------------------------------------- runs


def validate_batches(
    model: TrainingModel,
    batches: Iterable[tuple[Sequence[int], PairBatch]],
    *,
    protocol: Protocol,
    device: torch.device,
    seed: int,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Match and judge the batches of one process.

    Poses are estimated on other threads while the network works on the next batch (OpenCV lets the
    interpreter go).

    Args:
        model: to judge.
        batches: indices of their pairs in the set, and the pairs.
        protocol: how a pose is estimated.
        device: of the model.
        seed: what the model draws for a batch is seeded by this and its first index.
        threads: for the poses.

    Returns:
        Fields of a `PairResult` for each pair, fit for sending to other processes.
    """
    pending: list[Future[PairResult]] = []
    with ThreadPoolExecutor(threads) as pool:
        for indices, batch in batches:
            matches = model.match(batch.to(device), seed=seed + indices[0])
            for position, index in enumerate(indices):
                # Truth stays where it was loaded: geometry in float64 is the processor's work.
                xy0, xy1, score = (t.detach().float().cpu() for t in matches[position])
                match = xy0, xy1, score
                pending.append(pool.submit(judge, batch, match, position, index, protocol))
        return [asdict(future.result()) for future in pending]


def gather(parts: Iterable[Iterable[Mapping[str, Any]]]) -> list[PairResult]:
    """Return the results of all processes in the order of the set, each pair once."""
    found = {r["index"]: PairResult(**r) for part in parts for r in part}
    return [found[index] for index in sorted(found)]
