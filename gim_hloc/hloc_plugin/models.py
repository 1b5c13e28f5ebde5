"""What our modules in hloc do. They add hloc's base class, which only exists where hloc does.

Coordinates come and go in hloc's frame (an integer is the centre of a pixel) and in pixels of the
image that hloc hands over, which is all that hloc knows: it scales them itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from gim_hloc import matchers
from gim_hloc.errors import InputError
from gim_hloc.hloc_plugin.memory import EncodingMemory, content_key
from gim_hloc.types import Encoding, ImageData, Matcher, Matches, SparseEncoding

MAX_KEYPOINTS = 32767  # hloc stores rows of keypoints as int16

_IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def matcher_name(model: Mapping[str, Any], default: str | None = None) -> str:
    """Our matcher that a ``model`` configuration means."""
    name = model.get("matcher", default)
    if not name:
        raise InputError(
            f"The model {model.get('name')!r} needs the name of a matcher: "
            '{"name": ..., "matcher": "dkm_outdoor"}, for instance.'
        )
    return str(name)


def load_matcher(model: Mapping[str, Any], default: str | None = None) -> Matcher:
    """Load the matcher of a ``model`` configuration; see ``gim_hloc.hloc_plugin.confs``.

    Raises:
        InputError: unknown matcher or option.
        WeightsError: the weights cannot be had.
    """
    ours = ("name", "matcher", "cache_gb", "min_confidence_sum")
    options = {k: v for k, v in model.items() if k not in ours}
    return matchers.load(matcher_name(model, default), **options)


def match_free(
    matcher: Matcher, fixed: Container[str], pairs: Sequence[tuple[Encoding, Encoding]]
) -> list[Matches]:
    """Match pairs with their free ends where hloc wants them: in image 0.

    Semi-dense matches start at cells of the image that comes first, and end anywhere in the other.

    Args:
        matcher: dense or semi-dense.
        fixed: names of images whose keypoints are given, so that they must not have the free ends.
        pairs: encodings.
    """
    cells_first = matcher.info.kind == "semidense"
    turned = [(a.name in fixed) != cells_first for a, _ in pairs]
    found = matcher.match_batch(
        [(b, a) if turn else (a, b) for turn, (a, b) in zip(turned, pairs, strict=True)]
    )
    return [
        dataclasses.replace(m, keypoints0=m.keypoints1, keypoints1=m.keypoints0) if turn else m
        for turn, m in zip(turned, found, strict=True)
    ]


def as_image(tensor: torch.Tensor, name: str) -> ImageData:
    """An image (1, C, H, W) of hloc's."""
    return ImageData(
        image=tensor[0].float(),
        name=name,
        size=(int(tensor.shape[-1]), int(tensor.shape[-2])),
        to_original=_IDENTITY,
    )


class MatcherModel:
    """Base of our modules: loads a matcher.

    Attributes:
        matcher_default: name in our registry, unless the configuration has ``matcher``.
    """

    default_conf: ClassVar[dict[str, Any]] = {}
    matcher_default: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()
    matcher: Matcher

    def _init(self, conf: dict[str, Any]) -> None:
        """Load the matcher: hloc's constructor."""
        # hloc takes CUDA where there is one, as our "auto" does.
        self.matcher = load_matcher(conf, self.matcher_default)
        if self.matcher.info.kind not in self.kinds:
            raise InputError(
                f"{self.matcher.info.name} is {self.matcher.info.kind}; the model "
                f"{conf.get('name')!r} of hloc takes {' or '.join(self.kinds)} matchers."
            )


class DenseModel(MatcherModel):
    """A dense or semi-dense matcher. Every image is encoded once, as long as memory lasts."""

    required_inputs: ClassVar[list[str]] = ["image0", "image1"]
    kinds = ("dense", "semidense")

    def _init(self, conf: dict[str, Any]) -> None:
        super()._init(conf)
        self.memory = EncodingMemory(self.matcher.device, conf.get("cache_gb"))

    def _forward(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Match two images.

        Returns:
            ``keypoints0`` and ``keypoints1`` (M, 2), ``scores`` (M,).
        """
        a, b = (self._encoding(data[f"image{side}"]) for side in (0, 1))
        (found,) = match_free(self.matcher, (), [(a, b)])
        device = data["image0"].device
        return {
            "keypoints0": found.keypoints0.clone().to(device),
            "keypoints1": found.keypoints1.clone().to(device),
            "scores": found.scores.clone().to(device),
        }

    def _encoding(self, image: torch.Tensor) -> Encoding:
        key = content_key(image)  # hloc gives no names; the content is as good
        return self.memory.get(key, lambda: self.matcher.encode(as_image(image, key)))


class ExtractorModel(MatcherModel):
    """The keypoints of a sparse matcher.

    Keypoints are handed over in double precision: hloc rounds what is in single precision to half
    precision (``as_half``, its default), which moves keypoints by up to a pixel.
    """

    required_inputs: ClassVar[list[str]] = ["image"]
    kinds = ("sparse",)
    detection_noise = 1.0  # px, of positions; hloc's triangulation multiplies its limits by it

    def _init(self, conf: dict[str, Any]) -> None:
        super()._init(conf)
        wanted = getattr(self.matcher.options, "max_keypoints", None)
        if wanted is not None:
            check_number(wanted, "max_keypoints")

    def _forward(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Detect and describe.

        Returns:
            ``keypoints`` (1, N, 2), ``descriptors`` (1, D, N), ``scores`` (1, N).
        """
        found = self.matcher.encode(as_image(data["image"], "image"))
        check_number(len(found), "the number of keypoints")
        device = data["image"].device
        return {
            "keypoints": found.keypoints.double()[None].to(device),
            "descriptors": found.descriptors.float().T.contiguous()[None].to(device),
            "scores": found.scores.clone()[None].to(device),
        }


class SparseMatcherModel(MatcherModel):
    """Matches the keypoints of two images.

    hloc verifies by the number of inliers alone, which unrelated images reach. Pairs whose matches
    all together are less sure than ``min_confidence_sum`` (the matcher's own number unless the
    configuration has one) are therefore left without matches.
    """

    required_inputs: ClassVar[list[str]] = [
        "image0",
        "keypoints0",
        "descriptors0",
        "image1",
        "keypoints1",
        "descriptors1",
    ]
    kinds = ("sparse",)

    def _init(self, conf: dict[str, Any]) -> None:
        super()._init(conf)
        bound = conf.get("min_confidence_sum")
        if bound is None:
            own = self.matcher.info.min_confidence_sum
            bound = own.get(conf.get("quality", "base"), 0.0)
        self.bound = float(bound)

    def _forward(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Match two images.

        Returns:
            ``matches0`` (1, N0) int64 with -1 for none, ``matching_scores0`` (1, N0).

        Raises:
            InputError: more keypoints than hloc can number, or descriptors of another kind.
        """
        a, b = (self._encoding(data, side) for side in "01")
        found = self.matcher.match(a, b)
        if found.indices is None:
            raise InputError(f"The matches of {self.matcher.info.name} are not of keypoints.")
        device = data["keypoints0"].device
        rows = found.indices.to(device)
        matches0 = torch.full((1, len(a)), -1, dtype=torch.int64, device=device)
        scores0 = torch.zeros((1, len(a)), device=device)
        if float(found.scores.sum()) >= self.bound:
            matches0[0, rows[:, 0]] = rows[:, 1]
            scores0[0, rows[:, 0]] = found.scores.to(device)
        return {"matches0": matches0, "matching_scores0": scores0}

    def _encoding(self, data: Mapping[str, torch.Tensor], side: str) -> SparseEncoding:
        keypoints = data[f"keypoints{side}"][0]
        count = len(keypoints)
        check_number(count, "the number of keypoints")
        descriptors = data[f"descriptors{side}"][0].T
        if len(descriptors) != count:
            raise InputError(
                f"There are {count} keypoints and {len(descriptors)} descriptors; hloc's "
                "descriptors are (D, N)."
            )
        self.matcher.info.check_descriptors(descriptors.shape[1], f"image{side}")
        scores = data.get(f"scores{side}", data.get(f"keypoint_scores{side}"))
        height, width = data[f"image{side}"].shape[-2:]
        return SparseEncoding.make(
            name=side,
            size=(int(width), int(height)),
            network_size=(int(width), int(height)),
            to_original=_IDENTITY,
            keypoints=keypoints,
            # hloc hands over numbers in single precision, bits too.
            descriptors=descriptors.byte() if self.matcher.info.binary else descriptors,
            scores=torch.ones(count) if scores is None else scores[0],
        )


def check_number(count: int, what: str) -> None:
    """Refuse what hloc's int16 cannot hold.

    Raises:
        InputError: more than 32767.
    """
    if count > MAX_KEYPOINTS:
        raise InputError(
            f"{what} is {count}, but hloc stores matches as int16: at most {MAX_KEYPOINTS} "
            "keypoints an image. Lower max_keypoints in the configuration of the features."
        )
