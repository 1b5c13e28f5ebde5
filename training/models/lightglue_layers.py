"""LightGlue to be trained: one module per published weight.

``gim_hloc.networks.lightglue`` folds weights together for speed and cannot be trained back into
the published layout. Here every weight has its published name, and the states after all layers come
out, which the losses of the layers need.

Letters: R images of a padded batch, first images before second ones; N keypoints, D channels,
H heads, E = D / H.

Source: Lindenberger et al., "LightGlue", ICCV 2023; layout of ``matchers.md`` §2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Positions(nn.Module):
    """Learned frequencies: positions become rotations of pairs of channels."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.Wr = nn.Linear(2, head_dim // 2, bias=False)
        nn.init.normal_(self.Wr.weight)

    def forward(self, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each (R, 1, N, E), of positions (R, N, 2)."""
        with torch.autocast(normal.device.type, enabled=False):
            angle = F.linear(normal.to(self.Wr.weight), self.Wr.weight)[:, None]
            return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
    )


def _turn(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (0, 1), (2, 3), … of the last axis."""
    a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
    return (t * cos + torch.stack([-b, a], -1).flatten(-2) * sin).to(t.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ffn = _feed_forward(dim)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # The published rows: head, channel, (query, key, value).
        q, k, v = self.Wqkv(x).unflatten(-1, (self.heads, -1, 3)).transpose(1, 2).unbind(-1)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        message = self.out_proj(context.transpose(1, 2).flatten(2))
        return x + self.ffn(torch.cat([x, message], -1))


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qk = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.ffn = _feed_forward(dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        qk, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_qk, self.to_v)
        )
        half = len(x) // 2  # the other image of a pair is half the batch away
        context = F.scaled_dot_product_attention(
            qk, qk.roll(half, 0), v.roll(half, 0), attn_mask=mask
        )
        message = self.to_out(context.transpose(1, 2).flatten(2))
        return x + self.ffn(torch.cat([x, message], -1))


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(dim, heads)
        self.cross_attn = _CrossAttention(dim, heads)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        own: torch.Tensor | None,
        other: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.cross_attn(self.self_attn(x, cos, sin, own), other)


class _Assignment(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.matchability = nn.Linear(dim, 1)
        self.final_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarities (B, M, N) of pairs and logits (R, N) of being matchable."""
        projected = self.final_proj(x)
        # Similarities of some tens lose what tells them apart in half precision.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(projected.dtype, torch.float32)
            first, second = (projected.to(wide) * x.shape[-1] ** -0.25).chunk(2)
            similarity = first @ second.transpose(1, 2)
        return similarity, self.matchability(x)[..., 0]


class _Certainty(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(dim, 1), nn.Sigmoid())

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, N); no gradient flows into x."""
        found: torch.Tensor = self.token[0](x.detach())[..., 0]
        return found


class TrainableLightGlue(nn.Module):
    """LightGlue with the published names of weights.

    Args:
        input_dim: channels of the descriptors.
        dim: channels inside, a multiple of twice the heads.
        heads: attention heads.
        layers: pairs of self and cross attention.
    """

    def __init__(self, *, input_dim: int, dim: int = 256, heads: int = 4, layers: int = 9) -> None:
        super().__init__()
        self.sizes = {"input_dim": input_dim, "dim": dim, "heads": heads, "layers": layers}
        self.input_proj = nn.Linear(input_dim, dim) if input_dim != dim else nn.Identity()
        self.posenc = _Positions(dim // heads)
        self.transformers = nn.ModuleList([_Layer(dim, heads) for _ in range(layers)])
        self.log_assignment = nn.ModuleList([_Assignment(dim) for _ in range(layers)])
        self.token_confidence = nn.ModuleList([_Certainty(dim) for _ in range(layers - 1)])

    def forward(
        self,
        xy: torch.Tensor,
        size: tuple[int, int],
        descriptors: torch.Tensor,
        valid: torch.Tensor,
        *,
        recompute: bool = False,
    ) -> list[torch.Tensor]:
        """States (2B, N, D) after each layer.

        Args:
            xy: (2B, N, 2) keypoints in network pixels, first images of all pairs first.
            size: (width, height) of the images in pixels.
            descriptors: (2B, N, input_dim).
            valid: (2B, N) bool, False where a row is padding. States of padding mean nothing.
            recompute: keep the states between layers only, and compute the rest again for the
                gradient: less memory, a third more time.
        """
        extent = xy.new_tensor(size)
        cos, sin = self.posenc((xy - extent / 2) / (extent.max() / 2))
        own = other = None
        if not bool(valid.all()):
            # An image without keypoints attends to its first row of padding: anything but NaN.
            first = torch.arange(valid.shape[1], device=valid.device) == 0
            attended = valid | (~valid.any(1, keepdim=True) & first)
            own = attended[:, None, None]
            other = attended.roll(len(valid) // 2, 0)[:, None, None]
        x = self.input_proj(descriptors)
        # Sums over all layers stay in full precision under autocast.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        states = []
        for layer in self.transformers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, own, other, use_reentrant=False)
            else:
                x = layer(x, cos, sin, own, other)
            states.append(x)
        return states
