"""Resident memory over 2,000 steps of each trainer at tiny size, with a data worker: it must stay flat.

    python -m benchmarks.memory [--trainers srn kontext]        # about 15 minutes on one core
    python -m benchmarks.memory --pid 4711 --log train.log      # soak: of a training that runs

The commands of tests/faults/tiny_runs.py as processes of their own; validation, pictures and checkpoints come
about every 100 steps. Shown is VmRSS of the main process, and of its workers together (training has one, and
the validation of ControlNets another), at some steps: medians of the samples around each. --csv FILE keeps
all samples. Exit code 1 if more than `limit` MiB are added after step 1000.

With --pid, of a training begun by hand with its output in --log: MiB and processor seconds of each thousand
steps, evaluations included (processor time, for a shared machine's clock says little), with its workers.
"""

import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from benchmarks.head import begin
from tests.faults.tiny_runs import ROOT, TRAINERS, command, make_place, must, prepare_output, run

STEPS = 2000
MARKS = (200, 1000, STEPS)
NEAR = 40  # steps around a mark


@dataclass
class Settings:
    """Watch the memory of long runs."""

    trainers: tuple[str, ...] = TRAINERS
    limit: float = 8.0  # MiB that a process may add from step 1000 to step 2000
    csv: Path | None = None  # write all samples here
    pid: int | None = None  # watch this process instead
    log: Path | None = None  # what it prints


def changes(trainer: str) -> tuple[dict[str, object], int]:
    """Flags for 2,000 steps, and the length of the progress bar that counts them."""
    if trainer == "srn":  # 3 steps an epoch
        return {"epochs": 667, "log_epoch": 33}, 2001
    if trainer == "dbgan":  # the stage of most networks; another stage has a worker of its own
        return {"mode": "blur", "blur_epochs": 667, "log_epoch": 33}, 2001
    if trainer == "kontext":
        return {"max_train_steps": STEPS, "save_every": 100}, STEPS
    every = dict.fromkeys(("save_steps", "val_steps", "logger_freq"), 100)
    return {"max_steps": STEPS, "log_steps": 50, **every}, STEPS


def resident(pid: int) -> float:
    """VmRSS in MiB; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", text)
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def steps_done(log: Path, total: int) -> int:
    """What the progress bar of this length has counted so far."""
    return max(map(int, re.findall(rf"\b(\d+)/{total} \[", log.read_text(errors="replace"))), default=0)


def watch(trainer: str, place: Path, work: Path) -> Iterator[tuple[int, float, float]]:
    """Step, MiB of the main process, MiB of its workers, four times a second until the run ends."""
    flags, total = changes(trainer)
    output = work / trainer
    prepare_output(trainer, place, output)
    mode = flags.pop("mode", None)
    words = [word if word != "all" else mode for word in command(trainer, place, output, 1, **flags)]
    arguments = [sys.executable, *words]
    log = work / f"{trainer}.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=stream, stderr=stream, env={**os.environ})
        while process.poll() is None:
            time.sleep(0.25)
            workers = sum(map(resident, children(process.pid)))
            yield steps_done(log, total), resident(process.pid), workers
    if process.returncode:
        raise RuntimeError(f"{trainer}: exit code {process.returncode}: {log.read_text()[-2000:]}")


def processor_seconds(pid: int) -> float:
    """What a process has used on all processors, workers that have ended included; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def soak(pid: int, log: Path, every: int = 1000) -> None:
    """Print a line after each thousand steps, until the process ends."""
    print("   steps   MiB, at its end   processor seconds   of the first whole thousand's")
    mark, total, used, first = -1, every, 0.0, 0.0
    while memory := resident(pid):
        time.sleep(0.2)
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            bars = re.findall(r"\b(\d+)/(\d+) \[", file.read().decode(errors="replace"))
        longest = max([total, *(int(of) for _, of in bars)])
        if longest > total:  # the longest bar is that of the steps
            total, mark = longest, -1
        done = max((int(step) for step, of in bars if int(of) == total), default=0)
        if done // every <= mark:
            continue
        now = processor_seconds(pid) + sum(map(processor_seconds, children(pid)))
        if used and done // every == mark + 1:
            first = first or now - used
            print(f"{done:8} {memory:17.1f} {now - used:19.1f} {(now - used) / first:15.3f}", flush=True)
        used = now if mark >= 0 else 0.0  # when the watching began a thousand was begun
        mark = done // every


def at(samples: list[tuple[int, float, float]], mark: int, column: int) -> float:
    """Median around a step of a column of the samples, those without a worker left out."""
    near = [s[column] for s in samples if abs(s[0] - mark) <= NEAR and s[1] and s[2]]
    return statistics.median(near)


def main(settings: Settings) -> None:
    begin()
    if settings.pid and settings.log:
        return soak(settings.pid, settings.log)
    print("MiB at step  " + "".join(f"{mark:>9}" for mark in MARKS) + "   added after 200   after 1000")
    rows, fine = [], True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        must(run(partial(make_place, work / "place"), work / "log"))
        for trainer in settings.trainers:
            samples = list(watch(trainer, work / "place", work))
            rows += [(trainer, *sample) for sample in samples]
            for column, name in ((1, trainer), (2, "  its worker")):
                values = [at(samples, mark, column) for mark in MARKS]
                added = values[-1] - values[0], values[-1] - values[1]
                fine &= added[1] <= settings.limit
                numbers = "".join(f"{value:9.1f}" for value in values)
                print(f"{name:13}{numbers}{added[0]:18.1f}{added[1]:13.1f}", flush=True)
    if settings.csv:
        with open(settings.csv, "w", newline="") as file:
            csv.writer(file).writerows([("trainer", "step", "main_mib", "workers_mib"), *rows])
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
