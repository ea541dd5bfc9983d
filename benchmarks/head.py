"""What the benchmarks share: their first lines, times in turn, ratios of pairs, what arithmetic bounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Parts of the names of torch's kernels for arithmetic: attention, convolutions, then matrix products
KERNELS = "attention", "convolution", "::mm", "::addmm", "::bmm", "::baddbmm"
BUSY = 0.3  # load (processes that wait or run) above which a time says little


def processor() -> str:
    """The processor's name, with the GPU's where there is one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}; {name}" if torch.cuda.is_available() else name


def begin() -> None:
    """Print the date, the machine and its load, and warn if others use it too."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    print(f"{datetime.now(UTC):%Y-%m-%d}, {processor()}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, load before the start {load:.2f}")
    if load > BUSY:
        print(
            f"WARNING: a load above {BUSY} means that other programs run: these times are no figures to keep"
        )


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, with what it leaves to a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(
    works: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work, `repeats` times in turn, so that what else the machine does hits all of them."""
    for _ in range(warm_up):
        for work in works.values():
            work()
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: [taken[name] for taken in times] for name in works}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """ "0.93 (0.91 to 0.95)": the median of the pairs' ratios, and their quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f}, {len(ratios)} pairs)"


class Rates(NamedTuple):
    """TFLOP/s of this machine, measured: one large matrix product, one 3 x 3 convolution (channels_last)."""

    product: float
    convolution: float


def rates(device: str, dtype: torch.dtype, repeats: int = 10) -> Rates:
    """Both by the median of `repeats`, in sizes that fill a GPU or a few cores."""
    n, (b, c, side) = (8192, (16, 640, 64)) if device == "cuda" else (2048, (4, 256, 32))
    matrices = torch.randn(2, n, n, device=device, dtype=dtype)
    last = torch.channels_last
    image = torch.randn(b, c, side, side, device=device, dtype=dtype).to(memory_format=last)
    kernel = torch.randn(c, c, 3, 3, device=device, dtype=dtype).to(memory_format=last)
    works = {"a": lambda: matrices[0] @ matrices[1], "b": lambda: F.conv2d(image, kernel, padding=1)}
    product, convolution = (statistics.median(taken) for taken in in_turn(works, repeats, 3).values())
    return Rates(2 * n**3 / product / 1e12, 2 * 9 * b * c * c * side**2 / convolution / 1e12)


def bound(name: str, step: Callable[[], object], machine: Rates) -> str:
    """What `step` computes (not compiled: the compiler hides it), and how long that takes here at least."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    total = sum(counts.values()) / 1e12
    convolutions = sum(flop for kind, flop in counts.items() if "convolution" in str(kind)) / 1e12
    least = convolutions / machine.convolution + (total - convolutions) / machine.product
    return (
        f"{name}: {total:.3g} TFLOP a step, {convolutions:.3g} of them in convolutions; at the measured "
        f"{machine.convolution:.3g} TFLOP/s of a convolution and {machine.product:.3g} of a matrix product "
        f"{1000 * least:.0f} ms at least"
    )


def shares(name: str, step: Callable[[], object], repeats: int = 3) -> str:
    """What torch's own kernels for the arithmetic take of `step` (not compiled, on a CPU), and all else: the
    part of which a rewrite could save something."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            step()
    taken = {event.key: event.self_cpu_time_total / 1000 / repeats for event in profiled.key_averages()}
    kernels = {key: sum(ms for kind, ms in taken.items() if key in kind) for key in KERNELS}
    attention, convolutions, *products = kernels.values()
    return (
        f"{name}: of {sum(taken.values()):.3g} ms a step attention takes {attention:.3g}, convolutions "
        f"{convolutions:.3g}, matrix products {sum(products):.3g}, all else "
        f"{sum(taken.values()) - sum(kernels.values()):.3g}"
    )
