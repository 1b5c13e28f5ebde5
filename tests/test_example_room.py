"""The example room: its photographs, depth and poses agree with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

Array = npt.NDArray[Any]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROOM = EXAMPLES / "room"


def _read_truth() -> tuple[Array, tuple[int, int], dict[str, Array]]:
    """Read the text model without our own writer: calibration, (width, height), poses by name."""
    camera = (ROOM / "gt/cameras.txt").read_text().splitlines()[-1].split()
    assert camera[1] == "PINHOLE"
    fx, fy, cx, cy = map(float, camera[4:])
    k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    poses = {}
    for line in (ROOM / "gt/images.txt").read_text().splitlines():
        parts = line.split()
        if line.startswith("#") or not parts:
            continue
        w, x, y, z, *translation = map(float, parts[1:8])
        assert abs(w * w + x * x + y * y + z * z - 1) < 1e-12
        vector = np.array([x, y, z])
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = (w * w - vector @ vector) * np.eye(3) + 2 * np.outer(vector, vector)
        poses[parts[9]] = np.column_stack([rotation + 2 * w * cross, translation])
    return k, (int(camera[2]), int(camera[3])), poses


def _read_depth(name: str) -> Array:
    with Image.open(ROOM / "depth" / Path(name).with_suffix(".png")) as image:
        return np.asarray(image, dtype=np.float64) / 1000.0


def _read_photo(name: str) -> Array:
    with Image.open(ROOM / "images" / name) as image:
        return np.asarray(image.convert("RGB"))


def _unproject(k: Array, pose: Array, x: Array, y: Array, depth: Array) -> Array:
    camera = np.linalg.inv(k) @ np.stack([x * depth, y * depth, depth])
    world: Array = pose[:, :3].T @ (camera - pose[:, 3:])
    return world


def test_truth_names_every_photograph_and_depth_map() -> None:
    k, size, poses = _read_truth()
    assert list(poses) == sorted(poses)
    assert 16 <= len(poses) <= 24
    assert sorted(path.name for path in (ROOM / "images").iterdir()) == list(poses)
    assert sorted(path.stem for path in (ROOM / "depth").iterdir()) == [n[:-4] for n in poses]
    assert (k[0, 2], k[1, 2]) == (size[0] / 2, size[1] / 2)
    for name in poses:
        with Image.open(ROOM / "images" / name) as photo:
            exif = photo.getexif()
            assert photo.size == size
            # EXIF rounds the focal length to whole millimetres of a full-frame diagonal.
            focal = exif.get_ifd(0x8769)[41989] / np.hypot(36, 24) * np.hypot(*size)
        assert focal == pytest.approx(k[0, 0], rel=1e-9)
        assert 0x8825 not in exif  # no invented position
        depth = _read_depth(name)
        assert depth.shape == size[::-1]
        assert 0.2 < depth.min() < depth.max() < 9


def test_example_stays_small() -> None:
    assert sum(path.stat().st_size for path in ROOM.rglob("*") if path.is_file()) < 6 * 2**20


@pytest.mark.parametrize("step", [1, 3])
def test_depth_and_photographs_agree_through_the_poses(step: int) -> None:
    k, (width, height), poses = _read_truth()
    names = list(poses)
    for first in (0, 7, 14):
        name0, name1 = names[first], names[(first + step) % len(names)]
        x, y = (
            a.ravel() + 0.5 for a in np.meshgrid(np.arange(0, width, 3), np.arange(0, height, 3))
        )
        depth0 = _read_depth(name0)[y.astype(int), x.astype(int)]
        world = _unproject(k, poses[name0], x, y, depth0)
        image = k @ (poses[name1][:, :3] @ world + poses[name1][:, 3:])
        u, v, z = image[0] / image[2], image[1] / image[2], image[2]
        inside = (z > 0.1) & (u > 1) & (u < width - 1) & (v > 1) & (v < height - 1)
        i, j = v[inside].astype(int), u[inside].astype(int)
        error = np.abs(_read_depth(name1)[i, j] / z[inside] - 1)
        visible = error < 0.02
        assert visible.mean() > 0.5
        assert (
            np.median(error[visible]) < 1.5e-3
        )  # millimetres, and the nearest pixel instead of u, v
        grey0 = _read_photo(name0).mean(axis=2)[y.astype(int), x.astype(int)][inside]
        grey1 = _read_photo(name1).mean(axis=2)[i, j]
        assert np.corrcoef(grey0[visible], grey1[visible])[0, 1] > 0.85
