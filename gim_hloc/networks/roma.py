"""RoMa (Edstedt et al., CVPR 2024) with the changes of GIM (Shen et al., ICLR 2024).

Split into ``RoMa.encode``, which is everything that depends on one image, and ``RoMa.match``. Names
of weights are those of ``gim_roma_100h.ckpt`` without the leading ``model.``; DINOv2 comes from a
file of its own and stays outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gim_hloc.geometry.warp import cell_centres
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
from gim_hloc.networks.dinov2 import Block
from gim_hloc.networks.vgg import VGG19, conv_norm

Features = dict[str, torch.Tensor]

STRIDES = (16, 8, 4, 2, 1)  # of the features; "16" is DINOv2's, really 14
HEAD = 128  # channels of a head of the coarse transformer
_DISPLACEMENT_SCALE = 40 / 32  # of the displacements that refiners see


@dataclass(frozen=True, kw_only=True)
class RoMaConfig:
    """Widths of the network, by stride where there are several."""

    tokens: int = 1024  # channels of DINOv2
    vgg: tuple[int, int, int, int] = (64, 128, 256, 512)  # strides 1, 2, 4, 8
    projected: Mapping[int, int] = field(
        default_factory=lambda: {16: 512, 8: 512, 4: 256, 2: 64, 1: 9}
    )
    displacement: Mapping[int, int] = field(
        default_factory=lambda: {16: 128, 8: 64, 4: 32, 2: 16, 1: 6}
    )
    radius: Mapping[int, int] = field(default_factory=lambda: {16: 7, 8: 3, 4: 2})
    position: int = 512  # channels of the Gaussian process
    blocks: int = 5  # of the coarse transformer
    anchors: int = 64  # on a side of the grid of classes
    hidden: int = 8  # blocks of a refiner after its first

    @property
    def heads(self) -> int:
        """Attention heads of the coarse transformer, of ``HEAD`` channels each."""
        return max(1, (self.position + self.projected[16]) // HEAD)

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> RoMaConfig:
        """Widths of a checkpoint, prefixes taken off; the published ones if names are missing."""
        coarse = "decoder.embedding_decoder"
        layers = {1: 0, 2: 7, 4: 14, 8: 27}  # the first convolution of each stride
        try:
            projected = {s: len(state[f"decoder.proj.{s}.0.weight"]) for s in STRIDES}
            position = len(state["decoder.gps.16.pos_conv.weight"])
            displacement, radius, hidden = refiner_shapes(state, projected, {})
            return cls(
                tokens=state["decoder.proj.16.0.weight"].shape[1],
                vgg=tuple(  # type: ignore[arg-type]
                    len(state[f"encoder.cnn.layers.{i}.weight"]) for i in layers.values()
                ),
                projected=projected,
                displacement=displacement,
                radius=radius,
                position=position,
                blocks=count_modules(state, f"{coarse}.blocks."),
                anchors=round((len(state[f"{coarse}.to_out.weight"]) - 1) ** 0.5),
                hidden=hidden,
            )
        except (KeyError, IndexError):
            return cls()


class CoarseTransformer(nn.Module):
    """Classifies, for every cell of one image, where in a grid over the other image it lies."""

    def __init__(self, config: RoMaConfig) -> None:
        super().__init__()
        dim = config.position + config.projected[16]
        self.blocks = nn.Sequential(
            *(
                Block(dim, config.heads, qkv_bias=False, layer_scale=False, eps=1e-5)
                for _ in range(config.blocks)
            )
        )
        self.to_out = nn.Linear(dim, config.anchors**2 + 1)

    def forward(
        self, position: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the classes and of the certainty.

        Args:
            position: (B, P, H, W) posterior mean of the Gaussian process.
            features: (B, C, H, W) of the image whose cells are classified.

        Returns:
            (B, anchors ** 2, H, W) and (B, 1, H, W).
        """
        x = torch.cat([position.to(features.dtype), features], dim=1)
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = self.to_out(self.blocks(x)).transpose(1, 2).unflatten(2, size)
        return x[:, :-1], x[:, -1:]


def flow_of_classes(logits: torch.Tensor) -> torch.Tensor:
    """Expected position in the best class and its four neighbours.

    Neighbours are those in the row-major list of classes: at the left and right border of the grid
    they belong to the next row, and beyond the ends of the list the first or last class is counted
    again. The weights were trained with that.

    Args:
        logits: (B, n * n, H, W) over an n x n grid of cells of the other image, row-major.

    Returns:
        (B, 2, H, W) float32 normalised positions.
    """
    count = logits.shape[1]
    side = round(count**0.5)
    best = logits.argmax(dim=1, keepdim=True)
    near = torch.cat([best, best - 1, best + 1, best - side, best + side], 1).clamp(0, count - 1)
    # A softmax over the five is that over all classes, renormalised.
    weights = logits.gather(1, near).float().softmax(dim=1)
    anchors = cell_centres(side, side, device=logits.device).view(-1, 2)
    return torch.einsum("bkhw,bkhwc->bchw", weights, anchors[near])


class Decoder(nn.Module):
    """Projections, coarse matching and refiners."""

    def __init__(self, config: RoMaConfig) -> None:
        super().__init__()
        self.embedding_decoder = CoarseTransformer(config)
        self.gps: Any = nn.ModuleDict({"16": GaussianProcess(config.position)})
        inputs = {16: config.tokens, **dict(zip((1, 2, 4, 8), config.vgg, strict=True))}
        self.proj: Any = nn.ModuleDict(
            {
                str(stride): nn.Sequential(
                    nn.Conv2d(inputs[stride], config.projected[stride], 1),
                    nn.BatchNorm2d(config.projected[stride]),
                )
                for stride in STRIDES
            }
        )
        self.conv_refiner: Any = nn.ModuleDict(
            {
                str(stride): ConvRefiner(
                    features=config.projected[stride],
                    embedding=config.displacement[stride],
                    radius=config.radius.get(stride, 0),
                    hidden=config.hidden,
                    certainty_first=False,
                    momentum=0.01,
                )
                for stride in STRIDES
            }
        )

    def project(self, stride: int, features: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) of a stride as the rest of the decoder wants them."""
        conv, norm = self.proj[str(stride)]
        return conv_norm(conv, norm, features)


class RoMa(nn.Module):
    """The network without DINOv2.

    Args:
        config: widths.
    """

    def __init__(self, config: RoMaConfig | None = None) -> None:
        super().__init__()
        self.config = config or RoMaConfig()
        self.encoder: Any = nn.ModuleDict({"cnn": VGG19(self.config.vgg)})
        self.decoder = Decoder(self.config)

    def encode(
        self, tokens: torch.Tensor, image: torch.Tensor, fine: torch.Tensor | None = None
    ) -> Features:
        """Everything that depends on one image.

        Args:
            tokens: (B, C, h, w) DINOv2's of ``image``.
            image: (B, 3, H, W) in [0, 1], of the first pass.
            fine: (B, 3, H', W') the same, of the second pass, or None to leave that out.

        Returns:
            Projected features by name: "coarse16", "coarse8" to "coarse1" of the first pass,
            "fine8" to "fine1" of the second, and "position", the factor of the Gaussian process.
        """
        coarse = self.decoder.project(16, tokens)
        features = {"coarse16": coarse, "position": self.decoder.gps["16"].factor(coarse)}
        for name, x in (("coarse", image), ("fine", fine)):
            if x is not None:
                for stride, value in self.encoder["cnn"].stages(x):
                    features[f"{name}{stride}"] = self.decoder.project(stride, value)
        return features

    def match(
        self,
        a: Features,
        b: Features,
        *,
        scale_factors: tuple[float, float] = (1.0, 2.0),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match in both directions.

        Args:
            a: features of the images 0 of B pairs.
            b: features of the images 1.
            scale_factors: on displacements, in the first and in the second pass: how much finer
                than at the trained size a cell is.

        Returns:
            Flow (2, B, H, W, 2), normalised targets, 0 -> 1 and 1 -> 0, not clamped; certainty
            (2, B, H, W) in [0, 1].
        """
        flow, certainty = self._coarse(a, b)
        coarse_certainty: torch.Tensor | None = None
        for name, factor in zip(("coarse", "fine"), scale_factors, strict=True):
            if f"{name}1" not in a:
                continue
            finest = _size(a[f"{name}1"])
            for stride in STRIDES:
                if f"{name}{stride}" not in a:  # DINOv2 sees the first pass only
                    continue
                x, y = a[f"{name}{stride}"], b[f"{name}{stride}"]
                flow, certainty = (resize(value, _size(x)) for value in (flow, certainty))
                step, change = self.decoder.conv_refiner[str(stride)](
                    torch.cat([x, y]),
                    torch.cat([y, x]),
                    flow,
                    displacement_scale=_DISPLACEMENT_SCALE * factor,
                )
                flow = refine(flow, step, stride=stride, size=finest)
                certainty = certainty + change
                if coarse_certainty is None:
                    coarse_certainty = certainty
        assert coarse_certainty is not None
        certainty = attenuated_certainty(certainty, coarse_certainty)[:, 0]
        return flow.permute(0, 2, 3, 1).unflatten(0, (2, -1)), certainty.unflatten(0, (2, -1))

    def match_scales(
        self,
        tokens: torch.Tensor,
        images: torch.Tensor,
        *,
        recompute: bool = False,
    ) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
        """Match 0 -> 1 in one pass and give the answers of all strides, with gradients.

        Features carry gradients; positions and certainties do not pass them on from stride to
        stride, nor from the classes to the refiners.

        Args:
            tokens: (2 B, C, h, w) DINOv2's of the images.
            images: (2 B, 3, H, W) in [0, 1], the images 0 before the images 1. One batch, so that
                batch normalisation has the statistics of both.
            recompute: trade time for memory, see ``dense.recomputed``.

        Returns:
            Stride -> flow (B, 2, h, w), normalised targets, and certainty logits (B, 1, h, w), both
            float32, strides from 16 to 1; and logits of the classes (B, anchors ** 2, h, w) with
            the certainty logits (B, 1, h, w) that come with them.
        """

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recomputed(module, *args, **kwargs) if recompute else module(*args, **kwargs)

        tokens = call(self.decoder.proj["16"], tokens)
        here, there = tokens.chunk(2)
        position = self.decoder.gps["16"](here, there)
        classes, certainty = call(self.decoder.embedding_decoder, position, here)
        coarse = classes.float(), certainty.float()
        flow, certainty = flow_of_classes(coarse[0].detach()), coarse[1].detach()
        features = {16: (here, there)}
        for stride, x in reversed(list(call(_Stages(self.encoder["cnn"]), images).items())):
            first, second = call(self.decoder.proj[str(stride)], x).chunk(2)
            features[stride] = first, second
        scales = {}
        for stride in STRIDES:
            x, y = features[stride]
            flow, certainty = (resize(value.detach(), _size(x)) for value in (flow, certainty))
            step, change = call(
                self.decoder.conv_refiner[str(stride)],
                x,
                y,
                flow,
                displacement_scale=_DISPLACEMENT_SCALE,
            )
            flow, certainty = (
                refine(flow, step, stride=stride, size=_size(images)),
                certainty + change,
            )
            scales[stride] = flow, certainty
        return scales, coarse

    def compile_parts(self) -> None:
        """Compile what every pair runs, in place; names of weights stay as they are."""
        self.decoder.embedding_decoder.compile()
        for refiner in self.decoder.conv_refiner.values():
            refiner.compile()

    def _coarse(self, a: Features, b: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow and certainty logits at DINOv2's cells, both directions on the batch axis."""
        query = torch.cat([a["coarse16"], b["coarse16"]])
        support = torch.cat([b["coarse16"], a["coarse16"]])
        factor = torch.cat([b["position"], a["position"]])
        position = self.decoder.gps["16"](query, support, factor)
        classes, certainty = self.decoder.embedding_decoder(position, query)
        return flow_of_classes(classes), certainty.float()


class _Stages(nn.Module):
    """All features of a VGG at once."""

    def __init__(self, vgg: VGG19) -> None:
        super().__init__()
        self.vgg = vgg

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        return dict(self.vgg.stages(images))


def _size(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
