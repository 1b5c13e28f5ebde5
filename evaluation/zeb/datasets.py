"""ZEB's sets, and sets like them, on disk: labels, images, verification.

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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gim_hloc.errors import InputError
from gim_hloc.evaluation.pair_set import (
    CELL,
    TRUTH_NUMBERS,
    BadPair,
    PosedPair,
    Size,
    floor_to_cell,
    load_image,
    parse_numbers,
    split_truth,
)
from gim_hloc.evaluation.zeb.sets import SETS, ZebSet, check_set_name, set_folder
from gim_hloc.images import scan
from gim_hloc.types import ImageData, ImageOptions

logger = logging.getLogger(__name__)

TOKENS = 4 + TRUTH_NUMBERS
DESCRIPTION = "set.json"  # in the folder of a set that is none of the twelve


def find_set(name: str, root: str | os.PathLike[str] | None = None) -> ZebSet:
    """A set by its name, column, folder or name in dumps; case does not matter.

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


def find_root(folder: str | os.PathLike[str]) -> Path:
    """The folder with the sets' folders: ``folder`` itself or ``zeb/`` in it.

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
    """The sets whose folder exists: the twelve in the table's order, then others by name.

    Raises:
        InputError: there is none, or a description is damaged.
    """
    root = find_root(folder)
    own = [read_description(path) for path in _described_folders(root)]
    return [entry for entry in SETS if (root / entry.folder).is_dir()] + own


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
        if img_size is not None and (not isinstance(img_size, int) or img_size < CELL):
            raise ValueError(f"img_size is no whole number from {CELL} on")
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
        title=name,
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
class ZebPair(PosedPair):
    """One pair of a set."""

    scene: str
    label: str  # file name of the label


@dataclass(frozen=True, kw_only=True)
class Labels:
    """All labels of one set."""

    pairs: tuple[ZebPair, ...]  # in the reference's order
    bad: tuple[BadPair, ...]
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
    bad: list[BadPair] = []
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
    """Make a pair from the tokens of a label's line; ValueError says what is wrong with it.

    Args:
        tokens: the line, split at blanks.
        zeb_set: which set, for names.
        scene: from the label's file name.
        label: the label's file name.
    """
    if len(tokens) < TOKENS:
        raise ValueError(f"the line has {len(tokens)} tokens instead of {TOKENS}")
    numbers = parse_numbers(tokens[2:TOKENS])
    image0, image1 = (f"{scene}{zeb_set.separator}{zeb_set.stem(t)}.png" for t in tokens[:2])
    return ZebPair(
        identifier=zeb_set.identify(scene, tokens[0], tokens[1]),
        scene=scene,
        image0=image0,
        image1=image1,
        covisible0=float(numbers[0]),
        covisible1=float(numbers[1]),
        label=label,
        **split_truth(numbers[2:]),
    )


def _bad_label(
    tokens: Sequence[str], zeb_set: ZebSet, scene: str, path: Path, reason: str
) -> BadPair:
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
    return BadPair(
        label=path.name,
        identifier=zeb_set.identify(scene, tokens[0], tokens[1]) if named else f"{stem}##",
        reason=reason,
        covisible0=overlaps[0],
        covisible1=overlaps[1],
    )


# ------------------------------------------------------------------------------------------- images


def network_sizes(size: Size, zeb_set: ZebSet) -> tuple[Size, Size]:
    """(width, height) to which an image of a size is resized, and those after padding."""
    long_side = zeb_set.img_size
    if long_side is not None and max(size) > long_side:
        scale = long_side / max(size)
        size = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    if zeb_set.padded_size is None:
        floored = floor_to_cell(size)
        return floored, floored
    # A portrait image does not fit into the landscape frame: the frame grows as far as needed.
    width, height = (
        max(side, math.ceil(own / CELL) * CELL)
        for side, own in zip(zeb_set.padded_size, size, strict=True)
    )
    return size, (width, height)


def prepare_image(path: Path, zeb_set: ZebSet, options: ImageOptions) -> ImageData:
    """Read an image as ZEB shows it to a matcher, which decides between gray and colour only.

    The affine map back aligns pixel areas; the reference multiplies by the scale alone, which
    differs by (scale - 1) / 2 px.

    Raises:
        InputError: the file does not exist or cannot be read, named.
    """
    return load_image(
        path,
        lambda size: network_sizes(size, zeb_set),
        name=path.name,
        grayscale=options.grayscale,
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
            folder, min_size=CELL, names=names, upright=False, progress=progress
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
