"""benchmarks.quality and record_scores: scores by scene, colour shift; the included weights reach theirs."""

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.record_scores import score_file
from ldm.checkpoint import read_metadata, read_settings
from ldm.data.image import photographs, read_image, write_image
from ldm.metrics import psnr
from ldm.modules.image_degradation.blur import BLUR_TYPES


def test_score_line_has_gain_and_largest_colour_shift():
    sharp = np.full((40, 40, 3), 100, np.uint8)
    blurry = sharp + np.uint8(10)
    result = quality.score([(blurry, sharp)] * 2, lambda image: image - np.uint8([7, 8, 12]))
    restored = sharp + np.uint8([3, 2, 0]) - np.uint8([0, 0, 2])
    assert result.before == [psnr(blurry, sharp)] * 2 and result.after == [psnr(restored, sharp)] * 2
    gain = psnr(restored, sharp) - psnr(blurry, sharp)
    assert f"| scene | 2 | {psnr(blurry, sharp):.2f} -> " in result.line("scene")
    assert f"| {gain:+.2f} |" in result.line("scene") and result.line("scene").endswith("| 10.00 -> 3.00 |")
    half = quality.score([(blurry, sharp)], lambda image: image[:20, :20], crop=20)
    assert half.after == half.before


def test_each_scene_is_a_row(tmp_path):
    image = read_image(photographs()[0])[:40, :40]
    for scene in ("A", "B"):
        for side in ("blur", "sharp"):
            (tmp_path / scene / side).mkdir(parents=True)
            write_image(tmp_path / scene / side / "1.png", image)
    rows = quality.scene_rows(tmp_path)
    assert sorted(rows) == ["A", "B"] and all(len(pairs) == 1 for pairs in rows.values())


@pytest.mark.parametrize("name", ["srn_deblur", "dbgan"])
def test_srn_and_dbgan_weights_are_opened(name):
    network, restore = quality.open_network(quality.Path("models") / f"{name}.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)
    assert restore(image).shape == image.shape and not network.training


def test_synthetic_rows_are_four_blur_types_of_six_photos():
    rows = quality.synthetic_rows(0)
    assert set(rows) == {"motion_blur", "gaussian_blur", "defocus_blur", "lens_blur"}
    assert all(len(images) == len(photographs()) for images in rows.values())


@pytest.mark.parametrize("name", ["srn_deblur", "dbgan", "bgan"])
def test_included_weights_reach_their_recorded_scores(name):
    """On two photos outside the training set, as recorded in the file's metadata."""
    path = quality.Path("models") / f"{name}.safetensors"
    assert read_metadata(path).keys() >= {"command", "commit", "data"}
    assert path.stat().st_size < 16e6
    recorded = read_settings(path, "scores")
    found = score_file(path, ("chelsea.png", "coffee.png"))
    for photograph, row in found.items():
        assert row == pytest.approx(recorded[photograph], abs=0.05)
        if name == "bgan":
            continue
        assert np.mean([row[blur] for blur in BLUR_TYPES]) > 1 and row["sharp"] > 38
        assert row["color_shift"] < 0.5
    if name == "bgan":
        assert max(row["psnr"] for row in recorded.values()) < 40  # the images are visibly blurred
