"""Pose errors: angles, relative poses of all pairs, AUC, similarity alignment. NumPy only.

A pose is world to camera: ``x_camera = R @ x_world + t``; its centre is ``-R.T @ t``. Rotations are
(..., 3, 3), vectors (..., 3), both float64. Angles leave in degrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gim_hloc.errors import InputError

# Second singular value of the centres over the first, below which they count as lying on one line:
# there the turn about that line is noise.
COLLINEAR = 1e-3


def rotation_angle_deg(rotation: np.ndarray) -> np.ndarray:
    """Return the angle in [0, 180] of rotations (..., 3, 3), exact near 0 and near 180 degrees.

    The usual arccos of the trace cannot tell angles below 1e-6 degrees from 0 in float64 and fails
    just outside [-1, 1]; sine and cosine together do not have the problem.
    """
    rotation = np.asarray(rotation, dtype=np.float64)
    axis = np.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        axis=-1,
    )
    sine = np.linalg.norm(axis, axis=-1) / 2
    cosine = (np.trace(rotation, axis1=-2, axis2=-1) - 1) / 2
    return np.degrees(np.arctan2(sine, cosine))


def rotation_error_deg(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the angle between rotations (..., 3, 3)."""
    return rotation_angle_deg(np.swapaxes(np.asarray(estimate), -1, -2) @ np.asarray(truth))


def direction_error_deg(
    estimate: np.ndarray, truth: np.ndarray, *, sign_known: bool = True
) -> np.ndarray:
    """Return the angle between directions (..., 3); lengths do not matter.

    Args:
        estimate: estimated directions.
        truth: true directions.
        sign_known: True gives [0, 180]: right for SfM, whose points fix the sign. False folds the
            angle to [0, 90], as two-view protocols do because an essential matrix has no sign.

    Returns:
        Angles in degrees. Where the truth is the zero vector there is no direction to miss: 0.
        Where only the estimate is zero it points nowhere: the largest error.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    truth = np.asarray(truth, dtype=np.float64)
    cross = np.linalg.norm(np.cross(estimate, truth), axis=-1)
    angle = np.degrees(np.arctan2(cross, (estimate * truth).sum(-1)))
    if not sign_known:
        angle = np.minimum(angle, 180 - angle)
    no_truth = ~truth.any(-1)
    no_estimate = ~estimate.any(-1)
    angle = np.where(no_estimate & ~no_truth, 180.0 if sign_known else 90.0, angle)
    return np.where(no_truth, 0.0, angle)


def relative_pose(
    rotation0: np.ndarray, translation0: np.ndarray, rotation1: np.ndarray, translation1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(R, t)`` that takes points of camera 0 to camera 1: ``x1 = R @ x0 + t``."""
    rotation = rotation1 @ np.swapaxes(rotation0, -1, -2)
    return rotation, translation1 - (rotation @ translation0[..., None])[..., 0]


def relative_pose_errors(
    rotations: np.ndarray,
    translations: np.ndarray,
    true_rotations: np.ndarray,
    true_translations: np.ndarray,
    *,
    sign_known: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the relative poses of all pairs ``i < j`` of N images.

    Needs no alignment, because relative rotations and translation directions are the same in every
    world frame of the right handedness.

    Args:
        rotations: (N, 3, 3) estimated world to camera; a row of NaN is an unregistered image.
        translations: (N, 3) estimated.
        true_rotations: (N, 3, 3).
        true_translations: (N, 3).
        sign_known: see `direction_error_deg`.

    Returns:
        Pairs (P, 2), rotation errors (P,) and translation direction errors (P,) in degrees. Pairs
        with an unregistered image have both errors infinite.
    """
    rotations = np.asarray(rotations, dtype=np.float64)
    translations = np.asarray(translations, dtype=np.float64)
    i, j = np.triu_indices(len(rotations), k=1)
    estimate = relative_pose(rotations[i], translations[i], rotations[j], translations[j])
    truth = relative_pose(
        true_rotations[i], true_translations[i], true_rotations[j], true_translations[j]
    )
    rotation_errors = rotation_error_deg(estimate[0], truth[0])
    direction_errors = direction_error_deg(estimate[1], truth[1], sign_known=sign_known)
    missing = ~(np.isfinite(rotation_errors) & np.isfinite(estimate[1]).all(-1))
    rotation_errors = np.where(missing, np.inf, rotation_errors)
    direction_errors = np.where(missing, np.inf, direction_errors)
    return np.stack([i, j], axis=1), rotation_errors, direction_errors


def auc(errors: np.ndarray | Sequence[float], thresholds: Sequence[float]) -> list[float]:
    """Return the normalised area under the recall curve up to each threshold, in [0, 1].

    The same numbers as the evaluations of SuperGlue, LoFTR and ZEB: the curve is the polyline
    through (0, 0) and (e_i, i / N) for the sorted errors, cut before the first error that is not
    below the threshold and continued level from there.

    Args:
        errors: (N,) errors in the thresholds' unit; NaN and infinity are failures.
        thresholds: positive limits.

    Raises:
        InputError: there are no errors to judge, or a threshold is not positive.
    """
    ordered = np.asarray(errors, dtype=np.float64).ravel()
    if ordered.size == 0:
        raise InputError("AUC of no errors at all: give at least one pair to judge")
    ordered = np.sort(np.where(np.isnan(ordered), np.inf, ordered))
    ordered = np.concatenate([[0.0], ordered])
    recall = np.linspace(0.0, 1.0, len(ordered))
    areas = []
    for threshold in thresholds:
        if not threshold > 0:
            raise InputError(f"AUC threshold {threshold} is not positive")
        end = int(np.searchsorted(ordered, threshold))
        x = np.concatenate([ordered[:end], [threshold]])
        y = np.concatenate([recall[:end], [recall[end - 1]]])
        # The trapezoid rule by hand: NumPy renamed its function between the versions supported.
        areas.append(float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / threshold))
    return areas


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """The map ``x -> scale * rotation @ x + translation``."""

    scale: float
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (..., 3)."""
        return self.scale * points @ self.rotation.T + self.translation


def umeyama(source: np.ndarray, target: np.ndarray) -> Similarity:
    """Fit the similarity that maps ``source`` to ``target`` with the least sum of squares.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns",
    PAMI 1991, with the handedness kept.

    Args:
        source: (N, 3) points, N >= 3 and not on one line.
        target: (N, 3) where they belong.

    Raises:
        InputError: fewer than three points, or all of them on one line: the turn about that line is
            free (`align_cameras` then takes it from the orientations).
    """
    source = np.asarray(source, dtype=np.float64)
    target = np.asarray(target, dtype=np.float64)
    if len(source) < 3 or is_collinear(source) or is_collinear(target):
        raise InputError(
            f"{len(source)} point(s) do not fix a similarity: three that are not on one line do"
        )
    return fit_similarity(source, target)


def fit_similarity(source: np.ndarray, target: np.ndarray) -> Similarity:
    """The same for any points; on one line, the turn about it is any."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, singular, vt = np.linalg.svd(covariance)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u * signs @ vt
    scale = float((singular * signs).sum() / ((source - source_mean) ** 2).sum(1).mean())
    return Similarity(
        scale=scale, rotation=rotation, translation=target_mean - scale * rotation @ source_mean
    )


def robust_umeyama(
    source: np.ndarray,
    target: np.ndarray,
    *,
    samples: int = 500,
    seed: int = 0,
    fit: Callable[[np.ndarray, np.ndarray], Similarity] = umeyama,
) -> Similarity:
    """Fit a similarity to points of which up to about half may be wrong.

    Least median of squares over triples (Rousseeuw, 1984), which needs no threshold, then least
    squares on the points within 2.5 robust standard deviations, repeated until they stay the same.

    Args:
        source: (N, 3) points.
        target: (N, 3) where they belong.
        samples: triples to try; all of them where there are not more.
        seed: of the choice of triples.
        fit: of all triples and of the rest; ``fit_similarity`` takes points on one line.

    Raises:
        InputError: as `umeyama`, or no triple is usable.
    """
    source = np.asarray(source, dtype=np.float64)
    target = np.asarray(target, dtype=np.float64)
    count = len(source)
    triples: list[Sequence[int]]
    if count * (count - 1) * (count - 2) // 6 <= samples:
        triples = list(itertools.combinations(range(count), 3))
    else:
        generator = np.random.default_rng(seed)
        triples = [generator.choice(count, 3, replace=False).tolist() for _ in range(samples)]
    best, best_median = None, np.inf
    for triple in triples:
        chosen = list(triple)
        try:
            candidate = fit(source[chosen], target[chosen])
        except InputError:
            continue
        median = float(np.median(_residuals(candidate, source, target)))
        if median < best_median:
            best, best_median = candidate, median
    if best is None:
        return fit(source, target)  # says what is wrong with the points
    inliers = np.zeros(count, dtype=bool)
    for _ in range(10):
        residuals = _residuals(best, source, target)
        # 1.4826 makes the median of absolute values a standard deviation; the floor keeps all
        # points of exact data, whose median is rounding noise.
        limit = 2.5 * 1.4826 * float(np.median(residuals)) + 1e-9 * float(np.ptp(target))
        previous, inliers = inliers, residuals <= limit
        if (inliers == previous).all():
            break
        try:
            best = fit(source[inliers], target[inliers])
        except InputError:
            break
    return best


def align_cameras(
    rotations: np.ndarray,
    centres: np.ndarray,
    true_rotations: np.ndarray,
    true_centres: np.ndarray,
    *,
    robust: bool = False,
) -> Similarity:
    """Return the similarity that takes an estimated world to the true one.

    Fitted to the camera centres. Where these lie on one line (two cameras always do) the turn comes
    from the orientations (chordal mean) and only scale and shift from the centres.

    Args:
        rotations: (N, 3, 3) estimated, world to camera, N >= 2.
        centres: (N, 3) estimated.
        true_rotations: (N, 3, 3).
        true_centres: (N, 3).
        robust: fit with `robust_umeyama`, for models in which some cameras are plainly wrong.

    Raises:
        InputError: fewer than two cameras.
    """
    count = len(centres)
    if count < 2:
        raise InputError(f"{count} camera(s) in common: two are the least that can be aligned")
    if not (is_collinear(centres) or is_collinear(true_centres)):
        return (robust_umeyama if robust else umeyama)(centres, true_centres)
    turns = np.swapaxes(true_rotations, -1, -2) @ rotations
    u, _, vt = np.linalg.svd(turns.sum(0))
    rotation = u * [1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))] @ vt
    offsets = (centres - centres.mean(0)) @ rotation.T
    true_offsets = true_centres - true_centres.mean(0)
    spread = float((offsets**2).sum())
    scale = float((offsets * true_offsets).sum()) / spread if spread > 0 else 1.0
    translation = true_centres.mean(0) - scale * rotation @ centres.mean(0)
    return Similarity(scale=scale, rotation=rotation, translation=translation)


def is_collinear(points: np.ndarray) -> bool:
    """Tell whether points (N, 3) lie on one line or in one place."""
    singular = np.linalg.svd(np.asarray(points) - np.mean(points, axis=0), compute_uv=False)
    return len(singular) < 2 or bool(singular[1] <= COLLINEAR * singular[0])


def camera_centres(rotations: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """Return the centres (N, 3) of world-to-camera poses."""
    return -(np.swapaxes(rotations, -1, -2) @ np.asarray(translations)[..., None])[..., 0]


def _residuals(similarity: Similarity, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.linalg.norm(similarity(source) - target, axis=1)
