"""What is where in a photograph: the scene parsing network of Zhou et al. (IJCV 2018).

A dilated ResNet-50 with pyramid pooling, trained on the 150 classes of ADE20K. Names of weights are
those of the published pair of files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.resnet import make_layer

CLASSES = {"wall": 0, "sky": 2, "person": 12, "car": 20}
"""Rows of the class table that matter here."""
MAX_SIZE = 1920  # long side that the network sees by default, pixels

_COUNT = 150  # classes
_SCALES = (1, 2, 3, 6)  # of the pyramid: cells along a side
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
_DEVIATION = (0.229, 0.224, 0.225)
_ROWS = 64  # of the label map made at a time: 150 classes of a whole image take gigabytes


class Encoder(nn.Module):
    """ResNet-50 with three small convolutions as stem; layers 3 and 4 dilated, stride 8."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for index, (outputs, stride) in enumerate(((64, 2), (64, 1), (128, 1)), 1):
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            setattr(self, f"conv{index}", conv)
            setattr(self, f"bn{index}", nn.BatchNorm2d(outputs))
            inputs = outputs
        self.layer1 = make_layer(1, 128, stride=1)
        self.layer2 = make_layer(2, 256, stride=2)
        self.layer3 = make_layer(3, 512, stride=1, dilations=(1, 2, 2, 2, 2, 2))
        self.layer4 = make_layer(4, 1024, stride=1, dilations=(2, 4, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of the four layers: 256, 512, 1024, 2048 channels at strides 4, 8, 8, 8."""
        for index in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """Pyramid pooling and the classifier. The branch of deep supervision is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.ppm = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), *_conv_bn(2048, 512, 1)) for scale in _SCALES
        )
        self.conv_last = nn.Sequential(
            *_conv_bn(2048 + 512 * len(_SCALES), 512, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(512, _COUNT, 1),
        )
        self.cbr_deepsup = nn.Sequential(*_conv_bn(1024, 512, 3))
        self.conv_last_deepsup = nn.Conv2d(512, _COUNT, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 150, h, w) from features (B, 2048, h, w)."""
        pooled = [
            F.interpolate(level(x), x.shape[2:], mode="bilinear", align_corners=False)
            for level in self.ppm
        ]
        logits: torch.Tensor = self.conv_last(torch.cat([x, *pooled], 1))
        return logits


def _conv_bn(inputs: int, outputs: int, side: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


class Segmentation(nn.Module):
    """Encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 150, H/8, W/8) of normalised images, see ``prepare``."""
        logits: torch.Tensor = self.decoder(self.encoder(x)[-1])
        return logits

    @torch.inference_mode()
    def segment(self, image: np.ndarray, *, max_size: int = MAX_SIZE) -> np.ndarray:
        """Class of each pixel.

        Args:
            image: (H, W, 3) uint8 RGB, upright.
            max_size: larger images are reduced to this long side, pixels.

        Returns:
            (h, w) uint8 rows of the class table, of the reduced size.
        """
        device = next(self.parameters()).device
        x = prepare(image, max_size).to(device)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            logits = self(x)
        return labels(logits[0].float(), (x.shape[2], x.shape[3])).cpu().numpy()


def reduced_size(width: int, height: int, max_size: int) -> tuple[int, int]:
    """(width, height) that the network sees: the long side limited, the other rounded down."""
    scale = max_size / max(width, height)
    if scale >= 1:
        return width, height
    if width >= height:
        return max_size, max(1, int(height * max_size / width))
    return max(1, int(width * max_size / height)), max_size


def prepare(image: np.ndarray, max_size: int = MAX_SIZE) -> torch.Tensor:
    """Reduced and normalised image (1, 3, h, w) from (H, W, 3) uint8 RGB."""
    import cv2

    size = reduced_size(image.shape[1], image.shape[0], max_size)
    if size != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
    return (x - mean) / deviation


def labels(logits: torch.Tensor, size: tuple[int, int], *, rows: int = _ROWS) -> torch.Tensor:
    """Best class of each pixel: logits (C, h, w) enlarged to ``size`` (height, width), uint8.

    In blocks of rows. Softmax keeps the order, so it is left out.
    """
    height, width = size
    channels, low, _ = logits.shape
    # Sampling positions of half-pixel aligned bilinear enlargement.
    y = ((torch.arange(height, device=logits.device) + 0.5) * (low / height) - 0.5).clamp(min=0)
    top = y.floor().long().clamp(max=low - 1)
    below, weight = (top + 1).clamp(max=low - 1), y - top
    parts = []
    for chunk in torch.arange(height, device=logits.device).split(rows):
        lines = torch.lerp(
            logits[:, top[chunk]], logits[:, below[chunk]], weight[chunk][None, :, None]
        )
        wide = F.interpolate(
            lines.reshape(1, channels * len(chunk), -1), width, mode="linear", align_corners=False
        )
        parts.append(wide.view(channels, len(chunk), width).argmax(0).to(torch.uint8))
    return torch.cat(parts)


def allowed(label_map: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """(H, W) bool: pixels of none of the given classes, names of ``CLASSES``."""
    return ~np.isin(label_map, [CLASSES[name] for name in classes])
