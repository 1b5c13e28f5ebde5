"""COLMAP databases: images, keypoints, matches and verified geometries."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycolmap

from gim_hloc.colmap.cameras import CameraSpec, camera_spec, colmap_camera
from gim_hloc.colmap.verification import Verification, colmap_keypoints, geometry_of
from gim_hloc.errors import InputError, LockedError, OutputError
from gim_hloc.geometry.graph import connected
from gim_hloc.options import VerifyOptions

if TYPE_CHECKING:
    from gim_hloc.poses import Pose

logger = logging.getLogger(__name__)


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
# Two images, their matches (M, 2), and what ``Verification.verify`` found.
_Verified = tuple[str, str, np.ndarray, Mapping[str, np.ndarray]]


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
    """Verify pairs in threads, and write them with ``write_database``.

    Args:
        path: as of ``write_database``.
        cameras: as of both.
        names: as of ``write_database``.
        keypoints: as of ``write_database``.
        matches: (name0, name1, (M, 2) rows into the two images' keypoints), and as a fourth entry
            their confidences (M,), which ``verify.min_confidence_sum`` needs.
        verify: options of ``Verification``.
        seed: as of ``Verification``.
        threads: pairs verified at a time.
        progress: called with the number of pairs just finished.
        poses: as of ``Verification``.
        priors: as of ``write_database``.
        prior_stddev: as of ``write_database``.
        scale: as of ``Verification``.

    Returns:
        One entry for each pair of ``matches``, in its order.
    """
    work = Verification(
        cameras=cameras, options=verify, seed=seed, poses=poses or {}, scale=scale or {}
    )
    points = {name: keypoints(name) for name in names}

    def verified(entry: _Entry) -> _Verified:
        name0, name1, rows, *scores = entry
        result = work.verify(name0, name1, points[name0], points[name1], rows, *scores)
        return name0, name1, rows, result

    def told(pairs: Iterable[_Verified]) -> Iterator[_Verified]:
        for pair in pairs:
            yield pair
            if progress is not None:
                progress(1)

    pool = ThreadPoolExecutor(threads)  # COLMAP releases the GIL
    try:
        return write_database(
            path,
            cameras=cameras,
            names=names,
            keypoints=points.__getitem__,
            pairs=told(pool.map(verified, matches)),
            priors=priors,
            prior_stddev=prior_stddev,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def write_database(
    path: Path,
    *,
    cameras: Sequence[CameraSpec],
    names: Sequence[str],
    keypoints: Callable[[str], np.ndarray],
    pairs: Iterable[_Verified],
    priors: Mapping[str, np.ndarray] | None = None,
    prior_stddev: float = 1.0,
) -> list[PairVerification]:
    """Write a COLMAP database: images, cameras, keypoints, matches and verified geometries.

    Args:
        path: database to write; written under a temporary name, read back, then renamed.
        cameras: every image of ``names`` belongs to exactly one.
        names: images in the order of their ids.
        keypoints: name -> (N, 2) x, y in stored pixels, hloc's frame.
        pairs: (name0, name1, (M, 2) rows into the two images' keypoints, what
            ``Verification.verify`` found of them).
        priors: name -> (3,) camera centre that the mapper is to stay near.
        prior_stddev: standard deviation of priors, in their unit.

    Returns:
        One entry for each of ``pairs``, in their order.

    Raises:
        InputError: a pair is not in the order of ``names``.
        OutputError: it cannot be written whole; what was there is left as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    write = functools.partial(_write, path)
    counts = dict.fromkeys(("images", "keypoints", "matches", "two_view_geometries"), 0)
    results = []
    try:
        _remove(temporary)
        with write(pycolmap.Database.open, temporary) as database:
            ids, camera_of = write(_write_images, database, cameras, names)
            for name in names:
                xy_colmap = colmap_keypoints(keypoints(name))
                write(database.write_keypoints, ids[name], xy_colmap)
                if priors is not None and name in priors:
                    write(_write_prior, database, ids[name], priors[name], prior_stddev)
                counts["images"] += 1
                counts["keypoints"] += len(xy_colmap)
            for pair in pairs:
                results.append(write(_write_pair, database, ids, camera_of, pair))
                counts["matches"] += results[-1].matches
                counts["two_view_geometries"] += results[-1].inliers
        own = [(_pair_id(ids, r.name0, r.name1), r.confidence, r.doubtful) for r in results]
        write(_finish, temporary, own, counts)
        # SQLite would take a log that an ended reader left for one of the new file.
        write(_remove, path, "-wal", "-shm", "-journal")
        write(os.replace, temporary, path)
    finally:
        _remove(temporary)
    return results


def _write(path: Path, act: Callable[..., Any], *args: Any) -> Any:
    """Do a part of the writing of a file."""
    try:
        return act(*args)
    except (RuntimeError, sqlite3.Error, OSError) as error:
        raise OutputError(
            f"The database {path} cannot be written ({error}); what was there is left as it was. "
            "Is the disk full?"
        ) from None


def _remove(path: Path, *endings: str) -> None:
    """Remove files that SQLite keeps of a database."""
    for ending in endings or ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def _write_pair(
    database: Any, ids: Mapping[str, int], camera_of: Mapping[str, Any], pair: _Verified
) -> PairVerification:
    name0, name1, rows, result = pair
    rows = np.ascontiguousarray(np.reshape(rows, (-1, 2)), dtype=np.uint32)
    if ids[name0] > ids[name1]:
        raise InputError(f"Pair {name0} {name1} is not in the order of the image list; sort it.")
    if len(rows):
        database.write_matches(ids[name0], ids[name1], rows)
    if "config" in result:
        geometry = geometry_of(result, camera_of[name0], camera_of[name1])
        database.write_two_view_geometry(ids[name0], ids[name1], geometry)
    confidence = float(result["confidence"])
    return PairVerification(
        name0=name0,
        name1=name1,
        matches=len(rows),
        inliers=len(result["inliers"]),
        confidence=None if np.isnan(confidence) else confidence,
        doubtful=bool(result["doubtful"]),
    )


def _write_prior(database: Any, image_id: int, centre: np.ndarray, stddev: float) -> None:
    prior = pycolmap.PosePrior()
    prior.corr_data_id = database.read_image(image_id).data_id
    prior.position = np.asarray(centre, dtype=np.float64)
    prior.position_covariance = np.eye(3) * stddev**2
    prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
    database.write_pose_prior(prior)


def _write_images(
    database: Any, cameras: Sequence[CameraSpec], names: Sequence[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write cameras, rigs, images and frames.

    A camera that is of no rig has one of its own, and its images have a frame each, as COLMAP's
    import writes them. A rig has the id of its reference camera.
    """
    camera_of: dict[str, Any] = {}
    spec_of: dict[str, CameraSpec] = {}
    rig_of: dict[str, int] = {}
    groups: dict[Any, list[tuple[CameraSpec, Any]]] = {}
    for spec in cameras:
        camera = colmap_camera(spec)
        camera.camera_id = database.write_camera(camera)
        alone = ("alone", camera.camera_id)
        groups.setdefault(alone if spec.rig is None else spec.rig.rig, []).append((spec, camera))
        camera_of |= dict.fromkeys(spec.names, camera)
        spec_of |= dict.fromkeys(spec.names, spec)
    for members in groups.values():
        rig = pycolmap.Rig()
        for spec, camera in members:
            if spec.rig is None or spec.rig.cam_from_rig is None:
                rig.rig_id = camera.camera_id
                rig.add_ref_sensor(camera.sensor_id)
        for spec, camera in members:
            if spec.rig is not None and spec.rig.cam_from_rig is not None:
                w, x, y, z, *shift = spec.rig.cam_from_rig
                turn = pycolmap.Rotation3d(np.array([x, y, z, w]))
                rig.add_sensor(camera.sensor_id, pycolmap.Rigid3d(turn, np.array(shift)))
            rig_of |= dict.fromkeys(spec.names, rig.rig_id)
        database.write_rig(rig, use_rig_id=True)
    ids: dict[str, int] = {}
    frames: dict[Any, Any] = {}
    for name in names:
        image = pycolmap.Image(name=name, camera_id=camera_of[name].camera_id)
        image.image_id = ids[name] = database.write_image(image)
        place = spec_of[name].rig
        frame = frames.setdefault(name if place is None else place.frame(name), pycolmap.Frame())
        frame.rig_id = rig_of[name]
        frame.add_data_id(image.data_id)
    for frame in frames.values():
        database.write_frame(frame)
    return ids, camera_of


# COLMAP's tables have no place for confidences, and none for pairs that were dropped; and neither
# COLMAP nor SQLite sees a byte that changed on the disk.
_RESULTS = "gim_hloc_verification"
_CHECKSUM = "gim_hloc_checksum"
_Own = tuple[int, float | None, bool]  # pair id, confidence, doubtful


def _pair_id(ids: Mapping[str, int], name0: str, name1: str) -> int:
    return int(pycolmap.image_pair_to_pair_id(ids[name0], ids[name1]))


def _connected(path: Path) -> contextlib.closing[sqlite3.Connection]:
    """A file that exists; text, which may be damaged, as bytes."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
    database.text_factory = bytes
    return contextlib.closing(database)


def _finish(path: Path, own: list[_Own], counts: Mapping[str, int]) -> None:
    """Add the tables that COLMAP does not know; all must then be on the disk as it was given."""
    with _connected(path) as database:
        with database:
            database.execute(
                f"CREATE TABLE {_RESULTS} (pair_id INTEGER PRIMARY KEY, confidence REAL, doubtful)"
            )
            database.executemany(f"INSERT INTO {_RESULTS} VALUES (?, ?, ?)", own)
            database.execute(f"CREATE TABLE {_CHECKSUM} (crc32 INTEGER)")
            database.execute(f"INSERT INTO {_CHECKSUM} VALUES (?)", (_checksum(database),))
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb") as file:
        os.fsync(file.fileno())  # COLMAP writes without, and a disk may tell only now
    with _connected(path) as database:
        for table, count in counts.items():
            what = "count(*)" if table == "images" else "total(rows)"
            (found,) = database.execute(f"SELECT {what} FROM {table}").fetchone()
            if found != count:
                raise OSError(f"{found:.0f} of {count} {table} arrived")
        if not _whole(database):
            raise OSError("what was read back is not what was written")


def _checksum(database: sqlite3.Connection) -> int:
    """Of the definition and every value of every table but the checksum's own."""
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
    total = 0
    for name, definition in database.execute(query).fetchall():
        if name in (_CHECKSUM.encode(), b"sqlite_sequence"):
            continue
        rows = database.execute(f"SELECT * FROM {name.decode()} ORDER BY rowid")
        for value in itertools.chain([definition], itertools.chain.from_iterable(rows)):
            data = value if isinstance(value, bytes) else repr(value).encode()
            total = zlib.crc32(data, total)
    return total


def _whole(database: sqlite3.Connection) -> bool:
    (checked,) = database.execute("PRAGMA quick_check(1)").fetchone()
    (stored,) = database.execute(f"SELECT crc32 FROM {_CHECKSUM}").fetchone()
    return bool(checked == b"ok" and stored == _checksum(database))


def database_ok(path: Path, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether a database is there, undamaged, and of these images and pairs.

    Raises:
        OutputError: that cannot be told: locked, not permitted, a failing disk.
    """
    if not path.exists():
        return False
    try:
        with _connected(path) as database:
            if _whole(database):
                query = "SELECT name FROM images ORDER BY image_id"
                found = [name.decode() for (name,) in database.execute(query)]
                ids = {name: image_id for image_id, name in enumerate(names, 1)}
                kept = {row[0] for row in database.execute(f"SELECT pair_id FROM {_RESULTS}")}
                return found == list(names) and kept == {_pair_id(ids, *pair) for pair in pairs}
    except (sqlite3.Error, UnicodeDecodeError) as error:
        kind = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
        if not kind.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR")):
            raise _unreadable(path, error) from None
    logger.warning("The database %s is damaged, or of another version; it is written anew.", path)
    return False


def _unreadable(path: Path, error: Exception) -> OutputError:
    kind = LockedError if "locked" in str(error) else OutputError
    what = f"nothing of {error} is in it" if isinstance(error, KeyError) else error
    return kind(
        f"The database {path} cannot be read ({what}). If it is damaged, delete it and run again: "
        "it is written anew from the matches."
    )


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Any]:
    """A ``pycolmap.Database`` to read; ``OutputError`` where there is none, or a damaged one."""
    try:
        with _connected(path) as database:  # COLMAP would make what is missing
            database.execute("SELECT 1 FROM images").fetchone()
        with pycolmap.Database.open(path) as database:
            yield database
    except (RuntimeError, ValueError, KeyError, sqlite3.Error) as error:
        raise _unreadable(path, error) from None


def _own_results(path: Path) -> list[_Own]:
    with _connected(path) as database:
        query = f"SELECT pair_id, confidence, doubtful FROM {_RESULTS}"
        return database.execute(query).fetchall()


def copy_with_cameras(source: Path, target: Path, cameras: Sequence[CameraSpec]) -> None:
    """Copy a database, its images and what was found in them, but for the cameras."""
    with open_database(source) as old:
        _write(target, _copy, old, target, cameras)
        _write(target, _finish, target, _own_results(source), {})


def _copy(old: Any, target: Path, cameras: Sequence[CameraSpec]) -> None:
    _remove(target)
    with pycolmap.Database.open(target) as new:
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
    with open_database(database) as db:
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
    with open_database(database) as db:
        names = {image.image_id: image.name for image in db.read_all_images()}
        counts = zip(*db.read_two_view_geometry_num_inliers(), strict=True)
        ends = ((pycolmap.pair_id_to_image_pair(pair_id), count) for pair_id, count in counts)
        return {(names[a], names[b]): int(count) for (a, b), count in ends}


def inlier_matches(database: Path, pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Verified matches (M, 2) of some pairs, in their order; empty where there are none."""
    with open_database(database) as db:
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
    with open_database(database) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        matches = dict(zip(*db.read_num_matches(), strict=True))
        inliers = dict(zip(*db.read_two_view_geometry_num_inliers(), strict=True))
        kept = {pair_id: own for pair_id, *own in _own_results(database)}
        result = []
        for name0, name1 in pairs:
            pair_id = _pair_id(ids, name0, name1)
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


def verified_components(database: Path) -> list[set[str]]:
    """Names of the images of each set that verified pairs connect, largest set first."""
    with open_database(database) as db:
        names = {image.image_id: image.name for image in db.read_all_images()}
        pairs, inliers = db.read_two_view_geometry_num_inliers()
    ends = (pycolmap.pair_id_to_image_pair(p) for p, n in zip(pairs, inliers, strict=True) if n)
    groups = connected(list(names.values()), [(names[a], names[b]) for a, b in ends])
    return [group for group in groups if len(group) > 1]
