"""Reading and writing pictures: the one place where files become arrays and arrays become files."""

import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from ldm.data.packed import DamagedDatabase, database, list_packed, read_packed

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
SAME = 3  # of 255: an RGB profile that moves no colour farther is an sRGB
# What Pillow raises for files that are damaged.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, OSError)
DAMAGED = (*DAMAGED, struct.error, Image.DecompressionBombError)


class DamagedImage(ValueError):
    """An image file that cannot be decoded: training and scores pass it over."""


UNREADABLE = (DamagedImage, FileNotFoundError)
# Photographs that come inside the scikit-image package, for demonstrations and tests.
PHOTOGRAPHS = tuple("astronaut.png camera.png chelsea.png coffee.png motorcycle_left.png rocket.jpg".split())


def read_image(path: str | Path, max_megapixels: float | None = None) -> np.ndarray:
    """Read any picture as uint8 sRGB (h, w, 3), turned upright by its EXIF tag, transparency over white.

    Colours are converted by an embedded ICC profile; a damaged one, or one of another mode, is passed over.
    16-bit and 32-bit integer greys are scaled by 65535, float greys are taken to be in [0, 1].
    Raises FileNotFoundError if there is no such file and ValueError if Pillow cannot decode it, or without
    trying if it has more than `max_megapixels`.
    """
    with _opened(path) as image:
        return decode_image(image, max_megapixels)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture at a path; what goes wrong with it becomes a ValueError that names the file."""
    try:
        with open_image(Path(path)) as image:
            yield image
    except (FileNotFoundError, DamagedDatabase):
        raise
    except DAMAGED as error:
        raise DamagedImage(f"cannot read image {path}: {error}") from error


def decode_image(image: Image.Image, max_megapixels: float | None = None) -> np.ndarray:
    """What `read_image` makes of an opened picture. Raises what Pillow does, and ValueError."""
    pixels = image.width * image.height / 1e6
    if max_megapixels is not None and pixels > max_megapixels:
        raise ValueError(f"it has {pixels:.1f} megapixels, more than {max_megapixels:g}")
    return turn(_to_rgb(image), orientation(image))


def orientation(image: Image.Image) -> int:
    """EXIF's orientation 1 to 8 of a picture that is loaded, which turns a TIFF; 1 if its EXIF is damaged."""
    image.load()
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1


def turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, ...) as EXIF's orientation wants it to be shown."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


def open_image(path: Path) -> Image.Image:
    """The picture at a path, which may lie in an lmdb."""
    if database(path):
        return Image.open(read_packed(path))
    if not path.is_file():
        raise FileNotFoundError(f"image not found: {path}")
    return Image.open(path)


def read_rgba(path: str | Path) -> np.ndarray | None:
    """Read a picture that has transparency as uint8 sRGB (h, w, 4), upright; None if it has none."""
    with open_image(Path(path)) as image:
        if not image.has_transparency_data:
            return None
        return turn(np.array(_to_srgb(image).convert("RGBA")), orientation(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture, upright by its EXIF tag, from its header alone.

    Raises FileNotFoundError or ValueError as `read_image` does.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        turned = turned and image.format != "TIFF"  # Pillow gives that upright already
    return (height, width) if turned else (width, height)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64) * (255.0 if image.mode == "F" else 255.0 / 65535.0)
        return np.repeat(np.rint(grey.clip(0, 255)).astype(np.uint8)[..., None], 3, axis=2)
    image = _to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB or RGBA by the picture's ICC profile; as it is, to the bit, without one or with an sRGB."""
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = _transform_to_srgb(image.info.get("icc_profile") or b"", mode)
    if transform is None:
        return image
    converted = transform.apply(image.convert(mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=16)
def _transform_to_srgb(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for an sRGB, and for a profile that is damaged or not of this mode."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode == "RGB":
        colours = np.stack(np.mgrid[0:256:17, 0:256:17, 0:256:17], axis=-1).reshape(64, 64, 3)
        moved = np.asarray(transform.apply(Image.fromarray(colours.astype(np.uint8))))
        return transform if np.abs(moved - colours).max() > SAME else None
    return transform


def write_image(path: str | Path, image: np.ndarray, compress_level: int = 6) -> None:
    """Write uint8 (h, w), (h, w, 3) or (h, w, 4) as PNG; the file appears under its name once it is whole.

    Raises OSError that names the file.
    """
    picture = Image.fromarray(image)
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG", compress_level=compress_level))


def write_whole(path: str | Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a temporary file, which then gets its name. Raises OSError that names the file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def over_white(image: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) as it is, (h, w, 4) without its transparency."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """uint8 as it is, uint16 rounded to it."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (or numbers of its range) or uint16 (h, w, c) -> float32 (c, h, w) in [-1, 1]."""
    half = 65535 / 2 if image.dtype == np.uint16 else 255 / 2
    image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return image.float().div(half).sub(1)


def to_uint8(image: Tensor) -> np.ndarray:
    """Float (c, h, w) in [-1, 1] -> uint8 (h, w, c): clamped, then rounded."""
    return to_pixels(image, np.uint8)


def to_pixels(image: Tensor, dtype: np.dtype | type) -> np.ndarray:
    """Float (c, h, w) in [-1, 1] -> uint8 or uint16 (h, w, c), converted on the tensor's device."""
    half = np.iinfo(dtype).max / 2
    image = image.detach().float().clamp(-1, 1).add_(1).mul_(half).round_()
    image = image.to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return image.permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def natural_key(path: str | Path) -> tuple[list, str]:
    """Sort key that puts frame_2 before frame_10; names that differ in case alone have an order too."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part.lower() for part in parts], str(path)


def list_images(folder: str | Path) -> list[Path]:
    """Pictures below `folder` (by extension, links followed, hidden ones left out) in natural order.

    Raises FileNotFoundError if the folder does not exist or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}")
    if folder.suffix == ".lmdb":
        return sorted(list_packed(folder), key=natural_key)
    files = [Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    paths = [path for path in files if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    paths.sort(key=natural_key)
    if not paths:
        raise FileNotFoundError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {folder}")
    return paths


def photographs(names: tuple[str, ...] = PHOTOGRAPHS) -> list[Path]:
    """Paths of the photographs inside scikit-image: nothing to download."""
    from skimage import data

    return [Path(data.__file__).parent / name for name in names]


def side_by_side(images: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """uint8 pictures (h, w, 3) in one row, top-aligned on white, `gap` pixels apart."""
    height = max(image.shape[0] for image in images)
    row = np.full((height, sum(image.shape[1] + gap for image in images) - gap, 3), 255, np.uint8)
    x = 0
    for image in images:
        row[: image.shape[0], x : x + image.shape[1]] = image
        x += image.shape[1] + gap
    return row
