"""Make pairs of sharp and blurry pictures from photographs, for training a deblurring network.

    python tool_make_deblur_dataset.py --source_dir PHOTOS --output_dir ./training/deblur --num_samples 10000

writes, in the output folder,

    clear_images/clear_000000.png, blur_images/blur_000000.png, ...
    blur_types.json    one JSON object a line: clear_image, blur_image, blur_type, source, parameters
    preview.png        some pairs to look at, blurry on the left

Without --source_dir the photographs inside scikit-image serve. Sample number i is the same, byte for byte,
for the same seed and sources, whatever the number of workers or samples: the same command continues where it
stopped, and a larger --num_samples adds to what is there.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import tyro
from tqdm import tqdm

from harness.jobs import parse_shard, share_of
from harness.settings import check_counts, check_fractions, run_main
from ldm.checkpoint import write_atomically
from ldm.data.image import list_images, photographs, read_image, write_image
from ldm.data.lists import json_lines
from ldm.data.paired import at_least, blur_crop, sharpness
from ldm.data.pairs import JSONL
from ldm.data.stream import SampleStream
from ldm.modules.image_degradation.blur import BLUR_TYPES, check_blur_types

PNG_LEVEL = 2  # a third of the time of level 6, files 8% larger
# Settings that may differ from those a folder was begun with.
NOT_IN_PICTURES = ("source_dir", "output_dir", "num_samples", "workers", "shard")


@dataclass
class Settings:
    """Make pairs of blurry and sharp pictures from sharp photographs."""

    source_dir: str | None = None  # photographs, here and below; None takes those inside scikit-image
    output_dir: str = "./training/deblur"  # what is there already is kept
    num_samples: int = 1000  # pairs
    image_size: int = 512  # pixels; each picture is a random square of a photograph, scaled down to this
    small_images: Literal["upscale", "skip"] = "upscale"  # what happens to photographs below image_size
    sharpest_of: int = 1  # squares are drawn for each pair, of which the sharpest is taken
    blur_types: tuple[str, ...] = tuple(BLUR_TYPES)  # drawn evenly
    blur_scale: float = 1.0  # multiplies all blur sizes; 1 suits pictures of 256 to 1024 pixels
    jpeg_probability: float = 0.0  # part of the blurry pictures that went through a JPEG of quality 60 to 95
    seed: int = 0  # of the squares and the blurs
    shard: str = "1/1"  # i/n: only every n-th pair from the i-th on, for n processes on one folder
    # processes; 0 takes one for each processor core
    workers: Annotated[int, tyro.conf.arg(aliases=["--num_workers"])] = 0


@dataclass
class Summary:
    """Samples made now, samples that were there, and the sources not used with the reason."""

    made: int = 0
    kept: int = 0
    missing: int = 0  # those that other shards have yet to make
    not_used: dict[str, str] = field(default_factory=dict)


def make_dataset(settings: Settings) -> Summary:
    """Write the data set, or what is missing of it.

    Raises ValueError for settings that cannot be or that differ from those the folder was begun with, and
    FileNotFoundError if there are no sources.
    """
    check(settings)
    mine = share_of(range(settings.num_samples), settings.shard)
    paths = list_images(settings.source_dir) if settings.source_dir else photographs()
    folder = Path(settings.output_dir)
    for name in ("clear_images", "blur_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    claim(folder, settings, paths)

    records = finished(folder)
    todo = [index for index in mine if index not in records]
    summary = Summary(kept=len(mine) - len(todo))
    saved, cost = time.monotonic(), 0.0
    try:
        for index, record, not_used in tqdm(
            run(todo, Maker(settings, paths)), "pairs", len(mine), initial=summary.kept, unit="pair"
        ):
            records[index] = record
            summary.made += 1
            summary.not_used |= not_used
            if time.monotonic() - saved > 5 + 20 * cost:  # a killed run loses seconds
                start = time.monotonic()
                write_records(folder, records, settings.shard)
                saved, cost = time.monotonic(), time.monotonic() - start
    finally:
        write_records(folder, records, settings.shard)
    records = finished(folder)
    summary.missing = settings.num_samples - len(records.keys() & {*range(settings.num_samples)})
    if not summary.missing:  # the last shard, or two at once with the same content
        write_records(folder, records, settings.shard, JSONL)
        write_preview(folder, records)
    return summary


def check(settings: Settings) -> None:
    """Raise ValueError for numbers out of range or unknown blur types."""
    check_blur_types(settings.blur_types)
    check_counts(settings, "num_samples sharpest_of")
    check_counts(settings, "image_size", least=16)
    check_counts(settings, "workers seed", least=0)
    check_fractions(settings, "jpeg_probability")
    if settings.blur_scale <= 0:
        raise ValueError(f"blur_scale must be positive, got {settings.blur_scale}")


def claim(folder: Path, settings: Settings, paths: list[Path]) -> None:
    """Note in the folder what its pictures depend on; ValueError if it was begun with something else."""
    wanted = {key: value for key, value in asdict(settings).items() if key not in NOT_IN_PICTURES}
    names = "\n".join(source_name(path, settings) for path in paths)
    wanted |= {"blur_types": list(settings.blur_types), "sources": sha256(names.encode()).hexdigest()[:16]}
    file = folder / "settings.json"
    if not file.exists():
        return write_apart(file, json.dumps(wanted, indent=1), settings.shard)
    try:
        given = asdict(Settings()) | dict(json.loads(file.read_text()))  # older files lack newer settings
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}; take a new --output_dir") from error
    now = [f"{key} {given.get(key)} -> {new}" for key, new in wanted.items() if given.get(key) != new]
    if now := ", ".join(now):
        raise ValueError(f"{folder} was begun with other settings ({now}): take a new --output_dir")


def source_name(path: Path, settings: Settings) -> str:
    return path.relative_to(settings.source_dir).as_posix() if settings.source_dir else path.name


# ---- one sample --------------------------------------------------------------------------------------------


class Maker:
    """Makes sample `index`, in whatever process, from nothing but the settings and the list of sources."""

    def __init__(self, settings: Settings, paths: list[Path]):
        self.settings, self.paths = settings, paths
        self.read = lru_cache(maxsize=16)(read_image)

    def __call__(self, index: int) -> tuple[int, dict, dict[str, str]]:
        """Write both pictures; index, record, and the sources that had to be passed over with the reason."""
        settings, folder = self.settings, Path(self.settings.output_dir)
        rng = np.random.default_rng([settings.seed, index])
        image, path, not_used = self.source(index)
        sharp, blurry, blur_type, parameters = make_pair(image, rng, settings)
        names = {"clear_image": f"clear_images/clear_{index:06d}.png"}
        names["blur_image"] = f"blur_images/blur_{index:06d}.png"
        write_image(folder / names["clear_image"], sharp, PNG_LEVEL)
        write_image(folder / names["blur_image"], blurry, PNG_LEVEL)
        source = source_name(path, settings)
        return index, {**names, "blur_type": blur_type, "source": source, "parameters": parameters}, not_used

    def source(self, index: int) -> tuple[np.ndarray, Path, dict[str, str]]:
        """The photograph of sample `index`: every one once, in random order, then again in another order.

        Where one cannot be used the next in that order stands in.
        """
        not_used = {}
        end = index + 2 * len(self.paths)  # every source comes at least once
        for _, candidate in SampleStream(len(self.paths), self.settings.seed, start=index, total=end):
            path = self.paths[candidate]
            try:
                image = self.read(path)
            except (ValueError, OSError) as error:
                not_used[str(path)] = str(error)
                continue
            if self.settings.small_images == "upscale" or min(image.shape[:2]) >= self.settings.image_size:
                return image, path, not_used
            not_used[str(path)] = f"smaller than {self.settings.image_size} pixels: {path}"
        raise ValueError(f"no source can be used; the first: {next(iter(not_used.values()))}")


def make_pair(
    image: np.ndarray, rng: np.random.Generator, settings: Settings
) -> tuple[np.ndarray, np.ndarray, str, dict]:
    """A random square of uint8 (h, w, 3), scaled to image_size: sharp, blurry, blur type, blur parameters."""
    size = settings.image_size
    image = at_least(image, size)
    squares = [random_square(image, rng, size) for _ in range(settings.sharpest_of)]
    if len(squares) > 1:  # in photographs of a shallow focus most are blurred already
        squares.sort(key=lambda s: sharpness(s[0][s[1] : s[1] + size, s[2] : s[2] + size]))
    image, y, x = squares[-1]
    options = {"scale": settings.blur_scale, "jpeg_probability": settings.jpeg_probability}
    blurry, sharp, blur_type, parameters = blur_crop(image, y, x, size, rng, settings.blur_types, **options)
    return sharp, blurry, blur_type, parameters


def random_square(image: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, int, int]:
    """The picture scaled down at random, and the corner of a square of `size` pixels in it."""
    height, width = image.shape[:2]
    side = math.exp(rng.uniform(math.log(size), math.log(min(height, width))))
    target = max(size, round(width * size / side)), max(size, round(height * size / side))
    if target != (width, height):
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
    y, x = (int(rng.integers(length - size + 1)) for length in image.shape[:2])
    return image, y, x


# ---- many samples ------------------------------------------------------------------------------------------


def run(todo: list[int], maker: Maker) -> Iterator[tuple[int, dict, dict[str, str]]]:
    """The samples of `todo`, in this order, from as many processes as the settings say."""
    workers = min(maker.settings.workers or os.cpu_count() or 1, max(1, len(todo)))
    if workers == 1:
        yield from map(maker, todo)
        return
    first = {"initializer": start_worker, "initargs": (maker.settings, maker.paths)}
    with ProcessPoolExecutor(workers, **first) as pool:
        try:
            yield from pool.map(work, todo, chunksize=4)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def start_worker(settings: Settings, paths: list[Path]) -> None:
    global maker_of_process
    maker_of_process = Maker(settings, paths)
    cv2.setNumThreads(0)  # the processes are the parallelism (1 would wait for threads the fork left behind)


def work(index: int) -> tuple[int, dict, dict[str, str]]:
    return maker_of_process(index)


# ---- the list of samples -----------------------------------------------------------------------------------


def finished(folder: Path) -> dict[int, dict]:
    """Records of the samples that are on disk, by index, of all shards."""
    lists = [path for path in (folder / JSONL, *folder.glob(f"{JSONL}.*-of-*")) if path.exists()]
    records = [record for path in lists for _, record in json_lines(path)]
    whole = [r for r in records if all((folder / r[key]).is_file() for key in ("clear_image", "blur_image"))]
    return {int(Path(record["clear_image"]).stem.rpartition("_")[2]): record for record in whole}


def write_records(folder: Path, records: dict[int, dict], shard: str, name: str = "") -> None:
    """Write the list, or while shards are at work those of one to a list of its own, or to `name`."""
    i, n = parse_shard(shard)
    if n > 1 and not name:
        records = {index: record for index, record in records.items() if index % n == i - 1}
        name = f"{JSONL}.{i}-of-{n}"
    lines = "".join(json.dumps(records[index], ensure_ascii=False) + "\n" for index in sorted(records))
    write_apart(folder / (name or JSONL), lines, shard)


def write_apart(path: Path, text: str, shard: str) -> None:
    """Write a text atomically, also if other shards do so at once."""
    own = path.with_name(f"{path.name}.{shard.replace('/', '_')}")
    write_atomically(own, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    os.replace(own, path)


def write_preview(folder: Path, records: dict[int, dict], rows: int = 4, side: int = 256) -> None:
    """Pairs of each blur type side by side, blurry first: one column of pairs a type."""
    by_type: dict[str, list[dict]] = {}
    for index in sorted(records):
        by_type.setdefault(records[index]["blur_type"], []).append(records[index])
    columns = []
    for name in sorted(by_type):
        shown = []
        for record in by_type[name][:rows]:
            pair = [read_image(folder / record[key]) for key in ("blur_image", "clear_image")]
            small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in pair]
            shown.append(np.hstack(small))
        shown += [np.full_like(shown[0], 255)] * (rows - len(shown))
        columns.append(np.vstack(shown))
    write_image(folder / "preview.png", np.hstack(columns))


def main(settings: Settings) -> None:
    summary = make_dataset(settings)
    folder = Path(settings.output_dir)
    print(f"{summary.made} pairs made, {summary.kept} were there: {folder / JSONL}")
    if summary.missing:
        print(f"{summary.missing} are left to other shards, the last of which writes the list")
    else:
        print(f"look at: {folder / 'preview.png'}")
    if summary.not_used:
        print(f"{len(summary.not_used)} sources were not used:")
        for reason in islice(summary.not_used.values(), 20):
            print(f"  {reason}")
        if len(summary.not_used) > 20:
            print(f"  and {len(summary.not_used) - 20} more")
    print(f"next: python tutorial_train_deblur.py --data_root {settings.output_dir}")


if __name__ == "__main__":
    run_main(main, Settings)
