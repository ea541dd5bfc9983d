"""SRN-DeblurNet: the scale-recurrent network, trained from scratch and explained in one file.

Tao, Gao, Shen, Wang, Jia: Scale-recurrent Network for Deep Image Deblurring, CVPR 2018.

    python train_srn.py --data GOPRO_Large/train --val_data GOPRO_Large/test --precision bf16
    python train_srn.py --sharp_dir my_photos       # no pairs: the blur is made on the fly
    python train_srn.py --demo                      # minutes on two CPU cores, needs no data at all

The same command again resumes a stopped run. Published for GoPro: 30.26 dB. More in docs/srn.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import flags
from harness.run import Run, last_checkpoint, start_fabric, unscale_gradients
from harness.settings import check_ranges, plain, run_main
from harness.validation import HeldOut, line, open_held_out, report
from ldm.checkpoint import fill, read_trained, write_half
from ldm.data.blurred import blurred_photos
from ldm.data.paired import CropDataset, PairedDataset
from ldm.data.pairs import find_pairs, sharp_pairs
from ldm.modules.ema import EMA
from ldm.modules.losses import PixelLoss, restoration_loss
from ldm.tiling import pad_to_multiple, restore_photo
from ldm.tiling import self_ensemble as average_rotations

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # slow to import, and not needed to restore an image

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train SRN-DeblurNet on pairs of images, or on sharp images alone."""

    demo: bool = False  # train a small network on generated images, minutes on a CPU; other flags still count

    # ---- data
    data: Path | None = None  # pairs: GoPro tree, list file of `blurry sharp` lines, .jsonl, or blurry images
    sharp_dir: Path | None = None  # sharp images: ground truth of --data, or photos to blur on the fly
    dead_leaves: flags.Whole = 0  # number of generated images in an epoch, to be blurred
    val_data: Path | None = None  # pairs to validate on, in any form of --data
    crop_size: int = 256  # side of the training crops in pixels, a multiple of 16
    realistic_blur: bool = True  # blur 2 of 3 crops as cameras do (shake, noise, JPEG); off: simple blur only
    pairs: Path | None = None  # real pairs mixed among crops blurred on the fly, in any form of --data
    pairs_fraction: flags.Fraction = 0.1  # fraction of the crops that come from --pairs
    photo_crops: flags.Count = 1  # number of crops of each photo of --sharp_dir in an epoch
    crop_candidates: flags.Count = 1  # number of random crops of which the sharpest is taken, on the fly
    cache: bool = False  # keep all training images decoded in memory
    val_fraction: flags.Fraction = 0.05  # fraction held out for validation if --val_data is not given
    val_images: flags.Count = 32  # highest number of images to validate on
    val_crop: flags.Whole = 0  # validate on the middle N pixels; 0 = whole images

    # ---- model
    width: flags.Count = 32  # number of channels at full resolution
    residual: bool = False  # predict the difference to the blurry image
    sampling: bool = False  # work at half resolution, 2 x 2 pixels as channels: 4 times less computation
    init: Literal["default", "xavier"] = "default"  # distribution of the initial weights: torch's or Xavier's
    init_weights: Path | None = None  # file of weights to start from; a run that exists is resumed instead

    # ---- training
    epochs: flags.Count = 2000  # number of epochs, if max_steps is not above 0
    max_steps: flags.MaxSteps = -1  # number of optimizer steps; above 0 it replaces epochs
    batch_size: flags.BatchSize = 16  # number of crops per step and device
    learning_rate: flags.Weight = 1e-4  # learning rate of the first step
    schedule: Literal["step", "power", "cosine"] = "step"  # 0.3^(epoch // 500), (1 - t/T)^0.3, cosine
    loss: PixelLoss = "mse"  # distance of pixels at each scale
    fft_loss_weight: flags.Weight = 0.0  # weight of the distance of Fourier transforms; MIMO-UNet has 0.1
    optimizer: Literal["adam", "sgd"] = "adam"  # optimizer of the training: Adam, or SGD with momentum
    momentum: flags.Fraction = 0.9  # momentum of the optimizer sgd
    nesterov: bool = True  # use Nesterov's momentum in the optimizer sgd
    weight_decay: flags.WeightDecay = 0.0  # weight of the L2 regularisation
    max_grad_norm: flags.Weight = 0.0  # largest global norm of the gradients, 0 for no clipping
    precision: flags.Precision = "32"  # computing precision; bf16 and 16 are mixed, and faster on GPUs
    compile: bool = False  # use torch.compile: minutes at the start, then faster steps
    devices: flags.Devices = 1  # number of GPUs of each machine (processes on a CPU)
    num_workers: flags.Whole = 8  # number of processes that prepare images
    seed: int = 0  # random seed of the data order, initial weights and blur

    # ---- logging
    output_dir: Path = Path("outputs/srn")  # folder of logs, images and checkpoints; a run in it is resumed
    log_epoch: flags.Count = 10  # number of epochs between validations, each of which saves a checkpoint


DEMO = {
    "output_dir": Path("outputs/srn_demo"),
    "dead_leaves": 1360,
    "realistic_blur": False,
    "val_crop": 256,
    "crop_size": 64,
    "width": 16,
    "residual": True,
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 4e-4,
    "schedule": "power",
    "num_workers": 1,
    "log_epoch": 1,
}
# Settings that may differ when a run is resumed: they change the speed, not the weights (beyond rounding).
MAY_CHANGE = "devices batch_size num_workers log_epoch cache compile".split()
LSTM_CLIP = 3.0  # highest norm of the ConvLSTM's gradients
EMA_DECAY = 0.999  # EMA weights are validated and exported
DEMO_BLUR_SCALE = 0.4  # the demonstration's blur is mild, as it trains only for minutes


# ---- network -----------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """x + conv(relu(conv(x))), no normalisation and no ReLU after the sum (paper, section 3.2)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


def resblocks(width: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(width) for _ in range(3)))


class EBlock(nn.Module):
    """Encoder block: a convolution that may halve the resolution, then three residual blocks."""

    def __init__(self, in_width: int, out_width: int, stride: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(in_width, out_width, 5, stride, padding=2), nn.ReLU())
        self.resblock_stack = resblocks(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblock_stack(self.conv(x))  # (b, in, h, w) -> (b, out, h / stride, w / stride)


class DBlock(nn.Module):
    """Decoder block: three residual blocks, then a transposed convolution that doubles the resolution."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.resblock_stack = resblocks(in_width)
        deconv = nn.ConvTranspose2d(in_width, out_width, 5, stride=2, padding=2, output_padding=1)
        self.deconv = nn.Sequential(deconv, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.deconv(self.resblock_stack(x))  # (b, in, h, w) -> (b, out, 2h, 2w)


class OutBlock(nn.Module):
    """Three residual blocks, then a convolution to RGB."""

    def __init__(self, width: int, channels: int = 3):
        super().__init__()
        self.resblock_stack = resblocks(width)
        self.conv = nn.Sequential(nn.Conv2d(width, channels, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.resblock_stack(x))


class ConvLSTMCell(nn.Module):
    """LSTM cell with 5x5 convolutions as products (Shi et al. 2015), without peepholes or forget bias."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(2 * width, 4 * width, 5, padding=2)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.conv(torch.cat([x, hidden], dim=1))  # (b, 4 width, h, w)
        enter, forget, leave, new = gates.chunk(4, dim=1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell


class SRNDeblurNet(nn.Module):
    """One encoder-decoder applied at quarter, half and full size, each time starting from the last estimate.

    `forward(b1, b2, b3) -> i1, i2, i3` maps blurry images (b, 3, h, w) in [-1, 1] at full, half and quarter
    size to restored ones of the same sizes, not clamped; h and w are multiples of `multiple`. The function
    `restore` takes any size. `sampling` folds 2 x 2 pixels into channels (our addition, not in the paper).
    """

    def __init__(self, width: int = 32, residual: bool = False, sampling: bool = False):
        super().__init__()
        self.width, self.residual, self.sampling = width, residual, sampling
        self.side = 2 if sampling else 1  # side of the squares of pixels that become channels
        self.multiple = 16 * self.side
        pixels = self.side**2
        self.inblock = EBlock(6 * pixels, width, stride=1)
        self.eblock1 = EBlock(width, 2 * width, stride=2)
        self.eblock2 = EBlock(2 * width, 4 * width, stride=2)
        self.convlstm = ConvLSTMCell(4 * width)
        self.dblock1 = DBlock(4 * width, 2 * width)
        self.dblock2 = DBlock(2 * width, width)
        self.outblock = OutBlock(width, 3 * pixels)
        if residual:  # training starts from the blurry image instead of noise
            nn.init.zeros_(self.outblock.conv[0].weight)
            nn.init.zeros_(self.outblock.conv[0].bias)

    def forward(self, b1: Tensor, b2: Tensor, b3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if b1.shape[-2] % self.multiple or b1.shape[-1] % self.multiple:
            sides = tuple(b1.shape[-2:])
            raise ValueError(f"height and width must be multiples of {self.multiple}, not {sides}")
        b, _, h, w = b3.shape
        stride = 4 * self.side  # of the ConvLSTM, in pixels
        hidden = cell = b3.new_zeros(b, 4 * self.width, h // stride, w // stride)
        i3, hidden, cell = self.step(b3, torch.zeros_like(b3), hidden, cell)
        i2, hidden, cell = self.step(b2, double(i3), double(hidden), double(cell))
        i1, _, _ = self.step(b1, double(i2), double(hidden), double(cell))
        return i1, i2, i3

    def step(self, blurry: Tensor, estimate: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Restore one scale (b, 3, h, w) from itself and the previous estimate; also return hidden, cell."""
        both = F.pixel_unshuffle(torch.cat([blurry, estimate], dim=1), self.side)  # h, w now count squares
        e1 = self.inblock(both)  # (b, 6, h, w) -> (b, width, h, w)
        e2 = self.eblock1(e1)  # (b, 2 width, h/2, w/2)
        e3 = self.eblock2(e2)  # (b, 4 width, h/4, w/4)
        hidden, cell = self.convlstm(e3, hidden, cell)
        d2 = self.dblock1(hidden) + e2  # (b, 2 width, h/2, w/2)
        d1 = self.dblock2(d2) + e1  # (b, width, h, w)
        restored = F.pixel_shuffle(self.outblock(d1), self.side)  # (b, 3, h, w)
        if self.residual:
            restored = blurry + restored
        return restored, hidden, cell


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)  # (b, c, 2h, 2w)


def xavier(network: nn.Module) -> None:
    """Initialise weights from Xavier's normal distribution (Glorot and Bengio 2010), except zero weights."""
    for value in network.parameters():
        if value.ndim > 1 and value.any():
            nn.init.xavier_normal_(value)


def pyramid(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (b, 3, h, w) at full, half and quarter size; all scales, also in training, are made here."""
    h, w = image.shape[-2:]
    half = F.interpolate(image, (h // 2, w // 2), mode="bilinear", antialias=True)
    quarter = F.interpolate(image, (h // 4, w // 4), mode="bilinear", antialias=True)
    return image, half, quarter


@torch.no_grad()
def restore(network: SRNDeblurNet, blurry: Tensor) -> Tensor:
    """Restore (b, 3, h, w) in [-1, 1] of any size; the result has the same size and is not clamped."""
    h, w = blurry.shape[-2:]
    scales = pyramid(pad_to_multiple(blurry, network.multiple))
    return network.forward(*scales)[0][..., :h, :w]  # not compiled: sizes vary


def restore_image(
    network: SRNDeblurNet, blurry: np.ndarray, self_ensemble: bool = False, **options: Any
) -> np.ndarray:
    """Restore a uint8 image (h, w, 3) of any size on the network's device.

    `options` are those of ldm.tiling.restore_photo; `self_ensemble` averages over 8 flips and rotations.
    """
    run = partial(restore, network)
    if self_ensemble:
        run = partial(average_rotations, run)
    return restore_photo(blurry, run, next(network.parameters()).device, **options)


# ---- files of weights --------------------------------------------------------------------------------------

FORM = ("width", "residual", "sampling")  # settings that define the network


def load_network(path: str | Path) -> SRNDeblurNet:
    """Load the network of this script's files, or of the reproduction's (keys with or without `module.`).

    Raises FileNotFoundError, or ValueError if the file holds another network.
    """
    weights, content = read_trained(path)
    weights = {name.removeprefix("module."): value.float() for name, value in weights.items()}
    if "inblock.conv.0.weight" not in weights:
        raise ValueError(f"{path} holds no SRN-DeblurNet: its first key is {next(iter(weights))}")
    settings = content["settings"]
    width = len(weights["inblock.conv.0.weight"])
    network = SRNDeblurNet(width, settings.get("residual", False), settings.get("sampling", False))
    return fill(network, weights, path).eval()


def start_from(network: SRNDeblurNet, path: Path) -> None:
    """Load a file's weights into the network. Raises ValueError if the file's network differs in FORM."""
    other = load_network(path)
    for name in FORM:
        wanted, value = getattr(network, name), getattr(other, name)
        if wanted != value:
            raise ValueError(f"--init_weights {path}: its {name} is {value}, this run's {wanted}")
    network.load_state_dict(other.state_dict())


def export(checkpoint: Path, path: Path) -> None:
    """Write the network of a checkpoint in half precision, with its form in the metadata."""
    weights, content = read_trained(checkpoint)
    write_half(path, weights, {name: content["settings"][name] for name in FORM})


# ---- loss and training step --------------------------------------------------------------------------------


def scale_losses(
    restored: Sequence[Tensor], sharp: Sequence[Tensor], loss: PixelLoss = "mse", fft_weight: float = 0.0
) -> list[Tensor]:
    """Compute the mean squared error at each scale (paper, equation 5, kappa = 1), or another distance."""
    return [restoration_loss(i, s, loss, fft_weight) for i, s in zip(restored, sharp, strict=True)]


def train_step(
    fabric: "Fabric", network: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, settings: Settings
) -> dict[str, Tensor]:
    """Train on `blurry`, `sharp` (b, 3, h, w) in [-1, 1]; return loss, and mse and PSNR at full size."""
    restored = network(*pyramid(batch["blurry"]))
    loss = sum(scale_losses(restored, pyramid(batch["sharp"]), settings.loss, settings.fft_loss_weight))
    optimizer.zero_grad()
    fabric.backward(loss)
    unscale_gradients(fabric, optimizer)
    nn.utils.clip_grad_norm_(network.convlstm.parameters(), LSTM_CLIP)
    if settings.max_grad_norm:
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
    optimizer.step()
    mse = F.mse_loss(restored[0].detach().float(), batch["sharp"])
    return {"loss": loss, "mse": mse, "psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}  # values span 2


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), rate, settings.momentum, weight_decay=decay, nesterov=settings.nesterov
        )
    fused = next(network.parameters()).is_cuda
    return torch.optim.Adam(network.parameters(), rate, weight_decay=decay, fused=fused)


def learning_rate_factor(step: int, steps_per_epoch: int, steps: int, schedule: str) -> float:
    """Return the learning-rate multiplier after `step` of `steps` steps."""
    left = max(0.0, 1 - step / steps)
    if schedule == "power":
        return left**0.3
    if schedule == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    return 0.3 ** (step // steps_per_epoch // 500)


# ---- data --------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise ValueError for invalid settings that would fail only later."""
    check_ranges(settings)
    multiple = 32 if settings.sampling else 16
    if settings.crop_size < multiple or settings.crop_size % multiple:
        raise ValueError(f"crop_size must be a multiple of {multiple}, not {settings.crop_size}")
    if not (settings.data or settings.sharp_dir or settings.dead_leaves):
        raise ValueError("nothing to train on: give --data, --sharp_dir or --dead_leaves (or try --demo)")
    if settings.data and (settings.dead_leaves or settings.pairs):
        raise ValueError("--dead_leaves and --pairs go with images blurred on the fly, not with --data")


def make_data(settings: Settings) -> tuple[CropDataset, HeldOut]:
    """Return the training set and the validation set."""
    size, seed, cache = settings.crop_size, settings.seed, settings.cache
    blur_scale = DEMO_BLUR_SCALE if settings.demo else 1.0
    if settings.data:
        pairs = find_pairs(settings.data, settings.sharp_dir)
    else:
        pairs = sharp_pairs(settings.sharp_dir)
    pairs, held_out = open_held_out(
        pairs,
        settings.val_data,
        settings.val_fraction,
        settings.val_images,
        seed,
        settings.val_crop,
        blur_scale,
    )
    if settings.data:
        return PairedDataset(pairs, size, seed, cache=cache, augment=True), held_out
    dataset = blurred_photos(
        [pair.sharp for pair in pairs],
        settings.dead_leaves,
        size,
        seed,
        settings.realistic_blur,
        repeats=settings.photo_crops,
        candidates=settings.crop_candidates,
        pairs=settings.pairs,
        pairs_fraction=settings.pairs_fraction,
        cache=cache,
        blur_scale=blur_scale,
        augment=True,
    )
    return dataset, held_out


# ---- the whole run -----------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    check(settings)

    # Seed and devices
    fabric = start_fabric(settings.devices, settings.precision, settings.seed)

    # Data
    dataset, held_out = make_data(settings)
    steps_per_epoch = max(1, round(len(dataset) / (settings.batch_size * fabric.world_size)))
    steps = settings.max_steps if settings.max_steps > 0 else settings.epochs * steps_per_epoch

    # Network, optimizer, EMA. Convolutions are faster in channels_last, above all on a GPU.
    network = SRNDeblurNet(settings.width, settings.residual, settings.sampling)
    if settings.init == "xavier":
        xavier(network)
    if settings.init_weights and not last_checkpoint(settings.output_dir).is_file():
        start_from(network, settings.init_weights)
    network.to(fabric.device, memory_format=torch.channels_last)
    if settings.compile:
        network.compile()
    optimizer = make_optimizer(network, settings)
    trained, fabric_optimizer = fabric.setup(network, optimizer)
    schedule = partial(
        learning_rate_factor, steps_per_epoch=steps_per_epoch, steps=steps, schedule=settings.schedule
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    ema = EMA(network, EMA_DECAY)

    # Resume
    parts = {"state_dict": network, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    known = {**plain(settings), "samples": len(dataset)}
    run = Run(fabric, settings.output_dir, known, parts, MAY_CHANGE)
    baseline, _ = held_out.evaluate(lambda blurry: blurry, run)
    run.say(f"{len(dataset)} training images, {steps} steps; {len(held_out)} held out")
    restorer = partial(restore_image, network, precision=settings.precision)
    if not run.step:
        scores, _ = held_out.evaluate(restorer, run)
        run.log(report(scores, baseline))
        run.say(f"before the first step: {line({}, scores, baseline)}")

    # Loop
    loader = run.loader(dataset, settings.batch_size, steps, settings.seed, settings.num_workers)
    for batch in run.batches(loader, steps):
        metrics = train_step(fabric, trained, fabric_optimizer, batch, settings)
        scheduler.step()
        ema.update(network)
        run.advance(metrics, batch["path"])
        if run.step % (settings.log_epoch * steps_per_epoch) and run.step != steps:
            continue

        # Validate the EMA weights, log, save
        train = {f"train/{name}": value for name, value in run.means().items()}
        with ema.applied(network):
            scores, image = held_out.evaluate(restorer, run)
        run.log_image("sample", image)
        run.log(train | report(scores, baseline))
        run.save(score=scores["psnr"])
        epoch = f"epoch {run.step // steps_per_epoch}: train mse {train['train/mse']:.5f}"
        epoch += f" psnr {train['train/psnr']:.2f}, eval mse {scores['mse']:.5f}"
        run.say(f"{epoch}, {line(train, scores, baseline)}")

    # The best weights in half precision, for infer.py and for sharing
    weights = settings.output_dir / "srn_deblur.safetensors"
    if fabric.is_global_zero:
        export(run.best_checkpoint, weights)
    run.finish(f"python infer.py srn --checkpoint_path {weights} --input PHOTOS --output_dir restored")


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
