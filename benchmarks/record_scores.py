"""Write srn_deblur.safetensors, dbgan.safetensors or bgan.safetensors of a run to models/, with scores.

    python -m benchmarks.record_scores RUN/deblur/dbgan.safetensors --command "python train_dbgan.py ..."

The file's metadata contain command, commit and scores on the photographs inside scikit-image: the center crop
of 256 pixels of each, with each blur at scale 0.6.
"""

import json
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.quality import Restore, open_network
from harness.settings import run_main
from harness.validation import middle
from ldm.checkpoint import read_settings, read_weights, write_weights
from ldm.data.image import PHOTOGRAPHS, photographs, read_image
from ldm.metrics import psnr, radial_power, rgb_shift, spectrum_distance
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur
from train_dbgan import blur_image, load_generator

SCORED = 256  # pixels, size of the center crop


@dataclass
class Settings:
    """Write the pretrained weights included in the repo from a file of train_srn.py or train_dbgan.py."""

    weights: tyro.conf.Positional[Path]  # srn_deblur.safetensors, dbgan.safetensors or bgan.safetensors
    command: str = "docs/weights.md"  # command that trained the weights
    bad_at: str = "docs/weights.md"  # known weaknesses
    models: Path = Path("models")  # folder to write to


def spectra(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([radial_power(picture) for picture in pictures])


def deblur_scores(restore: Restore, name: str) -> dict[str, float]:
    """Return the gain in dB by blur type on one photograph of scikit-image; PSNR and colour shift (1/255) for
    the sharp input; distances of the restored and blurry spectra from the sharp one, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    row, made = {}, {"restored": [], "blurry": []}
    for number, kind in enumerate(BLUR_TYPES):
        blurry = random_blur(sharp, np.random.default_rng(number), [kind], scale=0.6)[0]
        restored = restore(blurry)
        row[kind] = psnr(restored, sharp) - psnr(blurry, sharp)
        made["restored"].append(restored)
        made["blurry"].append(blurry)
    restored = restore(sharp)
    row["sharp"] = psnr(restored, sharp)
    row["color_shift"] = float(np.abs(rgb_shift(restored, sharp)).max())
    for key, pictures in made.items():
        row[f"spectrum_{key}"] = spectrum_distance(spectra(pictures), spectra([sharp]))
    return row


def blur_scores(network: nn.Module, name: str) -> dict[str, float]:
    """Return the PSNR of BGAN's output on a sharp photograph, and the change of its spectrum, in decades."""
    sharp = middle(read_image(photographs((name,))[0]), SCORED)
    made = blur_image(network, sharp, seed=0)
    return {"psnr": psnr(made, sharp), "spectrum": spectrum_distance(spectra([made]), spectra([sharp]))}


def score_file(path: Path, names: Iterable[str] = PHOTOGRAPHS) -> dict[str, dict[str, float]]:
    """Return the scores of a file of weights on photographs of scikit-image."""
    if path.stem == "bgan":
        network = load_generator(path, "blur")
        return {name: blur_scores(network, name) for name in names}
    _, restore = open_network(path)
    return {name: deblur_scores(restore, name) for name in names}


def main(settings: Settings) -> None:
    """Write the file in half precision with its scores, and print their means."""
    torch.set_num_threads(1)  # recorded scores are from one thread
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    path = settings.weights
    scores = score_file(path)
    metadata = {
        "settings": json.dumps(read_settings(path)),
        "command": settings.command,
        "commit": commit.strip(),
        "data": "photographs and licences: docs/weights.md",
        "bad_at": settings.bad_at,
        "scores": json.dumps(scores),
    }
    write_weights(settings.models / path.name, read_weights(path), metadata)
    print(path.name, mean_scores(scores))


def mean_scores(scores: dict[str, dict[str, float]]) -> str:
    rows = list(scores.values())
    return ", ".join(f"{key} {statistics.mean(row[key] for row in rows):.3f}" for key in rows[0])


if __name__ == "__main__":
    run_main(main, Settings)
