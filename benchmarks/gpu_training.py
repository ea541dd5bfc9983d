"""A training run of the deblurring network by the clock: the last stage of benchmarks/gpu.py."""

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


def train(settings: Any, seconds: float) -> list[Row]:
    """A short run to learn the rate, then the run itself: as many epochs as there is time for.

    Weights are written about every minute, so that something is there when the time is up.
    """
    start, folder = time.monotonic(), settings.output_dir.resolve()
    write_held_out(folder / "held_out")
    options = f"{TRAINING} {SMALLER if settings.tiny else settings.train or TRAIN}"
    words = [*shlex.split(options), "--val_data", str(folder / "held_out")]
    trial = ["--output_dir", str(folder / "trial"), "--max_steps", "1" if settings.tiny else "100"]
    printed = run_training([*words, *trial], seconds)
    batch = read_settings(train_dbgan.Settings, words=words).batch_size
    epoch = max(1, int(re.search(r"(\d+) training images", printed)[1]) // batch)
    rate = float(re.search(r"([\d.]+) images/s", printed)[1]) / batch
    spent = time.monotonic() - start
    # starting takes as long again, and a last epoch meets a discriminator
    left = seconds - 2 * spent - 15
    epochs = 1 if settings.tiny else max(1, int(left * rate / epoch) - 1)
    every = max(1, int(60 * rate / epoch))
    words += ["--output_dir", str(folder / "training"), "--log_epoch", str(every)]
    words += ["--pretrain_epochs", str(epochs), "--epochs", "1"]
    weights = folder / "training" / "deblur" / "dbgan_content.safetensors"
    try:
        printed = run_training(words, seconds - spent)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode()
        weights = weights.with_name("checkpoints") / "last.ckpt"
    scores = re.findall(r"eval psnr: ([\d.]+) \(blurry ([\d.]+)\)", printed)
    gain = max((float(restored) - float(blurry) for restored, blurry in scores), default=0.0)
    return [
        Row("deblurring network, rate", rate, "steps/s"),
        Row("deblurring network, steps", float(epochs * epoch), "on the content loss"),
        Row("deblurring network, best gain in held-out PSNR", gain, "dB"),
        Row("deblurring network, weights", str(weights)),
    ]
