"""Blur synthesis against writing the PNG files: synthesis may cost no more.

    python -m benchmarks.make_dataset [--size 512] [--repeats 40]

For each blur type the two are timed in turn on the same picture, in one process with one OpenCV thread: the
synthesis of a pair (square cut out, blurred with its surroundings, noise) and writing its two PNG files.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro

from ldm.data.image import photographs, read_image, write_image
from ldm.data.paired import at_least, blur_crop
from ldm.modules.image_degradation.blur import BLUR_TYPES
from tool_make_deblur_dataset import PNG_LEVEL


@dataclass
class Settings:
    # Width and height of the pictures.
    size: int = 512
    repeats: int = 40


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main(settings: Settings) -> None:
    cv2.setNumThreads(0)
    images = [at_least(read_image(path), settings.size) for path in photographs()]
    print(f"{settings.size} px, median of {settings.repeats} pairs")
    print(f"{'':14} {'synthesis':>10} {'two PNGs':>10} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for blur_type in BLUR_TYPES:
            pairs = [
                time_pair(images, blur_type, n, settings.size, Path(folder)) for n in range(settings.repeats)
            ]
            synthesis, writing = (statistics.median(times) for times in zip(*pairs, strict=True))
            print(
                f"{blur_type:14} {synthesis * 1e3:7.1f} ms {writing * 1e3:7.1f} ms {synthesis / writing:7.2f}"
            )


def time_pair(
    images: list[np.ndarray], blur_type: str, number: int, size: int, folder: Path
) -> tuple[float, float]:
    """Seconds of synthesis and of writing for pair `number`."""
    image, rng = images[number % len(images)], np.random.default_rng(number)
    y, x = (int(rng.integers(length - size + 1)) for length in image.shape[:2])
    synthesis, (blurry, sharp, *_) = seconds(lambda: blur_crop(image, y, x, size, rng, [blur_type]))
    first, _ = seconds(lambda: write_image(folder / "clear.png", np.ascontiguousarray(sharp), PNG_LEVEL))
    second, _ = seconds(lambda: write_image(folder / "blur.png", np.ascontiguousarray(blurry), PNG_LEVEL))
    return synthesis, first + second


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
