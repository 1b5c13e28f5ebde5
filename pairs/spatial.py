"""Images taken near each other, by the positions in their EXIF data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.pairs.base import Pair, best_pairs

logger = logging.getLogger(__name__)

Position = tuple[float, float, float | None]  # latitude, longitude in degrees, altitude in metres

# WGS84 ellipsoid.
_SEMI_MAJOR_M = 6378137.0
_FLATTENING = 1 / 298.257223563


def spatial(
    positions: Mapping[str, Position | None],
    *,
    max_neighbours: int = 20,
    max_distance_m: float = 100.0,
    use_altitude: bool = False,
) -> list[Pair]:
    """Pair each image with the nearest ones on the ground.

    Args:
        positions: name -> (latitude, longitude, altitude or None): degrees in WGS84, metres.
            Images without a usable position (None, not finite, out of range, or exactly 0, 0, which
            cameras write without a fix) are left out; a log line counts them.
        max_neighbours: partners per image.
        max_distance_m: greatest distance of a pair in metres.
        use_altitude: measure in 3D if all images have an altitude. Off by default, as in COLMAP's
            spatial matcher, because the altitude of a phone is often wrong by tens of metres.

    Returns:
        Sorted pairs.

    Raises:
        InputError: if ``max_neighbours`` or ``max_distance_m`` is not positive.
    """
    if max_neighbours < 1 or not max_distance_m > 0:
        raise InputError(
            "Spatial pairs need at least 1 neighbour and a positive distance, "
            f"not {max_neighbours} and {max_distance_m} m"
        )
    usable = {name: p for name, p in positions.items() if p is not None and has_fix(p)}
    if len(usable) < len(positions):
        logger.warning(
            "%d of %d images have no GPS position and get no spatial pair",
            len(positions) - len(usable),
            len(positions),
        )
    if not usable:
        return []
    names = sorted(usable)
    altitudes = [usable[name][2] for name in names]
    if use_altitude and any(a is None for a in altitudes):
        logger.warning("Not all images have an altitude: distances are measured on the ground")
        use_altitude = False
    # Distances between earth-centred coordinates are those of any local east-north-up frame, and
    # hold without a seam at the date line or a distortion far from an origin.
    xyz = np.stack(
        [
            earth_centred_m(usable[name][0], usable[name][1], (a or 0.0) if use_altitude else 0.0)
            for name, a in zip(names, altitudes, strict=True)
        ]
    )

    def scores_of(rows: np.ndarray) -> np.ndarray:
        distance = np.linalg.norm(xyz[rows, None] - xyz[None], axis=-1)
        return np.where(distance <= max_distance_m, -distance, -np.inf)

    return best_pairs(names, scores_of, max_neighbours)


def has_fix(position: Position) -> bool:
    """Whether a position can be that of a photograph."""
    latitude, longitude, _ = position
    return (
        math.isfinite(latitude)
        and math.isfinite(longitude)
        and abs(latitude) <= 90
        and abs(longitude) <= 180
        and (latitude, longitude) != (0, 0)
    )


def earth_centred_m(latitude: float, longitude: float, altitude_m: float = 0.0) -> np.ndarray:
    """Earth-centred, earth-fixed coordinates (3,) in metres of a WGS84 position in degrees."""
    phi, lam = math.radians(latitude), math.radians(longitude)
    e2 = _FLATTENING * (2 - _FLATTENING)
    normal = _SEMI_MAJOR_M / math.sqrt(1 - e2 * math.sin(phi) ** 2)
    return np.array(
        [
            (normal + altitude_m) * math.cos(phi) * math.cos(lam),
            (normal + altitude_m) * math.cos(phi) * math.sin(lam),
            (normal * (1 - e2) + altitude_m) * math.sin(phi),
        ]
    )
