"""What the writers of exports share: where they write, and what they read of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import write_atomic
from gim_hloc.options import TargetOptions

if TYPE_CHECKING:
    from gim_hloc.colmap.geo import Metres

Mask = Callable[[str], np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a model is exported to, and what goes with it.

    Attributes:
        folder: which is there.
        images: image root, for formats that name image files.
        place: where the folder will stand, if it is moved; links to images are relative to it.
        progress: show a progress bar where images are written.
        options: see ``TargetOptions``.
        mask: (H, W) bool in stored pixels of an image by its name, True where it counts, or None.
        dense: COLMAP's workspace with depth maps and ``dense.ply`` of the model, if there is one.
        metres: what took the model into metres, z up; None: it is in units of its own.
    """

    folder: Path
    images: Path | None = None
    place: Path | None = None
    progress: bool = False
    options: TargetOptions = field(default_factory=TargetOptions)
    mask: Mask | None = None
    dense: Path | None = None
    metres: Metres | None = None


@dataclass(frozen=True)
class Format:
    """A format of models.

    Attributes:
        files: that it writes, relative, with ``*`` and ``**``.
        write: writes a ``pycolmap.Reconstruction`` and gives notes about what was left out.
        large: whether it writes images, which are later known by their sizes alone.
        dense: whether it holds something of the dense model.
    """

    files: Sequence[str]
    write: Callable[[Any, Target], list[str]]
    large: bool = False
    dense: bool = False


def registered(model: Any) -> list[Any]:
    """Images with a pose, by name."""
    return sorted((model.image(i) for i in model.reg_image_ids()), key=lambda image: image.name)


def used_cameras(model: Any) -> dict[int, Any]:
    """Cameras of the images with a pose, by id."""
    used = sorted({image.camera_id for image in registered(model)})
    return {camera_id: model.camera(camera_id) for camera_id in used}


def pose_of(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """R (3, 3), world to camera, and the centre (3,) of an image."""
    rotation = np.asarray(image.cam_from_world().matrix())[:, :3]
    return rotation, np.asarray(image.projection_center())


def principal(camera: Any) -> np.ndarray:
    """Principal point (2,) px, COLMAP's frame."""
    return np.array([camera.principal_point_x, camera.principal_point_y])


def coloured_points(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (M, 3) and colours (M, 3) in the order of the point ids."""
    ids = sorted(model.point3D_ids())
    xyz = np.array([model.points3D[i].xyz for i in ids], dtype=np.float64).reshape(-1, 3)
    rgb = np.array([model.points3D[i].color for i in ids], dtype=np.uint8).reshape(-1, 3)
    return xyz, rgb


def write_ply(path: Path, xyz: np.ndarray, rgb: np.ndarray, *, normals: bool = False) -> None:
    """Write coloured points (M, 3) as a binary PLY file, with normals of zero if asked for."""
    places = ["x", "y", "z", *(("nx", "ny", "nz") if normals else ())]
    colours = ["red", "green", "blue"]
    layout = np.dtype([*((n, "<f4") for n in places), *((n, "u1") for n in colours)])
    vertices = np.zeros(len(xyz), layout)
    for column, axis in enumerate("xyz"):
        vertices[axis] = xyz[:, column]
    for column, channel in enumerate(colours):
        vertices[channel] = rgb[:, column]
    header = "".join(
        [
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n",
            *(f"property float {name}\n" for name in places),
            *(f"property uchar {name}\n" for name in colours),
            "end_header\n",
        ]
    )
    write_atomic(path, header.encode() + vertices.tobytes())


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (M, 3) float32 and colours (M, 3) uint8 of a binary PLY file with both.

    Raises:
        InputError: it is no such file.
    """
    data = path.read_bytes()
    header, end, _ = data.partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines()]
    counts = [int(line[2]) for line in lines if line[:2] == ["element", "vertex"]]
    kinds = {"float": "<f4", "double": "<f8", "uchar": "u1"}
    layout = np.dtype([(line[2], kinds[line[1]]) for line in lines if line[:1] == ["property"]])
    if not (end and counts and ["format", "binary_little_endian", "1.0"] in lines):
        raise InputError(f"{path} is no binary PLY file of points.")
    vertices = np.frombuffer(data, layout, counts[0], len(header) + len(end))
    xyz = np.stack([vertices[axis] for axis in "xyz"], axis=1).astype(np.float32)
    return xyz, np.stack([vertices[channel] for channel in ("red", "green", "blue")], axis=1)


def distortion(camera: Any) -> dict[str, float] | None:
    """Terms k1 ... k4, p1, p2 of a camera as OpenCV names them, without those that are 0.

    None for models that have others: two with them, and fields of view beyond a plane's.
    """
    names = {
        "SIMPLE_PINHOLE": "", "PINHOLE": "", "SIMPLE_RADIAL": "k1", "RADIAL": "k1 k2",
        "OPENCV": "k1 k2 p1 p2", "FULL_OPENCV": "k1 k2 p1 p2 k3 k4 k5 k6",
        "SIMPLE_RADIAL_FISHEYE": "k1", "RADIAL_FISHEYE": "k1 k2", "OPENCV_FISHEYE": "k1 k2 k3 k4",
    }.get(str(camera.model_name))  # fmt: skip
    if names is None:
        return None
    listed = names.split()
    values = [float(p) for p in camera.params[len(camera.params) - len(listed) :]]
    found = {name: value for name, value in zip(listed, values, strict=True) if value}
    rational = not is_fisheye(camera) and {"k4", "k5", "k6"} & found.keys()
    return None if rational else found


def is_fisheye(camera: Any) -> bool:
    """Whether distortion acts on the angle instead of its tangent."""
    return str(camera.model_name).endswith("_FISHEYE")


def models_named(cameras: Mapping[int, Any]) -> str:
    """Camera models for a sentence."""
    return " and ".join(sorted({str(camera.model_name) for camera in cameras.values()}))
