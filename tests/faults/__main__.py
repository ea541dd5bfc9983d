"""Fault tests of training runs and the web page: kills at any moment, a full disk, malformed inputs.

    python -m tests.faults kills --seed 0 --count 200     # about 20 minutes on one core
    python -m tests.faults ranks --seed 0 --count 30      # one of two processes killed: 10 minutes
    python -m tests.faults disk --seed 0                  # 3 minutes; on a small tmpfs if mounting is allowed
    python -m tests.faults inputs --seed 0 --count 500    # 10 minutes, see tests/faults/bad_inputs.py
    python -m tests.faults page --seed 0                  # the web page under load, see tests/faults/page.py
    python -m tests.faults all

The trainers run at tiny size with the commands that users type. Everything but the timing depends only on
the seed. The exit code is 1 if anything is lost, unreadable or different. Results are in docs/reliability.md.
"""

import csv
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from ldm import checkpoint
from ldm.data.image import read_image
from tests.faults import bad_inputs
from tests.faults.page import run_page
from tests.faults.tiny_runs import (  # imported early: it limits torch to one thread
    PATIENCE,
    RUNS,
    Result,
    command,
    kill,
    make_test_files,
    prepare_output,
    require_success,
    run,
    script,
    start,
    wait,
)
from tests.test_processes import end_both, start_both

TIMES = ("images/s",)  # columns that differ between runs
TOGETHER = ("srn", "deblur", "kontext")  # run by two processes
LOST = "error: another process of this run ended"  # message of the surviving process
PARTS = "state_dict discriminators optimizer optimizer_states scheduler ema random processes step global_step"


@dataclass
class Settings:
    """Run fault tests."""

    # campaign to run
    what: tyro.conf.Positional[Literal["kills", "ranks", "disk", "inputs", "page", "all"]] = "all"
    seed: int = 0  # random seed of the campaign
    count: int = 0  # number of kills, kills of one rank, inputs or uploads; 0 = 200, 30, 500 or 50
    trainers: tuple[str, ...] = ()  # for kills, ranks and disk; default: all, for ranks those in TOGETHER
    folder: Path | None = None  # keep all files in this folder; None = temporary folder


# ---- checking a run's folder -----------------------------------------------------------------------------


def saved(folder: Path) -> list[Path]:
    """List the completely written files, as paths relative to the folder."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def check_files(folder: Path) -> None:
    """Read all saved files. Raises ValueError or OSError for a file that cannot be read."""
    for name in saved(folder):
        path = folder / name
        if path.suffix == ".ckpt":
            checkpoint.load(path)
        elif path.suffix == ".safetensors":
            checkpoint.read_weights(path)
        elif path.suffix == ".png":
            read_image(path)


def steps_saved(folder: Path) -> dict[str, int]:
    """Return the step of each last.ckpt."""
    contents = {str(path): checkpoint.load(path) for path in folder.rglob("last.ckpt")}
    return {path: content.get("step", content.get("global_step")) for path, content in contents.items()}


def check_progress(folder: Path, before: Path) -> None:
    """Check that all files can be read and no checkpoint is older than its step in the file `before`."""
    check_files(folder)
    now = steps_saved(folder)
    for line in before.read_text().splitlines() if before.exists() else ():
        step, path = line.split(" ", 1)
        if now.get(path, -1) < int(step):
            raise ValueError(f"{path} was of step {step} and is of step {now.get(path)}")
    before.write_text("".join(f"{step} {path}\n" for path, step in now.items()))


def same(a: object, b: object) -> bool:
    """Compare recursively, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_equal(whole: Path, parts: Path) -> None:
    """Raise ValueError with the first difference between two finished runs."""
    names = [[n for n in saved(folder) if "events.out" not in n.name] for folder in (whole, parts)]
    if names[0] != names[1]:
        raise ValueError(f"other files: {', '.join(map(str, set(names[0]) ^ set(names[1])))}")
    for name in names[0]:
        a, b = whole / name, parts / name
        if name.suffix == ".ckpt":
            a, b = checkpoint.load(a), checkpoint.load(b)
            wrong = [part for part in PARTS.split() if not same(a.get(part), b.get(part))]
            if wrong:
                raise ValueError(f"{name} differs in {', '.join(wrong)}")
        elif name.suffix == ".safetensors":
            if not same(checkpoint.read_weights(a), checkpoint.read_weights(b)):
                raise ValueError(f"{name} differs")
        elif name.suffix == ".csv":
            if rows(a) != rows(b):
                raise ValueError(f"{name} differs: {rows(a)} {rows(b)}")
        elif name.suffix in (".png", ".npy") and a.read_bytes() != b.read_bytes():
            raise ValueError(f"{name} differs")


def rows(path: Path) -> list[dict]:
    with open(path) as file:
        return [
            {name: value for name, value in row.items() if not name.endswith(TIMES)}
            for row in csv.DictReader(file)
        ]


# ---- kills -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Time of a kill: fraction `at` of a run's duration, or `late` seconds after the nth write began."""

    at: float | None
    nth: int
    late: float
    workers: int


def plan(seed: int, trainer: str) -> Iterator[Kill]:
    """Generate kills without end, half of them during a save."""
    rng = np.random.default_rng([seed, RUNS.index(trainer)])
    while True:
        at = None if rng.random() < 0.5 else float(rng.uniform(0.02, 1))
        yield Kill(at, int(rng.integers(1, 8)), float(rng.uniform(0, 0.002)), int(rng.integers(2)))


def half_written(folder: Path, known: dict[str, int] | None = None) -> dict[str, int]:
    """Find temporary files of unfinished writes, with their times, except those in `known`."""
    found = {}
    for root, _, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in names if name.endswith(".tmp")):
            try:
                found[path] = os.stat(path).st_mtime_ns
            except FileNotFoundError:
                continue  # renamed in the meantime
    return {path: changed for path, changed in found.items() if changed != (known or {}).get(path)}


def await_moment(pid: int, folder: Path, kill_at: Kill, seconds: float) -> bool:
    """Wait until the time of the kill; return False if the process ends before it."""
    if kill_at.at is not None:
        return not _ended(pid, time.monotonic() + kill_at.at * seconds)
    left, end = half_written(folder), time.monotonic() + PATIENCE
    seen, before = 0, {}
    while time.monotonic() < end:
        now = half_written(folder, left)
        seen, before = seen + len(now.keys() - before.keys()), now
        if seen >= kill_at.nth:
            time.sleep(kill_at.late)
            return True
        if _ended(pid, time.monotonic() + 0.0002):
            return False
    kill(pid)
    raise RuntimeError(f"process {pid} hangs")


def _ended(pid: int, until: float) -> bool:
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(max(0.0, min(0.002, until - time.monotonic())))


def kills(trainer: str, place: Path, work: Path, seed: int, count: int, bar: tqdm) -> Counter:
    """Kill a trainer `count` times, finish a run after every few kills, and compare with a whole run.

    Raises RuntimeError with the reason if something is lost, unreadable or different.
    """
    whole, log, tally = work / "whole", work / "log", Counter()
    prepare_output(trainer, place, whole)
    begin = time.monotonic()
    require_success(run(script(command(trainer, place, whole)), log))
    seconds = time.monotonic() - begin
    moments, rng = plan(seed, trainer), np.random.default_rng([seed, RUNS.index(trainer), 1])
    while tally["kills"] < count:
        folder = work / f"run{tally['runs']}"
        prepare_output(trainer, place, folder)
        for _ in range(int(rng.integers(1, 9))):
            if tally["kills"] == count:
                break
            moment, before = next(moments), half_written(folder)
            pid = start(script(command(trainer, place, folder, moment.workers)), log)
            if not await_moment(pid, folder, moment, seconds):
                require_success(Result(wait(pid, 1), "", log.with_suffix(".err").read_text()))
                break  # it finished first: compare
            if kill(pid) == -9:
                tally["kills"] += 1
                tally["while writing a file"] += bool(half_written(folder, before))
                bar.update()
            require_success(run(partial(check_progress, folder, work / f"steps{tally['runs']}"), log))
        require_success(run(script(command(trainer, place, folder, int(rng.integers(2)))), log))
        require_success(run(partial(check_equal, whole, folder), log))
        tally["runs"] += 1
        shutil.rmtree(folder)
    return tally


def begin_both(trainer: str, place: Path, folder: Path, log: Path, workers: int = 0) -> list[int]:
    """Start training on two processes; return their ids once they are connected."""
    prepare_output(trainer, place, folder)
    said = [log.with_name(f"{log.name}{rank}.err") for rank in range(2)]
    for path in said:
        path.unlink(missing_ok=True)
    pids = start_both([script(command(trainer, place, folder, workers))] * 2, log)
    end = time.monotonic() + 60
    while not all(path.exists() and "MEMBER" in path.read_text(errors="replace") for path in said):
        if _ended(pids[0], min(end, time.monotonic() + 0.02)) or time.monotonic() > end:
            break
    time.sleep(0.3)
    return pids


def finish_both(pids: list[int], log: Path) -> None:
    for code, text in end_both(pids, log):
        require_success(Result(code, "", text))


def check_survivor(pid: int, said: Path, folder: Path, steps: list[int]) -> None:
    """Raise RuntimeError unless the process ends within a minute, with one error line that another one ended,
    or successfully after all `steps`."""
    code = wait(pid, 60)
    if code is None:
        kill(pid)
    text = said.read_text(errors="replace")
    problem = bad_inputs.complaint(Result(code, "", text))
    done = code == 0 and [*steps_saved(folder).values()] == steps
    if problem or not done and not text.strip().splitlines()[-1].startswith(LOST):
        raise RuntimeError(f"{said.stem}: exit code {code}, {problem}: {text[-2000:]}")


def rank_kills(trainer: str, place: Path, work: Path, seed: int, count: int, bar: tqdm) -> Counter:
    """Kill one of two processes, as in `kills`: the other must end by itself with an error that says why.

    Kills come after the two are connected; before, the other would wait for half an hour.
    """
    whole, log, tally = work / "whole", work / "log", Counter()
    pids, begin = begin_both(trainer, place, whole, log), time.monotonic()
    finish_both(pids, log)
    seconds, steps = time.monotonic() - begin, [*steps_saved(whole).values()]
    moments, rng = plan(seed, trainer), np.random.default_rng([seed, RUNS.index(trainer), 3])
    while tally["kills"] < count:
        folder = work / f"run{tally['runs']}"
        for _ in range(min(int(rng.integers(1, 6)), count - tally["kills"])):
            moment, victim = next(moments), int(rng.integers(2))
            pids, before = begin_both(trainer, place, folder, log, moment.workers), half_written(folder)
            if not await_moment(pids[0], folder, moment, seconds):
                finish_both(pids, log)
                break  # it finished first: compare
            if kill(pids[victim]) == -9:
                tally["kills"] += 1
                tally["while writing a file"] += bool(half_written(folder, before))
                bar.update()
            other = 1 - victim
            check_survivor(pids[other], log.with_name(f"log{other}.err"), folder, steps)
            require_success(run(partial(check_progress, folder, work / f"steps{tally['runs']}"), log))
        finish_both(begin_both(trainer, place, folder, log, int(rng.integers(2))), log)
        require_success(run(partial(check_equal, whole, folder), log))
        tally["runs"] += 1
        shutil.rmtree(folder)
    return tally


def run_kills(settings: Settings, place: Path, work: Path, ranks: bool = False) -> bool:
    """Print a line for each trainer; return whether all passed."""
    kind, trainers = (
        (rank_kills, settings.trainers or TOGETHER) if ranks else (kills, settings.trainers or RUNS)
    )
    count, fine = settings.count or (30 if ranks else 200), True
    shares = [count // len(trainers)] * len(trainers)
    shares[0] += count - sum(shares)
    with tqdm(total=count, unit="kill", disable=None) as bar:
        for trainer, share in zip(trainers, shares, strict=True):
            try:
                tally = kind(trainer, place, work / trainer, settings.seed, share, bar)
                writing = tally["while writing a file"]
                text = f"{tally['kills']} kills, {writing} of them while a file was written; "
                text += f"{tally['runs']} runs completed, all equal to the uninterrupted one"
            except RuntimeError as error:
                fine, text = False, f"FAILED: {error}"
            tqdm.write(f"{trainer:13} {text}")
    return fine


# ---- full disk -------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, megabytes: int = 256) -> Iterator[bool]:
    """Mount a file system at `folder`; yield False if mounting is not allowed."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = not subprocess.run(["mount", *options], capture_output=True).returncode
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path, leave: int) -> None:
    """Write a file that leaves `leave` bytes free on the file system."""
    space = os.statvfs(file.parent)
    with open(file, "wb") as stream:
        stream.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))


def limited(work: Callable[[], None], size: int) -> Callable[[], None]:
    """Wrap `work` so that its process cannot write files larger than `size` bytes."""

    def run_limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return run_limited


def fill_disk(trainer: str, place: Path, work: Path, part: float, nth: int) -> str:
    """Kill a run after its nth save, resume it with `part` of a checkpoint's size free, then with more space;
    return the error message. Raises RuntimeError if something is lost or different."""
    log, whole = work / "log", work / "whole"
    if not whole.exists():
        prepare_output(trainer, place, whole)
        require_success(run(script(command(trainer, place, whole)), log))
    with small_disk(work / "disk") as mounted:
        folder = work / "disk" / "run"
        go = script(command(trainer, place, folder))
        begun = False
        while not begun:  # a run that ended before its nth save is repeated
            shutil.rmtree(folder, ignore_errors=True)
            prepare_output(trainer, place, folder)
            pid = start(go, log)
            begun = await_moment(pid, folder, Kill(None, nth, 0.05, 0), 0)
            kill(pid)
            nth = max(1, nth - 2)
        require_success(run(partial(check_progress, folder, work / "steps"), log))
        for leftover in half_written(folder):
            os.unlink(leftover)
        size = max((path.stat().st_size for path in whole.rglob("*.ckpt")), default=0)
        if mounted:
            fill(work / "disk" / "filler", int(part * size))
        result = run(go if mounted else limited(go, int(part * size)), log)
        problem = bad_inputs.complaint(result)
        finished = result.code == 0 and "finished at step" in result.out  # enough space
        if problem or result.code != 1 and not finished:
            raise RuntimeError(f"on a full disk: exit code {result.code}, {problem}: {result.err[-3000:]}")
        (work / "disk" / "filler").unlink(missing_ok=True)
        require_success(run(partial(check_progress, folder, work / "steps"), log))
        require_success(run(go, log))
        require_success(run(partial(check_equal, whole, folder), log))
    shutil.rmtree(work / "disk")
    (work / "steps").unlink()
    return "nothing: there was space enough" if finished else result.err.strip().splitlines()[-1]


def run_disk(settings: Settings, place: Path, work: Path, cases: int = 6) -> bool:
    """Print a line for each trainer; return whether all passed."""
    fine = True
    for trainer in settings.trainers or RUNS:
        rng = np.random.default_rng([settings.seed, RUNS.index(trainer), 2])
        messages = Counter()
        try:
            for n in range(cases):
                part = 0.0 if n == 0 else float(rng.uniform(0, 0.9))
                message = fill_disk(trainer, place, work / f"disk_{trainer}", part, int(rng.integers(1, 12)))
                messages[message.replace(str(work), "")] += 1
            print(f"{trainer:13} {cases} full disks: nothing lost, all runs equal after it. It said, e.g.:")
            print(f"              {messages.most_common(1)[0][0]}", flush=True)
        except RuntimeError as error:
            fine = False
            print(f"{trainer:13} FAILED: {error}", flush=True)
    return fine


def main(settings: Settings) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are bitwise equal only on CPUs, and processes are forked
    tqdm.monitor_interval = 0  # no second thread, since processes are forked
    print(f"seed {settings.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = settings.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if settings.what != "page":
            require_success(run(partial(make_test_files, work / "place"), work / "log"))
        fine = True
        if settings.what in ("kills", "all"):
            fine &= run_kills(settings, work / "place", work / "kills")
        if settings.what in ("ranks", "all"):
            fine &= run_kills(settings, work / "place", work / "ranks", ranks=True)
        if settings.what in ("disk", "all"):
            fine &= run_disk(settings, work / "place", work)
        if settings.what in ("inputs", "all"):
            fine &= bad_inputs.campaign(work / "place", work / "inputs", settings.seed, settings.count or 500)
        if settings.what in ("page", "all"):  # last, because it starts threads
            fine &= run_page(settings.seed, settings.count or 50, work / "page")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
