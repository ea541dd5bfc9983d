"""Read, write and list image files, and convert images between arrays and tensors."""

import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.decode import LEFT_OUT, DamagedImage, decode, opened, read_size, tell_frames

# Photo formats that Pillow reads.
EXTENSIONS = {
    *(".png .apng .jpg .jpeg .jpe .jfif .mpo .tif .tiff .webp .avif .gif .bmp .dib".split()),
    *(".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pfm .tga .qoi .pcx .sgi".split()),
}
# Folders that programs leave beside images; hidden folders are skipped as well.
OF_PROGRAMS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "@Recycle", "#snapshot", "lost+found"}
OF_PROGRAMS |= {"$RECYCLE.BIN", "System Volume Information"}
# Errors of images that training skips.
UNREADABLE = (DamagedImage, FileNotFoundError)
# Photos inside the scikit-image package, for demonstrations and tests.
PHOTOGRAPHS = tuple("astronaut.png camera.png chelsea.png coffee.png motorcycle_left.png rocket.jpg".split())


def read_image(path: str | Path, max_megapixels: float | None = None) -> np.ndarray:
    """Read any image as uint8 sRGB (h, w, 3), upright by its EXIF tag, with transparency over white.

    Colours are converted by an embedded ICC profile; a damaged one, or one of another mode, is ignored.
    Raises FileNotFoundError if the file does not exist, and ValueError if it cannot be decoded or has more
    than `max_megapixels` (checked before decoding). Warns if only the first of several frames is read.
    """
    with opened(path) as file:
        decoded = decode(file, max_megapixels)
        tell_frames(path, decoded)
        return decoded.rgb()


def image_size(path: str | Path) -> tuple[int, int]:
    """Read the upright (width, height) of an image from its header and EXIF tag.

    Raises FileNotFoundError or ValueError like `read_image`.
    """
    with opened(path) as file:
        return read_size(file)


def write_image(path: str | Path, image: np.ndarray, compress_level: int = 6) -> None:
    """Write uint8 (h, w), (h, w, 3) or (h, w, 4) as PNG, atomically.

    Raises an OSError that names the file.
    """
    pixels = Image.fromarray(image)
    write_whole(path, lambda temporary: pixels.save(temporary, format="PNG", compress_level=compress_level))


def write_whole(path: str | Path, save: Callable[[Path], object]) -> None:
    """Call `save` on a temporary file and rename it to `path`. Raises an OSError that names the file."""
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: the name itself may be very long
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        problem = OSError(f"cannot write {path}: {error}")
        problem.errno = error.errno  # callers check it for a full disk
        raise problem from error
    finally:
        temporary.unlink(missing_ok=True)


def over_white(image: np.ndarray) -> np.ndarray:
    """Return uint8 (h, w, 3) unchanged, (h, w, 4) composited over white."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def to_tensor(image: np.ndarray) -> Tensor:
    """Convert uint8 (or values in its range) or uint16 (h, w, c) to float32 (c, h, w) in [-1, 1]."""
    half = 65535 / 2 if image.dtype == np.uint16 else 255 / 2
    image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return image.float().div(half).sub(1)


def to_uint8(image: Tensor) -> np.ndarray:
    """Convert float (c, h, w) in [-1, 1] to uint8 (h, w, c): clamped, then rounded."""
    return to_pixels(image, np.uint8)


def is_finite(image: Tensor) -> bool:
    """Return True if no value is NaN or infinite."""
    return bool(torch.isfinite(image).all())


def to_pixels(image: Tensor, dtype: np.dtype | type) -> np.ndarray:
    """Convert float (c, h, w) in [-1, 1] to uint8 or uint16 (h, w, c), on the tensor's device.

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


# ---- folders -----------------------------------------------------------------------------------------------


def natural_key(path: str | Path) -> tuple[list, str]:
    """Return a sort key that puts frame_2 before frame_10; names that differ only in case are ordered too."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part.lower() for part in parts], str(path)


def walk(folder: str | Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each real folder at or below `folder` once: its path, its subfolders' names and its files' names.

    Links are followed, except to a folder that contains them. Hidden names and the folders in OF_PROGRAMS are
    skipped. The caller may remove names of subfolders, which are then not entered.
    """
    seen = set()
    for here, folders, files in os.walk(folder, onerror=_warn_of_folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        plain, links = [], []
        for name in sorted(folders, key=natural_key):
            path = os.path.join(here, name)
            if name.startswith(".") or name in OF_PROGRAMS:
                continue
            if not os.path.islink(path):
                plain.append(name)
            elif not Path(real).is_relative_to(os.path.realpath(path)):
                links.append(name)
        folders[:] = plain + links  # links last: a folder is listed under its own name first
        yield Path(here), folders, [name for name in files if not name.startswith(".")]


def _warn_of_folder(error: OSError) -> None:
    warnings.warn(f"left out, it cannot be opened: {error}", stacklevel=2)


def list_images(folder: str | Path) -> list[Path]:
    """List the images below `folder` (by extension, see `walk`) in natural order.

    Warns about files in formats that are not read (LEFT_OUT). Raises FileNotFoundError if the folder does not
    exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}")
    paths, left_out = [], Counter()
    for here, _, names in walk(folder):
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in EXTENSIONS:
                paths.append(here / name)
            elif suffix in LEFT_OUT:
                left_out[suffix] += 1
    counts = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
    why = f"{left_out.total()} left out: {counts} (not read here: convert them to PNG or JPEG)"
    if not paths:
        message = f"no images ({', '.join(sorted(EXTENSIONS))}) in {folder}"
        raise FileNotFoundError(f"{message}; {why}" if left_out else message)
    if left_out:
        warnings.warn(f"{folder}: {why}", stacklevel=2)
    return sorted(paths, key=natural_key)


def photographs(names: tuple[str, ...] = PHOTOGRAPHS) -> list[Path]:
    """Return the paths of photos in the scikit-image package; nothing is downloaded."""
    from skimage import data

    return [Path(data.__file__).parent / name for name in names]


def side_by_side(images: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Join uint8 images (h, w, 3) in one row, top-aligned on white, `gap` pixels apart."""
    height = max(image.shape[0] for image in images)
    row = np.full((height, sum(image.shape[1] + gap for image in images) - gap, 3), 255, np.uint8)
    x = 0
    for image in images:
        row[: image.shape[0], x : x + image.shape[1]] = image
        x += image.shape[1] + gap
    return row
