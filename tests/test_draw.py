"""Pictures show points where they are; pages show text as text."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from gim_hloc import draw, page

GREY = 90


def blank(width: int, height: int, value: int = GREY) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def centre(picture: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of what has a colour."""
    coloured = np.ptp(picture.astype(int), axis=2) > 60
    y, x = np.nonzero(coloured)
    return np.array([x.mean(), y.mean()])


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("size", [(320, 180), (90, 160), (2560, 1440)])
def test_dots_lie_on_their_pixels(size: tuple[int, int], below: bool) -> None:
    picture = draw.fit(blank(*size), 640, 640)
    assert picture.shape[1] == min(size[0], 640)
    xy = np.array([[0.3, 0.6]]) * size
    drawn_at = draw.scale_points(xy, size, picture)
    scale = picture.shape[1] / size[0]
    np.testing.assert_allclose(drawn_at, (xy + 0.5) * scale - 0.5)
    small = blank(100, 80)
    drawn = draw.draw_matches(
        (picture, small), (drawn_at, np.array([[70, 20]])), lines=0, below=below
    )
    h, w = picture.shape[:2]
    first = drawn[:h, :w]
    x, y = (0, h + 4) if below else (w + 4, 0)
    second = drawn[y : y + 80, x : x + 100]
    assert np.abs(centre(first) - drawn_at[0]).max() < 0.3
    assert np.abs(centre(second) - (70, 20)).max() < 0.3


def test_lines_join_matches_and_are_bounded() -> None:
    y = np.arange(10, 100, 2.0)
    xy = np.c_[np.full(len(y), 50), y]
    two = (blank(100, 100), blank(100, 100))
    drawn = draw.draw_matches(two, (xy, xy), lines=5, radius=1)
    assert (np.ptp(drawn[:, 75].astype(int), axis=1) > 30).sum() == 5
    chosen = draw.draw_matches(two, (xy, xy), (255, 0, 0), lines=np.array([3]), radius=1)
    assert np.ptp(chosen[:, 75].astype(int), axis=1).argmax() == 16
    small = (blank(9, 9), blank(9, 9))
    none = np.zeros((0, 2))
    assert draw.draw_matches(small, (none, none)).shape == (9, 22, 3)
    lost = np.array([[np.nan, 1.0], [np.inf, 2.0]])
    far = draw.draw_matches(small, (lost, lost), lines=0)
    assert (far[:, :9] == GREY).all()


def test_errors_go_from_green_to_red() -> None:
    errors = np.array([0, 0.5, math.sqrt(0.5 * 8), 8, 99, np.nan])
    assert draw.error_colours(errors, 0.5, 8).tolist() == [
        [0, 158, 115], [0, 158, 115], [240, 228, 66], [213, 94, 0], [213, 94, 0], [140, 140, 140],
    ]  # fmt: skip
    assert draw.error_colours(np.zeros(0), 0.5, 8).shape == (0, 3)


def test_depths_and_clouds_show_what_is_near() -> None:
    near, far, unknown = draw.depths(np.array([[1.0, 4.0, 0.0]], np.float32))[0].astype(int)
    assert near[0] > 200 > near[2]  # yellow
    assert far.max() < 100
    assert tuple(unknown) == draw.UNKNOWN
    canvas = blank(3, 2)
    xy = np.array([[1, 1], [1, 1], [1, 1], [0, 0], [7, 0], [np.nan, 0]], float)
    depth = np.array([2.0, 1.0, 3.0, -1.0, 1.0, 1.0])
    draw.draw_cloud(canvas, xy, depth, np.arange(18, dtype=np.uint8).reshape(6, 3))
    assert tuple(canvas[1, 1]) == (3, 4, 5)
    canvas[1, 1] = GREY
    assert (canvas == GREY).all()


def test_lines_are_spread_over_the_image() -> None:
    generator = np.random.default_rng(1)
    crowd = generator.uniform(0, 8, (5000, 2))
    others = generator.uniform((0, 0), (160, 90), (300, 2))
    rows = draw.spread(np.concatenate([crowd, others]), 100, (160, 90))
    assert 60 < len(rows) <= 110
    assert (rows < 5000).sum() < 5
    assert draw.spread(others, 300, (160, 90)).tolist() == list(range(300))


@pytest.mark.parametrize("text", ["WWWW MMMM @@@@ " * 5, "2015-02-03#1422953130110959#14229" * 3])
def test_text_is_not_cut(text: str) -> None:
    picture = draw.caption(blank(200, 40), [text, "more"], above=True)
    ink = np.flatnonzero((picture[:-40] < 128).any((0, 2)))
    assert ink.max() < picture.shape[1] - 1
    assert (picture[-40:, :200] == GREY).all()


def test_contact_sheet_holds_every_picture() -> None:
    pictures = [blank(120, 60, k + 1) for k in range(7)]
    sheet = draw.contact_sheet(pictures, [["name", "x " * 99]] * 7, "title")
    for k in range(7):
        assert (sheet == k + 1).all(axis=2).sum() == 120 * 60
    one = draw.contact_sheet(pictures[:1], [["name"]], "title")
    assert sheet.shape[1] > 2.5 * one.shape[1]


def test_encoded_pictures_open() -> None:
    picture = np.dstack([blank(8, 6, 10)[..., :1], blank(8, 6, 200)[..., :1], blank(8, 6)[..., :1]])
    with Image.open(io.BytesIO(draw.encode(picture, ".png"))) as image:
        assert (np.asarray(image) == picture).all()
    assert draw.data_url(picture).startswith("data:image/jpeg;base64,/9j/")
    assert draw.heat(np.array([[0.0, 1.0]]), (8, 4))[0, [0, -1]].tolist() == [
        [246, 245, 241], [10, 50, 60],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.02, "20 ms"), (3.14, "3.1 s"), (45.4, "45 s"), (185, "3 min 05 s"),
        (7810, "2 h 10 min"), (None, page.NONE),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert page.duration(seconds) == text


def test_a_page_shows_text_as_text_and_loads_nothing() -> None:
    evil = "</style></script><script>alert(1)</script><img src=x>"
    text = page.render(
        "base.html.j2",
        title=evil, eyebrow=evil, count=(3, 1000, evil, "warn"), verdicts=[("bad", evil)],
        tiles=[(evil, evil, "px", evil)], command=evil, sections=[("a", evil, evil, evil),
        ("none", "None", "None", " \n")], footer=evil,
    )  # fmt: skip
    assert "<script" not in text
    assert "<img" not in text
    assert "script-src" not in text
    assert "default-src 'none'" in text
    assert 'id="none"' not in text
    assert not re.search(r"https?://", text)
    assert "3 <span>/</span> 1,000" in text
