"""Metrics that papers report beside PSNR and SSIM, each with its definition."""

import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import nn

from ldm.alignment import measure_movement
from ldm.data.image import to_tensor
from ldm.metrics import DATA_RANGE, psnr, ssim

Values = dict[str, float]
# Definitions of the metrics, and the papers that report them.
ABOUT = {
    "psnr": "mean of each image's PSNR of uint8 RGB: all deblurring papers",
    "ssim": "11 x 11 gaussian of sigma 1.5 in each channel, uint8 RGB (Wang et al. 2004, scikit-image)",
    "ssim3d": "11 x 11 x 11 gaussian over height, width and channels: NAFNet and the published GoPro tables",
    "psnr_y": "of MATLAB's Y channel (ITU-R BT.601, 16 to 235): super-resolution and deraining papers",
    "ssim_y": "of the Y channel: super-resolution and deraining papers",
    "psnr_aligned": "after scaling the brightness and an ECC homography, where both are: RealBlur's tables",
    "ssim_aligned": "after the same alignment: RealBlur's tables",
    "shift_px": "distance in pixels by which the middle is shifted, where that can be measured",
    "scale_percent": "size of what is shown in percent, 100 without zoom, where that can be measured",
    "lpips": "LPIPS 0.1 on AlexNet, lower is better (Zhang et al. 2018): perceptual and diffusion papers",
    "dists": "DISTS on VGG-16, lower is better (Ding et al. 2022): perceptual and diffusion papers",
}
BACKBONES = {  # networks of torchvision that LPIPS and DISTS are computed with
    "lpips": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "dists": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
_ONE_AT_A_TIME = threading.Lock()  # torchmetrics' objects are stateful


def plain(restored: np.ndarray, sharp: np.ndarray) -> Values:
    return {"psnr": psnr(restored, sharp), "ssim": ssim(restored, sharp)}


def ssim3d(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """Return SSIM of uint8 (h, w, 3) with an 11 x 11 x 11 window over height, width and channels.

    Borders are repeated. It is closer to 1 than `ssim`, because the three channels are nearly the same image.
    """
    line = cv2.getGaussianKernel(11, 1.5)
    mix = np.zeros((3, 3))  # the window over the channels: [to, from], red and blue repeated outwards
    for to in range(3):
        np.add.at(mix[to], np.clip(np.arange(to - 5, to + 6), 0, 2), line[:, 0])

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(x, cv2.CV_64F, line, line, borderType=cv2.BORDER_REPLICATE) @ mix.T

    x, y = restored.astype(np.float64), sharp.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return {"ssim3d": float((top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())}


def luma(image: np.ndarray) -> np.ndarray:
    """Return MATLAB's Y (rgb2ycbcr) of uint8 RGB (h, w, 3): float (h, w), 16 to 235, not rounded."""
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def on_luma(restored: np.ndarray, sharp: np.ndarray) -> Values:
    x, y = luma(restored), luma(sharp)
    return {"psnr_y": _decibels(np.square(x - y).mean()), "ssim_y": float(_ssim_map(x, y)[5:-5, 5:-5].mean())}


def aligned(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """Return PSNR and SSIM after RealBlur's alignment, over the pixels that both images have.

    The brightness is scaled by least squares, then a homography is found that maximises the enhanced
    correlation (Evangelidis and Psarakis 2008) with the sharp image. Pixels that only one image has are black
    in both, and SSIM leaves out a margin of 5 pixels. Raises ValueError if no homography is found.
    """
    x, y = restored.astype(np.float64) / DATA_RANGE, sharp.astype(np.float64) / DATA_RANGE
    x = x * (x * y).sum() / max((x * x).sum(), 1e-12)
    grey, target = (cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY) for image in (x, y))
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 0)
    start = np.eye(3, dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(target, grey, start, cv2.MOTION_HOMOGRAPHY, stop, None, 5)
    except cv2.error as error:
        raise ValueError(f"cannot be aligned: {error.err}") from error
    size, back = (y.shape[1], y.shape[0]), cv2.WARP_INVERSE_MAP
    x = x.astype(np.float32)  # OpenCV 5.0 warps float64 wrongly with cubics
    x = cv2.warpPerspective(x, warp, size, flags=cv2.INTER_CUBIC | back, borderMode=cv2.BORDER_REFLECT)
    both = cv2.warpPerspective(np.ones(y.shape[:2]), warp, size, flags=cv2.INTER_NEAREST | back) > 0
    error = np.square(x - y)[both].mean() * DATA_RANGE**2
    x, y = (DATA_RANGE * image * both[..., None] for image in (x, y))
    similar = np.mean([_ssim_map(x[..., c], y[..., c])[5:-5, 5:-5] for c in range(3)], axis=0)
    return {"psnr_aligned": _decibels(error), "ssim_aligned": float(similar[both[5:-5, 5:-5]].mean())}


def moved(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """Return shift and zoom against the sharp image, NaN where they cannot be measured."""
    found = measure_movement(restored, sharp)
    return {
        "shift_px": found.shift,
        "shift_x": found.x,
        "shift_y": found.y,
        "scale_percent": found.scale,
    }


def _ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(x, y, data_range=DATA_RANGE, full=True, **window)[1]


def _decibels(error: float) -> float:
    return float(10 * np.log10(DATA_RANGE**2 / error)) if error else float("inf")


@torch.no_grad()
def deep_distance(name: str, restored: np.ndarray, sharp: np.ndarray) -> Values:
    """Return LPIPS or DISTS of uint8 (h, w, 3), by torchmetrics."""
    x, y = ((to_tensor(image)[None] + 1) / 2 for image in (restored, sharp))  # [0, 1]
    with _ONE_AT_A_TIME:
        return {name: float(deep_metric(name)(x, y))}


def backbone_file(name: str) -> Path:
    """Return the path at which torchvision stores the network of LPIPS or DISTS."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(BACKBONES[name]).name)


def local_distances(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """Return LPIPS and DISTS, each only if its backbone is on this machine: nothing is downloaded."""
    values = {}
    for name in BACKBONES:
        if backbone_file(name).is_file():
            values |= deep_distance(name, restored, sharp)
    return values


def describe_distances() -> str:
    """Describe which distances `local_distances` computes, and which files the others need."""
    files = {name: backbone_file(name) for name in BACKBONES}
    return "; ".join(
        f"{name}: {'lower is better' if file.is_file() else f'left out, {file} is missing'}"
        for name, file in files.items()
    )


@cache
def deep_metric(name: str) -> nn.Module:
    """Build LPIPS or DISTS. torchvision downloads the backbone once; a message announces it.

    Raises FileNotFoundError that names the missing file and its URL.
    """
    from torchmetrics.functional.image.dists import DISTSNetwork  # its Metric loads VGG anew for every image
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    url = BACKBONES[name]
    file = backbone_file(name)
    if not file.is_file():
        print(f"{name.upper()} needs {url}, which is downloaded to {file}")
    try:
        if name == "dists":
            return DISTSNetwork().eval()
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except (URLError, OSError) as error:
        raise FileNotFoundError(f"{name} needs {url} at {file}, which is not there: {error}") from error


# What each flag of evaluate.py adds.
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], Values]] = {
    "ssim3d": ssim3d,
    "y": on_luma,
    "align": aligned,
    "shift": moved,
    **{name: partial(deep_distance, name) for name in BACKBONES},
}
