"""hloc's own dense models in our schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from gim_hloc.hloc_plugin.registration import import_hloc, register
from gim_hloc.matchers.common import MatcherBase, resolve_device
from gim_hloc.types import (
    Encoding,
    ImageData,
    ImageOptions,
    MatcherInfo,
    Matches,
    apply_affine,
)


@dataclasses.dataclass(kw_only=True)
class HeldImage(Encoding):
    """The image itself: hloc's models match images, not encodings."""

    image: torch.Tensor  # (1, C, H, W) on the model's device


class HlocMatcher(MatcherBase[HeldImage]):
    """A dense model of hloc, e.g. its LoFTR.

    Args:
        model: hloc's configuration of it.
        image_options: how hloc's configuration wants images read.

    Raises:
        InputError: hloc is not installed.
    """

    def __init__(self, model: Mapping[str, Any], image_options: ImageOptions) -> None:
        register()
        load = import_hloc("utils.base_model").dynamic_load
        info = MatcherInfo(
            name=str(model["name"]),
            kind="semidense",
            checkpoint=(),
            licence="see hloc",
            commercial=False,
            colour="gray" if image_options.grayscale else "rgb",
            summary="a model of hloc",
        )
        super().__init__(
            info=info,
            options=dict(model),
            image_options=image_options,
            device=resolve_device("auto"),
        )
        made = load(import_hloc("matchers"), model["name"])(dict(model))
        self._model = made.eval().to(self.device)

    def encode_settings(self) -> dict[str, Any]:
        """All of them: images are only held."""
        return {"hloc": self.options}

    def match_settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def encode(self, image: ImageData) -> HeldImage:
        """Hold the image where the model wants it."""
        return HeldImage(
            name=image.name,
            size=image.size,
            network_size=image.network_size,
            to_original=image.to_original,
            image=image.image[None].to(self.device),
        )

    @torch.no_grad()
    def match(self, a: HeldImage, b: HeldImage) -> Matches:
        """Match two images; as with our semi-dense matchers, the free end is in ``b``."""
        found = self._model({"image0": b.image, "image1": a.image})
        return Matches(
            keypoints0=apply_affine(a.to_original, found["keypoints1"]),
            keypoints1=apply_affine(b.to_original, found["keypoints0"]),
            scores=found["scores"].float().cpu(),
        )
