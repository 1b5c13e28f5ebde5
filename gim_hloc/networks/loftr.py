"""LoFTR (Sun et al., CVPR 2021) in two halves: ``encode`` once per image, ``match`` per pair.

The layers, their names and their numbers are those of the published network; GIM's checkpoint
replaces the backbone by an RGB ResNet-50 and leaves the coarse features out of the fine stage.
What differs is the arrangement:

* backbone, positions and the first self-attention layer depend on one image and are ``encode``;
* the similarities of all cells with all cells (a gigabyte at 1000 pixels) exist in blocks of rows
  only. A match needs ``softmax over rows * softmax over columns > threshold``, hence each factor
  above it, and at most ``1 / threshold`` entries of a row are: these alone are kept;
* the fine stage reads its windows straight from the feature map.

Letters: B pairs or images, L and S coarse cells of image 0 and 1, C = 256 channels, H = 8 heads,
M matches, W = 25 cells of a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gim_hloc.networks.resnet import BLOCKS, ResNet50

Positional = Literal["published", "corrected"]
BorderRule = Literal["grid", "mask"]

CELL = 8  # pixels between coarse cells
FINE = 2  # pixels between fine cells
WINDOW = 5  # fine cells along a side of a window
TEMPERATURE = 0.1  # of the softmax over similarities
_FINE_CHUNK = {"cpu": 512}  # matches a fine pass: what a processor's caches hold, and
_FINE_CHUNK_ELSEWHERE = 8192  # what bounds memory on a GPU
# Exponentials of similarities less (maximum - _HEADROOM), summed over 10^5 cells, do not overflow
# float32; while the rows' maxima span less than _SPAN, what underflows is below 1e-6 of every sum
# that decides a match.
_HEADROOM = 75.0
_SPAN = 130.0


class Features(NamedTuple):
    """What LoFTR derives from images of one size: input to all their pairs."""

    tokens: torch.Tensor  # (B, L, C) coarse features after the first self attention
    fine: torch.Tensor  # (B, h, w, 128) fine features, half resolution
    grid: tuple[int, int]  # rows and columns of coarse cells; L is their product
    mask: torch.Tensor | None = None  # (B, L) bool, True where cells may match; None: all


class Cells(NamedTuple):
    """Matches of coarse cells."""

    batch: torch.Tensor  # (M,) int64 pair
    index0: torch.Tensor  # (M,) int64 cell of image 0, row by row
    index1: torch.Tensor  # (M,) int64 cell of image 1
    confidence: torch.Tensor  # (M,) float32 in (threshold, 1]


class Matched(NamedTuple):
    """Matches of pairs, ordered by pair and cell of image 0."""

    cells: Cells
    xy0: torch.Tensor  # (M, 2) float32 x, y in network pixels, integer = centre
    xy1: torch.Tensor  # (M, 2) the same in image 1, refined
    expectation: torch.Tensor  # (M, 3) offset x, y in half windows, and standard deviation


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How wide and deep GIM's LoFTR is. The published network by default; small ones are trained.

    There are always ``HEADS`` attention heads, which ``coarse`` and ``fine`` are multiples of.
    """

    encoder: int = 64  # channels of ResNet-50's stem; its layers have 4, 8 and 16 times as many
    blocks: tuple[int, ...] = BLOCKS[:3]  # of ResNet-50's layers
    coarse: int = 256  # channels of coarse features, a multiple of 8
    middle: int = 196  # channels between coarse and fine features
    fine: int = 128  # channels of fine features, a multiple of 8
    layers: int = 8  # of the coarse transformer, self and cross attention in turn, an even number

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor]) -> Widths:
        """Those of a state dict without prefixes; the published ones if the names do not fit."""

        def count(pattern: str) -> int:
            found = (re.match(pattern, key) for key in state)
            return 1 + max((int(match[1]) for match in found if match), default=-1)

        try:
            return cls(
                encoder=state["backbone.encode.conv1.weight"].shape[0],
                blocks=tuple(count(rf"backbone\.encode\.layer{k}\.(\d+)\.") for k in (1, 2, 3)),
                coarse=state["backbone.layer3_outconv.weight"].shape[0],
                middle=state["backbone.layer1_outconv.weight"].shape[0],
                fine=state["backbone.layer1_outconv2.3.weight"].shape[0],
                layers=count(r"loftr_coarse\.layers\.(\d+)\."),
            )
        except (KeyError, IndexError):
            return cls()


PUBLISHED = Widths()
HEADS = 8


class ResNetFPN(nn.Module):
    """GIM's backbone: ResNet-50 without max-pooling, and a pyramid down from 1/8 to 1/2."""

    def __init__(self, widths: Widths = PUBLISHED) -> None:
        super().__init__()
        encoder, coarse, middle = widths.encoder, widths.coarse, widths.middle
        self.encode = ResNet50(layers=3, max_pool=False, width=encoder, blocks=widths.blocks)
        self.layer3_outconv = nn.Conv2d(16 * encoder, coarse, 1, bias=False)
        self.layer2_outconv = nn.Conv2d(8 * encoder, coarse, 1, bias=False)
        self.layer2_outconv2 = _smoothing(coarse, middle)
        self.layer1_outconv = nn.Conv2d(4 * encoder, middle, 1, bias=False)
        self.layer1_outconv2 = _smoothing(middle, widths.fine)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coarse (B, 256, H/8, W/8) and fine (B, 128, H/2, W/2) features of (B, 3, H, W)."""
        _, half, quarter, eighth = self.encode(image)
        coarse = self.layer3_outconv(eighth)
        x = self.layer2_outconv2(self.layer2_outconv(quarter) + _double(coarse))
        return coarse, self.layer1_outconv2(self.layer1_outconv(half) + _double(x))


def _smoothing(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(),
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
    )


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def positions(
    height: int,
    width: int,
    kind: Positional,
    device: torch.device | None = None,
    channels: int = 256,
) -> torch.Tensor:
    """Sines and cosines of the cells' columns and rows, counted from 1.

    Args:
        height: rows of cells; any number, there is no table that could be too small.
        width: columns of cells.
        kind: the frequencies. ``published``: exp(-2 m), a mistake in the original code that
            published weights were trained with (an integer division meant to be a real one);
            ``corrected``: 10000^(-2 m / 128), which GIM's training code uses.
        device: where to make it.
        channels: a multiple of 4; 128 above stands for their half.

    Returns:
        (channels, height, width) float32.
    """
    half = channels // 2
    step = 1.0 if kind == "published" else math.log(10000.0) / half
    frequency = torch.exp(torch.arange(0, half, 2, dtype=torch.float32, device=device) * -step)
    x = torch.arange(1, width + 1, dtype=torch.float32, device=device)[None] * frequency[:, None]
    y = torch.arange(1, height + 1, dtype=torch.float32, device=device)[None] * frequency[:, None]
    waves = [wave[:, None, :].expand(-1, height, -1) for wave in (x.sin(), x.cos())]
    waves += [wave[:, :, None].expand(-1, -1, width) for wave in (y.sin(), y.cos())]
    return torch.stack(waves, 1).flatten(0, 1)


class _Layer(nn.Module):
    """Linear attention to a source and an update from [x, message]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.merge = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim, bias=False), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Update x (B, L, C) from source (B, S, C); masks (B, L), (B, S), True = valid."""
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        # Sums over up to 10^5 cells: in full precision under every autocast.
        with torch.autocast(x.device.type, enabled=False):
            message = _linear_attention(q, k, v, self.heads, mask, source_mask)
        message = self.norm1(self.merge(message))
        return x + self.norm2(self.mlp(torch.cat([x, message.to(x.dtype)], 2)))


def _linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    source_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with the kernel (elu + 1)(q) . (elu + 1)(k), (B, L, C)."""
    # At least float32; double stays double.
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = F.elu(q.to(dtype)) + 1, F.elu(k.to(dtype)) + 1, v.to(dtype)
    if mask is not None:
        q = q * mask[..., None]
    if source_mask is not None:
        k, v = k * source_mask[..., None], v * source_mask[..., None]
    length = v.shape[1]
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, *, E)
    # The division by the length keeps the sums small; it is undone after the normalisation.
    memory = k.transpose(2, 3) @ (v / length)
    weight = length / (q @ k.sum(2)[..., None] + 1e-6)
    return ((q @ memory) * weight).transpose(1, 2).flatten(2)


class _Transformer(nn.Module):
    """Self and cross attention in turn."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        # Annotated: a ModuleList does not know what it holds.
        self.layers: Any = nn.ModuleList([_Layer(dim, heads) for _ in range(layers)])

    def step(
        self,
        index: int,
        x0: torch.Tensor,
        x1: torch.Tensor,
        mask0: torch.Tensor | None = None,
        mask1: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer for both images: even ones look at themselves, odd ones at the other."""
        layer = self.layers[index]
        if index % 2:
            x0 = layer(x0, x1, mask0, mask1)
            return x0, layer(x1, x0, mask1, mask0)  # image 1 looks at the updated image 0
        if x0.shape == x1.shape and (mask0 is None) == (mask1 is None):
            both = torch.cat([x0, x1])
            mask = None if mask0 is None or mask1 is None else torch.cat([mask0, mask1])
            first, second = layer(both, both, mask, mask).chunk(2)
            return first, second
        return layer(x0, x0, mask0, mask0), layer(x1, x1, mask1, mask1)


class _FinePreprocess(nn.Module):
    """Mixes the coarse feature into the fine windows (the published LoFTR does, GIM's not)."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(256, 128)
        self.merge_feat = nn.Linear(256, 128)

    def forward(self, windows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mix tokens (M, 256) into windows (M, W, 128)."""
        coarse = self.down_proj(tokens)[:, None].expand(-1, windows.shape[1], -1)
        return self.merge_feat(torch.cat([windows, coarse.to(windows.dtype)], 2))


class LoFTR(nn.Module):
    """The network of GIM's checkpoint, or the published one.

    Args:
        backbone: image -> coarse and fine features; GIM's RGB backbone by default.
        positional: frequencies of the positional encoding that the weights were trained with.
        coarse_in_fine: whether the fine stage gets the coarse features too.
        widths: of GIM's network.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module | None = None,
        positional: Positional = "published",
        coarse_in_fine: bool = False,
        widths: Widths = PUBLISHED,
    ) -> None:
        super().__init__()
        self.positional: Positional = positional
        self.backbone = ResNetFPN(widths) if backbone is None else backbone
        self.loftr_coarse = _Transformer(widths.coarse, HEADS, widths.layers)
        self.fine_preprocess = _FinePreprocess() if coarse_in_fine else None
        self.loftr_fine = _Transformer(widths.fine, HEADS, 2)

    def embed(self, coarse: torch.Tensor) -> torch.Tensor:
        """Coarse features (B, C, h, w) with their positions added, float32."""
        channels, height, width = coarse.shape[1:]
        table = positions(height, width, self.positional, coarse.device, channels)
        return coarse.to(torch.promote_types(coarse.dtype, torch.float32)) + table

    def encode(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> Features:
        """Compute what depends on one image only.

        Args:
            image: (B, 3, H, W) in [0, 1], H and W multiples of 8; not normalised. (B, 1, H, W) for
                the published network.
            mask: (B, H/8, W/8) bool, True where cells may match.
        """
        coarse, fine = self.backbone(image)
        return self.begin(self.embed(coarse), fine, mask)

    def begin(
        self, embedded: torch.Tensor, fine: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Features:
        """The part of ``encode`` after the backbone: the first self attention."""
        height, width = embedded.shape[2:]
        tokens = embedded.flatten(2).transpose(1, 2).contiguous()
        flat = None if mask is None else mask.flatten(1).to(torch.bool)
        tokens = self.loftr_coarse.layers[0](tokens, tokens, flat, flat)
        # Windows are read pixel by pixel: channels last.
        return Features(tokens, fine.permute(0, 2, 3, 1).contiguous(), (height, width), flat)

    def transform(self, a: Features, b: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Coarse features (B, L, C), (B, S, C) that know both images."""
        x0, x1 = a.tokens, b.tokens
        for index in range(1, len(self.loftr_coarse.layers)):
            x0, x1 = self.loftr_coarse.step(index, x0, x1, a.mask, b.mask)
        return x0, x1

    def match(
        self,
        a: Features,
        b: Features,
        *,
        threshold: float = 0.2,
        border: int = 2,
        border_rule: BorderRule = "grid",
        scale0: torch.Tensor | None = None,
        scale1: torch.Tensor | None = None,
    ) -> Matched:
        """Match pairs: row k of ``a`` with row k of ``b``.

        Args:
            a: images 0.
            b: images 1.
            threshold: lowest confidence of a match, above 0.
            border: cells at the image's borders that never match.
            border_rule: ``grid``: borders of the whole image; ``mask``: the right and lower border
                lie where the mask's longest row and column end, as the reference has it for images
                padded at the right and below (holes in a mask move it).
            scale0: (B, 2) factor of x and y of image 0's coordinates.
            scale1: the same of image 1.
        """
        tokens0, tokens1 = self.transform(a, b)
        cells = mutual_matches(tokens0, tokens1, threshold, mask0=a.mask, mask1=b.mask)
        cells = drop_border(cells, a, b, border, border_rule)
        expectation = self.refine(a, b, tokens0, tokens1, cells)
        xy0, xy1 = cell_xy(cells.index0, a.grid), cell_xy(cells.index1, b.grid)
        offset = expectation[:, :2] * (WINDOW // 2 * FINE)
        if scale0 is not None:
            xy0 = xy0 * scale0[cells.batch]
        if scale1 is not None:
            xy1, offset = xy1 * scale1[cells.batch], offset * scale1[cells.batch]
        return Matched(cells, xy0, xy1 + offset, expectation)

    def refine(
        self,
        a: Features,
        b: Features,
        tokens0: torch.Tensor,
        tokens1: torch.Tensor,
        cells: Cells,
    ) -> torch.Tensor:
        """Offsets of the matches in image 1, see ``Matched.expectation``."""
        parts = [a.fine.new_zeros(0, 3, dtype=torch.float32)]
        device = cells.batch.device
        size = _FINE_CHUNK.get(device.type, _FINE_CHUNK_ELSEWHERE)
        for chunk in torch.arange(len(cells.batch), device=device).split(size):
            part = Cells(*(t[chunk] for t in cells))
            windows0, windows1 = self.fine_windows(a, b, tokens0, tokens1, part)
            for index in range(2):
                windows0, windows1 = self.loftr_fine.step(index, windows0, windows1)
            parts.append(window_expectation(windows0, windows1))
        return torch.cat(parts)

    def fine_windows(
        self,
        a: Features,
        b: Features,
        tokens0: torch.Tensor,
        tokens1: torch.Tensor,
        cells: Cells,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine features (M, W, 128) around the matched cells of both images."""
        windows = [
            _windows(a.fine, cells.batch, cells.index0, a.grid),
            _windows(b.fine, cells.batch, cells.index1, b.grid),
        ]
        if self.fine_preprocess is not None:
            tokens = (tokens0[cells.batch, cells.index0], tokens1[cells.batch, cells.index1])
            windows = [self.fine_preprocess(w, t) for w, t in zip(windows, tokens, strict=True)]
        return windows[0], windows[1]


def stack(features: Sequence[Features]) -> Features:
    """One batch of images of the same size, all with masks or all without."""
    if len(features) == 1:
        return features[0]
    masks = [f.mask for f in features if f.mask is not None]
    return Features(
        torch.cat([f.tokens for f in features]),
        torch.cat([f.fine for f in features]),
        features[0].grid,
        torch.cat(masks) if masks else None,
    )


def cell_xy(index: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Positions (M, 2) of coarse cells in network pixels, integer = centre."""
    row = index.div(grid[1], rounding_mode="floor")
    return torch.stack([index % grid[1], row], 1).float() * CELL


def drop_border(
    cells: Cells, a: Features, b: Features, border: int, rule: BorderRule = "grid"
) -> Cells:
    """Take matches out that lie at the border of either image, see ``LoFTR.match``."""
    keep = torch.ones_like(cells.batch, dtype=torch.bool)
    for index, side in ((cells.index0, a), (cells.index1, b)):
        rows, columns = side.grid
        row, column = index.div(columns, rounding_mode="floor"), index % columns
        height: Any = rows
        width: Any = columns
        if rule == "mask" and side.mask is not None:
            mask = side.mask.unflatten(1, side.grid)
            height = mask.sum(1).amax(1)[cells.batch]
            width = mask.sum(2).amax(1)[cells.batch]
        keep &= (row >= border) & (row < height - border)
        keep &= (column >= border) & (column < width - border)
    return Cells(*(t[keep] for t in cells))


def similarities(x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
    """Similarity (B, L, S) of all cells, before the two softmaxes. For tests and training."""
    scale = math.sqrt(x0.shape[2])
    return (x0 / scale) @ (x1 / scale).transpose(1, 2) / TEMPERATURE


@torch.no_grad()
def mutual_matches(
    x0: torch.Tensor,
    x1: torch.Tensor,
    threshold: float,
    *,
    mask0: torch.Tensor | None = None,
    mask1: torch.Tensor | None = None,
    block_bytes: int | None = None,
) -> Cells:
    """Cells that are each other's most confident partner, by dual softmax.

    The confidence is softmax over the row times softmax over the column; of equally confident
    partners of a cell the first counts.

    Args:
        x0: (B, L, C) coarse features of images 0.
        x1: (B, S, C) of images 1.
        threshold: lowest confidence, above 0; 1 / threshold entries of a row are kept in between.
        mask0: (B, L) bool, True where cells may match. Others take no part in any softmax.
        mask1: (B, S) the same for images 1.
        block_bytes: size of the block of similarities that exists at a time.
    """
    batch, length, channels = x0.shape
    size = x1.shape[1]
    dtype = torch.promote_types(x0.dtype, torch.float32)
    with torch.autocast(x0.device.type, enabled=False):
        left = x0.to(dtype) / (channels * TEMPERATURE)
        right = x1.to(dtype).transpose(1, 2)
        if mask1 is not None:
            # One more channel adds a bias to each column in the same product.
            bias = torch.zeros_like(right[:, :1]).masked_fill_(~mask1[:, None], -1e9)
            left, right = F.pad(left, (0, 1), value=1.0), torch.cat([right, bias], 1)
        if block_bytes is None:
            # A processor's caches want small blocks, a GPU large ones.
            block_bytes = (8 << 20) if x0.device.type == "cpu" else (128 << 20)
        rows = max(16, block_bytes // (4 * batch * size))
        parts: Any = _candidates(left, right, threshold, mask0, rows)
        if parts is None:
            parts = _candidates(left, right, threshold, mask0, rows, exact=True)
        pair, row, column, by_row, log, column_log = parts
        confidence = by_row * (log - column_log[pair, column]).exp().to(dtype)
    if mask1 is not None:
        confidence = confidence * mask1[pair, column]
    here, there = pair * length + row, pair * size + column
    best0 = confidence.new_zeros(batch * length).scatter_reduce_(0, here, confidence, "amax")
    best1 = confidence.new_zeros(batch * size).scatter_reduce_(0, there, confidence, "amax")
    mutual = (confidence == best0[here]) & (confidence == best1[there])
    chosen = (mutual & (confidence > threshold)).nonzero()[:, 0]
    chosen = chosen[(here[chosen] * size + column[chosen]).argsort()]
    first = torch.ones_like(chosen, dtype=torch.bool)
    first[1:] = here[chosen[1:]] != here[chosen[:-1]]
    chosen = chosen[first]
    return Cells(pair[chosen], row[chosen], column[chosen], confidence[chosen])


def _candidates(
    left: torch.Tensor,
    right: torch.Tensor,
    threshold: float,
    mask: torch.Tensor | None,
    rows: int,
    exact: bool = False,
) -> tuple[torch.Tensor, ...] | None:
    """Entries of the similarities whose softmax over the row is above a threshold.

    Args:
        left: (B, L, C).
        right: (B, C, S).
        threshold: of the softmax.
        mask: (B, L) rows that count, or None for all.
        rows: how many make a block.
        exact: use the slow way that holds for similarities of any range.

    Returns:
        pair, row, column, softmax over the row, and similarity (float64) of each entry; logarithm
        (B, S), float64, of the sum of exponentials of each column. None if the similarities span
        too much for the fast way.
    """
    column_log = left.new_full((len(left), right.shape[2]), -math.inf, dtype=torch.float64)
    low, high = math.inf, -math.inf
    found = []
    for start in range(0, left.shape[1], rows):
        block = left[:, start : start + rows] @ right
        valid = None if mask is None else mask[:, start : start + rows]
        top = block.amax(2)
        counted = top if valid is None else top[valid]
        if not counted.numel():
            continue
        ends = torch.stack(counted.aminmax()).tolist()
        low, high = min(low, ends[0]), max(high, ends[1])
        if exact:
            lines = block if valid is None else block.masked_fill(~valid[..., None], -math.inf)
            columns, reference = lines.logsumexp(1).double(), top
        elif high - low > _SPAN:
            return None
        else:
            # One exponential serves rows and columns: below the block's maximum by so much that
            # no sum overflows, and all values that count fit in float32.
            middle = ends[1] - _HEADROOM
            reference = torch.full_like(top, middle)
            if valid is not None:  # rows that do not count must not overflow either
                reference = torch.where(valid, reference, top)
        block = block.sub_(reference[..., None]).exp_()
        if not exact:
            sums = block.sum(1) if valid is None else (valid[:, None].to(block) @ block)[:, 0]
            columns = sums.double().log() + middle
        column_log = torch.logaddexp(column_log, columns)
        total = block.sum(2)
        likely = block > (threshold * total)[..., None]
        if valid is not None:
            likely &= valid[..., None]
        pair, row, column = likely.nonzero(as_tuple=True)
        value = block[pair, row, column]
        log = value.log().double() + reference[pair, row]
        found.append((pair, row + start, column, value / total[pair, row], log))
    if not found:
        none = torch.empty(0, dtype=torch.long, device=left.device)
        found = [(none, none, none, left.new_empty(0), column_log.new_empty(0))]
    return (*(torch.cat(part) for part in zip(*found, strict=True)), column_log)


def _windows(
    fine: torch.Tensor, batch: torch.Tensor, index: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Windows (M, W, C) of a map (B, h, w, C) around coarse cells; zero outside the map."""
    _, height, width, _ = fine.shape
    step = torch.arange(WINDOW, device=index.device) - WINDOW // 2
    stride = CELL // FINE
    row = (index.div(grid[1], rounding_mode="floor") * stride)[:, None] + step
    column = (index % grid[1] * stride)[:, None] + step
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    values = fine[
        batch[:, None, None],
        row.clamp(0, height - 1)[:, :, None],
        column.clamp(0, width - 1)[:, None],
    ]
    return (values * inside[..., None]).flatten(1, 2)


def window_expectation(windows0: torch.Tensor, windows1: torch.Tensor) -> torch.Tensor:
    """Where the centre of each window 0 lies in window 1.

    Args:
        windows0: (M, W, C) fine features.
        windows1: (M, W, C).

    Returns:
        (M, 3) float32: mean x, y of the heat map in half windows, and the sum of both standard
        deviations.
    """
    return query_expectation(windows0[:, windows0.shape[1] // 2], windows1)


def query_expectation(query: torch.Tensor, windows1: torch.Tensor) -> torch.Tensor:
    """``window_expectation`` for a feature (M, C) that need not be a window's centre."""
    with torch.autocast(query.device.type, enabled=False):
        query, windows1 = query.float(), windows1.float()
        heat = (windows1 @ query[..., None])[..., 0] / math.sqrt(query.shape[1])
        heat = heat.softmax(1)
        axis = torch.linspace(-1, 1, WINDOW, device=heat.device)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.stack([x.flatten(), y.flatten()], 1)
        mean = heat @ grid
        variance = heat @ grid**2 - mean**2
        deviation = variance.clamp(min=1e-10).sqrt().sum(1, keepdim=True)
        return torch.cat([mean, deviation], 1)
