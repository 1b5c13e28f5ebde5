"""ZEB's twelve sets, and sets like them, on disk: labels, images, archives, verification.

A set is a folder ``zeb/<name>`` with PNG images and one ``.txt`` per pair, whose first line has 38
tokens: two names, two overlaps, K of both images (row by row) and the 4x4 pose that takes points of
camera 0 to camera 1. K is of the original pixels, integer = pixel centre. The sets differ in how
files are named, in the size that matchers see and in whether images are padded; `ZebSet` says how.
A folder with a file ``set.json`` (`read_description`) is a set of a user's own.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from gim_hloc.errors import InputError, OutputError

if TYPE_CHECKING:
    from gim_hloc.types import ImageData, ImageOptions

logger = logging.getLogger(__name__)

TOKENS = 38
DESCRIPTION = "set.json"  # in the folder of a set that is none of the twelve
_CELL = 8  # sides of images that are not padded are multiples of it, px
# Determinant of a rotation may be off by this much: labels are rounded to five digits at worst.
_ROTATION_SLACK = 0.1


@dataclass(frozen=True, kw_only=True)
class ZebSet:
    """How one of the sets is stored and shown to matchers."""

    name: str  # as on the reference's command line
    column: str  # three letters of the published table; the name of other sets
    dump_name: str  # as dump files name it
    separator: Literal["_", "-"]  # between scene and image names in file names
    strip_suffix: bool  # names in labels carry a suffix that the image file's name lacks
    identifier: str  # how a name stands in identifiers; {} is the name of the image file
    pairs: int  # published, or what the description tells
    scenes: int  # the same
    img_size: int | None = None  # long side shown to matchers, px; larger images are reduced
    pad_ratio: float | None = None  # long over short side of the padded image; None: not padded

    @property
    def folder(self) -> str:
        """Name of the set's folder in ``zeb/``."""
        return self.name.lower()

    @property
    def padded_size(self) -> tuple[int, int] | None:
        """(width, height) to which images are padded with zeros at the right and the bottom."""
        if self.pad_ratio is None or self.img_size is None:
            return None
        return self.img_size, math.ceil(int(self.img_size / self.pad_ratio) / _CELL) * _CELL

    def stem(self, token: str) -> str:
        """The part of a name in a label that stands in the image file's name."""
        return token.rpartition(".")[0] or token if self.strip_suffix else token

    def identify(self, scene: str, token0: str, token1: str) -> str:
        """The identifier that dumps give a pair."""
        names = (self.identifier.format(self.stem(token)) for token in (token0, token1))
        return "#".join((scene, *names))


# In the columns' order of the published table and of the analysis.
SETS: tuple[ZebSet, ...] = (
    ZebSet(
        name="GL3D", column="GL3", dump_name="GL3D", separator="_", strip_suffix=True,
        identifier="{}", pairs=5165, scenes=430,
    ),
    ZebSet(
        name="BlendedMVS", column="BLE", dump_name="BlendedMVS", separator="_", strip_suffix=True,
        identifier="{}", pairs=5049, scenes=113,
    ),
    ZebSet(
        name="ETH3DI", column="ETI", dump_name="ETH3DI", separator="-", strip_suffix=True,
        identifier="{}.JPG", pairs=2131, scenes=7, img_size=1600, pad_ratio=1.5,
    ),
    ZebSet(
        name="ETH3DO", column="ETO", dump_name="ETH3DO", separator="-", strip_suffix=True,
        identifier="{}.JPG", pairs=3438, scenes=6, img_size=1600, pad_ratio=1.5,
    ),
    ZebSet(
        name="KITTI", column="KIT", dump_name="KITTI", separator="-", strip_suffix=True,
        identifier="{}.png", pairs=5013, scenes=9, img_size=1240, pad_ratio=3.25,
    ),
    ZebSet(
        name="RobotcarWeather", column="WEA", dump_name="RobotcarWeather", separator="_",
        strip_suffix=False, identifier="{}", pairs=1834, scenes=5,
    ),
    ZebSet(
        name="RobotcarSeason", column="SEA", dump_name="RobotcarSeason", separator="_",
        strip_suffix=False, identifier="{}", pairs=1077, scenes=1,
    ),
    ZebSet(
        name="RobotcarNight", column="NIG", dump_name="RobotcarNight", separator="_",
        strip_suffix=False, identifier="{}", pairs=2080, scenes=5,
    ),
    ZebSet(
        name="MultiFoV", column="MUL", dump_name="Multi-FoV", separator="-", strip_suffix=False,
        identifier="img/{}.png", pairs=5000, scenes=1,
    ),
    ZebSet(
        name="SceneNet", column="SCE", dump_name="SceneNetRGBD", separator="-", strip_suffix=False,
        identifier="{}.jpg", pairs=5100, scenes=170,
    ),
    ZebSet(
        name="ICLNUIM", column="ICL", dump_name="ICL-NUIM", separator="-", strip_suffix=False,
        identifier="{}.jpg", pairs=5000, scenes=4,
    ),
    ZebSet(
        name="GTASfM", column="GTA", dump_name="GTA-SfM", separator="-", strip_suffix=False,
        identifier="{}", pairs=5029, scenes=19,
    ),
)  # fmt: skip


def find_set(name: str, root: str | os.PathLike[str] | None = None) -> ZebSet:
    """Return a set by its name, column, folder or name in dumps; case does not matter.

    Args:
        name: of one of the twelve, or of another set in ``root``.
        root: folder with the sets' folders (`find_root`); None: only the twelve are known.

    Raises:
        InputError: there is no such set, or its description is damaged.
    """
    wanted = set_folder(name)
    for entry in SETS:
        if wanted == entry.folder:
            return entry
    others = _described_folders(Path(root)) if root is not None else []
    for folder in others:
        if folder.name == wanted:
            return read_description(folder)
    known = [*(entry.name for entry in SETS), *(folder.name for folder in others)]
    raise InputError(f"There is no set {name!r}; known are {', '.join(known)}.")


def set_folder(name: str) -> str:
    """Return the name of a set's folder, from its name, column, folder or name in dumps."""
    wanted = name.lower()
    for entry in SETS:
        if wanted in (entry.folder, entry.column.lower(), entry.dump_name.lower()):
            return entry.folder
    return wanted


def find_root(folder: str | os.PathLike[str]) -> Path:
    """Return the folder with the sets' folders: ``folder`` itself or ``zeb/`` in it.

    Raises:
        InputError: neither has the folder of a set.
    """
    folder = Path(folder)
    for candidate in (folder / "zeb", folder):
        if any((candidate / entry.folder).is_dir() for entry in SETS):
            return candidate
        if _described_folders(candidate):
            return candidate
    if not folder.exists():
        raise InputError(f"{folder} does not exist.")
    names = ", ".join(entry.folder for entry in SETS)
    raise InputError(f"{folder} has no folder of a ZEB set ({names}, or one with {DESCRIPTION}).")


def present_sets(folder: str | os.PathLike[str]) -> list[ZebSet]:
    """Return the sets whose folder exists: the twelve in the table's order, then others by name.

    Raises:
        InputError: there is none, or a description is damaged.
    """
    root = find_root(folder)
    own = [read_description(path) for path in _described_folders(root)]
    return [entry for entry in SETS if (root / entry.folder).is_dir()] + own


# ------------------------------------------------------------------------------------- other sets

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def check_set_name(name: str) -> None:
    """Raise InputError if a set that is none of the twelve cannot have this name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a set: letters, digits and _ . + - can, the first of "
            "them a letter or digit."
        )
    if set_folder(name) in (entry.folder for entry in SETS):
        raise InputError(
            f"{name!r} is a set of ZEB: choose another name, or results would pass for ZEB's."
        )


def read_description(folder: str | os.PathLike[str]) -> ZebSet:
    """Read ``set.json``, which makes a folder a set although it is none of the twelve.

    It is an object with ``name`` (lower-cased, it is the folder's name) and optionally
    ``separator`` (``-``), ``strip_suffix`` (false), ``img_size`` and ``pad_ratio`` (null), whose
    meaning `ZebSet` tells, and ``scenes``, an object that maps each scene to an object with its
    number of ``pairs``; other keys have no effect. Without ``scenes``, what is there is complete.

    Args:
        folder: of the set.

    Raises:
        InputError: the file cannot be read or has a value that is none; the message names it.
    """
    path = Path(folder) / DESCRIPTION
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name = data["name"]
        separator = data.get("separator", "-")
        strip_suffix = data.get("strip_suffix", False)
        img_size, pad_ratio = data.get("img_size"), data.get("pad_ratio")
        if not isinstance(name, str) or separator not in ("-", "_"):
            raise ValueError("name is no text or separator is neither - nor _")
        if not isinstance(strip_suffix, bool):
            raise ValueError("strip_suffix is neither true nor false")
        if img_size is not None and (not isinstance(img_size, int) or img_size < _CELL):
            raise ValueError(f"img_size is no whole number from {_CELL} on")
        if pad_ratio is not None and not float(pad_ratio) >= 1:
            raise ValueError("pad_ratio is below 1")
        if pad_ratio is not None and img_size is None:
            raise ValueError("pad_ratio needs img_size")
        if "scenes" in data:
            counts = {str(scene): int(entry["pairs"]) for scene, entry in data["scenes"].items()}
        else:
            labels, _ = _read_texts(path.parent, separator)
            counts = dict(Counter(text.scene for text in labels))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} does not describe a set: {reason}.") from error
    check_set_name(name)
    if name.lower() != path.parent.name:
        raise InputError(
            f"{path} describes the set {name}, so its folder must be named {name.lower()}."
        )
    return ZebSet(
        name=name,
        column=name,
        dump_name=name,
        separator=separator,
        strip_suffix=strip_suffix,
        identifier="{}",
        pairs=sum(counts.values()),
        scenes=len(counts),
        img_size=img_size,
        pad_ratio=None if pad_ratio is None else float(pad_ratio),
    )


def _described_folders(root: Path) -> list[Path]:
    """The folders in ``root`` that have a description, by name; the twelve's need none."""
    taken = {entry.folder for entry in SETS}
    found = [path.parent for path in root.glob(f"*/{DESCRIPTION}")]
    return sorted(folder for folder in found if folder.name not in taken)


# ------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True, kw_only=True, eq=False)
class ZebPair:
    """One pair to match and judge."""

    identifier: str  # scene#name0#name1, as in dumps
    scene: str
    image0: str  # file name in the set's folder
    image1: str
    covisible0: float  # overlap in [0, 1]
    covisible1: float
    K0: np.ndarray  # (3, 3) float64, original pixels
    K1: np.ndarray
    T_0to1: np.ndarray  # (4, 4) float64, x1 = R @ x0 + t
    label: str  # file name of the label


@dataclass(frozen=True, kw_only=True)
class BadLabel:
    """A label that cannot be judged by, and why. It counts as a failed pair."""

    label: str  # file name
    identifier: str  # as far as the label has names; else its file's name stands in
    reason: str
    covisible0: float = 0.0  # of the label, if it has them
    covisible1: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Labels:
    """All labels of one set."""

    pairs: tuple[ZebPair, ...]  # in the reference's order
    bad: tuple[BadLabel, ...]
    repeated: int = 0  # labels left out because a later one has the same identifier
    foreign: tuple[str, ...] = ()  # names of text files that are no labels

    def __len__(self) -> int:
        return len(self.pairs) + len(self.bad)


def read_labels(root: str | os.PathLike[str], zeb_set: ZebSet) -> Labels:
    """Read all labels of one set.

    Args:
        root: folder with the sets' folders, see `find_root`.
        zeb_set: which set.

    Returns:
        The pairs, sorted by scene and then by the label's tokens as text. Labels that cannot be
        used are returned beside them, not raised: one of them must not stop a benchmark.

    Raises:
        InputError: the set's folder does not exist or has no label at all.
    """
    folder = Path(root) / zeb_set.folder
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: {zeb_set.name} is not unpacked there.")
    texts, foreign = _read_texts(folder, zeb_set.separator)
    if foreign:
        logger.warning("%s: passed over, no labels: %s", folder, ", ".join(foreign[:10]))
    if not texts:
        raise InputError(f"{folder} has no label (.txt).")
    found: list[tuple[list[str], ZebPair]] = []
    bad: list[BadLabel] = []
    for text in texts:
        try:
            if text.unreadable:
                raise ValueError(text.unreadable)
            pair = parse_label(text.tokens, zeb_set, text.scene, text.path.name)
            found.append(([text.scene, *text.tokens], pair))
        except ValueError as error:
            bad.append(_bad_label(text.tokens, zeb_set, text.scene, text.path, str(error)))
    found.sort(key=lambda item: item[0])
    # The last of equal identifiers is what the reference's dumps keep.
    last = {pair.identifier: pair for _, pair in found}
    pairs = tuple(pair for _, pair in found if last[pair.identifier] is pair)
    faults = {entry.identifier: entry for entry in bad if entry.identifier not in last}
    return Labels(
        pairs=pairs,
        bad=tuple(faults.values()),
        repeated=len(texts) - len(pairs) - len(faults),
        foreign=tuple(foreign),
    )


@dataclass(frozen=True)
class _Text:
    """The first line of a text file."""

    path: Path
    scene: str
    tokens: list[str]
    unreadable: str  # why, else empty


def _read_texts(folder: Path, separator: str) -> tuple[list[_Text], list[str]]:
    """Read the labels of a set; returns them by name, and the names of other text files.

    A label is of a scene that has images, or its third token is a number, however damaged it is.
    Names that begin with a dot are of the file system (macOS writes ``._<name>`` on foreign disks).
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    scenes = {name.split(separator, 1)[0] for name in names if name.endswith(".png")}
    labels, foreign = [], []
    for name in names:
        if not name.endswith(".txt"):
            continue
        path = folder / name
        tokens, unreadable = [], ""
        try:
            with path.open(encoding="utf-8") as stream:
                tokens = stream.readline().split()
        except (OSError, UnicodeDecodeError) as error:
            unreadable = f"cannot be read ({error})"
        text = _Text(path, path.stem.split(separator, 1)[0], tokens, unreadable)
        if text.scene in scenes or (len(tokens) > 2 and _is_number(tokens[2])):
            labels.append(text)
        else:
            foreign.append(name)
    return labels, foreign


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def parse_label(tokens: Sequence[str], zeb_set: ZebSet, scene: str, label: str) -> ZebPair:
    """Make a pair from the tokens of a label's line.

    Args:
        tokens: the line, split at blanks.
        zeb_set: which set, for names.
        scene: from the label's file name.
        label: the label's file name.

    Raises:
        ValueError: what is wrong with the line, in words.
    """
    if len(tokens) < TOKENS:
        raise ValueError(f"the line has {len(tokens)} tokens instead of {TOKENS}")
    try:
        numbers = np.array([float(token) for token in tokens[2:TOKENS]])
    except ValueError as error:
        raise ValueError(f"a token is not a number ({error})") from error
    covisible, rest = numbers[:2], numbers[2:]
    K0, K1, pose = rest[:9].reshape(3, 3), rest[9:18].reshape(3, 3), rest[18:].reshape(4, 4)
    check_calibration(K0, K1, pose)
    return ZebPair(
        identifier=zeb_set.identify(scene, tokens[0], tokens[1]),
        scene=scene,
        image0=f"{scene}{zeb_set.separator}{zeb_set.stem(tokens[0])}.png",
        image1=f"{scene}{zeb_set.separator}{zeb_set.stem(tokens[1])}.png",
        covisible0=float(covisible[0]),
        covisible1=float(covisible[1]),
        K0=K0,
        K1=K1,
        T_0to1=pose,
        label=label,
    )


def check_calibration(K0: np.ndarray, K1: np.ndarray, pose: np.ndarray) -> None:
    """Raise ValueError, in words, if a pair's K (3, 3) or pose (4, 4) cannot be used."""
    for name, K in (("K0", K0), ("K1", K1)):
        if not np.isfinite(K).all():
            raise ValueError(f"{name} is not finite")
        if K[0, 0] <= 0 or K[1, 1] <= 0 or abs(np.linalg.det(K)) < 1e-12:
            raise ValueError(f"{name} is singular or has a focal length that is not positive")
    if not np.isfinite(pose).all():
        raise ValueError("the pose is not finite")
    if abs(np.linalg.det(pose[:3, :3]) - 1) > _ROTATION_SLACK:
        raise ValueError("the pose's rotation is none (its determinant is not 1)")


def _bad_label(
    tokens: Sequence[str], zeb_set: ZebSet, scene: str, path: Path, reason: str
) -> BadLabel:
    overlaps = [0.0, 0.0]
    for i, token in enumerate(tokens[2:4]):
        try:
            value = float(token)
        except ValueError:
            continue
        overlaps[i] = value if math.isfinite(value) else 0.0
    named = len(tokens) >= 2
    # No blanks in identifiers, whatever the file is called.
    stem = "_".join(path.stem.split())
    return BadLabel(
        label=path.name,
        identifier=zeb_set.identify(scene, tokens[0], tokens[1]) if named else f"{stem}##",
        reason=reason,
        covisible0=overlaps[0],
        covisible1=overlaps[1],
    )


# ------------------------------------------------------------------------------------------- images


def network_sizes(
    size: tuple[int, int], zeb_set: ZebSet | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size to which an image is resized, and that after padding.

    Args:
        size: (width, height) of the image in pixels.
        zeb_set: whose rule to follow; None floors both sides to multiples of 8 only.

    Returns:
        (width, height) twice; equal where nothing is padded.
    """
    width, height = size
    long_side = zeb_set.img_size if zeb_set is not None else None
    if long_side is not None and max(size) > long_side:
        scale = long_side / max(size)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    padded = zeb_set.padded_size if zeb_set is not None else None
    if padded is None:
        floored = tuple(max(_CELL, side // _CELL * _CELL) for side in (width, height))
        return (floored[0], floored[1]), (floored[0], floored[1])
    # A portrait image does not fit into the landscape frame: the frame grows as far as needed.
    frame = tuple(
        max(side, math.ceil(own / _CELL) * _CELL)
        for side, own in zip(padded, (width, height), strict=True)
    )
    return (width, height), (frame[0], frame[1])


def prepare_image(
    path: str | os.PathLike[str],
    zeb_set: ZebSet | None,
    options: ImageOptions,
    *,
    name: str | None = None,
) -> ImageData:
    """Read an image as ZEB shows it to a matcher.

    The set decides the size; the matcher's ``max_size`` and ``upsample`` play no part. Resizing is
    linear on 8-bit values, as in the reference. The affine map back aligns pixel areas
    (``x = (x' + 0.5) * scale - 0.5``); the reference multiplies by ``scale`` alone, which differs
    by (scale - 1) / 2 px.

    Args:
        path: image file.
        zeb_set: whose rules to follow; None: no limit, no padding.
        options: of the matcher: gray or colour.
        name: of the image; by default the file's name.

    Returns:
        The image; its mask is None without padding, else True inside of the image.

    Raises:
        InputError: the file does not exist or cannot be read, named.
    """
    import cv2
    import torch

    from gim_hloc.images import read_rgb
    from gim_hloc.types import ImageData

    path = Path(path)
    pixels = read_rgb(path, upright=False)
    height, width = pixels.shape[:2]
    (new_width, new_height), (full_width, full_height) = network_sizes((width, height), zeb_set)
    if (new_width, new_height) != (width, height):
        pixels = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    if options.grayscale:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    planes = np.zeros((pixels.shape[2], full_height, full_width), np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=planes[:, :new_height, :new_width])
    mask = None
    if (new_width, new_height) != (full_width, full_height):
        mask = torch.zeros(full_height, full_width, dtype=torch.bool)
        mask[:new_height, :new_width] = True
    x, y = width / new_width, height / new_height
    return ImageData(
        image=torch.from_numpy(planes),
        name=path.name if name is None else name,
        size=(width, height),
        to_original=np.array([[x, 0.0, x / 2 - 0.5], [0.0, y, y / 2 - 0.5]]),
        mask=mask,
    )


# ------------------------------------------------------------------------------------- verification


@dataclass(frozen=True, kw_only=True)
class SetVerification:
    """What `verify` found of one set."""

    zeb_set: ZebSet
    present: bool  # whether the folder exists
    pairs: int = 0  # labels, bad ones included
    scenes: int = 0
    images: int = 0  # different images that the labels name
    problems: tuple[str, ...] = ()  # one sentence each; bad labels, missing and unreadable files

    @property
    def complete(self) -> bool:
        """Whether pairs and scenes are as many as published and nothing is wrong."""
        counts = (self.pairs, self.scenes) == (self.zeb_set.pairs, self.zeb_set.scenes)
        return self.present and counts and not self.problems


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    root: Path
    sets: tuple[SetVerification, ...]

    @property
    def complete(self) -> bool:
        """Whether all sets that were to be checked are there as published, without a fault."""
        return all(entry.complete for entry in self.sets)

    @property
    def usable(self) -> bool:
        """Whether what is there has no fault, however much of ZEB that is."""
        return not any(entry.problems for entry in self.sets)


def verify(
    folder: str | os.PathLike[str],
    *,
    sets: Sequence[str] | None = None,
    decode: bool = True,
    progress: bool = False,
) -> Verification:
    """Check an unpacked ZEB.

    Args:
        folder: with ``zeb/`` in it, or ``zeb/`` itself.
        sets: names of the sets to check; None checks all twelve and the others that are there, or
            only these where there is none of the twelve.
        decode: decode every image once; False only looks whether the files exist.
        progress: show progress bars.

    Raises:
        InputError: no set is there at all, or a name is none.
    """
    root = find_root(folder)
    if sets is not None:
        chosen = [find_set(name, root) for name in sets]
    else:
        others = [entry for entry in present_sets(root) if entry not in SETS]
        whole = any((root / entry.folder).is_dir() for entry in SETS)
        chosen = [*(SETS if whole else ()), *others]
    return Verification(
        root=root,
        sets=tuple(_verify_set(root, entry, decode=decode, progress=progress) for entry in chosen),
    )


def _verify_set(root: Path, zeb_set: ZebSet, *, decode: bool, progress: bool) -> SetVerification:
    from gim_hloc.images import scan

    folder = root / zeb_set.folder
    if not folder.is_dir():
        return SetVerification(zeb_set=zeb_set, present=False)
    try:
        labels = read_labels(root, zeb_set)
    except InputError as error:
        return SetVerification(zeb_set=zeb_set, present=True, problems=(str(error),))
    problems = [f"{bad.label}: {bad.reason}" for bad in labels.bad]
    if labels.repeated:
        problems.append(f"{labels.repeated} labels repeat an identifier")
    uses = Counter(name for pair in labels.pairs for name in (pair.image0, pair.image1))
    missing = sorted(name for name in uses if not (folder / name).is_file())
    problems += [f"{name}: missing, {uses[name]} pairs need it" for name in missing]
    if decode:
        names = sorted(uses.keys() - set(missing))
        rejected = scan(
            folder, min_size=_CELL, names=names, upright=False, progress=progress
        ).rejected
        problems += [str(image) for image in rejected if image.reason != "duplicate"]
    scenes = {pair.scene for pair in labels.pairs}
    return SetVerification(
        zeb_set=zeb_set,
        present=True,
        pairs=len(labels) + labels.repeated,
        scenes=len(scenes),
        images=len(uses),
        problems=tuple(problems),
    )


# ----------------------------------------------------------------------------------------- archives


def unpack(
    archives: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]
) -> list[Path]:
    """Unpack ZIP and TAR archives into a folder; nothing outside of it is ever written.

    All names of an archive are checked before its first file is written. Files that are there
    already with the right size are kept, so that an interrupted call can be repeated; each file is
    complete or absent.

    Args:
        archives: files; their kind is recognised by their content.
        folder: made if it does not exist.

    Returns:
        The unpacked files, those that were there already included.

    Raises:
        InputError: an archive cannot be read, or has a name that leads out of the folder, a link
            or a device; the message names archive and member.
        OutputError: the disk has too little room.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for archive in archives:
        written += _unpack_one(Path(archive), folder)
    return written


@dataclass(frozen=True)
class _Member:
    name: str
    size: int  # bytes
    open: Callable[[], Any]


def _unpack_one(archive: Path, folder: Path) -> list[Path]:
    root = folder.resolve()
    with _open_archive(archive) as members:
        targets = [(member, _target(archive, member.name, root)) for member in members]
        needed = sum(m.size for m, path in targets if not _is_there(path, m.size))
        free = shutil.disk_usage(root).free
        if needed > free:
            raise OutputError(
                f"{archive} needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free."
            )
        for member, path in targets:
            if not _is_there(path, member.size):
                _write_member(archive, member, path)
    return [path for _, path in targets]


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_member(archive: Path, member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with member.open() as source, temporary.open("wb") as sink:
            _copy(source, sink, member.size)
        os.replace(temporary, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{archive}: {member.name} cannot be unpacked ({error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], sink: IO[bytes], size: int) -> None:
    """Copy exactly ``size`` bytes: a member may hold more than its archive declares."""
    left = size
    while chunk := source.read(1 << 20):
        left -= len(chunk)
        if left < 0:
            raise ValueError("it holds more than the archive declares")
        sink.write(chunk)
    if left:
        raise ValueError(f"it ends {left} bytes early")


def _target(archive: Path, name: str, root: Path) -> Path:
    """Where a member is written; its name must stay inside the folder on every system."""
    pure = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in pure.parts if part != "."]
    unsafe = pure.is_absolute() or ".." in parts or not parts or any(":" in part for part in parts)
    path = root.joinpath(*parts) if not unsafe else root
    # A link that was in the folder before could lead out of it too.
    if unsafe or not path.parent.resolve().is_relative_to(root) or path.is_symlink():
        raise InputError(f"{archive} has a file {name!r} that would land outside of the folder.")
    return path


@contextmanager
def _open_archive(archive: Path) -> Iterator[list[_Member]]:
    if not archive.is_file():
        raise InputError(f"The archive {archive} does not exist.")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                yield [_zip_member(archive, zipped, entry) for entry in zipped.infolist()
                       if not entry.is_dir()]  # fmt: skip
            return
        with tarfile.open(archive) as tar:
            yield [_tar_member(archive, tar, entry) for entry in tar if not entry.isdir()]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{archive} is no readable ZIP or TAR archive ({error}).") from error


def _zip_member(archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise InputError(f"{archive}: {entry.filename!r} is a link or device, not a file.")
    return _Member(entry.filename, entry.file_size, lambda: zipped.open(entry))


def _tar_member(archive: Path, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> _Member:
    if not entry.isreg():
        raise InputError(f"{archive}: {entry.name!r} is a link or device, not a file.")
    return _Member(entry.name, entry.size, lambda: tar.extractfile(entry))
