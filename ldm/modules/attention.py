"""Transformer blocks of the UNet (Rombach et al. 2022, sec. 3.3), and rotary position embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import GroupNorm32, LayerNorm32, zero_module
from ldm.modules.kernels import GatedGELU


class CrossAttention(nn.Module):
    """Multi-head attention of x (b, n, query_dim) to context (b, m, context_dim), or to itself."""

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64):
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None and x.numel() > 3 * self.to_q.weight.numel():  # many tokens: read them once
            weights = [layer.weight for layer in (self.to_q, self.to_k, self.to_v)]
            projections = F.linear(x, torch.cat(weights)).chunk(3, dim=-1)
        else:
            context = x if context is None else context
            projections = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # (b, heads, n, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (b, n, heads * d)
        return self.to_out(h)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if torch.compiler.is_compiling():
            x, gate = x.chunk(2, dim=-1)
            return x * F.gelu(gate)
        return GatedGELU.apply(x)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then a linear layer back to it."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1 = LayerNorm32(dim)
        self.norm2 = LayerNorm32(dim)
        self.norm3 = LayerNorm32(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map x (b, c, h, w), with context (b, m, context_dim)."""

    def __init__(
        self, channels: int, heads: int, dim_head: int, depth: int, context_dim: int, use_linear: bool = False
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.use_linear = use_linear
        self.norm = GroupNorm32(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner_dim) if use_linear else nn.Conv2d(channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, heads, dim_head, context_dim) for _ in range(depth)
        )
        last = nn.Linear(inner_dim, channels) if use_linear else nn.Conv2d(inner_dim, channels, 1)
        self.proj_out = zero_module(last)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.use_linear else tokens(self.proj_in(h))  # (b, h * w, inner_dim)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h if self.use_linear else feature_map(h, size))
        return x + (feature_map(h, size) if self.use_linear else h)


def tokens(x: Tensor) -> Tensor:
    """Reshape (b, c, h, w) to (b, h * w, c), contiguous if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def feature_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Reshape (b, h * w, c) to (b, c, h, w), channels_last."""
    return x.transpose(1, 2).unflatten(2, size)


def rotary_embedding(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """Compute the rotary position embeddings (Su et al. 2021) for kernels.Rotate, float32.

    ids (b, n, axes) -> cosines (b, 1, n, d), each twice in a row, and sines (b, 1, n, d / 2).
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim
        angles.append(ids[..., axis, None].float() * theta**-powers)
    angles = torch.cat(angles, dim=-1)[:, None]
    return angles.cos().repeat_interleave(2, dim=-1), angles.sin()
