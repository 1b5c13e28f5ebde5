"""DKM with GIM's weights (``gim_dkm``) and its authors' (``dkm_outdoor``, ``dkm_indoor``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gim_hloc import weights
from gim_hloc.geometry.warp import Warp
from gim_hloc.matchers.common import resolve_dtype, weight_files
from gim_hloc.matchers.dense import DenseEncoding, DenseMatcher, DenseOptions
from gim_hloc.matchers.registry import describe
from gim_hloc.networks.dkm import DKM, DKMConfig
from gim_hloc.options import options
from gim_hloc.types import ImageData


@options
class DKMOptions(DenseOptions):
    """Numbers of DKM."""

    # Above 2000 cells at stride 16 (``base`` and larger) solve the second direction with the
    # covariance of the first: a mistake of the reference, see ``networks.dkm.both_factors``.
    shared_factor: bool = False


def load_dkm(state: Mapping[str, torch.Tensor], *, path: str, normalise: bool = False) -> DKM:
    """The network with the weights of a checkpoint, of the widths that these have.

    Args:
        state: the checkpoint's tensors, with or without a leading ``model.``; ImageNet's
            classifier may be among them. Shared with the network, not copied.
        path: where they come from, for messages.
        normalise: see ``DKM``.

    Raises:
        WeightsError: names or shapes are not this network's.
    """
    state = {
        key: value.float() if value.is_floating_point() else value
        for key, value in weights.unwrap("dkm", state).items()
    }
    # Made without memory of its own: numbers drawn to be overwritten cost seconds.
    with torch.device("meta"):
        network = DKM(DKMConfig.of(state), normalise=normalise)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    weights.check_names(shapes, state, path=path, network="DKM")
    network.load_state_dict(state, assign=True)
    return network


class DKMMatcher(DenseMatcher):
    """DKM.

    Args:
        name: of the matcher in the registry.
        options: its numbers.
        device: where the network runs.
        state: weights instead of those of the published file.
        network: the whole network instead, already with weights.

    Raises:
        WeightsError: the weights cannot be had or are not this network's.
    """

    options_type = DKMOptions
    exact = ("0/16", "0/32", "gp/16", "gp/32")
    smallest_side = 128  # fewer than 4 x 4 cells at stride 32 say nothing about where things are

    def __init__(
        self,
        name: str,
        *,
        options: DKMOptions,
        device: torch.device,
        state: Mapping[str, torch.Tensor] | None = None,
        network: Any = None,
    ) -> None:
        info = describe(name)
        hashes: dict[str, str] = {}
        if state is None and network is None:
            paths, hashes = weight_files(info)
            (path,) = paths.values()
            state = weights.load_state_dict(path)
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        self.dtype = resolve_dtype(options.precision, device)
        self.hold = self.dtype if options.hold == "auto" else resolve_dtype(options.hold, device)
        if network is None:
            network = load_dkm(state or {}, path=info.checkpoint[0], normalise=name != "gim_dkm")
        self.network = network.eval().to(device)
        self.network.to(memory_format=torch.channels_last)
        if options.compile:
            self.network.compile_parts()

    @torch.inference_mode()
    def encode(self, image: ImageData) -> DenseEncoding:
        """Features of both passes of an RGB image (3, H, W) in [0, 1]; a gray one is repeated."""
        padded, frame, valid = self.place(image)
        features = self.network.encode(
            padded[None].contiguous(memory_format=torch.channels_last),
            size=self.options.size,
            upsample_size=self.options.upsample_size,
            dtype=self.dtype,
        )
        return DenseEncoding(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            frame=frame,
            valid=valid,
            black=self.black_cells(padded),
            features={k: v if k in self.exact else v.to(self.hold) for k, v in features.items()},
        )

    @torch.inference_mode()
    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        """Warps of many pairs in one network call."""
        if not pairs:
            return []
        a, b = (self.stack([pair[side].features for pair in pairs]) for side in (0, 1))
        flow, certainty = self.network.match(a, b, shared_factor=self.options.shared_factor)
        return [
            self.finish(*pair, flow[:, index], certainty[:, index])
            for index, pair in enumerate(pairs)
        ]
