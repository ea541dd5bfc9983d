"""Metrics of restored against sharp uint8 images: PSNR, SSIM, colour shift, spectrum."""

import math
from collections.abc import Iterable

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

DATA_RANGE = 255  # of uint8: never guessed from the pixels


def psnr(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 (h, w, 3) images in dB; infinite if they are equal.

    Raises ValueError if shapes differ or an image is not uint8.
    """
    _check(restored, sharp)
    if np.array_equal(restored, sharp):
        return float("inf")
    return float(peak_signal_noise_ratio(sharp, restored, data_range=DATA_RANGE))


def ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Return the structural similarity, in [-1, 1], of two uint8 (h, w, 3) images: the mean over all values.

    Wang et al. 2004, equation 13, with a gaussian window of sigma 1.5 and population covariances, by
    scikit-image. The published GoPro tables use a window that includes channels: see harness.scores.ssim3d.
    Raises ValueError if shapes differ, an image is not uint8, or a side is shorter than the window (11).
    """
    _check(restored, sharp)
    if min(sharp.shape[:2]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, not {sharp.shape[1]} x {sharp.shape[0]}")
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(restored, sharp, data_range=DATA_RANGE, channel_axis=2, **window))


def rgb_shift(restored: np.ndarray, sharp: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of restored - sharp in each channel, in steps of 1/255: the colour cast."""
    _check(restored, sharp)
    red, green, blue = restored.mean((0, 1)) - sharp.mean((0, 1))
    return float(red), float(green), float(blue)


def radial_power(image: np.ndarray) -> np.ndarray:
    """Average the power spectrum of the grey values of uint8 (n, n, 3) over circles: (n // 2,), without DC.

    Entry k - 1 is the mean power at k cycles per image, under a Hann window, of values in [0, 1].
    Raises ValueError if the image is not square.
    """
    size = image.shape[0]
    if image.shape[1] != size:
        raise ValueError(f"a radial spectrum needs a square image, not {image.shape[1]} x {size}")
    grey = image.mean(axis=2) / DATA_RANGE
    window = np.hanning(size)
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window)) ** 2
    cycles = np.fft.fftfreq(size, 1 / size)
    radius = np.rint(np.hypot(cycles[:, None], cycles)).astype(int).ravel()
    return (np.bincount(radius, power.ravel()) / np.bincount(radius))[1 : size // 2 + 1]


def spectrum_distance(powers: np.ndarray, others: np.ndarray) -> float:
    """Return the mean |difference|, in decades, of the mean radial spectra (images, k) of two sets."""
    means = (np.log10(values.mean(axis=0) + 1e-12) for values in (powers, others))
    return float(np.abs(np.subtract(*means)).mean())


def known_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN (could not be measured); NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _check(restored: np.ndarray, sharp: np.ndarray) -> None:
    if restored.shape != sharp.shape:
        raise ValueError(f"images of different shapes: {restored.shape} and {sharp.shape}")
    if restored.dtype != np.uint8 or sharp.dtype != np.uint8:
        raise ValueError(f"metrics want uint8 images, not {restored.dtype} and {sharp.dtype}")
