"""Depth maps of calibrated views: where a pixel lies in another view, what views agree on, normals.

Depth is z along the optical axis in the unit of the poses; maps hold its inverse, in which a plane
is a linear function of the pixel. Pixels are those of the map, hloc's frame (integer = centre).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Pinhole:
    """A camera without distortion, in its place.

    Attributes:
        width: of the map, pixels.
        height: likewise.
        calibration: (3, 3) float64, hloc's frame.
        rotation: (3, 3) world to camera.
        translation: (3,).
    """

    width: int
    height: int
    calibration: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """(3,) centre of projection in the world."""
        centre: np.ndarray = -self.rotation.T @ self.translation
        return centre

    def resized(self, width: int, height: int) -> Pinhole:
        """The camera of the same picture at another size."""
        scale = np.diag([width / self.width, height / self.height, 1.0])
        corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
        calibration = np.linalg.inv(corner) @ scale @ corner @ self.calibration
        return Pinhole(
            width=width,
            height=height,
            calibration=calibration,
            rotation=self.rotation,
            translation=self.translation,
        )

    def project(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 2) and depths (N,) of points (N, 3) of the world."""
        local = xyz @ self.rotation.T + self.translation
        with np.errstate(divide="ignore", invalid="ignore"):
            return (local @ self.calibration.T)[:, :2] / local[:, 2:], local[:, 2]

    def towards(self, other: Pinhole) -> tuple[np.ndarray, np.ndarray]:
        """(3, 3) A and (3,) b: A (x, y, 1) + b / depth is the pixel in ``other``, homogeneous."""
        rotation = other.rotation @ self.rotation.T
        translation = other.translation - rotation @ self.translation
        linear = other.calibration @ rotation @ np.linalg.inv(self.calibration)
        return linear, other.calibration @ translation


def pixels(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(3, H, W) homogeneous pixels of a map."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([x, y, torch.ones_like(x)])


def bases(
    view: Pinhole, others: Sequence[Pinhole], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, 3, H, W) and (S, 3, 1, 1): pixels in the others are the first + inverse depth * second.

    They are homogeneous; the third coordinate is the depth there divided by the depth here.
    """
    ways = [view.towards(other) for other in others]
    linear = torch.from_numpy(np.stack([a for a, _ in ways])).float().to(device)
    shift = torch.from_numpy(np.stack([b for _, b in ways])).float().to(device)
    grid = pixels(view.height, view.width, device)
    return torch.einsum("sij,jhw->sihw", linear, grid), shift[:, :, None, None]


def read_map(values: torch.Tensor, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (S, C, H, W) of maps (S, C, h, w) at pixels (S, 2, H, W), and which are inside."""
    height, width = values.shape[-2:]
    size = xy.new_tensor([width, height])[:, None, None]
    uv = ((2 * xy + 1) / size - 1).movedim(1, -1)
    found = F.grid_sample(values, uv, padding_mode="border", align_corners=False)
    return found, (uv.abs() <= 1).all(-1)


def agreement(
    view: Pinhole,
    inverse: torch.Tensor,
    others: Sequence[tuple[Pinhole, torch.Tensor]],
    *,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels other views agree with, and the mean of what they say.

    Args:
        view: of the map.
        inverse: (H, W) inverse depth; 0 where there is none.
        others: views with their maps of inverse depth.
        tolerance: largest relative difference of depths.

    Returns:
        (H, W) number of views that agree, and inverse depth averaged over them and this one.
    """
    count = torch.zeros_like(inverse)
    total = inverse.clone()
    for other, theirs in others:
        start, shift = bases(view, [other], inverse.device)
        there = (start + inverse * shift)[0]
        ahead = there[2] > 1e-6
        xy = there[:2] / there[2].clamp_min(1e-6)
        found, inside = read_map(theirs[None, None], xy[None])
        known, _ = read_map((theirs > 0).float()[None, None], xy[None])
        here, depth_ratio = found[0, 0], there[2]
        # Depth there of our point over depth that the other view has there.
        same = (here * depth_ratio / inverse.clamp_min(1e-12) - 1).abs() < tolerance
        same &= ahead & inside[0] & (known[0, 0] > 0.999) & (inverse > 0)
        # The other view's point, seen from here.
        linear, move = other.towards(view)
        row = torch.from_numpy(linear[2]).float().to(inverse.device)
        back = row[0] * xy[0] + row[1] * xy[1] + row[2] + here * float(move[2])
        total += torch.where(same, here / back.clamp_min(1e-6), torch.zeros_like(here))
        count += same
    return count, total / (count + 1)


def slopes(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of a map (H, W) a pixel to the right and down: of the two sides, the smaller one."""

    def along(axis: int) -> torch.Tensor:
        step = inverse.diff(dim=axis)
        none = torch.zeros_like(inverse.narrow(axis, 0, 1))
        ahead, behind = torch.cat([step, none], axis), torch.cat([none, step], axis)
        return torch.where(ahead.abs() < behind.abs(), ahead, behind)

    return along(1), along(0)


def normals(view: Pinhole, inverse: torch.Tensor, *, radius: int = 2) -> torch.Tensor:
    """Unit normals (3, H, W) in the camera's frame, towards the camera; 0 where there is no depth.

    Each is that of the plane fitted to the pixels of a window whose depth is like its middle's.
    """
    height, width = inverse.shape
    side = 2 * radius + 1
    window = F.unfold(F.pad(inverse[None, None], (radius,) * 4), side)[0]  # (side^2, H W)
    middle = inverse.reshape(1, -1)
    weight = ((window / middle.clamp_min(1e-12) - 1).abs() < 0.05 * (middle > 0)).float()
    offsets = pixels(side, side, inverse.device).reshape(3, -1) - radius
    dx, dy = offsets[0][:, None], offsets[1][:, None]
    change = (window - middle) * weight
    xx, xy, yy = (weight * dx * dx).sum(0), (weight * dx * dy).sum(0), (weight * dy * dy).sum(0)
    xw, yw = (change * dx).sum(0), (change * dy).sum(0)
    det = (xx * yy - xy * xy).clamp_min(1e-6)
    gx, gy = (yy * xw - xy * yw) / det, (xx * yw - xy * xw) / det
    # A plane n . X = 1 is w = n . K^-1 p: its gradient and value in pixels give K^-T n.
    grid = pixels(height, width, inverse.device).reshape(3, -1)
    plane = torch.stack([gx, gy, middle[0] - gx * grid[0] - gy * grid[1]])
    calibration = torch.from_numpy(view.calibration).float().to(inverse.device)
    normal = -F.normalize(calibration.T @ plane, dim=0) * (middle > 0)
    return normal.reshape(3, height, width)


def median(values: torch.Tensor) -> torch.Tensor:
    """Median of the 3 x 3 pixels around each one of a map (H, W)."""

    def middle(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))

    def three(rows: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length = rows.shape[axis] - 2
        return (
            rows.narrow(axis, 0, length),
            rows.narrow(axis, 1, length),
            rows.narrow(axis, 2, length),
        )

    # Each column sorted: the median is that of the largest low, the middle middle, the least high.
    a, b, c = three(F.pad(values[None, None], (1,) * 4, mode="replicate")[0, 0], 0)
    low, high = torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)
    lows, middles, highs = three(low, 1), three(middle(a, b, c), 1), three(high, 1)
    return middle(
        torch.maximum(torch.maximum(lows[0], lows[1]), lows[2]),
        middle(*middles),
        torch.minimum(torch.minimum(highs[0], highs[1]), highs[2]),
    )


def triangulate(
    view: Pinhole, other: Pinhole, xy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of a view's pixels from their places in another one.

    Args:
        view: whose depth is wanted.
        other: in which the pixels were found.
        xy: (2, H, W) their places, pixels of ``other``.

    Returns:
        (H, W) each: inverse depth, 0 where it is behind a camera; and distance of the place from
        the pixel's epipolar line, pixels.
    """
    start, shift = bases(view, [other], xy.device)
    a, b = start[0], shift[0]
    # (x, y) (a2 + w b2) = (a0, a1) + w (b0, b1): two equations for w.
    along, away = xy * b[2] - b[:2], a[:2] - xy * a[2]
    inverse = (along * away).sum(0) / (along * along).sum(0).clamp_min(1e-12)
    ratio = a[2] + inverse * b[2]
    there = (a[:2] + inverse * b[:2]) / ratio.clamp_min(1e-6)
    inverse = torch.where((inverse > 0) & (ratio > 1e-6), inverse, torch.zeros_like(inverse))
    return inverse, (there - xy).norm(dim=0)


def consensus(
    inverse: torch.Tensor, weight: torch.Tensor, speed: torch.Tensor, *, tolerance_px: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What most of several depths of a pixel agree on.

    Args:
        inverse: (K, H, W) inverse depths.
        weight: (K, H, W) trust in each, in [0, 1]; 0 where there is none.
        speed: (K, H, W) pixels that a place moves for an inverse depth of 1: exactness.
        tolerance_px: by which depths that agree may move each other's places.

    Returns:
        (H, W) inverse depth, their mean weighted by trust and exactness; and the sum of the trust
        in those that agree, less that of the best one: 0 where no two agree.
    """
    best = torch.zeros_like(inverse[0])
    mean = torch.zeros_like(inverse[0])
    for candidate, own in zip(inverse, weight, strict=True):
        near = ((inverse - candidate).abs() * speed < tolerance_px) * weight
        support = torch.where(own > 0, near.sum(0) - near.amax(0), torch.zeros_like(best))
        exact = near * speed**2
        value = (exact * inverse).sum(0) / exact.sum(0).clamp_min(1e-12)
        better = support > best
        best, mean = torch.where(better, support, best), torch.where(better, value, mean)
    return mean, best


def surface(xy: np.ndarray, inverse: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """A rough map of inverse depth (H, W) through points, flat triangles between them.

    Args:
        xy: (N, 2) pixels.
        inverse: (N,) inverse depths.
        size: (width, height).
    """
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
    from scipy.spatial import QhullError

    width, height = size
    near = NearestNDInterpolator(xy, inverse)
    every = max(1, max(size) // 160)  # finer than points are apart
    x, y = np.meshgrid(np.arange(0, width, every), np.arange(0, height, every))
    values = near(x, y)
    with contextlib.suppress(QhullError):  # points on a line
        flat = LinearNDInterpolator(xy, inverse)(x, y)
        values = np.where(np.isfinite(flat), flat, values)
    rough = torch.from_numpy(values.astype(np.float32))[None, None]
    return F.interpolate(rough, (height, width), mode="bilinear")[0, 0]


def speed(view: Pinhole, other: Pinhole, inverse: torch.Tensor) -> torch.Tensor:
    """(H, W) pixels that a place in another view moves for an inverse depth of 1."""
    start, shift = bases(view, [other], inverse.device)
    a, b = start[0], shift[0]
    ratio = (a[2] + inverse * b[2]).clamp_min(1e-6)
    there = (a[:2] + inverse * b[:2]) / ratio
    moved: torch.Tensor = ((b[:2] - there * b[2]) / ratio).norm(dim=0)
    return moved


def without_speckles(inverse: torch.Tensor, least: int) -> torch.Tensor:
    """A map (H, W) without connected patches of fewer than ``least`` pixels of like depth."""
    import cv2

    known = (inverse > 0).cpu().numpy()
    logarithm = np.log(inverse.cpu().numpy(), out=np.zeros(known.shape, np.float32), where=known)
    # Steps of 0.1 %, from 1 on: 0 is none.
    steps = np.where(known, (logarithm - logarithm.min(initial=0, where=known)) * 1000 + 1, 0)
    kept = steps.clip(0, 32767).astype(np.int16)
    cv2.filterSpeckles(kept, 0, least, 30)
    stays = torch.from_numpy(kept > 0).to(inverse.device)
    return torch.where(stays, inverse, torch.zeros_like(inverse))
