"""Images of any size through networks that want multiples, in bounded memory: padding and blended tiles."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn import functional as F

from ldm.data.image import to_tensor, to_uint8
from ldm.util import half_dtype


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """(b, c, h, w) grown at right and bottom, by repeating its edge, until `multiple` divides h and w."""
    h, w = image.shape[-2:]
    right, bottom = -w % multiple, -h % multiple
    return F.pad(image, (0, right, 0, bottom), mode="replicate") if right or bottom else image


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: neighbours share `overlap` or more, the last ends with the image."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def gaussian_window(h: int, w: int, sigma: float = 0.3) -> torch.Tensor:
    """Weights (h, w) of a tile in the blend: 1 in its middle, a gaussian of deviation `sigma` half-sides."""
    y, x = (torch.linspace(-1, 1, n + 2)[1:-1] for n in (h, w))
    return torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2))


def restore_tiled(
    image: torch.Tensor,
    restore: Callable[[torch.Tensor], torch.Tensor],
    tile: int,
    overlap: int,
    progress: Callable = iter,
) -> torch.Tensor:
    """`restore` applied to overlapping square tiles of (b, c, h, w), blended with gaussian weights.

    The sum is kept where `image` lies (leave it on the CPU if it is large); `restore` moves each tile where
    it likes and returns one of the same size. `progress` wraps the list of tile corners, as tqdm does.
    Raises ValueError if a tile is not larger than its overlap.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles need a size above their overlap, not tile {tile} and overlap {overlap}")
    h, w = image.shape[-2:]
    total = torch.zeros_like(image, dtype=torch.float32)
    weights = torch.zeros(h, w, device=image.device)
    window = gaussian_window(min(tile, h), min(tile, w)).to(image.device)
    corners = [(y, x) for y in tile_starts(h, tile, overlap) for x in tile_starts(w, tile, overlap)]
    for y, x in progress(corners):
        here = (..., slice(y, y + tile), slice(x, x + tile))
        restored = restore(image[here])
        total[here] += restored.to(total) * window
        weights[here[1:]] += window
    return total / weights


@torch.no_grad()
def restore_picture(
    image: np.ndarray,
    restore: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    precision: str = "32",
    tile: int = 0,
    overlap: int = 64,
    progress: Callable = iter,
) -> np.ndarray:
    """A uint8 picture (h, w, 3) through `restore`: (1, 3, h, w) in [-1, 1] on `device` -> the same.

    With `tile` above 0 the picture goes through in squares of that size, blended over `overlap` pixels, in
    memory that its size no longer counts for; `progress` wraps the list of them, as tqdm does.
    """
    dtype = half_dtype(precision)

    def run(part: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            return restore(part.to(device)).float()

    whole = to_tensor(image)[None]  # (1, 3, h, w)
    return to_uint8((restore_tiled(whole, run, tile, overlap, progress) if tile else run(whole))[0])
