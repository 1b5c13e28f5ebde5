"""Robust geometry of two images from their matches: fundamental matrix and homography."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gim_hloc.options import FitOptions

MIN_MATCHES = 8  # fewer determine no fundamental matrix
# As many agree with some fundamental matrix by chance: of few matches, and of thousands at random.
FEW_INLIERS = 15
FEW_OF_ALL = 0.05


@dataclass(kw_only=True)
class Fit:
    """Robust geometry of a pair.

    Attributes:
        fundamental: (3, 3) F with x1' F x0 = 0 in stored pixels, or None.
        inliers: (M,) bool, matches that agree with ``fundamental``; all False without one.
        homography: (3, 3) from image 1 to image 0 in stored pixels, or None.
        homography_inliers: (M,) bool.
        problem: why there is no fundamental matrix, or None.
    """

    fundamental: np.ndarray | None
    inliers: np.ndarray
    homography: np.ndarray | None
    homography_inliers: np.ndarray
    problem: str | None = None

    @property
    def remark(self) -> str | None:
        """What is wrong with the geometry, for people, or None."""
        total, count = len(self.inliers), int(self.inliers.sum())
        if self.problem is not None:
            drawn = " All matches are drawn, in orange." if total else ""
            return f"No geometry: {self.problem}.{drawn}"
        if count < max(FEW_INLIERS, FEW_OF_ALL * total):
            return (
                f"Only {count} of {total} matches are inliers, as few as wrong matches give: "
                "perhaps the images have nothing in common."
            )
        return None


def fit_geometry(
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    options: FitOptions,
    *,
    scale0: float = 1.0,
    scale1: float = 1.0,
) -> Fit:
    """Fit a fundamental matrix and a homography to matches.

    Args:
        keypoints0: (M, 2) pixels of image 0.
        keypoints1: (M, 2) pixels of image 1.
        options: thresholds.
        scale0: pixels of image 0 that one pixel of a threshold stands for.
        scale1: the same for image 1.
    """
    import cv2

    count = len(keypoints0)
    none = np.zeros(count, dtype=bool)
    if count < MIN_MATCHES:
        problem = f"{count} matches, and a fundamental matrix needs {MIN_MATCHES}"
        return Fit(
            fundamental=None,
            inliers=none,
            homography=None,
            homography_inliers=none,
            problem=problem,
        )
    # In float64: USAC works on what it is given.
    points0 = np.ascontiguousarray(keypoints0, dtype=np.float64) / scale0
    points1 = np.ascontiguousarray(keypoints1, dtype=np.float64) / scale1
    shrink0, shrink1 = (np.diag([1 / s, 1 / s, 1.0]) for s in (scale0, scale1))
    matrix, inliers = _usac(
        cv2.findFundamentalMat,
        *(points0, points1, cv2.USAC_MAGSAC),
        *(
            options.fundamental_px,
            options.fundamental_confidence,
            options.fundamental_iterations,
        ),
    )
    fundamental = None if matrix is None else shrink1.T @ matrix @ shrink0
    matrix, agreeing = _usac(
        cv2.findHomography,
        *(points1, points0, cv2.USAC_MAGSAC, options.homography_px),
        maxIters=options.homography_iterations,
        confidence=options.homography_confidence,
    )
    # Four points always agree with some homography.
    if matrix is None or agreeing.sum() < MIN_MATCHES:
        matrix, agreeing = None, none
    homography = None if matrix is None else np.linalg.inv(shrink0) @ matrix @ shrink1
    return Fit(
        fundamental=fundamental,
        inliers=inliers if fundamental is not None else none,
        homography=homography,
        homography_inliers=agreeing,
        problem="no fundamental matrix fits the matches" if fundamental is None else None,
    )


def _usac(method: Any, *args: Any, **kwargs: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """A robust fit of OpenCV: the matrix, or None where it found none, and the inliers."""
    import cv2

    nothing = np.zeros(len(args[0]), dtype=bool)
    try:
        matrix, mask = method(*args, **kwargs)
    except cv2.error:  # degenerate input, such as all points on one spot
        return None, nothing
    if matrix is None or mask is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return None, nothing
    inliers = mask.ravel().astype(bool)
    return (matrix, inliers) if inliers.any() else (None, nothing)
