"""Samplers against diffusers' schedulers and exact solutions, with an analytic denoiser."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion import samplers
from ldm.modules.diffusionmodules.util import make_beta_schedule

ALPHAS = np.cumprod(1 - make_beta_schedule(1000, 0.00085, 0.012))
SHAPE = (1, 2, 4, 4)
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def predict_eps(x: torch.Tensor, t: int) -> torch.Tensor:
    """Predict noise with a smooth nonlinear function instead of a network."""
    return torch.sin(1.3 * x + t / 300) * 0.8 + 0.1 * x


def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    eps, alpha = predict_eps(x, t), ALPHAS[t]
    return (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5, eps


def noises(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def ours(method: str, timesteps: list[int], **options) -> torch.Tensor:
    start, *rest = noises(len(timesteps) + 1)
    draws = iter(rest)
    alphas = [*ALPHAS[timesteps].tolist(), float(ALPHAS[0])]
    steps = [samplers.Step(t, alphas[i], alphas[i + 1], t == timesteps[-1]) for i, t in enumerate(timesteps)]
    return samplers.METHODS[method](denoise, start, steps, lambda x: next(draws), **options)


def theirs(scheduler, count: int, monkeypatch) -> torch.Tensor:
    start, *rest = noises(count + 1)
    draws = iter(rest)
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: next(draws), raising=False)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict_eps(seen, int(t)), t, x).prev_sample
    return x


@pytest.mark.parametrize("count", [2, 5, 10, 20])
@pytest.mark.parametrize("method", samplers.METHODS)
def test_samplers_equal_diffusers(method, count, monkeypatch):
    import diffusers

    options = {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, **options),
        "ddpm": lambda: diffusers.DDIMScheduler(**SCHEDULE, **options),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**SCHEDULE),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE),
        "euler_a": lambda: diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE),
    }[method]()
    if method == "ddpm":
        step = scheduler.step
        monkeypatch.setattr(scheduler, "step", lambda *args: step(*args, eta=1.0))
    scheduler.set_timesteps(count)
    timesteps = [int(t) for t in scheduler.timesteps]
    if method == "ddpm":
        assert torch.equal(ours("ddpm", timesteps), ours("ddim", timesteps, eta=1.0))
    if method in ("ddim", "ddpm"):
        assert timesteps == [step.t for step in samplers.make_steps(ALPHAS, count)]
    # diffusers' tables are float32
    assert torch.allclose(
        ours(method, timesteps), theirs(scheduler, count, monkeypatch), rtol=2e-3, atol=2e-3
    )


def test_ddim_with_eta_1_on_every_timestep_is_ddpm():
    """eta = 1 gives the posterior mean and variance of Ho et al. 2020, eq. 7."""
    step = samplers.make_steps(ALPHAS, 1000)[400]
    x = noises(1)[0]
    x0, eps = denoise(x, step.t)
    beta = 1 - step.alpha / step.alpha_next
    mean = step.alpha_next**0.5 * beta / (1 - step.alpha) * x0
    mean = mean + (1 - beta) ** 0.5 * (1 - step.alpha_next) / (1 - step.alpha) * x
    deviation = (beta * (1 - step.alpha_next) / (1 - step.alpha)) ** 0.5
    drawn = samplers.ddim(denoise, x, [step], lambda x: torch.ones_like(x), eta=1.0)
    assert torch.allclose(drawn, mean + deviation)


@pytest.mark.parametrize("method", ["unipc", "dpmpp_2m"])
def test_second_order_methods_are_more_accurate_than_ddim(method):
    """For Gaussian data the exact denoiser and solution are known: x scales with the total deviation."""

    def gaussian(x: torch.Tensor, t: int, variance: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = ALPHAS[t]
        x0 = alpha**0.5 * variance / (alpha * variance + 1 - alpha) * x
        return x0, (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5

    def error(method: str) -> float:
        steps, seen = samplers.make_steps(ALPHAS, 12), []
        samplers.METHODS[method](gaussian, noises(1)[0], steps, None, lambda x, step: seen.append(x) or x)
        first, last = (alpha * 0.1 + 1 - alpha for alpha in (steps[0].alpha, steps[-1].alpha))
        return (seen[-1] - seen[0] * (last / first) ** 0.5).abs().mean().item()

    assert error(method) < 0.6 * error("ddim")


def test_strength_selects_the_last_steps():
    whole = samplers.make_steps(ALPHAS, 20)
    assert samplers.make_steps(ALPHAS, 20, 0.25) == whole[15:]
    assert samplers.make_steps(ALPHAS, 20, 0.0) == []
    with pytest.raises(ValueError, match="1.5"):
        samplers.make_steps(ALPHAS, 20, 1.5)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_no_steps_return_the_input(method):
    x = noises(1)[0]
    assert torch.equal(samplers.METHODS[method](denoise, x, [], None), x)
