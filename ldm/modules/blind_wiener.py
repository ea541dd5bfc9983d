"""A learned blind Wiener filter: estimates the blur of each window from its power spectrum and inverts it.

Motion by a vector multiplies an image's spectrum by a sinc along its direction, defocus by a ring-shaped
function: the local power spectrum shows which. A small network reads it in polar form, with circular
convolutions over the angle (a rotated blur gives rotated scores), and weights a bank of Wiener filters for
straight motion, disks and Gaussians. The weighted filters are applied by overlap-add.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, HOP = 192, 96  # pixels: Hann windows that sum to 1; each has a filter of its own
SUPPORT = 32  # pixels by which a filter reaches beyond its window
FFT = WINDOW + 2 * SUPPORT
PATCH, STRIDE = 64, 32  # pixels: patches whose power spectra are averaged over a window
LENGTHS = (3.0, 4.5, 6.5, 9.0, 12.5, 17.0, 23.0, 31.0)  # pixels: straight motion
RADII = (1.5, 2.5, 4.0, 6.0)  # pixels: defocus
SIGMAS = (0.8, 1.3, 2.0, 3.0)  # pixels: Gaussian blur
NOISE = (0.006, 0.03)  # ratio of noise to signal at low frequencies that the filters assume
ANGLES, BANK_ANGLES = 24, 12  # directions from 0 to 180 degrees: of the spectra, of the motion
RINGS = 30  # radii of the spectra


def transfer_functions() -> Tensor:
    """Return Fourier transforms of the bank's kernels: (n, FFT, FFT // 2 + 1), real since they are symmetric.

    First motion by length and angle, then disks, then Gaussians.
    """
    fy = torch.fft.fftfreq(FFT)[:, None].double()
    fx = torch.fft.rfftfreq(FFT)[None].double()
    radius = torch.hypot(fx, fy)
    found = []
    for length in LENGTHS:
        for angle in range(BANK_ANGLES):
            theta = math.pi * angle / BANK_ANGLES
            found.append(torch.sinc(length * (fx * math.cos(theta) + fy * math.sin(theta))))
    for disk in RADII:
        x = 2 * math.pi * disk * radius
        found.append(torch.where(x > 0, 2 * torch.special.bessel_j1(x) / x.clamp_min(1e-9), 1.0))
    for sigma in SIGMAS:
        found.append(torch.exp(-2 * (math.pi * sigma * radius) ** 2))
    return torch.stack(found)


def filter_bank() -> Tensor:
    """Return the identity, then Wiener filters of all kernels by noise level: (k, FFT * (FFT // 2 + 1)).

    The prior is a natural image's spectrum, which falls with the square of the frequency.
    """
    blur = transfer_functions()
    fy = torch.fft.fftfreq(FFT)[:, None].double()
    fx = torch.fft.rfftfreq(FFT)[None].double()
    prior = 1 + 400 * (fx**2 + fy**2)
    filters = [torch.ones_like(blur[:1])]
    for noise in NOISE:
        inverse = blur / (blur**2 + noise * prior)
        filters.append(inverse * (1 + noise))  # the mean colour stays
    return torch.cat(filters).float().flatten(1)


def ring_radii() -> Tensor:
    """Return the radii of the circles in a patch's spectrum, in frequency bins: (RINGS,)."""
    return torch.linspace(1.5, PATCH / 2 - 1.5, RINGS)


def polar_matrix() -> Tensor:
    """Return a matrix that samples a half spectrum on circles: (RINGS * ANGLES, PATCH * (PATCH // 2 + 1))."""
    columns = PATCH // 2 + 1
    matrix = torch.zeros(RINGS, ANGLES, PATCH, columns)
    for ring, radius in enumerate(ring_radii().tolist()):
        for angle in range(ANGLES):
            theta = math.pi * angle / ANGLES
            x, y = radius * math.cos(theta), radius * math.sin(theta)
            left, top = math.floor(x), math.floor(y)
            for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                if column < 0:  # the spectrum of a real image is symmetric
                    column, row = -column, -row
                matrix[ring, angle, row % PATCH, column] += weight
    return matrix.flatten(2).flatten(0, 1)


class BlurEstimator(nn.Module):
    """Polar log power spectra (b, 2 * RINGS, ANGLES) -> scores (b, k) of the filters of the bank."""

    def __init__(self, width: int = 64):
        super().__init__()

        def layer(enter: int, kernel: int) -> nn.Conv1d:
            return nn.Conv1d(enter, width, kernel, padding=kernel // 2, padding_mode="circular")

        slope = 2 * torch.log(ring_radii()).repeat(2)[:, None]
        self.register_buffer("slope", slope, persistent=False)
        self.body = nn.Sequential(
            layer(4 * RINGS, 3), nn.GELU(), layer(width, 5), nn.GELU(), layer(width, 5), nn.GELU()
        )
        self.pooled = nn.Linear(2 * width, width)
        self.motion = nn.Conv1d(2 * width, len(LENGTHS) * len(NOISE), 1)
        self.others = nn.Linear(2 * width, 1 + (len(RADII) + len(SIGMAS)) * len(NOISE))
        for module in (self.motion, self.others):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        self.others.bias.data[0] = 4.0  # starts near the identity

    def forward(self, spectra: Tensor) -> Tensor:
        spectra = spectra + self.slope  # flat for natural images
        mean = spectra.mean(2, keepdim=True)
        level = mean.mean(1, keepdim=True)
        x = torch.cat([spectra - mean, (mean - level).expand_as(spectra)], dim=1)
        x = self.body(x)  # (b, width, ANGLES)
        both = torch.cat([x.mean(2), x.amax(2)], dim=1)
        pooled = F.gelu(self.pooled(both))
        motion = self.motion(torch.cat([x, pooled[:, :, None].expand_as(x)], dim=1))
        odd = motion[:, :, 1::2]
        motion = (motion[:, :, ::2] + (odd + odd.roll(1, dims=2)) / 2) / 2  # at BANK_ANGLES
        others = self.others(both)
        motion = motion.unflatten(1, (len(NOISE), len(LENGTHS))).flatten(2)  # (b, noise, lengths * angles)
        rest = others[:, 1:].unflatten(1, (len(NOISE), -1))
        return torch.cat([others[:, :1], torch.cat([motion, rest], dim=2).flatten(1)], dim=1)


class BlindWiener(nn.Module):
    """forward(blurry): (b, 3, h, w) in [0, 1] -> a correction of its luma, to be added: (b, 1, h, w).

    Chroma is not filtered: it has little detail and much noise.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.estimator = BlurEstimator(width)
        self.register_buffer("bank", filter_bank(), persistent=False)  # (k, FFT * (FFT // 2 + 1))
        self.register_buffer("polar", polar_matrix(), persistent=False)
        hann = torch.hann_window(PATCH)
        self.register_buffer("patch_window", hann[:, None] * hann, persistent=False)
        hann = torch.hann_window(WINDOW)
        self.register_buffer("window", hann[:, None] * hann, persistent=False)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1), persistent=False)

    @torch.compiler.disable  # inductor has no Fourier transforms
    def forward(self, blurry: Tensor) -> Tensor:
        with torch.autocast(blurry.device.type, enabled=False):  # Fourier transforms need float32
            gray = (blurry.float() * self.luma).sum(1, keepdim=True)
            rows, columns = (math.ceil(side / HOP) + 1 for side in blurry.shape[2:])
            weights = self.scores(gray, rows, columns).softmax(-1)  # (b * rows * columns, k)
            return self.apply_filters(gray, weights @ self.bank, rows, columns) - gray

    def scores(self, gray: Tensor, rows: int, columns: int) -> Tensor:
        """Return the filters' scores for windows around multiples of HOP pixels: (b * rows * columns, k)."""
        y = HOP * torch.arange(rows, device=gray.device)
        x = HOP * torch.arange(columns, device=gray.device)
        return self.estimator(self.spectra(gray, y, x).flatten(0, 2))

    def spectra(self, gray: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return polar log power spectra around the positions y and x (pixels): (b, y, x, 2 * RINGS, ANGLES).

        Each is averaged over patches in a square of 192 pixels around the position, and one of 384.
        """
        gray = F.pad(gray, (0, max(0, PATCH - gray.shape[3]), 0, max(0, PATCH - gray.shape[2])), "replicate")
        patches = gray[:, 0].unfold(1, PATCH, STRIDE).unfold(2, PATCH, STRIDE)  # (b, y, x, PATCH, PATCH)
        patches = patches - patches.mean((3, 4), keepdim=True)
        power = torch.fft.rfft2(patches * self.patch_window).abs().square()
        power = power.flatten(3).permute(0, 3, 1, 2)  # (b, frequencies, y, x)
        spectra = []
        for reach in (2, 5):  # patches at either side
            padded = F.pad(power, [reach + 1] * 4, "replicate")
            mean = F.avg_pool2d(padded, 2 * reach + 1, 1)  # (b, frequencies, y + 2, x + 2)
            rows = self._nearest(y, mean.shape[2])
            columns = self._nearest(x, mean.shape[3])
            spectra.append(torch.log(mean[:, :, rows][:, :, :, columns] + 1e-4))
        spectra = torch.stack(spectra, dim=1)  # (b, 2, frequencies, rows, columns)
        spectra = spectra.permute(0, 3, 4, 1, 2) @ self.polar.T  # (b, rows, columns, 2, RINGS * ANGLES)
        return spectra.unflatten(4, (RINGS, ANGLES)).flatten(3, 4)

    @staticmethod
    def _nearest(centers: Tensor, patches: int) -> Tensor:
        """Return the index of the patch nearest to each position; one patch was added at either side."""
        return (torch.round((centers - PATCH // 2) / STRIDE).long() + 1).clamp(0, patches - 1)

    def apply_filters(self, image: Tensor, filters: Tensor, rows: int, columns: int) -> Tensor:
        """Filter each window of (b, 1, h, w) by its own filter, by overlap-add."""
        b, _, h, w = image.shape
        right, below = columns * HOP - w, rows * HOP - h
        mode = "reflect" if min(h, w) > max(HOP, right, below) else "replicate"
        padded = F.pad(image, (HOP, right, HOP, below), mode)
        windows = padded.unfold(2, WINDOW, HOP).unfold(3, WINDOW, HOP)  # (b, 1, rows, columns, y, x)
        windows = F.pad(windows * self.window, [SUPPORT] * 4)
        filters = filters.view(b, 1, rows, columns, FFT, -1)
        filtered = torch.fft.irfft2(torch.fft.rfft2(windows) * filters, s=(FFT, FFT))
        stacked = filtered.permute(0, 1, 4, 5, 2, 3).reshape(b, FFT**2, rows * columns)
        size = (rows + 1) * HOP + 2 * SUPPORT, (columns + 1) * HOP + 2 * SUPPORT
        summed = F.fold(stacked, size, FFT, stride=HOP)
        start = HOP + SUPPORT
        return summed[:, :, start : start + h, start : start + w]
