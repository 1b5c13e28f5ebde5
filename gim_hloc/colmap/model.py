"""Reading, writing and describing COLMAP models."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, camera_key, camera_spec, project
from gim_hloc.colmap.model_files import check_model, image_lines, keypoint_rows, point_rows
from gim_hloc.errors import InputError, OutputError
from gim_hloc.poses import similarity

if TYPE_CHECKING:
    from gim_hloc.poses import Pose

logger = logging.getLogger(__name__)

_MODEL_FILES = ("cameras", "images", "points3D")


def read_model(path: Path | str) -> Any:
    """Read a COLMAP model, binary or text.

    Args:
        path: folder with cameras, images and points3D as ``.bin`` or ``.txt``, or an output folder
            of ``gim-reconstruct`` (then ``sparse/0``).

    Returns:
        A ``pycolmap.Reconstruction``.

    Raises:
        InputError: when there is no model or it cannot be read.
    """
    folder = find_model(path)
    if _has(folder, ".bin"):
        check_model(folder)
        return _read(folder, folder)
    images = image_lines(folder / "images.txt")
    if any(below is None for _, below in images):
        # COLMAP's reader wants two lines an image.
        with tempfile.TemporaryDirectory(prefix="gim-hloc-") as temporary:
            for path in folder.resolve().glob("*.txt"):
                (Path(temporary) / path.name).symlink_to(path)
            lines = [f"{' '.join(fields)}\n{below or ''}\n" for fields, below in images]
            copy = Path(temporary) / "images.txt"
            copy.unlink()
            copy.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
            model = _read(Path(temporary), folder)
    else:
        model = _read(folder, folder)
    # COLMAP's text reader ends a name at its first blank; its writer does not.
    for fields, _ in images:
        if " " in fields[9] and model.exists_image(int(fields[0])):
            model.image(int(fields[0])).name = fields[9]
    return model


def _read(folder: Path, source: Path) -> Any:
    try:
        model = pycolmap.Reconstruction(folder)
        model.reg_image_ids()  # raises where images and frames are not of one model
        return model
    except Exception as error:
        raise InputError(f"{source} is not a readable COLMAP model: {error}") from None


def _has(folder: Path, suffix: str) -> bool:
    return all((folder / f"{stem}{suffix}").is_file() for stem in _MODEL_FILES)


def find_model(path: Path | str) -> Path:
    """The folder at or below ``path`` (``sparse/0``, ``sparse``, ``0``) that holds a model."""
    root = Path(path)
    for folder in (root, root / "sparse" / "0", root / "sparse", root / "0"):
        if _has(folder, ".bin") or _has(folder, ".txt"):
            return folder
    raise InputError(
        f"{root} holds no COLMAP model (cameras, images and points3D as .bin or .txt; also looked "
        "in sparse/0)."
    )


def check_names(names: Iterable[str], where: Path | str) -> None:
    """Refuse names of images that lead out of a folder they are put behind.

    Raises:
        InputError: names ``where`` they stand.
    """
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(
                f"{where}: the image name {name!r} leads out of the image folder, and is not "
                "opened. Names are paths relative to the image folder."
            )


def poses_of(model: Any) -> dict[str, Pose]:
    """Poses of the registered images, world to camera, by name."""
    poses: dict[str, Pose] = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        matrix = np.asarray(image.cam_from_world().matrix())
        poses[image.name] = (matrix[:, :3].copy(), matrix[:, 3].copy())
    return poses


def rigid(pose: Pose) -> Any:
    """A pose as ``pycolmap.Rigid3d``."""
    return pycolmap.Rigid3d(np.column_stack(pose))


def poses_and_cameras(path: Path | str) -> tuple[dict[str, Pose], dict[str, CameraSpec]]:
    """Poses and cameras of the registered images of a model, by name."""
    model = read_model(path)
    images = [model.image(i) for i in model.reg_image_ids()]
    return poses_of(model), {i.name: camera_spec(model.camera(i.camera_id)) for i in images}


def model_cameras(path: Path | str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Poses of a model: name -> (R (3, 3), t (3,)), world to camera, in model units."""
    return poses_of(read_model(path))


def model_observations(path: Path | str) -> dict[str, np.ndarray]:
    """Points that each registered image sees: name -> int64 ids of 3D points, unsorted."""
    model = read_model(path)
    observations = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        observations[image.name] = np.array(
            [p.point3D_id for p in image.points2D if p.has_point3D()], dtype=np.int64
        )
    return observations


def model_statistics(path: Path | str) -> dict[str, float]:
    """Size and quality of a model.

    Returns:
        ``images`` registered, ``points``, ``observations``, ``mean_track_length`` (views a point)
        and ``mean_reprojection_error_px``.
    """
    return statistics(read_model(path))


def statistics(model: Any) -> dict[str, float]:
    """As ``model_statistics``, for a model already read."""
    points = model.num_points3D()
    return {
        "images": model.num_reg_images(),
        "points": points,
        "observations": model.compute_num_observations(),
        "mean_track_length": model.compute_mean_track_length() if points else 0.0,
        "mean_reprojection_error_px": model.compute_mean_reprojection_error() if points else 0.0,
    }


@dataclass(kw_only=True)
class ImageStatistics:
    """What the model knows about one registered image."""

    camera_id: int
    points: int  # 3D points seen
    mean_reprojection_error_px: float | None
    errors_px: np.ndarray  # (points,) reprojection errors of its observations
    focal_px: float
    rotation: np.ndarray  # (3, 3) world to camera
    translation: np.ndarray  # (3,)


def image_statistics(model: Any) -> dict[str, ImageStatistics]:
    """Per-image figures of a model; errors are measured in this image, not per point."""
    result = {}
    with _as_files(model) as folder:
        points, keypoints = _table(folder), keypoint_rows(folder / "images.bin")
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        camera = model.camera(image.camera_id)
        pose = np.asarray(image.cam_from_world().matrix())
        observed = keypoints[image_id][keypoints[image_id]["point"] >= 0]
        errors = np.zeros(0)
        if len(observed):
            xyz = points.xyz[np.searchsorted(points.ids, observed["point"])]
            projected = project(camera, xyz @ pose[:, :3].T + pose[:, 3])
            errors = np.linalg.norm(projected - observed["xy"], axis=1)
        result[image.name] = ImageStatistics(
            camera_id=int(image.camera_id),
            points=len(observed),
            mean_reprojection_error_px=float(np.nanmean(errors)) if len(observed) else None,
            errors_px=errors,
            focal_px=float(camera.mean_focal_length()),
            rotation=pose[:, :3].copy(),
            translation=pose[:, 3].copy(),
        )
    return result


@contextlib.contextmanager
def _as_files(model: Any) -> Iterator[Path]:
    """A model as binary files, which hold in rows what pycolmap gives one by one, far slower."""
    with tempfile.TemporaryDirectory(prefix="gim-hloc-") as temporary:
        model.write_binary(temporary)
        yield Path(temporary)


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """Points of a model, by id.

    Attributes:
        ids: (M,) int64, sorted.
        xyz: (M, 3) float64.
        rgb: (M, 3) uint8.
        lengths: (M,) int64, views a track.
        errors: (M,) reprojection errors, px.
    """

    ids: np.ndarray
    xyz: np.ndarray
    rgb: np.ndarray
    lengths: np.ndarray
    errors: np.ndarray


def _table(folder: Path) -> PointTable:
    """Points of the binary model in a folder."""
    rows = point_rows(folder / "points3D.bin")
    rows = rows[np.argsort(rows["id"])]
    columns = (np.ascontiguousarray(rows[n]) for n in ("id", "xyz", "rgb", "length", "error"))
    return PointTable(**dict(zip(("ids", "xyz", "rgb", "lengths", "errors"), columns, strict=True)))


def points(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points of a model.

    Returns:
        xyz (M, 3) float64, rgb (M, 3) uint8, views a track (M,) int64, reprojection errors (M,) px.
    """
    with _as_files(model) as folder:
        table = _table(folder)
    return table.xyz, table.rgb, table.lengths, table.errors


def positions_of(model: Any, ids: Iterable[int]) -> np.ndarray:
    """Positions (M, 3) of a model's points of these ids."""
    points = model.points3D
    return np.array([points[int(i)].xyz for i in ids], dtype=np.float64).reshape(-1, 3)


def point_positions(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids (M,) int64, sorted, and positions (M, 3) of a model's points."""
    with _as_files(model) as folder:
        table = _table(folder)
    return table.ids, table.xyz


def cameras_of(model: Any) -> list[dict[str, Any]]:
    """Cameras of a model that registered images use, as plain dictionaries for the report."""
    used: dict[int, int] = {}
    for image_id in model.reg_image_ids():
        camera_id = int(model.image(image_id).camera_id)
        used[camera_id] = used.get(camera_id, 0) + 1
    return [
        {
            "id": camera_id,
            "model": str(model.camera(camera_id).model_name),
            "width": int(model.camera(camera_id).width),
            "height": int(model.camera(camera_id).height),
            "params": [float(p) for p in model.camera(camera_id).params],
            "images": count,
        }
        for camera_id, count in sorted(used.items())
    ]


@dataclass(kw_only=True)
class MapView:
    """A registered image of a model.

    Attributes:
        xy_px: (N, 2) float64 keypoints in stored pixels, hloc's frame.
        points: (N,) int64 id of the 3D point of each keypoint, -1 for none.
        camera: its intrinsics.
        pose: (R, t), world to camera.
    """

    xy_px: np.ndarray
    points: np.ndarray
    camera: CameraSpec
    pose: Pose


def map_views(model: Any) -> dict[str, MapView]:
    """Registered images of a model, by name."""
    with _as_files(model) as folder:
        return _views(model, folder)


def tables(model: Any) -> tuple[PointTable, dict[str, MapView]]:
    """Points of a model, and its registered images by name."""
    with _as_files(model) as folder:
        return _table(folder), _views(model, folder)


def _views(model: Any, folder: Path) -> dict[str, MapView]:
    """Registered images of a model that is in a folder too, in binary files."""
    poses = poses_of(model)
    check_names(poses, "The model")
    rows = keypoint_rows(folder / "images.bin")
    views = {}
    for image_id in sorted(model.reg_image_ids()):
        image, keypoints = model.image(image_id), rows[image_id]
        views[image.name] = MapView(
            xy_px=keypoints["xy"] - 0.5,
            points=keypoints["point"].copy(),
            camera=camera_spec(model.camera(image.camera_id)),
            pose=poses[image.name],
        )
    return views


@dataclass(kw_only=True)
class NewImage:
    """An image to be added to a model.

    Attributes:
        name: not yet in the model.
        camera: intrinsics.
        pose: (R, t), world to camera.
        xy_px: (N, 2) keypoints in stored pixels, hloc's frame.
        points: (N,) int64 id of the 3D point that a keypoint sees, -1 for none.
    """

    name: str
    camera: CameraSpec
    pose: Pose
    xy_px: np.ndarray
    points: np.ndarray


def add_images(model: Any, images: Sequence[NewImage], *, share: bool = True) -> None:
    """Add images with their observations to a model, in place.

    Args:
        model: ``pycolmap.Reconstruction``.
        images: in the order of their new ids.
        share: use a camera of the model that has exactly the same intrinsics.
    """
    cameras: dict[tuple[Any, ...], int] = {}
    if share:
        for camera_id in sorted(model.cameras.keys(), reverse=True):
            # A rig of several cameras would want all of its images.
            if model.exists_rig(camera_id) and model.rig(camera_id).num_sensors() == 1:
                cameras[camera_key(camera_spec(model.camera(camera_id)))] = camera_id
    next_camera = max((*model.cameras.keys(), *model.rigs.keys()), default=0) + 1
    next_image = max((*model.images.keys(), *model.frames.keys()), default=0) + 1
    for new in images:
        key = camera_key(new.camera)
        if key not in cameras:
            camera = pycolmap.Camera(
                model=new.camera.model,
                width=new.camera.width,
                height=new.camera.height,
                params=list(new.camera.params),
                camera_id=next_camera,
            )
            camera.has_prior_focal_length = new.camera.prior
            model.add_camera_with_trivial_rig(camera)
            cameras[key] = next_camera
            next_camera += 1
        image = pycolmap.Image(name=new.name, camera_id=cameras[key], image_id=next_image)
        image.points2D = pycolmap.Point2DList(
            [pycolmap.Point2D(xy) for xy in np.asarray(new.xy_px) + 0.5]
        )
        model.add_image_with_trivial_frame(image, rigid(new.pose))
        for row in np.flatnonzero(new.points >= 0):
            element = pycolmap.TrackElement(next_image, int(row))
            model.add_observation(int(new.points[row]), element)
        next_image += 1


def write_model(model: Any, folder: Path) -> None:
    """Write a model in binary form into a folder, and read it back.

    Raises:
        OutputError: it could not be written whole; COLMAP itself says nothing of a full disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.write(folder)
        whole = _counts(read_model(folder)) == _counts(model)
    except (OSError, RuntimeError, InputError, ValueError) as error:
        raise OutputError(f"Cannot write the model {folder}: {error}.") from None
    if not whole:
        raise OutputError(f"Cannot write the model {folder} whole. Is the disk full?")


def _counts(model: Any) -> tuple[int, int, int, int]:
    observations = model.compute_num_observations()
    return model.num_cameras(), model.num_reg_images(), model.num_points3D(), observations


def write_models(models: Sequence[Any], folder: Path) -> list[Path]:
    """Write models to ``folder/0``, ``1``, …; errors as of ``write_model``."""
    paths = [folder / str(index) for index in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        write_model(model, path)
    return paths


def align(model: Any, poses: Mapping[str, Pose]) -> None:
    """Move a model as a whole to where known poses are."""
    found = similarity(poses_of(model), poses)
    if found is not None:
        scale, rotation, translation = found
        model.transform(
            pycolmap.Sim3d(scale, pycolmap.Rotation3d(rotation), np.asarray(translation))
        )


def extract_colours(model: Any, colours: Callable[[str], np.ndarray]) -> list[str]:
    """Colour each point with the mean over its observations, nearest pixel of the stored image.

    Args:
        model: ``pycolmap.Reconstruction``.
        colours: name -> (H, W, 3) stored pixels, which may be reduced.

    Returns:
        Names of images that could not be read.
    """
    seen: list[int] = []
    values: list[np.ndarray] = []
    unread = []
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        try:
            pixels = colours(image.name)
        except Exception as error:  # a picture that went away must not lose the model
            logger.warning("%s could not be read for colours: %s", image.name, error)
            unread.append(image.name)
            continue
        observed = image.get_observation_points2D()
        if not observed:
            continue
        size = np.array(pixels.shape[1::-1])
        stored = (image.camera.width, image.camera.height)
        xy = np.array([p.xy for p in observed]) * size / stored
        columns, rows = np.clip(xy.astype(int), 0, size - 1).T  # corner origin: floor
        values.append(pixels[rows, columns])
        seen += [p.point3D_id for p in observed]
    ids, group, counts = np.unique(seen, return_inverse=True, return_counts=True)
    stacked = np.concatenate([np.zeros((0, 3)), *values])
    means = np.stack([np.bincount(group, stacked[:, k], len(ids)) for k in range(3)], 1)
    means = np.round(means / counts[:, None]).astype(np.uint8)
    points = model.points3D
    for point_id, colour in zip(ids.tolist(), means, strict=True):
        points[point_id].color = colour
    return unread


@contextlib.contextmanager
def colmap_log(folder: Path | None) -> Iterator[None]:
    """Send COLMAP's log to ``folder`` instead of the terminal."""
    log = pycolmap.logging
    before = (log.alsologtostderr, log.logtostderr, log.stderrthreshold)
    log.alsologtostderr = False
    log.logtostderr = False
    log.stderrthreshold = int(log.FATAL)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log.set_log_destination(log.INFO, folder / "colmap.")
    try:
        yield
    finally:
        log.alsologtostderr, log.logtostderr, log.stderrthreshold = before


def version() -> str:
    """Version of the installed pycolmap."""
    return str(pycolmap.__version__)


def has_cuda() -> bool:
    """Whether this pycolmap was built with CUDA (needed by PatchMatch stereo)."""
    return bool(pycolmap.has_cuda)


def set_seed(seed: int) -> None:
    """Seed COLMAP's global random numbers."""
    pycolmap.set_random_seed(seed)
