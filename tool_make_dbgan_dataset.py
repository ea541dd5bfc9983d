"""Cut photographs into patches for train_dbgan.py: one HDF5 file to train on and one to evaluate on.

Real blurred photographs and sharp ones, no pairs (for the stage that learns to blur):

    python tool_make_dbgan_dataset.py --blur_train_path cycle_train.h5 --blur_valid_path cycle_valid.h5 \
        --blur_train_data RWBI/train --blur_valid_data RWBI/valid \
        --deblur_train_data gopro/train --deblur_valid_data gopro/valid

Without --blur_train_data and --blur_valid_data the two files hold the pairs of the GoPro trees instead.

A file has `sharp` and `blur`, uint8 (n, 128, 128, 3), chunked, and attributes that say how it was made. It is
written as a stream and appears under its name only when it is whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from ldm.checkpoint import write_atomically
from ldm.data.image import list_images, read_image
from ldm.data.pairs import find_pairs, sharp_pairs
from ldm.data.patches import KEYS, open_patches
from ldm.settings import run_main

CHUNK = 1  # patches in a chunk: they are read one by one, in any order


@dataclass
class Settings:
    """Cut photographs into patches, which train_dbgan.py reads faster than pictures."""

    blur_train_path: Path = Path("training/dbgan/train.h5")  # file to write, for training
    blur_valid_path: Path = Path("training/dbgan/valid.h5")  # file to write, for validation
    blur_train_data: Path | None = None  # folder of real blurred photographs; without it the files hold pairs
    blur_valid_data: Path | None = None  # the same for validation
    deblur_train_data: Path | None = None  # GoPro tree; beside real blurred photographs any folder will do
    deblur_valid_data: Path | None = None  # and for validation
    patch_size: int = 128  # width and height of the patches in pixels
    stride: int = 0  # pixels from one patch to the next; 0: patch_size, so that they do not overlap


def main(settings: Settings) -> None:
    if settings.patch_size < 8 or settings.stride < 0:
        raise ValueError(
            f"patch_size must be at least 8 and stride at least 0, not {settings.patch_size} and "
            f"{settings.stride}"
        )
    if settings.blur_train_path.resolve() == settings.blur_valid_path.resolve():
        raise ValueError(f"--blur_train_path and --blur_valid_path are one file: {settings.blur_train_path}")
    files = [
        (settings.blur_train_path, settings.blur_train_data, settings.deblur_train_data),
        (settings.blur_valid_path, settings.blur_valid_data, settings.deblur_valid_data),
    ]
    if not files[0][2]:
        raise ValueError("give --deblur_train_data: the folder of the sharp photographs, or the GoPro tree")
    todo = [(path, find_sources(blurred, gopro)) for path, blurred, gopro in files if gopro]
    for path, (sources, paired) in todo:
        make_file(path, sources, paired, settings.patch_size, settings.stride or settings.patch_size)


def find_sources(blurred: Path | None, gopro: Path) -> tuple[dict[str, list[Path]], bool]:
    """The pictures of each key, and whether they are pairs."""
    if blurred:
        return {"sharp": [pair.sharp for pair in sharp_pairs(gopro)], "blur": list_images(blurred)}, False
    pairs = find_pairs(gopro)
    return {"sharp": [pair.sharp for pair in pairs], "blur": [pair.blurry for pair in pairs]}, True


def make_file(path: Path, sources: dict[str, list[Path]], paired: bool, size: int, stride: int) -> None:
    """Write one file, or say that it is there already.

    Raises ValueError if the file there was made otherwise, if pictures of a pair differ in size, or if a
    picture is smaller than a patch.
    """
    names = "\n".join(f"{key} {source}" for key in KEYS for source in sources[key])
    made_by = {"paired": paired, "patch_size": size, "stride": stride}
    made_by["sources"] = sha256(names.encode()).hexdigest()[:16]
    if path.exists():
        return check_finished(path, made_by)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: write(temporary, sources, made_by))
    with open_patches(path) as file:
        print(f"{path}: {len(file['sharp'])} sharp and {len(file['blur'])} blurry patches of {size} pixels")


def check_finished(path: Path, made_by: dict) -> None:
    """Print that nothing is to do, or raise ValueError if the file holds something else."""
    with open_patches(path) as file:
        changed = [
            f"{key} was {file.attrs.get(key)}, is {value}"
            for key, value in made_by.items()
            if file.attrs.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{path} was made otherwise ({'; '.join(changed)}): delete it or take another name"
            )
        print(f"{path} is finished: {len(file['sharp'])} sharp and {len(file['blur'])} blurry patches")


def write(path: Path, sources: dict[str, list[Path]], made_by: dict) -> None:
    """Fill a new file picture by picture: no more than one picture is in memory."""
    size, stride = made_by["patch_size"], made_by["stride"]
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(made_by)
        shapes = {}
        for key in KEYS:
            data = file.create_dataset(
                key,
                (0, size, size, 3),
                np.uint8,
                maxshape=(None, size, size, 3),
                chunks=(CHUNK, size, size, 3),
            )
            shapes[key] = [append(data, image, size, stride) for image in read(key, sources[key], size)]
        if made_by["paired"]:
            check_sizes(sources, shapes)


def read(key: str, paths: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    for path in tqdm(paths, key, unit="image"):
        image = read_image(path)
        if min(image.shape[:2]) < size:
            raise ValueError(f"{path} is {image.shape[1]}x{image.shape[0]}: no patch of {size} pixels fits")
        yield image


def append(data: h5py.Dataset, image: np.ndarray, size: int, stride: int) -> tuple[int, ...]:
    """Add the patches of a picture (h, w, 3), row by row; returns its shape."""
    patches = cut(image, size, stride)
    data.resize(len(data) + len(patches), axis=0)
    data[-len(patches) :] = patches
    return image.shape


def cut(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All patches (n, size, size, 3) of (h, w, 3) that lie on the grid of `stride` pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))
    patches = windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)  # (rows, columns, size, size, 3)
    return patches.reshape(-1, size, size, 3)


def check_sizes(sources: dict[str, list[Path]], shapes: dict[str, list[tuple[int, ...]]]) -> None:
    for sharp, blurry, *both in zip(
        *(sources[key] for key in KEYS), *(shapes[key] for key in KEYS), strict=True
    ):
        if both[0] != both[1]:
            (h, w, _), (other_h, other_w, _) = both
            raise ValueError(
                f"the pictures of a pair differ in size: {sharp} is {w}x{h}, {blurry} {other_w}x{other_h}"
            )


if __name__ == "__main__":
    run_main(main, Settings)
