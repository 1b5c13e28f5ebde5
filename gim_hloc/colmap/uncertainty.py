"""How sure the poses of a model are, each relative to the image that shares most points with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycolmap

from gim_hloc.colmap.checks import shared_points
from gim_hloc.colmap.improve import adjuster
from gim_hloc.colmap.intrinsics import residual_variance

MAX_IMAGES = 300  # the covariance of more poses takes minutes


@dataclass(frozen=True, kw_only=True)
class PoseError:
    """Standard errors of a pose relative to another image's, along their worst axes.

    Attributes:
        neighbour: the other image.
        rotation_deg: of the rotation between the two.
        direction_deg: of the direction from one to the other; their distance has no scale.
    """

    neighbour: str
    rotation_deg: float
    direction_deg: float


def pose_errors(
    model: Any, fixed: set[int], threads: int, robust_px: float | None = None
) -> dict[str, PoseError]:
    """Image -> its standard errors; empty where they cannot be had, or of too many images.

    Args:
        model: ``pycolmap.Reconstruction`` after an adjustment.
        fixed: ids of cameras whose intrinsics were held.
        threads: of the solver.
        robust_px: of the adjustment's loss.
    """
    ids = sorted(model.reg_image_ids())
    variance = residual_variance(model, robust_px)
    if not 2 < len(ids) <= MAX_IMAGES or variance is None:
        return {}
    # Three points hold the world still: no pose is held, and so has no error.
    gauge = pycolmap.BundleAdjustmentGauge.THREE_POINTS
    problem = adjuster(model, fixed, threads, (), robust_px, gauge=gauge)
    options = pycolmap.BACovarianceOptions(
        damping=1e-6, params=pycolmap.BACovarianceOptionsParams.POSES
    )
    covariance = pycolmap.estimate_ba_covariance(options, model, problem)
    if covariance is None:
        return {}
    found = {}
    for image_id, other_id in _neighbours(model).items():
        image, other = model.image(image_id), model.image(other_id)
        ends = other.cam_from_world(), image.cam_from_world()
        parts = [
            covariance.get_cam_cov_from_world(other_id),
            covariance.get_cam_cross_cov_from_world(other_id, image_id),
            covariance.get_cam_cov_from_world(image_id),
        ]
        between = (ends[1] * ends[0].inverse()).translation
        length = float(np.linalg.norm(between))
        if any(part is None for part in parts) or length == 0:
            continue
        block = _relative(*ends, *parts)
        across = np.eye(3) - np.outer(between, between) / length**2
        rotation, direction = (
            math.degrees(math.sqrt(variance * max(0.0, np.linalg.eigvalsh(part).max())))
            for part in (block[:3, :3], across @ block[3:, 3:] @ across / length**2)
        )
        found[image.name] = PoseError(
            neighbour=other.name, rotation_deg=rotation, direction_deg=direction
        )
    return found


def _relative(a: Any, b: Any, of_a: Any, of_both: Any, of_b: Any) -> np.ndarray:
    """(6, 6) covariance of rotation (radians, on the left) and translation from camera a to b.

    Not COLMAP's ``get_cam2_cov_from_cam1``: it takes Ceres' steps of quaternions, which are half
    angles, for angles.
    """
    turn = (b * a.inverse()).rotation.matrix()
    x, y, z = turn @ a.translation
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    slope = np.zeros((6, 12))
    slope[:3, :3], slope[:3, 6:9] = -turn, np.eye(3)
    slope[3:, 3:6], slope[3:, 9:] = -turn, np.eye(3)
    slope[3:] += cross @ slope[:3]
    slope[:, [0, 1, 2, 6, 7, 8]] *= 2
    joint: np.ndarray = slope @ np.block([[of_a, of_both], [of_both.T, of_b]]) @ slope.T
    return joint


def _neighbours(model: Any) -> dict[int, int]:
    """The image that shares most points with each."""
    ids, shared = shared_points(model)
    return {ids[i]: ids[int(best)] for i, best in enumerate(shared.argmax(1)) if shared[i, best]}
