"""What GANs for restoration take for granted: networks of SRGAN and DeblurGAN, image pool, small change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + norm(conv(activation(norm(conv(x)))))."""

    def __init__(self, width: int, norm: type[nn.Module], activation: nn.Module):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.body = nn.Sequential(convs[0], norm(width), activation, convs[1], norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SRResNet(nn.Module):
    """SRGAN's generator without its upsampling (Ledig et al. 2017, figure 4), and a residual to the input."""

    multiple = 1

    def __init__(self, width: int = 64, blocks: int = 16):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(
            *(ResidualBlock(width, nn.BatchNorm2d, nn.PReLU()) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )
        self.last = nn.Conv2d(width, 3, 9, padding=4)

    def forward(self, blurry: Tensor) -> Tensor:
        h = self.first(blurry)
        return blurry + self.last(h + self.blocks(h))


class DeblurGANGenerator(nn.Module):
    """DeblurGAN's (Kupyn et al. 2018, section 3): blocks at quarter resolution; resized, not deconvolved."""

    multiple = 4

    def __init__(self, width: int = 64, blocks: int = 9):
        super().__init__()

        def layer(enter: int, leave: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(enter, leave, kernel, stride, kernel // 2)
            return [conv, nn.InstanceNorm2d(leave), nn.ReLU()]

        self.body = nn.Sequential(
            *layer(3, width, 7),
            *layer(width, 2 * width, 3, stride=2),
            *layer(2 * width, 4 * width, 3, stride=2),
            *(ResidualBlock(4 * width, nn.InstanceNorm2d, nn.ReLU()) for _ in range(blocks)),
            nn.Upsample(scale_factor=2),
            *layer(4 * width, 2 * width, 3),
            nn.Upsample(scale_factor=2),
            *layer(2 * width, width, 3),
            nn.Conv2d(width, 3, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, blurry: Tensor) -> Tensor:
        return blurry + self.body(blurry)


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, four LeakyReLU; each sees all before it, and the block adds to its input."""

    def __init__(self, width: int, norm: bool = False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n * width, width, 3, padding=1) for n in range(1, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv, norm in zip(self.convs[:4], self.norms, strict=True):
            seen.append(F.leaky_relu(norm(conv(torch.cat(seen, dim=1))), 0.2))  # (b, width, h, w)
        return x + self.convs[4](torch.cat(seen, dim=1))


class Discriminator(nn.Module):
    """SRGAN's (Ledig et al. 2017, figure 4) for patches of any size: (b, 3, h, w) in [0, 1] -> scores (b,).

    The mean over positions stands before the two dense layers. Scores are logits.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        enter = width
        for leave, stride in zip([1, 2, 2, 4, 4, 8, 8], [2, 1, 2, 1, 2, 1, 2], strict=True):
            conv = nn.Conv2d(enter, leave * width, 3, stride, padding=1)
            layers += [conv, nn.BatchNorm2d(leave * width), nn.LeakyReLU(0.2)]
            enter = leave * width
        self.features = nn.Sequential(*layers)  # (b, 8 width, h / 16, w / 16)
        self.score = nn.Sequential(nn.Linear(enter, 16 * width), nn.LeakyReLU(0.2), nn.Linear(16 * width, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.score(self.features(image).mean(dim=(2, 3)))[:, 0].float()


class ImagePool:
    """Earlier fakes for the discriminator (Shrivastava et al. 2017): half of what it sees is from before."""

    def __init__(self, size: int):
        self.size, self.images = size, []

    def __call__(self, fakes: Tensor) -> Tensor:
        """Take (b, 3, h, w) in, give as many out; draws from torch's random numbers."""
        chosen = []
        for fake in fakes.detach():
            if len(self.images) < self.size:
                self.images.append(fake.clone())
            elif self.size and torch.rand(()) < 0.5:
                index = int(torch.randint(self.size, ()))
                fake, self.images[index] = self.images[index].to(fake), fake.clone()  # resumed: on the CPU
            chosen.append(fake)
        return torch.stack(chosen)

    def state_dict(self) -> dict:
        return {"images": self.images}

    def load_state_dict(self, state: dict) -> None:
        self.images = list(state["images"])


def initialise(network: nn.Module, std: float = 0.01) -> nn.Module:
    """Weights from a normal distribution of this deviation (0.01 in the paper), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
    return network


def judge(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (b,) of real and fake pictures in one batch: apart, BatchNorm would hide how they differ."""
    real_scores, fake_scores = discriminator(torch.cat([real, fake.to(real)])).chunk(2)
    return real_scores, fake_scores


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients pass through the network and leave none in it."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def least_squares(scores: Tensor, label: float) -> Tensor:
    return (scores - label).square().mean()  # Mao et al. 2017


def relativistic_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: real pictures look more real than fake ones do on average.

    Scores (b,): C(real) - mean C(fake) against the label 1, C(fake) - mean C(real) against 0, by the mean of
    their cross-entropies (relativistic average GAN, Jolicoeur-Martineau 2019; the paper's RBL and RDBL).
    """
    above, below = real - fake.mean(), fake - real.mean()
    return (bce(above, 1.0) + bce(below, 0.0)) / 2


def relativistic_g_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the generator minimises, through `fake`: both probabilities are 0.5, real and fake look alike."""
    above, below = real - fake.mean(), fake - real.mean()
    return (bce(above, 0.5) + bce(below, 0.5)) / 2


def bce(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
