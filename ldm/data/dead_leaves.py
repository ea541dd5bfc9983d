"""Dead leaves: synthetic sharp images of overlapping textured shapes, made without photos.

Lee, Mumford and Huang (Occlusion Models for Natural Images, IJCV 2001) showed that shapes with power-law
sizes that occlude one another have the edges and scales of photos; Achddou, Gousseau and Ladjal
(Synthetic Images as a Regularity Prior for Image Restoration Neural Networks, SSVM 2021) trained restoration
networks on them.
"""

import math

import cv2
import numpy as np

from ldm.data.stream import Key, item_seed

FINE = 2  # images are drawn at this scale and then reduced, which antialiases the edges
SHIFT = 4  # cv2 takes coordinates in 1/16 pixel
COVER = 4  # mean number of leaves over a point: about e^-4 of all points show the background
SMALLEST, LARGEST = 1 / 64, 1 / 3  # radii as fractions of the size
CORNERS = np.array([3, 4, 4, 5, 6, 24, 24, 24])  # numbers of corners to choose from; 24 is almost a disk


def dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an image, uint8 RGB (size, size, 3): every leaf has its own colour, shade, stripes and grain."""
    labels = _labels(size, rng).astype(np.intp)  # (fine, fine), 0 is the background
    count = labels.max() + 1
    y, x = np.indices(labels.shape, np.float32) / FINE
    grey = rng.uniform(20, 235, (count, 1))
    color = np.clip(grey + rng.normal(0, 28, (count, 3)), 0, 255).astype(np.float32)

    shade = _waves(rng, count, wavelength=(size / 2, 4 * size), amplitude=40)
    stripes = _waves(rng, count, wavelength=(4, 40), amplitude=60 * (rng.random(count) < 0.3))
    light = np.zeros_like(x)
    for wave in (shade, stripes):
        across, down, phase, amplitude = (values[labels] for values in wave)
        light += amplitude * np.sin(across * x + down * y + phase)
    light += rng.gamma(0.7, 12, count).astype(np.float32)[labels] * _grain(labels.shape, rng)

    image = color.take(labels, axis=0) + light[..., None]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def leaf_radii(count: int, smallest: float, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Sample radii (count,) with density ~ r^-3 between two limits, the only scale-invariant distribution."""
    low, high = smallest**-2, largest**-2
    return (low - rng.random(count) * (low - high)) ** -0.5


def _labels(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw leaves and return each point's front leaf: int32 (FINE * size, FINE * size), 0 for none."""
    mean_square = 2 * math.log(LARGEST / SMALLEST) / (SMALLEST**-2 - LARGEST**-2)  # of the radius
    count = math.ceil(COVER / (0.65 * math.pi * mean_square))  # a leaf has about 0.65 of its disk's area
    radius = size * leaf_radii(count, SMALLEST, LARGEST, rng)
    corners = rng.choice(CORNERS, count)
    turn = rng.uniform(0, 2 * math.pi, count)
    stretch = rng.uniform(0.5, 1.0, count)  # short axis over long axis
    angle = 2 * math.pi * np.arange(CORNERS.max()) / corners[:, None]  # (count, 24), `corners` of them used
    along = np.cos(angle) * radius[:, None]
    across = np.sin(angle) * (radius * stretch)[:, None]
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    points = np.stack([cos * along - sin * across, sin * along + cos * across], axis=-1)  # (count, 24, 2)
    points += rng.uniform(0, size, (count, 1, 2))
    points = np.rint(points * FINE * 2**SHIFT).astype(np.int32)
    labels = np.zeros((FINE * size, FINE * size), np.int32)
    for label, (outline, used) in enumerate(zip(points, corners.tolist(), strict=True), start=1):
        cv2.fillConvexPoly(labels, outline[:used], label, shift=SHIFT)
    return labels


def _waves(
    rng: np.random.Generator, count: int, wavelength: tuple[float, float], amplitude: float | np.ndarray
) -> tuple[np.ndarray, ...]:
    """Sample a wave per leaf: angular frequency across and down, phase, amplitude; each float32 (count,)."""
    frequency = 2 * math.pi / np.exp(rng.uniform(*np.log(wavelength), count))
    turn, phase = rng.uniform(0, 2 * math.pi, (2, count))
    wave = frequency * np.cos(turn), frequency * np.sin(turn), phase, rng.random(count) * amplitude
    return tuple(values.astype(np.float32) for values in wave)


def _grain(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Sample noise of four octaves with standard deviation about 1."""
    total = np.zeros(shape, np.float32)
    for octave in range(1, 5):
        coarse = (shape[0] // 2**octave + 1, shape[1] // 2**octave + 1)
        noise = rng.standard_normal(coarse, dtype=np.float32)
        total += cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return total / 1.5


class DeadLeaves:
    """Source of dead leaves for ldm.data.paired.BlurDataset: `length` new images in every epoch."""

    def __init__(self, size: int, length: int, seed: int):
        if size < 8:
            raise ValueError(f"the size of dead leaves must be at least 8 pixels, not {size}")
        self.size, self.length, self.seed = size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> np.ndarray:
        return dead_leaves(self.size, np.random.default_rng([item_seed(self.seed, key), self.size]))

    def name(self, key: Key) -> str:
        """Return a display name, where other sources return a path."""
        return f"dead leaves {key}"
