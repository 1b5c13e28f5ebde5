"""Pairs without ground truth: the matches that agree with a fundamental matrix are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gim_hloc.evaluation.dumps import DumpRecord
from gim_hloc.evaluation.pair_set import Pair
from gim_hloc.evaluation.predictions import Prediction
from gim_hloc.evaluation.protocol import Protocol, poselib_options
from gim_hloc.options import FitOptions
from gim_hloc.two_view import MIN_MATCHES, fit_geometry

# Longest side in pixels at which one pixel of the threshold is a stored one; of larger images it is
# as much more.
_LONG_SIDE = 1600.0


@dataclass(frozen=True, kw_only=True)
class FundamentalProtocol(Protocol):
    """How the matches that agree with an epipolar geometry are found."""

    threshold: float = 1.0  # px: distance from the epipolar line
    confidence: float = 0.999999
    max_iterations: int = 10_000

    poselib: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """What folders are named by."""
        return f"{self.estimator}-fundamental-{self.threshold:g}px"


def fundamental_scales(prediction: Prediction) -> tuple[float, float]:
    """Stored pixels of either image that one pixel of the threshold stands for."""
    sizes = prediction.size0, prediction.size1
    scale0, scale1 = (max(1.0, max(size) / _LONG_SIDE) for size in sizes)
    return scale0, scale1


def fundamental_inliers(prediction: Prediction, protocol: Protocol) -> np.ndarray:
    """The matches (M,) bool that agree with a fundamental matrix estimated from them.

    ``gim`` is USAC with MAGSAC as in GIM's demo (`gim_hloc.two_view`), ``poselib`` is LO-RANSAC.
    """
    scale0, scale1 = fundamental_scales(prediction)
    if protocol.estimator == "gim":
        options = FitOptions(
            fundamental_px=protocol.threshold,
            fundamental_confidence=protocol.confidence,
            fundamental_iterations=protocol.max_iterations,
        )
        points = prediction.points0, prediction.points1
        return fit_geometry(*points, options, scale0=scale0, scale1=scale1).inliers
    count = len(prediction.points0)
    if count < MIN_MATCHES:
        return np.zeros(count, dtype=bool)
    import poselib

    _, found = poselib.estimate_fundamental(
        prediction.points0.astype(np.float64) / scale0,
        prediction.points1.astype(np.float64) / scale1,
        poselib_options(protocol),
        {},
    )
    return np.asarray(found["inliers"], dtype=bool)


def count_inliers(prediction: Prediction, pair: Pair, protocol: Protocol) -> DumpRecord:
    """A record whose two numbers are all matches and the inliers; errors are not known."""
    return DumpRecord(
        identifier=pair.identifier,
        covisible0=pair.covisible0,
        covisible1=pair.covisible1,
        rotation_error=math.nan,
        translation_error=math.nan,
        translation_distance=math.nan,
        precision_before=math.nan,
        correct_before=len(prediction.scores),
        precision_after=math.nan,
        correct_after=int(fundamental_inliers(prediction, protocol).sum()),
    )
