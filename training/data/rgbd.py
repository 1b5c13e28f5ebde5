"""Posed RGB-D folders.

A scene is a folder with

* ``color/`` images, ``depth/`` maps (``.png`` of 16 bits, ``.npy``, ``.h5`` or COLMAP's ``.bin``)
  and ``pose/`` text files of 4 x 4 numbers, camera to world; the same name, apart from the suffix,
  belongs together, and frames that lack one of the three are left out;
* ``intrinsics.txt``, ``intrinsic/intrinsic_color.txt`` or ``intrinsic_color.txt``: 3 x 3 or 4 x 4
  numbers for the colour images, with the centre of the first pixel at (0, 0).

That is what ScanNet's ``SensReader`` exports and what most RGB-D recorders can be brought to. The
folder given may also hold several such scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import natural_key
from gim_hloc.images import SUFFIXES as IMAGE_SUFFIXES
from gim_hloc.options import Count, options
from gim_hloc.training.data.depth_maps import SUFFIXES as DEPTH_SUFFIXES
from gim_hloc.training.data.posed import PosedOptions, PosedViews, View

_INTRINSICS = ("intrinsics.txt", "intrinsic/intrinsic_color.txt", "intrinsic_color.txt")


@options
class RgbdOptions(PosedOptions):
    """Where the frames are."""

    root: Path  # a scene, or a folder of scenes
    stride: Count = 1  # of the frames in order of name, every so many are used
    poses: Literal["camera_to_world", "world_to_camera"] = "camera_to_world"


def open_rgbd(options: RgbdOptions) -> PosedViews:
    """Pairs of posed RGB-D folders.

    Raises:
        InputError: no scene, no intrinsics, or no pair that overlaps.
    """
    root = Path(options.root)
    scenes = [root] if (root / "color").is_dir() else []
    if not scenes and root.is_dir():
        scenes = sorted(p for p in root.iterdir() if (p / "color").is_dir())
    if not scenes:
        raise InputError(f"{root} holds no folder color/, and neither does a folder in it.")
    return PosedViews({scene.name: _views(scene, options) for scene in scenes}, options, "rgbd")


def _views(scene: Path, options: RgbdOptions) -> list[View]:
    intrinsics = next((scene / name for name in _INTRINSICS if (scene / name).is_file()), None)
    if intrinsics is None:
        raise InputError(f"{scene} has no intrinsics; known are {', '.join(_INTRINSICS)}.")
    K = read_matrix(intrinsics, (3, 4))[:3, :3]
    images = _by_stem(scene / "color", IMAGE_SUFFIXES)
    depths = _by_stem(scene / "depth", DEPTH_SUFFIXES)
    poses = _by_stem(scene / "pose", (".txt",))
    views = []
    names = sorted(images.keys() & depths.keys() & poses.keys(), key=natural_key)
    for name in names[:: options.stride]:
        pose = read_matrix(poses[name], (4,))
        if options.poses == "camera_to_world" and np.isfinite(pose).all():
            pose = np.linalg.inv(pose)
        views.append(
            View(
                name=f"{scene.name}/{name}",
                image=images[name],
                depth=depths[name],
                K=K,
                world_to_camera=pose,
            )
        )
    return views


def _by_stem(folder: Path, suffixes: Any) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.")
    return {p.stem: p for p in sorted(folder.glob("[!.]*")) if p.suffix.lower() in suffixes}


def read_matrix(path: Path, sides: tuple[int, ...]) -> np.ndarray:
    """A square matrix of numbers in text, float64; it may hold ``inf`` and ``nan``.

    Raises:
        InputError: missing, no numbers, or of another size.
    """
    try:
        matrix = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a matrix: {error}.") from None
    if matrix.shape not in [(n, n) for n in sides]:
        expected = " or ".join(f"{n} x {n}" for n in sides)
        raise InputError(f"{path} holds {matrix.shape[0]} x {matrix.shape[1]}, not {expected}.")
    return matrix
