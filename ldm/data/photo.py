"""Read and write photos with their transparency, 16 bits, EXIF and ICC profile, and a note in the result."""

import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms

from ldm.data.decode import DAMAGED, Decoded, decode, opened, read_exif, tell_frames, to_8_bit, turn
from ldm.data.image import over_white, write_whole
from ldm.data.tiff import read_16_bits

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # of results, by file extension
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of libjpeg and libwebp in pixels
TAGS = ExifTags.Base
# EXIF tags that stay true for a restored image (`keep_exif` also keeps those of capture and GPS).
KEPT = {
    *(TAGS.ImageDescription, TAGS.Make, TAGS.Model, TAGS.Software, TAGS.DateTime, TAGS.Artist),
    *(TAGS.Copyright, TAGS.XResolution, TAGS.YResolution, TAGS.ResolutionUnit),
}
NOTE = TAGS.ImageHistory  # tag in which a result records what it was made from


@dataclass
class Photo:
    """Pixels of an image file for a network, and the metadata that the restored image keeps."""

    pixels: np.ndarray  # uint8 or uint16 (h, w, 3), upright; also defined under transparent parts
    alpha: np.ndarray | None = None  # (h, w) of the same type
    exif: Image.Exif | None = None
    profile: bytes | None = None  # ICC profile of these pixels; None: the file has none, sRGB is assumed

    def with_alpha(self, pixels: np.ndarray) -> np.ndarray:
        """Add this image's alpha, resized, to pixels (h, w, 3) of the same dtype; return others unchanged."""
        if self.alpha is None or pixels.shape[2] != 3 or pixels.dtype != self.alpha.dtype:
            return pixels
        return np.dstack([pixels, resize_to(self.alpha, pixels)])

    def shown(self) -> np.ndarray:
        """Return uint8 (h, w, 3) with transparency over white."""
        return over_white(to_8_bit(self.with_alpha(self.pixels)))


def resize_to(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Resize uint8 or uint16 (h, w) or (h, w, c) linearly to the size of another image."""
    if image.shape[:2] == other.shape[:2]:
        return image
    return cv2.resize(image, other.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def read_photo(path: str | Path, deep: bool = False, max_megapixels: float | None = None) -> Photo:
    """Read an image with its transparency and EXIF, upright; with `deep` 16-bit PNG and TIFF as uint16.

    Results of 8 bits are converted to sRGB by their ICC profile; those of 16 bits keep colours and profile.
    Raises FileNotFoundError and ValueError like `read_image`.
    """
    with opened(path) as file:
        decoded = decode(file, max_megapixels)
        tell_frames(path, decoded)
        exif = keep_exif(file, path)
        profile = decoded.image.info.get("icc_profile")
        values = _deep_values(file, decoded) if deep else None
        if values is None:
            profile = profile and _srgb_profile()
            rgba = decoded.rgba()
            values = decoded.rgb() if rgba is None else rgba
    alpha = values[..., 3] if values.shape[2] == 4 else None
    return Photo(np.ascontiguousarray(values[..., :3]), alpha, exif, profile)


def keep_exif(file: BinaryIO, path: str | Path) -> Image.Exif:
    """Return EXIF tags that stay true for the restored image; if damaged, warn and return an empty Exif."""
    kept = Image.Exif()
    try:
        exif = read_exif(file)
        kept.update({tag: value for tag, value in exif.items() if tag in KEPT})
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            values = {**exif.get_ifd(ifd)}
            for of_the_file in (TAGS.ExifImageWidth, TAGS.ExifImageHeight, TAGS.MakerNote):
                values.pop(of_the_file, None)
            if values:
                kept.get_ifd(ifd).update(values)
        kept.tobytes()
    except DAMAGED as error:
        warnings.warn(f"{path}: its EXIF is damaged and not kept ({error})", stacklevel=2)
        return Image.Exif()
    return kept


def _deep_values(file: BinaryIO, decoded: Decoded) -> np.ndarray | None:
    """Return uint16 (h, w, 3 or 4), upright, of a 16-bit PNG or a TIFF of more than 8 bits, else None."""
    values = decoded.deep
    file.seek(0)
    start = file.read(25)
    if start.startswith(b"\x89PNG") and start[24] == 16:
        values = read_16_bits(file)
    if values is None:
        return None
    if values.shape[2] < 3:  # grey, with or without transparency
        values = values[..., [0, 0, 0, 1][: 2 + values.shape[2]]]
    return turn(values, decoded.orientation)


@lru_cache(maxsize=1)
def _srgb_profile() -> bytes:
    """Return an ICC profile of sRGB without its creation date."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)
    return bytes(profile)


def write_photo(
    path: str | Path, pixels: np.ndarray, source: Photo, note: str = "", quality: int = 95
) -> None:
    """Write uint8 or uint16 (h, w, 3 or 4) in the format of the extension, with `source`'s EXIF and profile.

    `read_note` reads the note. Only PNG keeps 16 bits; JPEG gets transparent images composited over white.
    Raises an OSError that names the file, or ValueError for an image that the format cannot hold.
    """
    kind = FORMATS[Path(path).suffix[1:]]
    exif = source.exif or Image.Exif()
    if note:
        exif[NOTE] = note
    if kind == "PNG" and pixels.dtype == np.uint16:
        content = _deep_png(pixels, source.profile, exif.tobytes())
        return write_whole(path, lambda temporary: temporary.write_bytes(content))
    pixels = to_8_bit(pixels)
    image = Image.fromarray(over_white(pixels) if kind == "JPEG" else pixels)
    options = {"compress_level": 6} if kind == "PNG" else {"quality": quality}
    if kind == "JPEG" and quality >= 90:
        options["subsampling"] = 0
    if source.profile:
        options["icc_profile"] = source.profile
    try:
        write_whole(path, lambda temporary: image.save(temporary, format=kind, exif=exif, **options))
    except ValueError as error:
        raise ValueError(f"{path}: {kind} cannot hold this image: {error}") from error


def check_fits(path: str | Path, height: int, width: int) -> None:
    """Raise ValueError if the format of the file extension cannot hold images of that size."""
    kind = FORMATS[Path(path).suffix[1:]]
    most = LONGEST_SIDE.get(kind)
    if most is not None and max(height, width) > most:
        raise ValueError(f"{path}: {width} x {height} pixels, {kind} holds {most} a side: choose png")


def read_note(path: str | Path) -> str:
    """Return the note that `write_photo` stored in a file, "" if there is none or it is not an image."""
    try:
        with opened(path) as file:
            return str(read_exif(file).get(NOTE, ""))
    except DAMAGED:
        return ""


def _deep_png(pixels: np.ndarray, profile: bytes | None, exif: bytes) -> bytes:
    """Encode uint16 (h, w, 3 or 4) as a PNG with an ICC profile and EXIF (PNG specification, 11.3.2).

    Pillow writes no 16-bit colours and OpenCV no profile, so the chunks are inserted after the header here.
    """
    order = [2, 1, 0, 3][: pixels.shape[2]]
    content = cv2.imencode(".png", pixels[..., order])[1].tobytes()
    chunks = [(b"eXIf", exif.removeprefix(b"Exif\0\0"))]
    if profile:
        chunks.insert(0, (b"iCCP", b"ICC\0\0" + zlib.compress(profile)))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    header = 8 + 25  # bytes: the signature and IHDR
    return b"".join([content[:header], *parts, content[header:]])
