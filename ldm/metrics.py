"""How close a restored image is to the sharp one: PSNR, SSIM, colour and pixel shift, spectrum, all uint8."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.registration import phase_cross_correlation

DATA_RANGE = 255  # of uint8: never guessed from the pixels


def psnr(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 (h, w, 3) images in dB; infinite if they are equal.

    Raises ValueError if shapes differ or an image is not uint8.
    """
    _check(restored, sharp)
    if np.array_equal(restored, sharp):
        return float("inf")
    return float(peak_signal_noise_ratio(sharp, restored, data_range=DATA_RANGE))


def ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Structural similarity of two uint8 (h, w, 3) images in [-1, 1]: the mean over channels and pixels.

    Wang et al. 2004, equation 13, with a gaussian window of sigma 1.5 and population covariances, by
    scikit-image. The published GoPro tables use a window over the channels too: harness.scores.ssim3d.
    Raises ValueError if shapes differ, an image is not uint8, or a side is shorter than the window (11).
    """
    _check(restored, sharp)
    if min(sharp.shape[:2]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, not {sharp.shape[1]} x {sharp.shape[0]}")
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(restored, sharp, data_range=DATA_RANGE, channel_axis=2, **window))


def rgb_shift(restored: np.ndarray, sharp: np.ndarray) -> tuple[float, float, float]:
    """Mean of restored - sharp in each channel, in steps of 1/255: what a colour cast would show."""
    _check(restored, sharp)
    red, green, blue = restored.mean((0, 1)) - sharp.mean((0, 1))
    return float(red), float(green), float(blue)


def misalignment(restored: np.ndarray, sharp: np.ndarray) -> tuple[float, float]:
    """By how many pixels a picture is shifted, and by how many its corners are moved by a zoom.

    The cross-correlation's peak is found to 0.01 pixel (Guizar-Sicairos et al. 2008) in each quarter of the
    grey pictures, under a Hann window; shift and zoom fit these best, quarters with more contrast counting
    more. It is not whitened as in plain phase correlation, which goes astray where the restored picture lacks
    fine detail. The windows stay where they are, which makes both too small by about a tenth.
    Raises ValueError if shapes differ, an image is not uint8, or a side is below 32.
    """
    _check(restored, sharp)
    if min(sharp.shape[:2]) < 32:
        raise ValueError(f"alignment needs 32 x 32 pixels, not {sharp.shape[1]} x {sharp.shape[0]}")
    h, w = (side // 2 for side in sharp.shape[:2])
    window, rows, found = np.outer(np.hanning(h), np.hanning(w)), [], []
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = slice(y * h, y * h + h), slice(x * w, x * w + w)
        grey = [image[here].mean(axis=2) for image in (sharp, restored)]
        moved = [(part - part.mean()) * window for part in grey]
        dy, dx = -phase_cross_correlation(*moved, upsample_factor=100, normalization=None)[0]
        weight = np.hypot(*np.gradient(grey[0])).mean()
        rows += [[weight, 0, weight * (x - 0.5) * w], [0, weight, weight * (y - 0.5) * h]]
        found += [weight * dx, weight * dy]
    shift_x, shift_y, zoom = np.linalg.lstsq(np.array(rows), np.array(found))[0]
    return float(np.hypot(shift_x, shift_y)), float(abs(zoom) * np.hypot(h, w))


def radial_power(image: np.ndarray) -> np.ndarray:
    """Radially averaged power spectrum of the grey of a square uint8 (n, n, 3) image: (n // 2,), without DC.

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
    """How far apart the mean radial spectra (images, k) of two sets are: mean |difference| in decades."""
    means = (np.log10(values.mean(axis=0) + 1e-12) for values in (powers, others))
    return float(np.abs(np.subtract(*means)).mean())


def _check(restored: np.ndarray, sharp: np.ndarray) -> None:
    if restored.shape != sharp.shape:
        raise ValueError(f"images of different shapes: {restored.shape} and {sharp.shape}")
    if restored.dtype != np.uint8 or sharp.dtype != np.uint8:
        raise ValueError(f"metrics want uint8 images, not {restored.dtype} and {sharp.dtype}")
