"""Pictures for people: matches between two images, points, heat maps, text, contact sheets.

A picture is RGB uint8 (H, W, 3). Points are x, y in pixels of the picture that they are drawn on,
integer = pixel centre; `scale_points` brings them there from an image of another size.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gim_hloc.errors import OutputError
from gim_hloc.geometry.frames import resize_points

if TYPE_CHECKING:
    import torch

GAP = 4  # white pixels between pictures
INLIER, OUTLIER, UNKNOWN = (38, 222, 129), (255, 64, 64), (140, 140, 140)
INK, SOFT = (29, 33, 38), (98, 106, 115)  # of text: the first line, the others
_SHIFT = 4  # bits after the point in OpenCV's drawing coordinates
_TEXT = 15  # px, height of letters
_LEADING = 20  # px from line to line
# Okabe and Ito's green, yellow, red: eyes that confuse red and green tell them apart too.
_GOOD_TO_BAD = np.array([(0, 158, 115), (240, 228, 66), (213, 94, 0)], np.float64)
_HEAT = np.array([(246, 245, 241), (140, 200, 192), (15, 113, 115), (10, 50, 60)], np.float64)
# Of places: top left, top right, bottom left, bottom right.
_CORNERS = np.array([(255, 90, 60), (255, 225, 40), (200, 70, 255), (40, 215, 255)], np.float64)

# ------------------------------------------------------------------------------------------- sizes


def from_tensor(image: torch.Tensor) -> np.ndarray:
    """A picture of an image (3, H, W) in [0, 1], as networks see it."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture at another (width, height)."""
    smaller = size[0] <= picture.shape[1] and size[1] <= picture.shape[0]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    resized: np.ndarray = cv2.resize(np.ascontiguousarray(picture), size, interpolation=how)
    return resized


def fit(picture: np.ndarray, width: int, height: int, *, enlarge: bool = False) -> np.ndarray:
    """A picture as large as fits into width x height; a smaller one is enlarged only if asked."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    if scale >= 1 and not enlarge:
        return picture
    return resize(picture, tuple(max(1, round(n * scale)) for n in picture.shape[1::-1]))  # type: ignore[arg-type]


def scale_points(xy: np.ndarray, before: tuple[int, int], picture: np.ndarray) -> np.ndarray:
    """Points (M, 2) of an image of size ``before`` (width, height) as pixels of a picture of it."""
    scale = np.array(picture.shape[1::-1]) / np.array(before)
    return resize_points(np.asarray(xy, np.float64).reshape(-1, 2), scale)


def join(
    pictures: Sequence[np.ndarray], *, below: bool = False, gap: int = GAP, margin: int = 0
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pictures beside or below each other on white, and the x, y of their top left corners."""
    heights, widths = ([picture.shape[k] for picture in pictures] for k in (0, 1))
    steps = np.cumsum([margin, *(n + gap for n in (heights if below else widths))]).tolist()
    long, wide = steps[-1] - gap + margin, max(widths if below else heights) + 2 * margin
    canvas = np.full((long, wide, 3) if below else (wide, long, 3), 255, np.uint8)
    corners = [(margin, step) if below else (step, margin) for step in steps[:-1]]
    for picture, (x, y) in zip(pictures, corners, strict=True):
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas, corners


# ----------------------------------------------------------------------------------------- colours


def _ramp(stops: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours between stops (S, 3) at shares (...) in [0, 1], grey where they are NaN."""
    place = np.nan_to_num(np.clip(share, 0, 1)) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    colours = stops[low] * (1 - part) + stops[low + 1] * part
    colours[np.isnan(share)] = UNKNOWN
    return np.rint(colours).astype(np.uint8)


def error_colours(errors: np.ndarray, good: float, wrong: float) -> np.ndarray:
    """RGB (M, 3) of errors: green up to ``good``, red from ``wrong`` on, grey where NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(np.asarray(errors, np.float64) / good) / np.log(max(wrong / good, 2))
    return _ramp(_GOOD_TO_BAD, share)


def place_colours(xy: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB (M, 3) of points by their place in an image of ``size`` (width, height)."""
    u, v = (np.clip(xy[:, k, None] / size[k], 0, 1) for k in (0, 1))
    top, bottom = (_CORNERS[k] * (1 - u) + _CORNERS[k + 1] * u for k in (0, 2))
    return np.rint(top * (1 - v) + bottom * v).astype(np.uint8)


def shade(picture: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """A picture with what a mask (h, w), bool, does not allow in dark red."""
    mask = cv2.resize(allowed.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_AREA)
    shaded = picture.copy()
    shaded[mask == 0] = picture[mask == 0] * 0.3 + np.array([110, 20, 20])
    return shaded


def heat(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (h, w) in [0, 1] as a picture of ``size`` (width, height), white to dark."""
    return np.asarray(cv2.resize(_ramp(_HEAT, values), size, interpolation=cv2.INTER_NEAREST))


def depths(values: np.ndarray) -> np.ndarray:
    """Depths (H, W) as a picture, near yellow and far dark, grey where there is none (0)."""
    known = values > 0
    inverse = np.divide(1, values, out=np.zeros(values.shape, np.float32), where=known)
    low, high = np.quantile(inverse[known], (0.02, 0.98)) if known.any() else (0.0, 1.0)
    share = np.clip((inverse - low) / max(high - low, 1e-12), 0, 1)
    picture = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    picture[~known] = UNKNOWN
    picture[known] = picture[known][:, ::-1]
    return picture


# ----------------------------------------------------------------------------------------- drawing


def spread(xy: np.ndarray, count: int, size: tuple[int, int]) -> np.ndarray:
    """Rows of about ``count`` points spread over an image: one in each cell of a grid."""
    if len(xy) <= count or count < 1:
        return np.arange(len(xy) if count > 0 else 0)
    columns = max(1, round((count * size[0] / size[1]) ** 0.5))
    rows = max(1, round(count / columns))
    x, y = (
        np.clip(xy[:, k] / size[k] * n, 0, n - 1).astype(int) for k, n in ((0, columns), (1, rows))
    )
    return np.sort(np.unique(y * columns + x, return_index=True)[1])


def _fixed(xy: np.ndarray) -> list[list[int]]:
    """Points as OpenCV's fixed-point numbers; NaN is drawn far outside."""
    limited = np.nan_to_num(np.clip(np.asarray(xy, np.float64), -1e5, 1e5), nan=-1e5)
    return np.rint(limited * (1 << _SHIFT)).astype(int).tolist()  # type: ignore[no-any-return]


def _each(colours: np.ndarray | tuple[int, int, int], count: int) -> list[list[int]]:
    return np.broadcast_to(np.asarray(colours, int), (count, 3)).tolist()  # type: ignore[no-any-return]


def draw_lines(
    canvas: np.ndarray,
    xy0: np.ndarray,
    xy1: np.ndarray,
    colours: np.ndarray | tuple[int, int, int],
    *,
    opacity: float = 0.6,
) -> None:
    """Draw lines from (M, 2) to (M, 2) onto a picture, in one colour or in (M, 3); last on top."""
    drawn = canvas.copy()
    for a, b, colour in zip(_fixed(xy0), _fixed(xy1), _each(colours, len(xy0)), strict=True):
        cv2.line(drawn, a, b, colour, 1, cv2.LINE_AA, _SHIFT)
    cv2.addWeighted(drawn, opacity, canvas, 1 - opacity, 0, dst=canvas)


def draw_points(
    canvas: np.ndarray,
    xy: np.ndarray,
    colours: np.ndarray | tuple[int, int, int],
    *,
    radius: int = 3,
    square: bool = False,
) -> None:
    """Draw points (M, 2) onto a picture, in one colour or in (M, 3)."""
    half = radius << _SHIFT
    for (x, y), colour in zip(_fixed(xy), _each(colours, len(xy)), strict=True):
        if square:
            corners = (x - half, y - half), (x + half, y + half)
            cv2.rectangle(canvas, *corners, colour, -1, cv2.LINE_AA, _SHIFT)
        else:
            cv2.circle(canvas, (x, y), half, colour, -1, cv2.LINE_AA, _SHIFT)


def draw_cloud(canvas: np.ndarray, xy: np.ndarray, depth: np.ndarray, rgb: np.ndarray) -> None:
    """Draw points (M, 2) in front of a camera as single pixels, near ones over far ones."""
    height, width = canvas.shape[:2]
    with np.errstate(invalid="ignore"):
        inside = (depth > 0) & (xy > -0.5).all(1) & (xy < (width - 0.5, height - 0.5)).all(1)
    rows = np.flatnonzero(inside)
    rows = rows[np.argsort(-depth[rows], kind="stable")]
    x, y = np.rint(xy[rows]).astype(int).T
    canvas[y, x] = rgb[rows]


def draw_matches(
    pictures: Sequence[np.ndarray],
    points: Sequence[np.ndarray],
    colours: np.ndarray | tuple[int, int, int] = INLIER,
    *,
    lines: int | np.ndarray = 100,
    radius: int = 3,
    opacity: float = 0.6,
    below: bool = False,
    gap: int = GAP,
) -> np.ndarray:
    """Two pictures side by side with a dot for every match and lines between some.

    Args:
        pictures: of image 0 and 1, (H, W, 3) uint8 RGB.
        points: (M, 2) pixels of picture 0, integer = pixel centre, and (M, 2) of picture 1.
        colours: one RGB, or (M, 3).
        lines: which rows have a line, or how many have, evenly over all; later ones are on top.
        radius: of a dot, pixels.
        opacity: of the lines.
        below: the second picture below the first.
        gap: white pixels between the pictures.
    """
    canvas, corners = join(pictures, below=below, gap=gap)
    count = len(points[0])
    colours = np.asarray(_each(colours, count), int).reshape(-1, 3)
    ends = [np.asarray(xy) + corner for xy, corner in zip(points, corners, strict=True)]
    if isinstance(lines, int):
        lines = np.unique(np.linspace(0, count - 1, min(lines, count)).astype(int))
    draw_lines(canvas, ends[0][lines], ends[1][lines], colours[lines], opacity=opacity)
    for end in ends:
        draw_points(canvas, end, colours, radius=radius)
    return canvas


# -------------------------------------------------------------------------------------------- text


@functools.cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has the letters of more languages than others."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, _TEXT)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if lines[0] else lines[1:]


def caption(
    picture: np.ndarray, lines: Sequence[str], *, above: bool = False, width: int = 0
) -> np.ndarray:
    """A picture with lines of text below or above it, the first bold, wrapped at its width.

    The result is at least ``width`` pixels wide, and as wide as its longest word.
    """
    fonts = [_font(number == 0) for number in range(len(lines))]
    words = [
        font.getlength(w) for line, font in zip(lines, fonts, strict=True) for w in line.split()
    ]
    width = max(picture.shape[1], width, *(int(word) + 2 for word in words), 1)
    parts = [
        (part, font)
        for line, font in zip(lines, fonts, strict=True)
        for part in _wrap(line, width, font)
    ]
    strip = Image.new("RGB", (width, _LEADING * len(parts) + GAP), (255, 255, 255))
    pen = ImageDraw.Draw(strip)
    for number, (part, font) in enumerate(parts):
        pen.text((0, _LEADING * number), part, fill=INK if font is fonts[0] else SOFT, font=font)
    text = np.asarray(strip)
    return join([text, picture] if above else [picture, text], below=True)[0]


def notice(text: str, size: tuple[int, int]) -> np.ndarray:
    """A grey picture of (width, height) that says something in its middle."""
    picture = Image.new("RGB", size, (223, 221, 213))
    font = _font(False).font_variant(size=min(_TEXT, max(8, size[0] // 14)))
    ImageDraw.Draw(picture).text(
        (size[0] / 2, size[1] / 2), text, fill=SOFT, font=font, anchor="mm"
    )
    return np.array(picture)


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[Sequence[str]],
    title: str,
    *,
    columns: int = 3,
    width: int = 300,
) -> np.ndarray:
    """At least one picture in columns of at least ``width`` pixels, each with its text below it."""
    width = max(width, *(picture.shape[1] for picture in pictures))
    cells = [caption(p, text, width=width) for p, text in zip(pictures, captions, strict=True)]
    rows = [join(cells[k : k + columns], gap=4 * GAP)[0] for k in range(0, len(cells), columns)]
    return join(
        [caption(join(rows, below=True, gap=4 * GAP)[0], [title], above=True)], margin=4 * GAP
    )[0]


# -------------------------------------------------------------------------------------------- files


def encode(picture: np.ndarray, suffix: str = ".jpg", *, quality: int = 88) -> bytes:
    """The bytes of a .jpg or .png file."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    done, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise OutputError(f"A picture of {picture.shape[1]} x {picture.shape[0]} cannot be coded.")
    return bytes(data)


def data_url(picture: np.ndarray, suffix: str = ".jpg", *, quality: int = 82) -> str:
    """A picture as the address of an image within a page."""
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    data = base64.b64encode(encode(picture, suffix, quality=quality)).decode()
    return f"data:image/{kind};base64,{data}"
