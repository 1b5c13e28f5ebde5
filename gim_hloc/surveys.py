"""Measured positions that users bring: GPS of images as CSV, ground control points of ODM."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.poses import match_names

Fix = tuple[float, float, float | None]  # latitude, longitude in degrees; height in m

_COLUMNS = {
    "name": ("name", "image", "imagename", "file", "filename", "sourcefile", "label"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon", "lng", "long"),
    "altitude": ("altitude", "alt", "height", "elevation", "z"),
}
# What headers of Metashape ("#Label,X/Longitude") and exiftool ("GPSLatitude") have around these.
_AROUND = re.compile(r"\(.*\)|.*/|^#?\s*(gps)?|[\s_]")


def read_positions(path: Path, names: Sequence[str]) -> dict[str, Fix]:
    """Latitude, longitude (degrees, WGS84) and height (m) of images.

    Args:
        path: lines ``name, latitude, longitude[, altitude]`` with commas, semicolons or tabs, or
            with a header that names these columns in any order. Empty or NaN: not known.
        names: of the images.

    Raises:
        InputError: a line that is none, no position of these images; names file and line.
    """
    lines = [line for line in read_text(path, "list of positions").splitlines() if line.strip()]
    remarks = [line for line in lines if line[0] == "#"]
    lines = [line for line in lines if line[0] != "#"]
    if not lines:
        raise InputError(f"{path} holds no position.")
    separator = next((mark for mark in "\t;," if mark in lines[0]), ",")
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    order: Mapping[str, int | None] = {"name": 0, "latitude": 1, "longitude": 2, "altitude": 3}
    if (columns := _columns(rows[0])) is not None:
        order, rows = columns, rows[1:]
    for remark in csv.reader(remarks, delimiter=separator):
        order = _columns(remark) or order
    given: dict[str, Fix] = {}
    for row in rows:
        try:
            name, *values = (
                "" if place is None or place >= len(row) else row[place].strip()
                for place in order.values()
            )
            latitude, longitude, height = (
                None if value.lower() in ("", "nan") else float(value) for value in values
            )
        except ValueError:
            good = False
        else:
            good = name != "" and len(row) > 2 and (latitude is None) == (longitude is None)
            good = good and (height is None or math.isfinite(height))
            if good and latitude is not None and longitude is not None:
                good = abs(latitude) <= 90 and abs(longitude) <= 180
                given[name] = (latitude, longitude, height)
        if not good:
            raise InputError(
                f"{path}: {separator.join(row)!r} is not 'name{separator} latitude{separator} "
                f"longitude{separator} altitude' (degrees, m)."
            )
    if not given:
        raise InputError(f"{path} holds no position.")
    partner = match_names(given, names)
    if not partner:
        raise InputError(
            f"{path} has positions of {len(given)} images (first: {next(iter(given))}), and none "
            f"of them is one of the run's (first: {names[0] if names else '-'})."
        )
    return {name: given[text] for text, name in partner.items()}


def _columns(header: Sequence[str]) -> dict[str, int | None] | None:
    """Where the columns are by a header; None where it is no header of positions."""
    cells = [_AROUND.sub("", cell.strip().lower()) for cell in header]
    found = {
        column: next((i for i, cell in enumerate(cells) if cell in known), None)
        for column, known in _COLUMNS.items()
    }
    needed = found["name"], found["latitude"], found["longitude"]
    return None if None in needed else found


@dataclass(frozen=True, kw_only=True)
class ControlPoint:
    """A point on the ground.

    Attributes:
        name: of the file, or its coordinates.
        position: (3,) in the file's system.
        marks: image -> (2,) pixel where it was clicked, the corner of the image being 0, 0.
    """

    name: str
    position: np.ndarray
    marks: dict[str, np.ndarray]


def read_control_points(path: Path, names: Sequence[str]) -> tuple[str, list[ControlPoint]]:
    """Ground control points as OpenDroneMap writes them in ``gcp_list.txt``.

    Args:
        path: the coordinate system in the first line (``EPSG:32632``, ``WGS84 UTM 32N``, a proj
            string), then lines ``x y z pixel_x pixel_y image [name]``.
        names: of the images.

    Returns:
        The coordinate system, ``EPSG:4326`` for longitude and latitude, and the points.

    Raises:
        InputError: the system is not one in metres, or a line is none; names file and line.
    """
    lines = [line.strip() for line in read_text(path, "list of control points").splitlines()]
    lines = [line for line in lines if line and line[0] != "#"]
    if len(lines) < 2:
        raise InputError(f"{path} holds no control points.")
    system = _system(lines[0], path)
    if system != "EPSG:4326":
        _require_metres(system, path)
    points: dict[str, ControlPoint] = {}
    for line in lines[1:]:
        fields = line.split()
        try:
            *values, _ = [*map(float, fields[:5]), fields[5]]
            good = bool(np.isfinite(values).all())
        except (ValueError, IndexError):
            good = False
        if good and system == "EPSG:4326":
            good = abs(values[0]) <= 180 and abs(values[1]) <= 90
        if not good:
            raise InputError(f"{path}: {line!r} is not 'x y z pixel_x pixel_y image [name]'.")
        text = " ".join(fields[6:]) or " ".join(fields[:3])
        name = text.encode("utf-8", "backslashreplace").decode()  # it may be in another code
        point = points.setdefault(
            name, ControlPoint(name=name, position=np.array(values[:3]), marks={})
        )
        if not np.array_equal(point.position, values[:3]):
            raise InputError(f"{path}: the point {name} has two positions.")
        image = match_names([fields[5]], names).get(fields[5])
        if image is not None:
            point.marks[image] = np.array(values[3:])
    if points and not any(point.marks for point in points.values()):
        raise InputError(
            f"{path}: its marks are in {fields[5]} and others, and none of them is one of the "
            f"run's images (first: {names[0] if names else '-'})."
        )
    return system, list(points.values())


def _system(header: str, path: Path) -> str:
    """``EPSG:4326``, or the code of a UTM zone of WGS84, or the projected system as it stands."""
    text = header.strip("'\" ")
    zone = re.fullmatch(r"WGS84 UTM (\d{1,2})([NS])", text, re.IGNORECASE)
    proj = re.search(r"\+proj=utm .*\+zone=(\d{1,2})", text)
    if zone is not None:
        return f"EPSG:{(326 if zone[2].upper() == 'N' else 327) * 100 + int(zone[1])}"
    if proj is not None and ("WGS84" in text or "datum" not in text):
        return f"EPSG:{(327 if '+south' in text else 326) * 100 + int(proj[1])}"
    if re.fullmatch(r"EPSG:\d+", text, re.IGNORECASE):
        return text.upper()
    if "+proj=longlat" in text or "+proj=latlong" in text:
        return "EPSG:4326"
    if "+proj" in text:
        return text
    raise InputError(
        f"{path}: its first line must say the coordinate system (EPSG:32632, WGS84 UTM 32N, or a "
        f"proj string), not {header!r}."
    )


def _require_metres(system: str, path: Path) -> None:
    """Refuse a system that has other axes than metres, where pyproj is there to say so."""
    try:
        import pyproj
    except ImportError:
        return
    try:
        crs = pyproj.CRS(system)
    except pyproj.exceptions.CRSError:
        raise InputError(f"{path}: {system} is no coordinate system that pyproj knows.") from None
    if not crs.is_projected or any(axis.unit_name != "metre" for axis in crs.axis_info):
        raise InputError(
            f"{path}: {system} ({crs.name}) is not in metres: give the points in a projected "
            "system in metres, or in degrees as EPSG:4326 (longitude latitude height)."
        )


__all__ = ["ControlPoint", "Fix", "read_control_points", "read_positions"]
