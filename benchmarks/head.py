"""What the benchmarks share: rows of a table, their first lines, times in turn, ratios of pairs."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

BUSY = 0.3  # load (processes that wait or run) above which a time says little


class Row(NamedTuple):
    """One figure; `aim` 0 where there is none, `more` where more is better."""

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
    """What is measured, and how: `rows` builds the networks, runs them and returns the figures."""

    what: str
    rows: Callable[[], list[Row]]


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


def wake(network: torch.nn.Module) -> torch.nn.Module:
    """Give weights that start at zero small random values: a GPU multiplies zeros faster, with less power."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
    return network
