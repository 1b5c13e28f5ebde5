"""Everything that touches COLMAP. The only package of the project that imports ``pycolmap``.

Pixel frames: everything that comes in is in hloc's frame (integer = pixel centre); COLMAP's origin
is the corner of the first pixel. The half pixel is added here and nowhere else. Poses are world to
camera throughout, as in COLMAP's files.

Supported: pycolmap 4.0 to 4.2 (rigs and frames in the database; see ``tests/test_colmap.py``).
"""

from __future__ import annotations

import contextlib
import signal
import threading

from gim_hloc.colmap.baseline import sift_baseline
from gim_hloc.colmap.cameras import (
    CameraSpec,
    assign_cameras,
    camera_param_count,
    camera_spec,
    check_params,
    fixed_cameras,
    parse_intrinsics,
)
from gim_hloc.colmap.checks import Checked, check_models, only_turns, split_at_weak_joints
from gim_hloc.colmap.database import (
    PairVerification,
    build_database,
    copy_with_cameras,
    database_ok,
    inlier_matches,
    read_cameras,
    read_verification,
    write_database,
)
from gim_hloc.colmap.geo import (
    Metres,
    metres_by_control_points,
    metres_by_distance,
    metres_by_gps,
    metres_by_poses,
    positions_enu,
)
from gim_hloc.colmap.improve import (
    Refined,
    bundle_adjust,
    give_back,
    refine_by_warps,
    refine_tracks,
)
from gim_hloc.colmap.intrinsics import (
    Determined,
    Grouped,
    describe_intrinsics,
    determined,
    hold_undetermined,
    map_scene,
    settle,
    unknown_cameras,
)
from gim_hloc.colmap.localization import Located, locate, shared_focal
from gim_hloc.colmap.mapping import (
    AUTO_GLOBAL_ABOVE,
    MapJob,
    Mapped,
    extend_models,
    resolve_mapper,
    run_mapping,
    triangulate_known,
    well_supported,
)
from gim_hloc.colmap.model import (
    ImageStatistics,
    MapView,
    NewImage,
    PointTable,
    add_images,
    align,
    cameras_of,
    check_names,
    colmap_log,
    extract_colours,
    find_model,
    has_cuda,
    image_statistics,
    map_views,
    model_cameras,
    model_observations,
    model_statistics,
    point_positions,
    points,
    poses_and_cameras,
    poses_of,
    read_model,
    set_seed,
    statistics,
    tables,
    version,
    write_model,
    write_models,
)
from gim_hloc.colmap.priors import lay_on_gps
from gim_hloc.colmap.uncertainty import PoseError, pose_errors
from gim_hloc.colmap.undistort import pinhole, resample, undistort
from gim_hloc.colmap.verification import Verification

# pycolmap's import puts a stack trace in the place of whatever SIGTERM was to do: ending at once,
# or storing the state of a training. Python still knows what that was.
if threading.current_thread() is threading.main_thread():
    with contextlib.suppress(TypeError):  # a handler that was not set from Python
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

__all__ = [
    "AUTO_GLOBAL_ABOVE",
    "CameraSpec",
    "Checked",
    "Determined",
    "Grouped",
    "ImageStatistics",
    "Located",
    "MapJob",
    "MapView",
    "Mapped",
    "Metres",
    "NewImage",
    "PairVerification",
    "PointTable",
    "PoseError",
    "Refined",
    "Verification",
    "add_images",
    "align",
    "assign_cameras",
    "build_database",
    "bundle_adjust",
    "camera_param_count",
    "camera_spec",
    "cameras_of",
    "check_models",
    "check_names",
    "check_params",
    "colmap_log",
    "copy_with_cameras",
    "database_ok",
    "describe_intrinsics",
    "determined",
    "extend_models",
    "extract_colours",
    "find_model",
    "fixed_cameras",
    "give_back",
    "has_cuda",
    "hold_undetermined",
    "image_statistics",
    "inlier_matches",
    "lay_on_gps",
    "locate",
    "map_scene",
    "map_views",
    "metres_by_control_points",
    "metres_by_distance",
    "metres_by_gps",
    "metres_by_poses",
    "model_cameras",
    "model_observations",
    "model_statistics",
    "only_turns",
    "parse_intrinsics",
    "pinhole",
    "point_positions",
    "points",
    "pose_errors",
    "poses_and_cameras",
    "poses_of",
    "positions_enu",
    "read_cameras",
    "read_model",
    "read_verification",
    "refine_by_warps",
    "refine_tracks",
    "resample",
    "resolve_mapper",
    "run_mapping",
    "set_seed",
    "settle",
    "shared_focal",
    "sift_baseline",
    "split_at_weak_joints",
    "statistics",
    "tables",
    "triangulate_known",
    "undistort",
    "unknown_cameras",
    "version",
    "well_supported",
    "write_database",
    "write_model",
    "write_models",
]
