"""Damage of photographs, one small function for each kind, and chains of them.

A kind takes and gives float32 RGB (h, w, 3) in [0, 255]. The four of DEGRADATIONS have settings of their own;
the others have a strength: 0 is next to nothing, 1 as bad as such pictures get.
"""

import math
from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
from PIL import Image

from ldm.modules.image_degradation import blur as camera

DEGRADATIONS = ("downsample", "noise", "blur", "jpeg")  # the usual ones
Value = float | tuple[float, float]  # a setting, or the range from which it is drawn for every picture


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Float in [0, 255] -> uint8, clipped and rounded."""
    return np.rint(values.clip(0, 255)).astype(np.uint8)


def downsample(values: np.ndarray, rng: np.random.Generator, lr_scale: float) -> np.ndarray:
    """`lr_scale` times smaller and back, both bicubic."""
    height, width = values.shape[:2]
    size = max(1, int(width / lr_scale)), max(1, int(height / lr_scale))
    small = Image.fromarray(to_bytes(values)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def noise(values: np.ndarray, rng: np.random.Generator, noise_level: float) -> np.ndarray:
    """White Gaussian noise of standard deviation `noise_level`, 1 = white."""
    return values + rng.standard_normal(values.shape, dtype=np.float32) * (255 * noise_level)


def blur(values: np.ndarray, rng: np.random.Generator, blur_radius: float) -> np.ndarray:
    """Gaussian blur of standard deviation `blur_radius` in pixels."""
    if blur_radius <= 0:
        return values
    return cv2.GaussianBlur(values, (0, 0), blur_radius, borderType=cv2.BORDER_REFLECT)


def jpeg(values: np.ndarray, rng: np.random.Generator, jpeg_quality: float) -> np.ndarray:
    """A JPEG file of quality 1 to 100."""
    return camera.compress_jpeg(to_bytes(values), round(jpeg_quality)).astype(np.float32)


def motion_blur(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Camera shake in linear light: a path of 2 to 40 pixels for 512 (Boracchi & Foi 2012, as in blur.py)."""
    length = (2 + 38 * strength) * min(values.shape[:2]) / 512
    kernel = camera.motion_kernel(camera.motion_path(rng, length, rng.uniform(0, 0.7)))
    light = camera.convolve(camera.srgb_to_linear(to_bytes(values)), kernel)
    return camera.linear_to_srgb(light).astype(np.float32)


def colour_noise(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Blotches of colour that leave the brightness as it is: Cb and Cr of ITU-R BT.601 move by up to 0.06."""
    chroma = 255 * 0.06 * strength * smooth_noise(rng, (*values.shape[:2], 2), 1.5)
    to_rgb = np.array([[0, -0.344136, 1.772], [1.402, -0.714136, 0]], np.float32)  # of Cb and Cr
    return values + chroma @ to_rgb


def film_grain(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Grains of 2 pixels, the same in all channels; their deviation goes with sqrt(u (1 - u)) of brightness
    u (the Boolean model of Newson et al. 2017) and is up to 0.08 in the middle."""
    brightness = values.mean(axis=2, keepdims=True).clip(0, 255) / 255
    grain = smooth_noise(rng, (*values.shape[:2], 1), 0.8)
    return values + 255 * 0.16 * strength * np.sqrt(brightness * (1 - brightness)) * grain


def scratches(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Up to 12 scratches, mostly upright, and 60 grains of dust, white or black (Wan et al. 2020)."""
    height, width = values.shape[:2]
    for count, shade in ((strength, 255.0), (strength, 0.0)):
        cover = np.zeros((height, width), np.uint8)
        for _ in range(rng.binomial(12, count / 2)):
            x = rng.uniform(0, width) + np.cumsum(rng.normal(0, width / 60, 8))
            y = np.linspace(*np.sort(rng.uniform(-0.2, 1.2, 2)) * height, 8)
            points = np.rint(np.stack([x, y], axis=1)).astype(np.int32)
            cv2.polylines(cover, [points], False, int(rng.integers(90, 256)), 1, cv2.LINE_AA)
        for _ in range(rng.binomial(60, count / 2)):
            place = (int(rng.integers(width)), int(rng.integers(height)))
            radius = max(1, round(min(height, width) / 300 * rng.uniform(0.3, 2)))
            cv2.circle(cover, place, radius, int(rng.integers(90, 256)), -1, cv2.LINE_AA)
        opacity = cover[..., None].astype(np.float32) / 255
        values = values + opacity * (shade - values)
    return values


def fading(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Dyes fade, each at its own pace (Wilhelm & Brower 1993): blacks rise by up to 0.3, whites fall by 0.1,
    half of the colour goes, and a cast stays."""
    grey = values.mean(axis=2, keepdims=True)
    pale = grey + (1 - 0.5 * strength) * (values - grey)
    pace = np.exp(strength * rng.uniform(-0.35, 0.35, 3)).astype(np.float32)  # gamma of each channel
    cast = (pale.clip(0, 255) / 255) ** pace
    return 255 * (0.3 * strength + (1 - 0.4 * strength) * cast)


def low_light(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Up to 4 stops too dark, with the shot noise of so little light (Foi et al. 2008), in linear light."""
    light = camera.srgb_to_linear(to_bytes(values)) * np.float32(2 ** (-4 * strength))
    return camera.linear_to_srgb(camera.add_sensor_noise(light, rng, 0.002 * strength)).astype(np.float32)


def haze(values: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """I = J t + A (1 - t) with t = exp(-2 strength depth) (Koschmieder; He et al. 2009). The depth grows from
    the bottom to the top and with the clouds of a smooth noise, A is a bright grey."""
    height, width = values.shape[:2]
    clouds = smooth_noise(rng, (height, width, 1), min(height, width) / 8)
    depth = (np.linspace(1, 0.4, height, dtype=np.float32)[:, None, None] + 0.15 * clouds).clip(0.1, 1.5)
    veil = np.exp(-2 * strength * depth)
    return values * veil + 255 * np.float32(rng.uniform(0.75, 0.95)) * (1 - veil)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> np.ndarray:
    """Gaussian noise (h, w, c) of mean 0 and deviation 1 whose grains are `sigma` pixels wide; float32."""
    height, width, channels = shape
    step = max(1, int(sigma / 2))  # wide grains are drawn small
    small = rng.standard_normal((-(-height // step), -(-width // step), channels), dtype=np.float32)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step).reshape(small.shape)
    full = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(shape)
    return (full - full.mean()) / max(float(full.std()), 1e-6)


TAKEN, DEVELOPED = (haze, low_light, motion_blur), (downsample, noise, colour_noise, film_grain, blur)
LIFE = (*TAKEN, *DEVELOPED, fading, scratches, jpeg)  # of a picture, in this order
KINDS = {kind.__name__: kind for kind in LIFE}
# Each name of DEGRADATIONS with its setting.
SETTINGS = {"downsample": "lr_scale", "noise": "noise_level", "blur": "blur_radius", "jpeg": "jpeg_quality"}
LIMITS = {"lr_scale": (1, 64), "noise_level": (0, 1), "blur_radius": (0, 100), "jpeg_quality": (1, 100)}
LIMITS["damage_strength"] = (0, 1)


def degrade(
    image: np.ndarray,
    rng: np.random.Generator,
    types: Sequence[str] = DEGRADATIONS,
    lr_scale: Value = 8,
    noise_level: Value = 0.05,
    blur_radius: Value = 1.0,
    jpeg_quality: Value = 75,
    damage_strength: Value = (0.2, 0.8),
    order: str = "fixed",
    rounds: int = 1,
) -> np.ndarray:
    """Damage uint8 RGB (h, w, 3) by the kinds that `types` names.

    The chain is run through `rounds` times (Wang et al. 2021, Real-ESRGAN). Its `order` is fixed (that of
    KINDS), given (that of `types`) or random (drawn for every round).
    """
    own = {"lr_scale": lr_scale, "noise_level": noise_level, "blur_radius": blur_radius}
    own |= {"jpeg_quality": jpeg_quality, "damage_strength": damage_strength}
    names = list(types) if order == "given" else [name for name in KINDS if name in types]
    values = np.ascontiguousarray(image).astype(np.float32)
    for _ in range(rounds):
        for name in rng.permutation(names) if order == "random" else names:
            value = own[SETTINGS.get(name, "damage_strength")]
            drawn = rng.uniform(*value) if isinstance(value, tuple) else value
            values = KINDS[name](values, rng, drawn)
    return to_bytes(values)


def check_damage(types: Sequence[str], values: dict[str, Value]) -> None:
    """Raise ValueError for a kind that does not exist, a value outside its limits or a reversed range."""
    unknown = [name for name in types if name not in KINDS]
    if unknown:
        known = ", ".join([*DEGRADATIONS, *(name for name in KINDS if name not in DEGRADATIONS)])
        raise ValueError(f"unknown degradation {', '.join(unknown)}: choose from {known}")
    for name, value in values.items():
        ends, (lowest, highest) = value if isinstance(value, tuple) else (value, value), LIMITS[name]
        given = ",".join(f"{end:g}" for end in ends) if isinstance(value, tuple) else value
        if not all(math.isfinite(end) and lowest <= end <= highest for end in ends):
            raise ValueError(f"{name} must lie in {lowest} ... {highest}, not {given}")
        if ends[0] > ends[1]:
            raise ValueError(f"{name} {given} is reversed: write {ends[1]:g},{ends[0]:g} (lowest, highest)")


def damage_sheet(image: np.ndarray, types: Sequence[str], values: dict[str, Value]) -> np.ndarray:
    """A row for each kind: uint8 `image`, then damaged from the lowest to the highest of its range."""
    rows = []
    for name in types:
        setting = SETTINGS.get(name, "damage_strength")
        ends = values[setting] if isinstance(values[setting], tuple) else (values[setting],) * 2
        damaged = partial(degrade, image, types=(name,))
        at = [damaged(np.random.default_rng(0), **{setting: end}) for end in np.linspace(*ends, 4)]
        how = (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 0)
        rows.append(cv2.putText(np.hstack([image, *at]), name, *how))
    return np.vstack(rows)
