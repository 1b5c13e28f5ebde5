"""RoMa with GIM's weights (``gim_roma``) and its authors' (``roma_outdoor``, ``roma_indoor``)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.geometry.warp import Warp
from gim_hloc.matchers.common import resolve_dtype, weight_files
from gim_hloc.matchers.dense import DenseEncoding, DenseMatcher, DenseOptions, Side
from gim_hloc.matchers.registry import describe
from gim_hloc.networks.dense import count_modules, resize
from gim_hloc.networks.dinov2 import HEAD, PATCH, DINOv2
from gim_hloc.networks.roma import Features, RoMa, RoMaConfig
from gim_hloc.options import options
from gim_hloc.types import ImageData

DINOV2 = "dinov2_vitl14_pretrain.pth"
_SMALLEST = 8 * PATCH  # px: fewer than 8 x 8 tokens say nothing about where things are

# ImageNet's, which the authors' weights were trained with and GIM's were not.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_TRAINED_SIDE = 560  # px: where displacements of the authors' weights have a scale factor of 1


@options
class RoMaOptions(DenseOptions):
    """Numbers of RoMa."""

    size: tuple[Side, Side] = (672, 672)  # (height, width) of the first pass, px, multiples of 14
    # Of the second pass; None leaves it out.
    upsample_size: tuple[Side, Side] | None = (1344, 1344)

    def __post_init__(self) -> None:
        if any(side % PATCH for side in self.size):
            near = tuple(max(_SMALLEST, round(side / PATCH) * PATCH) for side in self.size)
            raise InputError(
                f"size is {self.size}; RoMa needs multiples of {PATCH} px in its first pass, for "
                f"instance {near}."
            )


def load_roma(state: Mapping[str, torch.Tensor], *, path: str) -> RoMa:
    """The network with the weights of a checkpoint (leading ``model.`` or not), of their widths.

    Args:
        state: the checkpoint's tensors; shared with the network, not copied.
        path: where they come from, for messages.

    Raises:
        WeightsError: names or shapes are not this network's.
    """
    state = weights.unwrap("roma", state)
    with torch.device("meta"):
        network = RoMa(RoMaConfig.of(state))
    return _assign(network, state, path)


def load_dinov2(state: Mapping[str, torch.Tensor], *, path: str) -> DINOv2:
    """DINOv2 with the weights of Meta's file; see ``load_roma``.

    RoMa's is ViT-L/14. Another size of the same layout (S, B, or a small one for tests) serves a
    RoMa that was trained with it.
    """
    try:
        dim, tokens = len(state["patch_embed.proj.weight"]), state["pos_embed"].shape[1]
        size = {
            "dim": dim,
            "depth": count_modules(state, "blocks."),
            "heads": max(1, dim // HEAD),
            "side": round((tokens - 1) ** 0.5),
        }
    except (KeyError, IndexError):
        size = {}
    with torch.device("meta"):
        network = DINOv2(**size)
    return _assign(network, state, path)


def check_tokens(network: RoMa, dinov2: DINOv2, *, path: str) -> None:
    """Check that RoMa was trained with a DINOv2 of this size.

    Raises:
        WeightsError: it was not.
    """
    given, wanted = dinov2.cls_token.shape[-1], network.config.tokens
    if given != wanted:
        raise WeightsError(
            f"{path} was trained with a DINOv2 of {wanted} channels, but {DINOV2} has {given}. "
            "Use the file that it was trained with."
        )


def _assign(network: Any, state: Mapping[str, torch.Tensor], path: str) -> Any:
    # Made without memory of its own: initialising 400 million numbers to overwrite them takes
    # longer than all else, and doubles the memory.
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    weights.check_names(shapes, state, path=path, network=type(network).__name__)
    ready = {key: v.float() if v.is_floating_point() else v for key, v in state.items()}
    network.load_state_dict(ready, assign=True)
    return network


class RoMaMatcher(DenseMatcher):
    """RoMa.

    Args:
        name: of the matcher in the registry.
        options: its numbers.
        device: where the networks run.
        states: weights by file name, instead of the published files.

    Raises:
        WeightsError: the weights cannot be had or are not this network's.
    """

    options_type = RoMaOptions
    exact = ("coarse16", "position")
    patch = PATCH
    smallest_side = _SMALLEST

    def __init__(
        self,
        name: str,
        *,
        options: RoMaOptions,
        device: torch.device,
        states: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        info = describe(name)
        hashes: dict[str, str] = {}
        if states is None:
            # Find all of them before the first gigabyte is read.
            paths, hashes = weight_files(info)
            states = {file: weights.load_state_dict(path) for file, path in paths.items()}
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        self.authors = name != "gim_roma"  # trained with ImageNet's normalisation
        self.dtype = resolve_dtype(options.precision, device)
        self.hold = self.dtype if options.hold == "auto" else resolve_dtype(options.hold, device)
        self.network, self.dinov2 = self._networks(states)
        self.network.eval().to(device)
        # The transformer is large and needs float32 nowhere: it is converted once and for all.
        self.dinov2.eval().to(device, self.dtype)
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.compile:
            self.dinov2.compile()
            self.network.compile_parts()

    def _networks(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[RoMa, DINOv2]:
        file, dinov2 = self.info.checkpoint
        network = load_roma(states[file], path=file)
        transformer = load_dinov2(states[dinov2], path=dinov2)
        check_tokens(network, transformer, path=file)
        return network, transformer

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @torch.inference_mode()
    def encode(self, image: ImageData) -> DenseEncoding:
        """Compute the features of both passes.

        Args:
            image: RGB, (3, H, W); a gray image (1, H, W) is repeated.
        """
        padded, frame, valid = self.place(image)
        return DenseEncoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            frame=frame,
            valid=valid,
            black=self.black_cells(padded),
            features=self._features(padded[None]),
        )

    def _features(self, image: torch.Tensor) -> Features:
        if self.authors:
            mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
            image = (image - mean) / std
        fine_size = self.options.upsample_size
        coarse = resize(image, self.options.size)
        fine = None if fine_size is None else resize(image, fine_size)
        if self.device.type == "cuda":
            coarse = coarse.contiguous(memory_format=torch.channels_last)
            fine = fine if fine is None else fine.contiguous(memory_format=torch.channels_last)
        tokens = self.dinov2(coarse)
        with self._autocast():
            features = self.network.encode(tokens, coarse, fine)
        return {k: v if k in self.exact else v.to(self.hold) for k, v in features.items()}

    def scale_factors(self) -> tuple[float, float]:
        """Factors on displacements in the two passes; see ``RoMa.match``."""

        def side(size: tuple[int, int]) -> float:
            return float(size[0] * size[1]) ** 0.5

        first = side(self.options.size)
        second = side(self.options.upsample_size or self.options.size)
        trained = _TRAINED_SIDE if self.authors else first
        return first / trained, second / trained

    @torch.inference_mode()
    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        """Warps of many pairs in one network call."""
        if not pairs:
            return []
        a, b = (self.stack([pair[side].features for pair in pairs]) for side in (0, 1))
        with self._autocast():
            flow, certainty = self.network.match(a, b, scale_factors=self.scale_factors())
        return [
            self.finish(*pair, flow[:, index], certainty[:, index])
            for index, pair in enumerate(pairs)
        ]
