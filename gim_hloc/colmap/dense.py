"""COLMAP's dense workspace: views and their neighbours, maps of depth and normals, cloud and mesh.

``OUTPUT/dense`` holds undistorted ``images/``, their model ``sparse/``, and ``stereo/`` as COLMAP
lays them out; depth maps may be smaller than their images.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, camera_spec, colmap_camera, project, unproject
from gim_hloc.colmap.model import colmap_log, poses_of
from gim_hloc.errors import OutputError
from gim_hloc.geometry.depth import Pinhole

_BEST_ANGLE_DEG = 12.0  # between the rays to a point: below it, depth is inexact
_WIDEST_ANGLE_DEG = 45.0  # beyond, views hardly look alike
_POISSON_DEPTH = 10  # of the octree: cells of 1/1024 of the scene
_MARGIN = 1.5  # by which surfaces may be nearer or farther than the sparse points


@dataclass(frozen=True, kw_only=True)
class DenseView:
    """An image of the workspace.

    Attributes:
        name: in the workspace.
        source: of the image in the model that was undistorted.
        camera: of the map of depth.
        stored: of the image as it is stored.
        neighbours: names in the workspace, best first.
        near_far: least and greatest depth to be expected.
        xy: (N, 2) float32 sparse points, pixels of the map, hloc's frame.
        depth: (N,) float32 of these.
    """

    name: str
    source: str
    camera: Pinhole
    stored: CameraSpec
    neighbours: tuple[str, ...]
    near_far: tuple[float, float]
    xy: np.ndarray = field(repr=False)
    depth: np.ndarray = field(repr=False)

    def stored_pixels(self) -> np.ndarray:
        """(H, W, 2) float32: where the map's pixels lie in the stored image, hloc's frame."""
        grid = np.indices((self.camera.height, self.camera.width))[::-1].reshape(2, -1)
        homogeneous = np.vstack([grid, np.ones((1, grid.shape[1]))])
        rays = (np.linalg.inv(self.camera.calibration) @ homogeneous).T
        places = project(colmap_camera(self.stored), np.ascontiguousarray(rays)) - 0.5
        return places.astype(np.float32).reshape(self.camera.height, self.camera.width, 2)

    def map_pixels(self, xy_px: np.ndarray) -> np.ndarray:
        """(N, 2) pixels of the map, hloc's frame, of pixels (N, 2) of the stored image."""
        rays = unproject(colmap_camera(self.stored), xy_px.astype(np.float64) + 0.5)
        places: np.ndarray = (rays @ self.camera.calibration.T)[:, :2]
        return places

    def mask(self, keep: np.ndarray) -> np.ndarray:
        """(H, W) bool on the map of a mask in stored pixels."""
        xy = np.rint(self.stored_pixels()).astype(int)
        height, width = keep.shape
        inside = (xy >= 0).all(-1) & (xy < (width, height)).all(-1)
        x, y = xy[..., 0].clip(0, width - 1), xy[..., 1].clip(0, height - 1)
        shown: np.ndarray = keep[y, x] & inside
        return shown


def dense_views(model: Any, workspace: Path, *, size: int, neighbours: int) -> list[DenseView]:
    """The views of a workspace that share points with others, by name.

    Args:
        model: ``pycolmap.Reconstruction`` that was undistorted.
        workspace: with the model of the undistorted images.
        size: long side of the maps, pixels, if images are larger.
        neighbours: of a view at most.
    """
    flat = pycolmap.Reconstruction(workspace / "sparse")
    chosen = _neighbours(flat, neighbours)
    poses = poses_of(flat)
    views = []
    for image_id in flat.reg_image_ids():
        image, original = flat.image(image_id), model.image(image_id)
        camera = _pinhole(flat.camera(image.camera_id), *poses[image.name], size)
        seen = [flat.point3D(p.point3D_id).xyz for p in image.points2D if p.has_point3D()]
        xy, depth = camera.project(np.array(seen).reshape(-1, 3))
        ahead = depth > 0
        if not ahead.any():
            continue
        low, high = np.quantile(depth[ahead], (0.01, 0.99))
        views.append(
            DenseView(
                name=image.name,
                source=original.name,
                camera=camera,
                stored=camera_spec(model.camera(original.camera_id)),
                neighbours=tuple(flat.image(i).name for i in chosen[image_id]),
                near_far=(float(low / _MARGIN), float(high * _MARGIN)),
                xy=xy[ahead].astype(np.float32),
                depth=depth[ahead].astype(np.float32),
            )
        )
    there = {view.name for view in views}
    with_others = (
        replace(view, neighbours=tuple(name for name in view.neighbours if name in there))
        for view in sorted(views, key=lambda view: view.name)
    )
    return [view for view in with_others if view.neighbours]


def pinholes(workspace: Path, size: int) -> dict[str, Pinhole]:
    """The views of a workspace by name, with a long side of ``size`` pixels if they are larger."""
    model = pycolmap.Reconstruction(workspace / "sparse")
    cameras = {image.name: model.camera(image.camera_id) for image in model.images.values()}
    return {n: _pinhole(cameras[n], *pose, size) for n, pose in sorted(poses_of(model).items())}


def _pinhole(camera: Any, rotation: np.ndarray, translation: np.ndarray, size: int) -> Pinhole:
    fx, fy, cx, cy = camera.params
    whole = Pinhole(
        width=camera.width,
        height=camera.height,
        calibration=np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1.0]]),
        rotation=rotation,
        translation=translation,
    )
    scale = min(1.0, size / max(camera.width, camera.height))
    return whole.resized(max(1, round(scale * camera.width)), max(1, round(scale * camera.height)))


def _neighbours(model: Any, count: int) -> dict[int, list[int]]:
    """Ids of each image's neighbours, best first, by shared points and the angles of their rays."""
    ids = list(model.reg_image_ids())
    row = {image_id: i for i, image_id in enumerate(ids)}
    centres = np.array([model.image(i).projection_center() for i in ids])
    score = np.zeros((len(ids), len(ids)))
    for point in model.points3D.values():
        seen = np.array(
            sorted({row[e.image_id] for e in point.track.elements if e.image_id in row})
        )
        rays = centres[seen] - point.xyz
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        angle = np.degrees(np.arccos((rays @ rays.T).clip(-1, 1)))
        worth = np.minimum(angle / _BEST_ANGLE_DEG, 1) * (angle < _WIDEST_ANGLE_DEG)
        score[np.ix_(seen, seen)] += worth
    np.fill_diagonal(score, 0)
    best = np.argsort(-score, axis=1, kind="stable")[:, :count]
    return {
        image_id: [ids[j] for j in best[i] if score[i, j] > 0] for i, image_id in enumerate(ids)
    }


def write_workspace(model: Any, output: Path, *, neighbours: int) -> None:
    """Write what COLMAP's MVS expects beside the images.

    Args:
        model: of the undistorted images.
        output: the workspace.
        neighbours: of an image at most.
    """
    names = sorted(model.image(i).name for i in model.reg_image_ids())
    stereo = output / "stereo"
    (output / "sparse").mkdir(parents=True, exist_ok=True)
    model.write_binary(output / "sparse")
    for folder in ("depth_maps", "normal_maps"):
        for name in names:
            (stereo / folder / name).parent.mkdir(parents=True, exist_ok=True)
    chosen = {
        model.image(i).name: ", ".join(model.image(j).name for j in others)
        for i, others in _neighbours(model, neighbours).items()
    }
    sources = "".join(f"{name}\n{chosen[name]}\n" for name in names if chosen[name])
    (stereo / "patch-match.cfg").write_text(sources, encoding="utf-8")
    fused = "".join(f"{name}\n" for name in names)
    (stereo / "fusion.cfg").write_text(fused, encoding="utf-8")


def write_maps(workspace: Path, name: str, depth: np.ndarray, normals: np.ndarray) -> None:
    """Write a view's maps as COLMAP's geometric ones.

    Args:
        workspace: folder.
        name: of the view.
        depth: (H, W); 0: none.
        normals: (3, H, W) in the camera's frame.
    """
    for kind, values in (("depth_maps", depth[None]), ("normal_maps", normals)):
        path = workspace / "stereo" / kind / f"{name}.geometric.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        channels, height, width = values.shape
        header = f"{width}&{height}&{channels}&".encode()
        path.write_bytes(header + np.ascontiguousarray(values, "<f4").tobytes())


def depth_path(workspace: Path, name: str) -> Path:
    """The depth map of a view of the workspace."""
    return workspace / "stereo" / "depth_maps" / f"{name}.geometric.bin"


def read_depth(workspace: Path, name: str) -> np.ndarray:
    """(H, W) float32 depth of a view of the workspace, 0 where there is none."""
    data = depth_path(workspace, name).read_bytes()
    width, height, _, values = data.split(b"&", 3)
    return np.frombuffer(values, "<f4").reshape(int(height), int(width)).copy()


def fuse(workspace: Path, output: Path, *, min_views: int, log_dir: Path | None = None) -> int:
    """Fuse a workspace's maps into a cloud with colours and normals.

    Args:
        workspace: folder.
        output: PLY file; ``output.vis`` beside it says which images see each point.
        min_views: pixels that a point is made of at least.
        log_dir: where COLMAP's log goes.

    Returns:
        Number of points.
    """
    options = pycolmap.StereoFusionOptions()
    options.min_num_pixels = min_views
    options.use_cache = True  # else all maps and images are in memory at once
    options.cache_size = 2.0
    with colmap_log(log_dir):
        cloud = pycolmap.stereo_fusion(output, workspace, options=options, output_type="PLY")
    return int(cloud.num_points3D())


def mesh(cloud: Path, output: Path, *, log_dir: Path | None = None) -> list[str]:
    """Poisson's surface through a cloud, with its colours, trimmed where there are no points.

    Args:
        cloud: PLY file with normals.
        output: PLY file; with trimesh, a binary glTF file of the same name is written beside it.
        log_dir: where COLMAP's log goes.

    Returns:
        Sentences for the user.

    Raises:
        OutputError: no surface came out.
    """
    options = pycolmap.PoissonMeshingOptions()
    # Trimmed where samples are farther apart than some cells: COLMAP's own depth less trim.
    options.depth, options.trim = _POISSON_DEPTH, _POISSON_DEPTH - 3.0
    with colmap_log(log_dir):
        pycolmap.poisson_meshing(cloud, output, options)
    if not output.is_file() or b"element face 0\n" in output.read_bytes()[:1000]:
        raise OutputError(f"No surface could be laid through {cloud}: too few points.")
    try:
        import trimesh
    except ImportError:
        return ["mesh.glb needs trimesh: pip install gim-hloc[dense]. mesh.ply is there."]
    surface: Any = trimesh.load(output)
    surface.apply_transform(np.diag([1.0, -1.0, -1.0, 1.0]))  # glTF has y up
    surface.export(output.with_suffix(".glb"))
    return []


def patch_match(workspace: Path, output: Path, *, scratch: Path) -> None:
    """COLMAP's own depth maps, which need CUDA.

    Args:
        workspace: with images and model.
        output: stands for the workspace; its ``stereo/`` is written.
        scratch: folder for COLMAP's work, removed in the end.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(workspace / "stereo", scratch / "stereo")
    for name in ("images", "sparse"):
        (scratch / name).symlink_to((workspace / name).resolve())
    pycolmap.patch_match_stereo(scratch)
    for kind in ("depth_maps", "normal_maps"):
        shutil.move(scratch / "stereo" / kind, output / "stereo" / kind)
    shutil.rmtree(scratch)
