"""DKM (Edstedt et al., "DKM: Dense Kernelized Feature Matching", CVPR 2023), version 3.

Written anew after the paper and the layout of the published checkpoints. A ResNet-50 sees each
image at two sizes. At strides 32 and 16 a Gaussian process regresses where each cell lies in the
other image and a small decoder reads that off; refiners at strides 16 to 1 improve it. A second
pass repeats strides 8 to 1 on larger images.

``encode`` holds everything that one image decides, ``match`` does the rest for pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.dense import (
    ConvRefiner,
    GaussianProcess,
    Record,
    attenuated_certainty,
    refine,
    resize,
)
from gim_hloc.networks.resnet import ResNet50

_CONTEXT = 384  # channels that the coarse decoder hands from stride to stride
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

Features = Mapping[str, torch.Tensor]
"""``"pass/stride"`` -> (B, C, h, w), and ``"gp/stride"`` -> (B, h w, 256) in float32."""


class Encoder(nn.Module):
    """ResNet-50 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet50()

    def forward(self, x: torch.Tensor, *, layers: int = 4) -> dict[int, torch.Tensor]:
        """Features by stride: 1 (the image itself), 2, 4, ... up to ``layers`` layers."""
        return {1: x} | {2 << i: f for i, f in enumerate(self.net(x, layers=layers))}


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        return F.relu(x + self.conv3(F.relu(self.bn(self.conv2(x)))))


class _ChannelAttention(nn.Module):
    """Adds ``new`` to ``old``, channel by channel as much as both together ask for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([old, new], 1).mean((2, 3), keepdim=True)
        return old + new * torch.sigmoid(self.conv2(F.relu(self.conv1(pooled))))


class EmbeddingDecoder(nn.Module):
    """Reads flow and certainty off the Gaussian process' answer, at strides 32 and 16."""

    def __init__(self) -> None:
        super().__init__()

        def at_both(module: type[nn.Module], *arguments: int) -> nn.ModuleDict:
            return nn.ModuleDict({str(stride): module(*arguments) for stride in (32, 16)})

        self.feat_input_modules = at_both(nn.Conv2d, 512, 256, 1)
        self.rrb_d = at_both(_ResidualBlock, 512, _CONTEXT)
        self.cab = at_both(_ChannelAttention, _CONTEXT)
        self.rrb_u = at_both(_ResidualBlock, _CONTEXT, _CONTEXT)
        self.terminal_module = at_both(nn.Conv2d, _CONTEXT, 3, 1)

    def forward(
        self, answer: torch.Tensor, features: torch.Tensor, context: torch.Tensor, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flow (B, 2, h, w), certainty logits (B, 1, h, w) and the context for the next stride.

        Args:
            answer: (B, 256, h, w) of the Gaussian process.
            features: (B, 512, h, w) of the image that is asked about.
            context: (B, 384, ., .) from the stride before; zeros at first.
            stride: 32 or 16.
        """
        key = str(stride)
        reduced = self.feat_input_modules[key](features)
        context = resize(context, (features.shape[-2], features.shape[-1]))
        embedded = self.rrb_d[key](torch.cat([reduced, answer], 1))
        context = self.rrb_u[key](self.cab[key](context, embedded))
        out = self.terminal_module[key](context)
        return out[:, 1:], out[:, :1], context


class Decoder(nn.Module):
    """Everything behind the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_decoder = EmbeddingDecoder()
        self.gps: Any = nn.ModuleDict({"32": GaussianProcess(256), "16": GaussianProcess(256)})
        self.proj: Any = nn.ModuleDict(
            {"16": nn.Conv2d(1024, 512, 1), "32": nn.Conv2d(2048, 512, 1)}
        )
        self.conv_refiner: Any = nn.ModuleDict(
            {
                "16": ConvRefiner(features=512, embedding=128, radius=7),
                "8": ConvRefiner(features=512, embedding=64, radius=3),
                "4": ConvRefiner(features=256, embedding=32, radius=2),
                "2": ConvRefiner(features=64, embedding=16),
                "1": ConvRefiner(features=3, embedding=6, multiplier=2),
            }
        )


class DKM(nn.Module):
    """Dense matching of image pairs, both ways.

    Args:
        normalise: subtract ImageNet's mean and divide by its deviation. Upstream's checkpoints want
            it, GIM's want plain [0, 1].
    """

    def __init__(self, *, normalise: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.normalise = normalise

    def encode(
        self,
        images: torch.Tensor,
        *,
        size: tuple[int, int],
        upsample_size: tuple[int, int] | None,
        dtype: torch.dtype = torch.float32,
        record: Record | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute what depends on single images.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            size: (height, width) of the first pass.
            upsample_size: of the second pass, or None to leave it out.
            dtype: of the encoder and of features at strides 1 to 8. Strides 16 and 32, which the
                Gaussian process compares, are held in float32.
            record: given encoder features and projections by name.

        Returns:
            See ``Features``.
        """
        record = record or _ignore
        images = images.float()
        if self.normalise:
            mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
            images = (images - mean) / std
        held: dict[str, torch.Tensor] = {}
        autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
        with autocast:
            pyramid = self.encoder(resize(images, size))
            for stride in (32, 16):
                record(f"pass0_enc{stride}", pyramid[stride])
                projected = self.decoder.proj[str(stride)](pyramid.pop(stride)).float()
                record(f"proj{stride}_0", projected)
                held[f"0/{stride}"] = projected
                held[f"gp/{stride}"] = self.decoder.gps[str(stride)].factor(projected)
            self._hold(held, 0, pyramid, dtype, record)
            if upsample_size is not None:
                # Its deeper half is not used: strides 16 and 32 keep the first pass' answer.
                pyramid = self.encoder(resize(images, upsample_size), layers=2)
                self._hold(held, 1, pyramid, dtype, record)
        return held

    @staticmethod
    def _hold(
        held: dict[str, torch.Tensor],
        number: int,
        pyramid: dict[int, torch.Tensor],
        dtype: torch.dtype,
        record: Record,
    ) -> None:
        for stride in (8, 4, 2, 1):
            record(f"pass{number}_enc{stride}", pyramid[stride])
            held[f"{number}/{stride}"] = pyramid[stride].to(dtype)

    def match(
        self,
        a: Features,
        b: Features,
        *,
        shared_factor: bool = False,
        record: Record | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match pairs, both ways at once.

        Args:
            a: features of the first images, see ``encode``.
            b: features of the second images, as many.
            shared_factor: see ``both_factors``.
            record: given intermediate results by name, of both directions: 0 -> 1, then 1 -> 0.

        Returns:
            Flow (2, B, h, w, 2), normalised targets a -> b and b -> a, not clamped, and certainty
            (2, B, h, w) in [0, 1], both float32.
        """
        record = record or _ignore

        sizes = [_size(a[f"{number}/1"]) for number in (0, 1) if f"{number}/1" in a]
        # The answer at stride 32 depends on features alone; stride 16 replaces its flow.
        context = a["0/32"].new_zeros(1, _CONTEXT, 1, 1)
        for stride in (32, 16):
            here, there = _both(a, b, f"0/{stride}")
            factors = both_factors(a[f"gp/{stride}"], b[f"gp/{stride}"], shared=shared_factor)
            answer = self.decoder.gps[str(stride)](here, there, factors)
            if stride == 32:
                context = context.expand(len(here), -1, -1, -1)
            flow, certainty, context = self.decoder.embedding_decoder(answer, here, context, stride)
            record(f"gp{stride}", answer)
            record(f"dfn{stride}_flow", flow)
            record(f"dfn{stride}_certainty", certainty)
            record(f"dfn{stride}_context", context)
            if stride == 32:
                record("pass0_flow32", flow)
                record("pass0_cert32", certainty)
        doubt = certainty
        for number, size in enumerate(sizes):
            for stride in (16, 8, 4, 2, 1):
                if stride == 16 and number == 1:
                    continue
                here, there = _both(a, b, f"{number}/{stride}")
                flow, certainty = resize(flow, _size(here)), resize(certainty, _size(here))
                dtype = a["0/1"].dtype

                def first_block(
                    name: str, value: torch.Tensor, stride: int = stride, number: int = number
                ) -> None:
                    if stride >= 8 and number == 0:
                        record(f"refiner{stride}_{name}", value)

                delta, change = self.decoder.conv_refiner[str(stride)](
                    here.to(dtype),
                    there.to(dtype),
                    flow,
                    record=first_block if record is not _ignore else None,
                )
                flow = refine(flow, delta, stride=stride, size=size)
                certainty = certainty + change
                if stride == 16:
                    doubt = certainty
                record(f"refiner{stride}_call{number}_dflow", delta)
                record(f"refiner{stride}_call{number}_dcert", change)
                record(f"pass{number}_flow{stride}", flow)
                record(f"pass{number}_cert{stride}", certainty)
        certainty = attenuated_certainty(certainty, doubt)[:, 0]
        return flow.permute(0, 2, 3, 1).unflatten(0, (2, -1)), certainty.unflatten(0, (2, -1))

    def compile_parts(self) -> None:
        """Compile the refiners for inference; see ``ConvRefiner.compile``."""
        for refiner in self.decoder.conv_refiner.values():
            refiner.compile()


def both_factors(a: torch.Tensor, b: torch.Tensor, *, shared: bool = False) -> torch.Tensor:
    """Factors of the Gaussian process for a batch of both directions: a -> b, then b -> a.

    Args:
        a: (B, N, dim) factors of the images 0.
        b: (B, N, dim) factors of the images 1.
        shared: repeat a mistake of the reference. On grids of more than 2000 cells (its default
            sizes among them) it inverts image 1's covariance only and solves b -> a with that too,
            which gives answers far out of range. Training was not affected: it ran one direction.
    """
    return torch.cat([b, b if shared and b.shape[1] > 2000 else a])


def _both(a: Features, b: Features, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of both directions: of the images asked about, and of the others."""
    return torch.cat([a[key], b[key]]), torch.cat([b[key], a[key]])


def _size(x: torch.Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])


def _ignore(_: str, __: torch.Tensor) -> None:
    pass
