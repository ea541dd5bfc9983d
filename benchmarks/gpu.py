"""Ten minutes of one GPU: is everything right on it, how fast is it, and a training run on it.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --train "--sharp_dir PHOTOS --generator nafnet --init_weights mine.safetensors"

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
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_dbgan
from benchmarks import gpu_checks, gpu_figures
from benchmarks.gpu_figures import Case, Row
from benchmarks.head import begin, processor
from harness.settings import read_settings, run_main
from harness.validation import middle
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur

ROOT = Path(__file__).parent.parent
TOTAL = 590  # seconds for everything
TRAIN = "--generator nafnet --width 32 --blocks 4 --crop_size 256 --batch_size 16 --dead_leaves 1600"
# What a run by the clock needs: content loss alone, bf16, pictures blurred on the fly.
TRAINING = (
    "deblur --generated_fraction 0 --perceptual_loss_weight 0 --content_loss charbonnier --precision bf16 "
    "--channels_last --accumulate_grad_batches 1 --num_workers 14"
)
SMALLER = (
    "--width 4 --blocks 1 --crop_size 32 --batch_size 2 --dead_leaves 4 --discriminator_width 2 "
    "--precision 32 --num_workers 0 --val_images 2 --val_crop 32 --generator dbgan"
)


@dataclass
class Settings:
    """Check, measure and train on this machine's GPU."""

    output_dir: Path = Path("outputs/gpu")  # the report, and the training's folder
    train: str = TRAIN  # options of train_dbgan.py for the training
    tiny: bool = False  # tiny networks on any device: whether it runs at all


def machine(tiny: bool, device: str) -> Iterator[Case]:
    """What everything else is about."""
    begin()
    about = {"machine": processor(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    yield Case("machine", lambda: [Row(name, value) for name, value in about.items()])


# Seconds that each may take, what is wanted most first; the training gets what is left.
STAGES: dict[str, tuple[int, Callable[[bool, str], Iterator[Case]]]] = {
    "machine": (30, machine),
    "checks": (90, gpu_checks.checks),
    "controlnet": (60, gpu_figures.controlnet),
    "srn": (20, gpu_figures.srn),
    "kontext": (50, gpu_figures.kontext),
    "dbgan": (20, gpu_figures.dbgan),
}


def write(report: Path, stage: str, row: Row) -> None:
    """A row into the report and the table, at once."""
    value = row.value if isinstance(row.value, str) else f"{row.value:.3g}"
    print(f"| {stage} | {row.what} | {value} | {row.unit} | {row.aim or ''} | {row.met} |", flush=True)
    with report.open("a", encoding="utf-8") as file:
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
    except ImportError as error:
        return [Row(case.what, f"no peer: {error}")]
    except (RuntimeError, ValueError, OSError) as error:  # the others are worth having
        return [Row(case.what, f"failed: {(str(error) or type(error).__name__).splitlines()[0]}")]


def run_stage(name: str, tiny: bool, report: Path) -> None:
    """All of a stage's cases, in the process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in STAGES[name][1](tiny, device):
        for row in rows_of(case):
            write(report, name, row)


def in_process(work: Callable[[], None], limit: float) -> str:
    """Run `work` in a process of its own; "" or what went wrong.

    Stages are forked from a process that has imported everything and has not started CUDA (on Windows each
    imports for itself), so that what one of them breaks is no other's.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["benchmarks.gpu"])
    process = context.Process(target=work)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"stopped after {limit:.0f} s"
    return f"ended with exit code {process.exitcode}" if process.exitcode else ""


# ---- the training ------------------------------------------------------------------------------------------


def write_held_out(folder: Path) -> None:
    """Pairs of scikit-image's photographs, which no weights of the project were trained on."""
    for number, path in enumerate(photographs()):
        sharp = np.ascontiguousarray(middle(read_image(path), 256))
        for place, kind in enumerate(BLUR_TYPES):
            blurry = random_blur(sharp, np.random.default_rng([number, place]), [kind])[0]
            for name, picture in (("blur", blurry), ("sharp", sharp)):
                (folder / name).mkdir(parents=True, exist_ok=True)
                write_image(folder / name / f"{path.stem}_{kind}.png", picture)


def run_training(words: list[str], limit: float) -> str:
    """What train_dbgan.py prints. Raises RuntimeError if it fails, TimeoutExpired after `limit` seconds."""
    command = [sys.executable, "train_dbgan.py", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
    return run.stdout


def train(settings: Settings, seconds: float) -> list[Row]:
    """A short run to learn the rate, then the run itself: as many epochs as there is time for.

    Weights are written about every minute, so that something is there when the time is up.
    """
    start, folder = time.monotonic(), settings.output_dir.resolve()
    write_held_out(folder / "held_out")
    options = f"{TRAINING} {SMALLER if settings.tiny else settings.train}"
    words = [*shlex.split(options), "--val_data", str(folder / "held_out")]
    trial = 1 if settings.tiny else 100
    printed = run_training(
        [*words, "--output_dir", str(folder / "trial"), "--max_steps", str(trial)], seconds
    )
    chosen = read_settings(train_dbgan.Settings, words=words)
    epoch = max(1, int(re.search(r"(\d+) training images", printed)[1]) // chosen.batch_size)
    rate = float(re.findall(r"([\d.]+) images/s", printed)[0]) / chosen.batch_size
    spent = time.monotonic() - start
    left = (
        seconds - 2 * spent - 15
    )  # starting takes as long again, and the last epoch is with a discriminator
    epochs = 1 if settings.tiny else max(1, int(left * rate / epoch) - 1)
    every = max(1, int(60 * rate / epoch))
    words += ["--output_dir", str(folder / "training"), "--log_epoch", str(every)]
    words += ["--pretrain_epochs", str(epochs), "--epochs", "1"]
    weights = folder / "training" / "deblur" / "dbgan_content.safetensors"
    try:
        printed = run_training(words, seconds - spent)
    except subprocess.TimeoutExpired:
        weights = weights.with_name("checkpoints") / "last.ckpt"
    scores = re.findall(r"eval psnr: ([\d.]+) \(blurry ([\d.]+)\)", printed)
    gain = max((float(restored) - float(blurry) for restored, blurry in scores), default=0.0)
    return [
        Row("deblurring network, rate", rate, "steps/s"),
        Row("deblurring network, steps", float(epochs * epoch), "on the content loss"),
        Row("deblurring network, best gain in held-out PSNR", gain, "dB"),
        Row("deblurring network, weights", str(weights)),
    ]


def main(settings: Settings) -> None:
    """Run all stages, print the table, write the report."""
    if not (torch.cuda.is_available() or settings.tiny):
        raise ValueError("torch finds no CUDA device here: `python -m benchmarks.plan` counts without one")
    start, total = time.monotonic(), TOTAL * (10 if settings.tiny else 1)
    os.environ.setdefault("TQDM_DISABLE", "1")  # for the stages: their bars would cut the table
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    report = settings.output_dir / "report.jsonl"
    report.write_text("")
    print("| stage | what | measured | unit | aim | met |\n|---|---|---|---|---|---|", flush=True)
    for name, (limit, _) in STAGES.items():
        left = total - (time.monotonic() - start)
        limit = min(left, left if settings.tiny else limit)
        problem = in_process(partial(run_stage, name, settings.tiny, report), limit)
        if problem:
            write(report, name, Row(name, problem))
    case = Case("training", partial(train, settings, total - (time.monotonic() - start)))
    for row in rows_of(case):
        write(report, "training", row)
    print(f"written: {report}")


if __name__ == "__main__":
    run_main(main, Settings)
