"""DISK keypoints and descriptors (Tyszkiewicz et al., 2020) on top of kornia's network."""

from __future__ import annotations

import kornia.feature
import torch
import torch.nn.functional as F

from gim_hloc.networks.keypoints import select_maxima


class DISK(kornia.feature.DISK):
    """kornia's DISK with a detector that knows masks and any image size."""

    @torch.inference_mode()
    def detect_and_describe(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float,
        radius: int = 2,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keypoints of one image, strongest first.

        Args:
            image: (3, H, W) in [0, 1].
            max_keypoints: at most so many, the strongest.
            threshold: lowest score of a keypoint, a logit of the network.
            radius: of the suppression window, pixels.
            mask: (H, W) bool, True where keypoints are allowed.

        Returns:
            keypoints (N, 2) x, y in whole pixels, descriptors (N, 128), scores (N,).
        """
        height, width = image.shape[-2:]
        padded = F.pad(image[None], (0, -width % 16, 0, -height % 16))
        heatmap, dense = self.heatmap_and_dense_descriptors(padded)
        scores = heatmap[0, 0, :height, :width]
        index = select_maxima(
            scores, max_keypoints=max_keypoints, threshold=threshold, radius=radius, mask=mask
        )
        y, x = index.div(width, rounding_mode="floor"), index % width
        descriptors = F.normalize(dense[0][:, y, x].T, dim=1)
        return torch.stack([x, y], 1).float(), descriptors, scores[y, x]
