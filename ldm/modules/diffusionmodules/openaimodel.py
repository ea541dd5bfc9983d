"""The UNet of Stable Diffusion 1 and 2 (Ho et al. 2020; Dhariwal & Nichol 2021; Rombach et al. 2022).

`UNetEncoder` is the half that UNetModel and ControlNet share; parameters are named as in the original files.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    GroupNormSiLU,
    Upsample,
    checkpoint,
    timestep_embedding,
    zero_module,
)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added in between, and a residual."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        first = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(GroupNormSiLU(channels), nn.Identity(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_channels),
            nn.Identity(),  # in the originals SiLU has this index
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]  # (b, out_channels, h, w)
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Downsampling by 2 with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class TimestepEmbedSequential(nn.Sequential):
    """Sequence that passes the timestep embedding to ResBlocks and the context to transformers."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """Input and middle blocks, shared by UNetModel and ControlNet.

    `image_size`, `use_fp16` and `legacy` appear in original yaml files and are ignored. Raises ValueError for
    models without text context (`use_spatial_transformer: false`).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        attention_resolutions: Sequence[int],
        num_res_blocks: int,
        context_dim: int,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int = 1,
        use_linear_in_transformer: bool = False,
        use_checkpoint: bool = False,
        dropout: float = 0.0,
        use_spatial_transformer: bool = True,
        image_size: int | None = None,
        use_fp16: bool = False,
        legacy: bool = False,
    ):
        super().__init__()
        if not use_spatial_transformer:
            raise ValueError("only text-conditioned UNets are built here: set use_spatial_transformer: true")
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError("set either num_heads or num_head_channels")
        self.model_channels, self.channel_mult, self.dropout = model_channels, tuple(channel_mult), dropout
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.attention_resolutions, self.context_dim = tuple(attention_resolutions), context_dim
        self.transformer_depth, self.use_linear = transformer_depth, use_linear_in_transformer
        self.use_checkpoint = use_checkpoint

        width = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))
        channels, factor = model_channels, 1
        blocks = [TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))]
        self.skips = [(channels, factor)]  # channels and downsampling factor of each input block's output
        for level, mult in enumerate(channel_mult):
            if level > 0:
                blocks.append(TimestepEmbedSequential(Downsample(channels)))
                factor *= 2
                self.skips.append((channels, factor))
            for _ in range(num_res_blocks):
                blocks.append(TimestepEmbedSequential(*self._layers(channels, mult * model_channels, factor)))
                channels = mult * model_channels
                self.skips.append((channels, factor))
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = TimestepEmbedSequential(
            self._res_block(channels, channels),
            self._attention(channels),
            self._res_block(channels, channels),
        )

    def _res_block(self, channels: int, out_channels: int) -> ResBlock:
        return ResBlock(channels, self.model_channels * 4, out_channels, self.dropout)

    def _attention(self, channels: int) -> SpatialTransformer:
        heads = self.num_heads if self.num_heads != -1 else channels // self.num_head_channels
        return SpatialTransformer(
            channels, heads, channels // heads, self.transformer_depth, self.context_dim, self.use_linear
        )

    def _layers(self, channels: int, out_channels: int, factor: int) -> list[nn.Module]:
        layers: list[nn.Module] = [self._res_block(channels, out_channels)]
        if factor in self.attention_resolutions:
            layers.append(self._attention(out_channels))
        return layers

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Return block(*inputs); with `use_checkpoint` activations are recomputed in the backward pass."""
        return checkpoint(block, *inputs, enabled=self.use_checkpoint)

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor | float = 0.0
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the input blocks' outputs, the middle block's, the time embedding (b, 4 * model_channels).

        x (b, in_channels, h, w) noisy latents; timesteps (b,); context (b, m, context_dim); `hint` is added
        to the first block's output. Raises ValueError if h or w is not divisible by the downsampling factor.
        """
        multiple = self.skips[-1][1]
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            size = " x ".join(str(8 * side) for side in x.shape[-2:])
            raise ValueError(f"image sides must be multiples of {8 * multiple} pixels, not {size}")
        dtype = self.time_embed[0].weight.dtype
        x, context = x.to(dtype), context.to(dtype)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        h, outputs = x, []
        for index, block in enumerate(self.input_blocks):
            h = self.run(block, h, emb, context)
            if index == 0:
                h = h + hint
            outputs.append(h)
        return outputs, self.run(self.middle_block, h, emb, context), emb


class UNetModel(UNetEncoder):
    """UNet that predicts noise (or v) from noisy latents; arguments as UNetEncoder, plus `out_channels`."""

    def __init__(self, *, out_channels: int = 4, **encoder_arguments):
        super().__init__(**encoder_arguments)
        channels, blocks = self.skips[-1][0], []
        following = [*self.skips[-2::-1], (0, 1)]
        for (skip_channels, factor), (_, next_factor) in zip(self.skips[::-1], following, strict=True):
            out = self.model_channels * self.channel_mult[factor.bit_length() - 1]
            layers = self._layers(channels + skip_channels, out, factor)
            if next_factor < factor:
                layers.append(Upsample(out))
            blocks.append(TimestepEmbedSequential(*layers))
            channels = out
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            GroupNormSiLU(channels),
            nn.Identity(),
            zero_module(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def decode(self, h: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
        """Run the output blocks on the middle block's h and the skips; return (b, out_channels, h, w)."""
        context = context.to(emb.dtype)
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = self.run(block, torch.cat([h, skip], dim=1), emb, context)
        return self.out(h)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Map x (b, in_channels, h, w), timesteps (b,), context (b, m, d) to (b, out_channels, h, w)."""
        skips, h, emb = self.encode(x, timesteps, context)
        return self.decode(h, skips, emb, context)
