"""Cut photographs into patches for train_dbgan.py: one HDF5 file to train on and one to evaluate on.

Real blurred photographs and sharp ones, no pairs (for the stage that learns to blur):

    python tool_make_dbgan_dataset.py --blur_train_path cycle_train.h5 --blur_valid_path cycle_valid.h5 \
        --blur_train_data RWBI/train --blur_valid_data RWBI/valid \
        --deblur_train_data gopro/train --deblur_valid_data gopro/valid

Without --blur_train_data and --blur_valid_data the two files hold the pairs of the GoPro trees instead; with
--by_focus --deblur_train_data FOLDER the parts of photographs that are in focus, and those out of it.

A file has `sharp` and `blur`, uint8 (n, 128, 128, 3), chunked, and attributes that say how it was made. It is
written as a stream and appears under its name only when it is whole.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from harness.jobs import parse_shard, share_of
from harness.settings import check_counts, run_main
from ldm.checkpoint import write_atomically
from ldm.data.image import list_images, read_image
from ldm.data.pairs import check_alike, check_apart, find_pairs, sharp_pairs
from ldm.data.patches import KEYS, open_patches

CHUNK = 1  # patches in a chunk: they are read one by one, in any order
CONTRAST, SHARP, SOFT = 6.0, 0.45, 0.36  # limits of `focus`, chosen by looking at 32 photographs


@dataclass
class Settings:
    """Cut photographs into patches, which train_dbgan.py reads faster than pictures."""

    blur_train_path: Path = Path("training/dbgan/train.h5")  # file to write, for training
    blur_valid_path: Path = Path("training/dbgan/valid.h5")  # file to write, for validation
    blur_train_data: Path | None = None  # folder of real blurred photographs; without it the files hold pairs
    blur_valid_data: Path | None = None  # the same for validation
    deblur_train_data: Path | None = None  # GoPro tree; beside real blurred photographs any folder will do
    deblur_valid_data: Path | None = None  # and for validation
    by_focus: bool = False  # photographs have both: parts in focus are `sharp`, those out of focus `blur`
    patch_size: int = 128  # width and height of the patches in pixels
    stride: int = 0  # pixels from one patch to the next; 0: patch_size, so that they do not overlap
    shard: str = "1/1"  # i/n: only every n-th picture from the i-th on, for n processes on the same files


def main(settings: Settings) -> None:
    check_counts(settings, "patch_size", least=8)
    check_counts(settings, "stride", least=0)
    if settings.blur_train_path.resolve() == settings.blur_valid_path.resolve():
        raise ValueError(f"--blur_train_path and --blur_valid_path are one file: {settings.blur_train_path}")
    files = [
        (settings.blur_train_path, settings.blur_train_data, settings.deblur_train_data),
        (settings.blur_valid_path, settings.blur_valid_data, settings.deblur_valid_data),
    ]
    if not files[0][2]:
        raise ValueError("give --deblur_train_data: the folder of the sharp photographs, or the GoPro tree")
    if settings.by_focus and (settings.blur_train_data or settings.blur_valid_data):
        raise ValueError("--by_focus takes both parts from the sharp photographs: no --blur_train_data then")
    todo = [(path, find_sources(*data, settings.by_focus)) for path, *data in files if data[1]]
    made_by = {"patch_size": settings.patch_size, "stride": settings.stride or settings.patch_size}
    made_by |= {"by_focus": True} if settings.by_focus else {}  # files from before know nothing of it
    for path, (sources, paired) in todo:
        make_file(path, sources, {"paired": paired, **made_by}, settings.shard)


def find_sources(blurred: Path | None, gopro: Path, by_focus: bool) -> tuple[dict[str, list[Path]], bool]:
    """The pictures of each key, and whether they are pairs."""
    if by_focus:
        photographs = [pair.sharp for pair in sharp_pairs(gopro)]
        return {"sharp": photographs, "blur": photographs}, False
    if blurred:
        check_apart(blurred, gopro)
        return {"sharp": [pair.sharp for pair in sharp_pairs(gopro)], "blur": list_images(blurred)}, False
    pairs = find_pairs(gopro)
    return {"sharp": [pair.sharp for pair in pairs], "blur": [pair.blurry for pair in pairs]}, True


def make_file(path: Path, sources: dict[str, list[Path]], made_by: dict, shard: str = "1/1") -> None:
    """Write one file, or say that it is there already; `made_by` are its attributes, without the sources.

    A shard writes its part, train.2-of-4.h5; the one that finds all parts there, the file that joins them.
    Raises ValueError if the file there was made otherwise, if pictures of a pair differ in size, if a
    picture is smaller than a patch, or if nothing is out of focus (or in it).
    """
    i, n = parse_shard(shard)
    names = "\n".join(f"{key} {source}" for key in KEYS for source in sources[key])
    options, made_by = made_by, made_by | {"sources": sha256(names.encode()).hexdigest()[:16]}
    if path.exists():
        return check_finished(path, made_by)
    path.parent.mkdir(parents=True, exist_ok=True)
    if n > 1:
        parts = [path.with_name(f"{path.stem}.{number}-of-{n}.h5") for number in range(1, n + 1)]
        if min(len(names) for names in sources.values()) < n:
            raise ValueError(f"--shard {shard}: there are fewer pictures than shards")
        part = {key: list(share_of(names, shard)) for key, names in sources.items()}
        make_file(parts[i - 1], part, options)
        missing = [file.name for file in parts if not file.exists()]
        if missing:
            return print(f"{path} joins the parts when {', '.join(missing)} are there")
        join(path, parts, made_by, path.with_name(f"{path.stem}.{i}_{n}.h5"))
    else:
        write_atomically(path, lambda temporary: write(temporary, sources, made_by))
    with open_patches(path) as file:
        counts = f"{len(file['sharp'])} sharp and {len(file['blur'])} blurry patches"
        print(f"{path}: {counts} of {made_by['patch_size']} pixels")


def join(path: Path, parts: Sequence[Path], made_by: dict, own: Path) -> None:
    """Write a file that shows the patches of its parts, which stay beside it, by way of the file `own`.

    Raises ValueError if a part was made with another patch_size.
    """
    size = made_by["patch_size"]
    with h5py.File(own, "w", libver="latest") as file:
        file.attrs.update(made_by)
        for key in KEYS:
            counts = []
            for part in parts:
                with open_patches(part) as content:
                    counts.append(len(content[key]))
                    if content.attrs["patch_size"] != size:
                        raise ValueError(f"{part} was made with another patch_size: delete it")
            layout = h5py.VirtualLayout((sum(counts), size, size, 3), np.uint8)
            at = 0
            for part, count in zip(parts, counts, strict=True):
                source = h5py.VirtualSource(part.name, key, (count, size, size, 3))
                layout[at : at + count] = source
                at += count
            file.create_virtual_dataset(key, layout)
    os.replace(own, path)


def check_finished(path: Path, made_by: dict) -> None:
    """Print that nothing is to do, or raise ValueError if the file holds something else."""
    with open_patches(path) as file:
        changed = [
            f"{key} was {file.attrs.get(key)}, is {value}"
            for key, value in made_by.items()
            if file.attrs.get(key) != value
        ]
        if changed:
            raise ValueError(f"{path} was made otherwise ({'; '.join(changed)}): delete it, or take another")
        print(f"{path} is finished: {len(file['sharp'])} sharp and {len(file['blur'])} blurry patches")


def write(path: Path, sources: dict[str, list[Path]], made_by: dict) -> None:
    """Fill a new file picture by picture: no more than one picture is in memory."""
    size, stride = made_by["patch_size"], made_by["stride"]
    one, shapes = (size, size, 3), {}
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(made_by)
        for key in KEYS:
            data = file.create_dataset(key, (0, *one), np.uint8, maxshape=(None, *one), chunks=(CHUNK, *one))
            choose = (in_focus if key == "sharp" else out_of_focus) if made_by.get("by_focus") else None
            images = read(key, sources[key], size)
            shapes[key] = [append(data, image, size, stride, choose) for image in images]
            if not len(data):
                where = "in" if key == "sharp" else "out of"
                raise ValueError(f"no part of {len(sources[key])} photographs is {where} focus")
        if made_by["paired"]:
            columns = [found[key] for found in (sources, shapes) for key in KEYS]
            for sharp, blurry, *both in zip(*columns, strict=True):
                check_alike(blurry, sharp, *both[::-1])


def read(key: str, paths: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    for path in tqdm(paths, key, unit="image"):
        image = read_image(path)
        if min(image.shape[:2]) < size:
            raise ValueError(f"{path} is {image.shape[1]}x{image.shape[0]}: no patch of {size} pixels fits")
        yield image


def append(
    data: h5py.Dataset, image: np.ndarray, size: int, stride: int, choose: Callable | None = None
) -> tuple[int, ...]:
    """Add the patches of a picture (h, w, 3), row by row, those that `choose` takes; returns its shape."""
    patches = cut(image, size, stride)
    patches = patches[choose(patches)] if choose else patches
    before = len(data)
    data.resize(before + len(patches), axis=0)
    data[before:] = patches
    return image.shape


def in_focus(patches: np.ndarray) -> np.ndarray:
    """Which of the patches (n, size, size, 3) of a photograph are sharp."""
    sharpness, contrast = focus(patches)
    return (contrast > CONTRAST) & (sharpness > SHARP)


def out_of_focus(patches: np.ndarray) -> np.ndarray:
    """Which of the patches of a photograph are blurred: they have edges, but wide ones, and a tenth of the
    photograph's parts with edges is sharp. What is blurred all over may be soft by nature, as clouds are."""
    sharpness, contrast = focus(patches)
    edges = contrast > CONTRAST
    has_focus = edges.any() and np.quantile(sharpness[edges], 0.9) > SHARP
    return edges & (sharpness < SOFT) & has_focus


def focus(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sharpness and contrast (n,) of patches (n, size, size, 3).

    Contrast is the mean step between neighbours at a quarter of the size, in grey levels; sharpness the mean
    step at full size by it: about 1/4 where edges are wider than a few pixels, 1/2 to 1 where they are sharp.
    """
    full = [cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32) for patch in patches]
    quarter = [cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA) for grey in full]
    fine, coarse = (np.array([mean_step(grey) for grey in greys]) for greys in (full, quarter))
    return fine / np.maximum(coarse, 1e-6), coarse


def mean_step(grey: np.ndarray) -> float:
    return float(sum(np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)))


def cut(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All patches (n, size, size, 3) of (h, w, 3) that lie on the grid of `stride` pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))
    patches = windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)  # (rows, columns, size, size, 3)
    return patches.reshape(-1, size, size, 3)


if __name__ == "__main__":
    run_main(main, Settings)
