"""A dense matcher of another's: OpenCV's DIS flow, good for images that lie near each other."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from gim_hloc.geometry.warp import Warp, cell_centres
from gim_hloc.matchers.dense import DenseEncoding, DenseMatcher, DenseOptions
from gim_hloc.options import options
from gim_hloc.types import ImageData, MatcherInfo


@options
class FlowOptions(DenseOptions):
    size: tuple[int, int] = (240, 320)
    upsample_size: tuple[int, int] | None = None
    pad: bool = False
    num_matches: int = 800


class Flow(DenseMatcher):
    info = MatcherInfo(name="flow", kind="dense", summary="DIS flow")
    options_type = FlowOptions

    def encode(self, image: ImageData) -> DenseEncoding:
        pixels, frame, valid = self.place(image)
        gray = F.interpolate(pixels.mean(0)[None, None], self.grid_size, mode="area")[0, 0]
        return DenseEncoding(
            name=image.name, size=image.size, network_size=image.network_size,
            to_original=image.to_original, frame=frame, valid=valid, features={"gray": gray},
        )  # fmt: skip

    def warp_batch(self, pairs: Sequence[tuple[DenseEncoding, DenseEncoding]]) -> list[Warp]:
        return [self.warp(*pair) for pair in pairs]

    def warp(self, a: DenseEncoding, b: DenseEncoding) -> Warp:
        pictures = [(e.features["gray"].numpy() * 255).astype(np.uint8) for e in (a, b)]
        finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        flows = [finder.calc(*both, None) for both in (pictures, pictures[::-1])]
        height, width = self.grid_size
        centres = cell_centres(height, width, device=self.device)
        half = torch.tensor([width / 2, height / 2])
        targets = torch.stack([centres + torch.from_numpy(flow) / half for flow in flows])
        back = F.grid_sample(targets.flip(0).permute(0, 3, 1, 2), targets, align_corners=False)
        astray = ((back.permute(0, 2, 3, 1) - centres) * half).norm(dim=-1)
        return self.finish(a, b, targets, torch.exp(-astray))
