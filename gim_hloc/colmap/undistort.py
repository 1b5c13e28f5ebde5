"""Undistorted images and their pinhole cameras."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, camera_spec, project, unproject
from gim_hloc.errors import InputError, OutputError
from gim_hloc.images import check_names, map_in_threads, read_stored

# What stays JPEG or becomes it; all others become PNG.
_LOSSY = {".jpg", ".jpeg", ".webp", ".heic", ".heif"}
_KEPT = {".jpg", ".jpeg", ".png"}
_MIDDLE_PX = 0.01  # a principal point this near the middle is there: no reason to resample


def pinhole(camera: CameraSpec, *, centred: bool = False) -> tuple[CameraSpec, np.ndarray | None]:
    """A camera without distortion for the images of another one, by COLMAP's undistortion.

    Focal lengths stay; the frame is cut or grown so that it shows little that was not seen.

    Args:
        camera: of any model.
        centred: cut the frame further so that the principal point is its middle.

    Returns:
        The PINHOLE camera, and where its pixels lie in the other's images: (H, W, 2) float32,
        stored pixels, hloc's frame. None instead of the latter where the images are the same.

    Raises:
        InputError: the parameters are those of no camera, or the principal point is outside.
    """
    source = _camera(camera)
    target = pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), source)
    said = f"The camera {camera.model} {' '.join(f'{p:g}' for p in camera.params)}"
    fx, fy, cx, cy = target.params
    if not (np.isfinite(target.params).all() and fx > 0 and fy > 0):
        raise InputError(f"{said} has a focal length that is not positive.")
    same = bool(source.is_undistorted())
    if centred:
        width = int(2 * min(cx, target.width - cx) + _MIDDLE_PX)
        height = int(2 * min(cy, target.height - cy) + _MIDDLE_PX)
        if width < 1 or height < 1:
            raise InputError(f"{said} has a principal point that is not inside the image.")
        same = same and (width, height) == (target.width, target.height)
        target.width, target.height = width, height
        cx, cy = width / 2, height / 2
        target.params = [fx, fy, cx, cy]
    found = camera_spec(target)
    if same:
        return found, None
    places = np.empty((found.height, found.width, 2), np.float32)
    x = (np.arange(found.width) + 0.5 - cx) / fx
    for row in range(found.height):  # all at once would take a hundred bytes a pixel
        y = np.full(found.width, (row + 0.5 - cy) / fy)
        places[row] = project(source, np.column_stack([x, y, np.ones(found.width)])) - 0.5
    return found, places


def resample(pixels: np.ndarray, places: np.ndarray | None) -> np.ndarray:
    """An image (H, W, 3) uint8 with its pixels taken from the places that ``pinhole`` gave."""
    if places is None:
        return pixels
    x, y = places[..., 0], places[..., 1]
    return cv2.remap(pixels, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _camera(spec: CameraSpec) -> pycolmap.Camera:
    return pycolmap.Camera(
        model=spec.model, width=spec.width, height=spec.height, params=list(spec.params)
    )


def undistort(
    images: Path,
    model: Any,
    output: Path,
    *,
    centred: bool = False,
    flat: bool = False,
    progress: bool = False,
) -> tuple[Any, list[str]]:
    """Write undistorted images as JPEG (of JPEG, WebP and HEIC) or PNG, EXIF left behind.

    Args:
        images: image root.
        model: ``pycolmap.Reconstruction``.
        output: folder of the images.
        centred: with the principal point in the middle, for programs that keep the field of view
            only.
        flat: under plain ASCII names without folders, for programs that look for base names.
        progress: show a progress bar.

    Returns:
        The model of the written images, with PINHOLE cameras, and notes for the user.

    Raises:
        InputError: an image is missing, cannot be read or is not the camera's, or its name leads
            out of the root.
        OutputError: an image cannot be written.
    """
    from PIL import Image

    result = copy.deepcopy(model)
    views = [result.image(i) for i in result.reg_image_ids()]
    views.sort(key=lambda view: (view.camera_id, view.name))  # the maps of cameras are large
    check_names(images, [view.name for view in views])
    written = plain_names([view.name for view in views], flat=flat)
    cameras = {i: camera_spec(result.camera(i)) for i in {view.camera_id for view in views}}
    targets: dict[int, CameraSpec] = {}

    @functools.lru_cache(maxsize=4)
    def places_of(camera_id: int) -> np.ndarray | None:
        targets[camera_id], places = pinhole(cameras[camera_id], centred=centred)
        return places

    def write(view: Any) -> int:
        path, target = images / view.name, output / written[view.name]
        camera = cameras[view.camera_id]
        pixels, orientation = read_stored(path)
        require_size(path, pixels.shape[1::-1], camera)
        pixels = resample(pixels, places_of(view.camera_id))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target, quality=95, subsampling=0)
        except OSError as error:
            raise OutputError(f"Cannot write {target}: {error}") from error
        return orientation

    orientations = map_in_threads(
        write, views, workers=min(4, os.cpu_count() or 1), title="Undistort", progress=progress
    )
    for view in views:
        _move(view, cameras[view.camera_id], targets[view.camera_id])
        view.name = written[view.name]
    for camera_id, spec in targets.items():
        camera = result.camera(camera_id)
        camera.model, camera.width, camera.height = spec.model, spec.width, spec.height
        camera.params = list(spec.params)
    return result, _notes(written, orientations, cameras, targets)


def require_size(path: Path, size: Sequence[int], camera: Any) -> None:
    """Refuse an image of another width and height than its camera's."""
    if tuple(size) != (camera.width, camera.height):
        raise InputError(
            f"{path} has {size[0]} x {size[1]} pixels, its camera in the model {camera.width} x "
            f"{camera.height}: give the images that the model was made of."
        )


def _move(view: Any, source: CameraSpec, target: CameraSpec) -> None:
    """Put the keypoints of an image where the target camera sees them."""
    points = view.points2D
    if not len(points):
        return
    rays = unproject(_camera(source), np.array([point.xy for point in points]))
    fx, fy, cx, cy = target.params
    for point, xy in zip(points, rays[:, :2] * (fx, fy) + (cx, cy), strict=True):
        point.xy = xy


def plain_names(names: Sequence[str], *, flat: bool) -> dict[str, str]:
    """Name -> name of the written file; no two are the same, not even in another case.

    Flat names differ without their suffixes, too: masks and depth maps have another one.
    """

    def wanted(name: str) -> str:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in _KEPT:
            suffix = ".jpg" if suffix.lower() in _LOSSY else ".png"
        return re.sub(r"[^A-Za-z0-9._-]", "_", stem) + suffix if flat else stem + suffix

    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names, key=lambda name: (wanted(name) != name, name)):
        stem, suffix = os.path.splitext(wanted(name))
        candidate, count = stem, 1
        key = "" if flat else suffix
        while (candidate + key).lower() in taken:
            count += 1
            candidate = f"{stem}_{count}"
        taken.add((candidate + key).lower())
        found[name] = candidate + suffix
    return found


def _notes(
    written: dict[str, str],
    orientations: Sequence[int],
    sources: dict[int, CameraSpec],
    targets: dict[int, CameraSpec],
) -> list[str]:
    notes = []
    other = sorted(name for name, new in written.items() if new != name)
    converted = sum(os.path.splitext(n)[1].lower() not in _KEPT for n in other)
    if other:
        notes.append(
            f"{len(other)} images have other names there, {converted} of them converted to JPEG or "
            f"PNG, such as {other[0]}: {written[other[0]]}."
        )
    turned = sum(orientation != 1 for orientation in orientations)
    if turned:
        notes.append(
            f"{turned} images lost their EXIF orientation there: poses are those of the pixels as "
            "they are stored."
        )
    for camera_id, camera in sorted(targets.items()):
        source = sources[camera_id]
        if camera.width * camera.height < 0.9 * source.width * source.height:
            notes.append(
                f"The images of camera {camera_id} were cut from {source.width} x {source.height} "
                f"to {camera.width} x {camera.height} pixels there."
            )
    return notes
