"""Golden arrays of gim_roma."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.matchers.dense import BLACK, DenseEncoding, DenseMatcher, padding_to_aspect
from gim_hloc.matchers.roma import DINOV2, load_dinov2, load_roma
from gim_hloc.networks.dense import resize
from gim_hloc.networks.dinov2 import DINOv2
from gim_hloc.networks.roma import RoMa, flow_of_classes

from . import dense
from .golden import Golden, Weights


def load(weights: Weights) -> tuple[RoMa, DINOv2]:
    roma = load_roma(weights("gim_roma"), path="gim_roma")
    return roma.eval(), load_dinov2(weights("dinov2_vitl14"), path=DINOV2).eval()


def produce(golden: Golden, networks: tuple[RoMa, DINOv2]) -> dict[str, Any]:
    roma, dinov2 = networks
    config = golden.config
    size, fine_size = (config["h"], config["w"]), tuple(config["upsample_res"])
    images = [golden["image0"], golden["image1"]]
    paddings = [(0, 0, 0, 0)] * 2
    if golden.has("demo_geometry"):
        paddings = [padding_to_aspect(x.shape[1], x.shape[0], size) for x in images]
    padded = [
        F.pad(torch.from_numpy(image).permute(2, 0, 1).float() / 255, padding)
        for image, padding in zip(images, paddings, strict=True)
    ]
    factor = (fine_size[0] * fine_size[1] / (size[0] * size[1])) ** 0.5
    with torch.inference_mode(), dense.Recorder(golden) as recorder:
        watch(recorder, roma, dinov2, (size, fine_size))
        features = []
        for image in padded:
            coarse, fine = (resize(image[None], s) for s in (size, fine_size))
            features.append(roma.encode(dinov2(coarse), coarse, fine))
        flow, certainty = roma.match(*features, scale_factors=(1.0, factor))
        del features
        a, b = (black_encoding(image, certainty.shape[2:]) for image in padded)
        warp = DenseMatcher.finish(a, b, flow[:, 0], certainty[:, 0])
        produced = recorder.arrays() | dense.results(golden, warp)
    if golden.has("demo_geometry"):
        produced |= dense.demo(produced["kde_points"], images, paddings)
    return produced


def black_encoding(image: torch.Tensor, grid: torch.Size) -> DenseEncoding:
    """What ``finish`` wants to know: black pixels match nothing there, and padding is black."""
    black = (image < BLACK).all(0)[None, None].float()
    size = (image.shape[2], image.shape[1])
    return DenseEncoding(
        name="",
        size=size,
        network_size=size,
        to_original=np.eye(2, 3),
        frame=np.eye(2, 3),
        valid=torch.ones(grid, dtype=torch.bool),
        black=F.interpolate(black, tuple(grid), mode="nearest")[0, 0] > 0,
    )


def watch(recorder: dense.Recorder, roma: RoMa, dinov2: DINOv2, sizes: tuple[Any, Any]) -> None:
    decoder = roma.decoder
    project, calls = decoder.project, Counter[int]()

    def projected(stride: int, features: torch.Tensor) -> torch.Tensor:
        number = calls[stride] % 2 if stride < 16 else 0  # DINOv2 sees the first pass only
        calls[stride] += 1
        recorder.record(f"pass{number}_enc{stride}", features)
        value = project(stride, features)
        if number == 0:
            recorder.record(f"proj{stride}_0", value)
        return value

    def classified(_: Any, output: Any) -> None:
        classes, certainty = output[0], output[1].float()
        top = classes.topk(2, dim=1)
        recorder.record("gm_cls", classes)
        recorder.record("gm_cls_argmax", top.indices[:, 0])
        recorder.record("gm_cls_max", top.values[:, 0])
        recorder.record("gm_cls_top2_gap", top.values[:, 0] - top.values[:, 1])
        recorder.record("gm_certainty", certainty)
        recorder.record("gm_flow", flow_of_classes(classes))
        recorder.certainty = certainty

    recorder.watch(dinov2.patch_embed, "dino_patch_embed")
    recorder.watch(dinov2.norm, "dino_norm")
    for index, block in enumerate(dinov2.blocks):
        recorder.watch(block, f"dino_blocks{index}")
    recorder.replace(decoder, "project", projected)
    recorder.watch(decoder.gps["16"], "gp16")
    for index, block in enumerate(decoder.embedding_decoder.blocks):
        recorder.watch(block, f"coarse_block{index}")
    recorder.watch(decoder.embedding_decoder, classified)
    recorder.watch_refiners(decoder.conv_refiner, sizes)
