"""Which images share a camera, what is known about it, and rays and pixels of it."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np
import pycolmap

from gim_hloc.colmap.model_files import binary_cameras, image_cameras
from gim_hloc.colmap.rigs import RigCamera, RigSensor, read_rigs, rig_cameras
from gim_hloc.errors import InputError, some
from gim_hloc.files import by_unicode_form, read_text
from gim_hloc.images import doubtful_focal, focal_prior
from gim_hloc.options import CameraMode, CameraOptions, RefineIntrinsics

if TYPE_CHECKING:
    from gim_hloc.images import ImageRecord


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
    rig: RigSensor | None = None  # its place, if it is of a rig

    def to_facts(self) -> dict[str, Any]:
        """What JSON holds, and what keys of steps are made of."""
        facts = dataclasses.asdict(self)
        if self.rig is None:
            del facts["rig"]  # as of runs before there were rigs
        return facts

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> CameraSpec:
        """The inverse of ``to_facts``."""
        rig = facts.get("rig")
        if rig is not None:
            place = rig["cam_from_rig"] and tuple(rig["cam_from_rig"])
            rig = RigSensor(**{**rig, "cam_from_rig": place})
        return cls(**{**facts, "params": tuple(facts["params"]), "rig": rig})


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
    check_params(model, params, f"--intrinsics {text!r}")
    return model, params


def check_params(
    model: str, params: Sequence[float], where: str, size: tuple[int, int] | None = None
) -> None:
    """Refuse parameters of no camera, and a principal point outside the image of (w, h) pixels.

    Raises:
        InputError: begins with ``where``.
    """
    camera = _create_camera(model, 1.0, 2, 2)
    if len(params) != len(camera.params):
        raise InputError(
            f"{where}: {model} takes {len(camera.params)} parameters ({camera.params_info}), "
            f"got {len(params)}."
        )
    focal = [params[i] for i in camera.focal_length_idxs()]
    if not np.isfinite(params).all() or min(focal, default=1.0) <= 0:
        raise InputError(f"{where}: parameters must be finite and focal lengths positive.")
    if min(focal, default=1.0) < 1:
        raise InputError(
            f"{where}: a focal length of {min(focal):g} px is none: focal lengths and principal "
            "points are in pixels, not in shares of the image."
        )
    if size is None:
        return
    if min(size) < 1:
        raise InputError(f"{where}: an image of {size[0]}x{size[1]} px is none.")
    centre = [params[i] for i in camera.principal_point_idxs()]
    if any(not 0 <= value <= side for value, side in zip(centre, size, strict=False)):
        raise InputError(
            f"{where}: the principal point ({centre[0]:g}, {centre[1]:g}) lies outside the image "
            f"of {size[0]}x{size[1]} px. Are these the intrinsics of another size?"
        )


def assign_cameras(
    images: Sequence[ImageRecord],
    options: CameraOptions,
    known: Mapping[str, CameraSpec] | None = None,
    rigs: Sequence[RigCamera] = (),
) -> tuple[list[CameraSpec], list[str]]:
    """Decide which images share a camera and what is known about it.

    Args:
        images: the usable images.
        options: see ``CameraOptions``.
        known: name -> camera that is known from elsewhere (a model); ``options.intrinsics`` is for
            the other images only. Their ``names`` are not looked at.
        rigs: cameras of rigs besides those of ``options.rig``.

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
    rigged = rig_cameras(images, rigs, "rig")
    if options.rig is not None:
        rigged |= rig_cameras(images, read_rigs(options.rig), options.rig)
    for record in images:
        if record.name in rigged and record.name not in given:
            given |= _of_configuration(record, rigged[record.name])
    groups: dict[tuple[Any, ...], CameraSpec] = {}
    for record in images:
        spec = given.get(record.name)
        key = _group_key(record, spec, options.camera_mode)
        sensor = rigged[record.name].sensor if record.name in rigged else None
        if sensor is not None:
            key = ("rig", sensor.prefix)
        if key not in groups:
            spec = spec or _guessed_camera(record, options.camera_model)
            groups[key] = dataclasses.replace(spec, rig=sensor)
        group = groups[key]
        if (group.width, group.height) != (record.width, record.height):
            raise InputError(
                f"{f'--camera-mode {options.camera_mode}' if sensor is None else '--rig'}: "
                f"{group.names[0]} is "
                f"{group.width}x{group.height} but {record.name} is "
                f"{record.width}x{record.height}. Images of one camera have one size"
                f"{'; use --camera-mode auto' if sensor is None else ''}."
            )
        group.names.append(record.name)
    return list(groups.values()), notes + _doubts(
        [record for record in images if record.name not in given]
    )


def _of_configuration(record: ImageRecord, camera: RigCamera) -> dict[str, CameraSpec]:
    """The camera of an image, if the rig configuration has its intrinsics."""
    if camera.intrinsics is None:
        return {}
    model, params = camera.intrinsics
    check_params(model, params, f"The rig's {camera.sensor.prefix}", record.size)
    spec = CameraSpec(
        model=model, width=record.width, height=record.height, params=params, prior=True,
        given=True,
    )  # fmt: skip
    return {record.name: spec}


def _doubts(images: Sequence[ImageRecord]) -> list[str]:
    """A note for each implausible focal length in EXIF that was ignored."""
    doubtful: dict[str, list[str]] = {}
    for record in images:
        doubt = doubtful_focal(record)
        if doubt is not None:
            doubtful.setdefault(doubt, []).append(record.name)
    return [
        f"The focal length in EXIF of {some(names, 1)} is implausible and was ignored: {doubt}."
        for doubt, names in doubtful.items()
    ]


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
        record.video,
    )


def _guessed_camera(record: ImageRecord, model: str) -> CameraSpec:
    focal = focal_prior(record)
    return _camera_of_focal(model, record.width, record.height, focal)


def guessed_again(spec: CameraSpec) -> CameraSpec:
    """The same camera with its focal length guessed instead of known."""
    guessed = _camera_of_focal(spec.model, spec.width, spec.height, None)
    return dataclasses.replace(guessed, names=spec.names, rig=spec.rig)


def _camera_of_focal(model: str, width: int, height: int, focal: float | None) -> CameraSpec:
    # COLMAP's guess for an unknown camera.
    value = focal if focal else 1.2 * max(width, height)
    camera = _create_camera(model, value, width, height)
    return CameraSpec(
        model=model,
        width=width,
        height=height,
        params=tuple(float(p) for p in camera.params),
        prior=focal is not None,
        given=False,
    )


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A line of an intrinsics file."""

    head: str  # the name or glob of images, or COLMAP's number of the camera
    where: str
    model: str
    width: int
    height: int
    params: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def _given_cameras(images: Sequence[ImageRecord], text: str) -> dict[str, CameraSpec]:
    path = _table(text)
    if path is not None:
        rules = _rules(path)
        if path.name in ("cameras.bin", "cameras.txt") and all(r.head.isdigit() for r in rules):
            found = _by_camera_id(images, path, rules)
        else:
            found = _by_name(images, rules)
        if not found:
            raise InputError(_fits_none(images, path, rules))
        return {r.name: _fitting(r, found[r.name]) for r in images if r.name in found}
    if "," not in text:
        raise InputError(
            f"--intrinsics {text!r} is neither a file nor MODEL,params (such as "
            '"PINHOLE,fx,fy,cx,cy").'
        )
    model, params = parse_intrinsics(text)
    sizes = {record.size for record in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:4])
        raise InputError(
            f"--intrinsics {text!r} is one camera but the images have {len(sizes)} sizes "
            f"({shown}). Give a file of lines 'GLOB MODEL width height params...' instead."
        )
    (size,) = sizes
    check_params(model, params, f"--intrinsics {text!r}", size)
    rule = _Rule(head="", where="", model=model, width=size[0], height=size[1], params=params)
    return {record.name: _fitting(record, rule) for record in images}


def _table(text: str) -> Path | None:
    """The file that ``--intrinsics`` means; None for a camera written out."""
    if os.path.isdir(text):
        for folder in ("", "sparse/0", "sparse", "0"):
            for name in ("cameras.bin", "cameras.txt"):
                if (Path(text) / folder / name).is_file():
                    return Path(text) / folder / name
        raise InputError(
            f"--intrinsics {text}: the folder holds no cameras.bin or cameras.txt of COLMAP."
        )
    return Path(text) if os.path.isfile(text) else None  # a long text is no file name


def _rules(path: Path) -> list[_Rule]:
    """Cameras of a COLMAP model, or of a file of globs."""
    rules = []
    if path.suffix == ".bin":
        for camera_id, (model, width, height, params) in binary_cameras(path).items():
            where = f"{path}, camera {camera_id}"
            rules.append(
                _Rule(
                    head=str(camera_id),
                    where=where,
                    model=model,
                    width=width,
                    height=height,
                    params=params,
                )
            )
    else:
        for number, line in enumerate(read_text(path, "file of intrinsics").split("\n"), 1):
            line = line.strip()
            if line and not line.startswith("#"):
                rules.append(_rule(line, f"{path}, line {number}"))
    if not rules:
        raise InputError(f"{path} holds no camera.")
    for rule in rules:
        check_params(rule.model, rule.params, rule.where, rule.size)
    return rules


def _rule(line: str, where: str) -> _Rule:
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
    return _Rule(head=head, where=where, model=model, width=width, height=height, params=params)


def _by_camera_id(
    images: Sequence[ImageRecord], path: Path, rules: Sequence[_Rule]
) -> dict[str, _Rule]:
    """COLMAP's cameras: by the list of images beside them, else by size."""
    by_id = {int(rule.head): rule for rule in rules}
    camera_of = image_cameras(path.parent)
    forms = by_unicode_form(camera_of)
    found: dict[str, _Rule] = {}
    for record in images:
        name = record.name
        if name not in camera_of:
            name = forms.get(normalize("NFC", name), name)
        if name in camera_of:
            rule = by_id.get(camera_of[name])
        else:
            fitting = [rule for rule in rules if rule.size == record.size]
            if len(fitting) > 1:
                raise InputError(
                    f"{path}: {len(fitting)} cameras have the size of {record.name} "
                    f"({record.width}x{record.height}) and no images.txt beside it says which "
                    "one it is. Use a file of lines 'GLOB MODEL width height params...'."
                )
            # One camera for all: its size is checked.
            rule = fitting[0] if fitting else (rules[0] if len(rules) == 1 else None)
        if rule is not None:
            found[record.name] = rule
    return found


def _by_name(images: Sequence[ImageRecord], rules: Sequence[_Rule]) -> dict[str, _Rule]:
    """A line that is the name of an image is for that image; others are globs, the first counts."""
    names = {record.name for record in images}
    forms = by_unicode_form(names)
    found: dict[str, _Rule] = {}
    globs: list[_Rule] = []
    for rule in rules:
        name = rule.head if rule.head in names else forms.get(normalize("NFC", rule.head))
        if name is None:
            globs.append(rule)
        else:
            found.setdefault(name, rule)
    for rule in globs:
        for name in filter(partial(fnmatch.fnmatchcase, pat=rule.head), names):
            found.setdefault(name, rule)
    return found


def _fitting(record: ImageRecord, rule: _Rule) -> CameraSpec:
    if rule.size != record.size:
        raise InputError(
            f"{rule.where}: the camera is {rule.width}x{rule.height} but {record.name} is "
            f"{record.width}x{record.height}. Intrinsics belong to one image size."
        )
    return CameraSpec(
        model=rule.model,
        width=rule.width,
        height=rule.height,
        params=rule.params,
        prior=True,
        given=True,
    )


def _fits_none(images: Sequence[ImageRecord], path: Path, rules: Sequence[_Rule]) -> str:
    """Why a file of intrinsics names none of the images."""
    first = images[0]
    message = (
        f"--intrinsics {path} names no camera of the {len(images)} images (first: {first.name}, "
        f"{first.width}x{first.height})."
    )
    if not all(rule.head.isdigit() for rule in rules):
        return (
            f"{message} Its first line is for {rules[0].head!r}; names are paths relative to the "
            "image folder."
        )
    if path.name not in ("cameras.bin", "cameras.txt"):
        return (
            f"{message} Are its first fields COLMAP's camera numbers? Such a file has the name "
            "cameras.txt."
        )
    sizes = ", ".join(dict.fromkeys(f"{rule.width}x{rule.height}" for rule in rules))
    return f"{message} Its cameras are of {sizes}; intrinsics belong to one image size."


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


def colmap_camera(spec: CameraSpec) -> Any:
    """A known camera as a ``pycolmap.Camera`` without an id."""
    camera = pycolmap.Camera(
        model=spec.model, width=spec.width, height=spec.height, params=list(spec.params)
    )
    camera.has_prior_focal_length = spec.prior
    return camera


def camera_key(camera: CameraSpec) -> tuple[Any, ...]:
    """What two cameras of the same intrinsics have in common."""
    return (camera.model, camera.width, camera.height, camera.params)


def fixed_cameras(cameras: Sequence[CameraSpec], refine: RefineIntrinsics) -> set[int]:
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
