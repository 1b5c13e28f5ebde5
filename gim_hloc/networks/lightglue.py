"""LightGlue (Lindenberger et al., 2023) on kornia's weights."""

from __future__ import annotations

import kornia.feature


class LightGlue(kornia.feature.LightGlue):
    """kornia's LightGlue."""

    def __init__(
        self,
        *,
        input_dim: int,
        depth_confidence: float = 0.95,
        width_confidence: float = 0.99,
        filter_threshold: float = 0.1,
    ) -> None:
        super().__init__(
            features=None,
            input_dim=input_dim,
            depth_confidence=depth_confidence,
            width_confidence=width_confidence,
            filter_threshold=filter_threshold,
        )
