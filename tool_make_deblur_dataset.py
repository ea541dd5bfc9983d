"""Make pairs of sharp and blurry images from photos, for training a deblurring network.

    python tool_make_deblur_dataset.py --source_dir PHOTOS --output_dir ./training/deblur --num_samples 10000

writes, in the output folder,

    clear_images/clear_000000.png, blur_images/blur_000000.png, ...
    blur_types.json    one JSON object a line: clear_image, blur_image, blur_type, source, parameters

Without --source_dir the photos inside scikit-image are used. Sample i depends only on the seed and the
sources, byte for byte, not on the number of workers or samples: the same command continues where it stopped,
and a larger --num_samples adds samples.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from harness.flags import Count, Fraction, Range, Whole
from harness.loading import start_worker
from harness.settings import check_ranges, run_main
from ldm.data.crop import Crop, at_least, sharpness
from ldm.data.image import list_images, photographs, read_image, write_image, write_whole
from ldm.data.lists import json_lines
from ldm.data.paired import blur_crop
from ldm.data.pairs import JSONL
from ldm.data.shards import check_made_from, digest
from ldm.data.stream import SampleStream
from ldm.modules.image_degradation.blur import BLUR_TYPES, check_blur_types

PNG_LEVEL = 2  # a third of the time of level 6, files 8% larger
SAVE_EVERY = 20  # seconds between writes of the list: a killed run loses no more than that
REPORTED = 20  # highest number of unusable sources that are listed at the end
IN_IMAGES = ("image_size", "sharpest_of", "blur_types", "blur_scale", "jpeg_probability", "seed")


@dataclass
class Settings:
    """Make pairs of blurry and sharp images from sharp photos."""

    # ---- data
    source_dir: str | None = None  # folder of photos, with its subfolders; default: those inside scikit-image
    output_dir: str = "./training/deblur"  # folder of the data set; samples that are there are kept
    num_samples: Count = 1000  # number of pairs in the whole data set
    image_size: Annotated[int, Range(16)] = 512  # width and height of the images in pixels
    sharpest_of: Count = 1  # number of random squares of a photo of which the sharpest is taken
    seed: Whole = 0  # random seed of the squares and the blurs

    # ---- blur
    blur_types: tuple[str, ...] = tuple(BLUR_TYPES)  # kinds of blur, all equally frequent
    # factor of all blur sizes, 1 suits images of 256 to 1024 px
    blur_scale: Annotated[float, Range(1e-6)] = 1.0
    jpeg_probability: Fraction = 0.0  # fraction of the blurry images that are JPEGs of quality 60 to 95

    # ---- processes
    num_workers: Whole = 0  # number of worker processes on this machine, 0 for one on each processor core


@dataclass
class Summary:
    """Numbers of samples made now and kept from before; unused sources with the reason."""

    made: int = 0
    kept: int = 0
    not_used: dict[str, str] = field(default_factory=dict)


def make_dataset(settings: Settings) -> Summary:
    """Write the data set, or the missing part of it.

    Raises ValueError for settings that are out of range or differ from those that the folder was begun with,
    and FileNotFoundError if there are no sources.
    """
    # Settings, sources and existing samples
    check_ranges(settings)
    check_blur_types(settings.blur_types)
    paths = list_images(settings.source_dir) if settings.source_dir else photographs()
    folder = Path(settings.output_dir)
    for name in ("clear_images", "blur_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    claim(folder, settings, paths)
    records = finished(folder)
    todo = [index for index in range(settings.num_samples) if index not in records]
    summary = Summary(kept=settings.num_samples - len(todo))

    # Samples, in the order of their numbers; the list is saved now and then
    saved = time.monotonic()
    read_source.cache_clear()  # the files may have changed since an earlier call
    try:
        samples = load(todo, settings, paths)
        for index, record, not_used in tqdm(samples, "pairs", settings.num_samples, initial=summary.kept):
            records[index] = record
            summary.made += 1
            summary.not_used |= not_used
            if time.monotonic() - saved > SAVE_EVERY:
                write_records(folder / JSONL, records)
                saved = time.monotonic()
    finally:
        write_records(folder / JSONL, records)
    return summary


def claim(folder: Path, settings: Settings, paths: list[Path]) -> None:
    """Record in the folder what its images depend on; ValueError if it was begun with other values."""
    wanted = {name: asdict(settings)[name] for name in IN_IMAGES} | {"blur_types": list(settings.blur_types)}
    wanted["sources"] = digest(source_name(path, settings) for path in paths)
    file = folder / "settings.json"
    if not file.exists():
        return write_whole(file, lambda temporary: temporary.write_text(json.dumps(wanted, indent=1)))
    try:
        before = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; take another output folder") from error
    check_made_from(folder, before, wanted)


def source_name(path: Path, settings: Settings) -> str:
    return path.relative_to(settings.source_dir).as_posix() if settings.source_dir else path.name


# ---- samples -----------------------------------------------------------------------------------------------


def load(todo: list[int], settings: Settings, paths: list[Path]) -> DataLoader:
    """Return a loader of the samples `todo`, in this order, with the number of workers in the settings."""
    workers = min(settings.num_workers or os.cpu_count() or 1, max(1, len(todo)))
    return DataLoader(
        Maker(settings, paths),
        batch_size=None,
        sampler=todo,
        num_workers=workers if workers > 1 else 0,
        collate_fn=unchanged,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the global one belongs to the script that calls this
    )


def unchanged(sample: tuple) -> tuple:
    return sample


class Maker(Dataset):
    """Dataset that makes sample `index` in any process, from the settings and the list of sources alone."""

    def __init__(self, settings: Settings, paths: list[Path]):
        self.settings, self.paths = settings, paths

    def __len__(self) -> int:
        return self.settings.num_samples

    def __getitem__(self, index: int) -> tuple[int, dict, dict[str, str]]:
        """Write both images; return index, record of the list, and skipped sources with the reason."""
        folder = Path(self.settings.output_dir)
        image, path, not_used = self.source(index)
        rng = np.random.default_rng([self.settings.seed, index])
        sharp, blurry, blur_type, parameters = make_pair(image, rng, self.settings)
        record = {
            "clear_image": f"clear_images/clear_{index:06d}.png",
            "blur_image": f"blur_images/blur_{index:06d}.png",
            "blur_type": blur_type,
            "source": source_name(path, self.settings),
            "parameters": parameters,
        }
        write_image(folder / record["clear_image"], sharp, PNG_LEVEL)
        write_image(folder / record["blur_image"], blurry, PNG_LEVEL)
        return index, record, not_used

    def source(self, index: int) -> tuple[np.ndarray, Path, dict[str, str]]:
        """Return the photo of sample `index`, its path, and skipped sources with the reason.

        All photos are used once, in random order, then again in another order. If one cannot be read, the
        next in that order is used instead. Raises ValueError if no photo can be read.
        """
        not_used = {}
        end = index + 2 * len(self.paths)  # every source comes at least once
        for _, candidate in SampleStream(len(self.paths), self.settings.seed, start=index, total=end):
            path = self.paths[candidate]
            try:
                return read_source(path), path, not_used
            except (ValueError, OSError) as error:
                not_used[str(path)] = str(error)
        raise ValueError(f"no source can be used; the first: {next(iter(not_used.values()))}")


@lru_cache(maxsize=16)
def read_source(path: Path) -> np.ndarray:
    return read_image(path)


def make_pair(
    image: np.ndarray, rng: np.random.Generator, settings: Settings
) -> tuple[np.ndarray, np.ndarray, str, dict[str, Any]]:
    """Cut a random square from uint8 (h, w, 3) and blur it; return sharp, blurry, blur type, parameters."""
    image = at_least(image, settings.image_size)
    squares = [random_square(image, rng, settings.image_size) for _ in range(settings.sharpest_of)]
    if len(squares) > 1:  # at a shallow depth of field most are out of focus
        squares.sort(key=lambda square: sharpness(square[1].cut(square[0])))
    image, crop = squares[-1]
    blurry, blur_type, parameters = blur_crop(
        image,
        crop,
        rng,
        settings.blur_types,
        scale=settings.blur_scale,
        jpeg_probability=settings.jpeg_probability,
    )
    return crop.cut(image), blurry, blur_type, parameters


def random_square(image: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, Crop]:
    """Scale the image down by a random factor; return it and a random square of `size` pixels in it."""
    height, width = image.shape[:2]
    side = math.exp(rng.uniform(math.log(size), math.log(min(height, width))))
    target = (max(size, round(width * size / side)), max(size, round(height * size / side)))
    if target != (width, height):
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
    return image, Crop.random(image.shape, size, rng)


# ---- the list of samples -----------------------------------------------------------------------------------


def finished(folder: Path) -> dict[int, dict]:
    """Return the records of the samples that are on disk, by index."""
    records = {}
    if not (folder / JSONL).exists():
        return records
    for _, record in json_lines(folder / JSONL):
        if (folder / record["clear_image"]).is_file() and (folder / record["blur_image"]).is_file():
            index = int(Path(record["clear_image"]).stem.rpartition("_")[2])
            records[index] = record
    return records


def write_records(path: Path, records: dict[int, dict]) -> None:
    """Write the list of samples, in the order of their numbers."""
    lines = [json.dumps(records[index], ensure_ascii=False) for index in sorted(records)]
    text = "".join(line + "\n" for line in lines)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main(settings: Settings) -> None:
    summary = make_dataset(settings)
    folder = Path(settings.output_dir)
    print(f"{summary.made} pairs made, {summary.kept} were there: {folder / JSONL}")
    if summary.not_used:
        print(f"{len(summary.not_used)} sources were not used, such as:")
        for reason in list(summary.not_used.values())[:REPORTED]:
            print(f"  {reason}")
    print(f"next: python tutorial_train_deblur.py --data_root {settings.output_dir}")


if __name__ == "__main__":
    run_main(main, Settings)
