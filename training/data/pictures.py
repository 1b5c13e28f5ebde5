"""Training pairs with their truth drawn in: to see that images and truth fit before training."""

from __future__ import annotations

import colorsys

import numpy as np
import torch

from gim_hloc import draw
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points

_NO_IMAGE = (40, 20, 60)


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
        (H, W, 3) uint8 RGB.
    """
    batch = batch.to("cpu")
    generator = torch.Generator().manual_seed(seed)
    width, height = batch.box
    xy = torch.rand(len(batch), 40 * points, 2, generator=generator)
    xy = xy * torch.tensor([width - 1, height - 1])
    warped, true = warp_points(batch, xy, source=0)
    rows = []
    for k in range(min(samples, len(batch))):
        pictures = [draw.from_tensor(image[k]) for image in (batch.image0, batch.image1)]
        for picture, valid in zip(pictures, (batch.valid0[k], batch.valid1[k]), strict=True):
            picture[~valid.numpy()] = _NO_IMAGE
        canvas, (_, right) = draw.join(pictures)
        chosen = torch.nonzero(true[k])[:points, 0]
        labels = batch.labels[k, : int(batch.label_count[k])]
        labels = labels[torch.randperm(len(labels), generator=generator)[:points]]
        for xy0, xy1, square in (
            (xy[k, chosen], warped[k, chosen], False),
            (labels[:, :2], labels[:, 2:], True),
        ):
            ends = (xy0.numpy(), xy1.numpy() + right)
            colours = _hues(len(xy0))
            if lines:
                draw.draw_lines(canvas, *ends, colours, opacity=1.0)
            for end in ends:
                draw.draw_points(canvas, end, colours, square=square)
        depth = f"{float(true[k].float().mean()):.0%} seen in both, " if batch.has_depth[k] else ""
        count = f"{int(batch.label_count[k])} labels, " if batch.has_labels[k] else ""
        text = f"{batch.dataset[k]}: {depth}{count}{' - '.join(batch.names[k])}"
        rows.append(draw.caption(canvas, [text]))
    return draw.join(rows, below=True)[0]


def _hues(count: int) -> np.ndarray:
    """RGB (count, 3); hues a golden section apart differ from their neighbours."""
    hues = [colorsys.hsv_to_rgb(k * 0.618 % 1, 0.8, 1.0) for k in range(count)]
    return np.rint(255 * np.array(hues).reshape(-1, 3)).astype(np.uint8)
