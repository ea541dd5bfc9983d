"""Mask files: which pixels are the hole, and which mask belongs to which photo."""

import contextlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ldm.data.decode import DamagedImage, decode, opened, tell_frames
from ldm.data.image import list_images

MARK = re.compile(r"_mask\d*$")  # a_mask.png, and a_mask001.png as LaMa's data sets have it
HOW = "paint the hole white (255) on black, without transparency"
SAMPLED = 100_000  # pixels: enough to tell paint from a photo
CHECKED = 500  # number of masks that are read before training to check a folder


def read_mask(path: str | Path, max_megapixels: float | None = None) -> np.ndarray:
    """Read a mask file as uint8 (h, w): 1 in the hole and 0 elsewhere.

    In an opaque mask the hole is brighter than 127, so soft brushes and JPEG noise become a hard edge. White
    paint on a transparent layer is the hole. In a photo with a transparent part that part is the hole.
    Pixels count as transparent up to an alpha of 127. A black mask has no hole.

    Raises FileNotFoundError and ValueError like `read_image`, and ValueError for a mask that is not black but
    nowhere brighter than 127 (such as values 0 and 1), for ambiguous or complete transparency, and for an
    opaque image in colour.
    """
    with opened(path) as file:
        decoded = decode(file, max_megapixels)
    tell_frames(path, decoded)
    image, rgba = decoded.rgb(), decoded.rgba()
    if rgba is not None and rgba[..., 3].min() <= 127:
        return _read_layer(rgba, path).astype(np.uint8)
    if (np.ptp(image, axis=2) > 32).mean() > 0.1:
        raise ValueError(f"{path} is an image in colour without transparency, not a mask: {HOW}")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if 0 < grey.max() <= 127:
        raise ValueError(f"{path}: the brightest value of this mask is {grey.max()} of 255: {HOW}")
    return (grey > 127).astype(np.uint8)


def _read_layer(rgba: np.ndarray, path: str | Path) -> np.ndarray:
    """Return the hole (h, w) of a partly transparent image (h, w, 4). Raises ValueError if ambiguous."""
    visible = rgba[..., 3] > 127
    if not visible.any():
        raise ValueError(f"{path} is transparent everywhere, so that it shows no hole: {HOW}")
    pixels = rgba[visible][:, :3]
    pixels = pixels[:: len(pixels) // SAMPLED + 1]
    if (pixels >= 240).all(axis=1).mean() > 0.99:
        return visible
    coarse = (pixels >> 4).astype(np.int64) @ (256, 16, 1)  # one of 16 ** 3 colours
    counts = np.sort(np.bincount(coarse))
    if counts[-2:].sum() < 0.8 * len(pixels):  # photos have many: their two most common cover 35%
        return ~visible
    colour = tuple(np.median(pixels, axis=0).astype(int).tolist())
    raise ValueError(
        f"{path}: what is not transparent is neither white paint nor a photo (its median colour is "
        f"{colour}), so that the hole may be either part: {HOW}"
    )


def read_hole(path: str | Path) -> np.ndarray:
    """Read a mask to train on like `read_mask`, but raise ValueError for a black one as well."""
    mask = read_mask(path)
    if not mask.any():
        raise ValueError(f"{path} has no hole to train on, its brightest value is 0 of 255: {HOW}")
    return mask


def check_masks(paths: Sequence[str | Path]) -> None:
    """Read up to CHECKED evenly spaced masks. Raises ValueError like `read_hole`.

    Damaged files are skipped; training reports them.
    """
    chosen = paths[:: max(1, -(-len(paths) // CHECKED))]
    for path in tqdm(chosen, "checking masks", unit="mask", leave=False, delay=2):
        with contextlib.suppress(DamagedImage):
            read_hole(path)


def resize_mask(mask: np.ndarray, size: tuple[int, int], path: str | Path) -> np.ndarray:
    """Resize a mask (h, w) read from `path` to `size` (h, w), with a warning.

    A pixel is in the hole if any part of it is. Raises ValueError if the aspect ratio changes by more than
    2%.
    """
    if mask.shape == tuple(size):
        return mask
    (h, w), (height, width) = mask.shape, size
    sizes = f"the mask {path} is {w}x{h}, its image {width}x{height} (width x height)"
    if not same_shape(mask.shape, size):
        raise ValueError(f"{sizes}: they must have the same shape")
    warnings.warn(f"{sizes}: it is resized", stacklevel=2)
    shrinks = h > height or w > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return (cv2.resize(mask.astype(np.float32), (width, height), interpolation=method) > 0).astype(np.uint8)


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return True if two sizes (h, w) have the same aspect ratio within 2%."""
    return 0.98 < (size[1] / size[0]) / (other[1] / other[0]) < 1.02


# ---- which mask belongs to which photo ---------------------------------------------------------------------


def list_photographs(folder: str | Path, masks: str | Path | None = None) -> list[Path]:
    """List the images below `folder` that are not masks (see without_masks).

    Raises FileNotFoundError if there is no photo.
    """
    return without_masks(list_images(folder), Path(folder), masks)


def without_masks(paths: list[Path], folder: Path, masks: str | Path | None = None) -> list[Path]:
    """Return `paths`, the images below `folder`, without the masks.

    Masks are NAME_mask and NAME_mask001 beside an image NAME, and `masks` (a file, or a folder with all its
    images) if it lies below `folder`. Raises FileNotFoundError if there is no photo.
    """
    names = {path.with_suffix("") for path in paths}
    inside = _seen_from(folder, masks) if masks else None
    if inside not in (None, folder):
        paths = [path for path in paths if not path.is_relative_to(inside)]
    paths = [path for path in paths if _without_mark(path) not in names]
    if not paths:
        raise FileNotFoundError(f"no photos in {folder}: all images there are masks")
    return paths


class MaskFolder:
    """Masks below a folder, found by the names of their photos; the folder is listed only once."""

    def __init__(self, folder: str | Path, photographs: str | Path):
        """List the masks below `folder`, without the photos if their folder `photographs` lies there too.

        Raises FileNotFoundError if there is no mask.
        """
        self.folder = Path(folder)
        paths = list_images(self.folder)
        inside = _seen_from(self.folder, photographs)
        known = set(list_photographs(inside)) if inside else set()
        self.paths = [path for path in paths if path not in known]
        if not self.paths:
            raise FileNotFoundError(f"no masks in {folder}: beside a photo NAME its mask is NAME_mask")
        self.named: dict[Path, list[Path]] = {}
        self.marked: dict[Path, list[Path]] = {}
        for path in self.paths:
            place = path.relative_to(self.folder)
            self.named.setdefault(place.with_suffix(""), []).append(path)
            if owner := _without_mark(place):
                self.marked.setdefault(owner, []).append(path)

    def of(self, name: Path) -> list[Path]:
        """Return the masks of a photo, given by its path below the folder of photos: NAME_mask and
        NAME_mask001, else NAME; [] if there is none."""
        key = name.with_suffix("")
        return self.marked.get(key) or self.named.get(key) or []

    def find(self, name: Path) -> Path:
        """Return the only mask of the photo `name`.

        Raises FileNotFoundError if there is none, ValueError if there are several.
        """
        found = self.of(name)
        if not found:
            wanted = f"it would be {name.stem}_mask or, in a folder of its own, {name.stem}"
            raise FileNotFoundError(f"no mask for {name} in {self.folder}: {wanted}")
        if len(found) > 1:
            raise ValueError(f"{name} has {len(found)} masks, {found[0]} and {found[1]}: leave one of them")
        return found[0]


def _without_mark(path: Path) -> Path | None:
    """Return the path, without suffix, of the photo that a mask belongs to; None if `path` is no mask."""
    stem, marks = MARK.subn("", path.stem)
    return path.with_name(stem) if marks and stem else None


def _seen_from(folder: Path, other: str | Path) -> Path | None:
    """Return `other` as a path that starts with `folder`; None if it is not at or below `folder`."""
    base, place = folder.resolve(), Path(other).resolve()
    return folder / place.relative_to(base) if place.is_relative_to(base) else None
