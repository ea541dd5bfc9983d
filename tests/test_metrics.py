import numpy as np
import pytest
from scipy.signal import convolve2d

from ldm.data.image import photographs, read_image
from ldm.metrics import known_mean, psnr, rgb_shift, ssim


@pytest.fixture(scope="module")
def pairs():
    random = np.random.default_rng(0)
    pairs = []
    for path in photographs(("coffee.png", "camera.png", "rocket.jpg")):
        sharp = read_image(path)[:121, 40:157]
        noise = random.normal(0, random.uniform(2, 30), sharp.shape)
        pairs.append(((sharp + noise).clip(0, 255).round().astype(np.uint8), sharp))
    flat = np.full((11, 40, 3), 128, np.uint8)
    return [*pairs, (flat + np.uint8(3), flat)]


def test_psnr_matches_formula(pairs):
    for restored, sharp in pairs:
        error = np.mean((restored.astype(float) - sharp) ** 2)
        assert psnr(restored, sharp) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-4)
    assert psnr(sharp, sharp) == float("inf")


def by_the_formula(x: np.ndarray, y: np.ndarray) -> float:
    """Compute SSIM of one channel (Wang et al. 2004, eq. 13) over all 11 x 11 windows inside the image."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(image: np.ndarray) -> np.ndarray:
        return convolve2d(image, window, mode="valid")

    x, y = x.astype(float), y.astype(float)
    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean()


def test_ssim_matches_formula(pairs):
    for restored, sharp in pairs:
        expected = np.mean([by_the_formula(restored[..., c], sharp[..., c]) for c in range(3)])
        assert ssim(restored, sharp) == pytest.approx(expected, abs=1e-4)
    assert ssim(sharp, sharp) == pytest.approx(1)


def test_rgb_shift_is_signed_and_per_channel():
    sharp = np.full((12, 12, 3), 100, np.uint8)
    restored = sharp + np.array([0, 5, 0], np.uint8)
    restored[..., 2] -= 2
    assert rgb_shift(restored, sharp) == (0, 5, -2)


def test_known_mean_ignores_nan():
    assert known_mean([1.0, float("nan"), 4.0]) == 2.5 and known_mean([1.0, float("inf")]) == float("inf")
    assert np.isnan(known_mean([float("nan")]))


def test_bad_input_raises():
    image = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match=r"different shapes: \(20, 20, 3\) and \(20, 10, 3\)"):
        psnr(image, image[:, :10])
    with pytest.raises(ValueError, match="uint8"):
        ssim(image.astype(np.float32), image)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, not 20 x 9"):
        ssim(image[:9], image[:9])
