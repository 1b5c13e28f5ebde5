"""Points that a few small cameras see: the made-up truth of tests of pairs."""

from __future__ import annotations

import math

import numpy as np

SIZE = (64, 48)  # (width, height), px
K = np.array([[60.0, 0, 31.5], [0, 61.0, 23.5], [0, 0, 1]])
POINTS = np.random.default_rng(0).uniform([-2, -1.5, 4], [2, 1.5, 8], (200, 3))


def turned(angle: float, translation: tuple[float, float, float]) -> np.ndarray:
    """World to camera, (4, 4): a turn about the vertical axis, radians, and a translation."""
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)],
    ]  # fmt: skip
    matrix[:3, 3] = translation
    return matrix


def pose(i: int) -> np.ndarray:
    """World to camera i: a slow walk to the right with turns."""
    return turned(0.06 * i, (-0.3 * i, 0.02 * i * i, 0.05 * i))


def relative(i: int, j: int) -> np.ndarray:
    return pose(j) @ np.linalg.inv(pose(i))
