"""DDIMSampler, the class that Stable Diffusion scripts expect, wraps the functions in `samplers`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.models.diffusion import samplers
from ldm.models.diffusion.samplers import Step


class DDIMSampler:
    """Sampler of latents from a LatentDiffusion model (Song et al. 2021); eta 0 is DDIM, 1 is DDPM."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Mapping,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Mapping | None = None,
        x0: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        generator: torch.Generator | None = None,
        method: str = "ddim",
        progress: Callable = iter,
        verbose: bool = False,
    ) -> tuple[Tensor, dict]:
        """Sample latents (batch_size, *shape) in S steps; also return a dict with the first and last latents.

        With strength < 1 sampling starts from `x0`, noised to that fraction of the steps. Where `mask` is 1,
        the noised `x0` is restored before every step. `progress` wraps the list of steps, for a progress bar.
        `generator` is a CPU generator, so that the noise is the same on every device. Raises ValueError for
        an unknown `method`, and for strength < 1 or a mask without `x0`.
        """
        if method not in samplers.METHODS:
            raise ValueError(f"scheduler must be one of {', '.join(samplers.METHODS)}, not {method!r}")
        if x0 is None and (strength < 1 or mask is not None):
            raise ValueError("strength below 1 and a mask need x0, the latents to start from")
        model, device = self.model, self.model.betas.device

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(device)

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            ts = torch.full((batch_size,), t, device=device)
            eps = self._eps(x, ts, conditioning, unconditional_conditioning, unconditional_guidance_scale)
            return model.predict_start_from_noise(x, ts, eps), eps

        def put_back(x: Tensor, step: Step) -> Tensor:
            if mask is None:
                return x
            known = step.alpha**0.5 * x0 + (1 - step.alpha) ** 0.5 * noise(x)
            return mask * known + (1 - mask) * x

        alphas = model.alphas_cumprod.cpu().double().numpy()
        steps = samplers.make_steps(alphas, S, strength, model.timestep_spacing)
        x = noise(torch.empty(batch_size, *shape)) if x_T is None else x_T
        if strength < 1:
            alpha = steps[0].alpha if steps else 1.0
            x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * x
        options = {"eta": eta} if method == "ddim" else {}
        latents = samplers.METHODS[method](denoise, x, progress(steps), noise, put_back, **options)
        return latents, {"x_inter": [x, latents]}

    def _eps(self, x: Tensor, t: Tensor, cond: Mapping, uncond: Mapping | None, scale: float) -> Tensor:
        """Apply classifier-free guidance (Ho & Salimans 2022, eq. 6), in two calls as hints may differ."""
        output = self.model.apply_model(x, t, cond).float()
        if uncond is not None and scale != 1.0:
            unconditional = self.model.apply_model(x, t, uncond).float()
            output = unconditional + scale * (output - unconditional)
        return self.model.predict_eps_from_v(x, t, output) if self.model.parameterization == "v" else output
