"""LoFTR with GIM's weights (``gim_loftr``) and its authors' (``loftr_outdoor``, ``loftr_indoor``).

LoFTR has no keypoints: a match starts at the corner of a cell of 8 pixels in the first image and
ends anywhere in the second one.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.matchers.common import (
    MatcherBase,
    Precision,
    resolve_dtype,
    resolve_precision,
    weight_files,
)
from gim_hloc.matchers.registry import describe
from gim_hloc.networks.loftr import (
    CELL,
    BorderRule,
    Features,
    LoFTR,
    Matched,
    Positional,
    Widths,
    stack,
)
from gim_hloc.options import CountOrNone, options
from gim_hloc.types import (
    Encoding,
    ImageData,
    Matches,
    apply_affine,
)

_SMALLEST = 160  # px, long side: below it hardly a cell is off the border
_LARGE = 4096  # px, long side: what halving starts from where no size was set
NOTE = "positional"  # name under which a checkpoint says what its weights were trained with


@options
class LoFTROptions:
    """Numbers of LoFTR."""

    # Long side in pixels that the network sees; None keeps the image's.
    max_size: Annotated[int, Field(ge=4 * CELL)] | None = 1024
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2  # lowest confidence of a match, in (0, 1)
    border: CountOrNone = 2  # cells of 8 px at the image's borders that never match
    border_rule: BorderRule = "grid"  # mask: borders follow the mask's extent, as the reference has
    # Frequencies of the positional encoding that the weights were trained with. auto: what the
    # checkpoint says (gim-train's do), else published; corrected: for those of GIM's own training.
    positional: Literal["auto", "published", "corrected"] = "auto"
    precision: Precision = "auto"  # of the network; auto: float16 on CUDA, float32 elsewhere
    hold: Precision = "auto"  # of fine features between pairs; auto: as computed
    compile: bool = False  # torch.compile the backbone: slow start, faster images afterwards


@dataclass(kw_only=True)
class LoFTREncoding(Encoding):
    """What LoFTR holds of one image, in memory only.

    Attributes:
        features: ``tokens`` (L, 256) coarse and ``fine`` (H/2, W/2, 128) features; where the image
            has a mask, also ``cells`` (L,) and ``pixels`` (H, W) bool, True where matches may lie.
    """

    features: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


def make_network(
    name: str,
    positional: Positional = "published",
    state: Mapping[str, torch.Tensor] | None = None,
) -> LoFTR:
    """The network of a matcher, without weights: GIM's, or the published one for gray images.

    Args:
        name: of the matcher.
        positional: frequencies of the positional encoding.
        state: weights without prefixes that GIM's network shall be as wide as.
    """
    if name == "gim_loftr":
        return LoFTR(positional=positional, widths=Widths.of_state(state or {}))
    from kornia.feature.loftr.backbone import build_backbone
    from kornia.feature.loftr.loftr import default_cfg

    return LoFTR(backbone=build_backbone(default_cfg), positional=positional, coarse_in_fine=True)


class LoFTRMatcher(MatcherBase[LoFTREncoding]):
    """LoFTR.

    Args:
        name: of the matcher in the registry.
        options: its numbers.
        device: where the network runs.
        network: a network with weights instead of the published file's.

    Raises:
        WeightsError: the weights cannot be had or are not this network's.
    """

    options_type = LoFTROptions
    encode_fields = ("max_size", "positional", "precision", "hold")
    multiple_of = CELL

    def __init__(
        self,
        name: str,
        *,
        options: LoFTROptions,
        device: torch.device,
        network: LoFTR | None = None,
    ) -> None:
        info = describe(name)
        hashes: dict[str, str] = {}
        if network is None:
            paths, hashes = weight_files(info)
            (path,) = paths.values()
            state = weights.load_state_dict(path)
            state = weights.unwrap("loftr", state)
            positional = options.positional
            if positional == "auto":
                noted = weights.load_notes(path).get(NOTE)
                positional = "corrected" if noted == "corrected" else "published"
            network = make_network(name, positional, state)
            weights.load_into(network, state, path=path)
        # Settings name what is in use: encodings of both kinds are worlds apart.
        options = dataclasses.replace(options, positional=network.positional)
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        self.dtype = resolve_dtype(options.precision, device)
        self.hold = None if options.hold == "auto" else resolve_dtype(options.hold, device)
        module: Any = network.eval().requires_grad_(False).to(device)
        self.network: LoFTR = module.to(memory_format=torch.channels_last)
        if options.compile:
            self.network.backbone.compile()

    def encode_settings(self) -> dict[str, Any]:
        """See ``MatcherBase``; with the number format that "auto" stands for."""
        resolved = resolve_precision(self.options.precision, self.device)
        return super().encode_settings() | {"precision": resolved}

    def smaller(self) -> bool:
        """Make do with less memory: see images at half the size from here on.

        Encodings made before are of no use afterwards.

        Returns:
            Whether that was possible.
        """
        size = (self.options.max_size or _LARGE) // 2
        if size < _SMALLEST:
            return False
        self.options = dataclasses.replace(self.options, max_size=size)
        self.image_options = dataclasses.replace(self.image_options, max_size=size)
        return True

    @torch.inference_mode()
    def encode(self, image: ImageData) -> LoFTREncoding:
        """Compute what depends on one image only.

        Args:
            image: (3, H, W), for the published networks (1, H, W), in [0, 1]; sides multiples of 8.

        Raises:
            InputError: a side is no multiple of 8.
        """
        tensor = image.image.to(self.device, non_blocking=True)
        if self.info.colour == "rgb" and tensor.shape[0] == 1:
            tensor = tensor.expand(3, -1, -1)
        height, width = tensor.shape[1:]
        if height % CELL or width % CELL or min(height, width) < CELL:
            raise InputError(
                f"{image.name}: LoFTR needs sides that are multiples of {CELL} px, not "
                f"{width} x {height}. Read images with the matcher's image_options."
            )
        features: dict[str, torch.Tensor] = {}
        cells = None
        if image.mask is not None:
            features["pixels"] = image.mask.to(self.device)
            cells = features["pixels"][None, ::CELL, ::CELL]
            features["cells"] = cells.flatten()
        batch = tensor[None].contiguous(memory_format=torch.channels_last)
        with self._autocast():
            found = self.network.encode(batch, cells)
        features["tokens"] = found.tokens[0]
        features["fine"] = found.fine[0] if self.hold is None else found.fine[0].to(self.hold)
        return LoFTREncoding(
            name=image.name,
            size=image.size,
            network_size=(width, height),
            to_original=image.to_original,
            features=features,
        )

    @torch.inference_mode()
    def match(self, a: LoFTREncoding, b: LoFTREncoding) -> Matches:
        """Match two encodings."""
        return self._match([(a, b)])[0]

    @torch.inference_mode()
    def match_batch(self, pairs: Sequence[tuple[LoFTREncoding, LoFTREncoding]]) -> list[Matches]:
        """Match many pairs: those of equal sizes at once on a GPU, one by one on a processor."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for row, (a, b) in enumerate(pairs):
            alike: Any = row
            if self.device.type != "cpu":
                alike = tuple((e.network_size, "cells" in e.features) for e in (a, b))
            groups[alike].append(row)
        results: dict[int, Matches] = {}
        for rows in groups.values():
            found = self._match([pairs[row] for row in rows])
            results |= dict(zip(rows, found, strict=True))
        return [results[row] for row in range(len(pairs))]

    def _match(self, pairs: Sequence[tuple[LoFTREncoding, LoFTREncoding]]) -> list[Matches]:
        """Match pairs whose images agree in size and in having masks."""
        sides = [stack([self._features(pair[side]) for pair in pairs]) for side in (0, 1)]
        with self._autocast():
            found = self.network.match(
                sides[0],
                sides[1],
                threshold=self.options.threshold,
                border=self.options.border,
                border_rule=self.options.border_rule,
            )
        keep = torch.ones_like(found.cells.batch, dtype=torch.bool)
        for xy, side in ((found.xy0, 0), (found.xy1, 1)):
            if "pixels" in pairs[0][side].features:
                masks = torch.stack([pair[side].features["pixels"] for pair in pairs])
                keep &= _allowed(masks.to(xy.device), found.cells.batch, xy)
        return _split(found, keep, pairs)

    def _features(self, encoding: LoFTREncoding) -> Features:
        width, height = encoding.network_size
        features = {key: value.to(self.device) for key, value in encoding.features.items()}
        cells = features.get("cells")
        fine = features["fine"] if self.hold is None else features["fine"].to(self.dtype)
        return Features(
            features["tokens"][None],
            fine[None],
            (height // CELL, width // CELL),
            None if cells is None else cells[None],
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def _allowed(masks: torch.Tensor, batch: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """Which points (M, 2) of images ``batch`` lie on allowed pixels of masks (B, H, W)."""
    column, row = xy.round().long().unbind(1)
    row, column = row.clamp(0, masks.shape[1] - 1), column.clamp(0, masks.shape[2] - 1)
    return masks[batch, row, column]


def _split(
    found: Matched, keep: torch.Tensor, pairs: Sequence[tuple[LoFTREncoding, LoFTREncoding]]
) -> list[Matches]:
    """Matches of each pair in stored pixels."""
    batch = found.cells.batch[keep].cpu()
    xy0, xy1 = found.xy0[keep].cpu(), found.xy1[keep].cpu()
    scores = found.cells.confidence[keep].float().clamp(max=1.0).cpu()
    ends = torch.searchsorted(batch, torch.arange(len(pairs)), right=True).tolist()
    results = []
    for (a, b), start, end in zip(pairs, [0, *ends], ends, strict=False):
        results.append(
            Matches(
                keypoints0=apply_affine(a.to_original, xy0[start:end]),
                keypoints1=apply_affine(b.to_original, xy1[start:end]),
                scores=scores[start:end],
            )
        )
    return results
