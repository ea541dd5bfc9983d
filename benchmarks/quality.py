"""Score a deblurring network: real motion blur by scene, synthetic blur by type, sharp photos, colour, time.

    python -m benchmarks.quality --checkpoint_path models/srn_deblur.safetensors
    python -m benchmarks.quality --checkpoint_path models/dbgan.safetensors --pairs gopro/test --crop 512

Synthetic blur is applied to the whole photographs inside scikit-image, which no included network was trained
on. `--pairs` is any data set of pairs (training/README.md), scored by scene. Colour shift is the largest mean
difference of a channel from the ground truth, in 1/255 (blur in linear light brightens an image).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import train_dbgan
import train_srn
from harness.run import start_fabric
from harness.validation import HeldOut, middle
from ldm.data.image import photographs, read_image
from ldm.data.pairs import Pair, find_pairs
from ldm.metrics import psnr, rgb_shift, ssim

Restore = Callable[[np.ndarray], np.ndarray]


@dataclass
class Settings:
    """Score the weights of SRN or of a deblurring generator of train_dbgan.py."""

    checkpoint_path: Path  # weights to score
    pairs: Path | None = None  # data set of real pairs, in any form that train_srn.py's --data takes
    crop: int = 0  # score the middle N pixels of each image; 0 = whole images
    seed: int = 0  # random seed of the synthetic blur
    precision: str = "32"  # precision of the computation: 32 or bf16
    synthetic: bool = True  # score synthetic blur and sharp photos too
    threads: int = 0  # CPU threads to use; 0 = all


@dataclass
class Score:
    """Scores of the images of one table row."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    ssim_before: list[float] = field(default_factory=list)
    ssim_after: list[float] = field(default_factory=list)
    shifts_before: list[tuple[float, float, float]] = field(default_factory=list)
    shifts_after: list[tuple[float, float, float]] = field(default_factory=list)

    def line(self, name: str) -> str:
        """Format the row as a line of a markdown table."""
        gains = np.subtract(self.after, self.before)
        shifts = [np.abs(np.mean(side, axis=0)).max() for side in (self.shifts_before, self.shifts_after)]
        return (
            f"| {name} | {len(gains)} | {np.mean(self.before):.2f} -> {np.mean(self.after):.2f} dB "
            f"| {gains.mean():+.2f} | {gains.min():+.2f} to {gains.max():+.2f} "
            f"| {np.mean(self.ssim_before):.3f} -> {np.mean(self.ssim_after):.3f} "
            f"| {shifts[0]:.2f} -> {shifts[1]:.2f} |"
        )


def open_network(path: Path, precision: str = "32") -> tuple[torch.nn.Module, Restore]:
    """Load a network of either script; return it with a function that restores a uint8 image."""
    try:
        network = train_srn.load_network(path)
        restore_image = train_srn.restore_image
    except ValueError:
        network = train_dbgan.load_generator(path, "deblur")
        restore_image = train_dbgan.restore_image
    network.to(memory_format=torch.channels_last)
    return network, partial(restore_image, network, precision=precision)


def score(pairs: Iterable[tuple[np.ndarray, np.ndarray]], restore: Restore, crop: int = 0) -> Score:
    """Score images (uint8) against their sharp ones, before and after restoring."""
    result = Score()
    for blurry, sharp in pairs:
        blurry, sharp = middle(blurry, crop), middle(sharp, crop)
        restored = restore(blurry)
        result.before.append(psnr(blurry, sharp))
        result.after.append(psnr(restored, sharp))
        result.ssim_before.append(ssim(blurry, sharp))
        result.ssim_after.append(ssim(restored, sharp))
        result.shifts_before.append(rgb_shift(blurry, sharp))
        result.shifts_after.append(rgb_shift(restored, sharp))
    return result


def synthetic_rows(seed: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Create blurry and sharp photographs by blur type; whole photographs are blurred."""
    held_out = HeldOut([Pair(path, path) for path in photographs()], limit=10**6, seed=seed)
    rows: dict[str, list] = {}
    for number, pair in enumerate(held_out.pairs):
        rows.setdefault(pair.blur_type, []).append(held_out[number])
    return rows


def scene_rows(root: Path) -> dict[str, list[Pair]]:
    """Find the pairs of a data set by scene."""
    rows: dict[str, list[Pair]] = {}
    for pair in find_pairs(root):
        rows.setdefault(pair.group, []).append(pair)
    return rows


def cost(network: torch.nn.Module, restore: Restore) -> str:
    """Describe parameters, FLOPs and seconds for 1280 x 720 pixels."""
    frame = np.zeros((720, 1280, 3), np.uint8)
    restore(frame)  # the first call is slower
    start = time.perf_counter()
    restore(frame)
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        restore(frame)
    millions = sum(value.numel() for value in network.parameters()) / 1e6
    work = f"{counter.get_total_flops() / 2e9:.0f} GMAC and {seconds:.2f} s for 1280 x 720"
    return f"{millions:.2f} M parameters, {work}"


def main(settings: Settings) -> None:
    start_fabric(seed=settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    network, restore = open_network(settings.checkpoint_path, settings.precision)
    print(f"{settings.checkpoint_path}: {cost(network, restore)}, {torch.get_num_threads()} threads\n")
    print("| images | n | PSNR | gain | lowest to highest | SSIM | colour shift |")
    print("|---|---|---|---|---|---|---|")
    if settings.pairs:
        for name, pairs in scene_rows(settings.pairs).items():
            images = ((read_image(pair.blurry), read_image(pair.sharp)) for pair in pairs)
            print(score(images, restore, settings.crop).line(name), flush=True)
    if not settings.synthetic:
        return
    total = Score()
    for blur_type, images in synthetic_rows(settings.seed).items():
        row = score(images, restore, settings.crop)
        print(row.line(blur_type), flush=True)
        for name, values in vars(row).items():
            getattr(total, name).extend(values)
    print(total.line("all synthetic"), flush=True)
    sharp = [middle(read_image(path), settings.crop) for path in photographs()]
    restored = [restore(image) for image in sharp]
    kept = [min(psnr(*pair), 99.0) for pair in zip(restored, sharp, strict=True)]
    shift = max(np.abs(rgb_shift(*pair)).max() for pair in zip(restored, sharp, strict=True))
    print(f"\nsharp photos to themselves: {np.mean(kept):.1f} dB on average, {min(kept):.1f} lowest,")
    print(f"largest colour shift {shift:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
