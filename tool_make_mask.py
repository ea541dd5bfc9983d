"""Make masks for trying `python infer.py inpaint`: white is what will be filled.

python tool_make_mask.py mask.png --image photo.jpg                          # a random hole for a photograph
python tool_make_mask.py mask.png --image photo.jpg --kind irregular --ratio 0.1 0.2 --seed 3
python tool_make_mask.py mask.png --size 512 512 --box 100 150 300 260       # left, top, right, bottom
python tool_make_mask.py masks --image FOLDER          # for every picture NAME in it masks/NAME_mask.png
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
    output_path: Annotated[Path, tyro.conf.Positional]  # PNG file to write, or folder if --image is one
    image: Path | None = None  # picture whose size the mask takes, or a folder of pictures
    size: tuple[int, int] | None = None  # width and height, instead of --image
    kind: Literal["rectangle", "irregular", "mixed"] = "mixed"  # shape of a random hole
    # least and greatest part of the picture that a random hole covers
    ratio: tuple[float, float] = (0.1, 0.3)
    # left, top, right and bottom of a rectangle, instead of a random hole
    box: tuple[int, int, int, int] | None = None
    seed: int = 0  # of random masks


def make_mask(height: int, width: int, settings: Settings, number: int = 0) -> np.ndarray:
    """uint8 (height, width), 255 in the hole. Raises ValueError for a box that is not inside the picture."""
    if settings.box is None:
        rng = np.random.default_rng(item_seed(settings.seed, number))
        return 255 * random_mask(height, width, rng, settings.kind, settings.ratio)
    left, top, right, bottom = settings.box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the box {settings.box} is not inside a picture of {width}x{height} pixels")
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def main(settings: Settings) -> None:
    """Write the mask, or a folder of masks."""
    output = settings.output_path
    if (settings.image is None) == (settings.size is None):
        raise ValueError("give --image or --size, and not both")
    if settings.image is None:
        jobs = [(output, settings.size[::-1])]
    elif settings.image.is_dir():
        paths = list_photographs(settings.image, output)
        names = [path.relative_to(settings.image) for path in paths]
        targets = [output / name.with_name(f"{name.stem}_mask.png") for name in names]
        jobs = list(zip(targets, paths, strict=True))
    elif output.exists() and output.samefile(settings.image):
        raise ValueError(f"the mask would overwrite its picture: give another file than {output}")
    else:
        jobs = [(output, settings.image)]
    for number, (target, source) in enumerate(jobs):
        height, width = read_image(source).shape[:2] if isinstance(source, Path) else source
        mask = make_mask(height, width, settings, number)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, mask)
        print(f"{target}: {width}x{height}, {(mask > 0).mean():.1%} to fill")


if __name__ == "__main__":
    run_main(main, Settings)
