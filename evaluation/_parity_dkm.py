"""What the golden files ``dkm_*.npz`` hold, from our gim_dkm.

The reference pads images with black, and black pixels match nothing in it: here images are padded
before the matcher sees them and ``black_pixels`` is on. So is ``shared_factor``, its mistake.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.evaluation.parity import Golden, Weights
from gim_hloc.geometry.sampling import balance_weights, kernel_density
from gim_hloc.geometry.warp import Warp, cell_centres
from gim_hloc.matchers.dense import padding_to_aspect
from gim_hloc.matchers.dkm import DKMMatcher, DKMOptions
from gim_hloc.types import ImageData

_OPTIONS = DKMOptions(precision="float32", pad=False, black_pixels=True, shared_factor=True)


@functools.lru_cache(maxsize=1)
def _matcher(weights: Weights) -> DKMMatcher:
    device = torch.device("cpu")
    return DKMMatcher("gim_dkm", options=_OPTIONS, device=device, state=weights("gim_dkm"))


def produce(golden: Golden, weights: Weights) -> dict[str, torch.Tensor | np.ndarray]:
    """Arrays of one golden file."""
    matcher = _matcher(weights)
    config = golden.config
    size = (config["h"], config["w"])
    matcher.options = dataclasses.replace(
        _OPTIONS,
        size=size,
        upsample_size=tuple(config["upsample_res"]) if config["upsample_preds"] else None,
    )
    # dkm_noupsample is another run on the images of dkm_synthetic.
    source = golden if golden.has("image0") else golden.sibling("dkm_synthetic")
    images = [source["image0"], source["image1"]]
    paddings = [(0, 0, 0, 0)] * 2
    if golden.has("demo_geometry"):
        paddings = [padding_to_aspect(x.shape[1], x.shape[0], size) for x in images]

    parts: dict[str, list[torch.Tensor]] = {}

    def record(name: str, value: torch.Tensor) -> None:
        if golden.has(name):
            parts.setdefault(name, []).append(value)
        if name == "pass1_enc8" and golden.has("pass1_enc32"):
            # Recorded of the reference, which computes them and uses them nowhere.
            net: Any = matcher.network.encoder.net
            deep = net.layer3(value)
            record("pass1_enc16", deep)
            record("pass1_enc32", net.layer4(deep))

    encodings = []
    for name, image, padding in zip(("0", "1"), images, paddings, strict=True):
        tensor = F.pad(torch.from_numpy(image).permute(2, 0, 1).float() / 255, padding)
        height, width = tensor.shape[1:]
        data = ImageData(image=tensor, name=name, size=(width, height), to_original=np.eye(2, 3))
        encodings.append(matcher.encode(data, record=record))
    warp = matcher.warp_batch([(encodings[0], encodings[1])], record=record)[0]
    del encodings
    produced: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items()}
    produced |= _result(warp)
    produced |= _sampling(golden, produced["warp"])
    if golden.has("demo_geometry"):
        produced |= _demo(produced["kde_points"].double().numpy(), images, paddings)
    return produced


def _result(warp: Warp) -> dict[str, torch.Tensor]:
    """Both directions side by side, as the reference's ``match`` returns them."""
    grid = cell_centres(warp.flow0.shape[0], warp.flow0.shape[1])
    sides = [torch.cat([grid, warp.flow0], -1), torch.cat([warp.flow1, grid], -1)]
    return {
        "warp": torch.cat(sides, 1),
        "certainty": torch.cat([warp.certainty0, warp.certainty1], 1),
    }


def _sampling(golden: Golden, warp: torch.Tensor) -> dict[str, torch.Tensor]:
    """The part of drawing matches that depends on no random numbers."""
    rows = warp.reshape(-1, 4)
    # Recorded: evenly spaced rows.
    points = rows[:: -(-len(rows) // golden["kde_points"].shape[0])]
    density = kernel_density(points)
    return {
        "kde_points": points,
        "kde_density": density,
        "balance_weight": balance_weights(density),
    }


def _demo(
    points: np.ndarray, images: list[np.ndarray], paddings: list[tuple[int, int, int, int]]
) -> dict[str, np.ndarray]:
    """Pixels of the unpadded images, corner origin, as the reference's demo draws them."""
    produced: dict[str, np.ndarray] = {}
    inside = np.ones(len(points), dtype=bool)
    padded, start, own = [], [], []
    for index, (image, (left, right, top, bottom)) in enumerate(zip(images, paddings, strict=True)):
        height, width = image.shape[:2]
        full = np.array([width + left + right, height + top + bottom])
        pixels = full * (points[:, 2 * index : 2 * index + 2] + 1) / 2 - (left, top)
        inside &= ((pixels > 0) & (pixels <= (width - 1, height - 1))).all(1)
        produced[f"demo_kpts{index}"] = pixels
        padded += [full[1], full[0]]
        start += [left, top]
        own += [width, height]
    return produced | {"demo_inside": inside, "demo_geometry": np.array(padded + start + own)}
