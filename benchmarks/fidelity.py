"""What fidelity to the input and a cleaner do to diffusion's restoring: PSNR, SSIM, LPIPS, DISTS.

    python -m benchmarks.fidelity                        # the small model in models/
    python -m benchmarks.fidelity --checkpoint_path best.ckpt --distances lpips dists

A table for docs/deblur.md: the blurry pictures, the cleaner's, then each fidelity with and without a cleaner.
Held-out pictures are those of benchmarks.quality. LPIPS and DISTS want networks that torchvision downloads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import infer
from benchmarks.quality import held_out
from harness.scores import SCORES, deep_network
from harness.validation import middle
from ldm.metrics import psnr, ssim


@dataclass
class Settings:
    """Restore held-out pictures with a ControlNet at every fidelity, with and without a cleaner."""

    checkpoint_path: Path | None = None  # the ControlNet; None takes models/small_deblur.safetensors
    base_path: Path | None = None  # its Stable Diffusion; None takes what the file names, or the small one
    cleaner: Path = Path("models/srn_deblur.safetensors")  # weights of SRN or DBGAN
    fidelities: tuple[float, ...] = (0.0, 0.5, 1.0)
    distances: tuple[Literal["lpips", "dists"], ...] = ("lpips",)  # none: only PSNR and SSIM
    crop: int = 128  # the middle so many pixels of each picture: what the small model was trained on
    num_inference_steps: int = 20  # of dpmpp_2m
    seed: int = 0  # of the blurs, and of the sampling


Pictures = list[tuple[np.ndarray, np.ndarray]]  # blurry and sharp, uint8 (h, w, 3)


def row(name: str, pictures: Pictures, restore: Callable[[np.ndarray], np.ndarray], distances: tuple) -> None:
    """Print the means of what `restore` makes of the blurry pictures, as a line of a table."""
    found = []
    for blurry, sharp in pictures:
        restored = restore(blurry)
        deep = [SCORES[distance](restored, sharp)[distance] for distance in distances]
        found.append([psnr(restored, sharp), ssim(restored, sharp), *deep])
    decibels, *others = np.mean(found, axis=0)
    print(f"| {name} | {decibels:.2f} | {' | '.join(f'{value:.4f}' for value in others)} |", flush=True)


def main(settings: Settings) -> None:
    for distance in settings.distances:  # one that is missing is found before minutes are spent
        deep_network(distance)
    options = {
        "input": Path("."),
        "checkpoint_path": settings.checkpoint_path,
        "base_path": settings.base_path,
    }
    options |= {"num_inference_steps": settings.num_inference_steps, "scheduler": "dpmpp_2m"}
    command = infer.Deblur(**options, seed=settings.seed, cleaner=settings.cleaner)
    names = ["fidelity", "PSNR", "SSIM", *map(str.upper, settings.distances)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    pictures = [
        tuple(np.ascontiguousarray(middle(image, settings.crop)) for image in pair)
        for _, *pair, _ in held_out(settings.seed)
    ]
    clean = command.open_cleaner()
    row("blurry", pictures, lambda blurry: blurry, settings.distances)
    row(f"{settings.cleaner.name} alone", pictures, lambda x: clean(x, Path()), settings.distances)
    for cleaner in (None, settings.cleaner):
        command.cleaner = cleaner
        restore = command.restorer()
        for fidelity in settings.fidelities:
            command.fidelity = fidelity  # a restorer reads it anew
            name = f"{fidelity:g}" + (f", after {cleaner.name}" if cleaner else "")
            row(name, pictures, lambda x, restore=restore: restore(x, Path()), settings.distances)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
