"""Dense correspondence of two images: where each point of one lies in the other.

Normalised coordinates (u, v) span the rectangle that a network saw, padding included: -1 and 1 are
its *edges*, so that cell i of n has its centre at (2 i + 1) / n - 1 (``align_corners=False``).
``frame`` matrices carry them to pixels of the stored image in hloc's frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


def cell_centres(
    height: int, width: int, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalised centres (u, v) of a grid's cells, (height, width, 2)."""
    v = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=device, dtype=dtype)
    u = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=device, dtype=dtype)
    return torch.stack([u[None].expand(height, width), v[:, None].expand(height, width)], -1)


def normalised_frame(
    width: int, height: int, to_stored: np.ndarray, *, left: int = 0, top: int = 0
) -> np.ndarray:
    """Matrix (2, 3), float64, from normalised coordinates to stored pixels, hloc's frame.

    Args:
        width: of the rectangle that spans [-1, 1], in network pixels, padding included.
        height: likewise.
        to_stored: (2, 3) network pixel -> stored pixel, both in hloc's frame.
        left: columns of padding left of the image.
        top: rows of padding above it.
    """
    # The corner of the top left pixel is (-0.5, -0.5) in hloc's frame.
    network = np.array(
        [
            [width / 2, 0, width / 2 - left - 0.5],
            [0, height / 2, height / 2 - top - 0.5],
            [0, 0, 1],
        ]
    )
    frame: np.ndarray = np.asarray(to_stored, dtype=np.float64) @ network
    return frame


def transform(matrix: np.ndarray, xy: torch.Tensor) -> torch.Tensor:
    """Map points (..., 2) by a (2, 3) matrix, in float64, returning float32 on their device."""
    m = torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float64)).to(xy.device)
    return (xy.double() @ m[:, :2].T + m[:, 2]).float()


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a (2, 3) affine matrix, float64."""
    full = np.vstack([np.asarray(matrix, dtype=np.float64), [0.0, 0.0, 1.0]])
    inverted: np.ndarray = np.linalg.inv(full)[:2]
    return inverted


def read_grid(grid: torch.Tensor, uv: torch.Tensor, *, mode: str = "bilinear") -> torch.Tensor:
    """Values (N, C) of a grid (H, W, C) at normalised points (N, 2); the border value outside."""
    values = F.grid_sample(
        grid.permute(2, 0, 1)[None].float(),
        uv[None, None].float(),
        mode=mode,
        padding_mode="border",
        align_corners=False,
    )
    return values[0, :, 0].T


@dataclass(kw_only=True)
class Reading:
    """What a warp says about N points of one image.

    Attributes:
        xy_px: (N, 2) float32 their places in the other image, stored pixels, hloc's frame.
        certainty: (N,) float32 in [0, 1]; 0 where the warp says nothing.
        cycle_px: (N,) float32 distance from the point after going there and back, in cells of the
            warp's grid over this image (network scale).
    """

    xy_px: torch.Tensor
    certainty: torch.Tensor
    cycle_px: torch.Tensor


@dataclass(kw_only=True)
class Warp:
    """Both directed warps of a pair (0, 1). All tensors are on one device.

    Attributes:
        flow0: (H, W, 2) for each cell of a grid over image 0 its place in image 1, normalised.
        flow1: the same from image 1 to image 0; its grid may have another size.
        certainty0: (H, W) in [0, 1]; 0 in padding, on masked pixels and where the target lies
            outside image 1 or on its mask.
        certainty1: the same for ``flow1``.
        frame0: (2, 3) float64, normalised -> stored pixels of image 0, hloc's frame.
        frame1: the same for image 1.
    """

    flow0: torch.Tensor
    flow1: torch.Tensor
    certainty0: torch.Tensor
    certainty1: torch.Tensor
    frame0: np.ndarray
    frame1: np.ndarray

    def swapped(self) -> Warp:
        """The same warp with the images in the other order."""
        return Warp(
            flow0=self.flow1,
            flow1=self.flow0,
            certainty0=self.certainty1,
            certainty1=self.certainty0,
            frame0=self.frame1,
            frame1=self.frame0,
        )

    def read(self, xy_px: torch.Tensor) -> Reading:
        """Read the warp at points of image 0 (use ``swapped()`` for image 1).

        Args:
            xy_px: (N, 2) stored pixels of image 0, hloc's frame.
        """
        uv = transform(inverse(self.frame0), xy_px.to(self.flow0.device))
        there = read_grid(self.flow0, uv)
        back = read_grid(self.flow1, there)
        height, width = self.flow0.shape[:2]
        cells = uv.new_tensor([width / 2, height / 2])
        inside = (uv.abs() <= 1).all(1) & (there.abs() <= 1).all(1)
        certainty = read_grid(self.certainty0[..., None], uv)[:, 0]
        return Reading(
            xy_px=transform(self.frame1, there),
            certainty=torch.where(inside, certainty, torch.zeros_like(certainty)),
            cycle_px=((back - uv) * cells).norm(dim=1),
        )

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All cells of both directions as rows.

        Returns:
            (N, 4) normalised (u0, v0, u1, v1) of every cell, image 0's grid first, and the
            certainties (N,).
        """
        grid0, grid1 = (
            cell_centres(*flow.shape[:2], device=flow.device) for flow in (self.flow0, self.flow1)
        )
        rows0 = torch.cat([grid0, self.flow0.float()], -1).reshape(-1, 4)
        rows1 = torch.cat([self.flow1.float(), grid1], -1).reshape(-1, 4)
        certainty = torch.cat([self.certainty0.reshape(-1), self.certainty1.reshape(-1)])
        return torch.cat([rows0, rows1]), certainty.float()
