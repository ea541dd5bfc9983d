"""Blurry and sharp crops for training: from pairs on disk, or from sharp pictures blurred on the fly."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.image import UNREADABLE, read_image, to_tensor
from ldm.data.pairs import Pair, check_alike
from ldm.data.stream import item_seed
from ldm.modules.image_degradation.blur import BLUR_TYPES, check_blur_types, random_blur

BLUR_MARGIN = 32  # pixels around a crop that are blurred with it, so that its borders are true
LUMA = np.array([0.299, 0.587, 0.114])

Key = int | tuple[int, int]


class ImageFiles:
    """Pictures on disk as uint8 RGB (h, w, 3) by key; with `cache` all are decoded once and kept."""

    def __init__(self, paths: Sequence[Path], cache: bool = False):
        self.paths, self.images = list(paths), None
        if cache:
            unique = list(dict.fromkeys(self.paths))
            with ThreadPoolExecutor() as threads:
                decoded = tqdm(threads.map(_decoded, unique), "reading images", len(unique), leave=False)
                self.images = dict(zip(unique, decoded, strict=True))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> np.ndarray:
        path = self.paths[_index(key)]
        image = self.images[path] if self.images else None
        return read_image(path) if image is None else image

    def name(self, key: Key) -> str:
        """Path of the picture."""
        return str(self.paths[_index(key)])


def _decoded(path: Path) -> np.ndarray | None:
    """The image, or None for one that cannot be read: that is an error only when it is asked for."""
    try:
        return read_image(path)
    except UNREADABLE:
        return None


def _index(key: Key) -> int:
    return key[1] if isinstance(key, tuple) else key


class Together:
    """Several sources of sharp pictures as one, such as ImageFiles and ldm.data.dead_leaves.DeadLeaves.

    `sources` are pairs of a source and how often each of its pictures comes in an epoch: that is the ratio.
    """

    def __init__(self, *sources: tuple[Any, int]):
        self.places = [
            (source, index) for source, times in sources for index in range(len(source)) for _ in range(times)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Key) -> np.ndarray:
        source, own = self.places[_index(key)]
        return source[key[0] if isinstance(key, tuple) else 0, own]

    def name(self, key: Key) -> str:
        """What the picture's own source calls it."""
        source, own = self.places[_index(key)]
        return source.name((key[0] if isinstance(key, tuple) else 0, own))


class CropDataset(Dataset):
    """What paired and synthesised data share: one window, one turn and one colour for both pictures.

    `dataset[(epoch, index)]` (or `dataset[index]`, which is epoch 0) is a dictionary of `blurry` and `sharp`,
    float32 (3, size, size) in [-1, 1], `path`, `blur_type` and the item's `seed`, on which all that is random
    depends. Pictures smaller than `size` are scaled up. Without `augment` the window is in the middle; with
    it the window is anywhere, flipped and turned by 90 degrees. `color_jitter` (0.1 is mild) varies
    brightness, contrast, saturation and white balance.
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
            turns, flip = rng.integers(4), rng.integers(2)
            blurry, sharp = (np.rot90(image[:, ::-1] if flip else image, turns) for image in (blurry, sharp))
        if self.color_jitter:
            matrix = color_matrix(rng, self.color_jitter)
            blurry, sharp = recolor(blurry, matrix), recolor(sharp, matrix)
        tensors = {"blurry": to_tensor(blurry), "sharp": to_tensor(sharp)}
        return {**tensors, "path": path, "blur_type": blur_type, "seed": seed}

    def resized(self, size: int) -> Self:
        """The same data in crops of another size."""
        other = copy(self)
        other.size = size
        return other

    def _crops(self, key: Key, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str, str]:
        """Blurry and sharp uint8 (size, size, 3), where they come from, and the blur type."""
        raise NotImplementedError

    def _window(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
        """Top left corner of the crop."""
        if self.augment:
            return int(rng.integers(height - self.size + 1)), int(rng.integers(width - self.size + 1))
        return (height - self.size) // 2, (width - self.size) // 2


class PairedDataset(CropDataset):
    """Crops of pairs on disk; the two pictures of a pair must have one size (ValueError names both).

    `look` are `augment` and `color_jitter` of CropDataset; with `cache` all images are kept in memory. With
    `match_colors` the sharp image gets the mean colour of the blurry one: the two sides of video data sets
    are averaged differently, and a network would learn that difference as a colour cast.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int,
        seed: int,
        cache: bool = False,
        match_colors: bool = False,
        **look: float,
    ):
        super().__init__(len(pairs), size, seed, **look)
        self.pairs, self.match_colors = list(pairs), match_colors
        self.blurry = ImageFiles([pair.blurry for pair in pairs], cache)
        self.sharp = ImageFiles([pair.sharp for pair in pairs], cache)

    def _crops(self, key: Key, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str, str]:
        pair, images = self.pairs[_index(key)], (self.blurry[key], self.sharp[key])
        check_alike(pair.blurry, pair.sharp, *(image.shape for image in images))
        images = [at_least(image, self.size) for image in images]
        y, x = self._window(*images[0].shape[:2], rng)
        blurry, sharp = (image[y : y + self.size, x : x + self.size] for image in images)
        if self.match_colors:
            shift = images[0].mean(axis=(0, 1)) - images[1].mean(axis=(0, 1))
            sharp = np.rint((sharp + shift).clip(0, 255)).astype(np.uint8)
        return blurry, sharp, str(pair.blurry), pair.blur_type


class BlurDataset(CropDataset):
    """Pairs from sharp pictures alone: the blur is new in every epoch.

    `images` is a list of paths, or anything with `len`, `images[key]` (uint8 RGB) and `images.name(key)`,
    such as ldm.data.dead_leaves.DeadLeaves. The surroundings of a crop are blurred with it, so that its
    borders are true. `blur_options` are those of `random_blur` (`scale`, `noise`, `jpeg_probability`), and
    `field`, the fall-off of lens blur, which a crop of a larger picture does not have.

    Of the pictures the part `sharp_fraction` is spared, so that a network learns to leave sharp pictures
    alone: half of these are not blurred at all, half by at most a quarter of the blur's size. Of
    `candidates` windows the sharpest is taken: in photographs of a shallow focus most are blurred.
    """

    def __init__(
        self,
        images: Sequence[Path] | ImageFiles,
        size: int,
        seed: int,
        augment: bool = False,
        color_jitter: float = 0.0,
        cache: bool = False,
        blur_types: Sequence[str] = tuple(BLUR_TYPES),
        sharp_fraction: float = 0.0,
        candidates: int = 1,
        field: tuple[float, float] | None = None,
        **blur_options: float,
    ):
        super().__init__(len(images), size, seed, augment, color_jitter)
        check_blur_types(blur_types)
        self.images = images if hasattr(images, "name") else ImageFiles(images, cache)
        self.blur_types, self.blur_options, self.field = tuple(blur_types), blur_options, field
        self.sharp_fraction, self.candidates = sharp_fraction, candidates

    def _crops(self, key: Key, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str, str]:
        image, name = at_least(self.images[key], self.size), self.images.name(key)
        windows = [self._window(*image.shape[:2], rng) for _ in range(self.candidates)]
        y, x = windows[0]
        if self.candidates > 1:
            crops = [image[y : y + self.size, x : x + self.size] for y, x in windows]
            y, x = windows[int(np.argmax([sharpness(crop) for crop in crops]))]
        types, options = self.blur_types, dict(self.blur_options)
        if self.sharp_fraction:
            spared = rng.random() / self.sharp_fraction  # below 1 for that part
            if spared < 0.5:
                sharp = image[y : y + self.size, x : x + self.size]
                return sharp, sharp, name, ""
            if spared < 1:
                options["scale"] = options.get("scale", 1.0) * rng.uniform(0, 0.25)
        if self.field is not None:
            types = [types[rng.integers(len(types))]]
            options |= {"field": self.field} if types == ["lens_blur"] else {}
        blurry, sharp, blur_type, _ = blur_crop(image, y, x, self.size, rng, types, **options)
        return blurry, sharp, name, blur_type


class MixedDataset(CropDataset):
    """Crops of `dataset`, the fraction `fraction` of them replaced by crops of any item of `pairs`."""

    def __init__(self, dataset: CropDataset, pairs: CropDataset, fraction: float):
        super().__init__(len(dataset), dataset.size, dataset.seed)
        self.dataset, self.pairs, self.fraction = dataset, pairs, fraction

    def __getitem__(self, key: Key) -> dict:
        own_seed = item_seed(self.seed, key)
        rng = np.random.default_rng([own_seed, 1])
        if rng.random() >= self.fraction:
            return self.dataset[key]
        return self.pairs[own_seed, int(rng.integers(len(self.pairs)))]

    def resized(self, size: int) -> Self:
        """The same data in crops of another size."""
        return MixedDataset(self.dataset.resized(size), self.pairs.resized(size), self.fraction)


def blur_crop(
    image: np.ndarray,
    y: int,
    x: int,
    size: int,
    rng: np.random.Generator,
    blur_types: Sequence[str] = tuple(BLUR_TYPES),
    **options: float,
) -> tuple[np.ndarray, np.ndarray, str, dict]:
    """Blur the window at (y, x) with its surroundings: blurry, sharp, blur type, parameters of the blur."""
    top, left = min(y, BLUR_MARGIN), min(x, BLUR_MARGIN)
    around = image[y - top : y + size + BLUR_MARGIN, x - left : x + size + BLUR_MARGIN]
    blurred, blur_type, parameters = random_blur(around, rng, blur_types, **options)
    return (
        blurred[top : top + size, left : left + size],
        image[y : y + size, x : x + size],
        blur_type,
        parameters,
    )


def crop_schedule(first: int, late: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """Crop sizes, each with the step where it ends: the late sizes share the last half of the steps."""
    parts = 2 * max(1, len(late))
    return [(size, steps - steps * (len(late) - n) // parts) for n, size in enumerate((first, *late))]


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian of uint8 RGB (h, w, 3): near 0 where nothing is in focus."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def at_least(image: np.ndarray, size: int) -> np.ndarray:
    """Scale uint8 (h, w, 3) up until its shorter side is `size`; larger pictures are returned as they are."""
    height, width = image.shape[:2]
    factor = size / min(height, width)
    if factor <= 1:
        return image
    target = max(size, round(width * factor)), max(size, round(height * factor))
    return cv2.resize(image, target, interpolation=cv2.INTER_CUBIC)


def color_matrix(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Random brightness, contrast, saturation and white balance as one affine map (3, 4) of RGB in [0, 1]."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    balance = rng.uniform(1 - strength / 2, 1 + strength / 2, 3)
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA  # towards each pixel's own grey
    mix = brightness * contrast * balance[:, None] * mix
    return np.hstack([mix, np.full((3, 1), 0.5 * (1 - contrast))])


def recolor(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply an affine map (3, 4) of RGB in [0, 1] to a uint8 picture (h, w, 3)."""
    return cv2.transform(np.ascontiguousarray(image), matrix * [1, 1, 1, 255])
