"""Shared by the benchmarks: table rows, description of the machine, alternating timings, ratios."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

BUSY = 0.3  # load average above which timings are unreliable


class Row(NamedTuple):
    """One result; `aim` is its target (0: none), `more` means that higher is better."""

    what: str
    value: float | str
    unit: str = ""
    aim: float = 0
    more: bool = False

    @property
    def met(self) -> str:
        if not self.aim or isinstance(self.value, str):
            return ""
        return "yes" if (self.value >= self.aim if self.more else self.value <= self.aim) else "no"


class Case(NamedTuple):
    """One measurement; `rows` builds and runs the networks and returns the results."""

    what: str
    rows: Callable[[], list[Row]]


def processor() -> str:
    """Return the name of the CPU and, if there is one, the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}; {name}" if torch.cuda.is_available() else name


def begin() -> None:
    """Print the date, the machine and its load, and warn if other programs are running."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    print(f"{datetime.now(UTC):%Y-%m-%d}, {processor()}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, load before the start {load:.2f}")
    if load > BUSY:
        print(
            f"WARNING: a load above {BUSY} means that other programs are running: do not publish these times"
        )


def seconds(work: Callable[[], object]) -> float:
    """Measure the time of `work`, including its work on a GPU."""
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
    """Measure the works alternately, `repeats` times each, so that other load affects all of them equally."""
    for _ in range(warm_up):
        for work in works.values():
            work()
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: [taken[name] for taken in times] for name in works}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Format the median and quartiles of the pairwise ratios, e.g. "0.930 (0.910 to 0.950, 10 pairs)"."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f}, {len(ratios)} pairs)"


def randomize_zero_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Replace zero-initialized weights by small random values: a GPU multiplies zeros faster."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
    return network
