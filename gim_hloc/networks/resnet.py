"""ResNet-50 (He et al., CVPR 2016; stride in the 3x3, "v1.5") as the encoders here use it.

Names of weights are those of the published ImageNet checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; four times ``planes`` channels come out."""

    def __init__(
        self, inputs: int, planes: int, *, stride: int = 1, dilation: int = 1, project: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride=stride, bias=False),
                nn.BatchNorm2d(4 * planes),
            )
            if project
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, 4 planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


def make_layer(
    index: int,
    inputs: int,
    *,
    stride: int,
    dilations: Sequence[int] | None = None,
    width: int = 64,
) -> nn.Sequential:
    """Layer ``index`` (1 to 4): bottlenecks of 64, 128, 256 or 512 planes.

    Args:
        index: which layer.
        inputs: channels that come in.
        stride: of its first block.
        dilations: of each block's 3x3, one number per block; by default 1 in as many blocks as
            ResNet-50 has.
        width: planes of the first layer.
    """
    planes = width << (index - 1)
    dilations = dilations or (1,) * BLOCKS[index - 1]
    blocks = [Bottleneck(inputs, planes, stride=stride, dilation=dilations[0], project=True)]
    blocks += [Bottleneck(4 * planes, planes, dilation=d) for d in dilations[1:]]
    return nn.Sequential(*blocks)


class ResNet50(nn.Module):
    """The convolutional part of ResNet-50, up to a layer.

    Args:
        layers: how many of the four layers there are.
        max_pool: whether the stem is followed by the 3x3 max-pooling of stride 2.
        width: channels of the stem; layer k gives ``width << (k + 1)``. 64 is ResNet-50's.
        blocks: number of blocks of each layer.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        max_pool: bool = True,
        width: int = 64,
        blocks: Sequence[int] = BLOCKS,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.max_pool = max_pool
        self.layers = layers
        inputs = width
        for index in range(1, layers + 1):
            dilations = (1,) * blocks[index - 1]
            layer = make_layer(
                index, inputs, stride=1 + (index > 1), dilations=dilations, width=width
            )
            setattr(self, f"layer{index}", layer)
            inputs = width << (index + 1)

    def forward(self, x: torch.Tensor, *, layers: int | None = None) -> list[torch.Tensor]:
        """Features of the stem (after its ReLU, before pooling) and of each layer.

        Args:
            x: (B, 3, H, W).
            layers: stop after this many layers; all by default.
        """
        features = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(features[0], 3, stride=2, padding=1) if self.max_pool else features[0]
        for index in range(1, (self.layers if layers is None else layers) + 1):
            x = getattr(self, f"layer{index}")(x)
            features.append(x)
        return features
