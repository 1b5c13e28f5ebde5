"""LightGlue (Lindenberger et al., 2023), rearranged for speed.

The network, its weights and its decisions (early stopping, pruning, assignment) are those of
kornia's ``LightGlue``; ``LightGlue.from_state`` takes the weights over. What differs:

* cross attention uses the fused kernel in both directions instead of storing the similarities and
  two softmaxes of them;
* the output projection of each attention is folded into the layer that follows it, and the
  projections to queries, keys and values are one product;
* what depends on one image only (``start``: projection, positions, first self attention) is
  separate from what depends on the pair, so that it is computed once per image;
* ``match_padded`` runs many pairs at once, and a pair that is done leaves the batch.

Letters: B pairs or images, N keypoints, D = 256 channels, H = 4 heads, E = 64 channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Start(NamedTuple):
    """What LightGlue derives from one image: input to all its pairs."""

    x: torch.Tensor  # (N, D) state after the first self attention
    cos: torch.Tensor  # (N, E/2) of the rotary angles
    sin: torch.Tensor  # (N, E/2)


class _Block(nn.Module):
    """What self and cross attention share: projections before, update after the attention."""

    def __init__(self, dim: int, heads: int, parts: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, parts * dim)
        self.mix = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(2 * dim)
        self.out = nn.Linear(2 * dim, dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Project (B, N, D) to (B, N, parts, H, E)."""
        batch, length, _ = x.shape
        return self.project(x).view(batch, length, -1, self.heads, x.shape[-1] // self.heads)

    def attend(
        self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any
    ) -> torch.Tensor:
        """Update x (B, N, D) by attention of q, k, v (B, H, N, E)."""
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        context = context.transpose(1, 2).flatten(2).to(x.dtype)
        hidden = self.norm(self.mix(torch.cat([x, context], -1)))
        return x + self.out(F.gelu(hidden))


class _SelfBlock(_Block):
    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        qkv = self.split(x)
        # Queries and keys turn together. The two halves of a head's channels are the two
        # coordinates of its rotating pairs (from_state reorders the rows so).
        first, second = qkv[:, :, :2].chunk(2, -1)
        cos, sin = cos[:, :, None, None], sin[:, :, None, None]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        q, k = turned.to(qkv.dtype).permute(2, 0, 3, 1, 4)
        return self.attend(x, q, k, qkv[:, :, 2].transpose(1, 2), mask)


class _CrossBlock(_Block):
    def heads_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shared queries/keys and values, each (B, H, N, E)."""
        qk, v = self.split(x).permute(2, 0, 3, 1, 4)
        return qk, v


class LightGlue(nn.Module):
    """LightGlue for descriptors of ``input_dim`` channels.

    Args:
        input_dim: channels of the descriptors.
        dim: channels inside.
        heads: attention heads.
        layers: pairs of self and cross attention.
        depth_confidence: stop when this part of the points is certain; -1 never stops early.
        width_confidence: drop points that are certain and matchable with a probability below
            ``1 - width_confidence``; -1 keeps all.
        filter_threshold: lowest confidence of a match.
        pruning_min: points are dropped while an image has more than this many (on a GPU fewer
            points save nothing).
    """

    def __init__(
        self,
        *,
        input_dim: int = 128,
        dim: int = 256,
        heads: int = 4,
        layers: int = 9,
        depth_confidence: float = 0.95,
        width_confidence: float = 0.99,
        filter_threshold: float = 0.1,
        pruning_min: int = -1,
    ) -> None:
        super().__init__()
        self.depth_confidence = depth_confidence
        self.width_confidence = width_confidence
        self.filter_threshold = filter_threshold
        self.pruning_min = pruning_min
        self.input_proj = nn.Linear(input_dim, dim) if input_dim != dim else nn.Identity()
        self.frequencies = nn.Linear(2, dim // heads // 2, bias=False)
        # Annotated: a ModuleList does not know what it holds.
        self.selfs: Any = nn.ModuleList([_SelfBlock(dim, heads, 3) for _ in range(layers)])
        self.crosses: Any = nn.ModuleList([_CrossBlock(dim, heads, 2) for _ in range(layers)])
        self.final_proj: Any = nn.ModuleList([nn.Linear(dim, dim) for _ in range(layers)])
        # Two outputs per point: matchability, and (all layers but the last) certainty.
        self.heads: Any = nn.ModuleList([nn.Linear(dim, 2) for _ in range(layers)])

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor], **options: Any) -> LightGlue:
        """Take over published weights.

        Args:
            state: names and tensors in kornia's words, checked against ``published_shapes``.
            **options: constructor arguments, those of ``published_shapes`` included.
        """
        model = cls(**options)
        with torch.no_grad():
            _copy(model.input_proj, state, "input_proj")
            _copy(model.frequencies, state, "posenc.Wr")
            for i in range(len(model.selfs)):
                _copy_self(model.selfs[i], state, f"transformers.{i}.self_attn")
                _copy_cross(model.crosses[i], state, f"transformers.{i}.cross_attn")
                _copy(model.final_proj[i], state, f"log_assignment.{i}.final_proj")
                rows = [f"log_assignment.{i}.matchability", f"token_confidence.{i}.token.0"]
                # After the last layer nobody asks for certainty.
                for row, name in enumerate(rows if i < len(model.selfs) - 1 else rows[:1]):
                    model.heads[i].weight[row] = state[f"{name}.weight"][0]
                    model.heads[i].bias[row] = state[f"{name}.bias"][0]
        return model.eval().requires_grad_(False)

    def start(self, xy: torch.Tensor, size: tuple[int, int], descriptors: torch.Tensor) -> Start:
        """Compute what depends on one image only.

        Args:
            xy: (N, 2) keypoints in network pixels.
            size: (width, height) of the network's image, pixels.
            descriptors: (N, input_dim).
        """
        extent = xy.new_tensor(size)
        normal = (xy - extent / 2) / (extent.max() / 2)
        # Positions are turned into angles in full precision under every autocast.
        angle = normal.float() @ self.frequencies.weight.float().T
        cos, sin = angle.cos(), angle.sin()
        x = self.input_proj(descriptors)
        x = self.selfs[0](x[None], cos[None], sin[None], None)[0]
        return Start(x=x, cos=cos, sin=sin)

    def match(self, a: Start, b: Start) -> tuple[torch.Tensor, torch.Tensor]:
        """Match one pair.

        Returns:
            indices (K, 2) int64, ordered by the index in image 0, and confidences (K,).
        """
        sides = [_Side(a), _Side(b)]
        total = sum(len(side.index) for side in sides)
        last = len(self.selfs) - 1
        for i in range(last + 1):
            if i > 0:
                for side in sides:
                    side.x = self.selfs[i](side.x, side.cos, side.sin, None)
            block = self.crosses[i]
            (qk0, v0), (qk1, v1) = (block.heads_of(side.x) for side in sides)
            sides[0].x = block.attend(sides[0].x, qk0, qk1, v1, None)
            sides[1].x = block.attend(sides[1].x, qk1, qk0, v0, None)
            if i == last or (self.depth_confidence <= 0 and self.width_confidence <= 0):
                continue
            judged = [self._judge(side.x[0], i) for side in sides]
            if self.depth_confidence > 0:
                unsure = sum((~sure).sum() for _, sure in judged)
                if 1.0 - float(unsure) / total > self.depth_confidence:
                    break
            for side, (keep, _) in zip(sides, judged, strict=True):
                if self.width_confidence > 0 and len(side.index) > self.pruning_min:
                    side.prune(keep)
            if min(len(side.index) for side in sides) == 0:
                empty = sides[0].index.new_empty(0, 2)
                return empty, sides[0].x.new_empty(0)
        first, second, confidence = self._assign(sides[0].x[0], sides[1].x[0], i)
        return torch.stack([sides[0].index[first], sides[1].index[second]], 1), confidence

    def match_padded(
        self, pairs: Sequence[tuple[Start, Start]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Match many pairs at once; each gets what ``match`` gives it, up to float noise.

        Images are padded to the longest and padding is masked. A pair that is done leaves the
        batch, and the batch shrinks to the longest image left.
        """
        results: list[Any] = [None] * len(pairs)
        # Rows [0, B) are the first images, rows [B, 2B) the second ones of the same pairs.
        state = _Batch.of([a for a, _ in pairs] + [b for _, b in pairs])
        where = list(range(len(pairs)))
        total = state.count.view(2, -1).sum(0)
        last = len(self.selfs) - 1
        for i in range(last + 1):
            if i > 0:
                state.x = self.selfs[i](state.x, state.cos, state.sin, state.mask)
            block = self.crosses[i]
            qk, v = block.heads_of(state.x)
            half = len(where)
            state.x = block.attend(
                state.x, qk, qk.roll(half, 0), v.roll(half, 0), state.partner_mask()
            )
            done = [i == last] * half
            keep = None
            if i < last and (self.depth_confidence > 0 or self.width_confidence > 0):
                keep, sure = self._judge(state.x, i)
                if self.depth_confidence > 0:
                    unsure = (~sure & state.valid).sum(1).view(2, -1).sum(0)
                    done = (1.0 - unsure / total > self.depth_confidence).tolist()
            if any(done):
                for row, finished in enumerate(done):
                    if finished:
                        results[where[row]] = self._finish(state, row, half, i)
                left = [row for row, finished in enumerate(done) if not finished]
                if not left:
                    break
                where = [where[row] for row in left]
                rows = torch.tensor(left + [half + row for row in left], device=state.x.device)
                state = state.select(rows)
                total = total[rows[: len(left)]]
                keep = keep[rows] if keep is not None else None
            if keep is not None and self.width_confidence > 0:
                prunable = (state.count > self.pruning_min)[:, None]
                state = state.prune(torch.where(prunable, keep, state.valid) & state.valid)
                counts = state.count.view(2, -1).amin(0).tolist()
                if min(counts) == 0:
                    for row, count in enumerate(counts):
                        if count == 0:
                            results[where[row]] = (
                                state.index.new_empty(0, 2),
                                state.x.new_empty(0),
                            )
                    left = [row for row, count in enumerate(counts) if count]
                    if not left:
                        break
                    rows = torch.tensor(
                        left + [len(where) + row for row in left], device=state.x.device
                    )
                    where = [where[row] for row in left]
                    state = state.select(rows)
                    total = total[rows[: len(left)]]
        return results

    def _finish(
        self, state: _Batch, row: int, half: int, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        valid0, valid1 = state.valid[row], state.valid[half + row]
        first, second, confidence = self._assign(
            state.x[row][valid0], state.x[half + row][valid1], layer
        )
        index0, index1 = state.index[row][valid0], state.index[half + row][valid1]
        return torch.stack([index0[first], index1[second]], 1), confidence

    def _judge(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which points (…, N) to keep, and which are certain, after a layer."""
        matchable, certain = self.heads[layer](x).float().sigmoid().unbind(-1)
        threshold = self.certainty_threshold(layer)
        keep = matchable > 1 - self.width_confidence
        if self.depth_confidence > 0:
            keep |= certain <= threshold
        return keep, certain >= threshold

    def certainty_threshold(self, layer: int) -> float:
        """Certainty from which a point counts as certain after a layer (0, 1, …)."""
        return 0.8 + 0.1 * math.exp(-4.0 * layer / len(self.selfs))

    def _assign(
        self, x0: torch.Tensor, x1: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mutual best matches of states (M, D) and (N, D): rows, columns, confidences."""
        scale = x0.shape[-1] ** -0.25
        project = self.final_proj[layer]
        similarity = ((project(x0) * scale) @ (project(x1) * scale).T).float()
        bias = [F.logsigmoid(self.heads[layer](x).float()[:, 0]) for x in (x0, x1)]
        # log of (softmax over rows * softmax over columns * both matchabilities)
        row = bias[0] - similarity.logsumexp(1)
        column = bias[1] - similarity.logsumexp(0)
        score = similarity.mul_(2).add_(row[:, None]).add_(column)
        best0, arg0 = score.max(1)
        arg1 = score.argmax(0)
        confidence = best0.exp()
        here = torch.arange(len(arg0), device=arg0.device)
        chosen = ((arg1[arg0] == here) & (confidence > self.filter_threshold)).nonzero()[:, 0]
        return chosen, arg0[chosen], confidence[chosen]


class _Side:
    """One image of a single pair while its points are pruned."""

    def __init__(self, start: Start) -> None:
        self.x, self.cos, self.sin = start.x[None], start.cos[None], start.sin[None]
        self.index = torch.arange(start.x.shape[0], device=start.x.device)

    def prune(self, keep: torch.Tensor) -> None:
        kept = keep.nonzero()[:, 0]
        if len(kept) == len(self.index):
            return
        self.index = self.index[kept]
        self.x, self.cos, self.sin = (t.index_select(1, kept) for t in (self.x, self.cos, self.sin))


@dataclass
class _Batch:
    """Padded images: rows of a batch."""

    x: torch.Tensor  # (R, N, D)
    cos: torch.Tensor  # (R, N, E/2)
    sin: torch.Tensor  # (R, N, E/2)
    index: torch.Tensor  # (R, N) keypoint that a column stands for
    valid: torch.Tensor  # (R, N) False where a column is padding
    full: bool  # no column is padding

    @classmethod
    def of(cls, starts: Sequence[Start]) -> _Batch:
        lengths = [len(start.x) for start in starts]
        pad = nn.utils.rnn.pad_sequence
        x = pad([start.x for start in starts], batch_first=True)
        column = torch.arange(max(lengths), device=x.device).expand(len(starts), -1)
        return cls(
            x=x,
            cos=pad([start.cos for start in starts], batch_first=True),
            sin=pad([start.sin for start in starts], batch_first=True),
            index=column,
            valid=column < torch.tensor(lengths, device=x.device)[:, None],
            full=min(lengths) == max(lengths),
        )

    @property
    def count(self) -> torch.Tensor:
        """(R,) number of points left in each image."""
        return self.valid.sum(1)

    @property
    def mask(self) -> torch.Tensor | None:
        """(R, 1, 1, N) keys that may be attended to; None if all may."""
        return None if self.full else self.valid[:, None, None]

    def partner_mask(self) -> torch.Tensor | None:
        """``mask`` of the other image of each pair."""
        return None if self.full else self.valid.roll(len(self.valid) // 2, 0)[:, None, None]

    def select(self, rows: torch.Tensor) -> _Batch:
        """Keep some rows."""
        return _Batch(
            x=self.x[rows],
            cos=self.cos[rows],
            sin=self.sin[rows],
            index=self.index[rows],
            valid=self.valid[rows],
            full=self.full,
        )

    def prune(self, keep: torch.Tensor) -> _Batch:
        """Keep some points of each row, in order, and shrink to the longest row left."""
        counts = keep.sum(1)
        shortest, longest = (int(value) for value in torch.stack(counts.aminmax()).tolist())
        if longest == keep.shape[1] and shortest == longest:
            return self
        order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        wide = order[..., None]

        def take(t: torch.Tensor) -> torch.Tensor:
            return t.gather(1, wide.expand(-1, -1, t.shape[-1]))

        return _Batch(
            x=take(self.x),
            cos=take(self.cos),
            sin=take(self.sin),
            index=self.index.gather(1, order),
            valid=keep.gather(1, order),
            full=shortest == longest,
        )


def sizes_of(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """``dim``, ``layers`` and ``heads`` of a published state dict, in kornia's words.

    Small networks are trained, too, and shapes tell their sizes. Empty if the names do not fit.
    """
    frequencies = state.get("posenc.Wr.weight")
    output = state.get("transformers.0.self_attn.out_proj.weight")
    if frequencies is None or output is None or not len(frequencies):
        return {}
    dim = output.shape[0]
    numbers = [int(key.split(".")[1]) for key in state if key.startswith("transformers.")]
    return {"dim": dim, "layers": 1 + max(numbers), "heads": dim // (2 * len(frequencies))}


def published_shapes(
    *, input_dim: int = 128, dim: int = 256, layers: int = 9, heads: int = 4
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict, in kornia's words."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = linear("input_proj", input_dim, dim) if input_dim != dim else {}
    shapes["posenc.Wr.weight"] = (dim // heads // 2, 2)
    for i in range(layers):
        own, cross = f"transformers.{i}.self_attn", f"transformers.{i}.cross_attn"
        shapes |= linear(f"{own}.Wqkv", dim, 3 * dim) | linear(f"{own}.out_proj", dim, dim)
        for name in ("to_qk", "to_v", "to_out"):
            shapes |= linear(f"{cross}.{name}", dim, dim)
        for block in (own, cross):
            shapes |= linear(f"{block}.ffn.0", 2 * dim, 2 * dim)
            shapes |= {f"{block}.ffn.1.{part}": (2 * dim,) for part in ("weight", "bias")}
            shapes |= linear(f"{block}.ffn.3", 2 * dim, dim)
        shapes |= linear(f"log_assignment.{i}.matchability", dim, 1)
        shapes |= linear(f"log_assignment.{i}.final_proj", dim, dim)
        if i < layers - 1:
            shapes |= linear(f"token_confidence.{i}.token.0", dim, 1)
    return shapes


def _copy(module: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    for key, parameter in module.named_parameters():
        parameter.copy_(state[f"{name}.{key}"])


def _fold(block: _Block, state: Mapping[str, torch.Tensor], name: str, output: str) -> None:
    """Take the feed-forward part over with the attention's output projection folded in."""
    weight, bias = state[f"{name}.ffn.0.weight"], state[f"{name}.ffn.0.bias"]
    on_x, on_message = weight.chunk(2, 1)
    block.mix.weight.copy_(torch.cat([on_x, on_message @ state[f"{name}.{output}.weight"]], 1))
    block.mix.bias.copy_(bias + on_message @ state[f"{name}.{output}.bias"])
    _copy(block.norm, state, f"{name}.ffn.1")
    _copy(block.out, state, f"{name}.ffn.3")


def _copy_self(block: _SelfBlock, state: Mapping[str, torch.Tensor], name: str) -> None:
    dim, heads = block.project.in_features, block.heads
    # Published rows: head, channel, (q, k, v). Here: (q, k, v), head, channel; and the pairs
    # (0, 1), (2, 3), … that rotate together become (0, E/2), (1, E/2 + 1), … in q and k.
    pair = torch.arange(dim // heads).view(-1, 2).T.flatten()
    weight = state[f"{name}.Wqkv.weight"].view(heads, -1, 3, dim).permute(2, 0, 1, 3).clone()
    bias = state[f"{name}.Wqkv.bias"].view(heads, -1, 3).permute(2, 0, 1).clone()
    weight[:2], bias[:2] = weight[:2][:, :, pair], bias[:2][:, :, pair]
    block.project.weight.copy_(weight.reshape(3 * dim, dim))
    block.project.bias.copy_(bias.reshape(-1))
    _fold(block, state, name, "out_proj")


def _copy_cross(block: _CrossBlock, state: Mapping[str, torch.Tensor], name: str) -> None:
    for part in ("weight", "bias"):
        rows = [state[f"{name}.to_qk.{part}"], state[f"{name}.to_v.{part}"]]
        getattr(block.project, part).copy_(torch.cat(rows))
    _fold(block, state, name, "to_out")
