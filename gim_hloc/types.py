"""The core types: a matcher (``encode`` once per image, ``match`` per pair) and what it works on.

Coordinates: ``*_px`` and every ``keypoints`` field are in hloc's frame, in which the integer
coordinate (0, 0) is the *centre* of the top left pixel. Unless a name says ``network``, pixels are
those of the image *as stored in its file* (EXIF orientation not applied), because that is what
COLMAP reads. ``network`` pixels are those of the upright, resized tensor that a network sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from gim_hloc.errors import InputError
from gim_hloc.geometry.warp import Warp, transform
from gim_hloc.geometry.warp import inverse as invert_affine
from gim_hloc.options import Quality as Quality

Kind = Literal["sparse", "semidense", "dense"]
"""sparse: matches are of keypoints; semidense: they start at cells of image 0 and end anywhere in
image 1; dense: every pixel has one (a warp)."""


@dataclass(frozen=True, kw_only=True)
class MatcherInfo:
    """Facts about a matcher that users choose by."""

    name: str
    kind: Kind
    summary: str = ""  # one line for ``describe()``
    checkpoint: tuple[str, ...] = ()  # weight files of ``gim-weights`` by their published names
    licence: str = "not stated"  # of code and weights, e.g. "Apache-2.0 (LightGlue)"
    commercial: bool = False  # whether that licence allows commercial use
    colour: Literal["rgb", "gray"] = "rgb"
    rotation_invariant: bool = False  # whether images may be turned against each other at will
    # Sum of the inliers' confidences that no pair of unrelated images reaches, by operating point;
    # calibrated (docs/accuracy.md), and empty where it is not.
    min_confidence_sum: Mapping[Quality, float] = field(default_factory=dict)
    descriptor_dim: int | None = None  # numbers in a descriptor; None takes any
    binary: bool = False  # descriptors are bits, eight in a uint8
    # Whether a matcher without keypoints is faster on a processor with several pairs side by side.
    side_by_side: bool = False

    @property
    def has_keypoints(self) -> bool:
        """Whether images have keypoints before they are matched."""
        return self.kind == "sparse"

    @property
    def has_warps(self) -> bool:
        """Whether ``warp_batch`` answers."""
        return self.kind == "dense"

    def check_descriptors(self, width: int, where: str) -> None:
        """Refuse descriptors that another extractor made; ``InputError`` begins with ``where``."""
        if self.descriptor_dim is not None and width != self.descriptor_dim:
            raise InputError(
                f"{where}: the descriptors have {width} numbers, those of {self.name} "
                f"{self.descriptor_dim}. Extract features with the matcher that matches them."
            )


@dataclass(kw_only=True)
class ImageData:
    """One image as a network sees it.

    Attributes:
        image: float32 tensor (C, H, W) in [0, 1], upright.
        name: POSIX path relative to the image root.
        size: (width, height) of the stored file in pixels.
        to_original: (2, 3) float64 affine map, network pixel -> stored pixel, both in hloc's frame.
            It holds the resize and the EXIF turn.
        mask: bool tensor (H, W) at network resolution, True where keypoints are allowed, or None.
    """

    image: torch.Tensor
    name: str
    size: tuple[int, int]
    to_original: np.ndarray
    mask: torch.Tensor | None = None

    @property
    def network_size(self) -> tuple[int, int]:
        """(width, height) of the tensor in pixels."""
        return int(self.image.shape[-1]), int(self.image.shape[-2])


@dataclass(kw_only=True)
class Encoding:
    """What depends on one image only. Subclasses hold what their matcher's ``match`` needs."""

    name: str
    size: tuple[int, int]  # (width, height) of the stored file, pixels
    network_size: tuple[int, int]  # (width, height) of the tensor, pixels
    to_original: np.ndarray  # (2, 3) network -> stored pixels, hloc's frame


@dataclass(kw_only=True)
class SparseEncoding(Encoding):
    """Keypoints and descriptors of one image.

    Attributes:
        keypoints: (N, 2) float32 x, y in stored pixels, hloc's frame, strongest first.
        network_keypoints: (N, 2) float32 x, y in network pixels (upright), hloc's frame.
        descriptors: (N, D) float16, or uint8 of binary ones. Half precision also in memory, so that
            encodings read back from ``features.h5`` match exactly as fresh ones do.
        scores: (N,) float32 detection scores.
        cache: values that a matcher derives from the encoding alone and reuses for all its pairs.
            Never stored.
    """

    keypoints: torch.Tensor
    network_keypoints: torch.Tensor
    descriptors: torch.Tensor
    scores: torch.Tensor
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.keypoints.shape[0])

    @classmethod
    def make(
        cls,
        *,
        name: str,
        size: tuple[int, int],
        network_size: tuple[int, int],
        to_original: np.ndarray,
        keypoints: torch.Tensor,
        descriptors: torch.Tensor,
        scores: torch.Tensor,
    ) -> SparseEncoding:
        """Make an encoding from what is stored, on the processor.

        Fresh encodings are made here too: network keypoints are derived from the rounded stored
        ones in both cases, so that both match alike.
        """
        keypoints = keypoints.detach().float().cpu()
        if descriptors.dtype != torch.uint8:
            descriptors = descriptors.half()
        return cls(
            name=name,
            size=(int(size[0]), int(size[1])),
            network_size=(int(network_size[0]), int(network_size[1])),
            to_original=np.asarray(to_original, dtype=np.float64),
            keypoints=keypoints,
            network_keypoints=apply_affine(invert_affine(to_original), keypoints),
            descriptors=descriptors.detach().cpu(),
            scores=scores.detach().float().cpu(),
        )

    def strongest(self, most: int) -> SparseEncoding:
        """The first, that is the strongest, keypoints; their rows stay."""
        return replace(
            self,
            keypoints=self.keypoints[:most],
            network_keypoints=self.network_keypoints[:most],
            descriptors=self.descriptors[:most],
            scores=self.scores[:most],
            cache={},
        )

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Datasets and attributes of a feature group in hloc's layout."""
        arrays: dict[str, np.ndarray] = {
            "keypoints": self.keypoints.cpu().numpy().astype(np.float32),
            "descriptors": self.descriptors.cpu().numpy().T,
            "scores": self.scores.cpu().numpy().astype(np.float32),
            "image_size": np.array(self.size, dtype=np.int64),
        }
        attributes: dict[str, Any] = {
            "network_size": [int(v) for v in self.network_size],
            "to_original": [float(v) for v in np.asarray(self.to_original).ravel()],
        }
        return arrays, attributes

    @classmethod
    def from_arrays(
        cls, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
    ) -> SparseEncoding:
        """Undo ``to_arrays``; the encoding matches exactly as the fresh one."""
        width, height = (int(v) for v in arrays["image_size"])
        network_width, network_height = (int(v) for v in attributes["network_size"])
        return cls.make(
            name=name,
            size=(width, height),
            network_size=(network_width, network_height),
            to_original=np.asarray(attributes["to_original"], dtype=np.float64).reshape(2, 3),
            keypoints=torch.from_numpy(np.array(arrays["keypoints"], dtype=np.float32)),
            descriptors=torch.from_numpy(np.array(arrays["descriptors"].T, order="C")),
            scores=torch.from_numpy(np.array(arrays["scores"], dtype=np.float32)),
        )


@dataclass(kw_only=True)
class Matches:
    """Correspondences of one pair.

    Attributes:
        keypoints0: (M, 2) float32 x, y in stored pixels of image 0, hloc's frame.
        keypoints1: (M, 2) the same in image 1.
        scores: (M,) float32 confidence in [0, 1].
        indices: (M, 2) int64 rows into the two encodings' keypoints, or None for matchers without
            keypoints.
        warp: what a dense matcher drew them from, else None.
    """

    keypoints0: torch.Tensor
    keypoints1: torch.Tensor
    scores: torch.Tensor
    indices: torch.Tensor | None = None
    warp: Warp | None = None

    def __len__(self) -> int:
        return int(self.scores.shape[0])

    @classmethod
    def from_indices(
        cls, a: SparseEncoding, b: SparseEncoding, indices: torch.Tensor, scores: torch.Tensor
    ) -> Matches:
        """Make matches from rows (M, 2) into the keypoints of ``a`` and ``b``."""
        indices = indices.long().cpu()
        return cls(
            keypoints0=a.keypoints[indices[:, 0]],
            keypoints1=b.keypoints[indices[:, 1]],
            scores=scores.float().cpu(),
            indices=indices,
        )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How a matcher wants its images read."""

    max_size: int | None  # long side in pixels; larger images are reduced (area), None keeps all
    upsample: bool = False  # also enlarge smaller images to max_size
    grayscale: bool = False
    multiple_of: int = 1  # both sides are rounded down to a multiple of this (by resizing)


E = TypeVar("E", bound=Encoding)


@runtime_checkable
class Matcher(Protocol[E]):
    """What every matcher offers, and all that callers use. Derive from ``MatcherBase``.

    ``E`` is its kind of encoding: a ``Matcher[SparseEncoding]`` has keypoints.
    """

    info: MatcherInfo
    options: Any  # frozen dataclass with the resolved numbers
    image_options: ImageOptions
    device: torch.device
    weights_hashes: dict[str, str]  # file name -> sha256 of the weights in use

    def encode_settings(self) -> dict[str, Any]:
        """Everything that decides encodings, flat and JSON-able."""
        ...

    def match_settings(self) -> dict[str, Any]:
        """Everything that decides matches of given encodings, flat and JSON-able."""
        ...

    def encode(self, image: ImageData) -> E:
        """Compute what depends on one image only."""
        ...

    def match(self, a: E, b: E) -> Matches:
        """Match two encodings."""
        ...

    def match_batch(self, pairs: Sequence[tuple[E, E]]) -> list[Matches]:
        """Match many pairs; the same results as ``match`` on each, up to float noise."""
        ...

    def warp_batch(self, pairs: Sequence[tuple[E, E]]) -> list[Warp]:
        """Where each point of one image lies in the other, both ways, of many pairs.

        Raises:
            InputError: the matcher is not dense (``info.has_warps``).
        """
        ...

    def smaller(self) -> bool:
        """Make do with less memory from here on; earlier encodings are of no use afterwards.

        Returns:
            Whether that was possible.
        """
        ...


def apply_affine(matrix: np.ndarray, xy: torch.Tensor) -> torch.Tensor:
    """Map points (N, 2) by a (2, 3) affine matrix, in float64, returning float32 in main memory."""
    return transform(matrix, xy.cpu())
