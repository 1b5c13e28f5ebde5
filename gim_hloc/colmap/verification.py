"""Two-view geometric verification of one pair, as arrays that can be kept and sent anywhere.

Not COLMAP's ``verify_matches``: that reads names from a blank-separated file, shows no progress,
and draws its random numbers per thread. Here each pair has a seed of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, colmap_camera, unproject
from gim_hloc.errors import InputError
from gim_hloc.geometry.epipolar import distances, essential_matrix
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.geometry.seeds import pair_seed
from gim_hloc.options import VerifyOptions

if TYPE_CHECKING:
    from gim_hloc.poses import Pose


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Verifies pairs one by one, in any order, thread or process, with the same results.

    Attributes:
        cameras: every image belongs to exactly one.
        options: thresholds of the two-view estimation.
        seed: base of the pairs' seeds.
        poses: name -> (R, t), world to camera, exact ones. A pair with two of them is not
            estimated: its inliers are the matches that fit the known relative pose, whatever
            their confidences.
        scale: name -> pixels that the matcher saw for a stored one, at most 1 (the default).
    """

    cameras: Sequence[CameraSpec]
    options: VerifyOptions
    seed: int = 0
    poses: Mapping[str, Pose] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)

    def verify(
        self,
        name0: str,
        name1: str,
        xy0: np.ndarray,
        xy1: np.ndarray,
        rows: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Verify a pair.

        Args:
            name0: first image.
            name1: second image.
            xy0: (N, 2) keypoints of the first in stored pixels, hloc's frame.
            xy1: (N, 2) of the second.
            rows: (M, 2) matches, rows into the keypoints.
            scores: (M,) confidences, which ``min_confidence_sum`` needs.

        Returns:
            inliers: (K, 2) uint32 matches of the verified geometry; none for a dropped pair.
            confidence, doubtful: as in ``PairVerification``; NaN for matches without scores.
            config: number of the kind of geometry, for a verified pair alone, and with it what
                COLMAP found of E, F, H (3, 3), cam2_from_cam1 (7,) quaternion x y z w and
                translation, camera1 and camera2 (parameters with the focal length found).

        Raises:
            InputError: the matches are those of other keypoints.
        """
        rows = np.ascontiguousarray(np.reshape(rows, (-1, 2)), dtype=np.uint32)
        _check_rows(name0, name1, rows, (len(xy0), len(xy1)))
        known = self._known(name0, name1)
        least = self.options.min_confidence_sum or 0.0
        geometry = None
        if len(rows) and known:
            geometry = self._from_poses((name0, name1), (xy0, xy1), rows)
        elif len(rows) and _confidence(rows, scores, rows) >= least:  # else trials change nothing
            geometry = self._estimated((name0, name1), (xy0, xy1), rows)
        # A pair below a bound is left out: the mapper must not trust it.
        found, sane = rows, True
        if geometry is not None:
            found = geometry.inlier_matches
            sane = geometry.config not in _NO_GEOMETRY
        enough = sane and len(found) >= self.options.min_num_inliers
        confidence = _confidence(rows, scores, found)
        doubtful = enough and confidence < least and not known
        verified = geometry is not None and enough and not doubtful
        return {
            "inliers": found[: None if verified else 0],
            "confidence": np.array(np.nan if scores is None else confidence),
            "doubtful": np.array(doubtful),
            **(_geometry_arrays(geometry) if verified else {}),
        }

    def settings(self) -> dict[str, Any]:
        """All that decides a result beside ``pair_facts``, keypoints, matches and confidences."""
        return {
            "verify": dataclasses.asdict(self.options),
            "seed": self.seed,
            "pycolmap": str(pycolmap.__version__),
        }

    def pair_facts(self, name0: str, name1: str) -> dict[str, Any]:
        """What of cameras, poses and scale decides the result of a pair, for JSON."""
        names = (name0, name1)
        cameras = [dataclasses.asdict(self._camera_of[name]) for name in names]
        known = self._known(*names)
        poses = [[np.asarray(part).tolist() for part in self.poses[n]] for n in names if known]
        return {
            "names": names,
            "cameras": [{k: c[k] for k in _CAMERA_FACTS} for c in cameras],
            "one_camera": self._camera_of[name0] is self._camera_of[name1],
            "poses": poses if known else None,
            "scale": self._scales(names),
        }

    @functools.cached_property
    def _camera_of(self) -> dict[str, CameraSpec]:
        return {name: spec for spec in self.cameras for name in spec.names}

    def _known(self, name0: str, name1: str) -> bool:
        return name0 in self.poses and name1 in self.poses

    def _scales(self, names: tuple[str, str]) -> list[float]:
        return [float(self.scale.get(name, 1.0)) for name in names]

    def _ends(self, names: tuple[str, str]) -> tuple[Any, Any]:
        """The two cameras; COLMAP sees by their ids whether they are one."""
        first, second = (self._camera_of[name] for name in names)
        camera0, camera1 = colmap_camera(first), colmap_camera(second)
        camera0.camera_id, camera1.camera_id = 1, 1 if first is second else 2
        return camera0, camera1

    def _estimated(
        self, names: tuple[str, str], xy: tuple[np.ndarray, np.ndarray], rows: np.ndarray
    ) -> Any:
        options = pycolmap.TwoViewGeometryOptions()
        options.min_num_inliers = self.options.min_num_inliers
        # COLMAP takes one bound a pair; for an essential matrix this mean is exact.
        options.ransac.max_error = self.options.max_error * 2 / sum(self._scales(names))
        options.ransac.min_inlier_ratio = self.options.min_inlier_ratio
        options.ransac.confidence = self.options.confidence
        options.ransac.min_num_trials = self.options.min_num_trials
        options.ransac.max_num_trials = self.options.max_num_trials
        options.ransac.random_seed = pair_seed(self.seed, *names) % (2**31 - 1)
        camera0, camera1 = self._ends(names)
        return pycolmap.estimate_two_view_geometry(
            camera0, _corner_origin(xy[0]), camera1, _corner_origin(xy[1]), rows, options
        )

    def _from_poses(
        self, names: tuple[str, str], xy: tuple[np.ndarray, np.ndarray], rows: np.ndarray
    ) -> Any:
        """Geometry of a known relative pose: matches within ``max_error`` px of their lines.

        As in hloc's triangulation, the distance to the epipolar line counts in both images.
        """
        turn, shift = relative_pose(*self.poses[names[0]], *self.poses[names[1]])
        essential = essential_matrix(turn, shift)
        cameras = self._ends(names)
        rays = [
            unproject(camera, _corner_origin(xy[side][rows[:, side]]))
            for side, camera in enumerate(cameras)
        ]
        good = np.ones(len(rows), dtype=bool)
        errors = distances(essential, rays[0], rays[1])
        for camera, error, scale in zip(cameras, errors, self._scales(names), strict=True):
            good &= error <= camera.cam_from_img_threshold(self.options.max_error / scale)
        geometry = pycolmap.TwoViewGeometry()
        geometry.config = int(pycolmap.TwoViewGeometryConfiguration.CALIBRATED)
        geometry.inlier_matches = np.ascontiguousarray(rows[good])
        geometry.cam2_from_cam1 = pycolmap.Rigid3d(np.column_stack([turn, shift]))
        geometry.E = essential
        return geometry


_CAMERA_FACTS = ("model", "width", "height", "params", "prior")
_NO_GEOMETRY = {
    int(getattr(pycolmap.TwoViewGeometryConfiguration, name))
    for name in ("UNDEFINED", "DEGENERATE")
}


def _corner_origin(xy_px: np.ndarray) -> np.ndarray:
    """Keypoints (N, 2) as COLMAP's database has them (float32), in double precision."""
    return colmap_keypoints(xy_px).astype(np.float64)


def colmap_keypoints(xy_px: np.ndarray) -> np.ndarray:
    """Keypoints (N, 2) of hloc's frame in COLMAP's, float32."""
    xy_colmap: np.ndarray = np.asarray(xy_px, dtype=np.float32).reshape(-1, 2) + 0.5
    return xy_colmap


def _check_rows(name0: str, name1: str, rows: np.ndarray, counts: tuple[int, int]) -> None:
    if len(rows) and (rows.max(0) >= counts).any():  # COLMAP would read what lies behind them
        raise InputError(
            f"The matches of {name0} and {name1} name keypoints {rows.max(0).tolist()} of images "
            f"with {counts[0]} and {counts[1]}: they belong to other features. Match the images "
            "again."
        )


def _confidence(rows: np.ndarray, scores: np.ndarray | None, some: np.ndarray) -> float:
    """Sum over some of the rows; unbounded without scores, so that no bound drops the pair."""
    if scores is None:
        return np.inf
    key = np.array([1 << 32, 1], dtype=np.uint64)
    mine, asked = (each.astype(np.uint64) @ key for each in (rows, some))
    return float(scores[np.isin(mine, asked)].sum(dtype=np.float64))


def _geometry_arrays(geometry: Any) -> dict[str, np.ndarray]:
    arrays = {name: getattr(geometry, name) for name in "EFH"}
    pose = geometry.cam2_from_cam1
    if pose is not None:
        arrays["cam2_from_cam1"] = np.concatenate([pose.rotation.quat, pose.translation])
    for name in ("camera1", "camera2"):  # which pycolmap 4.0 does not have
        camera = getattr(geometry, name, None)
        arrays[name] = None if camera is None else np.array(camera.params)
    kept = {name: array for name, array in arrays.items() if array is not None}
    return {"config": np.array(geometry.config), **kept}


def geometry_of(result: Mapping[str, np.ndarray], camera1: Any, camera2: Any) -> Any:
    """``pycolmap.TwoViewGeometry`` of a verified pair, from what ``Verification.verify`` gave."""
    geometry = pycolmap.TwoViewGeometry()
    geometry.config = int(result["config"])
    geometry.inlier_matches = np.ascontiguousarray(result["inliers"], dtype=np.uint32)
    for name in "EFH":
        if name in result:
            setattr(geometry, name, result[name])
    if "cam2_from_cam1" in result:
        values = result["cam2_from_cam1"]
        turn = pycolmap.Rotation3d(np.ascontiguousarray(values[:4]))
        geometry.cam2_from_cam1 = pycolmap.Rigid3d(turn, np.ascontiguousarray(values[4:]))
    for name, camera in (("camera1", camera1), ("camera2", camera2)):
        if name in result:
            found = copy.copy(camera)
            found.params = result[name]
            setattr(geometry, name, found)
    return geometry


__all__ = ["Verification", "colmap_keypoints", "geometry_of"]
