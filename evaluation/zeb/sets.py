"""ZEB's twelve sets: how each is named, stored and shown to matchers. Imports nothing slow."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from gim_hloc.errors import InputError

_CELL = 8  # sides of padded images are multiples of it, px
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_COLUMNS = ("matcher", "mean", "sum")  # of the results table besides those of the sets


@dataclass(frozen=True, kw_only=True)
class ZebSet:
    """How one of the sets is stored and shown to matchers."""

    name: str  # as on the reference's command line
    column: str  # three letters of the published table; the name of other sets
    title: str  # heading in the published spreadsheet
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
        name="GL3D", column="GL3", title="GL3D", dump_name="GL3D", separator="_",
        strip_suffix=True, identifier="{}", pairs=5165, scenes=430,
    ),
    ZebSet(
        name="BlendedMVS", column="BLE", title="BlendedMVS", dump_name="BlendedMVS", separator="_",
        strip_suffix=True, identifier="{}", pairs=5049, scenes=113,
    ),
    ZebSet(
        name="ETH3DI", column="ETI", title="ETH3DIn", dump_name="ETH3DI", separator="-",
        strip_suffix=True, identifier="{}.JPG", pairs=2131, scenes=7, img_size=1600, pad_ratio=1.5,
    ),
    ZebSet(
        name="ETH3DO", column="ETO", title="ETH3-Out", dump_name="ETH3DO", separator="-",
        strip_suffix=True, identifier="{}.JPG", pairs=3438, scenes=6, img_size=1600, pad_ratio=1.5,
    ),
    ZebSet(
        name="KITTI", column="KIT", title="KITTI", dump_name="KITTI", separator="-",
        strip_suffix=True, identifier="{}.png", pairs=5013, scenes=9, img_size=1240, pad_ratio=3.25,
    ),
    ZebSet(
        name="RobotcarWeather", column="WEA", title="Weather", dump_name="RobotcarWeather",
        separator="_", strip_suffix=False, identifier="{}", pairs=1834, scenes=5,
    ),
    ZebSet(
        name="RobotcarSeason", column="SEA", title="Season", dump_name="RobotcarSeason",
        separator="_", strip_suffix=False, identifier="{}", pairs=1077, scenes=1,
    ),
    ZebSet(
        name="RobotcarNight", column="NIG", title="Night", dump_name="RobotcarNight",
        separator="_", strip_suffix=False, identifier="{}", pairs=2080, scenes=5,
    ),
    ZebSet(
        name="MultiFoV", column="MUL", title="MultiFoV", dump_name="Multi-FoV", separator="-",
        strip_suffix=False, identifier="img/{}.png", pairs=5000, scenes=1,
    ),
    ZebSet(
        name="SceneNet", column="SCE", title="SceneNet", dump_name="SceneNetRGBD", separator="-",
        strip_suffix=False, identifier="{}.jpg", pairs=5100, scenes=170,
    ),
    ZebSet(
        name="ICLNUIM", column="ICL", title="ICLNUIM", dump_name="ICL-NUIM", separator="-",
        strip_suffix=False, identifier="{}.jpg", pairs=5000, scenes=4,
    ),
    ZebSet(
        name="GTASfM", column="GTA", title="GTA-SfM", dump_name="GTA-SfM", separator="-",
        strip_suffix=False, identifier="{}", pairs=5029, scenes=19,
    ),
)  # fmt: skip

NAMES = tuple(entry.dump_name for entry in SETS)
"""Names of the twelve sets in dump file names, in table order."""


def set_folder(name: str) -> str:
    """Name of a set's folder, from its name, column, folder or name in dumps."""
    wanted = name.lower()
    for entry in SETS:
        if wanted in (entry.folder, entry.column.lower(), entry.dump_name.lower()):
            return entry.folder
    return wanted


def short_name(dump_name: str) -> str:
    """The three letters of one of the twelve sets; any other name as it is."""
    return next((entry.column for entry in SETS if entry.dump_name == dump_name), dump_name)


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
    if name.lower() in _COLUMNS:
        raise InputError(
            f"{name!r} cannot be the name of a set: tables of results have a column of this name."
        )
