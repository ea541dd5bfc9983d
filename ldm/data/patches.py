"""Patches in an HDF5 file, and crops of two sources of images, paired or unpaired."""

import os
from pathlib import Path

import h5py
import numpy as np

from ldm.data.crop import at_least
from ldm.data.decode import DamagedImage
from ldm.data.image import list_images
from ldm.data.paired import CropDataset, Crops, ImageFiles
from ldm.data.stream import Key, split_key

KEYS = ("sharp", "blur")  # of the file: uint8 (n, size, size, 3) each
SUFFIXES = (".h5", ".hdf5")


def open_patches(path: str | Path) -> h5py.File:
    """Open and check a file of patches. Raises FileNotFoundError, or ValueError that says what is wrong."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"file of patches not found: {path} (tool_make_dbgan_dataset.py makes one)")
    try:
        file = h5py.File(path, "r")
        names, _ = list(file), dict(file.attrs)
    except (OSError, KeyError, RuntimeError) as error:  # h5py raises these for damaged metadata
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
    """uint8 RGB patches (size, size, 3) under one key of a file, read on demand.

    Every process, including DataLoader workers, opens the file once for itself.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key
        self._file, self._process = None, 0
        with open_patches(path) as file:
            self.length, self.size = file[key].shape[:2]

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_process": 0}

    def __getitem__(self, key: Key) -> np.ndarray:
        if self._process != os.getpid():  # an HDF5 handle must not be used across a fork
            self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        index = split_key(key)[1]
        try:
            return self._file[self.key][index]
        except OSError as error:
            raise DamagedImage(f"{self.path} is damaged at {self.key}[{index}]: {error}") from error

    def name(self, key: Key) -> str:
        """Return a display name, where other sources return a path."""
        return f"{self.path}:{self.key}[{split_key(key)[1]}]"


Source = ImageFiles | Patches


def is_patches(path: str | Path | None) -> bool:
    """Return True if a path has the suffix of a file of patches (SUFFIXES)."""
    return path is not None and Path(path).suffix.lower() in SUFFIXES


def open_source(path: str | Path, key: str, cache: bool = False) -> Source:
    """Open the images of a folder, or the patches under `key` of a file."""
    return Patches(path, key) if is_patches(path) else ImageFiles(list_images(path), cache)


def check_paired(blurry: Patches, sharp: Patches) -> None:
    """Raise ValueError if the patches of two sources are marked as unpaired or differ in number."""
    with open_patches(sharp.path) as file:
        if not file.attrs.get("paired", True):
            raise ValueError(f"{sharp.path} is unpaired: its blurry and sharp patches are no pairs")
    if len(blurry) != len(sharp):
        raise ValueError(f"{sharp.path} has {len(blurry)} blurry and {len(sharp)} sharp patches: no pairs")


class SourceDataset(CropDataset):
    """Crops of two sources: images of the same index if `paired`, else each sharp and a random blurry image.

    If unpaired, the sharp crop is the sharpest of `candidates`. Items and `options` are those of CropDataset.
    Raises ValueError if the sources cannot be paired (see check_paired), or if crops are larger than the
    patches of a file.
    """

    def __init__(
        self,
        blurry: Source,
        sharp: Source,
        size: int,
        seed: int,
        paired: bool = False,
        candidates: int = 1,
        **options: float,
    ):
        super().__init__(len(sharp), size, seed, **options)
        self.blurry, self.sharp, self.paired, self.candidates = blurry, sharp, paired, candidates
        for source in (blurry, sharp):
            if isinstance(source, Patches) and source.size < size:
                raise ValueError(f"crops of {size} pixels from {source.path}: its patches have {source.size}")
        if paired:
            check_paired(blurry, sharp)

    def _crops(self, key: Key, rng: np.random.Generator) -> Crops:
        index = split_key(key)[1]
        other = index if self.paired else int(rng.integers(len(self.blurry)))
        blurry = at_least(self.blurry[other], self.size)
        sharp = at_least(self.sharp[index], self.size)
        crop = self._crop(blurry, rng)
        sharp_crop = crop if self.paired else self._crop(sharp, rng, self.candidates)
        name = f"{self.blurry.name(other)} with {self.sharp.name(index)}"
        return crop.cut(blurry), sharp_crop.cut(sharp), name, ""
