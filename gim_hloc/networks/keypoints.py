"""Keypoints from a score map: local maxima and their sub-pixel positions."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch

Subpixel = Literal["quadratic", "soft_argmax", "none"]


class Detection(NamedTuple):
    """Keypoints of one image, strongest first."""

    xy: torch.Tensor  # (N, 2) float32 x, y in pixels, integer = centre
    descriptors: torch.Tensor  # (N, D)
    scores: torch.Tensor  # (N,)


class Detector(Protocol):
    """A network that finds and describes keypoints; it says itself what its scores are."""

    def detect_and_describe(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float,
        radius: int,
        subpixel: Subpixel,
        mask: torch.Tensor | None = None,
    ) -> Detection:
        """Find and describe keypoints.

        Args:
            image: (C, H, W) in [0, 1], of any size.
            max_keypoints: at most so many, the strongest.
            threshold: a score must exceed it.
            radius: of the suppression window, pixels.
            subpixel: see ``refine``; ``none`` leaves whole pixels.
            mask: (H, W) bool, True where keypoints are allowed.
        """
        ...

    def describe_points(self, image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """Descriptors (N, D) at points (N, 2) in pixels, integer = centre, as keypoints have."""
        ...


def select_maxima(
    scores: torch.Tensor,
    *,
    max_keypoints: int,
    threshold: float,
    radius: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Strict local maxima of a score map, strongest first.

    Args:
        scores: (H, W).
        max_keypoints: at most so many.
        threshold: a maximum must exceed it.
        radius: a maximum is above all others in the window of side ``2 * radius + 1``; maxima
            closer to the border than this are dropped.
        mask: (H, W) bool, True where maxima are allowed. It acts after the suppression, so that a
            maximum outside the mask makes no new one beside it, and before the best are chosen.

    Returns:
        (N,) indices into ``scores.flatten()``.
    """
    height, width = scores.shape
    if min(height, width) <= 2 * radius:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    inner = scores[radius:-radius, radius:-radius]
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[radius:-radius, radius:-radius] = (inner == _highest(scores, radius)) & (inner > threshold)
    if mask is not None:
        keep &= mask.to(keep.device)
    index = keep.flatten().nonzero()[:, 0]
    index = index[_strict(scores, index, radius)]
    values = scores.flatten()[index]
    if len(index) > max_keypoints >= 0:
        chosen = torch.topk(values, max_keypoints, sorted=False).indices
        index, values = index[chosen], values[chosen]
    # Raster order decides ties, which keeps the order the same on every device.
    index, raster = index.sort()
    order = values[raster].sort(descending=True, stable=True).indices
    return index[order]


def _highest(scores: torch.Tensor, radius: int) -> torch.Tensor:
    """Maximum of the window around each pixel, without the border of ``radius`` pixels."""
    # Maxima of shifted copies, one axis after the other: pooling a single channel is several times
    # slower on a processor.
    for axis in (0, 1):
        length = scores.shape[axis] - 2 * radius
        highest = scores.narrow(axis, 0, length)
        for shift in range(1, 2 * radius + 1):
            highest = torch.maximum(highest, scores.narrow(axis, shift, length))
        scores = highest
    return scores


def window_indices(radius: int, width: int, device: torch.device) -> torch.Tensor:
    """Offsets ((2r+1)²,) from a pixel's flat index to those of its window, row by row."""
    step = torch.arange(-radius, radius + 1, device=device)
    return (step[:, None] * width + step[None]).flatten()


def _strict(scores: torch.Tensor, index: torch.Tensor, radius: int) -> torch.Tensor:
    """Which maxima have no equal in their window: plateaus are no keypoints."""
    window = scores.flatten()[
        index[:, None] + window_indices(radius, scores.shape[1], scores.device)
    ]
    return (window == scores.flatten()[index][:, None]).sum(1) == 1


def refine(
    scores: torch.Tensor,
    index: torch.Tensor,
    *,
    radius: int,
    method: Subpixel = "quadratic",
) -> torch.Tensor:
    """Sub-pixel positions of maxima. Only the windows of the given maxima are read.

    ``quadratic`` fits a paraboloid to the logits around each maximum (least squares, Gaussian
    weights of one pixel) and takes its top. On photographs with measured poses, epipolar errors
    are a sixth smaller than with ``soft_argmax``, which ALIKED was trained with (its section
    III-B): the soft-argmax is pulled to the middle of its window. docs/performance.md has figures.

    Args:
        scores: (H, W) logits.
        index: (N,) flat indices, at least ``radius`` from the border.
        radius: of the suppression window, pixels.
        method: see above; ``none`` leaves whole pixels.

    Returns:
        (N, 2) float32 x, y in pixels, integer = centre.
    """
    width = scores.shape[1]
    xy = torch.stack([index % width, index.div(width, rounding_mode="floor")], 1).float()
    if method == "none":
        return xy
    reach = radius if method == "soft_argmax" else min(radius, 2)
    window = scores.flatten()[index[:, None] + window_indices(reach, width, scores.device)]
    step = torch.arange(-reach, reach + 1, device=scores.device, dtype=torch.float32)
    dy, dx = (grid.flatten() for grid in torch.meshgrid(step, step, indexing="ij"))
    if method == "soft_argmax":
        weight = ((window.sigmoid() - window.amax(1, keepdim=True).sigmoid()) / 0.1).exp()
        weight = weight / weight.sum(1, keepdim=True)
        return xy + torch.stack([weight @ dx, weight @ dy], 1)
    return xy + _paraboloid_top(window, dx, dy)


def _paraboloid_top(window: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Offsets (N, 2) of the tops of paraboloids through windows (N, P) at dx, dy (P,)."""
    terms = torch.stack([torch.ones_like(dx), dx, dy, dx * dx, dx * dy, dy * dy], 1).double()
    weighted = terms.T * torch.exp(-(dx**2 + dy**2) / 2).double()
    fit = torch.linalg.solve(weighted @ terms, weighted).float()
    # Relative to the maximum: the constant is of no interest and costs digits.
    _, x, y, xx, xy, yy = ((window - window.amax(1, keepdim=True)) @ fit.T).unbind(1)
    # Gradient x + 2 xx u + xy v = 0 and y + xy u + 2 yy v = 0 at the top (u, v).
    determinant = 4 * xx * yy - xy * xy
    top = torch.stack([xy * y - 2 * yy * x, xy * x - 2 * xx * y], 1) / determinant[:, None]
    # A saddle has no top, and a top far off is not this maximum's.
    sound = (determinant > 0) & (xx < 0) & (top.abs().amax(1) <= 1)
    return torch.where(sound[:, None], top, torch.zeros_like(top))
