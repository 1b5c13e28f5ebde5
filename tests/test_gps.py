"""Models against GPS: positions on a true ellipsoid, poses moved by a known amount."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gim_hloc.errors import InputError
from gim_hloc.evaluation import gps

# A degree of the WGS84 ellipsoid at 55.7 degrees north, m (standard series).
NORTH, EAST = 111_346.0, 62_857.0


def walk() -> dict[str, gps.Fix]:
    rng = np.random.default_rng(0)
    track = np.column_stack([np.linspace(0, 180, 20), rng.normal(0, 12, 20), rng.normal(0, 3, 20)])
    return {
        f"{i:02d}.jpg": (55.7 + y / NORTH, 13.2 + x / EAST, 40 + z)
        for i, (x, y, z) in enumerate(track.tolist())
    }


def test_positions_are_metres_east_north_and_up() -> None:
    places = gps.positions_m(
        {"a": (55.7, 13.2, 40.0), "b": (55.7 + 100 / NORTH, 13.2 - 50 / EAST, 43.0)}
    )
    assert places["b"] - places["a"] == pytest.approx([-50, 100, 3], abs=0.2)


def test_distances_are_those_by_which_the_model_is_off() -> None:
    fixes = walk()
    turn = Rotation.from_euler("xyz", [10, 50, -70], degrees=True).as_matrix()
    poses = {
        name: (turn.T, -turn.T @ (turn @ place * 0.1 + 3))
        for name, place in gps.positions_m(fixes).items()
    }
    assert gps.evaluate(poses, fixes).rmse < 1e-6
    rotation, translation = poses["10.jpg"]
    poses["10.jpg"] = (rotation, translation + rotation @ turn @ [0, 0.8, 0])  # 8 m south
    scores = gps.evaluate(poses, fixes)
    assert scores.names[int(np.argmax(scores.distances))] == "10.jpg"
    assert scores.distances.max() == pytest.approx(8, rel=0.15)
    assert scores.rmse == pytest.approx(8 / np.sqrt(20), rel=0.15)
    with pytest.raises(InputError, match="three are needed"):
        gps.evaluate(poses, {"00.jpg": fixes["00.jpg"]})
