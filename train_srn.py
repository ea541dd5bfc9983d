"""SRN-DeblurNet: the scale-recurrent network, trained from scratch and explained in one file.

Tao, Gao, Shen, Wang, Jia: Scale-recurrent Network for Deep Image Deblurring, CVPR 2018.

    python train_srn.py --data GOPRO_Large/train --val_data GOPRO_Large/test --precision bf16
    python train_srn.py --sharp_dir my_photos       # no pairs: the blur is made on the fly
    python train_srn.py --demo                      # minutes on two CPU cores, needs no data at all

The same command again resumes a stopped run. Published for GoPro: 30.26 dB. More in docs/srn.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from harness import flags
from harness.run import Run, last_checkpoint, start_fabric, unscale_gradients
from harness.settings import check_counts, check_fractions, plain, run_main
from harness.training_data import Data, blurred_anew, camera, check_pictures, extra_pairs
from harness.validation import HeldOut, line, report
from ldm.checkpoint import fill, read_trained, write_half
from ldm.data.image import photographs
from ldm.data.paired import CropDataset, PairedDataset, crop_schedule
from ldm.data.pairs import Pair, find_pairs, sharp_pairs, split_pairs
from ldm.modules.ema import EMA
from ldm.modules.image_degradation.blur import BLUR_TYPES
from ldm.modules.losses import PixelLoss, restoration_loss
from ldm.tiling import pad_to_multiple, restore_picture
from ldm.tiling import self_ensemble as average_rotations

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train SRN-DeblurNet on pairs of images, or on sharp images alone."""

    demo: bool = False  # a small network on generated pictures, minutes on a CPU; other flags still count
    output_dir: Path = Path("outputs/srn")  # logs, pictures and checkpoints; an old run in it is resumed

    data: Path | None = None  # GoPro tree, list file of `blurry sharp` lines, .jsonl, or blurry images
    sharp_dir: Path | None = None  # sharp images: the partners of --data, or alone, to be blurred on the fly
    dead_leaves: int = 0  # generated pictures in every epoch, blurred on the fly, beside --sharp_dir or alone
    val_data: Path | None = None  # pairs to evaluate on, in any form of --data
    val_sharp_dir: Path | None = None  # their sharp images, or sharp images alone
    crop_size: int = 256  # of training images, a multiple of 16

    width: int = 32  # channels at full resolution
    init_weights: Path | None = None  # start from the weights of this file; a run that exists is resumed

    loss: PixelLoss = "mse"  # distance of pixels at each scale
    epochs: int = 2000  # passes over the data
    max_steps: flags.MaxSteps = -1  # optimizer steps; above 0 it replaces epochs
    batch_size: flags.BatchSize = 16  # of each device
    learning_rate: float = 1e-4  # at the start

    precision: flags.Precision = "32"  # bf16 or 16: mixed, faster on GPUs
    devices: flags.Devices = 1  # GPUs of each machine (processes on a CPU)

    val_fraction: float = 0.05  # without the two: the part of the data that is held out (whole sequences)
    val_images: int = 32  # evaluate on at most that many, drawn once
    val_crop: int = 0  # evaluate on that many pixels in the middle; 0 = whole images
    pairs: Path | None = None  # real pairs mixed among crops blurred on the fly, in any form of --data
    pairs_fraction: float = 0.1  # fraction of the crops that come from --pairs
    realistic_blur: bool = False  # blur on the fly as real cameras do: varying shake, noise, JPEG
    blur_types: tuple[str, ...] = tuple(BLUR_TYPES)  # blur types made on the fly, without --realistic_blur
    blur_scale: float = 1.0  # scale of the blur sizes, without --realistic_blur
    jpeg_probability: float = 0.0  # part of the blurred training images that went through a JPEG file
    sharp_fraction: float = 0.0  # part of the training images that is not, or hardly, blurred: do no harm
    photo_crops: int = 1  # crops of each photograph of --sharp_dir in an epoch: its ratio to --dead_leaves
    crop_candidates: int = 1  # windows drawn for a crop on the fly, of which the sharpest is taken
    late_crop_sizes: tuple[int, ...] = ()  # larger ones, in equal shares of the last half of the steps
    cache: bool = False  # keep all training images decoded in memory

    coarsest: Literal["zeros", "blurry"] = "zeros"  # estimate at the first scale; the authors' code: blurry
    detach: bool = False  # no gradient through the upsampled estimate, as in the authors' code
    residual: bool = False  # predict the difference to the blurry image
    sampling: bool = False  # work at half resolution, on 2 x 2 pixels as channels: 4 times less to compute
    init: Literal["default", "xavier"] = "default"  # first weights: torch's, or Xavier's

    fft_loss_weight: float = 0.0  # of the distance of Fourier transforms beside it; 0.1 is MIMO-UNet's
    optimizer: Literal["adam", "sgd"] = "adam"  # the way to step
    momentum: float = 0.9  # of sgd: how much of the last step goes on
    nesterov: bool = True  # of sgd: look ahead along the momentum
    weight_decay: flags.WeightDecay = 0.0  # L2 regularisation
    schedule: Literal["step", "power", "cosine"] = "step"  # 0.3^(epoch // 500); (1 - t/T)^0.3; cosine
    lstm_clip: float = 3.0  # highest global norm of the ConvLSTM's gradients
    max_grad_norm: float = 0.0  # highest global norm of all gradients; 0 = not clipped
    ema_decay: float = 0.999  # of the averaged weights, which are evaluated and used; 0 for none
    seed: int = 0  # of the data's order, first weights and noise

    channels_last: bool = True  # memory layout: faster, above all on a GPU
    compile: bool = False  # torch.compile: minutes at the start, faster steps
    num_nodes: int = 1  # machines
    num_workers: int = 8  # processes that prepare images
    log_epoch: int = 10  # evaluate and save every so many epochs


DEMO = {
    "output_dir": Path("outputs/srn_demo"),
    "dead_leaves": 1360,
    "val_crop": 256,
    "blur_scale": 0.4,
    "crop_size": 64,
    "width": 16,
    "residual": True,
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 4e-4,
    "schedule": "power",
    "ema_decay": 0.99,
    "channels_last": True,
    "num_workers": 1,
    "log_epoch": 1,
}
# What may differ when a run is resumed: it changes the speed, not the weights (beyond rounding).
MAY_CHANGE = "devices num_nodes batch_size num_workers log_epoch cache channels_last compile".split()


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
    """LSTM whose products are 5x5 convolutions (Shi et al. 2015), without peepholes and forget bias."""

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

    `forward(b1, b2, b3) -> i1, i2, i3`: blurry (b, 3, h, w) at full, half and quarter size, in [-1, 1],
    h and w multiples of `multiple`, to restored images of the same sizes, not clamped. `restore` takes any
    size. With `sampling` 2 x 2 pixels enter and leave as channels of one (ours, not the paper's).
    """

    def __init__(
        self,
        width: int = 32,
        coarsest: str = "zeros",
        detach: bool = False,
        residual: bool = False,
        sampling: bool = False,
    ):
        super().__init__()
        self.width, self.coarsest, self.detach, self.residual = width, coarsest, detach, residual
        self.sampling, self.side = sampling, 2 if sampling else 1  # pixels that are one to the convolutions
        self.multiple, pixels = 16 * self.side, self.side**2
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
        estimate = b3 if self.coarsest == "blurry" else torch.zeros_like(b3)
        b, h, w = len(b3), b3.shape[-2] // self.side, b3.shape[-1] // self.side
        hidden = cell = b3.new_zeros(b, 4 * self.width, h // 4, w // 4)
        i3, hidden, cell = self.step(b3, estimate, hidden, cell)
        i2, hidden, cell = self.step(b2, self.upsampled(i3), double(hidden), double(cell))
        i1, _, _ = self.step(b1, self.upsampled(i2), double(hidden), double(cell))
        return i1, i2, i3

    def step(self, blurry: Tensor, estimate: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Restore one scale: (b, 3, h, w) from itself and the estimate of the scale before; hidden, cell."""
        both = F.pixel_unshuffle(torch.cat([blurry, estimate], dim=1), self.side)  # h, w now count squares
        e1 = self.inblock(both)  # (b, 6, h, w) -> (b, width, h, w)
        e2 = self.eblock1(e1)  # (b, 2 width, h/2, w/2)
        e3 = self.eblock2(e2)  # (b, 4 width, h/4, w/4)
        hidden, cell = self.convlstm(e3, hidden, cell)
        d2 = self.dblock1(hidden) + e2  # (b, 2 width, h/2, w/2)
        d1 = self.dblock2(d2) + e1  # (b, width, h, w)
        restored = F.pixel_shuffle(self.outblock(d1), self.side)  # (b, 3, h, w)
        return (blurry + restored if self.residual else restored), hidden, cell

    def upsampled(self, estimate: Tensor) -> Tensor:
        return double(estimate.detach() if self.detach else estimate)


def xavier(network: nn.Module) -> None:
    """Xavier's normal first weights (Glorot and Bengio 2010), biases as they are; zero weights stay."""
    for value in network.parameters():
        if value.ndim > 1 and value.any():
            nn.init.xavier_normal_(value)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)  # (b, c, 2h, 2w)


def pyramid(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, 3, h, w) at full, half and quarter size: the one rule by which all scales are made, everywhere."""
    h, w = image.shape[-2:]
    half, quarter = (F.interpolate(image, (h // n, w // n), mode="bilinear", antialias=True) for n in (2, 4))
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
    """Restore a uint8 picture (h, w, 3) of any size on the network's device.

    `options` are those of ldm.tiling.restore_picture; `self_ensemble` averages over the 8 flips and turns.
    """

    one = partial(restore, network)
    run = partial(average_rotations, one) if self_ensemble else one
    return restore_picture(blurry, run, next(network.parameters()).device, **options)


FORM = ("width", "coarsest", "detach", "residual", "sampling")


def load_network(path: str | Path) -> SRNDeblurNet:
    """The network in a file of this script, or one with the reproduction's key names (`module.` or not).

    Raises FileNotFoundError, or ValueError if it holds another network.
    """
    weights, content = read_trained(path)
    weights = {name.removeprefix("module."): value.float() for name, value in weights.items()}
    if "inblock.conv.0.weight" not in weights:
        raise ValueError(f"{path} holds no SRN-DeblurNet: its first key is {next(iter(weights))}")
    settings = content["settings"]
    form = {name: settings[name] for name in FORM[1:] if name in settings}
    return fill(SRNDeblurNet(len(weights["inblock.conv.0.weight"]), **form), weights, path).eval()


def start_from(network: SRNDeblurNet, path: Path) -> None:
    """Give the network the weights of a file. Raises ValueError if it holds one of another form."""
    found = load_network(path)
    for name in ("width", "residual", "sampling"):
        own, other = getattr(network, name), getattr(found, name)
        if own != other:
            raise ValueError(f"--init_weights {path}: its {name} is {other}, this run's {own}")
    network.load_state_dict(found.state_dict())


def export(checkpoint: Path, path: Path) -> None:
    """Write the network of a checkpoint in half precision with what `load_network` must know."""
    weights, content = read_trained(checkpoint)
    settings = {**plain(Settings()), **content["settings"]}  # those that an older file lacks
    write_half(path, weights, {name: settings[name] for name in FORM})


# ---- loss and training step --------------------------------------------------------------------------------


def scale_losses(restored: Sequence[Tensor], sharp: Sequence[Tensor], *loss: Any) -> list[Tensor]:
    """Mean squared error at each scale (paper, equation 5, with kappa = 1), or what `loss` names."""
    return [restoration_loss(i, s, *loss) for i, s in zip(restored, sharp, strict=True)]


def train_step(
    fabric: Fabric, network: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, settings: Settings
) -> dict[str, Tensor]:
    """One step on `blurry` and `sharp` (b, 3, h, w) in [-1, 1]; loss, mse and PSNR (range 2) at full size."""
    restored = network(*pyramid(batch["blurry"]))
    losses = scale_losses(restored, pyramid(batch["sharp"]), settings.loss, settings.fft_loss_weight)
    loss = sum(losses)
    optimizer.zero_grad()
    fabric.backward(loss)
    unscale_gradients(fabric, optimizer)
    nn.utils.clip_grad_norm_(network.convlstm.parameters(), settings.lstm_clip)
    if settings.max_grad_norm:
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
    optimizer.step()
    mse = F.mse_loss(restored[0].detach().float(), batch["sharp"])
    return {"loss": loss, "mse": mse, "psnr": 10 * torch.log10(4 / mse.clamp(min=1e-10))}


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), rate, settings.momentum, weight_decay=decay, nesterov=settings.nesterov
        )
    fused = next(network.parameters()).is_cuda
    return torch.optim.Adam(network.parameters(), rate, weight_decay=decay, fused=fused)


def learning_rate_factor(step: int, steps_per_epoch: int, steps: int, settings: Settings) -> float:
    """What the learning rate is multiplied by after `step` of `steps` steps."""
    left = max(0.0, 1 - step / steps)
    if settings.schedule == "power":
        return left**0.3
    if settings.schedule == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    return 0.3 ** (step // steps_per_epoch // 500)


# ---- data --------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise ValueError for a setting that would fail only later."""
    check_counts(settings, "epochs batch_size log_epoch width devices num_nodes")
    check_pictures(settings, (settings.crop_size, *settings.late_crop_sizes), 32 if settings.sampling else 16)
    check_fractions(settings, "ema_decay", whole=False)
    if not (settings.data or settings.sharp_dir or settings.dead_leaves):
        raise ValueError("nothing to train on: give --data, --sharp_dir or --dead_leaves (or try --demo)")


def make_data(settings: Settings) -> Data:
    """The training set and what is held out: given, or a part of the data, or scikit-image's photographs."""
    seed, data = settings.seed, settings.data
    pairs = find_pairs(data, settings.sharp_dir) if data else sharp_pairs(settings.sharp_dir)
    if settings.val_data:
        held_out = find_pairs(settings.val_data, settings.val_sharp_dir)
    elif settings.val_sharp_dir:
        held_out = sharp_pairs(settings.val_sharp_dir)
    elif pairs:
        pairs, held_out = split_pairs(pairs, settings.val_fraction, seed)
    else:
        held_out = [Pair(path, path) for path in photographs()]

    validation = HeldOut(held_out, settings.val_images, seed, settings.val_crop, **camera(settings))
    if data:
        return PairedDataset(pairs, settings.crop_size, seed, augment=True, cache=settings.cache), validation
    largest = max(settings.crop_size, *settings.late_crop_sizes, 0)
    photos = [pair.sharp for pair in pairs]
    return blurred_anew(settings, photos, largest, extra_pairs(settings), augment=True), validation


def batches(run: Run, dataset: CropDataset, settings: Settings, steps: int) -> Iterator[dict]:
    """All batches from where the run stands, in crops that grow."""
    for size, end in crop_schedule(settings.crop_size, settings.late_crop_sizes, steps):
        if run.step < end:
            part = dataset.resized(size)
            yield from run.loader(part, settings.batch_size, end, settings.seed, settings.num_workers)


# ---- the whole run -----------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    check(settings)

    # Seed and devices
    fabric = start_fabric(settings.devices, settings.num_nodes, settings.precision, settings.seed)

    # Data
    dataset, held_out = make_data(settings)
    steps_per_epoch = max(1, round(len(dataset) / (settings.batch_size * fabric.world_size)))
    steps = settings.max_steps if settings.max_steps > 0 else settings.epochs * steps_per_epoch

    # Network, optimizer, average
    network = SRNDeblurNet(*(getattr(settings, name) for name in FORM))
    if settings.init == "xavier":
        xavier(network)
    if settings.init_weights and not last_checkpoint(settings.output_dir).is_file():
        start_from(network, settings.init_weights)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    if settings.compile:
        network.compile()
    optimizer = make_optimizer(network.to(fabric.device), settings)
    trained, fabric_optimizer = fabric.setup(network, optimizer)
    schedule = partial(learning_rate_factor, steps_per_epoch=steps_per_epoch, steps=steps, settings=settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    ema = EMA(network, settings.ema_decay)

    # Resume
    parts = {"state_dict": network, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    known = {**plain(settings), "samples": len(dataset)}
    run = Run(fabric, settings.output_dir, known, parts, MAY_CHANGE, defaults=Settings())
    baseline, _ = held_out.evaluate(lambda blurry: blurry, run)
    run.say(f"{len(dataset)} training images, {steps} steps; {len(held_out)} held out")
    restorer = partial(restore_image, network, precision=settings.precision)
    if not run.step:
        scores, _ = held_out.evaluate(restorer, run)
        run.log(report(scores, baseline))
        run.say(f"before the first step: {line({}, scores, baseline)}")

    # Loop
    for batch in run.batches(batches(run, dataset, settings, steps), steps):
        metrics = train_step(fabric, trained, fabric_optimizer, batch, settings)
        scheduler.step()
        ema.update(network)
        run.advance(metrics, batch["path"])
        if run.step % (settings.log_epoch * steps_per_epoch) and run.step != steps:
            continue

        # Evaluate the averaged weights, log, save
        train = {f"train/{name}": value for name, value in run.means().items()}
        with ema.applied(network):
            scores, picture = held_out.evaluate(restorer, run)
        run.picture("sample", picture)
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
