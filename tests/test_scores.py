"""Metrics of other papers against independent implementations."""

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from skimage.metrics import structural_similarity

from harness import scores
from ldm.data.image import photographs, read_image
from ldm.metrics import psnr, ssim

CHELSEA = read_image(photographs(("chelsea.png",))[0])[60:220, 100:260]


def blurred(sigma: float = 2.0) -> np.ndarray:
    return cv2.GaussianBlur(CHELSEA, (0, 0), sigma)


def conv3d_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Compute SSIM by three-dimensional convolution with replicated borders."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.einsum("i,j,k->ijk", line, line, line) / line.sum() ** 3

    def mean(image: np.ndarray) -> np.ndarray:
        return correlate(image, window, mode="nearest")  # (h, w, 3) is the volume

    x, y = x[:48, :48].astype(np.float64), y[:48, :48].astype(np.float64)
    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 6.5025, 58.5225
    return float(((2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))).mean())


def test_ssim3d_equals_three_dimensional_convolution():
    noise = np.random.default_rng(0).normal(0, 25, CHELSEA.shape)
    noisy = (CHELSEA + noise).clip(0, 255).astype(np.uint8)
    for restored in (blurred(), noisy, CHELSEA):
        value = scores.ssim3d(restored[:48, :48], CHELSEA[:48, :48])["ssim3d"]
        assert value == pytest.approx(conv3d_ssim(restored, CHELSEA), abs=1e-9)
    assert value == pytest.approx(1)
    # higher than 2D SSIM, by a difference that is not constant but grows with the degradation
    near, far = (
        scores.ssim3d(image, CHELSEA)["ssim3d"] - ssim(image, CHELSEA) for image in (blurred(1), blurred(4))
    )
    assert 0.1 < near < far / 2


def test_luma_equals_matlab_rgb2ycbcr():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    expected = [16, 235, 81.481, 144.553, 40.966]  # of rgb2ycbcr
    assert scores.luma(colours)[0] == pytest.approx(expected, abs=1e-6)
    found = scores.on_luma(blurred(), CHELSEA)
    weights = np.array([65.481, 128.553, 24.966]) / 255
    error = np.mean(((blurred().astype(float) - CHELSEA) @ weights) ** 2)
    assert found["psnr_y"] == pytest.approx(10 * np.log10(255**2 / error))
    assert found["psnr_y"] > psnr(blurred(), CHELSEA) + 1  # range of 219 instead of 255, no chroma
    assert found["ssim_y"] > ssim(blurred(), CHELSEA)


def test_alignment_undoes_shift_and_brightness():
    photo = read_image(photographs(("coffee.png",))[0])
    shift = np.array([[1, 0, 1.5], [0, 1, -0.75]], np.float32)
    moved = cv2.warpAffine(photo, shift, photo.shape[1::-1], flags=cv2.INTER_CUBIC)[60:260, 100:360]
    moved, sharp = (moved * 0.9).round().astype(np.uint8), photo[60:260, 100:360]
    found = scores.aligned(moved, sharp)
    assert psnr(moved, sharp) < 24 and found["psnr_aligned"] > 31
    assert found["ssim_aligned"] > ssim(moved, sharp) + 0.05
    same = scores.aligned(sharp, sharp)
    assert same["psnr_aligned"] > 45 and same["ssim_aligned"] > 0.99
    flat = np.zeros_like(sharp)
    with pytest.raises(ValueError, match="cannot be aligned"):
        scores.aligned(flat, sharp)


def test_aligned_scores_use_only_overlapping_pixels(monkeypatch):
    """Brightness is scaled; SSIM excludes a margin of 5 pixels as in scikit-image; other pixels are black."""
    shift = np.float32([[1, 0, 7], [0, 1, 0], [0, 0, 1]])
    x, y = (image.astype(np.float64) for image in (blurred(), CHELSEA))
    x *= (x * y).sum() / (x * x).sum()
    for warp, columns in ((np.eye(3, dtype=np.float32), 160), (shift, 153)):
        monkeypatch.setattr(cv2, "findTransformECC", lambda *_, warp=warp: (1.0, warp))
        found, moved, sharp = scores.aligned(blurred(), CHELSEA), np.zeros_like(x), y.copy()
        moved[:, :columns], sharp[:, columns:] = x[:, 160 - columns :], 0
        error = np.square(moved - sharp)[:, :columns].mean()
        assert found["psnr_aligned"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
        similar = structural_similarity(moved, sharp, data_range=255, channel_axis=2, **window)[1]
        expected = similar[5:-5, 5 : min(columns, 155)].mean()
        assert found["ssim_aligned"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def backbones(tmp_path, monkeypatch):
    """Save random weights under torchvision's file names, so that nothing is downloaded."""
    from torchvision.models import alexnet, vgg16

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    for name, make in (("alexnet-owt-7be5be79.pth", alexnet), ("vgg16-397923af.pth", vgg16)):
        torch.save(make(weights=None).state_dict(), tmp_path / "checkpoints" / name)
    scores.deep_metric.cache_clear()
    yield tmp_path
    scores.deep_metric.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_deep_distances_grow_with_blur(name, backbones):
    near, far = (scores.SCORES[name](blurred(sigma), CHELSEA)[name] for sigma in (0.8, 4))
    assert 0 < near < far < 2
    assert scores.SCORES[name](CHELSEA, CHELSEA)[name] == pytest.approx(0, abs=1e-5)


def test_local_distances_use_only_available_backbones(backbones):
    """Distances without a local file are left out and reported with the missing path."""
    far = blurred(4)
    both = scores.SCORES["lpips"](far, CHELSEA) | scores.SCORES["dists"](far, CHELSEA)
    assert scores.local_distances(far, CHELSEA) == both
    assert scores.describe_distances() == "lpips: lower is better; dists: lower is better"
    missing = backbones / "checkpoints" / "vgg16-397923af.pth"
    missing.unlink()
    assert scores.local_distances(far, CHELSEA) == {"lpips": both["lpips"]}
    assert f"dists: left out, {missing} is missing" in scores.describe_distances()


@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_missing_backbone_raises_with_its_url(name, tmp_path, monkeypatch, capsys):
    scores.deep_metric.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=f"{name} needs https://.*checkpoints.*no network"):
        scores.deep_metric(name)
    assert "needs https://download.pytorch.org" in capsys.readouterr().out
