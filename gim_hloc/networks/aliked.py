"""ALIKED keypoints and descriptors (Zhao et al., 2023) on top of kornia's network."""

from __future__ import annotations

import kornia.feature
import torch

from gim_hloc.networks.keypoints import refine, select_maxima


class ALIKED(kornia.feature.ALIKED):
    """kornia's ALIKED with a detector that knows masks."""

    def __init__(self, model_name: str = "aliked-n16") -> None:
        super().__init__(model_name)

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
            threshold: lowest score of a keypoint.
            radius: of the suppression window, pixels.
            mask: (H, W) bool, True where keypoints are allowed.

        Returns:
            keypoints (N, 2) x, y in pixels (integer = centre), descriptors (N, D), scores (N,).
        """
        features, scores = self.extract_dense_map(image[None])
        score_map = scores[0, 0]
        index = select_maxima(
            score_map, max_keypoints=max_keypoints, threshold=threshold, radius=radius, mask=mask
        )
        xy = refine(score_map, index, radius=radius)
        height, width = score_map.shape
        wh = torch.tensor([width - 1, height - 1], device=xy.device, dtype=xy.dtype)
        values = score_map.flatten()[index]
        if len(index) == 0:
            return xy, features.new_zeros(0, features.shape[1]), values
        descriptors, _ = self.desc_head(features, [xy / wh * 2 - 1])
        return xy, descriptors[0], values
