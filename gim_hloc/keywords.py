"""The fields of the options as keyword arguments, for editors and type checkers.

They stand here once more because neither can read them off a class; a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from gim_hloc.options import (
    AnchoredOptions,
    CameraMode,
    CameraOptions,
    Export,
    MapOptions,
    Mapper,
    PairOptions,
    PanoramaUse,
    PhotometricOptions,
    PoseUse,
    Quality,
    QuantizedOptions,
    RefineIntrinsics,
    RereadOptions,
    StepName,
    VerifyOptions,
    VideoOptions,
)


class RunKeywords(TypedDict, total=False):
    """Of every run."""

    masks: Path | str | None
    mask_erode: int
    min_image_size: int
    rotations: Literal["auto", "none"]
    pairs: str
    matcher_options: tuple[str, ...]
    features: Path | str | None
    intrinsics: str | None
    camera_model: str
    camera_mode: CameraMode
    device: str
    devices: tuple[str, ...]
    engine: Literal["local", "ray"]
    workers: int
    seed: int
    overwrite: bool
    prune: bool
    threads: int
    batch_size: int
    cache_gb: float | None
    step: Literal["encode", "match", "verify"] | None
    shard: str | None
    stop_after: StepName | None
    start: StepName | None


class ReconstructKeywords(RunKeywords, total=False):
    """Fields of ``ReconstructOptions``, and of its ``cameras``."""

    matcher: str
    rescue: Literal["auto", "none"]
    quality: Quality
    max_size: int | None
    max_keypoints: int | None
    matches: Path | str | None
    tracks: Literal["anchored", "quantized"]
    anchors: str
    refine_keypoints: bool
    refine_warps: bool
    mapper: Mapper
    model: Path | str | None
    poses: PoseUse
    prior_stddev: float | None
    missing_poses: Literal["register", "leave-out"]
    extend: Path | str | None
    deterministic: bool
    export: tuple[Export, ...]
    num_downscales: int
    dense_points: int
    gps: str | None
    gcp: Path | str | None
    scale: tuple[str, str, float] | None
    ref_model: Path | str | None
    crs: Literal["enu", "utm"]
    dense: bool
    depth_from: Literal["auto", "images", "warps", "colmap"]
    depth_size: int
    depth_neighbours: int
    mesh: bool
    dry_run: bool
    rig: Path | str | None
    panorama: PanoramaUse
    refine_intrinsics: RefineIntrinsics
    cameras: CameraOptions
    video: VideoOptions
    pair: PairOptions
    verify: VerifyOptions
    map: MapOptions
    refine: PhotometricOptions
    anchored: AnchoredOptions
    quantized: QuantizedOptions
    warps: RereadOptions


class LocalizeKeywords(RunKeywords, total=False):
    """Fields of ``LocalizeOptions``."""

    matcher: str | None
    anchors: str | None
    quality: Quality | None
    neighbours: int
    min_score: float | None
    cluster: bool
    images: Path | str | None
    camera: Literal["auto", "map", "exif", "estimate"]
    max_error: float
    min_inliers: int
    min_inlier_ratio: float
    confidence: float
    max_trials: int
    max_spread: float
