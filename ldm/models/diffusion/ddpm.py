"""Latent diffusion (Ho et al. 2020; Rombach et al. 2022): schedule, forward process, training losses."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.stream import item_generator
from ldm.models.autoencoder import DiagonalGaussianDistribution
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.util import instantiate_from_config

# Arguments of original yaml files that are ignored here.
UNUSED = {
    *("channels", "cond_stage_trainable", "conditioning_key", "image_size"),
    *("log_every_t", "monitor", "num_timesteps_cond", "use_ema"),
}
REMEMBERED_PROMPTS = 256
Loss = tuple[Tensor, dict[str, Tensor]]  # the loss, and its parts by name for the logs


class DiffusionWrapper(nn.Module):
    """Container that gives the UNet its name in checkpoint files: `model.diffusion_model`."""

    def __init__(self, unet_config: Mapping):
        super().__init__()
        self.diffusion_model = instantiate_from_config(unet_config)


class LatentDiffusion(pl.LightningModule):
    """UNet that denoises the latents of a frozen autoencoder, guided by a frozen text tower.

    Batches are dict(jpg, txt, ...): images (b, h, w, 3) float in [-1, 1] and a list of prompts; an optional
    `seed` (b,) makes all random choices of an item repeatable. `parameterization` is the UNet's output,
    "eps" or "v" (Salimans & Ho 2022). Without `cond_stage_config` prompts must be embeddings.
    `timestep_spacing` places the sampling steps, "leading" or "trailing" (see make_ddim_timesteps).
    Raises ValueError for other values of these strings, and TypeError for unknown arguments.
    """

    def __init__(
        self,
        unet_config: Mapping,
        first_stage_config: Mapping,
        cond_stage_config: Mapping | None,
        timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        parameterization: str = "eps",
        scale_factor: float = 0.18215,
        first_stage_key: str = "jpg",
        cond_stage_key: str = "txt",
        timestep_spacing: str = "leading",
        **unused,
    ):
        super().__init__()
        if set(unused) - UNUSED:
            raise TypeError(f"unknown arguments: {', '.join(sorted(set(unused) - UNUSED))}")
        if parameterization not in ("eps", "v"):
            raise ValueError(f"parameterization must be 'eps' or 'v', not {parameterization!r}")
        if timestep_spacing not in ("leading", "trailing"):
            raise ValueError(f"timestep_spacing must be 'leading' or 'trailing', not {timestep_spacing!r}")
        self.parameterization = parameterization
        self.scale_factor = scale_factor
        self.num_timesteps = timesteps
        self.timestep_spacing = timestep_spacing
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.register_schedule(timesteps, linear_start, linear_end)
        self.model = DiffusionWrapper(unet_config)
        self.first_stage_model = instantiate_from_config(first_stage_config).requires_grad_(False).eval()
        self.cond_stage_model = instantiate_from_config(cond_stage_config) if cond_stage_config else None
        self._embeddings: dict[str, Tensor] = {}
        self.train_values: dict[str, Tensor] = {}  # losses of the last training step

    def register_schedule(self, timesteps: int, linear_start: float, linear_end: float) -> None:
        """Compute the schedule's tables in float64 and keep them as float32 buffers (timesteps,).

        The posterior tables and `logvar` are unused here, but the original files contain them.
        """
        betas = make_beta_schedule(timesteps, linear_start, linear_end)
        alphas = 1.0 - betas
        bar = np.cumprod(alphas)
        bar_prev = np.append(1.0, bar[:-1])
        posterior_variance = betas * (1 - bar_prev) / (1 - bar)  # Ho et al. 2020, eq. 7
        tables = {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": bar_prev,
            "sqrt_alphas_cumprod": np.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
            "log_one_minus_alphas_cumprod": np.log(1 - bar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(bar_prev) / (1 - bar),
            "posterior_mean_coef2": (1 - bar_prev) * np.sqrt(alphas) / (1 - bar),
            "logvar": np.zeros(timesteps),
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Set training mode for everything but the frozen autoencoder and text tower."""
        super().train(mode)
        for frozen in (self.first_stage_model, self.cond_stage_model):
            if frozen is not None:
                frozen.eval()
        return self

    # ---- pixels, latents, texts

    def _autoencoder_precision(self) -> AbstractContextManager:
        """Return the autoencoder's autocast context: its weights' dtype, as float16 overflows."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            in_bf16 = self.first_stage_model.decoder.conv_in.weight.dtype == torch.bfloat16
            return torch.autocast(kind, torch.bfloat16, enabled=in_bf16)
        return nullcontext()

    @torch.no_grad()
    def encode_first_stage(self, image: Tensor) -> DiagonalGaussianDistribution:
        """Encode an image (b, 3, h, w) in [-1, 1] to an unscaled latent distribution (b, 4, h / 8, w / 8)."""
        with self._autoencoder_precision():
            return self.first_stage_model.encode(image)

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution, noise: Tensor | None = None
    ) -> Tensor:
        """Sample a latent, scaled to unit variance, from the standard normal `noise` if given."""
        return self.scale_factor * posterior.sample(noise).float()

    def decode_first_stage(self, latent: Tensor) -> Tensor:
        """Decode a scaled latent (b, 4, h, w) to an image (b, 3, 8h, 8w) near [-1, 1], with gradients."""
        with self._autoencoder_precision():
            return self.first_stage_model.decode(latent.float() / self.scale_factor)

    @torch.no_grad()
    def get_learned_conditioning(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Encode prompts to embeddings (b, 77, d), each distinct one once; embeddings pass through unchanged.

        Raises ValueError for prompts given to a model without a text tower.
        """
        if isinstance(prompts, Tensor):
            return prompts.to(self.device)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if new and self.cond_stage_model is None:
            raise ValueError(f"this model has no text tower: pass embeddings instead of {new}")
        if new:
            if len(self._embeddings) + len(new) > REMEMBERED_PROMPTS:
                self._embeddings.clear()
                new = list(dict.fromkeys(prompts))
            with torch.autocast(self.device.type, enabled=False):
                embeddings = self.cond_stage_model.encode(new)
            self._embeddings.update(zip(new, embeddings, strict=True))
        for prompt in set(prompts):
            self._embeddings[prompt] = self._embeddings[prompt].to(self.device)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    # ---- forward process and predictions

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute noisy latents at timesteps t (b,) (Ho et al. 2020, eq. 4)."""
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.ndim)
        deviation = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.ndim)
        return signal * x_start + deviation * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity sqrt(abar) noise - sqrt(1 - abar) x (Salimans & Ho 2022, sec. 4)."""
        return self.q_sample(noise, t, -x)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute clean latents from noisy latents and their noise."""
        recip = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.ndim)
        return recip * x_t - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.ndim) * noise

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute clean latents from noisy latents and their velocity."""
        return self.q_sample(x_t, t, -v)

    def predict_eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute the noise from noisy latents and their velocity."""
        return self.q_sample(v, t, x_t)

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Compute clean latents from noisy latents and the UNet's output."""
        if self.parameterization == "v":
            return self.predict_start_from_v(x_t, t, output)
        return self.predict_start_from_noise(x_t, t, output)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping) -> Tensor:
        """Run the UNet on noisy latents (b, 4, h, w); cond["c_crossattn"] is a list of embeddings."""
        return self.model.diffusion_model(x_noisy, t, torch.cat(cond["c_crossattn"], dim=1))

    # ---- training

    def get_input(self, batch: Mapping) -> tuple[Tensor, dict]:
        """Return scaled latents (b, 4, h, w) and conditioning of a batch of images or encoded `moments`."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"])
        else:
            posterior = self.encode_first_stage(image_of(batch, self.first_stage_key))
        noise = self.noise_of(batch, posterior.mean, salt=0)
        cond = {"c_crossattn": [self.get_learned_conditioning(batch[self.cond_stage_key])]}
        return self.get_first_stage_encoding(posterior, noise), cond

    def noise_of(self, batch: Mapping, like: Tensor, salt: int) -> Tensor:
        """Return standard normal noise shaped like `like`: stored in the batch, or from its `seed` if any."""
        if f"noise_{salt}" in batch:
            return batch[f"noise_{salt}"]
        if "seed" not in batch:
            return torch.randn_like(like, dtype=torch.float32)
        generators = [item_generator(int(seed) + salt) for seed in batch["seed"]]
        samples = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(samples).to(like.device)

    def timesteps_of(self, batch: Mapping, count: int) -> Tensor:
        """Return uniform timesteps (count,): stored in the batch, or from its `seed` if any."""
        if "timestep" in batch:
            return batch["timestep"]
        if "seed" not in batch:
            return torch.randint(0, self.num_timesteps, (count,), device=self.device)
        generators = [item_generator(int(seed) + 2) for seed in batch["seed"]]
        samples = [torch.randint(0, self.num_timesteps, (), generator=generator) for generator in generators]
        return torch.stack(samples).to(self.device)

    def shared_step(self, batch: Mapping) -> Loss:
        """Return the loss of a batch, and its parts by name."""
        x_start, cond = self.get_input(batch)
        t = self.timesteps_of(batch, len(x_start))
        return self.p_losses(x_start, cond, t, self.noise_of(batch, x_start, salt=1), batch)

    def p_losses(
        self, x_start: Tensor, cond: Mapping, t: Tensor, noise: Tensor, batch: Mapping | None = None
    ) -> Loss:
        """Return the loss of latents at timesteps t (b,), with the `extra_losses` of `batch` if given."""
        x_noisy = self.q_sample(x_start, t, noise)
        output = self.apply_model(x_noisy, t, cond)
        loss = self.diffusion_loss(output, x_start, t, noise)
        values = {"loss_simple": loss}
        if batch is not None:
            extra, parts = self.extra_losses(batch, x_noisy, t, output)
            if parts:
                loss = loss + extra
                values |= parts
        return loss, {**values, "loss": loss}

    def diffusion_loss(self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the mean squared error of the UNet's output (Ho et al. 2020, eq. 14)."""
        target = self.get_v(x_start, noise, t) if self.parameterization == "v" else noise
        return F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3)).mean()

    def extra_losses(
        self, batch: Mapping, x_noisy: Tensor, t: Tensor, output: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the weighted sum of a subclass's additional losses, and its parts by name."""
        return 0.0, {}

    def transfer_batch_to_device(self, batch: Mapping, device: torch.device, index: int) -> dict:
        """Move everything but the seeds, which only the CPU reads."""
        moved = super().transfer_batch_to_device(batch, device, index)
        if "seed" in batch:
            moved["seed"] = batch["seed"]
        return moved

    def training_step(self, batch: Mapping, batch_idx: int) -> Tensor:
        loss, values = self.shared_step(batch)
        self.train_values = {name: value.detach() for name, value in values.items()}
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        loss, _ = self.shared_step(batch)
        values = {"val/loss": loss, "step": float(self.global_step)}
        self.log_dict(values, batch_size=len(batch[self.cond_stage_key]), sync_dist=True)


def image_of(batch: Mapping, key: str) -> Tensor:
    """Return batch[key] (b, h, w, c) as (b, c, h, w), a channels_last view."""
    return batch[key].permute(0, 3, 1, 2)
