"""Mask files: which pixels are the hole, and which mask belongs to which photograph."""

import contextlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ldm.data.image import DamagedImage, decode, list_images, opened, tell_frames

MARK = re.compile(r"_mask\d*$")  # a_mask.png, and a_mask001.png as LaMa's data sets have it
HOW = "paint the hole white (255) on black, without transparency"
SAMPLED = 100_000  # pixels are enough to tell paint from a photograph
CHECKED = 500  # masks are enough to see what a folder holds


def read_mask(path: str | Path) -> np.ndarray:
    """The hole that a mask file describes: uint8 (h, w), 1 in the hole and 0 elsewhere.

    An opaque mask: the hole is what is brighter than 127, so soft brushes and JPEG noise become a hard edge.
    White paint on a transparent layer: the paint is the hole. A photograph with a transparent part: that part
    is the hole. Pixels count as transparent up to an alpha of 127. A black mask has no hole.

    Raises FileNotFoundError and ValueError as `read_image` does, and ValueError for a mask that is neither
    black nor has white (values 0 and 1), for transparency that can be read in two ways, and for a colour
    photograph without transparency.
    """
    with opened(path) as file:
        decoded = decode(file)
    tell_frames(path, decoded)
    image, rgba = decoded.rgb(), decoded.rgba()
    if rgba is not None:
        image, visible = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] > 127
        if not visible.all():
            return _read_layer(image, visible, path).astype(np.uint8)
    pixels = _sampled(image.reshape(-1, 3))
    if (np.ptp(pixels, axis=1) > 32).mean() > 0.1 and _is_photograph(pixels):
        raise ValueError(f"{path} is a photograph without transparency, not a mask: {HOW}")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if 0 < grey.max() <= 127:
        raise ValueError(f"{path}: the brightest value of this mask is {grey.max()} of 255: {HOW}")
    return (grey > 127).astype(np.uint8)


def _read_layer(image: np.ndarray, visible: np.ndarray, path: str | Path) -> np.ndarray:
    """The hole (h, w) of a picture (h, w, 3) that is `visible` (h, w) in parts; ValueError if unclear."""
    if not visible.any():
        raise ValueError(f"{path} is transparent everywhere, so that it shows no hole: {HOW}")
    pixels = _sampled(image[visible])
    if (pixels >= 240).all(axis=1).mean() > 0.99:
        return visible
    if _is_photograph(pixels):
        return ~visible
    colour = tuple(np.median(pixels, axis=0).astype(int).tolist())
    raise ValueError(
        f"{path}: what is not transparent is neither white paint nor a photograph (its median colour is "
        f"{colour}), so that the hole may be either part: {HOW}"
    )


def _sampled(pixels: np.ndarray) -> np.ndarray:
    """At most about SAMPLED of pixels (n, 3), evenly spread."""
    return pixels[:: len(pixels) // SAMPLED + 1]


def _is_photograph(pixels: np.ndarray) -> bool:
    """Whether pixels (n, 3) have many colours: the two most common of 16 ** 3 coarse ones hold less than 80%.

    Of scikit-image's photographs they hold at most 35%, of masks nearly all.
    """
    coarse = (pixels >> 4).astype(np.int64) @ (256, 16, 1)
    counts = np.sort(np.bincount(coarse))[::-1]
    return counts[:2].sum() < 0.8 * len(pixels)


def read_hole(path: str | Path) -> np.ndarray:
    """`read_mask` of a mask to train on. Raises ValueError also for a black one."""
    mask = read_mask(path)
    if not mask.any():
        raise ValueError(f"{path} has no hole to train on, its brightest value is 0 of 255: {HOW}")
    return mask


def check_masks(paths: Sequence[str | Path]) -> None:
    """Read up to CHECKED masks, evenly spread. Raises ValueError for a mask without a hole.

    Damaged files are passed over: training reports them when it meets them.
    """
    chosen = paths[:: max(1, -(-len(paths) // CHECKED))]
    for path in tqdm(chosen, "checking masks", unit="mask", leave=False, delay=2):
        with contextlib.suppress(DamagedImage):
            read_hole(path)


def resize_mask(mask: np.ndarray, size: tuple[int, int], path: str | Path) -> np.ndarray:
    """A mask (h, w) from `path` at another size of the same shape (h, w), with a warning.

    A pixel is in the hole if any part of it is. Raises ValueError for a mask of another shape: more than 2%
    wider or higher.
    """
    if mask.shape == tuple(size):
        return mask
    (h, w), (height, width) = mask.shape, size
    sizes = f"the mask {path} is {w}x{h}, its picture {width}x{height} (width x height)"
    if not same_shape(mask.shape, size):
        raise ValueError(f"{sizes}: they must have the same shape")
    warnings.warn(f"{sizes}: it is resized", stacklevel=2)
    shrinks = h > height or w > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return (cv2.resize(mask.astype(np.float32), (width, height), interpolation=method) > 0).astype(np.uint8)


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (h, w) have the same aspect ratio within 2%."""
    return 0.98 < (size[1] / size[0]) / (other[1] / other[0]) < 1.02


# ---- which mask belongs to which photograph ----------------------------------------------------------------


def list_photographs(folder: str | Path, masks: str | Path | None = None) -> list[Path]:
    """Images below `folder` that are not masks (see without_masks).

    Raises FileNotFoundError if there is no photograph.
    """
    return without_masks(list_images(folder), Path(folder), masks)


def without_masks(paths: list[Path], folder: Path, masks: str | Path | None = None) -> list[Path]:
    """The photographs among `paths`, the images below `folder`.

    Masks are NAME_mask and NAME_mask001 beside an image NAME, and `masks` (a file, or a folder and all below
    it) if it lies below `folder`. Raises FileNotFoundError if there is no photograph.
    """
    names = {path.with_suffix("") for path in paths}
    inside = _seen_from(folder, masks) if masks else None
    if inside not in (None, folder):
        paths = [path for path in paths if not path.is_relative_to(inside)]
    paths = [path for path in paths if _without_mark(path) not in names]
    if not paths:
        raise FileNotFoundError(f"no photographs in {folder}: all pictures there are masks")
    return paths


class MaskFolder:
    """The masks below a folder, by the names of their photographs; the folder is listed once."""

    def __init__(self, folder: str | Path, photographs: str | Path):
        """`photographs` is the folder of the photographs, which may lie beside their masks.

        Raises FileNotFoundError if there is no mask.
        """
        self.folder = Path(folder)
        paths = list_images(self.folder)
        inside = _seen_from(self.folder, photographs)
        known = set(list_photographs(inside)) if inside else set()
        self.paths = [path for path in paths if path not in known]
        if not self.paths:
            raise FileNotFoundError(f"no masks in {folder}: beside a photograph NAME its mask is NAME_mask")
        self.named: dict[Path, list[Path]] = {}
        self.marked: dict[Path, list[Path]] = {}
        for path in self.paths:
            place = path.relative_to(self.folder)
            self.named.setdefault(place.with_suffix(""), []).append(path)
            if owner := _without_mark(place):
                self.marked.setdefault(owner, []).append(path)

    def of(self, name: Path) -> list[Path]:
        """The masks of the photograph `name`, its path below the folder of photographs: NAME_mask and
        NAME_mask001, or else NAME; perhaps none."""
        key = name.with_suffix("")
        return self.marked.get(key) or self.named.get(key) or []

    def find(self, name: Path) -> Path:
        """The one mask of the photograph `name`.

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
    """The path of the photograph whose mask is called so, without a suffix; None if it is no mask's name."""
    stem, marks = MARK.subn("", path.stem)
    return path.with_name(stem) if marks and stem else None


def _seen_from(folder: Path, other: str | Path) -> Path | None:
    """`other` as a path in a listing of `folder`, or `folder` itself; None if it lies elsewhere."""
    base, place = folder.resolve(), Path(other).resolve()
    return folder / place.relative_to(base) if place.is_relative_to(base) else None
