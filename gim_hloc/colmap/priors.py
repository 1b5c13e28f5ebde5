"""Models adjusted together with GPS positions of their cameras, as they are laid on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycolmap

from gim_hloc.colmap.geo import Metres, metres_by_gps
from gim_hloc.colmap.improve import adjuster
from gim_hloc.colmap.model import image_statistics, poses_of
from gim_hloc.surveys import Fix

_ROUNDS = 3  # in each the deviations of the positions are measured anew
_CAUCHY = 2.4  # scale of a Cauchy loss in standard deviations
_UNKNOWN_M = 1e4  # standard deviation of a height that was not measured


def lay_on_gps(
    model: Any,
    fixes: Mapping[str, Fix],
    orientations: Mapping[str, int],
    *,
    fixed: set[int],
    threads: int,
    focal: bool,
) -> Metres:
    """Put a model into metres, in place, and adjust it to pixels and positions at once.

    Both count as their residuals say, and what is wrong of the positions does not: a model that
    pixels determine better than the positions do stays as it is, one that bends is straightened.

    Args:
        model: ``pycolmap.Reconstruction``.
        fixes: as of ``metres_by_gps``.
        orientations: as of ``metres_by_gps``.
        fixed: ids of cameras whose intrinsics are known.
        threads: of the solver.
        focal: whether focal lengths move; distortion does, which is what bends long flights.

    Raises:
        InputError: as ``metres_by_gps``.
    """
    metres = metres_by_gps(model, fixes, orientations)
    metres.apply(model)
    for _ in range(_ROUNDS):
        deviation = _pixel_deviation(model)
        if deviation is None:
            break
        adjuster(
            model, fixed, threads, (), _CAUCHY * deviation, focal=focal,
            priors=_priors(model, metres, deviation),
        ).solve()  # fmt: skip
        metres = metres_by_gps(model, fixes, orientations)
        metres.apply(model)
    model.update_point_3d_errors()
    return metres


def _pixel_deviation(model: Any) -> float | None:
    """Robust standard deviation of a coordinate of an observation, px; None if none is known."""
    errors = np.concatenate([one.errors_px for one in image_statistics(model).values()])
    spare = 2 * len(errors) - 3 * model.num_points3D() - 6 * model.num_reg_images()
    if spare <= 0:
        return None
    return float(np.median(errors) / 1.1774 * np.sqrt(2 * len(errors) / spare))  # of a Rayleigh's


def _priors(model: Any, metres: Metres, deviation_px: float) -> list[Any]:
    """Positions that are not wrong; an adjustment takes an observation to be good to 1 px."""
    facts = metres.facts
    across, height = facts["rms_across_m"] / np.sqrt(2), facts["rms_height_m"] or _UNKNOWN_M
    poses = poses_of(model)
    priors = []
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        residual = facts["residuals_m"].get(image.name)
        if residual is None or image.name in facts["wrong"] or not image.is_ref_in_frame():
            continue
        rotation, translation = poses[image.name]
        known = residual[2] is not None
        deviations = np.array([across, across, height if known else _UNKNOWN_M])
        prior = pycolmap.PosePrior()
        prior.corr_data_id = image.data_id
        prior.position = [r or 0.0 for r in residual] - rotation.T @ translation
        prior.position_covariance = np.diag((np.maximum(deviations, 1e-3) / deviation_px) ** 2)
        prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
        priors.append(prior)
    return priors
