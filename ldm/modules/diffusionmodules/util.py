"""Parts shared by the diffusion networks: schedules, embeddings, norms, activation checkpointing."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.kernels import SiLUChannelsLast


def make_beta_schedule(n_timestep: int, linear_start: float, linear_end: float) -> np.ndarray:
    """Return float64 betas (n_timestep,), linear in sqrt(beta): the schedule of Stable Diffusion."""
    return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2


def make_ddim_timesteps(
    num_ddim_timesteps: int, num_ddpm_timesteps: int = 1000, spacing: str = "leading"
) -> np.ndarray:
    """Return exactly `num_ddim_timesteps` ascending, evenly spaced int64 timesteps.

    They are shifted up by one as in the original sampler (1, 51, ..., 951 for 20 of 1000), except when every
    timestep is used. With `spacing` "trailing" they end at the noisiest (49, ..., 999), where sampling should
    start if steps are few (Lin et al. 2024, "Common Diffusion Noise Schedules ...", sec. 3.3).
    Raises ValueError for a number outside 1..num_ddpm_timesteps.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(f"sampling steps must lie in 1..{num_ddpm_timesteps}, not {num_ddim_timesteps}")
    if spacing == "trailing":
        return np.arange(1, num_ddim_timesteps + 1) * num_ddpm_timesteps // num_ddim_timesteps - 1
    steps = np.arange(num_ddim_timesteps) * num_ddpm_timesteps // num_ddim_timesteps
    return steps + (num_ddim_timesteps < num_ddpm_timesteps)


def extract_into_tensor(values: Tensor, timesteps: Tensor, ndim: int) -> Tensor:
    """Return values[timesteps] with trailing axes of size 1, to multiply an `ndim`-dimensional batch."""
    return values[timesteps].reshape(-1, *(1,) * (ndim - 1))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Embed `timesteps` (b,) as sinusoids, cosines first: float32 (b, dim)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm that keeps the input's dtype under autocast; statistics are float32 inside.

    32 groups as in all released models; widths that are no multiple of 32 get groups of four channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels // 4 if channels % 32 else 32, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.normalized(x)
        # CUDA's kernel returns NCHW, which the next convolution would convert, forward and backward
        return h.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else h

    def normalized(self, x: Tensor) -> Tensor:
        """Return the normalised input in the memory layout that the kernel returns."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class GroupNormSiLU(GroupNorm32):
    """GroupNorm32, then SiLU, which restores the input's memory layout in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.normalized(x)
        if not is_channels_last(x):
            return F.silu(h)
        if is_channels_last(h) or torch.compiler.is_compiling():  # a compiler fuses the copy itself
            return F.silu(h).contiguous(memory_format=torch.channels_last)
        return SiLUChannelsLast.apply(h)


def is_channels_last(x: Tensor) -> bool:
    """Return True if x is (b, c, h, w) in the channels_last memory format."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


class LayerNorm32(nn.LayerNorm):
    """LayerNorm that keeps the input's dtype under autocast; statistics are float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Upsample(nn.Module):
    """Upsampling by 2 with nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # autocast would use float32
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpoint(module: nn.Module, *inputs: Tensor | None, enabled: bool) -> Tensor:
    """Return module(*inputs); if `enabled`, activations are recomputed in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return torch_checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)
