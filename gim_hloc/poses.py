"""Known camera poses: COLMAP models, nerfstudio's transforms.json, TUM trajectories.

All come out as world to camera, in COLMAP's axes (x right, y down, z ahead), in the world that the
file uses: nothing is turned, scaled or moved.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import natural_key, read_text
from gim_hloc.geometry.pose import align_cameras, camera_centres

if TYPE_CHECKING:
    from gim_hloc.colmap import CameraSpec

Pose = tuple[np.ndarray, np.ndarray]  # R (3, 3), t (3,): x_camera = R x_world + t

# Seconds by which the timestamps of a trajectory and of an image may differ, as in TUM's tools.
MAX_TIME_DIFFERENCE = 0.02

# Rounding to two decimals moves the length of a quaternion by as much.
_QUATERNION_ERROR = 0.01

# Whole numbers below this count frames; above, they are times in some unit.
_MAX_COUNTER = 1e7

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(kw_only=True)
class KnownPoses:
    """Poses of images.

    Attributes:
        poses: name -> (R, t), world to camera.
        cameras: name -> intrinsics, where the file has them.
        source: what was read, for messages.
        notes: what a user should know, e.g. how names were matched.
    """

    poses: dict[str, Pose]
    cameras: dict[str, CameraSpec]
    source: str
    notes: list[str] = field(default_factory=list)

    def centres(self) -> dict[str, np.ndarray]:
        """Camera centres (3,) by name."""
        return {name: -r.T @ t for name, (r, t) in self.poses.items()}


def read_poses(
    path: Path | str, names: Sequence[str], sizes: Mapping[str, tuple[int, int]] | None = None
) -> KnownPoses:
    """Read poses and give them the names of images.

    Args:
        path: folder of a COLMAP model (binary or text) or of a run of ``gim-reconstruct``;
            a nerfstudio ``transforms.json``, or the folder that holds one; or a TUM trajectory:
            lines ``timestamp tx ty tz qx qy qz qw``, camera to world.
        names: the images.
        sizes: name -> (width, height) in pixels, for files whose intrinsics lack them.

    Returns:
        Poses of those images that have one.

    Raises:
        InputError: nothing readable is there, or it holds no pose of these images.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "transforms.json").is_file():
            found = _read_nerfstudio(path / "transforms.json", names, sizes or {})
        else:
            found = _read_colmap(path, names)
    elif not path.exists():
        raise InputError(f"There are no poses at {path}.")
    elif path.suffix.lower() == ".json":
        found = _read_nerfstudio(path, names, sizes or {})
    else:
        found = _read_tum(path, names)
    if not found.poses:
        raise InputError(
            f"{path} holds no pose of any of the {len(names)} images (first: {names[0]!r}). Names "
            "must be paths relative to the image folder."
        )
    return found


def match_names(given: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Which image each given name means: itself, else by the longest end of its path.

    ``./images/a/0001.jpg`` means ``a/0001.jpg``, or ``0001.jpg``; suffixes are looked past last
    (nerfstudio's synthetic scenes have none). An end that fits several images means none. Unicode
    forms are looked past, too, where one image is left.

    Returns:
        given name -> image name, for those that have one.
    """
    names = list(names)
    ends: dict[str, set[str]] = {}
    for name in names:
        for form in (name, PurePosixPath(name).with_suffix("").as_posix()):
            parts = normalize("NFC", form).split("/")
            for start in range(len(parts)):
                ends.setdefault("/".join(parts[start:]), set()).add(name)
    known = set(names)
    found = {}
    for text in given:
        if text in known:
            found[text] = text
            continue
        clean = normalize("NFC", PurePosixPath(text.replace("\\", "/")).as_posix())
        forms = (clean, PurePosixPath(clean).with_suffix("").as_posix()) if clean != "." else ()
        for form in forms:
            parts = form.split("/")
            hits = (ends.get("/".join(parts[start:]), set()) for start in range(len(parts)))
            first = next((hit for hit in hits if hit), set())
            if len(first) == 1:
                found[text] = next(iter(first))
                break
    return found


def _assigned(
    given: Mapping[str, Any], names: Sequence[str], where: Path | str
) -> tuple[dict[str, Any], list[str]]:
    """Values by image name, and notes about those that belong to no image."""
    partner = match_names(given, names)
    result: dict[str, Any] = {}
    for text, name in partner.items():
        if name in result:
            raise InputError(f"{where} names the image {name} twice (as {text!r} the second time).")
        result[name] = given[text]
    unused = [text for text in given if text not in partner]
    notes = []
    if unused and result:
        notes.append(
            f"{where} has poses of {len(unused)} images that are not in the image folder (first: "
            f"{unused[0]})."
        )
    return result, notes


def checked_rotation(matrix: np.ndarray, where: str) -> np.ndarray:
    """The nearest rotation (3, 3) to a matrix that already nearly is one.

    Raises:
        InputError: the matrix is no rotation: scaled, mirrored or not finite.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(f"{where}: the rotation is not a finite 3x3 matrix.")
    if np.abs(matrix.T @ matrix - np.eye(3)).max() > 1e-2 or np.linalg.det(matrix) < 0:
        raise InputError(f"{where}: the matrix is no rotation (it scales or mirrors).")
    u, _, vt = np.linalg.svd(matrix)
    rotation: np.ndarray = u @ vt
    return rotation


def check_quaternion(quaternion: Sequence[float], where: str) -> None:
    """Refuse a quaternion whose length is not 1 within rounding; ``InputError`` names where."""
    length = float(np.linalg.norm(quaternion))
    if not abs(length - 1) <= _QUATERNION_ERROR:
        raise InputError(f"{where}: the quaternion has length {length:.4g} instead of 1.")


# ---------------------------------------------------------------------------------------- COLMAP


def _read_colmap(path: Path, names: Sequence[str]) -> KnownPoses:
    from gim_hloc import colmap

    model = colmap.find_model(path)
    given, cameras = colmap.poses_and_cameras(model)
    poses, notes = _assigned(given, names, model)
    known, _ = _assigned({n: cameras[n] for n in given}, names, model)
    for name, camera in known.items():
        size = (camera.width, camera.height)
        colmap.check_params(camera.model, camera.params, f"{model}, camera of {name}", size)
    return KnownPoses(poses=poses, cameras=known, source=str(model), notes=notes)


# ------------------------------------------------------------------------------------ nerfstudio

_FISHEYE = {"OPENCV_FISHEYE", "FISHEYE", "EQUIDISTANT"}
_PERSPECTIVE = {"OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "RADIAL", "SIMPLE_RADIAL"}
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")


def _read_nerfstudio(
    path: Path, names: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> KnownPoses:
    try:
        content = json.loads(read_text(path, "transforms.json"))
        frames = content["frames"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a transforms.json with frames: {error!r:.200}.") from None
    if not isinstance(frames, list):
        raise InputError(f"{path} is not a transforms.json with frames: they are no list.")
    shared = {key: value for key, value in content.items() if key != "frames"}
    given: dict[str, tuple[Pose, dict[str, Any]]] = {}
    for number, frame in enumerate(frames, 1):
        where = f"{path}, frame {number}"
        try:
            text = str(frame["file_path"])
            matrix = np.array(frame["transform_matrix"], dtype=np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(
                f"{where}: file_path or transform_matrix is missing, or the matrix is not one of "
                "numbers."
            ) from None
        if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
            raise InputError(f"{where}: transform_matrix is not a finite 4x4 matrix.")
        if text in given:
            raise InputError(f"{where}: {text} comes twice.")
        # Camera to world with OpenGL's camera axes: y up, z back.
        turn = checked_rotation(matrix[:3, :3], where) * [1.0, -1.0, -1.0]
        given[text] = ((turn.T, -turn.T @ matrix[:3, 3]), frame)
    assigned, notes = _assigned(given, names, path)
    cameras = {}
    for name, (_, frame) in assigned.items():
        spec = _nerfstudio_camera(frame, shared, sizes.get(name), f"{path}, {name}")
        if spec is not None:
            cameras[name] = spec
    return KnownPoses(
        poses={name: pose for name, (pose, _) in assigned.items()},
        cameras=cameras,
        source=str(path),
        notes=notes,
    )


def _nerfstudio_camera(
    frame: Mapping[str, Any],
    shared: Mapping[str, Any],
    size: tuple[int, int] | None,
    where: str,
) -> CameraSpec | None:
    """Intrinsics of a frame, its own before those of the whole file; None when there are none."""
    from gim_hloc.colmap import CameraSpec, check_params

    def number(values: Mapping[str, Any], key: str, otherwise: float) -> float:
        try:
            return float(values.get(key, otherwise))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: {key} is not a number.") from None

    def holder(*keys: str) -> Mapping[str, Any]:
        """The frame or the file, whichever says something; what belongs together is not mixed."""
        return next((v for v in (frame, shared) if any(key in v for key in keys)), {})

    place = holder("w", "h")
    if "w" in place and "h" in place:
        sides = (number(place, "w", 0), number(place, "h", 0))
        if not (np.isfinite(sides).all() and min(sides) >= 1):
            raise InputError(f"{where}: w and h are no size of an image.")
        width, height = (round(side) for side in sides)
    elif size is not None:
        width, height = size
    else:
        return None
    lens = holder("fl_x", "fl_y", "camera_angle_x")
    if "fl_x" in lens or "fl_y" in lens:
        fx = number(lens, "fl_x", number(lens, "fl_y", 0))
        fy = number(lens, "fl_y", fx)
    elif "camera_angle_x" in lens:  # Blender's scenes and older files
        fx = 0.5 * width / math.tan(0.5 * number(lens, "camera_angle_x", 1))
        fy = fx
        if "camera_angle_y" in lens:
            fy = 0.5 * height / math.tan(0.5 * number(lens, "camera_angle_y", 1))
    else:
        return None
    place = holder("cx", "cy")
    focal = (fx, fy, number(place, "cx", width / 2), number(place, "cy", height / 2))
    kind = str(holder("camera_model").get("camera_model", "OPENCV")).upper()
    fisheye = kind in _FISHEYE or bool(holder("is_fisheye").get("is_fisheye"))
    values = holder(*_DISTORTION, "distortion_params")
    if "distortion_params" in values:  # nerfstudio's order; counts before k1, ...
        listed = values["distortion_params"]
        if not isinstance(listed, list) or len(listed) not in (6, 4 if fisheye else 6):
            raise InputError(f"{where}: distortion_params are not [k1, k2, k3, k4, p1, p2].")
        values = dict(zip(("k1", "k2", "k3", "k4", "p1", "p2"), listed, strict=False))
    k1, k2, k3, k4, k5, k6, p1, p2 = (number(values, key, 0) for key in _DISTORTION)
    params: tuple[float, ...]
    if fisheye:
        model, params = "OPENCV_FISHEYE", (*focal, k1, k2, k3, k4)
    elif kind == "FULL_OPENCV":
        model, params = kind, (*focal, k1, k2, p1, p2, k3, k4, k5, k6)
    elif kind not in _PERSPECTIVE:
        raise InputError(f"{where}: camera_model {kind} has no COLMAP camera to stand for it.")
    elif k4 or k5 or k6:
        # nerfstudio's k4 is the fourth radial term; COLMAP's FULL_OPENCV divides by its k4.
        raise InputError(
            f"{where}: no COLMAP camera has the radial terms k4, k5 or k6 of the perspective "
            f"camera_model {kind}. Undistort the images, or say FULL_OPENCV if k4 to k6 are "
            "OpenCV's, which divide."
        )
    elif k3:
        model, params = "FULL_OPENCV", (*focal, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0)
    elif k1 or k2 or p1 or p2:
        model, params = "OPENCV", (*focal, k1, k2, p1, p2)
    else:
        model, params = "PINHOLE", focal
    check_params(model, params, where, (width, height))
    return CameraSpec(
        model=model, width=width, height=height, params=params, prior=True, given=True
    )


# ------------------------------------------------------------------------------------------- TUM


def _read_tum(path: Path, names: Sequence[str]) -> KnownPoses:
    """Read a trajectory and match its timestamps to file names, or in order."""
    times: list[float] = []
    poses: list[Pose] = []
    for number, line in enumerate(read_text(path, "trajectory").splitlines(), 1):
        fields = line.replace(",", " ").split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        try:
            time, *values = (float(value) for value in fields)
        except ValueError:
            values = []
        if len(values) != 7 or not np.isfinite([time, *values]).all():
            raise InputError(
                f"{where}: expected 'timestamp tx ty tz qx qy qz qw' (a TUM trajectory); other "
                "pose files are COLMAP models (folders) and transforms.json."
            )
        check_quaternion(values[3:], where)
        quaternion = np.array(values[3:])
        turn = _rotation(quaternion / np.linalg.norm(quaternion))
        times.append(time)
        poses.append((turn.T, -turn.T @ np.array(values[:3])))
    if not poses:
        raise InputError(f"{path} holds no pose.")
    rows, how = _match_times(np.array(times), names, path)
    return KnownPoses(
        poses={name: poses[row] for name, row in rows.items()},
        cameras={},
        source=str(path),
        notes=[f"Poses of {path} were given to images {how}."],
    )


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrix of a unit quaternion x, y, z, w."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _match_times(times: np.ndarray, names: Sequence[str], path: Path) -> tuple[dict[str, int], str]:
    """Line of each image, and how it was found."""
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    gaps = np.diff(np.unique(ordered))
    limit = min(MAX_TIME_DIFFERENCE, 0.5 * float(np.median(gaps))) if len(gaps) else 1e-6
    best: dict[str, int] = {}
    unit = 1.0
    numbers = {name: _NUMBER.findall(PurePosixPath(name).stem) for name in names}
    for scale in (1.0, 1e-3, 1e-6, 1e-9):
        found: dict[str, int] = {}
        for name, texts in numbers.items():
            if not texts:
                continue
            time = float(texts[-1]) * scale
            after = int(np.searchsorted(ordered, time))
            near = [i for i in (after - 1, after) if 0 <= i < len(ordered)]
            nearest = min(near, key=lambda i: abs(ordered[i] - time))
            if abs(ordered[nearest] - time) <= limit:
                found[name] = int(order[nearest])
        found = found if len(set(found.values())) == len(found) else {}
        if len(found) > len(best):
            best, unit = found, scale
    scaled = "" if unit == 1 else f" (numbers in names times {unit:g})"
    by_time = f"by the timestamps in file names{scaled}, {len(best)} of {len(names)} images"
    if len(best) == len(names):
        return best, by_time
    counted = bool((ordered % 1 == 0).all()) and ordered[0] >= 0 and ordered[-1] < _MAX_COUNTER
    span = f"{ordered[0]:.6f} to {ordered[-1]:.6f}"
    if len(times) == len(names):
        in_order = {name: int(order[i]) for i, name in enumerate(sorted(names, key=natural_key))}
        agree = all(in_order[name] == row for name, row in best.items())
        # Numbers that happen to be near some timestamps are not timestamps.
        if counted or agree or len(best) < len(names) / 2:
            return in_order, (
                f"in order, since the numbers in file names are the stamps of {len(best)} of "
                f"{len(names)} only ({span}): first line to the first file name and so on"
            )
        raise InputError(
            f"{path} has as many poses as there are images, {len(times)}, but its timestamps "
            f"({span}) fit the names of {len(best)} images, and not in order: which pose belongs "
            "to which image cannot be told. Name images by timestamp, or take out the lines of "
            "other images."
        )
    # Counters that miss some lines and some images may be counted from another start.
    enough = len(times) if counted else max(1, min(len(names), len(times)) / 2)
    if len(best) >= enough:
        return best, by_time
    raise InputError(
        f"{path} has {len(times)} poses for {len(names)} images, and the numbers in file names are "
        f"not its timestamps ({span}; {len(best)} fit). Name images by timestamp, or give one pose "
        "an image."
    )


def similarity(
    model: Mapping[str, Pose], target: Mapping[str, Pose]
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """Scale, rotation (3, 3) and translation (3,) that take one world onto another.

    Args:
        model: poses in the world to be moved.
        target: poses in the world to be moved to.

    Returns:
        None when fewer than two images are in both.
    """
    names = sorted(set(model) & set(target))
    if len(names) < 2:
        return None

    def stacked(poses: Mapping[str, Pose]) -> tuple[np.ndarray, np.ndarray]:
        rotations = np.stack([poses[name][0] for name in names])
        return rotations, camera_centres(rotations, np.stack([poses[n][1] for n in names]))

    found = align_cameras(*stacked(model), *stacked(target))
    return float(found.scale), found.rotation, found.translation


def radius(centres: Iterable[np.ndarray]) -> float:
    """Mean distance of points from their mean; 0 for one point."""
    points = np.array(list(centres))
    return float(np.linalg.norm(points - points.mean(0), axis=1).mean())


__all__: list[str] = [
    "KnownPoses",
    "Pose",
    "checked_rotation",
    "match_names",
    "radius",
    "read_poses",
    "similarity",
]
