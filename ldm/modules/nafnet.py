"""NAFNet: a U-Net of blocks without activation functions; only products and norms are non-linear.

Chen, Chu, Zhang, Sun: Simple Baselines for Image Restoration, ECCV 2022. Parameters have the authors' names,
so that their files load.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of (b, c, h, w)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gate(x: Tensor) -> Tensor:
    """Multiply one half of the channels by the other: (b, 2c, h, w) -> (b, c, h, w) (paper, equation 4)."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFBlock(nn.Module):
    """Two residual branches: a gated depthwise convolution with channel attention, and a gated 1x1 one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(width), LayerNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4, self.conv5 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, width, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = gate(self.conv2(self.conv1(self.norm1(x))))  # (b, width, h, w)
        x = x + self.beta * self.conv3(h * self.sca(h))
        return x + self.gamma * self.conv5(gate(self.conv4(self.norm2(x))))


def blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(width) for _ in range(count)))


class NAFNet(nn.Module):
    """forward(blurry): (b, 3, h, w), any size and range -> restored, the same size, not clamped.

    The image is padded with zeros to multiples of `multiple` and cropped back. The paper's networks for
    deblurring have encoder blocks 1, 1, 1, 28, one in the middle, and decoder blocks 1, 1, 1, 1.
    """

    def __init__(
        self,
        width: int = 32,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        middle_blk_num: int = 1,
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
    ):
        super().__init__()
        if len(enc_blk_nums) != len(dec_blk_nums):
            raise ValueError(f"{len(enc_blk_nums)} encoder stages do not match {len(dec_blk_nums)} decoders")
        widths = [width * 2**level for level in range(len(enc_blk_nums) + 1)]
        self.multiple = 2 ** len(enc_blk_nums)
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        pairs = list(zip(widths, widths[1:], strict=False))  # of neighbouring levels, from the top
        self.encoders = nn.ModuleList(map(blocks, widths, enc_blk_nums))
        self.downs = nn.ModuleList(nn.Conv2d(high, low, 2, stride=2) for high, low in pairs)
        self.middle_blks = blocks(widths[-1], middle_blk_num)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(low, 4 * high, 1, bias=False), nn.PixelShuffle(2))
            for high, low in reversed(pairs)
        )
        self.decoders = nn.ModuleList(map(blocks, widths[-2::-1], dec_blk_nums))

    def forward(self, blurry: Tensor) -> Tensor:
        h, w = blurry.shape[-2:]
        padded = F.pad(blurry, (0, -w % self.multiple, 0, -h % self.multiple))
        x, seen = self.intro(padded), []  # (b, width, h, w)
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            seen.append(x)
            x = down(x)  # (b, 2 width, h / 2, w / 2)
        x = self.middle_blks(x)
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            x = decoder(up(x) + seen.pop())
        return (self.ending(x) + padded)[..., :h, :w]
