"""Pairs are verified anywhere, one by one; databases are written whole and read back or refused."""

from __future__ import annotations

import json
import logging
import pickle
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from synthetic import FOCAL, HEIGHT, WIDTH, Scene, make_scene

from gim_hloc import colmap
from gim_hloc.cache import Cache, key
from gim_hloc.colmap import CameraSpec, Verification
from gim_hloc.colmap.database import copy_with_cameras, inlier_counts, verified_components
from gim_hloc.errors import LockedError, OutputError
from gim_hloc.geometry.pose import relative_pose
from gim_hloc.geometry.seeds import pair_seed
from gim_hloc.options import VerifyOptions

Entry = tuple[str, str, np.ndarray, np.ndarray]


def camera(names: list[str], *, prior: bool, focal: float = 1.1 * FOCAL) -> CameraSpec:
    params = (focal, WIDTH / 2, HEIGHT / 2, 0.01)
    return CameraSpec(
        model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=params, prior=prior,
        given=False, names=names,
    )  # fmt: skip


def cluttered(**options: Any) -> tuple[Scene, list[Entry]]:
    """A scene with noise and as many wrong matches as right ones: what RANSAC draws matters."""
    scene = make_scene(images=4, points=200, noise_px=1.5, **options)
    rng = np.random.default_rng(0)
    entries = []
    for a, b, rows in scene.all_matches():
        wrong = np.stack([rng.permutation(len(rows)), rng.permutation(len(rows))], 1)
        rows = np.concatenate([rows, wrong])
        entries.append((a, b, rows, rng.uniform(0.5, 1, len(rows)).astype(np.float32)))
    return scene, entries


def verified(work: Verification, scene: Scene, entry: Entry) -> dict[str, np.ndarray]:
    a, b, rows, scores = entry
    return work.verify(a, b, scene.keypoints[a], scene.keypoints[b], rows, scores)


def write(path: Path, work: Verification, scene: Scene, pairs: Any, **options: Any) -> Any:
    return colmap.write_database(
        path,
        cameras=work.cameras,
        names=scene.names,
        keypoints=scene.keypoints.__getitem__,
        pairs=pairs,
        **options,
    )


def tables(path: Path) -> dict[str, list[Any]]:
    connection = sqlite3.connect(path)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE sql > ''")]
    found = {}
    for name in names:
        if connection.execute(
            "SELECT type FROM sqlite_master WHERE name = ?", [name]
        ).fetchone() == ("table",):
            found[name] = connection.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall()
    connection.close()
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name], equal_nan=True) for name in one
    )


# ------------------------------------------------------------------------------------ a pair alone

CAMERAS: dict[str, Callable[[list[str]], list[CameraSpec]]] = {
    "known": lambda names: [camera(names, prior=True)],
    "guessed": lambda names: [camera(names, prior=False)],
    "one each": lambda names: [camera([name], prior=False) for name in names],
    "mixed": lambda names: [camera(names[2:], prior=True), camera(names[:2], prior=False)],
}


@pytest.mark.parametrize("kind", CAMERAS)
def test_kept_results_give_the_database_that_colmap_writes(kind: str, tmp_path: Path) -> None:
    scene, entries = cluttered()
    work = Verification(cameras=CAMERAS[kind](scene.names), options=VerifyOptions(), seed=3)
    with Cache(tmp_path / "cache") as cache:
        for entry in entries:
            cache.put(key(entry[:2]), verified(work, scene, entry))
        kept = [(*e[:3], cache.get(key(e[:2]))) for e in entries]
    results = write(tmp_path / "kept.db", work, scene, kept)
    assert all(r.inliers > 150 for r in results)
    colmap.build_database(
        tmp_path / "threads.db", cameras=work.cameras, names=scene.names, seed=3, threads=3,
        keypoints=scene.keypoints.__getitem__, matches=entries, verify=work.options,
    )  # fmt: skip
    assert tables(tmp_path / "threads.db") == tables(tmp_path / "kept.db")

    # the same through COLMAP's own objects
    nothing = {"inliers": np.zeros((0, 2)), "confidence": np.nan, "doubtful": False}
    write(tmp_path / "direct.db", work, scene, [(*e[:3], nothing) for e in entries])
    options = pycolmap.TwoViewGeometryOptions()
    for name in (
        "max_error",
        "min_inlier_ratio",
        "confidence",
        "min_num_trials",
        "max_num_trials",
    ):
        setattr(options.ransac, name, getattr(work.options, name))
    with pycolmap.Database.open(tmp_path / "direct.db") as db:
        for a, b, rows, _ in entries:
            images = [db.read_image_with_name(name) for name in (a, b)]
            ends: list[Any] = []
            for image in images:
                points = db.read_keypoints(image.image_id)[:, :2].astype(np.float64)
                ends += [db.read_camera(image.camera_id), points]
            options.ransac.random_seed = pair_seed(3, a, b) % (2**31 - 1)
            geometry = pycolmap.estimate_two_view_geometry(*ends, rows, options)
            db.write_two_view_geometry(*(image.image_id for image in images), geometry)
    direct, kept_tables = tables(tmp_path / "direct.db"), tables(tmp_path / "kept.db")
    for name in ("gim_hloc_verification", "gim_hloc_checksum"):
        del direct[name], kept_tables[name]
    assert len(direct["two_view_geometries"]) == 6
    assert direct == kept_tables
    focal_found = kind == "mixed" and hasattr(pycolmap.TwoViewGeometry, "camera1")
    assert any(row[-2] for row in direct["two_view_geometries"]) == focal_found


def test_a_result_is_that_of_the_pair_alone(tmp_path: Path) -> None:
    scene, entries = cluttered()
    cameras = CAMERAS["mixed"](scene.names)
    work = Verification(cameras=cameras, options=VerifyOptions())
    results = {entry[:2]: verified(work, scene, entry) for entry in entries}
    again = pickle.loads(pickle.dumps(work))
    for entry in reversed(entries[1:]):
        assert same(verified(again, scene, entry), results[entry[:2]])
        own = [
            camera([n for n in spec.names if n in entry[:2]], prior=spec.prior)
            for spec in reversed(cameras)
        ]
        alone = Verification(cameras=own, options=VerifyOptions())
        assert alone.pair_facts(*entry[:2]) == work.pair_facts(*entry[:2])
        assert same(verified(alone, scene, entry), results[entry[:2]])
    other = Verification(cameras=cameras, options=VerifyOptions(), seed=1)
    assert not all(same(verified(other, scene, e), results[e[:2]]) for e in entries)


def test_facts_of_a_pair_change_with_what_decides_it_alone() -> None:
    scene, _ = cluttered()
    pairs, names = scene.pairs(), scene.names

    def facts(**changes: Any) -> dict[Any, str]:
        work = Verification(
            **{"cameras": [camera([n], prior=True) for n in names], "options": VerifyOptions()}
            | changes
        )
        json.dumps(work.settings(), allow_nan=False)
        return {pair: json.dumps(work.pair_facts(*pair), allow_nan=False) for pair in pairs}

    def changed(one: dict[Any, str], other: dict[Any, str]) -> set[Any]:
        return {pair for pair in pairs if one[pair] != other[pair]}

    def of(*some: str) -> set[Any]:
        return {pair for pair in pairs if set(some) & set(pair)}

    usual = facts()
    cameras = [camera([n], prior=True, focal=FOCAL + (n == names[1])) for n in names]
    assert changed(facts(cameras=[camera([n], prior=True, focal=FOCAL) for n in names]),
                   facts(cameras=cameras)) == of(names[1])  # fmt: skip
    together = [camera(names[:2], prior=True), *(camera([n], prior=True) for n in names[2:])]
    assert changed(usual, facts(cameras=together)) == {(names[0], names[1])}
    assert changed(usual, facts(scale={names[2]: 0.5})) == of(names[2])
    some = {name: scene.poses[name] for name in names[:3]}
    assert changed(usual, facts(poses=some)) == set(pairs) - of(names[3])
    moved = {**some, names[0]: (some[names[0]][0], some[names[0]][1] + 0.1)}
    assert changed(facts(poses=some), facts(poses=moved)) == of(names[0]) - of(names[3])
    # a pose without a partner decides nothing
    assert changed(usual, facts(poses={names[0]: scene.poses[names[0]]})) == set()


def test_known_poses_and_priors_arrive_exactly(tmp_path: Path) -> None:
    scene, entries = cluttered()
    a, b, c, d = scene.names
    known = {name: scene.poses[name] for name in (a, b, c)}
    work = Verification(
        cameras=[camera(scene.names, prior=True, focal=FOCAL)],
        options=VerifyOptions(max_error=6),
        poses=known,
    )
    pairs = [(*e[:3], verified(work, scene, e)) for e in entries]
    priors = {name: -r.T @ t for name, (r, t) in scene.poses.items() if name != c}
    write(tmp_path / "d.db", work, scene, pairs, priors=priors, prior_stddev=0.5)
    with pycolmap.Database.open(tmp_path / "d.db") as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        for name0, name1 in scene.pairs():
            geometry = db.read_two_view_geometry(ids[name0], ids[name1])
            both = name0 in known and name1 in known
            assert (geometry.cam2_from_cam1 is not None) == both
            if both:
                turn, shift = relative_pose(*known[name0], *known[name1])
                rigid = pycolmap.Rigid3d(np.column_stack([turn, shift]))
                assert np.array_equal(geometry.cam2_from_cam1.rotation.quat, rigid.rotation.quat)
                assert np.array_equal(geometry.cam2_from_cam1.translation, shift)
                assert len(geometry.inlier_matches) > 180
        found = {p.corr_data_id.id: p for p in db.read_all_pose_priors()}
        assert set(found) == {ids[name] for name in (a, b, d)}
        for name, centre in priors.items():
            assert np.array_equal(found[ids[name]].position, centre)
            assert np.array_equal(found[ids[name]].position_covariance, 0.25 * np.eye(3))


# ------------------------------------------------------------------------------- whole or refused


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[tuple[Path, Scene, Verification, list[Any]]]:
    scene, entries = cluttered()
    options = VerifyOptions(min_confidence_sum=10)
    work = Verification(cameras=CAMERAS["mixed"](scene.names), options=options)
    entries[2] = (*entries[2][:3], entries[2][3] / 1000)  # a doubtful pair
    pairs = [(*e[:3], verified(work, scene, e)) for e in entries]
    write(tmp_path / "database.db", work, scene, pairs)
    yield tmp_path / "database.db", scene, work, pairs
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"database.db", "database.db-wal", "database.db-shm", "other.db"}


def everything(path: Path, scene: Scene, work: Verification) -> list[Any]:
    """All that is read of a database."""
    return [
        colmap.read_verification(path, scene.pairs()),
        [rows.tolist() for rows in colmap.inlier_matches(path, scene.pairs())],
        colmap.read_cameras(path, work.cameras),
        inlier_counts(path),
        verified_components(path),
    ]


def test_whole_database_is_known_by_its_images_and_pairs(whole: Any, tmp_path: Path) -> None:
    path, scene, _, _ = whole
    names = scene.names
    assert colmap.database_ok(path, names, scene.pairs())
    assert colmap.database_ok(path, names, scene.pairs()[::-1])
    assert not colmap.database_ok(path, names, scene.pairs()[1:])
    assert not colmap.database_ok(path, [*names, "z.jpg"], scene.pairs())
    assert not colmap.database_ok(path, names[::-1], [p[::-1] for p in scene.pairs()])
    assert not colmap.database_ok(tmp_path / "none.db", names, scene.pairs())
    # with other cameras it is as whole, and what was dropped is still known
    copy_with_cameras(path, tmp_path / "other.db", CAMERAS["one each"](names))
    assert colmap.database_ok(tmp_path / "other.db", names, scene.pairs())
    read = colmap.read_verification(tmp_path / "other.db", scene.pairs())
    assert read == colmap.read_verification(path, scene.pairs())
    assert [r.doubtful for r in read] == [False, False, True, False, False, False]


def test_flipped_bytes_are_seen_or_mean_nothing(whole: Any) -> None:
    path, scene, work, _ = whole
    data, right = path.read_bytes(), [tables(path), everything(path, scene, work)]
    rng = random.Random(0)
    seen = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(100, len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        if colmap.database_ok(path, scene.names, scene.pairs()):
            assert [tables(path), everything(path, scene, work)] == right
        else:
            seen += 1
    assert seen > 10  # most of so small a file is room in its pages
    path.write_bytes(data.replace(b"two_view_geom", b"two_view_GOOD"))
    assert not colmap.database_ok(path, scene.names, scene.pairs())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no database at all\n" * 1000,
        lambda data: data[:50],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4096],
        lambda data: data[:4096] + bytes(len(data) - 4096),
        lambda data: bytes(4096) + data[4096:],
        None,
    ],
)
def test_damage_is_one_error_that_names_the_file(
    damage: Callable[[bytes], bytes] | None, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path, scene, work, pairs = whole
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert not colmap.database_ok(path, scene.names, scene.pairs())
    assert [str(path) in r.getMessage() for r in caplog.records] == [True] * (damage is not None)
    for read in (
        lambda: colmap.read_verification(path, scene.pairs()),
        lambda: colmap.inlier_matches(path, scene.pairs()),
    ):
        with pytest.raises(OutputError, match=r"database\.db cannot be read .*run again"):
            read()
    assert path.exists() == (damage is not None)  # COLMAP makes what is missing
    write(path, work, scene, pairs)
    assert colmap.database_ok(path, scene.names, scene.pairs())


def test_another_database_is_refused(whole: Any, tmp_path: Path) -> None:
    path, scene, _, _ = whole
    with pytest.raises(OutputError, match=r"nothing of 'z.jpg' is in it"):
        colmap.inlier_matches(path, [(scene.names[0], "z.jpg")])
    with pycolmap.Database.open(tmp_path / "other.db"):
        pass
    with pytest.raises(OutputError, match=r"other\.db cannot be read"):
        colmap.read_verification(tmp_path / "other.db", scene.pairs())


def test_a_held_database_is_not_called_damaged(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scene, _, _ = whole
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, timeout=0))
    try:
        with pytest.raises(LockedError, match=r"database\.db cannot be read .*locked"):
            colmap.database_ok(path, scene.names, scene.pairs())
    finally:
        other.close()
    assert colmap.database_ok(path, scene.names, scene.pairs())


@pytest.mark.parametrize("room", [2000, 60_000, 190_000, 1.0])
def test_full_disk_leaves_the_old_database(room: float, whole: Any) -> None:
    resource = pytest.importorskip("resource")
    path, scene, work, pairs = whole
    before = path.read_bytes()
    size = len(before) - 4096 if room == 1.0 else int(room)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"database\.db cannot be written .*disk full"):
            write(path, work, scene, pairs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


@pytest.mark.parametrize("part", ["write_keypoints", "write_matches", "write_two_view_geometry"])
def test_short_write_leaves_the_old_database(
    part: str, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scene, work, pairs = whole
    before = path.read_bytes()
    real, calls = getattr(pycolmap.Database, part), []

    def lost(*args: Any) -> None:
        calls.append(args)
        if len(calls) != 3:
            real(*args)

    monkeypatch.setattr(pycolmap.Database, part, lost)
    with pytest.raises(OutputError, match=r"\d+ of \d+ (keypoints|matches|two_view_g\w+) arrived"):
        write(path, work, scene, pairs)
    assert len(calls) >= 3
    assert path.read_bytes() == before


def test_errors_of_the_caller_are_the_callers(whole: Any) -> None:
    path, scene, work, pairs = whole
    before = path.read_bytes()

    def failing() -> Iterator[Any]:
        yield pairs[0]
        raise RuntimeError("of a worker")

    with pytest.raises(RuntimeError, match="of a worker"):
        write(path, work, scene, failing())
    assert path.read_bytes() == before
