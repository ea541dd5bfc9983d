"""Deblurring networks by name, most by other authors, and restoring images of any size with them.

Each is called as network(blurry (b, 3, h, w) in [0, 1]), h and w multiples of its `multiple`, and returns the
restored image, not clamped; a network of several stages returns a list of images, the best one first.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint import read_trained
from ldm.modules.losses import PixelLoss, restoration_loss
from ldm.modules.mprnet import EDGE_WEIGHT, MPRNet, edge_loss
from ldm.modules.nafnet import NAFNet
from ldm.modules.restoration_unet import RestorationUNet
from ldm.modules.sftnet import SFTNet
from ldm.tiling import pad_to_multiple, restore_photo
from ldm.util import check_package, settle_precision

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

Made = Tensor | list[Tensor]  # output of a network with one stage, or with several


class ResidualBlock(nn.Module):
    """x + norm(conv(activation(norm(conv(x)))))."""

    def __init__(self, width: int, norm: type[nn.Module], activation: nn.Module):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            norm(width),
            activation,
            nn.Conv2d(width, width, 3, padding=1),
            norm(width),
        )

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
    """DeblurGAN's generator (Kupyn et al. 2018, section 3): blocks at quarter size, upsampled by resizing."""

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


def make_mprnet(width: int, blocks: int) -> MPRNet:
    return MPRNet(width, width // 2, width // 3, blocks)


def make_nafnet(width: int, blocks: int) -> NAFNet:
    return NAFNet(width, (1, 1, 1, blocks), 1, (1, 1, 1, 1))


def make_unet(width: int, blocks: int) -> RestorationUNet:
    return RestorationUNet(width, middle_blocks=blocks)


def make_wiener_unet(width: int, blocks: int) -> RestorationUNet:
    return RestorationUNet(width, middle_blocks=blocks, wiener=True)


OTHERS: dict[str, Callable[[int, int], nn.Module]] = {  # by width and number of blocks
    "srresnet": SRResNet,
    "deblurgan": DeblurGANGenerator,
    "mprnet": make_mprnet,
    "sftnet": SFTNet,
    "nafnet": make_nafnet,
    "unet": make_unet,
    "wiener_unet": make_wiener_unet,
}


def authors_form(shapes: dict[str, torch.Size]) -> dict:
    """Identify an authors' MPRNet or NAFNet by its parameters: name, width and blocks; {} for others."""
    if "stage3_orsnet.orb1.body.0.body.0.weight" in shapes and "shallow_feat1.0.weight" in shapes:
        blocks = sum(name.startswith("stage3_orsnet.orb1.body.") for name in shapes) // 5
        return {"generator": "mprnet", "width": shapes["shallow_feat1.0.weight"][0], "blocks": blocks}
    if "encoders.3.0.beta" in shapes and "intro.weight" in shapes and "middle_blks.1.beta" not in shapes:
        blocks = sum(name.startswith("encoders.3.") and name.endswith(".beta") for name in shapes)
        return {"generator": "nafnet", "width": shapes["intro.weight"][0], "blocks": blocks}
    return {}


def final(made: Made) -> Tensor:
    """Return the restored image of a network's output: the first in the list if it has several stages."""
    return made[0] if isinstance(made, list) else made


def content_loss(made: Made, real: Tensor, kind: PixelLoss, fft_weight: float = 0.0) -> Tensor:
    """Compute the pixel loss, plus the weighted Fourier loss if `fft_weight` is not 0.

    For several stages it is the sum over them, plus their weighted edge losses (MPRNet's equation 1).
    """
    if not isinstance(made, list):
        return restoration_loss(made, real, kind, fft_weight)
    loss = sum(restoration_loss(stage, real, kind, fft_weight) for stage in made)
    return loss + EDGE_WEIGHT * sum(edge_loss(stage.float(), real) for stage in made)


def to_unit(image: Tensor) -> Tensor:
    return (image + 1) / 2  # [-1, 1] -> [0, 1]


def restore_image(
    network: nn.Module, image: np.ndarray, noise: Tensor | None = None, **options: Any
) -> np.ndarray:
    """Restore a uint8 image (h, w, 3) of any size in eval mode.

    `noise` is the second input of train_dbgan's BGAN, which blurs images. `options` are those of
    ldm.tiling.restore_photo.
    """

    def run(part: Tensor) -> Tensor:
        h, w = part.shape[2:]
        padded = pad_to_multiple(to_unit(part), network.multiple)
        inputs = [padded] if noise is None else [padded, noise.to(padded)]
        restored = final(network.forward(*inputs))  # not the compiled network: sizes vary
        return restored[..., :h, :w].clamp(0, 1) * 2 - 1

    training = network.training
    network.eval()
    try:
        return restore_photo(image, run, next(network.parameters()).device, **options)
    finally:
        network.train(training)


# ---- any other network, through the package spandrel -------------------------------------------------------

OTHER_PURPOSES = {
    "Inpainting": "fills holes and needs a mask",
    "FaceSR": "restores cut-out faces of a fixed size",
}


def load_foreign(path: str | Path) -> "ImageModelDescriptor":
    """Load NAFNet, SwinIR, Real-ESRGAN or another network that spandrel recognises by its weight names.

    The network takes RGB (1, 3, h, w) in [0, 1] of any size, pads it as needed, and returns (1, 3, scale * h,
    scale * w), clamped. Raises FileNotFoundError, and ValueError if spandrel is not installed, if the file
    holds code or no known network, or if the network has another purpose or other channels.
    """
    weights, _ = read_trained(path)
    check_package("spandrel", f"{path}, a network of other authors,")
    import spandrel

    if find_spec("spandrel_extra_arches"):  # Restormer and others with restrictive licences
        import spandrel_extra_arches

        spandrel_extra_arches.install(ignore_duplicates=True)
    try:
        network = spandrel.ModelLoader().load_from_state_dict(weights)
    except spandrel.UnsupportedModelError as error:
        raise ValueError(
            f"{path} holds no network that spandrel {spandrel.__version__} recognises (spandrel_extra_arches "
            f"has more): its first key is {next(iter(weights))}"
        ) from error
    except Exception as error:  # known names but unexpected weights: any error may occur
        raise ValueError(f"{path} does not fit the network that its names are of: {error}") from error
    name = network.architecture.name
    if network.purpose in OTHER_PURPOSES:
        raise ValueError(f"{path} holds {name}, which {OTHER_PURPOSES[network.purpose]}: it is not used here")
    channels = network.input_channels, network.output_channels
    if channels != (3, 3):
        raise ValueError(
            f"{path} holds {name} with {channels[0]} input and {channels[1]} output channels, not 3"
        )
    return network


def check_precision(network: "ImageModelDescriptor", precision: str) -> str:
    """Return the precision for `restore_foreign`: `auto` becomes 32 if its 16-bit type is not supported.

    Raises ValueError for any other precision that the network does not support.
    """
    settled = settle_precision(precision, network.device)
    supported = {"16": network.supports_half, "bf16": network.supports_bfloat16}
    if supported.get(settled, True):
        return precision
    if precision != "auto":
        raise ValueError(f"{network.architecture.name} does not support precision {precision}: use 32")
    return "32"


def restore_foreign(network: "ImageModelDescriptor", image: np.ndarray, **options: Any) -> np.ndarray:
    """Restore a uint8 or uint16 image (h, w, 3) of any size; the result is `network.scale` times as large.

    `options` are those of ldm.tiling.restore_photo.
    """

    def run(part: Tensor) -> Tensor:
        restored = network(to_unit(part).contiguous())  # third-party code may need this memory format
        return restored.float() * 2 - 1

    return restore_photo(image, run, network.device, scale=network.scale, **options)
