"""Which images share a camera, what is known about it, and rays and pixels of it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pycolmap

from gim_hloc.errors import InputError

if TYPE_CHECKING:
    from gim_hloc.images import ImageRecord

CameraMode = Literal["auto", "single", "folder", "image"]


Refine = Literal["auto", "none", "all"]


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


def image_names(path: Path) -> dict[int, str]:
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


def camera_key(camera: CameraSpec) -> tuple[Any, ...]:
    """What two cameras of the same intrinsics have in common."""
    return (camera.model, camera.width, camera.height, camera.params)


def fixed_cameras(cameras: Sequence[CameraSpec], refine: Refine) -> set[int]:
    """Ids of the cameras whose intrinsics must not move."""
    if refine == "all":
        return set()
    return {index for index, spec in enumerate(cameras, 1) if refine == "none" or spec.given}


def size_of(camera: Any) -> tuple[int, int]:
    """Width and height, pixels."""
    return int(camera.width), int(camera.height)


def project(camera: Any, points_in_camera: np.ndarray) -> np.ndarray:
    """Pixels (N, 2), corner origin; NaN where a point cannot be projected."""
    projected = camera.img_from_cam(points_in_camera)
    if isinstance(projected, np.ndarray) and projected.dtype == np.float64:
        return projected.reshape(-1, 2)
    return np.array(
        [(np.nan, np.nan) if p is None else p for p in projected], dtype=np.float64
    ).reshape(-1, 2)


def unproject(camera: Any, xy_colmap: np.ndarray) -> np.ndarray:
    """Rays (N, 3) with z = 1 of pixels, corner origin; NaN where the camera has none."""
    found = camera.cam_from_img(np.ascontiguousarray(xy_colmap, dtype=np.float64))
    plane = [(np.nan, np.nan) if ray is None else ray[:2] for ray in found]
    return np.column_stack([np.array(plane).reshape(-1, 2), np.ones(len(xy_colmap))])
