"""Losses between restored and sharp images, for training restoration networks."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PixelLoss = Literal["mse", "l1", "charbonnier", "psnr"]
EPSILON = 1e-3  # of the Charbonnier loss, in the units of the images


def pixel_loss(restored: Tensor, sharp: Tensor, kind: PixelLoss = "mse") -> Tensor:
    """Return the mean squared error, absolute error or sqrt(difference^2 + EPSILON^2) (Charbonnier 1994).

    `psnr` is the mean over the images of log(mean squared error + 4 EPSILON^2), in which images count equally
    however strong their blur is (NAFNet's PSNR loss, Chen et al. 2022, without its factor).
    """
    restored = restored.float()
    if kind == "psnr":
        error = (restored - sharp).square().mean(dim=(1, 2, 3))
        return (error + 4 * EPSILON**2).log().mean()
    if kind == "charbonnier":
        return ((restored - sharp).square() + EPSILON**2).sqrt().mean()
    if kind == "l1":
        return F.l1_loss(restored, sharp)
    return F.mse_loss(restored, sharp)


def restoration_loss(
    restored: Tensor, sharp: Tensor, kind: PixelLoss = "mse", fft_weight: float = 0.0
) -> Tensor:
    """Return the pixel loss plus `fft_weight` times the loss of the Fourier transforms."""
    loss = pixel_loss(restored, sharp, kind)
    if fft_weight:
        loss = loss + fft_weight * fft_loss(restored, sharp)
    return loss


def fft_loss(restored: Tensor, sharp: Tensor) -> Tensor:
    """Return the mean absolute difference of 2D Fourier transforms, real and imaginary parts separately.

    Both are (b, c, h, w); the transform is not normalised (Cho et al., MIMO-UNet, ICCV 2021, equation 6).
    """
    difference = torch.fft.rfft2(restored.float() - sharp)
    return torch.view_as_real(difference).abs().mean()
