"""The blind Wiener filter: filter bank, spectra, overlap-add and training."""

import math

import cv2
import numpy as np
import pytest
import torch

from ldm.data.image import photographs, read_image
from ldm.modules import blind_wiener
from ldm.modules.blind_wiener import BlindWiener, filter_bank, polar_matrix, ring_radii, transfer_functions
from tests.fill import fill

MOTION = len(blind_wiener.LENGTHS) * blind_wiener.BANK_ANGLES


def photo(side: int) -> torch.Tensor:
    image = read_image(photographs(("astronaut.png",))[0])[:side, :side]
    return torch.as_tensor(image).permute(2, 0, 1)[None] / 255


def motion_kernel(length: float, degrees: float) -> np.ndarray:
    """Rasterize a straight path from many points, independently of the bank's closed form."""
    kernel = np.zeros((65, 65), np.float32)
    for along in np.linspace(-length / 2, length / 2, 400):
        x, y = 32 + along * math.cos(math.radians(degrees)), 32 + along * math.sin(math.radians(degrees))
        left, top = math.floor(x), math.floor(y)
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            kernel[row, column] += (1 - abs(x - column)) * (1 - abs(y - row))
    return kernel / kernel.sum()


def blurred(image: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    pixels = image[0].permute(1, 2, 0).numpy()
    result = cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return torch.as_tensor(result).permute(2, 0, 1)[None]


def only(index: int) -> BlindWiener:
    """Create a network that applies one filter of the bank everywhere."""
    network = BlindWiener(8)
    scores = torch.full((len(network.bank),), -1e4)
    scores[index] = 1e4
    network.scores = lambda gray, rows, columns: scores.expand(len(gray) * rows * columns, -1)
    return network


@pytest.mark.parametrize(("length", "angle"), [(6.5, 0), (12.5, 3), (17.0, 8)])
def test_transfer_functions_match_rasterized_kernels(length, angle):
    index = blind_wiener.LENGTHS.index(length) * blind_wiener.BANK_ANGLES + angle
    kernel = np.zeros((blind_wiener.FFT, blind_wiener.FFT))
    kernel[:65, :65] = motion_kernel(length, 180 * angle / blind_wiener.BANK_ANGLES)
    expected = np.fft.rfft2(np.roll(kernel, (-32, -32), (0, 1)))
    low = slice(0, blind_wiener.FFT // 16)  # bilinear rasterization damps high frequencies
    assert np.abs(transfer_functions()[index].numpy() - expected)[low, low].max() < 0.03


def test_disk_and_gaussian_filters_have_correct_second_moment():
    functions = transfer_functions()[MOTION:]
    at = 2  # a low frequency, where H = 1 - 2 pi^2 f^2 variance
    frequency = at / blind_wiener.FFT
    variances = [radius**2 / 4 for radius in blind_wiener.RADII] + [s**2 for s in blind_wiener.SIGMAS]
    expected = [1 - 2 * (math.pi * frequency) ** 2 * variance for variance in variances]
    assert functions[:, 0, at].tolist() == pytest.approx(expected, abs=1e-3)


def test_filters_preserve_the_mean():
    assert torch.allclose(filter_bank()[:, 0], torch.ones(1), atol=1e-6)


def test_polar_spectrum_of_a_wave_peaks_at_its_angle_and_radius():
    angle, radius = 5, ring_radii()[10].item()
    theta = math.pi * angle / blind_wiener.ANGLES
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = torch.cos(2 * math.pi * radius / 64 * (x * math.cos(theta) + y * math.sin(theta)))
    hann = torch.hann_window(64)
    power = torch.fft.rfft2(wave * hann[:, None] * hann).abs().square().flatten()
    polar = (polar_matrix() @ power).view(blind_wiener.RINGS, blind_wiener.ANGLES)
    assert divmod(polar.argmax().item(), blind_wiener.ANGLES) == (10, angle)


@pytest.mark.parametrize(("height", "width"), [(50, 70), (96, 97), (200, 320), (193, 400)])
def test_identity_filter_leaves_images_of_any_size_unchanged(height, width):
    image = torch.rand(2, 3, height, width)
    assert only(0)(image).abs().max() < 1e-5


def test_matching_filter_reduces_error_of_blurred_photo():
    sharp = photo(320)
    blurry = blurred(sharp, motion_kernel(12.5, 45))
    index = 1 + blind_wiener.LENGTHS.index(12.5) * blind_wiener.BANK_ANGLES + 3
    luma = BlindWiener(8).luma
    target = (sharp * luma).sum(1, keepdim=True)
    before = (blurry * luma).sum(1, keepdim=True)

    def error(index):
        return (before + only(index)(blurry) - target)[..., 64:-64, 64:-64].square().mean()

    assert error(index) < 0.6 * error(0)  # 2.2 dB
    across = index + blind_wiener.BANK_ANGLES // 2  # the same motion at a right angle
    assert error(across) > 2 * error(index)


def test_scores_rotate_with_the_image():
    network = fill(BlindWiener(8))
    gray = photo(192).mean(1, keepdim=True)
    count = blind_wiener.BANK_ANGLES
    straight = network.scores(gray, 2, 2)[-1, 1 : 1 + MOTION].view(-1, count)
    turned = network.scores(gray.rot90(1, (2, 3)), 2, 2)[-1, 1 : 1 + MOTION].view(-1, count)
    assert torch.allclose(straight.roll(count // 2, dims=1), turned, atol=1e-2)
    assert straight.std(dim=1).max() > 5e-2  # they depend on the angle


def test_learns_to_distinguish_two_blurs():
    torch.manual_seed(0)
    sharp = photo(512)[..., 100:356, 100:356].repeat(2, 1, 1, 1)
    kernels = motion_kernel(9, 0), motion_kernel(9, 90)
    blurry = torch.cat([blurred(sharp[:1], kernel) for kernel in kernels])
    network = BlindWiener(16)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    first = (blurry - sharp).square().mean()
    for _ in range(25):
        loss = (blurry + network(blurry) - sharp).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is not None for value in network.parameters())
        optimizer.step()
    assert loss < 0.75 * first
