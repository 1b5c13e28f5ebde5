"""What ``reconstruct`` and ``localize`` can be told. Each field is a flag of the command.

The base classes are the groups of ``--help``. Nothing here imports torch or pycolmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from gim_hloc.options import (
    AnchoredOptions,
    CameraMode,
    CameraOptions,
    Count,
    CountOrNone,
    DepthOptions,
    Export,
    MapOptions,
    Mapper,
    MatcherName,
    MatcherOptions,
    NotNegative,
    PairOptions,
    PhotometricOptions,
    PoseUse,
    Positive,
    Quality,
    QuantizedOptions,
    RereadOptions,
    RunOptions,
    Share,
    StepOptions,
    TargetOptions,
    TuningOptions,
    VerifyOptions,
    VideoOptions,
    options,
)


@options
class ImageOptions:
    """Which images, and which parts of them."""

    masks: Path | None = None
    """Folder of masks in COLMAP's convention (a.jpg.png or a.png for a.jpg); black is ignored."""
    mask_erode: CountOrNone = 4
    """Keypoints keep this many pixels away from masked ones."""
    min_image_size: Count = 64
    """Pixels; images with a smaller side are left out."""
    rotations: Literal["auto", "none"] = "auto"
    """auto: images that match nothing are tried in other quarter turns (cameras often write no EXIF
    orientation, and learned matchers want images upright)."""


@options
class MatchingOptions(MatcherOptions):
    """What is matched, and with what."""

    matcher: MatcherName = "auto"
    """Name of a matcher (--list-matchers), or cascade: xfeat for every pair, stronger ones where
    that leaves doubt. auto: cascade at --quality fast without a GPU, else aliked_lightglue."""
    pairs: str = "auto"
    """auto, exhaustive, sequential, retrieval, spatial, poses, covisibility, a union such as
    sequential+retrieval, or the path of a pair list. auto takes every pair up to 60 images."""
    rescue: Literal["auto", "none"] = "auto"
    """auto: images that no model holds, or that hang on few points, are matched anew with the
    strongest matcher whose weights are here and whose licence is no stricter."""
    max_keypoints: Count | None = None
    """Keypoints an image, instead of the operating point's."""
    features: Path | None = None
    """Feature file of hloc (or ours) to take keypoints from instead of computing them; with
    --matches and a pair list as --pairs."""
    matches: Path | None = None
    """Match file of hloc that belongs to --features."""


@options
class TrackOptions:
    """How matches become tracks, and how exact they get."""

    tracks: Literal["anchored", "quantized"] = "anchored"
    """How matches of dense and semi-dense matchers become tracks. quantized: hloc's aggregation."""
    anchors: MatcherName = "auto"
    """Matcher whose keypoints are the first anchors and describe images for the pair selection.
    auto: aliked_lightglue, or sift where its weights are missing."""
    refine_keypoints: bool = True
    """Refine keypoints to sub-pixel accuracy by comparing image patches once a model exists."""
    refine_warps: bool = False
    """Match all pairs of a dense matcher again once a model exists and read the warps at its
    points: longer, more exact tracks for twice the matching time and more."""


@options
class ModelOptions:
    """How the model is made, and what is known of it."""

    mapper: Mapper = "incremental"
    """COLMAP's mapper. auto: incremental up to 500 images, global above."""
    model: Path | None = None
    """Known poses: folder of a COLMAP model, nerfstudio's transforms.json, or a TUM trajectory
    (camera to world). Its intrinsics are used too unless --intrinsics is given."""
    poses: PoseUse = "fixed"
    """fixed: triangulate, poses stay; refine: bundle adjustment afterwards; prior: ordinary mapping
    that stays near the known camera centres, or near GPS positions and in metres where no poses are
    given."""
    prior_stddev: Positive | None = None
    """Standard deviation of the centres that --poses prior takes as known, in their unit. By
    default 1 % of the cameras' mean distance from their middle; of GPS 5 m."""
    missing_poses: Literal["register", "leave-out"] = "register"
    """Images without a known pose: registered by the mapper afterwards, or left out."""
    extend: Path | None = None
    """Output folder of an earlier run: IMAGES are added to its model. Its settings, keypoints,
    matches and poses are taken over (--poses fixed or refine); it is not changed."""
    deterministic: bool = False
    """One thread throughout: the same model twice, but slower."""


@options
class ExportOptions:
    """What is written."""

    export: tuple[Export, ...] = ("ply",)
    """Formats written to export/ for every model, beside COLMAP's binary one in sparse/: see
    docs/handover.md. gim-export writes them afterwards."""
    dense: bool = False
    """Also find depth maps, and fuse them into a dense cloud (see gim-densify)."""
    dry_run: bool = False
    """Stop after the estimate of time and disk space; writes nothing."""


@options(rare=True)
class ExportTargetOptions(TargetOptions):
    """What exports hold, as in gim-export."""


@options(rare=True)
class RunDepthOptions(DepthOptions):
    """Depth maps, the dense cloud and its mesh, with --dense."""


@options
class ReconstructOptions(
    ImageOptions,
    MatchingOptions,
    TrackOptions,
    ModelOptions,
    ExportOptions,
    ExportTargetOptions,
    RunDepthOptions,
    RunOptions,
    TuningOptions,
    StepOptions,
):
    """Everything a reconstruction can be told."""

    cameras: CameraOptions = CameraOptions()
    video: VideoOptions = VideoOptions()
    pair: PairOptions = PairOptions()
    verify: VerifyOptions = VerifyOptions()
    map: MapOptions = MapOptions()
    refine: PhotometricOptions = PhotometricOptions()
    anchored: AnchoredOptions = AnchoredOptions()
    quantized: QuantizedOptions = QuantizedOptions()
    warps: RereadOptions = RereadOptions()


@options
class WantedOptions:
    """What is written."""

    to: tuple[Export, ...] = ()
    """Formats written to export/ in OUTPUT for every model: see docs/handover.md."""
    images: Path | None = None
    """Folder of the images, if they are not where they were."""


@options
class HandoverOptions(WantedOptions, TargetOptions):
    """Everything that gim-export can be told."""


@options
class DenseInputOptions:
    """What it is made of."""

    images: Path | None = None
    """Folder of the images, if they are not where they were."""


@options
class DensePartOptions:
    """Parts of a run, for arrays of jobs in a batch system."""

    shard: str | None = None
    """i/N: the depth of part i of N of the images, from 0. A run without --shard takes over what
    such jobs did, and does what is left."""
    stop_after: Literal["undistort", "depth", "fuse"] | None = None
    """Stop after this step."""


@options
class DensifyOptions(DenseInputOptions, DepthOptions, RunOptions, DensePartOptions):
    """Everything that gim-densify can be told."""


@options
class QueryMatchingOptions:
    """What queries are matched with."""

    pairs: str = "auto"
    """Images of the map that a query is matched with. auto: all of them up to 20, else retrieval;
    exhaustive; retrieval (the most similar ones, VLAD of the map's own descriptors); covisibility
    (few most similar ones and what sees the same points); or the path of a list "query image"."""
    neighbours: Count = 20
    """Images of the map a query, for retrieval and covisibility."""
    min_score: float | None = None
    """Least cosine similarity in retrieval; None accepts every value."""
    cluster: bool = False
    """One attempt for each group of retrieved images that share points, the best is taken: for
    places that look alike. Otherwise one attempt with all."""
    matcher: MatcherName | None = None
    """Matcher; that of the map by default. A dense one reads its warps at the map's keypoints."""
    anchors: MatcherName | None = None
    """Matcher whose keypoints and descriptors the images of the map have, for retrieval with a
    dense matcher; what the map's run says by default."""
    quality: Quality | None = None
    """Operating point; that of the map by default."""
    matcher_options: tuple[str, ...] = ()
    """Any other option of the matcher as NAME=VALUE."""
    features: Path | None = None
    """Keypoints and descriptors of the map's images (hloc's layout), for maps of other programs."""
    images: Path | None = None
    """Folder of the map's images, if a dense matcher needs it and it is not where it was."""


@options
class QueryCameraOptions:
    """Intrinsics of the queries."""

    intrinsics: str | None = None
    """As in gim-reconstruct: "PINHOLE,fx,fy,cx,cy", a COLMAP model or cameras.txt, or lines "GLOB
    MODEL width height params..."."""
    camera: Literal["auto", "map", "exif", "estimate"] = "auto"
    """Intrinsics of queries that --intrinsics does not name. auto: those of the map if it has one
    camera of the same size and EXIF does not contradict; else from EXIF, focal length refined; else
    estimated with the pose."""
    camera_model: str = "SIMPLE_RADIAL"
    """Model of cameras that are guessed."""
    camera_mode: CameraMode = "image"
    """Queries that share one focal length where it is not known (EXIF or estimated). image: none;
    single: all; folder: those of a sub-folder; auto: those of one size and EXIF camera. Give one of
    the three for photographs of one camera that does not zoom: what none of them says well by
    itself, all say together."""


@options
class AcceptanceOptions:
    """When a pose is accepted."""

    max_error: Positive = 12.0
    """Largest reprojection error of an inlier, px."""
    min_inliers: Annotated[int, Field(ge=4)] = 30
    """With fewer a query is not localised (COLMAP's own bound to register an image)."""
    min_inlier_ratio: NotNegative = 0.25
    """Of the points a query was matched to; with less it is not localised (COLMAP's bound too)."""
    confidence: Share = 0.99999
    """Of RANSAC having drawn one sample without outliers."""
    max_trials: Count = 10_000
    """Samples of RANSAC at most."""
    max_spread: Positive = 3.0
    """Dense matchers: readings of one point from several images farther than this from their median
    are not used, px in an image of 1600 px."""


@options
class LocalizeOptions(
    ImageOptions,
    QueryMatchingOptions,
    QueryCameraOptions,
    AcceptanceOptions,
    RunOptions,
    TuningOptions,
    StepOptions,
):
    """Everything localisation can be told."""


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Look at a model in the browser: points, cameras, matches, dense clouds and meshes."""

    model: tyro.conf.Positional[Path]
    """Output folder of gim-reconstruct, which may still be at work, or a COLMAP model."""
    compare: Path | None = None
    """Another run or model of the same images, laid over the first."""
    images: Path | None = None
    """Folder of the photographs, where MODEL is no run of ours or they were moved."""
    host: str = "127.0.0.1"
    """Address to listen at. On a server keep it, and forward the port (ssh -L)."""
    port: int = 8080
    """Port of the page; the next free one if it is taken."""
    record: Path | None = None
    """Write a turntable video (.mp4) and end; needs Chromium."""


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Serve a web page that matches images and reconstructs scenes."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all, behind a proxy that asks for a password."""
    port: int = 7860
    """Port of the page."""
    root_path: str | None = None
    """Path under which a reverse proxy shows it, such as /gim."""
    share: bool = False
    """Let Gradio tunnel it to a public address for a week."""
    device: str = "auto"
    """Where matchers run."""
    examples: Path | None = None
    """Folder of images to offer as examples."""
    max_files: int = 300
    """Files of one upload."""
    max_mb: int = 1000
    """Bytes of one upload, in millions."""
    max_megapixels: float = 60.0
    """Pixels of one image, in millions."""
    max_minutes: float = 30.0
    """A reconstruction is stopped after so many."""
