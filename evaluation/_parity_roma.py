"""What the golden files ``roma_*.npz`` hold, from our gim_roma."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.evaluation.parity import Golden, Weights
from gim_hloc.geometry.sampling import balance_weights, kernel_density
from gim_hloc.geometry.warp import cell_centres
from gim_hloc.matchers.dense import BLACK, DenseEncoding, DenseMatcher, padding_to_aspect
from gim_hloc.matchers.roma import DINOV2, load_dinov2, load_roma
from gim_hloc.networks.dense import resize
from gim_hloc.networks.dinov2 import DINOv2
from gim_hloc.networks.roma import RoMa


@functools.lru_cache(maxsize=1)
def _networks(weights: Weights) -> tuple[RoMa, DINOv2]:
    roma = load_roma(weights("gim_roma"), path="gim_roma")
    return roma.eval(), load_dinov2(weights("dinov2_vitl14"), path=DINOV2).eval()


class _Recorder:
    """Collects what a golden file holds; calls of one name go to one array's batch axis."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self.parts: dict[str, list[torch.Tensor]] = {}

    def __call__(self, name: str, value: torch.Tensor) -> None:
        if self.golden.has(name):
            self.parts.setdefault(name, []).append(value)
        if name == "gm_cls":
            top = value.topk(2, dim=1)
            self("gm_cls_argmax", top.indices[:, 0])
            self("gm_cls_max", top.values[:, 0])
            self("gm_cls_top2_gap", top.values[:, 0] - top.values[:, 1])

    def arrays(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat(parts) if len(parts) > 1 else parts[0]
            for name, parts in self.parts.items()
        }


def produce(golden: Golden, weights: Weights) -> dict[str, torch.Tensor | np.ndarray]:
    """Arrays of one golden file."""
    roma, dinov2 = _networks(weights)
    config = golden.config
    size, fine_size = (config["h"], config["w"]), tuple(config["upsample_res"])
    record = _Recorder(golden)
    images = [
        torch.from_numpy(golden[name]).permute(2, 0, 1).float() / 255
        for name in ("image0", "image1")
    ]
    paddings = [(0, 0, 0, 0)] * 2
    if golden.has("demo_geometry"):
        paddings = [padding_to_aspect(x.shape[2], x.shape[1], size) for x in images]
    padded = [F.pad(x, padding) for x, padding in zip(images, paddings, strict=True)]

    with torch.inference_mode():
        features = []
        for image in padded:
            coarse, fine = (resize(image[None], s) for s in (size, fine_size))
            tokens = dinov2(coarse, record=record)
            features.append(roma.encode(tokens, coarse, fine, record=record))
        factor = (fine_size[0] * fine_size[1] / (size[0] * size[1])) ** 0.5
        flow, certainty = roma.match(
            features[0], features[1], scale_factors=(1.0, factor), record=record
        )
        del features
        produced: dict[str, Any] = record.arrays()
        produced |= _results(padded, flow[:, 0], certainty[:, 0])
        produced |= _sampling(golden, produced["warp"])
    if golden.has("demo_geometry"):
        produced |= _demo(golden, produced["kde_points"].double().numpy(), images, paddings)
    return produced


def _results(
    padded: list[torch.Tensor], flow: torch.Tensor, certainty: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the reference's ``match`` returns: both directions side by side.

    Black pixels match nothing there, and padding is black.
    """
    height, width = certainty.shape[1:]
    encodings = [
        DenseEncoding(
            name="",
            size=(image.shape[2], image.shape[1]),
            network_size=(image.shape[2], image.shape[1]),
            to_original=np.eye(2, 3),
            frame=np.eye(2, 3),
            valid=torch.ones(height, width, dtype=torch.bool),
            black=F.interpolate(
                (image < BLACK).all(0)[None, None].float(), (height, width), mode="nearest"
            )[0, 0]
            > 0,
        )
        for image in padded
    ]
    warp = DenseMatcher.finish(encodings[0], encodings[1], flow, certainty)
    grid = cell_centres(height, width)
    sides = [torch.cat([grid, warp.flow0], -1), torch.cat([warp.flow1, grid], -1)]
    return {
        "warp": torch.cat(sides, 1),
        "certainty": torch.cat([warp.certainty0, warp.certainty1], 1),
    }


def _sampling(golden: Golden, warp: torch.Tensor) -> dict[str, torch.Tensor]:
    """The part of drawing matches that depends on no random numbers."""
    count = golden["kde_points"].shape[0]
    rows = warp.reshape(-1, 4)
    points = rows[:: -(-len(rows) // count)]  # recorded: evenly spaced rows
    density = kernel_density(points)
    return {
        "kde_points": points,
        "kde_density": density,
        "balance_weight": balance_weights(density),
    }


def _demo(
    golden: Golden,
    points: np.ndarray,
    images: list[torch.Tensor],
    paddings: list[tuple[int, int, int, int]],
) -> dict[str, np.ndarray]:
    """Pixels of the unpadded images, corner origin, as the reference's demo draws them."""
    inside = np.ones(len(points), dtype=bool)
    produced: dict[str, np.ndarray] = {}
    full, start, own = [], [], []
    for index, (image, padding) in enumerate(zip(images, paddings, strict=True)):
        left, right, top, bottom = padding
        height, width = image.shape[1:]
        full += [height + top + bottom, width + left + right]
        start += [left, top]
        own += [width, height]
        pixels = (points[:, 2 * index : 2 * index + 2] + 1) / 2 * (full[-1], full[-2])
        pixels -= (left, top)
        produced[f"demo_kpts{index}"] = pixels
        inside &= ((pixels > 0) & (pixels <= (width - 1, height - 1))).all(1)
    return produced | {"demo_inside": inside, "demo_geometry": np.array(full + start + own)}
