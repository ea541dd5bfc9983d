"""Camera blur for training pairs: motion, gaussian, defocus and lens blur, as a sensor would record them.

Light is linear on the sensor but not in the file, so every blur undoes the sRGB curve, convolves linear light
with a kernel that sums to 1 and has its centroid in the middle, adds sensor noise, and applies the curve.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np
from numpy.random import Generator
from scipy.special import ndtri

Parameters = dict[str, float | int]
Range = tuple[float, float]  # lowest and highest value of a random parameter

LEVELS = 65535  # steps of linear light in the look-up table back to sRGB
DARK_SIGNAL = 0.002  # signal of the sensor without light, as a fraction of full scale


# ---- light -----------------------------------------------------------------------------------------------


@cache
def _srgb_tables() -> tuple[np.ndarray, np.ndarray]:
    """Tabulate the sRGB curve (IEC 61966-2-1): 256 levels to light, LEVELS + 1 steps of light to levels."""
    encoded = np.arange(256) / 255
    to_linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    light = np.arange(LEVELS + 1) / LEVELS
    to_srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return to_linear.astype(np.float32), np.rint(to_srgb * 255).astype(np.uint8)


def srgb_to_linear(image: np.ndarray) -> np.ndarray:
    """Convert uint8 sRGB of any shape to float32 linear light in [0, 1]."""
    return cv2.LUT(image, _srgb_tables()[0])


def linear_to_srgb(light: np.ndarray) -> np.ndarray:
    """Convert float32 linear light (clipped to [0, 1]) to uint8 sRGB; exact inverse of `srgb_to_linear`."""
    steps = np.clip(light, 0, 1)
    steps *= np.float32(LEVELS)
    steps += np.float32(0.5)
    return cv2.LUT(steps.astype(np.uint16), _srgb_tables()[1])


@cache
def _gaussian_table() -> np.ndarray:
    return ndtri((np.arange(65536) + 0.5) / 65536).astype(np.float32)


def add_sensor_noise(light: np.ndarray, rng: Generator, gain: float) -> np.ndarray:
    """Add shot noise and dark noise of variance `gain * (light + DARK_SIGNAL)` in linear light."""
    noise = cv2.LUT(rng.integers(0, 65536, light.shape, dtype=np.uint16), _gaussian_table())
    deviation = np.maximum(light, 0)
    deviation += np.float32(DARK_SIGNAL)
    noise *= np.sqrt(deviation, out=deviation)
    noise *= np.float32(math.sqrt(gain))
    noise += light
    return noise


def compress_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress uint8 RGB (h, w, 3) to a JPEG of this quality (1..100) and decode it again."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


# ---- kernels: float32 (k, k), k odd, sum 1, centroid in the middle ----------------------------------------


def motion_path(rng: Generator, length: float, shake: float) -> np.ndarray:
    """Sample a path of the scene over the sensor in one exposure: (steps, 2) points x, y in pixels, mean 0.

    A random walk at constant speed (Boracchi & Foi, Modeling the Performance of Image Restoration from
    Motion Blur, IEEE TIP 2012): the velocity keeps its direction (inertia) except for gaussian tremor, a pull
    back to the start, and rare impulses that reverse it. `shake` 0 is a straight line, 1 a tangle; `length`
    is the length of the whole path in pixels.
    """
    steps = max(64, math.ceil(4 * length))
    time = 1 / (steps - 1)  # the exposure lasts 1, the speed is 1 path length per exposure
    position, velocity = 0j, np.exp(2j * math.pi * rng.random())
    tremor = (rng.standard_normal((steps - 1, 2)) @ [1, 1j]) * 2.5 * shake * math.sqrt(time)
    impulses = rng.random(steps - 1) < 3 * shake * time
    path = [position]
    for tremble, impulse in zip(tremor, impulses, strict=True):
        velocity = velocity + tremble - 6 * shake * time * position
        velocity = velocity / abs(velocity) * (-1 if impulse else 1)
        position = position + velocity * time
        path.append(position)
    points = np.array(path) * length
    return np.stack([points.real, points.imag], axis=1) - [points.real.mean(), points.imag.mean()]


def motion_kernel(path: np.ndarray) -> np.ndarray:
    """Return the kernel of a path (n, 2) with mean 0: each point is spread bilinearly over four pixels."""
    radius = math.ceil(np.abs(path).max()) + 1
    size = 2 * radius + 1
    corner = np.floor(path).astype(int)
    x, y = (path - corner).T
    index = (corner[:, 1] + radius) * size + corner[:, 0] + radius
    indices = np.concatenate([index, index + 1, index + size, index + size + 1])
    weights = np.concatenate([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]) / len(path)
    return np.bincount(indices, weights, size * size).reshape(size, size).astype(np.float32)


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Return a one-dimensional gaussian (k,) up to 3.5 sigma; its outer product is the blur kernel."""
    return cv2.getGaussianKernel(2 * math.ceil(3.5 * sigma) + 1, sigma, cv2.CV_32F)[:, 0]


def aperture_kernel(radius: float, blades: int = 0, angle: float = 0.0) -> np.ndarray:
    """Return the image of a point out of focus: a uniform disk, or a regular polygon of `blades` sides.

    `radius` is the radius in pixels of the disk or of the circle through the corners; `angle` in radians
    rotates the polygon. For antialiasing a pixel is the mean of 4 x 4 points, weighted by their distance to
    the edge.
    """
    radius = max(radius, 0.25)  # a smaller spot would miss all points, and covers one pixel anyway
    reach = math.ceil(radius + 0.5)
    fine = (np.arange(4 * (2 * reach + 1)) + 0.5) / 4 - reach - 0.5
    x, y = fine[None, :], fine[:, None]
    if blades:
        normals = angle + 2 * math.pi * np.arange(blades) / blades
        depth = np.max([x * math.cos(turn) + y * math.sin(turn) for turn in normals], axis=0)
        inside = radius * math.cos(math.pi / blades) - depth
    else:
        inside = radius - np.hypot(x, y)
    coverage = np.clip(0.5 + 4 * inside, 0, 1).reshape(2 * reach + 1, 4, 2 * reach + 1, 4).mean(axis=(1, 3))
    return (coverage / coverage.sum()).astype(np.float32)


def convolve(light: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve float32 (h, w) or (h, w, c) with an odd square kernel, borders reflected; same shape out."""
    return cv2.filter2D(light, -1, cv2.flip(kernel, -1), borderType=cv2.BORDER_REFLECT_101)


# ---- the four blurs ----------------------------------------------------------------------------------------
# uint8 RGB (h, w, 3) in, the same and the random parameters out; `camera` are the options of `record`.


def motion_blur(
    image: np.ndarray,
    rng: Generator,
    length: Range = (8.0, 40.0),
    shake: Range = (0.0, 0.7),
    scale: float = 1.0,
    **camera: float,
) -> tuple[np.ndarray, Parameters]:
    """Blur by camera shake on a path of `scale * length` pixels; `shake` 0 is a straight pan, 1 a tangle."""
    length = scale * rng.uniform(*length)
    shake = rng.uniform(*shake)
    path = motion_path(rng, length, shake)
    light = convolve(_light(image), motion_kernel(path))
    _, axes = np.linalg.eigh(np.cov(path.T))  # the last one is the main direction of the path
    angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1])) % 180
    return record(light, rng, {"length": length, "shake": shake, "angle": angle}, **camera)


def gaussian_blur(
    image: np.ndarray, rng: Generator, sigma: Range = (1.0, 5.0), scale: float = 1.0, **camera: float
) -> tuple[np.ndarray, Parameters]:
    """Blur with a gaussian of deviation `scale * sigma` pixels: haze, a soft lens, a rescaled image."""
    sigma = scale * rng.uniform(*sigma)
    kernel = gaussian_kernel(sigma)
    light = cv2.sepFilter2D(_light(image), -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return record(light, rng, {"sigma": sigma}, **camera)


def defocus_blur(
    image: np.ndarray, rng: Generator, radius: Range = (2.0, 8.0), scale: float = 1.0, **camera: float
) -> tuple[np.ndarray, Parameters]:
    """Defocus with the aperture wide open: a disk (circle of confusion) of `scale * radius` pixels."""
    radius = scale * rng.uniform(*radius)
    return record(convolve(_light(image), aperture_kernel(radius)), rng, {"radius": radius}, **camera)


def lens_blur(
    image: np.ndarray,
    rng: Generator,
    radius: Range = (3.0, 10.0),
    blades: tuple[int, int] = (5, 8),
    aberration: Range = (0.0, 0.06),
    field: Range = (0.0, 15.0),
    scale: float = 1.0,
    **camera: float,
) -> tuple[np.ndarray, Parameters]:
    """Defocus with the aperture stopped down: a rotated polygon of `blades` sides, radius `scale * radius`.

    Red is spread by the factor 1 + `aberration` and blue by 1 - `aberration` (axial chromatic aberration),
    and light falls off as cos^4 of the angle to the axis, which is `field` degrees in the corners.
    """
    radius, aberration, field = (rng.uniform(*limits) for limits in (radius, aberration, field))
    radius *= scale
    blades = int(rng.integers(blades[0], blades[1] + 1))
    angle = rng.uniform(0, 2 * math.pi / blades)
    spread = (1 + aberration, 1.0, 1 - aberration)  # red, green, blue
    falloff = vignette(*image.shape[:2], field)
    channels = [
        convolve(channel, aperture_kernel(radius * factor, blades, angle)) * falloff
        for channel, factor in zip(cv2.split(_light(image)), spread, strict=True)
    ]
    light = cv2.merge(channels)
    drawn = {"radius": radius, "blades": blades, "angle": math.degrees(angle)}
    return record(light, rng, {**drawn, "aberration": aberration, "field": field}, **camera)


def vignette(height: int, width: int, field: float) -> np.ndarray:
    """Return the cos^4 fall-off of light (height, width) for an angle of `field` degrees in the corners."""
    y = np.arange(height) - (height - 1) / 2
    x = np.arange(width) - (width - 1) / 2
    scale = math.tan(math.radians(field)) / max(math.hypot(x[0], y[0]), 1)
    y = (y * scale).astype(np.float32)
    x = (x * scale).astype(np.float32)
    return (1 + (y**2)[:, None] + x**2) ** -2  # cos^2 = 1 / (1 + tan^2)


def record(
    light: np.ndarray,
    rng: Generator,
    drawn: Parameters,
    noise: float | Range = 3e-4,
    jpeg_probability: float = 0.0,
) -> tuple[np.ndarray, Parameters]:
    """Record blurred light as a camera does: sensor noise, sRGB curve, 8 bits and perhaps a JPEG file.

    `noise` is the highest gain of `add_sensor_noise` (0 = none), sampled uniformly, or a range from which the
    gain is sampled log-uniformly; with `jpeg_probability` the image goes through a JPEG of quality 60 to 95.
    Returns the uint8 image, and `drawn` with the random parameters of this function added.
    """
    gain = float(np.exp(rng.uniform(*np.log(noise)))) if isinstance(noise, tuple) else rng.uniform(0, noise)
    quality = int(rng.integers(60, 96)) if rng.random() < jpeg_probability else None
    image = linear_to_srgb(add_sensor_noise(light, rng, gain) if gain else light)
    drawn = {**drawn, "noise": gain}
    if quality:
        image = compress_jpeg(image, quality)
        drawn["jpeg_quality"] = quality
    return image, {name: round(value, 6) for name, value in drawn.items()}


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is uint8 RGB (h, w, 3)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"a blur needs a uint8 image (h, w, 3), got {image.dtype} {image.shape}")


def _light(image: np.ndarray) -> np.ndarray:
    check_image(image)
    return srgb_to_linear(image)


BLUR_TYPES: dict[str, Callable[..., tuple[np.ndarray, Parameters]]] = {
    blur.__name__: blur for blur in (motion_blur, gaussian_blur, defocus_blur, lens_blur)
}


def random_blur(
    image: np.ndarray, rng: Generator, blur_types: Sequence[str] = tuple(BLUR_TYPES), **options: float
) -> tuple[np.ndarray, str, Parameters]:
    """Blur uint8 (h, w, 3) by a random one of `blur_types`; return the image, blur type and parameters.

    `options` are common to all blurs: `scale` (of all sizes in pixels) and those of `record`.

    Raises ValueError for an unknown blur type, or if `blur_types` is empty.
    """
    check_blur_types(blur_types)
    blur_type = blur_types[rng.integers(len(blur_types))]
    blurred, parameters = BLUR_TYPES[blur_type](image, rng, **options)
    return blurred, blur_type, parameters


def check_blur_types(blur_types: Sequence[str]) -> None:
    """Raise ValueError if `blur_types` is empty or holds an unknown name."""
    unknown = [name for name in blur_types if name not in BLUR_TYPES]
    if unknown or not blur_types:
        given = ", ".join(map(repr, unknown)) or "none given"
        raise ValueError(f"unknown blur type ({given}): choose from {', '.join(BLUR_TYPES)}")
