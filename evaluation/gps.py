"""How far a model's cameras stand from the GPS positions in the photographs' EXIF.

    python -m gim_hloc.evaluation.gps MODEL IMAGES

The model is laid on the positions by one similarity; distances are horizontal, because phones are
far worse at altitudes. A phone's GPS is good to 5-10 m: enough to tell the right track from a
folded one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gim_hloc import colmap
from gim_hloc.errors import GimError, InputError
from gim_hloc.geometry.pose import camera_centres, umeyama
from gim_hloc.images import scan
from gim_hloc.pairs.spatial import has_fix
from gim_hloc.poses import Pose

Fix = tuple[float, float, float | None]  # latitude and longitude in degrees, altitude in m


@dataclass(frozen=True, kw_only=True)
class GpsScores:
    """Horizontal distances, m, of the images that have both a pose and a position."""

    total: int  # images with a position
    names: tuple[str, ...]
    distances: np.ndarray

    @property
    def rmse(self) -> float:
        """Root of the mean square, m."""
        return float(np.sqrt(np.mean(self.distances**2)))


def positions_m(fixes: Mapping[str, Fix]) -> dict[str, np.ndarray]:
    """East, north and up in m of each image with a fix; heights that are not known are 0."""
    known = {n: (*fix[:2], fix[2] or 0.0) for n, fix in fixes.items() if has_fix(fix)}
    return colmap.positions_enu(known)


def evaluate(poses: Mapping[str, Pose], fixes: Mapping[str, Fix]) -> GpsScores:
    """Judge poses (world to camera) by GPS fixes.

    Raises:
        InputError: fewer than three images have both.
    """
    places = positions_m(fixes)
    names = sorted(poses.keys() & places.keys())
    if len(names) < 3:
        raise InputError(f"{len(names)} images have a pose and a GPS position: three are needed.")
    centres = camera_centres(
        np.stack([poses[n][0] for n in names]), np.stack([poses[n][1] for n in names])
    )
    true = np.stack([places[n] for n in names])
    moved = umeyama(centres, true)(centres)
    return GpsScores(
        total=len(places),
        names=tuple(names),
        distances=np.linalg.norm((moved - true)[:, :2], axis=1),
    )


@dataclass(frozen=True, kw_only=True)
class GpsOptions:
    """Compare a model with the GPS positions in its photographs' EXIF."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a COLMAP model, or of a gim-reconstruct run."""
    images: Annotated[Path, tyro.conf.Positional]
    """Folder of the photographs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the module."""
    options = tyro.cli(GpsOptions, args=argv)
    try:
        records = scan(options.images).images
        fixes = {r.name: r.exif.gps for r in records if r.exif.gps is not None}
        scores = evaluate(colmap.model_cameras(options.model), fixes)
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    worst = int(np.argmax(scores.distances))
    sys.stdout.write(
        f"{len(scores.names)} of {scores.total} images, {scores.rmse:.2f} m from GPS (rmse, "
        f"horizontal), worst {scores.distances[worst]:.1f} m ({scores.names[worst]})\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
