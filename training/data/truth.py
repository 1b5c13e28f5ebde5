"""Where a point of one image lies in the other, by depth and pose.

Two readings of the depth map exist, as the published trainings differ (``training.md`` §4):

* ``nearest`` (LoFTR, DKM, RoMa): the depth of the nearest pixel; the point must project strictly
  inside the other image, and the depth found there must agree with its own within a fifth.
* ``bilinear`` (LightGlue): interpolated depth, the nearest pixel's where a neighbour is unknown;
  the point must lie in front of the other camera and inside its image. Nothing tests whether it is
  hidden there.

Points are divided by their true depth z where z > ``MIN_DEPTH``, not by z + 1e-4 as in the
published trainings: at a depth of one unit and 1000 px focal length theirs is 0.1 px off.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from gim_hloc.training.batch import PairBatch, PairSample, collate

Lookup = Literal["nearest", "bilinear"]

MIN_DEPTH = 1e-4  # of a projected point, in the unit of the poses
CONSISTENCY = 0.2  # largest relative difference of a projected point's depth and the map's
_CELL = 8  # px: of the grid on which a pair's true matches are looked for
_AROUND = 9  # px: of the surroundings that texture is told from


class NoTruthError(Exception):
    """A pair has nothing to learn from: depth, poses and intrinsics agree at no place."""


def pixel_grid(
    height: int, width: int, stride: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Centres of the cells of ``stride`` pixels that tile an image, row by row.

    Args:
        height: of the image in network pixels; a part of a cell at the end is left out.
        width: likewise.
        stride: side of a cell in network pixels.
        device: of the result.

    Returns:
        (height // stride * (width // stride), 2) float32 x, y in network pixels, hloc's frame: cell
        (0, 0) has its centre at (stride - 1) / 2.
    """
    x = torch.arange(width // stride, device=device, dtype=torch.float32)
    y = torch.arange(height // stride, device=device, dtype=torch.float32)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).reshape(-1, 2) * stride + (stride - 1) / 2


def warp_points(
    batch: PairBatch, xy: torch.Tensor, *, source: int, lookup: Lookup = "nearest"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry points of one image into the other by depth and pose.

    Args:
        batch: pairs on one device; samples without depth have no valid points.
        xy: (B, N, 2) points of image ``source`` in network pixels, hloc's frame.
        source: 0 or 1, the image that the points are on.
        lookup: how depth is read and a point is tested, see the module.

    Returns:
        (B, N, 2) places in the other image in network pixels, float32, and (B, N) bool whether they
        are true: the point lies on the image (not on padding), has depth, passes the tests of the
        lookup and arrives on the other image's valid area. Other rows are finite, but mean nothing.

    Source: ``training.md`` §4.
    """
    if source not in (0, 1):
        raise ValueError(f"source is {source}, an image of a pair is 0 or 1")
    if lookup not in ("nearest", "bilinear"):
        raise ValueError(f"lookup is {lookup!r}, known are 'nearest' and 'bilinear'")
    other = 1 - source

    def of(name: str, image: int) -> torch.Tensor:
        value: torch.Tensor = getattr(batch, f"{name}{image}")
        return value

    # float64: a chain of matrices whose entries span eight orders of magnitude.
    point = torch.cat([xy.double(), torch.ones_like(xy[..., :1], dtype=torch.float64)], -1)
    original = _dehomogenise(_apply(of("to_original", source), point))
    valid = batch.has_depth[:, None] & _on_valid_area(of("valid", source), xy.double())

    read = _read_bilinear if lookup == "bilinear" else _read_nearest
    depth, known = read(of("depth", source), of("size", source), original)
    valid = valid & known

    inverse_k = torch.linalg.inv(of("K", source))
    homogeneous = torch.cat([original, torch.ones_like(original[..., :1])], -1)
    local = _apply(inverse_k, homogeneous) * depth[..., None]
    pose = batch.T_0to1 if source == 0 else torch.linalg.inv(batch.T_0to1)
    moved = _apply(pose[:, :3, :3], local) + pose[:, None, :3, 3]
    z = moved[..., 2]
    in_front = z > MIN_DEPTH
    valid = valid & in_front
    projected = _apply(of("K", other), moved)[..., :2]
    projected = projected / torch.where(in_front, z, torch.ones_like(z))[..., None]

    last = (of("size", other) - 1)[:, None].to(projected)
    if lookup == "nearest":
        valid = valid & ((projected > 0) & (projected < last)).all(-1)
        there, known = _read_nearest(of("depth", other), of("size", other), projected)
        valid = valid & known & ((there - z).abs() < CONSISTENCY * there)
    else:
        valid = valid & ((projected >= 0) & (projected <= last)).all(-1)

    homogeneous = torch.cat([projected, torch.ones_like(projected[..., :1])], -1)
    # No test of the sign: the image shows at a network pixel whatever the matrix sends it to.
    arrived = _dehomogenise(_apply(torch.linalg.inv(of("to_original", other)), homogeneous))
    valid = valid & _on_valid_area(of("valid", other), arrived)
    arrived = torch.nan_to_num(arrived, nan=0.0, posinf=0.0, neginf=0.0)
    return arrived.float(), valid


def _apply(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(B, M, K) matrices on (B, N, K) points: (B, N, M)."""
    return points @ matrix.to(points.dtype).transpose(1, 2)


def _dehomogenise(points: torch.Tensor) -> torch.Tensor:
    return points[..., :2] / points[..., 2:]


def _nearest_index(
    xy: torch.Tensor, width: torch.Tensor | int, height: torch.Tensor | int
) -> torch.Tensor:
    """(B, N, 2) integer pixels, halves upwards, and whether they exist as a third column."""
    # NaN and infinity have no integer; -1 does not exist.
    pixel = torch.nan_to_num(torch.floor(xy + 0.5), nan=-1.0, posinf=-1.0, neginf=-1.0)
    x, y = pixel.unbind(-1)
    exists = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    zero = torch.zeros_like(x)
    return torch.stack(
        [torch.where(exists, x, zero), torch.where(exists, y, zero), exists.to(x)], -1
    ).long()


def _gather(maps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values (B, N) of maps (B, h, w) at integer pixels."""
    return maps.flatten(1).gather(1, y * maps.shape[2] + x)


def _on_valid_area(valid: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """Whether the pixel nearest to each point (B, N, 2) exists and is set in (B, H, W)."""
    height, width = valid.shape[1:]
    x, y, exists = _nearest_index(xy, width, height).unbind(-1)
    return _gather(valid, x, y) & exists.bool()


def _read_nearest(
    depth: torch.Tensor, size: torch.Tensor, xy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth (B, N) of the nearest pixel, 1 where unknown, and whether it is known."""
    width, height = size[:, :1], size[:, 1:]
    # A batch may hold samples without depth, whose map is a placeholder smaller than the image.
    width = width.clamp(max=depth.shape[2])
    height = height.clamp(max=depth.shape[1])
    x, y, exists = _nearest_index(xy, width, height).unbind(-1)
    value = _gather(depth, x, y).to(xy.dtype)
    known = exists.bool() & torch.isfinite(value) & (value > 0)
    return torch.where(known, value, torch.ones_like(value)), known


def _read_bilinear(
    depth: torch.Tensor, size: torch.Tensor, xy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolated depth (B, N); the nearest pixel's where a needed neighbour is unknown."""
    nearest, known = _read_nearest(depth, size, xy)
    width = size[:, :1].clamp(max=depth.shape[2]).to(xy)
    height = size[:, 1:].clamp(max=depth.shape[1]).to(xy)
    x, y = xy.unbind(-1)
    x = torch.where(known, x, torch.zeros_like(x))
    y = torch.where(known, y, torch.zeros_like(y))
    left, top = torch.floor(x), torch.floor(y)
    total = torch.zeros_like(x)
    complete = known
    for dx in (0, 1):
        for dy in (0, 1):
            # Half a pixel at the border continues the outermost row.
            cx = torch.minimum((left + dx).clamp(min=0), width - 1)
            cy = torch.minimum((top + dy).clamp(min=0), height - 1)
            weight = (1 - (x - left - dx).abs()) * (1 - (y - top - dy).abs())
            value = _gather(depth, cx.long(), cy.long()).to(xy.dtype)
            usable = torch.isfinite(value) & (value > 0)
            complete = complete & (usable | (weight == 0))
            total = total + weight * torch.where(usable, value, torch.zeros_like(value))
    return torch.where(complete, total, nearest), known


def true_matches(sample: PairSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of image 0 that depth and pose carry to image 1 and back to the same cell.

    Returns:
        (K, 2) and (K, 2) float32 network pixels of both images; K is 0 without depth.
    """
    batch = collate([sample])
    height, width = sample.valid0.shape
    xy = pixel_grid(height, width, _CELL)[None]
    there, valid = warp_points(batch, xy, source=0)
    back, seen = warp_points(batch, there, source=1)
    kept = (valid & seen & ((back - xy).abs().amax(-1) < _CELL / 2))[0]
    return xy[0, kept], there[0, kept]


def require_truth(sample: PairSample) -> None:
    """Refuse a pair that has nothing to learn from.

    Raises:
        NoTruthError: an image is of one colour, a depth map is empty, a principal point lies
            outside its image, or there is no true match.
    """
    images = ((sample.image0, sample.valid0), (sample.image1, sample.valid1))
    for name, (image, valid) in zip(sample.names, images, strict=True):
        seen = image[:, ::4, ::4][:, valid[::4, ::4]]  # some of it will do
        if (seen == seen[:, :1]).all():
            raise NoTruthError(f"{name} shows a single colour")
    if sample.depth0 is None or sample.depth1 is None:
        return
    for name, depth in zip(sample.names, (sample.depth0, sample.depth1), strict=True):
        if not (depth > 0).any():
            raise NoTruthError(f"the depth map of {name} is empty")
    sides = ((sample.K0, sample.size0), (sample.K1, sample.size1))
    for name, (K, (width, height)) in zip(sample.names, sides, strict=True):
        x, y = K[:2, 2].tolist()
        if not (0 <= x < width - 1 and 0 <= y < height - 1):
            raise NoTruthError(
                f"the principal point ({x:.1f}, {y:.1f}) of {name} lies outside of its "
                f"{width} x {height} pixels"
            )
    if not len(true_matches(sample)[0]):
        raise NoTruthError("depth and poses carry no place of one image to the other and back")


def likeness(sample: PairSample) -> float:
    """Correlation of fine texture at true matches: high if they are true, NaN without any.

    Grey levels less the mean of their surroundings: those themselves correlate at wrong places too.
    """
    levels = []
    matches = true_matches(sample)
    for image, xy in zip((sample.image0, sample.image1), matches, strict=True):
        grid = (2 * xy + 1) / xy.new_tensor([image.shape[2], image.shape[1]]) - 1
        gray = image.mean(0)[None, None]
        fine = gray - F.avg_pool2d(gray, _AROUND, 1, _AROUND // 2, count_include_pad=False)
        levels.append(F.grid_sample(fine, grid[None, None], align_corners=False)[0, 0, 0])
    return float(torch.corrcoef(torch.stack(levels))[0, 1]) if len(matches[0]) > 1 else math.nan
