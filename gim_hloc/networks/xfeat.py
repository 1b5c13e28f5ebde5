"""XFeat (Potje et al., CVPR 2024): keypoints, and the semi-dense matches of XFeat*.

Modules have the names of the published weights. Two things look odd and are part of these: maps
are sampled at ``x * w / (W - 1) - 0.5``, and descriptors of XFeat* are not normalised.

Letters: H, W of the image as the network sees it, h = H / 8 and w = W / 8 of its maps, N keypoints
or cells, M matches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.keypoints import Detection, Subpixel, refine, select_maxima

CELL = 8  # px of the network's image per cell of its maps
_MULTIPLE = 32  # px: of the sides of the network's image
_SCALES = ((0.6, 0.2), (1.3, 0.8))  # of XFeat*: size of the image, share of the cells
_SHARPNESS = 3.0  # of the softmax over a cell's pixels in XFeat*


class Maps(NamedTuple):
    """What the network makes of an image."""

    descriptors: torch.Tensor  # (1, 64, h, w), not normalised
    reliability: torch.Tensor  # (1, 1, h, w) in (0, 1)
    logits: torch.Tensor  # (1, 65, h, w): the pixels of a cell row by row, then "no keypoint"


class Cells(NamedTuple):
    """Cells of one image that XFeat* matches, from both scales."""

    corner: torch.Tensor  # (N, 2) x, y of the first pixel of a cell, network pixels of its scale
    step: torch.Tensor  # (N, 2) pixels of the image per network pixel
    descriptors: torch.Tensor  # (N, 64), not normalised


class _Layer(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs, affine=False),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def fold(self) -> None:
        conv: Any = self.layer[0]
        norm: Any = self.layer[1]
        self.layer = nn.Sequential(
            torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm), nn.ReLU(inplace=True)
        )


class XFeat(nn.Module):
    """The network for inference on one image at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.skip1 = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(
            _Layer(1, 4), _Layer(4, 8, stride=2), _Layer(8, 8), _Layer(8, 24, stride=2)
        )
        self.block2 = nn.Sequential(_Layer(24, 24), _Layer(24, 24))
        self.block3 = nn.Sequential(_Layer(24, 64, stride=2), _Layer(64, 64), _Layer(64, 64, 1))
        self.block4 = nn.Sequential(_Layer(64, 64, stride=2), _Layer(64, 64), _Layer(64, 64))
        self.block5 = nn.Sequential(
            _Layer(64, 128, stride=2), _Layer(128, 128), _Layer(128, 128), _Layer(128, 64, 1)
        )
        self.block_fusion = nn.Sequential(_Layer(64, 64), _Layer(64, 64), nn.Conv2d(64, 64, 1))
        self.heatmap_head = nn.Sequential(
            _Layer(64, 64, 1), _Layer(64, 64, 1), nn.Conv2d(64, 1, 1), nn.Sigmoid()
        )
        self.keypoint_head = nn.Sequential(
            _Layer(64, 64, 1), _Layer(64, 64, 1), _Layer(64, 64, 1), nn.Conv2d(64, 65, 1)
        )
        hidden = [
            part
            for inputs in (128, 512, 512, 512)
            for part in (
                nn.Linear(inputs, 512),
                nn.BatchNorm1d(512, affine=False),
                nn.ReLU(inplace=True),
            )
        ]
        self.fine_matcher = nn.Sequential(*hidden, nn.Linear(512, CELL * CELL))

    def fold(self) -> XFeat:
        """Fold batch normalisation into the convolutions: faster, and trained no more."""
        self.eval().requires_grad_(False)
        for module in list(self.modules()):
            if isinstance(module, _Layer):
                module.fold()
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def dense(self, gray: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Descriptors and reliability (see ``Maps``) of a normalised image (1, 1, H, W)."""
        x2 = self.block2(self.block1(gray) + self.skip1(gray))
        x3 = self.block3(x2)
        x4 = self.block4(x3)
        x5 = self.block5(x4)
        size = x3.shape[-2:]
        for coarse in (x4, x5):
            x3 = x3 + F.interpolate(coarse, size, mode="bilinear")
        descriptors = self.block_fusion(x3)
        return descriptors, self.heatmap_head(descriptors)

    def forward(self, gray: torch.Tensor) -> Maps:
        """Maps of a normalised image (1, 1, H, W)."""
        descriptors, reliability = self.dense(gray)
        # A cell's logits depend on its own pixels alone.
        return Maps(descriptors, reliability, self.keypoint_head(F.pixel_unshuffle(gray, CELL)))

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
        """See ``Detector``; scores are in [0, 1], ``threshold`` is of the heat."""
        height, width = image.shape[-2:]
        maps = self(_padded(normalise(image[None])))
        heat = heat_map(maps.logits)[0, 0, :height, :width].contiguous()
        index = select_maxima(heat, max_keypoints=-1, threshold=threshold, radius=radius, mask=mask)
        whole = refine(heat, index, radius=radius, method="none")
        scores = heat.flatten()[index] * sample(maps.reliability, whole, "bilinear")[:, 0]
        best = scores.sort(descending=True, stable=True).indices[:max_keypoints]
        # The root makes peaks rounder: epipolar errors are a twentieth smaller than with the heat.
        xy = refine(heat.sqrt(), index[best], radius=radius, method=subpixel)
        return Detection(xy, describe(maps, whole[best]), scores[best])

    @torch.inference_mode()
    def describe_points(self, image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """See ``Detector``; descriptors are those of the nearest pixels."""
        return describe(self(_padded(normalise(image[None]))), xy.round())

    @torch.inference_mode()
    def cells(
        self, image: torch.Tensor, *, max_cells: int, mask: torch.Tensor | None = None
    ) -> Cells:
        """The most reliable cells of an image at both scales of XFeat*.

        Args:
            image: (C, H, W) in [0, 1], of any size.
            max_cells: at most so many at both scales together.
            mask: (H, W) bool, True where cells may begin.
        """
        parts = []
        for scale, share in _SCALES:
            if scale * min(image.shape[-2:]) < 1:
                continue
            gray, step = shrunk(image.mean(0)[None, None], scale)
            descriptors, reliability = self.dense(normalise(gray))
            value = reliability[0, 0]
            row, column = torch.meshgrid(*map(torch.arange, value.shape), indexing="ij")
            corner = CELL * torch.stack([column, row], -1).to(value.device)
            if mask is not None:
                x, y = (corner * step).long().unbind(-1)
                value = value.where(mask.to(value.device)[y, x], -1.0)
            order = value.flatten().sort(descending=True, stable=True).indices
            best = order[: min(int(share * max_cells), int((value >= 0).sum()))]
            corner = corner.flatten(0, 1)[best].float()
            parts.append((corner, step.expand(len(best), 2), descriptors[0].flatten(1).T[best]))
        return Cells(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @torch.inference_mode()
    def offsets(
        self, descriptors0: torch.Tensor, descriptors1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in the cells of image 0 the matched cells of image 1 are.

        Args:
            descriptors0: (M, 64) of ``Cells``.
            descriptors1: (M, 64) of the matched ones.

        Returns:
            (M, 2) x, y from -4 to 3 in network pixels of image 0, and confidences (M,).
        """
        logits = self.fine_matcher(torch.cat([descriptors0, descriptors1], 1))
        share = (_SHARPNESS * logits).softmax(1).unflatten(1, (CELL, CELL))
        place = torch.arange(CELL, device=share.device, dtype=share.dtype) - CELL // 2
        offset = torch.stack([share.sum(1) @ place, share.sum(2) @ place], 1)
        return offset, share.flatten(1).amax(1)


def normalise(image: torch.Tensor) -> torch.Tensor:
    """The mean of an image's channels (1, C, H, W), with mean 0 and variance 1."""
    gray = image.mean(1, keepdim=True)
    variance, mean = torch.var_mean(gray, dim=(2, 3), correction=0, keepdim=True)
    return (gray - mean) / (variance + 1e-5).sqrt()


def shrunk(image: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize an image (1, C, H, W) by a scale, then down to sides that the network takes.

    Returns:
        the image, and (2,) pixels of the given image per pixel of it, x, y.
    """
    if scale != 1.0:
        image = F.interpolate(image, scale_factor=scale, mode="bilinear")
    height, width = image.shape[-2:]
    size = [max(_MULTIPLE, side - side % _MULTIPLE) for side in (height, width)]
    step = image.new_tensor([width / size[1], height / size[0]]) / scale
    return F.interpolate(image, size, mode="bilinear"), step


def heat_map(logits: torch.Tensor) -> torch.Tensor:
    """Probability (1, 1, H, W) of a keypoint at each pixel from logits (1, 65, h, w)."""
    return F.pixel_shuffle(logits.softmax(1)[:, :-1], CELL)


def sample(maps: torch.Tensor, xy: torch.Tensor, mode: str) -> torch.Tensor:
    """Values (N, C) of maps (1, C, h, w) at network pixels (N, 2), zeros outside."""
    height, width = maps.shape[-2:]
    last = xy.new_tensor([width, height]) * CELL - 1
    grid = 2 * xy / last - 1
    found = F.grid_sample(maps, grid[None, None], mode=mode, align_corners=False)
    return found[0, :, 0].T


def describe(maps: Maps, xy: torch.Tensor) -> torch.Tensor:
    """Unit descriptors (N, 64) at network pixels (N, 2)."""
    return F.normalize(sample(F.normalize(maps.descriptors, dim=1), xy, "bicubic"), dim=1)


def _padded(gray: torch.Tensor) -> torch.Tensor:
    """A normalised image (1, 1, H, W) with sides that the network takes."""
    height, width = gray.shape[-2:]
    right, below = -width % _MULTIPLE, -height % _MULTIPLE
    return F.pad(gray, (0, right, 0, below), mode="replicate")
