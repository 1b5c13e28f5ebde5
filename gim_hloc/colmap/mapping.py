"""From a verified database to models."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, Refine, fixed_cameras
from gim_hloc.colmap.improve import bundle_adjust
from gim_hloc.colmap.model import align, colmap_log, extract_colours, rigid, version
from gim_hloc.errors import InputError, MappingError, check_numbers

if TYPE_CHECKING:
    from gim_hloc.poses import Pose

logger = logging.getLogger(__name__)

Mapper = Literal["auto", "incremental", "global", "hierarchical"]


# Above this many images ``auto`` maps globally: incremental mapping is the more accurate and the
# more forgiving of the two, but its time grows faster than linearly.
AUTO_GLOBAL_ABOVE = 500


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
        with colmap_log(log_dir):
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
        with colmap_log(log_dir):
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
            with colmap_log(log_dir):
                sentence = refine(model, fixed)
            logger.info("Model %d: %s", index, sentence)
        if align_to is not None:
            align(model, align_to)
        if colours is not None:
            extract_colours(model, colours)
        folder = temporary / str(index)
        folder.mkdir()
        model.write(folder)
        paths.append(output / str(index))
    shutil.rmtree(output, ignore_errors=True)
    os.replace(temporary, output)
    return paths


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
        bundle_adjust(model, fixed, threads)


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
    with colmap_log(log_dir):
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
                bundle_adjust(model, fixed, threads)
                pycolmap.ObservationManager(model).filter_all_points3D(bound, 1.5)
                bundle_adjust(model, fixed, threads)
        if adjust:
            align(model, poses)
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
                align(model, poses)
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
                model.add_image_with_trivial_frame(image, rigid(poses[image.name]))
    return model


def _put_poses(model: Any, poses: Mapping[str, Pose]) -> None:
    """Undo what rounding did to poses that were held."""
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        if image.name in poses:
            model.frame(image.frame_id).set_cam_from_world(
                image.camera_id, rigid(poses[image.name])
            )


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
    with colmap_log(log_dir):
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
