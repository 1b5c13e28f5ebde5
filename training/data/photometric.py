"""Changes of colour and sharpness, after the recipes of ``training.md`` §3.

``dark`` is the recipe of the published trainings: darker, flatter, blurred. ``mobile`` is the one
they define and do not use: what the camera of a telephone does. Images are (3, H, W) float32 in
[0, 1]. A sample depends on its seed alone, so strengths are drawn from the generator that is handed
in, and kornia applies them; its augmentations, which draw from a generator of their own, have no
shift of the value, no glare and no noise that grows with the light.

The published numbers can leave an image all but black, one in twenty of those that go through
``dark``. There is nothing to learn from it: such an image stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import cv2
import kornia
import numpy as np
import torch

Style = Literal["none", "dark", "mobile"]

_LEAST_CONTRAST = 0.02  # standard deviation of the values of an image in which something is seen


def change(image: torch.Tensor, style: Style, rng: np.random.Generator) -> torch.Tensor:
    """One draw of a recipe.

    Args:
        image: (3, H, W) float32 in [0, 1]; not modified.
        style: name of the recipe.
        rng: source of everything random.

    Returns:
        (3, H, W) float32 in [0, 1].
    """
    if style == "none" or (style == "dark" and rng.random() >= 0.75):
        return image
    before = image
    for probability, step, ranges in RECIPES[style]:
        if rng.random() < probability:
            strengths = {name: _draw(low, high, rng) for name, (low, high) in ranges.items()}
            image = step(image, rng, **strengths).clamp(0, 1)
    return image if float(image.std()) >= _LEAST_CONTRAST else before


def _draw(low: float, high: float, rng: np.random.Generator) -> float:
    if isinstance(low, int) and isinstance(high, int):
        return int(rng.integers(low, high + 1))
    return rng.uniform(low, high)


def brightness_contrast(
    image: torch.Tensor, _: Any, *, brightness: float, contrast: float
) -> torch.Tensor:
    """(1 + contrast) image + brightness * (largest value of the image).

    For a photograph with highlights that is the usual shift by a share of white; what is dark
    already does not become black altogether.
    """
    return image * (1 + contrast) + brightness * image.amax()


def value_shift(image: torch.Tensor, _: Any, *, shift: float) -> torch.Tensor:
    """Add to the value of HSV; hue and saturation stay."""
    value = image.amax(0, keepdim=True)
    factor = (value + shift).clamp(0, 1) / value.clamp(min=1e-6)
    return image * factor


def blur(image: torch.Tensor, _: Any, *, reach: int) -> torch.Tensor:
    """Mean over all pixels at most ``reach`` away along both axes."""
    size = _size(image, reach)
    return kornia.filters.box_blur(image[None], size, border_type="reflect", separable=True)[0]


def motion_blur(
    image: torch.Tensor, _: Any, *, reach: int, angle_deg: float, direction: float
) -> torch.Tensor:
    """Mean along a line; ``direction`` in [-1, 1] says which of its ends weighs more."""
    size = _size(image, reach)
    return kornia.filters.motion_blur(image[None], size, angle_deg, direction, "reflect")[0]


def _size(image: torch.Tensor, reach: int) -> int:
    """Pixels of a kernel, at most as many as the image can have."""
    return 2 * min(reach, (min(image.shape[1:]) - 1) // 2) + 1


def gamma(image: torch.Tensor, _: Any, *, exponent: float) -> torch.Tensor:
    """``image`` to the power of ``exponent``: below 1 it becomes brighter."""
    return kornia.enhance.adjust_gamma(image, exponent)


def colour_jitter(
    image: torch.Tensor,
    _: Any,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue_deg: float,
) -> torch.Tensor:
    """As ``kornia.augmentation.ColorJitter``: three factors, and a turn of the hue."""
    enhance = kornia.enhance
    image = enhance.adjust_brightness_accumulative(image, brightness)
    image = enhance.adjust_contrast_with_mean_subtraction(image, contrast)
    image = enhance.adjust_saturation_with_gray_subtraction(image, saturation)
    return enhance.adjust_hue(image, float(np.deg2rad(hue_deg)))


def jpeg(image: torch.Tensor, _: Any, *, quality: int) -> torch.Tensor:
    """Through the codec itself and back: kornia's imitation of it takes many times as long."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    _, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(decoded)).permute(2, 0, 1).float() / 255


def sensor_noise(
    image: torch.Tensor, rng: np.random.Generator, *, intensity: float, colour: float
) -> torch.Tensor:
    """Shot noise of lightness and of single channels, by their standard deviations on white."""
    shape = tuple(image.shape)
    level = image.mean(0, keepdim=True).clamp(0, 1).sqrt()  # photons arrive by Poisson's law
    light = torch.from_numpy(rng.standard_normal(shape[1:], dtype=np.float32))
    channels = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return image + level * (intensity * light + colour * channels)


def rain(image: torch.Tensor, rng: np.random.Generator, *, slant: float) -> torch.Tensor:
    """Bright streaks of one slant (columns per row), one in 1000 pixels, and less light."""
    height, width = image.shape[1:]
    length, drops = max(4, height // 30), height * width // 1000
    streaks = np.zeros((height, width), np.uint8)
    for x, y in zip(rng.integers(0, width, drops), rng.integers(0, height, drops), strict=True):
        end = (int(x + slant * length), int(y + length))
        cv2.line(streaks, (int(x), int(y)), end, 255, 1, cv2.LINE_AA)
    shine = torch.from_numpy(cv2.blur(streaks, (3, 3)).astype(np.float32) / 255)
    return image * 0.8 * (1 - shine) + 0.8 * shine


def sun_flare(image: torch.Tensor, _: Any, *, x: float, y: float, radius: float) -> torch.Tensor:
    """Glare around a point; all are shares of width, height, and long side."""
    height, width = image.shape[1:]
    across = torch.arange(width) - x * width
    down = torch.arange(height)[:, None] - y * height
    glare = torch.exp(-torch.hypot(across, down) / (radius * max(height, width)))
    return image + glare * (1 - image)


Step = Callable[..., torch.Tensor]
Ranges = dict[str, tuple[float, float]]

_ALL_LINES: Ranges = {"angle_deg": (0.0, 360.0), "direction": (-1.0, 1.0)}
_TWENTY_PERCENT: Ranges = dict.fromkeys(("brightness", "contrast", "saturation"), (0.8, 1.2))

#: Probability, step and the ranges of its strengths (whole numbers: both ends included), in order.
#: The strengths that training.md does not name (JPEG, noise, rain, flare) are ours.
RECIPES: dict[str, tuple[tuple[float, Step, Ranges], ...]] = {
    "dark": (
        (0.75, brightness_contrast, {"brightness": (-0.6, 0.0), "contrast": (-0.5, 0.3)}),
        (0.1, blur, {"reach": (1, 4)}),
        (0.2, motion_blur, {"reach": (1, 12), **_ALL_LINES}),
        (0.1, gamma, {"exponent": (0.15, 0.65)}),
        (0.1, value_shift, {"shift": (-100 / 255, -40 / 255)}),
    ),
    "mobile": (
        (0.25, motion_blur, {"reach": (1, 3), **_ALL_LINES}),
        (0.5, colour_jitter, {**_TWENTY_PERCENT, "hue_deg": (-72.0, 72.0)}),
        (0.1, rain, {"slant": (-0.3, 0.3)}),
        (0.1, sun_flare, {"x": (0.0, 1.0), "y": (0.0, 0.5), "radius": (0.05, 0.2)}),
        (0.25, jpeg, {"quality": (30, 95)}),
        (0.25, sensor_noise, {"intensity": (0.01, 0.08), "colour": (0.005, 0.03)}),
    ),
}
