"""Ten minutes of one GPU: is everything right on it, how fast is it, and a training run on it.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --train "--sharp_dir PHOTOS --generator unet --init_weights mine.safetensors"

Each stage is a process of its own with a time limit: checks against the CPU (gpu_checks.py), figures at full
size with random weights (gpu_figures.py; its peers are those of requirements-dev.txt), and train_dbgan.py
`deblur` as one would start it, for the time that is left. OUTPUT_DIR/report.jsonl gets a line as soon as a
figure is known; the table that is printed can be pasted into an issue. The times aimed at are an H200's;
memory is torch's peak, to which CUDA's context comes (about 0.5 GB). `--tiny` runs the same on tiny networks,
on any device and without hurry.
"""

import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.head import Case, Row, begin, processor
from harness.settings import run_main

TOTAL = 590  # seconds for everything
# Seconds that each stage may take, what is wanted most first; the training gets what is left.
LIMITS = dict(machine=30, checks=90, controlnet=60, srn=20, kontext=50, dbgan=20, training=TOTAL)
PRELOADED = ["benchmarks.gpu_checks", "benchmarks.gpu_figures", "benchmarks.gpu_training"]


@dataclass
class Settings:
    """Check, measure and train on this machine's GPU."""

    output_dir: Path = Path("outputs/gpu")  # the report, and the training's folder
    train: str = (
        ""  # options of train_dbgan.py for the training; none: the U-Net on the photos that are there
    )
    tiny: bool = False  # tiny networks on any device: whether it runs at all


def machine() -> list[Row]:
    """What everything else is about."""
    begin()
    about = {"machine": processor(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    return [Row(name, value) for name, value in about.items()]


def cases_of(stage: str, settings: Settings, seconds: float) -> Iterable[Case]:
    """What a stage measures."""
    from benchmarks import gpu_checks, gpu_figures, gpu_training  # not in the driver: they take seconds

    if stage == "machine":
        return [Case(stage, machine)]
    if stage == "training":
        return [Case(stage, partial(gpu_training.train, settings, seconds))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return getattr(gpu_checks if stage == "checks" else gpu_figures, stage)(settings.tiny, device)


def write(folder: Path, stage: str, row: Row) -> None:
    """A row into the report and the table, at once."""
    value = row.value if isinstance(row.value, str) else f"{row.value:.3g}"
    print(f"| {stage} | {row.what} | {value} | {row.unit} | {row.aim or ''} | {row.met} |", flush=True)
    with (folder / "report.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, **row._asdict(), "met": row.met}) + "\n")


def rows_of(case: Case) -> list[Row]:
    """The rows of a case; one that does not fit or cannot run says so and stops no other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return case.rows()
    except torch.OutOfMemoryError:
        return [Row(case.what, "out of memory")]
    except Exception as error:  # of every kind: it is reported, and the others are worth having
        return [Row(case.what, f"failed: {(str(error) or type(error).__name__).splitlines()[0]}")]


def run_stage(stage: str, settings: Settings, seconds: float) -> None:
    """All of a stage's cases, in the process of its own."""
    for case in cases_of(stage, settings, seconds):
        for row in rows_of(case):
            write(settings.output_dir, stage, row)


def in_process(work: Callable[[], None], limit: float) -> str:
    """Run `work` in a process of its own; "" or what went wrong.

    Stages are forked from a process that has imported everything and has not started CUDA (on Windows each
    imports for itself), so that what one of them breaks is no other's.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"stopped after {limit:.0f} s"
    return f"ended with exit code {process.exitcode}" if process.exitcode else ""


def main(settings: Settings) -> None:
    """Run all stages, print the table, write the report."""
    if not (torch.cuda.is_available() or settings.tiny):
        raise ValueError("torch finds no CUDA device here: `python -m benchmarks.plan` counts without one")
    report = settings.output_dir / "report.jsonl"
    if report.exists():
        raise ValueError(f"{report} exists: give another --output_dir")
    start, total = time.monotonic(), TOTAL * (10 if settings.tiny else 1)
    os.environ.setdefault("TQDM_DISABLE", "1")  # for the stages: their bars would cut the table
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    print("| stage | what | measured | unit | aim | met |\n|---|---|---|---|---|---|", flush=True)
    for stage, limit in LIMITS.items():
        left = total - (time.monotonic() - start)
        limit = min(left, left if settings.tiny else limit)
        problem = in_process(partial(run_stage, stage, settings, limit - 10), limit)
        if problem:
            write(settings.output_dir, stage, Row(stage, problem))
    print(f"written: {report}")


if __name__ == "__main__":
    run_main(main, Settings)
