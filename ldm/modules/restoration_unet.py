"""A U-Net of dense 3x3 residual blocks on 2x2-unshuffled pixels, applied at three scales.

The layout is DRUNet's (Zhang, Li, Zuo, Zhang, Van Gool, Timofte: Plug-and-Play Image Restoration with Deep
Denoiser Prior, TPAMI 2021), with GELU, unshuffled pixels and a residual to the input. It has no normalisation
and no global pooling: a tile is restored as the whole image would be. The scales are those of SRN (Tao, Gao,
Shen, Wang, Jia, CVPR 2018) and share their weights: the image is restored at a quarter of its size, then at
half, then at full size, each time with the correction of the coarser scale as input. A blur of 40 pixels is
one of 10 pixels at the coarsest scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.blind_wiener import BlindWiener

SIDE = 2  # pixels along each side of the squares that become channels
SCALES = 3  # full size, half, quarter


class ResBlock(nn.Module):
    """x + conv(gelu(conv(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


def blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(width) for _ in range(count)))


class RestorationUNet(nn.Module):
    """forward(blurry): (b, 3, h, w), h and w multiples of `multiple`, [0, 1] -> restored, not clamped.

    `width` is the number of channels at the first of four levels; each level doubles it. The last convolution
    starts at zero: an untrained network returns its input. With `wiener` the U-Net corrects the result of a
    blind Wiener filter, which is frozen and trained beforehand (BlindWiener).
    """

    def __init__(
        self,
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 1, 2),
        middle_blocks: int = 4,
        decoder_blocks: Sequence[int] = (1, 1, 2),
        wiener: bool = False,
    ):
        super().__init__()
        widths = [width * 2**level for level in range(len(encoder_blocks) + 1)]
        self.multiple = SIDE * 2 ** len(encoder_blocks) * 2 ** (SCALES - 1)
        self.wiener = BlindWiener().requires_grad_(False) if wiener else None
        channels = 7 if wiener else 6  # the image, the coarser scale's correction, the filter's correction
        self.first = nn.Conv2d(channels * SIDE**2, width, 3, padding=1)
        self.encoders = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.decoders = nn.ModuleList()
        for level, (fine, coarse) in enumerate(zip(widths, widths[1:], strict=False)):
            self.encoders.append(blocks(fine, encoder_blocks[level]))
            self.downs.append(nn.Conv2d(fine, coarse, 2, stride=2))
            self.ups.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoders.append(blocks(fine, decoder_blocks[level]))
        self.middle = blocks(widths[-1], middle_blocks)
        self.last = nn.Conv2d(width, 3 * SIDE**2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, blurry: Tensor) -> Tensor:
        images = [blurry]
        for _ in range(SCALES - 1):
            images.append(F.avg_pool2d(images[-1], 2))
        correction = torch.zeros_like(images[-1])
        for image in reversed(images):  # from the coarsest to the finest
            if correction.shape != image.shape:
                correction = F.interpolate(correction, scale_factor=2, mode="bilinear")
            correction = self.correct(image, correction)
        return blurry + correction

    def correct(self, image: Tensor, coarser: Tensor) -> Tensor:
        """Return the correction of one scale: (b, 3, h, w), given the coarser scale's at the same size."""
        if self.wiener is None:
            return self.unet(torch.cat([image, coarser], dim=1))
        sharper = self.wiener(image)  # (b, 1, h, w)
        return sharper + self.unet(torch.cat([image, sharper, coarser], dim=1))

    def unet(self, x: Tensor) -> Tensor:
        """The U-Net: (b, 6 or 7, h, w) -> (b, 3, h, w)."""
        x = self.first(F.pixel_unshuffle(x, SIDE))  # (b, width, h/2, w/2)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)  # half the size, twice the channels
        x = self.middle(x)  # (b, 8 width, h/16, w/16)
        for level in reversed(range(len(skips))):
            x = self.decoders[level](self.ups[level](x) + skips[level])
        return F.pixel_shuffle(self.last(x), SIDE)
