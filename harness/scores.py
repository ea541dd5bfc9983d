"""The figures that papers print beside PSNR and SSIM, each with its definition; baselines to compare with."""

import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import wiener
from torch import nn

from harness.profile import peak_resident_memory
from ldm.data.image import read_image, read_rgba, to_tensor, to_uint8
from ldm.device import choose_device
from ldm.metrics import DATA_RANGE, psnr, ssim
from ldm.util import check_package

Values = dict[str, float]
# What the names of figures mean, and who prints them.
ABOUT = {
    "psnr": "mean of each picture's PSNR of uint8 RGB: all deblurring papers",
    "ssim": "11 x 11 gaussian of sigma 1.5 in each channel, uint8 RGB (Wang et al. 2004, scikit-image)",
    "ssim3d": "11 x 11 x 11 gaussian over height, width and channels: NAFNet and the published GoPro tables",
    "psnr_y": "of MATLAB's Y channel (ITU-R BT.601, 16 to 235): super-resolution and deraining papers",
    "ssim_y": "of the Y channel: super-resolution and deraining papers",
    "psnr_aligned": "after scaling the brightness and an ECC homography, where both are: RealBlur's tables",
    "ssim_aligned": "after the same alignment: RealBlur's tables",
    "lpips": "LPIPS 0.1 on AlexNet, lower is better (Zhang et al. 2018): perceptual and diffusion papers",
    "dists": "DISTS on VGG-16, lower is better (Ding et al. 2022): perceptual and diffusion papers",
}
BACKBONES = {  # of torchvision: what LPIPS and DISTS look through
    "lpips": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "dists": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
_LOADING = threading.Lock()


def plain(restored: np.ndarray, sharp: np.ndarray) -> Values:
    return {"psnr": psnr(restored, sharp), "ssim": ssim(restored, sharp)}


def ssim3d(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """SSIM whose window is 11 x 11 x 11 over height, width and channel, the border repeated on all sides.

    uint8 (h, w, 3). Near 1 sooner than `ssim`: the three channels are nearly the same picture.
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
    """MATLAB's Y (rgb2ycbcr) of uint8 RGB (h, w, 3): float (h, w), 16 to 235, not rounded."""
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def on_luma(restored: np.ndarray, sharp: np.ndarray) -> Values:
    x, y = luma(restored), luma(sharp)
    return {"psnr_y": _decibels(np.square(x - y).mean()), "ssim_y": float(_ssim_map(x, y)[5:-5, 5:-5].mean())}


def aligned(restored: np.ndarray, sharp: np.ndarray) -> Values:
    """PSNR and SSIM after RealBlur's alignment, over the pixels that both pictures have.

    The brightness is scaled by least squares, then a homography is found that maximises the enhanced
    correlation (Evangelidis and Psarakis 2008) with the sharp picture. What one has alone is black in both,
    and SSIM leaves out a margin of 5 pixels. Raises ValueError if no homography is found.
    """
    x, y = restored.astype(np.float64) / DATA_RANGE, sharp.astype(np.float64) / DATA_RANGE
    x = x * (x * y).sum() / max((x * x).sum(), 1e-12)
    grey, target = (cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY) for image in (x, y))
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 0)
    form = cv2.MOTION_HOMOGRAPHY
    try:
        _, warp = cv2.findTransformECC(target, grey, np.eye(3, dtype=np.float32), form, stop, None, 5)
    except cv2.error as error:
        raise ValueError(f"cannot be aligned: {error.err}") from error
    size, back = (y.shape[1], y.shape[0]), cv2.WARP_INVERSE_MAP
    x = x.astype(np.float32)  # OpenCV 5.0 warps float64 wrongly by cubics
    x = cv2.warpPerspective(x, warp, size, flags=cv2.INTER_CUBIC | back, borderMode=cv2.BORDER_REFLECT)
    both = cv2.warpPerspective(np.ones(y.shape[:2]), warp, size, flags=cv2.INTER_NEAREST | back) > 0
    error = np.square(x - y)[both].mean() * DATA_RANGE**2
    x, y = (DATA_RANGE * image * both[..., None] for image in (x, y))
    similar = np.mean([_ssim_map(x[..., c], y[..., c])[5:-5, 5:-5] for c in range(3)], axis=0)
    return {"psnr_aligned": _decibels(error), "ssim_aligned": float(similar[both[5:-5, 5:-5]].mean())}


def _ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(x, y, data_range=DATA_RANGE, full=True, **window)[1]


def _decibels(error: float) -> float:
    return float(10 * np.log10(DATA_RANGE**2 / error)) if error else float("inf")


@torch.no_grad()
def deep_distance(name: str, restored: np.ndarray, sharp: np.ndarray) -> Values:
    """LPIPS or DISTS of uint8 (h, w, 3), by torchmetrics."""
    with _LOADING:
        network = deep_network(name)
    x, y = (to_tensor(image)[None] for image in (restored, sharp))  # [-1, 1]
    return {name: float(network(x, y) if name == "lpips" else network((x + 1) / 2, (y + 1) / 2))}


@cache
def deep_network(name: str) -> nn.Module:
    """LPIPS's or DISTS's network. The backbone is torchvision's file, downloaded once, which is announced.

    Raises FileNotFoundError that says what is missing where.
    """
    from torchmetrics.functional.image import dists, lpips

    url = BACKBONES[name]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not file.is_file():
        print(f"{name.upper()} looks through {url}, which goes to {file}")
    try:
        network = lpips._NoTrainLpips(net="alex") if name == "lpips" else dists.DISTSNetwork()
    except (URLError, OSError) as error:
        raise FileNotFoundError(f"--{name} needs {url} at {file}, and it cannot be had: {error}") from error
    return network.eval()


# What each flag of evaluate.py adds.
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], Values]] = {
    "ssim3d": ssim3d,
    "y": on_luma,
    "align": aligned,
    **{name: partial(deep_distance, name) for name in BACKBONES},
}


# ---- baselines ---------------------------------------------------------------------------------------------


def read_kernel(path: Path) -> np.ndarray:
    """The blur kernel in a picture, (h, w): its grey values, black where it is transparent."""
    grey, rgba = read_image(path).mean(axis=2), read_rgba(path)
    return grey if rgba is None else rgba[..., :3].mean(axis=2) * rgba[..., 3] / 255


def load_baseline(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What restores uint8 (h, w, 3): Wiener's filter for a blur kernel (a picture or .npy), or a network.

    Networks are those that the package spandrel recognises. Raises ValueError or FileNotFoundError.
    """
    if path.suffix.lower() not in (".pth", ".pt", ".ckpt", ".safetensors"):
        kernel = np.load(path) if path.suffix == ".npy" else read_kernel(path)
        if kernel.ndim != 2 or kernel.min() < 0 or not kernel.sum():
            raise ValueError(f"{path} is no blur kernel: (h, w), not negative, not all zero")
        return lambda blurry: deconvolve(blurry, kernel / kernel.sum())
    check_package("spandrel", f"{path}, a network of others,")
    import spandrel

    try:
        model = spandrel.ModelLoader(choose_device()).load_from_file(path)
    except spandrel.UnsupportedModelError as error:
        raise ValueError(f"{path} is no network that spandrel recognises") from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.scale != 1 or model.input_channels != 3:
        raise ValueError(f"{path} ({model.architecture.name}) restores no RGB pictures at their own size")
    return lambda blurry: _run(model, blurry)


@torch.no_grad()
def _run(model: Callable, blurry: np.ndarray) -> np.ndarray:
    x = ((to_tensor(blurry)[None] + 1) / 2).to(model.device)
    return to_uint8(model(x)[0] * 2 - 1)


def deconvolve(blurry: np.ndarray, kernel: np.ndarray, balance: float = 0.01) -> np.ndarray:
    """Wiener's filter with a Laplacian prior (scikit-image) on uint8 (h, w, 3), the border mirrored."""
    margin = max(kernel.shape)
    padded = np.pad(blurry / 255, [(margin, margin), (margin, margin), (0, 0)], mode="reflect")
    restored = np.stack([wiener(padded[..., c], kernel, balance) for c in range(3)], axis=2)
    return np.rint(restored[margin:-margin, margin:-margin].clip(0, 1) * 255).astype(np.uint8)


def timed(restore: Callable[[np.ndarray], np.ndarray], blurry: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The result, the seconds it took, and the MiB held at most (on CUDA allocated, else by the process)."""
    start = time.perf_counter()
    restored = restore(blurry)
    seconds = time.perf_counter() - start
    cuda = choose_device().type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else peak_resident_memory() or 0
    return restored, seconds, memory / 2**20
