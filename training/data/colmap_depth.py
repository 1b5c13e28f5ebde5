"""COLMAP models with depth maps.

Depth is looked for by the name of the image, in this order: ``<name>.geometric.bin``,
``<name>.photometric.bin`` (what ``colmap patch_match_stereo`` writes), ``<name>`` followed by or
with its suffix replaced by ``.h5``, ``.npy`` or ``.png``. Images without a map are left out. A
workspace of COLMAP (``images/``, ``sparse/``, ``stereo/depth_maps/``) and the examples' room
(``images/``, ``gt/``, ``depth/``) need only ``root``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gim_hloc import colmap
from gim_hloc.errors import InputError
from gim_hloc.options import options
from gim_hloc.training.data.posed import PosedOptions, PosedViews, View

_MODELS = ("sparse", "gt", "sparse/0", ".")
_DEPTHS = ("stereo/depth_maps", "depth", "depths", "depth_maps")
_MODEL_FILES = ("images.bin", "images.txt")
_DEPTH_SUFFIXES = (".h5", ".npy", ".png")


@options
class ColmapOptions(PosedOptions):
    """Where the model is."""

    root: Path  # folder of the scene
    model: Path | None = None  # folder of the model; None: sparse, gt or sparse/0 in root, or root
    images: Path | None = None  # folder of the images; None: images in root
    depth: Path | None = None  # folder of the maps; None: stereo/depth_maps or depth in root


def open_colmap(options: ColmapOptions) -> PosedViews:
    """Pairs of a COLMAP model with depth.

    Raises:
        InputError: a part is missing, a camera has distortion, or no pair overlaps.
    """
    root = Path(options.root)
    model = options.model or next(
        (root / m for m in _MODELS if any((root / m / f).is_file() for f in _MODEL_FILES)), None
    )
    if model is None:
        raise InputError(f"{root} holds no model in {', '.join(_MODELS)}: give model.")
    images = options.images or root / "images"
    depth = options.depth or next((root / d for d in _DEPTHS if (root / d).is_dir()), None)
    for folder, what in ((images, "images"), (depth, "depth")):
        if folder is None or not folder.is_dir():
            raise InputError(f"{root} has no folder of {what}: give {what}.")
    poses, cameras = colmap.poses_and_cameras(model)
    colmap.check_names(poses, model)
    views = []
    for name in sorted(poses):
        path = _find_depth(Path(depth), name)  # type: ignore[arg-type]
        if path is None:
            continue
        camera = cameras[name]
        rotation, translation = poses[name]
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, translation
        views.append(
            View(
                name=name,
                image=images / name,
                depth=path,
                K=_intrinsics(camera.model, camera.params, model),
                world_to_camera=pose,
                size=(camera.width, camera.height),
            )
        )
    if not views:
        raise InputError(f"{depth} holds no depth map for any image of {model}.")
    return PosedViews({root.name: views}, options, "colmap")


def _intrinsics(model: str, params: tuple[float, ...], path: Path) -> np.ndarray:
    if model == "SIMPLE_PINHOLE":
        focal_x = focal_y = params[0]
    elif model == "PINHOLE":
        focal_x, focal_y = params[:2]
    else:
        raise InputError(
            f"{path} has cameras with distortion ({model}); undistort the images first, for "
            "example with `colmap image_undistorter`."
        )
    # COLMAP's principal point counts from the corner of the first pixel.
    x, y = params[-2] - 0.5, params[-1] - 0.5
    return np.array([[focal_x, 0, x], [0, focal_y, y], [0, 0, 1]])


def _find_depth(folder: Path, name: str) -> Path | None:
    candidates = [folder / f"{name}.{kind}.bin" for kind in ("geometric", "photometric")]
    for suffix in _DEPTH_SUFFIXES:
        candidates += [folder / f"{name}{suffix}", (folder / name).with_suffix(suffix)]
    return next((path for path in candidates if path.is_file()), None)
