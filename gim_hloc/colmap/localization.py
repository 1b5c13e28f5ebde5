"""Poses of single images in a finished model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, project
from gim_hloc.colmap.model import rigid

if TYPE_CHECKING:
    from gim_hloc.poses import Pose

_FOCAL_POINTS = 500  # of an image, for the focal length of several


@dataclass(kw_only=True)
class Located:
    """Pose of a single image.

    Attributes:
        pose: (R, t), world to camera.
        inliers: (N,) bool.
        error_px: mean reprojection error of the inliers.
        params: intrinsics, after refinement if there was any.
    """

    pose: Pose
    inliers: np.ndarray
    error_px: float
    params: tuple[float, ...]


def locate(
    xy_px: np.ndarray,
    xyz: np.ndarray,
    camera: CameraSpec,
    *,
    max_error: float,
    focal: Literal["known", "refine", "estimate"] = "known",
    confidence: float = 0.99999,
    max_trials: int = 10_000,
    seed: int = 0,
) -> Located | None:
    """Pose from points seen in an image: COLMAP's LO-RANSAC and refinement of all inliers.

    Args:
        xy_px: (N, 2) stored pixels, hloc's frame.
        xyz: (N, 3) where they are in the world.
        camera: intrinsics.
        max_error: largest reprojection error of an inlier, px.
        focal: known: kept; refine: a guess that is refined; estimate: found with the pose.
        confidence: of having drawn one sample without outliers.
        max_trials: samples at most.
        seed: of the samples.

    Returns:
        None when no pose was found.
    """
    if len(xy_px) < (5 if focal != "known" else 3):
        return None
    colmap_camera = pycolmap.Camera(
        model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
    )
    estimation = pycolmap.AbsolutePoseEstimationOptions()
    estimation.ransac.max_error = max_error
    estimation.ransac.confidence = confidence
    estimation.ransac.max_num_trials = max_trials
    estimation.ransac.random_seed = seed
    estimation.estimate_focal_length = focal == "estimate"
    refinement = pycolmap.AbsolutePoseRefinementOptions()
    refinement.refine_focal_length = focal != "known"
    refinement.print_summary = False
    xy_colmap = np.ascontiguousarray(xy_px, dtype=np.float64) + 0.5
    xyz = np.ascontiguousarray(xyz, dtype=np.float64)
    found = pycolmap.estimate_and_refine_absolute_pose(
        xy_colmap, xyz, colmap_camera, estimation, refinement
    )
    if found is None:
        return None
    matrix = np.asarray(found["cam_from_world"].matrix())
    pose = (matrix[:, :3].copy(), matrix[:, 3].copy())
    # What refinement moved decides again who is an inlier.
    local = xyz @ pose[0].T + pose[1]
    errors = np.full(len(xyz), np.inf)
    ahead = local[:, 2] > 0
    if ahead.any():
        distance = np.linalg.norm(project(colmap_camera, local[ahead]) - xy_colmap[ahead], axis=1)
        errors[ahead] = np.where(np.isfinite(distance), distance, np.inf)
    inliers = errors <= max_error
    if not inliers.any():
        return None
    return Located(
        pose=pose,
        inliers=inliers,
        error_px=float(errors[inliers].mean()),
        params=tuple(float(p) for p in colmap_camera.params),
    )


def shared_focal(
    views: Sequence[tuple[np.ndarray, np.ndarray, Pose]], camera: CameraSpec
) -> tuple[float, ...]:
    """The focal length at which several images of one camera together fit their points best.

    It is searched for within a factor of 1.5 around that of ``camera``; the poses follow. Each
    image weighs as much as its points say about the focal length, unlike in a mean of its values.

    Args:
        views: of each image the inliers (N, 2), stored pixels, hloc's frame, their points (N, 3) in
            the world, and a pose (R, t), world to camera.
        camera: a first guess, e.g. with the median of what the images say one by one.

    Returns:
        Parameters of the camera; nothing but focal lengths is changed.
    """
    from scipy.optimize import minimize_scalar

    refinement = pycolmap.AbsolutePoseRefinementOptions()
    refinement.refine_focal_length = False
    refinement.print_summary = False
    data = []
    for xy_px, xyz, pose in views:
        rows = np.linspace(0, len(xy_px) - 1, min(len(xy_px), _FOCAL_POINTS)).astype(np.int64)
        xy_colmap = np.ascontiguousarray(xy_px[rows], dtype=np.float64) + 0.5
        data.append((xy_colmap, np.ascontiguousarray(xyz[rows], dtype=np.float64), rigid(pose)))

    def scaled(log_scale: float) -> Any:
        found = pycolmap.Camera(
            model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
        )
        params = np.array(found.params)
        params[list(found.focal_length_idxs())] *= np.exp(log_scale)
        found.params = params.tolist()
        return found

    def cost(log_scale: float) -> float:
        used, total = scaled(log_scale), 0.0
        for xy_colmap, xyz, start in data:
            everything = np.ones(len(xyz), dtype=bool)
            found = pycolmap.refine_absolute_pose(
                start, xy_colmap, xyz, everything, used, refinement
            )
            matrix = np.asarray((start if found is None else found["cam_from_world"]).matrix())
            local = xyz @ matrix[:, :3].T + matrix[:, 3]
            local[:, 2] = np.maximum(local[:, 2], 1e-9)
            residual = ((project(used, local) - xy_colmap) ** 2).sum(1)
            # Cauchy's loss of 1 px, which refinement minimises, too.
            total += float(np.log1p(np.nan_to_num(residual, nan=1e12)).sum())
        return total

    limit = float(np.log(1.5))
    best = minimize_scalar(cost, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-5})
    return tuple(float(p) for p in scaled(float(best.x)).params)
