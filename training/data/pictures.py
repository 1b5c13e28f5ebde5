"""Training pairs with their truth drawn in: to see that images and truth fit before training."""

from __future__ import annotations

import numpy as np
import torch

from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points

_MARGIN = 4  # px between images


def show_batch(
    batch: PairBatch, *, points: int = 60, samples: int = 8, lines: bool = True, seed: int = 0
) -> np.ndarray:
    """Draw pairs side by side, one sample a row, with some true correspondences.

    A point has the same colour in both images. Truth from depth is drawn as circles, labels as
    squares; what is no image is tinted.

    Args:
        batch: the pairs.
        points: correspondences of each kind of truth and sample.
        samples: largest number of rows.
        lines: connect the points.
        seed: of the choice of points.

    Returns:
        (rows * (H + 4), 2 W + 4, 3) uint8 RGB.
    """
    import cv2

    batch = batch.to("cpu")
    generator = torch.Generator().manual_seed(seed)
    width, height = batch.box
    xy = torch.rand(len(batch), 40 * points, 2, generator=generator)
    xy = xy * torch.tensor([width - 1, height - 1])
    warped, true = warp_points(batch, xy, source=0)
    rows = []
    for k in range(min(samples, len(batch))):
        canvas = np.full((height + _MARGIN, 2 * width + _MARGIN, 3), 255, np.uint8)
        for left, image, valid in (
            (0, batch.image0[k], batch.valid0[k]),
            (width + _MARGIN, batch.image1[k], batch.valid1[k]),
        ):
            pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy().copy()
            pixels[~valid.numpy()] = (40, 20, 60)
            canvas[:height, left : left + width] = pixels
        chosen = torch.nonzero(true[k])[:points, 0]
        _draw(canvas, xy[k, chosen], warped[k, chosen], width, lines, square=False)
        labels = batch.labels[k, : int(batch.label_count[k])]
        labels = labels[torch.randperm(len(labels), generator=generator)[:points]]
        _draw(canvas, labels[:, :2], labels[:, 2:], width, lines, square=True)
        depth = f"{float(true[k].float().mean()):.0%} seen in both, " if batch.has_depth[k] else ""
        count = f"{int(batch.label_count[k])} labels, " if batch.has_labels[k] else ""
        text = f"{batch.dataset[k]}: {depth}{count}{' - '.join(batch.names[k])}"
        canvas[:20] = canvas[:20] // 3
        cv2.putText(
            canvas, text, (6, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA
        )
        rows.append(canvas)
    return np.concatenate(rows)


def _draw(
    canvas: np.ndarray,
    xy0: torch.Tensor,
    xy1: torch.Tensor,
    width: int,
    lines: bool,
    *,
    square: bool,
) -> None:
    import colorsys

    import cv2

    for k, (end0, end1) in enumerate(zip(xy0.tolist(), xy1.tolist(), strict=True)):
        # Hues a golden section apart differ from their neighbours.
        colour = tuple(255 * c for c in colorsys.hsv_to_rgb(k * 0.618 % 1, 0.8, 1.0))
        a = (round(end0[0]), round(end0[1]))
        b = (round(end1[0]) + width + _MARGIN, round(end1[1]))
        if lines:
            cv2.line(canvas, a, b, colour, 1, cv2.LINE_AA)
        for x, y in (a, b):
            if square:
                cv2.rectangle(canvas, (x - 2, y - 2), (x + 2, y + 2), colour, -1)
            else:
                cv2.circle(canvas, (x, y), 3, colour, -1, cv2.LINE_AA)
