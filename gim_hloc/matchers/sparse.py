"""What the matchers with keypoints share: encodings, and networks that detect and describe."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch

from gim_hloc.errors import InputError
from gim_hloc.matchers.common import MatcherBase, weight_files
from gim_hloc.matchers.registry import describe
from gim_hloc.networks.keypoints import Detector, Subpixel
from gim_hloc.options import Count, options
from gim_hloc.types import ImageData, Matches, SparseEncoding, apply_affine


def encode_network_keypoints(
    image: ImageData, xy: torch.Tensor, descriptors: torch.Tensor, scores: torch.Tensor
) -> SparseEncoding:
    """Make an encoding from keypoints (N, 2) in network pixels, hloc's frame."""
    return SparseEncoding.make(
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


@options
class DetectorOptions:
    """Numbers of a matcher with learned keypoints."""

    # Long side in pixels that the network sees; None keeps the image's.
    max_size: Count | None = 1024
    upsample: bool = False  # enlarge smaller images to max_size: finer keypoints, more time
    max_keypoints: Count = 2048  # per image, the strongest; matching time grows with the square
    detection_threshold: float = 0.0  # lowest score of a keypoint, in units of the network
    nms_radius: Count = 2  # pixels of the network's image: keypoints keep this distance
    subpixel: Subpixel = "quadratic"  # keypoint positions: quadratic, soft_argmax or none

    def __post_init__(self) -> None:
        if self.upsample and self.max_size is None:
            raise InputError("upsample needs max_size: the long side to enlarge images to.")


_GRAY = (0.299, 0.587, 0.114)  # what red, green and blue weigh in a gray image


class DetectorMatcher(MatcherBase[SparseEncoding]):
    """A network that detects and describes keypoints; its file is the first of the matcher's."""

    whole_pixels = False  # whether the detector's keypoints have no sub-pixel positions
    encode_fields = (
        "max_size",
        "upsample",
        "max_keypoints",
        "detection_threshold",
        "nms_radius",
        "subpixel",
    )

    def __init__(self, name: str, *, options: Any, device: torch.device) -> None:
        info = describe(name)
        if self.whole_pixels and options.subpixel != "none":
            raise InputError(
                f"{name} has whole-pixel keypoints: subpixel must be 'none', "
                f"not {options.subpixel!r}."
            )
        self.paths, hashes = weight_files(info)
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        path = self.paths[info.checkpoint[0]]
        module: Any = self.load_detector(path).eval().to(device)
        self.extractor: Detector = module

    @staticmethod
    @abstractmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """The detector with the weights of a file."""

    def _encode_weights(self) -> list[str]:
        return [self.info.checkpoint[0]]

    @torch.inference_mode()
    def encode(self, image: ImageData) -> SparseEncoding:
        """Detect and describe keypoints.

        Args:
            image: RGB, (3, H, W), or gray (1, H, W); turned into what the network wants.
        """
        tensor = image.image.to(self.device)
        if self.info.colour == "gray" and tensor.shape[0] == 3:
            tensor = torch.tensordot(tensor.new_tensor(_GRAY), tensor, 1)[None]
        elif self.info.colour == "rgb" and tensor.shape[0] == 1:
            tensor = tensor.expand(3, -1, -1)
        if tensor.amax() - tensor.amin() < 1 / 255:
            # Networks that normalise each image find keypoints in nothing, at the border.
            nothing = tensor.new_empty(0, self.info.descriptor_dim or 0)
            return encode_network_keypoints(image, nothing[:, :2], nothing, nothing[:, 0])
        xy, descriptors, scores = self.extractor.detect_and_describe(
            tensor,
            max_keypoints=self.options.max_keypoints,
            threshold=self.options.detection_threshold,
            radius=self.options.nms_radius,
            subpixel=self.options.subpixel,
            mask=image.mask,
        )
        return encode_network_keypoints(image, xy, descriptors, scores)
