"""Measuring and undoing known shifts and zooms, which scipy's spline interpolation produces."""

import cv2
import numpy as np
import pytest
from scipy.ndimage import affine_transform

from ldm.alignment import measure_movement, undo_movement
from ldm.data.image import photographs, read_image
from ldm.metrics import psnr

COFFEE = read_image(photographs(("coffee.png",))[0])[20:340, 40:440]
MOVES = [(0, 0, 1), (3, -2, 1), (12, -12, 1), (-7.3, 4.6, 1), (0.25, 0.5, 1), (0, 0, 0.97), (0, 0, 1.03)]


def rounded(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def move(image: np.ndarray, x: float, y: float, zoom: float) -> np.ndarray:
    """Shift the content x pixels right and y pixels down and scale it by `zoom` about the center."""
    middle = np.array(image.shape[:2]) / 2 - 0.5
    offset = middle - (middle + [y, x]) / zoom
    planes = np.moveaxis(image, 2, 0).astype(float)
    moved = [affine_transform(plane, [1 / zoom] * 2, offset, order=3, mode="mirror") for plane in planes]
    return rounded(np.stack(moved, axis=2))


def degrade(image: np.ndarray, kind: str) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 25, image.shape)
    if kind == "blur":
        return cv2.GaussianBlur(image, (0, 0), 3)
    return rounded(image + noise) if kind == "noise" else image


@pytest.mark.parametrize("kind", ["", "blur", "noise"])
@pytest.mark.parametrize("name", ["astronaut.png", "motorcycle_left.png"])
def test_known_shift_and_zoom_are_measured(name, kind):
    """The restored image is sharp and the input degraded."""
    image = read_image(photographs((name,))[0])[60:380, :400]
    given = degrade(image, kind)
    for x, y, zoom in MOVES:
        found = measure_movement(move(image, x, y, zoom), given)
        assert found.is_known and abs(found.x - x) < 0.1 and abs(found.y - y) < 0.1
        assert found.scale == pytest.approx(100 * zoom, abs=0.1)


def test_shift_of_large_image_is_in_full_resolution_pixels():
    large = cv2.resize(COFFEE, (1600, 1200), interpolation=cv2.INTER_CUBIC)
    found = measure_movement(move(large, 6.5, -11, 1.01), large)
    assert (found.x, found.y, found.scale) == pytest.approx((6.5, -11, 101), abs=0.1)


def unmeasurable() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    flat = np.full((120, 160, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 255, (1, 40, 3), np.uint8), 4, axis=1).repeat(120, axis=0)
    noise = rng.integers(0, 255, (2, 120, 160, 3), np.uint8)
    photo = COFFEE[:120, :160]
    return {
        "flat": (flat, flat),
        "flat input": (photo, flat),
        "flat result": (flat, photo),
        "stripes": (stripes, stripes),
        "other noise": (noise[0], noise[1]),
        "another photo": (photo, COFFEE[200:320, 200:360]),
        "too small": (photo[:31], photo[:31]),
    }


@pytest.mark.parametrize("case", unmeasurable())
def test_unmeasurable_movement_is_nan(case):
    found = measure_movement(*unmeasurable()[case])
    assert not found.is_known and np.isnan([*found, found.shift]).all()
    assert str(found) == "movement not measurable"


def test_movement_is_undone_and_borders_filled_from_input():
    moved = move(COFFEE, 5.4, -3.2, 1.02)
    found = measure_movement(moved, COFFEE)
    assert str(found).startswith("shift +5.4") and str(found).endswith(f"{found.scale:.2f} %")
    undone = undo_movement(moved, COFFEE, found)
    assert psnr(moved, COFFEE) < 20 and psnr(undone[20:-20, 20:-20], COFFEE[20:-20, 20:-20]) > 34
    assert measure_movement(undone, COFFEE).shift < 0.05
    shrunk = move(COFFEE, 0, 0, 0.97)
    enlarged = undo_movement(shrunk, 255 - COFFEE, measure_movement(shrunk, COFFEE))
    assert psnr(enlarged, COFFEE) > 30  # all borders are covered
    zoomed = move(COFFEE, 0, 0, 1.03)
    filled = undo_movement(zoomed, 255 - COFFEE, measure_movement(zoomed, COFFEE))
    assert np.array_equal(filled[:4], 255 - COFFEE[:4]) and np.array_equal(
        filled[:, -4:], 255 - COFFEE[:, -4:]
    )


def test_different_shapes_raise():
    with pytest.raises(ValueError, match=r"different shapes: \(320, 400, 3\) and \(320, 399, 3\)"):
        measure_movement(COFFEE, COFFEE[:, 1:])
