"""The robust fit of labels to one epipolar geometry."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)


def epipolar_inliers(
    labels: np.ndarray, *, threshold: float, confidence: float, max_iterations: int
) -> np.ndarray:
    """Which labels agree with one fundamental matrix (MAGSAC); the same for the same input.

    Args:
        labels: (n, 4) x0, y0, x1, y1 in pixels.
        threshold: distance to epipolar lines in pixels.
        confidence: that the best matrix was found.
        max_iterations: samples at most.

    Returns:
        (n,) bool; all False where there is no such matrix.
    """
    import cv2

    none = np.zeros(len(labels), dtype=bool)
    if len(labels) < 8:
        return none
    points = labels.astype(np.float64)
    # OpenCV's USAC stops with an error where a plane fills much of both views and the parallax of
    # the rest gives it no model (seen with 5.0); its older estimator copes.
    for method in (cv2.USAC_MAGSAC, cv2.RANSAC):
        try:
            _, mask = cv2.findFundamentalMat(
                np.ascontiguousarray(points[:, :2]),
                np.ascontiguousarray(points[:, 2:]),
                method,
                threshold,
                confidence,
                max_iterations,
            )
        except cv2.error as error:
            logger.debug("No fundamental matrix of %d labels: %s", len(labels), error)
            continue
        return none if mask is None else mask.ravel() > 0
    return none
