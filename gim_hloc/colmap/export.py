"""Models in other programs' formats: text, coloured points, NVM, Bundler, nerfstudio, 3DGS.

Every format but 3DGS's is written for the images as they are stored, distortion included; formats
that cannot express a camera are left out with a note instead of being written wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.files import write_atomic

# nerfstudio's world has z up and the first axis kept; its COLMAP reader applies the same map.
_NERFSTUDIO_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, -1.0, 0, 0]])

# Names of COLMAP's parameters in transforms.json, by model (fl_* and c* first).
_NERFSTUDIO_MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SIMPLE_PINHOLE": ("OPENCV", ("f", "cx", "cy")),
    "PINHOLE": ("OPENCV", ("fl_x", "fl_y", "cx", "cy")),
    "SIMPLE_RADIAL": ("OPENCV", ("f", "cx", "cy", "k1")),
    "RADIAL": ("OPENCV", ("f", "cx", "cy", "k1", "k2")),
    "OPENCV": ("OPENCV", ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2")),
    "OPENCV_FISHEYE": ("OPENCV_FISHEYE", ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4")),
    "SIMPLE_RADIAL_FISHEYE": ("OPENCV_FISHEYE", ("f", "cx", "cy", "k1")),
    "RADIAL_FISHEYE": ("OPENCV_FISHEYE", ("f", "cx", "cy", "k1", "k2")),
}
# Radial terms that Bundler and NVM can hold, as positions in the parameters.
_NOTED_PX = 0.01
_RADIAL: dict[str, tuple[int, ...]] = {
    "SIMPLE_PINHOLE": (),
    "PINHOLE": (),
    "SIMPLE_RADIAL": (3,),
    "RADIAL": (3, 4),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a model is exported to.

    Attributes:
        folder: which is there.
        images: image root, for formats that name image files.
        place: where the folder will stand, if it is moved; paths of images are relative to it.
        progress: show a progress bar where images are written.
    """

    folder: Path
    images: Path | None = None
    place: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class Format:
    """A format of models.

    Attributes:
        files: that it writes, relative, with ``*`` and ``**``.
        write: writes a ``pycolmap.Reconstruction`` and gives notes about what was left out.
    """

    files: Sequence[str]
    write: Callable[[Any, Target], list[str]]


def export_model(
    model: Any,
    folder: Path,
    *,
    formats: Sequence[str],
    images: Path | None = None,
    place: Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Write a model in several formats.

    Args:
        model: ``pycolmap.Reconstruction``.
        folder: where to write the files of ``FORMATS``.
        formats: names in ``FORMATS``.
        images: see ``Target``.
        place: see ``Target``.
        progress: see ``Target``.

    Returns:
        Notes about formats that could not be written, or not exactly.

    Raises:
        InputError: for an unknown format, or an image that cannot be read.
        OutputError: an image cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"Unknown export {unknown[0]!r}. Known: {', '.join(FORMATS)}.")
    if formats:
        folder.mkdir(parents=True, exist_ok=True)
    target = Target(folder=folder, images=images, place=place, progress=progress)
    return [note for name in formats for note in FORMATS[name].write(model, target)]


def write_text(model: Any, target: Target) -> list[str]:
    """Write COLMAP's text files."""
    model.write_text(target.folder)
    return []


def write_points(model: Any, target: Target) -> list[str]:
    """Write the coloured points, ``points.ply``."""
    write_ply(target.folder / "points.ply", *_points(model))
    return []


def _points(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (M, 3) and colours (M, 3) in the order of the point ids."""
    ids = sorted(model.point3D_ids())
    xyz = np.array([model.points3D[i].xyz for i in ids], dtype=np.float64).reshape(-1, 3)
    rgb = np.array([model.points3D[i].color for i in ids], dtype=np.uint8).reshape(-1, 3)
    return xyz, rgb


def _registered(model: Any) -> list[Any]:
    return sorted((model.image(i) for i in model.reg_image_ids()), key=lambda image: image.name)


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


def _unsupported(model: Any, what: str) -> list[str]:
    names = sorted(
        {
            str(model.camera(image.camera_id).model_name)
            for image in _registered(model)
            if str(model.camera(image.camera_id).model_name) not in _RADIAL
        }
    )
    if not names:
        return []
    return [
        f"{what} was not written: it cannot hold {' and '.join(names)} cameras. Reconstruct with "
        "--camera-model SIMPLE_RADIAL, or undistort first."
    ]


def _lost(model: Any, what: str, *, terms: int) -> list[str]:
    """A note about what the format cannot hold of the cameras, in pixels at worst.

    Args:
        model: ``pycolmap.Reconstruction``.
        what: name of the file.
        terms: radial terms of the format. One: NVM's, which acts on the distorted point.
    """
    focal = centre = radial = 0.0
    for image in _registered(model):
        camera = model.camera(image.camera_id)
        fx, fy = camera.focal_length_x, camera.focal_length_y
        reach = np.array([camera.width / fx, camera.height / fy]) / 2
        focal = max(focal, float(abs(fx - fy) / 2 * reach.max()))
        middle = np.array([camera.width, camera.height]) / 2
        centre = max(centre, float(np.linalg.norm(_principal(camera) - middle)))
        if terms == 1:
            k1, k2 = _radial(camera)
            r = np.linspace(0, np.linalg.norm(reach), 50)
            distorted = r * (1 + k1 * r**2 + k2 * r**4)
            back = distorted * (1 - k1 * distorted**2)
            radial = max(radial, float(np.abs(back - r).max() * camera.mean_focal_length()))
    said = [
        (focal, "one focal length a camera: fx and fy became their mean"),
        (centre, "the middle of the image as principal point, and measurements are written "
        "relative to the true one"),
        (radial, "one radial term, which here is an approximation"),
    ]  # fmt: skip
    parts = [f"{sentence} ({worst:.2f} px)" for worst, sentence in said if worst >= _NOTED_PX]
    if not parts:
        return []
    return [
        f"{what} holds {'; '.join(parts)}: points drawn into the images move by up to so many "
        "pixels."
    ]


def _radial(camera: Any) -> tuple[float, float]:
    terms = [float(camera.params[i]) for i in _RADIAL[str(camera.model_name)]]
    k1, k2 = [*terms, 0.0, 0.0][:2]
    return k1, k2


def _principal(camera: Any) -> np.ndarray:
    return np.array([camera.principal_point_x, camera.principal_point_y])


def write_nvm(model: Any, target: Target) -> list[str]:
    """Write VisualSFM's NVM_V3, ``model.nvm``; measurements are from the principal point, y down.

    Its single radial term acts on the distorted point, hence the sign (first order of ours).
    """
    path = target.folder / "model.nvm"
    notes = _unsupported(model, path.name)
    if notes:
        return notes
    images = _registered(model)
    index = {image.image_id: i for i, image in enumerate(images)}
    lines = ["NVM_V3", "", str(len(images))]
    for image in images:
        camera = model.camera(image.camera_id)
        x, y, z, w = image.cam_from_world().rotation.quat
        center = " ".join(f"{v:.12g}" for v in image.projection_center())
        name = image.name.replace(" ", '"')  # VisualSFM's own way of writing blanks
        lines.append(
            f"{name}\t{camera.mean_focal_length():.12g} {w:.15g} {x:.15g} {y:.15g} {z:.15g} "
            f"{center} {-_radial(camera)[0]:.12g} 0"
        )
    lines += ["", str(model.num_points3D())]
    for point_id in sorted(model.point3D_ids()):
        point = model.points3D[point_id]
        parts = [f"{v:.10g}" for v in point.xyz] + [str(int(v)) for v in point.color]
        elements = [e for e in point.track.elements if e.image_id in index]
        parts.append(str(len(elements)))
        for element in elements:
            image = model.image(element.image_id)
            xy = image.point2D(element.point2D_idx).xy - _principal(model.camera(image.camera_id))
            parts.append(f"{index[element.image_id]} {element.point2D_idx} {xy[0]:.6f} {xy[1]:.6f}")
        lines.append(" ".join(parts))
    lines += ["", "0", ""]
    write_atomic(path, "\n".join(lines))
    return _lost(model, path.name, terms=1)


def write_bundler(model: Any, target: Target) -> list[str]:
    """Write Bundler v0.3 (cameras look along -z, y up), ``bundle.out`` and ``list.txt``."""
    path = target.folder / "bundle.out"
    notes = _unsupported(model, path.name)
    if notes:
        return notes
    images = _registered(model)
    index = {image.image_id: i for i, image in enumerate(images)}
    flip = np.diag([1.0, -1.0, -1.0])
    lines = ["# Bundle file v0.3", f"{len(images)} {model.num_points3D()}"]
    for image in images:
        camera = model.camera(image.camera_id)
        k1, k2 = _radial(camera)
        pose = flip @ np.asarray(image.cam_from_world().matrix())
        lines.append(f"{camera.mean_focal_length():.12g} {k1:.12g} {k2:.12g}")
        lines += [" ".join(f"{v:.15g}" for v in row) for row in pose[:, :3]]
        lines.append(" ".join(f"{v:.15g}" for v in pose[:, 3]))
    for point_id in sorted(model.point3D_ids()):
        point = model.points3D[point_id]
        lines.append(" ".join(f"{v:.10g}" for v in point.xyz))
        lines.append(" ".join(str(int(v)) for v in point.color))
        views = []
        for element in point.track.elements:
            image = model.image(element.image_id)
            xy = image.point2D(element.point2D_idx).xy - _principal(model.camera(image.camera_id))
            views.append(
                f"{index[element.image_id]} {element.point2D_idx} {xy[0]:.6f} {-xy[1]:.6f}"
            )
        lines.append(f"{len(views)} " + " ".join(views))
    write_atomic(path, "\n".join(lines) + "\n")
    write_atomic(path.with_name("list.txt"), "".join(f"{image.name}\n" for image in images))
    return _lost(model, path.name, terms=2)


def write_nerfstudio(model: Any, target: Target) -> list[str]:
    """Write nerfstudio's ``transforms.json`` and its start points ``sparse_pc.ply``.

    Camera to world in OpenGL axes (x right, y up, z back), in a world with z up. Image paths are
    relative to the file where it really is, links followed.

    Returns:
        A note when a camera cannot be expressed, and nothing is written then, or an image not read.
    """
    path, images = target.folder / "transforms.json", target.images
    registered = _registered(model)
    cameras = {image.camera_id: model.camera(image.camera_id) for image in registered}
    unknown = sorted({str(c.model_name) for c in cameras.values()} - set(_NERFSTUDIO_MODELS))
    if unknown:
        return [f"{path.name} was not written: nerfstudio knows no {' and '.join(unknown)} camera."]
    families = {_NERFSTUDIO_MODELS[str(c.model_name)][0] for c in cameras.values()}
    if len(families) > 1:
        return [
            f"{path.name} was not written: it holds one kind of camera, this model has fisheye "
            "and other cameras."
        ]
    # ".." after a link leads to the parent of where the link points.
    place = (target.place or target.folder).resolve()
    root = Path(os.path.relpath(images.resolve(), place)) if images else Path()
    intrinsics = {camera_id: _nerfstudio_camera(c) for camera_id, c in cameras.items()}
    shared = len(cameras) == 1
    world = np.vstack([_NERFSTUDIO_WORLD, [0, 0, 0, 1]])
    frames = []
    for image in registered:
        pose = np.vstack([np.asarray(image.cam_from_world().matrix()), [0, 0, 0, 1]])
        camera_to_world = np.linalg.inv(pose)
        camera_to_world[:, 1:3] *= -1
        frame: dict[str, Any] = {
            "file_path": (root / image.name).as_posix(),
            "transform_matrix": (world @ camera_to_world).tolist(),
            "colmap_im_id": int(image.image_id),
        }
        if not shared:
            frame.update(intrinsics[image.camera_id])
        frames.append(frame)
    content: dict[str, Any] = {"camera_model": families.pop()}
    if shared:
        content.update(next(iter(intrinsics.values())))
    content["applied_transform"] = _NERFSTUDIO_WORLD.tolist()
    content["ply_file_path"] = "sparse_pc.ply"
    content["frames"] = frames
    xyz, rgb = _points(model)
    write_ply(path.with_name("sparse_pc.ply"), xyz @ _NERFSTUDIO_WORLD[:, :3].T, rgb)
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False))
    unread = [i.name for i in registered if i.name.lower().endswith((".heic", ".heif"))]
    if not unread:
        return []
    return [
        f"nerfstudio reads no HEIC ({len(unread)} images, such as {unread[0]}): give it the folder "
        "that --export 3dgs writes."
    ]


def write_3dgs(model: Any, target: Target) -> list[str]:
    """Write ``3dgs/images`` and ``3dgs/sparse/0`` as the reference 3DGS loader reads them.

    That loader takes PINHOLE cameras, keeps their field of view only, looks for images by their
    base name, decodes names byte by byte, and reads start points from ``points3D.ply`` if there is
    one.

    Returns:
        Notes about names, orientations and cuts.

    Raises:
        InputError: see ``colmap.undistort``.
        OutputError: see ``colmap.undistort``.
    """
    folder = target.folder / "3dgs"
    result, notes = colmap.undistort(
        target.images or Path(), model, folder / "images", centred=True, flat=True,
        progress=target.progress,
    )  # fmt: skip
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True, exist_ok=True)
    result.write_binary(sparse)
    write_ply(sparse / "points3D.ply", *_points(result), normals=True)
    return [f"{folder}: {note}" for note in notes]


def _nerfstudio_camera(camera: Any) -> dict[str, float | int]:
    _, names = _NERFSTUDIO_MODELS[str(camera.model_name)]
    values = dict(zip(names, (float(p) for p in camera.params), strict=True))
    if "f" in values:
        focal = values.pop("f")
        values = {"fl_x": focal, "fl_y": focal, **values}
    return {"w": int(camera.width), "h": int(camera.height), **values}


# By their names in --export (``Export`` in gim_hloc/options.py).
FORMATS = {
    "txt": Format(
        [f"{part}.txt" for part in ("cameras", "images", "points3D", "rigs", "frames")], write_text
    ),
    "ply": Format(["points.ply"], write_points),
    "nvm": Format(["model.nvm"], write_nvm),
    "bundler": Format(["bundle.out", "list.txt"], write_bundler),
    "nerfstudio": Format(["transforms.json", "sparse_pc.ply"], write_nerfstudio),
    "3dgs": Format(["3dgs/**/*"], write_3dgs),
}
