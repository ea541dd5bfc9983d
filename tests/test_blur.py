"""Blur kernels and camera model: closed forms, statistics, scipy as oracle for the convolution."""

import math

import cv2
import numpy as np
import pytest
from scipy import ndimage, stats

from ldm.data.image import photographs, read_image
from ldm.modules.image_degradation import blur

QUIET = {"noise": 0.0}


def kernels() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = [
        (f"motion {seed}", blur.motion_kernel(blur.motion_path(np.random.default_rng(seed), length, shake)))
        for seed, (length, shake) in enumerate([(1.0, 0), (8.0, 0.2), (25.0, 0.7), (40.0, 1.0), (80.0, 0.4)])
    ]
    for radius in (0.0, 0.04, 0.3, 1.0, 2.5, 7.3, 20.0):
        found.append((f"disk {radius}", blur.aperture_kernel(radius)))
    for blades in range(3, 10):
        radius, angle = rng.uniform(2, 12) * (blades != 6), rng.uniform(0, 2 * math.pi)  # 6 blades: radius 0
        found.append((f"{blades} blades", blur.aperture_kernel(radius, blades, angle)))
    for sigma in (0.4, 1.0, 3.7):
        line = blur.gaussian_kernel(sigma)
        found.append((f"gaussian {sigma}", np.outer(line, line)))
    return found


@pytest.mark.parametrize("kernel", [pytest.param(kernel, id=name) for name, kernel in kernels()])
def test_kernels_sum_to_one_and_are_centered(kernel):
    size = len(kernel)
    assert kernel.shape == (size, size) and size % 2 == 1 and kernel.dtype == np.float32
    assert kernel.min() >= 0
    assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    offset = np.arange(size) - size // 2
    assert abs((kernel.sum(0) * offset).sum()) < 0.02  # pixels
    assert abs((kernel.sum(1) * offset).sum()) < 0.02


@pytest.mark.parametrize("radius", [2.0, 4.7, 9.0, 15.3])
def test_aperture_area_matches_geometry(radius):
    # inside, a uniform kernel is 1 / area
    assert 1 / blur.aperture_kernel(radius).max() == pytest.approx(math.pi * radius**2, rel=0.01)
    for blades in (5, 6, 8):
        area = blades / 2 * radius**2 * math.sin(2 * math.pi / blades)
        assert 1 / blur.aperture_kernel(radius, blades, 0.3).max() == pytest.approx(area, rel=0.02)


def test_disk_kernel_has_correct_second_moment():
    kernel, offset = blur.aperture_kernel(8.0).astype(float), np.arange(19) - 9
    assert len(kernel) == 19
    assert (kernel.sum(0) * offset**2).sum() == pytest.approx(8.0**2 / 4 + 1 / 12, rel=0.005)


def test_gaussian_kernel_has_given_standard_deviation():
    line = blur.gaussian_kernel(3.0).astype(float)
    offset = np.arange(len(line)) - len(line) // 2
    assert (line * offset**2).sum() == pytest.approx(9.0, rel=0.01)


def test_polygon_aperture_rotates_with_its_angle():
    kernel = blur.aperture_kernel(10.0, 4, 0.0)  # sides upright: a square of half width 10 cos(45 degrees)
    assert kernel[len(kernel) // 2 + 8].max() == 0  # 7.07 + 0.5 is the last row
    turned = blur.aperture_kernel(10.0, 4, math.pi / 4)
    assert turned[len(turned) // 2 + 8].max() > 0
    assert np.allclose(kernel, blur.aperture_kernel(10.0, 4, math.pi / 2), atol=1e-7)


def test_motion_path_without_shake_is_a_segment():
    for seed in range(5):
        path = blur.motion_path(np.random.default_rng(seed), 20.0, 0.0)
        assert np.linalg.norm(path[-1] - path[0]) == pytest.approx(20.0)
        assert np.linalg.matrix_rank(path, tol=1e-6) == 1
        kernel = blur.motion_kernel(path).astype(float)
        offset = np.arange(len(kernel)) - len(kernel) // 2
        moment = ((kernel.sum(0) + kernel.sum(1)) * offset**2).sum()
        assert moment == pytest.approx(20.0**2 / 12, rel=0.05)  # variance of a uniform segment


def test_motion_path_statistics():
    def paths(shake: float, count: int = 200) -> np.ndarray:
        return np.array([blur.motion_path(np.random.default_rng(s), 30.0, shake) for s in range(count)])

    extents = []
    for shake in (0.0, 0.3, 1.0):
        many = paths(shake)
        steps = np.linalg.norm(np.diff(many, axis=1), axis=2)
        assert np.allclose(steps, 30.0 / (many.shape[1] - 1))  # constant speed, whole length 30
        assert np.abs(many.mean(axis=1)).max() < 1e-9
        extents.append(np.linalg.norm(np.ptp(many, axis=1), axis=1).mean())
    assert extents[0] > 1.1 * extents[1] > 1.3 * extents[2]  # more shake, smaller extent

    first = np.diff(paths(0.3)[:, :2], axis=1)[:, 0]
    direction = np.arctan2(first[:, 1], first[:, 0]) / (2 * math.pi) % 1
    assert stats.kstest(direction, "uniform").pvalue > 0.01  # no preferred direction

    turns = np.cos(np.diff(np.unwrap(np.arctan2(*np.diff(paths(0.5), axis=1).T)), axis=0))
    assert np.median(turns) > 0.95  # inertia: the direction holds from step to step ...
    reversals = (turns < -0.5).sum() / turns.shape[1]
    assert 0.5 < reversals < 2.5  # ... except for impulses, 3 * shake per exposure


def test_motion_kernel_splats_points_bilinearly():
    kernel = blur.motion_kernel(np.array([[0.25, 0.0], [-0.25, 0.0]]))
    middle = len(kernel) // 2
    assert np.allclose(kernel[middle, middle - 1 : middle + 2], [0.125, 0.75, 0.125])


@pytest.mark.parametrize("size", [3, 9, 11, 31])
@pytest.mark.parametrize("shape", [(40, 57), (40, 57, 3), (33, 37, 3)])
def test_convolution_equals_scipy(size, shape):
    rng = np.random.default_rng(size)
    light, kernel = rng.random(shape, np.float32), rng.random((size, size), np.float32)
    kernel /= kernel.sum()
    planes = light.reshape(*shape[:2], -1)
    expected = [ndimage.convolve(planes[..., c], kernel, mode="mirror") for c in range(planes.shape[2])]
    assert np.allclose(blur.convolve(light, kernel), np.stack(expected, -1).reshape(shape), atol=2e-6)


def test_kernel_larger_than_image_reflects_repeatedly():
    light = np.full((5, 7, 3), 0.3, np.float32)
    assert np.allclose(blur.convolve(light, blur.aperture_kernel(20.0)), 0.3, atol=1e-6)


def test_srgb_curve_matches_standard_and_inverts_exactly():
    levels = np.arange(256, dtype=np.uint8)
    light = blur.srgb_to_linear(levels).ravel()
    assert light[128] == pytest.approx(((128 / 255 + 0.055) / 1.055) ** 2.4, rel=1e-6)
    assert light[5] == pytest.approx(5 / 255 / 12.92, rel=1e-6)
    assert np.array_equal(blur.linear_to_srgb(light).ravel(), levels)
    assert blur.linear_to_srgb(np.array([[-1.0, 2.0]], np.float32)).tolist() == [[0, 255]]


def test_blur_is_applied_in_linear_light():
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 255
    blurred, drawn = blur.gaussian_blur(edge, np.random.default_rng(0), sigma=(4, 4), **QUIET)
    distance = np.arange(64) - 31.5
    light = stats.norm.cdf(distance / 4.0)  # an edge convolved with a gaussian
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(blurred[32, :, 0] - encoded)[20:44].max() < 2
    gamma_space = 255 * light
    assert (
        blurred[32, 31:33, 0].mean() > gamma_space[31:33].mean() + 50
    )  # the middle of an edge: 188, not 128
    assert drawn["sigma"] == 4


@pytest.mark.parametrize("name", blur.BLUR_TYPES)
def test_constant_image_is_unchanged(name):
    options = {"field": (0.0, 0.0)} if name == "lens_blur" else {}
    for level in (0, 17, 128, 255):
        image = np.full((40, 56, 3), (level, 200, 90), np.uint8)
        blurred, _ = blur.BLUR_TYPES[name](image, np.random.default_rng(1), **options, **QUIET)
        assert np.array_equal(blurred, image)


@pytest.mark.parametrize("name", blur.BLUR_TYPES)
def test_each_blur_is_deterministic_and_reports_its_parameters(name):
    image = read_image(photographs(("chelsea.png",))[0])[:128, 100:260]
    first, drawn = blur.BLUR_TYPES[name](image, np.random.default_rng(5), **QUIET)
    again, drawn_again = blur.BLUR_TYPES[name](image, np.random.default_rng(5), **QUIET)
    other, _ = blur.BLUR_TYPES[name](image, np.random.default_rng(6), **QUIET)
    assert np.array_equal(first, again) and drawn == drawn_again and not np.array_equal(first, other)
    assert first.shape == image.shape and first.dtype == np.uint8
    sharpness = [cv2.Laplacian(picture, cv2.CV_32F).var() for picture in (image, first)]
    assert sharpness[1] < 0.5 * sharpness[0]
    assert abs(first.mean() - image.mean()) < 8  # no brightening or darkening
    assert all(isinstance(value, (int, float)) for value in drawn.values())
    cropped = first[10:-10, 10:-10]
    assert cropped.min() > 0  # no black borders


@pytest.mark.parametrize("name", blur.BLUR_TYPES)
def test_blur_does_not_shift_the_image(name):
    image = np.zeros((101, 101, 3), np.uint8)
    image[45:56, 45:56] = 255
    options = {"field": (0.0, 0.0), "blades": (6, 6)} if name == "lens_blur" else {}
    for seed in range(4):
        blurred, _ = blur.BLUR_TYPES[name](image, np.random.default_rng(seed), **options, **QUIET)
        light = blur.srgb_to_linear(blurred)[..., 1].astype(float)
        assert ndimage.center_of_mass(light) == pytest.approx((50, 50), abs=0.15)


def test_scale_multiplies_blur_size():
    image = np.zeros((32, 32, 3), np.uint8)
    for name, key in (("motion_blur", "length"), ("gaussian_blur", "sigma"), ("lens_blur", "radius")):
        one, three = (blur.BLUR_TYPES[name](image, np.random.default_rng(3), scale=s)[1][key] for s in (1, 3))
        assert three == pytest.approx(3 * one, rel=1e-4)


def test_lens_blur_has_chromatic_aberration_and_vignetting():
    spot = np.zeros((65, 65, 3), np.uint8)
    spot[30:35, 30:35] = 255
    blurred, drawn = blur.lens_blur(
        spot, np.random.default_rng(0), radius=(10, 10), aberration=(0.1, 0.1), field=(0, 0), **QUIET
    )
    light = blur.srgb_to_linear(blurred).astype(float)
    y, x = np.indices((65, 65)) - 32
    spread = [((x**2 + y**2) * light[..., c]).sum() / light[..., c].sum() for c in range(3)]
    assert math.sqrt(spread[0] / spread[1]) == pytest.approx(1.1, rel=0.03)
    assert math.sqrt(spread[2] / spread[1]) == pytest.approx(0.9, rel=0.03)
    assert drawn["aberration"] == pytest.approx(0.1)

    falloff = blur.vignette(101, 151, 30.0)
    assert falloff[50, 75] == pytest.approx(1)
    assert falloff[0, 0] == pytest.approx(math.cos(math.radians(30)) ** 4, rel=1e-5)
    assert np.array_equal(blur.vignette(8, 9, 0.0), np.ones((8, 9)))


def test_sensor_noise_has_documented_variance():
    for level in (0.0, 0.05, 0.5):
        light = np.full((200, 200, 3), level, np.float32)
        noise = blur.add_sensor_noise(light, np.random.default_rng(0), 1e-3) - light
        assert noise.var() == pytest.approx(1e-3 * (level + blur.DARK_SIGNAL), rel=0.03)
        assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(noise.size)
        assert stats.kstest(noise.ravel()[:5000] / noise.std(), "norm").pvalue > 0.01


def test_noise_is_added_after_blur_and_preserves_the_mean():
    image = np.full((128, 128, 3), 120, np.uint8)
    blurred, drawn = blur.gaussian_blur(image, np.random.default_rng(0), sigma=(4, 4), noise=1e-3)
    assert 0 < drawn["noise"] <= 1e-3
    difference = blurred.astype(float) - 120
    assert difference.std() > 1 and abs(difference.mean()) < 0.1
    neighbours = (difference[:, 1:] * difference[:, :-1]).mean() / difference.var()
    assert abs(neighbours) < 0.03  # blurred noise would be smooth


def test_jpeg_preserves_colours_and_quality_is_reported():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 40, 30), (30, 60, 190)
    seen, drawn = blur.gaussian_blur(image, np.random.default_rng(0), jpeg_probability=1.0, **QUIET)
    plain, without = blur.gaussian_blur(image, np.random.default_rng(0), **QUIET)
    assert 60 <= drawn["jpeg_quality"] <= 95 and "jpeg_quality" not in without
    assert not np.array_equal(seen, plain)
    assert np.abs(seen.astype(int) - plain).mean() < 3


def test_random_blur_types_are_uniform():
    image = read_image(photographs(("coffee.png",))[0])[:64, :64]
    rng = np.random.default_rng(0)
    drawn = [blur.random_blur(image, rng)[1] for _ in range(200)]
    assert stats.chisquare([drawn.count(name) for name in blur.BLUR_TYPES]).pvalue > 0.01
    assert {blur.random_blur(image, rng, ["lens_blur"])[1] for _ in range(5)} == {"lens_blur"}


def test_bad_input_raises():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="zoom_blur.*choose from motion_blur"):
        blur.random_blur(np.zeros((8, 8, 3), np.uint8), rng, ["motion_blur", "zoom_blur"])
    with pytest.raises(ValueError, match="choose from"):
        blur.random_blur(np.zeros((8, 8, 3), np.uint8), rng, [])
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 image"):
            blur.motion_blur(image, rng)
