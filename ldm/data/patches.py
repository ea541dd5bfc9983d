"""Patches in an HDF5 file, and crops from any two sources of pictures: pairs, or blurry and sharp apart."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.dead_leaves import DeadLeaves
from ldm.data.image import list_images
from ldm.data.paired import (
    BlurDataset,
    CropDataset,
    ImageFiles,
    Key,
    PairedDataset,
    Together,
    at_least,
    sharpness,
)
from ldm.data.pairs import Pair, find_pairs, sharp_pairs, split_pairs
from ldm.settings import check_counts
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
    """Crops of two sources: number n with number n if `paired`, else each sharp one with any blurry one, the
    sharp one the sharpest of `candidates` windows.

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
        candidates: int = 1,
    ):
        super().__init__(len(sharp), size, seed, augment, color_jitter)
        self.blurry, self.sharp, self.paired, self.candidates = blurry, sharp, paired, candidates
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
            windows = [self._window(*sharp.shape[:2], rng) for _ in range(self.candidates)]
            here = max(windows, key=lambda at: sharpness(sharp[at[0] :, at[1] :][: self.size, : self.size]))
        crops = [
            image[top : top + self.size, left : left + self.size]
            for image, (top, left) in ((blurry, (y, x)), (sharp, here))
        ]
        return *crops, f"{self.blurry.name(other)} with {self.sharp.name(index)}", ""


def open_data(settings: Any, stage: str) -> tuple[CropDataset, HeldOut]:
    """What a stage of train_dbgan.py trains on, and what is held out, by that script's settings.

    Pairs come from `data` (what `find_pairs` takes, or a file of paired patches); without it they are made of
    the sharp pictures in `sharp_dir` and of dead leaves. `blur` takes each sharp picture with any of
    `blur_data`. Raises ValueError if something is not given, or too little for a batch.
    """
    size, seed, cache, data = settings.crop_size, settings.seed, settings.cache, settings.data
    _check(settings)
    pairs, held_out = _split(settings)
    look = {"augment": True, "color_jitter": settings.color_jitter}
    photographs = [pair.sharp for pair in pairs for _ in range(settings.photo_crops if not data else 1)]
    smallest = None
    if stage == "blur":
        blurry, sharp = open_unpaired(settings, photographs)
        look["candidates"] = settings.crop_candidates if settings.sharp_dir else 1
        dataset = SourceDataset(blurry, sharp, size, seed, **look)
        smallest = min(len(blurry), len(sharp))
    elif is_patches(data):
        dataset = SourceDataset(
            Patches(data, "blur"), Patches(data, "sharp"), size, seed, paired=True, **look
        )
    elif data:
        dataset = PairedDataset(pairs, size, seed, cache=cache, **look)
    elif photographs or settings.dead_leaves:
        leaves = DeadLeaves(size + 64, settings.dead_leaves, seed)
        look |= {name: getattr(settings, name) for name in ("jpeg_probability", "sharp_fraction")}
        look |= {"candidates": settings.crop_candidates, "field": (0.0, 0.0), **_camera(settings)}
        dataset = BlurDataset(Together((ImageFiles(photographs, cache), 1), (leaves, 1)), size, seed, **look)
    else:
        raise ValueError(
            f"the stage `{stage}` needs pairs: give --data, --sharp_dir or --dead_leaves (or try --demo)"
        )
    smallest = len(dataset) if smallest is None else smallest
    if smallest < settings.batch_size:
        raise ValueError(f"{smallest} images for `{stage}` are fewer than a batch of {settings.batch_size}")
    return dataset, held_out


def _check(settings: Any) -> None:
    check_counts(settings, "photo_crops crop_candidates")
    if settings.crop_size < 16 or settings.crop_size % 16:
        raise ValueError(f"crop_size must be a multiple of 16, not {settings.crop_size}")
    if settings.data and settings.dead_leaves:
        raise ValueError("--dead_leaves goes with --sharp_dir or alone, not with the pairs of --data")
    for name in ("sharp_fraction", "jpeg_probability"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {getattr(settings, name)}")


def _camera(settings: Any) -> dict[str, Any]:
    """How pictures are blurred on the fly."""
    return {"blur_types": settings.blur_types, "scale": settings.blur_scale}


def _split(settings: Any) -> tuple[list[Pair], HeldOut]:
    """Pairs on disk to train on (sharp pictures with themselves, to be blurred) and what is held out:
    `val_data`, or the part `val_fraction` of them."""
    limits, pairs, held_out = (settings.val_images, settings.seed, settings.val_crop), [], []
    if not is_patches(settings.data):
        pairs = find_pairs(settings.data) if settings.data else sharp_pairs(settings.sharp_dir)
    if is_patches(settings.val_data):
        return pairs, HeldOutPatches(settings.val_data, *limits)
    if settings.val_data:
        held_out = find_pairs(settings.val_data)
    elif pairs:
        pairs, held_out = split_pairs(pairs, settings.val_fraction, settings.seed)
    if not held_out:
        raise ValueError(
            "nothing to evaluate on: give --val_data, or --data or --sharp_dir as folders (or try --demo)"
        )
    return pairs, HeldOut(held_out, *limits, **_camera(settings))


def open_unpaired(settings: Any, photographs: list[Path]) -> tuple[Source, Source]:
    """Real blurred pictures, and sharp ones: of `sharp_dir`, else of the pairs, else of the same file."""
    if not settings.blur_data:
        raise ValueError("the stage `blur` needs --blur_data: real blurred photographs (or try --demo)")
    blurry = open_source(settings.blur_data, "blur", settings.cache)
    if settings.data and settings.sharp_dir:
        photographs = [pair.sharp for pair in sharp_pairs(settings.sharp_dir)]
    if photographs:
        return blurry, ImageFiles(photographs, settings.cache)
    for path in (settings.data, settings.blur_data):
        if is_patches(path):
            return blurry, Patches(path, "sharp")
    raise ValueError("the stage `blur` needs sharp photographs: give --sharp_dir or --data")


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
