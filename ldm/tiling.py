"""Run networks on images of any size: padding to multiples, blended tiles, filled hidden colours."""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.image import to_pixels, to_tensor
from ldm.util import compute_dtype, computing_in

MULTIPLE = 16  # pixels: tile sides are rounded up to it, so that networks need no padding of their own


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (b, c, h, w) at the right and bottom by repeating its edge until `multiple` divides h and w."""
    h, w = image.shape[-2:]
    right, bottom = -w % multiple, -h % multiple
    return F.pad(image, (0, right, 0, bottom), mode="replicate") if right or bottom else image


def tile_spans(length: int, tile: int, overlap: int, multiple: int = 1) -> list[slice]:
    """Split a side into the fewest equal spans of at most `tile`; neighbours overlap by `overlap` or more.

    If there are several, their length is rounded up to `multiple`, but not above `tile`. Raises ValueError if
    `tile` is not larger than `overlap`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles need a size above their overlap, not tile {tile} and overlap {overlap}")
    if length <= tile:
        return [slice(0, length)]
    count = -((overlap - length) // (tile - overlap))  # rounded up, as the next line
    side = -((overlap - length - count * overlap) // count)
    side = min(tile, -(-side // multiple) * multiple)
    starts = [n * (length - side) // (count - 1) for n in range(count)]
    return [slice(start, start + side) for start in starts]


def gaussian_window(h: int, w: int, sigma: float = 0.3) -> Tensor:
    """Return a tile's weights (h, w): a gaussian of deviation `sigma` half-sides, 1 in the centre."""
    y, x = (torch.linspace(-1, 1, n + 2)[1:-1] for n in (h, w))
    return torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2))


def blend_tiles(
    compute: Callable[[slice, slice], Tensor],
    rows: list[slice],
    columns: list[slice],
    scale: int = 1,
    device: torch.device | None = None,
    progress: Callable = iter,
) -> Tensor:
    """Blend compute(y, x) (b, c, h, w) of every tile, `scale` times as large, with gaussian weights.

    The sum is float32 on `device`, by default the device of the first result. The result of a single tile is
    returned unchanged. `progress` wraps the list of tiles, as tqdm does.
    """
    tiles = [(y, x) for y in rows for x in columns]
    if len(tiles) == 1:
        return compute(*tiles[0])
    total = weights = window = None
    for y, x in progress(tiles):
        part = compute(y, x)
        if total is None:  # all tiles are of one size
            size = rows[-1].stop * scale, columns[-1].stop * scale
            total = torch.zeros(*part.shape[:2], *size, device=device or part.device)
            weights, window = total.new_zeros(size), gaussian_window(*part.shape[2:]).to(total)
        here = tuple(slice(span.start * scale, span.stop * scale) for span in (y, x))
        total[(..., *here)] += part.to(total) * window
        weights[here] += window
    return total / weights


def self_ensemble(restore: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Average `restore`, in float32, over 8 flips and rotations of (b, c, h, w), each undone afterwards.

    Errors that differ between rotations cancel, but some texture does too (Timofte et al. 2016, sec. 3.4).
    """

    def over_rotations(image: Tensor) -> Tensor:
        restored = (restore(torch.rot90(image, k, (2, 3))).float() for k in range(4))
        return sum(torch.rot90(x, -k, (2, 3)) for k, x in enumerate(restored))

    return (over_rotations(image) + over_rotations(image.flip(3)).flip(3)) / 8


def restore_tiled(
    image: Tensor,
    restore: Callable[[Tensor], Tensor],
    tile: int,
    overlap: int,
    progress: Callable = iter,
    scale: int = 1,
) -> Tensor:
    """Apply `restore` to overlapping tiles of (b, c, h, w), at most `tile` a side, and blend them.

    The sum is kept on the device of `image` (leave it on the CPU if it is large); `restore` may move a tile
    to another device and returns it `scale` times as large. Raises ValueError if `tile` is not larger than
    `overlap`.
    """
    rows, columns = (tile_spans(length, tile, overlap, MULTIPLE) for length in image.shape[-2:])
    return blend_tiles(lambda y, x: restore(image[..., y, x]), rows, columns, scale, image.device, progress)


def fill_hidden(pixels: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Fill uint8 or uint16 (h, w, 3) where `alpha` (h, w) is 0 with the colours of the visible surroundings.

    These hidden pixels are usually black or white. A completely hidden image is returned unchanged.
    """
    if alpha is None or alpha.all() or not alpha.any():
        return pixels
    hidden = alpha == 0
    filled = fill_smoothly(pixels.astype(np.float32), hidden.astype(np.uint8))
    return np.where(hidden[..., None], np.rint(filled).astype(pixels.dtype), pixels)


def fill_smoothly(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill the hole of float32 (h, w, c) from its surroundings, coarser with distance (pull-push pyramid).

    An image that is all hole becomes grey (127.5).
    """
    if not hole.any():
        return image
    height, width = hole.shape
    known = (hole == 0).astype(np.float32)
    if min(height, width) < 2 or not known.any():
        mean = image[hole == 0].mean(axis=0) if known.any() else 127.5
        return np.where(hole[..., None] > 0, mean, image).astype(np.float32)
    half = (max(1, width // 2), max(1, height // 2))
    weight = cv2.resize(known, half, interpolation=cv2.INTER_AREA)
    small = cv2.resize(image * known[..., None], half, interpolation=cv2.INTER_AREA)
    small = small / np.maximum(weight, 1e-6)[..., None]
    small = fill_smoothly(small, (weight == 0).astype(np.uint8))
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(hole[..., None] > 0, large, image)


@torch.inference_mode()
def restore_photo(
    image: np.ndarray,
    restore: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: str = "32",
    tile: int = 0,
    overlap: int = 64,
    progress: Callable = iter,
    scale: int = 1,
) -> np.ndarray:
    """Restore uint8 or uint16 (h, w, 3); `restore` maps (1, 3, h, w) in [-1, 1] on `device` to [-1, 1].

    The result has the image's dtype and is `scale` times as large, like the output of `restore`. With `tile`
    above 0 the image is processed in equal tiles of at most that size, blended over `overlap` pixels or more,
    so that the network's memory does not grow with the image; `progress` wraps the list of tiles, as tqdm
    does. Precision `auto` is 32 for 16-bit images.
    """
    deep = image.dtype == np.uint16 and precision == "auto"
    dtype = compute_dtype("32" if deep else precision, device)

    def run(part: Tensor) -> Tensor:
        with computing_in(dtype, device):
            return restore(part.to(device, memory_format=torch.channels_last)).float()

    whole = to_tensor(image)[None]  # (1, 3, h, w)
    restored = restore_tiled(whole, run, tile, overlap, progress, scale) if tile else run(whole)
    return to_pixels(restored[0], image.dtype)
