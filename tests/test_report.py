"""``report.html`` and ``report.json``: totals, verdicts, charts, one file that loads nothing."""

from __future__ import annotations

import base64
import html
import itertools
import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gim_hloc import draw, pair_viewer
from gim_hloc.pipelines import _report_figures as figures
from gim_hloc.pipelines.outcome import PLAN_SIZE, plan_places
from gim_hloc.pipelines.report import (
    CameraView,
    SceneView,
    complete_report,
    draw_pair,
    write_report,
)

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
NASTY = (
    'a <b>"bold"</b> & more.jpg',
    "sub/ordner mit ä/ 写真 100%41.jpg",
    "</script><script>alert(1)</script>.png",
    "it's.jpg",
)


class Page(HTMLParser):
    """Collects what a browser would load, the text, and the elements with an id."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text("utf-8")
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.policy = ""
        self._open = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self._open = tag
        self.ids |= {values["id"]} if "id" in values else set()
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        names = ("src", "srcset", "href", "action", "data", "poster")
        self.loads += [values[name] for name in names if values.get(name)]

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_report(names: Any = NAMES, missing: Any = ()) -> dict[str, Any]:
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
        "command": "gim-reconstruct '<in>' & out",
        "settings": {"matcher": {"name": "sift"}, "masks": None, "</details><b>": "<i>&amp;"},
        "versions": {"torch": "2.9"},
        "images": images,
        "pairs": pairs,
        "models": [model],
        "track_lengths": {2: 300, 3: 500, 4: 300, 30: 100},
        "reprojection_errors": {"edges": np.array([0.0, 1.0, 2.0]), "counts": [3000, 1000]},
        "timings": {"other": 0.1, "match": 2.0, "scan": 1.0, "refine": 3.0, "map": 0.5},
        "counts": {"pairs_matched_now": 5},
        "pair_selection": {"mode": "exhaustive", "why": "few images.", "counts": {"near": 6}},
        "notes": ["mapping was repeated with relaxed values"],
    }


def make_scene(names: Any = NAMES, points: int = 500) -> SceneView:
    rng = np.random.default_rng(1)
    cameras = [
        CameraView(name, np.array([i, 0.0, -4.0]), np.eye(3), 500.0, 640, 480)
        for i, name in enumerate(names)
    ]
    xyz = rng.normal(size=(points, 3))
    return SceneView(xyz, rng.integers(0, 255, (points, 3), dtype=np.uint8), cameras)


def read_image(name: str) -> np.ndarray:
    return np.full((48, 64, 3), 90, np.uint8)


def read_matches(pairs: Any) -> Any:
    xy = np.array([[10.0, 10.0], [50.0, 30.0]])
    return [(xy, xy, np.array([True, False]))] * len(pairs)


def write(report: dict[str, Any], folder: Path, **parts: Any) -> tuple[Path, Path]:
    return write_report(complete_report(report), folder, **parts)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A report with names that look like code, one image of which is missing."""
    return write(
        make_report(NASTY, missing={NASTY[1]: "no_verified_matches"}),
        tmp_path_factory.mktemp("report") / "new",
        images=read_image,
        scene=make_scene(NASTY),
        pair_matches=read_matches,
    )


@pytest.fixture(scope="module")
def page(written: tuple[Path, Path]) -> Page:
    return Page(written[0])


def levels(report: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verdict in complete_report(report)["verdicts"]:
        found.setdefault(verdict["level"], []).append(verdict["text"])
    return found


# ------------------------------------------------------------------------------- report.json


def test_json_holds_what_was_given_and_the_derived_totals(written: tuple[Path, Path]) -> None:
    report = make_report(NASTY, missing={NASTY[1]: "no_verified_matches"})
    parsed = json.loads(written[1].read_text("utf-8"))
    for key in ("settings", "images", "pairs", "models", "timings", "pair_selection"):
        assert parsed[key] == report[key]
    assert parsed["track_lengths"] == {"2": 300, "3": 500, "4": 300, "30": 100}
    assert parsed["reprojection_errors"] == {"edges": [0, 1, 2], "counts": [3000, 1000]}
    summary = parsed["summary"]
    assert (summary["images"], summary["usable"], summary["registered"]) == (4, 4, 3)
    assert (summary["pairs"], summary["pairs_matched"], summary["pairs_verified"]) == (3, 3, 3)
    assert (summary["points"], summary["models"]) == (1200, 1)
    assert summary["seconds"] == pytest.approx(6.6)
    assert summary["two_view_track_share"] == pytest.approx(300 / 1200)
    assert summary["missing"] == {"no_verified_matches": 1}
    assert parsed == complete_report(report)


def test_json_is_strict_and_keeps_given_totals_and_odd_names(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    report = make_report(names=("a.jpg", name), missing={"a.jpg": "unreadable"})
    report["images"][0] |= {"focal_px": float("nan"), "mean_reprojection_error_px": np.inf}
    report["settings"] |= {"images": Path("a/b"), "sizes": (np.int64(3), np.float32(0.5))}
    report["summary"] = {"seconds": 99.5}
    before = repr(report)
    _, json_path = write(report, tmp_path, scene=make_scene((name,)))

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    parsed = json.loads(json_path.read_text("utf-8"), parse_constant=refuse)
    assert parsed["images"][0]["focal_px"] is None
    assert parsed["images"][1]["name"] == name
    assert parsed["settings"]["images"] == "a/b"
    assert parsed["settings"]["sizes"] == [3, 0.5]
    assert parsed["summary"]["seconds"] == 99.5
    assert parsed["summary"]["usable"] == 1
    assert repr(report) == before


# ---------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("missing", "level", "text"),
    [
        ({}, "good", "All 4 images"),
        ({"d.jpg": "duplicate"}, "good", "not a copy"),
        ({"d.jpg": "no_pairs"}, "warn", "1 image is missing (1 without pairs)"),
        (dict.fromkeys(NAMES[1:], "not_registered"), "bad", "3 images are missing"),
        (dict.fromkeys(NAMES, "no_matches"), "bad", "No model was built"),
    ],
)
def test_verdict_is_green_only_when_all_is_well(missing: Any, level: str, text: str) -> None:
    report = make_report(missing=missing)
    if len(missing) == 4:
        report |= {"models": [], "track_lengths": {}}
    found = levels(report)
    assert list(found) == [level]
    assert any(text in sentence for sentence in found[level])


def test_two_view_tracks_are_blamed_on_pairs_or_on_the_matcher() -> None:
    report = make_report([f"{i}.jpg" for i in range(8)])
    report["track_lengths"] = {2: 51, 3: 49}
    assert "different spot" in levels(report)["warn"][0]
    report["pairs"] = report["pairs"][:8]
    assert "2.0 verified partners" in levels(report)["warn"][0]
    report["track_lengths"] = {2: 50, 3: 50}
    assert "warn" not in levels(report)


def test_several_models_are_a_warning() -> None:
    report = make_report()
    report["models"].append({"path": "sparse/1", "images": 2})
    report["images"][3]["model"] = 1
    assert any("2 models that share no scale (4, 2 images)" in t for t in levels(report)["warn"])
    assert complete_report(report)["summary"]["registered"] == 3  # in the largest


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
def test_implausible_intrinsics_are_named(model: str, params: list[float], word: str) -> None:
    report = make_report()
    report["models"][0]["cameras"][0] |= {"model": model, "params": params}
    warnings = levels(report).get("warn", [])
    assert len(warnings) == (word is not None)
    assert not word or word in warnings[0]


def test_focal_lengths_that_scatter_are_named() -> None:
    report = make_report()
    camera = report["models"][0]["cameras"][0]
    report["models"][0]["cameras"].append({**camera, "id": 2, "params": [900.0, 320, 240, 0]})
    assert "share one camera" in levels(report)["warn"][0]


def test_images_of_a_second_model_are_not_missing() -> None:
    report = make_report()
    report["models"].append({"path": "sparse/1", "images": 3})
    for row in report["images"][1:]:
        row["model"] = 1
    assert list(levels(report)) == ["bad"]  # one of four images is in the largest
    assert "missing" not in levels(report)["bad"][0]


# ------------------------------------------------------------------------------- report.html


def test_page_loads_nothing_from_anywhere(page: Page) -> None:
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.loads)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    # Plotly's code can ask for map tiles; the policy forbids the browser any request.
    assert "default-src 'none'" in page.policy
    assert "http" not in page.policy
    assert "connect-src" not in page.policy


def test_page_has_every_part(page: Page) -> None:
    parts = {"missing", "scene", "quality", "graph", "pairs", "images", "models", "time"}
    charts = {f"chart-{name}" for name in ("scene", "tracks", "errors", "graph")}
    assert parts | charts | {"settings"} <= page.ids
    assert page.tags.count("img") == 3 + 1  # three pairs, one missing image
    for text in (
        "3 / 4 images registered", "No verified matches", f"reason of {NASTY[1]}",
        "900 keypoints · 3 pairs", "mapping was repeated with relaxed values", "matcher.name",
        "Pairs chosen by exhaustive (near 6): few images.", "50 inliers of 100 matches (50.0%)",
        "2.5 pairs matched per second",
    ):  # fmt: skip
        assert text in page.text, text
    steps = re.findall('<th scope="row">([^<]+)</th><td class="bar">', page.source)
    assert steps == ["Scan images", "Match pairs", "Map", "Refine keypoints", "Other"]


def test_names_are_text_everywhere(page: Page) -> None:
    assert page.tags.count("script") == 1 + 4 + 2  # plotly, the charts, the tables' and pairs' data
    for text in (*NASTY, "gim-reconstruct '<in>' & out", "</details><b>", "<i>&amp;"):
        assert text in page.words


def test_a_report_of_nothing(tmp_path: Path) -> None:
    names = ("a.jpg", "b.jpg")
    report = make_report(names, missing=dict.fromkeys(names, "no_features"))
    report |= {"models": [], "track_lengths": {}, "reprojection_errors": {}, "timings": {}}
    page = Page(write(report, tmp_path)[0])
    assert {"missing", "images"} <= page.ids
    assert not {"scene", "pairs", "quality"} & page.ids
    assert page.tags.count("script") == 1  # no chart, so no plotly
    assert "No keypoints" in page.text
    report = {"images": [], "pairs": [], "models": [], "settings": {}, "timings": {}}
    nothing = SceneView(np.zeros((0, 3)), np.zeros((0, 3)), [])
    assert "images registered" in Page(write(report, tmp_path, scene=nothing)[0]).text


def test_a_status_without_advice_is_told_too(tmp_path: Path) -> None:
    missing = {"a.jpg": "eaten_by_dog", "b.jpg": "no_pairs"}
    page = Page(write(make_report(missing=missing), tmp_path)[0])
    assert "2 images are missing (1 without pairs, 1 eaten by dog): see why below." in page.text
    assert page.text.index("In no pair") < page.text.index("Eaten by dog")


def test_masks_are_shown_on_some_images(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(20)]
    mask = np.ones((480, 640), bool)
    mask[:, :160] = False
    parts = {"images": read_image, "masks": lambda name: None if name == "0.jpg" else mask}
    page = Page(write(make_report(names), tmp_path, **parts)[0])
    assert page.tags.count("img") == 7
    assert page.text.count("25% ignored") == 7
    picture = draw.shade(read_image("1.jpg"), mask)
    assert (picture[:, 16:] == 90).all()
    assert (picture[:, :16] == (137, 47, 47)).all()


def test_parts_that_fail_do_not_cost_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("gone")

    monkeypatch.setattr("gim_hloc.draw.data_url", broken)
    monkeypatch.setattr("gim_hloc.page.chart", broken)
    report = make_report(missing={"d.jpg": "not_registered"})
    parts = {"images": read_image, "pair_matches": read_matches, "scene": make_scene()}
    page = Page(write(report, tmp_path, **parts)[0])
    assert "3 / 4 images registered" in page.text
    assert not {"missing", "pairs", "scene", "quality"} & page.ids
    assert len(caplog.records) == 7  # the four charts, both sorts of pairs, the missing images


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("gone")

    scene = SceneView(np.zeros((4, 3)), np.zeros((2, 3), np.uint8), [])  # sizes disagree
    report = make_report(missing={"d.jpg": "not_registered"})
    with caplog.at_level(logging.WARNING):
        paths = write(report, tmp_path, images=read_image, scene=scene, pair_matches=broken)
    page = Page(paths[0])
    assert "graph" in page.ids
    assert not {"pairs", "scene"} & page.ids
    assert any("'scene'" in record.getMessage() for record in caplog.records)
    page = Page(write(report, tmp_path, images=broken, pair_matches=read_matches)[0])
    assert "img" not in page.tags
    assert not list(tmp_path.glob(".*"))


def test_large_collection_stays_small(tmp_path: Path) -> None:
    names = [f"folder/image_{i:05d}.jpg" for i in range(300)]
    html_path, json_path = write(make_report(names), tmp_path, scene=make_scene(names, 70_000))
    assert html_path.stat().st_size < 9e6
    assert len(json.loads(json_path.read_text("utf-8"))["pairs"]) == 300 * 299 // 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_the_page_without_errors(written: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-unsafe-swiftshader", "--virtual-time-budget=10000", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    # The last pair is asked for by its cell of the graph; that a list is shown in parts is told.
    click = (
        'onload = () => find("chart-graph").emit("plotly_click", {points: [{pointIndex: [2, 0]}]})'
    )
    page = tmp_path / "page.html"
    text = written[0].read_text("utf-8").replace("</main>", f"</main><script>{click}</script>")
    page.write_text(text, "utf-8")
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=300, check=True)
    log, dom = done.stderr.decode(errors="replace"), done.stdout.decode()
    assert "Uncaught" not in log
    assert "Content Security Policy" not in log
    for chart in ("tracks", "errors", "graph", "scene"):
        assert re.search(rf'id="chart-{chart}"[^>]*class="[^"]*js-plotly-plot', dom), chart
    shown = html.unescape(re.search('<b id="pair-names">(.*?)</b>', dom)[1])  # type: ignore[index]
    assert shown == f"{NASTY[0]} — {NASTY[2]}"
    assert ">50 inliers of 100 matches; 1 and 1 rejected ones are drawn<" in dom
    assert re.search('<canvas id="pair-canvas" width="[1-9]', dom)
    assert '<output id="image-count">4 images</output>' in dom


# -------------------------------------------------------------------------------- pictures


def test_graph_holds_every_pair_in_either_order() -> None:
    pairs = [
        {"name0": "d", "name1": "b", "matches": 70_000, "inliers": 12},
        {"name0": "a", "name1": "c", "matches": 5, "inliers": 0},
        {"name0": "a", "name1": "elsewhere", "matches": 5, "inliers": 5},
    ]
    figure = figures.match_graph(["a", "b", "c", "d"], pairs)
    assert figure is not None
    (matrix,) = figure.data
    tried = np.argwhere(np.isfinite(matrix.z)).tolist()
    assert tried == [[0, 2], [1, 3], [2, 0], [3, 1]]
    assert matrix.z[0, 2] == 0 < matrix.z[1, 3] == matrix.z[3, 1] == pytest.approx(matrix.zmax)
    assert matrix.customdata[1, 3].tolist() == [12, 70_000]
    assert matrix.customdata[2, 0].tolist() == [0, 5]
    assert figures.match_graph([str(i) for i in range(1501)], pairs) is None


def test_track_lengths_add_up() -> None:
    figure = figures.track_lengths({"2": 700, "3": 500, "30": 100, "22": 1})
    assert figure is not None
    (bars,) = figure.data
    assert dict(zip(bars.x, bars.y.tolist(), strict=True)) == {
        "2": 700, "3": 500, **{str(n): 0 for n in range(4, 21)}, "21+": 101,
    }  # fmt: skip
    assert bars.marker.color[0] != bars.marker.color[1]  # two views only: most of them


def test_chosen_pairs_are_varied_and_disjoint() -> None:
    pairs = [
        {"name0": "a", "name1": str(i), "matches": 1000, "inliers": 900 - 10 * i} for i in range(5)
    ]
    pairs += [
        {"name0": "x", "name1": "y", "matches": 1000, "inliers": 875},
        {"name0": "x", "name1": "z", "matches": 100, "inliers": 20},
        {"name0": "y", "name1": "z", "matches": 80, "inliers": 0},
        {"name0": "y", "name1": "w", "matches": 0, "inliers": 0},
    ]
    best, worst = figures.choose_pairs(pairs, 3)
    assert [pair["inliers"] for pair in best] == [900, 890, 875]  # "a" twice at most
    assert worst[0]["inliers"] == 20
    best, worst = figures.choose_pairs(pairs, 6)
    assert [pair["inliers"] for pair in best] == [900, 890, 880, 875]
    assert [pair["inliers"] for pair in worst] == [20, 860, 870, 0]  # by share; nothing twice


def test_embedded_pairs_say_where_matches_are() -> None:
    names = [f"{i}.jpg" for i in range(pair_viewer.MAX_IMAGES + 1)]
    pairs = [
        {"name0": a, "name1": b, "matches": 3, "inliers": 2} for a, b in itertools.pairwise(names)
    ]
    xy = np.array([[-0.5, -0.5], [np.nan, 1], [99.5, 24.5]])
    ends = xy, xy[::-1], np.array([True, True, False])
    data = pair_viewer.embed(
        names,
        pairs,
        dict.fromkeys(names, (200, 100)),
        read_image,
        lambda found: [ends] * len(found),
    )
    assert len(data["pairs"]) == len(pairs) - 1  # the last one has an image too many
    assert [bool(url) for url in data["pictures"]] == [True] * (len(names) - 1) + [False]
    i, j, inliers, matches, outliers, code = data["pairs"][4]
    assert (i, j, inliers, matches, outliers) == (4, 5, 2, 3, 1)
    rows = np.frombuffer(base64.b64decode(code), "<u2").reshape(-1, 4) / 65535
    np.testing.assert_allclose(rows, [[0.5, 0.25, 0, 0], [0, 0, 0.5, 0.25]], atol=1e-4)


def test_pair_picture_draws_lines_where_the_keypoints_are() -> None:
    xy0 = np.array([[99.5, 19.5], [99.5, 79.5], [np.nan, 0]])
    image = (np.full((50, 100, 3), 90, np.uint8), (200, 100))  # reduced to half its size
    drawn = draw_pair([image, image], xy0, np.nan_to_num(xy0), np.array([True, False, True]))
    assert drawn.shape == (159, 640, 3)  # (640 - 4) / 2 wide each, 2:1
    rows = drawn[:, 180:310].astype(int).mean(1)
    assert np.argmax(rows[:, 1] - rows[:, 0]) == pytest.approx(0.2 * 159, abs=1)
    assert np.argmax(rows[:, 0] - rows[:, 1]) == pytest.approx(0.8 * 159, abs=1)


def test_pictures_are_drawn_in_the_pixels_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(
        "gim_hloc.pipelines.report.draw_pair",
        lambda images, *_: drawn.append(images) or images[0][0],
    )
    report = make_report()
    for row in report["images"]:
        row |= {"width": 4000, "height": 3000}  # what reads them makes them smaller
    write(report, tmp_path, images=read_image, pair_matches=read_matches)
    assert {size for pair in drawn for _, size in pair} == {(4000, 3000)}


def pack(scene: SceneView) -> figures.PackedScene:
    packed = figures.pack_scene(scene)
    assert packed is not None
    return packed


def test_scene_is_turned_upright_and_keeps_shape() -> None:
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
    packed = pack(SceneView(xyz @ turn.T, np.zeros((400, 3), np.uint8), cameras))
    frusta = packed.frusta.reshape(-1, 12, 3)
    shift = packed.centers[0] - centers[0]
    np.testing.assert_allclose(packed.centers - shift, centers, atol=1e-5)
    np.testing.assert_allclose(packed.points - shift, xyz, atol=1e-5)
    # A pyramid opens forward and is level: corners 1 and 2 are the top edge, seen from below.
    assert np.isnan(frusta[:, 11]).all()
    assert np.isfinite(frusta[:, :11]).all()
    corners = frusta[0, [1, 2, 4, 5]] - packed.centers[0]
    assert (corners[:, 1] > 0).all()
    assert corners[:, 2] * [1, 1, -1, -1] == pytest.approx(corners[0, 2])
    assert corners[0, 2] / corners[0, 1] == pytest.approx(240 / 500, rel=1e-4)
    assert corners[0, 0] / corners[0, 1] == pytest.approx(-320 / 500, rel=1e-4)


def test_far_points_and_a_lost_camera_do_not_shrink_the_scene() -> None:
    scene = make_scene(points=1000)
    xyz = scene.points_xyz.copy()
    xyz[:5] = 1e5
    xyz[5] = np.nan
    lost = CameraView("lost.jpg", np.array([1e6, 0, 0]), np.eye(3), 500.0, 640, 480)
    packed = pack(SceneView(xyz, scene.points_rgb, [*scene.cameras, lost]))
    low, high = packed.ranges.T
    assert (high - low < 30).all()
    assert packed.far >= 5
    assert len(packed.points) + packed.far == 999
    assert packed.total == 1000
    assert ((packed.points >= low - 1e-4) & (packed.points <= high + 1e-4)).all()
    assert ((packed.centers[:4] >= low) & (packed.centers[:4] <= high)).all()


def test_scene_samples_points_with_their_colours() -> None:
    xyz = np.random.default_rng(0).uniform(0, 255, (figures.MAX_POINTS + 5000, 3))
    packed = pack(SceneView(xyz, xyz.astype(np.uint8), []))
    assert len(packed.points) == figures.MAX_POINTS
    # Without cameras the view is (x, z, -y) of the world.
    for axis, source, sign in ((0, 0, 1), (1, 2, 1), (2, 1, -1)):
        colours = packed.colours[:, source].astype(float)
        assert np.corrcoef(packed.points[:, axis], colours)[0, 1] * sign > 0.999


def test_first_view_of_a_deep_scene_shows_cameras_and_points() -> None:
    rng = np.random.default_rng(0)
    deep = np.c_[rng.uniform(-1, 1, (500, 2)), rng.uniform(4, 60, 500)]  # far along the view
    cameras = [
        CameraView(f"{i}.jpg", np.array([0.3 * i, 0, 0]), np.eye(3), 500.0, 640, 480)
        for i in range(9)
    ]
    sideways = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    cameras.append(CameraView("x.jpg", np.array([3.0, 0, 0]), sideways, 500.0, 640, 480))
    packed = pack(SceneView(deep, np.zeros((500, 3), np.uint8), cameras))
    unit = np.exp(np.log(np.ptp(packed.ranges, axis=1)).mean())
    eye, centre = np.array(packed.eye) * unit, np.array(packed.centre) * unit
    axis = (centre - eye) / np.linalg.norm(centre - eye)
    for content, share in ((packed.centers, 1.0), (packed.points, 0.85)):
        depth = (content - eye) @ axis
        beside = np.linalg.norm(content - eye - depth[:, None] * axis, axis=1)
        seen = (depth > 0) & (beside < 0.6 * depth)  # plotly's view is about 2 x 31 degrees
        assert seen.mean() >= share
    assert np.allclose(np.ptp(packed.centers[:9], axis=0)[2], 0, atol=1e-5)  # one image is not up


def test_a_plan_shows_every_camera_and_is_seen_from_above() -> None:
    rng = np.random.default_rng(0)
    upright = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # looks north, z is up
    east, north = [40.0, 0, 1], [0, 40.0, 2]
    xyz = np.concatenate([rng.normal(size=(500, 3)), [[0, 0, 0], east, north]])
    places = plan_places(xyz, np.stack([upright] * 3), 500)
    origin, to_east, to_north = places[500:]
    assert ((places[500:] > 0) & (places[500:] < PLAN_SIZE)).all()
    (ex, ey), (nx, ny) = to_east - origin, to_north - origin
    assert ex * ny - ey * nx < 0  # from east to north is anticlockwise where y points down
