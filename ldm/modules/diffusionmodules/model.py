"""Encoder and decoder of the KL autoencoder of Stable Diffusion and FLUX (Rombach et al. 2022, sec. 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import feature_map, tokens
from ldm.modules.diffusionmodules.util import GroupNorm32, GroupNormSiLU, Upsample, checkpoint


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = GroupNormSiLU(channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm32(channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        projected = (tokens(project(h)) for project in (self.q, self.k, self.v))
        q, k, v = (x.contiguous()[:, None] for x in projected)  # (b, 1, h * w, c) for fused attention
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(feature_map(h, x.shape[-2:]))


class Downsample(nn.Module):
    """Downsampling by 2 with a strided convolution, padded at the bottom and right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, followed by `downsample` or `upsample` if the size changes."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int):
        super().__init__()
        widths = [channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels) for width in widths)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


@dataclass
class Sizes:
    """Arguments of Encoder and Decoder, as in yaml files; `resolution` and `dropout` are ignored.

    Raises ValueError for `attn_resolutions`, which neither Stable Diffusion nor FLUX uses.
    """

    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = True
    attn_resolutions: Sequence[int] = ()
    resolution: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        if self.attn_resolutions:
            raise ValueError(f"attn_resolutions must be empty, not {list(self.attn_resolutions)}")


class Encoder(nn.Module):
    """Image (b, in_channels, h, w) in [-1, 1] -> moments (b, 2 * z_channels, h / f, w / f), f = 2^(levels-1).

    The arguments are those of Sizes.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        sizes = Sizes(**arguments)
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        widths = [sizes.ch * mult for mult in (1, *sizes.ch_mult)]
        self.down = nn.ModuleList()
        for index, out_channels in enumerate(widths[1:]):
            level = Level(widths[index], out_channels, sizes.num_res_blocks)
            if index < len(sizes.ch_mult) - 1:
                level.downsample = Downsample(out_channels)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNormSiLU(widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels * (1 + sizes.double_z), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Latent (b, z_channels, h, w) -> image (b, out_ch, f * h, f * w) near [-1, 1]; arguments as Encoder's.

    With `use_checkpoint` the blocks' activations are recomputed in the backward pass.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        sizes, self.use_checkpoint = Sizes(**arguments), False
        widths = [sizes.ch * mult for mult in (*sizes.ch_mult, sizes.ch_mult[-1])]
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the finest level, and runs last
        for index in range(len(sizes.ch_mult)):
            level = Level(widths[index + 1], widths[index], sizes.num_res_blocks + 1)
            if index > 0:
                level.upsample = Upsample(widths[index])
            self.up.append(level)
        self.norm_out = GroupNormSiLU(widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], sizes.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self._run(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = self._run(block, h)
            if hasattr(level, "upsample"):
                h = self._run(level.upsample, h)
        return self.conv_out(self.norm_out(h))

    def _run(self, block: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(block, h, enabled=self.use_checkpoint)
