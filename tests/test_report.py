from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gim_hloc.pipelines import _report_pictures as pictures
from gim_hloc.pipelines.report import (
    CameraView,
    SceneView,
    complete_report,
    write_report,
)

NASTY = (
    'a <b>"bold"</b> & more.jpg',
    "sub/ordner mit ä/ 写真 100%41.jpg",
    "</script><script>alert(1)</script>.png",
    "it's.jpg",
)


class Page(HTMLParser):
    """Collects what a browser would load, the text, and the elements with an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.policy = ""
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self._open = tag
        if tag == "script":
            self.scripts.append("")
        if "id" in values:
            self.ids.add(values["id"])
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            if values.get(name):
                self.loads.append(values[name])

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def make_report(names=("a.jpg", "b.jpg", "c.jpg", "d.jpg"), missing=()) -> dict:
    """A report in which the images in ``missing`` (name to status) did not make it."""
    missing = dict(missing)
    kept = [name for name in names if name not in missing]
    images = []
    for name in names:
        image = {"name": name, "width": 640, "height": 480, "keypoints": 900, "pairs": 3}
        if name in missing:
            image |= {"status": missing[name], "reason": f"reason of {name}", "model": None}
        else:
            image |= {"status": "registered", "model": 0, "camera_id": 1, "focal_px": 500.0}
        images.append(image)
    pairs = [
        {"name0": name0, "name1": name1, "matches": 100 + 10 * i, "inliers": 50 + i}
        for i, name0 in enumerate(kept)
        for name1 in kept[i + 1 :]
    ]
    camera = {"id": 1, "model": "SIMPLE_RADIAL", "width": 640, "height": 480}
    camera |= {"params": [500.0, 320.0, 240.0, 0.01], "images": len(kept), "refined": True}
    model = {"path": "sparse/0", "images": len(kept), "points": 1200, "observations": 4000}
    model |= {"mean_track_length": 3.33, "mean_reprojection_error_px": 0.7, "cameras": [camera]}
    return {
        "gim_hloc": "0.1.0",
        "created": "2026-01-02T03:04:05",
        "command": "gim-reconstruct images out",
        "settings": {"matcher": {"name": "sift"}, "masks": None},
        "versions": {"torch": "2.9"},
        "summary": {},
        "images": images,
        "pairs": pairs,
        "models": [model],
        "track_lengths": {2: 300, 3: 500, 4: 300, 30: 100},
        "reprojection_errors": {"edges": [0.0, 1.0, 2.0], "counts": [3000, 1000]},
        "timings": {"scan": 0.1, "match": 2.0, "map": 3.5},
        "pair_selection": {"mode": "exhaustive", "why": "few images", "counts": {"exhaustive": 6}},
        "notes": [],
    }


def make_scene(names=("a.jpg", "b.jpg", "c.jpg"), points=500) -> SceneView:
    rng = np.random.default_rng(1)
    cameras = [
        CameraView(name, np.array([i, 0.0, -4.0]), np.eye(3), 500.0, 640, 480)
        for i, name in enumerate(names)
    ]
    xyz = rng.normal(size=(points, 3))
    return SceneView(xyz, rng.integers(0, 255, (points, 3), dtype=np.uint8), cameras)


def read_image(name: str) -> np.ndarray:
    return np.full((48, 64, 3), 90, np.uint8)


def read_matches(name0: str, name1: str):
    xy = np.array([[10.0, 10.0], [50.0, 30.0]])
    return xy, xy, np.array([True, False])


def write(report, folder, **kwargs) -> tuple[Page, dict]:
    html_path, json_path = write_report(report, folder, **kwargs)
    return Page(html_path.read_text("utf-8")), json.loads(json_path.read_text("utf-8"))


def levels(report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verdict in complete_report(report)["verdicts"]:
        found.setdefault(verdict["level"], []).append(verdict["text"])
    return found


def unpack(text: str, kind) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


# ------------------------------------------------------------------------------- report.json


def test_json_holds_what_was_given_and_the_derived_totals(tmp_path):
    report = make_report(missing={"d.jpg": "unreadable"})
    _, parsed = write(report, tmp_path)
    for key in ("settings", "images", "pairs", "models", "timings", "pair_selection"):
        assert parsed[key] == report[key]
    assert parsed["track_lengths"] == {"2": 300, "3": 500, "4": 300, "30": 100}
    summary = parsed["summary"]
    assert (summary["images"], summary["usable"], summary["registered"]) == (4, 3, 3)
    assert (summary["pairs"], summary["pairs_matched"], summary["pairs_verified"]) == (3, 3, 3)
    assert (summary["points"], summary["models"]) == (1200, 1)
    assert summary["seconds"] == pytest.approx(5.6)
    assert summary["two_view_track_share"] == pytest.approx(300 / 1200)
    assert summary["missing"] == {"unreadable": 1}
    assert parsed == complete_report(report)


def test_a_given_total_is_not_replaced_and_the_input_is_left_alone(tmp_path):
    report = make_report()
    report["summary"] = {"seconds": 99.5, "points": 7}
    before = json.dumps(report)
    _, parsed = write(report, tmp_path)
    assert parsed["summary"]["seconds"] == 99.5
    assert parsed["summary"]["points"] == 7
    assert json.dumps(report) == before


def test_json_is_strict_and_takes_numpy_paths_and_nan(tmp_path):
    report = make_report()
    report["images"][0] |= {"focal_px": float("nan"), "mean_reprojection_error_px": np.inf}
    report["reprojection_errors"] = {
        "edges": np.array([0.0, 0.5, 1.0]),
        "counts": np.array([4, 5]),
    }
    report["settings"] |= {"images": Path("a/b"), "sizes": (np.int64(3), np.float32(0.5))}
    _, json_path = write_report(report, tmp_path)

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    parsed = json.loads(json_path.read_text("utf-8"), parse_constant=refuse)
    assert parsed["images"][0]["focal_px"] is None
    assert parsed["images"][0]["mean_reprojection_error_px"] is None
    assert parsed["reprojection_errors"] == {"edges": [0.0, 0.5, 1.0], "counts": [4, 5]}
    assert parsed["settings"]["images"] == "a/b"
    assert parsed["settings"]["sizes"] == [3, 0.5]


def test_names_that_are_not_unicode_survive(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    _, parsed = write(make_report(names=("a.jpg", name)), tmp_path, scene=make_scene((name,)))
    assert parsed["images"][1]["name"] == name


@pytest.mark.parametrize("key", ["images", "pairs", "models", "settings", "timings"])
def test_a_missing_part_is_named_and_nothing_is_written(tmp_path, key):
    report = make_report()
    del report[key]
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        write_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_without_a_field_is_named():
    report = make_report()
    del report["pairs"][2]["inliers"]
    with pytest.raises(ValueError, match=r"report\['pairs'\]\[2\] lacks 'inliers'"):
        complete_report(report)
    report = make_report()
    report["images"] = {"a.jpg": {}}
    with pytest.raises(ValueError, match="must be a list of records, not dict"):
        complete_report(report)


# ---------------------------------------------------------------------------------- verdicts


def test_verdict_is_green_only_when_all_is_well():
    assert list(levels(make_report())) == ["good"]
    assert "All 4 images" in levels(make_report())["good"][0]
    found = levels(make_report(missing={"d.jpg": "no_pairs"}))
    assert list(found) == ["warn"]
    assert "1 image is missing (1 without pairs)" in found["warn"][0]
    three = dict.fromkeys(("b.jpg", "c.jpg", "d.jpg"), "not_registered")
    assert "3 images are missing" in levels(make_report(missing=three))["bad"][0]


def test_verdict_without_a_model_is_red():
    report = make_report(missing=dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg"), "no_matches"))
    report |= {"models": [], "track_lengths": {}}
    assert "No model" in levels(report)["bad"][0]


def test_a_copy_alone_is_no_fault():
    found = levels(make_report(missing={"d.jpg": "duplicate"}))
    assert set(found) == {"good"}


def test_two_view_tracks_are_blamed_on_pairs_or_on_the_matcher():
    names = [f"{i}.jpg" for i in range(8)]
    report = make_report(names)
    report["track_lengths"] = {2: 51, 3: 49}
    assert "different spot" in levels(report)["warn"][0]
    report["pairs"] = report["pairs"][:8]
    assert "2.0 verified partners" in levels(report)["warn"][0]
    report["track_lengths"] = {2: 50, 3: 50}
    assert "warn" not in levels(report)


def test_several_models_are_a_warning():
    report = make_report()
    report["models"].append({"path": "sparse/1", "images": 2})
    assert "2 models that share no scale (4, 2 images)" in levels(report)["warn"][0]


@pytest.mark.parametrize(
    ("model", "params", "word"),
    [
        ("SIMPLE_RADIAL", [30.0, 320.0, 240.0, 0.0], "focal length"),  # 169 degrees
        ("PINHOLE", [500.0, 700.0, 320.0, 240.0], "two focal lengths"),
        ("OPENCV", [500.0, 500.0, 20.0, 240.0, 0, 0, 0, 0], "principal point"),
        ("SIMPLE_PINHOLE", [-5.0, 320.0, 240.0], "focal length"),
        ("SIMPLE_RADIAL", [500.0, 320.0, 240.0, 0.1], None),
        ("PINHOLE", [500.0, 505.0, 320.0, 240.0], None),
        ("OPENCV_FISHEYE", [140.0, 140.0, 320.0, 240.0, 0, 0, 0, 0], None),
        ("SIMPLE_RADIAL", [], None),  # not known is not implausible
    ],
)
def test_implausible_intrinsics_are_named(model, params, word):
    report = make_report()
    report["models"][0]["cameras"][0] |= {"model": model, "params": params}
    warnings = levels(report).get("warn", [])
    assert len(warnings) == (word is not None)
    if word:
        assert word in warnings[0]


def test_focal_lengths_that_scatter_are_named():
    report = make_report()
    camera = report["models"][0]["cameras"][0]
    report["models"][0]["cameras"].append({**camera, "id": 2, "params": [900.0, 320, 240, 0]})
    assert "share one camera" in levels(report)["warn"][0]


# ------------------------------------------------------------------------------- report.html


def test_page_loads_nothing_from_anywhere(tmp_path):
    page, _ = write(
        make_report(missing={"d.jpg": "not_registered"}),
        tmp_path,
        images=read_image,
        scene=make_scene(),
        pair_matches=read_matches,
    )
    assert page.loads
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.loads)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    ours = page.scripts[-1] + "".join(page.styles)
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|XMLHttpRequest|import\(", ours)
    # Plotly's code can ask for map tiles; the policy forbids the browser any request.
    assert "default-src 'none'" in page.policy
    assert "http" not in page.policy
    assert "connect-src" not in page.policy


def test_page_has_every_part(tmp_path):
    page, _ = write(
        make_report(missing={"d.jpg": "no_verified_matches"}),
        tmp_path,
        images=read_image,
        scene=make_scene(),
        pair_matches=read_matches,
    )
    parts = {"missing", "scene", "quality", "graph", "pairs", "images", "models", "time"}
    assert parts | {"settings"} <= page.ids
    assert {"chart-scene", "chart-tracks", "chart-errors", "chart-graph"} <= page.ids
    assert "No verified matches" in page.text
    assert "reason of d.jpg" in page.text
    assert page.tags.count("img") == 3 + 1  # three pairs, one missing image
    assert page.data["tracks"]["labels"][0] == "2"
    assert page.data["tracks"]["labels"][-1] == "21+"
    assert sum(page.data["tracks"]["counts"]) == 1200


def test_steps_have_names_in_their_order_and_speed_counts_this_run_only(tmp_path):
    report = make_report()
    report["timings"] = {"match": 2.0, "pairs": 1.0, "refine": 3.0, "map": 0.5, "other": 0.1}
    report["counts"] = {"pairs_matched_now": 0}
    write(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page[page.index("<table class=timings>") :]
    table = table[: table.index("</table>")]
    assert re.findall("<th scope=row>([^<]+)", table) == [
        "Choose pairs", "Match pairs", "Map", "Refine keypoints", "other",
    ]  # fmt: skip
    assert "pairs matched per second" not in page
    report["counts"] = {"pairs_matched_now": 5}
    write(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2.5 pairs matched per second" in page


def test_notes_and_settings_are_shown(tmp_path):
    report = make_report()
    report["notes"] = ["mapping was repeated with relaxed values"]
    page, _ = write(report, tmp_path)
    assert "mapping was repeated with relaxed values" in page.text
    assert "matcher.name" in page.text


def test_names_are_text_everywhere(tmp_path):
    report = make_report(NASTY, missing={NASTY[1]: "no_pairs"})
    report["command"] = "gim-reconstruct '<in>' & out"
    report["settings"] = {"</details><b>": "<i>&amp;"}
    html_path, _ = write_report(
        report,
        tmp_path,
        images=read_image,
        scene=make_scene(NASTY),
        pair_matches=read_matches,
    )
    page = Page(html_path.read_text("utf-8"))
    assert page.tags.count("script") == 3  # data, plotly, ours
    for name in NASTY:
        assert name in page.words
    assert "gim-reconstruct '<in>' & out" in page.words
    assert "</details><b>" in page.words
    assert "<i>&amp;" in page.words
    assert page.data["graph"]["names"] == list(NASTY)
    assert page.data["scene"]["cameras"]["names"] == list(NASTY)


def test_page_without_pictures_scene_or_registered_images(tmp_path):
    names = ("a.jpg", "b.jpg")
    report = make_report(names, missing=dict.fromkeys(names, "no_features"))
    report |= {"models": [], "track_lengths": {}, "reprojection_errors": {}, "timings": {}}
    page, parsed = write(report, tmp_path, images=None, scene=None, pair_matches=None)
    assert parsed["summary"]["registered"] == 0
    assert page.data == {}
    assert {"missing", "images"} <= page.ids
    assert not {"scene", "pairs", "quality"} & page.ids
    assert page.tags.count("script") == 2  # no chart, so no plotly
    assert "No keypoints" in page.text


def test_empty_report(tmp_path):
    report = {"images": [], "pairs": [], "models": [], "settings": {}, "timings": {}}
    page, parsed = write(report, tmp_path, scene=SceneView(np.zeros((0, 3)), np.zeros((0, 3)), []))
    assert parsed["summary"]["images"] == 0
    assert "images registered" in page.text


def test_what_cannot_be_drawn_is_left_out(tmp_path, caplog):
    def broken(*_):
        raise OSError("gone")

    scene = SceneView(np.zeros((4, 3)), np.zeros((2, 3), np.uint8), [])  # sizes disagree
    report = make_report(missing={"d.jpg": "not_registered"})
    with caplog.at_level(logging.WARNING):
        page, parsed = write(report, tmp_path, images=read_image, scene=scene, pair_matches=broken)
        write(report, tmp_path, images=broken, pair_matches=read_matches)
    assert parsed["summary"]["registered"] == 3
    assert "graph" in page.ids
    assert not {"pairs", "scene"} & page.ids
    assert any("'scene'" in record.getMessage() for record in caplog.records)
    assert not list(tmp_path.glob(".*"))


def test_files_are_replaced_at_once(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "report.json").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("gim_hloc.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(make_report(), tmp_path)
    assert (tmp_path / "report.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_large_collection_stays_small(tmp_path):
    names = [f"folder/image_{i:05d}.jpg" for i in range(300)]
    html_path, json_path = write_report(
        make_report(names),
        tmp_path,
        images=read_image,
        scene=make_scene(names, 200_000),
        pair_matches=read_matches,
    )
    assert html_path.stat().st_size < 12e6
    assert len(json.loads(json_path.read_text("utf-8"))["pairs"]) == 300 * 299 // 2


# -------------------------------------------------------------------------------- pictures


def test_graph_triangle_holds_every_pair_in_either_order():
    names = ["a", "b", "c", "d"]
    pairs = [
        {"name0": "d", "name1": "b", "matches": 70_000, "inliers": 12},
        {"name0": "a", "name1": "c", "matches": 5, "inliers": 0},
        {"name0": "a", "name1": "elsewhere", "matches": 5, "inliers": 5},
    ]
    packed = pictures.pack_graph(names, pairs)
    assert packed["bits"] == 32
    # Rows of the upper triangle: ab ac ad | bc bd | cd; 0 = not tried, else 1 + count.
    assert unpack(packed["inliers"], "<u4").tolist() == [0, 1, 0, 0, 13, 0]
    assert unpack(packed["matches"], "<u4").tolist() == [0, 6, 0, 0, 70_001, 0]
    assert pictures.pack_graph([str(i) for i in range(1501)], pairs) is None


def test_chosen_pairs_are_varied_and_disjoint():
    pairs = [
        {"name0": "a", "name1": str(i), "matches": 1000, "inliers": 900 - 10 * i} for i in range(5)
    ]
    pairs += [
        {"name0": "x", "name1": "y", "matches": 1000, "inliers": 875},
        {"name0": "x", "name1": "z", "matches": 100, "inliers": 20},
        {"name0": "y", "name1": "z", "matches": 80, "inliers": 0},
        {"name0": "y", "name1": "w", "matches": 0, "inliers": 0},
    ]
    best, worst = pictures.choose_pairs(pairs, 3)
    assert [pair["inliers"] for pair in best] == [900, 890, 875]  # "a" twice at most
    assert worst[0]["inliers"] == 20
    best, worst = pictures.choose_pairs(pairs, 6)
    assert [pair["inliers"] for pair in best] == [900, 890, 880, 875]
    assert [pair["inliers"] for pair in worst] == [20, 860, 870, 0]  # by share; nothing twice


def test_pair_picture_draws_lines_where_the_keypoints_are():
    def matches(name0, name1):
        return (
            np.array([[99.5, 19.5], [99.5, 79.5], [np.nan, 0]]),
            np.array([[99.5, 19.5], [99.5, 79.5], [0, 0]]),
            np.array([True, False, True]),
        )

    grey = np.full((100, 200, 3), 90, np.uint8)
    url = pictures.Thumbnails(lambda name: grey).pair_url("a", "b", matches)
    data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    assert width <= pictures.PAIR_WIDTH
    assert height == pytest.approx(119, abs=1)  # (480 - 4) / 2 wide each, 2:1
    rows = picture[:, width // 4 + 20 : width // 2 - 10].mean(1)
    greenest = np.argmax(rows[:, 1] - rows[:, 0])
    reddest = np.argmax(rows[:, 0] - rows[:, 1])
    assert greenest == pytest.approx(0.2 * height, abs=1.5)
    assert reddest == pytest.approx(0.8 * height, abs=1.5)


def scene_arrays(packed):
    points = unpack(packed["points"], "<f4").reshape(-1, 3)
    cameras = packed["cameras"]
    centers = unpack(cameras["centers"], "<f4").reshape(-1, 3)
    return points, centers, unpack(cameras["frusta"], "<f4").reshape(-1, 12, 3)


def test_scene_is_turned_upright_and_keeps_shape():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)  # a rotation: an arbitrary world frame
    level = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # looks along +y, up is +z
    centers = np.array([[-1.0, -5, 1], [0, -5, 1], [1, -5, 1]])
    xyz = rng.uniform(-1, 1, (400, 3))
    cameras = [
        CameraView(f"{i}", turn @ center, level @ turn.T, 500.0, 640, 480)
        for i, center in enumerate(centers)
    ]
    packed = pictures.pack_scene(SceneView(xyz @ turn.T, np.zeros((400, 3), np.uint8), cameras))
    points, seen, frusta = scene_arrays(packed)
    assert packed["shown"] == 400
    shift = seen[0] - centers[0]
    np.testing.assert_allclose(seen - shift, centers, atol=1e-5)
    np.testing.assert_allclose(points - shift, xyz, atol=1e-5)
    # A pyramid opens forward and is level: corners 1 and 2 are the top edge, seen from below.
    assert np.isnan(frusta[:, 11]).all()
    assert np.isfinite(frusta[:, :11]).all()
    corners = frusta[0, [1, 2, 4, 5]] - seen[0]
    assert (corners[:, 1] > 0).all()
    assert corners[:, 2] * [1, 1, -1, -1] == pytest.approx(corners[0, 2])
    assert corners[0, 2] / corners[0, 1] == pytest.approx(240 / 500, rel=1e-4)
    assert corners[0, 0] / corners[0, 1] == pytest.approx(-320 / 500, rel=1e-4)


def test_far_points_and_a_lost_camera_do_not_shrink_the_scene():
    scene = make_scene(points=1000)
    xyz = scene.points_xyz.copy()
    xyz[:5] = 1e5
    xyz[5] = np.nan
    lost = CameraView("lost.jpg", np.array([1e6, 0, 0]), np.eye(3), 500.0, 640, 480)
    packed = pictures.pack_scene(SceneView(xyz, scene.points_rgb, [*scene.cameras, lost]))
    extent = np.diff(packed["ranges"], axis=1)
    assert (extent < 30).all()
    assert packed["far"] >= 5
    assert packed["shown"] + packed["far"] == 999
    assert packed["total"] == 1000
    points, centers, _ = scene_arrays(packed)
    low, high = np.array(packed["ranges"]).T
    assert ((points >= low - 1e-4) & (points <= high + 1e-4)).all()
    assert ((centers[:3] >= low) & (centers[:3] <= high)).all()


def test_scene_samples_points_with_their_colours():
    count = pictures.MAX_POINTS + 5000
    xyz = np.random.default_rng(0).uniform(0, 255, (count, 3))
    packed = pictures.pack_scene(SceneView(xyz, xyz.astype(np.uint8), []))
    assert packed["shown"] == pictures.MAX_POINTS
    points = unpack(packed["points"], "<f4").reshape(-1, 3)
    colours = unpack(packed["colours"], np.uint8).reshape(-1, 3)
    # Without cameras the view is (x, z, -y) of the world.
    for axis, source, sign in ((0, 0, 1), (1, 2, 1), (2, 1, -1)):
        slope = np.corrcoef(points[:, axis], colours[:, source].astype(float))[0, 1]
        assert slope * sign > 0.999


# --------------------------------------------------------------------------------- browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_the_page_without_errors(tmp_path):
    html_path, _ = write_report(
        make_report(NASTY, missing={NASTY[1]: "no_pairs"}),
        tmp_path,
        images=read_image,
        scene=make_scene(NASTY),
        pair_matches=read_matches,
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-unsafe-swiftshader", "--virtual-time-budget=10000", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command.append(html_path.as_uri())
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    log = done.stderr.decode(errors="replace")
    assert "Uncaught" not in log
    assert "Content Security Policy" not in log
    dom = done.stdout.decode()
    for chart in ("tracks", "errors", "graph", "scene"):
        drawn = re.search(rf'id="chart-{chart}"[^>]*class="[^"]*js-plotly-plot', dom)
        drawn = drawn or re.search(rf'class="[^"]*js-plotly-plot[^"]*" id="chart-{chart}"', dom)
        assert drawn, f"{chart} was not drawn"


def test_first_view_of_a_deep_scene_shows_cameras_and_points() -> None:
    rng = np.random.default_rng(0)
    deep = np.c_[rng.uniform(-1, 1, (500, 2)), rng.uniform(4, 60, 500)]  # far along the view
    cameras = [
        CameraView(f"{i}.jpg", np.array([0.3 * i, 0, 0]), np.eye(3), 500.0, 640, 480)
        for i in range(9)
    ]
    sideways = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    cameras.append(CameraView("x.jpg", np.array([3.0, 0, 0]), sideways, 500.0, 640, 480))
    packed = pictures.pack_scene(SceneView(deep, np.zeros((500, 3), np.uint8), cameras))
    assert packed is not None
    ranges = np.array(packed["ranges"])
    unit = np.exp(np.log(np.ptp(ranges, axis=1)).mean())
    centers = np.frombuffer(base64.b64decode(packed["cameras"]["centers"]), "<f4").reshape(-1, 3)
    points = np.frombuffer(base64.b64decode(packed["points"]), "<f4").reshape(-1, 3)
    eye, centre = np.array(packed["eye"]) * unit, np.array(packed["centre"]) * unit
    axis = (centre - eye) / np.linalg.norm(centre - eye)
    for content, share in ((centers, 1.0), (points, 0.85)):
        depth = (content - eye) @ axis
        beside = np.linalg.norm(content - eye - depth[:, None] * axis, axis=1)
        seen = (depth > 0) & (beside < 0.6 * depth)  # plotly's view is about 2 x 31 degrees
        assert seen.mean() >= share
    assert np.allclose(np.ptp(centers[:9], axis=0)[2], 0, atol=1e-5)  # one image is not up
