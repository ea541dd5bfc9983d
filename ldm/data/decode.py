"""Decode image files of any kind to pixels: formats, frames, colours, orientation."""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

from ldm.data.tiff import as_image, count_images, is_tiff, open_tiff, page_orientation, read_page, scale

# Formats that are often found among photos but are not read here.
LEFT_OUT = {
    *(".heic .heif .hif .jxl .jxr .wdp .exr .hdr .svg .psd .psb .xcf .kra .eps .ai".split()),
    *(".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .rw2 .orf .pef .srw .x3f .3fr .iiq .rwl".split()),
}
SAME = 3  # of 255: an RGB profile that changes no colour by more counts as sRGB
# The errors that Pillow raises for damaged files.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, OSError)
DAMAGED = (*DAMAGED, EOFError, MemoryError, struct.error)
# Users' own files may have any size; the web page, which accepts other people's, sets `max_megapixels`.
Image.MAX_IMAGE_PIXELS = None


class DamagedImage(ValueError):
    """Error for an image file that cannot be decoded; training and evaluation skip the file."""


@dataclass
class Decoded:
    """First image of a file as stored; `orientation` is EXIF's, 1 to 8."""

    image: Image.Image  # 8 bits per channel
    orientation: int
    frames: int = 1
    deep: np.ndarray | None = None  # uint16 (h, w, 1 to 4) of a TIFF with more bits

    def rgb(self) -> np.ndarray:
        """Return uint8 sRGB (h, w, 3), upright, with transparency over white."""
        image = _to_srgb(self.image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return turn(np.array(image.convert("RGB")), self.orientation)

    def rgba(self) -> np.ndarray | None:
        """Return uint8 sRGB (h, w, 4), upright; None if the image has no transparency."""
        if not self.image.has_transparency_data:
            return None
        return turn(np.array(_to_srgb(self.image).convert("RGBA")), self.orientation)


def tell_frames(path: str | Path, decoded: Decoded) -> None:
    """Warn if only the first of several frames was read."""
    if decoded.frames > 1:
        warnings.warn(f"{path}: only the first of {decoded.frames} frames is read", stacklevel=3)


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open an image file. Raises FileNotFoundError, or DamagedImage that names the file for other errors."""
    path = Path(path)
    if path.suffix.lower() in LEFT_OUT:
        raise DamagedImage(
            f"cannot read image {path}: {path.suffix} files are not read, convert it to PNG or JPEG"
        )
    try:
        if not path.is_file():
            raise FileNotFoundError(f"image not found: {path}")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        reason = re.sub(r" <_io\.\S+ .*>$", "", str(error))  # Pillow appends the repr of an open file
        raise DamagedImage(f"cannot read image {path}: {reason}") from error


def decode(file: BinaryIO, max_megapixels: float | None = None) -> Decoded:
    """Decode an open file. Raises one of DAMAGED; ValueError if it has more than `max_megapixels`."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            page = tiff.pages[0]
            _check_size(page.imagewidth, page.imagelength, max_megapixels)
            pixels, orientation = read_page(page, file)
            frames = count_images(tiff)
        if isinstance(pixels, Image.Image):
            return Decoded(pixels, orientation, frames)
        return Decoded(as_image(to_8_bit(pixels), page.iccprofile), orientation, frames, pixels)
    image = Image.open(file)
    _check_size(*image.size, max_megapixels)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # phones add previews to MPO
    orientation = _orientation(image)  # before the pixels are read, as in `image_size`
    image.load()
    if image.mode == "F":
        image = as_image(to_8_bit(scale(np.asarray(image)))[..., None])
    elif image.mode.startswith("I"):  # 16 bits of grey
        image = as_image(to_8_bit(np.asarray(image).clip(0, 65535).astype(np.uint16))[..., None])
    return Decoded(image, orientation, frames)


def _check_size(width: int, height: int, most: float | None) -> None:
    pixels = width * height / 1e6
    if not pixels:
        raise ValueError("it has no pixels")
    if most is not None and pixels > most:
        raise ValueError(f"it has {pixels:.1f} megapixels, more than {most:g}")


def read_size(file: BinaryIO) -> tuple[int, int]:
    """Read the upright (width, height) of an open file from header and EXIF tag. Raises one of DAMAGED."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            page = tiff.pages[0]
            width, height = page.imagewidth, page.imagelength
            orientation = page_orientation(page)
    else:
        image = Image.open(file)
        width, height = image.size
        orientation = _orientation(image)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def read_exif(file: BinaryIO) -> Image.Exif:
    """Read the EXIF of an open file without decoding its pixels. Raises one of DAMAGED."""
    if not is_tiff(file):
        return Image.Image.getexif(Image.open(file))  # PNG's own method decodes the pixels
    exif = Image.Exif()
    with open_tiff(file) as tiff:
        exif.bigtiff, exif.endian = tiff.is_bigtiff, tiff.byteorder
        exif.load_from_fp(file, tiff.pages[0].offset)
    return exif


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF is missing or damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1


def turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip (h, w, ...) upright according to its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert to sRGB by the ICC profile, as RGB or RGBA; without one or with sRGB the image is unchanged."""
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
    """Build the transform to sRGB; None for an sRGB profile, a damaged one, or one of another mode."""
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


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """Return uint8 unchanged, uint16 rounded to uint8."""
    if image.dtype == np.uint8:
        return image
    return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
