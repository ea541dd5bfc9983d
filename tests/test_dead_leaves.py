"""Dead leaves: power-law radii, photograph-like spectrum, a new image for every key."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ldm.data.dead_leaves import DeadLeaves, dead_leaves, leaf_radii
from ldm.data.paired import BlurDataset


def test_radii_follow_power_law():
    radii = leaf_radii(200_000, 2.0, 50.0, np.random.default_rng(0))
    assert 2 <= radii.min() < 2.001 and 45 < radii.max() <= 50
    for limit in (3.0, 7.0, 20.0):  # P(r > x) = (x^-2 - b^-2) / (a^-2 - b^-2)
        share = (limit**-2 - 50.0**-2) / (2.0**-2 - 50.0**-2)
        assert (radii > limit).mean() == pytest.approx(share, rel=0.05)


def test_image_is_uint8_colourful_and_repeatable():
    picture = dead_leaves(96, np.random.default_rng(3))
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    assert picture.std() > 30 and np.unique(picture).size > 200
    assert np.array_equal(picture, dead_leaves(96, np.random.default_rng(3)))
    assert not np.array_equal(picture, dead_leaves(96, np.random.default_rng(4)))


def test_mean_brightness_is_neutral_grey():
    mean = np.mean([dead_leaves(64, np.random.default_rng(seed)).mean((0, 1)) for seed in range(40)], axis=0)
    assert np.abs(mean - 127.5).max() < 12


def test_spectrum_slope_is_like_photographs():
    powers = []
    for seed in range(12):
        picture = dead_leaves(128, np.random.default_rng(seed)).mean(-1)
        window = np.hanning(128)[:, None] * np.hanning(128)
        powers.append(np.abs(np.fft.fft2((picture - picture.mean()) * window)) ** 2)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    rings = np.geomspace(0.03, 0.4, 10)
    pairs = zip(rings[:-1], rings[1:], strict=True)
    power = [np.mean(powers, axis=0)[(frequency >= low) & (frequency < high)].mean() for low, high in pairs]
    slope = np.polyfit(np.log(rings[:-1]), np.log(power), 1)[0]
    assert -3.5 < slope < -1.2  # photographs: about -2


def test_images_differ_by_key_and_feed_blur_dataset():
    source = DeadLeaves(size=96, length=4, seed=0)
    assert len(source) == 4 and np.array_equal(source[2], source[(0, 2)])
    assert not np.array_equal(source[(0, 2)], source[(1, 2)])
    assert not np.array_equal(source[(0, 2)], DeadLeaves(96, 4, seed=1)[(0, 2)])
    dataset = BlurDataset(source, size=64, seed=0, augment=True)
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["sharp"].shape == batch["blurry"].shape == (4, 3, 64, 64)
    assert batch["path"][0].startswith("dead leaves")


def test_small_size_raises():
    with pytest.raises(ValueError, match="at least 8"):
        DeadLeaves(size=4, length=1, seed=0)
