"""Samplers: each is one function that walks from noise to an image through a list of steps.

A sampler takes `denoise(x, t) -> (x0, eps)`, the starting latents x (b, c, h, w), the `steps` and `noise(x)`,
which draws standard normal noise; `before(x, step)` may change the latents before each step (inpainting).
They are deterministic but for `noise`, and never clip x0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ldm.modules.diffusionmodules.util import make_ddim_timesteps

Denoise = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Noise = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One step from timestep t, where alpha_bar is `alpha`, to the alpha_bar `alpha_next` of less noise."""

    t: int
    alpha: float
    alpha_next: float


def make_steps(alphas_cumprod: np.ndarray, count: int, strength: float = 1.0) -> list[Step]:
    """The last `strength` part of `count` evenly spaced steps, noisiest first; none if that part is empty.

    Raises ValueError for a strength outside [0, 1] or a count outside 1..len(alphas_cumprod).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, not {strength}")
    timesteps = make_ddim_timesteps(count, len(alphas_cumprod))
    alphas = alphas_cumprod[timesteps].tolist()
    steps = [
        Step(int(t), alpha, alpha_next)
        for t, alpha, alpha_next in zip(
            timesteps, alphas, [float(alphas_cumprod[0]), *alphas[:-1]], strict=True
        )
    ]
    return steps[: round(count * strength)][::-1]


def keep(x: torch.Tensor, step: Step) -> torch.Tensor:
    """The `before` that changes nothing."""
    return x


def ddim(
    denoise: Denoise,
    x: torch.Tensor,
    steps: list[Step],
    noise: Noise,
    before: Callable[[torch.Tensor, Step], torch.Tensor] = keep,
    eta: float = 0.0,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta 1 is ancestral sampling, DDPM on respaced timesteps."""
    for step in steps:
        x = before(x, step)
        x0, eps = denoise(x, step.t)
        a, a_next = step.alpha, step.alpha_next
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next**0.5 * x0 + (1 - a_next - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def ddpm(denoise: Denoise, x: torch.Tensor, steps: list[Step], noise: Noise, before=keep) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020) on respaced timesteps: DDIM with eta 1."""
    return ddim(denoise, x, steps, noise, before, eta=1.0)


METHODS = {"ddim": ddim, "ddpm": ddpm}
