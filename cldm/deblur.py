"""ControlNet that deblurs: the diffusion loss plus losses on the image that each prediction stands for."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cldm.cldm import ControlLDM, ControlNet
from cldm.logger import compared
from cldm.model import CONTROL, FIRST, widen_input, with_hint_latent
from ldm.data.image import to_uint8
from ldm.data.stream import item_generator
from ldm.metrics import psnr
from ldm.models.diffusion.ddpm import Loss, image_of
from ldm.modules.perceptual import PerceptualLoss

GRADIENT_WEIGHT = 0.1


class DeblurControlNet(ControlLDM):
    """ControlLDM whose hint is the blurry image; its loss is

    diffusion_loss + deblur_loss_weight * (l1 + mse + perceptual_loss_weight * perceptual + 0.1 * gradient).

    The four pixel losses compare the sharp image with x0, which follows from the noise prediction, decoded by
    the frozen autoencoder with gradients. Decoding is dear: only an aligned crop of `deblur_crop` latents a
    side is decoded (0 = all), its activations recomputed in the backward pass. At high noise x0 means
    little: each item's losses are weighted by its alpha_bar unless `weight_by_alpha_bar` is off.
    A term of weight 0 is not computed. With `deblur_every` N they belong to every Nth optimizer step, N times
    as heavy: the gradient's mean stays, and most of the cost goes. Perceptual is the distance in VGG-19
    features, whose weights are no part of the state dict; gradient is the L1 distance of horizontal and
    vertical differences.
    """

    def __init__(
        self,
        deblur_loss_weight: float = 1.0,
        perceptual_loss_weight: float = 0.1,
        deblur_crop: int = 32,
        weight_by_alpha_bar: bool = True,
        deblur_every: int = 1,
        **arguments,
    ):
        super().__init__(**arguments)
        self.deblur_loss_weight, self.perceptual_loss_weight = deblur_loss_weight, perceptual_loss_weight
        self.deblur_crop, self.weight_by_alpha_bar = deblur_crop, weight_by_alpha_bar
        self.deblur_every = deblur_every
        self.first_stage_model.decoder.use_checkpoint = True
        self._perceptual: list[PerceptualLoss] = []  # in a list: no part of the state dict

    def load_perceptual(self) -> None:
        """Read VGG-19's weights now rather than at the first training step."""
        self._perceptual = [PerceptualLoss()]

    def perceptual(self, restored: Tensor, sharp: Tensor) -> Tensor:
        """Perceptual distance of each item (b,)."""
        if not self._perceptual:
            self.load_perceptual()
        return self._perceptual[0].to(restored.device)(restored, sharp)

    def shared_step(self, batch: Mapping) -> Loss:
        x_start, cond = self.get_input(batch)
        t, noise = self.timesteps_of(batch, len(x_start)), self.noise_of(batch, x_start, salt=1)
        x_noisy = self.q_sample(x_start, t, noise)
        output = self.apply_model(x_noisy, t, cond)
        loss, values = self.diffusion_loss(output, x_start, t, noise)
        due = (self.global_step + 1) % self.deblur_every == 0
        if self.deblur_loss_weight == 0 or not due or not self.training:
            return loss, values
        x0 = self.predict_start(x_noisy, t, output.float())
        sharp = image_of(batch, self.first_stage_key)
        x0, sharp = self._aligned_crop(batch, x0, sharp)
        weights = self.alphas_cumprod[t] if self.weight_by_alpha_bar else torch.ones_like(t, dtype=x0.dtype)
        pixel_loss, pixel_values = self.deblur_losses(self.decode_first_stage(x0).float(), sharp, weights)
        loss = loss + self.deblur_every * self.deblur_loss_weight * pixel_loss
        return loss, {**values, **pixel_values, "loss": loss}

    def deblur_losses(self, restored: Tensor, sharp: Tensor, weights: Tensor) -> Loss:
        """Sum of the pixel losses of images (b, 3, h, w) in [-1, 1], items weighted by (b,), and terms."""
        difference = restored - sharp
        terms = {
            "l1": (1.0, difference.abs().mean(dim=(1, 2, 3))),
            "mse": (1.0, difference.square().mean(dim=(1, 2, 3))),
            "gradient": (GRADIENT_WEIGHT, gradient_l1(difference)),
        }
        if self.perceptual_loss_weight:
            terms["perceptual"] = (self.perceptual_loss_weight, self.perceptual(restored, sharp))
        means = {name: (weights * term).mean() for name, (_, term) in terms.items()}
        total = sum(weight * means[name] for name, (weight, _) in terms.items())
        return total, {**{f"deblur_{k}_loss": v for k, v in means.items()}, "total_deblur_loss": total}

    @torch.no_grad()
    def log_images(
        self, batch: Mapping, max_images: int = 4, ddim_steps: int = 20, guidance_scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Columns of the training grid: blurry, restored, sharp, prompt; each (b, 3, 8h, 8w) in [-1, 1]."""
        images = super().log_images(batch, max_images, ddim_steps, guidance_scale)
        return dict(zip(("blurry", "restored", "sharp", "prompt"), images.values(), strict=True))

    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Log `val/loss`, and `val/psnr` and `val/ssim` of sampled images as uint8, means over the images."""
        super().validation_step(batch, batch_idx)
        images, pairs, values = compared(self, batch, batch_idx, "restored", "sharp")
        blurry = [psnr(to_uint8(image), pair[1]) for image, pair in zip(images["blurry"], pairs, strict=True)]
        values["val/psnr_blurry"] = float(np.mean(blurry))
        self.log_dict(values, batch_size=len(pairs), sync_dist=True)

    def _aligned_crop(self, batch: Mapping, x0: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
        """The same random window of each item's latents and pixels, from its `seed` where there is one."""
        height, width = x0.shape[-2:]
        h, w = (min(self.deblur_crop or side, side) for side in (height, width))
        seeds = batch["seed"] if "seed" in batch else torch.randint(2**62, (len(x0),))
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        latents, pixels = [], []
        for index, seed in enumerate(seeds):
            generator = item_generator(seed + 3)
            (y,) = torch.randint(height - h + 1, (1,), generator=generator).tolist()
            (x,) = torch.randint(width - w + 1, (1,), generator=generator).tolist()
            latents.append(x0[index, :, y : y + h, x : x + w])
            pixels.append(sharp[index, :, 8 * y : 8 * (y + h), 8 * x : 8 * (x + w)])
        return torch.stack(latents), torch.stack(pixels)


def gradient_l1(difference: Tensor) -> Tensor:
    """Mean size of horizontal plus vertical differences of neighbouring pixels, each item: (b,)."""
    horizontal = difference.diff(dim=-1).abs().mean(dim=(1, 2, 3))
    return horizontal + difference.diff(dim=-2).abs().mean(dim=(1, 2, 3))


class ChannelSpatialAttention(nn.Module):
    """A gate over channels, then one over positions (CBAM, Woo et al. 2018, eq. 1-3).

    x (b, c, h, w) -> x + gate * attended, with `gate` zero at the start: it begins as the identity.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(8, channels // reduction)
        fewer, again = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.channel = nn.Sequential(fewer, nn.ReLU(), again)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.gate = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)  # (b, c, 1, 1)
        h = x * torch.sigmoid(self.channel(pooled[0]) + self.channel(pooled[1]))
        planes = torch.cat([h.mean(dim=1, keepdim=True), h.amax(dim=1, keepdim=True)], dim=1)  # (b, 2, h, w)
        return x + self.gate * (h * torch.sigmoid(self.spatial(planes)))


class AttentionControlNet(ControlNet):
    """ControlNet with channel and spatial attention on its hint features, under `hint_attention`."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.hint_attention = ChannelSpatialAttention(self.model_channels)

    def hint_features(self, hint: Tensor) -> Tensor:
        return self.hint_attention(super().hint_features(hint))


class DeblurControlNetWithAttention(DeblurControlNet):
    """DeblurControlNet whose ControlNet is an AttentionControlNet; other tools ignore the attention."""

    def __init__(self, control_stage_config: Mapping, **arguments):
        control = {**control_stage_config, "target": "cldm.deblur.AttentionControlNet"}
        super().__init__(control_stage_config=control, **arguments)


def add_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain ControlLDM's state dict with fresh attention: it is still the same function.

    Raises ValueError if there is no ControlNet in it.
    """
    if "control_model.zero_convs.0.0.weight" not in weights:
        raise ValueError("these weights have no ControlNet yet: add one with tool_add_control.py")
    channels = len(weights["control_model.zero_convs.0.0.weight"])
    fresh = ChannelSpatialAttention(channels).state_dict()
    return {**{f"control_model.hint_attention.{name}": value for name, value in fresh.items()}, **weights}


def add_hint_latent(config: Mapping, weights: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and state dict of a ControlLDM whose ControlNet also takes the hint's latent, beside x.

    The new channels start at weight zero: it is still the same function.
    """
    params = config["params"]
    channels = params["first_stage_config"]["params"]["embed_dim"]
    own = params["control_stage_config"]["params"]["in_channels"]
    return with_hint_latent(config, channels), widen_input(weights, CONTROL + FIRST, own + channels)
