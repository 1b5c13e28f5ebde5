"""DKM (Edstedt et al., "DKM: Dense Kernelized Feature Matching", CVPR 2023), version 3.

Written anew after the paper and the layout of the published checkpoints. A ResNet-50 sees each
image at two sizes. At strides 32 and 16 a Gaussian process regresses where each cell lies in the
other image and a small decoder reads that off; refiners at strides 16 to 1 improve it. A second
pass repeats strides 8 to 1 on larger images.

``encode`` holds everything that one image decides, ``match`` does the rest for pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.dense import (
    ConvRefiner,
    GaussianProcess,
    attenuated_certainty,
    count_modules,
    recomputed,
    refine,
    refiner_shapes,
    resize,
)
from gim_hloc.networks.resnet import BLOCKS, ResNet50

STRIDES = (32, 16, 8, 4, 2, 1)
_REFINED = (16, 8, 4, 2, 1)
_MULTIPLIER = {1: 2}  # of the channels inside the refiner at stride 1
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

Features = Mapping[str, torch.Tensor]
"""``"pass/stride"`` -> (B, C, h, w), and ``"gp/stride"`` -> (B, h w, 256) in float32."""


Read = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Stride -> features of the images asked about, and of the others."""


@dataclass(frozen=True, kw_only=True)
class DKMConfig:
    """Widths of the network, by stride where there are several."""

    stem: int = 64  # channels of the encoder at stride 2; 4, 8, 16 and 32 times that follow
    blocks: tuple[int, int, int, int] = BLOCKS  # of the encoder's layers
    projected: int = 512  # channels that the Gaussian processes compare
    reduced: int = 256  # of them, channels that the coarse decoder sees
    position: int = 256  # channels of the Gaussian processes' answer
    context: int = 384  # channels that the coarse decoder hands from stride to stride
    displacement: Mapping[int, int] = field(
        default_factory=lambda: {16: 128, 8: 64, 4: 32, 2: 16, 1: 6}
    )
    radius: Mapping[int, int] = field(default_factory=lambda: {16: 7, 8: 3, 4: 2})
    hidden: int = 8  # blocks of a refiner after its first

    @property
    def features(self) -> dict[int, int]:
        """Channels that the refiners compare, by stride."""
        n = self.stem
        return {16: self.projected, 8: 8 * n, 4: 4 * n, 2: n, 1: 3}

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> DKMConfig:
        """Widths of a checkpoint, prefixes taken off; the published ones if names are missing."""
        try:
            coarse = "decoder.embedding_decoder"
            first = cls(
                stem=len(state["encoder.net.conv1.weight"]),
                blocks=tuple(  # type: ignore[arg-type]
                    count_modules(state, f"encoder.net.layer{layer}.") for layer in range(1, 5)
                ),
                projected=len(state["decoder.proj.16.weight"]),
                reduced=len(state[f"{coarse}.feat_input_modules.16.weight"]),
                position=len(state["decoder.gps.16.pos_conv.weight"]),
                context=state[f"{coarse}.terminal_module.16.weight"].shape[1],
            )
            displacement, radius, hidden = refiner_shapes(state, first.features, _MULTIPLIER)
        except (KeyError, IndexError):
            return cls()
        return replace(first, displacement=displacement, radius=radius, hidden=hidden)


class Encoder(nn.Module):
    """ResNet-50 without its classifier."""

    def __init__(self, config: DKMConfig) -> None:
        super().__init__()
        self.net = ResNet50(width=config.stem, blocks=config.blocks)

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

    def __init__(self, config: DKMConfig) -> None:
        super().__init__()

        def at_both(module: type[nn.Module], *arguments: int) -> nn.ModuleDict:
            return nn.ModuleDict({str(stride): module(*arguments) for stride in (32, 16)})

        context = config.context
        self.feat_input_modules = at_both(nn.Conv2d, config.projected, config.reduced, 1)
        self.rrb_d = at_both(_ResidualBlock, config.reduced + config.position, context)
        self.cab = at_both(_ChannelAttention, context)
        self.rrb_u = at_both(_ResidualBlock, context, context)
        self.terminal_module = at_both(nn.Conv2d, context, 3, 1)

    def forward(
        self, answer: torch.Tensor, features: torch.Tensor, context: torch.Tensor, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flow (B, 2, h, w), certainty logits (B, 1, h, w) and the context for the next stride.

        Args:
            answer: (B, 256, h, w) of the Gaussian process (channels as published; ``DKMConfig``).
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

    def __init__(self, config: DKMConfig) -> None:
        super().__init__()
        self.embedding_decoder = EmbeddingDecoder(config)
        self.gps: Any = nn.ModuleDict(
            {str(stride): GaussianProcess(config.position) for stride in (32, 16)}
        )
        self.proj: Any = nn.ModuleDict(
            {
                str(stride): nn.Conv2d(stride * config.stem, config.projected, 1)
                for stride in (16, 32)
            }
        )
        self.conv_refiner: Any = nn.ModuleDict(
            {
                str(stride): ConvRefiner(
                    features=config.features[stride],
                    embedding=config.displacement[stride],
                    radius=config.radius.get(stride, 0),
                    hidden=config.hidden,
                    multiplier=_MULTIPLIER.get(stride, 1),
                )
                for stride in _REFINED
            }
        )


class DKM(nn.Module):
    """Dense matching of image pairs, both ways.

    Args:
        config: widths.
        normalise: subtract ImageNet's mean and divide by its deviation. Upstream's checkpoints want
            it, GIM's want plain [0, 1].
    """

    def __init__(self, config: DKMConfig | None = None, *, normalise: bool = False) -> None:
        super().__init__()
        self.config = config or DKMConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.normalise = normalise

    def encode(
        self,
        images: torch.Tensor,
        *,
        size: tuple[int, int],
        upsample_size: tuple[int, int] | None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, torch.Tensor]:
        """Compute what depends on single images.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.
            size: (height, width) of the first pass.
            upsample_size: of the second pass, or None to leave it out.
            dtype: of the encoder and of features at strides 1 to 8. Strides 16 and 32, which the
                Gaussian process compares, are kept in float32.

        Returns:
            See ``Features``.
        """
        images = self._normalised(images)
        features: dict[str, torch.Tensor] = {}
        autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
        with autocast:
            pyramid = self.encoder(resize(images, size))
            for stride in (32, 16):
                projected = self.decoder.proj[str(stride)](pyramid.pop(stride)).float()
                features[f"0/{stride}"] = projected
                features[f"gp/{stride}"] = self.decoder.gps[str(stride)].factor(projected)
            self._hold(features, 0, pyramid, dtype)
            if upsample_size is not None:
                # Its deeper half is not used: strides 16 and 32 keep the first pass' answer.
                pyramid = self.encoder(resize(images, upsample_size), layers=2)
                self._hold(features, 1, pyramid, dtype)
        return features

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float()
        if self.normalise:
            mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
            images = (images - mean) / std
        return images

    @staticmethod
    def _hold(
        features: dict[str, torch.Tensor],
        number: int,
        pyramid: dict[int, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        for stride in (8, 4, 2, 1):
            features[f"{number}/{stride}"] = pyramid[stride].to(dtype)

    def match(
        self, a: Features, b: Features, *, shared_factor: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match pairs, both ways at once.

        Args:
            a: features of the first images, see ``encode``.
            b: features of the second images, as many.
            shared_factor: see ``both_factors``.

        Returns:
            Flow (2, B, h, w, 2), normalised targets a -> b and b -> a, not clamped, and certainty
            (2, B, h, w) in [0, 1], both float32.
        """
        sizes = [_size(a[f"{number}/1"]) for number in (0, 1) if f"{number}/1" in a]
        flow, certainty = self._coarse(
            lambda stride: _both(a, b, f"0/{stride}"),
            lambda stride: both_factors(a[f"gp/{stride}"], b[f"gp/{stride}"], shared=shared_factor),
        )[16]
        doubt = certainty
        for number, size in enumerate(sizes):
            for stride in _REFINED:
                if stride == 16 and number == 1:
                    continue
                here, there = _both(a, b, f"{number}/{stride}")
                flow, certainty = resize(flow, _size(here)), resize(certainty, _size(here))
                dtype = a["0/1"].dtype
                refiner = self.decoder.conv_refiner[str(stride)]
                delta, change = refiner(here.to(dtype), there.to(dtype), flow)
                flow = refine(flow, delta, stride=stride, size=size)
                certainty = certainty + change
                if stride == 16:
                    doubt = certainty
        certainty = attenuated_certainty(certainty, doubt)[:, 0]
        return flow.permute(0, 2, 3, 1).unflatten(0, (2, -1)), certainty.unflatten(0, (2, -1))

    def match_scales(
        self, images0: torch.Tensor, images1: torch.Tensor, *, recompute: bool = False
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Match 0 -> 1 in one pass and give the answers of all strides, with gradients.

        Features carry gradients; positions do not pass them on, neither from stride to stride nor
        into the refiners, which see where the flow points as a fact: each stride learns to improve
        what it is given.

        Args:
            images0: (B, 3, H, W) in [0, 1].
            images1: likewise. Both go through the encoder as one batch, so that its batch
                normalisation has the statistics of both.
            recompute: trade time for memory, see ``dense.recomputed``.

        Returns:
            Stride -> flow (B, 2, h, w), normalised targets, and certainty logits (B, 1, h, w), both
            float32; strides from 32 to 1.
        """
        call = recomputed if recompute else _call
        images = self._normalised(torch.cat([images0, images1]))
        pyramid = call(self.encoder, images)
        for stride in (32, 16):
            pyramid[stride] = self.decoder.proj[str(stride)](pyramid[stride]).float()
        pairs = {stride: features.chunk(2) for stride, features in pyramid.items()}
        # As at inference, strides that a linear system is solved at know float32 only.
        with torch.autocast(images.device.type, enabled=False):
            scales = self._coarse(
                lambda stride: pairs[stride],
                lambda stride: self.decoder.gps[str(stride)].factor(pairs[stride][1]),
            )
        flow, certainty = scales[16]
        for stride in _REFINED:
            here, there = pairs[stride]
            if stride != 16:
                flow, certainty = (resize(x.detach(), _size(here)) for x in scales[2 * stride])
            delta, change = call(self.decoder.conv_refiner[str(stride)], here, there, flow.detach())
            flow = refine(flow, delta, stride=stride, size=_size(images))
            scales[stride] = flow, certainty + change
        return scales

    def _coarse(
        self, read: Read, factor: Callable[[int], torch.Tensor]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Flow and certainty logits of the coarse decoder, by features and Gaussian factors."""
        # The answer at stride 32 depends on features alone; stride 16 replaces its flow.
        answers = {}
        for stride in (32, 16):
            here, there = read(stride)
            if stride == 32:
                context = here.new_zeros(len(here), self.config.context, 1, 1)
            answer = self.decoder.gps[str(stride)](here, there, factor(stride))
            flow, certainty, context = self.decoder.embedding_decoder(answer, here, context, stride)
            answers[stride] = flow, certainty
        return answers

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


def _call(module: nn.Module, *args: Any) -> Any:
    return module(*args)
