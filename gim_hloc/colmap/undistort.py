"""Undistorted images and their pinhole cameras."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, camera_spec, project
from gim_hloc.colmap.model import check_names, colmap_log, has_cuda, read_model
from gim_hloc.errors import InputError


def pinhole(camera: CameraSpec) -> tuple[CameraSpec, np.ndarray | None]:
    """A camera without distortion for the images of another one, by COLMAP's undistortion.

    Focal lengths stay; the frame is cut or grown so that it shows little that was not seen.

    Args:
        camera: of any model.

    Returns:
        The PINHOLE camera, and where its pixels lie in the other's images: (H, W, 2) float32,
        stored pixels, hloc's frame. None instead of the latter where nothing is distorted.

    Raises:
        InputError: the parameters are those of no camera.
    """
    source = pycolmap.Camera(
        model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
    )
    target = pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), source)
    found = camera_spec(target)
    fx, fy, cx, cy = found.params
    if not (np.isfinite(found.params).all() and fx > 0 and fy > 0):
        raise InputError(
            f"The camera {camera.model} {' '.join(f'{p:g}' for p in camera.params)} has a focal "
            "length that is not positive."
        )
    if source.is_undistorted():
        return found, None
    places = np.empty((found.height, found.width, 2), np.float32)
    x = (np.arange(found.width) + 0.5 - cx) / fx
    for row in range(found.height):  # all at once would take a hundred bytes a pixel
        y = np.full(found.width, (row + 0.5 - cy) / fy)
        places[row] = project(source, np.column_stack([x, y, np.ones(found.width)])) - 0.5
    return found, places


def undistort(images: Path, model: Path, output: Path) -> None:
    """Write undistorted images and their pinhole model, laid out as splatting programs expect.

    Args:
        images: image root.
        model: sparse model folder.
        output: gets ``images/`` and ``sparse/0/`` (and COLMAP's ``stereo/`` for MVS).

    Raises:
        InputError: the model is damaged, or names images outside the root.
    """
    check_names((image.name for image in read_model(model).images.values()), model)
    pycolmap.undistort_images(output, model, images)
    folder = output / "sparse" / "0"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (output / "sparse").iterdir():
        if path.is_file():  # COLMAP's MVS reads sparse/, splatting programs sparse/0/
            shutil.copy2(path, folder / path.name)


def run_dense(
    images: Path, model: Path, output: Path, *, log_dir: Path | None = None
) -> tuple[bool, str]:
    """Undistort, and with CUDA run PatchMatch stereo and fusion.

    Args:
        images: image root.
        model: sparse model folder.
        output: workspace to write: undistorted images and model, depth maps, ``dense.ply``.
        log_dir: where COLMAP's own log goes.

    Returns:
        Whether a dense cloud was made, and a sentence for the user.
    """
    with colmap_log(log_dir):
        undistort(images, model, output)
        if not has_cuda():
            return False, (
                f"Undistorted images are in {output}, but this pycolmap has no CUDA, which "
                "PatchMatch stereo needs: run 'colmap patch_match_stereo --workspace_path "
                f"{output}' and 'colmap stereo_fusion' with a CUDA build of COLMAP."
            )
        pycolmap.patch_match_stereo(output)
        pycolmap.stereo_fusion(output / "dense.ply", output, output_type="PLY")
    return True, f"Dense cloud: {output / 'dense.ply'}"
