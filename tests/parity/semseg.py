"""Golden arrays of the segmentation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gim_hloc.masks import load_segmentation_state
from gim_hloc.networks import segmentation

from .golden import Golden, Weights


def load(weights: Weights) -> segmentation.Segmentation:
    """The network with filled weights."""
    model = segmentation.Segmentation()
    for part in ("encoder", "decoder"):
        state = weights(f"semseg_{part}")
        load_segmentation_state(getattr(model, part), state, path=f"the filled semseg_{part}")
    return model.eval()


def produce(golden: Golden, model: segmentation.Segmentation) -> dict[str, Any]:
    """All arrays that the file holds."""
    image = golden["image"]
    x = segmentation.prepare(image, golden.config["size"])
    features = model.encoder(x)
    logits = model.decoder(features[-1])
    size = (x.shape[2], x.shape[3])
    probability = F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)
    best, second = probability.topk(2, 1).values.unbind(1)
    return {
        "input": x[0],
        **{f"layer{index}": feature for index, feature in enumerate(features, 1)},
        "ppm0": model.decoder.ppm[0](features[-1]),
        "ppm3": model.decoder.ppm[3](features[-1]),
        "logits": logits,
        "probability": probability,
        "probability_max": best,
        "probability_gap": best - second,
        "label": model.segment(image, max_size=golden.config["size"]),
    }
