"""Golden arrays of gim_dkm.

The reference pads images with black, and black pixels match nothing in it: here images are padded
before the matcher sees them and ``black_pixels`` is on. So is ``shared_factor``, its mistake.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.matchers.dense import padding_to_aspect
from gim_hloc.matchers.dkm import DKMMatcher, DKMOptions
from gim_hloc.networks.dkm import DKM
from gim_hloc.types import ImageData

from . import dense
from .golden import Golden, Weights

OPTIONS = DKMOptions(precision="float32", pad=False, black_pixels=True, shared_factor=True)


def load(weights: Weights) -> DKMMatcher:
    device = torch.device("cpu")
    return DKMMatcher("gim_dkm", options=OPTIONS, device=device, state=weights("gim_dkm"))


def produce(golden: Golden, matcher: DKMMatcher) -> dict[str, Any]:
    config = golden.config
    size = (config["h"], config["w"])
    fine_size = tuple(config["upsample_res"])
    matcher.options = dataclasses.replace(
        OPTIONS, size=size, upsample_size=fine_size if config["upsample_preds"] else None
    )
    # dkm_noupsample is another run on the images of dkm_synthetic.
    source = golden if golden.has("image0") else golden.sibling("dkm_synthetic")
    images = [source["image0"], source["image1"]]
    paddings = [(0, 0, 0, 0)] * 2
    if golden.has("demo_geometry"):
        paddings = [padding_to_aspect(x.shape[1], x.shape[0], size) for x in images]
    encodings = []
    with dense.Recorder(golden) as recorder:
        watch(recorder, matcher.network, (size, fine_size))
        for name, image, padding in zip("01", images, paddings, strict=True):
            tensor = F.pad(torch.from_numpy(image).permute(2, 0, 1).float() / 255, padding)
            height, width = tensor.shape[1:]
            data = ImageData(
                image=tensor, name=name, size=(width, height), to_original=np.eye(2, 3)
            )
            encodings.append(matcher.encode(data))
        warp = matcher.warp_batch([(encodings[0], encodings[1])])[0]
    produced = recorder.arrays() | dense.results(golden, warp)
    if golden.has("demo_geometry"):
        produced |= dense.demo(produced["kde_points"], images, paddings)
    return produced


def watch(recorder: dense.Recorder, network: DKM, sizes: tuple[Any, Any]) -> None:
    decoder = network.decoder

    def encoded(_: Any, pyramid: dict[int, torch.Tensor]) -> None:
        number = 0 if 32 in pyramid else 1
        for stride, value in pyramid.items():
            recorder.record(f"pass{number}_enc{stride}", value)
        if number == 1 and recorder.golden.has("pass1_enc32"):
            # Recorded of the reference, which computes them and uses them nowhere.
            net: Any = network.encoder.net
            deep = net.layer3(pyramid[8])
            recorder.record("pass1_enc16", deep)
            recorder.record("pass1_enc32", net.layer4(deep))

    def decoded(args: Any, output: Any) -> None:
        stride = args[3]
        for name, value in zip(("flow", "certainty", "context"), output, strict=True):
            recorder.record(f"dfn{stride}_{name}", value)
        if stride == 32:
            recorder.record("pass0_flow32", output[0])
            recorder.record("pass0_cert32", output[1])
        recorder.certainty = output[1]

    recorder.watch(network.encoder, encoded)
    recorder.watch(decoder.embedding_decoder, decoded)
    for stride in (32, 16):
        recorder.watch(decoder.proj[str(stride)], f"proj{stride}_0")
        recorder.watch(decoder.gps[str(stride)], f"gp{stride}")
    recorder.watch_refiners(decoder.conv_refiner, sizes)
