"""Pictures of a matched pair: its inliers, and image 1 projected onto image 0.

Images are shown upright and reduced to a size that screens can show; coordinates, which are those
of the stored files, are mapped accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from gim_hloc import draw, images
from gim_hloc.geometry.warp import inverse
from gim_hloc.two_view import Fit
from gim_hloc.types import ImageOptions

if TYPE_CHECKING:
    from gim_hloc.geometry.warp import Warp
    from gim_hloc.images import ImageRecord

    Pair = tuple[ImageRecord, ImageRecord]

_MARGIN = 2  # white pixels between and around images
_MATCH_SIDE = 1600  # longest side of an image in the picture of matches, pixels
_SMALL_SIDE = 320  # smaller images are enlarged to it, and to half the other's side
_WARP_SIDE = 1200  # of a panel of the projection
_INLIER = (0, 255, 0)  # green
_UNVERIFIED = (255, 140, 0)  # orange: matches that no geometry was fitted to
_ROWS = 256  # of a projection at a time


@dataclass(frozen=True)
class _Picture:
    """An upright image (H, W, 3) uint8 and the (2, 3) map from its pixels to stored ones."""

    rgb: np.ndarray
    to_stored: np.ndarray

    def place(self, stored: np.ndarray) -> np.ndarray:
        """Stored pixels (..., 2) as picture pixels, float64."""
        return _apply(inverse(self.to_stored), stored)


def _open(record: ImageRecord, side: int, *, enlarge: bool = False) -> _Picture:
    data = images.load(record, ImageOptions(max_size=side, upsample=enlarge))
    rgb = np.rint(data.image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    return _Picture(np.ascontiguousarray(rgb), data.to_original)


def _apply(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    mapped: np.ndarray = np.asarray(xy, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return mapped


def draw_inliers(
    pair: Pair,
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    fit: Fit | None,
    *,
    plain: bool = True,
) -> np.ndarray:
    """Both images side by side with their matches; above them the same without, if ``plain``.

    Inliers are green; of many, a part has lines. Where no geometry could be fitted or none was
    asked for, all matches are drawn in orange.

    Args:
        pair: the two image files.
        keypoints0: (M, 2) stored pixels of image 0.
        keypoints1: (M, 2) of image 1.
        fit: their robust geometry.
        plain: show the images without matches, too.
    """
    sides = [min(max(record.size), _MATCH_SIDE) for record in pair]
    smallest = max(_SMALL_SIDE, max(sides) // 2)
    pictures = [
        _open(record, max(side, smallest), enlarge=True)
        for record, side in zip(pair, sides, strict=True)
    ]
    fitted = fit is not None and fit.fundamental is not None
    shown = fit.inliers if fit is not None and fitted else slice(None)
    matches = draw.draw_matches(
        [picture.rgb for picture in pictures],
        [
            pictures[0].place(keypoints0[shown]),
            pictures[1].place(keypoints1[shown]),
        ],
        _INLIER if fitted else _UNVERIFIED,
        opacity=0.5,
        gap=_MARGIN,
    )
    rows = [matches]
    if plain:
        rows.insert(0, draw.join([picture.rgb for picture in pictures], gap=_MARGIN)[0])
    return draw.join(rows, below=True, gap=_MARGIN, margin=_MARGIN)[0]


def draw_projection(
    pair: Pair, keypoints0: np.ndarray, fit: Fit | None, warp: Warp | None = None
) -> np.ndarray | None:
    """Image 0, image 1 projected onto it, and a blend of the two, side by side.

    Dense matchers project by their warp, faint where it is uncertain; others by the homography,
    which is exact for planes and turning cameras only.

    None where there is neither warp nor homography.
    """
    if warp is None and (fit is None or fit.homography is None):
        return None
    base, other = (_open(record, _WARP_SIDE) for record in pair)
    height, width = base.rgb.shape[:2]
    panels = np.full((3, height, width, 3), 255, dtype=np.uint8)
    panels[0] = base.rgb
    for top in range(0, height, _ROWS):  # the maps of a large picture would take much memory
        rows = np.arange(top, min(top + _ROWS, height))
        x, y = np.meshgrid(np.arange(width), rows)
        stored = _apply(base.to_stored, np.stack([x, y], axis=-1))
        if warp is not None:
            target, weight = _by_warp(warp, stored)
        elif fit is not None:
            target, weight = by_homography(fit, keypoints0, stored)
        seen, weight = _read(other.rgb, other.place(target), weight)
        here = base.rgb[rows].astype(np.float32)
        panels[1, rows] = np.rint(seen * weight + 255 * (1 - weight))
        panels[2, rows] = np.rint(here * (1 - weight / 2) + seen * weight / 2)
    return draw.join(list(panels), gap=_MARGIN, margin=_MARGIN)[0]


def _by_warp(warp: Warp, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in image 1 (..., 2) of points of image 0, stored pixels, and certainties (...)."""
    import torch

    reading = warp.read(torch.from_numpy(stored.reshape(-1, 2)).float())
    shape = stored.shape[:-1]
    return (
        reading.xy_px.cpu().numpy().reshape(*shape, 2),
        reading.certainty.cpu().numpy().reshape(shape),
    )


def by_homography(
    fit: Fit, keypoints0: np.ndarray, stored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places in image 1 (..., 2) of stored pixels of image 0, and where there are any (...)."""
    assert fit.homography is not None
    to_other = np.linalg.inv(fit.homography)
    inlier = keypoints0[fit.homography_inliers][0]
    # Beyond its horizon a homography shows the other image once more, turned over.
    side = np.sign(to_other[2] @ [*inlier, 1.0])
    mapped = stored @ to_other[:, :2].T + to_other[:, 2]
    depth = mapped[..., 2] * side
    visible = depth > 1e-9
    target = mapped[..., :2] / np.where(visible, depth * side, 1.0)[..., None]
    return np.where(visible[..., None], target, -1e6), visible.astype(np.float64)


def _read(rgb: np.ndarray, xy: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (H, W, 3) float32 of an image at points (H, W, 2), and weights that are 0 outside."""
    height, width = rgb.shape[:2]
    inside = (xy >= -0.5).all(-1) & (xy[..., 0] <= width - 0.5) & (xy[..., 1] <= height - 0.5)
    maps = np.clip(xy, -1, (width, height)).astype(np.float32)
    seen = cv2.remap(
        rgb, maps[..., 0], maps[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return seen.astype(np.float32), (weight * inside).astype(np.float32)[..., None]
