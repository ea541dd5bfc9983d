"""Check correctness, measure speed and memory, and train on one GPU, in ten minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --train "--sharp_dir PHOTOS --generator unet --init_weights mine.safetensors"

Each stage runs in its own process with a time limit: checks against the CPU (gpu_checks.py), time and memory
at full size with random weights (gpu_figures.py; compared with packages of requirements-dev.txt), and
`train_dbgan.py deblur` for the remaining time. OUTPUT_DIR/report.jsonl gets a line for each result at once;
the printed table can be pasted into an issue. Target times are for an H200; memory is torch's peak, without
CUDA's context (about 0.5 GB). `--tiny` runs the same on tiny networks, on any device, with longer limits.
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
# Seconds for each stage, the most important first; the training gets the remaining time.
LIMITS = dict(machine=30, checks=90, controlnet=60, srn=20, kontext=50, dbgan=20, training=TOTAL)
PRELOADED = ["benchmarks.gpu_checks", "benchmarks.gpu_figures", "benchmarks.gpu_training"]


@dataclass
class Settings:
    """Check, measure and train on this machine's GPU."""

    output_dir: Path = Path("outputs/gpu")  # folder for the report and the training run
    train: str = ""  # options of train_dbgan.py; default: train the U-Net on the available photos
    tiny: bool = False  # run tiny networks on any device, as a test of the benchmark itself


def machine() -> list[Row]:
    """Describe the machine and the versions of torch and CUDA."""
    begin()
    about = {"machine": processor(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    return [Row(name, value) for name, value in about.items()]


def cases_of(stage: str, settings: Settings, seconds: float) -> Iterable[Case]:
    """Return the cases of a stage."""
    from benchmarks import gpu_checks, gpu_figures, gpu_training  # imported late: they take seconds

    if stage == "machine":
        return [Case(stage, machine)]
    if stage == "training":
        return [Case(stage, partial(gpu_training.train, settings, seconds))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return getattr(gpu_checks if stage == "checks" else gpu_figures, stage)(settings.tiny, device)


def write(folder: Path, stage: str, row: Row) -> None:
    """Append a row to the report and print it."""
    value = row.value if isinstance(row.value, str) else f"{row.value:.3g}"
    print(f"| {stage} | {row.what} | {value} | {row.unit} | {row.aim or ''} | {row.met} |", flush=True)
    with (folder / "report.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, **row._asdict(), "met": row.met}) + "\n")


def rows_of(case: Case) -> list[Row]:
    """Run a case and return its rows; an error or lack of memory becomes a row and stops no other case."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return case.rows()
    except torch.OutOfMemoryError:
        return [Row(case.what, "out of memory")]
    except Exception as error:  # any error is reported, and the other cases go on
        return [Row(case.what, f"failed: {(str(error) or type(error).__name__).splitlines()[0]}")]


def run_stage(stage: str, settings: Settings, seconds: float) -> None:
    """Run all cases of a stage, in the stage's process."""
    for case in cases_of(stage, settings, seconds):
        for row in rows_of(case):
            write(settings.output_dir, stage, row)


def in_process(work: Callable[[], None], limit: float) -> str:
    """Run `work` in a separate process; return "" or what went wrong.

    Stages are forked from a process that has imported everything but not initialized CUDA (on Windows each
    stage does its own imports), so that a crash of one does not affect the others.
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
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of the stages would interrupt the table
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
