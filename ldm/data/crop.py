"""Crops of images: choosing their place, and cutting the same crop from several images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import cv2
import numpy as np

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels; with `flip` it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    @classmethod
    def middle(cls, shape: Sequence[int], size: int) -> Self:
        """Return the centred square of side `size` in an image of shape (h, w, ...)."""
        return cls((shape[0] - size) // 2, (shape[1] - size) // 2, size, size)

    @classmethod
    def random(cls, shape: Sequence[int], size: int, rng: np.random.Generator) -> Self:
        """Return a random square of side `size` in an image of shape (h, w, ...)."""
        top = int(rng.integers(shape[0] - size + 1))
        left = int(rng.integers(shape[1] - size + 1))
        return cls(top, left, size, size)

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Return the crop of an image (h, w, ...) as a view."""
        part = image[self.top : self.top + self.height, self.left : self.left + self.width]
        return part[:, ::-1] if self.flip else part

    def grown(self, margin: int, shape: Sequence[int]) -> Self:
        """Return the crop with `margin` more pixels on each side, limited to an image (h, w, ...)."""
        top = max(0, self.top - margin)
        left = max(0, self.left - margin)
        height = min(shape[0], self.top + self.height + margin) - top
        width = min(shape[1], self.left + self.width + margin) - left
        return replace(self, top=top, left=left, height=height, width=width)

    def inside(self, outer: "Crop") -> Self:
        """Return this crop in the coordinates of a larger crop around it."""
        return replace(self, top=self.top - outer.top, left=self.left - outer.left)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator | None, candidates: int = 1) -> Crop:
    """Return the sharpest of `candidates` random squares of side `size`; without `rng` the centred one."""
    if rng is None:
        return Crop.middle(image.shape, size)
    crops = [Crop.random(image.shape, size, rng) for _ in range(candidates)]
    if candidates == 1:
        return crops[0]
    return max(crops, key=lambda crop: sharpness(crop.cut(image)))


def sharpness(image: np.ndarray) -> float:
    """Return the variance of the Laplacian of uint8 RGB (h, w, 3): near 0 if nothing is in focus."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def at_least(image: np.ndarray, size: int) -> np.ndarray:
    """Scale uint8 (h, w, 3) up until its shorter side is `size`; larger images are returned as they are."""
    height, width = image.shape[:2]
    factor = size / min(height, width)
    if factor <= 1:
        return image
    target = (max(size, round(width * factor)), max(size, round(height * factor)))
    return cv2.resize(image, target, interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class ScaledCrop:
    """Crop of an image that is first resized from `source` (h, w) to `scaled` (h, w)."""

    source: Size
    scaled: Size
    crop: Crop

    @classmethod
    def fit(cls, source: Sequence[int], size: int, rng: np.random.Generator | None = None) -> Self:
        """Return a square of side `size` of an image (h, w, ...) whose shorter side is scaled to `size`.

        It is centred, or with `rng` at a random position and flipped half the time.
        """
        source = (source[0], source[1])
        factor = size / min(source)
        scaled = (max(size, round(source[0] * factor)), max(size, round(source[1] * factor)))
        if rng is None:
            return cls(source, scaled, Crop.middle(scaled, size))
        crop = Crop.random(scaled, size, rng)
        return cls(source, scaled, replace(crop, flip=bool(rng.integers(2))))

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Return the crop of an image (h, w, 3) or (h, w)."""
        if self.scaled != self.source:
            shrinks = self.scaled[0] < self.source[0]
            method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            image = cv2.resize(image, self.scaled[::-1], interpolation=method)
        return np.ascontiguousarray(self.crop.cut(image))

    def cut_mask(self, mask: np.ndarray) -> np.ndarray:
        """Return the crop of a mask of 0 and 1 as uint8 0 and 1; a hole too thin for this scale is kept."""
        part = self.cut(mask.astype(np.float32))
        hole = part > 0.5
        return (hole if hole.any() else part > 0).astype(np.uint8)

    def over_hole(self, mask: np.ndarray) -> Self:
        """Return this crop moved over the hole of a mask: over its middle pixel in reading order."""
        pixels = np.argwhere(mask)
        middle = pixels[len(pixels) // 2] * self.scaled // mask.shape
        size = self.crop.height
        top, left = np.clip(middle - size // 2, 0, np.subtract(self.scaled, size)).tolist()
        return replace(self, crop=replace(self.crop, top=top, left=left))
