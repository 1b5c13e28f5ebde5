"""One training pair, and a batch of them: the only thing that data sources and models share.

Frames: *network pixels* are those of the tensors a model sees, *original pixels* those of the
image file; both in hloc's frame (integer = centre of a pixel). Everything that was done to an image
on its way to the network (scale, crop, flip, homography) is one 3x3 matrix, so that labels and
depth never follow an augmentation step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(kw_only=True)
class PairSample:
    """Two images of one scene and what is known about their correspondences.

    Truth is depth with poses (``depth0`` is not None), labels (``labels`` is not None), or both.

    Attributes:
        image0, image1: (3, H, W) float32 in [0, 1], zero where there is no image (padding, or
            outside a homography). All samples of a run have the same box (H, W).
        valid0, valid1: (H, W) bool, True inside the image.
        to_original0, to_original1: (3, 3) float64 homography, network -> original pixels.
        size0, size1: (width, height) of the original images in pixels.
        dataset: name of the source, for logs and for losses that leave one out.
        names: the two images, for messages and pictures.
        depth0, depth1: (h, w) float32 along the optical axis on the original pixels, 0 where
            unknown; or None.
        K0, K1: (3, 3) float64 intrinsics on original pixels; identity where there is no depth.
        T_0to1: (4, 4) float64, x1 = T x0; identity where there is no depth.
        labels: (L, 4) float32 network pixels x0, y0, x1, y1, or None.
    """

    image0: torch.Tensor
    image1: torch.Tensor
    valid0: torch.Tensor
    valid1: torch.Tensor
    to_original0: torch.Tensor
    to_original1: torch.Tensor
    size0: tuple[int, int]
    size1: tuple[int, int]
    dataset: str
    names: tuple[str, str]
    depth0: torch.Tensor | None = None
    depth1: torch.Tensor | None = None
    K0: torch.Tensor = dataclasses.field(default_factory=lambda: torch.eye(3, dtype=torch.float64))
    K1: torch.Tensor = dataclasses.field(default_factory=lambda: torch.eye(3, dtype=torch.float64))
    T_0to1: torch.Tensor = dataclasses.field(
        default_factory=lambda: torch.eye(4, dtype=torch.float64)
    )
    labels: torch.Tensor | None = None


@dataclass(kw_only=True)
class PairBatch:
    """``PairSample``s of one box, stacked.

    Attributes:
        image0, image1: (B, 3, H, W) float32.
        valid0, valid1: (B, H, W) bool.
        to_original0, to_original1: (B, 3, 3) float64.
        size0, size1: (B, 2) int64 width, height of the original images.
        depth0, depth1: (B, h, w) float32, padded with 0 at the right and below to a common size.
        K0, K1: (B, 3, 3) float64.
        T_0to1: (B, 4, 4) float64.
        labels: (B, L, 4) float32, padded with 0.
        label_count: (B,) int64, rows of ``labels`` in use.
        has_depth, has_labels: (B,) bool, which truth a sample has.
        dataset: B names of sources.
        names: B pairs of image names.
    """

    image0: torch.Tensor
    image1: torch.Tensor
    valid0: torch.Tensor
    valid1: torch.Tensor
    to_original0: torch.Tensor
    to_original1: torch.Tensor
    size0: torch.Tensor
    size1: torch.Tensor
    depth0: torch.Tensor
    depth1: torch.Tensor
    K0: torch.Tensor
    K1: torch.Tensor
    T_0to1: torch.Tensor
    labels: torch.Tensor
    label_count: torch.Tensor
    has_depth: torch.Tensor
    has_labels: torch.Tensor
    dataset: tuple[str, ...]
    names: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return int(self.image0.shape[0])

    @property
    def box(self) -> tuple[int, int]:
        """(width, height) of the network images in pixels."""
        return int(self.image0.shape[-1]), int(self.image0.shape[-2])

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on a device; copies from pinned memory do not block."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> PairBatch:
        """The same batch in pinned memory; a ``DataLoader`` calls it."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **pinned)


def collate(samples: Sequence[PairSample]) -> PairBatch:
    """Stack samples of one box."""
    no_depth = torch.zeros(1, 1)
    no_labels = torch.zeros(0, 4)
    labels = [no_labels if s.labels is None else s.labels for s in samples]
    longest = max(len(rows) for rows in labels)

    def stack(name: str) -> torch.Tensor:
        return torch.stack([getattr(s, name) for s in samples])

    return PairBatch(
        image0=stack("image0"),
        image1=stack("image1"),
        valid0=stack("valid0"),
        valid1=stack("valid1"),
        to_original0=stack("to_original0"),
        to_original1=stack("to_original1"),
        size0=torch.tensor([s.size0 for s in samples]),
        size1=torch.tensor([s.size1 for s in samples]),
        depth0=_pad_to_common([no_depth if s.depth0 is None else s.depth0 for s in samples]),
        depth1=_pad_to_common([no_depth if s.depth1 is None else s.depth1 for s in samples]),
        K0=stack("K0"),
        K1=stack("K1"),
        T_0to1=stack("T_0to1"),
        labels=torch.stack([F.pad(rows, (0, 0, 0, longest - len(rows))) for rows in labels]),
        label_count=torch.tensor([len(rows) for rows in labels]),
        has_depth=torch.tensor([s.depth0 is not None for s in samples]),
        has_labels=torch.tensor([s.labels is not None for s in samples]),
        dataset=tuple(s.dataset for s in samples),
        names=tuple(s.names for s in samples),
    )


def _pad_to_common(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    height = max(m.shape[0] for m in maps)
    width = max(m.shape[1] for m in maps)
    return torch.stack([F.pad(m, (0, width - m.shape[1], 0, height - m.shape[0])) for m in maps])
