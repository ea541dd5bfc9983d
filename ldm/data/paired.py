"""Blurry and sharp crops for training: from pairs on disk, or from sharp images blurred on the fly."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.crop import Crop, at_least, random_crop
from ldm.data.image import UNREADABLE, read_image, to_tensor
from ldm.data.pairs import Pair, check_alike
from ldm.data.stream import Key, item_seed, split_key
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur

BLUR_MARGIN = 32  # pixels around a crop that are blurred with it, so that its borders are correct
BLUR_NAMES = tuple(BLUR_TYPES)
LUMA = np.array([0.299, 0.587, 0.114])
Crops = tuple[np.ndarray, np.ndarray, str, str]  # blurry, sharp, path or name of their source, blur type

# ---- sources of images: anything with `len`, `source[key]` (uint8 RGB) and `source.name(key)` -----------


class ImageFiles:
    """Images on disk as uint8 RGB (h, w, 3) by key; with `cache` all are decoded once and kept in memory."""

    def __init__(self, paths: Sequence[Path], cache: bool = False):
        self.paths = list(paths)
        self.images: dict[Path, np.ndarray | None] = {}
        if cache:
            unique = list(dict.fromkeys(self.paths))
            with ThreadPoolExecutor() as threads:
                decoded = tqdm(threads.map(_decoded, unique), "reading images", len(unique), leave=False)
                self.images = dict(zip(unique, decoded, strict=True))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> np.ndarray:
        path = self.paths[split_key(key)[1]]
        image = self.images.get(path)
        return read_image(path) if image is None else image

    def name(self, key: Key) -> str:
        """Return the path of the image."""
        return str(self.paths[split_key(key)[1]])


def _decoded(path: Path) -> np.ndarray | None:
    """Read an image, or return None if it cannot be read: the error is raised when the image is used."""
    try:
        return read_image(path)
    except UNREADABLE:
        return None


class ConcatSource:
    """Concatenation of sources such as ImageFiles and ldm.data.dead_leaves.DeadLeaves.

    `sources` are pairs of a source and the number of times that each of its images appears in an epoch.
    """

    def __init__(self, *sources: tuple[Any, int]):
        self.places = []
        for source, times in sources:
            for index in range(len(source)):
                self.places += [(source, index)] * times

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Key) -> np.ndarray:
        epoch, place = split_key(key)
        source, index = self.places[place]
        return source[epoch, index]

    def name(self, key: Key) -> str:
        """Return the image's name in its own source."""
        epoch, place = split_key(key)
        source, index = self.places[place]
        return source.name((epoch, index))


# ---- data sets of pairs ------------------------------------------------------------------------------------


class CropDataset(Dataset):
    """Base class of paired and synthetic data: the same crop, rotation and colour change for both images.

    `dataset[(epoch, index)]` (or `dataset[index]`, which is epoch 0) is a dictionary of `blurry` and `sharp`,
    float32 (3, size, size) in [-1, 1], `path`, `blur_type` and `seed`, which determines all random choices.
    Images smaller than `size` are scaled up. The crop is centred, or with `augment` at a random position and
    randomly flipped and rotated by multiples of 90 degrees. `color_jitter` (0.1 is mild) varies brightness,
    contrast, saturation and white balance.
    """

    def __init__(self, length: int, size: int, seed: int, augment: bool = False, color_jitter: float = 0.0):
        if not length:
            raise ValueError("the data set is empty")
        if size < 1:
            raise ValueError(f"the crop size must be at least 1, got {size}")
        self.length, self.size, self.seed = length, size, seed
        self.augment, self.color_jitter = augment, color_jitter

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> dict:
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        blurry, sharp, path, blur_type = self._crops(key, rng)
        if self.augment:
            turns = rng.integers(4)
            if rng.integers(2):
                blurry, sharp = blurry[:, ::-1], sharp[:, ::-1]
            blurry, sharp = np.rot90(blurry, turns), np.rot90(sharp, turns)
        if self.color_jitter:
            matrix = color_matrix(rng, self.color_jitter)
            blurry, sharp = recolor(blurry, matrix), recolor(sharp, matrix)
        images = {"blurry": to_tensor(blurry), "sharp": to_tensor(sharp)}
        return {**images, "path": path, "blur_type": blur_type, "seed": seed}

    def _crops(self, key: Key, rng: np.random.Generator) -> Crops:
        """Return blurry and sharp uint8 (size, size, 3), their source's path or name, and the blur type."""
        raise NotImplementedError

    def _crop(self, image: np.ndarray, rng: np.random.Generator, candidates: int = 1) -> Crop:
        """Choose the centred crop of an image, or with `augment` the sharpest of `candidates` random ones."""
        return random_crop(image, self.size, rng if self.augment else None, candidates)


class PairedDataset(CropDataset):
    """Crops of pairs on disk; the two images of a pair must have the same size (ValueError names both).

    `options` are `augment` and `color_jitter` of CropDataset; with `cache` all images are kept in memory.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int,
        seed: int,
        cache: bool = False,
        **options: float,
    ):
        super().__init__(len(pairs), size, seed, **options)
        self.pairs = list(pairs)
        self.blurry = ImageFiles([pair.blurry for pair in pairs], cache)
        self.sharp = ImageFiles([pair.sharp for pair in pairs], cache)

    def _crops(self, key: Key, rng: np.random.Generator) -> Crops:
        pair = self.pairs[split_key(key)[1]]
        blurry, sharp = self.blurry[key], self.sharp[key]
        check_alike(pair.blurry, pair.sharp, blurry.shape, sharp.shape)
        blurry, sharp = at_least(blurry, self.size), at_least(sharp, self.size)
        crop = self._crop(blurry, rng)
        return crop.cut(blurry), crop.cut(sharp), str(pair.blurry), pair.blur_type


class BlurDataset(CropDataset):
    """Pairs made from sharp images alone, with new blur in every epoch.

    `images` is a list of paths, or a source such as ldm.data.dead_leaves.DeadLeaves. `blur_options` are those
    of `random_blur` (`scale`, `noise`, `jpeg_probability`), and `field` sets lens_blur's fall-off of light
    towards the corners, which a crop of a larger image does not have. The sharpest of `candidates` crops is
    used: in photos with a shallow focus most crops are blurred.
    """

    def __init__(
        self,
        images: Sequence[Path] | ImageFiles,
        size: int,
        seed: int,
        augment: bool = False,
        color_jitter: float = 0.0,
        cache: bool = False,
        candidates: int = 1,
        field: tuple[float, float] | None = None,
        **blur_options: float,
    ):
        super().__init__(len(images), size, seed, augment, color_jitter)
        self.images = images if hasattr(images, "name") else ImageFiles(images, cache)
        self.candidates, self.blur_options, self.field = candidates, blur_options, field

    def _crops(self, key: Key, rng: np.random.Generator) -> Crops:
        image = at_least(self.images[key], self.size)
        name = self.images.name(key)
        crop = self._crop(image, rng, self.candidates)
        options = dict(self.blur_options)
        blur_type = BLUR_NAMES[rng.integers(len(BLUR_NAMES))]
        if blur_type == "lens_blur" and self.field is not None:
            options["field"] = self.field
        blurry, _, _ = blur_crop(image, crop, rng, [blur_type], **options)
        return blurry, crop.cut(image), name, blur_type


class MixedDataset(CropDataset):
    """Crops of `dataset`, with the fraction `fraction` replaced by crops of random items of `pairs`."""

    def __init__(self, dataset: CropDataset, pairs: CropDataset, fraction: float):
        super().__init__(len(dataset), dataset.size, dataset.seed)
        self.dataset, self.pairs, self.fraction = dataset, pairs, fraction

    def __getitem__(self, key: Key) -> dict:
        own_seed = item_seed(self.seed, key)
        rng = np.random.default_rng([own_seed, 1])
        if rng.random() >= self.fraction:
            return self.dataset[key]
        return self.pairs[own_seed, int(rng.integers(len(self.pairs)))]


def blur_crop(
    image: np.ndarray,
    crop: Crop,
    rng: np.random.Generator,
    blur_types: Sequence[str] = BLUR_NAMES,
    **options: float,
) -> tuple[np.ndarray, str, dict]:
    """Blur a crop with its surroundings; return the blurred crop, the blur type and the blur's parameters."""
    around = crop.grown(BLUR_MARGIN, image.shape)
    blurred, blur_type, parameters = random_blur(around.cut(image), rng, blur_types, **options)
    return crop.inside(around).cut(blurred), blur_type, parameters


def color_matrix(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Sample brightness, contrast, saturation and white balance as one affine map (3, 4) of RGB in [0, 1]."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    balance = rng.uniform(1 - strength / 2, 1 + strength / 2, 3)
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA  # towards each pixel's own grey
    mix = brightness * contrast * balance[:, None] * mix
    return np.hstack([mix, np.full((3, 1), 0.5 * (1 - contrast))])


def recolor(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply an affine map (3, 4) of RGB in [0, 1] to a uint8 image (h, w, 3)."""
    return cv2.transform(np.ascontiguousarray(image), matrix * [1, 1, 1, 255])
