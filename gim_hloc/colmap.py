"""Everything that touches COLMAP. The only module of the project that imports ``pycolmap``.

Pixel frames: everything that comes in is in hloc's frame (integer = pixel centre); COLMAP's origin
is the corner of the first pixel. The half pixel is added here, in ``write_database``, and nowhere
else. Poses are world to camera throughout, as in COLMAP's files.

Supported: pycolmap 4.0 to 4.2 (rigs and frames in the database; see ``tests/test_colmap.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pycolmap

from gim_hloc.errors import InputError, MappingError, check_numbers

if TYPE_CHECKING:
    from gim_hloc.geometry.warp import Warp
    from gim_hloc.images import ImageRecord
    from gim_hloc.poses import Pose
    from gim_hloc.tracks.photometric import PhotometricOptions
    from gim_hloc.tracks.refine import RefineOptions

logger = logging.getLogger(__name__)

# pycolmap's import puts a stack trace in the place of whatever SIGTERM was to do: ending at once,
# or storing the state of a training. Python still knows what that was.
if threading.current_thread() is threading.main_thread():
    with contextlib.suppress(TypeError):  # a handler that was not set from Python
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

Mapper = Literal["auto", "incremental", "global", "hierarchical"]
CameraMode = Literal["auto", "single", "folder", "image"]
Refine = Literal["auto", "none", "all"]

# Above this many images ``auto`` maps globally: incremental mapping is the more accurate and the
# more forgiving of the two, but its time grows faster than linearly.
AUTO_GLOBAL_ABOVE = 500

_FOCAL_POINTS = 500  # of an image, for the focal length of several

_MODEL_FILES = ("cameras", "images", "points3D")


# --------------------------------------------------------------------------------------- options


@dataclass(frozen=True, kw_only=True)
class CameraOptions:
    """How images share cameras and where intrinsics come from."""

    # auto: one camera for all images of the same size and EXIF camera; single: one for all;
    # folder: one a sub-folder; image: one each.
    camera_mode: CameraMode = "auto"
    # Any COLMAP model; one focal length and one radial term suit an unknown camera.
    camera_model: str = "SIMPLE_RADIAL"
    # "PINHOLE,fx,fy,cx,cy" (pixels, COLMAP's corner origin), a COLMAP cameras.txt, or a text file
    # of lines "GLOB MODEL width height params...".
    intrinsics: str | None = None
    # auto: refine what was guessed, keep what was given; none: keep all; all: refine all.
    refine_intrinsics: Refine = "auto"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Two-view geometric verification (COLMAP's ``TwoViewGeometryOptions``)."""

    max_error: float = 4.0  # px, largest epipolar error of an inlier
    min_num_inliers: int = 15  # fewer: the pair is dropped
    min_inlier_ratio: float = 0.1  # share assumed by RANSAC's stopping rule
    confidence: float = 0.999  # of having drawn one outlier-free sample
    max_num_trials: int = 20000  # RANSAC iterations at most

    def __post_init__(self) -> None:
        check_numbers(
            self,
            group="verify.",
            positive=("max_error",),
            share=("min_inlier_ratio", "confidence"),
            at_least={"min_num_inliers": 1, "max_num_trials": 1},
        )


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Mapping. Fields left None keep COLMAP's default."""

    min_model_size: int = 3  # images; smaller models are dropped unless they are all there is
    init_min_num_inliers: int | None = None  # of the first pair (COLMAP: 100)
    init_min_tri_angle: float | None = None  # degrees, of the first pair (COLMAP: 16)
    abs_pose_min_num_inliers: int | None = None  # to register an image (COLMAP: 30)
    filter_max_reproj_error: float | None = None  # px, observations above it go (COLMAP: 4)
    ba_refine_principal_point: bool = False
    multiple_models: bool = True  # keep going with the images that did not fit the first model

    def __post_init__(self) -> None:
        check_numbers(
            self,
            group="map.",
            positive=("init_min_tri_angle", "filter_max_reproj_error"),
            at_least={
                "min_model_size": 0,
                "init_min_num_inliers": 1,
                "abs_pose_min_num_inliers": 1,
            },
        )


# --------------------------------------------------------------------------------------- cameras


@dataclass(kw_only=True)
class CameraSpec:
    """One camera and the images that share it."""

    model: str
    width: int  # pixels
    height: int  # pixels
    params: tuple[float, ...]  # in the model's order, pixels, corner origin
    prior: bool  # whether the focal length is known (given or EXIF) rather than guessed
    given: bool  # whether the user gave the intrinsics
    names: list[str] = field(default_factory=list)


def camera_param_count(model: str) -> int:
    """Number of parameters of a COLMAP camera model; ``InputError`` for an unknown name."""
    return len(_create_camera(model, 1.0, 2, 2).params)


def _create_camera(model: str, focal: float, width: int, height: int) -> Any:
    members = pycolmap.CameraModelId.__members__
    if model not in members or model == "INVALID":
        known = ", ".join(name for name in members if name != "INVALID")
        raise InputError(f"Unknown camera model {model!r}. COLMAP knows: {known}.")
    return pycolmap.Camera.create_from_model_id(0, members[model], focal, width, height)


def parse_intrinsics(text: str) -> tuple[str, tuple[float, ...]]:
    """Parse ``"MODEL,p1,p2,..."``.

    Returns:
        The model's name and its parameters in COLMAP's order.

    Raises:
        InputError: for an unknown model, a wrong number of parameters or no numbers.
    """
    model, *rest = [part.strip() for part in text.replace(" ", ",").split(",") if part.strip()]
    try:
        params = tuple(float(part) for part in rest)
    except ValueError:
        raise InputError(
            f"--intrinsics {text!r}: expected MODEL,number,number,... such as "
            '"PINHOLE,fx,fy,cx,cy".'
        ) from None
    return model, _checked_params(model, params, f"--intrinsics {text!r}")


def _checked_params(model: str, params: tuple[float, ...], where: str) -> tuple[float, ...]:
    camera = _create_camera(model, 1.0, 2, 2)
    if len(params) != len(camera.params):
        raise InputError(
            f"{where}: {model} takes {len(camera.params)} parameters ({camera.params_info}), "
            f"got {len(params)}."
        )
    if not np.isfinite(params).all() or min(params[i] for i in camera.focal_length_idxs()) <= 0:
        raise InputError(f"{where}: parameters must be finite and focal lengths positive.")
    return params


def assign_cameras(
    images: Sequence[ImageRecord],
    options: CameraOptions,
    known: Mapping[str, CameraSpec] | None = None,
) -> tuple[list[CameraSpec], list[str]]:
    """Decide which images share a camera and what is known about it.

    Args:
        images: the usable images.
        options: see ``CameraOptions``.
        known: name -> camera that is known from elsewhere (a model); ``options.intrinsics`` is for
            the other images only. Their ``names`` are not looked at.

    Returns:
        Cameras in the order of their first image, and notes for the report.

    Raises:
        InputError: for intrinsics that do not fit the images or cannot be parsed.
    """
    notes: list[str] = []
    others = [record for record in images if record.name not in (known or {})]
    given = _given_cameras(others, options.intrinsics) if options.intrinsics and others else {}
    missing = [record.name for record in others if record.name not in given]
    if given and missing:
        notes.append(
            f"{options.intrinsics} names no camera for {len(missing)} of {len(images)} images "
            f"(first: {missing[0]}); these get a guessed one."
        )
    for record in images:
        if known and record.name in known:
            one = known[record.name]
            if (one.width, one.height) != record.size:
                raise InputError(
                    f"The known camera of {record.name} is {one.width}x{one.height} but the "
                    f"image is {record.width}x{record.height}. Intrinsics belong to one image size."
                )
            given[record.name] = dataclasses.replace(one, names=[])
    groups: dict[tuple[Any, ...], CameraSpec] = {}
    for record in images:
        spec = given.get(record.name)
        key = _group_key(record, spec, options.camera_mode)
        if key not in groups:
            groups[key] = spec or _guessed_camera(record, options.camera_model)
        group = groups[key]
        if (group.width, group.height) != (record.width, record.height):
            raise InputError(
                f"--camera-mode {options.camera_mode}: {group.names[0]} is "
                f"{group.width}x{group.height} but {record.name} is "
                f"{record.width}x{record.height}. Images of one camera have one size; use "
                "--camera-mode auto."
            )
        group.names.append(record.name)
    return list(groups.values()), notes


def _group_key(record: ImageRecord, spec: CameraSpec | None, mode: CameraMode) -> tuple[Any, ...]:
    if mode == "image":
        return ("image", record.name)
    if spec is not None:
        base: tuple[Any, ...] = ("given", spec.model, spec.params, spec.width, spec.height)
        return (*base, record.name.rpartition("/")[0]) if mode == "folder" else base
    if mode == "single":
        return ("single",)
    if mode == "folder":
        return ("folder", record.name.rpartition("/")[0])
    exif = record.exif
    return (
        "auto",
        record.width,
        record.height,
        exif.make,
        exif.model,
        exif.focal_mm,
        exif.focal_35mm,
    )


def _guessed_camera(record: ImageRecord, model: str) -> CameraSpec:
    from gim_hloc.images import focal_prior

    focal = focal_prior(record)
    # COLMAP's guess for an unknown camera.
    value = focal if focal else 1.2 * max(record.width, record.height)
    camera = _create_camera(model, value, record.width, record.height)
    return CameraSpec(
        model=model,
        width=record.width,
        height=record.height,
        params=tuple(float(p) for p in camera.params),
        prior=focal is not None,
        given=False,
    )


def _given_cameras(images: Sequence[ImageRecord], text: str) -> dict[str, CameraSpec]:
    path = Path(text)
    if path.is_dir() and (path / "cameras.txt").is_file():
        path = path / "cameras.txt"
    if not path.is_file():
        if "," not in text:
            raise InputError(
                f"--intrinsics {text!r} is neither a file nor MODEL,params (such as "
                '"PINHOLE,fx,fy,cx,cy").'
            )
        model, params = parse_intrinsics(text)
        sizes = {(record.width, record.height) for record in images}
        if len(sizes) > 1:
            shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:4])
            raise InputError(
                f"--intrinsics {text!r} is one camera but the images have {len(sizes)} sizes "
                f"({shown}). Give a file of lines 'GLOB MODEL width height params...' instead."
            )
        return {
            record.name: CameraSpec(
                model=model,
                width=record.width,
                height=record.height,
                params=params,
                prior=True,
                given=True,
            )
            for record in images
        }
    return _camera_file(images, path)


def _camera_file(images: Sequence[ImageRecord], path: Path) -> dict[str, CameraSpec]:
    """Read a COLMAP cameras.txt (numeric first field) or a glob file."""
    rules: list[tuple[str | None, str, int, int, tuple[float, ...], int]] = []
    ids: dict[int, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        head, *fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 1:
            fields = fields[0].split()
        try:
            model, width, height = fields[0], int(fields[1]), int(fields[2])
            params = tuple(float(value) for value in fields[3:])
        except (IndexError, ValueError):
            raise InputError(
                f"{where}: expected 'CAMERA_ID MODEL width height params...' (COLMAP) or "
                "'GLOB MODEL width height params...'."
            ) from None
        params = _checked_params(model, params, where)
        is_id = head.isdigit() and path.name == "cameras.txt"
        if is_id:
            ids[int(head)] = len(rules)
        rules.append((None if is_id else head, model, width, height, params, number))
    if not rules:
        raise InputError(f"{path} holds no camera.")
    by_name = _image_cameras(path.with_name("images.txt")) if ids else {}

    cameras: dict[str, CameraSpec] = {}
    for record in images:
        rule = None
        if record.name in by_name:
            index = ids.get(by_name[record.name])
            rule = None if index is None else rules[index]
        elif ids:
            fitting = [r for r in rules if (r[2], r[3]) == (record.width, record.height)]
            if len(fitting) > 1:
                raise InputError(
                    f"{path}: {len(fitting)} cameras have the size of {record.name} "
                    f"({record.width}x{record.height}) and no images.txt beside it says which "
                    "one it is. Use a file of lines 'GLOB MODEL width height params...'."
                )
            rule = fitting[0] if fitting else None
            if rule is None and len(rules) == 1:
                rule = rules[0]  # one camera for all: the size check below tells the user
        else:
            rule = next((r for r in rules if fnmatch.fnmatchcase(record.name, str(r[0]))), None)
        if rule is None:
            continue
        if (rule[2], rule[3]) != (record.width, record.height):
            raise InputError(
                f"{path}, line {rule[5]}: the camera is {rule[2]}x{rule[3]} but {record.name} is "
                f"{record.width}x{record.height}. Intrinsics belong to one image size."
            )
        cameras[record.name] = CameraSpec(
            model=rule[1], width=rule[2], height=rule[3], params=rule[4], prior=True, given=True
        )
    return cameras


def _image_cameras(path: Path) -> dict[str, int]:
    """Image name -> camera id from a COLMAP images.txt; empty when there is none."""
    return {fields[9]: int(fields[8]) for fields in _image_lines(path)}


def _image_names(path: Path) -> dict[int, str]:
    """Image id -> name from a COLMAP images.txt."""
    return {int(fields[0]): fields[9] for fields in _image_lines(path)}


def _image_lines(path: Path) -> list[list[str]]:
    """The ten fields of each image in an images.txt; names may hold blanks."""
    if not path.is_file():
        return []
    lines = [
        line
        for line in path.read_text(encoding="utf-8-sig").splitlines()
        if not line.startswith("#")
    ]
    # Every second line holds the observations, and may be empty.
    found = [line.strip().split(maxsplit=9) for line in lines[::2]]
    return [fields for fields in found if len(fields) == 10]


# -------------------------------------------------------------------------------------- database


@dataclass(kw_only=True)
class PairVerification:
    """What verification left of a pair."""

    name0: str
    name1: str
    matches: int
    inliers: int


def build_database(
    path: Path,
    *,
    cameras: Sequence[CameraSpec],
    names: Sequence[str],
    keypoints: Callable[[str], np.ndarray],
    matches: Iterable[tuple[str, str, np.ndarray]],
    verify: VerifyOptions,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    poses: Mapping[str, Pose] | None = None,
    priors: Mapping[str, np.ndarray] | None = None,
    prior_stddev: float = 1.0,
) -> list[PairVerification]:
    """Write a COLMAP database: images, cameras, keypoints, matches and verified geometries.

    Verification runs here rather than through COLMAP's ``verify_matches``: that reads names from a
    blank-separated file, shows no progress, and draws its random numbers per thread. Each pair has
    its own seed, so the result does not depend on the number of threads.

    Args:
        path: database to write; written under a temporary name, then renamed.
        cameras: every image of ``names`` belongs to exactly one.
        names: images in the order of their ids.
        keypoints: name -> (N, 2) float32 x, y in stored pixels, hloc's frame.
        matches: (name0, name1, (M, 2) rows into the two images' keypoints).
        verify: thresholds of the two-view estimation.
        seed: base of the pairs' seeds.
        threads: pairs verified at a time.
        progress: called with the number of pairs just finished.
        poses: name -> (R, t), world to camera, exact ones. A pair with two of them is not
            estimated: its inliers are the matches that fit the known relative pose.
        priors: name -> (3,) camera centre that the mapper is to stay near.
        prior_stddev: standard deviation of priors, in their unit.

    Returns:
        One entry for each pair of ``matches``, in its order.
    """
    temporary = path.with_name(path.name + ".tmp")
    for stale in (temporary, *(Path(f"{temporary}{end}") for end in ("-wal", "-shm", "-journal"))):
        stale.unlink(missing_ok=True)
    results: list[PairVerification] = []
    with pycolmap.Database.open(temporary) as database:
        ids, camera_of = _write_images(database, cameras, names)
        points: dict[str, np.ndarray] = {}
        for name in names:
            xy_colmap = np.asarray(keypoints(name), dtype=np.float32).reshape(-1, 2) + 0.5
            points[name] = xy_colmap
            database.write_keypoints(ids[name], xy_colmap)
            if priors is not None and name in priors:
                _write_prior(database, ids[name], priors[name], prior_stddev)

        def estimate(index: int, name0: str, name1: str, rows: np.ndarray) -> Any:
            if poses is not None and name0 in poses and name1 in poses:
                ends = [
                    (camera_of[name], points[name].astype(np.float64), poses[name])
                    for name in (name0, name1)
                ]
                return _known_geometry(ends[0], ends[1], rows, verify.max_error)
            options = _two_view_options(verify, seed + index)
            return pycolmap.estimate_two_view_geometry(
                camera_of[name0],
                points[name0].astype(np.float64),
                camera_of[name1],
                points[name1].astype(np.float64),
                rows,
                options,
            )

        for name0, name1, rows, geometry in _ordered_map(estimate, matches, threads):
            if ids[name0] > ids[name1]:
                raise InputError(
                    f"Pair {name0} {name1} is not in the order of the image list; sort it."
                )
            if len(rows):
                database.write_matches(ids[name0], ids[name1], rows)
            inliers = 0
            if geometry is not None:
                config = _config_name(geometry.config)
                inliers = len(geometry.inlier_matches)
                # A pair below the bound is left out: the mapper must not trust it.
                if inliers >= verify.min_num_inliers and config not in ("UNDEFINED", "DEGENERATE"):
                    database.write_two_view_geometry(ids[name0], ids[name1], geometry)
                else:
                    inliers = 0
            results.append(
                PairVerification(name0=name0, name1=name1, matches=len(rows), inliers=inliers)
            )
            if progress is not None:
                progress(1)
    os.replace(temporary, path)
    return results


def _write_prior(database: Any, image_id: int, centre: np.ndarray, stddev: float) -> None:
    prior = pycolmap.PosePrior()
    prior.corr_data_id = database.read_image(image_id).data_id
    prior.position = np.asarray(centre, dtype=np.float64)
    prior.position_covariance = np.eye(3) * stddev**2
    prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
    database.write_pose_prior(prior)


_End = tuple[Any, np.ndarray, "Pose"]  # camera, keypoints (N, 2) corner origin, pose


def _known_geometry(end0: _End, end1: _End, rows: np.ndarray, max_error: float) -> Any:
    """Two-view geometry of a known relative pose: matches within ``max_error`` px of their lines.

    As in hloc's triangulation, the distance to the epipolar line counts in both images.
    """
    (camera0, xy0, (r0, t0)), (camera1, xy1, (r1, t1)) = end0, end1
    turn = r1 @ r0.T
    shift = t1 - turn @ t0
    cross = np.array([[0, -shift[2], shift[1]], [shift[2], 0, -shift[0]], [-shift[1], shift[0], 0]])
    essential = cross @ turn
    rays0, rays1 = (
        _unproject(camera, xy[rows[:, side]])
        for side, (camera, xy) in enumerate(((camera0, xy0), (camera1, xy1)))
    )
    lines0, lines1 = rays1 @ essential, rays0 @ essential.T
    residual = np.abs((rays0 * lines0).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        error0 = residual / np.linalg.norm(lines0[:, :2], axis=1)
        error1 = residual / np.linalg.norm(lines1[:, :2], axis=1)
        good = (error0 <= camera0.cam_from_img_threshold(max_error)) & (
            error1 <= camera1.cam_from_img_threshold(max_error)
        )
    geometry = pycolmap.TwoViewGeometry()
    geometry.config = int(pycolmap.TwoViewGeometryConfiguration.CALIBRATED)
    geometry.inlier_matches = np.ascontiguousarray(rows[good], dtype=np.uint32)
    geometry.cam2_from_cam1 = pycolmap.Rigid3d(np.column_stack([turn, shift]))
    geometry.E = essential
    return geometry


def _unproject(camera: Any, xy_colmap: np.ndarray) -> np.ndarray:
    """Rays (N, 3) with z = 1 of pixels, corner origin; NaN where the camera has none."""
    found = camera.cam_from_img(np.ascontiguousarray(xy_colmap, dtype=np.float64))
    plane = [(np.nan, np.nan) if ray is None else ray[:2] for ray in found]
    return np.column_stack([np.array(plane).reshape(-1, 2), np.ones(len(xy_colmap))])


def _ordered_map(
    estimate: Callable[..., Any],
    matches: Iterable[tuple[str, str, np.ndarray]],
    threads: int,
) -> Iterator[tuple[str, str, np.ndarray, Any]]:
    """Run ``estimate`` over pairs in threads (it releases the GIL), yielding in input order."""
    pending: list[tuple[str, str, np.ndarray, Future[Any] | None]] = []
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for index, (name0, name1, rows) in enumerate(matches):
            rows = np.ascontiguousarray(np.asarray(rows).reshape(-1, 2), dtype=np.uint32)
            future = pool.submit(estimate, index, name0, name1, rows) if len(rows) else None
            pending.append((name0, name1, rows, future))
            while len(pending) > 4 * threads:  # bound the memory of what waits
                head = pending.pop(0)
                yield (*head[:3], head[3].result() if head[3] else None)
        for head in pending:
            yield (*head[:3], head[3].result() if head[3] else None)


def _config_name(config: Any) -> str:
    value = int(config)
    for name, member in pycolmap.TwoViewGeometryConfiguration.__members__.items():
        if int(member) == value:
            return str(name)
    return str(config)


def _two_view_options(verify: VerifyOptions, seed: int) -> Any:
    options = pycolmap.TwoViewGeometryOptions()
    options.min_num_inliers = verify.min_num_inliers
    options.ransac.max_error = verify.max_error
    options.ransac.min_inlier_ratio = verify.min_inlier_ratio
    options.ransac.confidence = verify.confidence
    options.ransac.max_num_trials = verify.max_num_trials
    options.ransac.random_seed = seed % (2**31 - 1)
    return options


def _write_images(
    database: Any, cameras: Sequence[CameraSpec], names: Sequence[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write cameras with one-sensor rigs, and images with one-image frames, as COLMAP's import."""
    camera_of: dict[str, Any] = {}
    rig_of: dict[str, int] = {}
    for spec in cameras:
        camera = pycolmap.Camera(
            model=spec.model, width=spec.width, height=spec.height, params=list(spec.params)
        )
        camera.has_prior_focal_length = spec.prior
        camera.camera_id = database.write_camera(camera)
        rig = pycolmap.Rig()
        rig.add_ref_sensor(camera.sensor_id)
        rig_id = database.write_rig(rig)
        for name in spec.names:
            camera_of[name] = camera
            rig_of[name] = rig_id
    ids: dict[str, int] = {}
    for name in names:
        image = pycolmap.Image(name=name, camera_id=camera_of[name].camera_id)
        image.image_id = ids[name] = database.write_image(image)
        frame = pycolmap.Frame()
        frame.rig_id = rig_of[name]
        frame.add_data_id(image.data_id)
        database.write_frame(frame)
    return ids, camera_of


# --------------------------------------------------------------------------------------- mapping


@dataclass(kw_only=True)
class MappingResult:
    """Models of one mapping run, largest first."""

    paths: list[Path]
    mapper: str
    notes: list[str]


def resolve_mapper(mapper: Mapper, num_images: int) -> str:
    """The mapper that ``auto`` stands for: global above ``AUTO_GLOBAL_ABOVE`` images."""
    if mapper != "auto":
        return mapper
    return "global" if num_images > AUTO_GLOBAL_ABOVE else "incremental"


def run_mapping(
    database: Path,
    output: Path,
    *,
    options: MapOptions,
    cameras: Sequence[CameraSpec],
    mapper: Mapper = "incremental",
    refine_intrinsics: Refine = "auto",
    seed: int = 0,
    threads: int = -1,
    log_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    colours: Callable[[str], np.ndarray] | None = None,
    refine: Callable[[Any, set[int]], str] | None = None,
    priors: Mapping[str, Pose] | None = None,
) -> MappingResult:
    """Map a verified database and write every model, largest first, to ``output/0``, ``1``, ….

    When COLMAP finds no first pair, mapping is repeated once with relaxed values, and a note says
    so: small scenes and narrow baselines often fail COLMAP's defaults only.

    Args:
        database: COLMAP database with verified pairs.
        output: folder that is replaced as a whole once all models are there.
        options: thresholds.
        cameras: as written to the database (ids are 1, 2, … in this order).
        mapper: which of COLMAP's mappers.
        refine_intrinsics: see ``CameraOptions``.
        seed: of COLMAP's random numbers.
        threads: COLMAP's threads; one thread and a seed give the same model twice.
        log_dir: where COLMAP's own log goes.
        progress: called with (index of the model, images registered in it).
        colours: name -> (H, W, 3) uint8 stored pixels, to colour the points with.
        refine: improves a model in place before it is written (see ``refine_tracks``), given the
            ids of the cameras to keep; returns a sentence for the log.
        priors: poses whose centres the database holds as priors (incremental mapper only); models
            are put into their world.

    Raises:
        MappingError: when no model comes out even with relaxed values.
    """
    num_images = sum(len(spec.names) for spec in cameras)
    resolved = resolve_mapper(mapper, num_images)
    notes: list[str] = []
    temporary = output.with_name(output.name + ".tmp")
    fixed = fixed_cameras(cameras, refine_intrinsics)

    def attempt(relaxed: bool) -> list[Any]:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with _colmap_log(log_dir):
            return _map_once(
                resolved, database, temporary, options, fixed, len(cameras), num_images, seed,
                threads, relaxed, progress, priors is not None,
            )  # fmt: skip

    models = attempt(relaxed=False)
    if not models:
        notes.append(
            f"COLMAP's {mapper} mapper found no first pair with the usual thresholds; it was run "
            "again with relaxed ones (first pair: 30 inliers and 4 degrees or less; registration: "
            "15 inliers; tracks of two views kept). Look at the model before you trust it."
        )
        logger.warning(notes[-1])
        models = attempt(relaxed=True)
    shutil.rmtree(temporary, ignore_errors=True)
    if not models:
        raise MappingError(
            "COLMAP found no pair of images to start from, even with relaxed thresholds. The "
            "matches, the database and the report are kept; look at the match graph in the "
            "report: are there pairs with many inliers and enough parallax?"
        )
    if resolved == "global":
        with _colmap_log(log_dir):
            for model in models:
                _pin_cameras(model, cameras, fixed, threads)
    models.sort(key=lambda m: (-m.num_reg_images(), -m.num_points3D()))
    paths = _write_models(models, output, fixed, refine, colours, log_dir, align_to=priors)
    return MappingResult(paths=paths, mapper=resolved, notes=notes)


def _write_models(
    models: Sequence[Any],
    output: Path,
    fixed: set[int],
    refine: Callable[[Any, set[int]], str] | None,
    colours: Callable[[str], np.ndarray] | None,
    log_dir: Path | None,
    align_to: Mapping[str, Pose] | None = None,
) -> list[Path]:
    """Refine, align and colour models, and replace ``output`` by them as a whole."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    paths = []
    for index, model in enumerate(models):
        if refine is not None:
            with _colmap_log(log_dir):
                sentence = refine(model, fixed)
            logger.info("Model %d: %s", index, sentence)
        if align_to is not None:
            _align(model, align_to)
        if colours is not None:
            _extract_colours(model, colours)
        folder = temporary / str(index)
        folder.mkdir()
        model.write(folder)
        paths.append(output / str(index))
    shutil.rmtree(output, ignore_errors=True)
    os.replace(temporary, output)
    return paths


def fixed_cameras(cameras: Sequence[CameraSpec], refine: Refine) -> set[int]:
    """Ids of the cameras whose intrinsics must not move."""
    if refine == "all":
        return set()
    return {index for index, spec in enumerate(cameras, 1) if refine == "none" or spec.given}


def _pin_cameras(model: Any, cameras: Sequence[CameraSpec], fixed: set[int], threads: int) -> None:
    """Put the cameras that must not move back and adjust the rest to them.

    The global mapper refines all cameras or none (and in pycolmap 4.0 a little even then).
    """
    moved = False
    for camera_id in sorted(fixed):
        if model.exists_camera(camera_id):
            camera = model.camera(camera_id)
            given = list(cameras[camera_id - 1].params)
            if [float(p) for p in camera.params] != given:
                camera.params = given
                moved = True
    if moved:
        _adjust(model, fixed, threads)


def _map_once(
    mapper: str,
    database: Path,
    output: Path,
    options: MapOptions,
    fixed: set[int],
    num_cameras: int,
    num_images: int,
    seed: int,
    threads: int,
    relaxed: bool,
    progress: Callable[[int, int], None] | None,
    priors: bool,
) -> list[Any]:
    # COLMAP reads the images only for colours, which we extract ourselves (any format, any EXIF).
    images = Path(".")
    if mapper == "global":
        return _map_global(database, output, images, options, fixed, num_cameras, seed, threads)
    incremental = _incremental_options(
        options, fixed, num_cameras, num_images, seed, threads, relaxed
    )
    if priors:
        incremental.use_prior_position = True
        incremental.use_robust_loss_on_prior_position = True  # one wrong prior must not bend all
    if mapper == "hierarchical":
        if not hasattr(pycolmap, "HierarchicalPipelineOptions"):
            raise InputError(
                f"--mapper hierarchical needs pycolmap 4.1 or newer, this is {version()}."
            )
        hierarchical = pycolmap.HierarchicalPipelineOptions()
        hierarchical.num_threads = threads
        hierarchical.incremental_options = incremental
        models = pycolmap.hierarchical_mapping(database, images, output, hierarchical)
        return _non_empty(models)

    counter = [-1, 0]

    def first_pair() -> None:
        counter[0] += 1
        counter[1] = 2
        if progress is not None:
            progress(counter[0], 2)

    def next_image() -> None:
        counter[1] += 1
        if progress is not None:
            progress(max(counter[0], 0), counter[1])

    models = pycolmap.incremental_mapping(
        database,
        images,
        output,
        options=incremental,
        initial_image_pair_callback=first_pair,
        next_image_callback=next_image,
    )
    return _non_empty(models)


def _non_empty(models: Mapping[int, Any]) -> list[Any]:
    return [model for model in models.values() if model.num_reg_images() >= 2]


def _incremental_options(
    options: MapOptions,
    fixed: set[int],
    num_cameras: int,
    num_images: int,
    seed: int,
    threads: int,
    relaxed: bool,
) -> Any:
    pipeline = pycolmap.IncrementalPipelineOptions()
    pipeline.num_threads = threads
    pipeline.random_seed = seed
    pipeline.extract_colors = False
    pipeline.multiple_models = options.multiple_models
    pipeline.min_model_size = options.min_model_size
    pipeline.ba_refine_principal_point = options.ba_refine_principal_point
    pipeline.constant_cameras = fixed
    if len(fixed) == num_cameras:
        pipeline.ba_refine_focal_length = False
        pipeline.ba_refine_extra_params = False
        pipeline.mapper.abs_pose_refine_focal_length = False
        pipeline.mapper.abs_pose_refine_extra_params = False
    if relaxed:
        pipeline.mapper.init_min_num_inliers = 30
        pipeline.mapper.init_min_tri_angle = 4.0
        pipeline.mapper.abs_pose_min_num_inliers = 15
        pipeline.mapper.abs_pose_min_inlier_ratio = 0.15
        pipeline.init_num_trials = 500
    if relaxed or num_images == 2:
        # With two images every track has two views; COLMAP would keep no point at all.
        pipeline.triangulation.ignore_two_view_tracks = False
    for name in (
        "init_min_num_inliers",
        "init_min_tri_angle",
        "abs_pose_min_num_inliers",
        "filter_max_reproj_error",
    ):
        value = getattr(options, name)
        if value is not None and not relaxed:
            setattr(pipeline.mapper, name, value)
    return pipeline


def _map_global(
    database: Path,
    output: Path,
    images: Path,
    options: MapOptions,
    fixed: set[int],
    num_cameras: int,
    seed: int,
    threads: int,
) -> list[Any]:
    pipeline = pycolmap.GlobalPipelineOptions()
    pipeline.num_threads = threads
    pipeline.random_seed = seed
    if hasattr(pipeline, "min_model_size"):  # pycolmap 4.0 keeps one model only
        pipeline.min_model_size = options.min_model_size
        pipeline.multiple_models = options.multiple_models
    adjustment = pipeline.mapper.bundle_adjustment
    adjustment.refine_principal_point = options.ba_refine_principal_point
    if len(fixed) == num_cameras:
        adjustment.refine_focal_length = False
        adjustment.refine_extra_params = False
    return _non_empty(pycolmap.global_mapping(database, images, output, pipeline))


def _extract_colours(model: Any, colours: Callable[[str], np.ndarray]) -> None:
    """Colour each point with the mean over its observations, nearest pixel of the stored image."""
    total: dict[int, np.ndarray] = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        try:
            pixels = colours(image.name)
        except Exception as error:  # a picture that went away must not lose the model
            logger.warning("%s could not be read for colours: %s", image.name, error)
            continue
        observed = [p for p in image.points2D if p.has_point3D()]
        if not observed:
            continue
        xy = np.array([p.xy for p in observed])
        columns = np.clip(xy[:, 0].astype(int), 0, pixels.shape[1] - 1)  # corner origin: floor
        rows = np.clip(xy[:, 1].astype(int), 0, pixels.shape[0] - 1)
        values = pixels[rows, columns].astype(np.float64)
        for point, value in zip(observed, values, strict=True):
            entry = total.setdefault(point.point3D_id, np.zeros(4))
            entry[:3] += value
            entry[3] += 1
    for point_id, entry in total.items():
        model.points3D[point_id].color = np.round(entry[:3] / entry[3]).astype(np.uint8)


@contextlib.contextmanager
def _colmap_log(folder: Path | None) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------ known poses


def poses_and_cameras(path: Path | str) -> tuple[dict[str, Pose], dict[str, CameraSpec]]:
    """Poses and cameras of the registered images of a model, by name."""
    model = read_model(path)
    images = [model.image(i) for i in model.reg_image_ids()]
    return _poses_of(model), {i.name: camera_spec(model.camera(i.camera_id)) for i in images}


def camera_spec(camera: Any) -> CameraSpec:
    """A ``pycolmap.Camera`` as a known camera without images."""
    return CameraSpec(
        model=str(camera.model_name),
        width=int(camera.width),
        height=int(camera.height),
        params=tuple(float(p) for p in camera.params),
        prior=True,
        given=True,
    )


def triangulate_known(
    database: Path,
    output: Path,
    *,
    poses: Mapping[str, Pose],
    cameras: Sequence[CameraSpec],
    options: MapOptions,
    adjust: bool = False,
    refine_intrinsics: Refine = "auto",
    seed: int = 0,
    threads: int = -1,
    log_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    colours: Callable[[str], np.ndarray] | None = None,
    refine: Callable[[Any, set[int]], str] | None = None,
) -> MappingResult:
    """Triangulate a verified database with known poses and write the model to ``output/0``.

    Images without a pose are registered afterwards by COLMAP's incremental mapper, which then also
    triangulates what they see.

    Args:
        database: COLMAP database as ``build_database`` writes it.
        output: folder that is replaced as a whole once the model is there.
        poses: name -> (R, t), world to camera.
        cameras: as written to the database.
        options: thresholds.
        adjust: move the poses too, by bundle adjustment. The model is then put back into the world
            of the known poses by a similarity. Otherwise they stay as they are.
        refine_intrinsics: see ``CameraOptions``.
        seed: of COLMAP's random numbers.
        threads: COLMAP's threads.
        log_dir: where COLMAP's own log goes.
        progress: called with (0, images with a pose in the model).
        colours: see ``run_mapping``.
        refine: see ``run_mapping``.

    Raises:
        MappingError: when no point can be triangulated.
    """
    num_images = sum(len(spec.names) for spec in cameras)
    fixed = fixed_cameras(cameras, refine_intrinsics)
    pipeline = _incremental_options(
        options, fixed, len(cameras), num_images, seed, threads, relaxed=False
    )
    pipeline.multiple_models = False
    if len(poses) == 2:
        pipeline.triangulation.ignore_two_view_tracks = False
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _colmap_log(log_dir):
        model = _posed_model(database, poses)
        if progress is not None:
            progress(0, model.num_reg_images())
        final = pipeline.mapper.filter_max_reproj_error
        # Approximate poses give approximate points; the bounds tighten as both get better.
        for bound in (4 * final, 2 * final, final) if adjust else (final,):
            pipeline.mapper.filter_max_reproj_error = bound
            pipeline.triangulation.complete_max_reproj_error = bound
            pipeline.triangulation.merge_max_reproj_error = bound
            model = pycolmap.triangulate_points(
                model, database, Path("."), temporary, clear_points=True, options=pipeline
            )
            if adjust and model.num_points3D():
                _adjust(model, fixed, threads)
                pycolmap.ObservationManager(model).filter_all_points3D(bound, 1.5)
                _adjust(model, fixed, threads)
        if adjust:
            _align(model, poses)
        pipeline.mapper.filter_max_reproj_error = final
        if not model.num_points3D():
            shutil.rmtree(temporary, ignore_errors=True)
            raise MappingError(
                "No point could be triangulated with the known poses. The matches, the database "
                "and the report are kept. Are the poses those of these images (order of names), in "
                "the convention of their format (world to camera in COLMAP's, camera to world in "
                "transforms.json and TUM files), and do the intrinsics fit?"
            )
        if model.num_reg_images() < num_images:
            model.write(temporary)
            done = model.num_reg_images()
            pipeline.fix_existing_frames = not adjust

            def next_image() -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(0, done)

            found = pycolmap.incremental_mapping(
                database,
                Path("."),
                temporary,
                options=pipeline,
                input_path=temporary,
                next_image_callback=next_image,
            )
            if found:
                model = max(found.values(), key=lambda m: m.num_reg_images())
            if adjust:
                _align(model, poses)
    shutil.rmtree(temporary, ignore_errors=True)
    if not adjust:
        _put_poses(model, poses)
    paths = _write_models(
        [model], output, fixed, refine, colours, log_dir, align_to=poses if adjust else None
    )
    return MappingResult(paths=paths, mapper="known poses", notes=[])


def _posed_model(database: Path, poses: Mapping[str, Pose]) -> Any:
    """A reconstruction of the database's cameras and those of its images that have a pose."""
    model = pycolmap.Reconstruction()
    with pycolmap.Database.open(database) as db:
        for camera in db.read_all_cameras():
            model.add_camera_with_trivial_rig(camera)
        for image in db.read_all_images():
            if image.name in poses:
                model.add_image_with_trivial_frame(image, _rigid(poses[image.name]))
    return model


def _rigid(pose: Pose) -> Any:
    return pycolmap.Rigid3d(np.column_stack(pose))


def _put_poses(model: Any, poses: Mapping[str, Pose]) -> None:
    """Undo what rounding did to poses that were held."""
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        if image.name in poses:
            model.frame(image.frame_id).set_cam_from_world(
                image.camera_id, _rigid(poses[image.name])
            )


def _align(model: Any, poses: Mapping[str, Pose]) -> None:
    """Move a model as a whole to where known poses are."""
    from gim_hloc.poses import similarity

    found = similarity(_poses_of(model), poses)
    if found is not None:
        scale, rotation, translation = found
        model.transform(
            pycolmap.Sim3d(scale, pycolmap.Rotation3d(rotation), np.asarray(translation))
        )


def _poses_of(model: Any) -> dict[str, Pose]:
    poses: dict[str, Pose] = {}
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        matrix = np.asarray(image.cam_from_world().matrix())
        poses[image.name] = (matrix[:, :3].copy(), matrix[:, 3].copy())
    return poses


# ---------------------------------------------------------------------------------- localisation


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
    poses = _poses_of(model)
    views = {}
    for image_id in sorted(model.reg_image_ids()):
        image = model.image(image_id)
        rows = image.points2D
        views[image.name] = MapView(
            xy_px=np.array([p.xy for p in rows], dtype=np.float64).reshape(-1, 2) - 0.5,
            points=np.array(
                [p.point3D_id if p.has_point3D() else -1 for p in rows], dtype=np.int64
            ),
            camera=camera_spec(model.camera(image.camera_id)),
            pose=poses[image.name],
        )
    return views


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
        places[row] = _project(source, np.column_stack([x, y, np.ones(found.width)])) - 0.5
    return found, places


def point_positions(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids (M,) int64, sorted, and positions (M, 3) of a model's points."""
    ids = np.array(sorted(model.point3D_ids()), dtype=np.int64)
    xyz = np.array([model.points3D[int(i)].xyz for i in ids], dtype=np.float64).reshape(-1, 3)
    return ids, xyz


@dataclass(kw_only=True)
class Located:
    """Pose of a single image.

    Attributes:
        pose: (R, t), world to camera.
        inliers: (N,) bool.
        error_px: mean reprojection error of the inliers.
        params: intrinsics, after refinement if there was any.
    """

    pose: Pose
    inliers: np.ndarray
    error_px: float
    params: tuple[float, ...]


def locate(
    xy_px: np.ndarray,
    xyz: np.ndarray,
    camera: CameraSpec,
    *,
    max_error: float,
    focal: Literal["known", "refine", "estimate"] = "known",
    confidence: float = 0.99999,
    max_trials: int = 10_000,
    seed: int = 0,
) -> Located | None:
    """Pose from points seen in an image: COLMAP's LO-RANSAC and refinement of all inliers.

    Args:
        xy_px: (N, 2) stored pixels, hloc's frame.
        xyz: (N, 3) where they are in the world.
        camera: intrinsics.
        max_error: largest reprojection error of an inlier, px.
        focal: known: kept; refine: a guess that is refined; estimate: found with the pose.
        confidence: of having drawn one sample without outliers.
        max_trials: samples at most.
        seed: of the samples.

    Returns:
        None when no pose was found.
    """
    if len(xy_px) < (5 if focal != "known" else 3):
        return None
    colmap_camera = pycolmap.Camera(
        model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
    )
    estimation = pycolmap.AbsolutePoseEstimationOptions()
    estimation.ransac.max_error = max_error
    estimation.ransac.confidence = confidence
    estimation.ransac.max_num_trials = max_trials
    estimation.ransac.random_seed = seed
    estimation.estimate_focal_length = focal == "estimate"
    refinement = pycolmap.AbsolutePoseRefinementOptions()
    refinement.refine_focal_length = focal != "known"
    refinement.print_summary = False
    xy_colmap = np.ascontiguousarray(xy_px, dtype=np.float64) + 0.5
    xyz = np.ascontiguousarray(xyz, dtype=np.float64)
    found = pycolmap.estimate_and_refine_absolute_pose(
        xy_colmap, xyz, colmap_camera, estimation, refinement
    )
    if found is None:
        return None
    matrix = np.asarray(found["cam_from_world"].matrix())
    pose = (matrix[:, :3].copy(), matrix[:, 3].copy())
    # What refinement moved decides again who is an inlier.
    local = xyz @ pose[0].T + pose[1]
    errors = np.full(len(xyz), np.inf)
    ahead = local[:, 2] > 0
    if ahead.any():
        distance = np.linalg.norm(_project(colmap_camera, local[ahead]) - xy_colmap[ahead], axis=1)
        errors[ahead] = np.where(np.isfinite(distance), distance, np.inf)
    inliers = errors <= max_error
    if not inliers.any():
        return None
    return Located(
        pose=pose,
        inliers=inliers,
        error_px=float(errors[inliers].mean()),
        params=tuple(float(p) for p in colmap_camera.params),
    )


def shared_focal(
    views: Sequence[tuple[np.ndarray, np.ndarray, Pose]], camera: CameraSpec
) -> tuple[float, ...]:
    """The focal length at which several images of one camera together fit their points best.

    It is searched for within a factor of 1.5 around that of ``camera``; the poses follow. Each
    image weighs as much as its points say about the focal length, unlike in a mean of its values.

    Args:
        views: of each image the inliers (N, 2), stored pixels, hloc's frame, their points (N, 3) in
            the world, and a pose (R, t), world to camera.
        camera: a first guess, e.g. with the median of what the images say one by one.

    Returns:
        Parameters of the camera; nothing but focal lengths is changed.
    """
    from scipy.optimize import minimize_scalar

    refinement = pycolmap.AbsolutePoseRefinementOptions()
    refinement.refine_focal_length = False
    refinement.print_summary = False
    data = []
    for xy_px, xyz, pose in views:
        rows = np.linspace(0, len(xy_px) - 1, min(len(xy_px), _FOCAL_POINTS)).astype(np.int64)
        xy_colmap = np.ascontiguousarray(xy_px[rows], dtype=np.float64) + 0.5
        data.append((xy_colmap, np.ascontiguousarray(xyz[rows], dtype=np.float64), _rigid(pose)))

    def scaled(log_scale: float) -> Any:
        found = pycolmap.Camera(
            model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
        )
        params = np.array(found.params)
        params[list(found.focal_length_idxs())] *= np.exp(log_scale)
        found.params = params.tolist()
        return found

    def cost(log_scale: float) -> float:
        used, total = scaled(log_scale), 0.0
        for xy_colmap, xyz, start in data:
            everything = np.ones(len(xyz), dtype=bool)
            found = pycolmap.refine_absolute_pose(
                start, xy_colmap, xyz, everything, used, refinement
            )
            matrix = np.asarray((start if found is None else found["cam_from_world"]).matrix())
            local = xyz @ matrix[:, :3].T + matrix[:, 3]
            local[:, 2] = np.maximum(local[:, 2], 1e-9)
            residual = ((_project(used, local) - xy_colmap) ** 2).sum(1)
            # Cauchy's loss of 1 px, which refinement minimises, too.
            total += float(np.log1p(np.nan_to_num(residual, nan=1e12)).sum())
        return total

    limit = float(np.log(1.5))
    best = minimize_scalar(cost, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-5})
    return tuple(float(p) for p in scaled(float(best.x)).params)


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
                cameras[_camera_key(camera_spec(model.camera(camera_id)))] = camera_id
    next_camera = max((*model.cameras.keys(), *model.rigs.keys()), default=0) + 1
    next_image = max((*model.images.keys(), *model.frames.keys()), default=0) + 1
    for new in images:
        key = _camera_key(new.camera)
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
        model.add_image_with_trivial_frame(image, _rigid(new.pose))
        for row in np.flatnonzero(new.points >= 0):
            element = pycolmap.TrackElement(next_image, int(row))
            model.add_observation(int(new.points[row]), element)
        next_image += 1


def _camera_key(camera: CameraSpec) -> tuple[Any, ...]:
    return (camera.model, camera.width, camera.height, camera.params)


def write_model(model: Any, folder: Path) -> None:
    """Write a model in binary form, replacing what is there once it is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


# ------------------------------------------------------------------------------------- refinement


def refine_tracks(
    model: Any,
    gray: Callable[[str], np.ndarray],
    *,
    options: PhotometricOptions,
    fixed: set[int],
    threads: int = -1,
    progress: Callable[[], None] | None = None,
    held: Collection[str] = (),
) -> str:
    """Move a model's observations by comparing patches, and adjust poses and points to them.

    Observations that no patch confirms are dropped from their track, but an image that would be
    left with fewer than ``options.min_confirmed`` keeps all of its own. A model that would lose
    more than half of its points is left as it was.

    Args:
        model: ``pycolmap.Reconstruction``, changed in place.
        gray: name -> (H, W) float32 grey values of the stored image.
        options: see ``gim_hloc.tracks.photometric``.
        fixed: ids of the cameras whose intrinsics must not move.
        threads: of the bundle adjustment, and images at a time; -1 takes all cores.
        progress: called after each image of each round.
        held: images whose poses must not move.

    Returns:
        A sentence for the log.
    """
    import copy

    from gim_hloc.tracks import photometric

    before = statistics(model)
    if not before["points"]:
        return "no points to refine"
    original = copy.deepcopy(model)
    confirmed_share = 0.0
    for round_ in range(options.rounds):
        if not model.num_points3D():
            break  # nothing was confirmed: the original is put back below
        images = [model.image(i) for i in sorted(model.reg_image_ids())]
        ids = np.array(sorted(model.point3D_ids()))
        views, rows = _views(model, images, ids)
        reference, shapes = _patch_shapes(model, images, ids, views, options)

        def read(index: int, names: list[str] = [i.name for i in images]) -> np.ndarray:  # noqa: B006
            if progress is not None:
                progress()
            return gray(names[index])

        xy_px, confirmed = photometric.refine_positions(
            views,
            reference,
            shapes,
            read,
            len(images),
            options,
            workers=threads if threads > 0 else os.cpu_count() or 1,
        )
        confirmed_share = float(confirmed.mean())
        others = np.ones(len(confirmed), dtype=bool)
        others[reference] = False
        if round_ == 0 and confirmed[others].mean() < options.min_share:
            return (
                "kept as it was: patches confirm only "
                f"{confirmed[others].mean():.0%} of the observations"
            )
        for index, image in enumerate(images):
            mine = np.flatnonzero(views.image == index)
            for k in mine[confirmed[mine]]:
                image.points2D[rows[k]].xy = xy_px[k] + 0.5
            if confirmed[mine].sum() < options.min_confirmed:
                continue
            for k in mine[~confirmed[mine]]:
                point_id = int(ids[views.track[k]])
                if model.exists_point3D(point_id):  # goes with its last but one observation
                    model.delete_observation(image.image_id, int(rows[k]))
        _adjust(model, fixed, threads, held)
        # Refined observations agree far better than COLMAP's 4 px ask.
        limit = 4.0 if round_ == 0 else 2.0
        pycolmap.ObservationManager(model).filter_all_points3D(limit, 1.5)
        _adjust(model, fixed, threads, held)
    model.update_point_3d_errors()
    after = statistics(model)
    if after["points"] < 0.5 * before["points"]:
        _restore(model, original)
        return (
            f"kept as it was: patches confirm only {after['points']:.0f} of "
            f"{before['points']:.0f} points"
        )
    return (
        f"refined by patches: {before['mean_reprojection_error_px']:.2f} -> "
        f"{after['mean_reprojection_error_px']:.2f} px, {confirmed_share:.0%} of "
        f"{after['observations']:.0f} observations confirmed, "
        f"{before['points']:.0f} -> {after['points']:.0f} points"
    )


def _restore(model: Any, original: Any) -> None:
    """Put positions, poses, cameras and points of ``original`` back into ``model``."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        original.write(folder)
        model.read(folder)


def _views(model: Any, images: Sequence[Any], ids: np.ndarray) -> tuple[Any, np.ndarray]:
    """All observations, and the row of each among its image's keypoints."""
    from gim_hloc.tracks.photometric import TrackViews

    index_of = {int(point_id): i for i, point_id in enumerate(ids)}
    track, image_index, xy, rows = [], [], [], []
    for index, image in enumerate(images):
        for row, point in enumerate(image.points2D):
            if point.has_point3D():
                track.append(index_of[point.point3D_id])
                image_index.append(index)
                xy.append(point.xy)
                rows.append(row)
    views = TrackViews(track=np.array(track), image=np.array(image_index), xy_px=np.array(xy) - 0.5)
    return views, np.array(rows, dtype=np.int64)


def _patch_shapes(
    model: Any,
    images: Sequence[Any],
    ids: np.ndarray,
    views: Any,
    options: PhotometricOptions,
) -> tuple[np.ndarray, np.ndarray]:
    """Reference row of each track, and (K, 2, 2) shape of its patch in every observation."""
    from gim_hloc.tracks import photometric

    xyz = np.array([model.points3D[int(i)].xyz for i in ids])
    poses = [np.asarray(image.cam_from_world().matrix()) for image in images]
    centres = np.array([-pose[:, :3].T @ pose[:, 3] for pose in poses])
    rays = centres[views.image] - xyz[views.track]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    towards = np.zeros_like(xyz)
    np.add.at(towards, views.track, rays)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    normals = photometric.local_normals(xyz, towards, neighbours=options.neighbours)
    axes = photometric.tangents(normals)
    jacobian = np.zeros((len(views.track), 2, 2))  # pixels for a unit along each tangent
    for index, image in enumerate(images):
        mine = np.flatnonzero(views.image == index)
        camera, pose = model.camera(image.camera_id), poses[index]
        points_here = xyz[views.track[mine]]
        depth = points_here @ pose[2, :3] + pose[2, 3]
        step = (depth / camera.mean_focal_length())[:, None]  # about a pixel
        for column, axis in enumerate(axes):
            offset = step * axis[views.track[mine]]
            ahead, behind = (
                _project(camera, (points_here + sign * offset) @ pose[:, :3].T + pose[:, 3])
                for sign in (1, -1)
            )
            jacobian[mine, :, column] = (ahead - behind) / (2 * step)
    determinant = np.linalg.det(jacobian)
    footprint = np.sqrt(np.abs(determinant))
    reference = photometric.pick_references(views, footprint, len(ids))
    # A plane seen edge-on has no inverse; such tracks are then found not comparable.
    own = jacobian[reference].copy()
    own[np.abs(np.linalg.det(own)) < 1e-9] = np.eye(2)
    shapes = jacobian @ np.linalg.inv(own)[views.track]
    return reference, np.nan_to_num(shapes)


def _project(camera: Any, points_in_camera: np.ndarray) -> np.ndarray:
    """Pixels (N, 2), corner origin; NaN where a point cannot be projected."""
    projected = camera.img_from_cam(points_in_camera)
    if isinstance(projected, np.ndarray) and projected.dtype == np.float64:
        return projected.reshape(-1, 2)
    return np.array(
        [(np.nan, np.nan) if p is None else p for p in projected], dtype=np.float64
    ).reshape(-1, 2)


def _adjust(model: Any, fixed: set[int], threads: int, held: Collection[str] = ()) -> None:
    """Bundle-adjust a whole model, but not the poses of the images ``held``."""
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.solver_options.num_threads = threads
    config = pycolmap.BundleAdjustmentConfig()
    used = set()
    for image_id in model.reg_image_ids():
        config.add_image(image_id)
        image = model.image(image_id)
        used.add(int(image.camera_id))
        if image.name in held:
            config.set_constant_rig_from_world_pose(image.frame_id)
    for camera_id in fixed & used:
        config.set_constant_cam_intrinsics(camera_id)
    if config.num_constant_rig_from_world_poses() < 2:  # the world is not held in place otherwise
        config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    pycolmap.create_default_bundle_adjuster(options, config, model).solve()


# ---------------------------------------------------------------------------------- reading models


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
    try:
        model = pycolmap.Reconstruction(folder)
    except Exception as error:
        raise InputError(f"{folder} is not a readable COLMAP model: {error}") from None
    if not (folder / "images.bin").is_file():
        # COLMAP's text reader ends a name at its first blank; its writer does not.
        for image_id, name in _image_names(folder / "images.txt").items():
            if model.exists_image(image_id) and " " in name:
                model.image(image_id).name = name
    return model


def find_model(path: Path | str) -> Path:
    """The folder at or below ``path`` (``sparse/0``, ``sparse``, ``0``) that holds a model."""
    root = Path(path)
    for folder in (root, root / "sparse" / "0", root / "sparse", root / "0"):
        for suffix in (".bin", ".txt"):
            if all((folder / f"{stem}{suffix}").is_file() for stem in _MODEL_FILES):
                return folder
    raise InputError(
        f"{root} holds no COLMAP model (cameras, images and points3D as .bin or .txt; also looked "
        "in sparse/0)."
    )


def model_cameras(path: Path | str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Poses of a model: name -> (R (3, 3), t (3,)), world to camera, in model units."""
    return _poses_of(read_model(path))


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
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        camera = model.camera(image.camera_id)
        pose = np.asarray(image.cam_from_world().matrix())
        observed = [p for p in image.points2D if p.has_point3D()]
        errors = np.zeros(0)
        if observed:
            xyz = np.array([model.point3D(p.point3D_id).xyz for p in observed])
            xy = np.array([p.xy for p in observed])
            projected = np.array(
                [
                    q if (q := camera.img_from_cam(p)) is not None else (np.nan, np.nan)
                    for p in xyz @ pose[:, :3].T + pose[:, 3]
                ]
            )
            errors = np.linalg.norm(projected - xy, axis=1)
        result[image.name] = ImageStatistics(
            camera_id=int(image.camera_id),
            points=len(observed),
            mean_reprojection_error_px=float(np.nanmean(errors)) if observed else None,
            errors_px=errors,
            focal_px=float(camera.mean_focal_length()),
            rotation=pose[:, :3].copy(),
            translation=pose[:, 3].copy(),
        )
    return result


def points(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points of a model.

    Returns:
        xyz (M, 3) float64, rgb (M, 3) uint8, views a track (M,) int64, reprojection errors (M,) px.
    """
    all_points = [model.points3D[i] for i in sorted(model.point3D_ids())]
    if not all_points:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8), np.zeros(0, np.int64), np.zeros(0)
    return (
        np.array([p.xyz for p in all_points]),
        np.array([p.color for p in all_points], dtype=np.uint8),
        np.array([p.track.length() for p in all_points]),
        np.array([p.error for p in all_points]),
    )


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


def inlier_matches(database: Path, pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Verified matches (M, 2) of some pairs, in their order; empty where there are none."""
    with pycolmap.Database.open(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        result = []
        for name0, name1 in pairs:
            if not db.exists_two_view_geometry(ids[name0], ids[name1]):
                result.append(np.zeros((0, 2), np.uint32))
                continue
            geometry = db.read_two_view_geometry(ids[name0], ids[name1])
            result.append(np.asarray(geometry.inlier_matches))
        return result


def read_verification(database: Path, pairs: Sequence[tuple[str, str]]) -> list[PairVerification]:
    """What verification left of each pair, from a database that ``build_database`` wrote."""
    with pycolmap.Database.open(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        matches = dict(zip(*db.read_num_matches(), strict=True))
        inliers = dict(zip(*db.read_two_view_geometry_num_inliers(), strict=True))
    result = []
    for name0, name1 in pairs:
        pair_id = pycolmap.image_pair_to_pair_id(ids[name0], ids[name1])
        result.append(
            PairVerification(
                name0=name0,
                name1=name1,
                matches=int(matches.get(pair_id, 0)),
                inliers=int(inliers.get(pair_id, 0)),
            )
        )
    return result


def version() -> str:
    """Version of the installed pycolmap."""
    return str(pycolmap.__version__)


def has_cuda() -> bool:
    """Whether this pycolmap was built with CUDA (needed by PatchMatch stereo)."""
    return bool(pycolmap.has_cuda)


def set_seed(seed: int) -> None:
    """Seed COLMAP's global random numbers."""
    pycolmap.set_random_seed(seed)


# ---------------------------------------------------------------------------------------- baseline


def sift_baseline(
    images: Path,
    output: Path,
    *,
    cameras: Sequence[CameraSpec],
    max_features: int = 8192,
    seed: int = 0,
    log_dir: Path | None = None,
) -> MappingResult:
    """COLMAP as it comes: its SIFT, its exhaustive matching, its incremental mapping.

    What a reconstruction is compared with, on the same images and cameras.

    Args:
        images: image root.
        output: gets ``database.db`` and ``sparse/``.
        cameras: one camera with known parameters is given to COLMAP and kept; several, or a
            guessed one, are left to COLMAP's own AUTO mode.
        max_features: SIFT features an image (COLMAP's default is 8192).
        seed: of COLMAP's random numbers.
        log_dir: where COLMAP's own log goes.
    """
    output.mkdir(parents=True, exist_ok=True)
    database = output / "database.db"
    database.unlink(missing_ok=True)
    given = len(cameras) == 1 and cameras[0].given
    reader = pycolmap.ImageReaderOptions()
    if given:
        reader.camera_model = cameras[0].model
        reader.camera_params = ",".join(repr(p) for p in cameras[0].params)
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.sift.max_num_features = max_features
    extraction.use_gpu = False
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu = False
    with _colmap_log(log_dir):
        pycolmap.extract_features(
            database,
            images,
            camera_mode=pycolmap.CameraMode.SINGLE
            if len(cameras) == 1
            else pycolmap.CameraMode.AUTO,
            reader_options=reader,
            extraction_options=extraction,
        )
        pycolmap.match_exhaustive(database, matching_options=matching)
    return run_mapping(
        database,
        output / "sparse",
        options=MapOptions(),
        cameras=cameras,
        seed=seed,
        log_dir=log_dir,
    )


# ----------------------------------------------------------------------------------------- dense


def undistort(images: Path, model: Path, output: Path) -> None:
    """Write undistorted images and their pinhole model, laid out as splatting programs expect.

    Args:
        images: image root.
        model: sparse model folder.
        output: gets ``images/`` and ``sparse/0/`` (and COLMAP's ``stereo/`` for MVS).
    """
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
    with _colmap_log(log_dir):
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


# --------------------------------------------------------------------------- refinement by warps


def refine_by_warps(
    model: Any,
    warp: Callable[[str, str], Warp],
    pairs: Sequence[tuple[str, str]],
    *,
    options: RefineOptions,
    fixed: set[int],
    threads: int = -1,
    progress: Callable[[], None] | None = None,
    held: Collection[str] = (),
) -> str:
    """Read the warps of a dense matcher again at a model's points, and adjust the model to them.

    Observations move to the mean of what the warps from all other images of their track say;
    those that the warps deny are dropped; images that two or more warps find a point in join its
    track. A model that would lose more than half of its points is left as it was.

    Args:
        model: ``pycolmap.Reconstruction``, changed in place.
        warp: (name0, name1) of a pair -> its warp; called once a pair and round.
        pairs: all pairs that can be asked for.
        options: see ``gim_hloc.tracks.refine``.
        fixed: ids of the cameras whose intrinsics must not move.
        threads: of the bundle adjustment; -1 takes all cores.
        progress: called after each pair of each round.
        held: images whose poses must not move.

    Returns:
        A sentence for the log.
    """
    import copy

    from gim_hloc.tracks.refine import read_again

    before = statistics(model)
    if not before["points"]:
        return "no points to read the warps at"
    original = copy.deepcopy(model)
    joined = dropped = 0
    for round_ in range(options.rounds):
        if not model.num_points3D():
            break  # the warps deny everything: the original is put back below
        images = [model.image(i) for i in sorted(model.reg_image_ids())]
        ids = np.array(sorted(model.point3D_ids()))
        views, rows = _views(model, images, ids)
        found = read_again(
            [image.name for image in images],
            [_size(model.camera(image.camera_id)) for image in images],
            [views.track[views.image == index] for index in range(len(images))],
            _projection(model, images, ids),
            pairs,
            warp,
            options,
            progress,
        )
        row_of = dict(
            zip((views.track * len(images) + views.image).tolist(), rows.tolist(), strict=True)
        )
        for point, index, xy, agreeing, against in zip(
            ids[found.point].tolist(),
            found.image.tolist(),
            found.xy_px + 0.5,
            found.agreeing.tolist(),
            found.against.tolist(),
            strict=True,
        ):
            image = images[index]
            row = row_of.get(int(np.searchsorted(ids, point)) * len(images) + index)
            if row is not None and agreeing:
                image.points2D[row].xy = xy
            elif row is not None and against and model.exists_point3D(point):
                model.delete_observation(image.image_id, row)
                dropped += 1
            elif row is None and agreeing >= options.min_readings and model.exists_point3D(point):
                image.points2D.append(pycolmap.Point2D(xy))
                element = pycolmap.TrackElement(image.image_id, len(image.points2D) - 1)
                model.add_observation(point, element)
                joined += 1
        _adjust(model, fixed, threads, held)
        pycolmap.ObservationManager(model).filter_all_points3D(4.0 if round_ == 0 else 2.0, 1.5)
        _adjust(model, fixed, threads, held)
    model.update_point_3d_errors()
    after = statistics(model)
    if after["points"] < 0.5 * before["points"]:
        _restore(model, original)
        return (
            f"kept as it was: the warps agree with only {after['points']:.0f} of "
            f"{before['points']:.0f} points"
        )
    return (
        f"refined by the warps: {before['mean_reprojection_error_px']:.2f} -> "
        f"{after['mean_reprojection_error_px']:.2f} px, images a point "
        f"{before['mean_track_length']:.1f} -> {after['mean_track_length']:.1f}, {joined} "
        f"observations added and {dropped} dropped, "
        f"{before['points']:.0f} -> {after['points']:.0f} points"
    )


def _size(camera: Any) -> tuple[int, int]:
    return int(camera.width), int(camera.height)


def _projection(
    model: Any, images: Sequence[Any], ids: np.ndarray
) -> Callable[[int, np.ndarray], np.ndarray]:
    """(index of an image, indices of points) -> pixels in hloc's frame, NaN for points unseen."""
    xyz = np.array([model.points3D[int(i)].xyz for i in ids])
    cameras = [model.camera(image.camera_id) for image in images]
    poses = [np.asarray(image.cam_from_world().matrix()) for image in images]

    def project(index: int, points: np.ndarray) -> np.ndarray:
        local = xyz[points] @ poses[index][:, :3].T + poses[index][:, 3]
        xy = np.full((len(points), 2), np.nan)
        ahead = local[:, 2] > 0
        if ahead.any():
            xy[ahead] = _project(cameras[index], local[ahead])
        with np.errstate(invalid="ignore"):
            inside = (xy > 0).all(1) & (xy < _size(cameras[index])).all(1)
        xy[~inside] = np.nan
        return xy - 0.5

    return project


__all__ = [
    "AUTO_GLOBAL_ABOVE",
    "CameraOptions",
    "CameraSpec",
    "ImageStatistics",
    "Located",
    "MapOptions",
    "MapView",
    "MappingResult",
    "NewImage",
    "PairVerification",
    "VerifyOptions",
    "add_images",
    "assign_cameras",
    "build_database",
    "camera_param_count",
    "camera_spec",
    "cameras_of",
    "find_model",
    "fixed_cameras",
    "has_cuda",
    "image_statistics",
    "inlier_matches",
    "locate",
    "map_views",
    "model_cameras",
    "model_observations",
    "model_statistics",
    "parse_intrinsics",
    "pinhole",
    "point_positions",
    "points",
    "poses_and_cameras",
    "read_model",
    "read_verification",
    "refine_by_warps",
    "refine_tracks",
    "resolve_mapper",
    "run_dense",
    "run_mapping",
    "set_seed",
    "sift_baseline",
    "statistics",
    "triangulate_known",
    "undistort",
    "version",
    "write_model",
]
