"""Distances to epipolar lines, against geometry done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gim_hloc.geometry import epipolar

# A shift along x: epipolar lines are rows.
ROWS = epipolar.essential_matrix(np.eye(3), np.array([1.0, 0, 0]))


def test_lines_that_are_rows() -> None:
    points0, points1 = np.array([[3.0, 7.0], [0, 1]]), np.array([[90.0, 9.5], [5, 1]])
    for found in epipolar.distances(ROWS, points0, points1):
        np.testing.assert_allclose(found, [2.5, 0])
    squared = epipolar.squared_symmetric_distance(ROWS, points0, points1)
    np.testing.assert_allclose(squared, [2 * 2.5**2, 0])


def test_points_of_a_scene_lie_on_their_lines() -> None:
    """And a step across a line is the distance to it, in the image where it is made."""
    generator = np.random.default_rng(3)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    shift = generator.normal(size=3)
    x0 = generator.uniform(-1, 1, (20, 3)) + np.array([0, 0, 5])
    x1 = x0 @ rotation.T + shift
    points0, points1 = x0[:, :2] / x0[:, 2:], x1[:, :2] / x1[:, 2:]
    essential = epipolar.essential_matrix(rotation, shift)
    for found in epipolar.distances(essential, points0, points1):
        np.testing.assert_allclose(found, 0, atol=1e-12)
    lines = epipolar.homogeneous(points0) @ essential.T
    normals = lines[:, :2] / np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
    in0, in1 = epipolar.distances(essential, points0, points1 + 0.1 * normals)
    np.testing.assert_allclose(in1, 0.1)
    squared = epipolar.squared_symmetric_distance(essential, points0, points1 + 0.1 * normals)
    np.testing.assert_allclose(squared, in0**2 + in1**2)
    means = epipolar.mean_distances(
        *map(torch.tensor, (essential, points0, points1 + 0.1 * normals))
    )
    assert means.shape == (20, 20)
    np.testing.assert_allclose(means.diagonal(), (in0 + in1) / 2)
    rays = epipolar.distances(essential, x0 / x0[:, 2:], x1 / x1[:, 2:])
    np.testing.assert_allclose(rays, 0, atol=1e-12)


@pytest.mark.parametrize("vector", [(1.0, 2.0, 3.0), (-4.0, 0.5, 0.0)])
def test_cross_matrix(vector: tuple[float, float, float]) -> None:
    other = np.array([0.3, -2.0, 7.0])
    np.testing.assert_allclose(
        epipolar.cross_matrix(np.array(vector)) @ other, np.cross(vector, other)
    )


def test_epipoles_have_no_line() -> None:
    ahead = epipolar.essential_matrix(np.eye(3), np.array([0, 0, 1.0]))
    in0, in1 = epipolar.distances(ahead, np.zeros((1, 2)), np.array([[1.0, 1.0]]))
    assert not np.isfinite(in1).any()
    assert in0[0] == 0
