"""Homographies: estimation from matches, corner error, matching accuracy.

The corner error of a pair is the mean distance of the four corners of image 0 (the centres of its
corner pixels), mapped by the estimated and by the true homography. The matching accuracy at t
pixels is the share of matches that the true homography puts within t pixels of their mate; its mean
over pairs, pairs without a match counting 0, is the MMA of the literature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import DumpRecord
from gim_hloc.evaluation.protocol import Protocol, poselib_options
from gim_hloc.geometry.frames import resize_points

FEWEST_MATCHES = 4  # that a homography needs
CORRECT_PX = 3.0  # distance below which a match counts as correct in dumps
ACCURACY_PX = (1.0, 2.0, 3.0, 5.0, 10.0)
AUC_PX = (1.0, 3.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True, kw_only=True)
class HomographyProtocol(Protocol):
    """How a homography is estimated from matches: OpenCV's RANSAC or PoseLib's LO-RANSAC."""

    threshold: float = 3.0  # px in image 1: distance of an inlier
    max_iterations: int = 2000  # cap on RANSAC's samples; 2000 is OpenCV's own
    # Side in pixels that the shorter side of both images is taken to have: thresholds and errors
    # count such pixels. The literature on HPatches uses 480. None: pixels of the stored images.
    short_side: int | None = None

    poselib: ClassVar[dict[str, Any]] = {"max_iterations": 10000}

    @property
    def name(self) -> str:
        """What folders are named by."""
        parts = [self.estimator, "homography", f"{self.threshold:g}px"]
        if self.short_side is not None:
            parts.append(f"side{self.short_side}")
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


def transfer(H: np.ndarray, points: np.ndarray, *, front: np.ndarray) -> np.ndarray:
    """Map points by a homography.

    Args:
        H: (3, 3).
        points: (N, 2) pixels.
        front: (2,) a point on the side of the horizon that is seen.

    Returns:
        (N, 2); infinite for points on or beyond the horizon, where the formula shows a picture
        that does not exist.
    """
    mapped = points @ H[:, :2].T + H[:, 2]
    depth = mapped[:, 2] * np.sign(H[2, :2] @ front + H[2, 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        xy: np.ndarray = mapped[:, :2] / mapped[:, 2:]
    return np.where(depth[:, None] > 1e-12, xy, np.inf)


def corners(size: tuple[float, float]) -> np.ndarray:
    """The centres (4, 2) of the corner pixels of an image of (width, height)."""
    right, bottom = size[0] - 1.0, size[1] - 1.0
    return np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])


def corner_error(estimate: np.ndarray, truth: np.ndarray, size: tuple[float, float]) -> float:
    """The mean distance in pixels of image 1 of the corners of image 0.

    Args:
        estimate: (3, 3), image 0 -> image 1.
        truth: (3, 3).
        size: (width, height) of image 0.

    Returns:
        Infinite where a corner lies beyond the horizon of the estimate.
    """
    ends = corners(size)
    centre = ends.mean(0)
    mapped = transfer(estimate, ends, front=centre)
    if not np.isfinite(mapped).all():
        return math.inf
    error = float(np.linalg.norm(mapped - transfer(truth, ends, front=centre), axis=1).mean())
    return error if math.isfinite(error) else math.inf


def transfer_distance(
    points0: np.ndarray, points1: np.ndarray, H: np.ndarray, size: tuple[float, float]
) -> np.ndarray:
    """How far (M,) matches are from where a homography puts them, pixels of image 1.

    Args:
        points0: (M, 2) pixels of image 0.
        points1: (M, 2) of image 1.
        H: (3, 3).
        size: (width, height) of image 0.
    """
    mapped = transfer(H, points0, front=corners(size).mean(0))
    distance: np.ndarray = np.linalg.norm(mapped - points1, axis=1)
    return distance


def accuracy(distances: Sequence[np.ndarray], thresholds: Sequence[float]) -> list[float]:
    """The mean matching accuracy at each threshold.

    Args:
        distances: of each pair, from `transfer_distance`, in pixels.
        thresholds: pixels.

    Raises:
        InputError: there is no pair.
    """
    if not distances:
        raise InputError("accuracy of no pairs at all: give at least one")
    return [
        float(np.mean([(d <= limit).mean() if len(d) else 0.0 for d in distances]))
        for limit in thresholds
    ]


def frame_scale(size: tuple[int, int], short_side: int | None) -> float:
    """Pixels of an evaluation for one stored pixel of an image of this (width, height)."""
    return 1.0 if short_side is None else short_side / min(size)


def scaled_homography(H: np.ndarray, scale0: float, scale1: float) -> np.ndarray:
    """The homography between the images resized by these factors."""
    return _resize(scale1) @ H @ np.linalg.inv(_resize(scale0))


def _resize(scale: float) -> np.ndarray:
    shift = 0.5 * scale - 0.5
    return np.array([[scale, 0.0, shift], [0.0, scale, shift], [0.0, 0.0, 1.0]])


def estimate_homography(
    points0: np.ndarray, points1: np.ndarray, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray] | None:
    """Estimate the homography from image 0 to image 1.

    Args:
        points0: (M, 2) pixels of image 0.
        points1: (M, 2) their matches.
        protocol: how.

    Returns:
        (3, 3) and the inliers (M,) bool; None where there are fewer than four matches or no
        homography was found.
    """
    if len(points0) < FEWEST_MATCHES:
        return None
    points0 = np.ascontiguousarray(points0, dtype=np.float64)
    points1 = np.ascontiguousarray(points1, dtype=np.float64)
    if protocol.estimator == "poselib":
        import poselib

        H, info = poselib.estimate_homography(
            points0,
            points1,
            poselib_options(protocol, "max_reproj_error"),
            {},
        )
        inliers = np.asarray(info["inliers"], dtype=bool)
    else:
        try:
            H, mask = cv2.findHomography(
                points0,
                points1,
                cv2.RANSAC,
                protocol.threshold,
                maxIters=protocol.max_iterations,
                confidence=protocol.confidence,
            )
        except cv2.error:  # degenerate points only, e.g. all in one place
            return None
        if H is None or mask is None:
            return None
        inliers = mask.ravel() > 0
    H = np.asarray(H, dtype=np.float64)
    if H.shape != (3, 3) or not np.isfinite(H).all() or not inliers.any():
        return None
    return H, inliers


def evaluate_pair(
    points0: np.ndarray,
    points1: np.ndarray,
    truth: np.ndarray,
    size0: tuple[int, int],
    size1: tuple[int, int],
    protocol: HomographyProtocol,
    *,
    identifier: str,
    covisible: tuple[float, float] = (0.0, 0.0),
) -> DumpRecord:
    """Judge the matches of one pair.

    Args:
        points0: (M, 2) stored pixels of image 0, hloc's frame.
        points1: (M, 2) their matches.
        truth: (3, 3) image 0 -> image 1.
        size0: (width, height) of image 0.
        size1: of image 1.
        protocol: how the homography is estimated.
        identifier: of the pair.
        covisible: overlaps, if known.

    Returns:
        A line as of a pair with a pose, but of pixels, which the dump's header says: all three
        errors are the corner error, a match is correct within `CORRECT_PX`. Without an estimate
        the errors are infinite.
    """
    scale0 = frame_scale(size0, protocol.short_side)
    scale1 = frame_scale(size1, protocol.short_side)
    points0, points1 = (
        resize_points(np.asarray(points, np.float64), scale)
        for points, scale in ((points0, scale0), (points1, scale1))
    )
    truth = scaled_homography(truth, scale0, scale1)
    # In the frame of the evaluation the image need not have whole pixels: its outermost centres do.
    frame = (size0[0] * scale0, size0[1] * scale0)
    correct = transfer_distance(points0, points1, truth, frame) <= CORRECT_PX
    error, inliers = math.inf, np.zeros(len(points0), dtype=bool)
    found = estimate_homography(points0, points1, protocol)
    if found is not None:
        inliers = found[1]
        error = corner_error(found[0], truth, frame)
    return DumpRecord.judged(identifier, covisible, (error, error, error), correct, inliers)
