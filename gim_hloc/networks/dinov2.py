"""DINOv2 (Oquab et al., 2023): the vision transformer that gives RoMa its coarse features.

Names of weights are those of Meta's published file ``dinov2_vitl14_pretrain.pth``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 14  # side of a token, px
HEAD = 64  # channels of a head of an attention, in all published sizes
_POSITION_OFFSET = 0.1  # added to the number of tokens when the position table is resized


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> the same."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> the same."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        dim: channels of a token.
        heads: of the attention.
        qkv_bias: whether query, key and value have a bias.
        layer_scale: whether both branches end in a factor per channel.
        eps: of the layer norms.
    """

    def __init__(
        self, dim: int, heads: int, *, qkv_bias: bool, layer_scale: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias=qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, dim) -> the same."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A linear map of every 14 x 14 patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, H / 14 * W / 14, dim), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


def resize_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bring a square table of positions to another grid of tokens, as the published code does.

    The 0.1 that it adds to the wanted size (against rounding) enters the sampling positions, so
    that resizing to a size gives other numbers.

    Args:
        table: (1, n * n, C).
        height: wanted number of token rows.
        width: wanted number of token columns.

    Returns:
        (1, height * width, C); the table itself where it has that size already.
    """
    side = round(table.shape[1] ** 0.5)
    if (height, width) == (side, side):
        return table
    grid = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((height + _POSITION_OFFSET) / side, (width + _POSITION_OFFSET) / side)
    resized = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


class DINOv2(nn.Module):
    """ViT-L/14 (or another size) without registers, up to its last layer norm.

    Args:
        dim: channels of a token.
        depth: number of blocks.
        heads: of each attention.
        side: tokens on a side of the trained position table.
    """

    def __init__(
        self, *, dim: int = 1024, depth: int = 24, heads: int = 16, side: int = 37
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in the file; used in training only
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, layer_scale=True, eps=1e-6) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised patch tokens (B, dim, H / 14, W / 14) of (B, 3, H, W), multiples of 14."""
        height, width = image.shape[-2] // PATCH, image.shape[-1] // PATCH
        x = self.patch_embed(image.to(self.patch_embed.proj.weight.dtype))
        x = x + resize_positions(self.pos_embed[:, 1:], height, width)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first.to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, (height, width))
