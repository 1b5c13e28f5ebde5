"""Changes of colour and sharpness, after the recipes of ``training.md`` §3.

``dark`` is the recipe of the published trainings: darker, flatter, blurred. ``mobile`` is the one
they define and do not use: what the camera of a telephone does. Images are (3, H, W) float32 in
[0, 1]; strengths are drawn from the generator that is handed in, kornia's own are not used.

The published numbers can leave an image all but black, one in twenty of those that go through
``dark``. There is nothing to learn from it: such an image stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch

Style = Literal["none", "dark", "mobile"]
STYLES: tuple[str, ...] = get_args(Style)

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
    for probability, step in _RECIPES[style]:
        if rng.random() < probability:
            image = step(image, rng).clamp(0, 1)
    return image if float(image.std()) >= _LEAST_CONTRAST else before


def brightness_contrast(image: torch.Tensor, *, brightness: float, contrast: float) -> torch.Tensor:
    """(1 + contrast) image + brightness * (largest value of the image).

    For a photograph with highlights that is the usual shift by a share of white; what is dark
    already does not become black altogether.
    """
    return image * (1 + contrast) + brightness * image.amax()


def value_shift(image: torch.Tensor, shift: float) -> torch.Tensor:
    """Add to the value of HSV; hue and saturation stay."""
    value = image.amax(0, keepdim=True)
    factor = (value + shift).clamp(0, 1) / value.clamp(min=1e-6)
    return image * factor


def blur(image: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over a square of ``size`` pixels."""
    import kornia

    return kornia.filters.box_blur(image[None], size, border_type="reflect", separable=True)[0]


def motion_blur(
    image: torch.Tensor, *, size: int, angle_deg: float, direction: float
) -> torch.Tensor:
    """Mean along a line.

    Args:
        image: (3, H, W).
        size: length of the line in pixels, odd.
        angle_deg: of the line.
        direction: -1 to 1, which end of the line weighs more; 0 for neither.
    """
    import kornia

    kernel = kornia.filters.get_motion_kernel2d(
        size, torch.tensor([float(angle_deg)]), torch.tensor([float(direction)])
    )
    return kornia.filters.filter2d(image[None], kernel, border_type="reflect")[0]


def gamma(image: torch.Tensor, exponent: float) -> torch.Tensor:
    """``image`` to the power of ``exponent``: below 1 it becomes brighter."""
    return image.clamp(min=0).pow(exponent)


def colour_jitter(
    image: torch.Tensor, *, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """Factors of brightness, contrast about the mean and saturation, and a turn of the hue.

    Args:
        image: (3, H, W).
        brightness: factor.
        contrast: factor.
        saturation: factor.
        hue: turn as a share of the full circle.
    """
    import kornia

    image = (image * brightness).clamp(0, 1)
    mean = kornia.color.rgb_to_grayscale(image).mean()
    image = (mean + (image - mean) * contrast).clamp(0, 1)
    hsv = kornia.color.rgb_to_hsv(image)
    turned = torch.remainder(hsv[0] + 2 * np.pi * hue, 2 * np.pi)
    return kornia.color.hsv_to_rgb(torch.stack([turned, (hsv[1] * saturation).clamp(0, 1), hsv[2]]))


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Through the codec itself and back."""
    import cv2

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    _, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(decoded)).permute(2, 0, 1).float() / 255


def sensor_noise(
    image: torch.Tensor, rng: np.random.Generator, *, intensity: float, colour: float
) -> torch.Tensor:
    """Shot noise of the lightness, the same in all channels, and noise of the single channels.

    Args:
        image: (3, H, W).
        rng: source of the noise.
        intensity: standard deviation on white.
        colour: standard deviation of a channel on white.
    """
    shape = tuple(image.shape)
    level = image.mean(0, keepdim=True).clamp(0, 1).sqrt()  # photons arrive by Poisson's law
    light = torch.from_numpy(rng.standard_normal(shape[1:], dtype=np.float32))
    channels = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return image + level * (intensity * light + colour * channels)


def rain(
    image: torch.Tensor, rng: np.random.Generator, *, drops: int, length: int, slant: float
) -> torch.Tensor:
    """Bright streaks of one slant, and less light.

    Args:
        image: (3, H, W).
        rng: source of their places.
        drops: number of streaks.
        length: of a streak in pixels.
        slant: columns per row.
    """
    import cv2

    height, width = image.shape[1:]
    streaks = np.zeros((height, width), np.uint8)
    for x, y in zip(rng.integers(0, width, drops), rng.integers(0, height, drops), strict=True):
        end = (int(x + slant * length), int(y + length))
        cv2.line(streaks, (int(x), int(y)), end, 255, 1, cv2.LINE_AA)
    shine = torch.from_numpy(cv2.blur(streaks, (3, 3)).astype(np.float32) / 255)
    return image * 0.8 * (1 - shine) + 0.8 * shine


def sun_flare(image: torch.Tensor, *, x: float, y: float, radius: float) -> torch.Tensor:
    """Glare around a point.

    Args:
        image: (3, H, W).
        x: column of the middle in pixels.
        y: row of the middle in pixels.
        radius: in pixels, where the glare has fallen to 1/e.
    """
    height, width = image.shape[1:]
    squared = (torch.arange(width) - x) ** 2 + (torch.arange(height)[:, None] - y) ** 2
    glare = torch.exp(-squared.sqrt() / radius)
    return image + glare * (1 - image)


Step = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def _odd(rng: np.random.Generator, low: int, high: int, image: torch.Tensor) -> int:
    """An odd number of pixels in [low, high], one that a kernel on the image can have."""
    high = min(high, min(image.shape[1:]) - 1)
    return int(rng.integers(low // 2, max(low, high + high % 2 - 1) // 2 + 1)) * 2 + 1


def _draw_darker(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return brightness_contrast(
        image, brightness=rng.uniform(-0.6, 0.0), contrast=rng.uniform(-0.5, 0.3)
    )


def _draw_blur(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return blur(image, _odd(rng, 3, 9, image))


def _draw_motion_blur(longest: int) -> Step:
    def step(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return motion_blur(
            image,
            size=_odd(rng, 3, longest, image),
            angle_deg=rng.uniform(0, 360),
            direction=rng.uniform(-1, 1),
        )

    return step


def _draw_gamma(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return gamma(image, rng.uniform(0.15, 0.65))


def _draw_value_shift(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return value_shift(image, rng.uniform(-100, -40) / 255)


def _draw_jitter(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    return colour_jitter(
        image,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=rng.uniform(-0.2, 0.2),
    )


def _draw_jpeg(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return jpeg(image, int(rng.integers(30, 96)))


def _draw_noise(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return sensor_noise(
        image, rng, intensity=rng.uniform(0.01, 0.08), colour=rng.uniform(0.005, 0.03)
    )


def _draw_rain(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    height, width = image.shape[1:]
    return rain(
        image,
        rng,
        drops=height * width // 1000,
        length=max(4, height // 30),
        slant=rng.uniform(-0.3, 0.3),
    )


def _draw_flare(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    height, width = image.shape[1:]
    return sun_flare(
        image,
        x=rng.uniform(0, width),
        y=rng.uniform(0, height / 2),
        radius=rng.uniform(0.05, 0.2) * max(height, width),
    )


# Probability and step, in order. Rain and flares are in kornia not at all or with generators of
# their own; the strengths that training.md does not name (JPEG, noise, rain, flare) are ours.
_RECIPES: dict[str, tuple[tuple[float, Step], ...]] = {
    "dark": (
        (0.75, _draw_darker),
        (0.1, _draw_blur),
        (0.2, _draw_motion_blur(25)),
        (0.1, _draw_gamma),
        (0.1, _draw_value_shift),
    ),
    "mobile": (
        (0.25, _draw_motion_blur(7)),
        (0.5, _draw_jitter),
        (0.1, _draw_rain),
        (0.1, _draw_flare),
        (0.25, _draw_jpeg),
        (0.25, _draw_noise),
    ),
}
