"""Models in metres: by GPS, control points, known poses or one distance.

A place on earth is kept as an offset or an origin beside small coordinates: float32, which most
programs compute with, loses decimetres in the millions of UTM.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycolmap
import scipy  # its packages are loaded when they are used

from gim_hloc.colmap.model import poses_of
from gim_hloc.colmap.target import (
    Target,
    coloured_points,
    pose_of,
    read_ply,
    registered,
    write_ply,
)
from gim_hloc.errors import InputError, some
from gim_hloc.files import write_atomic
from gim_hloc.geometry.georeference import Georeference, georeference, upright
from gim_hloc.geometry.pose import (
    Similarity,
    align_cameras,
    camera_centres,
    robust_umeyama,
    umeyama,
)
from gim_hloc.images import orientation_affine
from gim_hloc.poses import Pose
from gim_hloc.surveys import ControlPoint, Fix

_ROBUST_FROM = 6  # control points; of fewer any three agree
_WRONG = 5.0  # robust standard deviations
_SURVEY_M = 0.05  # nearer points are as good as surveyed ones are
_LAZ_M = 1e-4  # coordinates of dense.laz are multiples of it
_MARK_PX = 2.0  # marks farther from where the others put a point count less


@dataclass(kw_only=True)
class Metres:
    """What takes a model to metres.

    Attributes:
        similarity: from the model to coordinates of ``crs``, less ``offset``.
        crs: of the coordinates: a code, a proj string, "ENU" or "local".
        offset: (3,) to be added to coordinates.
        origin: latitude, longitude (degrees) and height (m) of ENU's origin.
        facts: JSON-able: how it was found, and residuals.
        notes: sentences for the user.
    """

    similarity: Similarity
    crs: str
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    origin: tuple[float, float, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def apply(self, model: Any) -> None:
        """Move a model into metres, in place."""
        found = self.similarity
        model.transform(
            pycolmap.Sim3d(found.scale, pycolmap.Rotation3d(found.rotation), found.translation)
        )

    def described(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        found = self.similarity
        return {
            "crs": self.crs, "offset": self.offset.tolist(), "origin": self.origin,
            "scale": found.scale, "rotation": found.rotation.tolist(),
            "translation": found.translation.tolist(), **self.facts,
        }  # fmt: skip


def metres_by_gps(
    model: Any,
    fixes: Mapping[str, Fix],
    orientations: Mapping[str, int],
    crs: Literal["enu", "utm"] = "enu",
) -> Metres:
    """Metres by GPS positions of images, of which some may be wrong.

    Args:
        model: ``pycolmap.Reconstruction``.
        fixes: name -> latitude, longitude (degrees), height (m) or None.
        orientations: name -> EXIF orientation, which says where up is in an image.
        crs: metres east, north and up of an origin among the images, or UTM.

    Raises:
        InputError: fewer than three images in different places have one.
    """
    names = sorted(poses_of(model).keys() & fixes.keys())
    if len(names) < 3:
        raise InputError(
            f"{len(names)} images of the model have a GPS position: three give metres. Give them "
            "in a file (--gps FILE.csv), or control points (--gcp), or one distance (--scale)."
        )
    wgs84 = np.array([[*fixes[name][:2], fixes[name][2] or 0.0] for name in names])
    known = np.array([fixes[name][2] is not None for name in names])
    heights = wgs84[known, 2]
    latitude, longitude = _middle(wgs84).round(6).tolist()
    origin = latitude, longitude, float(np.median(heights).round(2)) if known.any() else 0.0
    wgs84[~known, 2] = origin[2]
    positions, system, offset = _projected(wgs84, origin, crs)
    positions = positions.copy()
    positions[~known, 2] = np.nan
    centres, rights, forwards = _held(model, names, orientations)
    if not min(np.ptp(centres, axis=0).max(), np.ptp(wgs84, axis=0).max()) > 0:
        raise InputError("All GPS positions, or all cameras, are in one place: they give no scale.")
    found = georeference(centres, positions - offset, rights, forwards)
    residuals = dict(zip(names, found.residuals.tolist(), strict=True))
    wrong = {
        name: float(np.linalg.norm(np.nan_to_num(row)))
        for name, row, bad in zip(names, found.residuals, found.wrong, strict=True)
        if bad
    }
    good = found.residuals[~found.wrong]
    across = float(np.sqrt((good[:, :2] ** 2).sum(1).mean()))
    height = _rms(good[:, 2]) if known.any() else None
    return Metres(
        similarity=found.similarity, crs=system, offset=offset,
        origin=origin if crs == "enu" else None,
        facts={
            "by": "gps", "images": len(names), "wrong": wrong, "rms_across_m": across,
            "rms_height_m": height, "scale_std": found.scale_std, "up_std_deg": found.up_std_deg,
            "up_std_by_positions_deg": found.loose_deg, "held": found.held,
            "residuals_m": {n: [None if v != v else v for v in r] for n, r in residuals.items()},
        },
        notes=_gps_notes(found, len(names), wrong, across, height),
    )  # fmt: skip


def positions_enu(fixes: Mapping[str, Fix]) -> dict[str, np.ndarray]:
    """Metres (3,) east, north and up of their middle, of the positions that have a height."""
    known = {name: fix for name, fix in fixes.items() if fix[2] is not None}
    if not known:
        return {}
    wgs84 = np.array(list(known.values()), float)
    latitude, longitude = _middle(wgs84)
    positions = pycolmap.GPSTransform().ellipsoid_to_enu(
        wgs84, latitude, longitude, np.median(wgs84[:, 2])
    )
    return dict(zip(known, np.asarray(positions), strict=True))


def _middle(wgs84: np.ndarray) -> np.ndarray:
    """Median latitude and longitude (2,), of longitudes that may lie on both sides of 180."""
    first = wgs84[0, 1]
    east = (wgs84[:, 1] - first + 180) % 360 - 180
    return np.array([np.median(wgs84[:, 0]), (first + np.median(east) + 180) % 360 - 180])


def _rms(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.sqrt((known**2).mean())) if len(known) else None


def _projected(
    wgs84: np.ndarray, origin: tuple[float, float, float], crs: Literal["enu", "utm"]
) -> tuple[np.ndarray, str, np.ndarray]:
    """Metres (N, 3) of latitude, longitude, height; the system's name; and an offset (3,)."""
    transform = pycolmap.GPSTransform()
    if crs == "enu":
        return np.asarray(transform.ellipsoid_to_enu(wgs84, *origin)), "ENU", np.zeros(3)
    found, zone = transform.ellipsoid_to_utm(wgs84)
    positions = np.array(found)
    south = (wgs84[:, 0] < 0).astype(float)  # northings of the south are 10000 km more
    positions[:, 1] += 1e7 * (float(origin[0] < 0) - south)
    offset = np.append(np.median(positions[:, :2], axis=0).round(), 0.0)
    return positions, f"EPSG:{32600 + zone if origin[0] >= 0 else 32700 + zone}", offset


def _held(
    model: Any, names: Sequence[str], orientations: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (N, 3), directions to the right in upright images and viewing directions."""
    found: list[tuple[np.ndarray, ...]] = []
    poses = poses_of(model)
    for name in names:
        rotation, translation = poses[name]
        right = np.append(orientation_affine(orientations.get(name, 1), 1, 1)[:, 0], 0.0)
        found.append((-rotation.T @ translation, rotation.T @ right, rotation[2]))
    centres, rights, forwards = (np.array(part) for part in zip(*found, strict=True))
    return centres, rights, forwards


def _gps_notes(
    found: Georeference, count: int, wrong: Mapping[str, float], across: float, height: float | None
) -> list[str]:
    tall = (
        "no heights, which are taken to be equal" if height is None else f"{height:.1f} m in height"
    )
    held = f", cameras taken to be held {found.held}" if found.held else ""
    notes = [
        f"Metres by the GPS positions of {count} images: {across:.1f} m across and {tall} (root "
        f"mean square); scale to {found.scale_std:.2%}, up to {found.up_std_deg:.1f} degrees (one "
        f"standard deviation{held})."
    ]
    if wrong:
        listed = sorted(wrong, key=lambda name: -wrong[name])
        notes.append(
            f"{len(wrong)} GPS positions are far off and were not used: "
            f"{some([f'{name} ({wrong[name]:.0f} m)' for name in listed])}."
        )
    if found.is_loose:
        notes.append(
            "The cameras stand about on a straight line, which leaves the roll about it open "
            f"({found.loose_deg:.0f} degrees by their positions): "
            + (
                f"up is where it must be if they were held {found.held}."
                if found.held
                else "up is any direction across it. Give control points (--gcp)."
            )
        )
    return notes


def metres_by_control_points(model: Any, crs: str, points: Sequence[ControlPoint]) -> Metres:
    """Metres by ground control points that were marked in images.

    Args:
        model: ``pycolmap.Reconstruction``.
        crs: of their coordinates; EPSG:4326 becomes ENU.
        points: with marks in images.

    Raises:
        InputError: fewer than three of them are seen by two images, or they lie on a line.
    """
    views = {image.name: image for image in registered(model)}
    placed = {}
    for point in points:
        marks = [(views[name], xy) for name, xy in point.marks.items() if name in views]
        if len(marks) >= 2:
            placed[point.name] = (point.position, *_triangulated(marks))
    if len(placed) < 3:
        raise InputError(
            f"{len(placed)} of {len(points)} control points are marked in two images of the model "
            "or more: three give metres."
        )
    positions = np.array([position for position, _, _ in placed.values()])
    origin, offset = None, np.append(np.median(positions[:, :2], axis=0).round(), 0.0)
    if crs == "EPSG:4326":  # longitude first, as ODM has it
        wgs84 = positions[:, [1, 0, 2]]
        origin = tuple(float(v) for v in wgs84.mean(0).round(6))
        positions, crs, offset = _projected(wgs84, origin, "enu")  # type: ignore[arg-type]
    xyz = np.array([place for _, place, _ in placed.values()])
    robust = len(placed) >= _ROBUST_FROM
    try:
        found = (robust_umeyama if robust else umeyama)(xyz, positions - offset)
    except InputError:
        raise InputError("The control points lie on a line, which leaves a turn open.") from None
    residuals = positions - offset - found(xyz)
    lengths = np.linalg.norm(residuals, axis=1)
    limit = max(_WRONG * 1.4826 * float(np.median(lengths)), _SURVEY_M) if robust else np.inf
    wrong = [name for name, length in zip(placed, lengths, strict=True) if length > limit]
    good = lengths <= limit
    rms = float(np.sqrt((lengths[good] ** 2).mean()))
    notes = [
        f"Metres by {int(good.sum())} control points: {rms:.3f} m (root mean square of their "
        "distances)."
    ]
    if wrong:
        notes.append(
            f"{len(wrong)} control points do not fit and were not used: {some(sorted(wrong))}."
        )
    if len(placed) == 3:
        notes.append("Three control points leave nothing to check them by: mark a fourth.")
    return Metres(
        similarity=found, crs=crs, offset=offset, origin=origin,  # type: ignore[arg-type]
        facts={
            "by": "control points", "rms_m": rms, "wrong": wrong,
            "places_m": dict(zip(placed, (positions - offset).tolist(), strict=True)),
            "residuals_m": dict(zip(placed, residuals.tolist(), strict=True)),
            "marks_px": {name: error for name, (_, _, error) in placed.items()},
        },
        notes=notes,
    )  # fmt: skip


def _triangulated(marks: Sequence[tuple[Any, np.ndarray]]) -> tuple[np.ndarray, float]:
    """Point (3,) of marks in images, and their mean distance from it, px."""
    normal, target = np.zeros((3, 3)), np.zeros(3)
    for image, xy in marks:
        rotation, centre = pose_of(image)
        x, y = np.asarray(image.camera.cam_from_img(xy)).ravel()[:2]
        ray = rotation.T @ [x, y, 1.0]
        across = np.eye(3) - np.outer(ray, ray) / (ray @ ray)
        normal, target = normal + across, target + across @ centre

    def errors(xyz: np.ndarray) -> np.ndarray:
        drawn = [image.project_point(xyz) for image, _ in marks]
        far = np.full(2, 1e3)
        return np.concatenate(
            [far if d is None else d - xy for d, (_, xy) in zip(drawn, marks, strict=True)]
        )

    start = np.linalg.lstsq(normal, target, rcond=None)[0]
    solved = scipy.optimize.least_squares(
        errors, start, loss="soft_l1", f_scale=_MARK_PX, x_scale="jac"
    )
    return solved.x, float(np.linalg.norm(errors(solved.x).reshape(-1, 2), axis=1).mean())


def metres_by_poses(model: Any, poses: Mapping[str, Pose]) -> Metres:
    """Metres by known poses, of which some may be wrong.

    Raises:
        InputError: fewer than two images have one.
    """
    own = poses_of(model)
    names = sorted(own.keys() & poses.keys())
    if len(names) < 2:
        raise InputError(f"{len(names)} images of the model have a known pose: two give metres.")
    turns, true_turns = (np.stack([p[n][0] for n in names]) for p in (own, poses))
    shifts, true_shifts = (np.stack([p[n][1] for n in names]) for p in (own, poses))
    centres, true = camera_centres(turns, shifts), camera_centres(true_turns, true_shifts)
    found = align_cameras(turns, centres, true_turns, true, robust=len(names) >= _ROBUST_FROM)
    residuals = true - found(centres)
    rms = float(np.sqrt((residuals**2).sum(1).mean()))
    median = float(np.median(np.linalg.norm(residuals, axis=1)))
    return Metres(
        similarity=found, crs="local",
        facts={
            "by": "known poses", "images": len(names), "rms_m": rms,
            "residuals_m": dict(zip(names, residuals.tolist(), strict=True)),
        },
        notes=[
            f"Metres by the known poses of {len(names)} images: they are {median:.3f} (median) and "
            f"{rms:.3f} (root mean square) of their unit from the model's."
        ],
    )  # fmt: skip


def metres_by_distance(
    model: Any, ends: Sequence[np.ndarray], distance: float, orientations: Mapping[str, int]
) -> Metres:
    """Metres by one distance; up by cameras being held level.

    Args:
        model: ``pycolmap.Reconstruction``.
        ends: two places (3,) in the model.
        distance: of them, m.
        orientations: name -> EXIF orientation.
    """
    length = float(np.linalg.norm(ends[1] - ends[0]))
    if not length > 0:
        raise InputError("--scale wants two different places.")
    centres, rights, forwards = _held(model, sorted(poses_of(model)), orientations)
    rotation, scale = upright(rights, forwards), distance / length
    return Metres(
        similarity=Similarity(
            scale=scale, rotation=rotation, translation=-scale * rotation @ centres.mean(0)
        ),
        crs="local",
        facts={"by": "distance", "distance_m": distance},
        notes=[
            f"Metres by one distance ({distance:g} m): nothing checks it. Up is where it must be "
            "if cameras were held level; north is not known."
        ],
    )


def write_geo(model: Any, target: Target) -> list[str]:
    """Write ``geo/``: the model in metres, z up, and where on earth that is.

    ``sparse/0`` and ``points.ply`` are less the offset; ``offset.xyz`` has it; ``cameras.csv`` has
    every camera in the system's own coordinates, and in degrees where it is on earth; ``geo.json``
    has how the metres were found, with the residuals. The dense cloud is ``dense.laz``, in full
    coordinates.
    """
    metres = target.metres
    if metres is None:
        raise InputError("Nothing says what a metre is: give --gps, --gcp, --scale or --ref-model.")
    folder = target.folder / "geo"
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True, exist_ok=True)
    model.write_binary(sparse)
    write_ply(folder / "points.ply", *coloured_points(model))
    write_atomic(folder / "offset.xyz", " ".join(f"{v:.3f}" for v in metres.offset) + "\n")
    write_atomic(folder / "geo.json", json.dumps(metres.described(), indent=1, ensure_ascii=False))
    text = io.StringIO()
    table = csv.writer(text)
    views = registered(model)
    places = np.array([pose_of(view)[1] for view in views]) + metres.offset
    degrees = _degrees(places, metres)
    table.writerow(["name", "x", "y", "z", *([] if degrees is None else ["latitude", "longitude"])])
    for row, view in enumerate(views):
        end = [] if degrees is None else [f"{v:.9f}" for v in degrees[row, :2]]
        table.writerow([view.name, *(f"{v:.4f}" for v in places[row]), *end])
    write_atomic(folder / "cameras.csv", text.getvalue())
    cloud = None if target.dense is None else target.dense / "dense.ply"
    return _write_laz(folder / "dense.laz", cloud, metres) if cloud and cloud.is_file() else []


def _write_laz(path: Path, cloud: Path, metres: Metres) -> list[str]:
    """Write a cloud of the model as LAZ; a note where that cannot be."""
    try:
        import laspy
        import lazrs  # noqa: F401 - laspy compresses by it
    except ImportError:
        return ["geo/dense.laz needs laspy and lazrs: pip install gim-hloc[dense]."]
    xyz, rgb = read_ply(cloud)
    places = metres.similarity(xyz.astype(np.float64)) + metres.offset
    header = laspy.LasHeader(version="1.4", point_format=7)
    header.offsets, header.scales = np.floor(places.min(0)), np.full(3, _LAZ_M)
    if metres.crs.startswith("EPSG:"):
        with contextlib.suppress(ImportError):
            import pyproj

            header.add_crs(pyproj.CRS(metres.crs))
    points = laspy.LasData(header)
    points.xyz = places
    points.red, points.green, points.blue = rgb.T.astype(np.uint16) * 257  # of 16 bits
    points.write(path)
    return []


def _degrees(places: np.ndarray, metres: Metres) -> np.ndarray | None:
    """Latitude, longitude and height (N, 3) of coordinates, where pycolmap knows the system."""
    transform = pycolmap.GPSTransform()
    if metres.origin is not None:
        return np.asarray(transform.enu_to_ellipsoid(places, *metres.origin))
    code = metres.crs.removeprefix("EPSG:")
    zone = int(code) % 100 if code.isdigit() and code[:3] in ("326", "327") else 0
    if not 1 <= zone <= 60:
        return None
    degrees = np.array(transform.utm_to_ellipsoid(places, zone, code[:3] == "326"))
    degrees[:, 1] = (degrees[:, 1] + 180) % 360 - 180
    return degrees
