"""How fast BGAN and DBGAN train and read their patches: the fast settings against plain float32, in one run.

    python -m benchmarks.dbgan          # a few minutes on a GPU or on two CPU cores

Training is one step of the stage `deblur` at the paper's settings (16 blocks of width 64, SRGAN's
discriminator, VGG-19 with random weights, crop 128, batch 4), data in memory; on a CPU at 4 blocks. Reading
takes random patches of 128 pixels from an HDF5 file, one process. Shown are medians of several repeats,
synchronised; cases alternate, so that what else the machine does hits all of them alike.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from torchvision.models import vgg19

from benchmarks.head import begin
from benchmarks.srn import CUDA, forms, measure, show
from harness.run import start_fabric
from ldm.data.image import photographs, read_image, write_image
from ldm.data.paired import at_least
from ldm.data.patches import Patches
from ldm.modules.perceptual import PerceptualLoss
from tool_make_dbgan_dataset import cut
from train_dbgan import Settings as TrainSettings
from train_dbgan import deblur_losses, make_players, train_step


@dataclass
class Settings:
    """Time a training step of DBGAN, and reading patches."""

    blocks: int = 16 if CUDA else 4  # of the generator
    repeats: int = 20 if CUDA else 3  # of each case


def training(blocks: int, vgg: Path, precision: str, channels_last: bool, compiled: bool) -> Callable:
    """One step of a batch of 4 as a function."""
    fabric = start_fabric(precision=precision)
    settings = TrainSettings(
        blocks=blocks, generated_fraction=0.0, channels_last=channels_last, compile=compiled
    )
    perceptual = PerceptualLoss(file=vgg).to(fabric.device)
    players = make_players(settings, "deblur", perceptual, fabric.device)
    parameters = [*players.generators.parameters(), *players.discriminators.parameters()]
    fused = fabric.device.type == "cuda"
    optimizer = fabric.setup_optimizers(torch.optim.Adam(parameters, 1e-4, fused=fused))
    images = torch.rand(2, settings.batch_size, 3, 128, 128, device=fabric.device) * 2 - 1
    batch = {"blurry": images[0], "sharp": images[1]}
    return lambda: train_step(fabric, optimizer, batch, 1, partial(deblur_losses, players, settings))


def reading(folder: Path, count: int) -> dict[str, Callable[[], object]]:
    """Reading `count` random patches, from PNG pictures and from an HDF5 file."""
    image = at_least(read_image(photographs(("coffee.png",))[0]), 720)[:720, :1080]
    patches = np.concatenate([cut(np.roll(image, n, axis=1), 128, 128) for n in range(50)])  # 2000 of them
    write_image(folder / "frame.png", image)
    with h5py.File(folder / "patches.h5", "w", libver="latest") as file:
        for key in ("sharp", "blur"):
            file.create_dataset(key, data=patches, chunks=(1, 128, 128, 3))
    source = Patches(folder / "patches.h5", "sharp")
    order = np.random.default_rng(0).permutation(len(source))[:count]
    return {
        "crops of a 1080 x 720 PNG": lambda: [read_image(folder / "frame.png")[:128, :128] for _ in order],
        "patches of an HDF5 file": lambda: [source[int(number)] for number in order],
    }


def main(settings: Settings) -> None:
    begin()
    with tempfile.TemporaryDirectory() as folder:
        show("reading", measure(reading(Path(folder), 100), 5), 100, "patches")
        torch.save(vgg19().state_dict(), Path(folder) / "vgg.pth")
        cases = {
            name: training(settings.blocks, Path(folder) / "vgg.pth", *form) for name, form in forms().items()
        }
        show(f"training, {settings.blocks} blocks, batch 4", measure(cases, settings.repeats), 4)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
