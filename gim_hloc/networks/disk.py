"""DISK keypoints and descriptors (Tyszkiewicz et al., 2020) on top of kornia's network.

The last layer of the U-Net makes 128 descriptor channels and one score channel of every pixel, and
four fifths of the network's arithmetic are the descriptors. Here it makes scores everywhere and
descriptors only at the keypoints.
"""

from __future__ import annotations

from typing import Any

import kornia.feature
import torch
import torch.nn.functional as F

from gim_hloc.networks.keypoints import Detection, Subpixel, refine, select_maxima


class DISK(kornia.feature.DISK):
    """kornia's DISK with sparse descriptors and a detector that knows masks and any size."""

    @torch.inference_mode()
    def detect_and_describe(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float,
        radius: int = 2,
        subpixel: Subpixel = "quadratic",
        mask: torch.Tensor | None = None,
    ) -> Detection:
        """See ``Detector``; images are RGB, scores logits, descriptors those of whole pixels."""
        height, width = image.shape[-2:]
        values, last = self._before_last(_padded(image))
        scores = F.conv2d(values, last.weight[-1:], last.bias[-1:], padding="same")
        scores = scores[0, 0, :height, :width].contiguous()
        index = select_maxima(
            scores, max_keypoints=max_keypoints, threshold=threshold, radius=radius, mask=mask
        )
        y, x = index.div(width, rounding_mode="floor"), index % width
        xy = refine(scores, index, radius=radius, method=subpixel)
        return Detection(xy, _describe(values, last, x, y), scores[y, x])

    @torch.inference_mode()
    def describe_points(self, image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """See ``Detector``; descriptors are those of the nearest pixels."""
        height, width = image.shape[-2:]
        values, last = self._before_last(_padded(image))
        x, y = xy.round().long().unbind(1)
        return _describe(values, last, x.clamp(0, width - 1), y.clamp(0, height - 1))

    def _before_last(self, image: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Input (1, C, H, W) of the network's last convolution, and that convolution."""
        net: Any = self.unet
        down = [image]
        for layer in net.path_down:
            down.append(layer(down[-1]))
        x = down.pop()
        for layer in net.path_up[:-1]:
            x = layer(x, down.pop())
        top = net.path_up[-1]
        norm, gate, _, last = top.conv
        return gate(norm(torch.cat([top.upsample(x), down.pop()], 1))), last


def _padded(image: torch.Tensor) -> torch.Tensor:
    """An image (3, H, W) as a batch of sides that the network takes."""
    height, width = image.shape[-2:]
    # Four halvings, and the instance norm after them needs more than one pixel.
    right, below = (max(-(-side // 16), 2) * 16 - side for side in (width, height))
    return F.pad(image[None], (0, right, 0, below))


def _describe(values: torch.Tensor, last: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Unit descriptors (N, D) at whole pixels x, y (N,): the last convolution there only."""
    reach = last.kernel_size[0] // 2
    windows = F.pad(values, (reach,) * 4)[0].permute(1, 2, 0)
    step = torch.arange(2 * reach + 1, device=x.device)
    weight = last.weight[:-1].permute(0, 2, 3, 1).flatten(1)
    descriptors = values.new_empty(len(x), len(weight))
    for part in torch.arange(len(x), device=x.device).split(512):  # bounds memory
        rows, columns = (v[part, None] + step for v in (y, x))
        window = windows[rows[:, :, None], columns[:, None, :]].flatten(1)
        descriptors[part] = F.linear(window, weight, last.bias[:-1])
    return F.normalize(descriptors, dim=1)
