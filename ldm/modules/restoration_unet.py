"""A U-Net of dense 3x3 residual blocks on 2x2-unshuffled pixels: fast on CPUs and GPUs, any image size.

The layout is DRUNet's (Zhang, Li, Zuo, Zhang, Van Gool, Timofte: Plug-and-Play Image Restoration with Deep
Denoiser Prior, TPAMI 2021), with GELU, unshuffled pixels and a residual to the input. It has no normalisation
and no global pooling: a tile is restored as the whole image would be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 2  # pixels along each side of the squares that become channels


class ResBlock(nn.Module):
    """x + conv(gelu(conv(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


class FourierResBlock(ResBlock):
    """ResBlock with a second branch on the Fourier transform, which sees the whole image at once.

    The branch is two 1x1 convolutions with a ReLU between on real and imaginary parts (Mao et al.: Intriguing
    Findings of Frequency Selection for Image Deblurring, AAAI 2023, Res FFT-ReLU block).
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.spectrum1 = nn.Conv2d(2 * width, 2 * width, 1)
        self.spectrum2 = nn.Conv2d(2 * width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.float(), norm="ortho")
        parts = torch.cat([spectrum.real, spectrum.imag], dim=1).to(x.dtype)  # (b, 2 width, h, w / 2 + 1)
        real, imaginary = self.spectrum2(F.relu(self.spectrum1(parts))).float().chunk(2, dim=1)
        branch = torch.fft.irfft2(torch.complex(real, imaginary), x.shape[-2:], norm="ortho")
        return super().forward(x) + branch.to(x.dtype)


def _stage(width: int, count: int, fourier: bool) -> nn.Sequential:
    block = FourierResBlock if fourier else ResBlock
    return nn.Sequential(*(block(width) for _ in range(count)))


class RestorationUNet(nn.Module):
    """forward(blurry): (b, 3, h, w), h and w multiples of `multiple`, any range -> restored, not clamped.

    `width` is that of the first of four levels, each of which doubles it. The last convolution starts at
    zero: an untrained network returns its input. With `fourier` the two coarse levels have Fourier branches.
    """

    def __init__(
        self,
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 1, 2),
        middle_blocks: int = 4,
        decoder_blocks: Sequence[int] = (1, 1, 2),
        fourier: bool = False,
    ):
        super().__init__()
        widths = [width * 2**level for level in range(len(encoder_blocks) + 1)]
        self.multiple = SIDE * 2 ** len(encoder_blocks)
        self.first = nn.Conv2d(3 * SIDE**2, width, 3, padding=1)
        self.encoders = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.decoders = nn.ModuleList()
        for level, (fine, coarse) in enumerate(zip(widths, widths[1:], strict=False)):
            deep = fourier and level == len(encoder_blocks) - 1
            self.encoders.append(_stage(fine, encoder_blocks[level], deep))
            self.downs.append(nn.Conv2d(fine, coarse, 2, stride=2))
            self.ups.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoders.append(_stage(fine, decoder_blocks[level], deep))
        self.middle = _stage(widths[-1], middle_blocks, fourier)
        self.last = nn.Conv2d(width, 3 * SIDE**2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, blurry: Tensor) -> Tensor:
        x = self.first(F.pixel_unshuffle(blurry, SIDE))  # (b, width, h/2, w/2)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)  # half the size, twice the channels
        x = self.middle(x)  # (b, 8 width, h/16, w/16)
        for level in reversed(range(len(skips))):
            x = self.decoders[level](self.ups[level](x) + skips[level])
        return blurry + F.pixel_shuffle(self.last(x), SIDE)
