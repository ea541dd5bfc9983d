"""Samplers: each is one function from noise to clean latents through a list of steps.

A sampler takes `denoise(x, t) -> (x0, eps)`, the starting latents x (b, c, h, w), the `steps` and `noise(x)`,
which returns standard normal noise; `before(x, step)` may change the latents before each step (inpainting).
Samplers are deterministic except for `noise`, and never clip x0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_ddim_timesteps

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """Sampling step from timestep t with alpha_bar `alpha` to the less noisy alpha_bar `alpha_next`."""

    t: int
    alpha: float
    alpha_next: float
    last: bool = False


def make_steps(
    alphas_cumprod: np.ndarray, count: int, strength: float = 1.0, spacing: str = "leading"
) -> list[Step]:
    """Return the last fraction `strength` of `count` evenly spaced steps, noisiest first; it may be empty.

    For `spacing` see make_ddim_timesteps.

    Raises ValueError for a strength outside [0, 1] or a count outside 1..len(alphas_cumprod).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, not {strength}")
    timesteps = make_ddim_timesteps(count, len(alphas_cumprod), spacing)
    alphas = alphas_cumprod[[0, *timesteps]].tolist()
    steps = [Step(int(t), alphas[i + 1], alphas[i], last=i == 0) for i, t in enumerate(timesteps)]
    return steps[: round(count * strength)][::-1]


def keep(x: Tensor, step: Step) -> Tensor:
    """Return x unchanged: the default for `before`."""
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    steps: list[Step],
    noise: Noise,
    before: Callable[[Tensor, Step], Tensor] = keep,
    eta: float = 0.0,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, eq. 12 and 16); eta 1 is ancestral, DDPM on respaced timesteps."""
    for step in steps:
        x = before(x, step)
        x0, eps = denoise(x, step.t)
        sigma = eta * ddim_sigma(step)
        x = step.alpha_next**0.5 * x0 + (1 - step.alpha_next - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def ddpm(denoise: Denoise, x: Tensor, steps: list[Step], noise: Noise, before=keep) -> Tensor:
    """Sample ancestrally (Ho et al. 2020) on respaced timesteps: DDIM with eta 1."""
    return ddim(denoise, x, steps, noise, before, eta=1.0)


def euler_a(denoise: Denoise, x: Tensor, steps: list[Step], noise: Noise, before=keep) -> Tensor:
    """Sample by Euler's method, ancestral, on x / sqrt(alpha_bar) and sigma (Karras et al. 2022, eq. 1)."""
    for step in steps:
        x = before(x, step)
        x0, eps = denoise(x, step.t)
        if step.last:
            return x0
        sigma, sigma_next = sigma_of(step.alpha), sigma_of(step.alpha_next)
        up = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        x = step.alpha_next**0.5 * (x0 + down * eps + up * noise(x))
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, steps: list[Step], noise: Noise, before=keep) -> Tensor:
    """Sample by DPM-Solver++ of order 2, multistep (Lu et al. 2022, algorithm 2); the last step gives x0."""
    last_x0 = last_h = None
    for step in steps:
        x = before(x, step)
        x0, _ = denoise(x, step.t)
        if step.last:
            return x0
        h = half_log_snr(step.alpha_next) - half_log_snr(step.alpha)
        slope = 0 if last_x0 is None else (x0 - last_x0) * (h / last_h)
        x = first_order(x, step, x0 + slope / 2)
        last_x0, last_h = x0, h
    return x


def unipc(denoise: Denoise, x: Tensor, steps: list[Step], noise: Noise, before=keep) -> Tensor:
    """Sample by UniPC of order 2, B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 1 and 2); ends in x0.

    After each call of the network the previous step is corrected, then the next one is predicted.
    """
    history: list[tuple[float, Tensor]] = []  # half log SNR and x0 of the last two points
    start = order = previous = None
    for step in steps:
        x = before(x, step)
        x0, _ = denoise(x, step.t)
        here = half_log_snr(step.alpha)
        if previous is not None:
            x = unipc_correct(start, previous, history[-order:], x0)
        if step.last:
            return x0
        history = [*history[-1:], (here, x0)]
        order, start, previous = len(history), x, step
        x = first_order(x, step, x0)
        if order == 2:
            h = half_log_snr(step.alpha_next) - here
            slope = (x0 - history[0][1]) * (h / (here - history[0][0]))
            x = x + step.alpha_next**0.5 * -math.expm1(-h) * slope / 2
    return x


def unipc_correct(x: Tensor, step: Step, history: list[tuple[float, Tensor]], x0_next: Tensor) -> Tensor:
    """Correct the end of `step` from x, given x0 at its end (Zhao et al. 2023, eq. 3 and theorem 3.1)."""
    here, x0 = history[-1]
    h = half_log_snr(step.alpha_next) - here
    ratios = [(level - here) / h for level, _ in history[:-1]] + [1.0]
    slopes = [(other - x0) / ratio for (_, other), ratio in zip(history, ratios[:-1], strict=False)]
    slopes.append(x0_next - x0)
    phi, right, factorial = math.expm1(-h) / -h - 1, [], 1
    for power in range(1, len(ratios) + 1):
        right.append(phi * factorial / math.expm1(-h))
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    left = np.vander(ratios, increasing=True).T
    weights = [0.5] if len(ratios) == 1 else np.linalg.solve(left, right)
    change = sum(float(weight) * slope for weight, slope in zip(weights, slopes, strict=True))
    return first_order(x, step, x0) - step.alpha_next**0.5 * math.expm1(-h) * change


def first_order(x: Tensor, step: Step, x0: Tensor) -> Tensor:
    """Solve `step` exactly for a constant x0: DDIM in terms of x0 (Lu et al. 2022, eq. 4.1)."""
    ratio = ((1 - step.alpha_next) / (1 - step.alpha)) ** 0.5
    return ratio * x + (step.alpha_next**0.5 - ratio * step.alpha**0.5) * x0


def ddim_sigma(step: Step) -> float:
    """Return the standard deviation of the noise that DDIM adds at eta 1 (Song et al. 2021, eq. 16)."""
    return ((1 - step.alpha_next) / (1 - step.alpha) * (1 - step.alpha / step.alpha_next)) ** 0.5


def sigma_of(alpha: float) -> float:
    """Return the noise level relative to the signal, sqrt((1 - alpha_bar) / alpha_bar)."""
    return ((1 - alpha) / alpha) ** 0.5


def half_log_snr(alpha: float) -> float:
    """Return half the logarithm of the signal-to-noise ratio, called lambda in the papers."""
    return -math.log(sigma_of(alpha))


METHODS = {"ddim": ddim, "ddpm": ddpm, "unipc": unipc, "dpmpp_2m": dpmpp_2m, "euler_a": euler_a}
