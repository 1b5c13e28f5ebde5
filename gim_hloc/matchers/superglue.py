"""SuperPoint and SuperGlue as their authors trained them: baselines of the ZEB table.

The matching network is that of the ``transformers`` package, an optional dependency (without
torchvision it runs too); keypoints come from our SuperPoint with the weights of the same file.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import torch
from pydantic import Field

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.matchers.common import MatcherBase, weight_files
from gim_hloc.matchers.registry import describe
from gim_hloc.matchers.sparse import encode_network_keypoints, no_matches
from gim_hloc.networks.superpoint import SuperPoint
from gim_hloc.options import Count, options
from gim_hloc.types import ImageData, Matches, SparseEncoding


@options
class SuperGlueOptions:
    """Numbers of SuperPoint and SuperGlue."""

    # Long side in pixels that the network sees; None keeps the image's.
    max_size: Annotated[int, Field(ge=8)] | None = 1024
    max_keypoints: Count = 2048  # per image, the strongest; matching time grows with the square
    detection_threshold: float = 0.005  # lowest score of a keypoint
    nms_radius: Count = 4  # pixels of the network's image: keypoints keep this distance
    filter_threshold: float = 0.2  # lowest confidence of a match, in [0, 1]
    sinkhorn_iterations: Count = 100  # of the assignment; fewer are faster and less exact


# Our SuperPoint's layers -> the package's.
_LAYERS = {
    **{
        f"conv{stage}{part}": f"encoder.conv_blocks.{stage - 1}.conv_{part}"
        for stage in range(1, 5)
        for part in "ab"
    },
    **{f"convP{part}": f"keypoint_decoder.conv_score_{part}" for part in "ab"},
    **{f"convD{part}": f"descriptor_decoder.conv_descriptor_{part}" for part in "ab"},
}


def make_network(options: SuperGlueOptions, name: str = "superglue_outdoor") -> Any:
    """The package's SuperGlue (its SuperPoint included), without weights.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from transformers import SuperGlueConfig, SuperGlueForKeypointMatching
    except ImportError as error:
        (file,) = describe(name).checkpoint
        raise InputError(
            f"{name} needs the package transformers, which is not installed or does not import "
            f"({error}). Install it with: pip install 'gim-hloc[transformers]'. Its weights are "
            f"model.safetensors of huggingface.co/magic-leap-community/{name}, here named {file}."
        ) from error
    return SuperGlueForKeypointMatching(
        SuperGlueConfig(
            sinkhorn_iterations=options.sinkhorn_iterations,
            matching_threshold=options.filter_threshold,
        )
    )


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in the published files.

    Raises:
        InputError: the package is not installed.
    """
    state = make_network(SuperGlueOptions()).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


class SuperGlueMatcher(MatcherBase[SparseEncoding]):
    """SuperPoint and SuperGlue.

    Args:
        name: of the matcher in the registry.
        options: its numbers.
        device: where the networks run.
        network: a network of ``make_network`` with weights instead of the published file's.

    Raises:
        InputError: transformers is not installed.
        WeightsError: the weights cannot be had or are not this network's.
    """

    options_type = SuperGlueOptions
    encode_fields = ("max_size", "max_keypoints", "detection_threshold", "nms_radius")

    def __init__(
        self,
        name: str,
        *,
        options: SuperGlueOptions,
        device: torch.device,
        network: Any = None,
    ) -> None:
        info = describe(name)
        hashes: dict[str, str] = {}
        if network is None:
            network = make_network(options, name)
            paths, hashes = weight_files(info)
            (path,) = paths.values()
            weights.load_into(network, weights.load_state_dict(path), path=path)
        super().__init__(info=info, options=options, device=device, weights_hashes=hashes)
        self.libraries = {"transformers": importlib.metadata.version("transformers")}
        self.network = network.eval().requires_grad_(False).to(device)
        self.detector = SuperPoint().eval().requires_grad_(False).to(device)
        state = network.keypoint_detector.state_dict()
        self.detector.load_state_dict(
            {
                f"{ours}.{part}": state[f"{theirs}.{part}"]
                for ours, theirs in _LAYERS.items()
                for part in ("weight", "bias")
            }
        )

    @torch.inference_mode()
    def encode(self, image: ImageData) -> SparseEncoding:
        """Detect and describe keypoints in a gray image (1, H, W)."""
        xy, descriptors, scores = self.detector.detect_and_describe(
            image.image.mean(0, keepdim=True).to(self.device),
            max_keypoints=self.options.max_keypoints,
            threshold=self.options.detection_threshold,
            radius=self.options.nms_radius,
            mask=image.mask,
        )
        return encode_network_keypoints(image, xy, descriptors, scores)

    @torch.inference_mode()
    def match(self, a: SparseEncoding, b: SparseEncoding) -> Matches:
        """Match two encodings."""
        if len(a) == 0 or len(b) == 0:
            return no_matches(a, b)
        # The package takes images of one size and keypoints padded to one length.
        longest = max(len(a), len(b))
        shape = (1, 2, longest)
        xy, descriptors = torch.zeros(*shape, 2), torch.zeros(*shape, a.descriptors.shape[1])
        scores, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.int)
        for side, encoding in enumerate((a, b)):
            extent = torch.tensor(encoding.network_size, dtype=torch.float32)
            count = len(encoding)
            # As if every image were one unit large, with its centre at (1/2, 1/2).
            unit = (encoding.network_keypoints - extent / 2) / extent.max() + 0.5
            xy[0, side, :count] = unit
            descriptors[0, side, :count] = encoding.descriptors.float()
            scores[0, side, :count] = encoding.scores
            mask[0, side, :count] = 1
        matches, confidence = self.network._match_image_pair(
            *(t.to(self.device) for t in (xy, descriptors, scores)),
            height=1,
            width=1,
            mask=mask.to(self.device) if len(a) != len(b) else None,
        )[:2]
        partner, confidence = matches[0, 0, : len(a)], confidence[0, 0, : len(a)]
        rows = ((partner >= 0) & (partner < len(b))).nonzero()[:, 0]
        index = torch.stack([rows, partner[rows]], 1)
        return Matches.from_indices(a, b, index, confidence[rows])
