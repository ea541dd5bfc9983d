"""Filling holes without a model: Telea's method, biharmonic equation, FSR."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from ldm import holes
from ldm.data.image import photographs, read_image
from ldm.holes import METHODS, fill_classically

IMAGE = read_image(photographs()[0])[100:164, 60:124]


def masks():
    """Create masks of a scratch, of single pixels (corner, edge, inside) and of a quarter of the image."""
    scratch, corner, edge, inside, quarter = (np.zeros((64, 64), np.uint8) for _ in range(5))
    cv2.line(scratch, (3, 9), (60, 40), 255, 2)
    corner[63, 63] = edge[0, 30] = inside[31, 17] = 1
    quarter[:32, :32] = 7
    return {"scratch": scratch, "corner": corner, "edge": edge, "inside": inside, "quarter": quarter}


@pytest.mark.parametrize("method", ["telea", "biharmonic"])
@pytest.mark.parametrize("place", masks())
def test_known_pixels_are_kept_and_hole_content_has_no_effect(method, place):
    mask = masks()[place]
    filled = fill_classically(IMAGE, mask, method)
    other = np.where(mask[..., None] > 0, 255 - IMAGE, IMAGE)
    assert filled.shape == IMAGE.shape and filled.dtype == np.uint8
    assert np.array_equal(filled[mask == 0], IMAGE[mask == 0])
    assert np.array_equal(filled, fill_classically(other, mask, method))
    near = IMAGE[cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0]
    low, high = near.min(axis=0).astype(int) - 60, near.max(axis=0).astype(int) + 60
    assert (filled[mask > 0] >= low).all() and (filled[mask > 0] <= high).all()


@pytest.mark.parametrize("method", ["telea", "biharmonic"])
def test_constant_colour_is_continued(method):
    flat = np.broadcast_to(np.array([10, 120, 250], np.uint8), (64, 64, 3))
    for mask in masks().values():
        error = np.abs(fill_classically(flat, mask, method).astype(int) - flat)
        assert error.max() <= (8 if method == "telea" else 1)  # rounding errors of OpenCV's Telea add up


def test_biharmonic_fill_continues_a_cubic_surface():
    """Cubic polynomials solve the biharmonic equation exactly, also in finite differences."""
    y, x = np.mgrid[-32:32, -32:32] / 32
    surface = np.dstack([128 + 60 * x**3 - 40 * x * y, 128 + 90 * y**2 * x, 100 + 50 * x**2 + 50 * y**3])
    image, mask = np.rint(surface).astype(np.uint8), np.zeros((64, 64), np.uint8)
    mask[20:44, 25:40] = 1
    filled = [fill_classically(image, mask, method) for method in ("biharmonic", "telea")]
    error, of_telea = (np.abs(each - surface).max() for each in filled)
    assert error < 1.5 and of_telea > 3


def test_empty_and_full_masks():
    for method in METHODS:
        assert np.array_equal(fill_classically(IMAGE, np.zeros((64, 64), np.uint8), method), IMAGE)
        assert (fill_classically(IMAGE, np.ones((64, 64), np.uint8), method) == 128).all()


def test_fsr_is_called_as_opencv_documents(monkeypatch):
    """FSR takes BGR, a mask that is 0 at missing pixels, and an output image of the same size."""

    def inpaint(source, mask, target, kind):
        assert kind == 2 and not source[mask == 0].any() and target.shape == source.shape
        target[:] = cv2.inpaint(source, (mask == 0).astype(np.uint8), 5, cv2.INPAINT_TELEA)
        target[..., 0] = 0  # blue

    fake = SimpleNamespace(INPAINT_FSR_FAST=2, inpaint=inpaint)
    monkeypatch.setattr(cv2, "xphoto", fake, raising=False)
    monkeypatch.setitem(METHODS, "fsr", holes.fsr)
    mask = masks()["scratch"]
    filled, telea = (fill_classically(IMAGE, mask, method) for method in ("fsr", "telea"))
    assert np.array_equal(filled[..., :2], telea[..., :2])
    assert (filled[mask > 0, 2] == 0).all() and np.array_equal(filled[mask == 0], IMAGE[mask == 0])


@pytest.mark.skipif(not hasattr(cv2, "xphoto"), reason="opencv-contrib is not installed")
def test_fsr_fills_a_scratch_closely():
    mask = masks()["scratch"]
    filled = fill_classically(IMAGE, mask, "fsr")
    assert np.array_equal(filled[mask == 0], IMAGE[mask == 0])
    flat = np.abs(IMAGE[mask > 0] - IMAGE.mean(axis=(0, 1))).mean()
    assert np.abs(filled[mask > 0].astype(int) - IMAGE[mask > 0]).mean() < 0.5 * flat
