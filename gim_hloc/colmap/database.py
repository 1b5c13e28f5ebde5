"""COLMAP databases: images, keypoints, matches and verified geometries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from gim_hloc.colmap.cameras import CameraSpec, camera_spec, unproject
from gim_hloc.errors import InputError
from gim_hloc.geometry.epipolar import distances, essential_matrix
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.options import VerifyOptions

if TYPE_CHECKING:
    from gim_hloc.poses import Pose


@dataclass(kw_only=True)
class PairVerification:
    """What verification left of a pair.

    Attributes:
        name0: first image.
        name1: second image.
        matches: before verification.
        inliers: of the verified geometry; 0 for a dropped pair.
        confidence: sum of the confidences of the inliers, those of a dropped pair included; of all
            matches where that was too little already. None for matches without scores.
        doubtful: dropped for too little confidence alone, with inliers (or matches) enough.
    """

    name0: str
    name1: str
    matches: int
    inliers: int
    confidence: float | None = None
    doubtful: bool = False


_Entry = tuple[str, str, np.ndarray] | tuple[str, str, np.ndarray, np.ndarray | None]


def build_database(
    path: Path,
    *,
    cameras: Sequence[CameraSpec],
    names: Sequence[str],
    keypoints: Callable[[str], np.ndarray],
    matches: Iterable[_Entry],
    verify: VerifyOptions,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    poses: Mapping[str, Pose] | None = None,
    priors: Mapping[str, np.ndarray] | None = None,
    prior_stddev: float = 1.0,
    scale: Mapping[str, float] | None = None,
) -> list[PairVerification]:
    """Write a COLMAP database: images, cameras, keypoints, matches and verified geometries.

    Verification runs here rather than through COLMAP's ``verify_matches``: that reads names from a
    blank-separated file, shows no progress, and draws its random numbers per thread. Each pair has
    its own seed, so the result does not depend on the number of threads.

    Args:
        path: database to write; written under a temporary name, then renamed.
        cameras: every image of ``names`` belongs to exactly one.
        names: images in the order of their ids.
        keypoints: name -> (N, 2) float32 x, y in stored pixels, hloc's frame.
        matches: (name0, name1, (M, 2) rows into the two images' keypoints), and as a fourth entry
            their confidences (M,), which ``verify.min_confidence_sum`` needs.
        verify: thresholds of the two-view estimation.
        seed: base of the pairs' seeds.
        threads: pairs verified at a time.
        progress: called with the number of pairs just finished.
        poses: name -> (R, t), world to camera, exact ones. A pair with two of them is not
            estimated: its inliers are the matches that fit the known relative pose, whatever
            their confidences.
        priors: name -> (3,) camera centre that the mapper is to stay near.
        prior_stddev: standard deviation of priors, in their unit.
        scale: name -> pixels that the matcher saw for a stored one, at most 1 (the default).

    Returns:
        One entry for each pair of ``matches``, in its order.
    """
    temporary = path.with_name(path.name + ".tmp")
    for stale in (temporary, *(Path(f"{temporary}{end}") for end in ("-wal", "-shm", "-journal"))):
        stale.unlink(missing_ok=True)
    results: list[PairVerification] = []
    with pycolmap.Database.open(temporary) as database:
        ids, camera_of = _write_images(database, cameras, names)
        points: dict[str, np.ndarray] = {}
        for name in names:
            xy_colmap = np.asarray(keypoints(name), dtype=np.float32).reshape(-1, 2) + 0.5
            points[name] = xy_colmap
            database.write_keypoints(ids[name], xy_colmap)
            if priors is not None and name in priors:
                _write_prior(database, ids[name], priors[name], prior_stddev)

        least = verify.min_confidence_sum or 0.0

        def known_pose(name0: str, name1: str) -> bool:
            return poses is not None and name0 in poses and name1 in poses

        def seen_by(pair: _Pair) -> list[float]:
            return [(scale or {}).get(name, 1.0) for name in (pair.name0, pair.name1)]

        def estimate(pair: _Pair) -> Any:
            if not len(pair.rows):
                return None
            counts = len(points[pair.name0]), len(points[pair.name1])
            if (pair.rows.max(0) >= counts).any():  # COLMAP would read what lies behind them
                raise InputError(
                    f"The matches of {pair.name0} and {pair.name1} name keypoints "
                    f"{pair.rows.max(0).tolist()} of images with {counts[0]} and {counts[1]}: they "
                    "belong to other features. Match the images again."
                )
            if poses is not None and known_pose(pair.name0, pair.name1):
                ends = [
                    (camera_of[name], points[name].astype(np.float64), poses[name])
                    for name in (pair.name0, pair.name1)
                ]
                limits = [verify.max_error / seen for seen in seen_by(pair)]
                return _known_geometry(ends[0], ends[1], pair.rows, limits)
            if pair.confidence(pair.rows) < least:
                return None  # all the trials could not change that
            return pycolmap.estimate_two_view_geometry(
                camera_of[pair.name0],
                points[pair.name0].astype(np.float64),
                camera_of[pair.name1],
                points[pair.name1].astype(np.float64),
                pair.rows,
                # COLMAP takes one bound a pair; for an essential matrix this mean is exact.
                _two_view_options(verify, seed + pair.index, 2 / sum(seen_by(pair))),
            )

        for pair, geometry in _ordered_map(estimate, matches, threads):
            name0, name1, rows = pair.name0, pair.name1, pair.rows
            if ids[name0] > ids[name1]:
                raise InputError(
                    f"Pair {name0} {name1} is not in the order of the image list; sort it."
                )
            if len(rows):
                database.write_matches(ids[name0], ids[name1], rows)
            # A pair below a bound is left out: the mapper must not trust it.
            found, sane = rows, True
            if geometry is not None:
                found = geometry.inlier_matches
                sane = _config_name(geometry.config) not in ("UNDEFINED", "DEGENERATE")
            enough = sane and len(found) >= verify.min_num_inliers
            confidence = pair.confidence(found)
            doubtful = enough and confidence < least and not known_pose(name0, name1)
            verified = geometry is not None and enough and not doubtful
            if verified:
                database.write_two_view_geometry(ids[name0], ids[name1], geometry)
            results.append(
                PairVerification(
                    name0=name0,
                    name1=name1,
                    matches=len(rows),
                    inliers=len(found) if verified else 0,
                    confidence=None if pair.scores is None else confidence,
                    doubtful=doubtful,
                )
            )
            if progress is not None:
                progress(1)
    _write_results(temporary, ids, results)
    os.replace(temporary, path)
    return results


# COLMAP's tables have no place for confidences, and none for pairs that were dropped.
_RESULTS = "gim_hloc_verification"


def _write_results(path: Path, ids: Mapping[str, int], results: list[PairVerification]) -> None:
    rows = [
        (pycolmap.image_pair_to_pair_id(ids[r.name0], ids[r.name1]), r.confidence, r.doubtful)
        for r in results
    ]
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            f"CREATE TABLE {_RESULTS} (pair_id INTEGER PRIMARY KEY, confidence REAL, doubtful)"
        )
        database.executemany(f"INSERT INTO {_RESULTS} VALUES (?, ?, ?)", rows)


def _write_prior(database: Any, image_id: int, centre: np.ndarray, stddev: float) -> None:
    prior = pycolmap.PosePrior()
    prior.corr_data_id = database.read_image(image_id).data_id
    prior.position = np.asarray(centre, dtype=np.float64)
    prior.position_covariance = np.eye(3) * stddev**2
    prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
    database.write_pose_prior(prior)


_End = tuple[Any, np.ndarray, "Pose"]  # camera, keypoints (N, 2) corner origin, pose


def _known_geometry(end0: _End, end1: _End, rows: np.ndarray, max_error: Sequence[float]) -> Any:
    """Two-view geometry of a known relative pose: matches within ``max_error`` px of their lines.

    As in hloc's triangulation, the distance to the epipolar line counts in both images.
    """
    (camera0, xy0, (r0, t0)), (camera1, xy1, (r1, t1)) = end0, end1
    turn, shift = relative_pose(r0, t0, r1, t1)
    essential = essential_matrix(turn, shift)
    rays = (
        unproject(camera, xy[rows[:, side]])
        for side, (camera, xy) in enumerate(((camera0, xy0), (camera1, xy1)))
    )
    error0, error1 = distances(essential, *rays)
    good = (error0 <= camera0.cam_from_img_threshold(max_error[0])) & (
        error1 <= camera1.cam_from_img_threshold(max_error[1])
    )
    geometry = pycolmap.TwoViewGeometry()
    geometry.config = int(pycolmap.TwoViewGeometryConfiguration.CALIBRATED)
    geometry.inlier_matches = np.ascontiguousarray(rows[good], dtype=np.uint32)
    geometry.cam2_from_cam1 = pycolmap.Rigid3d(np.column_stack([turn, shift]))
    geometry.E = essential
    return geometry


@dataclass(frozen=True)
class _Pair:
    index: int
    name0: str
    name1: str
    rows: np.ndarray  # (M, 2) uint32
    scores: np.ndarray | None  # (M,)

    def confidence(self, rows: np.ndarray) -> float:
        """Sum over some of the rows; unbounded without scores, so that no bound drops the pair."""
        if self.scores is None:
            return np.inf
        key = np.array([1 << 32, 1], dtype=np.uint64)
        mine, asked = (some.astype(np.uint64) @ key for some in (self.rows, rows))
        return float(self.scores[np.isin(mine, asked)].sum(dtype=np.float64))


def _ordered_map(
    estimate: Callable[[_Pair], Any], matches: Iterable[_Entry], threads: int
) -> Iterator[tuple[_Pair, Any]]:
    """Run ``estimate`` over pairs in threads (it releases the GIL), yielding in input order."""
    pending: list[tuple[_Pair, Future[Any]]] = []
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for index, (name0, name1, rows, *scores) in enumerate(matches):
            rows = np.ascontiguousarray(np.asarray(rows).reshape(-1, 2), dtype=np.uint32)
            pair = _Pair(index, name0, name1, rows, scores[0] if scores else None)
            pending.append((pair, pool.submit(estimate, pair)))
            while len(pending) > 4 * threads:  # bound the memory of what waits
                pair, future = pending.pop(0)
                yield pair, future.result()
        for pair, future in pending:
            yield pair, future.result()


def _config_name(config: Any) -> str:
    value = int(config)
    for name, member in pycolmap.TwoViewGeometryConfiguration.__members__.items():
        if int(member) == value:
            return str(name)
    return str(config)


def _two_view_options(verify: VerifyOptions, seed: int, stored_px: float) -> Any:
    options = pycolmap.TwoViewGeometryOptions()
    options.min_num_inliers = verify.min_num_inliers
    options.ransac.max_error = verify.max_error * stored_px
    options.ransac.min_inlier_ratio = verify.min_inlier_ratio
    options.ransac.confidence = verify.confidence
    options.ransac.max_num_trials = verify.max_num_trials
    options.ransac.random_seed = seed % (2**31 - 1)
    return options


def _write_images(
    database: Any, cameras: Sequence[CameraSpec], names: Sequence[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write cameras with one-sensor rigs, and images with one-image frames, as COLMAP's import."""
    camera_of: dict[str, Any] = {}
    rig_of: dict[str, int] = {}
    for spec in cameras:
        camera = pycolmap.Camera(
            model=spec.model, width=spec.width, height=spec.height, params=list(spec.params)
        )
        camera.has_prior_focal_length = spec.prior
        camera.camera_id = database.write_camera(camera)
        rig = pycolmap.Rig()
        rig.add_ref_sensor(camera.sensor_id)
        rig_id = database.write_rig(rig)
        for name in spec.names:
            camera_of[name] = camera
            rig_of[name] = rig_id
    ids: dict[str, int] = {}
    for name in names:
        image = pycolmap.Image(name=name, camera_id=camera_of[name].camera_id)
        image.image_id = ids[name] = database.write_image(image)
        frame = pycolmap.Frame()
        frame.rig_id = rig_of[name]
        frame.add_data_id(image.data_id)
        database.write_frame(frame)
    return ids, camera_of


def copy_with_cameras(source: Path, target: Path, cameras: Sequence[CameraSpec]) -> None:
    """Copy a database, its images and what was found in them, but for the cameras."""
    target.unlink(missing_ok=True)
    with pycolmap.Database.open(source) as old, pycolmap.Database.open(target) as new:
        images = sorted(old.read_all_images(), key=lambda image: image.image_id)
        ids, _ = _write_images(new, cameras, [image.name for image in images])
        for image in images:
            new.write_keypoints(ids[image.name], old.read_keypoints(image.image_id))
        for pair_id, rows in zip(*old.read_all_matches(), strict=True):
            new.write_matches(*pycolmap.pair_id_to_image_pair(pair_id), rows)
        for pair_id, geometry in zip(*old.read_two_view_geometries(), strict=True):
            new.write_two_view_geometry(*pycolmap.pair_id_to_image_pair(pair_id), geometry)
        for prior in old.read_all_pose_priors():
            new.write_pose_prior(prior)


def read_cameras(database: Path, known: Sequence[CameraSpec]) -> list[CameraSpec]:
    """Cameras of a database made from ``known`` ones, which may have been parted since."""
    given = {name: spec.given for spec in known for name in spec.names}
    with pycolmap.Database.open(database) as db:
        cameras = sorted(db.read_all_cameras(), key=lambda camera: camera.camera_id)
        names: dict[int, list[str]] = {camera.camera_id: [] for camera in cameras}
        for image in sorted(db.read_all_images(), key=lambda image: image.image_id):
            names[image.camera_id].append(image.name)
    return [
        dataclasses.replace(
            camera_spec(camera),
            prior=camera.has_prior_focal_length,
            given=any(given.get(name, False) for name in names[camera.camera_id]),
            names=names[camera.camera_id],
        )
        for camera in cameras
    ]


def inlier_counts(database: Path) -> dict[tuple[str, str], int]:
    """Names of each verified pair -> its inliers."""
    with pycolmap.Database.open(database) as db:
        names = {image.image_id: image.name for image in db.read_all_images()}
        counts = zip(*db.read_two_view_geometry_num_inliers(), strict=True)
        ends = ((pycolmap.pair_id_to_image_pair(pair_id), count) for pair_id, count in counts)
        return {(names[a], names[b]): int(count) for (a, b), count in ends}


def inlier_matches(database: Path, pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Verified matches (M, 2) of some pairs, in their order; empty where there are none."""
    with pycolmap.Database.open(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        result = []
        for name0, name1 in pairs:
            if not db.exists_two_view_geometry(ids[name0], ids[name1]):
                result.append(np.zeros((0, 2), np.uint32))
                continue
            geometry = db.read_two_view_geometry(ids[name0], ids[name1])
            result.append(np.asarray(geometry.inlier_matches))
        return result


def read_verification(database: Path, pairs: Sequence[tuple[str, str]]) -> list[PairVerification]:
    """What verification left of each pair, from a database that ``build_database`` wrote."""
    with pycolmap.Database.open(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        matches = dict(zip(*db.read_num_matches(), strict=True))
        inliers = dict(zip(*db.read_two_view_geometry_num_inliers(), strict=True))
    with contextlib.closing(sqlite3.connect(database)) as own:
        kept = {row[0]: row[1:] for row in own.execute(f"SELECT * FROM {_RESULTS}")}
    result = []
    for name0, name1 in pairs:
        pair_id = pycolmap.image_pair_to_pair_id(ids[name0], ids[name1])
        confidence, doubtful = kept[pair_id]
        result.append(
            PairVerification(
                name0=name0,
                name1=name1,
                matches=int(matches.get(pair_id, 0)),
                inliers=int(inliers.get(pair_id, 0)),
                confidence=confidence,
                doubtful=bool(doubtful),
            )
        )
    return result


def largest_component(database: Path) -> int:
    """Number of images in the largest set that verified pairs connect."""
    with pycolmap.Database.open(database) as db:
        pairs, inliers = db.read_two_view_geometry_num_inliers()
        ends = [
            pycolmap.pair_id_to_image_pair(pair)
            for pair, count in zip(pairs, inliers, strict=True)
            if count
        ]
    if not ends:
        return 0
    rows, columns = np.array(ends).T
    size = int(max(rows.max(), columns.max())) + 1
    _, label = connected_components(coo_matrix((np.ones(len(ends)), (rows, columns)), (size, size)))
    return int(np.bincount(label).max())
