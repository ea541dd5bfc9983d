"""Spatially varying camera shake: limiting cases, energy, seeds."""

import numpy as np
import pytest

from ldm.data.image import photographs, read_image
from ldm.modules.image_degradation import blur, shake

QUIET = {"noise": 0.0}
SHIFTED = np.array([[1.0, 0, 3], [0, 1, -2]])


@pytest.fixture(scope="module")
def image():
    return read_image(photographs(("astronaut.png",))[0])[100:260, 150:350]


def test_zero_length_path_returns_the_input(image):
    for seed in range(6):
        blurred, _ = shake.camera_shake(image, np.random.default_rng(seed), length=(1e-9, 1e-9), **QUIET)
        assert np.abs(blurred.astype(int) - image).max() <= 1  # rounding


def test_pure_translation_equals_convolution(image):
    path = blur.motion_path(np.random.default_rng(0), 20.0, 0.5)
    views = np.repeat(np.eye(2, 3)[None], len(path), axis=0)
    views[:, :, 2] = path
    light = blur.srgb_to_linear(image)
    expected = blur.convolve(light, blur.motion_kernel(-path))
    assert np.abs(shake.expose(light, views) - expected)[25:-25, 25:-25].max() < 1e-5
    opposite = blur.convolve(light, blur.motion_kernel(path))
    assert np.abs(opposite - expected)[25:-25, 25:-25].max() > 0.1


def test_most_paths_are_nearly_straight(image):
    """Short exposures have nearly straight paths; a uniform distribution would have a median of 0.5."""
    draws = [
        shake.camera_shake(image[:32, :32], np.random.default_rng(n), shake=(0, 1))[1] for n in range(60)
    ]
    roughness = np.array([parameters["shake"] for parameters in draws])
    assert np.median(roughness) < 0.25 and roughness.max() > 0.7


def test_energy_is_preserved():
    light = np.zeros((101, 121, 3), np.float32)
    light[45:55, 55:65] = (0.9, 0.5, 0.1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        views = shake.shake_views(rng, 12.0, 0.5, light.shape[:2])
        zoom = np.mean([np.linalg.det(view[:, :2]) ** -1 for view in views])  # ratio of areas
        total = shake.expose(light, views).sum(axis=(0, 1))
        assert total / light.sum(axis=(0, 1)) == pytest.approx([zoom] * 3, rel=0.03)
    flat = np.full((40, 50, 3), 0.3, np.float32)
    mask = shake.soft_mask(np.random.default_rng(0), (40, 50))
    views = shake.shake_views(np.random.default_rng(1), 15.0, 0.5, (40, 50))
    assert shake.expose_object(flat, views, views[::-1], mask) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("length", [3.0, 20.0, 60.0])
def test_views_have_given_length_and_are_centered(length):
    size = (180, 240)
    points = np.array([[0, 240, 0, 240, 120], [0, 0, 180, 180, 90], [1, 1, 1, 1, 1]])
    for seed in range(5):
        views = shake.shake_views(np.random.default_rng(seed), length, 0.6, size)
        assert len(views) % 2 == 1 and shake.FEWEST_FRAMES <= len(views) <= shake.MOST_FRAMES
        assert views[len(views) // 2] == pytest.approx(np.eye(2, 3), abs=1e-9)
        steps = np.diff(views @ points, axis=0)
        assert np.linalg.norm(steps, axis=1).sum(axis=0).mean() == pytest.approx(length, rel=0.02)


def test_shake_varies_over_the_image():
    """A single kernel would move all corners by the same amount."""
    views = shake.shake_views(np.random.default_rng(3), 20.0, 0.5, (200, 200))
    corners = views @ np.array([[0, 200], [0, 200], [1, 1]])
    assert np.abs((corners[..., 0] - corners[..., 1]) - (0 - 200)).max() > 2


def test_object_moves_independently_of_background(image):
    light = blur.srgb_to_linear(image)
    mask = np.zeros(image.shape[:2], np.float32)
    mask[40:120, 60:140] = 1
    still = np.repeat(np.eye(2, 3)[None], 3, axis=0)
    moving = np.stack([np.eye(2, 3), SHIFTED, SHIFTED])
    blurred = shake.expose_object(light, still, moving, mask)
    away = np.ones(image.shape[:2], bool)
    away[35:125, 55:145] = False
    assert np.abs(blurred - light)[away].max() < 1e-6
    assert np.abs(blurred - light)[60:100, 80:120].max() > 0.1


def test_restore_highlights_raises_only_clipped_pixels():
    light = blur.srgb_to_linear(np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2))
    raised = shake.restore_highlights(light, 4.0)
    assert (raised[:, 254:] == 4).all() and np.array_equal(raised[:, :254], light[:, :254])
    assert raised.dtype == np.float32


def test_result_depends_on_seed(image):
    first, again, other = (shake.camera_shake(image, np.random.default_rng(n))[0] for n in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.uint8 and first.shape == image.shape


def test_mean_colour_is_preserved(image):
    means = [
        shake.camera_shake(image, np.random.default_rng(seed), length=(6.0, 6.0), **QUIET)[0].mean()
        for seed in range(12)
    ]
    assert np.abs(np.array(means) - image.mean()).max() < 4  # linear light brightens edges a little


def test_wrong_image_dtype_raises():
    with pytest.raises(ValueError, match="uint8 image"):
        shake.camera_shake(np.zeros((8, 8, 3), np.float32), np.random.default_rng(0))
