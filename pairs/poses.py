"""Cameras near each other that look the same way, from known poses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.pairs.base import Pair, best_pairs


def poses(
    cameras: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    k: int = 20,
    max_angle_deg: float = 30.0,
) -> list[Pair]:
    """Pair each image with the k nearest cameras whose viewing direction is similar.

    The same rule as hloc's ``pairs_from_poses``: the angle is between the principal axes, because
    a turn about the axis does not change what is seen.

    Args:
        cameras: name -> (R (3, 3), t (3,)), world to camera: x_cam = R x_world + t.
        k: partners per image.
        max_angle_deg: pairs of a greater (or equal) angle are left out.

    Returns:
        Sorted pairs.

    Raises:
        InputError: if ``k`` is below 1.
    """
    if k < 1:
        raise InputError(f"Pairs from poses need at least 1 neighbour per image, not {k}")
    if not cameras:
        return []
    names = sorted(cameras)
    rotations = np.stack([np.asarray(cameras[name][0], dtype=np.float64) for name in names])
    translations = np.stack([np.asarray(cameras[name][1], dtype=np.float64) for name in names])
    centres = -np.einsum("nji,nj->ni", rotations, translations)
    axes = rotations[:, 2]

    def scores_of(rows: np.ndarray) -> np.ndarray:
        distance = np.linalg.norm(centres[rows, None] - centres[None], axis=-1)
        angle = np.rad2deg(np.arccos(np.clip(axes[rows] @ axes.T, -1, 1)))
        return np.where(angle < max_angle_deg, -distance, -np.inf)

    return best_pairs(names, scores_of, k)
