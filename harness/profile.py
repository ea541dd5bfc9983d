"""What a restoration costs: multiplications, time and memory, measured on the device that does it."""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

PROFILE = "profile.json"  # beside the images it is about
RUNS = 3  # timed ones, after one that warms up


def measure(restore: Callable[[], object], device: torch.device) -> dict:
    """Measure MACs, seconds and peak memory (bytes) of `restore()`; with the device and torch's version.

    Seconds are the median of three runs, each waited for; memory is what torch allocated on a CUDA device,
    weights included, or the most the process ever held.
    """
    cuda = device.type == "cuda"
    macs = count_macs(restore)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        restore()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "macs": macs,
        "seconds": statistics.median(seconds),
        "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else peak_resident_memory(),
        "memory": "allocated on the device" if cuda else "resident, the whole process",
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
    }


def count_macs(compute: Callable[[], object]) -> int:
    """Count the multiplications with their additions in all convolutions, matrix products and attention that
    torch computes in `compute()`, on any device."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts CUDA's alone
    formula = {attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operation is not counted
    try:
        with FlopCounterMode(display=False, custom_mapping=formula) as counter:
            compute()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def peak_resident_memory() -> int | None:
    """Return the bytes of CPU memory that the process held at most; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost_lines(profile: dict) -> list[str]:
    """Return what `measure` found for an image, and the weights it was made with, as lines to print."""
    memory = profile["peak_memory"]
    held = "" if memory is None else f", at most {memory / 2**20:.0f} MiB ({profile['memory']})"
    size = "{} x {}".format(*profile["size"])
    return [
        f"cost      {profile['macs'] / 1e9:.3f} GMAC, {profile['seconds']:.4g} s for {size}{held}",
        f"          on {profile['device']}, torch {profile['torch']}",
        *weights_lines(profile["checkpoint"]),
    ]


def weights_lines(about: dict) -> list[str]:
    """Return what `ldm.checkpoint.describe` found, as lines to print."""
    return [
        f"weights   {about['path']}: step {about['step']}, {about['parameters']} parameters",
        f"          sha256 {about['sha256']}",
    ]
