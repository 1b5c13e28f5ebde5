"""ALIKED keypoints and descriptors (Zhao et al., 2023), rearranged for speed and memory.

The network and its weights are kornia's; ``ALIKED.from_kornia`` takes them over. kornia builds a
128-channel feature map at full resolution, normalises it and unfolds every pixel's window. Here
nothing of 128 channels exists at full resolution:

* the first layer of the score head is linear and commutes with upsampling, so each scale is
  reduced to 8 channels before it is enlarged;
* descriptors read the feature map only at the pixels they need, interpolated from the four scales;
* deformable convolution and descriptor sampling are weighted sums of a few rows of a table, which
  is what ``embedding_bag`` does in one pass;
* batch normalisation is folded into the convolutions.

Letters: C channels, P pixels or sample positions, N keypoints, K = 16 sample positions per
keypoint. Tensors are channels-last; tables are (pixels, C).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.keypoints import Detection, Subpixel, refine, select_maxima

_STRIP = 1 << 14  # pixels at once where 32 channels at full resolution pass by


class _Deformable(nn.Module):
    """3x3 deformable convolution; the offsets come from the input (Dai et al., 2017)."""

    def __init__(self, offsets: Any, conv: Any) -> None:
        super().__init__()
        self.offsets = offsets
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve x (1, C, h, w)."""
        _, channels, h, w = x.shape
        limit = max(h, w) / 4.0
        # (h, w, 9, 2), last axis y, x
        shift = self.offsets(x).clamp(-limit, limit)[0].permute(1, 2, 0).reshape(h, w, 9, 2)
        tap = torch.arange(9, device=x.device)
        y = torch.arange(h, device=x.device)[:, None, None] + (tap // 3 - 1) + shift[..., 0]
        x_ = torch.arange(w, device=x.device)[:, None] + (tap % 3 - 1) + shift[..., 1]
        sampled = sample(table_of(x), h, w, x_.flatten(), y.flatten())
        weight = self.conv.weight.permute(2, 3, 1, 0).reshape(9 * channels, -1)
        out = torch.addmm(self.conv.bias, sampled.view(h * w, 9 * channels), weight)
        return out.view(1, h, w, -1).permute(0, 3, 1, 2)


class ALIKED(nn.Module):
    """ALIKED for inference on one image at a time.

    Make it with ``from_kornia``.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            [
                _folded(source.block1.conv1, source.block1.bn1),
                _folded(source.block1.conv2, source.block1.bn2),
            ]
        )
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList(
                [_folded(block.conv1, block.bn1), _folded(block.conv2, block.bn2), block.downsample]
            )
            for block in (source.block2, source.block3, source.block4)
        )
        # 1x1 convolutions as matrices (C_in, C_out)
        self.lateral: Any = nn.ParameterList(
            _matrix(conv) for conv in (source.conv1, source.conv2, source.conv3, source.conv4)
        )
        quarter = self.lateral[0].shape[1]
        reduce = _matrix(source.score_head[0])
        self.reduce: Any = nn.ParameterList(
            nn.Parameter(reduce[i * quarter : (i + 1) * quarter].clone()) for i in range(4)
        )
        self.score_convs = nn.ModuleList(source.score_head[i] for i in (2, 4, 6))
        head = source.desc_head
        offset = head.offset_conv[0]
        self.window = nn.Linear(9 * 4 * quarter, offset.out_channels)
        # rows of a window are its pixels, row by row, then channels
        self.window.weight.data = offset.weight.data.permute(0, 2, 3, 1).flatten(1).contiguous()
        self.window.bias = offset.bias
        self.to_offset = nn.Parameter(_matrix(head.offset_conv[2]).data)
        self.offset_bias = head.offset_conv[2].bias
        self.sampled = nn.Parameter(_matrix(head.sf_conv).data)
        self.aggregate = nn.Parameter(head.agg_weights.data.flatten(0, 1))
        self.positions = head.n_pos

    @classmethod
    def from_kornia(cls, source: Any) -> ALIKED:
        """Take the weights of kornia's ``ALIKED`` over, for inference."""
        model: Any = cls(source).eval().requires_grad_(False)
        typed: ALIKED = model.to(memory_format=torch.channels_last)
        return typed

    def scales(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features (1, C, h, w) of an image (1, 3, H, W) at strides 1, 2, 8, 32."""
        x = image.contiguous(memory_format=torch.channels_last)
        for conv in self.first:
            x = F.selu(conv(x), inplace=True)
        found = [x]
        for (conv1, conv2, shortcut), factor in zip(self.blocks, (2, 4, 4), strict=True):
            x = F.avg_pool2d(x, factor)
            y = conv2(F.selu(conv1(x), inplace=True))
            x = F.selu(y.add_(shortcut(x)), inplace=True)
            found.append(x)
        return found

    def score_logits(self, scales: list[torch.Tensor], tables: list[torch.Tensor]) -> torch.Tensor:
        """Logits (H, W) of the keypoint score.

        Args:
            scales: of ``scales``.
            tables: (pixels, C) features after the lateral layers of strides 2, 8 and 32.
        """
        height, width = scales[0].shape[-2:]
        pixels = table_of(scales[0])
        score = pixels.new_empty(height * width, self.reduce[0].shape[1])
        for start in range(0, len(pixels), _STRIP):
            part = F.selu(pixels[start : start + _STRIP] @ self.lateral[0], inplace=True)
            torch.mm(part, self.reduce[0], out=score[start : start + _STRIP])
        score = score.view(1, height, width, -1).permute(0, 3, 1, 2)
        for table, x, weight in zip(tables, scales[1:], self.reduce[1:], strict=True):
            h, w = x.shape[-2:]
            small = (table @ weight).view(1, h, w, -1).permute(0, 3, 1, 2)
            score += F.interpolate(small, (height, width), mode="bilinear", align_corners=True)
        for conv in self.score_convs:
            score = conv(F.selu(score, inplace=True))
        return score[0, 0]

    @torch.inference_mode()
    def detect_and_describe(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float,
        radius: int = 2,
        subpixel: Subpixel = "quadratic",
        mask: torch.Tensor | None = None,
    ) -> Detection:
        """See ``Detector``; images are RGB, scores in (0, 1)."""
        height, width = image.shape[-2:]
        scales, tables, (left, top) = self._maps(image)
        logits = self.score_logits(scales, tables)[top : top + height, left : left + width]
        logits = logits.contiguous()
        # Strong scores differ little, and some round to 1; their logits keep the order.
        threshold = math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
        index = select_maxima(
            logits, max_keypoints=max_keypoints, threshold=threshold, radius=radius, mask=mask
        )
        xy = refine(logits, index, radius=radius, method=subpixel)
        if len(xy) == 0:
            return Detection(xy, xy.new_empty(0, self.aggregate.shape[1]), xy.new_empty(0))
        described = self._describe_all(scales, tables, xy, (width, height), (left, top))
        return Detection(xy, described, logits.flatten()[index].sigmoid())

    @torch.inference_mode()
    def describe_points(self, image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """See ``Detector``."""
        if len(xy) == 0:
            return xy.new_empty(0, self.aggregate.shape[1])
        height, width = image.shape[-2:]
        scales, tables, origin = self._maps(image)
        return self._describe_all(scales, tables, xy, (width, height), origin)

    def _maps(
        self, image: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[int, int]]:
        """Features of ``scales``, tables after the lateral layers, and (left, top) padding."""
        height, width = image.shape[-2:]
        below, right = -height % 32, -width % 32
        top, left = below // 2, right // 2
        padded = F.pad(image[None], (left, right - left, top, below - top), mode="replicate")
        scales = self.scales(padded)
        tables = [
            F.selu(table_of(x) @ weight, inplace=True)
            for x, weight in zip(scales[1:], self.lateral[1:], strict=True)
        ]
        return scales, tables, (left, top)

    def _describe_all(
        self,
        scales: list[torch.Tensor],
        tables: list[torch.Tensor],
        xy: torch.Tensor,
        size: tuple[int, int],
        origin: tuple[int, int],
    ) -> torch.Tensor:
        """``describe`` in parts whose samples a processor's cache holds."""
        parts = xy.split(512)
        return torch.cat([self.describe(scales, tables, part, size, origin) for part in parts])

    def describe(
        self,
        scales: list[torch.Tensor],
        tables: list[torch.Tensor],
        xy: torch.Tensor,
        size: tuple[int, int],
        origin: tuple[int, int],
    ) -> torch.Tensor:
        """Unit descriptors (N, D) at keypoints.

        Args:
            scales: of ``scales``.
            tables: features after the lateral layers of strides 2, 8 and 32.
            xy: (N, 2) x, y in pixels of the image without padding.
            size: (width, height) without padding.
            origin: (left, top) padding.
        """
        width, height = size
        limit = max(size) / 4.0
        grid = torch.arange(-1, 2, device=xy.device)
        # The window around the keypoint's pixel, moved inside the image.
        column = (xy[:, 0].long() - 1).clamp(0, max(width - 4, 0)) + 1
        row = (xy[:, 1].long() - 1).clamp(0, max(height - 4, 0)) + 1
        columns = (column[:, None, None] + grid[None, None, :]).expand(-1, 3, 3)
        rows = (row[:, None, None] + grid[None, :, None]).expand(-1, 3, 3)
        window = self.features(
            scales, tables, columns.flatten(), rows.flatten(), size, origin
        ).view(len(xy), -1)
        offset = F.selu(self.window(window)) @ self.to_offset + self.offset_bias
        offset = offset.clamp(-limit, limit).view(-1, 2, self.positions).transpose(1, 2)
        place = (xy[:, None] + offset).flatten(0, 1)

        # Interpolating normalised features: the four corner pixels first, then their mean.
        corner, weight = corners(place[:, 0], place[:, 1], height, width)
        needed, lookup = torch.unique(corner, return_inverse=True)
        y, x = needed.div(width, rounding_mode="floor"), needed % width
        table = self.features(scales, tables, x, y, size, origin)
        samples = weighted_rows(table, lookup, weight)
        samples = F.selu(samples @ self.sampled, inplace=True).view(len(xy), -1)
        return F.normalize(samples @ self.aggregate, dim=1)

    def features(
        self,
        scales: list[torch.Tensor],
        tables: list[torch.Tensor],
        x: torch.Tensor,
        y: torch.Tensor,
        size: tuple[int, int],
        origin: tuple[int, int],
    ) -> torch.Tensor:
        """Normalised features (P, D) of whole pixels x, y (P,) of the image without padding."""
        left, top = origin
        x, y = x.clamp(0, size[0] - 1) + left, y.clamp(0, size[1] - 1) + top
        height, width = scales[0].shape[-2:]
        parts = [F.selu(table_of(scales[0])[y * width + x] @ self.lateral[0], inplace=True)]
        for table, scale in zip(tables, scales[1:], strict=True):
            h, w = scale.shape[-2:]
            # corners of the maps lie on each other (align_corners)
            parts.append(
                sample(table, h, w, x * ((w - 1) / (width - 1)), y * ((h - 1) / (height - 1)))
            )
        return F.normalize(torch.cat(parts, 1), dim=1)


def table_of(x: torch.Tensor) -> torch.Tensor:
    """(1, C, h, w), channels-last in memory, as rows (h * w, C)."""
    return x[0].permute(1, 2, 0).reshape(-1, x.shape[1])


def corners(
    x: torch.Tensor, y: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear interpolation with zeros outside.

    Args:
        x: (P,) positions in pixels, integer = centre.
        y: (P,) the same.
        height: of the map, pixels.
        width: of the map, pixels.

    Returns:
        (P, 4) flat indices of the pixels around, and (P, 4) their weights.
    """
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    columns = torch.stack([x0, x0 + 1, x0, x0 + 1], 1)
    rows = torch.stack([y0, y0, y0 + 1, y0 + 1], 1)
    gx, gy = 1 - fx, 1 - fy
    weight = torch.stack([gx * gy, fx * gy, gx * fy, fx * fy], 1)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return index.long(), weight * inside


def weighted_rows(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums (P, C) of the rows index (P, J) of a table (rows, C), times weight (P, J)."""
    return F.embedding_bag(index, table, per_sample_weights=weight.to(table.dtype), mode="sum")


def sample(
    table: torch.Tensor, height: int, width: int, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Bilinear samples (P, C) of a map given as rows (height * width, C); zeros outside."""
    index, weight = corners(x, y, height, width)
    return weighted_rows(table, index, weight)


def _matrix(conv: nn.Conv2d) -> nn.Parameter:
    """A 1x1 convolution's weight as (C_in, C_out)."""
    return nn.Parameter(conv.weight.data[:, :, 0, 0].T.contiguous())


def _folded(conv: Any, norm: nn.BatchNorm2d) -> nn.Module:
    """A convolution, plain or deformable, with the batch normalisation after it."""
    plain = getattr(conv, "regular_conv", conv)
    fused: nn.Module = torch.nn.utils.fusion.fuse_conv_bn_eval(plain.eval(), norm.eval())
    return fused if plain is conv else _Deformable(conv.offset_conv, fused)  # type: ignore[arg-type]
