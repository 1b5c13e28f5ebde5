"""LightGlue (Lindenberger et al., 2023), for matching and for training.

Weights have their published names (kornia's ``LightGlue`` reads them too). What differs from other
implementations is the order of work:

* cross attention uses the fused kernel in both directions instead of storing the similarities and
  two softmaxes of them;
* the output projection of each attention is folded into the layer that follows it, and the
  projections to queries, keys and values are one product. In training the folding is part of the
  graph; `fold` keeps its results;
* what depends on one image only (`start`: projection, positions, first self attention) is separate
  from what depends on the pair, so that it is computed once per image;
* `match` runs many pairs at once, and a pair that is done leaves the batch.

Letters: B pairs, M and N keypoints of the two images, D = 256 channels, H = 4 heads, E = D / H
channels per head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Start(NamedTuple):
    """What LightGlue derives from one image: input to all its pairs."""

    x: torch.Tensor  # (N, D) state after the first self attention
    cos: torch.Tensor  # (N, E/2) of the rotary angles
    sin: torch.Tensor  # (N, E/2)


@dataclass(frozen=True)
class Side:
    """The first, or the second, images of a batch of pairs, padded to the longest."""

    x: torch.Tensor  # (B, N, D)
    cos: torch.Tensor  # (B, N, E/2)
    sin: torch.Tensor  # (B, N, E/2)
    valid: torch.Tensor  # (B, N) False where a column is padding
    index: torch.Tensor  # (B, N) keypoint that a column stands for
    full: bool  # no column is padding

    @classmethod
    def of(cls, starts: Sequence[Start]) -> Side:
        """Images with any numbers of keypoints."""
        counts = [len(start.x) for start in starts]
        pad = nn.utils.rnn.pad_sequence
        x, cos, sin = (pad(list(t), batch_first=True) for t in zip(*starts, strict=True))
        index = torch.arange(max(counts), device=x.device).expand(len(counts), -1)
        valid = index < torch.tensor(counts, device=x.device)[:, None]
        return cls(x, cos, sin, valid, index, full=min(counts) == max(counts))

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, 1, 1, N) keys that may be attended to; None if all may."""
        return None if self.full else self.valid[:, None, None]

    def select(self, rows: torch.Tensor | slice) -> Side:
        """Some images of the batch."""
        x, cos, sin, valid, index = (
            t[rows] for t in (self.x, self.cos, self.sin, self.valid, self.index)
        )
        return Side(x, cos, sin, valid, index, full=self.full)

    def prune(self, keep: torch.Tensor) -> Side:
        """Some keypoints (B, N) of each image, in order, padded to the longest that is left."""
        counts = keep.sum(1)
        shortest, longest = torch.stack(counts.aminmax()).tolist()
        if shortest == keep.shape[1]:
            return self
        order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        x, cos, sin = (
            t.gather(1, order[..., None].expand(-1, -1, t.shape[-1]))
            for t in (self.x, self.cos, self.sin)
        )
        valid, index = keep.gather(1, order), self.index.gather(1, order)
        return Side(x, cos, sin, valid, index, full=shortest == longest)


_Weights = tuple[torch.Tensor, torch.Tensor]  # of a linear layer: matrix and bias


class _Positions(nn.Module):
    """Learned frequencies: positions become rotations of pairs of channels."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.Wr = nn.Linear(2, head_dim // 2, bias=False)
        nn.init.normal_(self.Wr.weight)

    def forward(self, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (..., E/2) of positions (..., 2)."""
        with torch.autocast(normal.device.type, enabled=False):
            angle = self.Wr(normal.to(self.Wr.weight))
            return angle.cos(), angle.sin()


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
    )


class _Attention(nn.Module, ABC):
    """What self and cross attention share: one product before the attention, the update after."""

    ffn: Any

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.folded: tuple[_Weights, _Weights] | None = None

    @abstractmethod
    def products(self) -> tuple[_Weights, _Weights]:
        """Weights of the projection to queries, keys, values (rows), and of the update's start."""

    def _folded_into_ffn(self, output: nn.Linear) -> _Weights:
        """The first layer of ``ffn`` on [state, attended values]: ``output`` is part of it."""
        first = self.ffn[0]
        on_x, on_message = first.weight.chunk(2, 1)
        weight = torch.cat([on_x, on_message @ output.weight], 1)
        return weight, first.bias + on_message @ output.bias

    def weights(self) -> tuple[_Weights, _Weights]:
        """`products` in full precision, those that `fold` kept or anew."""
        if self.folded is not None:
            return self.folded
        with torch.autocast(self.ffn[0].weight.device.type, enabled=False):
            return self.products()

    def split(self, x: torch.Tensor, project: _Weights) -> torch.Tensor:
        """Project (B, N, D) to (B, N, parts, H, E)."""
        return F.linear(x, *project).unflatten(
            -1, (-1, self.num_heads, x.shape[-1] // self.num_heads)
        )

    def update(self, x: Any, q: Any, k: Any, v: Any, mask: Any, mix: _Weights) -> torch.Tensor:
        """States (B, N, D) after attention of q (B, H, N, E) to k, v (B, H, M, E)."""
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        context = context.transpose(1, 2).flatten(2).to(x.dtype)
        hidden = F.linear(torch.cat([x, context], -1), *mix)
        return x + self.ffn[3](self.ffn[2](self.ffn[1](hidden)))


class _SelfAttention(_Attention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(heads)
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ffn = _feed_forward(dim)

    def products(self) -> tuple[_Weights, _Weights]:
        # Published rows: head, channel, (q, k, v). Here: (q, k, v), head, channel, and the channels
        # (0, 1), (2, 3), … of q and k that rotate together become (0, E/2), (1, E/2 + 1), …
        def rows(t: torch.Tensor) -> torch.Tensor:
            q, k, v = t.unflatten(0, (self.num_heads, -1, 3)).unbind(2)
            q, k = (part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for part in (q, k))
            return torch.cat([part.flatten(0, 1) for part in (q, k, v)])

        project = rows(self.Wqkv.weight), rows(self.Wqkv.bias)
        return project, self._folded_into_ffn(self.out_proj)

    def forward(self, side: Side) -> Side:
        project, mix = self.weights()
        qkv = self.split(side.x, project)
        first, second = qkv[:, :, :2].chunk(2, -1)  # queries and keys turn together
        cos, sin = side.cos[:, :, None, None], side.sin[:, :, None, None]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        q, k = turned.to(qkv.dtype).permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)
        return replace(side, x=self.update(side.x, q, k, v, side.mask, mix))


class _CrossAttention(_Attention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(heads)
        self.to_qk = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.ffn = _feed_forward(dim)

    def products(self) -> tuple[_Weights, _Weights]:
        weight = torch.cat([self.to_qk.weight, self.to_v.weight])
        bias = torch.cat([self.to_qk.bias, self.to_v.bias])
        return (weight, bias), self._folded_into_ffn(self.to_out)

    def forward(self, a: Side, b: Side) -> tuple[Side, Side]:
        project, mix = self.weights()
        (qk0, v0), (qk1, v1) = (
            self.split(side.x, project).permute(2, 0, 3, 1, 4) for side in (a, b)
        )
        x0 = self.update(a.x, qk0, qk1, v1, b.mask, mix)
        x1 = self.update(b.x, qk1, qk0, v0, a.mask, mix)
        return replace(a, x=x0), replace(b, x=x1)


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(dim, heads)
        self.cross_attn = _CrossAttention(dim, heads)

    def forward(self, a: Side, b: Side) -> tuple[Side, Side]:
        a, b = self.cross_attn(self.self_attn(a), self.self_attn(b))
        return a, b


class _Assignment(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.matchability = nn.Linear(dim, 1)
        self.final_proj = nn.Linear(dim, dim)

    def forward(
        self, x0: torch.Tensor, x1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Similarities (B, M, N) of states, and logits (B, M) and (B, N) of being matchable."""
        scale = x0.shape[-1] ** -0.25
        projected = [self.final_proj(x) for x in (x0, x1)]
        # Similarities of some tens lose what tells them apart in half precision.
        with torch.autocast(x0.device.type, enabled=False):
            wide = torch.promote_types(projected[0].dtype, torch.float32)
            first, second = (p.to(wide) * scale for p in projected)
            similarity = first @ second.transpose(1, 2)
        return similarity, self.matchability(x0)[..., 0], self.matchability(x1)[..., 0]


class _Certainty(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, N); no gradient flows into x."""
        logits: torch.Tensor = self.token[0](x.detach())[..., 0]
        return logits


class LightGlue(nn.Module):
    """LightGlue for descriptors of ``input_dim`` channels.

    Args:
        input_dim: channels of the descriptors.
        dim: channels inside, a multiple of twice the heads.
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
        self.sizes = {"input_dim": input_dim, "dim": dim, "heads": heads, "layers": layers}
        self.last = layers - 1
        # Annotated: a ModuleList does not know what it holds.
        self.input_proj: Any = nn.Linear(input_dim, dim) if input_dim != dim else nn.Identity()
        self.posenc = _Positions(dim // heads)
        self.transformers: Any = nn.ModuleList([_Layer(dim, heads) for _ in range(layers)])
        self.log_assignment: Any = nn.ModuleList([_Assignment(dim) for _ in range(layers)])
        # After the last layer nobody asks for certainty.
        self.token_confidence: Any = nn.ModuleList([_Certainty(dim) for _ in range(layers - 1)])

    def fold(self) -> LightGlue:
        """Make it fast: products of weights are computed once. Call it last, on the device."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, _Attention):
                module.folded = module.weights()
        return self

    def embed(
        self, xy: torch.Tensor, size: tuple[int, int], descriptors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States (..., N, D), and cosines and sines (..., N, E/2) of the positions.

        Args:
            xy: (..., N, 2) keypoints in network pixels.
            size: (width, height) of the network's image, pixels.
            descriptors: (..., N, input_dim).
        """
        extent = xy.new_tensor(size)
        cos, sin = self.posenc((xy - extent / 2) / (extent.max() / 2))
        return self.input_proj(descriptors), cos, sin

    def forward(self, a: Side, b: Side, *, recompute: bool = False) -> list[tuple[Side, Side]]:
        """Both sides of pairs after each layer, for losses. States of padding mean nothing.

        Args:
            a: the first images, as `embed` made them.
            b: the second ones.
            recompute: keep the states between layers only, and compute the rest again for the
                gradient: less memory, a third more time.
        """
        # Sums over all layers stay in full precision under autocast.
        a, b = (replace(s, x=s.x.to(torch.promote_types(s.x.dtype, torch.float32))) for s in (a, b))
        found = []
        for layer in self.transformers:
            if recompute and torch.is_grad_enabled():
                a, b = checkpoint(layer, a, b, use_reentrant=False)
            else:
                a, b = layer(a, b)
            found.append((a, b))
        return found

    def start(self, xy: torch.Tensor, size: tuple[int, int], descriptors: torch.Tensor) -> Start:
        """Compute what depends on one image only; see `embed`."""
        alone = Side.of([Start(*self.embed(xy, size, descriptors))])
        return Start(self.transformers[0].self_attn(alone).x[0], alone.cos[0], alone.sin[0])

    def match(
        self, pairs: Sequence[tuple[Start, Start]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Match pairs of images with at least one keypoint each.

        Images are padded to the longest, and padding is masked; the batch shrinks with its pairs.

        Returns:
            for each pair indices (K, 2) int64, ordered by the index in image 0, and confidences
            (K,). What else is in the batch changes them by float noise only.
        """
        results: list[Any] = [None] * len(pairs)
        rows = list(range(len(pairs)))  # which pairs are in the batch
        a, b = (Side.of(starts) for starts in zip(*pairs, strict=True))
        total = a.valid.sum(1) + b.valid.sum(1)
        for i, layer in enumerate(self.transformers):
            a, b = layer(a, b) if i else layer.cross_attn(a, b)
            keep0, keep1 = self._wanted(a, i), self._wanted(b, i)
            sure = self._sure(a, b, total, i)
            hopeless = ~(keep0.any(1) & keep1.any(1))
            for row, (done, empty) in enumerate(torch.stack([sure, hopeless], 1).tolist()):
                if done:
                    results[rows[row]] = self._assign(a, b, row, i)
                elif empty:
                    results[rows[row]] = a.index.new_empty(0, 2), a.x.new_empty(0)
            left = [row for row, pair in enumerate(rows) if results[pair] is None]
            if not left:
                break
            if len(left) < len(rows):
                rows = [rows[row] for row in left]
                chosen = torch.tensor(left, device=a.x.device)
                a, b = a.select(chosen), b.select(chosen)
                keep0, keep1, total = keep0[chosen], keep1[chosen], total[chosen]
            a, b = a.prune(keep0), b.prune(keep1)
        return results

    def certainty_threshold(self, layer: int) -> float:
        """Certainty from which a point counts as certain after a layer (0, 1, …)."""
        return 0.8 + 0.1 * math.exp(-4.0 * layer / len(self.transformers))

    def _certainty(self, side: Side, layer: int) -> torch.Tensor:
        return self.token_confidence[layer](side.x).float().sigmoid()

    def _wanted(self, side: Side, layer: int) -> torch.Tensor:
        """Which points (B, N) the next layer gets."""
        if self.width_confidence <= 0 or layer == self.last:
            return side.valid
        matchability = self.log_assignment[layer].matchability(side.x)[..., 0].float().sigmoid()
        keep = matchability > 1 - self.width_confidence
        if self.depth_confidence > 0:
            keep |= self._certainty(side, layer) <= self.certainty_threshold(layer)
        few = side.valid.sum(1, keepdim=True) <= self.pruning_min
        return (keep | few) & side.valid

    def _sure(self, a: Side, b: Side, total: torch.Tensor, layer: int) -> torch.Tensor:
        """Which pairs (B,) need no further layer; ``total`` counts their points at the start."""
        if self.depth_confidence <= 0 or layer == self.last:
            return torch.full_like(total, layer == self.last, dtype=torch.bool)
        threshold = self.certainty_threshold(layer)
        unsure = sum((s.valid & ~(self._certainty(s, layer) >= threshold)).sum(1) for s in (a, b))
        return 1.0 - unsure / total > self.depth_confidence

    def _assign(self, a: Side, b: Side, row: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mutual best matches of a pair: indices (K, 2) and confidences (K,)."""
        valid0, valid1 = a.valid[row], b.valid[row]
        x0, x1 = a.x[row][None, valid0], b.x[row][None, valid1]
        similarity, *logits = (t[0] for t in self.log_assignment[layer](x0, x1))
        bias0, bias1 = (F.logsigmoid(logit.float()) for logit in logits)
        # log of (softmax over rows * softmax over columns * both matchabilities)
        by_row = bias0 - similarity.logsumexp(1)
        by_column = bias1 - similarity.logsumexp(0)
        score = similarity.mul_(2).add_(by_row[:, None]).add_(by_column)
        best0, arg0 = score.max(1)
        arg1 = score.argmax(0)
        confidence = best0.exp()
        here = torch.arange(len(arg0), device=arg0.device)
        chosen = ((arg1[arg0] == here) & (confidence > self.filter_threshold)).nonzero()[:, 0]
        index0, index1 = a.index[row][valid0], b.index[row][valid1]
        return torch.stack([index0[chosen], index1[arg0[chosen]]], 1), confidence[chosen]


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
