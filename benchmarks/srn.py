"""How fast SRN-DeblurNet trains and restores: the fast settings against plain float32, in one run.

    python -m benchmarks.srn            # about 3 minutes on a GPU, 2 on two CPU cores

Training is one step (forward, backward, clipping, Adam) of the full network at crop 256, data in memory;
restoring is one image. Shown are the median of several repeats, synchronised, and on a GPU the peak
memory. Cases alternate, so that what else the machine does hits all of them alike.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch.nn import functional as F

from benchmarks.head import begin, seconds
from harness.run import start_fabric
from train_srn import Settings as TrainSettings
from train_srn import SRNDeblurNet, make_optimizer, restore, train_step

CUDA = torch.cuda.is_available()


@dataclass
class Settings:
    """Time SRN-DeblurNet's training step and its restoring."""

    batch_size: int = 16 if CUDA else 2  # of the training step
    repeats: int = 20 if CUDA else 3  # of each case
    size: tuple[int, int] = (720, 1280) if CUDA else (360, 640)  # height and width to restore


def training(
    batch_size: int, crop: int, precision: str, channels_last: bool, compiled: bool
) -> Callable[[], object]:
    """One training step as a function."""
    fabric = start_fabric(precision=precision)
    network = SRNDeblurNet().to(fabric.device)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.compile()
    settings = TrainSettings()
    optimizer = make_optimizer(network, settings)
    network, optimizer = fabric.setup(network, optimizer)
    sharp = torch.rand(batch_size, 3, crop, crop, device=fabric.device) * 2 - 1
    batch = {"blurry": F.avg_pool2d(sharp, 5, 1, 2), "sharp": sharp}
    return lambda: train_step(fabric, network, optimizer, batch, settings)


def restoring(h: int, w: int, precision: str, channels_last: bool, compiled: bool) -> Callable[[], object]:
    """One restored image (h, w) as a function."""
    fabric = start_fabric(precision=precision)
    network = SRNDeblurNet().to(fabric.device).eval()
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.forward = torch.compile(network.forward)
    blurry = torch.rand(1, 3, h, w, device=fabric.device) * 2 - 1

    def run() -> torch.Tensor:
        with fabric.autocast():
            return restore(network, blurry)

    return run


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and peak GiB (0 on a CPU) of each case."""
    times, memory = {name: [] for name in cases}, dict.fromkeys(cases, 0.0)
    for run in cases.values():
        for _ in range(3 if CUDA else 1):  # compile, choose kernels
            run()
    for _ in range(repeats):
        for name, run in cases.items():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds(run))
            memory[name] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    return {name: (statistics.median(values), memory[name]) for name, values in times.items()}


def show(title: str, results: dict[str, tuple[float, float]], count: int, unit: str = "images") -> None:
    print(title)
    plain = next(iter(results.values()))[0]
    for name, (taken, memory) in results.items():
        rate = f"{1e3 * taken:9.1f} ms {count / taken:8.2f} {unit}/s {plain / taken:5.2f} x"
        print(f"  {name:32} {rate}" + (f" {memory:6.2f} GiB" if memory else ""))


def forms() -> dict[str, tuple[str, bool, bool]]:
    """Precision, channels_last and compile of each case, by name."""
    found = {"float32": ("32", False, False), "float32 channels_last": ("32", True, False)}
    if CUDA:
        found |= {"bf16": ("bf16", False, False), "bf16 channels_last": ("bf16", True, False)}
        found |= {"bf16 channels_last compiled": ("bf16", True, True)}
    return found


def main(settings: Settings) -> None:
    begin()
    batch_size, repeats, (h, w) = settings.batch_size, settings.repeats, settings.size
    cases = {name: training(batch_size, 256, *form) for name, form in forms().items()}
    show(f"training, batch {batch_size}, crop 256", measure(cases, repeats), batch_size)
    del cases
    cases = {name: restoring(h, w, *form) for name, form in forms().items()}
    show(f"restoring {w} x {h}", measure(cases, repeats), 1)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
