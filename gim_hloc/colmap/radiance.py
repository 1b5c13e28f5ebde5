"""Models for radiance fields: 3DGS's folder of pinhole images, nerfstudio's transforms.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pycolmap
from PIL import Image

from gim_hloc.colmap.cameras import CameraSpec, camera_spec
from gim_hloc.colmap.target import (
    Target,
    coloured_points,
    models_named,
    read_ply,
    registered,
    used_cameras,
    write_ply,
)
from gim_hloc.colmap.undistort import pinhole, plain_names, require_size, undistort
from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import write_atomic
from gim_hloc.images import check_names, map_in_threads, read_stored

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
_PLAIN_MODES = ("RGB", "RGBA", "L")  # of Pillow: what programs take for an image without asking
_DEPTH_RANGE = 2**16 - 1  # of 16-bit PNG


def write_3dgs(model: Any, target: Target) -> list[str]:
    """Write ``3dgs/images`` and ``3dgs/sparse/0`` as the reference 3DGS loader reads them.

    That loader takes PINHOLE cameras, keeps their field of view only, looks for images by their
    base name, decodes names byte by byte, and reads start points from ``points3D.ply`` if there is
    one. Masks and depth maps have the names of the images, as PNG.

    Returns:
        Notes about names, orientations and cuts.

    Raises:
        InputError: see ``colmap.undistort``; dense points of a run without a dense cloud.
        OutputError: see ``colmap.undistort``.
    """
    folder = target.folder / "3dgs"
    result, notes = undistort(
        target.images or Path(), model, folder / "images", centred=True, flat=True,
        progress=target.progress,
    )  # fmt: skip
    write_undistorted_masks(model, result, target, folder / "masks", centred=True)
    written = {path.name: path for path in (folder / "images").iterdir()}
    reduced = _write_reduced(folder, written, target)
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True, exist_ok=True)
    notes += _write_depths(result, target, folder)
    _add_dense_points(result, target)
    result.write_binary(sparse)
    write_ply(sparse / "points3D.ply", *coloured_points(result), normals=True)
    return [f"{folder}: {note}" for note in [*notes, *reduced]]


def write_undistorted_masks(
    model: Any, result: Any, target: Target, folder: Path, *, centred: bool, suffix: str = ".png"
) -> bool:
    """Write the masks of undistorted images, white where pixels count; all images get one.

    Args:
        model: of the images as stored.
        result: what ``undistort`` made of it.
        target: whose ``mask`` is asked.
        folder: of the masks, which have the names of the written images.
        centred: as of ``undistort``.
        suffix: of masks in the place of the images' own.

    Returns:
        Whether any image has a mask; else none is written.
    """
    if target.mask is None:
        return False
    views = sorted(registered(model), key=lambda image: (image.camera_id, image.name))
    masks = {image.image_id: target.mask(image.name) for image in views}
    if all(mask is None for mask in masks.values()):
        return False
    places: dict[int, np.ndarray | None] = {}
    for image in views:
        if image.camera_id not in places:  # the maps are large: one at a time
            spec = camera_spec(model.camera(image.camera_id))
            places = {image.camera_id: pinhole(spec, centred=centred)[1]}
        camera = model.camera(image.camera_id)
        keep = masks[image.image_id]
        pixels = np.full((camera.height, camera.width), 255, np.uint8)
        if keep is not None:
            pixels = keep.astype(np.uint8) * 255
        where = places[image.camera_id]
        if where is not None:  # what the camera did not see does not count either
            pixels = cv2.remap(pixels, where[..., 0], where[..., 1], cv2.INTER_NEAREST)
        written = PurePosixPath(result.image(image.image_id).name)
        save(pixels, folder / written.with_suffix(suffix))
    return True


def save(pixels: np.ndarray, path: Path) -> None:
    """Write an image file; ``OutputError`` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95, subsampling=0)  # PNG has neither
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}") from error


def _write_reduced(folder: Path, images: Mapping[str, Path], target: Target) -> list[str]:
    """Write ``images_2``, ``images_4`` ... (and ``masks_2`` ...) beside ``images``, area averaged.

    They are known by base names, as nerfstudio and gsplat look for them. Sizes are rounded down.

    Args:
        folder: that has ``images`` and ``masks``.
        images: name -> where it can be read; a link that waits to be moved cannot.
        target: which says how many of them.

    Returns:
        A note about images that are too small for it.
    """
    masks = {path.name: path for path in (folder / "masks").rglob("*.png")}
    jobs = [
        (path, folder / f"{kind}_{2**step}" / PurePosixPath(name).name, 2**step)
        for kind, files in (("images", images), ("masks", masks))
        for name, path in files.items()
        for step in range(1, target.options.num_downscales + 1)
    ]

    def write(job: tuple[Path, Path, int]) -> bool:
        source, wanted, factor = job
        pixels, _ = read_stored(source)
        size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
        if min(size) < 1:
            return False
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        if source.is_relative_to(folder / "masks"):
            small = np.where(small[..., 0] == 255, 255, 0).astype(np.uint8)
        save(small, wanted)
        return True

    workers = min(4, os.cpu_count() or 1)
    done = map_in_threads(write, jobs, workers=workers, title="Reduce", progress=target.progress)
    missing = len(done) - sum(done)
    return [f"{missing} reduced copies would have no pixel and are missing."] if missing else []


def _write_depths(result: Any, target: Target, folder: Path) -> list[str]:
    """Write depth maps as the reference loader reads them with ``--depths depths``.

    16-bit PNG of the inverse depth over the largest one of all images, 0 where there is none, and
    ``sparse/0/depth_params.json`` with the factor.
    """
    depths = dict(_depth_maps(result, target))
    if not depths:
        return []
    nearest = max((float(d[d > 0].max(initial=0)) for d in depths.values()), default=0.0)
    scale = nearest * 2**16 / _DEPTH_RANGE or 1.0  # the loader divides by 2^16
    params = {}
    for image_id, inverse in depths.items():
        name = PurePosixPath(result.image(image_id).name)
        values = np.rint(inverse / (scale / 2**16)).astype(np.uint16)
        path = (folder / "depths" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), values):
            raise OutputError(f"Cannot write {path}.")
        params[name.stem] = {"scale": scale, "offset": 0.0}
    write_atomic(folder / "sparse" / "0" / "depth_params.json", json.dumps(params, indent=1))
    missing = result.num_reg_images() - len(depths)
    return [f"{missing} images have no depth map."] if missing else []


def _depth_maps(result: Any, target: Target) -> list[tuple[int, np.ndarray]]:
    """Inverse depth (H, W) float32 of the images of a model, from those of the dense workspace."""
    if target.dense is None or not (target.dense / "sparse").is_dir():
        return []
    dense = pycolmap.Reconstruction(target.dense / "sparse")
    scale = 1.0 if target.metres is None else target.metres.similarity.scale
    found = []
    for image in registered(result):
        if not dense.exists_image(image.image_id):
            continue
        view = dense.image(image.image_id)
        path = target.dense / "stereo" / "depth_maps" / f"{view.name}.geometric.bin"
        if not path.is_file():
            continue
        stored = pycolmap.DepthMap()
        stored.read(path)
        depth = np.asarray(stored.to_array()) * scale
        wanted, given = camera_spec(image.camera), camera_spec(view.camera)
        inverse = np.divide(1, depth, out=np.zeros(depth.shape, np.float32), where=depth > 0)
        found.append((image.image_id, _between(inverse, given, wanted)))
    return found


def _between(values: np.ndarray, source: CameraSpec, wanted: CameraSpec) -> np.ndarray:
    """Values of a pinhole camera's pixels (a depth map may be smaller) for those of another."""
    fx, fy, cx, cy = wanted.params
    sx, sy, px, py = source.params
    height, width = values.shape
    x = ((np.arange(wanted.width) + 0.5 - cx) / fx * sx + px) * width / source.width - 0.5
    y = ((np.arange(wanted.height) + 0.5 - cy) / fy * sy + py) * height / source.height - 0.5
    columns, rows = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    return np.asarray(cv2.remap(values, columns, rows, cv2.INTER_NEAREST))


def _add_dense_points(result: Any, target: Target) -> None:
    """Add points of the dense cloud, drawn evenly, to the sparse ones, up to the number asked."""
    missing = target.options.dense_points - result.num_points3D()
    if missing <= 0:
        return
    path = None if target.dense is None else target.dense / "dense.ply"
    if path is None or not path.is_file():
        raise InputError(
            "--dense-points wants the dense cloud of the run, and it has none: make it first "
            "(gim-densify OUTPUT)."
        )
    xyz, rgb = read_ply(path)
    if target.metres is not None:
        xyz = target.metres.similarity(xyz)
    chosen = np.random.default_rng(0).permutation(len(xyz))[:missing]
    for row in np.sort(chosen):
        result.add_point3D(xyz[row], pycolmap.Track(), rgb[row])


# ------------------------------------------------------------------------------------- nerfstudio


def write_nerfstudio(model: Any, target: Target) -> list[str]:
    """Write ``nerfstudio/``: ``transforms.json``, ``sparse_pc.ply``, ``images/`` and ``masks/``.

    Camera to world in OpenGL axes (x right, y up, z back), in a world with z up. Images are links
    to those as stored, distortion included; what nerfstudio does not read is converted.

    Returns:
        A note when a camera cannot be expressed, and nothing is written then; notes about names.

    Raises:
        InputError: an image is missing, cannot be read or is not the camera's.
    """
    folder = target.folder / "nerfstudio"
    views, cameras = registered(model), used_cameras(model)
    unknown = {i: c for i, c in cameras.items() if str(c.model_name) not in _NERFSTUDIO_MODELS}
    if unknown:
        return [f"nerfstudio was not written: it knows no {models_named(unknown)} camera."]
    families = {_NERFSTUDIO_MODELS[str(c.model_name)][0] for c in cameras.values()}
    if len(families) > 1:
        return [
            "nerfstudio was not written: it holds one kind of camera, this model has fisheye and "
            "other cameras."
        ]
    names = [view.name for view in views]
    # Reduced copies and their images meet by base names.
    bases = [PurePosixPath(name).name.lower() for name in names]
    written = plain_names(names, flat=len(set(bases)) < len(bases))
    gather(views, written, target, folder / "images")
    masks = {} if target.mask is None else {name: target.mask(name) for name in names}
    masked = any(mask is not None for mask in masks.values())
    intrinsics = {camera_id: _nerfstudio_camera(c) for camera_id, c in cameras.items()}
    shared = len(cameras) == 1
    world = np.vstack([_NERFSTUDIO_WORLD, [0, 0, 0, 1]])
    frames = []
    for view in views:
        pose = np.vstack([np.asarray(view.cam_from_world().matrix()), [0, 0, 0, 1]])
        camera_to_world = np.linalg.inv(pose)
        camera_to_world[:, 1:3] *= -1
        frame: dict[str, Any] = {
            "file_path": f"images/{written[view.name]}",
            "transform_matrix": (world @ camera_to_world).tolist(),
            "colmap_im_id": int(view.image_id),
        }
        if masked:
            keep = masks[view.name]  # an image without a mask counts as a whole
            if keep is None:
                keep = np.ones((view.camera.height, view.camera.width), bool)
            frame["mask_path"] = f"masks/{written[view.name]}.png"
            save(keep.astype(np.uint8) * 255, folder / frame["mask_path"])
        if not shared:
            frame.update(intrinsics[view.camera_id])
        frames.append(frame)
    sources = {written[name]: (target.images or Path()) / name for name in names}
    notes = _write_reduced(folder, sources, target)
    content: dict[str, Any] = {"camera_model": families.pop()}
    if shared:
        content.update(next(iter(intrinsics.values())))
    content["applied_transform"] = _NERFSTUDIO_WORLD.tolist()
    content["ply_file_path"] = "sparse_pc.ply"
    content["frames"] = frames
    xyz, rgb = coloured_points(model)
    write_ply(folder / "sparse_pc.ply", xyz @ _NERFSTUDIO_WORLD[:, :3].T, rgb)
    write_atomic(folder / "transforms.json", json.dumps(content, indent=1, ensure_ascii=False))
    other = [name for name in names if written[name] != name]
    if other:
        notes.append(
            f"{len(other)} images have other names there, such as {other[0]}: {written[other[0]]}."
        )
    return [f"{folder}: {note}" for note in notes]


def gather(views: Sequence[Any], written: dict[str, str], target: Target, folder: Path) -> None:
    """Put images, name -> new name, into a folder: links, or JPEG and PNG of what few can read."""
    root = target.images or Path()
    check_names(root, [view.name for view in views])
    # ".." after a link leads to the parent of where the link points.
    place = (target.place or target.folder).resolve() / folder.relative_to(target.folder)

    def put(view: Any) -> None:
        source, new = (root / view.name).resolve(), written[view.name]
        wanted = folder / new
        wanted.parent.mkdir(parents=True, exist_ok=True)
        same_kind = PurePosixPath(view.name).suffix == PurePosixPath(new).suffix
        size = _plain_size(source) if same_kind else None
        if size is None:
            pixels = read_stored(source)[0]
            require_size(root / view.name, pixels.shape[1::-1], view.camera)
            save(pixels, wanted)
            return
        require_size(root / view.name, size, view.camera)
        link = os.path.relpath(source, (place / new).parent)
        try:
            os.symlink(link, wanted)
        except OSError:  # a file system without links
            shutil.copyfile(source, wanted)

    workers = min(4, os.cpu_count() or 1)
    map_in_threads(put, views, workers=workers, title="Images", progress=target.progress)


def _plain_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a file of 8-bit grey or RGB, None for others."""
    try:
        with Image.open(path) as image:
            return image.size if image.mode in _PLAIN_MODES else None
    except (OSError, ValueError):  # what it is our reader may know, or say
        return None


def _nerfstudio_camera(camera: Any) -> dict[str, float | int]:
    _, names = _NERFSTUDIO_MODELS[str(camera.model_name)]
    values = dict(zip(names, (float(p) for p in camera.params), strict=True))
    if "f" in values:
        focal = values.pop("f")
        values = {"fl_x": focal, "fl_y": focal, **values}
    return {"w": int(camera.width), "h": int(camera.height), **values}
