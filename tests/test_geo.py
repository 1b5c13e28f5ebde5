"""Models in metres: flights with exact poses, whose positions are read back by pyproj."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from scipy.spatial.transform import Rotation
from test_handover import build, observed

from gim_hloc import colmap
from gim_hloc.colmap.export import export_model
from gim_hloc.colmap.target import write_ply
from gim_hloc.errors import InputError
from gim_hloc.files import read_text
from gim_hloc.geometry.pose import fit_similarity
from gim_hloc.pipelines._report_figures import plan_in_metres
from gim_hloc.pipelines.previews import metres_rows
from gim_hloc.store import digest
from gim_hloc.surveys import read_control_points, read_positions

pyproj = pytest.importorskip("pyproj", reason="pyproj is not installed")

ORIGIN = (55.7, 13.2, 20.0)
TO_ENU = (
    "+proj=pipeline +step +proj=cart +ellps=WGS84 +step +proj=topocentric +ellps=WGS84 "
    "+lat_0={} +lon_0={} +h_0={}"
)


def wgs84(enu: np.ndarray, origin: tuple[float, ...] = ORIGIN) -> np.ndarray:
    """Latitude, longitude, height (N, 3) by PROJ."""
    pipeline = pyproj.Transformer.from_pipeline(TO_ENU.format(*origin))
    longitude, latitude, height = pipeline.transform(*enu.T, direction="INVERSE", radians=False)
    return np.column_stack([latitude, longitude, height])


class Flight:
    """40 images over 150 m at 60 m, looking down, in a model of unknown scale and turn."""

    def __init__(self, seed: int, *, line: bool = False) -> None:
        rng = np.random.default_rng(seed)
        x, y = np.meshgrid(np.linspace(0, 150, 8), np.linspace(0, 150, 5))
        self.centres = np.column_stack([x.ravel(), y.ravel(), np.full(40, 60.0)])
        heading = np.repeat([0.0, np.pi, 0, np.pi, 0], 8)
        if line:
            self.centres[:, :2] = np.column_stack([np.linspace(0, 150, 40), np.zeros(40)])
            heading[:] = np.pi / 2  # forwards is up in the images
        self.centres += rng.normal(0, 0.05 if line else 0.5, (40, 3))
        self.names = [f"{i:02d}.jpg" for i in range(40)]
        jitter = np.radians(rng.normal(0, 2, (40, 2)))
        angles = np.column_stack([heading, jitter[:, 0], np.pi + jitter[:, 1]])
        turns = Rotation.from_euler("ZYX", angles).as_matrix()  # camera to world
        ground = rng.uniform((-20, -20, 0), (170, 170, 5), (300, 3))
        model = pycolmap.Reconstruction()
        camera = pycolmap.Camera(
            model="SIMPLE_RADIAL", width=800, height=600, params=[700, 400, 300, -0.05], camera_id=1
        )
        model.add_camera_with_trivial_rig(camera)
        tracks = [pycolmap.Track() for _ in ground]
        for i, name in enumerate(self.names):
            pose = np.column_stack([turns[i].T, -turns[i].T @ self.centres[i]])
            xy = np.asarray(camera.img_from_cam(ground @ pose[:, :3].T + pose[:, 3]))
            inside = np.flatnonzero(((xy > 0) & (xy < (800, 600))).all(1))
            for row, point in enumerate(inside):
                tracks[point].add_element(i + 1, row)
            image = pycolmap.Image(name, xy[inside], 1, i + 1)
            model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        for xyz, track in zip(ground, tracks, strict=True):
            if track.length() > 1:
                model.add_point3D(xyz, track, np.array([9, 8, 7], np.uint8))
        self.rotation = Rotation.random(rng=rng).as_matrix()
        self.scale = 0.031
        model.transform(
            pycolmap.Sim3d(self.scale, pycolmap.Rotation3d(self.rotation), np.array([1.0, 2, 3]))
        )
        self.model = model
        tags = self.centres + rng.normal(size=(40, 3)) * (2, 2, 4)
        self.wrong = sorted(rng.choice(self.names, 3, replace=False).tolist())
        for name in self.wrong:
            way = rng.normal(size=2)
            tags[self.names.index(name), :2] += 50 * way / np.linalg.norm(way)
        places = zip(self.names, wgs84(tags).tolist(), strict=True)
        self.fixes = {name: tuple(place) for name, place in places}

    def errors(self, metres: Any) -> tuple[float, float]:
        """Of the scale, as a share, and of up, degrees."""
        similarity = metres.similarity
        up = (similarity.rotation @ self.rotation)[2, 2]
        scale = abs(similarity.scale * self.scale - 1)
        return scale, float(np.degrees(np.arccos(min(1.0, up))))


@pytest.mark.parametrize("seed", range(4))
def test_gps_gives_scale_and_up_and_names_what_is_wrong(seed: int) -> None:
    flight = Flight(seed)
    metres = colmap.metres_by_gps(flight.model, flight.fixes, {})
    scale, up = flight.errors(metres)
    assert scale < 0.01
    assert up < 1
    assert sorted(metres.facts["wrong"]) == flight.wrong
    assert 1 < metres.facts["rms_across_m"] / np.sqrt(2) < 3
    assert 2.5 < metres.facts["rms_height_m"] < 5.5
    assert any("3 GPS positions are far off" in note for note in metres.notes)
    assert all(name in metres.notes[1] for name in flight.wrong)
    assert not any("straight line" in note for note in metres.notes)
    # The deviations that are told are those that are.
    assert scale < 3 * metres.facts["scale_std"]
    assert up < 3 * metres.facts["up_std_deg"]


def bent_flight(length: float, count: int, noise_px: float) -> tuple[Any, np.ndarray, list[str]]:
    """Two rows at 60 m, looking down, adjusted to keypoints with noise: model, true centres."""
    rng = np.random.default_rng(0)
    names = [f"{n:03d}.jpg" for n in range(count)]
    along, row = np.arange(count) // 2 / (count // 2 - 1) * length, np.arange(count) % 2 * 30.0
    centres = np.column_stack([along, row, np.full(count, 60.0)]) + rng.normal(0, 0.5, (count, 3))
    number = int(length * 3)
    ground = rng.uniform((-40, -40, 0), (length + 40, 70, 4), (number, 3))
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model="SIMPLE_RADIAL", width=800, height=600, params=[720, 400, 300, 0], camera_id=1
        )
    )
    tracks: list[Any] = [pycolmap.Track() for _ in ground]
    for number, (name, centre) in enumerate(zip(names, centres, strict=True), 1):
        turn = Rotation.from_euler("xyz", rng.normal(0, 2, 3), degrees=True).as_matrix()
        rotation = turn @ np.diag([1.0, -1, -1])
        local = (ground - centre) @ rotation.T
        uv = local[:, :2] / local[:, 2:]
        square = (uv**2).sum(1)
        xy = 700 * uv * (1 - 0.08 * square)[:, None] + (400, 300)
        xy += rng.normal(0, noise_px, xy.shape)
        rows = np.flatnonzero((square < 1) & (xy > 0).all(1) & (xy < (800, 600)).all(1))
        pose = pycolmap.Rigid3d(np.column_stack([rotation, -rotation @ centre]))
        model.add_image_with_trivial_frame(pycolmap.Image(name, xy[rows], 1, number), pose)
        for place, point in enumerate(rows):
            tracks[point].add_element(number, place)
    for point, track in zip(ground, tracks, strict=True):
        if track.length() >= 3:
            model.add_point3D(point, track, np.zeros(3, np.uint8))
    colmap.bundle_adjust(model, set(), 1)
    return model, centres, names


def bend(names: list[str], found: np.ndarray | Any, centres: np.ndarray) -> float:
    """By how much heights are off in the middle against both ends, m, after a similarity."""
    if not isinstance(found, np.ndarray):
        poses = colmap.poses_of(found)
        own = np.array([-poses[n][0].T @ poses[n][1] for n in names])
        found = fit_similarity(own, centres)(own)
    x = centres[:, 0] / centres[:, 0].max() * 2 - 1
    terms = np.column_stack([np.ones(len(x)), x, x**2, centres[:, 1]])
    return float(np.linalg.lstsq(terms, (found - centres)[:, 2], rcond=None)[0][2])


@pytest.mark.parametrize(
    ("length", "count", "noise_px", "before_m", "after_m"),
    [(800, 80, 0.5, (5, 15), 0), (240, 30, 0.1, (0, 0.2), 0.2)],
)
def test_gps_straightens_what_bends_and_bends_nothing(
    length: float, count: int, noise_px: float, before_m: tuple[float, float], after_m: float
) -> None:
    model, centres, names = bent_flight(length, count, noise_px)
    rng = np.random.default_rng(1)
    tags = centres + rng.normal(0, 1, centres.shape) * (2, 2, 4)
    of_tags = abs(bend(names, tags, centres))
    wrong = names[5], names[count // 2]
    tags[[5, count // 2]] += (30, 40, 0)
    fixes = {name: (*place,) for name, place in zip(names, wgs84(tags).tolist(), strict=True)}
    assert before_m[0] <= abs(bend(names, model, centres)) < before_m[1]
    metres = colmap.lay_on_gps(model, fixes, {}, fixed=set(), threads=1, focal=False)
    assert sorted(metres.facts["wrong"]) == sorted(wrong)
    assert abs(bend(names, model, centres)) < (after_m or of_tags + 0.5)


def test_a_straight_line_leaves_the_roll_open_and_says_so() -> None:
    flight = Flight(0, line=True)
    metres = colmap.metres_by_gps(flight.model, flight.fixes, {})
    assert any("straight line, which leaves the roll about it open" in n for n in metres.notes)
    scale, up = flight.errors(metres)
    assert scale < 0.02
    assert up < 2  # since the cameras look straight down


def test_heights_may_be_missing() -> None:
    flight = Flight(1)
    flat = {name: (*fix[:2], None) for name, fix in flight.fixes.items()}
    metres = colmap.metres_by_gps(flight.model, flat, {})
    scale, up = flight.errors(metres)
    assert scale < 0.01
    assert up < 1.5
    assert metres.facts["rms_height_m"] is None


def traces(figure: Any) -> dict[str, np.ndarray]:
    """Places (N, 2) by the titles of the legend."""
    return {t.name: np.column_stack([t.x, t.y]) for t in figure.data if t.name}


def test_a_plan_shows_cameras_and_what_was_measured() -> None:
    flight = Flight(0)
    metres = colmap.metres_by_gps(flight.model, flight.fixes, {})
    metres.apply(flight.model)
    centres = {n: -r.T @ t for n, (r, t) in colmap.poses_of(flight.model).items()}
    figure = plan_in_metres(metres.described(), centres)
    found = traces(figure)
    np.testing.assert_allclose(found["cameras"], np.array(list(centres.values()))[:, :2])
    assert len(found["measured"]) == 37
    assert len(found["measured, not used"]) == 3
    fixes = {n: flight.fixes[n] for n in flight.wrong}
    away = pycolmap.GPSTransform().ellipsoid_to_enu(
        np.array(list(fixes.values())), *metres.described()["origin"]
    )
    np.testing.assert_allclose(found["measured, not used"], np.asarray(away)[:, :2], atol=1e-3)
    (named,) = (trace.text for trace in figure.data if trace.mode == "text")
    assert sorted(named) == flight.wrong
    rows = metres_rows(metres.described())
    assert sorted(row[0] for row in rows[:3]) == flight.wrong
    assert rows[0][2] > 40
    assert all(row[1] == "used" for row in rows[3:])


@pytest.mark.parametrize("crs", ["enu", "utm"])
def test_geo_is_read_back_by_pyproj(crs: Any, tmp_path: Path) -> None:
    flight = Flight(2)
    truth = observed(flight.model)
    metres = colmap.metres_by_gps(flight.model, flight.fixes, {}, crs)
    metres.apply(flight.model)
    export_model(flight.model, tmp_path, formats=("geo",), metres=metres)
    found = pycolmap.Reconstruction(tmp_path / "geo/sparse/0")
    for name, (_, xy) in observed(found).items():
        np.testing.assert_allclose(xy, truth[name][1], atol=0.01)
    about = json.loads((tmp_path / "geo/geo.json").read_text())
    offset = np.array((tmp_path / "geo/offset.xyz").read_text().split(), float)
    images = {i.name: i for i in map(found.image, found.reg_image_ids())}
    small = np.array([images[n].projection_center() for n in flight.names])
    assert np.abs(small).max() < 1000  # float32 is good to a tenth of a millimetre there
    places = small + offset
    if crs == "enu":
        read = wgs84(places, about["origin"])
    else:
        assert about["crs"] == "EPSG:32633"
        back = pyproj.Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True)
        longitude, latitude = back.transform(places[:, 0], places[:, 1])
        read = np.column_stack([latitude, longitude, places[:, 2]])
    true = wgs84(flight.centres)
    across = (read - true)[:, :2] * 111_000 * (1, np.cos(np.radians(ORIGIN[0])))
    assert np.linalg.norm(across, axis=1).max() < 2.5  # 40 tags of 2 m noise
    rows = list(csv.DictReader((tmp_path / "geo/cameras.csv").open(newline="")))
    written = np.array([[float(r["latitude"]), float(r["longitude"])] for r in rows])
    np.testing.assert_allclose(written, read[:, :2], atol=2e-8)  # 2 mm


def test_the_dense_cloud_is_laz_in_full_coordinates(tmp_path: Path) -> None:
    laspy = pytest.importorskip("laspy", reason="laspy is not installed")
    pytest.importorskip("lazrs", reason="lazrs is not installed")
    flight = Flight(2)
    xyz = np.random.default_rng(0).normal(size=(50, 3))
    rgb = np.arange(150, dtype=np.uint8).reshape(50, 3)
    write_ply(tmp_path / "dense.ply", xyz, rgb, normals=True)  # in the frame of the model
    metres = colmap.metres_by_gps(flight.model, flight.fixes, {}, "utm")
    metres.apply(flight.model)
    export_model(flight.model, tmp_path, formats=("geo",), metres=metres, dense=tmp_path)
    cloud = laspy.read(tmp_path / "geo/dense.laz")
    assert cloud.header.are_points_compressed
    assert cloud.header.parse_crs().to_epsg() == 32633
    expected = metres.similarity(xyz) + metres.offset
    np.testing.assert_allclose(cloud.xyz, expected, atol=2e-4 * metres.similarity.scale)
    assert np.array_equal(np.stack([cloud.red, cloud.green, cloud.blue], 1) // 257, rgb)


def test_control_points_of_opendronemap(tmp_path: Path) -> None:
    flight = Flight(3)
    utm = pyproj.Transformer.from_crs("EPSG:4979", "EPSG:32633", always_xy=True)
    ground = np.random.default_rng(0).uniform((10, 10, 0), (140, 140, 8), (8, 3))
    degrees = wgs84(ground)
    x, y = utm.transform(degrees[:, 1], degrees[:, 0])
    lines = ["WGS84 UTM 33N"]
    images = [flight.model.image(i) for i in flight.model.reg_image_ids()]
    to_model = pycolmap.Sim3d(
        flight.scale, pycolmap.Rotation3d(flight.rotation), np.array([1.0, 2, 3])
    )
    for number, place in enumerate(ground):
        views = [(i, i.project_point(to_model * place)) for i in images]
        seen = [
            (i, p) for i, p in views if p is not None and (p > 0).all() and (p < (800, 600)).all()
        ]
        assert len(seen) >= 2
        wrong = 10.0 if number == 5 else 0.0
        for count, (image, p) in enumerate(seen[:4]):
            px = p + (30 if number == 2 and count == 0 and len(seen) > 3 else 0)
            lines.append(
                f"{x[number] + wrong:.4f} {y[number]:.4f} {degrees[number, 2]:.4f} "
                f"{px[0]:.3f} {px[1]:.3f} {image.name} gcp{number}"
            )
    path = tmp_path / "gcp_list.txt"
    path.write_text("\n".join(lines) + "\n")
    crs, points = read_control_points(path, flight.names)
    assert crs == "EPSG:32633"
    metres = colmap.metres_by_control_points(flight.model, crs, points)
    assert metres.facts["wrong"] == ["gcp5"]
    scale, up = flight.errors(metres)
    assert scale < 1e-3  # UTM's own scale is 0.9996 and less
    assert up < 0.1
    good = [np.linalg.norm(r) for n, r in metres.facts["residuals_m"].items() if n != "gcp5"]
    assert max(good) < 0.15
    found = traces(plan_in_metres(metres.described(), {"a.jpg": np.zeros(3)}))
    utm_places = found["measured"] + metres.offset[:2]
    np.testing.assert_allclose(utm_places, np.delete(np.column_stack([x, y]), 5, axis=0), atol=1e-3)
    np.testing.assert_allclose(
        found["measured, not used"][0] + metres.offset[:2], (x[5] + 10, y[5]), atol=1e-3
    )
    for point in points[2:]:
        point.marks.clear()
    with pytest.raises(InputError, match="2 of 8 control points are marked"):
        colmap.metres_by_control_points(flight.model, crs, points)


def test_known_poses_and_a_distance() -> None:
    made = build("PINHOLE")
    poses = colmap.poses_of(made)
    moved = build("PINHOLE")
    moved.transform(
        pycolmap.Sim3d(3.0, pycolmap.Rotation3d(Rotation.random(rng=1).as_matrix()), [1, 2, 3])
    )
    colmap.metres_by_poses(moved, poses).apply(moved)
    for name, (rotation, translation) in colmap.poses_of(moved).items():
        np.testing.assert_allclose(rotation, poses[name][0], atol=1e-6)
        np.testing.assert_allclose(translation, poses[name][1], atol=1e-6)
    ends = [-poses[n][0].T @ poses[n][1] for n in ("a.jpg", "d.jpg")]
    metres = colmap.metres_by_distance(made, ends, 12.5, {})
    length = np.linalg.norm(metres.similarity(ends[1]) - metres.similarity(ends[0]))
    assert length == pytest.approx(12.5)
    np.testing.assert_allclose(metres.similarity.rotation @ [0, -1, 0], [0, 0, 1], atol=0.05)
    assert "nothing checks it" in metres.notes[0]
    # A camera that was turned by a quarter is upright by its EXIF orientation.
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    for image in map(made.image, made.reg_image_ids()):
        r, t = poses[image.name]
        made.frame(image.frame_id).set_cam_from_world(
            1, pycolmap.Rigid3d(np.column_stack([quarter @ r, quarter @ t]))
        )
    turned = colmap.metres_by_distance(made, ends, 12.5, dict.fromkeys(poses, 8))
    np.testing.assert_allclose(turned.similarity.rotation @ [0, -1, 0], [0, 0, 1], atol=0.05)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a.jpg,55.7,13.2,20\nb.jpg,55.8,13.1,\n",
            {"a.jpg": (55.7, 13.2, 20.0), "b.jpg": (55.8, 13.1, None)},
        ),
        ("Lon;Lat;Image\n13.2;55.7;x/a.jpg\n", {"a.jpg": (55.7, 13.2, None)}),
        ("a.jpg\t55.7\t13.2\t-3\n", {"a.jpg": (55.7, 13.2, -3.0)}),
        (  # Metashape's
            "# System: WGS 84\n#Label,X/Longitude,Y/Latitude,Z/Altitude\na,13.2,55.7,20\n",
            {"a.jpg": (55.7, 13.2, 20.0)},
        ),
        (  # exiftool -n -csv
            "SourceFile,GPSLatitude,GPSLongitude,GPSAltitude\n./b.jpg,55.7,13.2,20\n",
            {"b.jpg": (55.7, 13.2, 20.0)},
        ),
        ("name,lat,lon,Altitude (m)\na.jpg,55.7,13.2,20\n", {"a.jpg": (55.7, 13.2, 20.0)}),
        ("a.jpg,,,\nb.jpg,55.7,13.2,nan\n", {"b.jpg": (55.7, 13.2, None)}),
        ("a.jpg,55.7,\n", "is not 'name, latitude"),
        ("name,latitude,longitude\n", "holds no position"),
        ("a.jpg,nan,nan,nan\n", "holds no position"),
        ("a.jpg,55.7\n", "is not 'name, latitude"),
        ("a.jpg,155.7,13\n", "is not 'name, latitude"),
        ("c.jpg,55.7,13.2\n", "none of them is one of the run's"),
        ("", "holds no position"),
    ],
)
def test_lists_of_positions(text: str, found: Any, tmp_path: Path) -> None:
    path = tmp_path / "gps.csv"
    path.write_text(text)
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            read_positions(path, ["a.jpg", "b.jpg"])
    else:
        assert read_positions(path, ["a.jpg", "b.jpg"]) == found


@pytest.mark.parametrize(
    ("header", "system"),
    [
        ("EPSG:32632", "EPSG:32632"),
        ("WGS84 UTM 32S", "EPSG:32732"),
        ("+proj=utm +zone=10 +ellps=WGS84 +datum=WGS84 +units=m +no_defs", "EPSG:32610"),
        ("+proj=longlat +datum=WGS84", "EPSG:4326"),
        ("1 2 3 4 5 a.jpg", None),
        ("EPSG:4258", None),  # degrees
        ("EPSG:2263", None),  # feet
        ("EPSG:4978", None),  # z is not up
        ("EPSG:999999", None),
    ],
)
def test_systems_of_control_points(header: str, system: str | None, tmp_path: Path) -> None:
    path = tmp_path / "gcp_list.txt"
    path.write_text(f"{header}\n1 2 3 4 5 a.jpg\n")
    if system is None:
        with pytest.raises(InputError, match=r"coordinate system|not in metres"):
            read_control_points(path, ["a.jpg"])
        return
    assert read_control_points(path, ["a.jpg"])[0] == system


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EPSG:32632\n1 2 3 4 5 c.jpg\n", "c.jpg and others"),
        ("EPSG:4326\n55.7 113.2 3 4 5 a.jpg\n", "is not 'x y z"),  # latitude first
        ("EPSG:32632\n", "holds no control points"),
    ],
)
def test_control_points_that_cannot_be_right(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "gcp_list.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_control_points(path, ["a.jpg"])


def test_names_of_control_points_are_text_in_any_code(tmp_path: Path) -> None:
    path = tmp_path / "gcp_list.txt"
    path.write_bytes(b"EPSG:32632\n1 2 3 4 5 a.jpg K\xfcche\n")
    (point,) = read_control_points(path, ["a.jpg"])[1]
    point.name.encode()  # pages and plots are UTF-8
    assert digest(read_text(path, "list"))  # keys of steps hold what a file says


@pytest.mark.parametrize("crs", ["enu", "utm"])
@pytest.mark.parametrize(("latitude", "longitude"), [(-17.0, 180.0), (0.0, 12.0)])
def test_flights_across_the_ends_of_coordinates(
    crs: Any, latitude: float, longitude: float, tmp_path: Path
) -> None:
    flight = Flight(2)
    tags = wgs84(flight.centres - flight.centres.mean(0), (latitude, longitude, 0.0))
    fixes = {n: (lat, lon, h) for n, (lat, lon, h) in zip(flight.names, tags.tolist(), strict=True)}
    metres = colmap.metres_by_gps(flight.model, fixes, {}, crs)
    scale, up = flight.errors(metres)
    assert up < 0.1
    assert scale < 2e-3  # UTM is longer near the ends of its zones
    assert not metres.facts["wrong"]
    metres.apply(flight.model)
    export_model(flight.model, tmp_path, formats=("geo",), metres=metres)
    rows = csv.DictReader((tmp_path / "geo/cameras.csv").open(newline=""))
    read = np.array([[float(r["latitude"]), float(r["longitude"])] for r in rows])
    np.testing.assert_allclose(read, tags[:, :2], atol=1e-6)


def test_few_positions_are_refused() -> None:
    flight = Flight(0)
    few = dict(list(flight.fixes.items())[:2])
    with pytest.raises(InputError, match="2 images of the model have a GPS position"):
        colmap.metres_by_gps(flight.model, few, {})
