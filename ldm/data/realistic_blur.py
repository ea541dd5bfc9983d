"""Training pairs made from sharp images as real cameras degrade them: the recipe and its data set."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from ldm.data.crop import Crop, at_least, random_crop
from ldm.data.paired import BLUR_MARGIN, BLUR_NAMES, CropDataset, Crops
from ldm.data.stream import Key
from ldm.modules.image_degradation.blur import compress_jpeg, random_blur
from ldm.modules.image_degradation.shake import camera_shake


@dataclass(frozen=True)
class RealisticBlur:
    """Recipe that degrades photos as real cameras do: fractions of the samples, sizes in pixels.

    The choices follow what Rim et al. measured (Realistic Blur Synthesis for Learning Image Deblurring, ECCV
    2022): noise matters most, then the sRGB curve, saturated highlights and the camera's processing.
    """

    shake: float = 0.65  # varying camera shake
    motion: float = 0.05  # one motion kernel for the whole crop
    optical: float = 0.15  # defocus, lens or gaussian blur
    both: float = 0.05  # defocus or lens blur at half size, then shake; the rest stays sharp
    simple: float = 0.25  # of all samples: only one of BLUR_TYPES, without noise, tone curve or JPEG
    photo_scales: tuple[float, ...] = (1.0, 0.6, 0.36)  # photos are shrunk before they are blurred
    shrink_after: float = 0.3  # the blurred image is scaled down by 0.5 to 0.9
    noise: tuple[float, float] = (1e-6, 2e-3)  # gain of the sensor's noise, log-uniform
    tone_curve: float = 0.25  # strongest change of contrast by the camera's tone curve
    jpeg: float = 0.35
    jpeg_quality: tuple[int, int] = (50, 98)
    shortest_path: float = 6.0
    longest_path: float = 60.0  # and no longer than a quarter of the crop: a crop must show the path


class RealisticBlurDataset(CropDataset):
    """Pairs from sharp images alone, degraded by `recipe` (default: RealisticBlur()), anew in every epoch.

    `images` as in BlurDataset. Of `candidates` crops the sharpest is taken.
    """

    def __init__(
        self,
        images: Any,
        size: int,
        seed: int,
        candidates: int = 1,
        recipe: RealisticBlur | None = None,
        **options: float,
    ):
        super().__init__(len(images), size, seed, **options)
        self.images, self.candidates = images, candidates
        self.recipe = recipe or RealisticBlur()

    def _crops(self, key: Key, rng: np.random.Generator) -> Crops:
        image = at_least(self.images[key], self.size)
        simple = rng.random() < self.recipe.simple
        shrink = rng.uniform(0.5, 0.9) if rng.random() < self.recipe.shrink_after else 1.0
        shortest = min(image.shape[:2])
        if simple or self.size / shrink > shortest:
            shrink = 1.0
        size = round(self.size / shrink)  # of the crop when it is blurred
        scales = [scale for scale in self.recipe.photo_scales if size <= shortest * scale]
        scale = scales[rng.integers(len(scales))] if scales else size / shortest
        around, crop = self._surroundings(image, size, scale, rng)
        sharp = crop.cut(around)
        if simple:
            blur_type = BLUR_NAMES[rng.integers(len(BLUR_NAMES))]
            blurred, _, _ = random_blur(around, rng, [blur_type], **blur_options(blur_type))
            return crop.cut(blurred), sharp, self.images.name(key), blur_type
        blurred, blur_type = self._degrade(around, rng)
        blurry = crop.cut(blurred)
        if size != self.size:
            target = (self.size, self.size)
            sharp = cv2.resize(sharp, target, interpolation=cv2.INTER_AREA)
            blurry = cv2.resize(blurry, target, interpolation=cv2.INTER_AREA)
        curve = tone_curve(rng.uniform(-self.recipe.tone_curve, self.recipe.tone_curve))
        blurry, sharp = cv2.LUT(blurry, curve), cv2.LUT(sharp, curve)
        if blur_type and rng.random() < self.recipe.jpeg:
            low, high = self.recipe.jpeg_quality
            blurry = compress_jpeg(blurry, int(rng.integers(low, high + 1)))
        return blurry, sharp, self.images.name(key), blur_type

    def _surroundings(
        self, image: np.ndarray, size: int, scale: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, Crop]:
        """Return a part of the image at `scale`: a crop of `size` pixels with a margin around it."""
        side = min(int(np.ceil(size / scale)), *image.shape[:2])
        crop = random_crop(image, side, rng, self.candidates)
        around = crop.grown(int(BLUR_MARGIN / scale), image.shape)
        crop = crop.inside(around)
        part = around.cut(image)
        if scale != 1:
            target = (round(part.shape[1] * scale), round(part.shape[0] * scale))
            target = (max(target[0], size), max(target[1], size))
            part = cv2.resize(part, target, interpolation=cv2.INTER_AREA)
        top = min(round(crop.top * scale), part.shape[0] - size)
        left = min(round(crop.left * scale), part.shape[1] - size)
        return part, Crop(top, left, size, size)

    def _degrade(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Blur by a type sampled from the recipe; return the image and the type ("" = left sharp)."""
        recipe = self.recipe
        noise = {"noise": recipe.noise}
        longest = max(2.0, min(recipe.longest_path, self.size / 4))
        path = {"length": (min(recipe.shortest_path, longest / 2), longest)}
        drawn = rng.random()
        if drawn < recipe.shake:
            return camera_shake(image, rng, **path, **noise)[0], "camera_shake"
        drawn -= recipe.shake
        if drawn < recipe.motion:
            scale = longest / recipe.longest_path
            return random_blur(image, rng, ["motion_blur"], scale=scale, **noise)[0], "motion_blur"
        drawn -= recipe.motion
        if drawn < recipe.optical:
            return self._optical_blur(image, rng, 1.0, **noise)
        drawn -= recipe.optical
        if drawn < recipe.both:
            image, _ = self._optical_blur(image, rng, 0.5, noise=0.0)
            return camera_shake(image, rng, **path, **noise)[0], "two_blurs"
        if rng.random() < 0.5:
            return image, ""
        return self._optical_blur(image, rng, rng.uniform(0, 0.25), **noise)

    def _optical_blur(
        self, image: np.ndarray, rng: np.random.Generator, scale: float, **options: Any
    ) -> tuple[np.ndarray, str]:
        types = ("defocus_blur", "lens_blur", "gaussian_blur")
        blur_type = types[rng.integers(3)]
        return random_blur(image, rng, [blur_type], scale=scale, **blur_options(blur_type), **options)[:2]


def blur_options(blur_type: str) -> dict[str, Any]:
    """Return options for blurring a crop: light falls off towards the corners of a photo, not of a crop."""
    return {"field": (0.0, 0.0)} if blur_type == "lens_blur" else {}


def tone_curve(strength: float) -> np.ndarray:
    """Return a camera's tone curve as a table of 256 levels: an S-curve, or its inverse if strength < 0."""
    level = np.arange(256) / 255
    curve = level + strength * np.sin(2 * np.pi * (level - 0.5)) / (2 * np.pi)
    return np.rint(curve.clip(0, 1) * 255).astype(np.uint8)
