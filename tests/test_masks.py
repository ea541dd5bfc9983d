"""Random masks: area, shape, seeds."""

import cv2
import numpy as np
import pytest

from ldm.modules.image_degradation.masks import MASK_KINDS, fit_area, pixel_limits, random_mask


def draws(kind: str, count: int = 600, size: int = 64, **options) -> np.ndarray:
    return np.stack(
        [random_mask(size, size, np.random.default_rng(n), kind, **options) for n in range(count)]
    )


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_area_and_position_statistics(kind):
    masks = draws(kind)
    areas = masks.mean((1, 2))
    assert masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    assert areas.min() >= 0.1 and areas.max() <= 0.3
    assert np.ptp(areas) > 0.19 and 0.18 < areas.mean() < 0.26  # the whole range is used
    assert (np.histogram(areas, 4, (0.1, 0.3))[0] > 60).all()
    everywhere = masks.mean(0)  # every pixel is sometimes in the hole, none always
    assert everywhere[4:-4, 4:-4].min() > 0.001 and everywhere.max() < 0.6


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(
    "ratio", [(0.1, 0.101), (0.0, 0.02), (0.7, 0.95), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)]
)
def test_area_is_in_the_given_range(kind, ratio):
    for shape in ((64, 64), (40, 70), (96, 72)):
        for seed in range(3):
            area = random_mask(*shape, np.random.default_rng(seed), kind, ratio).sum()
            low, high = pixel_limits(*shape, ratio)
            assert 1 <= low <= area <= high <= ratio[1] * shape[0] * shape[1]


def test_shapes_match_their_names():
    def filled(mask: np.ndarray) -> float:
        x, y, w, h = cv2.boundingRect(mask)
        return mask.sum() / (w * h)

    assert all(filled(mask) == 1 for mask in draws("rectangle", 50))
    boxes = np.array([cv2.boundingRect(mask)[2:] for mask in draws("rectangle", 500)])
    aspects = boxes[:, 0] / boxes[:, 1]
    assert 1 / 2.8 < aspects.min() < 0.5 and 2 < aspects.max() < 2.8
    assert np.median([filled(mask) for mask in draws("irregular", 100)]) < 0.7
    mixed = np.array([filled(mask) for mask in draws("mixed", 300)])
    assert 0.2 < (mixed == 1).mean() < 0.5


def test_masks_depend_on_the_seed():
    for kind in MASK_KINDS:
        assert np.array_equal(draws(kind, 5), draws(kind, 5))
        assert len(np.unique(draws(kind, 20), axis=0)) == 20


def test_fit_area_grows_or_shrinks_a_mask_to_the_range():
    mask = np.zeros((100, 120), np.uint8)
    mask[40:60, 50:90] = 1
    grown, shrunk = fit_area(mask, (0.1, 0.3)), fit_area(mask, (0.0, 0.01))
    assert grown.sum() == 1200 and (grown >= mask).all()
    assert shrunk.sum() == 120 and (shrunk <= mask).all()
    assert np.array_equal(fit_area(mask, (0.03, 0.1)), mask)
    assert fit_area(np.ones_like(mask), (0.1, 0.3)).sum() == 3600


def test_bad_arguments_raise():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rectangle, irregular, mixed, not 'round'"):
        random_mask(64, 64, rng, "round")
    for ratio in ((0.3, 0.1), (-0.1, 0.3), (0.1, 1.1), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
            random_mask(64, 64, rng, ratio=ratio)
    with pytest.raises(ValueError, match="no hole that could be grown"):
        fit_area(np.zeros((8, 8), np.uint8), (0.1, 0.3))
    with pytest.raises(ValueError, match="no hole in an image of 8x8"):
        random_mask(8, 8, rng, ratio=(0.11, 0.12))
