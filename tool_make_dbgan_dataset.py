"""Cut photos into patches for train_dbgan.py: one HDF5 file to train on and one to evaluate on.

Real blurred photos and sharp ones, no pairs (for the stage that learns to blur):

    python tool_make_dbgan_dataset.py --blur_train_path cycle_train.h5 --blur_valid_path cycle_valid.h5 \
        --blur_train_data RWBI/train --blur_valid_data RWBI/valid \
        --deblur_train_data gopro/train --deblur_valid_data gopro/valid

Without --blur_train_data and --blur_valid_data the two files hold the pairs of the GoPro trees instead; with
--by_focus --deblur_train_data FOLDER the parts of photos that are in focus, and those out of it.

A file has `sharp` and `blur`, uint8 (n, 128, 128, 3), chunked, and attributes that say how it was made. It is
written as a stream and appears under its name only when it is whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from harness.flags import Range, Whole
from harness.settings import check_ranges, run_main
from ldm.data.image import list_images, read_image, write_whole
from ldm.data.pairs import check_alike, check_apart, find_pairs, sharp_pairs
from ldm.data.patches import KEYS, open_patches
from ldm.data.shards import check_made_from, digest

CONTRAST, SHARP, SOFT = 6.0, 0.45, 0.36  # limits of `focus`, chosen by looking at 32 photos
Sources = dict[str, list[Path]]  # images for each of KEYS


@dataclass
class Settings:
    """Cut photos into patches, which train_dbgan.py reads faster than images."""

    # ---- files to write
    blur_train_path: Path = Path("training/dbgan/train.h5")  # HDF5 file to write for training
    blur_valid_path: Path = Path("training/dbgan/valid.h5")  # HDF5 file to write for validation

    # ---- data
    blur_train_data: Path | None = None  # folder of real blurred photos for training; default: write pairs
    blur_valid_data: Path | None = None  # folder of real blurred photos for validation
    # GoPro tree for training; with blurred photos any folder of sharp ones
    deblur_train_data: Path | None = None
    deblur_valid_data: Path | None = None  # GoPro tree or folder of sharp photos for validation

    # ---- patches
    by_focus: bool = False  # take sharp and blurry parts of the same photos, in focus and out of it
    patch_size: Annotated[int, Range(8)] = 128  # width and height of the patches in pixels
    stride: Whole = 0  # pixels from one patch to the next; 0 for patch_size, so that they do not overlap


def main(settings: Settings) -> None:
    """Write both files; files that are finished already are kept."""
    check_ranges(settings)
    if settings.blur_train_path.resolve() == settings.blur_valid_path.resolve():
        raise ValueError(f"--blur_train_path and --blur_valid_path are one file: {settings.blur_train_path}")
    if not settings.deblur_train_data:
        raise ValueError("give --deblur_train_data: the folder of the sharp photos, or the GoPro tree")
    if settings.by_focus and (settings.blur_train_data or settings.blur_valid_data):
        raise ValueError("--by_focus takes both parts from the sharp photos: no --blur_train_data then")
    about = {"patch_size": settings.patch_size, "stride": settings.stride or settings.patch_size}
    about["by_focus"] = settings.by_focus
    files = [(settings.blur_train_path, settings.blur_train_data, settings.deblur_train_data)]
    if settings.deblur_valid_data:
        files.append((settings.blur_valid_path, settings.blur_valid_data, settings.deblur_valid_data))
    found = [find_sources(blurred, sharp, settings.by_focus) for _, blurred, sharp in files]  # before writing
    for (path, _, _), (sources, paired) in zip(files, found, strict=True):
        make_file(path, sources, {"paired": paired, **about})


def find_sources(blurred: Path | None, sharp: Path, by_focus: bool) -> tuple[Sources, bool]:
    """Return the images for each key, and whether they are pairs."""
    if not blurred and not by_focus:
        pairs = find_pairs(sharp)
        return {"sharp": [pair.sharp for pair in pairs], "blur": [pair.blurry for pair in pairs]}, True
    if blurred:
        check_apart(blurred, sharp)
    photos = [pair.sharp for pair in sharp_pairs(sharp)]
    return {"sharp": photos, "blur": list_images(blurred) if blurred else photos}, False


def make_file(path: Path, sources: Sources, about: dict) -> None:
    """Write one file unless it exists; `about` are its attributes, without the sources.

    Raises ValueError if an existing file was made with other options, if images of a pair differ in size, if
    an image is smaller than a patch, or if no patch is in focus (or out of focus).
    """
    wanted = about | {"sources": digest(f"{key} {source}" for key in KEYS for source in sources[key])}
    if path.exists():
        with open_patches(path) as file:
            check_made_from(path, file.attrs, wanted)
        return report(path, "is finished")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: write(temporary, sources, wanted))
    report(path, "is written")


def report(path: Path, state: str) -> None:
    with open_patches(path) as file:
        counts = f"{len(file['sharp'])} sharp and {len(file['blur'])} blurry patches"
        print(f"{path} {state}: {counts} of {file['sharp'].shape[1]} pixels")


def write(path: Path, sources: Sources, about: dict) -> None:
    """Fill a new file image by image, with only one image in memory."""
    size = about["patch_size"]
    shapes = {}
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(about)
        for key in KEYS:
            patch = (size, size, 3)  # one in a chunk: they are read one by one, in any order
            data = file.create_dataset(
                key, (0, *patch), np.uint8, maxshape=(None, *patch), chunks=(1, *patch)
            )
            choose = None
            if about["by_focus"]:
                choose = in_focus if key == "sharp" else out_of_focus
            shapes[key] = [append(data, path, about, choose) for path in tqdm(sources[key], key)]
            if not len(data):
                where = "in" if key == "sharp" else "out of"
                raise ValueError(f"no part of {len(sources[key])} photos is {where} focus")
    if about["paired"]:
        for sharp, blurry, shape, other in zip(
            sources["sharp"], sources["blur"], *shapes.values(), strict=True
        ):
            check_alike(blurry, sharp, other, shape)


def append(data: h5py.Dataset, path: Path, about: dict, choose: Callable | None) -> tuple[int, ...]:
    """Append the patches of an image, row by row, or those that `choose` selects; return its shape."""
    image, size = read_image(path), about["patch_size"]
    if min(image.shape[:2]) < size:
        raise ValueError(f"{path} is {image.shape[1]}x{image.shape[0]}: no patch of {size} pixels fits")
    patches = cut(image, size, about["stride"])
    if choose:
        patches = patches[choose(patches)]
    data.resize(len(data) + len(patches), axis=0)
    data[len(data) - len(patches) :] = patches
    return image.shape


def cut(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Cut all patches (n, size, size, 3) of (h, w, 3) that lie on a grid of `stride` pixels."""
    views = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))
    patches = views[::stride, ::stride].transpose(0, 1, 3, 4, 2)  # (rows, columns, size, size, 3)
    return patches.reshape(-1, size, size, 3)


# ---- focus -------------------------------------------------------------------------------------------------


def in_focus(patches: np.ndarray) -> np.ndarray:
    """Select the sharp ones among the patches (n, size, size, 3) of a photo: bool (n,)."""
    sharpness, contrast = focus(patches)
    return (contrast > CONTRAST) & (sharpness > SHARP)


def out_of_focus(patches: np.ndarray) -> np.ndarray:
    """Select the blurred ones among the patches of a photo: those with wide edges, but none if fewer than a
    tenth of the patches with edges are sharp: such a photo may show something soft, like clouds."""
    sharpness, contrast = focus(patches)
    edges = contrast > CONTRAST
    if not edges.any() or np.quantile(sharpness[edges], 0.9) <= SHARP:
        return np.zeros(len(patches), bool)
    return edges & (sharpness < SOFT)


def focus(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute sharpness and contrast (n,) of patches (n, size, size, 3).

    Contrast is the mean step between neighbouring pixels at a quarter of the size, in grey levels. Sharpness
    is the mean step at full size / contrast: about 1/4 for edges wider than a few pixels, 1/2 to 1 if sharp.
    """
    fine, coarse = [], []
    for patch in patches:
        grey = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY).astype(np.float32)
        fine.append(mean_step(grey))
        coarse.append(mean_step(cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)))
    return np.array(fine) / np.maximum(coarse, 1e-6), np.array(coarse)


def mean_step(grey: np.ndarray) -> float:
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


if __name__ == "__main__":
    run_main(main, Settings)
