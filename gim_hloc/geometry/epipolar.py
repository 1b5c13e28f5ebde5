"""Distances to epipolar lines. Matrices are essential or fundamental: ``x1^T M x0 = 0``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def cross_matrix(vector: np.ndarray) -> np.ndarray:
    """The matrix (3, 3) that takes ``x`` to the cross product ``vector x x``."""
    x, y, z = vector
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])


def essential_matrix(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Essential matrix (3, 3) of ``x1 = rotation @ x0 + translation``."""
    matrix: np.ndarray = cross_matrix(translation) @ rotation
    return matrix


def homogeneous(points: np.ndarray) -> np.ndarray:
    """Points (N, 2) with a third coordinate of 1; rays (N, 3) as they are."""
    points = np.asarray(points, dtype=np.float64)
    return points if points.shape[1] == 3 else np.hstack([points, np.ones((len(points), 1))])


def distances(
    matrix: np.ndarray, points0: np.ndarray, points1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point to the epipolar line of its partner, (N,) in each image.

    Args:
        matrix: (3, 3).
        points0: (N, 2) or rays (N, 3), in the coordinates of the matrix.
        points1: their partners.

    Returns:
        In image 0 and in image 1; NaN or infinite where there is no line, at an epipole.
    """
    x0, x1 = homogeneous(points0), homogeneous(points1)
    lines1, lines0 = x0 @ matrix.T, x1 @ matrix
    residual = np.abs((x1 * lines1).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple(residual / np.linalg.norm(lines[:, :2], axis=1) for lines in (lines0, lines1))


def squared_symmetric_distance(
    matrix: np.ndarray, points0: np.ndarray, points1: np.ndarray
) -> np.ndarray:
    """Sum (N,) of the squares of both distances, as SuperGlue's and LoFTR's evaluations compute it.

    Args:
        matrix: (3, 3).
        points0: (N, 2), in the coordinates of the matrix.
        points1: their partners.
    """
    x0, x1 = homogeneous(points0), homogeneous(points1)
    lines1, lines0 = x0 @ matrix.T, x1 @ matrix
    residual = (x1 * lines1).sum(1) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        distance: np.ndarray = residual * (
            1 / (lines1[:, :2] ** 2).sum(1) + 1 / (lines0[:, :2] ** 2).sum(1)
        )
    return distance


def mean_distances(
    matrix: torch.Tensor, points0: torch.Tensor, points1: torch.Tensor
) -> torch.Tensor:
    """Mean of both distances (M, N) between every point and every other.

    Args:
        matrix: (3, 3).
        points0: (M, 2), in the coordinates of the matrix.
        points1: (N, 2).
    """
    import torch.nn.functional as F

    matrix = matrix.double()
    x0, x1 = (F.pad(xy.double(), (0, 1), value=1.0) for xy in (points0, points1))
    lines1, lines0 = x0 @ matrix.T, x1 @ matrix  # (M, 3) in image 1, (N, 3) in image 0
    residual = (lines1 @ x1.T).abs()
    slope1 = lines1[:, :2].norm(dim=1).clamp(min=1e-12)
    slope0 = lines0[:, :2].norm(dim=1).clamp(min=1e-12)
    return ((residual / slope1[:, None] + residual / slope0) / 2).to(points0.dtype)
