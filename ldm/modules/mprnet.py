"""MPRNet: three stages that restore quarters, halves and the whole image, each with features of the previous.

Zamir, Arora, Khan, Hayat, Khan, Yang, Shao: Multi-Stage Progressive Image Restoration, CVPR 2021. Parameters
have the authors' names, so that their files load.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EDGE_WEIGHT, EPSILON = 0.05, 1e-3  # of the loss: lambda and epsilon of equations 1 to 3
Features = Sequence[Tensor]  # at full, half and quarter size


def conv(enter: int, leave: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(enter, leave, kernel, padding=kernel // 2, bias=False)


class ChannelAttention(nn.Module):
    """Channel attention: each channel is scaled by a number in (0, 1), computed from all channel means."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        few = width // reduction
        self.conv_du = nn.Sequential(conv(width, few, 1), nn.ReLU(), conv(few, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class CAB(nn.Module):
    """x + attention(conv(activation(conv(x)))): the channel attention block (paper, figure 3)."""

    def __init__(self, width: int, reduction: int, activation: nn.Module):
        super().__init__()
        self.CA = ChannelAttention(width, reduction)
        self.body = nn.Sequential(conv(width, width), activation, conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.CA(self.body(x))


class Resize(nn.Module):
    """Bilinear resize by `factor`, then a 1x1 convolution, under the authors' module name `name`."""

    def __init__(self, name: str, factor: float, enter: int, leave: int):
        super().__init__()
        resize = nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False)
        self.name = name
        self.add_module(name, nn.Sequential(resize, conv(enter, leave, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class Encoder(nn.Module):
    """Two blocks at each of three sizes; with `fusion` features of the previous stage are added (stage 2)."""

    def __init__(self, widths: Sequence[int], block: Callable[[int], CAB], fusion: bool):
        super().__init__()
        for level, width in enumerate(widths, start=1):
            self.add_module(f"encoder_level{level}", nn.Sequential(block(width), block(width)))
            if fusion:  # cross-stage feature fusion (paper, section 3.3)
                self.add_module(f"csff_enc{level}", conv(width, width, 1))
                self.add_module(f"csff_dec{level}", conv(width, width, 1))
        self.down12 = Resize("down", 0.5, widths[0], widths[1])
        self.down23 = Resize("down", 0.5, widths[1], widths[2])

    def forward(self, x: Tensor, encoded: Features = (), decoded: Features = ()) -> Features:
        found = []
        for level, down in enumerate((self.down12, self.down23, None), start=1):
            x = getattr(self, f"encoder_level{level}")(x)  # (b, widths[level - 1], h, w)
            if encoded:
                x = x + getattr(self, f"csff_enc{level}")(encoded[level - 1])
                x = x + getattr(self, f"csff_dec{level}")(decoded[level - 1])
            found.append(x)
            x = down(x) if down else x  # (b, widths[level], h / 2, w / 2)
        return found


class Decoder(nn.Module):
    """Decoder of three sizes, with channel attention blocks on the skip connections."""

    def __init__(self, widths: Sequence[int], block: Callable[[int], CAB]):
        super().__init__()
        for level, width in enumerate(widths, start=1):
            self.add_module(f"decoder_level{level}", nn.Sequential(block(width), block(width)))
        self.skip_attn1, self.skip_attn2 = block(widths[0]), block(widths[1])
        self.up21 = Resize("up", 2, widths[1], widths[0])
        self.up32 = Resize("up", 2, widths[2], widths[1])

    def forward(self, encoded: Features) -> Features:
        third = self.decoder_level3(encoded[2])
        second = self.decoder_level2(self.up32(third) + self.skip_attn2(encoded[1]))
        first = self.decoder_level1(self.up21(second) + self.skip_attn1(encoded[0]))
        return [first, second, third]


class ORB(nn.Module):
    """Original-resolution block: x + conv(blocks(x))."""

    def __init__(self, width: int, count: int, block: Callable[[int], CAB]):
        super().__init__()
        self.body = nn.Sequential(*(block(width) for _ in range(count)), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ORSNet(nn.Module):
    """Third stage, at full resolution; after each ORB the second stage's features of one size are added."""

    def __init__(self, widths: Sequence[int], width: int, count: int, block: Callable[[int], CAB]):
        super().__init__()
        for level in (1, 2, 3):
            self.add_module(f"orb{level}", ORB(width, count, block))
        for kind in ("enc", "dec"):
            ups = [Resize("up", 2, enter, leave) for enter, leave in zip(widths[1:], widths, strict=False)]
            deep = [Resize("up", 2, enter, leave) for enter, leave in zip(widths[1:], widths, strict=False)]
            self.add_module(f"up_{kind}1", ups[0])
            self.add_module(f"up_{kind}2", nn.Sequential(*reversed(deep)))
            for level in (1, 2, 3):
                self.add_module(f"conv_{kind}{level}", conv(widths[0], width, 1))

    def forward(self, x: Tensor, encoded: Features, decoded: Features) -> Tensor:
        for level in (1, 2, 3):
            x = getattr(self, f"orb{level}")(x)  # (b, width, h, w)
            for kind, features in (("enc", encoded), ("dec", decoded)):
                seen = features[level - 1]
                if level > 1:
                    seen = getattr(self, f"up_{kind}{level - 1}")(seen)  # (b, widths[0], h, w)
                x = x + getattr(self, f"conv_{kind}{level}")(seen)
        return x


class SAM(nn.Module):
    """Supervised attention: a stage's features weighted by its restored image, and that image (figure 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(width, width, 1), conv(width, 3, 1), conv(3, width, 1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        restored = self.conv2(x) + image  # (b, 3, h, w)
        return self.conv1(x) * torch.sigmoid(self.conv3(restored)) + x, restored


class MPRNet(nn.Module):
    """forward(blurry (b, 3, h, w) in [0, 1]) -> [restored by stage 3, by stage 2, by stage 1], not clamped.

    h and w are multiples of 8. The defaults are the paper's for deblurring: 20,127,073 parameters.
    """

    multiple = 8

    def __init__(
        self,
        n_feat: int = 96,
        scale_unetfeats: int = 48,
        scale_orsnetfeats: int = 32,
        num_cab: int = 8,
        reduction: int = 4,
    ):
        super().__init__()
        activation = nn.PReLU()  # shared by all blocks

        def block(width: int) -> CAB:
            return CAB(width, reduction, activation)

        widths = [n_feat + level * scale_unetfeats for level in range(3)]
        wide = n_feat + scale_orsnetfeats
        for stage in (1, 2, 3):
            self.add_module(f"shallow_feat{stage}", nn.Sequential(conv(3, n_feat), block(n_feat)))
        self.stage1_encoder, self.stage1_decoder = Encoder(widths, block, False), Decoder(widths, block)
        self.stage2_encoder, self.stage2_decoder = Encoder(widths, block, True), Decoder(widths, block)
        self.stage3_orsnet = ORSNet(widths, wide, num_cab, block)
        self.sam12, self.sam23 = SAM(n_feat), SAM(n_feat)
        self.concat12, self.concat23 = conv(2 * n_feat, n_feat), conv(2 * n_feat, wide)
        self.tail = conv(wide, 3)
        self.register_load_state_dict_pre_hook(share_activation)

    def forward(self, blurry: Tensor) -> list[Tensor]:
        # Stage 1 encodes quarters and decodes halves
        halves = blurry.chunk(2, dim=2)  # (b, 3, h / 2, w)
        encoded1, decoded1, seen, restored1 = [], [], [], []
        for half in halves:
            quarters = [self.stage1_encoder(self.shallow_feat1(part)) for part in half.chunk(2, dim=3)]
            encoded1.append([torch.cat(pair, dim=3) for pair in zip(*quarters, strict=True)])
            decoded1.append(self.stage1_decoder(encoded1[-1]))
            features, restored = self.sam12(decoded1[-1][0], half)
            seen.append(features)
            restored1.append(restored)

        # Stage 2 encodes halves and decodes the whole
        encoded2 = []
        for half, features, *before in zip(halves, seen, encoded1, decoded1, strict=True):
            x = self.concat12(torch.cat([self.shallow_feat2(half), features], dim=1))
            encoded2.append(self.stage2_encoder(x, *before))
        encoded2 = [torch.cat(pair, dim=2) for pair in zip(*encoded2, strict=True)]
        decoded2 = self.stage2_decoder(encoded2)
        features, restored2 = self.sam23(decoded2[0], blurry)

        # Stage 3 keeps the resolution
        x = self.concat23(torch.cat([self.shallow_feat3(blurry), features], dim=1))  # (b, wide, h, w)
        restored3 = blurry + self.tail(self.stage3_orsnet(x, encoded2, decoded2))
        return [restored3, restored2, torch.cat(restored1, dim=2)]


def share_activation(network: nn.Module, weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Copy the shared activation to all of its names in a file: EMA weights update only the first one."""
    own = [name for name, value in network.named_parameters(remove_duplicate=False) if value.shape == (1,)]
    for name in own[1:]:
        if f"{prefix}{own[0]}" in weights and f"{prefix}{name}" in weights:
            weights[f"{prefix}{name}"] = weights[f"{prefix}{own[0]}"]


def edge_loss(restored: Tensor, sharp: Tensor) -> Tensor:
    """Return the Charbonnier distance of the Laplacians of two (b, 3, h, w) (equation 3)."""
    kernel = restored.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    difference = F.conv2d((restored - sharp), kernel, groups=3)
    return (difference.square() + EPSILON**2).sqrt().mean()
