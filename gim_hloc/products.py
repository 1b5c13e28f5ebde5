"""Pictures that programs left among the images: masks, depth maps, reduced and undistorted copies.

A picture is passed over only where a name or a marker says what it is *and* the image that it was
made of is here too: two cameras that number their images alike are never taken for each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROLE = r"(?:dynamic_)?(?:masks?|masked|depths?|depth_?maps?|normals|normal_?maps?|segmentations?)"
_ROLE_FOLDER = re.compile(rf"(?:\w+_)?{_ROLE}(?:_\d+|_for_\w+)?", re.IGNORECASE)
_ROLE_FILE = re.compile(rf"(.+)[._-](?:{_ROLE}|normal)", re.IGNORECASE)
_ROLE_FIRST = re.compile(rf"(.*/)?(?:{_ROLE}|normal)[._-](.+)", re.IGNORECASE)
_COLOURS = ("", "_rgb", ".rgb", "_color", ".color", "-color")  # of the image beside a role
_REDUCED = re.compile(r"images_([2-9]|[1-9]\d)")


@dataclass(frozen=True, kw_only=True)
class Products:
    """Files of one kind that are no images of the user."""

    names: tuple[str, ...]  # relative to the image root, sorted
    what: str
    folder: str | None  # that holds them and nothing else; None: beside the images

    def __str__(self) -> str:
        if self.folder is None:
            where, cure = f"beside the images, such as {self.names[0]}", "rename them"
        else:
            where, cure = f"in {self.folder}", "give that folder as IMAGES"
        many = f"{len(self.names)} picture{'s' * (len(self.names) != 1)}"
        return f"Passed over {many} {where}: {self.what}. To use them as images, {cure}."


def find_products(root: Path, names: Sequence[str]) -> list[Products]:
    """Find what programs made of images that are here too.

    Args:
        root: image root.
        names: all pictures, POSIX paths relative to ``root``.
    """
    finder = _Finder(root, names)
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(names):
        kind = finder.kind(name)
        if kind is not None:
            groups.setdefault(kind, []).append(name)
    return [
        Products(names=tuple(found), what=what, folder=folder)
        for (what, folder), found in groups.items()
    ]


class _Finder:
    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = set(names)
        self.by_stem = {os.path.splitext(name)[0]: name for name in names}
        self.children: dict[str, set[str]] = {}  # folder, "" or ending in / -> what lies in it
        for name in names:
            parts = name.split("/")
            for depth, part in enumerate(parts):
                self.children.setdefault("".join(p + "/" for p in parts[:depth]), set()).add(part)
        self._there: dict[str, bool] = {}
        self._tails: dict[str, set[str]] = {}

    def kind(self, name: str) -> tuple[str, str | None] | None:
        """What a picture is and the folder of its kind, or None for an image."""
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".png" and stem in self.names:
            return "masks of images", None
        parts = name.split("/")
        for depth in range(1, len(parts)):
            parent, folder = "".join(p + "/" for p in parts[: depth - 1]), parts[depth - 1]
            place, tail = parent + folder, "/".join(parts[depth:])
            what = self._kind_in(parent, folder, tail)
            if what is not None:
                return what, place
        if any(base + colour in self.by_stem for base in _of_role(stem) for colour in _COLOURS):
            return "masks or maps of images", None
        if re.search(r"_(match|warp)$", stem) and self._exists(
            f"{stem.rpartition('_')[0]}_matches.npz"
        ):
            return "gim-match drew them", None
        return None

    def _kind_in(self, parent: str, folder: str, tail: str) -> str | None:
        """What ``parent + folder + "/" + tail`` is by the folder it lies in, or None."""
        path = self.root / parent / folder / tail
        stem = os.path.splitext(tail)[0]
        if (
            folder in ("dense", "export", "images")
            and self._exists(parent + "run.yaml")
            and self._exists(parent + "database.db")
            and (folder != "images" or path.is_symlink())
        ):
            return "a run of gim-reconstruct wrote them"
        if (
            folder == "images"
            and self._exists(parent + "stereo")
            and stem in self._tails_outside(f"{parent}{folder}/")
        ):
            return "COLMAP's undistorted copies of images that are here too"
        reduced = _REDUCED.fullmatch(folder)
        if reduced:
            whole = self.by_stem.get(f"{parent}images/{stem}") or self.by_stem.get(parent + stem)
            if whole and _is_reduced(path, self.root / whole, int(reduced[1])):
                return "reduced copies of images that are here too"
        if _ROLE_FOLDER.fullmatch(folder) and (
            _is_gray16(path)
            or any(
                f"{beside}{base}" in self.by_stem
                for base in (stem, os.path.splitext(stem)[0], *_of_role(stem))
                for beside in self._beside(parent)
            )
        ):
            return "masks or maps of images that are here too"
        return None

    def _tails_outside(self, folder: str) -> set[str]:
        """Ends of the paths, without suffix, of all pictures that are not in ``folder``."""
        if folder not in self._tails:
            outside = [stem.split("/") for stem in self.by_stem if not stem.startswith(folder)]
            self._tails[folder] = {"/".join(p[i:]) for p in outside for i in range(len(p))}
        return self._tails[folder]

    def _exists(self, path: str) -> bool:
        if path not in self._there:
            self._there[path] = (self.root / path).exists()
        return self._there[path]

    def _beside(self, parent: str) -> list[str]:
        """The folder ``parent`` and those in it that may hold images, each ending in /."""
        return [
            parent,
            *(f"{parent}{c}/" for c in self.children[parent] if not _ROLE_FOLDER.fullmatch(c)),
        ]


def _of_role(stem: str) -> Iterator[str]:
    """Names without suffix that the image of a mask or map may have."""
    if found := _ROLE_FILE.fullmatch(stem):
        yield found[1]
    if found := _ROLE_FIRST.fullmatch(stem):
        yield (found[1] or "") + found[2]


def _is_reduced(small: Path, large: Path, factor: int) -> bool:
    from PIL import Image

    if not (small.is_file() and large.is_file()):  # a pipe would be waited for
        return False
    try:
        with Image.open(small) as one, Image.open(large) as two:
            sizes = zip(sorted(one.size), sorted(two.size), strict=True)  # perhaps turned by EXIF
            return all(abs(a * factor - b) <= factor for a, b in sizes)
    except Exception:  # damaged: said where it is read
        return False


def _is_gray16(path: Path) -> bool:
    """Whether a PNG holds one channel of 16 bits, as depth maps do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(26)
    return head[:4] == b"\x89PNG" and head[24:26] == b"\x10\0"
