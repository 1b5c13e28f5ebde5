"""Pixel frames: integer = pixel centre, so that an image begins at -0.5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

Points = TypeVar("Points", "np.ndarray", "torch.Tensor")


def resize_points(xy: Points, scale: Any) -> Points:
    """Points (..., 2) after an image is resized by a factor or one an axis: its corners stay."""
    return (xy + 0.5) * scale - 0.5
