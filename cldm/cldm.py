"""ControlNet (Zhang, Rao & Agrawala 2023): a trained copy of the UNet's encoder steers the frozen UNet."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cldm.model import open_control_model
from ldm.data.image import is_finite, to_uint8
from ldm.metrics import psnr, ssim
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion, image_of
from ldm.modules.diffusionmodules.openaimodel import UNetEncoder, UNetModel
from ldm.modules.diffusionmodules.util import zero_module
from ldm.modules.kernels import CastTogether
from ldm.util import instantiate_from_config, log_txt_as_img, make_adamw

WEIGHT_DECAY = 0.01  # of AdamW


class ControlNet(UNetEncoder):
    """UNet encoder that also takes a hint; it returns a feature map for each skip and one for the middle.

    Takes UNetEncoder's arguments and the number of hint channels. The hint is 8 times as high and wide as the
    latents. With `hint_latent_channels` its latent is concatenated to x (DiffBIR, Lin et al. 2024, sec. 3.2).
    """

    def __init__(
        self, *, in_channels: int, hint_channels: int = 3, hint_latent_channels: int = 0, **encoder_arguments
    ):
        super().__init__(in_channels=in_channels + hint_latent_channels, **encoder_arguments)
        self.hint_latent_channels = hint_latent_channels
        if hint_latent_channels:  # these channels have no effect at the start
            nn.init.zeros_(self.input_blocks[0][0].weight[:, in_channels:])
        widths = [hint_channels, 16, 16, 32, 32, 96, 96, 256]
        strides = [1, 1, 2, 1, 2, 1, 2]
        layers: list[nn.Module] = []
        for index, stride in enumerate(strides):
            convolution = nn.Conv2d(widths[index], widths[index + 1], 3, stride=stride, padding=1)
            # torch's default initialisation would shrink the hint, layer by layer, below the biases
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.SiLU()]
        layers.append(zero_module(nn.Conv2d(256, self.model_channels, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)
        self.zero_convs = nn.ModuleList(zero_conv(channels) for channels, _ in self.skips)
        self.middle_block_out = zero_conv(self.skips[-1][0])

    def hint_features(self, hint: Tensor) -> Tensor:
        """Compute the features (b, model_channels, h, w) of a hint (b, hint_channels, 8h, 8w)."""
        return self.run(self.input_hint_block, hint.to(self.time_embed[0].weight.dtype))

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, hint_latent: Tensor | None = None
    ) -> list[Tensor]:
        """Return one tensor for each input block, then one for the middle.

        x (b, 4, h, w), hint (b, hint_channels, 8h, 8w) in [0, 1], timesteps (b,), context (b, m, d);
        hint_latent (b, hint_latent_channels, h, w), scaled like x, if the network has such channels.
        Raises ValueError if the hint does not fit x.
        """
        if hint.shape[-2:] != (8 * x.shape[-2], 8 * x.shape[-1]):
            raise ValueError(f"a hint of {tuple(hint.shape)} does not fit latents of {tuple(x.shape)}")
        if hint_latent is not None:
            x = torch.cat([x, hint_latent.to(x.dtype)], dim=1)
        outputs, middle, _ = self.encode(x, timesteps, context, self.hint_features(hint))
        controls = [convolve(h) for convolve, h in zip(self.zero_convs, outputs, strict=True)]
        return [*controls, self.middle_block_out(middle)]


def zero_conv(channels: int) -> nn.Sequential:
    """Return a 1x1 convolution initialised to zero, so that training starts from the unchanged model."""
    return nn.Sequential(zero_module(nn.Conv2d(channels, channels, 1)))


class ControlledUnetModel(UNetModel):
    """UNet that adds a ControlNet's outputs to its middle and skips; ControlLDM keeps its encoder frozen."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """Run UNetModel.forward with `control` added: one tensor for each input block, then the middle's."""
        skips, h, emb = self.encode(x, timesteps, context)  # builds no graph: it is all frozen
        if control is not None:
            control = [added.to(h.dtype) for added in control]
            h = h + control[-1]
            if not only_mid_control:
                skips = [skip + added for skip, added in zip(skips, control[:-1], strict=True)]
        return self.decode(h, skips, emb, context)


class ControlLDM(LatentDiffusion):
    """Latent diffusion with a ControlNet: batches also hold `hint` (b, 8h, 8w, hint_channels), in [0, 1].

    Only the ControlNet is trained, and the UNet's decoder too if `sd_locked` is set to False.
    `control_scales` are factors of the ControlNet's outputs, the middle's last; None means 1 for all.
    """

    preview_guidance = 9.0  # guidance scale of log_images

    def __init__(
        self, control_stage_config: Mapping, only_mid_control: bool, control_key: str = "hint", **arguments
    ):
        super().__init__(**arguments)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.control_scales: Sequence[float] | None = None
        # set by open_control_model: the training prompt, and the method that filled the holes of hints
        self.prompt, self.coarse_fill = "", "none"
        self.strict_loading = False  # our checkpoints leave out the frozen weights

        # training; the script sets these
        self.learning_rate, self.optimizer = 1e-5, "adamw"
        self.learning_rate_factor: Callable[[int], float] | None = None  # by step; None: always 1
        self.fused_optimizer: bool | None = True
        self.cast_together = False
        self.sd_locked = True
        self.validation_ddim_steps = 20
        self.validation_images: dict[str, Tensor] = {}

    @property
    def sees_hint_latent(self) -> bool:
        """Whether the ControlNet also takes the hint's latent."""
        return self.control_model.hint_latent_channels > 0

    @property
    def sd_locked(self) -> bool:
        """Whether the UNet's decoder is frozen."""
        return self._sd_locked

    @sd_locked.setter
    def sd_locked(self, locked: bool) -> None:
        self._sd_locked = locked
        self.requires_grad_(False)
        self.control_model.requires_grad_(True)
        if not locked:
            self.model.diffusion_model.output_blocks.requires_grad_(True)
            self.model.diffusion_model.out.requires_grad_(True)

    # ---- conditioning and networks

    def hint_of(self, batch: Mapping) -> Tensor:
        """Return the hint (b, c, 8h, 8w) of a batch."""
        return image_of(batch, self.control_key)

    def hint_latent(self, cond: Mapping) -> Tensor:
        """Return cond["c_latent"], or the scaled latent (b, c, h, w) of the RGB hint in cond["c_concat"]."""
        if cond.get("c_latent") is not None:
            return cond["c_latent"]
        hint = torch.cat(list(cond["c_concat"]), dim=1).to(self.device)
        return self.scale_factor * self.encode_first_stage(hint[:, :3] * 2 - 1).mode().float()

    def hint_cond(self, batch: Mapping) -> dict:
        """Return the hint's part of the conditioning; the batch may hold its unscaled latent, `hint_mean`."""
        cond = {"c_concat": [self.hint_of(batch)]}
        if "hint_mean" in batch:
            return {**cond, "c_latent": self.scale_factor * batch["hint_mean"]}
        return {**cond, "c_latent": self.hint_latent(cond) if self.sees_hint_latent else None}

    def get_input(self, batch: Mapping) -> tuple[Tensor, dict]:
        latents, cond = super().get_input(batch)
        return latents, {**cond, **self.hint_cond(batch)}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping) -> Tensor:
        """Return the UNet's output. cond["c_concat"] holds hints (b, c, 8h, 8w); None turns control off."""
        context = torch.cat(cond["c_crossattn"], dim=1)
        control = None
        if cond.get("c_concat") is not None:
            hint = torch.cat(cond["c_concat"], dim=1)
            latent = self.hint_latent(cond) if self.sees_hint_latent else None
            control = self.run_control(x_noisy, hint, t, context, latent)
            if self.control_scales is not None:
                control = [scale * h for scale, h in zip(self.control_scales, control, strict=True)]
        return self.model.diffusion_model(x_noisy, t, context, control, self.only_mid_control)

    def run_control(self, *inputs: Tensor | None) -> list[Tensor]:
        """Return the ControlNet's outputs; with `cast_together` training casts all its weights at once."""
        kind = self.device.type
        if not (self.cast_together and torch.is_grad_enabled() and torch.is_autocast_enabled(kind)):
            return self.control_model(*inputs)
        weights = dict(self.control_model.named_parameters())
        cast = CastTogether.apply(torch.get_autocast_dtype(kind), *weights.values())
        return functional_call(self.control_model, dict(zip(weights, cast, strict=True)), inputs)

    # ---- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trained parameters (ldm.util.make_adamw)."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return make_adamw(trained, self.optimizer, self.learning_rate, WEIGHT_DECAY, self.fused_optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate. It depends only on the step, so no scheduler has to be resumed."""
        if self.learning_rate_factor is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.learning_rate_factor(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep only the trained parameters: the frozen weights are in the base file."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device = "cpu",
        base_path: str | Path | None = None,
    ) -> "ControlLDM":
        """Load a trained model from our checkpoint, a full file, or a ControlNet file with `base_path`.

        See cldm.model.open_control_model. Raises ValueError if the file holds a model of another class.
        """
        model = open_control_model(checkpoint_path, base_path)
        if not isinstance(model, cls):
            raise ValueError(f"{checkpoint_path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model.to(map_location)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        cond: Mapping,
        batch_size: int,
        ddim_steps: int = 50,
        unconditional_guidance_scale: float = 1.0,
        negative_prompt: str = "",
        sampler: DDIMSampler | None = None,
        **sampling,
    ) -> Tensor:
        """Sample latents (batch_size, 4, h, w), to be decoded by decode_first_stage.

        cond["c_concat"] holds hints (b, c, 8h, 8w) in [0, 1], cond["c_crossattn"] prompts or embeddings: one
        for each item or one for all. With a guidance scale other than 1 the unconditional call gets
        `negative_prompt` and the same hint. `sampling` is passed to the sampler's `sample` (eta, method,
        strength, x0, mask, x_T, generator).
        """
        hint = torch.cat([h.to(self.device) for h in cond["c_concat"]], dim=1)
        control = {"c_concat": [hint.expand(batch_size, -1, -1, -1)]}
        if self.sees_hint_latent:
            latent = self.hint_latent({**cond, "c_concat": [hint]}).to(self.device)
            control["c_latent"] = latent.expand(batch_size, -1, -1, -1)

        def embed(prompt: str | Sequence[str] | Tensor) -> Tensor:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            return self.get_learned_conditioning(prompt).expand(batch_size, -1, -1)

        text = torch.cat([embed(prompt) for prompt in cond["c_crossattn"]], dim=1)
        uncond = None
        if unconditional_guidance_scale != 1.0:
            uncond = {**control, "c_crossattn": [embed(negative_prompt)]}
        latents, _ = (sampler or DDIMSampler(self)).sample(
            ddim_steps,
            batch_size,
            self.latent_shape(hint),
            {**control, "c_crossattn": [text]},
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=uncond,
            **sampling,
        )
        return latents

    def latent_shape(self, hint: Tensor) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of one item's latents for hints (b, c, 8h, 8w)."""
        return self.model.diffusion_model.out[-1].out_channels, hint.shape[-2] // 8, hint.shape[-1] // 8

    @torch.no_grad()
    def restore(self, batch: Mapping, ddim_steps: int, guidance_scale: float = 1.0) -> Tensor:
        """Sample images (b, 3, 8h, 8w) in [-1, 1] for a batch's hints and prompts, seeded by each item.

        Raises ValueError if a value is not finite.
        """
        hint = self.hint_of(batch)
        noise = self.noise_of(batch, hint.new_empty(len(hint), *self.latent_shape(hint)), salt=4)
        cond = {**self.hint_cond(batch), "c_crossattn": [batch[self.cond_stage_key]]}
        images = self.decode_first_stage(self.sample(cond, len(hint), ddim_steps, guidance_scale, x_T=noise))
        if not is_finite(images):  # after clamping, an infinity would be a white pixel
            raise ValueError(
                "a sampled image is not finite (NaN or infinity): it overflows in 16 bits (use precision 32 "
                "or bf16), or the weights are damaged"
            )
        return images.clamp(-1, 1)

    @torch.no_grad()
    def log_images(self, batch: Mapping, max_images: int = 4, ddim_steps: int = 20) -> dict[str, Tensor]:
        """Return the training grid's columns (b, 3, 8h, 8w) in [-1, 1]: hint, sample, truth, prompt."""
        batch = {name: value[:max_images] for name, value in batch.items()}
        image = image_of(batch, self.first_stage_key)
        prompts = batch[self.cond_stage_key]
        return {
            "control": self.hint_of(batch)[:, :3] * 2 - 1,
            "sample": self.restore(batch, ddim_steps, self.preview_guidance),
            "truth": image,
            "conditioning": log_txt_as_img(image.shape[:1:-1], prompts).to(image.device),
        }

    def compare(
        self, batch: Mapping, batch_idx: int, restored: str, truth: str
    ) -> tuple[dict[str, Tensor], list[tuple[np.ndarray, np.ndarray]]]:
        """Sample a validation batch and log `val/psnr` and `val/ssim`, means over its images.

        Returns the columns of `log_images`, and pairs of uint8 images from the columns that `restored` and
        `truth` name. Four rows of the first batch's columns are kept for the validation grid.
        """
        images = self.log_images(batch, len(batch[self.first_stage_key]), self.validation_ddim_steps)
        if batch_idx == 0:
            self.validation_images = {name: value[:4] for name, value in images.items()}
        pairs = [(to_uint8(a), to_uint8(b)) for a, b in zip(images[restored], images[truth], strict=True)]
        scores = {
            "val/psnr": float(np.mean([psnr(a, b) for a, b in pairs])),
            "val/ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
        }
        self.log_dict(scores, batch_size=len(pairs), sync_dist=True)
        return images, pairs
