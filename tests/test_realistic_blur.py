"""Realistic camera blur: alignment, blur types, fraction of unblurred samples, seeds."""

from collections import Counter

import numpy as np
import pytest
import torch

from ldm.alignment import measure_movement
from ldm.data.dead_leaves import DeadLeaves
from ldm.data.image import photographs
from ldm.data.paired import ImageFiles
from ldm.data.realistic_blur import RealisticBlur, RealisticBlurDataset, tone_curve
from ldm.modules.image_degradation.blur import BLUR_TYPES

STILL = {"shake": 0.0, "motion": 0.0, "optical": 0.0, "both": 0.0}  # no or hardly any blur
GENTLE = {"shake": 1.0, "longest_path": 5.0, "jpeg": 0.0, "noise": (1e-9, 1e-8)}


def items(count: int, size: int = 64, **recipe) -> list[dict]:
    images = ImageFiles(photographs() * 20)
    recipe = RealisticBlur(**{"simple": 0.0} | recipe)
    dataset = RealisticBlurDataset(images, size, 0, candidates=2, recipe=recipe, augment=True)
    return [dataset[(0, index)] for index in range(count)]


def pixels(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_blur_types_occur_at_configured_rates():
    counts = Counter(item["blur_type"] for item in items(100, 32))
    assert counts["camera_shake"] == pytest.approx(60, abs=16)
    optical = counts["defocus_blur"] + counts["lens_blur"] + counts["gaussian_blur"]
    assert optical == pytest.approx(23, abs=13)
    assert counts["motion_blur"] > 0 and counts["two_blurs"] > 0 and counts[""] > 0


def test_simple_blurs_have_no_noise_tone_curve_or_jpeg(monkeypatch):
    from ldm.data import realistic_blur

    def refuse(*_):
        raise AssertionError("a simple blur is all that happens")

    for name in ("compress_jpeg", "tone_curve", "camera_shake"):
        monkeypatch.setattr(realistic_blur, name, refuse)
    found = items(60, 48, simple=1.0)
    counts = Counter(item["blur_type"] for item in found)
    assert set(counts) == set(BLUR_TYPES) and min(counts.values()) >= 5
    for item in found:
        if item["blur_type"] == "gaussian_blur":  # noise would raise gradients
            blurry, sharp = (item[side].diff(dim=2).abs().mean() for side in ("blurry", "sharp"))
            assert blurry < sharp


def test_both_sides_are_aligned():
    sides = [(pixels(item["blurry"]), pixels(item["sharp"])) for item in items(12, 96, **GENTLE)]
    shifts = [measure_movement(*pair).shift for pair in sides]
    assert np.median(shifts) < 1.0 and max(shifts) < 3.0  # small offsets come from the curved 5 px paths


def test_unblurred_samples_are_identical_on_both_sides():
    found = [item for item in items(30, 48, **STILL) if item["blur_type"] == ""]
    assert len(found) > 8
    for item in found:
        assert torch.equal(item["blurry"], item["sharp"])


def test_items_have_pair_format_and_depend_only_on_their_key():
    first, second = items(2, 32)
    again = items(2, 32)[1]
    assert set(first) == {"blurry", "sharp", "path", "blur_type", "seed"}
    assert first["blurry"].shape == first["sharp"].shape == (3, 32, 32)
    assert torch.equal(second["blurry"], again["blurry"]) and torch.equal(second["sharp"], again["sharp"])


def test_crops_up_to_and_beyond_the_image_size():
    leaves = DeadLeaves(40, 3, seed=0)
    for size in (16, 40, 64):  # 64: scaled up
        assert RealisticBlurDataset(leaves, size, 0)[(1, 2)]["blurry"].shape == (3, size, size)


def test_shake_length_is_limited_by_crop_size(monkeypatch):
    from ldm.data import realistic_blur

    lengths = []

    def note(image, rng, length, **options):
        lengths.append(length)
        return image, {}

    monkeypatch.setattr(realistic_blur, "camera_shake", note)
    items(3, 32, shake=1.0)
    items(3, 256, shake=1.0)
    assert lengths[0] == (4.0, 8.0) and lengths[-1] == (6.0, 60.0)


def test_tone_curve_keeps_black_white_and_middle_grey():
    for strength in (-0.25, 0.0, 0.25):
        curve = tone_curve(strength).astype(int)
        assert curve[0] == 0 and curve[255] == 255 and abs(curve[127] - 127) <= 1
        assert (np.diff(curve) >= 0).all()
    assert np.array_equal(tone_curve(0.0), np.arange(256))
    assert tone_curve(0.25)[64] < 64 < tone_curve(-0.25)[64]
