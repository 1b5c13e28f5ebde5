"""What the dense matchers share: options, frames, padding, masks, the way from warp to matches."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from gim_hloc.geometry.sampling import balanced_sample
from gim_hloc.geometry.seeds import pair_seed
from gim_hloc.geometry.warp import Warp, cell_centres, normalised_frame, read_grid, transform
from gim_hloc.matchers.common import MatcherBase, Precision, resolve_precision
from gim_hloc.options import Count, options
from gim_hloc.types import Encoding, ImageData, Matches

BLACK = 8 / 255  # pixels whose channels are all below it are black (``black_pixels``)


Side = Annotated[int, Field(ge=64)]


@options
class DenseOptions:
    """Numbers of a dense matcher."""

    size: tuple[Side, Side] = (672, 896)  # (height, width) of the first pass, px
    # Of the second pass; None leaves it out.
    upsample_size: tuple[Side, Side] | None = (1152, 1536)
    pad: bool = True  # pad to the aspect of ``size`` instead of stretching
    max_size: int | None = None  # long side of the image before both resizes, px; None keeps it
    num_matches: Count = 5000  # drawn per pair when matches are asked for instead of the warp
    sample_threshold: float = 0.05  # certainties above it are drawn as if they were 1
    black_pixels: bool = False  # never match black pixels, as the reference does
    seed: int = 0  # of the draw; the names of the pair enter too
    precision: Precision = "auto"  # of the networks; auto: float16 on CUDA, float32 elsewhere
    hold: Precision = "auto"  # of features between pairs; auto: as ``precision`` computes them
    compile: bool = False  # torch.compile: minutes at the start, faster pairs afterwards


@dataclass(kw_only=True)
class DenseEncoding(Encoding):
    """What a dense matcher holds of one image, in memory only: storing costs more than it saves.

    Attributes:
        frame: (2, 3) float64, normalised coordinates -> stored pixels, hloc's frame.
        valid: (H, W) bool on the grid of the warp: inside the image and allowed by its mask.
        black: (H, W) bool, black pixels that match nothing, or None (see ``black_pixels``).
        features: tensors by name, as the matcher's network wants them.
    """

    frame: np.ndarray
    valid: torch.Tensor
    black: torch.Tensor | None = None
    features: dict[str, Any] = field(default_factory=dict, repr=False)


def padding_to_aspect(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns that bring an image to the aspect of ``size`` (height, width), centred.

    Returns:
        left, right, top, bottom in pixels.
    """
    aspect = size[1] / size[0]
    new_width = max(width, int(height * aspect))
    new_height = max(height, int(width / aspect))
    left, top = (new_width - width) // 2, (new_height - height) // 2
    return left, new_width - width - left, top, new_height - height - top


def matchable(
    flow: torch.Tensor, here: torch.Tensor, there: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow within the other image, and which cells may match.

    Args:
        flow: (H, W, 2) normalised targets in the other image.
        here: (H, W) bool on the same grid, allowed pixels of the image.
        there: (h, w) bool on a grid over the other image, likewise.

    Returns:
        The flow clamped to [-1, 1], and (H, W) bool: from an allowed pixel to an allowed one.
    """
    outside = (flow.abs() > 1).any(-1)
    flow = flow.clamp(-1, 1)
    target = read_grid(there[..., None].float(), flow.reshape(-1, 2), mode="nearest")
    return flow, here & (target.view(here.shape) > 0) & ~outside


class DenseMatcher(MatcherBase[DenseEncoding]):
    """Base of the matchers that give a warp for every pair."""

    encode_fields: tuple[str, ...] = (
        "size",
        "upsample_size",
        "pad",
        "max_size",
        "black_pixels",
        "precision",
        "hold",
    )

    exact: tuple[str, ...] = ()  # features that stay as computed: what a Gaussian process reads
    dtype: torch.dtype = torch.float32  # that the network computes in
    patch: int = 1  # px: sides of the first pass are multiples of it
    smallest_side: int = 128  # px, of the first pass: below, ``smaller`` gives up

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the warp's grid."""
        size: tuple[int, int] = self.options.upsample_size or self.options.size
        return size

    def encode_settings(self) -> dict[str, Any]:
        """See ``MatcherBase``; with the number formats that "auto" stands for."""
        precision = resolve_precision(self.options.precision, self.device)
        hold = precision if self.options.hold == "auto" else self.options.hold
        return super().encode_settings() | {"precision": precision, "hold": hold}

    def match_settings(self) -> dict[str, Any]:
        """See ``MatcherBase``; compiling changes no number that matters."""
        settings = super().match_settings()
        settings.pop("compile", None)
        return settings

    def smaller(self) -> bool:
        """Make do with less memory: halve the second pass, leave it out, then halve the first.

        Encodings made before are of no use afterwards.

        Returns:
            Whether that was possible.
        """
        size, fine = self.options.size, self.options.upsample_size
        if fine is not None:
            fine = tuple(side // 2 for side in fine)
            if fine[0] * fine[1] <= size[0] * size[1]:
                fine = None
        else:
            size = tuple(side // 2 // self.patch * self.patch for side in size)
        if min(size) < self.smallest_side:
            return False
        self.options = dataclasses.replace(self.options, size=size, upsample_size=fine)
        return True

    def stack(self, features: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Features of many images on the batch axis, in the format that the network computes in."""
        stacked = {}
        for name, value in features[0].items():
            if len(features) > 1:
                value = torch.cat([f[name] for f in features])
            stacked[name] = value if name in self.exact else value.to(self.dtype)
        return stacked

    @abstractmethod
    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        """Warps of many pairs in one network call."""

    def warp(self, a: DenseEncoding, b: DenseEncoding) -> Warp:
        """Where each point of one image lies in the other, both ways."""
        return self.warp_batch([(a, b)])[0]

    def match(self, a: DenseEncoding, b: DenseEncoding) -> Matches:
        """Draw matches from the warp: ``num_matches`` at most, the same ones every time."""
        return self.draw(self.warp(a, b), a, b)

    def match_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Matches]:
        """``match`` for many pairs."""
        warps = self.warp_batch(pairs)
        return [self.draw(warp, a, b) for warp, (a, b) in zip(warps, pairs, strict=True)]

    def draw(self, warp: Warp, a: DenseEncoding, b: DenseEncoding) -> Matches:
        """Matches drawn from a warp of (a, b), with the certainties that the warp has there."""
        rows, certainty = warp.stacked()
        chosen = balanced_sample(
            rows,
            certainty,
            self.options.num_matches,
            threshold=self.options.sample_threshold,
            seed=pair_seed(self.options.seed, a.name, b.name),
        )
        rows, certainty = rows[chosen], certainty[chosen]
        return Matches(
            keypoints0=transform(warp.frame0, rows[:, :2]).cpu(),
            keypoints1=transform(warp.frame1, rows[:, 2:]).cpu(),
            scores=certainty.cpu(),
            warp=warp,
        )

    def place(self, image: ImageData) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Pad an image and say where it lies.

        Returns:
            (3, H, W) float32 padded tensor on the matcher's device; the frame, see
            ``DenseEncoding``; (h, w) bool on the warp's grid, True on allowed pixels of the image.
        """
        tensor = image.image.to(self.device, non_blocking=True)
        if tensor.shape[0] == 1:
            tensor = tensor.expand(3, -1, -1)
        width, height = image.network_size
        left, right, top, bottom = (
            padding_to_aspect(width, height, self.options.size)
            if self.options.pad
            else (0, 0, 0, 0)
        )
        padded = F.pad(tensor, (left, right, top, bottom))
        full_width, full_height = width + left + right, height + top + bottom
        frame = normalised_frame(full_width, full_height, image.to_original, left=left, top=top)
        grid = cell_centres(*self.grid_size, device=self.device)
        column = ((grid[..., 0] + 1) / 2 * full_width).floor() - left
        row = ((grid[..., 1] + 1) / 2 * full_height).floor() - top
        valid = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        if image.mask is not None:
            mask = image.mask.to(self.device)
            valid &= mask[row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
        return padded, frame, valid

    def black_cells(self, padded: torch.Tensor) -> torch.Tensor | None:
        """(h, w) bool on the warp's grid: black pixels; None if they may match."""
        if not self.options.black_pixels:
            return None
        dark = (padded < BLACK).all(0)[None, None].float()
        return F.interpolate(dark, self.grid_size, mode="nearest")[0, 0] > 0

    @staticmethod
    def finish(
        a: DenseEncoding, b: DenseEncoding, flow: torch.Tensor, certainty: torch.Tensor
    ) -> Warp:
        """Make a warp from a network's output.

        Args:
            a: encoding of image 0.
            b: encoding of image 1.
            flow: (2, H, W, 2) normalised targets, 0 -> 1 and 1 -> 0.
            certainty: (2, H, W) in [0, 1].
        """
        flows, seen = [], []
        for direction, (here, there) in enumerate(((a, b), (b, a))):
            inside, allowed = matchable(flow[direction], here.valid, there.valid)
            if here.black is not None:
                allowed &= ~here.black
            flows.append(inside)
            seen.append(torch.where(allowed, certainty[direction], certainty.new_zeros(())))
        return Warp(
            flow0=flows[0],
            flow1=flows[1],
            certainty0=seen[0],
            certainty1=seen[1],
            frame0=a.frame,
            frame1=b.frame,
        )
