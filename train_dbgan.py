"""Train BGAN, which learns to add realistic camera blur, and DBGAN, which learns to remove it.

Zhang, Luo, Zhong, Ma, Stenger, Liu, Li: Deblurring by Realistic Blurring, CVPR 2020.
Networks, losses and training loop are in this file. The paper reports 31.10 dB PSNR on GoPro.

    python train_dbgan.py all --blur_data RWBI/train --data gopro/train --val_data gopro/test --precision bf16
    python train_dbgan.py all --demo            # minutes on two CPU cores, needs no data at all

The mode `all` trains two stages, one after the other: `blur` trains BGAN on photos without pairs, `deblur`
trains DBGAN on pairs and on images that BGAN blurred. The stage `deblur` has two phases of equal length: the
content loss alone, then the full adversarial loss. Each stage is a mode of its own too. The mode `paired` is
a third stage, which trains both networks on pairs at once. The same command again resumes a stopped run.
More in docs/dbgan.md.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from harness import flags
from harness.run import Run, average_gradients, last_checkpoint, start_fabric, unscale_gradients
from harness.settings import check_ranges, plain, run_main
from harness.validation import HeldOut, Spectra, line, open_held_out, report
from ldm.checkpoint import fill, fingerprint, read_trained, write_half
from ldm.data.blurred import blurred_photos
from ldm.data.demo import write_demo
from ldm.data.paired import CropDataset, ImageFiles, PairedDataset
from ldm.data.pairs import check_apart, find_pairs, sharp_pairs
from ldm.data.patches import Patches, Source, SourceDataset, is_patches, open_source
from ldm.data.stream import item_generator
from ldm.modules.ema import EMA
from ldm.modules.generators import (
    OTHERS,
    Made,
    authors_form,
    content_loss,
    final,
    restore_image,
    to_unit,
)
from ldm.modules.image_pool import ImagePool
from ldm.modules.losses import PixelLoss
from ldm.modules.perceptual import PerceptualLoss

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # slow to import, and not needed to restore an image

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train BGAN (sharp to blurry) and DBGAN (blurry to sharp)."""

    # `blur` trains BGAN, `deblur` DBGAN, `all` one after the other, `paired` both on pairs at once
    mode: tyro.conf.Positional[Literal["paired", "blur", "deblur", "all"]] = "all"
    demo: bool = False  # train small networks on generated data, minutes on a CPU; other flags still count

    # ---- data
    data: Path | None = None  # pairs: GoPro tree, list of `blurry sharp` lines, or paired .h5 file
    blur_data: Path | None = None  # real blurred photos: a folder, or an unpaired .h5 file of both sides
    sharp_dir: Path | None = None  # folder of sharp photos for `blur`; without --data also for `deblur`
    val_data: Path | None = None  # pairs to validate on, in any form of --data
    crop_size: int = 128  # side of the training crops in pixels, a multiple of 16 (unet: 64)
    dead_leaves: flags.Whole = 0  # number of generated dead-leaves images in an epoch; not with --data
    # blur on the fly as cameras do (shake, noise, JPEG), a third of the crops simply; off: simple blur only
    realistic_blur: bool = True
    pairs: Path | None = None  # real pairs mixed among crops blurred on the fly, in any form of --data
    pairs_fraction: flags.Fraction = 0.1  # fraction of the crops that come from --pairs
    photo_crops: flags.Count = 1  # number of crops of each photo of --sharp_dir in an epoch
    crop_candidates: flags.Count = 1  # number of random crops of a sharp photo, the sharpest of which is used
    cache: bool = False  # keep all training images decoded in memory
    val_fraction: flags.Fraction = 0.05  # fraction held out for validation if --val_data is not given
    val_crop: flags.Whole = 256  # validate on the middle N pixels; 0 = whole images, far slower

    # ---- model
    generator: Literal["dbgan", *OTHERS] = "dbgan"  # network that deblurs (docs/dbgan.md has a table)
    width: flags.Count = 64  # number of channels of the generators; discriminators have as many, up to 64
    blocks: flags.Count = 16  # number of blocks of the deblurring generator; BGAN has 9/16 as many
    init_weights: Path | None = None  # file of weights that the deblurring generator starts from

    # ---- training

    # number of epochs of each phase; 0 (only `deblur`, with max_steps): the content-loss phase alone
    epochs: flags.Whole = 20
    max_steps: flags.MaxSteps = -1  # number of optimizer steps of each phase; above 0 it replaces epochs
    batch_size: flags.BatchSize = 4  # number of crops per batch and device
    accumulate_grad_batches: flags.Accumulate = 4  # number of batches per optimizer step
    learning_rate: flags.Weight = 1e-4  # peak learning rate of all networks
    schedule: Literal["cosine", "constant"] = "cosine"  # learning-rate schedule of each phase, after warmup
    warmup_steps: flags.Whole = 0  # number of steps in which the learning rate rises from 0
    max_grad_norm: flags.Weight = 0.0  # largest global norm of the gradients, 0 for no clipping
    content_loss: PixelLoss = "l1"  # pixel loss that the content loss consists of
    fft_loss_weight: flags.Weight = 0.0  # weight of the L1 distance of Fourier transforms in the content loss
    # weight of the VGG-19 perceptual loss; with 0 the content loss gets weight 1 and VGG-19 is not needed
    perceptual_loss_weight: flags.Weight = 1.0
    generated_fraction: flags.Fraction = 0.5  # fraction of DBGAN's inputs that BGAN makes from sharp crops
    precision: flags.Precision = "32"  # floating-point type; bf16 and 16 are mixed precision, faster on GPUs
    compile: bool = False  # use torch.compile: minutes at the start, then faster steps
    devices: flags.Devices = 1  # number of GPUs of each machine (processes on a CPU)
    num_workers: flags.Whole = 8  # number of processes that prepare images
    seed: int = 0  # random seed of the data order, initial weights and noise

    # ---- logging

    # folder with one subfolder for each stage, for its logs, images and checkpoints
    output_dir: Path = Path("outputs/dbgan")
    log_epoch: flags.Count = 1  # number of epochs between validations, each of which saves a checkpoint


DEMO_DATA = Path("outputs/dbgan_demo/data")
DEMO = {
    "output_dir": DEMO_DATA.parent,
    "data": DEMO_DATA / "train",
    "blur_data": DEMO_DATA / "real",
    "val_data": DEMO_DATA / "valid",
    "crop_size": 48,
    "cache": True,
    "width": 16,
    "blocks": 2,
    "perceptual_loss_weight": 0.0,
    "generated_fraction": 0.2,
    "epochs": 6,
    "accumulate_grad_batches": 1,
    "learning_rate": 1e-3,
    "num_workers": 1,
    "log_epoch": 2,
}


class Weights(NamedTuple):
    """Weights of the losses, beside the perceptual loss."""

    content: float = 0.005  # alpha (paper, section 3)
    adversarial: float = 0.01  # beta (paper, section 3)
    cycle: float = 10.0  # weight of the cycle loss in `blur`: sharp to blurry and back (Zhu et al. 2017)
    identity: float = 5.0  # weight of the identity loss in `blur`: blurry images stay as they are


WITHOUT_VGG = Weights(content=1.0, adversarial=0.001)  # the content loss takes the perceptual loss's place
DEMO_WEIGHTS = WITHOUT_VGG._replace(cycle=1.0, identity=0.5)  # BGAN learns blur in a few hundred steps

NOISE = 4  # number of noise channels of BGAN, each one random number for the whole image
LAST_LEARNING_RATE = 1e-6  # at the end of the cosine
EMA_DECAY = 0.999  # EMA weights are validated and exported
BETAS = {"paired": (0.9, 0.999), "blur": (0.5, 0.999), "deblur": (0.9, 0.999)}  # of Adam
CONTENT_BETAS = (0.9, 0.9)  # without discriminators; at 1e-3 with 0.999 the U-Net diverged after 1,500 steps
POOL = 50  # number of earlier generated images kept for each discriminator of `blur`
SOFT_REAL, SOFT_FAKE = 0.9, 0.1  # soft labels of the least-squares discriminators
COLOR_JITTER = 0.1  # strength, the same for both images of a pair; prevents colour shifts of the results
VAL_IMAGES = 32  # largest number of validation images
# Settings that may differ when a run is resumed. All but devices and batch_size leave the weights the same,
# up to rounding. Those two may only change together: Run checks that the number of crops in a step stays. The
# weights then differ a little: BatchNorm, relativistic losses and noise depend on how a step is split.
MAY_CHANGE = "mode devices batch_size num_workers log_epoch cache compile val_crop".split()


# ---- networks ----------------------------------------------------------------------------------------------


def initialise(network: nn.Module, width: int) -> None:
    """Initialise weights from a normal distribution: std 0.01 as in the paper, more for narrow networks."""
    std = 0.01 if width >= 64 else 0.08
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each on the input and all earlier outputs; the last is added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n * width, width, 3, padding=1) for n in range(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs[:4]:
            features.append(F.leaky_relu(conv(torch.cat(features, dim=1)), 0.2))  # (b, width, h, w)
        return x + self.convs[4](torch.cat(features, dim=1))


class DBGANGenerator(nn.Module):
    """The paper's deblurring network: 16 dense blocks, no normalisation, and a residual to the input.

    forward(blurry): (b, 3, h, w) in [0, 1] -> the same size, not clamped.
    """

    multiple = 1  # height and width of the input must be multiples of it

    def __init__(self, width: int = 64, blocks: int = 16, channels: int = 3):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(DenseBlock(width) for _ in range(blocks)))
        wide, last = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.last = nn.Sequential(wide, nn.LeakyReLU(0.2), last)
        initialise(self, width)

    def forward(self, image: Tensor) -> Tensor:
        return image[:, :3] + self.last(self.blocks(self.first(image)))


class BGANGenerator(DBGANGenerator):
    """The paper's blurring network: 9 dense blocks on the sharp image and four random numbers.

    forward(sharp, noise): (b, 3, h, w) and (b, 4, 1, 1) from a normal distribution -> blurry (b, 3, h, w).
    """

    def __init__(self, width: int = 64, blocks: int = 9):
        super().__init__(width, blocks, channels=3 + NOISE)

    def forward(self, sharp: Tensor, noise: Tensor) -> Tensor:
        tiled = noise.expand(-1, -1, *sharp.shape[2:])  # (b, 4, h, w)
        return super().forward(torch.cat([sharp, tiled.to(sharp)], dim=1))


def draw_noise(sharp: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample the noise of BGAN on the CPU, so that it is the same on every device."""
    return torch.randn(len(sharp), NOISE, 1, 1, generator=generator).to(sharp)


class Discriminator(nn.Module):
    """SRGAN's (Ledig et al. 2017, figure 4) for crops of any size: (b, 3, h, w) in [0, 1] -> logits (b,).

    The features are averaged over all positions before the two dense layers.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        enter = width
        for factor, stride in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)):
            leave = factor * width
            conv = nn.Conv2d(enter, leave, 3, stride, padding=1)
            layers += [conv, nn.BatchNorm2d(leave), nn.LeakyReLU(0.2)]
            enter = leave
        self.features = nn.Sequential(*layers)  # (b, 8 width, h / 16, w / 16)
        self.score = nn.Sequential(nn.Linear(enter, 16 * width), nn.LeakyReLU(0.2), nn.Linear(16 * width, 1))
        initialise(self, width)

    def forward(self, image: Tensor) -> Tensor:
        return self.score(self.features(image).mean(dim=(2, 3)))[:, 0].float()


GENERATORS: dict[str, Callable[[int, int], nn.Module]] = {"dbgan": DBGANGenerator, **OTHERS}


# ---- files of weights, and images of any size --------------------------------------------------------------


def load_generator(path: str | Path, kind: Literal["blur", "deblur"]) -> nn.Module:
    """Load a generator from a file of this script, or a file of MPRNet's or NAFNet's authors.

    Raises FileNotFoundError if the file is missing, and ValueError if it holds no such generator.
    """
    weights, content = read_trained(path)
    form = content["settings"]
    own = {name.removeprefix(f"{kind}."): v for name, v in weights.items() if name.startswith(f"{kind}.")}
    if kind == "deblur" and not form:
        own = {name.removeprefix("module."): value for name, value in weights.items()}
        form = authors_form({name: value.shape for name, value in own.items()})
    if not own or not form.keys() >= {"generator", "width", "blocks"}:
        raise ValueError(f"{path} holds no {kind}ring generator of train_dbgan.py")
    if kind == "blur":
        blocks = sum(name.startswith("blocks.") and name.endswith(".convs.0.weight") for name in own)
        network = BGANGenerator(form["width"], blocks)
    else:
        network = GENERATORS[form["generator"]](form["width"], form["blocks"])
    return fill(network, own, path).eval()


def export(generators: nn.ModuleDict, settings: Settings, folder: Path, suffix: str = "") -> None:
    """Write bgan and dbgan + `suffix` in half precision, with the metadata that `load_generator` reads."""
    form = {"generator": settings.generator, "width": settings.width, "blocks": settings.blocks}
    for kind, network in generators.items():
        weights = {f"{kind}.{name}": value for name, value in network.state_dict().items()}
        name = "bgan" if kind == "blur" else "dbgan"
        write_half(folder / f"{name}{suffix}.safetensors", weights, form)


def blur_image(network: nn.Module, image: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    """Blur a uint8 image (h, w, 3) by BGAN with the noise of this seed; `options` as in `restore_image`."""
    noise = draw_noise(torch.empty(1, 3, 1, 1), item_generator(seed))
    return restore_image(network, image, noise, **options)


# ---- losses ------------------------------------------------------------------------------------------------


# Generators: "blur" is BGAN, "deblur" is DBGAN.
# Discriminators: "blur" judges blurry images, "sharp" judges sharp ones: real or generated.
@dataclass
class StageModels:
    """The networks that a stage trains, and what else its losses need."""

    generators: nn.ModuleDict
    discriminators: nn.ModuleDict
    weights: Weights
    pools: dict[str, ImagePool] = field(default_factory=dict)  # one for each discriminator
    perceptual: PerceptualLoss | None = None
    blurrer: nn.Module | None = None  # a trained BGAN, which is not trained further


def judge(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return the discriminator's scores (b,) of real and of fake images.

    Both go through in one batch: in separate batches BatchNorm would normalise away the difference between
    them.
    """
    real_scores, fake_scores = discriminator(torch.cat([real, fake.to(real)])).chunk(2)
    return real_scores, fake_scores


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Context in which the network passes gradients to its input, but gets none for its own weights."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def relativistic_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator: real images score higher than the average fake, and fakes lower.

    Scores (b,): C(real) - mean C(fake) against the label 1, C(fake) - mean C(real) against 0, by the mean of
    their cross-entropies (relativistic average GAN, Jolicoeur-Martineau 2019; the paper's RBL and RDBL).
    """
    return (bce(real - fake.mean(), 1.0) + bce(fake - real.mean(), 0.0)) / 2


def relativistic_g_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the generator, through `fake`: both probabilities become 0.5, real and fake score alike."""
    return (bce(real - fake.mean(), 0.5) + bce(fake - real.mean(), 0.5)) / 2


def bce(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def least_squares(scores: Tensor, label: float) -> Tensor:
    return (scores - label).square().mean()  # Mao et al. 2017


def relativistic_losses(
    models: StageModels, name: str, made: Made, real: Tensor, alpha: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the losses of a discriminator and of the generator that made `made` (paper, section 3).

    The generator's is perceptual + alpha * content + beta * relativistic. Both can be minimised in one
    backward: `made` is detached for the first, the discriminator frozen for the second.
    """
    discriminator = models.discriminators[name]
    fake = final(made)  # `made` may be a list, one image for each stage of the network
    loss_d = relativistic_d_loss(*judge(discriminator, real, fake.detach()))
    with frozen(discriminator):
        adversarial = relativistic_g_loss(*judge(discriminator, real, fake))
    content = content_loss(made, real, settings.content_loss, settings.fft_loss_weight)
    loss_g = alpha * content + models.weights.adversarial * adversarial
    if models.perceptual:
        distance = models.perceptual(fake * 2 - 1, real * 2 - 1).mean()
        loss_g = loss_g + settings.perceptual_loss_weight * distance
    return loss_d, loss_g


# Each of these functions is a generator. `next()` runs one forward pass and yields a dict of losses;
# `train_step` adds them up, calls backward, then asks for the next dict. The dicts share no graph: only one
# graph is in memory at a time, which takes a third of the memory in `blur`.
Terms = Iterator[dict[str, Tensor]]


def content_losses(models: StageModels, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """Yield the loss of DBGAN's pretraining: the content loss."""
    blurry = replace_some(models.blurrer, settings.generated_fraction, blurry, sharp)
    restored = models.generators["deblur"](blurry)
    yield {"total_loss": content_loss(restored, sharp, settings.content_loss, settings.fft_loss_weight)}


def deblur_losses(models: StageModels, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """Yield the losses of DBGAN against its discriminator (paper, equations of RDBL)."""
    blurry = replace_some(models.blurrer, settings.generated_fraction, blurry, sharp)
    restored = models.generators["deblur"](blurry)
    loss_d, loss_g = relativistic_losses(models, "sharp", restored, sharp, models.weights.content, settings)
    yield {"loss_d": loss_d, "total_loss": loss_g}


def paired_losses(models: StageModels, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """Yield the losses of both networks on pairs; BGAN makes some of DBGAN's inputs."""
    made = blurred(models.generators["blur"], sharp)
    # BGAN's loss in the paper has no content loss; without VGG-19 that takes the perceptual loss's place.
    alpha = 0.0 if models.perceptual else models.weights.content
    loss_d, loss_g = relativistic_losses(models, "blur", made, blurry, alpha, settings)
    yield {"loss_d_blur": loss_d, "loss_g": loss_g}
    blurry = mix(made.detach().clamp(0, 1), blurry, settings.generated_fraction)
    for losses in deblur_losses(models, settings, blurry, sharp):  # `blurrer` is None in this stage
        yield {"loss_d_sharp": losses["loss_d"], "loss_g": losses["total_loss"]}


def unpaired_losses(models: StageModels, settings: Settings, blurry: Tensor, sharp: Tensor) -> Terms:
    """Yield the losses of BGAN and DBGAN without pairs: LSGAN, cycle, identity (Zhu et al. 2017)."""
    blur = partial(blurred, models.generators["blur"])

    def deblur(image: Tensor) -> Tensor:
        return final(models.generators["deblur"](image))

    yield cycle_losses(models, "blur", forward=blur, backward=deblur, source=sharp, real=blurry)
    yield cycle_losses(models, "sharp", forward=deblur, backward=blur, source=blurry, real=sharp)
    # Identity: blurry images should stay as they are in BGAN, sharp images in DBGAN
    yield {"loss_g": models.weights.identity * F.l1_loss(blur(blurry).float(), blurry)}
    yield {"loss_g": models.weights.identity * F.l1_loss(deblur(sharp).float(), sharp)}


def cycle_losses(
    models: StageModels,
    name: str,
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    source: Tensor,
    real: Tensor,
) -> dict[str, Tensor]:
    """Return the losses of one direction: of discriminator `name`, and of the generators.

    `forward` turns `source` into an image like `real`, `backward` turns that into `source` again.
    """
    discriminator = models.discriminators[name]
    made = forward(source)
    real_scores, fake_scores = judge(discriminator, real, models.pools[name](made))
    loss_d = least_squares(real_scores, SOFT_REAL) + least_squares(fake_scores, SOFT_FAKE)
    with frozen(discriminator):
        _, fake_scores = judge(discriminator, real, made)
    cycle = F.l1_loss(backward(made).float(), source)
    loss_g = least_squares(fake_scores, SOFT_REAL) + models.weights.cycle * cycle
    return {f"loss_d_{name}": loss_d / 2, "loss_g": loss_g}


def blurred(blurrer: nn.Module, sharp: Tensor) -> Tensor:
    """Blur sharp images by BGAN with new noise."""
    return blurrer(sharp, draw_noise(sharp))


def replace_some(blurrer: nn.Module | None, fraction: float, blurry: Tensor, sharp: Tensor) -> Tensor:
    """Replace random blurry images by sharp ones that BGAN blurred."""
    if blurrer is None:
        return blurry
    with torch.no_grad():
        made = blurred(blurrer, sharp).float().clamp(0, 1)
    return mix(made, blurry, fraction)


def mix(made: Tensor, real: Tensor, fraction: float) -> Tensor:
    """Take each image from `made` with probability `fraction`, else from `real`."""
    chosen = torch.rand(len(real), 1, 1, 1) < fraction
    return torch.where(chosen.to(real.device), made.to(real), real)


# ---- training step -----------------------------------------------------------------------------------------


def train_step(
    fabric: "Fabric",
    optimizer: torch.optim.Optimizer,
    batch: dict,
    parts: int,
    losses: Callable[[Tensor, Tensor], Terms],
    max_grad_norm: float = 0.0,
) -> dict[str, Tensor]:
    """Take a step of all networks on the mean gradient of `parts` equal parts of a batch; return losses."""
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    blurry_parts = to_unit(batch["blurry"]).chunk(parts)
    sharp_parts = to_unit(batch["sharp"]).chunk(parts)
    for blurry, sharp in zip(blurry_parts, sharp_parts, strict=True):
        forward_passes = losses(blurry, sharp)
        while True:
            with fabric.autocast():  # forward pass, under autocast
                loss_values = next(forward_passes, None)
            if loss_values is None:
                break
            fabric.backward(sum(loss_values.values()) / parts)  # backward, outside autocast
            for name, value in loss_values.items():
                sums[name] = sums.get(name, 0) + value.detach() / parts
    average_gradients(fabric, optimizer)  # DDP's wrapper cannot run a network twice in a step
    if max_grad_norm:
        unscale_gradients(fabric, optimizer)
        # generators and discriminators together: the optimizer has one group
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    return sums


def learning_rate_factor(step: int, phases: list[int], settings: Settings) -> float:
    """Return the learning-rate multiplier after `step` steps of a stage whose phases have these lengths.

    It rises linearly during the first `warmup_steps` of the stage. Then it follows, in each phase, a cosine
    from 1 down to LAST_LEARNING_RATE, or stays 1.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    last = LAST_LEARNING_RATE / max(settings.learning_rate, LAST_LEARNING_RATE)
    current, *later = [length for length in phases if length]
    for length in later:
        if step >= current:  # the next phase has begun
            step, current = step - current, length
    return last + (1 - last) * (1 + math.cos(math.pi * min(1, step / current))) / 2


# ---- data --------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise ValueError for settings that would fail only later."""
    check_ranges(settings)
    data, mode = settings.data, settings.mode
    if settings.crop_size < 16 or settings.crop_size % 16:
        raise ValueError(f"crop_size must be a multiple of 16, not {settings.crop_size}")
    if mode in ("blur", "all") and not settings.blur_data:
        raise ValueError("the stage `blur` needs --blur_data: real blurred photos (or try --demo)")
    if mode != "blur" and not (data or settings.sharp_dir or settings.dead_leaves):
        raise ValueError("nothing to train on: give --data, --sharp_dir or --dead_leaves (or try --demo)")
    if data and (settings.dead_leaves or settings.pairs):
        raise ValueError("--dead_leaves and --pairs go with photos blurred on the fly, not with --data")
    if not settings.epochs and (mode != "deblur" or settings.max_steps < 1):
        raise ValueError("nothing to train: --epochs 0 is for `deblur` on the content loss, with --max_steps")


def open_data(settings: Settings, stage: str) -> tuple[CropDataset, HeldOut]:
    """Return the training set of a stage, and the validation set.

    stage            given                    blurry images                   sharp images
    blur             --sharp_dir              blur_data                       sharp_dir
    blur             --data, no --sharp_dir   blur_data                       of the pairs in data
    blur             neither                  blur_data (an .h5 file)         blur_data
    deblur, paired   --data                   data                            data
    deblur, paired   no --data                sharp images, blurred on        sharp_dir and dead_leaves
                                              the fly; some from --pairs

    Validation pairs: val_data, else `val_fraction` of the training pairs.
    """
    data, size, seed, cache = settings.data, settings.crop_size, settings.seed, settings.cache
    pairs = []
    if not is_patches(data):
        pairs = find_pairs(data) if data else sharp_pairs(settings.sharp_dir)
    pairs, held_out = open_held_out(
        pairs, settings.val_data, settings.val_fraction, VAL_IMAGES, seed, settings.val_crop
    )
    photos = [pair.sharp for pair in pairs]
    options = {"augment": True, "color_jitter": COLOR_JITTER}
    if stage == "blur":
        blurry, sharp = open_unpaired(settings, photos)
        candidates = settings.crop_candidates if settings.sharp_dir else 1
        return SourceDataset(blurry, sharp, size, seed, candidates=candidates, **options), held_out
    if is_patches(data):
        blurry, sharp = Patches(data, "blur"), Patches(data, "sharp")
        return SourceDataset(blurry, sharp, size, seed, paired=True, **options), held_out
    if data:
        return PairedDataset(pairs, size, seed, cache=cache, **options), held_out
    dataset = blurred_photos(
        photos,
        settings.dead_leaves,
        size,
        seed,
        settings.realistic_blur,
        repeats=settings.photo_crops,
        candidates=settings.crop_candidates,
        pairs=settings.pairs,
        pairs_fraction=settings.pairs_fraction,
        cache=cache,
        **options,
    )
    return dataset, held_out


def open_unpaired(settings: Settings, photos: list[Path]) -> tuple[Source, Source]:
    """Return real blurred images, and sharp ones: of --sharp_dir, else of the pairs, else of an .h5 file."""
    for other in (settings.data, settings.sharp_dir):
        if other and not is_patches(other):  # a file has both sides
            check_apart(settings.blur_data, other)
    blurry = open_source(settings.blur_data, "blur", settings.cache)
    if settings.data and settings.sharp_dir:
        photos = [pair.sharp for pair in sharp_pairs(settings.sharp_dir)]
    if settings.sharp_dir:
        photos = photos * settings.photo_crops
    if photos:
        return blurry, ImageFiles(photos, settings.cache)
    file = settings.data or settings.blur_data
    if not is_patches(file):
        raise ValueError("the stage `blur` needs sharp photos: give --sharp_dir or --data")
    return blurry, Patches(file, "sharp")


# ---- the whole run -----------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A stage: the networks it trains, its losses (one for each phase), and the settings it ignores."""

    generators: list[str]
    discriminators: list[str]
    losses: list[Callable]
    unused: list[str]


NOT_OF_BLUR = "generated_fraction content_loss fft_loss_weight perceptual_loss_weight".split()
STAGES = {
    "paired": Stage(["blur", "deblur"], ["blur", "sharp"], [paired_losses], ["blur_data"]),
    "blur": Stage(["blur", "deblur"], ["blur", "sharp"], [unpaired_losses], NOT_OF_BLUR),
    "deblur": Stage(["deblur"], ["sharp"], [content_losses, deblur_losses], ["blur_data"]),
}


def first_generator(kind: str, settings: Settings, stage: str) -> nn.Module:
    """Make a generator with its initial weights; --init_weights is not read if the stage is resumed.

    Raises the errors of `load_generator`, and ValueError if the file holds another network.
    """
    if kind == "blur":
        return BGANGenerator(settings.width, max(1, settings.blocks * 9 // 16))
    network = GENERATORS[settings.generator](settings.width, settings.blocks)
    path = settings.init_weights
    if path is None or last_checkpoint(settings.output_dir / stage).is_file():
        return network
    weights, _ = read_trained(path)
    if settings.generator == "wiener_unet" and all(name.startswith("estimator.") for name in weights):
        fill(network.wiener, weights, path)  # a file of extras/train_blind_wiener.py
        return network
    other = load_generator(path, "deblur")
    if type(other) is not type(network):
        raise ValueError(f"{path} holds a {type(other).__name__}, this run trains a {type(network).__name__}")
    return fill(network, other.state_dict(), path)


def make_models(
    settings: Settings, stage: str, perceptual: PerceptualLoss | None, device: torch.device
) -> StageModels:
    """Make the networks of a stage on their device."""
    discriminator_names = STAGES[stage].discriminators
    weights = Weights() if settings.perceptual_loss_weight else WITHOUT_VGG
    models = StageModels(
        nn.ModuleDict({kind: first_generator(kind, settings, stage) for kind in STAGES[stage].generators}),
        nn.ModuleDict({name: Discriminator(min(64, settings.width)) for name in discriminator_names}),
        DEMO_WEIGHTS if settings.demo else weights,
        {name: ImagePool(POOL) for name in discriminator_names},
        perceptual,
    )
    for networks in (models.generators, models.discriminators):
        networks.to(device, memory_format=torch.channels_last)
        if settings.compile:
            for network in networks.values():
                network.compile()
    if stage == "deblur" and settings.generated_fraction:
        blurrer = load_generator(bgan_path(settings), "blur")
        models.blurrer = blurrer.requires_grad_(False).to(device)
    return models


def bgan_path(settings: Settings) -> Path:
    return settings.output_dir / "blur" / "bgan.safetensors"


def may_change(settings: Settings, stage: str) -> list[str]:
    """Return the settings that may differ when a stage is resumed.

    With a constant learning rate these include the length, unless a second phase would begin elsewhere.
    """
    names = MAY_CHANGE + STAGES[stage].unused
    if settings.schedule == "constant":
        if stage != "deblur":
            names = [*names, "epochs", "max_steps"]
        elif not settings.epochs:  # the content-loss phase alone
            names = [*names, "max_steps"]
    return names


def phase_lengths(settings: Settings, stage: str, steps_per_epoch: int) -> list[int]:
    """Return the number of steps of each phase of a stage."""
    length = settings.max_steps if settings.max_steps > 0 else settings.epochs * steps_per_epoch
    if stage != "deblur":
        return [length]
    return [length, length if settings.epochs else 0]  # content loss, then adversarial


def validate(
    run: Run, networks: nn.ModuleDict, held_out: HeldOut, spectra: Spectra | None, precision: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores of DBGAN and, if BGAN is trained, its spectral distances; write grids."""
    restore = partial(restore_image, networks["deblur"], precision=precision)
    scores, image = held_out.evaluate(restore, run)
    run.log_image("deblurred", image)
    if spectra is None:
        return scores, {}
    distances, image = spectra(partial(blur_image, networks["blur"], precision=precision))
    run.log_image("blurred", image)
    return scores, distances


def main(settings: Settings) -> None:
    check(settings)
    stages = ["blur", "deblur"] if settings.mode == "all" else [settings.mode]

    # Fail now rather than later: data, initial weights, BGAN, VGG-19
    fabric = start_fabric(settings.devices, settings.precision, settings.seed)
    if settings.demo:
        write_demo(DEMO_DATA, (settings.data, settings.val_data, settings.blur_data))
    data = {stage: open_data(settings, stage) for stage in stages}
    for stage in stages:
        multiple = first_generator("deblur", settings, stage).multiple
        if settings.crop_size % multiple:
            raise ValueError(
                f"--generator {settings.generator} needs a crop_size that is a multiple of {multiple}, "
                f"not {settings.crop_size}"
            )
    if settings.mode == "deblur" and settings.generated_fraction and not bgan_path(settings).is_file():
        raise FileNotFoundError(
            f"BGAN not found: {bgan_path(settings)}; train it with `blur`, copy one there "
            "(models/bgan.safetensors is a small one), or do without (--generated_fraction 0)"
        )
    perceptual = None
    if settings.perceptual_loss_weight and settings.mode != "blur":
        perceptual = PerceptualLoss().to(fabric.device)
    for stage in stages:
        fabric.seed_everything(settings.seed, verbose=False)
        train(fabric, settings, stage, *data[stage], perceptual)


def train(
    fabric: "Fabric",
    settings: Settings,
    stage: str,
    dataset: CropDataset,
    held_out: HeldOut,
    perceptual: PerceptualLoss | None,
) -> None:
    """Train one stage from its last checkpoint, or from the start, to its end."""
    # Networks, optimizer, EMA, learning rate
    models = make_models(settings, stage, perceptual, fabric.device)
    networks = models.generators
    parameters = [*networks.parameters(), *models.discriminators.parameters()]
    fused = fabric.device.type == "cuda"
    betas = BETAS[stage] if settings.epochs else CONTENT_BETAS
    optimizer = torch.optim.Adam(parameters, settings.learning_rate, betas, fused=fused)
    fabric_optimizer = fabric.setup_optimizers(optimizer)
    ema = EMA(networks, EMA_DECAY)
    batch_size = settings.batch_size * settings.accumulate_grad_batches
    steps_per_epoch = max(1, round(len(dataset) / (batch_size * fabric.world_size)))
    phases = phase_lengths(settings, stage, steps_per_epoch)
    steps = sum(phases)
    schedule = partial(learning_rate_factor, settings=settings, phases=phases)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    # Resume
    parts = {"state_dict": networks, "discriminators": models.discriminators, "optimizer": optimizer}
    parts |= {"scheduler": scheduler, "ema": ema}
    parts |= {f"pool_{name}": pool for name, pool in models.pools.items()}
    known = {**plain(settings), "samples": len(dataset), "blurrer": fingerprint(models.blurrer)}
    run = Run(fabric, settings.output_dir / stage, known, parts, may_change(settings, stage))
    baseline, _ = held_out.evaluate(lambda blurry: blurry, run)
    spectra = None
    if "blur" in networks:
        real = open_source(settings.blur_data, "blur") if stage == "blur" else None
        spectra = Spectra(held_out, real)
    run.say(f"{stage}: {len(dataset)} training images, {steps} steps; {len(held_out)} held out")

    # Loop
    loader = run.loader(dataset, batch_size, steps, settings.seed, settings.num_workers)
    for batch in run.batches(loader, steps):
        phase = 0 if run.step < phases[0] else 1
        losses = partial(STAGES[stage].losses[phase], models, settings)
        metrics = train_step(
            fabric, fabric_optimizer, batch, settings.accumulate_grad_batches, losses, settings.max_grad_norm
        )
        scheduler.step()
        ema.update(networks)
        run.advance(metrics, batch["path"])
        ends_phase = run.step in (phases[0], steps)
        if run.step % (settings.log_epoch * steps_per_epoch) and not ends_phase:
            continue

        # Validate the EMA weights, export them at the end of a phase, log, save
        values = {f"train/{name}": value for name, value in run.means().items()}
        with ema.applied(networks):
            scores, distances = validate(run, networks, held_out, spectra, settings.precision)
            if fabric.is_global_zero and ends_phase:
                export(networks, settings, run.folder, "" if run.step == steps else "_content")
        values |= distances
        run.log(values | report(scores, baseline))
        run.save(score=scores["psnr"])
        run.say(f"{stage} epoch {run.step // steps_per_epoch}: {line(values, scores, baseline)}")
    name, results = ("bgan", "blurred") if stage == "blur" else ("dbgan", "restored")
    weights = run.folder / f"{name}.safetensors"
    run.finish(f"python infer.py {name} --checkpoint_path {weights} --input PHOTOS --output_dir {results}")


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
