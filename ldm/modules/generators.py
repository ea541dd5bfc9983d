"""BGAN's and DBGAN's generators, others by name, their files, and pictures of any size through one of them.

Zhang et al., Deblurring by Realistic Blurring, CVPR 2020. Values are in [0, 1], h and w multiples of
a network's `multiple`, results not clamped.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint import fill, read_trained, write_half
from ldm.data.stream import item_generator
from ldm.modules.gan import DeblurGANGenerator, DenseBlock, SRResNet, initialise
from ldm.modules.losses import PixelLoss, restoration_loss
from ldm.modules.mprnet import EDGE_WEIGHT, MPRNet, edge_loss
from ldm.modules.nafnet import NAFNet
from ldm.modules.restoration_unet import RestorationUNet
from ldm.modules.sftnet import SFTNet
from ldm.tiling import pad_to_multiple, restore_picture

NOISE = 4  # numbers that BGAN draws for a picture
Kind = Literal["blur", "deblur"]
Made = Tensor | list[Tensor]  # by a network: of one stage, or of several


class DBGANGenerator(nn.Module):
    """The paper's deblurring network: 16 dense blocks, no normalisation, and a residual to the input.

    forward(blurry): (b, 3, h, w) -> the same. With `sampling` the blocks work at half resolution; the way
    back is a resize and a convolution, whose evenly covered pixels show no checkerboard.
    """

    def __init__(
        self, width: int = 64, blocks: int = 16, sampling: bool = False, norm: bool = False, channels: int = 3
    ):
        super().__init__()
        self.multiple = 2 if sampling else 1
        self.first = nn.Conv2d(channels, width, 3, stride=self.multiple, padding=1)
        self.blocks = nn.Sequential(*(DenseBlock(width, norm) for _ in range(blocks)))
        up = [nn.Upsample(scale_factor=2)] if sampling else []
        wide, last = (nn.Conv2d(width, leave, 3, padding=1) for leave in (width, 3))
        self.last = nn.Sequential(*up, wide, nn.LeakyReLU(0.2), last)

    def forward(self, image: Tensor) -> Tensor:
        return image[:, :3] + self.last(self.blocks(self.first(image)))


class BGANGenerator(DBGANGenerator):
    """The paper's blurring network: 9 dense blocks that see the sharp picture and a noise of four numbers.

    forward(sharp, noise): (b, 3, h, w), and (b, 4, 1, 1) or, if `varying`, (b, 4, h, w) from a normal
    distribution (`draw_noise`) -> blurry (b, 3, h, w).
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 9,
        sampling: bool = False,
        norm: bool = False,
        varying: bool = False,
    ):
        super().__init__(width, blocks, sampling, norm, channels=3 + NOISE)
        self.varying = varying

    def forward(self, sharp: Tensor, noise: Tensor) -> Tensor:
        tiled = noise.expand(-1, -1, *sharp.shape[2:])  # (b, 4, h, w)
        return super().forward(torch.cat([sharp, tiled.to(sharp)], dim=1))

    def draw_noise(self, sharp: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise for `forward`, drawn on the CPU: the same on every device."""
        size = sharp.shape[2:] if self.varying else (1, 1)
        return torch.randn(len(sharp), NOISE, *size, generator=generator).to(sharp)


OTHERS: dict[str, Callable[[int, int], nn.Module]] = {  # by width and blocks
    "srresnet": SRResNet,
    "deblurgan": DeblurGANGenerator,
    "mprnet": lambda width, blocks: MPRNet(width, width // 2, width // 3, blocks),
    "sftnet": SFTNet,
    "nafnet": lambda width, blocks: NAFNet(width, (1, 1, 1, blocks), 1, (1, 1, 1, 1)),
    "unet": lambda width, blocks: RestorationUNet(width, middle_blocks=blocks),
    "unet_fourier": lambda width, blocks: RestorationUNet(width, middle_blocks=blocks, fourier=True),
}
OWN_START = (MPRNet, SFTNet, NAFNet, RestorationUNet)  # begin with PyTorch's first weights


def make_generator(kind: str, form: dict) -> nn.Module:
    """The generator `blur` or `deblur` of some settings."""
    if kind == "blur":
        names = ("width", "blur_blocks", "sampling", "batch_norm", "varying_noise")
        return BGANGenerator(*(form.get(name, False) for name in names))
    if form["generator"] == "dbgan":
        return DBGANGenerator(form["width"], form["blocks"], form["sampling"])
    return OTHERS[form["generator"]](form["width"], form["blocks"])


FORM = ("generator", "width", "blocks", "blur_blocks", "sampling", "batch_norm", "varying_noise")


def load_generator(path: str | Path, kind: Kind) -> nn.Module:
    """A generator from a file of train_dbgan.py, or a deblurring one of MPRNet's or NAFNet's authors.

    Raises FileNotFoundError, or ValueError if it is not in it.
    """
    weights, content = read_trained(path)
    form, prefix = content["settings"], f"{kind}."
    if kind == "deblur" and not form:
        weights = {f"{prefix}{name.removeprefix('module.')}": value for name, value in weights.items()}
        form = authors_form({name.removeprefix(prefix): value.shape for name, value in weights.items()})
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not weights or not form.keys() >= set(FORM[:-1]):  # older files lack the last
        raise ValueError(f"{path} holds no {kind}ring generator of train_dbgan.py")
    return fill(make_generator(kind, form), weights, path).eval()


def authors_form(shapes: dict[str, torch.Size]) -> dict:
    """The settings of a network whose file has none, known by its parameters; {} for others."""
    found = {}
    if "stage3_orsnet.orb1.body.0.body.0.weight" in shapes and "shallow_feat1.0.weight" in shapes:
        blocks = sum(name.startswith("stage3_orsnet.orb1.body.") for name in shapes) // 5
        found = {"generator": "mprnet", "width": shapes["shallow_feat1.0.weight"][0], "blocks": blocks}
    if "encoders.3.0.beta" in shapes and "intro.weight" in shapes:
        blocks = sum(name.startswith("encoders.3.") and name.endswith(".beta") for name in shapes)
        found = {"generator": "nafnet", "width": shapes["intro.weight"][0], "blocks": blocks}
    return dict.fromkeys(FORM, 0) | found if found else {}


def export(generators: nn.ModuleDict, settings: dict, folder: Path, suffix: str = "") -> None:
    """Write each generator in half precision, with what `load_generator` must know: bgan, dbgan + suffix."""
    for kind, network in generators.items():
        weights = {f"{kind}.{name}": value for name, value in network.state_dict().items()}
        name = {"blur": "bgan", "deblur": "dbgan"}[kind]
        path = folder / f"{name}{suffix}.safetensors"
        write_half(path, weights, {name: settings[name] for name in FORM})


def begin(kind: Kind, form: dict, path: Path | None = None, std: float = 0.01) -> nn.Module:
    """A generator with its first weights: of a file, or drawn with this deviation, or PyTorch's own.

    Raises what `load_generator` does, and ValueError if the file holds another network.
    """
    generator = make_generator(kind, form)
    if path is None:
        return generator if isinstance(generator, OWN_START) else initialise(generator, std)
    found = load_generator(path, kind)
    own, other = type(generator).__name__, type(found).__name__
    if own != other:
        raise ValueError(f"{path} holds a {other}, this run trains a {own}")
    return fill(generator, found.state_dict(), path)


def restore_image(
    network: nn.Module, image: np.ndarray, noise: Callable[[Tensor], Tensor] | None = None, **options: Any
) -> np.ndarray:
    """Deblur a uint8 picture (h, w, 3) of any size, or blur it if there is a `noise`, in eval mode.

    `noise` gives what BGAN's `forward` wants for a picture or tile (1, 3, h, w); `options` are those of
    ldm.tiling.restore_picture.
    """

    def run(part: Tensor) -> Tensor:
        h, w = part.shape[2:]
        padded = pad_to_multiple(to_unit(part), network.multiple)
        extra = () if noise is None else (noise(padded),)
        restored = final(network.forward(padded, *extra))  # not compiled
        return restored[..., :h, :w].clamp(0, 1) * 2 - 1

    training = network.training
    network.eval()
    try:
        return restore_picture(image, run, next(network.parameters()).device, **options)
    finally:
        network.train(training)


def blur_image(network: nn.Module, image: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    """Blur a uint8 picture (h, w, 3) by BGAN with the noise of this seed; tiles share it if it does not vary.
    `options` as in `restore_image`."""
    generator = item_generator(seed)
    if network.varying:
        return restore_image(network, image, partial(network.draw_noise, generator=generator), **options)
    noise = network.draw_noise(torch.empty(1, 3, 1, 1), generator)
    return restore_image(network, image, lambda part: noise.to(part), **options)


def to_unit(image: Tensor) -> Tensor:
    return (image + 1) / 2  # [-1, 1] -> [0, 1]


def final(made: Made) -> Tensor:
    """The picture that counts: of a network of several stages, which gives a list, the first."""
    return made[0] if isinstance(made, list) else made


def content_loss(made: Made, real: Tensor, kind: PixelLoss, fft_weight: float = 0.0) -> Tensor:
    """Distance of the pixels, and of the spectra if they have a weight. Of several stages it is the sum, with
    the distances of their edges (MPRNet's equation 1)."""
    stages = made if isinstance(made, list) else [made]
    loss = sum(restoration_loss(stage, real, kind, fft_weight) for stage in stages)
    if len(stages) > 1:
        loss = loss + EDGE_WEIGHT * sum(edge_loss(stage.float(), real) for stage in stages)
    return loss
