"""How fast BGAN and DBGAN train and read their patches: the fast settings against plain float32, in one run.

    python benchmarks/dbgan.py          # a few minutes on a GPU or on two CPU cores

Training is one step of the stage `deblur` at the paper's settings (16 blocks of width 64, SRGAN's
discriminator, VGG-19 with random weights, crop 128, batch 4), data in memory; on a CPU at 4 blocks. Reading
takes random patches of 128 pixels from an HDF5 file, one process. Shown are medians of several repeats,
synchronised; cases alternate, so that what else the machine does hits all of them alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from torchvision.models import vgg19

sys.path.insert(0, str(Path(__file__).parent.parent))

from ldm.data.image import photographs, read_image, write_image  # noqa: E402
from ldm.data.paired import at_least  # noqa: E402
from ldm.data.patches import Patches  # noqa: E402
from ldm.modules.perceptual import PerceptualLoss  # noqa: E402
from ldm.run import start_fabric  # noqa: E402
from tool_make_dbgan_dataset import cut  # noqa: E402
from train_dbgan import Settings, deblur_losses, make_players, train_step  # noqa: E402


def training(blocks: int, vgg: Path, precision: str, channels_last: bool, compiled: bool) -> Callable:
    """One step of a batch of 4 as a function."""
    fabric = start_fabric(precision=precision)
    settings = Settings(blocks=blocks, generated_fraction=0.0, channels_last=channels_last, compile=compiled)
    perceptual = PerceptualLoss(file=vgg).to(fabric.device)
    players = make_players(settings, "deblur", perceptual, fabric.device)
    parameters = [*players.generators.parameters(), *players.discriminators.parameters()]
    fused = fabric.device.type == "cuda"
    optimizer = fabric.setup_optimizers(torch.optim.Adam(parameters, 1e-4, fused=fused))
    images = torch.rand(2, settings.batch_size, 3, 128, 128, device=fabric.device) * 2 - 1
    batch = {"blurry": images[0], "sharp": images[1]}
    return lambda: train_step(fabric, optimizer, batch, 1, partial(deblur_losses, players, settings))


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case."""
    cuda, seconds = torch.cuda.is_available(), {name: [] for name in cases}
    for run in cases.values():
        for _ in range(3 if cuda else 1):  # compile, choose kernels
            run()
    for _ in range(repeats):
        for name, run in cases.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, results: dict[str, float], count: int, unit: str) -> None:
    print(title)
    plain = next(iter(results.values()))
    for name, seconds in results.items():
        rate = f"{1e3 * seconds:9.1f} ms {count / seconds:9.1f} {unit}/s {plain / seconds:7.2f} x"
        print(f"  {name:32} {rate}")


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


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=16 if cuda else 4)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    options = parser.parse_args()
    forms = {"float32": ("32", False, False), "float32 channels_last": ("32", True, False)}
    if cuda:
        forms |= {"bf16": ("bf16", False, False), "bf16 channels_last": ("bf16", True, False)}
        forms |= {"bf16 channels_last compiled": ("bf16", True, True)}
    about = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{about}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        show("reading", measure(reading(Path(folder), 100), 5), 100, "patches")
        torch.save(vgg19().state_dict(), Path(folder) / "vgg.pth")
        cases = {
            name: training(options.blocks, Path(folder) / "vgg.pth", *form) for name, form in forms.items()
        }
        show(f"training, {options.blocks} blocks, batch 4", measure(cases, options.repeats), 4, "images")


if __name__ == "__main__":
    main()
