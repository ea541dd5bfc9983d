"""Reading and writing pictures: the one place where files become arrays and arrays become files."""

import io
import os
import re
import secrets
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from ldm.data.packed import DamagedDatabase, database, list_packed, read_packed
from ldm.data.tiff import as_image, count_images, is_tiff, open_tiff, page_orientation, read_page, scale

# What Pillow reads of what photographs come in, and what lies among them but is not read.
EXTENSIONS = {
    *(".png .apng .jpg .jpeg .jpe .jfif .mpo .tif .tiff .webp .avif .gif .bmp .dib".split()),
    *(".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .tga .qoi .pcx .sgi".split()),
}
LEFT_OUT = {
    *(".heic .heif .hif .jxl .jxr .wdp .exr .hdr .svg .psd .psb .xcf .kra .eps .ai".split()),
    *(".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .rw2 .orf .pef .srw .x3f .3fr .iiq .rwl".split()),
}
# Folders that programs leave beside pictures; hidden ones are left out as well.
OF_PROGRAMS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "#snapshot"}
OF_PROGRAMS |= {"$RECYCLE.BIN", "System Volume Information", "lost+found"}
SAME = 3  # of 255: an RGB profile that moves no colour farther is an sRGB
# What Pillow raises for files that are damaged.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, OSError)
DAMAGED = (*DAMAGED, EOFError, struct.error)
# Users' own files may have any size; the page, which takes those of others, judges them by `max_megapixels`.
Image.MAX_IMAGE_PIXELS = None


class DamagedImage(ValueError):
    """An image file that cannot be decoded: training and scores pass it over."""


UNREADABLE = (DamagedImage, FileNotFoundError)
# Photographs that come inside the scikit-image package, for demonstrations and tests.
PHOTOGRAPHS = tuple("astronaut.png camera.png chelsea.png coffee.png motorcycle_left.png rocket.jpg".split())


@dataclass
class Decoded:
    """The first image of a file as it is stored; `orientation` is EXIF's, 1 to 8."""

    image: Image.Image  # of 8 bits a channel
    orientation: int
    frames: int = 1
    deep: np.ndarray | None = None  # uint16 (h, w, 1 to 4): a TIFF of more bits

    def rgb(self) -> np.ndarray:
        """uint8 sRGB (h, w, 3), upright, transparency over white."""
        image = _to_srgb(self.image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return turn(np.array(image.convert("RGB")), self.orientation)

    def rgba(self) -> np.ndarray | None:
        """uint8 sRGB (h, w, 4), upright; None if it has no transparency."""
        if not self.image.has_transparency_data:
            return None
        return turn(np.array(_to_srgb(self.image).convert("RGBA")), self.orientation)


def read_image(path: str | Path, max_megapixels: float | None = None) -> np.ndarray:
    """Read any image as uint8 sRGB (h, w, 3), turned upright by its EXIF tag, transparency over white.

    Colours are converted by an embedded ICC profile; a damaged one, or one of another mode, is passed over.
    Raises FileNotFoundError if there is no such file and ValueError if it cannot be decoded, or without
    trying if it has more than `max_megapixels`. Warns if only the first of several frames is read.
    """
    with opened(path) as file:
        decoded = decode(file, max_megapixels)
        tell_frames(path, decoded)
        return decoded.rgb()


def read_rgba(path: str | Path) -> np.ndarray | None:
    """Read an image that has transparency as uint8 sRGB (h, w, 4), upright; None if it has none.

    Raises as `read_image` does.
    """
    with opened(path) as file:
        return decode(file).rgba()


def tell_frames(path: str | Path, decoded: Decoded) -> None:
    """Warn if only the first of several frames was read."""
    if decoded.frames > 1:
        warnings.warn(f"{path}: only the first of {decoded.frames} frames is read", stacklevel=3)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, upright by its EXIF tag, from its header alone.

    Raises FileNotFoundError or ValueError as `read_image` does.
    """
    with opened(path) as file:
        if is_tiff(file):
            with open_tiff(file) as tiff:
                page = tiff.pages[0]
                width, height, orientation = page.imagewidth, page.imagelength, page_orientation(page)
        else:
            image = _header(file)
            (width, height), orientation = image.size, _orientation(image)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file of an image, which may lie in an lmdb; errors become a ValueError that names it."""
    path = Path(path)
    if path.suffix.lower() in LEFT_OUT:
        raise DamagedImage(
            f"cannot read image {path}: {path.suffix} files are not read, convert it to PNG or JPEG"
        )
    try:
        if not database(path) and not path.is_file():
            raise FileNotFoundError(f"image not found: {path}")
        with read_packed(path) if database(path) else open(path, "rb") as file:
            yield file
    except (FileNotFoundError, DamagedDatabase):
        raise
    except DAMAGED as error:
        reason = re.sub(r" <_io\.\S+ .*>$", "", str(error))  # Pillow's name of a file that is open
        raise DamagedImage(f"cannot read image {path}: {reason}") from error


def decode(file: BinaryIO, max_megapixels: float | None = None) -> Decoded:
    """What an open file holds. Raises one of DAMAGED, ValueError if it has more than `max_megapixels`."""
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
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a telephone's further pictures
    image.load()
    orientation = _orientation(image)
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


def _header(file: BinaryIO) -> Image.Image:
    """An image whose size and EXIF are known; of a PNG, where EXIF may come last, without its pixels."""
    start = file.read(8)
    if start == b"\x89PNG\r\n\x1a\n":
        parts = [start]
        while len(start := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            if name in (b"IDAT", b"fdAT"):
                file.seek(length + 4, os.SEEK_CUR)
            else:
                parts += [start, file.read(length + 4)]
        file = io.BytesIO(b"".join(parts))
    return Image.open(file)


def read_exif(file: BinaryIO) -> Image.Exif:
    """EXIF of an open file, without decoding its pixels. Raises one of DAMAGED."""
    if not is_tiff(file):
        return Image.Image.getexif(_header(file))  # PNG's own decodes the pixels
    exif = Image.Exif()
    with open_tiff(file) as tiff:
        exif.bigtiff, exif.endian = tiff.is_bigtiff, tiff.byteorder
        exif.load_from_fp(file, tiff.pages[0].offset)
    return exif


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation 1 to 8; 1 if its EXIF is damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1


def turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, ...) as EXIF's orientation wants it to be shown."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


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
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: the name itself may be at its limit
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        problem = OSError(f"cannot write {path}: {error}")
        problem.errno = error.errno  # a full disk gets a hint of its own
        raise problem from error
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


def is_finite(image: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(image).all())


def to_pixels(image: Tensor, dtype: np.dtype | type) -> np.ndarray:
    """Float (c, h, w) in [-1, 1] -> uint8 or uint16 (h, w, c), converted on the tensor's device.

    Raises ValueError if a value is not finite: it would silently become a black pixel.
    """
    half = np.iinfo(dtype).max / 2
    image = image.detach().float()
    if not is_finite(image):
        raise ValueError(
            "the network's output is not finite (NaN or infinity): it overflows in 16 bits (use precision 32 "
            "or bf16), or the weights hold NaN"
        )
    image = image.clamp(-1, 1).add_(1).mul_(half).round_()
    image = image.to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return image.permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def natural_key(path: str | Path) -> tuple[list, str]:
    """Sort key that puts frame_2 before frame_10; names that differ in case alone have an order too."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part.lower() for part in parts], str(path)


def _entries(folder: str | Path) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Folders and files directly in a folder that are not hidden; linked ones too."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except PermissionError as error:
        warnings.warn(f"left out, it cannot be opened: {error}", stacklevel=2)
        return [], []
    # os.path.isdir: a link to itself is none, where entry.is_dir would raise
    is_folder = [os.path.isdir(entry) if entry.is_symlink() else entry.is_dir() for entry in entries]
    folders = [entry for entry, yes in zip(entries, is_folder, strict=True) if yes]
    return folders, [entry for entry, yes in zip(entries, is_folder, strict=True) if not yes]


def subfolders(folder: str | Path) -> list[Path]:
    """Folders directly in a folder, linked ones too, where pictures of users may be.

    Left out are hidden ones, those that programs leave, and links back to a folder that this one lies in.
    """
    above = {os.path.realpath(path) for path in (folder, *Path(folder).absolute().parents)}
    return [
        Path(entry.path)
        for entry in _entries(folder)[0]
        if entry.name not in OF_PROGRAMS and not (entry.is_symlink() and os.path.realpath(entry) in above)
    ]


def list_files(folder: str | Path) -> Iterator[str]:
    """Paths of the files below a folder that are not hidden, of each real folder once: see `subfolders`."""
    seen, folders, links = set(), [Path(folder)], []
    while folders or links:
        here = (folders or links).pop()
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        yield from [entry.path for entry in _entries(here)[1]]
        for inner in subfolders(here):
            (links if inner.is_symlink() else folders).append(inner)


def list_images(folder: str | Path) -> list[Path]:
    """Images below `folder` (by extension, see `list_files`) in natural order.

    Warns of files that are left out, since their formats are not read. Raises FileNotFoundError if the folder
    does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}")
    if folder.suffix == ".lmdb":
        return sorted(list_packed(folder), key=natural_key)
    paths, others = [], Counter()
    for path in list_files(folder):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in EXTENSIONS:
            paths.append(path)
        else:
            others[suffix] += 1
    left_out = Counter({suffix: count for suffix, count in others.items() if suffix in LEFT_OUT})
    named = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
    why = f"{left_out.total()} left out: {named} (not read here: convert them to PNG or JPEG)"
    if not paths:
        message = f"no images ({', '.join(sorted(EXTENSIONS))}) in {folder}"
        raise FileNotFoundError(f"{message}; {why}" if left_out else message)
    if left_out:
        warnings.warn(f"{folder}: {why}", stacklevel=2)
    return [Path(path) for path in sorted(paths, key=natural_key)]


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
