"""Write models/dbgan.safetensors and models/bgan.safetensors from a finished run, with their scores.

    python -m benchmarks.dbgan_quality --run outputs/RUN --command "python train_dbgan.py ..."

The files' metadata get the command, the commit and the scores on the photographs inside scikit-image: of each
the middle 128 pixels, with each blur at scale 0.4.
"""

import json
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness.settings import run_main
from harness.validation import middle
from ldm.checkpoint import read_settings, read_weights, write_weights
from ldm.data.image import PHOTOGRAPHS, photographs, read_image
from ldm.metrics import psnr, radial_power, spectrum_distance
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur
from train_dbgan import blur_image, load_generator, restore_image

SCORED = 128  # pixels in the middle of a photograph


@dataclass
class Settings:
    """Write the pretrained weights included in the repo from a run of train_dbgan.py."""

    run: Path = Path("outputs/dbgan")  # the run's folder
    stages: tuple[str, str] = ("deblur", "blur")  # those that dbgan and bgan are of
    command: str = ""  # what was run


def spectra(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([radial_power(picture) for picture in pictures])


def deblur_scores(network: nn.Module, name: str) -> dict[str, float]:
    """Gain in dB by blur type on one photograph of scikit-image, PSNR of the sharp one to itself, and how far
    the spectra of restored and of blurry pictures are from the sharp one's, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    row, made = {}, {"restored": [], "blurry": []}
    for number, kind in enumerate(BLUR_TYPES):
        blurry = random_blur(sharp, np.random.default_rng(number), [kind], scale=0.4)[0]
        restored = restore_image(network, blurry)
        row[kind] = psnr(restored, sharp) - psnr(blurry, sharp)
        made["restored"].append(restored)
        made["blurry"].append(blurry)
    row["sharp"] = psnr(restore_image(network, sharp), sharp)
    for key, pictures in made.items():
        row[f"spectrum_{key}"] = spectrum_distance(spectra(pictures), spectra([sharp]))
    return row


def blur_scores(network: nn.Module, name: str) -> dict[str, float]:
    """What BGAN takes from one photograph: PSNR to the sharp one, and change of its spectrum, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    made = blur_image(network, sharp, seed=0)
    return {"psnr": psnr(made, sharp), "spectrum": spectrum_distance(spectra([made]), spectra([sharp]))}


def main(settings: Settings) -> None:
    """Write models/dbgan.safetensors and models/bgan.safetensors, and print their scores."""
    torch.set_num_threads(1)  # the recorded scores are those of one thread
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    content = load_generator(settings.run / "deblur" / "dbgan_content.safetensors", "deblur")
    before = {name: deblur_scores(content, name) for name in PHOTOGRAPHS}
    print("before the adversarial phase:", mean_scores(before))
    made = (("deblur", "dbgan", deblur_scores), ("blur", "bgan", blur_scores))
    for stage, (kind, name, score) in zip(settings.stages, made, strict=True):
        path = settings.run / stage / f"{name}.safetensors"
        network = load_generator(path, kind)
        scores = {photograph: score(network, photograph) for photograph in PHOTOGRAPHS}
        metadata = {
            "settings": json.dumps(read_settings(path)),
            "command": settings.command,
            "commit": commit.strip(),
            "data": "photographs and licences: docs/weights.md",
            "scores": json.dumps(scores),
        }
        write_weights(Path("models") / path.name, read_weights(path), metadata)
        print(path.name, mean_scores(scores))


def mean_scores(scores: dict[str, dict[str, float]]) -> str:
    rows = list(scores.values())
    return ", ".join(f"{key} {statistics.mean(row[key] for row in rows):.3f}" for key in rows[0])


if __name__ == "__main__":
    run_main(main, Settings)
