"""Make masks for trying `python infer.py inpaint`: white is what will be filled.

python tool_make_mask.py mask.png --image photo.jpg                          # a random hole for a photo
python tool_make_mask.py mask.png --image photo.jpg --kind irregular --ratio 0.1 0.2 --seed 3
python tool_make_mask.py mask.png --size 512 512 --box 100 150 300 260       # left, top, right, bottom
python tool_make_mask.py masks --image FOLDER          # for every image NAME in it masks/NAME_mask.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from harness.settings import run_main
from ldm.data.image import read_image, write_image
from ldm.data.masks import list_photographs
from ldm.data.stream import item_seed
from ldm.modules.image_degradation.masks import random_mask


@dataclass
class Settings:
    # PNG file to write, or a folder if --image is one
    output_path: Annotated[Path, tyro.conf.Positional]
    image: Path | None = None  # image whose size the mask takes, or a folder of images
    size: tuple[int, int] | None = None  # width and height of the mask, instead of --image
    kind: Literal["rectangle", "irregular", "mixed"] = "mixed"  # shape of a random hole
    # least and greatest fraction of the image that a random hole covers
    ratio: tuple[float, float] = (0.1, 0.3)
    # left, top, right and bottom of a rectangle, instead of a random hole
    box: tuple[int, int, int, int] | None = None
    seed: int = 0  # random seed of the holes


def make_mask(height: int, width: int, settings: Settings, number: int) -> np.ndarray:
    """Return uint8 (height, width), 255 in the hole. Raises ValueError for a box that is not inside."""
    if settings.box is None:
        rng = np.random.default_rng(item_seed(settings.seed, number))
        return 255 * random_mask(height, width, rng, settings.kind, settings.ratio)
    left, top, right, bottom = settings.box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the box {settings.box} is not inside an image of {width}x{height} pixels")
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def list_targets(settings: Settings) -> dict[Path, tuple[int, int]]:
    """Return the masks to write, each with its height and width. Raises ValueError for a damaged image."""
    output, image = settings.output_path, settings.image
    if (image is None) == (settings.size is None):
        raise ValueError("give --image or --size, and not both")
    if image is None:
        return {output: settings.size[::-1]}
    if image.is_dir():
        targets = {}
        for path in list_photographs(image, output):
            name = path.relative_to(image)
            targets[output / name.with_name(f"{name.stem}_mask.png")] = read_image(path).shape[:2]
        return targets
    if output.exists() and output.samefile(image):
        raise ValueError(f"the mask would overwrite its image: give another file than {output}")
    return {output: read_image(image).shape[:2]}


def main(settings: Settings) -> None:
    """Write the mask, or a folder of masks."""
    for number, (target, (height, width)) in enumerate(list_targets(settings).items()):
        mask = make_mask(height, width, settings, number)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, mask)
        print(f"{target}: {width}x{height}, {(mask > 0).mean():.1%} to fill")


if __name__ == "__main__":
    run_main(main, Settings)
