"""SFTNet: a residual trunk whose features are scaled and shifted by conditions from a small network.

Wang, Yu, Dong, Loy: Recovering Realistic Texture in Image Super-Resolution by Deep Spatial Feature Transform,
CVPR 2018. There the conditions come from a segmentation; here they are computed from the blurry image. The
trunk is SRResNet's (Ledig et al. 2017) without normalisation and upsampling, with a residual to the input.
"""

from torch import Tensor, nn
from torch.nn import functional as F

CONDITIONS = 32  # channels of the conditions


class SFT(nn.Module):
    """x * (1 + scale) + shift, with scale and shift computed from each pixel's conditions (equation 4)."""

    def __init__(self, width: int):
        super().__init__()

        def maps() -> nn.Sequential:
            first, last = nn.Conv2d(CONDITIONS, CONDITIONS, 1), nn.Conv2d(CONDITIONS, width, 1)
            return nn.Sequential(first, nn.LeakyReLU(0.1), last)

        self.scale, self.shift = maps(), maps()

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = (
            F.interpolate(maps(conditions), scale_factor=4, mode="bilinear", align_corners=False)
            for maps in (self.scale, self.shift)
        )  # (b, width, h / 4, w / 4) -> (b, width, h, w)
        return x * (1 + scale) + shift


class SFTBlock(nn.Module):
    """x + conv(relu(sft(conv(relu(sft(x))))))."""

    def __init__(self, width: int):
        super().__init__()
        self.sft1, self.sft2 = SFT(width), SFT(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.sft1(x, conditions)))
        return x + self.conv2(F.relu(self.sft2(h, conditions)))


class SFTNet(nn.Module):
    """forward(blurry): (b, 3, h, w) in [0, 1], h and w multiples of 4 -> the same size, not clamped."""

    multiple = 4

    def __init__(self, width: int = 64, blocks: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        for enter, stride in ((3, 2), (CONDITIONS, 2), (CONDITIONS, 1), (CONDITIONS, 1)):
            layers += [nn.Conv2d(enter, CONDITIONS, 3, stride, padding=1), nn.LeakyReLU(0.1)]
        self.conditions = nn.Sequential(*layers)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(SFTBlock(width) for _ in range(blocks))
        self.sft = SFT(width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, blurry: Tensor) -> Tensor:
        conditions = self.conditions(blurry)  # (b, CONDITIONS, h / 4, w / 4)
        first = h = self.first(blurry)  # (b, width, h, w)
        for block in self.blocks:
            h = block(h, conditions)
        h = first + self.middle(self.sft(h, conditions))
        return blurry + self.last(F.leaky_relu(h, 0.1))
