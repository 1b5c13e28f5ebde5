"""Pictures of propagated pairs and of failures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Reads a frame as RGB uint8 (H, W, 3); None where it is missing.
FrameReader = Callable[[int], "np.ndarray | None"]

_MARGIN = 8  # pixels between and around frames
_RADIUS = 3  # of a label's dot, pixels
_SHIFT = 4  # bits after the point in OpenCV's drawing coordinates
_INK, _SOFT, _PAPER, _BLANK = (29, 33, 38), (98, 106, 115), (255, 255, 255), (223, 221, 213)
_FRAME = (15, 113, 115)
# Of dots, by place in the first frame: top left, top right, bottom left, bottom right.
_CORNERS = np.array([[255, 90, 60], [255, 225, 40], [200, 70, 255], [40, 215, 255]], np.float64)
_TEXT, _SMALL = 17, 13  # heights of letters, pixels
_NARROW = 720  # below it the footer would not fit


@dataclass(frozen=True, kw_only=True, eq=False)
class PairView:
    """What is drawn of one propagated pair.

    Attributes:
        frames: the two frames, RGB uint8; None where one is missing.
        indices: their frame indices.
        labels: (n, 4) pixels of the frames.
        size: (width, height) of the frames in pixels.
        text: lines for `with_footer`.
    """

    frames: tuple[np.ndarray | None, np.ndarray | None]
    indices: tuple[int, int]
    labels: np.ndarray
    size: tuple[int, int]
    text: tuple[str, ...]


def covisible(labels: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """Share of each frame that lies in the bounding box of the labels' points.

    Args:
        labels: (n, 4) pixels.
        size: (width, height) of the frames.
    """
    if not len(labels):
        return 0.0, 0.0
    extent = labels.max(axis=0) - labels.min(axis=0)
    area = size[0] * size[1]
    return float(extent[0] * extent[1] / area), float(extent[2] * extent[3] / area)


def spread_rows(points: np.ndarray, count: int, size: tuple[int, int]) -> np.ndarray:
    """Rows of about ``count`` points that are spread over the frame: one a cell of a grid."""
    if len(points) <= count or count < 1:
        return np.arange(len(points) if count > 0 else 0)
    width, height = size
    columns = max(1, round((count * width / height) ** 0.5))
    rows = max(1, round(count / columns))
    x = np.clip(points[:, 0] / width * columns, 0, columns - 1).astype(int)
    y = np.clip(points[:, 1] / height * rows, 0, rows - 1).astype(int)
    _, first = np.unique(y * columns + x, return_index=True)
    return np.sort(first)


def draw_pair(
    view: PairView, *, max_size: tuple[int, int] = (1280, 720), lines: int = 150
) -> np.ndarray:
    """The two frames with their labels; below them the same in grey with lines.

    A dot has the colour of its place in the first frame, so that the same colours must lie in the
    same order in both. The boxes hold all labels of a frame.

    Args:
        view: the pair.
        max_size: (width, height) that a frame is reduced to.
        lines: about how many labels have one.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import cv2

    scale = min(max_size[0] / view.size[0], max_size[1] / view.size[1], 1.0)
    width, height = (max(1, round(side * scale)) for side in view.size)
    colour = [_panel(f, i, (width, height)) for f, i in zip(view.frames, view.indices, strict=True)]
    grey = [_greyed(panel) for panel in colour]
    canvas: np.ndarray = np.full(
        (2 * height + 3 * _MARGIN, 2 * width + 3 * _MARGIN, 3), 255, dtype=np.uint8
    )
    corners = [(_MARGIN, _MARGIN), (2 * _MARGIN + width, _MARGIN)]
    below = height + _MARGIN
    for (x, y), plain, bottom in zip(corners, colour, grey, strict=True):
        canvas[y : y + height, x : x + width] = plain
        canvas[y + below : y + below + height, x : x + width] = bottom

    stretch = np.array([width / view.size[0], height / view.size[1]])
    # Integer = pixel centre on both sides of the scaling.
    ends = [(view.labels[:, k : k + 2] + 0.5) * stretch - 0.5 for k in (0, 2)]
    tones = _tones(view.labels[:, :2], view.size)
    chosen = spread_rows(view.labels[:, :2], lines, view.size)
    drawn = canvas.copy()
    places = [
        points + np.array([x, y + below]) for points, (x, y) in zip(ends, corners, strict=True)
    ]
    for row in chosen.tolist():
        a, b = (_fixed(points[row]) for points in places)
        cv2.line(drawn, a, b, tones[row], 1, cv2.LINE_AA, _SHIFT)
    canvas = cv2.addWeighted(drawn, 0.75, canvas, 0.25, 0)
    for points, corner in zip(ends, corners, strict=True):
        top = points + np.array(corner)
        if len(points):
            box = (_fixed(top.min(axis=0)), _fixed(top.max(axis=0)))
            for thick, tint in ((3, (0, 0, 0)), (1, (255, 255, 255))):
                cv2.rectangle(canvas, *box, tint, thick, cv2.LINE_AA, _SHIFT)
        for row, point in enumerate(top.tolist()):
            cv2.circle(canvas, _fixed(point), 2 << _SHIFT, tones[row], -1, cv2.LINE_AA, _SHIFT)
        for row in chosen.tolist():
            place = _fixed(top[row] + (0, below))
            cv2.circle(canvas, place, _RADIUS << _SHIFT, tones[row], -1, cv2.LINE_AA, _SHIFT)
    return canvas


def _panel(frame: np.ndarray | None, index: int, size: tuple[int, int]) -> np.ndarray:
    import cv2

    if frame is not None:
        smaller = frame.shape[1] > size[0]
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        panel: np.ndarray = cv2.resize(frame, size, interpolation=how)
        return panel
    picture = Image.new("RGB", size, _BLANK)
    ImageDraw.Draw(picture).text(
        (size[0] / 2, size[1] / 2),
        f"frame {index} is missing",
        fill=_SOFT,
        font=_font(min(_TEXT, max(8, size[0] // 14))),
        anchor="mm",
    )
    return np.array(picture)


def _greyed(panel: np.ndarray) -> np.ndarray:
    grey = panel.mean(axis=2, keepdims=True) * 0.6
    return np.broadcast_to(grey, panel.shape).astype(np.uint8)


def _tones(points: np.ndarray, size: tuple[int, int]) -> list[tuple[int, ...]]:
    u, v = (np.clip(points[:, k, None] / size[k], 0, 1) for k in (0, 1))
    top = _CORNERS[0] * (1 - u) + _CORNERS[1] * u
    bottom = _CORNERS[2] * (1 - u) + _CORNERS[3] * u
    return [tuple(tone) for tone in (top * (1 - v) + bottom * v).astype(int).tolist()]


def _fixed(point: Sequence[float] | np.ndarray) -> tuple[int, int]:
    return round(point[0] * (1 << _SHIFT)), round(point[1] * (1 << _SHIFT))


def _font(height: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=height)


def with_footer(canvas: np.ndarray, text: Sequence[str]) -> np.ndarray:
    """Add lines of text below a picture, the first in larger letters."""
    if not text:
        return canvas
    width = max(canvas.shape[1], _NARROW)
    wrapped = [
        (part, _TEXT if number == 0 else _SMALL)
        for number, line in enumerate(text)
        for part in _wrap(line, width - 2 * _MARGIN, _TEXT if number == 0 else _SMALL)
    ]
    height = sum(round(1.45 * size) for _, size in wrapped) + _MARGIN
    picture = Image.new("RGB", (width, canvas.shape[0] + height), _PAPER)
    picture.paste(Image.fromarray(canvas), (0, 0))
    draw = ImageDraw.Draw(picture)
    y = canvas.shape[0]
    for part, size in wrapped:
        ink = _INK if size == _TEXT else _SOFT
        draw.text((_MARGIN, y), part, fill=ink, font=_font(size))
        y += round(1.45 * size)
    return np.array(picture)


def _wrap(line: str, width: int, height: int) -> list[str]:
    font = _font(height)
    lines: list[str] = []
    for word in line.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# ----------------------------------------------------------------------------------------- failures


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """A pair without labels: the two frames it is about, what was tried, and why it failed."""

    indices: tuple[int, int]
    what: str
    reason: str


def thumbnail_pair(
    failure: Failure, read: FrameReader, size: tuple[int, int], *, width: int = 190
) -> np.ndarray:
    """The two frames of a failure side by side, small.

    Args:
        failure: what to show.
        read: reads a frame.
        size: (width, height) of the frames in pixels.
        width: of a thumbnail, pixels.
    """
    small = (width, max(1, round(width * size[1] / size[0])))
    if small[1] > width:  # portrait
        small = (max(1, round(width * size[0] / size[1])), width)
    panels = [_panel(read(index), index, small) for index in failure.indices]
    gap = np.full((small[1], 4, 3), 255, dtype=np.uint8)
    return np.concatenate([panels[0], gap, panels[1]], axis=1)


def contact_sheet(
    failures: Sequence[Failure], thumbnails: Sequence[np.ndarray], title: str, *, columns: int = 3
) -> np.ndarray:
    """All failures on one picture, each with its reason.

    Args:
        failures: at least one.
        thumbnails: their pictures, of one size.
        title: first line.
        columns: at most.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    columns = min(columns, len(failures))
    th, tw = thumbnails[0].shape[:2]
    # Portrait frames are narrow, their reasons are not.
    cell = max(tw, 300)
    texts = [
        [(line, _INK) for line in _wrap(f.what, cell, _SMALL)]
        + [(line, _SOFT) for line in _wrap(f.reason, cell, _SMALL)]
        for f in failures
    ]
    line = round(1.35 * _SMALL)
    rows = [range(k, min(k + columns, len(failures))) for k in range(0, len(failures), columns)]
    heights = [th + 6 + line * max(len(texts[k]) for k in row) + 2 * _MARGIN for row in rows]
    pad = 2 * _MARGIN
    head = round(2.2 * _TEXT)
    picture = Image.new("RGB", (columns * (cell + pad) + pad, head + pad + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((pad, pad), title, fill=_INK, font=_font(_TEXT))
    y = head + pad
    for row, height in zip(rows, heights, strict=True):
        for column, k in enumerate(row):
            x = pad + column * (cell + pad)
            picture.paste(Image.fromarray(thumbnails[k]), (x, y))
            for number, (text, ink) in enumerate(texts[k]):
                draw.text((x, y + th + 6 + number * line), text, fill=ink, font=_font(_SMALL))
        y += height
    return np.array(picture)


def coverage_map(grid: np.ndarray, *, cell: int = 16) -> np.ndarray:
    """A grid (h, w) of shares in [0, 1] as an RGB picture, white to dark teal."""
    stops = np.array([[246, 245, 241], [140, 200, 192], [15, 113, 115], [10, 50, 60]], np.float64)
    place = np.clip(grid, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    tones = stops[low] * (1 - part) + stops[low + 1] * part
    return np.kron(np.rint(tones), np.ones((cell, cell, 1))).astype(np.uint8)


def data_url(picture: np.ndarray, *, width: int | None = None, png: bool = False) -> str:
    """A picture as a data URL, reduced to a width in pixels."""
    image = Image.fromarray(picture)
    if width is not None and image.width > width:
        image = image.resize(
            (width, round(image.height * width / image.width)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if png else "JPEG", **({} if png else {"quality": 82}))
    kind = "png" if png else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
