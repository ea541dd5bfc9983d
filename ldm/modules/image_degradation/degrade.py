"""Degradation of photographs: one small function for each kind, and chains of them.

A kind takes and returns float32 RGB (h, w, 3) in [0, 255]. The four in DEGRADATIONS have parameters of their
own; the others have a strength from 0 (hardly visible) to 1 (as bad as such photographs get).
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from ldm.modules.image_degradation import blur as camera

DEGRADATIONS = ("downsample", "noise", "blur", "jpeg")  # the default ones
Value = float | tuple[float, float]  # a number, or the range to sample it from for every image


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Convert floats in [0, 255] to uint8, clipped and rounded."""
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def downsample(values: np.ndarray, rng: np.random.Generator, lr_scale: float) -> np.ndarray:
    """Shrink `lr_scale` times and enlarge again, both bicubic."""
    height, width = values.shape[:2]
    size = max(1, int(width / lr_scale)), max(1, int(height / lr_scale))
    small = Image.fromarray(to_bytes(values)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def noise(values: np.ndarray, rng: np.random.Generator, noise_level: float) -> np.ndarray:
    """Add white Gaussian noise with a standard deviation of `noise_level` * 255."""
    return values + rng.standard_normal(values.shape, dtype=np.float32) * (255 * noise_level)


def blur(values: np.ndarray, rng: np.random.Generator, blur_radius: float) -> np.ndarray:
    """Apply a Gaussian blur of standard deviation `blur_radius` in pixels."""
    if blur_radius <= 0:
        return values
    return cv2.GaussianBlur(values, (0, 0), blur_radius, borderType=cv2.BORDER_REFLECT)


def jpeg(values: np.ndarray, rng: np.random.Generator, jpeg_quality: float) -> np.ndarray:
    """Compress as a JPEG file of quality 1 to 100."""
    return camera.compress_jpeg(to_bytes(values), round(jpeg_quality)).astype(np.float32)


def motion_blur(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Add camera shake in linear light: 2 to 40 pixels per 512 (Boracchi & Foi 2012, as in blur.py)."""
    length = (2 + 38 * strength) * min(values.shape[:2]) / 512
    kernel = camera.motion_kernel(camera.motion_path(rng, length, rng.uniform(0, 0.7)))
    light = camera.convolve(camera.srgb_to_linear(to_bytes(values)), kernel)
    return camera.linear_to_srgb(light).astype(np.float32)


def film_grain(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Add grains of 2 pixels, the same in all channels. Their deviation is proportional to sqrt(u (1 - u)) at
    brightness u (the Boolean model of Newson et al. 2017), up to 0.08 at u = 0.5."""
    brightness = values.mean(axis=2, keepdims=True).clip(0, 255) / 255
    grain = rng.standard_normal((*values.shape[:2], 1), dtype=np.float32)
    grain = cv2.GaussianBlur(grain, (0, 0), 0.8)[..., None]
    grain = (grain - grain.mean()) / max(float(grain.std()), 1e-6)
    return values + 255 * 0.16 * strength * np.sqrt(brightness * (1 - brightness)) * grain


def scratches(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Draw upright scratches and dust, white or black: about 12 and 60 at strength 1 (Wan et al. 2020)."""
    height, width = values.shape[:2]
    for shade in (255.0, 0.0):
        cover = np.zeros((height, width), np.uint8)
        for _ in range(rng.binomial(12, strength / 2)):
            x = rng.uniform(0, width) + np.cumsum(rng.normal(0, width / 60, 8))
            y = np.linspace(*np.sort(rng.uniform(-0.2, 1.2, 2)) * height, 8)
            points = np.rint(np.stack([x, y], axis=1)).astype(np.int32)
            cv2.polylines(cover, [points], False, int(rng.integers(90, 256)), 1, cv2.LINE_AA)
        for _ in range(rng.binomial(60, strength / 2)):
            place = (int(rng.integers(width)), int(rng.integers(height)))
            radius = max(1, round(min(height, width) / 300 * rng.uniform(0.3, 2)))
            cv2.circle(cover, place, radius, int(rng.integers(90, 256)), -1, cv2.LINE_AA)
        opacity = cover[..., None].astype(np.float32) / 255
        values = values + opacity * (shade - values)
    return values


def fading(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Fade the dyes (Wilhelm & Brower 1993): blacks rise by up to 0.3, whites fall by 0.1, half of the
    saturation is lost, and a colour cast remains because each dye fades at its own rate."""
    grey = values.mean(axis=2, keepdims=True)
    pale = grey + (1 - 0.5 * strength) * (values - grey)
    pace = np.exp(strength * rng.uniform(-0.35, 0.35, 3)).astype(np.float32)  # gamma of each channel
    cast = (pale.clip(0, 255) / 255) ** pace
    return 255 * (0.3 * strength + (1 - 0.4 * strength) * cast)


def low_light(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Darken by up to 4 stops in linear light, with the shot noise of so little light (Foi et al. 2008)."""
    light = camera.srgb_to_linear(to_bytes(values)) * np.float32(2 ** (-4 * strength))
    return camera.linear_to_srgb(camera.add_sensor_noise(light, rng, 0.002 * strength)).astype(np.float32)


# In the order of a photograph's life: taken, developed, kept, scanned.
LIFE = (low_light, motion_blur, downsample, noise, film_grain, blur, fading, scratches, jpeg)
KINDS = {kind.__name__: kind for kind in LIFE}
# The parameter of each kind in DEGRADATIONS, and the limits of all parameters.
VALUES = {"downsample": "lr_scale", "noise": "noise_level", "blur": "blur_radius", "jpeg": "jpeg_quality"}
STRENGTH = "degradation_strength"  # parameter of all other kinds
LIMITS = {
    "lr_scale": (1, 64),
    "noise_level": (0, 1),
    "blur_radius": (0, 100),
    "jpeg_quality": (1, 100),
    STRENGTH: (0, 1),
}


def degrade(
    image: np.ndarray,
    rng: np.random.Generator,
    types: Sequence[str] = DEGRADATIONS,
    lr_scale: Value = 8,
    noise_level: Value = 0.05,
    blur_radius: Value = 1.0,
    jpeg_quality: Value = 75,
    degradation_strength: Value = (0.2, 0.8),
) -> np.ndarray:
    """Degrade uint8 RGB (h, w, 3) by the kinds in `types`, in the order of KINDS."""
    given = {
        "lr_scale": lr_scale,
        "noise_level": noise_level,
        "blur_radius": blur_radius,
        "jpeg_quality": jpeg_quality,
        STRENGTH: degradation_strength,
    }
    values = np.ascontiguousarray(image).astype(np.float32)
    for name, kind in KINDS.items():
        if name not in types:
            continue
        value = given[VALUES.get(name, STRENGTH)]
        if isinstance(value, tuple):
            value = rng.uniform(*value)
        values = kind(values, rng, value)
    return to_bytes(values)


def check_degradation(types: Sequence[str], values: dict[str, Value]) -> None:
    """Raise ValueError for an unknown kind, a value outside its limits or a reversed range."""
    unknown = [name for name in types if name not in KINDS]
    if unknown:
        known = ", ".join([*DEGRADATIONS, *(name for name in KINDS if name not in DEGRADATIONS)])
        raise ValueError(f"unknown degradation {', '.join(unknown)}: choose from {known}")
    for name, value in values.items():
        low, high = value if isinstance(value, tuple) else (value, value)
        least, most = LIMITS[name]
        text = f"{low:g},{high:g}" if isinstance(value, tuple) else f"{value:g}"
        if not all(math.isfinite(end) and least <= end <= most for end in (low, high)):
            raise ValueError(f"{name} must lie in {least} ... {most}, not {text}")
        if low > high:
            raise ValueError(f"{name} {text} is reversed: write {high:g},{low:g} (lowest, highest)")
