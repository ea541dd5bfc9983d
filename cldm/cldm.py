"""ControlNet (Zhang, Rao & Agrawala 2023): a trained copy of the UNet's encoder steers the frozen UNet."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion, image_of
from ldm.modules.diffusionmodules.openaimodel import UNetEncoder, UNetModel
from ldm.modules.diffusionmodules.util import zero_module
from ldm.util import instantiate_from_config


class ControlNet(UNetEncoder):
    """UNet encoder that also sees a hint, and gives one feature map for each skip and one for the middle.

    Arguments as UNetEncoder, plus the number of the hint's channels. The hint is 8 times the latents' size.
    """

    def __init__(self, *, hint_channels: int = 3, **encoder_arguments):
        super().__init__(**encoder_arguments)
        widths = [hint_channels, 16, 16, 32, 32, 96, 96, 256]
        strides = [1, 1, 2, 1, 2, 1, 2]
        layers = []
        for index, stride in enumerate(strides):
            layers += [nn.Conv2d(widths[index], widths[index + 1], 3, stride=stride, padding=1), nn.SiLU()]
        layers.append(zero_module(nn.Conv2d(256, self.model_channels, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)
        self.zero_convs = nn.ModuleList(zero_conv(channels) for channels, _ in self.skips)
        self.middle_block_out = zero_conv(self.skips[-1][0])

    def hint_features(self, hint: torch.Tensor) -> torch.Tensor:
        """Hint (b, hint_channels, 8h, 8w) -> features (b, model_channels, h, w)."""
        return self.run(self.input_hint_block, hint.to(self.time_embed[0].weight.dtype))

    def forward(
        self, x: torch.Tensor, hint: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor
    ) -> list[torch.Tensor]:
        """x (b, 4, h, w), hint (b, hint_channels, 8h, 8w) in [0, 1], timesteps (b,), context (b, m, d).

        Raises ValueError if the hint does not fit x.
        """
        if hint.shape[-2:] != (8 * x.shape[-2], 8 * x.shape[-1]):
            raise ValueError(f"a hint of {tuple(hint.shape)} does not fit latents of {tuple(x.shape)}")
        outputs, middle, _ = self.encode(x, timesteps, context, self.hint_features(hint))
        controls = [convolve(h) for convolve, h in zip(self.zero_convs, outputs, strict=True)]
        return [*controls, self.middle_block_out(middle)]


def zero_conv(channels: int) -> nn.Sequential:
    """1x1 convolution that starts as zero: training begins from the unchanged model."""
    return nn.Sequential(zero_module(nn.Conv2d(channels, channels, 1)))


class ControlledUnetModel(UNetModel):
    """UNet whose middle and skips take what a ControlNet adds; its encoder is never trained."""

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        control: Sequence[torch.Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> torch.Tensor:
        """As UNetModel's, plus `control`: one tensor for each input block, then one for the middle."""
        with torch.no_grad():
            skips, h, emb = self.encode(x, timesteps, context)
        if control is not None:
            h = h + control[-1]
            if not only_mid_control:
                skips = [skip + added for skip, added in zip(skips, control[:-1], strict=True)]
        return self.decode(h, skips, emb, context)


class ControlLDM(LatentDiffusion):
    """Latent diffusion with a ControlNet: batches also hold `hint` (b, 8h, 8w, hint_channels), in [0, 1].

    Only the ControlNet is trained, and the UNet's decoder too if `sd_locked` is set to False.
    `control_scales` weighs the ControlNet's outputs, the middle's last; None leaves them as they are.
    """

    def __init__(
        self, control_stage_config: Mapping, only_mid_control: bool, control_key: str = "hint", **arguments
    ):
        super().__init__(**arguments)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key, self.only_mid_control = control_key, only_mid_control
        self.control_scales: Sequence[float] | None = None
        self.learning_rate = 1e-5
        self.sd_locked = True

    @property
    def sd_locked(self) -> bool:
        """Whether the UNet's decoder keeps its weights."""
        return self._sd_locked

    @sd_locked.setter
    def sd_locked(self, locked: bool) -> None:
        self._sd_locked = locked
        self.requires_grad_(False)
        for module in self.trained_modules():
            module.requires_grad_(True)

    def trained_modules(self) -> list[nn.Module]:
        """The parts that the optimizer changes."""
        unet = self.model.diffusion_model
        return [self.control_model] + ([] if self.sd_locked else [unet.output_blocks, unet.out])

    def guess_mode_scales(self, strength: float = 1.0) -> list[float]:
        """Weights that fade the control towards the finest level: strength * 0.825^(n - 1 - i)."""
        count = len(self.control_model.zero_convs) + 1
        return [strength * 0.825 ** (count - 1 - i) for i in range(count)]

    def hint_of(self, batch: Mapping) -> torch.Tensor:
        """The hint (b, c, 8h, 8w) of a batch."""
        return image_of(batch, self.control_key)

    def get_input(self, batch: Mapping) -> tuple[torch.Tensor, dict]:
        latents, cond = super().get_input(batch)
        return latents, {**cond, "c_concat": [self.hint_of(batch)]}

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Mapping) -> torch.Tensor:
        """The UNet's output; cond["c_concat"] holds hints (b, c, 8h, 8w) and may be None: no control then."""
        context = torch.cat(cond["c_crossattn"], dim=1)
        control = None
        if cond.get("c_concat") is not None:
            control = self.control_model(x_noisy, torch.cat(cond["c_concat"], dim=1), t, context)
            if self.control_scales is not None:
                control = [scale * h for scale, h in zip(self.control_scales, control, strict=True)]
        return self.model.diffusion_model(x_noisy, t, context, control, self.only_mid_control)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for module in self.trained_modules() for p in module.parameters()]
        return torch.optim.AdamW(parameters, lr=self.learning_rate, fused=True)

    @torch.no_grad()
    def sample_log(
        self, cond: Mapping, batch_size: int, ddim_steps: int = 50, eta: float = 0.0, **sampling
    ) -> torch.Tensor:
        """Latents (batch_size, 4, h, w) of the hint's size; `sampling` as DDIMSampler.sample's."""
        height, width = cond["c_concat"][0].shape[-2:]
        shape = (self.model.diffusion_model.out[-1].out_channels, height // 8, width // 8)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, eta=eta, **sampling)[0]
