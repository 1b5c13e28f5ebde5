"""LoFTR to be trained: ``gim_loftr``.

The network is the one that matches, in training mode. Truth is depth with poses, labels of videos,
or both; what a sample has decides which losses it gets (``training.md`` §5.1).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gim_hloc import weights
from gim_hloc.errors import InputError
from gim_hloc.matchers.loftr import NOTE
from gim_hloc.networks.loftr import (
    CELL,
    FINE,
    HEADS,
    WINDOW,
    Cells,
    Features,
    LoFTR,
    Positional,
    Widths,
    cell_xy,
    drop_border,
    mutual_matches,
    query_expectation,
    window_expectation,
)
from gim_hloc.options import Count, CountOrNone, options, select
from gim_hloc.training.batch import PairBatch
from gim_hloc.training.data.truth import warp_points
from gim_hloc.training.losses.loftr import fine_loss, focal_loss, log_confidence
from gim_hloc.training.models.base import Match, TrainingModel, keep_graph
from gim_hloc.training.models.seeds import sample_seeds

logger = logging.getLogger(__name__)

ENCODER = "resnet50-0676ba61.pth"  # ImageNet weights that the backbone starts from
_HALF = WINDOW // 2 * FINE  # pixels: what half a window stands for


@options
class LoFTROptions(Widths):
    """LoFTR to be trained; the defaults are the published network and training."""

    positional: Positional = "corrected"
    """Frequencies of the positional encoding: corrected, or the published ones to go on from the
    published weights. The checkpoint's notes name them."""
    labels: Count = 2048
    """At most so many labels of a video pair count, drawn at random."""
    fine_share: float = 0.3
    """Windows of the fine stage per coarse cell that could match."""
    fine_truth: Count = 100
    """At least so many of the windows are true pairs, the rest are predicted ones."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lowest confidence of a match, in training (fine stage) and in validation."""
    border: CountOrNone = 2
    """Coarse cells at the border of the images that never match."""

    def __post_init__(self) -> None:
        coarse, fine, layers, blocks = self.coarse, self.fine, self.layers, self.blocks
        if coarse % HEADS or fine % HEADS or layers % 2 or layers < 2 or len(blocks) != 3:
            raise InputError(
                f"LoFTR needs coarse ({coarse}) and fine ({fine}) channels that are multiples of "
                f"{HEADS}, an even number of layers ({layers}) and blocks of three layers "
                f"({blocks})."
            )


class LoFTRTraining(TrainingModel):
    """LoFTR and its losses."""

    options_type = LoFTROptions

    def __init__(self, name: str, options: LoFTROptions) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.network = LoFTR(positional=options.positional, widths=select(Widths, options))
        self.threshold = options.threshold
        self.notes = {NOTE: options.positional}
        _reset(self.network)

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``. Parts: ``coarse``, ``fine`` and ``matches`` (predicted pairs).

        A sample's loss is the mean of its coarse terms plus the mean of its fine ones: of depth,
        of labels, or of both.
        """
        net = self.network
        a, b = _split(net.encode(*_both(batch)))
        tokens0, tokens1 = net.transform(a, b)
        truth = _coarse_truth(batch, a)
        seeds = sample_seeds(batch)
        # Borders as at test, but of the area that holds an image.
        found = mutual_matches(
            tokens0.detach(), tokens1.detach(), self.threshold, mask0=a.mask, mask1=b.mask
        )
        found = drop_border(found, a, b, self.options.border, "mask")
        facts = _facts(batch, a, b, found)
        coarse, fine = [], []
        first = 0
        for row, fact in enumerate(facts):
            generator = torch.Generator().manual_seed(seeds[row])
            terms, windows = [], []
            sides = (tokens0[row], tokens1[row])
            length = tokens0.shape[1]
            mask0 = _row(a.mask, row) if fact.valid0 < length else None
            mask1 = _row(b.mask, row) if fact.valid1 < length else None
            if fact.has_depth:
                index0, index1 = truth.pairs(row)
                confidence = log_confidence(*sides, index0, index1, mask0=mask0, mask1=mask1)
                terms.append(focal_loss(confidence))
                candidates = min(fact.valid0, fact.valid1)
                mine = range(first, first + fact.found)
                cells = self._choose(found, row, mine, (index0, index1), candidates, generator)
                windows.append(self._fine_by_depth(a, b, (tokens0, tokens1), cells, truth.there))
            first += fact.found
            if fact.has_labels:
                xy0, xy1 = self._draw_labels(batch, row, fact.labels, a.grid, generator)
                terms.append(_coarse_by_labels(sides, (mask0, mask1), xy0, xy1, a.grid))
                windows.append(self._fine_by_labels(a, b, (tokens0, tokens1), row, xy0, xy1))
            zero = tokens0.new_zeros((), dtype=torch.float32)
            coarse.append(torch.stack(terms).mean() if terms else zero)
            fine.append(torch.stack(windows).mean() if windows else zero)
        coarse_loss, fine_total = torch.stack(coarse).mean(), torch.stack(fine).mean()
        return {
            "loss": keep_graph(coarse_loss + fine_total, self),
            "coarse": coarse_loss.detach(),
            "fine": fine_total.detach(),
            "matches": torch.tensor(len(found.batch) / len(batch)),
        }

    def _choose(
        self,
        found: Cells,
        row: int,
        places: range,
        true: tuple[torch.Tensor, torch.Tensor],
        candidates: int,
        generator: torch.Generator,
    ) -> Cells:
        """Pairs of cells whose windows the fine stage is trained on: predicted, then true ones.

        ``places`` are those of the sample in ``found``.
        """
        total = max(int(self.options.fine_share * candidates), 1)
        reserved = min(self.options.fine_truth, total)
        drawn = torch.randperm(len(places), generator=generator)[: total - reserved]
        mine = (drawn + places.start).to(found.batch.device)
        index0, index1 = true
        padding = index0.new_zeros(0)
        if len(index0):
            drawn = torch.randint(len(index0), (total - len(mine),), generator=generator)
            padding = drawn.to(index0.device)
        chosen0 = torch.cat([found.index0[mine], index0[padding]])
        chosen1 = torch.cat([found.index1[mine], index1[padding]])
        batch = torch.full_like(chosen0, row)
        return Cells(batch, chosen0, chosen1, chosen0.new_zeros(len(chosen0)).float())

    def _fine_by_depth(
        self,
        a: Features,
        b: Features,
        tokens: tuple[torch.Tensor, torch.Tensor],
        cells: Cells,
        there: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        windows0, windows1 = self._windows(a, b, tokens, cells)
        xy, valid = there
        target = xy[cells.batch, cells.index0] - cell_xy(cells.index1, b.grid)
        return fine_loss(
            window_expectation(windows0, windows1),
            target / _HALF,
            valid[cells.batch, cells.index0],
        )

    def _fine_by_labels(
        self,
        a: Features,
        b: Features,
        tokens: tuple[torch.Tensor, torch.Tensor],
        row: int,
        xy0: torch.Tensor,
        xy1: torch.Tensor,
    ) -> torch.Tensor:
        """Where a label lies within a window need not be its centre: the query is interpolated."""
        index0, offset0 = _nearest_cell(xy0, a.grid)
        index1, offset1 = _nearest_cell(xy1, b.grid)
        inside = (offset0.abs().amax(1) <= 1) & (offset1.abs().amax(1) <= 1)
        inside = inside.nonzero()[:, 0]  # once: a GPU is waited for each time a mask is an index
        index0, offset0, index1, offset1 = (t[inside] for t in (index0, offset0, index1, offset1))
        batch = torch.full_like(index0, row)
        cells = Cells(batch, index0, index1, batch.float())
        windows0, windows1 = self._windows(a, b, tokens, cells)
        maps = windows0.transpose(1, 2).unflatten(2, (WINDOW, WINDOW))
        place = offset0[:, None, None].to(maps.dtype)
        query = F.grid_sample(maps, place, mode="bilinear", align_corners=True)[..., 0, 0]
        everywhere = torch.ones_like(batch, dtype=torch.bool)
        return fine_loss(query_expectation(query, windows1), offset1, everywhere)

    def _windows(
        self, a: Features, b: Features, tokens: tuple[torch.Tensor, torch.Tensor], cells: Cells
    ) -> tuple[torch.Tensor, torch.Tensor]:
        windows = self.network.fine_windows(a, b, *tokens, cells)
        for index in range(len(self.network.loftr_fine.layers)):
            windows = self.network.loftr_fine.step(index, *windows)
        return windows

    def _draw_labels(
        self,
        batch: PairBatch,
        row: int,
        count: int,
        grid: tuple[int, int],
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (P, 2), (P, 2) of a sample that lie between valid coarse cells."""
        labels = batch.labels[row, :count]
        last = labels.new_tensor([grid[1] - 1, grid[0] - 1, grid[1] - 1, grid[0] - 1]) * CELL
        keep = ((labels >= 0) & (labels <= last)).all(1)
        near = torch.minimum(labels.clamp(min=0), last)  # the others need a pixel, too
        for xy, valid in ((near[:, :2], batch.valid0[row]), (near[:, 2:], batch.valid1[row])):
            column, line = (_round(xy / CELL) * CELL).unbind(1)
            keep &= valid[line, column]
        labels = labels[keep]
        order = torch.randperm(len(labels), generator=generator)[: self.options.labels]
        labels = labels[order.to(labels.device)]
        return labels[:, :2], labels[:, 2:]

    @torch.no_grad()
    def match(self, batch: PairBatch, *, seed: int = 0) -> list[Match]:
        """See ``TrainingModel``; nothing is drawn, ``seed`` has no effect."""
        net = self.network
        was = net.training
        net.eval()
        try:
            images, masks = _both(batch)
            whole = bool(masks.all())
            sides = _split(net.encode(images, None if whole else masks))
            found = net.match(*sides, threshold=self.threshold, border=self.options.border)
        finally:
            net.train(was)
        keep = torch.ones_like(found.cells.batch, dtype=torch.bool)
        for xy, valid in ((found.xy0, batch.valid0), (found.xy1, batch.valid1)):
            height, width = valid.shape[1:]
            column, line = _round(xy).unbind(1)
            line, column = line.clamp(0, height - 1), column.clamp(0, width - 1)
            keep &= valid[found.cells.batch, line, column]
        scores = found.cells.confidence.float().clamp(max=1.0)
        rows = [(found.cells.batch == row) & keep for row in range(len(batch))]
        return [(found.xy0[chosen], found.xy1[chosen], scores[chosen]) for chosen in rows]

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """ResNet-50 at a tenth of the learning rate, and the rest."""
        backbone: Any = self.network.backbone
        encoder = list(backbone.encode.parameters())
        slow = {id(parameter) for parameter in encoder}
        rest = [p for p in self.network.parameters() if id(p) not in slow]
        return [(0.1, encoder), (1.0, rest)]

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """See ``TrainingModel``: ``model.`` before the network's names."""
        return {f"model.{key}": value.detach() for key, value in self.network.state_dict().items()}

    def load_checkpoint(self, state: Mapping[str, torch.Tensor]) -> None:
        """See ``TrainingModel``."""
        plain = weights.unwrap("loftr", state)
        weights.load_into(self.network, plain, path="the checkpoint")

    def initialise(self, path: Path | None) -> None:
        """Start from ImageNet's ResNet-50, or go on from a checkpoint of this network.

        Args:
            path: ``resnet50-0676ba61.pth``, or a file with all of this network's weights.
        """
        if path is None:
            logger.warning(
                "The backbone of gim_loftr starts from random numbers. ImageNet's weights "
                "(%s, gim-weights download %s) serve better.",
                ENCODER,
                ENCODER,
            )
            return
        state = weights.load_state_dict(path)
        if weights.recognise(state) == "LoFTR":
            plain = weights.unwrap("loftr", state)
            weights.load_into(self.network, plain, path=path)
            return
        encoder: Any = self.network.backbone.encode
        # The fourth layer and the classifier are not part of this network.
        heads = ("layer4.", "fc.")
        part = {key: value for key, value in state.items() if not key.startswith(heads)}
        counters = [key for key in encoder.state_dict() if key.endswith("num_batches_tracked")]
        weights.load_into(encoder, part, path=path, optional=counters)


class _Facts(NamedTuple):
    """Numbers of a sample that decide which code runs."""

    has_depth: int
    has_labels: int
    labels: int
    valid0: int  # coarse cells
    valid1: int
    found: int  # pairs of cells; those of one sample follow each other


def _facts(batch: PairBatch, a: Features, b: Features, found: Cells) -> list[_Facts]:
    """Those of all samples, read at once: each reading makes the processor wait for the GPU."""
    whole = batch.has_depth.new_full((len(batch),), a.grid[0] * a.grid[1], dtype=torch.long)
    masks = [whole if side.mask is None else side.mask.flatten(1).sum(1) for side in (a, b)]
    numbers = torch.bincount(found.batch, minlength=len(batch))
    rows = [batch.has_depth, batch.has_labels, batch.label_count, *masks, numbers]
    return [_Facts(*row) for row in torch.stack([r.long() for r in rows], 1).tolist()]


class _Truth:
    """Which cells of both images show the same, by depth."""

    def __init__(self, there: tuple[torch.Tensor, torch.Tensor], partner: torch.Tensor) -> None:
        self.there = there  # (B, L, 2) places in image 1 of cells of image 0, and (B, L) valid
        self.partner = partner  # (B, L) cell of image 1, or -1

    def pairs(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells of image 0 and 1 of a sample."""
        index0 = (self.partner[row] >= 0).nonzero()[:, 0]
        return index0, self.partner[row, index0]


@torch.no_grad()
def _coarse_truth(batch: PairBatch, a: Features) -> _Truth:
    """Cells that are nearest to each other when carried there, and back."""
    rows, columns = a.grid
    device = batch.image0.device
    index = torch.arange(rows * columns, device=device)
    xy = cell_xy(index, a.grid)[None].expand(len(batch), -1, -1)
    there0, valid0 = warp_points(batch, xy, source=0, lookup="nearest")
    there1, valid1 = warp_points(batch, xy, source=1, lookup="nearest")
    to1, to0 = _cell_of(there0, valid0, a.grid), _cell_of(there1, valid1, a.grid)
    back = to0.gather(1, to1.clamp(min=0))
    mutual = (to1 >= 0) & (back == index)
    return _Truth((there0, valid0), torch.where(mutual, to1, torch.full_like(to1, -1)))


def _cell_of(xy: torch.Tensor, valid: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Nearest cell (B, L) of places (B, L, 2), -1 where there is none."""
    column, row = _round(xy / CELL).unbind(-1)
    inside = valid & (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
    return torch.where(inside, row * grid[1] + column, torch.full_like(row, -1))


def _nearest_cell(xy: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell (P,) nearest to each point (P, 2) of an image, and where in its window it lies.

    The second is (P, 2) in half windows, within [-1, 1].
    """
    column, row = _round(xy / CELL).unbind(1)
    index = row.clamp(0, grid[0] - 1) * grid[1] + column.clamp(0, grid[1] - 1)
    return index, (xy - cell_xy(index, grid)) / _HALF


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest integer, halves upwards."""
    return torch.floor(x + 0.5).long()


def _coarse_by_labels(
    sides: tuple[torch.Tensor, torch.Tensor],
    masks: tuple[torch.Tensor | None, torch.Tensor | None],
    xy0: torch.Tensor,
    xy1: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Focal loss of labels, each of which competes with all labels and all cells."""
    extended0, extended1 = (
        torch.cat([sample_tokens(tokens, xy / CELL, grid), tokens])
        for tokens, xy in zip(sides, (xy0, xy1), strict=True)
    )
    mask0, mask1 = (
        None if mask is None else torch.cat([mask.new_ones(len(xy0)), mask]) for mask in masks
    )
    index = torch.arange(len(xy0), device=xy0.device)
    confidence = log_confidence(extended0, extended1, index, index, mask0=mask0, mask1=mask1)
    return focal_loss(confidence)


def sample_tokens(tokens: torch.Tensor, place: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Coarse features (P, C) between cells, by bilinear interpolation.

    Args:
        tokens: (L, C) features of the cells, row by row.
        place: (P, 2) x, y in cells; cell (0, 0) is at 0.
        grid: rows and columns of cells.
    """
    rows, columns = grid
    extent = place.new_tensor([max(columns - 1, 1), max(rows - 1, 1)])
    unit = (2 * place / extent - 1)[None, None].to(tokens.dtype)
    maps = tokens.T.view(1, -1, rows, columns)
    sampled = F.grid_sample(maps, unit, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled[0, :, 0].T


def _both(batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (2B, 3, H, W), first ones first, and valid coarse cells (2B, H/8, W/8)."""
    width, height = batch.box
    if width % CELL or height % CELL:
        raise InputError(
            f"LoFTR is trained on boxes whose sides are multiples of {CELL} px, not on "
            f"{width} x {height}."
        )
    images = torch.cat([batch.image0, batch.image1]).contiguous(memory_format=torch.channels_last)
    return images, torch.cat([batch.valid0, batch.valid1])[:, ::CELL, ::CELL]


def _split(both: Features) -> tuple[Features, Features]:
    half = len(both.tokens) // 2
    mask = both.mask
    parts = [
        Features(
            both.tokens[part], both.fine[part], both.grid, None if mask is None else mask[part]
        )
        for part in (slice(None, half), slice(half, None))
    ]
    return parts[0], parts[1]


def _row(mask: torch.Tensor | None, row: int) -> torch.Tensor | None:
    return None if mask is None else mask[row]


def _reset(network: LoFTR) -> None:
    """The start values of LoFTR's authors: Xavier in attention, Kaiming in convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
