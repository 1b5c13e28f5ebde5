"""What the matchers with keypoints share: their encodings."""

from __future__ import annotations

import numpy as np
import torch

from gim_hloc.errors import InputError
from gim_hloc.matchers.base import (
    ImageData,
    Matches,
    SparseEncoding,
    apply_affine,
    invert_affine,
)
from gim_hloc.matchers.common import MatcherBase


def make_encoding(
    *,
    name: str,
    size: tuple[int, int],
    network_size: tuple[int, int],
    to_original: np.ndarray,
    keypoints: torch.Tensor,
    descriptors: torch.Tensor,
    scores: torch.Tensor,
) -> SparseEncoding:
    """Make an encoding from what ``features.h5`` stores.

    Fresh encodings are made here too: network keypoints are derived from the rounded stored ones
    in both cases, so that both match alike.

    Args:
        name: POSIX path of the image relative to the image root.
        size: (width, height) of the stored file, pixels.
        network_size: (width, height) that the network saw, pixels.
        to_original: (2, 3) network pixel -> stored pixel.
        keypoints: (N, 2) x, y in stored pixels, hloc's frame, strongest first.
        descriptors: (N, D); note that ``features.h5`` holds the transpose.
        scores: (N,).
    """
    keypoints = keypoints.detach().float().cpu()
    return SparseEncoding(
        name=name,
        size=(int(size[0]), int(size[1])),
        network_size=(int(network_size[0]), int(network_size[1])),
        to_original=np.asarray(to_original, dtype=np.float64),
        keypoints=keypoints,
        network_keypoints=apply_affine(invert_affine(to_original), keypoints),
        descriptors=descriptors.detach().half().cpu(),
        scores=scores.detach().float().cpu(),
    )


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


class SparseMatcher(MatcherBase[SparseEncoding]):
    """Base of the matchers with keypoints.

    Attributes:
        descriptor_dim: numbers in a descriptor; None takes any.
    """

    descriptor_dim: int | None = None

    def check_descriptors(self, width: int, where: str) -> None:
        """Refuse descriptors that another extractor made; ``InputError`` begins with ``where``."""
        if self.descriptor_dim is not None and width != self.descriptor_dim:
            raise InputError(
                f"{where}: the descriptors have {width} numbers, those of {self.info.name} "
                f"{self.descriptor_dim}. Extract features with the matcher that matches them."
            )
