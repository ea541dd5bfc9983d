"""Reading TIFF: every kind of colour, number format, layout and transparency, or one clear error."""

import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldm.data.image import image_size, read_image
from ldm.data.photo import read_photo

H, W = 40, 50
LAYOUTS = {
    "strips": {"rowsperstrip": 7},
    "big-endian tiles": {"byteorder": ">", "tile": (16, 16)},
    "deflate": {"compression": "deflate", "predictor": True, "rowsperstrip": 7},
    "BigTIFF, deflate in tiles": {"bigtiff": True, "compression": "deflate", "tile": (16, 16)},
}
# Name -> photometric interpretation, number of colour channels, types of extra channels.
FORMS = {
    "grey": ("minisblack", 1, []),
    "white is zero": ("miniswhite", 1, []),
    "grey and alpha": ("minisblack", 1, ["unassalpha"]),
    "grey and associated alpha": ("minisblack", 1, ["assocalpha"]),
    "rgb": ("rgb", 3, []),
    "rgba": ("rgb", 3, ["unassalpha"]),
    "associated alpha": ("rgb", 3, ["assocalpha"]),
    "unspecified": ("rgb", 3, ["unspecified"]),
    "a further channel": ("rgb", 3, ["unspecified", "unassalpha"]),
}


def numbers(dtype: type, channels: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (H, W, channels)).astype(dtype)


def write(path, values: np.ndarray, planar: bool = False, **options) -> None:
    if values.shape[2] == 1:
        values = values[..., 0]
    elif planar:
        values = values.transpose(2, 0, 1)
        options["planarconfig"] = "separate"
    tifffile.imwrite(path, values, metadata=None, **options)


def stored(true: np.ndarray, form: str, extra: list[str]) -> np.ndarray:
    """Encode colours and transparency (the last channel, if any) as stored in this form of file."""
    colour, rest = true[..., : true.shape[2] - len(extra)], true[..., true.shape[2] - len(extra) :]
    if form == "white is zero":
        colour = ~colour
    if "assocalpha" in extra:
        colour = np.rint(colour * (rest / np.iinfo(true.dtype).max)).astype(true.dtype)
    return np.dstack([colour, rest])


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_form_and_layout_is_decoded(tmp_path, dtype, layout, planar):
    for form, (photometric, colours, extra) in FORMS.items():
        if planar and colours + len(extra) == 1:
            continue
        path = tmp_path / f"{form}.tif"
        true = numbers(dtype, colours + len(extra))
        if "assocalpha" in extra:
            true[..., -1] |= 1 << (8 * true.itemsize - 1)  # at least half opaque, to recover the colours
        options = {"photometric": photometric, "extrasamples": extra, **LAYOUTS[layout]}
        write(path, stored(true, form, extra), planar, **options)
        picture = read_photo(path, deep=True)
        assert picture.pixels.dtype == dtype and image_size(path) == (W, H), form
        colour = np.broadcast_to(true[..., :colours], (H, W, 3)).astype(int)
        assert np.abs(picture.pixels - colour).max() <= ("assocalpha" in extra), form
        if {"assocalpha", "unassalpha"} & {*extra}:
            assert np.array_equal(picture.alpha, true[..., -1]), form
        else:
            assert picture.alpha is None, form


@pytest.mark.parametrize("form", FORMS)
def test_16_bits_are_converted_to_8(tmp_path, form):
    photometric, colours, extra = FORMS[form]
    true = numbers(np.uint16, colours + len(extra))
    true[..., -1] |= 1 << 15
    write(tmp_path / "a.tif", stored(true, form, extra), photometric=photometric, extrasamples=extra)
    photo = read_photo(tmp_path / "a.tif")
    rgba = photo.with_alpha(photo.pixels)
    assert (rgba.shape[2] == 4) == bool({"assocalpha", "unassalpha"} & {*extra})
    assert np.abs(rgba[..., :3] - true[..., :colours] / 257).max() < 0.6
    assert rgba.shape[2] == 3 or np.abs(rgba[..., 3] - true[..., -1] / 257).max() <= 0.5


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cmyk_is_converted_to_rgb(tmp_path, dtype, planar):
    values = np.zeros((H, W, 4), dtype)
    values[:, 20:, 1:3] = np.iinfo(dtype).max  # magenta and yellow: red
    write(tmp_path / "a.tif", values, planar, photometric="separated")
    read = read_image(tmp_path / "a.tif")
    assert (read[:, :20] == 255).all() and (read[:, 20:] == [255, 0, 0]).all()
    write(tmp_path / "b.tif", numbers(dtype, 5), photometric="separated", extrasamples=["unassalpha"])
    with pytest.raises(ValueError, match="cannot read image .*b.tif: it is CMYK with transparency"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize("factor", [256, 257])
def test_palette_is_converted_to_rgb(tmp_path, factor):
    colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16)
    indices = numbers(np.uint8, 1)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=colours * factor)
    assert np.array_equal(read_image(tmp_path / "a.tif"), colours.T[indices])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int32, np.uint32])
def test_white_level_of_float_and_integer_values_is_estimated(tmp_path, dtype, white, channels):
    whole = np.dtype(dtype).kind in "iu"
    if white == 65535 and dtype in (np.float16, np.int16):
        white = 32767 if dtype == np.int16 else 255
    if whole and white == 1:
        return
    share = np.linspace(0, 1, H * W * channels).reshape(H, W, channels)
    values = (np.rint(share * white) if whole else share * white).astype(dtype)
    write(tmp_path / "a.tif", values, photometric="rgb" if channels == 3 else "minisblack")
    read = read_image(tmp_path / "a.tif")
    assert np.abs(read - 255 * share).max() < 1
    if not whole and white == 1:  # sharpened images have values outside [0, 1]
        write(tmp_path / "b.tif", (1.5 * values[..., :1] - 0.25).astype(dtype), photometric="minisblack")
        again = read_image(tmp_path / "b.tif")
        assert again.min() == 0 and again.max() == 255
    picture = read_photo(tmp_path / "a.tif", deep=True)
    assert picture.pixels.dtype == np.uint16 and np.abs(picture.pixels / 257 - 255 * share).max() < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[-1, 0, 1]]), r"its numbers \(float32\) go from -1 to 1"),
        (np.float32([[0, np.nan]]), "go from nan"),
        (np.float32([[0, np.inf]]), "to inf"),
        (np.float32([[0, 1e6]]), "to 1e.06"),
        (np.int16([[-5, 300]]), r"\(int16\) go from -5 to 300: save it with 8 or 16 bits"),
        (np.uint32([[0, 4_000_000_000]]), r"\(uint32\) go from 0 to 4e.09"),
        (np.complex64([[0, 1]]), "a TIFF of 1 x 64 bits .* cannot be read: save it as RGB"),
    ],
)
def test_ambiguous_value_ranges_raise(tmp_path, values, message):
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(ValueError, match=f"cannot read image .*a.tif: .*{message}"):
        read_image(tmp_path / "a.tif")


def test_compressions_read_without_imagecodecs(tmp_path):
    """Pillow reads LZW of 8 bits, OpenCV of 16 bits."""
    import cv2

    eight, sixteen = numbers(np.uint8, 3), numbers(np.uint16, 3)
    Image.fromarray(eight).save(tmp_path / "lzw8.tif", compression="tiff_lzw")
    assert np.array_equal(read_image(tmp_path / "lzw8.tif"), eight)
    Image.fromarray(eight).save(tmp_path / "jpeg.tif", compression="jpeg", quality=95)
    Image.fromarray(eight).convert("1").save(tmp_path / "fax.tif", compression="group4")
    assert read_image(tmp_path / "jpeg.tif").shape == (H, W, 3)
    assert np.unique(read_image(tmp_path / "fax.tif")).tolist() == [0, 255]
    cv2.imwrite(str(tmp_path / "lzw16.tif"), sixteen[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    with tifffile.TiffFile(tmp_path / "lzw16.tif") as tiff:
        assert tiff.pages[0].compression == 5
    assert np.array_equal(read_photo(tmp_path / "lzw16.tif", deep=True).pixels, sixteen)


def retagged(path, tag: int, value: int) -> None:
    """Overwrite a tag of the first page."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(value)


def test_unsupported_compression_raises_with_remedy(tmp_path):
    path = tmp_path / "a.tif"
    write(path, numbers(np.uint16, 3), planar=True, photometric="rgb")
    retagged(path, 259, 5)  # LZW, in planes
    with pytest.raises(ValueError, match=re.escape("16 bits (RGB, compression LZW, in planes) cannot be")):
        read_image(path)
    with pytest.raises(ValueError, match="save it without compression, or pip install imagecodecs"):
        read_photo(path, deep=True)
    write(path, numbers(np.uint8, 2), planar=True, photometric="minisblack", extrasamples=["unassalpha"])
    retagged(path, 259, 5)
    with pytest.raises(ValueError, match="cannot be read: save it with its channels interleaved"):
        read_image(path)


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_truncated_file_raises(tmp_path, compression, dtype):
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb", "rowsperstrip": 4, "compression": compression}
    write(path, numbers(dtype, 3), **options)
    content = path.read_bytes()
    for size in (len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cannot read image .*a.tif"):
            read_image(path)
    path.write_bytes(content)
    retagged(path, 257, 2**30)  # a height that would exhaust the memory
    with pytest.raises(ValueError, match="it is cut off"):
        read_image(path)


def test_first_of_several_pages_is_read_with_a_warning(tmp_path):
    pages = [numbers(np.uint16, 3) // (n + 1) for n in range(3)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:
            writer.write(page, photometric="rgb", metadata=None)
        writer.write(pages[0][::2, ::2], photometric="rgb", metadata=None, subfiletype=1)  # a preview
    with pytest.warns(UserWarning, match="a.tif: only the first of 3 frames is read"):
        picture = read_photo(tmp_path / "a.tif", deep=True)
    assert np.array_equal(picture.pixels, pages[0])
