"""How close a restored image is to the sharp one: PSNR, SSIM, colour shift of uint8 RGB images."""

import cv2
import numpy as np

DATA_RANGE = 255.0  # of uint8: never guessed from the pixels
SIGMA, RADIUS = 1.5, 5  # the gaussian window of SSIM: 11 x 11, as cut by scikit-image at 3.5 sigma


def psnr(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 (h, w, 3) images in dB; infinite if they are equal.

    Raises ValueError if shapes differ or an image is not uint8.
    """
    _check(restored, sharp)
    error = np.square(restored.astype(np.float64) - sharp).mean()
    return float(10 * np.log10(DATA_RANGE**2 / error)) if error else float("inf")


def ssim(restored: np.ndarray, sharp: np.ndarray) -> float:
    """Structural similarity of two uint8 (h, w, 3) images in [-1, 1]: the mean over channels and pixels.

    Wang et al. 2004, equation 13, with a gaussian window of sigma 1.5 and population covariances: what
    scikit-image computes with `gaussian_weights=True, use_sample_covariance=False`. The published GoPro
    tables use a MATLAB script with a 3-D window over RGB and are about 0.03 higher.
    Raises ValueError if shapes differ, an image is not uint8, or a side is shorter than the window (11).
    """
    _check(restored, sharp)
    if min(sharp.shape[:2]) < 2 * RADIUS + 1:
        raise ValueError(
            f"SSIM needs images of at least 11 x 11 pixels, not {sharp.shape[1]} x {sharp.shape[0]}"
        )
    x, y = restored.astype(np.float64), sharp.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    variances = _window(x * x) - mean_x**2 + _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    return float(similarity[RADIUS:-RADIUS, RADIUS:-RADIUS].mean())


def rgb_shift(restored: np.ndarray, sharp: np.ndarray) -> tuple[float, float, float]:
    """Mean of restored - sharp in each channel, in steps of 1/255: what a colour cast would show."""
    _check(restored, sharp)
    red, green, blue = restored.mean((0, 1)) - sharp.mean((0, 1))
    return float(red), float(green), float(blue)


def _window(image: np.ndarray) -> np.ndarray:
    size = 2 * RADIUS + 1
    return cv2.GaussianBlur(image, (size, size), SIGMA, borderType=cv2.BORDER_REFLECT)


def _check(restored: np.ndarray, sharp: np.ndarray) -> None:
    if restored.shape != sharp.shape:
        raise ValueError(f"images of different shapes: {restored.shape} and {sharp.shape}")
    if restored.dtype != np.uint8 or sharp.dtype != np.uint8:
        raise ValueError(f"metrics want uint8 images, not {restored.dtype} and {sharp.dtype}")
