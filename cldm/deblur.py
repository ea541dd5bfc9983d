"""Deblurring ControlNet: the diffusion loss plus losses on the image decoded from each prediction."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cldm.cldm import ControlLDM, ControlNet
from cldm.model import CONTROL
from ldm.data.image import to_uint8
from ldm.data.stream import item_generator
from ldm.metrics import psnr
from ldm.models.diffusion.ddpm import Loss, image_of
from ldm.modules.perceptual import PerceptualLoss

GRADIENT_WEIGHT = 0.1


class DeblurControlNet(ControlLDM):
    """ControlLDM whose hint is the blurry image; its loss is

    diffusion_loss + deblur_loss_weight * (l1 + mse + perceptual_loss_weight * perceptual + 0.1 * gradient).

    The four pixel losses compare the sharp image with x0, which follows from the noise prediction and is
    decoded by the frozen autoencoder with gradients. Decoding is expensive: only a crop of `deblur_crop`
    latents a side is decoded (0 = all), and its activations are recomputed in the backward pass. At high
    noise x0 is unreliable, so each item's losses are weighted by its alpha_bar, unless `weight_by_alpha_bar`
    is False. A term of weight 0 is not computed. With `deblur_every` = N the pixel losses are computed at
    every Nth optimizer step only, multiplied by N: the same mean gradient at a lower cost. Perceptual is the
    distance in VGG-19 features (its weights are not in the state dict); gradient is the L1 distance of
    horizontal and vertical differences.
    """

    preview_guidance = 1.0

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
        self.deblur_loss_weight = deblur_loss_weight
        self.perceptual_loss_weight = perceptual_loss_weight
        self.deblur_crop = deblur_crop
        self.weight_by_alpha_bar = weight_by_alpha_bar
        self.deblur_every = deblur_every
        self.first_stage_model.decoder.use_checkpoint = True
        self._perceptual: list[PerceptualLoss] = []  # in a list: no part of the state dict

    def load_perceptual(self) -> None:
        """Read VGG-19's weights now rather than at the first training step."""
        self._perceptual = [PerceptualLoss()]

    def perceptual(self, restored: Tensor, sharp: Tensor) -> Tensor:
        """Compute the perceptual distance of each item (b,)."""
        if not self._perceptual:
            self.load_perceptual()
        return self._perceptual[0].to(restored.device)(restored, sharp)

    def extra_losses(
        self, batch: Mapping, x_noisy: Tensor, t: Tensor, output: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the weighted pixel losses of a training step and their terms; (0, {}) if not computed."""
        due = (self.global_step + 1) % self.deblur_every == 0
        if self.deblur_loss_weight == 0 or not due or not self.training:
            return 0.0, {}
        # estimate the clean latents from the noise prediction, and decode a crop of them
        x0 = self.predict_start(x_noisy, t, output.float())
        x0, sharp = self._aligned_crop(batch, x0, image_of(batch, self.first_stage_key))
        restored = self.decode_first_stage(x0).float()
        # the noisier the latents, the smaller the weight of this prediction
        weights = self.alphas_cumprod[t] if self.weight_by_alpha_bar else torch.ones_like(t, dtype=x0.dtype)
        total, terms = self.deblur_losses(restored, sharp, weights)
        return self.deblur_every * self.deblur_loss_weight * total, terms

    def deblur_losses(self, restored: Tensor, sharp: Tensor, weights: Tensor) -> Loss:
        """Return sum and terms of the pixel losses of images (b, 3, h, w) in [-1, 1]; item weights (b,)."""
        difference = restored - sharp
        l1 = (weights * difference.abs().mean(dim=(1, 2, 3))).mean()
        mse = (weights * difference.square().mean(dim=(1, 2, 3))).mean()
        gradient = (weights * gradient_l1(difference)).mean()
        total = l1 + mse + GRADIENT_WEIGHT * gradient
        terms = {"deblur_l1_loss": l1, "deblur_mse_loss": mse, "deblur_gradient_loss": gradient}
        if self.perceptual_loss_weight:
            perceptual = (weights * self.perceptual(restored, sharp)).mean()
            total = total + self.perceptual_loss_weight * perceptual
            terms["deblur_perceptual_loss"] = perceptual
        return total, {**terms, "total_deblur_loss": total}

    @torch.no_grad()
    def log_images(self, batch: Mapping, max_images: int = 4, ddim_steps: int = 20) -> dict[str, Tensor]:
        """Return the training grid's columns (b, 3, 8h, 8w) in [-1, 1]: blurry, restored, sharp, prompt."""
        images = super().log_images(batch, max_images, ddim_steps)
        return dict(zip(("blurry", "restored", "sharp", "prompt"), images.values(), strict=True))

    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Log `val/loss`, and the mean `val/psnr` and `val/ssim` of the sampled images as uint8.

        Also logs `val/psnr_blurry`, the mean PSNR of the inputs.
        """
        super().validation_step(batch, batch_idx)
        images, pairs = self.compare(batch, batch_idx, "restored", "sharp")
        blurry = [
            psnr(to_uint8(image), sharp) for image, (_, sharp) in zip(images["blurry"], pairs, strict=True)
        ]
        self.log("val/psnr_blurry", float(np.mean(blurry)), batch_size=len(pairs), sync_dist=True)

    def _aligned_crop(self, batch: Mapping, x0: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the same random crop from each item's latents and pixels, using the item's `seed` if given."""
        height, width = x0.shape[-2:]
        h = min(self.deblur_crop or height, height)
        w = min(self.deblur_crop or width, width)
        seeds = torch.as_tensor(batch["seed"]) if "seed" in batch else torch.randint(2**62, (len(x0),))
        latents, pixels = [], []
        for index, seed in enumerate(seeds.tolist()):
            generator = item_generator(seed + 3)
            (y,) = torch.randint(height - h + 1, (1,), generator=generator).tolist()
            (x,) = torch.randint(width - w + 1, (1,), generator=generator).tolist()
            latents.append(x0[index, :, y : y + h, x : x + w])
            pixels.append(sharp[index, :, 8 * y : 8 * (y + h), 8 * x : 8 * (x + w)])
        return torch.stack(latents), torch.stack(pixels)


def gradient_l1(difference: Tensor) -> Tensor:
    """Return the mean absolute horizontal plus vertical difference of neighbouring pixels, per item (b,)."""
    horizontal = difference.diff(dim=-1).abs().mean(dim=(1, 2, 3))
    return horizontal + difference.diff(dim=-2).abs().mean(dim=(1, 2, 3))


class ChannelSpatialAttention(nn.Module):
    """Attention over channels, then over positions (CBAM, Woo et al. 2018, eq. 1-3).

    Maps x (b, c, h, w) to x + gate * attended. `gate` is zero at the start, so it begins as the identity.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(8, channels // reduction)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.gate = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)  # (b, c, 1, 1)
        largest = x.amax(dim=(2, 3), keepdim=True)
        h = x * torch.sigmoid(self.channel(mean) + self.channel(largest))
        planes = torch.cat([h.mean(dim=1, keepdim=True), h.amax(dim=1, keepdim=True)], dim=1)  # (b, 2, h, w)
        return x + self.gate * (h * torch.sigmoid(self.spatial(planes)))


class AttentionControlNet(ControlNet):
    """ControlNet with channel and spatial attention (`hint_attention`) on its hint features."""

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
    """Add new hint attention to the state dict of a plain ControlLDM; the model's output does not change.

    Raises ValueError if the state dict holds no ControlNet.
    """
    if CONTROL + "zero_convs.0.0.weight" not in weights:
        raise ValueError("these weights have no ControlNet yet: add one with tool_add_control.py")
    channels = len(weights[CONTROL + "zero_convs.0.0.weight"])
    fresh = ChannelSpatialAttention(channels).state_dict()
    return {**{f"{CONTROL}hint_attention.{name}": value for name, value in fresh.items()}, **weights}
