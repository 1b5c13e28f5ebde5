"""From matches to a pose and its errors: the reference's protocol, and one with PoseLib.

``gim`` is what the published numbers were made with: OpenCV's essential matrix by classical RANSAC
at 0.5 px and 0.99999. ``poselib`` is LO-RANSAC with bundle adjustment of the relative pose, at a
threshold that is part of the result's name, because the estimator is worth more than most matchers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

import cv2
import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import DumpRecord
from gim_hloc.evaluation.options import Estimator
from gim_hloc.geometry.epipolar import essential_matrix, squared_symmetric_distance
from gim_hloc.geometry.pose import direction_error_deg, rotation_error_deg

# Squared symmetric epipolar distance in normalised coordinates below which a match is correct.
CORRECT = 5e-4
FEWEST_MATCHES = 5  # that an essential matrix needs


Kind = TypeVar("Kind", bound="Protocol")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a pose is estimated from matches."""

    estimator: Estimator = "gim"  # gim: OpenCV's classical RANSAC; poselib: LO-RANSAC of PoseLib
    threshold: float = 0.5  # px of the original image: Sampson distance of an inlier
    confidence: float = 0.99999  # RANSAC stops when a better model is less likely than 1 minus this
    max_iterations: int = 1000  # cap on RANSAC's samples; 1000 is OpenCV's own
    # Baselines: matches triangulated farther away count neither for a pose nor as inliers (gim
    # only). The reference asks for 1e9, but its call of recoverPose hands that over as another
    # argument, and OpenCV's own 50 applies: pairs with little parallax fail by it.
    max_depth: float = 50.0
    seed: int = 0  # of PoseLib's samples, the same for every pair; OpenCV's seed is fixed
    # Multiply a dense matcher's coordinates on padded sets by the original size although the
    # network saw the padded frame, as the reference does: up to 4 % off, on KITTI.
    padded_slip: bool = False

    # PoseLib refines its models: it profits from a threshold at which all good matches are inliers.
    poselib: ClassVar[dict[str, Any]] = {"threshold": 1.0, "max_iterations": 10000}

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            choices = " or ".join(get_args(Estimator))
            raise InputError(f"There is no protocol {self.estimator!r}; choose {choices}.")
        if not self.threshold > 0 or not 0 < self.confidence < 1 or self.max_iterations < 1:
            raise InputError(
                f"A protocol needs a positive threshold, a confidence between 0 and 1 and an "
                f"iteration at least, not {self.threshold}, {self.confidence} and "
                f"{self.max_iterations}."
            )

    @classmethod
    def make(cls: type[Kind], estimator: str, **changes: Any) -> Kind:
        """The protocol of an estimator with its defaults, but for changes that are not None.

        Raises:
            InputError: no such estimator or a value that is none; or PoseLib is not installed.
        """
        if estimator == "poselib":
            require_poselib()
        return cls(
            **{**cls._defaults(estimator), **{k: v for k, v in changes.items() if v is not None}}
        )

    @classmethod
    def _defaults(cls, estimator: str) -> dict[str, Any]:
        return {"estimator": estimator, **(cls.poselib if estimator == "poselib" else {})}

    @property
    def name(self) -> str:
        """What folders are named by: the estimator and everything that differs from its default."""
        default = Protocol(**self._defaults(self.estimator))
        parts: list[str] = [self.estimator]
        if self.estimator == "poselib" or self.threshold != default.threshold:
            parts.append(f"{self.threshold:g}px")
        if self.confidence != default.confidence:
            parts.append(f"p{self.confidence:g}")
        if self.max_iterations != default.max_iterations:
            parts.append(f"{self.max_iterations}it")
        if self.max_depth != default.max_depth:
            parts.append(f"depth{self.max_depth:g}")
        if self.padded_slip:
            parts.append("slip")
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


def require_poselib() -> None:
    """Raise InputError with what to do if PoseLib is not installed."""
    if importlib.util.find_spec("poselib") is None:
        raise InputError("The protocol poselib needs PoseLib: pip install poselib")


def poselib_options(protocol: Protocol, threshold: str = "max_epipolar_error") -> dict[str, Any]:
    """A protocol as PoseLib's RANSAC takes it; its thresholds have several names."""
    return {
        threshold: protocol.threshold,
        "success_prob": protocol.confidence,
        "max_iterations": protocol.max_iterations,
        "min_iterations": min(1000, protocol.max_iterations),
        "seed": protocol.seed,
    }


def estimator_version(estimator: Estimator) -> str:
    """Library and version that a protocol's numbers depend on, e.g. "opencv 4.11.0"."""
    if estimator == "poselib":
        require_poselib()
        return f"poselib {importlib.metadata.version('poselib')}"
    return f"opencv {cv2.__version__}"


# --------------------------------------------------------------------------------------------- pose


@dataclass(frozen=True, kw_only=True)
class RelativePose:
    """An estimated pose, x1 = rotation @ x0 + translation, and the matches that support it."""

    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,), of length 1
    inliers: np.ndarray  # (M,) bool


def normalise(points: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) as directions (x / z, y / z) of the camera K (3, 3); skew is ignored."""
    focal, centre = K[[0, 1], [0, 1]], K[:2, 2]
    return (np.asarray(points, dtype=np.float64) - centre) / focal


def estimate_pose(
    points0: np.ndarray, points1: np.ndarray, K0: np.ndarray, K1: np.ndarray, protocol: Protocol
) -> RelativePose | None:
    """Estimate the relative pose of two cameras.

    Args:
        points0: (M, 2) pixels of image 0, hloc's frame.
        points1: (M, 2) their matches in image 1.
        K0: (3, 3) in the same pixels.
        K1: (3, 3).
        protocol: how.

    Returns:
        The pose, or None where there are too few matches or no pose has a point in front of both
        cameras.
    """
    if len(points0) < FEWEST_MATCHES:
        return None
    if protocol.estimator == "poselib":
        return _with_poselib(points0, points1, K0, K1, protocol)
    return _with_opencv(normalise(points0, K0), normalise(points1, K1), K0, K1, protocol)


def _with_opencv(
    points0: np.ndarray, points1: np.ndarray, K0: np.ndarray, K1: np.ndarray, protocol: Protocol
) -> RelativePose | None:
    # fy of camera 1 and fx of camera 0, twice each: the reference's mean.
    focal = float(np.mean([K0[0, 0], K1[1, 1], K0[0, 0], K1[1, 1]]))
    identity = np.eye(3)
    try:
        essential, mask = cv2.findEssentialMat(
            points0,
            points1,
            identity,
            method=cv2.RANSAC,
            prob=protocol.confidence,
            threshold=protocol.threshold / focal,
            maxIters=protocol.max_iterations,
        )
    except cv2.error:  # degenerate samples only, e.g. all points in one place
        return None
    if essential is None or mask is None or essential.shape[0] % 3 or essential.shape[1] != 3:
        return None
    best, most = None, 0
    for block in np.split(essential, len(essential) // 3):
        # recoverPose takes the matches that are behind a camera or too far out of the mask that it
        # is given, and the next block sees what is left. The reference counts inliers after that.
        count, rotation, translation = cv2.recoverPose(
            block, points0, points1, identity, distanceThresh=protocol.max_depth, mask=mask
        )[:3]
        if count > most:
            most = count
            best = RelativePose(
                rotation=rotation, translation=translation[:, 0], inliers=mask.ravel() > 0
            )
    return best


def _with_poselib(
    points0: np.ndarray, points1: np.ndarray, K0: np.ndarray, K1: np.ndarray, protocol: Protocol
) -> RelativePose | None:
    import poselib

    # Its PINHOLE has the origin at the corner of the first pixel or anywhere: only differences to
    # the principal point count.
    cameras = [
        {
            "model": "PINHOLE",
            "width": max(1, round(2 * K[0, 2])),
            "height": max(1, round(2 * K[1, 2])),
            "params": [K[0, 0], K[1, 1], K[0, 2], K[1, 2]],
        }
        for K in (K0, K1)
    ]
    pose, info = poselib.estimate_relative_pose(
        np.asarray(points0, dtype=np.float64),
        np.asarray(points1, dtype=np.float64),
        cameras[0],
        cameras[1],
        poselib_options(protocol),
        {},
    )
    inliers = np.asarray(info["inliers"], dtype=bool)
    translation = np.asarray(pose.t, dtype=np.float64).ravel()
    length = float(np.linalg.norm(translation))
    if not inliers.any() or not math.isfinite(length) or length == 0:
        return None
    return RelativePose(
        rotation=np.asarray(pose.R, dtype=np.float64),
        translation=translation / length,
        inliers=inliers,
    )


def epipolar_distance(
    points0: np.ndarray, points1: np.ndarray, K0: np.ndarray, K1: np.ndarray, pose: np.ndarray
) -> np.ndarray:
    """The squared symmetric epipolar distance (M,) of matches to the true pose (4, 4).

    In normalised coordinates, as SuperGlue's and LoFTR's evaluations compute it.
    """
    essential = essential_matrix(pose[:3, :3], pose[:3, 3])
    return squared_symmetric_distance(essential, normalise(points0, K0), normalise(points1, K1))


def evaluate_pair(
    points0: np.ndarray,
    points1: np.ndarray,
    K0: np.ndarray,
    K1: np.ndarray,
    pose: np.ndarray,
    protocol: Protocol,
    *,
    identifier: str,
    covisible: tuple[float, float] = (0.0, 0.0),
) -> DumpRecord:
    """Judge the matches of one pair.

    Args:
        points0: (M, 2) original pixels of image 0, hloc's frame.
        points1: (M, 2) their matches.
        K0: (3, 3).
        K1: (3, 3).
        pose: (4, 4) true pose, camera 0 to camera 1.
        protocol: how the pose is estimated.
        identifier: of the pair.
        covisible: overlaps of the label.

    Returns:
        The line of the dump. Without an estimate all errors are infinite. Where the true
        translation is exactly zero its direction is undefined: the error is NaN, as in the
        reference, whose analysis counts that as a failure.
    """
    correct = epipolar_distance(points0, points1, K0, K1, pose) < CORRECT
    errors = (math.inf, math.inf, math.inf)
    inliers = np.zeros(len(points0), dtype=bool)
    estimate = estimate_pose(points0, points1, K0, K1, protocol)
    if estimate is not None:
        inliers = estimate.inliers
        truth = pose[:3, 3]
        length = float(np.linalg.norm(truth))
        direction = math.nan
        if length > 0:
            direction = float(direction_error_deg(estimate.translation, truth, sign_known=False))
        scaled = estimate.translation * (length / np.linalg.norm(estimate.translation))
        errors = (
            float(rotation_error_deg(estimate.rotation, pose[:3, :3])),
            direction,
            float(np.linalg.norm(scaled - truth)),
        )
    return DumpRecord.judged(identifier, covisible, errors, correct, inliers)
