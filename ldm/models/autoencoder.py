"""The KL autoencoder between pixels and latents (Rombach et al. 2022, sec. 3.1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder


class DiagonalGaussianDistribution:
    """Normal distribution given by moments (b, 2c, h, w): mean, then log variance (clamped to [-30, 20])."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return a sample (b, c, h, w), made from the standard normal `noise` if given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """Return the mean (b, c, h, w)."""
        return self.mean


class AutoencoderKL(nn.Module):
    """Encoder and decoder, with 1x1 convolutions around the latent unless `use_quant_conv` is False (FLUX).

    `lossconfig`, `monitor` and `image_key` appear in original yaml files and are ignored.
    """

    def __init__(
        self,
        ddconfig: Mapping,
        embed_dim: int = 4,
        use_quant_conv: bool = True,
        lossconfig: Mapping | None = None,
        monitor: str | None = None,
        image_key: str = "image",
    ):
        super().__init__()
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        else:
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()

    def encode(self, image: Tensor) -> DiagonalGaussianDistribution:
        """Encode an image (b, 3, h, w) in [-1, 1] to a latent distribution (b, embed_dim, h / 8, w / 8)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(image)))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a latent (b, embed_dim, h, w) to an image (b, 3, 8h, 8w) near [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent))
