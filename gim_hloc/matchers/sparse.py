"""What the matchers with keypoints share: their encodings."""

from __future__ import annotations

import torch

from gim_hloc.types import ImageData, Matches, SparseEncoding, apply_affine

make_encoding = SparseEncoding.make


def encode_network_keypoints(
    image: ImageData, xy: torch.Tensor, descriptors: torch.Tensor, scores: torch.Tensor
) -> SparseEncoding:
    """Make an encoding from keypoints (N, 2) in network pixels, hloc's frame."""
    return make_encoding(
        name=image.name,
        size=image.size,
        network_size=image.network_size,
        to_original=image.to_original,
        keypoints=apply_affine(image.to_original, xy),
        descriptors=descriptors,
        scores=scores,
    )


def no_matches(a: SparseEncoding, b: SparseEncoding) -> Matches:
    """Matches of a pair that has none."""
    return Matches.from_indices(a, b, torch.empty(0, 2, dtype=torch.long), torch.empty(0))
