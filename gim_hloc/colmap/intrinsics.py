"""Intrinsics that nobody gave: which of them the images determine, and which images share them.

A scene need not determine its cameras. From the air over flat ground a longer focal length with a
higher flight explains the images as well, and every adjustment drifts along that valley. The
standard errors of an adjustment say so: the covariance of its parameters, times the variance of
its residuals, agrees with the scatter of adjustments to random halves of the points within a factor
of 1.5 (docs/accuracy.md).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, guessed_again
from gim_hloc.colmap.database import copy_with_cameras, inlier_counts, verified_components
from gim_hloc.colmap.improve import adjuster, bundle_adjust
from gim_hloc.colmap.mapping import (
    ENOUGH,
    MapJob,
    Mapped,
    extend_models,
    map_once,
    quality,
    run_mapping,
)
from gim_hloc.colmap.model import colmap_log, image_statistics
from gim_hloc.errors import MappingError, some

logger = logging.getLogger(__name__)

# Standard errors in px for 1,000 px of the image's longer side. Adjustments that freed what passes
# these came nearer to measured poses on every set tried; beyond, they went away from them.
MAX_FOCAL_STDERR = 4.0
MAX_PRINCIPAL_STDERR = 1.5

# Relative gap between the focal lengths of two zooms; what one lens does when it focuses is below.
ZOOM_GAP = 0.03
# Up to so many connected images, mapping anew is cheap beside what it may win.
_MAPPED_ANEW = 100
# Share of the longer side that a principal point is off the middle in a crop, not by a lens.
_CROP = 0.08
# Relative standard error of a focal length that says nothing about zooms.
_VAGUE = 0.05
# Verified matches with a model that COLMAP asks of an image to register it.
_MIN_INLIERS = 30


@dataclass(kw_only=True)
class Determined:
    """What the images say about one camera.

    Attributes:
        focal_stderr_px: of the focal length; the principal point is free where determined too.
        principal_stderr_px: the larger one of the principal point's.
        focal: whether the focal length and the distortion are determined.
        principal: whether the principal point is too.
    """

    focal_stderr_px: float
    principal_stderr_px: float
    focal: bool
    principal: bool


def standard_errors(
    model: Any,
    fixed: set[int],
    threads: int,
    *,
    principal_point: bool,
    robust_px: float | None = None,
) -> dict[int, tuple[float, float]]:
    """Camera id -> standard errors of focal length and principal point, px; infinite if unknown.

    Args:
        model: ``pycolmap.Reconstruction`` after an adjustment.
        fixed: ids of cameras whose intrinsics are known; they have no errors.
        threads: of the solver.
        principal_point: whether principal points are unknown too; else their errors are 0.
        robust_px: of the adjustment's loss.
    """
    cameras = _cameras(model) - fixed
    if not cameras or not model.num_points3D():
        return dict.fromkeys(cameras, (math.inf, math.inf))
    problem = adjuster(model, fixed, threads, (), robust_px, principal_point=principal_point)
    # COLMAP's damping of 1e-8 leaves some problems without an inverse; this bounds errors at a
    # thousand times the residuals.
    options = pycolmap.BACovarianceOptions(damping=1e-6)
    covariance = pycolmap.estimate_ba_covariance(options, model, problem)
    residual = residual_variance(model, robust_px)
    errors = {}
    for camera_id in cameras:
        camera = model.camera(camera_id)
        # The camera's own array: COLMAP finds the block by its address.
        block = None if covariance is None else covariance.get_other_params_cov(camera.params)
        if block is None or residual is None:
            errors[camera_id] = (math.inf, math.inf)
            continue
        focal, principal = camera.focal_length_idxs(), camera.principal_point_idxs()
        free = [i for i in range(len(camera.params)) if principal_point or i not in principal]
        variance = dict(zip(free, np.diag(block) * residual, strict=True))
        errors[camera_id] = (
            math.sqrt(max(variance[i] for i in focal)),
            math.sqrt(max(variance.get(i, 0.0) for i in principal)),
        )
    return errors


def residual_variance(model: Any, robust_px: float | None = None) -> float | None:
    """Of a coordinate, px^2, as an adjustment left them; None if nothing is overdetermined."""
    squares = np.concatenate([i.errors_px for i in image_statistics(model).values()]) ** 2
    if robust_px is not None:  # weighted as by the loss
        squares /= 1 + squares / robust_px**2
    spare = 2 * len(squares) - 3 * model.num_points3D() - 6 * model.num_reg_images()
    return float(squares.sum()) / spare if spare > 0 else None


def determined(
    model: Any, fixed: set[int], threads: int, robust_px: float | None = None
) -> dict[int, Determined]:
    """What the images determine of each camera that is not ``fixed``."""
    found = {}
    if not _cameras(model) - fixed or not model.num_points3D():
        return {}
    # Errors are those of a minimum: a wrong principal point leaves residuals that are no noise.
    freed = copy.deepcopy(model)
    adjuster(freed, fixed, threads, (), robust_px, principal_point=True).solve()
    free = standard_errors(freed, fixed, threads, principal_point=True, robust_px=robust_px)
    held: dict[int, tuple[float, float]] = {}
    for camera_id, (focal, principal) in free.items():
        size = _size(model.camera(camera_id))
        both = focal <= MAX_FOCAL_STDERR * size and principal <= MAX_PRINCIPAL_STDERR * size
        if not both:
            held = held or standard_errors(
                model, fixed, threads, principal_point=False, robust_px=robust_px
            )
            focal = held[camera_id][0]
        found[camera_id] = Determined(
            focal_stderr_px=focal,
            principal_stderr_px=principal,
            focal=both or focal <= MAX_FOCAL_STDERR * size,
            principal=both,
        )
    return found


def unknown_cameras(model: Any, job: MapJob) -> set[int]:
    """Ids of the cameras of a model whose intrinsics are neither given nor held by fixed poses."""
    if job.poses is not None and job.pose_use == "fixed":
        return set()
    given = {camera_id for camera_id, spec in enumerate(job.cameras, 1) if spec.given}
    return _cameras(model) - job.fixed - given


def hold_undetermined(model: Any, job: MapJob) -> set[int]:
    """Put focal lengths that the images do not determine back to EXIF's, after mapping, in place.

    Returns:
        Ids of the cameras that the images do not determine, to be held while keypoints move.
    """
    fixed = _cameras(model) - unknown_cameras(model, job)
    errors = standard_errors(model, fixed, job.threads, principal_point=False)
    weak = {
        camera_id
        for camera_id, (focal, _) in errors.items()
        if focal > MAX_FOCAL_STDERR * _size(model.camera(camera_id))
    }
    stated = [camera_id for camera_id in weak if job.cameras[camera_id - 1].prior]
    for camera_id in stated:
        camera = model.camera(camera_id)
        for index in camera.focal_length_idxs():
            camera.params[index] = job.cameras[camera_id - 1].params[index]
    if stated and model.num_points3D():
        bundle_adjust(model, fixed | weak, job.threads)
    return weak


def settle(
    model: Any,
    job: MapJob,
    before: Mapping[int, Sequence[float]],
    robust_px: float | None = None,
) -> tuple[list[str], dict[int, Determined]]:
    """Adjust a finished model once more, each camera as far as the images determine it, in place.

    Args:
        model: ``pycolmap.Reconstruction``.
        job: of its mapping.
        before: camera id -> parameters that cameras are held at which are not determined.
        robust_px: scale of a Cauchy loss, as in ``bundle_adjust``.

    Returns:
        A sentence for each kind of what was done, and what the images determine of each camera.
    """
    cameras = _cameras(model)
    found = determined(model, cameras - unknown_cameras(model, job), job.threads, robust_px)
    if not found:
        return [], {}
    principal = {camera_id for camera_id, one in found.items() if one.principal}
    focal = {camera_id for camera_id, one in found.items() if one.focal} - principal
    held = found.keys() - principal - focal
    for camera_id in held:
        model.camera(camera_id).params = list(before[camera_id])
    # One switch frees the principal points of all cameras: two adjustments.
    if principal:
        others = cameras - principal
        adjuster(model, others, job.threads, (), robust_px, principal_point=True).solve()
    if focal or held:
        bundle_adjust(model, cameras - focal, job.threads, robust_px=robust_px)
    model.update_point_3d_errors()
    notes = []
    if principal:
        notes.append(
            "the images determine the principal point of "
            + _listed(principal, lambda i: _pixels(found[i].principal_stderr_px))
            + ", and it was refined."
        )
    if held:
        stated = {i for i in held if job.cameras[i - 1].prior}
        for ids, where in ((stated, "EXIF has it"), (held - stated, "mapping put it")):
            if ids:
                notes.append(
                    "the images do not determine the focal length of "
                    + _listed(ids, lambda i: _pixels(found[i].focal_stderr_px))
                    + f"; it was held where {where}."
                )
    return notes, found


def describe_intrinsics(
    model: Any, job: MapJob, found: Mapping[int, Determined]
) -> dict[int, dict[str, Any]]:
    """Camera id -> where its intrinsics are from and what ``settle`` found, for the report."""
    described: dict[int, dict[str, Any]] = {}
    for camera_id in _cameras(model):
        spec, camera = job.cameras[camera_id - 1], model.camera(camera_id)
        principal = camera.principal_point_idxs()
        row: dict[str, Any] = {
            "source": "given" if spec.given else "EXIF" if spec.prior else "guessed",
            "refined": camera_id not in job.fixed,
        }
        one = found.get(camera_id)
        if one is not None:
            row["refined"] = one.focal
            row["principal_point_refined"] = any(
                camera.params[i] != spec.params[i] for i in principal
            )
            if math.isfinite(one.focal_stderr_px):
                row["focal_stderr_px"] = one.focal_stderr_px
                row["principal_point_stderr_px"] = one.principal_stderr_px
        described[camera_id] = row
    return described


def _pixels(error: float) -> str:
    return f"{error:.2g} px" if math.isfinite(error) else "without bound"


def _listed(ids: set[int], error: Callable[[int], str]) -> str:
    shown = [f"{camera_id} (standard error {error(camera_id)})" for camera_id in sorted(ids)]
    return ("camera " if len(ids) == 1 else f"{len(ids)} cameras: ") + some(shown, 3)


# ------------------------------------------------------------------------------------------- zooms


@dataclass(kw_only=True)
class Grouped:
    """Models of a scene and the cameras that they have after all, as in the database."""

    cameras: Sequence[CameraSpec]
    models: list[Any]
    notes: list[str]


def map_scene(job: MapJob, *, split: bool, start: Sequence[Any] = ()) -> Grouped:
    """Map a verified database, with the cameras changed where they do not fit the images.

    Focal lengths from EXIF with which mapping fails are forgotten. With ``split``, cameras whose
    images were taken at several zooms are parted. The database is rewritten where that helps.

    Args:
        job: what is mapped.
        split: whether cameras may be parted.
        start: models of the database before it grew. They are extended; a small set of which they
            still lack an image, or a large one of which they lack much, is mapped anew too, and the
            better model is kept.

    Raises:
        MappingError: as ``run_mapping``.
    """
    component = len(next(iter(verified_components(job.database)), ()))
    extended = Grouped(cameras=job.cameras, models=[], notes=[])
    if start:
        extended.models = extend_models(job, start).models
        wanted = component if component <= _MAPPED_ANEW else ENOUGH * component
        if quality(extended.models[0])[0] >= wanted:
            return extended
    failure: MappingError | None = None
    try:
        mapped = run_mapping(job)
        grouped = Grouped(cameras=job.cameras, models=mapped.models, notes=mapped.notes)
    except MappingError as error:
        failure = error
        grouped = Grouped(cameras=job.cameras, models=[], notes=[])
    if not grouped.models or grouped.models[0].num_reg_images() < ENOUGH * component:
        grouped = _without_priors(job, grouped)
    if start and (not grouped.models or quality(grouped.models[0]) <= quality(extended.models[0])):
        return extended
    if not grouped.models:
        raise failure or MappingError("No model came out.")
    if split:
        grouped = _regroup(dataclasses.replace(job, cameras=grouped.cameras), grouped)
    return grouped


def _try_cameras(
    job: MapJob, cameras: Sequence[CameraSpec], better: Callable[[Sequence[Any]], bool]
) -> Mapped | None:
    """Map with other cameras; the database gets them if the models are ``better``."""
    other = job.database.with_name("database.other.db")
    try:
        copy_with_cameras(job.database, other, cameras)
        mapped = run_mapping(dataclasses.replace(job, cameras=cameras, database=other))
        if not better(mapped.models):
            return None
        os.replace(other, job.database)
        return mapped
    except MappingError:
        return None
    finally:
        other.unlink(missing_ok=True)


def _without_priors(job: MapJob, before: Grouped) -> Grouped:
    """The same with focal lengths guessed where they came from EXIF, if that places more images."""
    doubted = [spec for spec in job.cameras if spec.prior and not spec.given]
    if not doubted:
        return before
    cameras = [guessed_again(spec) if spec in doubted else spec for spec in job.cameras]
    placed = before.models[0].num_reg_images() if before.models else 0
    mapped = _try_cameras(job, cameras, lambda models: models[0].num_reg_images() > placed)
    if mapped is None:
        return before
    note = (
        f"With the focal lengths in EXIF ({some([f'{s.params[0]:.0f} px' for s in doubted], 3)}) "
        f"COLMAP placed {placed} images, without them {mapped.models[0].num_reg_images()}: they "
        "were not used."
    )
    logger.warning("%s", note)
    return Grouped(cameras=cameras, models=mapped.models, notes=[note, *mapped.notes])


def _regroup(job: MapJob, before: Grouped) -> Grouped:
    """Part cameras whose images were taken at several zooms, and map again.

    Images of one size without EXIF, or cropped after EXIF was written, start with one camera. If
    focal lengths adjusted image by image differ, or images stay out though verified pairs join them
    to the model, the scene is mapped with a camera for each image; where the focal lengths found
    then have gaps, the cameras are parted.
    """
    shared = [
        spec
        for camera_id, spec in enumerate(job.cameras, 1)
        if camera_id not in job.fixed and not spec.given and len(spec.names) > 1
    ]
    if not shared:
        return before
    alone = _cameras_alone(before.models, job, free=False)
    if all(len(_zooms(spec.names, alone)) == 1 for spec in shared) and not _left_out(
        job, before.models[0], shared
    ):
        return before
    others = [spec for spec in job.cameras if spec not in shared]
    single = [dataclasses.replace(spec, names=[name]) for spec in shared for name in spec.names]
    apart = dataclasses.replace(
        job, cameras=[*others, *single], database=job.database.with_name("database.apart.db")
    )
    try:
        copy_with_cameras(job.database, apart.database, apart.cameras)
        models = map_once(apart, relaxed=False)  # to see focal lengths, not to place all
        alone = _cameras_alone(models, apart, free=True)
        # Crops need their principal points; where these leave focal lengths vague, without.
        if any(one.error > _VAGUE for one in alone.values()):
            alone = _cameras_alone(models, apart, free=False)
    finally:
        apart.database.unlink(missing_ok=True)
    cameras: list[CameraSpec] = []
    notes = []
    for spec in job.cameras:
        zooms = _zooms(spec.names, alone) if spec in shared else [spec.names]
        if len(zooms) == 1:
            cameras.append(spec)
            continue
        parts = sorted(
            (_at_zoom(spec, names, alone) for names in zooms), key=lambda part: part.params[0]
        )
        cameras += parts
        notes.append(
            f"Images of {spec.width}x{spec.height} pixels were taken at {len(parts)} focal lengths "
            "(zoomed or cropped) and have a camera for each: "
            + "; ".join(f"about {part.params[0]:.0f} px, {some(part.names, 3)}" for part in parts)
            + "."
        )
    mapped = None
    if notes:  # drifting focal lengths give as many images, in a model that falls apart
        placed, _ = quality(before.models[0])
        mapped = _try_cameras(job, cameras, lambda models: quality(models[0])[0] >= placed)
    if mapped is None:
        return before
    for note in notes:
        logger.warning("%s", note)
    return Grouped(cameras=cameras, models=mapped.models, notes=[*notes, *mapped.notes])


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """One image's camera, adjusted for this image alone."""

    focal_px: float
    error: float  # relative standard error of the focal length
    params: tuple[float, ...]


def _cameras_alone(models: Iterable[Any], job: MapJob, *, free: bool) -> dict[str, _Alone]:
    """Image -> its camera adjusted alone, with the principal point ``free`` or not."""
    found: dict[str, _Alone] = {}
    with colmap_log(job.log_dir):
        for model in models:
            known = {i for i in model.reg_image_ids() if _is_known(model.image(i).name, job)}
            own = _camera_each(model)
            adjuster(own, known, job.threads, principal_point=free).solve()
            errors = standard_errors(own, known, job.threads, principal_point=free)
            for camera_id, (error, _) in errors.items():
                camera = own.camera(camera_id)
                focal = float(camera.mean_focal_length())
                one = _Alone(
                    focal_px=focal,
                    error=error / focal if focal > 0 else math.inf,
                    params=tuple(float(p) for p in camera.params),
                )
                found.setdefault(own.image(camera_id).name, one)
    return found


def _is_known(name: str, job: MapJob) -> bool:
    return any(
        name in spec.names and (spec.given or camera_id in job.fixed)
        for camera_id, spec in enumerate(job.cameras, 1)
    )


def _camera_each(model: Any) -> Any:
    """A copy of a model whose images have a camera each, of the image's id."""
    own = pycolmap.Reconstruction()
    for image_id in sorted(model.reg_image_ids()):
        image = model.image(image_id)
        camera = copy.deepcopy(model.camera(image.camera_id))
        camera.camera_id = image_id
        own.add_camera_with_trivial_rig(camera)
        alone = pycolmap.Image(name=image.name, camera_id=image_id, image_id=image_id)
        alone.points2D = pycolmap.Point2DList([pycolmap.Point2D(p.xy) for p in image.points2D])
        own.add_image_with_trivial_frame(alone, image.cam_from_world())
    for point_id, point in model.points3D.items():
        own.add_point3D_with_id(point_id, pycolmap.Point3D(xyz=point.xyz, track=point.track))
    return own


def _zooms(names: Sequence[str], alone: Mapping[str, _Alone]) -> list[list[str]]:
    """Images of one camera by zoom: parted where sorted focal lengths have a gap beyond errors.

    Images whose focal length is unknown or vague go with the zoom that most have.
    """
    clear = sorted(
        (math.log(alone[name].focal_px), alone[name].error, name)
        for name in names
        if name in alone and alone[name].error <= _VAGUE
    )
    groups: list[list[str]] = []
    before = (-math.inf, 0.0)
    for focal, error, name in clear:
        if focal - before[0] > max(ZOOM_GAP, 2 * math.hypot(error, before[1])):
            groups.append([])
        groups[-1].append(name)
        before = focal, error
    if len(groups) < 2:
        return [list(names)]
    placed = {name for group in groups for name in group}
    max(groups, key=len).extend(name for name in names if name not in placed)
    return [sorted(group) for group in groups]


def _at_zoom(spec: CameraSpec, names: list[str], alone: Mapping[str, _Alone]) -> CameraSpec:
    """A camera for a part of another's images, starting from what was found of each alone."""
    found = np.median([alone[name].params for name in names if name in alone], axis=0)
    camera = pycolmap.Camera(
        model=spec.model, width=spec.width, height=spec.height, params=list(spec.params)
    )
    start = np.array(spec.params)
    focal, principal = camera.focal_length_idxs(), camera.principal_point_idxs()
    prior = spec.prior and abs(math.log(found[focal[0]] / start[focal[0]])) < ZOOM_GAP
    start[focal] = found[focal]
    if np.abs(found[principal] - start[principal]).max() > _CROP * max(spec.width, spec.height):
        start = found
    return dataclasses.replace(
        spec, names=names, params=tuple(float(p) for p in start), prior=prior
    )


def _left_out(job: MapJob, model: Any, shared: Sequence[CameraSpec]) -> bool:
    """Whether an image stays out that verified pairs join to images of its camera in the model."""
    inside = {model.image(i).name for i in model.reg_image_ids()}
    camera_of = {name: index for index, spec in enumerate(shared) for name in spec.names}
    for (name0, name1), inliers in inlier_counts(job.database).items():
        if inliers < _MIN_INLIERS or (name0 in inside) == (name1 in inside):
            continue
        if name0 in camera_of and camera_of[name0] == camera_of.get(name1):
            return True
    return False


def _cameras(model: Any) -> set[int]:
    """Ids of the cameras that registered images use."""
    return {int(model.image(image_id).camera_id) for image_id in model.reg_image_ids()}


def _size(camera: Any) -> float:
    """Thousands of px of the longer side."""
    return max(camera.width, camera.height) / 1000
