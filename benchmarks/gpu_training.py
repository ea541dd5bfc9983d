"""Train the deblurring network for a given time: the last stage of benchmarks/gpu.py."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import train_dbgan
from benchmarks.head import Row
from harness.settings import read_settings
from harness.validation import middle
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur

ROOT = Path(__file__).parent.parent
# The U-Net on the content loss alone, in bf16, with realistic camera blur on the fly.
TRAINING = (
    "deblur --epochs 0 --generated_fraction 0 --perceptual_loss_weight 0 --content_loss charbonnier "
    "--fft_loss_weight 0.1 --max_grad_norm 1 --realistic_blur --precision bf16 "
    "--accumulate_grad_batches 1 --num_workers 14"
)
NETWORK = (
    "--generator unet --width 32 --blocks 4 --crop_size 256 --batch_size 16 --learning_rate 1e-3 "
    "--warmup_steps 100 --dead_leaves 1600"
)
PHOTOS = "training/photos"  # sharp photos; used if the folder exists, like PAIRS
PAIRS = "training/pairs"
SMALLER = (
    "--generator unet --width 4 --blocks 1 --crop_size 64 --batch_size 2 --dead_leaves 4 "
    "--precision 32 --num_workers 0 --val_crop 32"
)


def data_options() -> str:
    """Return the options for the data on this machine."""
    words = ""
    if (ROOT / PHOTOS).is_dir():
        words += f" --sharp_dir {PHOTOS} --photo_crops 8 --crop_candidates 3 --cache"
    if (ROOT / PAIRS / "train").is_dir():
        words += f" --pairs {PAIRS}/train --val_data {PAIRS}/test"
    return words


def write_held_out(folder: Path) -> None:
    """Write pairs of scikit-image's photos, which no weights of the project were trained on."""
    for number, path in enumerate(photographs()):
        sharp = np.ascontiguousarray(middle(read_image(path), 256))
        for place, kind in enumerate(BLUR_TYPES):
            blurry = random_blur(sharp, np.random.default_rng([number, place]), [kind])[0]
            for name, image in (("blur", blurry), ("sharp", sharp)):
                (folder / name).mkdir(parents=True, exist_ok=True)
                write_image(folder / name / f"{path.stem}_{kind}.png", image)


def run_training(words: list[str], limit: float) -> str:
    """Run train_dbgan.py and return what it prints.

    Raises RuntimeError if it fails, TimeoutExpired after `limit` seconds.
    """
    command = [sys.executable, "train_dbgan.py", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
    return run.stdout


def train(settings: Any, seconds: float) -> list[Row]:
    """Measure the speed in a short run, then train for as many steps as the time allows.

    A checkpoint is saved about every minute, so that one exists when the time is up.
    """
    start, folder = time.monotonic(), settings.output_dir.resolve()
    write_held_out(folder / "held_out")
    options = settings.train or NETWORK + data_options()
    if settings.tiny:
        options = SMALLER
    words = shlex.split(f"{TRAINING} {options}")
    if "--val_data" not in words:
        words += ["--val_data", str(folder / "held_out")]
    printed = run_training(
        [*words, "--output_dir", str(folder / "trial"), "--max_steps", "1" if settings.tiny else "100"],
        seconds,
    )
    batch = read_settings(train_dbgan.Settings, words=words).batch_size
    epoch = max(1, int(re.search(r"(\d+) training images", printed)[1]) // batch)
    rate = float(re.search(r"([\d.]+) images/s", printed)[1]) / batch
    spent = time.monotonic() - start
    left = seconds - 2 * spent - 15  # startup takes as long as in the trial run
    steps = 1 if settings.tiny else max(100, int(left * rate))
    every = max(1, int(60 * rate / epoch))
    words += ["--output_dir", str(folder / "training"), "--log_epoch", str(every), "--max_steps", str(steps)]
    weights = folder / "training" / "deblur" / "dbgan.safetensors"
    try:
        printed = run_training(words, seconds - spent)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode()
        weights = weights.with_name("checkpoints") / "last.ckpt"
    scores = re.findall(r"eval psnr: ([\d.]+) \(blurry ([\d.]+)\)", printed)
    gain = max((float(restored) - float(blurry) for restored, blurry in scores), default=0.0)
    return [
        Row("deblurring network, rate", rate, "steps/s"),
        Row("deblurring network, steps", float(steps), "on the content loss"),
        Row("deblurring network, best gain in held-out PSNR", gain, "dB"),
        Row("deblurring network, weights", str(weights)),
    ]
