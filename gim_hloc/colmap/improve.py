"""Improving a finished model: patches compared, warps read again, bundle adjustment."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import project, size_of
from gim_hloc.colmap.model import positions_of, statistics
from gim_hloc.errors import some
from gim_hloc.tracks import photometric
from gim_hloc.tracks.photometric import TrackViews
from gim_hloc.tracks.refine import read_again

if TYPE_CHECKING:
    from gim_hloc.geometry.warp import Warp
    from gim_hloc.options import RereadOptions
    from gim_hloc.tracks.photometric import PhotometricOptions


_ENOUGH = 1e-5  # relative change of the sum of an iteration after which an adjustment ends


def bundle_adjust(
    model: Any,
    fixed: set[int],
    threads: int,
    held: Collection[str] = (),
    robust_px: float | None = None,
) -> None:
    """Bundle-adjust a whole model, but not the poses of the images ``held``.

    ``robust_px`` is the scale of a Cauchy loss: observations far above it hardly count.
    """
    adjuster(model, fixed, threads, held, robust_px).solve()


def adjuster(
    model: Any,
    fixed: set[int],
    threads: int,
    held: Collection[str] = (),
    robust_px: float | None = None,
    *,
    principal_point: bool = False,
    focal: bool = True,
    priors: Sequence[Any] = (),
    gauge: Any = pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD,
) -> Any:
    """The adjustment of ``bundle_adjust``, to be solved.

    Principal points and focal lengths are free or not; ``priors`` (``pycolmap.PosePrior``) of
    positions hold the world in place.
    """
    options = pycolmap.BundleAdjustmentOptions()
    options.refine_principal_point = principal_point
    options.refine_focal_length = focal
    options.refine_sensor_from_rig = False  # rigs are of known geometry
    options.print_summary = False
    options.ceres.solver_options.num_threads = threads
    if robust_px is not None:
        options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = robust_px
        # COLMAP's own bounds end after all 100 iterations, of which the last 80 change nothing.
        options.ceres.solver_options.function_tolerance = _ENOUGH
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
    if priors:
        how = pycolmap.PosePriorBundleAdjustmentOptions()
        return pycolmap.create_pose_prior_bundle_adjuster(options, how, config, priors, model)
    if config.num_constant_rig_from_world_poses() < 2:  # the world is not held in place otherwise
        config.fix_gauge(gauge)
    return pycolmap.create_default_ceres_bundle_adjuster(options, config, model)


# Of observations as detectors place them, in pixels that the matcher saw: COLMAP's own bound.
_DETECTED_PX = 4.0
_REFINED_PX = 2.0  # of refined ones
_MIN_ANGLE_DEG = 1.5  # between the rays of a point
# Scale of the loss, about the residuals of refined observations. These have long tails: squares
# moved a principal point by 1.7 px where its standard error said 0.5 px.
_ROBUST_PX = 0.12


@dataclass(frozen=True, kw_only=True)
class Refined:
    """What comparing patches did to a model.

    Attributes:
        sentence: for the log.
        original: the model before, whose observations ``give_back`` takes; None if nothing changed.
        scales: (N,) of the images in order of their ids, as in ``refine_tracks``.
        robust_px: scale of the Cauchy loss of further adjustments.
    """

    sentence: str
    original: Any = None
    scales: Any = None
    robust_px: float | None = None


def refine_tracks(
    model: Any,
    gray: Callable[[str], np.ndarray],
    *,
    rounds: int,
    options: PhotometricOptions,
    fixed: set[int],
    threads: int = -1,
    progress: Callable[[], None] | None = None,
    held: Collection[str] = (),
    scale: Mapping[str, float] | None = None,
) -> Refined:
    """Move a model's observations by comparing patches, and adjust poses and points to them.

    Each image is judged by the share of its patches that agree with those of the others. One that
    is not trusted (blurred, say) keeps its observations, which weigh little. In the others,
    observations that no patch confirms leave their track, until ``give_back`` puts them back. A
    model none of whose images can be trusted, or that would have to be adjusted without most of its
    points, is left as it was.

    Args:
        model: ``pycolmap.Reconstruction``, changed in place.
        gray: name -> (H, W) float32 grey values of the stored image.
        rounds: of comparing patches and adjusting, in turn.
        options: see ``gim_hloc.tracks.photometric``; its ``rounds`` are the caller's.
        fixed: ids of the cameras whose intrinsics must not move.
        threads: of the bundle adjustment, and images at a time; -1 takes all cores.
        progress: called after each image of each round.
        held: images whose poses must not move.
        scale: name -> pixels that the matcher saw for a stored one, at most 1 (the default).
    """
    import copy

    before = statistics(model)
    if not before["points"]:
        return Refined(sentence="left as it was: no points to refine")
    original = copy.deepcopy(model)
    images = [model.image(i) for i in sorted(model.reg_image_ids())]
    scales = np.array([(scale or {}).get(image.name, 1.0) for image in images])
    trusted = np.ones(len(images), dtype=bool)
    robust_px = _ROBUST_PX / float(np.median(scales))

    def read(index: int) -> np.ndarray:
        if progress is not None:
            progress()
        return gray(images[index].name)

    def compare(ids: np.ndarray, views: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        reference, shapes = _patch_shapes(model, images, ids, views, scales, trusted, options)
        workers = threads if threads > 0 else os.cpu_count() or 1
        xy_px, confirmed = photometric.refine_positions(
            views, reference, shapes, read, scales, options, workers=workers
        )
        return reference, xy_px, confirmed

    for round_ in range(rounds):
        if not model.num_points3D():
            break  # nothing was confirmed: the original is put back below
        ids = np.array(sorted(model.point3D_ids()))
        views, rows = _views(model, images, ids)
        reference, xy_px, confirmed = compare(ids, views)
        if round_ == 0:
            trusted = photometric.judge_images(views, reference, confirmed, len(images), options)
            if trusted.sum() < 2:
                return Refined(sentence="kept as it was: " + _unconfirmed(reference, confirmed))
            if not trusted.all():
                reference, xy_px, confirmed = compare(ids, views)
        confirmed &= trusted[views.image]
        xy_colmap = xy_px + 0.5
        for index in np.flatnonzero(trusted):
            image = images[index]
            mine = np.flatnonzero(views.image == index)
            points2d = image.points2D
            for k in mine[confirmed[mine]]:
                points2d[rows[k]].xy = xy_colmap[k]
            if confirmed[mine].sum() < options.min_confirmed:
                continue
            for k in mine[~confirmed[mine]]:
                point_id = int(ids[views.track[k]])
                if model.exists_point3D(point_id):  # goes with its last but one observation
                    model.delete_observation(image.image_id, int(rows[k]))
        bundle_adjust(model, fixed, threads, held, robust_px)
        # Where patches were not trusted, observations are still the detector's.
        refined_px = _DETECTED_PX if round_ == 0 else _REFINED_PX
        _filter(model, images, scales, np.where(trusted, refined_px, _DETECTED_PX))
        bundle_adjust(model, fixed, threads, held, robust_px)
    if model.num_points3D() < before["points"] / 3:
        _restore(model, original)
        return Refined(
            sentence=f"kept as it was: patches confirm only {model.num_points3D()} of "
            f"{before['points']:.0f} points"
        )
    model.update_point_3d_errors()
    after = statistics(model)
    return Refined(
        sentence=f"refined by patches: {before['mean_reprojection_error_px']:.2f} -> "
        f"{after['mean_reprojection_error_px']:.2f} px in {after['observations']:.0f} "
        "observations that determine the poses"
        + _distrust([image.name for image, good in zip(images, trusted, strict=True) if not good]),
        original=original,
        scales=scales,
        robust_px=robust_px,
    )


def _unconfirmed(reference: np.ndarray, confirmed: np.ndarray) -> str:
    others = np.ones(len(confirmed), dtype=bool)
    others[reference] = False
    return f"patches confirm only {confirmed[others].mean():.0%} of the observations"


def _distrust(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"; patches of {len(names)} images were not trusted: {some(names, 8)}"


def _filter(model: Any, images: Sequence[Any], scales: np.ndarray, limit: np.ndarray) -> None:
    """Drop observations above an image's limit (px that were compared), and points of flat rays."""
    ids = np.array(sorted(model.point3D_ids()))
    if not len(ids):
        return
    views, rows = _views(model, images, ids)
    error = _errors(model, images, ids, views) * scales[views.image]
    for k in np.flatnonzero(error > limit[views.image]):
        if model.exists_point3D(int(ids[views.track[k]])):
            model.delete_observation(images[views.image[k]].image_id, int(rows[k]))
    manager = pycolmap.ObservationManager(model)
    manager.filter_points3D_with_small_triangulation_angle(_MIN_ANGLE_DEG, model.point3D_ids())


def _errors(model: Any, images: Sequence[Any], ids: np.ndarray, views: Any) -> np.ndarray:
    """(K,) reprojection errors of observations in stored pixels, infinite behind the camera."""
    xyz = positions_of(model, ids)
    error = np.full(len(views.track), np.inf)
    for index, image in enumerate(images):
        pose = np.asarray(image.cam_from_world().matrix())
        local = xyz[views.track] @ pose[:, :3].T + pose[:, 3]
        mine = np.flatnonzero((views.image == index) & (local[:, 2] > 0))
        if len(mine):
            xy = project(model.camera(image.camera_id), local[mine]) - 0.5
            error[mine] = np.linalg.norm(xy - views.xy_px[mine], axis=1)
    return error


def give_back(model: Any, refined: Refined, threads: int = -1) -> str:
    """Put observations that refining took, and that fit the poses, back into their tracks.

    Poses and cameras stay. Points that are gone are placed anew from all of their observations; the
    others stay too. Returns a sentence for the log.
    """
    original, images = refined.original, [model.image(i) for i in sorted(model.reg_image_ids())]
    seen = {image.image_id: set(image.get_observation_point2D_idxs()) for image in images}
    lost = {int(i) for i in original.point3D_ids()} - {int(i) for i in model.point3D_ids()}
    for point_id in sorted(lost):
        point = original.point3D(point_id)
        model.add_point3D_with_id(point_id, pycolmap.Point3D(xyz=point.xyz, color=point.color))
    for point_id in original.point3D_ids():
        for element in original.point3D(point_id).track.elements:
            if element.point2D_idx not in seen[element.image_id]:
                model.add_observation(point_id, element)
    if lost:
        options = pycolmap.BundleAdjustmentOptions()
        options.print_summary = False
        options.ceres.solver_options.num_threads = threads
        config = pycolmap.BundleAdjustmentConfig()  # without images: only these points move
        for point_id in lost:
            config.add_variable_point(point_id)
        pycolmap.create_default_bundle_adjuster(options, config, model).solve()
    _filter(model, images, refined.scales, np.full(len(images), _DETECTED_PX))
    model.update_point_3d_errors()
    before, after = statistics(original), statistics(model)
    return (
        f"with what patches did not confirm given back, {after['observations']:.0f} of "
        f"{before['observations']:.0f} observations and {after['points']:.0f} of "
        f"{before['points']:.0f} points are left."
    )


def _restore(model: Any, original: Any) -> None:
    """Put positions, poses, cameras and points of ``original`` back into ``model``."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        original.write(folder)
        model.read(folder)


def _views(model: Any, images: Sequence[Any], ids: np.ndarray) -> tuple[Any, np.ndarray]:
    """All observations, and the row of each among its image's keypoints."""
    index_of = {int(point_id): i for i, point_id in enumerate(ids)}
    track: list[int] = []
    image_index: list[int] = []
    xy: list[np.ndarray] = []
    rows: list[int] = []
    for index, image in enumerate(images):
        seen = image.get_observation_points2D()
        track += [index_of[point.point3D_id] for point in seen]
        image_index += [index] * len(seen)
        xy += [point.xy for point in seen]
        rows += image.get_observation_point2D_idxs()
    views = TrackViews(track=np.array(track), image=np.array(image_index), xy_px=np.array(xy) - 0.5)
    return views, np.array(rows, dtype=np.int64)


def _patch_shapes(
    model: Any,
    images: Sequence[Any],
    ids: np.ndarray,
    views: Any,
    scales: np.ndarray,
    trusted: np.ndarray,
    options: PhotometricOptions,
) -> tuple[np.ndarray, np.ndarray]:
    """Reference row of each track, and (K, 2, 2) shape of its patch in every observation."""
    xyz = positions_of(model, ids)
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
                project(camera, (points_here + sign * offset) @ pose[:, :3].T + pose[:, 3])
                for sign in (1, -1)
            )
            jacobian[mine, :, column] = (ahead - behind) / (2 * step)
    determinant = np.linalg.det(jacobian)
    footprint = np.sqrt(np.abs(determinant)) * scales[views.image]  # in pixels that were compared
    reference = photometric.pick_references(views, footprint, len(ids), trusted)
    # A plane seen edge-on has no inverse; such tracks are then found not comparable.
    own = jacobian[reference].copy()
    own[np.abs(np.linalg.det(own)) < 1e-9] = np.eye(2)
    shapes = jacobian @ np.linalg.inv(own)[views.track]
    return reference, np.nan_to_num(shapes)


def refine_by_warps(
    model: Any,
    warp: Callable[[str, str], Warp],
    pairs: Sequence[tuple[str, str]],
    *,
    options: RereadOptions,
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
            [size_of(model.camera(image.camera_id)) for image in images],
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
        bundle_adjust(model, fixed, threads, held)
        pycolmap.ObservationManager(model).filter_all_points3D(4.0 if round_ == 0 else 2.0, 1.5)
        bundle_adjust(model, fixed, threads, held)
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


def _projection(
    model: Any, images: Sequence[Any], ids: np.ndarray
) -> Callable[[int, np.ndarray], np.ndarray]:
    """(index of an image, indices of points) -> pixels in hloc's frame, NaN for points unseen."""
    xyz = positions_of(model, ids)
    cameras = [model.camera(image.camera_id) for image in images]
    poses = [np.asarray(image.cam_from_world().matrix()) for image in images]

    def pixels(index: int, points: np.ndarray) -> np.ndarray:
        local = xyz[points] @ poses[index][:, :3].T + poses[index][:, 3]
        xy = np.full((len(points), 2), np.nan)
        ahead = local[:, 2] > 0
        if ahead.any():
            xy[ahead] = project(cameras[index], local[ahead])
        with np.errstate(invalid="ignore"):
            inside = (xy > 0).all(1) & (xy < size_of(cameras[index])).all(1)
        xy[~inside] = np.nan
        return xy - 0.5

    return pixels
