"""Score the small inpainting ControlNet in models/ with various options, and classical methods.

    python -m benchmarks.small_holes

Prints the table of docs/weights.md: 36 holes of 10 to 30 % in squares of the six photographs inside
scikit-image, which are not in the training set; the holes differ from the demonstration's.
Texture is the median ratio of gradient energy to the ground truth's (unbounded where the ground truth is
smooth). LPIPS and DISTS are computed on the whole square if torchvision's file of their network is on
this machine; FSR needs opencv-contrib.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import tyro

import infer
from cldm.inpaint import Inpainting, fill_smoothly, hole_scores, inpaint_image
from extras.train_small_base import square
from harness.scores import describe_distances, local_distances
from ldm.data.image import photographs, read_image
from ldm.holes import METHODS, fill_classically
from ldm.modules.image_degradation.masks import random_mask

SAMPLINGS = {
    "4 steps": {"steps": 4},
    "10 steps, the default": {"steps": 10},
    "10 steps of ddim": {"steps": 10, "method": "ddim"},
    "20 steps of dpmpp_2m": {"steps": 20, "method": "dpmpp_2m"},
    "6 of 10 steps of ddim, from colours around the hole": {
        "steps": 10,
        "method": "ddim",
        "strength": 0.6,
        "smoothly": True,
    },
    "14 of 20 steps of dpmpp_2m, from them": {
        "steps": 20,
        "method": "dpmpp_2m",
        "strength": 0.7,
        "smoothly": True,
    },
}
FINE = 2.0  # pixels, standard deviation of the low-pass that separates colours from detail
Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Settings:
    """Print the table of scores."""

    squares: int = 6  # number of squares of each photograph
    seed: int = 1000  # random seed of the squares and the holes


def row(name: str, holes: list[tuple[np.ndarray, np.ndarray]], fill: Fill) -> None:
    """Print the scores of `fill` on images (h, w, 3) and masks (h, w), nonzero in the hole; all uint8."""
    scores = []
    for image, mask in holes:
        filled = fill(image, mask)
        scores.append(hole_scores(filled, image, mask > 0) | local_distances(filled, image))
    columns = {key: [each[key] for each in scores] for key in scores[0]}
    texture = np.median(columns.pop("gradients_hole"))
    psnr, *distances = [np.mean(values) for values in columns.values()]
    cells = [f"{psnr:.2f}", f"{texture:.2f}", *(f"{distance:.3f}" for distance in distances)]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def smooth(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the hole with colours from around it, like A1111's "fill"."""
    return np.rint(fill_smoothly(image.astype(np.float32), mask)).clip(0, 255).astype(np.uint8)


def main(settings: Settings) -> None:
    model = infer.Inpaint(input=Path("none.png"), device="cpu").open()
    holes = []
    for photograph in map(read_image, photographs()):
        for number in range(settings.squares):
            rng = np.random.default_rng(settings.seed + number)
            holes.append((square(photograph, rng), random_mask(128, 128, rng, "mixed", (0.1, 0.3))))

    def sample(image: np.ndarray, mask: np.ndarray, smoothly: bool = False, **options) -> np.ndarray:
        start = smooth(image, mask) if smoothly else image
        return inpaint_image(model, start, mask, Inpainting(**{"method": "ddpm"} | options, mask_blur=0))

    def mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        fillings = [sample(image, mask, steps=4, seed=seed).astype(np.float32) for seed in range(8)]
        return np.rint(np.mean(fillings, axis=0)).astype(np.uint8)

    def mixed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        coarse = mean(image, mask).astype(np.float32)
        fine = sample(image, mask, steps=10, method="dpmpp_2m").astype(np.float32)
        coarse, low = (cv2.GaussianBlur(picture, None, FINE) for picture in (coarse, fine))
        result = np.rint(coarse + 1.5 * (fine - low)).clip(0, 255).astype(np.uint8)
        return np.where(mask[..., None] > 0, result, image)

    print(describe_distances())
    headings = ["", "PSNR in the hole", "texture", *local_distances(*[holes[0][0]] * 2)]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for method in METHODS:
        row(method, holes, partial(fill_classically, method=method))
    row("colours from around the hole, alone", holes, smooth)
    for name, options in SAMPLINGS.items():
        row(name, holes, partial(sample, **options))
    row("mean of 8 fillings of 4 steps", holes, mean)
    row("its coarse, with 1.5 times the fine detail of 10 steps of dpmpp_2m", holes, mixed)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
