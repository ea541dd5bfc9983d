"""Restore whole photos of any size with a trained ControlLDM: padding, tiles, colour."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.model import open_control_model
from ldm.data.image import to_tensor, to_uint8
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.tiling import blend_tiles, pad_to_multiple, self_ensemble, tile_spans

MULTIPLE = 64  # pixels: the UNet halves the latents three times


@dataclass
class SamplingOptions:
    """Options for sampling the latents of one image, common to `python infer.py deblur` and `inpaint`."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 50
    method: str = "ddim"
    guidance_scale: float = 1.0
    control_scale: float = 1.0
    strength: float = 1.0
    seed: int = 0
    color_fix: bool = True

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def sample(self, model: ControlLDM, cond: Mapping, progress: Callable, **more: Any) -> Tensor:
        """Sample latents (1, 4, h, w) for the hint in `cond` and the prompts; see ControlLDM.sample."""
        model.control_scales = [self.control_scale] * (len(model.control_model.zero_convs) + 1)
        same = self.prompt == self.negative_prompt  # guidance between equal prompts changes nothing
        return model.sample(
            {**cond, "c_crossattn": [self.prompt]},
            1,
            self.steps,
            1.0 if same else self.guidance_scale,
            self.negative_prompt,
            method=self.method,
            strength=self.strength,
            progress=progress,
            **more,
        )


@dataclass
class Sampling(SamplingOptions):
    """Options for deblurring: see `python infer.py deblur --help`."""

    tile: int = 0
    overlap: int = 128
    self_ensemble: bool = False


def open_restorer(
    path: Path, base: Path | None, config: Path | None, device: torch.device, dtype: torch.dtype | None
) -> ControlLDM:
    """Load a ControlLDM onto a device; with a `dtype`, UNet and ControlNet (most of the work) use it."""
    model = open_control_model(path, base, config)
    if dtype is not None:  # on the CPU: the device never holds them in float32
        model.model.diffusion_model.to(dtype)
        model.control_model.to(dtype)
    return model.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def deblur_image(
    model: ControlLDM, image: np.ndarray, sampling: Sampling, progress: Callable = iter
) -> np.ndarray:
    """Restore uint8 (h, w, 3) at the same size. The same seed gives the same image.

    With `tile` (pixels, a multiple of 64) the network and the autoencoder see the image in overlapping tiles
    whose predictions are blended at every step, so that memory does not grow with the image.
    With `self_ensemble` the result is the mean over 8 flips and rotations, each sampled from its own noise.
    Raises ValueError if tile or overlap is not a multiple of 64, or the overlap is not below the tile.
    """
    tile, overlap = sampling.tile, sampling.overlap
    if tile < 0 or tile % MULTIPLE or (tile and (overlap % MULTIPLE or not 0 <= overlap < tile)):
        raise ValueError(f"tile and a smaller overlap must be multiples of 64, not {tile} and {overlap}")
    height, width = image.shape[:2]
    generator = sampling.generator()

    def restore(pixels: Tensor) -> Tensor:
        size = pixels.shape[-2] // 8, pixels.shape[-1] // 8
        tiles = Tiles(size, tile // 8 or max(size), overlap // 8 if tile else 0)
        start = None
        if sampling.strength < 1 or model.sees_hint_latent:
            start = tiles.blend(
                lambda y, x: model.encode_first_stage(pixels[..., times8(y), times8(x)]).mode()
            )
            start = start.float() * model.scale_factor
        sampler = TiledSampler(model, tiles)
        cond = {"c_concat": [(pixels + 1) / 2], "c_latent": start}
        more = {"x0": start, "sampler": sampler, "generator": generator}  # x0: used if strength is below 1
        latents = sampling.sample(model, cond, progress, **more)
        return tiles.blend(lambda y, x: model.decode_first_stage(latents[..., y, x]), scale=8)

    pixels = pad_to_multiple(to_tensor(image)[None], MULTIPLE).to(model.device)
    restored = self_ensemble(restore, pixels) if sampling.self_ensemble else restore(pixels)
    restored = to_uint8(restored[0, :, :height, :width])
    return fix_color(restored, image) if sampling.color_fix else restored


@dataclass
class Tiles:
    """Overlapping tiles of at most `side` latents over a latent image of `size`."""

    size: tuple[int, int]
    side: int
    overlap: int

    def blend(self, compute: Callable[[slice, slice], Tensor], scale: int = 1) -> Tensor:
        """Blend compute(y, x) of all tiles; it returns them `scale` times as large."""
        return blend_tiles(compute, *(tile_spans(n, self.side, self.overlap, 8) for n in self.size), scale)


class TiledSampler(DDIMSampler):
    """Sampler whose noise predictions are blended from tiles at every step."""

    def __init__(self, model: ControlLDM, tiles: Tiles):
        super().__init__(model)
        self.tiles = tiles

    def _eps(self, x: Tensor, t: Tensor, cond: Mapping, uncond: Mapping | None, scale: float):
        def part(ys: slice, xs: slice) -> Tensor:
            uncond_part = uncond and cut(uncond, ys, xs)
            return super(TiledSampler, self)._eps(x[..., ys, xs], t, cut(cond, ys, xs), uncond_part, scale)

        return self.tiles.blend(part)


def cut(cond: Mapping, ys: slice, xs: slice) -> dict:
    """Cut the hints of a conditioning, and their latent if there is one, to a tile of latents."""
    latent = cond.get("c_latent")
    latent = None if latent is None else latent[..., ys, xs]
    hints = [hint[..., times8(ys), times8(xs)] for hint in cond["c_concat"]]
    return {**cond, "c_concat": hints, "c_latent": latent}


def times8(span: slice) -> slice:
    """Convert a span of latents to pixels."""
    return slice(8 * span.start, 8 * span.stop)


def fix_color(restored: np.ndarray, source: np.ndarray, levels: int = 5) -> np.ndarray:
    """Add the fine detail of `restored` to the low band of `source`, which has the colours; uint8 (h, w, 3).

    The low band is the residual of `levels` levels of an a-trous wavelet transform (Mallat 1999, sec. 5.5).
    """
    restored = restored.astype(np.float32)
    fixed = restored - coarse(restored, levels) + coarse(source.astype(np.float32), levels)
    return np.rint(fixed.clip(0, 255)).astype(np.uint8)


def coarse(image: np.ndarray, levels: int) -> np.ndarray:
    """Compute the low band of float32 (h, w, 3): blur by (1, 2, 1) / 4 with gaps of 1, 2, 4, ... pixels."""
    for level in range(levels):
        kernel = np.zeros(2 ** (level + 1) + 1, np.float32)
        kernel[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        image = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return image
