"""From a verified database to models."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, fixed_cameras
from gim_hloc.colmap.checks import (
    deregister,
    num_supported,
    points_of_frames,
    split_at_weak_joints,
)
from gim_hloc.colmap.database import open_database, verified_components
from gim_hloc.colmap.improve import bundle_adjust
from gim_hloc.colmap.model import align, colmap_log, poses_of, rigid, version
from gim_hloc.errors import InputError, MappingError, some
from gim_hloc.options import MapOptions, Mapper, PoseUse, RefineIntrinsics

if TYPE_CHECKING:
    from gim_hloc.poses import Pose

logger = logging.getLogger(__name__)

# Above this many images ``auto`` maps globally: incremental mapping is the more accurate and the
# more forgiving of the two, but its time grows faster than linearly.
AUTO_GLOBAL_ABOVE = 500
# Mapping is tried again while the largest model holds less than this share of the images that
# verified pairs connect.
ENOUGH = 0.8
# In sets of at most so many images a global adjustment follows nearly every image (COLMAP: each
# tenth more): the local one before it, most of the time there, need not converge.
_ADJUSTED_ANYWAY = 40
_LOCAL_ITERATIONS = 5  # COLMAP: 25
# Points that COLMAP registers an image on.
_REGISTERS_ON = 30
# COLMAP reads images only for colours, which we extract ourselves (any format, any EXIF).
_NOWHERE = Path(".")
_SNAPSHOT_IMAGES = 5  # registered from one snapshot of a growing model to the next


@dataclass(frozen=True, kw_only=True)
class MapJob:
    """What is to be mapped, and how.

    Attributes:
        database: as ``build_database`` writes it.
        cameras: as written to the database (ids are 1, 2, … in this order).
        options: thresholds.
        mapper: which of COLMAP's mappers.
        refine_intrinsics: see ``CameraOptions``.
        poses: name -> (R, t), world to camera, known from elsewhere.
        pose_use: fixed and refine are for ``triangulate_known``; prior: the database holds their
            centres, which the incremental mapper stays near.
        seed: of COLMAP's random numbers.
        threads: COLMAP's threads; one thread and a seed give the same model twice.
        log_dir: where COLMAP's own log goes.
        progress: called with (index of the model, images registered in it).
        stored_px: stored pixels for one that the matcher saw, COLMAP's bounds being in stored ones.
        images: to be mapped alone; empty: all.
        snapshots: folder that models are written to while they grow.
    """

    database: Path
    cameras: Sequence[CameraSpec]
    options: MapOptions = MapOptions()
    mapper: Mapper = "incremental"
    refine_intrinsics: RefineIntrinsics = "auto"
    poses: Mapping[str, Pose] | None = None
    pose_use: PoseUse = "fixed"
    seed: int = 0
    threads: int = -1
    log_dir: Path | None = None
    progress: Callable[[int, int], None] = lambda model, images: None
    stored_px: float = 1.0
    images: Collection[str] = ()
    snapshots: Path | None = None

    @property
    def num_images(self) -> int:
        """Images to be mapped."""
        return len(self.images) or sum(len(spec.names) for spec in self.cameras)

    @property
    def fixed(self) -> set[int]:
        """Ids of the cameras whose intrinsics must not move."""
        return fixed_cameras(self.cameras, self.refine_intrinsics)

    @property
    def all_fixed(self) -> bool:
        """Whether no camera is refined."""
        return len(self.fixed) == len(self.cameras)


@dataclass(kw_only=True)
class Mapped:
    """Models (``pycolmap.Reconstruction``) of one mapping, largest first, and what to know."""

    models: list[Any]
    notes: list[str] = field(default_factory=list)


def resolve_mapper(mapper: Mapper, num_images: int) -> str:
    """The mapper that ``auto`` stands for: global above ``AUTO_GLOBAL_ABOVE`` images."""
    if mapper != "auto":
        return mapper
    return "global" if num_images > AUTO_GLOBAL_ABOVE else "incremental"


def run_mapping(job: MapJob) -> Mapped:
    """Map a verified database, again with other values where much of it was left.

    COLMAP's defaults give up on forward motion, narrow baselines and small scenes. While the
    largest model of a component (images that verified pairs connect) holds less than ``ENOUGH`` of
    it, mapping is tried with relaxed values, then with another seed; the best attempt is kept and a
    note says so.

    Raises:
        MappingError: when no attempt gives a model.
    """
    components = verified_components(job.database)
    first = map_once(job, relaxed=False)
    kept: list[Any] = []
    notes: list[str] = []
    for component in components:
        own = [m for m in first if not component.isdisjoint(poses_of(m))]
        if kept and len(component) < max(3, job.options.min_model_size):
            kept += own  # too few images for a model beside others
            continue
        part = dataclasses.replace(job, images=component) if len(components) > 1 else job
        models, said = _best_attempt(part, own, len(component))
        kept += models
        notes += said
    if not kept:
        raise MappingError(
            "COLMAP found no pair of images to start from, even with relaxed thresholds. The "
            "matches, the database and the report are kept; look at the match graph in the "
            "report: are there pairs with many inliers and enough parallax? A camera that only "
            "turns gives none."
        )
    kept.sort(key=lambda m: (-m.num_reg_images(), -m.num_points3D()))
    return Mapped(models=kept, notes=notes)


def _best_attempt(job: MapJob, first: list[Any], component: int) -> tuple[list[Any], list[str]]:
    """Models of a component of so many images, and what was tried beyond ``first``."""
    tried: list[tuple[str, list[Any]]] = []
    work = 0  # images registered in all attempts: their time, the same on every machine
    for name, attempt, relaxed in _attempts(job):
        models = map_once(attempt, relaxed=relaxed) if tried else first
        if tried:  # what relaxed values join wrongly must not count as a larger model
            models = [part for model in models for part in split_at_weak_joints(model, [])]
        models.sort(key=quality, reverse=True)
        tried.append((name, models))
        logger.debug("mapping, %s: %s images", name, [num_supported(m) for m in models])
        if models and num_supported(models[0]) >= ENOUGH * component:
            break
        work += sum(model.num_reg_images() for model in models)
        before = sum(model.num_reg_images() for model in first)
        if len(tried) > 1 and work >= max(2 * before, component):
            break
    name, models = max(tried, key=lambda t: quality(t[1][0]) if t[1] else (0, 0))
    return models, _what_was_tried(tried, name, component, some(sorted(job.images), 3))


def _attempts(job: MapJob) -> list[tuple[str, MapJob, bool]]:
    """What to try, in this order: name, job, whether with relaxed values."""
    usual = ("the usual values", job, False)
    other = dataclasses.replace(job, seed=job.seed + 1)
    if resolve_mapper(job.mapper, job.num_images) == "global":  # nothing to relax
        return [usual, ("another seed", other, False)]
    return [usual, ("relaxed values", job, True), ("relaxed values and another seed", other, True)]


def quality(model: Any) -> tuple[int, int]:
    """The better model has more images with enough points, then more observations.

    Of a model that falls apart the largest part counts. Points in two images are no sign: relaxed
    mapping keeps them, the usual one does not.
    """
    part = max(split_at_weak_joints(model, []), key=num_supported)
    lengths = (point.track.length() for point in part.points3D.values())
    return num_supported(part), sum(length for length in lengths if length > 2)


def _what_was_tried(
    tried: Sequence[tuple[str, list[Any]]], kept: str, component: int, names: str
) -> list[str]:
    which = f"{component} images that verified pairs connect" + (f" ({names})" if names else "")
    counts = {name: num_supported(models[0]) if models else 0 for name, models in tried}
    notes = []
    if len(tried) > 1:
        listed = ", ".join(f"{counts[name]} with {name}" for name in counts)
        notes.append(
            f"The first mapping left much of the {which}, "
            f"so it was repeated; images placed: {listed}. Kept: {kept}."
            + (
                " Relaxed values (first pair: forward motion, 30 inliers, 4 degrees; registration: "
                "15 inliers; tracks of two views kept) are easier to deceive: look at the model."
                if "relaxed" in kept
                else ""
            )
        )
        logger.warning("%s", notes[-1])
    if counts[kept] < ENOUGH * component:
        notes.append(
            f"The largest model holds {counts[kept]} of the {which}. "
            "Look at the match graph in the report: photographs or pairs that link the "
            "missing images may help."
        )
        logger.warning("%s", notes[-1])
    return notes


@contextlib.contextmanager
def _scratch(job: MapJob) -> Iterator[Path]:
    """A folder for what COLMAP's mappers want to write, with its log turned away."""
    folder = job.database.with_name("sparse.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with colmap_log(job.log_dir):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pin_cameras(model: Any, job: MapJob) -> None:
    """Put the cameras that must not move back and adjust the rest to them.

    The global mapper refines all cameras or none (and in pycolmap 4.0 a little even then).
    """
    moved = False
    for camera_id in sorted(job.fixed):
        if model.exists_camera(camera_id):
            camera = model.camera(camera_id)
            given = list(job.cameras[camera_id - 1].params)
            if [float(p) for p in camera.params] != given:
                camera.params = given
                moved = True
    if moved:
        bundle_adjust(model, job.fixed, job.threads)


def map_once(job: MapJob, *, relaxed: bool) -> list[Any]:
    """Models of one attempt, with COLMAP's usual or with relaxed values."""
    mapper = resolve_mapper(job.mapper, job.num_images)
    with _scratch(job) as folder:
        if mapper == "global":
            models = _non_empty(
                pycolmap.global_mapping(job.database, _NOWHERE, folder, _global_options(job))
            )
            for model in models:
                _pin_cameras(model, job)
            return models
        options = _incremental_options(job, relaxed=relaxed)
        if job.pose_use == "prior" and job.poses is not None:
            options.use_prior_position = True
            # One wrong prior must not bend all.
            options.use_robust_loss_on_prior_position = True
        return _incremental(job, mapper, folder, options)


def _incremental(job: MapJob, mapper: str, folder: Path, options: Any) -> list[Any]:
    """Models of COLMAP's incremental or hierarchical mapper."""
    if mapper == "hierarchical":
        if not hasattr(pycolmap, "HierarchicalPipelineOptions"):
            raise InputError(
                f"--mapper hierarchical needs pycolmap 4.2 or newer, this is {version()}."
            )
        hierarchical = pycolmap.HierarchicalPipelineOptions()
        hierarchical.num_threads = job.threads
        hierarchical.incremental_options = options
        return _non_empty(
            pycolmap.hierarchical_mapping(job.database, _NOWHERE, folder, hierarchical)
        )

    model, registered = -1, 0

    def first_pair() -> None:
        nonlocal model, registered
        model, registered = model + 1, 2
        job.progress(model, registered)

    def next_image() -> None:
        nonlocal registered
        registered += 1
        job.progress(max(model, 0), registered)

    return _non_empty(
        pycolmap.incremental_mapping(
            job.database,
            _NOWHERE,
            folder,
            options=options,
            initial_image_pair_callback=first_pair,
            next_image_callback=next_image,
        )
    )


def _non_empty(models: Mapping[int, Any]) -> list[Any]:
    return [model for model in models.values() if model.num_reg_images() >= 2]


def keep_intrinsics(pipeline: Any) -> None:
    """Let COLMAP's incremental mapper refine no intrinsics."""
    pipeline.ba_refine_focal_length = False
    pipeline.ba_refine_extra_params = False
    pipeline.mapper.abs_pose_refine_focal_length = False
    pipeline.mapper.abs_pose_refine_extra_params = False


def _incremental_options(job: MapJob, *, relaxed: bool = False) -> Any:
    options = job.options
    pipeline = pycolmap.IncrementalPipelineOptions()
    pipeline.num_threads = job.threads
    pipeline.random_seed = job.seed
    pipeline.extract_colors = False
    pipeline.image_names = sorted(job.images)
    pipeline.multiple_models = options.multiple_models
    pipeline.min_model_size = options.min_model_size
    pipeline.ba_refine_principal_point = options.ba_refine_principal_point
    pipeline.constant_cameras = job.fixed
    if job.num_images <= _ADJUSTED_ANYWAY:
        pipeline.ba_local_max_num_iterations = _LOCAL_ITERATIONS
    pipeline.ba_refine_sensor_from_rig = False  # rigs are of known geometry
    if job.snapshots is not None:
        pipeline.snapshot_path = job.snapshots
        pipeline.snapshot_frames_freq = _SNAPSHOT_IMAGES
    if job.all_fixed:
        keep_intrinsics(pipeline)
    if relaxed:
        pipeline.mapper.init_max_forward_motion = 1.0  # COLMAP: 0.95, no first pair in a street
        pipeline.mapper.init_min_num_inliers = 30
        pipeline.mapper.init_min_tri_angle = 4.0
        pipeline.mapper.abs_pose_min_num_inliers = 15
        pipeline.mapper.abs_pose_min_inlier_ratio = 0.15
        pipeline.init_num_trials = 500
    if relaxed or job.num_images == 2:
        # With two images every track has two views; COLMAP would keep no point at all.
        pipeline.triangulation.ignore_two_view_tracks = False
    for name in (
        "init_min_num_inliers",
        "init_min_tri_angle",
        "abs_pose_min_num_inliers",
        "filter_max_reproj_error",
    ):
        value = getattr(options, name)
        if value is not None:
            setattr(pipeline.mapper, name, value)
    for group, name in (
        (pipeline.mapper, "init_max_error"),
        (pipeline.mapper, "abs_pose_max_error"),
        (pipeline.mapper, "filter_max_reproj_error"),
        (pipeline.triangulation, "merge_max_reproj_error"),
        (pipeline.triangulation, "complete_max_reproj_error"),
    ):
        setattr(group, name, getattr(group, name) * job.stored_px)
    return pipeline


def _global_options(job: MapJob) -> Any:
    pipeline = pycolmap.GlobalPipelineOptions()
    pipeline.image_names = sorted(job.images)
    pipeline.num_threads = job.threads
    pipeline.random_seed = job.seed
    if hasattr(pipeline, "min_model_size"):  # pycolmap 4.0 keeps one model only
        pipeline.min_model_size = job.options.min_model_size
        pipeline.multiple_models = job.options.multiple_models
    adjustment = pipeline.mapper.bundle_adjustment
    adjustment.refine_principal_point = job.options.ba_refine_principal_point
    adjustment.refine_sensor_from_rig = False
    if job.all_fixed:
        adjustment.refine_focal_length = False
        adjustment.refine_extra_params = False
    return pipeline


def well_supported(model: Any) -> set[str]:
    """Names of the images that see, with those of their rig, enough points to be registered by."""
    frames = points_of_frames(model)
    return {
        image.name
        for image in map(model.image, model.reg_image_ids())
        if len(frames[int(image.frame_id)]) >= _REGISTERS_ON
    }


def extend_models(job: MapJob, models: Sequence[Any]) -> Mapped:
    """Register into the first model what it lacks, once the database has more keypoints and pairs.

    Poses and points may still move; keypoints keep their rows. Other models are kept as far as they
    hold images that the first did not get.
    """
    first = copy.deepcopy(models[0])
    kept = well_supported(first)  # what hangs on little may be placed wrongly: it is placed anew
    held = {first.image(i).frame_id for i in first.reg_image_ids() if first.image(i).name in kept}
    deregister(first, [frame for frame in first.reg_frame_ids() if frame not in held])
    _append_keypoints(first, job.database)
    pipeline = _incremental_options(job)
    pipeline.multiple_models = False
    done = first.num_reg_images()

    def next_image() -> None:
        nonlocal done
        done += 1
        job.progress(0, done)

    with _scratch(job) as folder:
        first = pycolmap.triangulate_points(
            first, job.database, _NOWHERE, folder, clear_points=False, options=pipeline
        )
        first.write(folder)
        found = pycolmap.incremental_mapping(
            job.database, _NOWHERE, folder, options=pipeline, input_path=folder,
            next_image_callback=next_image,
        )  # fmt: skip
    first = max([first, *found.values()], key=lambda model: int(model.num_reg_images()))
    placed = set(poses_of(first))
    others = [model for model in models[1:] if not placed.issuperset(poses_of(model))]
    for model in others:
        _append_keypoints(model, job.database)
    return Mapped(models=[first, *others])


def _append_keypoints(model: Any, database: Path) -> None:
    """Give the images of a model the keypoints that were appended to theirs in the database."""
    with open_database(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        for image in model.images.values():
            keypoints = db.read_keypoints(ids[image.name])[:, :2]
            added = keypoints[image.num_points2D() :].astype(np.float64)
            for xy_colmap in added:
                image.points2D.append(pycolmap.Point2D(xy_colmap))


def triangulate_known(job: MapJob) -> Mapped:
    """Triangulate a verified database with the job's known poses.

    Images without a pose are registered afterwards by COLMAP's incremental mapper, which then also
    triangulates what they see. With ``pose_use`` refine the poses move too, by bundle adjustment,
    and the model is put back into their world by a similarity.

    Raises:
        MappingError: when no point can be triangulated.
    """
    poses = job.poses or {}
    adjust = job.pose_use == "refine"
    pipeline = _incremental_options(job)
    pipeline.multiple_models = False
    if len(poses) == 2:
        pipeline.triangulation.ignore_two_view_tracks = False
    with _scratch(job) as folder:
        model = _posed_model(job.database, poses)
        job.progress(0, model.num_reg_images())
        final = pipeline.mapper.filter_max_reproj_error
        # Approximate poses give approximate points; the bounds tighten as both get better.
        for bound in (4 * final, 2 * final, final) if adjust else (final,):
            pipeline.mapper.filter_max_reproj_error = bound
            pipeline.triangulation.complete_max_reproj_error = bound
            pipeline.triangulation.merge_max_reproj_error = bound
            model = pycolmap.triangulate_points(
                model, job.database, _NOWHERE, folder, clear_points=True, options=pipeline
            )
            if adjust and model.num_points3D():
                bundle_adjust(model, job.fixed, job.threads)
                pycolmap.ObservationManager(model).filter_all_points3D(bound, 1.5)
                bundle_adjust(model, job.fixed, job.threads)
        if adjust:
            align(model, poses)
        pipeline.mapper.filter_max_reproj_error = final
        if not model.num_points3D():
            raise MappingError(
                "No point could be triangulated with the known poses. The matches, the database "
                "and the report are kept. Are the poses those of these images (order of names), in "
                "the convention of their format (world to camera in COLMAP's, camera to world in "
                "transforms.json and TUM files), and do the intrinsics fit?"
            )
        if model.num_reg_images() < job.num_images:
            model.write(folder)
            done = model.num_reg_images()
            pipeline.fix_existing_frames = not adjust

            def next_image() -> None:
                nonlocal done
                done += 1
                job.progress(0, done)

            found = pycolmap.incremental_mapping(
                job.database,
                _NOWHERE,
                folder,
                options=pipeline,
                input_path=folder,
                next_image_callback=next_image,
            )
            if found:
                model = max(found.values(), key=lambda m: m.num_reg_images())
            if adjust:
                align(model, poses)
    if not adjust:
        _put_poses(model, poses)
    return Mapped(models=[model])


def _posed_model(database: Path, poses: Mapping[str, Pose]) -> Any:
    """A reconstruction of the database's cameras and those of its images that have a pose."""
    model = pycolmap.Reconstruction()
    with open_database(database) as db:
        for camera in db.read_all_cameras():
            model.add_camera(camera)
        for rig in db.read_all_rigs():
            model.add_rig(rig)
        images = {image.image_id: image for image in db.read_all_images()}
        for frame in db.read_all_frames():
            # The reference camera's pose, where it is known, is that of the rig.
            own = sorted((images[data.id] for data in frame.data_ids), key=_first_in(model, frame))
            if not any(image.name in poses for image in own):
                continue
            model.add_frame(frame)
            for image in own:
                image.frame_id = frame.frame_id
                model.add_image(image)
            known = next(image for image in own if image.name in poses)
            model.frame(frame.frame_id).set_cam_from_world(
                known.camera_id, rigid(poses[known.name])
            )
            model.register_frame(frame.frame_id)
    return model


def _first_in(model: Any, frame: Any) -> Callable[[Any], bool]:
    """Sort key of the images of a frame: that of the reference camera first."""
    reference = model.rig(frame.rig_id).ref_sensor_id
    return lambda image: image.camera_id != reference.id


def _put_poses(model: Any, poses: Mapping[str, Pose]) -> None:
    """Undo what rounding did to poses that were held."""
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        if image.name in poses and model.rig(model.frame(image.frame_id).rig_id).num_sensors() == 1:
            model.frame(image.frame_id).set_cam_from_world(
                image.camera_id, rigid(poses[image.name])
            )
