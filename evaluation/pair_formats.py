"""Lists of image pairs in the formats that others publish: SuperGlue's, LoFTR's, homographies.

========== =================================================================================
format     what it is
========== =================================================================================
superglue  text, 38 fields a line: two names, two numbers of quarter turns, K of both images and
           the 4x4 pose, row by row
megadepth  LoFTR's scene files (``.npz`` with image_paths, intrinsics, poses, pair_infos), a folder
           of them or a text file that names them (MegaDepth-1500)
scannet    LoFTR's ``test.npz`` (name, rel_pose) with ``intrinsics.npz`` (ScanNet-1500)
homography folders of images and matrices: HPatches (``1.ppm``, ``H_1_2``) or Oxford (``img1.png``,
           ``H1to2p``)
pairs      no truth: text with two names a line (and two numbers of turns), or folders
           ``<pair>/0.jpg 1.jpg``
========== =================================================================================

Poses take points of camera 0 to camera 1, K and H are of stored pixels, integer = pixel centre.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.options import Format
from gim_hloc.evaluation.pair_set import (
    TRUTH_NUMBERS,
    BadPair,
    HomographyPair,
    Pair,
    PosedPair,
    check_calibration,
    parse_numbers,
    split_truth,
)
from gim_hloc.pickles import read_npz

POSED: tuple[Format, ...] = ("superglue", "megadepth", "scannet")

_FIELDS = 4 + TRUTH_NUMBERS  # of a line of SuperGlue's format
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
_MATRIX_NAME = re.compile(r"H_?(\d+)(?:_|to)(\d+)p?(?:\.txt)?")
# Matrices are judged in units of this many pixels, where the entries of a homography are alike.
_UNIT = 1000.0
_SINGULAR = 1e-9  # smallest over largest singular value


def _escape(name: str) -> str:
    """A name as it can stand in identifiers: different names stay different."""
    # Bytes of a file's name that are no text are lone surrogates here; files are written in UTF-8.
    return re.sub(r"[\s#%\udc80-\udcff]", lambda found: f"%{ord(found[0]) & 0xFF:02X}", name)


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image of a list."""

    name: str  # path relative to the image root
    turns: int = 0  # quarter turns counter-clockwise before matchers see it, 0 to 3

    @property
    def key(self) -> str:
        """What it is called in runs; two turns of one file are two images."""
        return f"{self.name} turned by {90 * self.turns} degrees" if self.turns else self.name

    @property
    def token(self) -> str:
        """What stands in identifiers: no blanks, and no ``#``."""
        token = _escape(self.name)
        return f"{token}@{90 * self.turns}" if self.turns else token


@dataclass(frozen=True, kw_only=True)
class PairList:
    """What a list holds."""

    name: str  # of the set: names results
    format: Format
    root: Path  # folder that image names are relative to
    files: dict[str, ImageFile]  # images by their keys, which pairs name
    pairs: tuple[Pair, ...]
    bad: tuple[BadPair, ...] = ()  # entries that are no pair; each counts as a failed pair
    lost: tuple[str, ...] = ()  # whole files that cannot be used: how many pairs is unknown
    repeated: int = 0  # entries left out because a later one has the same identifier
    calibrated_size: tuple[int, int] | None = None  # (width, height) that K is for; None: stored

    def __len__(self) -> int:
        return len(self.pairs) + len(self.bad)


@dataclass(kw_only=True)
class _Entries:
    """Pairs and faults while a list is read."""

    files: dict[str, ImageFile] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    bad: list[BadPair] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add(
        self, scene: str, files: Sequence[ImageFile], kind: type[Pair] = Pair, **known: Any
    ) -> None:
        """A pair of two images."""
        a, b = files
        self.files |= {a.key: a, b.key: b}
        identifier = f"{scene}#{a.token}#{b.token}"
        self.pairs.append(kind(identifier=identifier, image0=a.key, image1=b.key, **known))

    def add_bad(self, label: str, reason: str, scene: str, names: Sequence[str] = ()) -> None:
        """An entry that cannot be used, and what it names."""
        identifier = f"{_escape(label)}##"
        if len(names) >= 2:
            identifier = "#".join((scene, *(ImageFile(name=name).token for name in names[:2])))
        self.bad.append(BadPair(label=label, identifier=identifier, reason=reason))


def read_list(
    path: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    format: Format | None = None,
    name: str | None = None,
    intrinsics: str | os.PathLike[str] | None = None,
    calibrated_size: tuple[int, int] | None = None,
) -> PairList:
    """Read a list of pairs.

    Args:
        path: file or folder, see the module.
        images: folder that names are relative to. By default the one of the list's folder, its
            ``images`` or ``scannet_test_1500`` and the folder above that has most of the images.
        format: by default found out from the content.
        name: of the set; by default that of the file or folder.
        intrinsics: of format scannet; by default ``intrinsics.npz`` beside the list.
        calibrated_size: (width, height) of the images that K is for, if not the stored one. By
            default 640 x 480 for format scannet, to which LoFTR's ``intrinsics.npz`` belongs.

    Returns:
        The list. Entries that cannot be used are named in it, not raised.

    Raises:
        InputError: the list cannot be read, is none of these formats, has no usable pair, or no
            folder has any of its images.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no list {path}.")
    if format is not None and format not in get_args(Format):
        raise InputError(f"No format {format!r}; choose one of {', '.join(get_args(Format))}.")
    format = format or detect_format(path)
    if format == "scannet":
        entries = _read_scannet(path, None if intrinsics is None else Path(intrinsics))
    else:
        entries = _READERS[format](path)
    if not entries.pairs:
        faults = [*entries.lost, *(f"{bad.label}: {bad.reason}" for bad in entries.bad)]
        listed = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise InputError(f"{path} has no usable pair" + (f": {listed}" if listed else "") + ".")
    last = {pair.identifier: pair for pair in entries.pairs}
    faults_by_name = {bad.identifier: bad for bad in entries.bad if bad.identifier not in last}
    if calibrated_size is None and format == "scannet":
        calibrated_size = (640, 480)
    return PairList(
        name=_set_name(path) if name is None else _clean(name),
        format=format,
        root=_find_root(path, images, [file.name for file in entries.files.values()]),
        files=entries.files,
        pairs=tuple(last.values()),
        bad=tuple(faults_by_name.values()),
        lost=tuple(entries.lost),
        repeated=len(entries.pairs) + len(entries.bad) - len(last) - len(faults_by_name),
        calibrated_size=calibrated_size,
    )


def detect_format(path: Path) -> Format:
    """Find out the format of a list from its content.

    Raises:
        InputError: it is none of them, or cannot be read.
    """
    if path.is_dir():
        if (path / "test.npz").is_file():
            return "scannet"
        if any(path.glob("[!.]*.npz")):
            return "megadepth"
        if any(_matrices(path)):
            return "homography"
        if any(_pair_folders(path)):
            return "pairs"
        raise InputError(
            f"{path} is no folder of pairs: it has neither .npz files, nor homographies (H_1_2 or "
            "H1to2p), nor folders with 0.jpg and 1.jpg."
        )
    if path.suffix == ".npz":
        arrays = read_npz(path)
        if {"name", "rel_pose"} <= arrays.keys():
            return "scannet"
        if "pair_infos" in arrays:
            return "megadepth"
        raise InputError(
            f"{path} is no list of pairs: it has {', '.join(sorted(arrays)) or 'no arrays'} and "
            "not pair_infos (MegaDepth) or name and rel_pose (ScanNet)."
        )
    lengths = [len(tokens) for _, tokens in _lines(path)]
    if not lengths:
        raise InputError(f"{path} is empty.")
    if max(lengths) > 4:
        return "superglue"
    if max(lengths) == 1:
        first = _named_file(path.parent, next(_lines(path))[1][0])
        return detect_format(first) if first.exists() else "megadepth"
    return "pairs"


def _set_name(path: Path) -> str:
    """The name of a file or folder as it can stand in dumps and folders."""
    path = path.resolve()
    stem = path.stem if path.suffix in (".txt", ".npz") else path.name
    # All lists of ScanNet are called test.npz.
    return _clean(path.parent.name if path.name == "test.npz" else stem)


def _clean(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "pairs"


def _find_root(path: Path, images: str | os.PathLike[str] | None, found: Sequence[str]) -> Path:
    folder = path if path.is_dir() else path.parent
    roots = [folder, folder / "images", folder / "scannet_test_1500", folder.parent]
    if images is not None:
        roots = [Path(images)]
        if not roots[0].is_dir():
            raise InputError(f"The image folder {roots[0]} does not exist.")
    names = list(dict.fromkeys(found))
    counts = []
    for root in roots:
        if (root / names[0]).is_file() and (root / names[-1]).is_file():
            return root
        counts.append(sum((root / name).is_file() for name in names))
    if not any(counts):
        looked = ", ".join(str(root) for root in roots if root.is_dir())
        raise InputError(
            f"None of the {len(names)} images that {path} names, such as {names[0]}, is in "
            f"{looked}: say which folder the names are relative to (--images)."
        )
    return roots[counts.index(max(counts))]


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and tokens of the lines of a text file that are neither empty nor comments."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no list of pairs: it is no text in UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        tokens = line.split()
        if tokens and not tokens[0].startswith("#"):
            yield number, tokens


def _turns(token: str) -> int:
    try:
        turns = int(token)
    except ValueError:
        raise ValueError(f"{token!r} is not a number of quarter turns") from None
    if not 0 <= turns <= 3:
        raise ValueError(f"{turns} is not a number of quarter turns (0 to 3)")
    return turns


# ---------------------------------------------------------------------------------------- SuperGlue


def _read_superglue(path: Path) -> _Entries:
    entries, scene = _Entries(), _set_name(path)
    for number, tokens in _lines(path):
        try:
            if len(tokens) != _FIELDS:
                raise ValueError(f"the line has {len(tokens)} tokens instead of {_FIELDS}")
            files = _turned_files(tokens)
            truth = split_truth(parse_numbers(tokens[4:]))
        except ValueError as error:
            entries.add_bad(f"{path.name}, line {number}", str(error), scene, tokens)
        else:
            entries.add(scene, files, PosedPair, **truth)
    return entries


def _turned_files(tokens: Sequence[str]) -> tuple[ImageFile, ImageFile]:
    """Two names and, where the line goes on, their quarter turns."""
    turns = [_turns(token) for token in tokens[2:4]] or [0, 0]
    return ImageFile(name=tokens[0], turns=turns[0]), ImageFile(name=tokens[1], turns=turns[1])


# -------------------------------------------------------------------------------------------- LoFTR


def _named_file(folder: Path, token: str) -> Path:
    """A file that a list of LoFTR's names, with or without its suffix."""
    path = folder / token
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def _npz_files(path: Path) -> list[Path]:
    """The scene files of a folder, of a text file that names them, or the file itself."""
    if path.is_dir():
        return sorted(path.glob("[!.]*.npz"))
    if path.suffix == ".npz":
        return [path]
    return [_named_file(path.parent, tokens[0]) for _, tokens in _lines(path)]


def _read_megadepth(path: Path) -> _Entries:
    entries = _Entries()
    for file in _npz_files(path):
        try:
            _add_scene(file, entries)
        except InputError as error:
            entries.lost.append(str(error))
    return entries


def _add_scene(path: Path, entries: _Entries) -> None:
    arrays = read_npz(path)
    missing = {"image_paths", "intrinsics", "poses", "pair_infos"} - arrays.keys()
    if missing:
        raise InputError(f"{path} is no scene file of MegaDepth: it lacks {min(missing)}.")
    names, calibrations, poses = (
        list(arrays[key]) if arrays[key].ndim else []
        for key in ("image_paths", "intrinsics", "poses")
    )
    if not len(names) == len(calibrations) == len(poses):
        raise InputError(
            f"{path} is no scene file of MegaDepth: it has {len(names)} image_paths, "
            f"{len(calibrations)} intrinsics and {len(poses)} poses."
        )
    scene = _set_name(path)
    infos = arrays["pair_infos"]
    for number, info in enumerate(infos if infos.ndim else ()):
        known: list[str] = []
        try:
            found = _parse_info(info, names, calibrations, poses, known)
        except ValueError as error:
            entries.add_bad(f"{path.name}, pair {number}", str(error), scene, known)
        else:
            entries.add(scene, [ImageFile(name=name) for name in known], PosedPair, **found)


def _parse_info(
    info: Any,
    names: Sequence[Any],
    calibrations: Sequence[Any],
    poses: Sequence[Any],
    known: list[str],
) -> dict[str, Any]:
    """What ((index0, index1), overlap, ...) says; names go to ``known`` as they are found."""
    try:
        indices = [int(index) for index in info[0]]
        overlap = float(info[1]) if len(info) > 1 else 0.0
    except (TypeError, ValueError, IndexError):
        raise ValueError("the entry is not ((index, index), overlap, ...)") from None
    if len(indices) != 2 or not all(0 <= index < len(names) for index in indices):
        raise ValueError(f"the images {indices} are not among the {len(names)} of the scene")
    for index in indices:
        if not isinstance(names[index], str) or not names[index]:
            raise ValueError(f"image {index} has no path")
        known.append(str(names[index]))
    K0, K1 = (_matrix(calibrations[index], (3, 3), f"K of image {index}") for index in indices)
    worlds = [_matrix(poses[index], (4, 4), f"the pose of image {index}") for index in indices]
    try:
        pose = worlds[1] @ np.linalg.inv(worlds[0])
    except np.linalg.LinAlgError:
        raise ValueError(f"the pose of image {indices[0]} is singular") from None
    check_calibration(K0, K1, pose)
    overlap = overlap if math.isfinite(overlap) else 0.0
    return {"covisible0": overlap, "covisible1": overlap, "K0": K0, "K1": K1, "T_0to1": pose}


def _matrix(value: Any, shape: tuple[int, int], what: str) -> np.ndarray:
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != shape:
        raise ValueError(f"{what} is not a {shape[0]} x {shape[1]} matrix of numbers")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} is not finite")
    return matrix


def _read_scannet(path: Path, intrinsics: Path | None) -> _Entries:
    entries = _Entries()
    files = [path / "test.npz"] if path.is_dir() else _npz_files(path)
    for file in files:
        try:
            _add_frames(file, intrinsics or file.with_name("intrinsics.npz"), entries)
        except InputError as error:
            entries.lost.append(str(error))
    return entries


def _add_frames(path: Path, intrinsics: Path, entries: _Entries) -> None:
    arrays = read_npz(path)
    if not {"name", "rel_pose"} <= arrays.keys():
        raise InputError(f"{path} is no list of ScanNet pairs: it lacks name or rel_pose.")
    names, poses = arrays["name"], arrays["rel_pose"]
    count = len(names) if names.ndim else 0
    numbers = names.dtype.kind in "iu" and poses.dtype.kind in "fiu"
    if names.shape != (count, 4) or poses.shape != (count, 12) or not numbers:
        raise InputError(
            f"{path} is no list of ScanNet pairs: name is {names.shape} and rel_pose {poses.shape} "
            "instead of (n, 4) integers and (n, 12) numbers."
        )
    calibrations = read_npz(intrinsics)
    for number, (frames, flat) in enumerate(zip(names.tolist(), poses, strict=True)):
        scene = f"scene{frames[0]:04d}_{frames[1]:02d}"
        files = [ImageFile(name=f"{scene}/color/{frame}.jpg") for frame in frames[2:]]
        try:
            if scene not in calibrations:
                raise ValueError(f"{intrinsics.name} has no K of {scene}")
            K = _matrix(calibrations[scene], (3, 3), f"K of {scene}")
            pose = np.eye(4)
            pose[:3] = np.asarray(flat, dtype=np.float64).reshape(3, 4)
            check_calibration(K, K, pose)
        except ValueError as error:
            label = f"{path.name}, pair {number}"
            entries.add_bad(label, str(error), scene, [file.name for file in files])
        else:
            entries.add(scene, files, PosedPair, K0=K, K1=K, T_0to1=pose)


# ------------------------------------------------------------------------------------- homographies


def _matrices(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Files of homographies in a folder and the folders in it, with the numbers of the images."""
    for path in sorted([*folder.glob("H*"), *folder.glob("*/H*")], key=_natural):
        named = _MATRIX_NAME.fullmatch(path.name)
        if named and path.is_file():
            yield path, named[1], named[2]


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part) if part.isdigit() else -1, part) for part in parts]


def _read_homographies(path: Path) -> _Entries:
    if not path.is_dir():
        raise InputError(f"{path} is no folder; homographies are read from folders.")
    entries = _Entries()
    for file, *numbers in _matrices(path):
        relative = file.relative_to(path)
        scene = _escape(relative.parent.name) or _set_name(path)
        names: list[str] = []
        try:
            for number in numbers:
                names.append(_numbered_image(file.parent, number).relative_to(path).as_posix())
            H = _read_matrix(file)
        except ValueError as error:
            entries.add_bad(relative.as_posix(), str(error), scene, names)
        else:
            entries.add(scene, [ImageFile(name=name) for name in names], HomographyPair, H=H)
    return entries


def _numbered_image(folder: Path, number: str) -> Path:
    for stem in (number, f"img{number}"):
        for suffix in _SUFFIXES:
            for path in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix.upper()}"):
                if path.is_file():
                    return path
    raise ValueError(f"there is no image {number} or img{number} beside it")


def _read_matrix(path: Path) -> np.ndarray:
    try:
        tokens = path.read_text(encoding="utf-8").split()
        numbers = np.array([float(token) for token in tokens])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"no 3 x 3 matrix can be read ({error})") from None
    if numbers.size != 9:
        raise ValueError(f"it has {numbers.size} numbers instead of 9")
    H = numbers.reshape(3, 3)
    if not np.isfinite(H).all():
        raise ValueError("the homography is not finite")
    scale = np.array([_UNIT, _UNIT, 1.0])
    singular = np.linalg.svd(H * scale / scale[:, None], compute_uv=False)
    if singular[2] <= _SINGULAR * singular[0]:
        raise ValueError("the homography is singular")
    return H


# ------------------------------------------------------------------------------------ without truth


def _pair_folders(folder: Path) -> Iterator[tuple[Path, Path | None, Path | None]]:
    """Folders with an image 0 or 1, the folder itself included."""
    for sub in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        found: list[Path | None] = []
        for number in ("0", "1"):
            try:
                found.append(_numbered_image(sub, number))
            except ValueError:
                found.append(None)
        if any(found):
            yield sub, found[0], found[1]


def _read_pairs(path: Path) -> _Entries:
    entries, scene = _Entries(), _set_name(path)
    if path.is_dir():
        for folder, *found in _pair_folders(path):
            if None in found:
                label = folder.relative_to(path).as_posix()
                reason = f"there is no image {found.index(None)} in it"
                entries.add_bad(label, reason, scene)
            else:
                names = [image.relative_to(path).as_posix() for image in found if image]
                entries.add(scene, [ImageFile(name=name) for name in names])
        return entries
    for number, tokens in _lines(path):
        try:
            if len(tokens) not in (2, 4):
                raise ValueError(f"the line has {len(tokens)} tokens instead of 2 names")
            files = _turned_files(tokens)
        except ValueError as error:
            entries.add_bad(f"{path.name}, line {number}", str(error), scene, tokens)
        else:
            entries.add(scene, files)
    return entries


_READERS: dict[Format, Callable[[Path], _Entries]] = {
    "superglue": _read_superglue,
    "megadepth": _read_megadepth,
    "homography": _read_homographies,
    "pairs": _read_pairs,
}
