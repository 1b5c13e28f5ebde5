"""Sub-pixel refinement of tracks by comparing image patches, after mapping.

Detectors place a keypoint anew in every image, to about half a pixel. Once a model exists, all
views of a point can be compared with one of them: its patch is carried into the other images by
the local plane, and each observation is moved until the grey values agree. What remains is the
error of the comparison, a tenth of a pixel on textured surfaces. Only the relative position of a
track's observations matters for poses, so the view compared with keeps its place.

This is Lucas-Kanade registration (Baker and Matthews, IJCV 2004) with gain and offset, moving the
position only; the shape of the patch comes from poses and points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from gim_hloc.geometry.frames import resize_points
from gim_hloc.options import PhotometricOptions


@dataclass(kw_only=True)
class TrackViews:
    """Observations of all tracks, ``K`` in number, grouped by nothing in particular.

    Attributes:
        track: (K,) index of the track.
        image: (K,) index of the image.
        xy_px: (K, 2) position in stored pixels, hloc's frame.
    """

    track: np.ndarray
    image: np.ndarray
    xy_px: np.ndarray


def local_normals(
    xyz: np.ndarray, towards: np.ndarray, *, neighbours: int, flatness: float = 0.15
) -> np.ndarray:
    """Normals of the surface at each point.

    Args:
        xyz: (M, 3) points.
        towards: (M, 3) unit vectors from the point to its cameras (mean), the fallback and the
            side that normals face.
        neighbours: points that each plane is fitted to.
        flatness: largest ratio of thickness to width of the neighbourhood for the fit to be used.

    Returns:
        (M, 3) unit normals.
    """
    from scipy.spatial import cKDTree

    normals = towards.copy()
    if len(xyz) <= neighbours:
        return normals
    _, near = cKDTree(xyz).query(xyz, k=neighbours + 1)
    patch = xyz[near]
    patch = patch - patch.mean(axis=1, keepdims=True)
    _, spread, axes = np.linalg.svd(patch, full_matrices=False)
    fitted = axes[:, 2]
    fitted *= np.sign(np.einsum("mi,mi->m", fitted, towards))[:, None] + 1e-12
    fitted /= np.linalg.norm(fitted, axis=1, keepdims=True)
    # A plane seen nearly edge-on, or a neighbourhood without one, says nothing useful.
    usable = (spread[:, 2] < flatness * spread[:, 1]) & (
        np.einsum("mi,mi->m", fitted, towards) > 0.3
    )
    normals[usable] = fitted[usable]
    return normals


def refine_positions(
    views: TrackViews,
    reference: np.ndarray,
    affine: np.ndarray,
    gray: Callable[[int], np.ndarray],
    scale: np.ndarray,
    options: PhotometricOptions,
    *,
    workers: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Move observations until their patches agree with the reference view's.

    Patches are compared at the size that the matcher saw, which is where the positions come from.
    Larger images are then compared at their full size, wherever that shows more.

    Args:
        views: all observations.
        reference: (T,) row of ``views`` that each track is compared with.
        affine: (K, 2, 2) change of position in the observation's image for one pixel in the
            reference's.
        gray: image index -> (H, W) float32 grey values; called twice per image.
        scale: (N,) of each image, pixels that the matcher saw for a stored one; at most 1.
        options: see there.
        workers: images at a time, one thread each; does not change the result.

    Returns:
        (K, 2) positions, and (K,) whether the observation was confirmed (references included).
    """
    r = options.radius
    offsets = np.stack(np.meshgrid(np.arange(-r, r + 1), np.arange(-r, r + 1)), -1).reshape(-1, 2)
    grid = torch.from_numpy(offsets.astype(np.float32))  # (P, 2) x, y in the reference
    weight = torch.exp(-(grid**2).sum(1) / (2 * (0.6 * r) ** 2))
    weight = weight / weight.sum()
    positions = torch.from_numpy(views.xy_px.astype(np.float32))
    result = positions.clone()
    confirmed = np.zeros(len(result), dtype=bool)
    reference_image = views.image[reference]
    # Pixels of each level for a stored one; where all images are seen as stored, one is enough.
    levels = np.unique([scale, np.ones(len(scale))], axis=0)
    templates = torch.zeros(len(levels), len(reference), len(grid))
    inside = torch.zeros(len(levels), len(reference), dtype=torch.bool)

    def read_templates(index: int) -> None:
        tracks = np.flatnonzero(reference_image == index)
        if not len(tracks):
            return
        stored = gray(index)
        for level, scales in enumerate(levels):
            picture = _Picture(stored, scales[index])
            at = picture.to_level(positions[reference[tracks]])[:, None] + grid
            templates[level, tracks] = _sample(picture.planes, at, "cubic")[:, 0]
            inside[level, tracks] = _within(picture.planes, at)

    _each(read_templates, len(scale), workers)
    spread = (
        ((weight * templates**2).sum(-1) - (weight * templates).sum(-1) ** 2).clamp_min(0).sqrt()
    )
    inside &= spread > 1.0  # grey values: nothing to hold on to below
    templates = _normalised(templates, weight)
    confirmed[reference[inside[0].numpy()]] = True

    shapes, candidates = [], []
    for level, scales in enumerate(levels):
        ratio = scales[views.image] / scales[reference_image[views.track]]
        shape = affine * ratio[:, None, None]
        shapes.append(torch.from_numpy(shape.astype(np.float32)))
        determinant = np.abs(np.linalg.det(shape))
        comparable = (determinant < options.max_scale**2) & (determinant > options.max_scale**-2)
        comparable[reference] = False
        candidates.append(comparable & inside[level].numpy()[views.track])

    def align(index: int) -> None:
        rows = np.flatnonzero((views.image == index) & candidates[0])
        if not len(rows):
            return
        stored = gray(index)
        texture = torch.zeros(len(result))
        for level, scales in enumerate(levels):
            picture = _Picture(stored, scales[index])
            moved, good, found = _align(
                picture.planes,
                picture.to_level(result[rows]),
                shapes[level][rows],
                templates[level, views.track[rows]],
                grid,
                weight,
                options,
            )
            # Where an image is soft at its full size, that shows the same with less around it.
            good &= found * scales[index] > texture[rows] * scale[index]
            keep = rows[good.numpy()]
            result[keep] = picture.to_stored(moved[good])
            texture[keep] = found[good]
            confirmed[keep] = True
            if level + 1 < len(levels):
                rows = keep[candidates[level + 1][keep] & (scale[index] < 1)]

    _each(align, len(scale), workers)
    return result.numpy().astype(np.float64), confirmed


def _each(work: Callable[[int], None], count: int, workers: int) -> None:
    """Run ``work`` on 0 … count - 1 in threads, each with one thread inside PyTorch.

    The patches are too small for threads inside an operator to help.
    """
    before = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,)) as p:
        for done in [p.submit(work, index) for index in range(count)]:
            done.result()
    torch.set_num_threads(before)


def _align(
    picture: torch.Tensor,
    start: torch.Tensor,
    shapes: torch.Tensor,
    templates: torch.Tensor,
    grid: torch.Tensor,
    weight: torch.Tensor,
    options: PhotometricOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gauss-Newton on the position, patches normalised by weighted mean and deviation.

    Returns:
        (K, 2) positions, (K,) whether they can be trusted, and (K,) how much texture they have.
    """
    pattern = torch.einsum("kij,pj->kpi", shapes, grid)
    xy = start.clone()
    good = _within(picture, xy[:, None] + pattern)
    texture = torch.zeros(len(xy))
    # Bilinear steps find the place, cubic ones remove what bilinear's blur pulled.
    for mode, steps, tolerance in (("bilinear", options.iterations, 0.02), ("cubic", 3, 0.004)):
        active = torch.nonzero(good)[:, 0]
        for _ in range(steps):
            if not len(active):
                break
            delta, texture[active] = _step(
                picture, xy[active], pattern[active], templates[active], weight, mode
            )
            usable = texture[active] > 1.0  # squared grey values a pixel: both directions hold
            xy[active] += delta * usable[:, None]
            moved = (xy[active] - start[active]).norm(dim=1)
            usable &= moved < options.max_shift
            good[active] &= usable
            active = active[usable & (delta.abs().amax(1) > tolerance)]
    rows = torch.nonzero(good)[:, 0]
    at = xy[rows, None] + pattern[rows]
    value = _normalised(_sample(picture, at, "cubic")[:, 0], weight)
    correlation = (weight * value * templates[rows]).sum(1)
    good[rows] = (correlation > options.min_correlation) & _within(picture, at)
    return xy, good, texture


def _step(
    picture: torch.Tensor,
    xy: torch.Tensor,
    pattern: torch.Tensor,
    templates: torch.Tensor,
    weight: torch.Tensor,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One Gauss-Newton step (K, 2), and (K,) the texture in the direction that has least."""
    sampled = _sample(picture, xy[:, None] + pattern, mode)  # (K, 3, P): value, d/dx, d/dy
    sampled = sampled - (sampled * weight).sum(2, keepdim=True)
    value, gradient = sampled[:, 0], sampled[:, 1:]
    gain = (weight * value * templates).sum(1, keepdim=True)  # contrast against the template's
    residual = (gain * templates - value) * weight
    gx, gy = gradient.unbind(1)
    xx, xy_, yy = ((weight * a * b).sum(1) for a, b in ((gx, gx), (gx, gy), (gy, gy)))
    smallest = (xx + yy) / 2 - ((xx - yy) ** 2 / 4 + xy_**2).sqrt()
    determinant = (xx * yy - xy_**2).clamp_min(1e-6)
    bx, by = (gx * residual).sum(1), (gy * residual).sum(1)
    delta = torch.stack([yy * bx - xy_ * by, xx * by - xy_ * bx], 1) / determinant[:, None]
    return delta.clamp(-1, 1), smallest


def _normalised(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    value = value - (value * weight).sum(-1, keepdim=True)
    return value / (weight * value**2).sum(-1, keepdim=True).sqrt().clamp_min(1e-6)


class _Picture:
    """An image at one level: its planes, and how its pixels lie to the stored ones."""

    def __init__(self, gray: np.ndarray, scale: float) -> None:
        import cv2

        height, width = gray.shape
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        self.ratio = torch.tensor([gray.shape[1] / width, gray.shape[0] / height])
        g = torch.from_numpy(np.ascontiguousarray(gray, dtype=np.float32))
        # (1, 3, H, W), channels last: grey values and their central differences
        planes = torch.zeros(*g.shape, 3)
        planes[..., 0] = g
        planes[:, 1:-1, 1] = (g[:, 2:] - g[:, :-2]) / 2
        planes[1:-1, :, 2] = (g[2:] - g[:-2]) / 2
        self.planes = planes.permute(2, 0, 1)[None]

    def to_level(self, xy: torch.Tensor) -> torch.Tensor:
        """Positions (K, 2) in stored pixels -> in this level's."""
        return resize_points(xy, self.ratio)

    def to_stored(self, xy: torch.Tensor) -> torch.Tensor:
        """The inverse of ``to_level``."""
        return resize_points(xy, 1 / self.ratio)


def _within(picture: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    h, w = picture.shape[-2:]
    limit = torch.tensor([w - 2.0, h - 2.0])
    return ((at >= 1) & (at <= limit)).flatten(1).all(1)


def _sample(picture: torch.Tensor, at: torch.Tensor, mode: str) -> torch.Tensor:
    """Interpolated values (K, C, P) at (K, P, 2) pixel positions (integer = pixel centre).

    ``cubic`` is Catmull-Rom's kernel (a = -0.5), which is exact for quadratic functions. PyTorch's
    bicubic (a = -0.75) is not even for linear ones: it would shift patches by up to 0.05 px.
    """
    h, w = picture.shape[-2:]
    if mode == "bilinear":
        normalised = at / torch.tensor([w - 1.0, h - 1.0]) * 2 - 1
        sampled = torch.nn.functional.grid_sample(
            picture, normalised[None], mode="bilinear", padding_mode="border", align_corners=True
        )
        return sampled[0].permute(1, 0, 2)
    base = at.floor()
    t = at - base  # (K, P, 2)
    weights = torch.stack(
        [
            t * (-0.5 + t * (1 - 0.5 * t)),
            1 + t * t * (-2.5 + 1.5 * t),
            t * (0.5 + t * (2 - 1.5 * t)),
            t * t * (-0.5 + 0.5 * t),
        ],
        dim=-1,
    )  # (K, P, 2, 4)
    taps = base.long()[..., None] + torch.arange(-1, 3)
    columns, rows = taps[..., 0, :].clamp(0, w - 1), taps[..., 1, :].clamp(0, h - 1)
    index = rows[..., :, None] * w + columns[..., None, :]
    product = weights[..., 1, :, None] * weights[..., 0, None, :]
    table = picture[0].permute(1, 2, 0).reshape(h * w, -1)  # a view, channels being last
    sampled = torch.nn.functional.embedding_bag(
        index.reshape(-1, 16), table, per_sample_weights=product.reshape(-1, 16), mode="sum"
    )
    return sampled.view(*at.shape[:2], picture.shape[1]).permute(0, 2, 1)


def judge_images(
    views: TrackViews,
    reference: np.ndarray,
    confirmed: np.ndarray,
    num_images: int,
    options: PhotometricOptions,
) -> np.ndarray:
    """Which images' patches agree with those of the others.

    The image with the smallest share of confirmed comparisons, as either side of them, is set
    aside until that share is ``options.min_share`` in all that are left.

    Args:
        views: all observations.
        reference: (T,) row of ``views`` that each track was compared with.
        confirmed: (K,) whether the comparison was good.
        num_images: images.
        options: see there.

    Returns:
        (num_images,) bool.
    """
    from scipy import sparse

    others = np.ones(len(confirmed), dtype=bool)
    others[reference] = False
    sides = views.image[others], views.image[reference][views.track[others]]

    def between(values: np.ndarray) -> sparse.csc_matrix:
        found = sparse.csc_matrix((values, sides), (num_images, num_images))
        return sparse.csc_matrix(found + found.T)

    all_, good = between(np.ones(others.sum())), between(confirmed[others].astype(float))
    made, agreed = all_.sum(1).A1, good.sum(1).A1
    trusted = np.ones(num_images, dtype=bool)
    while trusted.any():
        share = np.where(trusted, agreed / np.maximum(made, 1), np.inf)
        worst = int(share.argmin())
        if share[worst] >= options.min_share:
            break
        trusted[worst] = False
        made -= all_[:, [worst]].toarray()[:, 0]
        agreed -= good[:, [worst]].toarray()[:, 0]
    return trusted


def pick_references(
    views: TrackViews, footprint: np.ndarray, num_tracks: int, trusted: np.ndarray | None = None
) -> np.ndarray:
    """The view each track is compared with: that of median size, so that none is far from it.

    Args:
        views: all observations.
        footprint: (K,) pixels that a unit of the scene covers at the point.
        num_tracks: tracks.
        trusted: (number of images,) those preferred; by default all.

    Returns:
        (T,) rows of ``views``.
    """
    first = np.ones(len(views.track), dtype=bool) if trusted is None else trusted[views.image]
    order = np.lexsort((footprint, ~first, views.track))
    starts = np.searchsorted(views.track[order], np.arange(num_tracks))
    preferred = np.bincount(views.track[first], minlength=num_tracks)
    counts = np.where(preferred > 0, preferred, np.bincount(views.track, minlength=num_tracks))
    chosen: np.ndarray = order[starts + (counts - 1) // 2]
    return chosen


def tangents(normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors (M, 3) that span the plane across each normal."""
    helper = np.where(np.abs(normals[:, :1]) < 0.9, [[1.0, 0, 0]], [[0, 1.0, 0]])
    u = np.cross(normals, helper)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return u, np.cross(normals, u)


__all__: Sequence[str] = (
    "PhotometricOptions",
    "TrackViews",
    "judge_images",
    "local_normals",
    "pick_references",
    "refine_positions",
    "tangents",
)
