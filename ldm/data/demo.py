"""Data for demonstrations: photographs from scikit-image and dead leaves, with blur of fixed settings."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ldm.checkpoint import write_atomically
from ldm.data.dead_leaves import dead_leaves
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.image_degradation.blur import random_blur

TRAIN, HELD_OUT = ("astronaut.png", "motorcycle_left.png"), ("chelsea.png", "coffee.png", "rocket.jpg")
SIZE, LEAVES = 128, 500  # side of the training images in pixels; number of dead leaves among them
BLUR_TYPES = ("motion_blur", "gaussian_blur", "defocus_blur")  # not lens blur, which darkens the corners
CAMERA = {"scale": 0.4, "noise": 0.0}  # options of the blurs


def write_demo(folder: Path, wanted: Sequence[Path | None]) -> None:
    """Write train/{blur,sharp}, real (blurred, other scenes) and valid/{blur,sharp} once, if in `wanted`."""
    if folder not in [path.parent for path in wanted if path] or (folder / "finished").is_file():
        return
    for name in ("train/blur", "train/sharp", "real", "valid/blur", "valid/sharp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, sharp in enumerate(_crops()):
        blurry = random_blur(sharp, np.random.default_rng(number), BLUR_TYPES, **CAMERA)[0]
        if number % 2:
            write_image(folder / "real" / f"{number:04d}.png", blurry)
        else:
            write_image(folder / "train" / "blur" / f"{number:04d}.png", blurry)
            write_image(folder / "train" / "sharp" / f"{number:04d}.png", sharp)
    for number, path in enumerate(photographs(HELD_OUT)):
        sharp = read_image(path)
        for blur_type in BLUR_TYPES:
            blurry = random_blur(sharp, np.random.default_rng(number), [blur_type], **CAMERA)[0]
            for kind, image in (("blur", blurry), ("sharp", sharp)):
                write_image(folder / "valid" / kind / f"{path.stem}_{blur_type}.png", image)
    write_atomically(folder / "finished", lambda temporary: temporary.touch())


def _crops() -> Iterator[np.ndarray]:
    """Yield sharp squares: dead leaves, then crops of photographs."""
    for number in range(LEAVES):
        yield dead_leaves(SIZE, np.random.default_rng([SIZE, number]))
    for path in photographs(TRAIN):
        image = read_image(path)
        for y in range(0, image.shape[0] - SIZE + 1, SIZE):
            for x in range(0, image.shape[1] - SIZE + 1, SIZE):
                yield np.ascontiguousarray(image[y : y + SIZE, x : x + SIZE])
