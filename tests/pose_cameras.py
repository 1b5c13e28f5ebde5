"""Cameras at random poses, and the same ones in other worlds."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from gim_hloc.geometry import pose


def turn(degrees: float, axis: tuple[float, float, float] = (0, 0, 1)) -> np.ndarray:
    direction = np.array(axis) / np.linalg.norm(axis)
    return Rotation.from_rotvec(np.radians(degrees) * direction).as_matrix()


def random_cameras(count: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    rotations = Rotation.random(count, random_state=seed).as_matrix()
    return {
        f"{index:02d}.jpg": (rotations[index], generator.normal(size=3)) for index in range(count)
    }


def moved(
    cameras: dict[str, tuple[np.ndarray, np.ndarray]], similarity: pose.Similarity
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same cameras in the world ``similarity(x)``."""
    result = {}
    for name, (rotation, translation) in cameras.items():
        centre = similarity(-rotation.T @ translation)
        turned = rotation @ similarity.rotation.T
        result[name] = (turned, -turned @ centre)
    return result


def shifted(camera: tuple[np.ndarray, np.ndarray], by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The camera with its centre moved."""
    rotation, translation = camera
    return rotation, translation - rotation @ by


SIMILARITY = pose.Similarity(
    scale=2.5, rotation=turn(77, (1, 2, 3)), translation=np.array([4.0, -5.0, 6.0])
)
