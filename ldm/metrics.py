"""How close a restored image is to the sharp one: PSNR, SSIM, colour shift of uint8 RGB images."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

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
    scikit-image. The published GoPro tables use a MATLAB script with a 3-D window over RGB and are about
    0.03 higher.
    Raises ValueError if shapes differ, an image is not uint8, or a side is shorter than the window (11).
    """
    _check(restored, sharp)
    if min(sharp.shape[:2]) < 11:
        raise ValueError(
            f"SSIM needs images of at least 11 x 11 pixels, not {sharp.shape[1]} x {sharp.shape[0]}"
        )
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(restored, sharp, data_range=DATA_RANGE, channel_axis=2, **window))


def rgb_shift(restored: np.ndarray, sharp: np.ndarray) -> tuple[float, float, float]:
    """Mean of restored - sharp in each channel, in steps of 1/255: what a colour cast would show."""
    _check(restored, sharp)
    red, green, blue = restored.mean((0, 1)) - sharp.mean((0, 1))
    return float(red), float(green), float(blue)


def _check(restored: np.ndarray, sharp: np.ndarray) -> None:
    if restored.shape != sharp.shape:
        raise ValueError(f"images of different shapes: {restored.shape} and {sharp.shape}")
    if restored.dtype != np.uint8 or sharp.dtype != np.uint8:
        raise ValueError(f"metrics want uint8 images, not {restored.dtype} and {sharp.dtype}")
