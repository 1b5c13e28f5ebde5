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

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gim_hloc.geometry.frames import resize_points
from gim_hloc.options import PhotometricOptions

_CLOSE_PX = 0.004  # a step that ends the comparison


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
    grid = _square(options.radius)  # (P, 2) x, y in the reference
    wider = _square(options.radius + 1)  # neighbours give the gradients
    weight = torch.exp(-(grid**2).sum(1) / (2 * (0.6 * options.radius) ** 2))
    weight = weight / weight.sum()
    positions = torch.from_numpy(views.xy_px.astype(np.float32))
    result = positions.clone()
    confirmed = np.zeros(len(result), dtype=bool)
    reference_image = views.image[reference]
    # Pixels of each level for a stored one; where all images are seen as stored, one is enough.
    levels = np.unique([scale, np.ones(len(scale))], axis=0)
    templates = torch.zeros(len(levels), len(reference), len(wider))
    inside = torch.zeros(len(levels), len(reference), dtype=torch.bool)

    def read_templates(index: int) -> None:
        tracks = np.flatnonzero(reference_image == index)
        if not len(tracks):
            return
        stored = gray(index)
        for level, scales in enumerate(levels):
            picture = _Picture(stored, scales[index])
            at = picture.to_level(positions[reference[tracks]])
            templates[level, tracks] = picture.sample(at, wider[None])
            inside[level, tracks] = picture.holds(at, grid[None])

    _each(read_templates, len(scale), workers)
    within = _inner(templates)
    mean = within @ weight
    spread = ((within - mean[..., None]) ** 2 @ weight).sqrt()
    inside &= spread > 1.0  # grey values: nothing to hold on to below
    templates = (templates - mean[..., None]) / spread.clamp_min(1e-6)[..., None]
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
                picture,
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
    picture: _Picture,
    start: torch.Tensor,
    shapes: torch.Tensor,
    templates: torch.Tensor,
    grid: torch.Tensor,
    weight: torch.Tensor,
    options: PhotometricOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gauss-Newton on the position, with the template's gradients (inverse compositional).

    Returns:
        (K, 2) positions, (K,) whether they can be trusted, and (K,) how much texture they have.
    """
    basis = _basis(templates, weight)
    products = basis * weight
    hessian = products[:, 1:] @ basis[:, 1:].mT
    spread = shapes @ torch.linalg.inv(hessian + 1e-6 * torch.eye(2))  # of the position ...
    xx, xy_, yy = (spread @ shapes.mT).flatten(1)[:, [0, 1, 3]].unbind(1)  # ... in this image
    least = 1 / ((xx + yy) / 2 + ((xx - yy) ** 2 / 4 + xy_**2).sqrt())
    pattern = grid @ shapes.mT
    xy = start.clone()
    good = picture.holds(xy, pattern)
    texture, correlation = torch.zeros(2, len(xy))
    active = torch.nonzero(good)[:, 0]
    for _ in range(options.iterations):
        if not len(active):
            break
        value = picture.sample(xy[active], pattern[active])
        value = value - (value @ weight)[:, None]
        gain, *slope = (products[active] @ value[..., None])[..., 0].unbind(1)
        deviation = (value**2 @ weight).sqrt().clamp_min(1e-6)
        texture[active] = deviation**2 * least[active]
        correlation[active] = gain / deviation
        contrast = gain.maximum(deviation / 2)[:, None]
        delta = -(spread[active] @ (torch.stack(slope, 1) / contrast)[..., None])[..., 0]
        delta = delta.clamp(-1, 1)
        usable = texture[active] > 1.0  # squared grey values a pixel: both directions hold
        xy[active] += delta * usable[:, None]
        usable &= (xy[active] - start[active]).norm(dim=1) < options.max_shift
        good[active] &= usable
        active = active[usable & (delta.abs().amax(1) > _CLOSE_PX)]
    good &= (correlation > options.min_correlation) & picture.holds(xy, pattern)
    return xy, good, texture


def _basis(templates: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(K, 3, P): normalised templates, and their gradients as far as they are no gain or offset."""
    side = math.isqrt(templates.shape[1])
    square = templates.unflatten(1, (side, side))
    value = _inner(templates)
    right = (square[:, 1:-1, 2:] - square[:, 1:-1, :-2]).flatten(1) / 2
    down = (square[:, 2:, 1:-1] - square[:, :-2, 1:-1]).flatten(1) / 2
    basis = torch.stack([value, right, down], 1)
    gradient = basis[:, 1:]
    gradient -= (gradient @ weight)[..., None]
    gradient -= (gradient @ (value * weight)[..., None]) * value[:, None]
    return basis


def _square(radius: int) -> torch.Tensor:
    """Pixels (P, 2) x, y of a square, row by row, from its centre."""
    side = torch.arange(-radius, radius + 1, dtype=torch.float32)
    return torch.cartesian_prod(side, side).flip(1)


def _inner(templates: torch.Tensor) -> torch.Tensor:
    """Templates (…, Q) without the pixels at their borders (…, P)."""
    side = math.isqrt(templates.shape[-1])
    return templates.unflatten(-1, (side, side))[..., 1:-1, 1:-1].flatten(-2)


def _halfway(picture: np.ndarray, *, across: bool) -> Any:
    """Values halfway to the next pixel, by Catmull-Rom's kernel: exact for cubic functions."""
    import cv2

    kernel = np.array([[-1, 9, 9, -1]], np.float32) / np.float32(16)
    anchor = (1, 0) if across else (0, 1)
    return cv2.filter2D(
        picture, -1, kernel if across else kernel.T, anchor=anchor, borderType=cv2.BORDER_REPLICATE
    )


class _Picture:
    """An image at one level, enlarged twice, and how its pixels lie to the stored ones."""

    def __init__(self, gray: np.ndarray, scale: float) -> None:
        import cv2

        height, width = gray.shape
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        gray = np.ascontiguousarray(gray, dtype=np.float32)
        self.ratio = torch.tensor([gray.shape[1] / width, gray.shape[0] / height])
        # What bilinear sampling of this still blurs is a quarter of what it blurs between pixels.
        wide = np.empty((gray.shape[0], 2 * gray.shape[1]), np.float32)
        wide[:, ::2], wide[:, 1::2] = gray, _halfway(gray, across=True)
        larger = np.empty((2 * gray.shape[0], wide.shape[1]), np.float32)
        larger[::2], larger[1::2] = wide, _halfway(wide, across=False)
        self.larger = torch.from_numpy(larger)[None, None]
        self.size = torch.tensor(gray.shape[::-1], dtype=torch.float32)

    def sample(self, xy: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        """Grey values (K, P) at a pattern (K or 1, P, 2) around points (K, 2), in pixels."""
        # A pixel of the larger image is half a pixel, from the first pixel's centre on.
        unit = 2 / (self.size - 0.5)
        grid = (xy * unit - 1)[:, None] + pattern * unit
        return torch.nn.functional.grid_sample(
            self.larger, grid[None], mode="bilinear", padding_mode="border", align_corners=True
        )[0, 0]

    def holds(self, xy: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        """Whether a pattern (K or 1, P, 2) around points (K, 2) lies inside, (K,)."""
        low, high = xy + pattern.amin(1), xy + pattern.amax(1)
        return ((low >= 1) & (high <= self.size - 2)).all(1)

    def to_level(self, xy: torch.Tensor) -> torch.Tensor:
        """Positions (K, 2) in stored pixels -> in this level's."""
        return resize_points(xy, self.ratio)

    def to_stored(self, xy: torch.Tensor) -> torch.Tensor:
        """The inverse of ``to_level``."""
        return resize_points(xy, 1 / self.ratio)


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
