"""The convolutions of VGG-19 with batch norm (Simonyan and Zisserman, 2015), as RoMa uses them.

Weights are numbered as in torchvision's ``vgg19_bn().features``, up to the fourth pooling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

_REPEATS = (2, 2, 4, 4)  # convolutions between two poolings


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one convolution that does both in evaluation.

    Folded on every call: that costs no more than a look at the weights, where a batch norm of its
    own would cost a look at the whole feature map.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    bias = conv.bias if conv.bias is not None else 0
    weight = conv.weight * scale[:, None, None, None]
    return weight, (bias - norm.running_mean) * scale + norm.bias


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Convolution and batch norm; one convolution in evaluation without gradients."""
    if norm.training or torch.is_grad_enabled():
        return norm(conv(x))
    weight, bias = fold(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class VGG19(nn.Module):
    """Features before each of the four poolings: strides 1, 2, 4 and 8.

    Args:
        widths: channels at these strides.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width, repeats in zip(widths, _REPEATS, strict=True):
            for _ in range(repeats):
                layers += [
                    nn.Conv2d(inputs, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                inputs = width
            layers.append(nn.MaxPool2d(2, 2))
        self.layers = nn.ModuleList(layers)

    def stages(self, image: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (stride, features) from fine to coarse.

        One after the other, because those of stride 1 take most of the memory and the caller may
        need a projection of them only.

        Args:
            image: (B, 3, H, W).
        """
        x, stride = image, 1
        modules: Iterator[nn.Module] = iter(self.layers)
        for module in modules:
            if isinstance(module, nn.MaxPool2d):
                yield stride, x
                if stride == 8:
                    return
                x, stride = module(x), 2 * stride
            else:
                assert isinstance(module, nn.Conv2d)
                norm = next(modules)
                assert isinstance(norm, nn.BatchNorm2d)
                x = next(modules)(conv_norm(module, norm, x))
