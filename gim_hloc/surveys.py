"""Measured positions that users bring: GPS of images as CSV, ground control points of ODM."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.poses import match_names

Fix = tuple[float, float, float | None]  # latitude, longitude in degrees; height in m

_COLUMNS = {
    "name": ("name", "image", "image_name", "file", "filename", "label"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon", "lng", "long"),
    "altitude": ("altitude", "alt", "height", "elevation", "z"),
}


def read_positions(path: Path, names: Sequence[str]) -> dict[str, Fix]:
    """Latitude, longitude (degrees, WGS84) and height (m) of images.

    Args:
        path: lines ``name, latitude, longitude[, altitude]`` with commas, semicolons or tabs, or
            with a header that names these columns in any order.
        names: of the images.

    Raises:
        InputError: a line that is none, no position of these images; names file and line.
    """
    text = read_text(path, "list of positions")
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    if not lines:
        raise InputError(f"{path} holds no position.")
    separator = next((mark for mark in "\t;," if mark in lines[0]), ",")
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    header = [cell.strip().lower() for cell in rows[0]]
    order = {
        column: next((i for i, cell in enumerate(header) if cell in known), None)
        for column, known in _COLUMNS.items()
    }
    if order["latitude"] is None or order["longitude"] is None or order["name"] is None:
        order = {"name": 0, "latitude": 1, "longitude": 2, "altitude": 3}
    else:
        rows = rows[1:]
    given: dict[str, Fix] = {}
    for row in rows:
        try:
            name, *values = (
                None if place is None or place >= len(row) else row[place].strip()
                for place in order.values()
            )
            latitude, longitude = float(values[0] or "x"), float(values[1] or "x")
            height = float(values[2]) if values[2] else None
            good = abs(latitude) <= 90 and abs(longitude) <= 180 and bool(name)
            good = good and (height is None or bool(np.isfinite(height)))
        except ValueError:
            good = False
        if not good:
            raise InputError(
                f"{path}: {separator.join(row)!r} is not 'name{separator} latitude{separator} "
                f"longitude{separator} altitude' (degrees, m)."
            )
        given[str(name)] = (latitude, longitude, height)
    partner = match_names(given, names)
    if not partner:
        raise InputError(
            f"{path} has positions of {len(given)} images (first: {next(iter(given))}), and none "
            f"of them is one of the run's (first: {names[0] if names else '-'})."
        )
    return {name: given[text] for text, name in partner.items()}


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
    if not lines:
        raise InputError(f"{path} holds no control points.")
    system = _system(lines[0], path)
    points: dict[str, ControlPoint] = {}
    for line in lines[1:]:
        fields = line.split()
        try:
            *values, _ = [*map(float, fields[:5]), fields[5]]
            good = bool(np.isfinite(values).all())
        except (ValueError, IndexError):
            good = False
        if not good:
            raise InputError(f"{path}: {line!r} is not 'x y z pixel_x pixel_y image [name]'.")
        name = " ".join(fields[6:]) or " ".join(fields[:3])
        point = points.setdefault(
            name, ControlPoint(name=name, position=np.array(values[:3]), marks={})
        )
        if not np.array_equal(point.position, values[:3]):
            raise InputError(f"{path}: the point {name} has two positions.")
        image = match_names([fields[5]], names).get(fields[5])
        if image is not None:
            point.marks[image] = np.array(values[3:])
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


__all__ = ["ControlPoint", "Fix", "read_control_points", "read_positions"]
