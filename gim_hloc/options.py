"""Options: one base, one dialect of messages, and the sections that commands share.

Nothing here imports torch or pycolmap, so that help and wrong flags answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import pydantic
import tyro
import yaml
from pydantic import Field
from pydantic_core import ErrorDetails

from gim_hloc.errors import InputError

Kind = TypeVar("Kind")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]  # 0 means none, or that it is chosen
Side = Annotated[int, Field(ge=16)]  # pixels

_MATCHER = "matcher"  # marks types of fields that name matchers
MatcherName = Annotated[str, _MATCHER]


def is_code(matcher: str) -> bool:
    """Whether the name of a matcher says where code lies: ``module:Class``."""
    return ":" in matcher


def code_in(options: Any) -> dict[str, list[str]]:
    """Fields that name matchers, with those names in them that are code."""
    found = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if _MATCHER in _metadata(hint):
            value = getattr(options, name)
            texts = [value] if isinstance(value, str) else list(value or ())
            found[name] = [text for text in texts if is_code(text)]
    return {name: texts for name, texts in found.items() if texts}


def _metadata(hint: Any) -> list[Any]:
    """What annotates a type or those that it consists of."""
    inner = [one for part in get_args(hint) for one in _metadata(part)]
    return [*getattr(hint, "__metadata__", ()), *inner]


# --------------------------------------------------------------------------------------------- base


@overload
def options(kind: type[Kind]) -> type[Kind]: ...
@overload
def options(*, section: str = "", rare: bool = False) -> Callable[[type[Kind]], type[Kind]]: ...


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field)
)
def options(kind: type[Kind] | None = None, *, section: str = "", rare: bool = False) -> Any:
    """Make a class of options: frozen, keyword-only, checked.

    Args:
        kind: fields with types, bounds in the annotation, and their effect below each.
        section: what its flags begin with, as in ``--verify.max-error``.
        rare: whether ``--help-all`` alone shows them.

    Raises:
        InputError: when an instance is made, for an unknown name or a value out of its bounds.
    """
    if kind is None:
        return functools.partial(options, section=section, rare=rare)
    config = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(kind)
    checked = made.__init__
    numbers = {name: word for name, hint in get_type_hints(made).items() if (word := _number(hint))}

    @functools.wraps(checked)
    def init(self: Any, *args: Any, **values: Any) -> None:
        for name in numbers.keys() & values.keys():
            if isinstance(values[name], bool):  # YAML's yes and on; pydantic takes them for 1
                full = f"{section}.{name}" if section else name
                raise InputError(f"{full} is {values[name]}; it must be {numbers[name]}.")
        try:
            checked(self, *args, **values)
        except pydantic.ValidationError as error:
            raise _refusal(error, made, f"{section}." if section else "") from None

    made.__init__ = init
    made.section, made.rare = section, rare or bool(section)
    return made


def _number(hint: Any) -> str | None:
    """What a type wants in words, where it is a number or none."""
    if hint in (int, float):
        return _MUST[hint.__name__]
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    return next(filter(None, map(_number, get_args(hint))), None)


def given(kind: type[Kind], options: Any, overrides: Mapping[str, Any]) -> Kind:
    """The options that a function got: an object of them or None, and single fields.

    Raises:
        InputError: another object, an unknown field or a refused value.
    """
    if options is None:
        options = kind()
    if not isinstance(options, kind):
        raise InputError(
            f"options is a {type(options).__name__}; it must be {kind.__name__}. Give single "
            "fields as keyword arguments."
        )
    return replace(options, overrides)


def build(
    kind: type[Kind],
    values: Any,
    *,
    base: Kind | None = None,
    where: str = "",
    prefix: str = "",
) -> Kind:
    """Options of a mapping as YAML gives it.

    Args:
        kind: class made by ``options``.
        values: some of its fields; sections may name some of theirs.
        base: what the others are taken from; None: the defaults.
        where: file that the values come from, for messages.
        prefix: of the names, for messages.

    Raises:
        InputError: a name that does not exist, or a value that does not fit.
    """
    said = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        place = prefix.rstrip(".") or "the file"
        raise InputError(f"{said}{place} must hold settings (name: value), not {values!r}.")
    hints = get_type_hints(kind)
    found = {} if base is None else dict(vars(base))
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"{said}{_unknown(str(key), kind, prefix)}")
        if dataclasses.is_dataclass(hints[key]):
            inner: Any = hints[key]
            given = {} if value is None else value
            now = found.get(key, inner())
            found[key] = build(inner, given, base=now, where=where, prefix=f"{prefix}{key}.")
        else:
            found[key] = value
    try:
        return kind(**found)
    except InputError as error:
        text = str(error)
        raise InputError(said + ("" if text.startswith(prefix) else prefix) + text) from None


def replace(current: Kind, values: Mapping[str, Any]) -> Kind:
    """Options with some fields changed; ``InputError`` for a field that does not exist."""
    for name in values:
        if name not in {f.name for f in dataclasses.fields(current)}:  # type: ignore[arg-type]
            raise InputError(_unknown(name, type(current), ""))
    return dataclasses.replace(current, **values)  # type: ignore[type-var]


def select(kind: type[Kind], current: Any) -> Kind:
    """Options of a class from others that have all its fields."""
    return kind(**{f.name: getattr(current, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def to_mapping(value: Any) -> Any:
    """Options as dictionaries, lists, numbers and text: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_mapping(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_mapping(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; ``InputError`` where it is missing or no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is no YAML: {error}") from None


def _refusal(error: pydantic.ValidationError, kind: Any, prefix: str) -> InputError:
    first = error.errors(include_url=False)[0]
    name = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return InputError(_unknown(str(first["loc"][-1]), kind, prefix))
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # of a pair of numbers
        name = name.rpartition(".")[0]
        return InputError(f"{name} is {first['input']!r}; it must be a list with more entries.")
    if first["type"] == "missing":
        return InputError(f"{name} is missing.")
    if first["type"] in ("value_error", "assertion_error"):  # a rule of ours, in its own words
        return InputError(str(first["ctx"]["error"]))
    return InputError(f"{name} is {first['input']!r}; it must be {_must(first)}.")


_MUST = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "finite_number": "finite",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "too_long": "a list of {max_length} entries",
    "mapping": "a mapping",
    "dict": "a mapping",
    "dataclass": "a mapping",
    "none": "null",
}


def _must(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    for kind in (error["type"], error["type"].partition("_")[0]):
        if kind in _MUST:
            return _MUST[kind].format(**context)
    return f"otherwise ({error['msg']})"


def _unknown(key: str, kind: Any, prefix: str) -> str:
    """There is no such setting; the nearest one, wherever it stands, may be meant."""
    here = [f.name for f in dataclasses.fields(kind)]
    every = {name.rpartition(".")[2]: prefix + name for name in reversed(_names(kind))}
    for known, cutoff in ((every, 1.0), (here, 0.5), (every, 0.7)):  # right name, wrong section?
        close = difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
        if close:
            near = every[close[0]] if known is every else prefix + close[0]
            break
    else:
        near = ""
    hint = f"Did you mean {near!r}?" if near else f"Settings here: {', '.join(here)}."
    return f"There is no setting {prefix + key!r}. {hint}"


def _names(kind: Any, prefix: str = "") -> list[str]:
    hints = get_type_hints(kind)
    found: list[str] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = f"{prefix}{field.name}"
        found += _names(hint, f"{name}.") if dataclasses.is_dataclass(hint) else [name]
    return found


# ----------------------------------------------------------------------------------------- sections

Quality = Literal["fast", "base", "precise"]
CameraMode = Literal["auto", "single", "folder", "image"]
RefineIntrinsics = Literal["auto", "none", "all"]
Mapper = Literal["auto", "incremental", "global", "hierarchical"]
PoseUse = Literal["fixed", "refine", "prior"]
ImageFormat = Literal["jpg", "png"]
PanoramaUse = Literal["auto", "all", "none"]
Export = Literal[
    "txt", "ply", "glb", "nvm", "bundler", "openmvs", "metashape", "realityscan", "nerfstudio",
    "3dgs", "geo",
]  # fmt: skip


@options
class TargetOptions:
    """What exports hold."""

    num_downscales: CountOrNone = 0
    """3dgs, nerfstudio: reduced copies of images and masks: 3 for images_2, images_4, images_8."""
    dense_points: CountOrNone = 0
    """3dgs: so many points to start from: the sparse ones, and dense ones up to this number."""
    gps: str | None = None
    """Write all of it in metres, by GPS: exif, or a file "name,latitude,longitude,altitude"."""
    gcp: Path | None = None
    """Write all of it in metres, by ground control points: OpenDroneMap's gcp_list.txt."""
    scale: tuple[str, str, Positive] | None = None
    """Write all of it in metres, by one distance: A B METRES; A and B are images (their cameras) or
    places in the model as x,y,z."""
    ref_model: Path | None = None
    """Write all of it in metres, by known poses: COLMAP model, transforms.json or TUM file."""
    crs: Literal["enu", "utm"] = "enu"
    """With --gps: metres east, north and up of an origin, or UTM less an offset."""


@options
class CameraOptions:
    """How images share cameras and where intrinsics come from."""

    camera_mode: CameraMode = "auto"
    """auto: one camera for all images of the same size and EXIF camera; single: one for all;
    folder: one a sub-folder; image: one each."""
    camera_model: str = "SIMPLE_RADIAL"
    """Any COLMAP model; one focal length and one radial term suit an unknown camera."""
    intrinsics: str | None = None
    """"PINHOLE,fx,fy,cx,cy" (pixels, COLMAP's corner origin), COLMAP's cameras.txt or cameras.bin
    or the folder of one, or a text file of lines "GLOB MODEL width height params..."."""
    rig: Path | None = None
    """COLMAP's rig configuration (JSON): cameras that are fixed to each other, by the prefixes of
    their images' names; images of one name after the prefix are of one moment."""
    panorama: PanoramaUse = "auto"
    """Images and frames twice as wide as high that are taken apart into views of a rig. auto: those
    whose XMP calls them equirectangular (GPano); all; none."""
    refine_intrinsics: RefineIntrinsics = "auto"
    """auto: refine what was guessed, keep what was given; none: keep all; all: refine all."""


@options
class FrameFileOptions:
    """How frames of videos are stored."""

    max_size: Side | None = None
    """Reduce stored frames to this long side in pixels; None keeps them."""
    format: ImageFormat = "jpg"
    """Of the stored frames."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of JPEG, whose colours are not subsampled."""


@options
class FramesOptions(FrameFileOptions):
    """Which frames of a video a reconstruction gets."""

    fps: Positive | None = None
    """One frame per bucket of 1/fps seconds; 2 if neither this nor --num is given."""
    num: Count | None = None
    """As many buckets of equal length as this."""
    max_frames: Count | None = None
    """Of long videos fewer a second, so that there are no more buckets than this."""
    min_motion: NotNegative = 0.01
    """Least motion since the frame chosen last, as a share of the long side; 0 takes all."""
    start: float | None = None
    """First moment in seconds."""
    end: float | None = None
    """Last moment in seconds."""

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> FramesOptions:
        if self.fps is not None and self.num is not None:
            raise ValueError("Give either fps or num: how many frames to choose.")
        return self


@options(section="video")
class VideoOptions(FramesOptions):
    """Which frames of a video among the images are taken."""

    max_frames: Count | None = 300  # of long videos fewer a second


@options(section="pair")
class PairOptions:
    """How image pairs are chosen."""

    # auto, exhaustive, sequential, retrieval, spatial, poses, covisibility, file, a union such as
    # sequential+retrieval, or the path of a pair list.
    mode: str = "auto"
    exhaustive_limit: CountOrNone = 60  # auto: up to so many images every pair is taken
    window: Count = 10  # sequential: followers in name order that an image is paired with
    quadratic: bool = True  # sequential: also followers at distance 2, 4, 8, ... 2^(window - 1)
    # sequential: search images similar to every so-manieth frame, 0 = off. Not needed beside
    # retrieval, which searches for all.
    loop_every: CountOrNone = 0
    # Partners per image in retrieval, loop closure, spatial, poses and covisibility; 0 takes 20 up
    # to 400 images, then the root of their number, at most 50.
    neighbours: CountOrNone = 0
    min_score: float | None = None  # retrieval: least cosine similarity of a pair, None = any
    descriptor: str = "vlad"  # retrieval: global descriptor, vlad or a registered one
    clusters: Count = 64  # retrieval: size of VLAD's codebook
    seed: CountOrNone = 0  # retrieval: of the codebook
    # retrieval: h5 file of global descriptors in hloc's layout, instead of computing them.
    global_descriptors: Path | None = None
    max_distance_m: Positive = 100.0  # spatial: greatest distance of two cameras in metres
    use_altitude: bool = False  # spatial: distances in 3D, if all images have an altitude
    max_angle_deg: Positive = 30.0  # poses: greatest angle between two viewing directions
    model: Path | None = None  # poses, covisibility: folder of a COLMAP model
    pairs_file: Path | None = None  # file: pair list, one "name0 name1" a line


@options(section="verify")
class VerifyOptions:
    """Two-view geometric verification (COLMAP's ``TwoViewGeometryOptions``)."""

    max_error: Positive = 4.0  # px of the size that the matcher saw: epipolar error of an inlier
    min_num_inliers: Count = 15  # fewer: the pair is dropped
    # Smallest sum of the inliers' confidences, below which the pair is dropped; 0: none.
    # None: the matcher's own number at its operating point, none where it has no such number.
    min_confidence_sum: NotNegative | None = None
    min_inlier_ratio: Share = 0.1  # share assumed by RANSAC's stopping rule
    confidence: Share = 0.999  # of having drawn one outlier-free sample
    min_num_trials: Count = 30  # RANSAC iterations at least (COLMAP: 100)
    max_num_trials: Count = 20000  # and at most


@options(section="map")
class MapOptions:
    """Mapping. Fields left None keep COLMAP's default."""

    min_model_size: CountOrNone = 3  # images; smaller models are dropped unless they are all
    init_min_num_inliers: Count | None = None  # of the first pair (COLMAP: 100)
    init_min_tri_angle: Positive | None = None  # degrees, of the first pair (COLMAP: 16)
    abs_pose_min_num_inliers: Count | None = None  # to register an image (COLMAP: 30)
    filter_max_reproj_error: Positive | None = None  # px seen, above go (COLMAP: 4)
    ba_refine_principal_point: bool = False
    multiple_models: bool = True  # keep going with the images that did not fit the first model


@options(section="anchored")
class AnchoredOptions:
    """Numbers of anchored tracks; px are those of an image of 1600 px (``tracks.anchored``)."""

    # Spacing of grid anchors; smaller: more points, more time. 0: none.
    grid_px: Annotated[float, Field(ge=0)] = 24.0
    mask_margin_px: NotNegative = 4.0  # anchors keep this far away from masked pixels
    min_certainty: float = 0.1  # of a reading; what is hidden or outside has less
    max_cycle_px: Positive = 2.0  # from a point there and back, in cells of the warp
    symmetric: bool = True  # place readings halfway between the warp and the inverse of its reverse
    merge_px: Positive = 2.0  # a reading this near an anchor means that anchor
    guided: bool = True  # link keypoints with keypoints before stars
    max_spread_px: Positive = 3.0  # readings of one point farther from their median are dropped
    max_keypoints: Count | None = 12288  # an image; the longest tracks are kept. None: all

    @pydantic.field_validator("grid_px")
    @classmethod
    def _no_dense_grid(cls, value: float) -> float:
        if 0 < value < 4:
            raise ValueError(f"anchored.grid_px is {value:g}; it must be at least 4, or 0: none.")
        return value


@options(section="quantized")
class QuantizedOptions:
    """Numbers of hloc's aggregation; GIM's setting."""

    max_error: Positive = 2.0  # px; its whole part is a bin's side, and matches move no farther
    cell_size: Positive = 8  # px, one keypoint a cell; at least max_error is used
    max_keypoints: Count | None = 8192  # an image; None keeps all and assigns nothing anew


@options(section="warps")
class RereadOptions:
    """Reading the warps again once a model exists; px as in ``tracks.anchored``."""

    rounds: CountOrNone = 2  # of reading and bundle adjustment in turn
    min_certainty: float = 0.1  # of a reading
    max_cycle_px: Positive = 2.0  # from a point there and back, in cells of the warp
    symmetric: bool = True  # place readings halfway between the warp and the inverse of its reverse
    max_shift_px: Positive = 3.0  # readings farther from the projected point are dropped
    scale_px: Positive = 1.0  # distance from the projected point at which a reading counts half
    min_readings: Count = 2  # for an image to join a track


@options(section="refine")
class PhotometricOptions:
    """Refining keypoints by comparing patches."""

    radius: Count = 5  # px of the reference view; the patch has 2 radius + 1 pixels a side
    iterations: Count = 8  # Gauss-Newton steps at most
    max_shift: Positive = 2.5  # px seen; an observation that wants to move farther keeps its place
    min_correlation: Share = 0.9  # of the grey values after the move, else it keeps its place
    max_scale: Annotated[float, Field(ge=1)] = 2.5  # change of size beyond which none is compared
    neighbours: Annotated[int, Field(ge=3)] = 10  # points that the local plane is fitted to
    min_share: Share = 0.35  # of an image's comparisons confirmed; below, it is not trusted
    min_confirmed: CountOrNone = 60  # observations; images with fewer confirmed keep all of theirs
    rounds: Count | None = (
        None  # refinement and adjustment in turn: one with --quality fast, else 2
    )


@options
class DepthOptions:
    """Depth maps, the dense cloud and its mesh."""

    depth_from: Literal["auto", "images", "warps", "colmap"] = "auto"
    """images: grey values compared (plane sweep, PatchMatch); warps: those of the run's dense
    matcher; colmap: its PatchMatch stereo, with CUDA. auto: warps, else colmap, else images."""
    depth_size: CountOrNone = 0
    """Long side of depth maps in pixels; 0: 640, 1000 or 1600 by the run's --quality."""
    depth_neighbours: Count = 6
    """Images that an image is compared with at most."""
    mesh: bool = False
    """Also lay a surface through the dense cloud: dense/mesh.ply and mesh.glb."""


@options(section="fit")
class FitOptions:
    """Thresholds of the robust fits (USAC with MAGSAC); the numbers are those of GIM's demo.

    A threshold counts pixels of the image that the matcher saw, but at least stored pixels: an
    image of 8000 pixels matched at 1000 is not judged to an eighth of what the matcher can see.
    """

    fundamental_px: Positive = 1.0  # distance from the epipolar line of an inlier
    fundamental_confidence: Share = 0.999999  # of having found the best model
    fundamental_iterations: Count = 10_000  # at most
    homography_px: Positive = 8.0  # distance of an inlier from where the homography puts it
    homography_confidence: Share = 0.999  # of having found the best model
    homography_iterations: Count = 10_000  # at most


# What every run is told, whatever it does.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Who does the work; by default this process.

    Raises:
        InputError: devices for Ray, or Ray without a number of workers.
    """

    devices: tuple[str, ...] = ()  # one process a device ("cpu", "cuda:0", ...)
    engine: Literal["local", "ray"] = "local"
    workers: int = 0  # Ray's actors
    device: str = "auto"  # of Ray's actors and of this process

    def __post_init__(self) -> None:
        if self.engine == "ray" and (self.devices or self.workers < 1):
            raise InputError("Ray places its workers itself: give --workers N and no --devices.")

    @property
    def count(self) -> int:
        """Processes that work."""
        return self.workers if self.engine == "ray" else len(self.devices) or 1


@options
class WorkOptions:
    """Who does the work."""

    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    devices: tuple[str, ...] = ()
    """Several of them: a process for each, such as cuda:0 cuda:1, or cpu cpu."""
    engine: Literal["local", "ray"] = "local"
    """This machine, or --workers of Ray, here or on the cluster of RAY_ADDRESS; all of them must
    see the files."""
    workers: CountOrNone = 0
    """Ray's workers, each with a GPU where there are any; or processes on --device here."""

    @property
    def where(self) -> Where:
        """The same for ``workers.run``."""
        local = (self.device,) * self.workers if self.engine == "local" else ()
        return Where(
            devices=self.devices or local,
            engine=self.engine,
            workers=self.workers,
            device=self.device,
        )


@options
class MatcherOptions:
    """What matches."""

    matcher: MatcherName = "aliked_lightglue"
    """Name of a matcher; --list-matchers shows them."""
    quality: Quality = "base"
    """Operating point of the matcher: image size, number of keypoints and thresholds together."""
    max_size: Count | None = None
    """Long side in pixels that the matcher sees, instead of the operating point's."""
    matcher_options: tuple[str, ...] = ()
    """Any other option of the matcher as NAME=VALUE, e.g. filter_threshold=0.2."""


@options
class RunOptions(WorkOptions):
    """How it runs."""

    seed: CountOrNone = 0
    """Of every random number."""
    overwrite: bool = False
    """Start over instead of reusing what an earlier run left."""
    prune: bool = False
    """Remove what is kept for other settings and images than these."""


@options(rare=True)
class TuningOptions:
    """What is chosen well without you."""

    threads: CountOrNone = 0
    """Network threads side by side on a processor; 0 chooses."""
    batch_size: CountOrNone = 0
    """Pairs a network call on a GPU; 0 chooses. Halved when memory runs out."""
    cache_gb: Positive | None = None
    """Memory for encodings, 10^9 bytes; the device first, then the host."""


# In the order of a reconstruction; gim-localize has locate and model in the place of verify to
# export.
StepName = Literal[
    "frames", "encode", "pairs", "match", "rotations", "link", "cascade", "verify", "map", "rescue",
    "refine", "dense", "export",
    "locate", "model", "report",
]  # fmt: skip


@options(rare=True)
class StepOptions:
    """Parts of a run, for arrays of jobs in a batch system."""

    step: Literal["encode", "match", "verify"] | None = None
    """Do this step alone, or the part of it that --shard names. A run without --step takes over
    what such jobs did, and does what is left."""
    shard: str | None = None
    """i/N: part i of N of the step, from 0."""
    stop_after: StepName | None = None
    """Stop after this step."""
    start: Annotated[StepName | None, tyro.conf.arg(name="from")] = None
    """Do this step and those after it again."""

    def again(self, step: StepName) -> bool:
        """Whether a step is to be done again, whatever an earlier run left of it."""
        names: tuple[str, ...] = get_args(StepName)
        return self.start is not None and names.index(self.start) <= names.index(step)
