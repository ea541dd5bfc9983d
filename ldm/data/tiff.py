"""What the numbers in a TIFF file mean: its first image as 8 or 16 bits, white as the largest number."""

import logging
import math
import zlib
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage  # takes a second to import

WHITE_IS_ZERO, PALETTE, CMYK = 0, 3, 5  # photometric interpretations (TIFF 6.0, page 37)
COLOURS = {WHITE_IS_ZERO: 1, 1: 1, 2: 3, PALETTE: 1, CMYK: 4}  # channels of each that is read here
DEFLATE = (8, 32946)  # compressions
ASSOCIATED, UNASSOCIATED = 1, 2  # transparency: with colours multiplied by it, and without
MOST_SAMPLES = 16  # of a pixel
DENSEST = 2**16  # no compression makes data smaller than by this
MARGIN = 2**24  # bytes that tiles may reach beyond their image
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def is_tiff(file: BinaryIO) -> bool:
    """Whether a file begins as TIFF or BigTIFF do."""
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    return head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_tiff(file: BinaryIO) -> "TiffFile":
    """An open file's TIFF."""
    from tifffile import TiffFile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it reports private tags that nobody needs
    file.seek(0)
    return TiffFile(file)


def count_images(tiff: "TiffFile") -> int:
    """How many images a file holds, without previews and masks of others."""
    return max(1, sum(not (page.is_reduced or page.is_mask) for page in tiff.pages))


def page_orientation(page: "TiffPage") -> int:
    """EXIF's orientation, 1 to 8."""
    return page.tags.valueof(274, default=1)


def read_page(page: "TiffPage", file: BinaryIO) -> tuple[Image.Image | np.ndarray, int]:
    """The image of a page and the EXIF orientation that it still needs.

    Pillow's image where a channel has 8 bits or fewer; uint16 (h, w, 1 to 4), grey or RGB with or without
    transparency, where it has more. Raises ValueError for what cannot be read, or could mean several things.
    """
    colours = COLOURS.get(page.photometric)
    small = page.bitspersample <= 8 and page.sampleformat == 1
    if small and (colours is None or page.bitspersample < 8 or not _can_decode(page)):
        if page.planarconfig == 2 and page.samplesperpixel == 2:
            raise ValueError(f"{_form(page)} cannot be read: save it with its channels interleaved")
        return _with_pillow(file), 1
    known = page.bitspersample in (8, 16, 32, 64) and page.dtype is not None and page.dtype.kind in "uif"
    if not known or colours is None or not colours <= page.samplesperpixel <= MOST_SAMPLES:
        raise ValueError(f"{_form(page)} cannot be read: save it as RGB with 8 or 16 bits a channel")
    values = _meaning(_decode(page, file), page)
    orientation = page_orientation(page)
    if page.photometric == CMYK:
        values = values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
        return as_image(values, page.iccprofile, "CMYK"), orientation
    return values if values.dtype == np.uint16 else as_image(values, page.iccprofile), orientation


def as_image(values: np.ndarray, profile: bytes | None = None, mode: str = "") -> Image.Image:
    """uint8 (h, w, 1 to 4) as Pillow's image, by default grey or RGB with or without transparency."""
    image = Image.frombytes(mode or MODES[values.shape[2]], values.shape[1::-1], values.tobytes())
    if profile:
        image.info["icc_profile"] = profile
    return image


def _with_pillow(file: BinaryIO) -> Image.Image:
    """It has libtiff for all compressions and gives the image upright."""
    file.seek(0)
    image = Image.open(file)
    image.load()
    return image


def _form(page: "TiffPage") -> str:
    names = [getattr(value, "name", value) for value in (page.photometric, page.compression)]
    planes = ", in planes" if page.planarconfig == 2 and page.samplesperpixel > 1 else ""
    kind = "" if page.sampleformat == 1 else f", {getattr(page.sampleformat, 'name', page.sampleformat)}"
    return (
        f"a TIFF of {page.samplesperpixel} x {page.bitspersample} bits ({names[0]}, compression {names[1]}"
        f"{planes}{kind})"
    )


# ---- numbers -----------------------------------------------------------------------------------------------


def _can_decode(page: "TiffPage") -> bool:
    """Whether tifffile knows the compression: most need the package imagecodecs."""
    from tifffile import TIFF

    try:
        return None not in (TIFF.DECOMPRESSORS[page.compression], TIFF.UNPREDICTORS[page.predictor])
    except KeyError:
        return False


def _decode(page: "TiffPage", file: BinaryIO) -> np.ndarray:
    """The numbers of a page as they stand in the file: (h, w, samples)."""
    shape = page.imagelength, page.imagewidth, page.samplesperpixel
    if _can_decode(page):
        _check_whole(page, file)
        values = page.asarray()
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            values = np.moveaxis(values, 0, -1)
        return values.reshape(shape)
    values = None
    if page.planarconfig == 1 and page.dtype == np.uint16:  # the form that OpenCV reads right
        values = read_16_bits(file)
    if values is None or values.shape != shape:
        raise ValueError(
            f"{_form(page)} cannot be read: save it without compression, or pip install imagecodecs"
        )
    return values


def read_16_bits(file: BinaryIO) -> np.ndarray | None:
    """uint16 (h, w, 1, 3 or 4) of a PNG or TIFF, by OpenCV; None if it has other numbers or is damaged."""
    file.seek(0)
    try:
        values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None or values.dtype != np.uint16:
        return None
    values = values.reshape(*values.shape[:2], -1)
    return values if values.shape[2] == 1 else values[..., [2, 1, 0, 3][: values.shape[2]]]


def _check_whole(page: "TiffPage", file: BinaryIO) -> None:
    """Raise ValueError for a page that is cut off, or unpacks to more than its size."""
    end = file.seek(0, 2)
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    whole = len(parts) == math.prod(page.chunked) and all(n and start + n <= end for start, n in parts)
    size = sum(page.databytecounts)
    if whole and page.compression in DEFLATE:
        most = min(math.prod(page.chunks) * page.dtype.itemsize, page.nbytes + MARGIN)
        size = sum(_inflated_size(file, *part, most) for part in parts)
    if not whole or size * (1 if page.compression in (1, *DEFLATE) else DENSEST) < page.nbytes:
        raise ValueError("it is cut off")


def _inflated_size(file: BinaryIO, start: int, count: int, most: int) -> int:
    """Bytes that a part of a file unpacks to: tifffile would unpack it to any size."""
    file.seek(start)
    unpack = zlib.decompressobj()
    try:
        size = len(unpack.decompress(file.read(count), most + 1))
    except zlib.error as error:
        raise ValueError(f"it is damaged: {error}") from error
    if size > most:
        raise ValueError("it unpacks to more than its size")
    return size


def _meaning(values: np.ndarray, page: "TiffPage") -> np.ndarray:
    """uint8 or uint16 (h, w, 1 to 4): grey or RGB, with its transparency; or CMYK."""
    colours = COLOURS[page.photometric]
    extra = [int(kind) for kind in page.extrasamples]
    at = next((n for n, kind in enumerate(extra) if kind in (ASSOCIATED, UNASSOCIATED)), None)
    if not extra and values.shape[2] == colours + 1:  # OpenCV does not say that it is transparency
        at, extra = 0, [UNASSOCIATED]
    if page.photometric == PALETTE:
        table = np.asarray(page.colormap).T
        table = table >> 8 if table.max() > 255 else table
        colour = table.astype(np.uint8)[values[..., 0]]
    else:
        values = values if values.dtype in (np.uint8, np.uint16) else scale(values)
        colour = values[..., :colours]
    if page.photometric == WHITE_IS_ZERO:
        colour = ~colour
    if at is None:
        return colour
    alpha = values[..., colours + at].astype(colour.dtype)
    if page.photometric == CMYK:
        raise ValueError("it is CMYK with transparency: save it as RGB")
    if extra[at] == ASSOCIATED:
        white = np.iinfo(colour.dtype).max
        share = np.maximum(alpha, 1)[..., None].astype(np.float32) / white
        colour = np.rint((colour / share).clip(0, white)).astype(colour.dtype)
    return np.dstack([colour, alpha])


def scale(values: np.ndarray) -> np.ndarray:
    """uint16 from numbers whose type does not tell what white is: the first of 1, 255 and 65535 that fits.

    Floats may go a little beyond it, as sharpening and highlights do: they are clipped. Whole numbers begin
    at 255 and may not be negative. Raises ValueError where nothing fits.
    """
    low, high, is_float = values.min(), values.max(), values.dtype.kind == "f"
    whole = min(65535, np.iinfo(values.dtype).max) if not is_float else 65535
    fits = [(1, 16)] * is_float + [(255, 260), (whole, 66000)]
    white = next((white for white, most in fits if high <= most), None)
    if white is None or not low >= -0.5 * white * is_float:
        raise ValueError(
            f"its numbers ({values.dtype}) go from {low:g} to {high:g}: save it with 8 or 16 bits a channel, "
            "or as floats from 0 to 1"
        )
    values = values.clip(0, white).astype(np.result_type(values, np.float32))  # 16-bit floats end at 65504
    return np.rint(values * (65535 / white)).astype(np.uint16)
