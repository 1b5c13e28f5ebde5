"""SuperPoint (DeTone et al., CVPRW 2018): keypoints and descriptors of gray images.

Numbers and names of weights are those of the published network as GIM uses it. Images of different
sizes may share a batch: features outside an image are set to zero after every layer, as a
convolution pads, so each image gets what it gets alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.keypoints import Detection, Subpixel

Sizes = torch.Tensor
"""(B, 2) int64 (width, height) of the images in a padded batch, pixels."""


class SuperPoint(nn.Module):
    """The network, without and with the choice of keypoints."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 1
        for stage, channels in enumerate((64, 64, 128, 128), 1):
            setattr(self, f"conv{stage}a", nn.Conv2d(inputs, channels, 3, padding=1))
            setattr(self, f"conv{stage}b", nn.Conv2d(channels, channels, 3, padding=1))
            inputs = channels
        self.convPa = nn.Conv2d(128, 256, 3, padding=1)
        self.convPb = nn.Conv2d(256, 65, 1)
        self.convDa = nn.Conv2d(128, 256, 3, padding=1)
        self.convDb = nn.Conv2d(256, 256, 1)

    def forward(
        self, image: torch.Tensor, sizes: Sizes | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, 65, H/8, W/8) and raw descriptors (B, 256, H/8, W/8).

        Args:
            image: (B, 1, H, W) in [0, 1].
            sizes: of the images, where they are smaller than the tensor.
        """
        x = image
        for stage in range(1, 5):
            if stage > 1:
                x = F.max_pool2d(x, 2)
            inside = _inside(sizes, x, 2 ** (stage - 1))
            # The first one is for what the caller padded with.
            x = _clear(x, inside)
            for part in "ab":
                x = _clear(F.relu(getattr(self, f"conv{stage}{part}")(x)), inside)
        logits = self.convPb(_clear(F.relu(self.convPa(x)), inside))
        return logits, self.convDb(_clear(F.relu(self.convDa(x)), inside))

    def detect(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float = 0.0,
        radius: int = 3,
        border: int = 4,
        mask: torch.Tensor | None = None,
        sizes: Sizes | None = None,
    ) -> list[Detection]:
        """Keypoints of each image; scores are in (0, 1], descriptors of unit length.

        Args:
            image: (B, 1, H, W) in [0, 1].
            max_keypoints: at most so many, the strongest.
            threshold: a score must exceed it.
            radius: of the suppression window, pixels.
            border: pixels from the image's border without keypoints.
            mask: (B, H, W) bool, True where keypoints are allowed. It acts after the suppression.
            sizes: of the images, where they are smaller than the tensor.
        """
        logits, raw = self(image, sizes)
        scores = suppress(score_map(logits, sizes), radius)
        scores = clear_border(scores, (image.shape[2], image.shape[3]), border, sizes)
        if mask is not None:
            height, width = scores.shape[1:]
            scores = scores.where(mask[:, :height, :width], scores.new_tensor(-1.0))
        values, index = scores.flatten(1).topk(min(max_keypoints, scores[0].numel()))
        width = scores.shape[2]
        xy = torch.stack([index % width, index.div(width, rounding_mode="floor")], 2).float()
        descriptors = sample_descriptors(F.normalize(raw.float(), dim=1), xy, sizes)
        # The best come first, so those above the threshold are the first ones.
        counts = (values > max(threshold, 0.0)).sum(1).tolist()
        parts = (xy, descriptors, values)
        return [Detection(*(part[i, :n] for part in parts)) for i, n in enumerate(counts)]

    def detect_and_describe(
        self,
        image: torch.Tensor,
        *,
        max_keypoints: int,
        threshold: float,
        radius: int,
        subpixel: Subpixel = "none",
        mask: torch.Tensor | None = None,
    ) -> Detection:
        """See ``Detector``; images are gray, scores in (0, 1), positions always whole pixels."""
        if min(image.shape[1:]) < 8:
            empty = image.new_empty(0, 256)
            return Detection(empty[:, :2], empty, empty[:, 0])
        return self.detect(
            image[None],
            max_keypoints=max_keypoints,
            threshold=threshold,
            radius=radius,
            mask=None if mask is None else mask[None].to(image.device),
        )[0]

    def describe_points(self, image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """See ``Detector``."""
        _, raw = self(image[None])
        return sample_descriptors(F.normalize(raw.float(), dim=1), xy[None])[0]


def score_map(logits: torch.Tensor, sizes: Sizes | None = None) -> torch.Tensor:
    """Scores (B, 8 h, 8 w) of the pixels from logits (B, 65, h, w); 0 outside an image."""
    scores = F.pixel_shuffle(logits.float().softmax(1)[:, :-1], 8)
    whole = None if sizes is None else sizes // 8 * 8
    return _clear(scores, _inside(whole, scores, 1))[:, 0]


def suppress(scores: torch.Tensor, radius: int) -> torch.Tensor:
    """Set all but local maxima to zero; two more rounds find maxima beside suppressed ones.

    Args:
        scores: (B, H, W), not negative.
        radius: a maximum is the highest of the window of side ``2 * radius + 1``.
    """
    best = scores == _window_max(scores, radius)
    for _ in range(2):
        near = _window_max(best, radius)
        rest = scores.masked_fill(near, 0.0)
        best |= (rest == _window_max(rest, radius)) & ~near
    return scores.masked_fill(~best, 0.0)


def clear_border(
    scores: torch.Tensor, shape: tuple[int, int], border: int, sizes: Sizes | None = None
) -> torch.Tensor:
    """Set scores (B, H, W) to -1 near the border of the image: of ``shape``, or of ``sizes``."""
    if border <= 0:
        return scores
    height, width = scores.shape[1:]
    row = torch.arange(height, device=scores.device)
    column = torch.arange(width, device=scores.device)
    if sizes is None:
        sizes = torch.tensor([[shape[1], shape[0]]])
    limit = sizes.to(scores.device) - border
    rows = (row >= border) & (row < limit[:, 1:])
    columns = (column >= border) & (column < limit[:, :1])
    return scores.masked_fill(~(rows[:, :, None] & columns[:, None]), -1.0)


def sample_descriptors(
    dense: torch.Tensor, xy: torch.Tensor, sizes: Sizes | None = None
) -> torch.Tensor:
    """Descriptors (B, N, 256) of unit length at whole pixels, by the published ("legacy") rule.

    The rule is off by a fraction of a cell that grows over the image; weights and LightGlue were
    trained with it.

    Args:
        dense: (B, 256, h, w) descriptors of unit length.
        xy: (B, N, 2) x, y in pixels, integer = centre.
        sizes: of the images, where they are smaller than the tensor.
    """
    height, width = dense.shape[2:]
    shape = xy.new_tensor([width, height])
    cells = shape.expand(len(xy), 2) if sizes is None else (sizes // 8).to(xy)
    unit = (xy - 3.5) / (cells[:, None] * 8 - 4.5)  # 0 at the first cell, 1 at the last
    if sizes is not None:
        unit = unit * ((cells - 1) / (shape - 1).clamp(min=1))[:, None]
    sampled = F.grid_sample(dense, (2 * unit - 1)[:, None], mode="bilinear", align_corners=True)
    return F.normalize(sampled[:, :, 0].transpose(1, 2), dim=2)


def pad_with_random(
    xy: torch.Tensor, count: int, size: tuple[int, int], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Fill keypoints (N, 2) up with random positions to ``count``, as the reference does.

    They lie between the outermost keypoints, or in a square of the image's shorter side where
    there is none. Nothing good comes of them; they only make tensors equally long.

    Args:
        xy: keypoints in pixels.
        count: rows wanted.
        size: (width, height) of the image in pixels.
        generator: source of the numbers.
    """
    missing = count - len(xy)
    if missing <= 0:
        return xy
    low = xy.amin(0) if len(xy) else xy.new_zeros(2)
    high = xy.amax(0) if len(xy) else xy.new_full((2,), float(min(size)))
    drawn = torch.rand(missing, 2, generator=generator).to(xy)
    return torch.cat([xy, low + drawn * (high - low)])


def _inside(sizes: Sizes | None, x: torch.Tensor, stride: int) -> torch.Tensor | None:
    """(B, 1, h, w) bool: where a map of the given stride lies in its image; None: everywhere."""
    if sizes is None:
        return None
    extent = (sizes // stride).to(x.device)
    rows = torch.arange(x.shape[-2], device=x.device) < extent[:, 1:]
    columns = torch.arange(x.shape[-1], device=x.device) < extent[:, :1]
    return (rows[:, :, None] & columns[:, None])[:, None]


def _clear(x: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    return x if inside is None else x * inside


def _window_max(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Maximum (logical or) of the window around each pixel of (B, H, W)."""
    # Maxima of shifted copies, the shift doubling as long as it may: pooling a single channel is
    # several times slower on a processor.
    side = 2 * radius + 1
    if x.dtype == torch.bool:
        x = F.pad(x, (radius,) * 4, value=False)
    else:
        x = F.pad(x, (radius,) * 4, value=-torch.inf)
    for axis in (1, 2):
        reach = 1  # pixels that an entry already covers
        while reach < side:
            shift = min(reach, side - reach)
            length = x.shape[axis] - shift
            first, second = x.narrow(axis, 0, length), x.narrow(axis, shift, length)
            x = first | second if x.dtype == torch.bool else torch.maximum(first, second)
            reach += shift
    return x
