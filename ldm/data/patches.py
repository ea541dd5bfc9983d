"""Patches in an HDF5 file, and crops from any two sources of pictures: pairs, or blurry and sharp apart."""

import os
from pathlib import Path

import h5py
import numpy as np

from ldm.data.image import list_images
from ldm.data.paired import CropDataset, ImageFiles, Key, PairedDataset, at_least
from ldm.data.pairs import Pair, find_pairs, sharp_pairs, split_pairs
from ldm.validation import HeldOut, middle

KEYS = ("sharp", "blur")  # of the file: uint8 (n, size, size, 3) each
SMALLEST = 11  # pixels that SSIM needs
SUFFIXES = (".h5", ".hdf5")


def open_patches(path: str | Path) -> h5py.File:
    """Open and check a file of patches. Raises FileNotFoundError, or ValueError that says what is wrong."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"file of patches not found: {path} (tool_make_dbgan_dataset.py makes one)")
    try:
        file = h5py.File(path, "r")
        names, _ = list(file), dict(file.attrs)
    except (OSError, KeyError, RuntimeError) as error:  # h5py's, for damage to what names the data
        raise ValueError(f"{path} is damaged or no HDF5 file: {error}") from error
    for key in KEYS:
        data = file.get(key)
        if not isinstance(data, h5py.Dataset):
            raise ValueError(f"{path} has no patches {key!r}, only {', '.join(names) or 'nothing'}")
        shape = data.shape
        if data.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or not shape[0]:
            raise ValueError(f"{path}: {key!r} must be uint8 (n, size, size, 3), is {data.dtype} {shape}")
    return file


class Patches:
    """uint8 RGB patches (size, size, 3) of one key of a file, read as they are asked for.

    Every process (a DataLoader's worker too) opens the file once, for itself.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key, self._file, self._process = Path(path), key, None, 0
        with open_patches(path) as file:
            self.length, self.size = file[key].shape[:2]

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_process": 0}

    def __getitem__(self, key: Key) -> np.ndarray:
        if self._process != os.getpid():  # an HDF5 handle must not be used across a fork
            self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        index = key[1] if isinstance(key, tuple) else key
        try:
            return self._file[self.key][index]
        except OSError as error:
            raise ValueError(f"{self.path} is damaged at {self.key}[{index}]: {error}") from error

    def name(self, key: Key) -> str:
        """What stands for a path."""
        return f"{self.path}:{self.key}[{key[1] if isinstance(key, tuple) else key}]"


Source = ImageFiles | Patches


def is_patches(path: str | Path | None) -> bool:
    return path is not None and Path(path).suffix.lower() in SUFFIXES


def open_source(path: str | Path, key: str, cache: bool = False) -> Source:
    """The pictures of a folder, or the patches `key` of a file."""
    return Patches(path, key) if is_patches(path) else ImageFiles(list_images(path), cache)


class SourceDataset(CropDataset):
    """Crops of two sources: number n with number n if `paired`, else each sharp one with any blurry one.

    Items as in CropDataset. Raises ValueError for pairs of sources of different lengths, and for crops that
    are larger than the patches of a file.
    """

    def __init__(
        self,
        blurry: Source,
        sharp: Source,
        size: int,
        seed: int,
        augment: bool = False,
        color_jitter: float = 0.0,
        paired: bool = False,
    ):
        super().__init__(len(sharp), size, seed, augment, color_jitter)
        self.blurry, self.sharp, self.paired = blurry, sharp, paired
        for source in (blurry, sharp):
            if isinstance(source, Patches) and source.size < size:
                raise ValueError(f"crops of {size} pixels from {source.path}: its patches have {source.size}")
        if paired:
            check_paired(blurry, sharp)

    def _crops(self, key: Key, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str, str]:
        index = key[1] if isinstance(key, tuple) else key
        other = index if self.paired else int(rng.integers(len(self.blurry)))
        blurry, sharp = at_least(self.blurry[other], self.size), at_least(self.sharp[index], self.size)
        y, x = self._window(*blurry.shape[:2], rng)
        here = y, x
        if not self.paired:
            here = self._window(*sharp.shape[:2], rng)
        crops = [
            image[top : top + self.size, left : left + self.size]
            for image, (top, left) in ((blurry, (y, x)), (sharp, here))
        ]
        return *crops, f"{self.blurry.name(other)} with {self.sharp.name(index)}", ""


def open_pairs(
    data: Path | None,
    sharp_dir: Path | None,
    val_data: Path | None,
    val_fraction: float,
    limits: tuple[int, int, int],
    size: int,
    seed: int,
    cache: bool = False,
    **look: bool | float,
) -> tuple[CropDataset | None, Source | None, HeldOut]:
    """Pairs to train on and their sharp pictures (None where there are none), and what is held out.

    `data` and `val_data` are what `find_pairs` takes, or files of paired patches. With `sharp_dir` alone
    there are no pairs, and the held-out pictures are blurred on the fly. Without `val_data` the part
    `val_fraction` is held out. `limits` are HeldOut's `limit`, `seed`, `crop`; `look` CropDataset's options.
    """
    dataset = sharp = held_out = None
    if is_patches(data):
        sharp = Patches(data, "sharp")
        dataset = SourceDataset(Patches(data, "blur"), sharp, size, seed, paired=True, **look)
    elif data or sharp_dir:
        pairs = find_pairs(data) if data else sharp_pairs(sharp_dir)
        if not val_data:
            pairs, held_out = split_pairs(pairs, val_fraction, seed)
        sharp = ImageFiles([pair.sharp for pair in pairs], cache)
        dataset = PairedDataset(pairs, size, seed, cache=cache, **look) if data else None
    if is_patches(val_data):
        return dataset, sharp, HeldOutPatches(val_data, *limits)
    if not (val_data or held_out):
        raise ValueError(
            "nothing to evaluate on: give --val_data, or --data or --sharp_dir as folders (or try --demo)"
        )
    return dataset, sharp, HeldOut(held_out or find_pairs(val_data), *limits)


def open_unpaired(
    blur_data: Path | None, sharp_dir: Path | None, sharp: Source | None, cache: bool = False
) -> tuple[Source, Source]:
    """Real blurred pictures and sharp ones, from a folder each or from one file of patches.

    The sharp ones are those of `sharp_dir`, else `sharp`, else those of the file. Raises ValueError if
    there are none of a kind.
    """
    if not blur_data:
        raise ValueError("the stage `blur` needs --blur_data: real blurred photographs (or try --demo)")
    blurry = open_source(blur_data, "blur", cache)
    if sharp_dir:
        sharp = ImageFiles([pair.sharp for pair in sharp_pairs(sharp_dir)], cache)
    elif sharp is None and is_patches(blur_data):
        sharp = Patches(blur_data, "sharp")
    if sharp is None:
        raise ValueError("the stage `blur` needs sharp photographs: give --sharp_dir or --data")
    return blurry, sharp


def check_paired(blurry: Patches, sharp: Patches) -> None:
    """Raise ValueError if two sources cannot be pairs."""
    with open_patches(sharp.path) as file:
        if not file.attrs.get("paired", True):
            raise ValueError(f"{sharp.path} is unpaired (for --blur_data): its patches are no pairs")
    if len(blurry) != len(sharp):
        raise ValueError(f"{sharp.path} has {len(blurry)} blurry and {len(sharp)} sharp patches: no pairs")


class HeldOutPatches(HeldOut):
    """Held-out pairs (ldm.validation.HeldOut) from a file of paired patches."""

    def __init__(self, path: str | Path, limit: int, seed: int, crop: int = 0):
        self.blurry, self.sharp = Patches(path, "blur"), Patches(path, "sharp")
        check_paired(self.blurry, self.sharp)
        if self.sharp.size < SMALLEST:
            raise ValueError(
                f"{path}: patches of {self.sharp.size} pixels cannot be scored, it takes {SMALLEST}"
            )
        names = [Path(self.blurry.name(index)) for index in range(len(self.blurry))]
        super().__init__([Pair(name, Path(f"{name} sharp")) for name in names], limit, seed, crop)
        order = np.random.default_rng(seed).permutation(len(names))
        self.chosen = sorted(order[:limit].tolist())

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.chosen[number]
        return middle(self.blurry[index], self.crop), middle(self.sharp[index], self.crop)
