"""Read the first image of a TIFF file as 8 or 16 bits per channel, scaled so that white is the maximum.

tifffile reads planes, tiles, deep values and all kinds of transparency correctly, but most compressions only
with the package imagecodecs. Pillow reads all compressions, but only 8 bits correctly; OpenCV reads 16 bits
with LZW.
"""

import logging
import math
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage  # takes a second to import

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5  # photometric interpretations (TIFF 6.0, page 37)
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}  # channels of the supported ones
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha: with colours premultiplied by it, and without
MOST_SAMPLES = 16  # channels per pixel, colours and others
DENSEST = 2**16  # upper bound of the compression ratio
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def is_tiff(file: BinaryIO) -> bool:
    """Return True if a file begins with the signature of TIFF or BigTIFF."""
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_tiff(file: BinaryIO) -> "TiffFile":
    """Open a binary file as a TIFF."""
    from tifffile import TiffFile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it warns about irrelevant private tags
    file.seek(0)
    return TiffFile(file)


def count_images(tiff: "TiffFile") -> int:
    """Count the images in a file, without previews and transparency masks."""
    return max(1, sum(not (page.is_reduced or page.is_mask) for page in tiff.pages))


def page_orientation(page: "TiffPage") -> int:
    """Return the EXIF orientation, 1 to 8."""
    return page.tags.valueof(274, default=1)


def read_page(page: "TiffPage", file: BinaryIO) -> tuple[Image.Image | np.ndarray, int]:
    """Read the image of a page, and the EXIF orientation that is still to be applied.

    Returns a Pillow image for channels of up to 8 bits and for CMYK, else uint16 (h, w, 1 to 4), grey or RGB
    with or without transparency. Raises ValueError for a page that cannot be read or is ambiguous.
    """
    colours = COLOURS.get(page.photometric)
    decoder = _has_decoder(page)
    if page.bitspersample <= 8 and page.sampleformat == 1:
        if colours is None or page.bitspersample < 8 or not decoder:
            return _with_pillow(page, file), 1
    known = page.bitspersample in (8, 16, 32, 64) and page.dtype is not None and page.dtype.kind in "uif"
    if not known or colours is None or not colours <= page.samplesperpixel <= MOST_SAMPLES:
        raise ValueError(f"{_form(page)} cannot be read: save it as RGB with 8 or 16 bits a channel")
    values = _decode(page, file) if decoder else _with_opencv(page, file)
    values = _interpret(values, page)
    orientation = page_orientation(page)
    if page.photometric == CMYK:
        values = values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
        return as_image(values, page.iccprofile, "CMYK"), orientation
    return values if values.dtype == np.uint16 else as_image(values, page.iccprofile), orientation


def as_image(values: np.ndarray, profile: bytes | None = None, mode: str = "") -> Image.Image:
    """Convert uint8 (h, w, 1 to 4) to a Pillow image, by default grey or RGB with or without transparency."""
    image = Image.frombytes(mode or MODES[values.shape[2]], values.shape[1::-1], values.tobytes())
    if profile:
        image.info["icc_profile"] = profile
    return image


def _form(page: "TiffPage") -> str:
    photometric, compression = (
        getattr(value, "name", value) for value in (page.photometric, page.compression)
    )
    planes = ", in planes" if page.planarconfig == 2 and page.samplesperpixel > 1 else ""
    channels = f"{page.samplesperpixel} x {page.bitspersample} bits"
    return f"a TIFF of {channels} ({photometric}, compression {compression}{planes})"


# ---- three readers -----------------------------------------------------------------------------------------


def _has_decoder(page: "TiffPage") -> bool:
    """Return True if tifffile can decompress a page: most compressions need the package imagecodecs."""
    from tifffile import TIFF

    try:
        return None not in (TIFF.DECOMPRESSORS[page.compression], TIFF.UNPREDICTORS[page.predictor])
    except KeyError:
        return False


def _decode(page: "TiffPage", file: BinaryIO) -> np.ndarray:
    """Read the values of a page, (h, w, samples), with tifffile. Raises ValueError if it is truncated."""
    end = file.seek(0, 2)
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    whole = len(parts) == math.prod(page.chunked) and all(n and start + n <= end for start, n in parts)
    most = sum(page.databytecounts) * (1 if page.compression == 1 else DENSEST)
    if not whole or most < page.nbytes:
        raise ValueError("it is cut off")
    values = page.asarray()
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    return values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)


def _with_pillow(page: "TiffPage", file: BinaryIO) -> Image.Image:
    """Read a page of at most 8 bits, upright, with Pillow. Raises ValueError for two separate planes."""
    if page.planarconfig == 2 and page.samplesperpixel == 2:
        raise ValueError(f"{_form(page)} cannot be read: save it with its channels interleaved")
    file.seek(0)
    image = Image.open(file)
    image.load()
    return image


def _with_opencv(page: "TiffPage", file: BinaryIO) -> np.ndarray:
    """Read a page (h, w, samples) with OpenCV. Raises ValueError for formats that it reads incorrectly."""
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    interleaved = page.planarconfig == 1 and page.dtype == np.uint16
    values = read_16_bits(file) if interleaved else None
    if values is None or values.shape != shape:
        raise ValueError(
            f"{_form(page)} cannot be read: save it without compression, or pip install imagecodecs"
        )
    return values


def read_16_bits(file: BinaryIO) -> np.ndarray | None:
    """Read uint16 (h, w, 1, 3 or 4) of a PNG or TIFF with OpenCV; None if it is not uint16 or damaged."""
    file.seek(0)
    try:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None or values.dtype != np.uint16:
        return None
    values = values.reshape(*values.shape[:2], -1)
    return values if values.shape[2] == 1 else values[..., [2, 1, 0, 3][: values.shape[2]]]


# ---- numbers -----------------------------------------------------------------------------------------------


def _interpret(values: np.ndarray, page: "TiffPage") -> np.ndarray:
    """Convert raw values to uint8 or uint16 (h, w, 1 to 4): grey or RGB with any transparency, or CMYK."""
    colours = COLOURS[page.photometric]
    extra = [int(kind) for kind in page.extrasamples]
    if not extra and values.shape[2] == colours + 1:  # OpenCV does not declare transparency
        extra = [UNASSOCIATED]
    if values.dtype not in (np.uint8, np.uint16):
        values = scale(values)
    colour = values[..., :colours]
    if page.photometric == WHITE_IS_ZERO:
        colour = ~colour
    channels = [n for n, kind in enumerate(extra) if kind in (ASSOCIATED, UNASSOCIATED)]
    if not channels:
        return colour
    if page.photometric == CMYK:
        raise ValueError("it is CMYK with transparency: save it as RGB")
    alpha = values[..., colours + channels[0]]
    if extra[channels[0]] == ASSOCIATED:
        white = np.iinfo(colour.dtype).max
        share = np.maximum(alpha, 1)[..., None].astype(np.float32) / white
        colour = np.rint((colour / share).clip(0, white)).astype(colour.dtype)
    return np.dstack([colour, alpha])


def scale(values: np.ndarray) -> np.ndarray:
    """Scale values whose type does not define white to uint16; white is the first of 1, 255, 65535 that fits.

    Values may exceed it to some extent (sharpening, highlights) and are clipped. Integers start at 255 and
    must not be negative. Raises ValueError if nothing fits.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        limits = [(1, 16), (255, 260), (65535, 66000)]  # white, and the largest value accepted for it
    else:
        limits = [(255, 260), (min(65535, np.iinfo(values.dtype).max), 66000)]
    white = next((white for white, most in limits if high <= most), None)
    lowest = -0.5 * white if white and values.dtype.kind == "f" else 0
    if white is None or not low >= lowest:  # NaN is not >= anything
        raise ValueError(
            f"its numbers ({values.dtype}) go from {low:g} to {high:g}: save it with 8 or 16 bits a channel, "
            "or as floats from 0 to 1"
        )
    values = values.clip(0, white).astype(np.result_type(values, np.float32))  # 16-bit floats end at 65504
    return np.rint(values * (65535 / white)).astype(np.uint16)
