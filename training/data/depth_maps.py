"""Depth maps in the files that data sets keep them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.hloc_files import open_h5, read
from gim_hloc.pickles import read_npz

SUFFIXES = (".h5", ".npy", ".png", ".bin")
MILLIMETRES = 0.001


def read_depth(path: Path, *, scale: float = MILLIMETRES) -> np.ndarray:
    """Read depth along the optical axis.

    Args:
        path: ``.h5`` (data set ``depth``, MegaDepth), ``.npy``, ``.png`` of 16 bits, or ``.bin`` as
            COLMAP writes its dense maps.
        scale: unit of the poses per step of a ``.png``; other files hold that unit itself.

    Returns:
        (h, w) float32, 0 or less where unknown.

    Raises:
        InputError: the file is missing or damaged, or of another kind.
    """
    reader: Any = {".h5": _read_h5, ".npy": _read_npy, ".png": _read_png, ".bin": read_colmap}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise InputError(f"{path} is no depth map; known are {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise InputError(f"The depth map {path} does not exist.")
    try:
        depth = np.asarray(reader(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"The depth map {path} cannot be read: {error}.") from None
    if depth.ndim != 2 or not depth.size:
        raise InputError(f"The depth map {path} has the shape {depth.shape}, not (height, width).")
    result: np.ndarray = depth.astype(np.float32)
    return result * np.float32(scale) if path.suffix.lower() == ".png" else result


def read_colmap(path: Path) -> np.ndarray:
    """A map that COLMAP's stereo wrote: ``width&height&channels&``, then float32 row by row."""
    data = path.read_bytes()
    header = data[:64].split(b"&", 3)
    if len(header) < 4 or not all(part.isdigit() for part in header[:3]):
        raise ValueError("it does not begin as COLMAP's maps do")
    width, height, channels = (int(part) for part in header[:3])
    start = sum(len(part) + 1 for part in header[:3])
    if channels != 1 or len(data) - start != 4 * width * height:
        raise ValueError(f"{len(data)} bytes do not fit {width} x {height} x {channels}")
    return np.frombuffer(data, "<f4", offset=start).reshape(height, width)


def _read_h5(path: Path) -> np.ndarray:
    with open_h5(path, "depth map") as file:
        return read(file, "depth")


def _read_npy(path: Path) -> np.ndarray:
    return read_npz(path)[""]


def _read_png(path: Path) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise ValueError("it is no PNG of 16 bits")
    return image
