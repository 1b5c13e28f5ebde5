"""Textures of the example room: procedural materials and photographs.

Every function draws from the generator it is given and returns an sRGB image, uint8 (H, W, 3). No
material repeats itself, so that no two places of the room look the same.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
Colour = tuple[float, float, float]

TEXEL = 0.003  # metres per texel of the large surfaces

# Photographs read from the installed wheels; sources and licences are listed in examples/README.md.
_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def load_photo(name: str) -> Array:
    """Read one of the photographs that ship inside the scikit-image and scikit-learn wheels.

    Args:
        name: key of the photograph, for instance ``"astronaut"``.

    Returns:
        RGB image, uint8 (H, W, 3).

    Raises:
        FileNotFoundError: if the wheel is missing or lacks the file. Nothing is downloaded.
    """
    package, relative = _PHOTOS[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        wheel = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise FileNotFoundError(
            f"photograph {name!r} needs {relative} of {wheel}: pip install {wheel}"
        )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def fractal_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
    cell: float,
    octaves: int = 5,
    stretch: float = 1.0,
) -> Array:
    """Multi-octave value noise with mean about 0 and standard deviation 1.

    Args:
        rng: source of randomness.
        height: rows of the result.
        width: columns of the result.
        cell: size of the coarsest noise cell in texels.
        octaves: number of halvings of the cell, each weighted 0.6 of the one before.
        stretch: elongation of the cells along the columns (wood grain).

    Returns:
        float32 (height, width).
    """
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    for _ in range(octaves):
        if cell < 1.0:
            break
        cell_x = cell * stretch
        rows, columns = math.ceil(height / cell) + 2, math.ceil(width / cell_x) + 2
        grid = rng.standard_normal((rows, columns), dtype=np.float32)
        size = (max(math.ceil(columns * cell_x), width), max(math.ceil(rows * cell), height))
        kind = cv2.INTER_CUBIC if cell > 4 else cv2.INTER_LINEAR
        total += weight * cv2.resize(grid, size, interpolation=kind)[:height, :width]
        cell, weight = cell / 2.0, weight * 0.6
    return total / float(total.std() + 1e-6)


def finish(image: Array) -> Array:
    """Round and clip to uint8."""
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def flat(height: int, width: int, colour: Colour) -> Array:
    """Image of one colour, float32 (height, width, 3)."""
    return np.full((height, width, 3), colour, np.float32)


def vary(rng: np.random.Generator, colour: Sequence[float] | Array, amount: float) -> Colour:
    """Change brightness and hue of a colour a little."""
    values = np.asarray(colour) * (
        1 + amount * rng.standard_normal()
    ) + 22 * amount * rng.standard_normal(3)
    r, g, b = np.clip(values, 4, 250)
    return float(r), float(g), float(b)


def texels(metres: float, texel: float = TEXEL) -> int:
    """Texels for a length in metres, at least 4."""
    return max(4, round(metres / texel))


def plaster(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Painted plaster with stains, trowel marks, speckles and cracks."""
    image = flat(height, width, colour)
    image *= 1 + 0.07 * fractal_noise(rng, height, width, 260, 4)[..., None]
    image *= 1 + 0.05 * fractal_noise(rng, height, width, 24, 5)[..., None]
    trowel = np.maximum(fractal_noise(rng, height, width, 14, 4, stretch=5) - 1.0, 0)
    image *= 1 - 0.10 * trowel[..., None]
    worn = np.clip((fractal_noise(rng, height, width, 90, 6) - 1.25) * 6, 0, 1)[..., None]
    image = image * (1 - 0.5 * worn) + 0.5 * worn * np.array((205, 190, 168), np.float32)
    for _ in range(height * width // 2500):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        cv2.circle(image, (x, y), int(rng.integers(1, 4)), vary(rng, colour, 0.22), -1, cv2.LINE_AA)
    for _ in range(height * width // 70000):
        steps = np.cumsum(
            rng.normal(0, 7, (int(rng.integers(6, 22)), 2)) + rng.normal(0, 5, 2), axis=0
        )
        points = np.round(steps + rng.random(2) * (width, height)).astype(np.int32)
        cv2.polylines(image, [points], False, tuple(0.6 * c for c in colour), 1, cv2.LINE_AA)
    return finish(image)


def leafy_wallpaper(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Wallpaper with scattered leaves and berries of many shapes; no motif repeats."""
    image = flat(height, width, colour)
    image *= 1 + 0.05 * fractal_noise(rng, height, width, 120, 6)[..., None]
    palette = [
        (74, 98, 70),
        (118, 132, 84),
        (160, 120, 70),
        (52, 82, 96),
        (150, 78, 62),
        (196, 170, 110),
    ]
    for _ in range(height * width // 2200):
        centre = rng.random(2) * (width, height)
        length, angle = rng.uniform(12, 60), rng.uniform(0, 2 * math.pi)
        slim, bend = rng.uniform(0.18, 0.42), rng.normal(0, 0.25)
        s = np.linspace(0, 1, 9)
        half = slim * np.sin(math.pi * s ** rng.uniform(0.6, 1.3))
        spine = np.stack([s - 0.5, bend * (s - 0.5) ** 2], axis=1)
        outline = np.concatenate(
            [spine + np.stack([0 * s, half], 1), (spine - np.stack([0 * s, half], 1))[::-1]]
        )
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        to_texels = turn.T * length * 16  # cv2 takes sixteenths of a texel
        edge, vein = (
            np.round(p @ to_texels + centre * 16).astype(np.int32) for p in (outline, spine)
        )
        tone = vary(rng, palette[int(rng.integers(len(palette)))], 0.12)
        cv2.fillPoly(image, [edge], tone, cv2.LINE_AA, 4)
        cv2.polylines(image, [vein], False, tuple(0.7 * c for c in tone), 1, cv2.LINE_AA, 4)
        if rng.random() < 0.3:
            berry = tuple(np.round(centre + rng.normal(0, 20, 2)).astype(int).tolist())
            cv2.circle(
                image,
                berry,
                int(rng.integers(2, 6)),
                vary(rng, (150, 50, 44), 0.15),
                -1,
                cv2.LINE_AA,
            )
    image *= 1 + 0.05 * fractal_noise(rng, height, width, 8, 3)[..., None]
    return finish(image)


def bricks(
    rng: np.random.Generator, height: int, width: int, colour: Colour, texel: float = TEXEL
) -> Array:
    """Brickwork: every brick has its own size, tilt, colour and wear."""
    image = flat(height, width, (172, 164, 152)) * (
        1 + 0.08 * fractal_noise(rng, height, width, 10, 4)[..., None]
    )
    mask = np.zeros((height, width), np.float32)
    paint = flat(height, width, colour)
    y = -rng.uniform(0, 0.05)
    while y < height * texel:
        row = rng.uniform(0.062, 0.080)
        x = -rng.uniform(0, 0.2)
        while x < width * texel:
            length = rng.choice((0.11, 0.21, 0.21, 0.23)) * rng.uniform(0.9, 1.1)
            corners = np.array([[x, y], [x + length, y], [x + length, y + row], [x, y + row]])
            corners += np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * 0.006 + rng.normal(
                0, 0.0016, (4, 2)
            )
            polygon = np.round(corners / texel * 16).astype(np.int32)
            tone = vary(rng, (88, 70, 66) if rng.random() < 0.12 else colour, 0.13)
            cv2.fillPoly(paint, [polygon], tone, cv2.LINE_8, 4)
            cv2.fillPoly(mask, [polygon], 1.0, cv2.LINE_AA, 4)
            x += length
        y += row
    paint *= 1 + 0.11 * fractal_noise(rng, height, width, 16, 5)[..., None]
    paint *= 1 - 0.35 * np.clip(fractal_noise(rng, height, width, 5, 3) - 1.4, 0, 1)[..., None]
    wear = np.clip(
        mask - 0.35 * np.clip(fractal_noise(rng, height, width, 12, 4) - 1.0, 0, 2), 0, 1
    )[..., None]
    image = image * (1 - wear) + paint * wear
    return finish(image * (1 + 0.06 * fractal_noise(rng, height, width, 300, 3)[..., None]))


def wood(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Wood with the grain along the columns: rings bent around knots, pores and stains."""
    y = np.mgrid[0:height, 0:width][0].astype(np.float32) + 7 * fractal_noise(
        rng, height, width, 60, 3, stretch=8
    )
    dark = np.zeros((height, width), np.float32)
    for _ in range(max(1, height * width // 90000)):
        cx, cy, size = rng.random() * width, rng.random() * height, rng.uniform(4, 11)
        x0, y0 = max(0, int(cx - 10 * size)), max(0, int(cy - 5 * size))
        window = np.s_[y0 : int(cy + 5 * size), x0 : int(cx + 10 * size)]
        rows, columns = np.ogrid[window]
        rows, columns = (
            rows[: height - y0] - np.float32(cy),
            columns[:, : width - x0] - np.float32(cx),
        )
        near = np.exp(-((columns / (4 * size)) ** 2)) * np.exp(-((rows / (1.6 * size)) ** 2))
        y[window] += 3.0 * size * near * np.sign(rows)
        dark[window] += np.exp(-((columns / size) ** 2)) * np.exp(-((rows / (0.7 * size)) ** 2))
    rings = np.sin(
        y * 2 * math.pi / 17 + 1.5 * fractal_noise(rng, height, width, 40, 3, stretch=10)
    )
    grain = fractal_noise(rng, height, width, 4, 2, stretch=24)
    image = (
        flat(height, width, colour)
        * (1 + 0.055 * rings + 0.06 * grain - 0.5 * np.clip(dark, 0, 1))[..., None]
    )
    pores = np.clip(fractal_noise(rng, height, width, 2, 1, stretch=14) - 1.6, 0, 2)
    image *= (
        1 - 0.16 * pores[..., None] + 0.05 * fractal_noise(rng, height, width, 120, 4)[..., None]
    )
    return finish(image)


def painted(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Painted wood: faint grain, brush strokes, and chips where the wood shows."""
    grain = wood(rng, height, width, (150, 116, 80)).astype(np.float32)
    image = flat(height, width, colour) * (0.88 + 0.12 * grain / grain.mean())
    image *= 1 + 0.025 * fractal_noise(rng, height, width, 5, 3, stretch=20)[..., None]
    chips = np.clip((fractal_noise(rng, height, width, 26, 5, stretch=2) - 2.0) * 8, 0, 1)[
        ..., None
    ]
    return finish(image * (1 - chips) + grain * chips)


def planks(
    rng: np.random.Generator, height: int, width: int, colour: Colour, texel: float = TEXEL
) -> Array:
    """Floor boards of random width, length, tone and grain."""
    image = np.zeros((height, width, 3), np.float32)
    # One large sheet of grain, from which each board takes a piece at a random place.
    sheet = wood(rng, 520, 1500, (128, 128, 128)).astype(np.float32) / 128.0
    y = 0
    while y < height:
        board = min(int(rng.uniform(0.09, 0.15) / texel), height - y)
        x = -int(rng.uniform(0, 1.2) / texel)
        while x < width:
            length = min(int(rng.uniform(0.7, 1.9) / texel), 1400)
            x0, x1 = max(x, 0), min(x + length, width)
            if x1 > x0:
                sy = int(rng.integers(sheet.shape[0] - board + 1))
                sx = int(rng.integers(sheet.shape[1] - (x1 - x0) + 1))
                piece = sheet[sy : sy + board, sx : sx + x1 - x0]
                piece = piece[:: int(rng.choice((-1, 1))), :: int(rng.choice((-1, 1)))]
                image[y : y + board, x0:x1] = piece * np.array(vary(rng, colour, 0.11), np.float32)
                image[y : y + 1, x0:x1] *= 0.45
                image[y : y + board, x0 : x0 + 1] *= 0.45
                for nail in (x0 + 7, x1 - 8):
                    for side in (y + board // 4, y + 3 * board // 4):
                        if rng.random() < 0.8:
                            cv2.circle(image, (nail, side), 1, (52.0, 44.0, 38.0), -1, cv2.LINE_AA)
            x += length
        y += board
    image *= 1 + 0.06 * fractal_noise(rng, height, width, 200, 5)[..., None]
    for _ in range(height * width // 30000):
        p, d = rng.random(2) * (width, height), rng.normal(0, 26, 2)
        start, end = (tuple(np.round(q).astype(int).tolist()) for q in (p, p + d))
        cv2.line(image, start, end, vary(rng, (70, 52, 36), 0.1), 1, cv2.LINE_AA)
    return finish(image)


def terrazzo(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Stone with angular flecks of many colours."""
    image = flat(height, width, colour) * (
        1 + 0.05 * fractal_noise(rng, height, width, 20, 5)[..., None]
    )
    palette = [
        (60, 58, 60),
        (160, 84, 60),
        (206, 160, 92),
        (92, 120, 112),
        (236, 232, 222),
        (112, 70, 78),
    ]
    for _ in range(height * width // 130):
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(4, 8))))
        radius = rng.gamma(2.2, 1.6) * rng.uniform(0.6, 1.2, angles.size)
        centre = rng.random(2) * (width, height)
        points = centre + np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
        tone = vary(rng, palette[int(rng.integers(len(palette)))], 0.1)
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], tone, cv2.LINE_AA, 4)
    return finish(image)


def fabric(rng: np.random.Generator, height: int, width: int, colour: Colour) -> Array:
    """Woven cloth with stripes of random widths and colours in both directions."""
    image = flat(height, width, colour)
    for axis, length in ((0, height), (1, width)):
        at = 0
        while at < length:
            step = int(rng.integers(2, 36))
            tint = np.array(vary(rng, colour, 0.22) if rng.random() < 0.5 else colour, np.float32)
            strip = image[at : at + step] if axis == 0 else image[:, at : at + step]
            strip[:] = 0.55 * strip + 0.45 * tint
            at += step
    image *= 1 + 0.10 * fractal_noise(rng, height, width, 3, 2, stretch=3)[..., None]
    image *= 1 + 0.10 * fractal_noise(rng, width, height, 3, 2, stretch=3).T[..., None]
    return finish(image * (1 + 0.08 * fractal_noise(rng, height, width, 80, 5)[..., None]))


def rug(rng: np.random.Generator, height: int, width: int) -> Array:
    """Carpet with nested borders and hand-drawn looking motifs, none of them twice."""
    palette = [
        (126, 36, 34),
        (30, 44, 80),
        (214, 190, 148),
        (60, 88, 74),
        (176, 110, 52),
        (86, 30, 48),
    ]
    image = flat(height, width, palette[0])
    at = 0
    for band in range(7):
        cv2.rectangle(
            image,
            (at, at),
            (width - 1 - at, height - 1 - at),
            vary(rng, palette[band % 6], 0.08),
            -1,
        )
        at += int(rng.integers(10, 34))
    for _ in range(height * width // 700):
        x, y = rng.random() * width, rng.random() * height
        size, angle = rng.gamma(3, 3.2) + 2, rng.uniform(0, 2 * math.pi)
        corners = int(rng.integers(3, 9))
        turn = angle + np.arange(corners) * 2 * math.pi / corners
        radius = (
            size
            * (1 + rng.uniform(0, 0.5) * (np.arange(corners) % 2))
            * rng.uniform(0.8, 1.2, corners)
        )
        for shrink in (1.0, 0.6, 0.3):
            points = np.stack(
                [x + shrink * radius * np.cos(turn), y + shrink * radius * np.sin(turn)], axis=1
            )
            tone = vary(rng, palette[int(rng.integers(6))], 0.1)
            cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], tone, cv2.LINE_AA, 4)
    image *= 1 + 0.10 * fractal_noise(rng, height, width, 4, 3)[..., None]
    return finish(image * (1 + 0.06 * fractal_noise(rng, height, width, 150, 4)[..., None]))


def mosaic(rng: np.random.Generator, height: int, width: int, tile: float = 13.0) -> Array:
    """Small hand-laid tiles in random colours with grout between them."""
    image = flat(height, width, (196, 190, 178)) * (
        1 + 0.05 * fractal_noise(rng, height, width, 12, 4)[..., None]
    )
    palette = [
        (38, 88, 104),
        (80, 138, 140),
        (214, 206, 182),
        (190, 132, 66),
        (60, 62, 88),
        (140, 168, 150),
    ]
    field_noise = fractal_noise(rng, height, width, 140, 3)
    for row in range(math.ceil(height / tile)):
        for column in range(math.ceil(width / tile)):
            x, y = (column + 0.5) * tile, (row + 0.5) * tile
            level = float(field_noise[min(int(y), height - 1), min(int(x), width - 1)])
            index = int(np.clip(3 + 1.5 * level + rng.normal(0, 1.2), 0, 5))
            half = tile / 2 - 1.0
            points = (
                np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
                + rng.normal(0, 0.7, (4, 2))
                + (x, y)
            )
            cv2.fillPoly(
                image,
                [np.round(points * 16).astype(np.int32)],
                vary(rng, palette[index], 0.13),
                cv2.LINE_AA,
                4,
            )
    return finish(image * (1 + 0.04 * fractal_noise(rng, height, width, 5, 3)[..., None]))


def _write(
    rng: np.random.Generator, image: Array, box: tuple[int, int, int, int], size: int, ink: Colour
) -> None:
    """Fill ``box`` (x0, y0, x1, y1) with lines of invented letters ``size`` texels high."""
    x0, y0, x1, y1 = box
    line = y0
    while line + size <= y1:
        x = x0
        end = x1 - (int(rng.integers(0, max(1, (x1 - x0) // 3))) if rng.random() < 0.25 else 0)
        while x + size <= end:
            if rng.random() < 0.16:  # gap between words
                x += size // 2 + 1
                continue
            wide = max(2, int(size * rng.uniform(0.4, 0.75)))
            knots = rng.random((int(rng.integers(3, 6)), 2)) * (wide, size) + (x, line)
            cv2.polylines(
                image,
                [np.round(knots * 16).astype(np.int32)],
                False,
                ink,
                max(1, size // 7),
                cv2.LINE_AA,
                4,
            )
            x += wide + max(1, size // 5)
        line += round(size * 1.6)


def poster(rng: np.random.Generator, height: int, width: int) -> Array:
    """Printed sheet with coloured shapes, a headline and columns of invented letters."""
    paper = vary(rng, (232, 222, 200), 0.04)
    image = flat(height, width, paper)
    top = int(height * rng.uniform(0.35, 0.5))
    margin = max(3, width // 24)
    cv2.rectangle(
        image,
        (margin, margin),
        (width - margin, top),
        vary(rng, rng.uniform(30, 170, 3) * 0.6 + 50, 0.1),
        -1,
    )
    for _ in range(26):
        centre = (int(rng.integers(margin, width - margin)), int(rng.integers(margin, top)))
        axes = (int(rng.integers(3, max(4, width // 7))), int(rng.integers(3, max(4, width // 9))))
        tone = vary(rng, rng.uniform(10, 240, 3) * 0.65 + 45, 0.1)
        cv2.ellipse(
            image,
            centre,
            axes,
            float(rng.uniform(0, 180)),
            0,
            float(rng.uniform(120, 360)),
            tone,
            -1,
            cv2.LINE_AA,
        )
    image[top:] = paper
    image[:, :margin] = paper
    image[:, width - margin :] = paper
    head = max(6, height // 20)
    _write(
        rng,
        image,
        (margin, top + head // 3, width - margin, top + round(1.5 * head)),
        head,
        (40.0, 30.0, 34.0),
    )
    small = max(5, height // 42)
    half = width // 2
    for left, right in ((margin, half - margin // 2), (half + margin // 2, width - margin)):
        _write(
            rng, image, (left, top + 2 * head, right, height - margin), small, (60.0, 56.0, 56.0)
        )
    return finish(image * (1 + 0.03 * fractal_noise(rng, height, width, 30, 5)[..., None]))


def book_spine(rng: np.random.Generator, height: int, width: int) -> Array:
    """Back of a book: cloth, bands and a title written along it."""
    palette = [
        (120, 40, 36),
        (36, 64, 92),
        (52, 84, 58),
        (196, 172, 124),
        (70, 58, 74),
        (168, 104, 48),
        (210, 204, 190),
    ]
    base = vary(rng, palette[int(rng.integers(len(palette)))], 0.18)
    image = flat(height, width, base)
    ink: Colour = (232.0, 214.0, 150.0) if sum(base) < 380 else (44.0, 36.0, 40.0)
    for _ in range(int(rng.integers(1, 5))):
        y, thick = int(rng.integers(height)), int(rng.integers(1, 7))
        cv2.rectangle(image, (0, y), (width, y + thick), vary(rng, ink, 0.2), -1)
    along = np.ascontiguousarray(np.rot90(image))
    size = max(5, int(width * rng.uniform(0.35, 0.6)))
    start = int(rng.integers(2, max(3, height // 4)))
    offset = (width - size) // 2
    _write(rng, along, (start, offset, height - height // 6, offset + size), size, ink)
    image = np.rot90(along, -1) * (1 + 0.06 * fractal_noise(rng, height, width, 12, 4)[..., None])
    return finish(image)


def globe_map(rng: np.random.Generator, height: int, width: int) -> Array:
    """Invented continents with coast lines, relief and a graticule."""
    land = fractal_noise(rng, height, width, height / 2.5, 7)
    relief = fractal_noise(rng, height, width, 20, 5)
    sea = (
        np.array((60, 104, 140), np.float32)
        * (1 + 0.12 * relief + 0.15 * np.clip(land, -2, 0))[..., None]
    )
    tones = (np.array((120, 140, 80), np.float32), np.array((196, 168, 112), np.float32))
    mix = np.clip(0.5 + 0.5 * fractal_noise(rng, height, width, 60, 4), 0, 1)[..., None]
    soil = (tones[0] * mix + tones[1] * (1 - mix)) * (1 + 0.14 * relief)[..., None]
    inside = 1 / (1 + np.exp(-np.clip((land - 0.25) * 60, -30, 30)))[..., None]
    image = sea * (1 - inside) + soil * inside
    image *= 1 - 0.6 * np.exp(-(((land - 0.25) / 0.03) ** 2))[..., None]
    for k in range(1, 12):
        cv2.line(image, (k * width // 12, 0), (k * width // 12, height), (70.0, 62.0, 56.0), 1)
        if k < 6:
            cv2.line(image, (0, k * height // 6), (width, k * height // 6), (70.0, 62.0, 56.0), 1)
    return finish(image)


def cardboard(rng: np.random.Generator, height: int, width: int) -> Array:
    """Side of a carton with fibres, tape and a printed label."""
    image = flat(height, width, vary(rng, (176, 138, 96), 0.04))
    image *= 1 + 0.06 * fractal_noise(rng, height, width, 3, 2, stretch=6)[..., None]
    y = int(height * rng.uniform(0.4, 0.6))
    image[y : y + height // 12] = (
        image[y : y + height // 12] * 0.6 + np.array((200, 184, 140), np.float32) * 0.4
    )
    w, h = int(width * rng.uniform(0.3, 0.5)), int(height * rng.uniform(0.25, 0.35))
    x0, y0 = int(rng.integers(4, width - w - 4)), int(rng.integers(4, height - h - 4))
    cv2.rectangle(image, (x0, y0), (x0 + w, y0 + h), (232.0, 230.0, 224.0), -1)
    _write(rng, image, (x0 + 4, y0 + 4, x0 + w - 3, y0 + h - 2), max(6, h // 6), (36.0, 34.0, 40.0))
    _write(rng, image, (6, height - 26, width // 2, height - 4), 16, (70.0, 44.0, 34.0))
    return finish(image * (1 + 0.07 * fractal_noise(rng, height, width, 60, 5)[..., None]))


def wrap(image: Array) -> Array:
    """Cut an eighth off the width and fade it in at the other end, so that the sides meet."""
    pad = image.shape[1] // 8
    result = image[:, pad:].astype(np.float32)
    ramp = np.linspace(0, 1, pad, dtype=np.float32)[None, :, None]
    result[:, -pad:] = (1 - ramp) * result[:, -pad:] + ramp * image[:, :pad]
    return finish(result)


def tint(photo: Array, dark: Colour, bright: Colour) -> Array:
    """Colour a grey photograph by interpolating between two colours."""
    grey = photo.astype(np.float32).mean(axis=2, keepdims=True) / 255.0
    return finish(np.array(dark, np.float32) * (1 - grey) + np.array(bright, np.float32) * grey)
