"""Flow matching: timesteps, Euler's method, and image restoration, in tiles for large images."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor

from ldm.data.image import to_tensor, to_uint8
from ldm.modules.flux import predict_velocity
from ldm.tiling import blend_tiles, tile_spans

TOKEN = 16  # side in pixels


def shift_timesteps(timesteps: Tensor, num_tokens: int) -> Tensor:
    """Shift timesteps towards noise, further for larger images; `num_tokens` counts only target tokens.

    t' = e^mu / (e^mu + 1/t - 1) with mu on the line through (256 tokens, 0.5) and (4096 tokens, 1.15).
    """
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return math.exp(mu) * timesteps / (math.exp(mu) * timesteps + (1 - timesteps))


def schedule(steps: int, num_tokens: int) -> Tensor:
    """Return the steps + 1 timesteps of a sampling run, from 1 to 0, float64."""
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), num_tokens)


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Iterable[float],
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """Integrate by Euler's method along `timesteps` (1 ... 0) from noise (b, c, h, w) to a clean latent.

    velocity(latent, timesteps (b,)) has the shape of the latent. `progress` may wrap the list of steps in a
    progress bar.
    """
    latent = noise.float()
    for now, following in progress(list(pairwise(map(float, timesteps)))):
        t = torch.full((len(latent),), now, device=latent.device)
        latent = latent + (following - now) * velocity(latent, t)
    return latent


@torch.no_grad()
def restore_image(
    model: Callable,
    autoencoder: Callable,
    prompt: dict[str, Tensor],
    image: np.ndarray,
    steps: int = 30,
    guidance: float = 2.5,
    resolution: int = 1024,
    seed: int = 0,
    progress: Callable[[list], Iterable] = iter,
    tile: int = 0,
    overlap: int = 128,
) -> np.ndarray:
    """Restore a uint8 image (h, w, 3) of any size; the output has the same size, aligned to the pixel.

    Images of more than resolution^2 pixels are restored at that size and scaled back, or at full size in
    tiles of at most `tile` pixels a side, whose velocities are blended at every step. Sides are padded to
    multiples of 16 by reflection and cropped again at the end, so that nothing is stretched or lost.
    Raises ValueError for fewer than 1 step, a resolution below 16, or tiles that are no multiples of 16.
    """
    if steps < 1 or resolution < TOKEN:
        raise ValueError(f"restoring needs at least 1 step and a resolution of 16, not {steps}, {resolution}")
    if tile % TOKEN or overlap % TOKEN or (tile and not 0 <= overlap < tile):
        raise ValueError(f"tile and a smaller overlap must be multiples of 16, not {tile} and {overlap}")
    height, width = image.shape[:2]
    scale = 1.0 if tile else min(1.0, resolution / math.sqrt(height * width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    small = image
    if (h, w) != (height, width):
        small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    padded = cv2.copyMakeBorder(small, 0, -h % TOKEN, 0, -w % TOKEN, cv2.BORDER_REFLECT)
    device = prompt["t5"].device
    pixels = to_tensor(padded)[None].to(device)  # (1, 3, 16 rows, 16 columns)
    side = tile if tile and height * width > resolution**2 else max(padded.shape)
    tile_tokens, overlap_tokens = side // TOKEN, min(overlap, side - TOKEN) // TOKEN
    grid = [tile_spans(n // TOKEN, tile_tokens, overlap_tokens) for n in padded.shape[:2]]

    def blend(compute: Callable[[tuple], Tensor], inside: int, outside: int) -> Tensor:
        """Blend compute(place) of all tiles. Token sides are `inside` input and `outside` output points."""

        def part(rows: slice, columns: slice) -> Tensor:
            rows = slice(rows.start * inside, rows.stop * inside)
            columns = slice(columns.start * inside, columns.stop * inside)
            return compute((..., rows, columns))

        return blend_tiles(part, *grid, outside)

    control = blend(lambda here: autoencoder.encode(pixels[here]), TOKEN, 2)  # (1, c, h / 8, w / 8)

    def velocity(latent: Tensor, t: Tensor) -> Tensor:
        def part(here: tuple) -> Tensor:
            parts = latent[here], control[here]
            return predict_velocity(model, *parts, prompt["t5"], prompt["pooled"], t, guidance)

        return blend(part, 2, 2)

    noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = math.prod(spans[0].stop for spans in grid)  # of one tile
    latent = sample(velocity, noise, schedule(steps, tokens), progress)
    restored = to_uint8(blend(lambda here: autoencoder.decode(latent[here]), 2, TOKEN)[0])[:h, :w]
    if (h, w) == (height, width):
        return restored
    return cv2.resize(restored, (width, height), interpolation=cv2.INTER_CUBIC)
