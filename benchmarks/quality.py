"""What a minute of training brings: widths, losses, data and a NAFNet, each for the same processor time.

    python -m benchmarks.quality --sharp_dir PHOTOS --minutes 2         # one thread each; hours for the table
    python -m benchmarks.quality --checkpoint_path models/srn_deblur.safetensors    # score a file instead

Scored on the photographs inside scikit-image, which must not be among PHOTOS, blurred whole at the scale of
the picture: the gain in PSNR by blur type, what a sharp photograph loses (PSNR to itself, mean and lowest),
GMAC and seconds of one thread for 1280 x 720. Wiener's filter with the true kernel is the limit for a linear
method that knows everything: its regularisation is chosen by the sharp picture.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import train_srn
from harness.run import start_fabric
from harness.validation import middle
from ldm.data.image import photographs, read_image
from ldm.data.stream import SampleStream
from ldm.metrics import psnr
from ldm.modules.ema import EMA
from ldm.modules.image_degradation import blur
from ldm.modules.losses import restoration_loss
from ldm.modules.nafnet import NAFNet
from ldm.tiling import restore_picture

WORDS = ("motion", "gaussian", "defocus", "lens")  # the columns
SEED = 0


@dataclass
class Settings:
    """Train and score small networks for the same processor time, or score a file."""

    sharp_dir: Path | None = None  # photographs to train on
    minutes: float = 2.0  # of processor time for each case
    only: tuple[str, ...] = ()  # these cases
    checkpoint_path: Path | None = None  # score this network instead of training
    crop: int = 0  # score the middle so many pixels of each photograph; 0 = whole
    seed: int = 0  # of the blurs that are scored
    precision: str = "bf16"  # of training and scoring


@dataclass
class Case:
    """One row: a network, its loss and its data."""

    make: Callable[[], nn.Module]
    loss: str = "charbonnier"
    fft: float = 0.1
    photos: int = 16  # crops of each photograph in an epoch
    leaves: int = 560  # generated pictures in an epoch


class AtFullSize(nn.Module):
    """A network of one scale behind the form of train_srn.py's: three sizes in, a tuple out."""

    multiple = 16

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, blurry: Tensor, *smaller: Tensor) -> tuple[Tensor]:
        return (self.network(blurry),)


def srn(width: int, sampling: bool = False) -> Callable[[], nn.Module]:
    return lambda: train_srn.SRNDeblurNet(width, residual=True, sampling=sampling)


CASES = {
    "SRN 16 sampling": Case(srn(16, True)),
    "NAFNet 16": Case(lambda: AtFullSize(NAFNet(16, (1, 1, 2, 6), 1, (1, 1, 1, 1)))),
    "SRN 16": Case(srn(16)),
    "SRN 16 sampling, MSE": Case(srn(16, True), "mse", 0.0),
    "SRN 16 sampling, photographs": Case(srn(16, True), leaves=0),
    "SRN 16 sampling, dead leaves": Case(srn(16, True), photos=0),
    "SRN 24 sampling": Case(srn(24, True)),
    "SRN 24": Case(srn(24)),
    "SRN 32": Case(srn(32)),
}


def train(case: Case, settings: Settings) -> tuple[nn.Module, int]:
    """The averaged network after `minutes` of processor time, and its steps; the rate falls by a cosine."""
    fabric = start_fabric(precision=settings.precision, seed=SEED)
    network = case.make().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 5e-4)
    recipe = train_srn.Settings(
        sharp_dir=settings.sharp_dir if case.photos else None,
        val_sharp_dir=photographs()[0].parent,
        dead_leaves=case.leaves,
        photo_crops=max(case.photos, 1),
        crop_candidates=3,
        sharp_fraction=0.12,
        jpeg_probability=0.15,
        crop_size=128,
        cache=True,
    )
    dataset, _ = train_srn.make_data(recipe)
    keys, ema, steps = iter(SampleStream(len(dataset), SEED)), EMA(network, 0.99), 0
    start = time.process_time()
    while (spent := (time.process_time() - start) / (60 * settings.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 + math.cos(math.pi * spent)) / 2
        batch = default_collate([dataset[next(keys)] for _ in range(4)])
        with fabric.autocast():
            restored = network(*train_srn.pyramid(batch["blurry"]))
        pairs = list(zip(restored, train_srn.pyramid(batch["sharp"]), strict=False))
        loss = sum(restoration_loss(*pair, case.loss, case.fft) for pair in pairs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network)
        steps += 1
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(ema.average[name])
    return network.eval(), steps


def held_out(seed: int) -> list[tuple[str, np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Blur type, blurry and sharp, and the kernels (one, or one for each channel), light fall-off undone."""
    rows = []
    for path in photographs():
        sharp = read_image(path)
        for blur_type in blur.BLUR_TYPES:
            kernels, convolve = [], blur.convolve

            def note(light: np.ndarray, kernel: np.ndarray, kernels=kernels, convolve=convolve) -> np.ndarray:
                kernels.append(kernel)
                return convolve(light, kernel)

            rng = np.random.default_rng([seed, len(rows)])  # as in harness.validation.HeldOut
            with patch.object(blur, "convolve", note):
                blurry, _, drawn = blur.random_blur(sharp, rng, [blur_type])
            if "sigma" in drawn:
                line = blur.gaussian_kernel(drawn["sigma"])
                kernels.append(np.outer(line, line))
            rows.append((blur_type, blurry, sharp, kernels))
    return rows


def wiener(blurry: np.ndarray, sharp: np.ndarray, kernels: list[np.ndarray]) -> np.ndarray:
    """The best of Wiener's filters for spectra that fall as 1 / f^2, in linear light, borders reflected."""
    edge = max(map(len, kernels))
    light = blur.srgb_to_linear(blurry)
    padded = cv2.copyMakeBorder(light, edge, edge, edge, edge, cv2.BORDER_REFLECT_101)
    h, w = padded.shape[:2]
    square = np.add.outer(np.fft.fftfreq(h) ** 2, np.fft.rfftfreq(w) ** 2)
    channels = []
    for channel, kernel in enumerate(kernels * (3 // len(kernels))):
        whole = np.zeros((h, w), np.float32)
        whole[: len(kernel), : len(kernel)] = kernel
        shift = -(len(kernel) // 2)
        channels.append(
            (np.fft.rfft2(np.roll(whole, (shift, shift), (0, 1))), np.fft.rfft2(padded[..., channel]))
        )

    def filtered(strength: float) -> np.ndarray:
        found = [
            np.fft.irfft2(np.conj(k) * y / (np.abs(k) ** 2 + strength * square), (h, w)) for k, y in channels
        ]
        return blur.linear_to_srgb(
            np.stack(found, axis=-1)[edge : h - edge, edge : w - edge].astype(np.float32)
        )

    return max((filtered(10.0**power) for power in np.arange(-3, 2.1, 0.5)), key=lambda x: psnr(x, sharp))


def row(settings: Settings, name: str, restore: Callable[..., np.ndarray], cost: str) -> None:
    """Print what `restore(blurry, sharp, kernels)` gains, as a line of a table."""
    gains: dict[str, list[float]] = {}
    for blur_type, blurry, sharp, kernels in held_out(settings.seed):
        blurry, sharp = middle(blurry, settings.crop), middle(sharp, settings.crop)
        gain = psnr(restore(blurry, sharp, kernels), sharp) - psnr(blurry, sharp)
        gains.setdefault(blur_type.removesuffix("_blur"), []).append(gain)
    means = {word: float(np.mean(gains[word])) for word in WORDS}
    values = " | ".join(f"{value:+.2f}" for value in (np.mean(list(means.values())), *means.values()))
    print(f"| {name} | {values} | {cost} |", flush=True)


def score(settings: Settings, name: str, network: nn.Module, steps: int | str) -> None:
    """The line of a network."""

    def restore(image: np.ndarray, *_: object) -> np.ndarray:
        run = partial(train_srn.restore, network)
        return restore_picture(image, run, torch.device("cpu"), precision=settings.precision)

    sharp = [middle(read_image(path), settings.crop) for path in photographs()]
    kept = [min(psnr(restore(image), image), 99.0) for image in sharp]
    frame = torch.zeros(1, 3, 720, 256)  # a fifth of the picture
    with FlopCounterMode(display=False) as counter:
        train_srn.restore(network, frame)
    start = time.process_time()
    restore(np.zeros((720, 1280, 3), np.uint8))
    seconds = time.process_time() - start
    millions = sum(value.numel() for value in network.parameters()) / 1e6
    cost = f"{np.mean(kept):.1f}, {min(kept):.1f} | {millions:.2f} | {steps} "
    row(settings, name, restore, cost + f"| {5 * counter.get_total_flops() / 2e9:.0f} | {seconds:.1f}")


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    start_fabric(seed=SEED)
    print(f"| network | gain | {' | '.join(WORDS)} | sharp | M | steps | GMAC | s |\n|{'---|' * 11}")
    if settings.checkpoint_path:
        network = train_srn.load_network(settings.checkpoint_path).to(memory_format=torch.channels_last)
        return score(settings, settings.checkpoint_path.name, network, "")
    if not settings.sharp_dir:
        raise SystemExit("give --sharp_dir, a folder of photographs to train on, or --checkpoint_path")
    if not settings.only or "Wiener" in settings.only:
        row(settings, "Wiener, true kernel", wiener, "| | | |")
    for name, case in CASES.items():
        if not settings.only or name in settings.only:
            score(settings, name, *train(case, settings))


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
