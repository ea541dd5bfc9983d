"""Reading and writing images of every mode, listing folders, and files that are not images."""

import os
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from cldm.logger import ImageLogger
from ldm.data.captions import check_captions, read_caption
from ldm.data.image import (
    image_size,
    list_images,
    natural_key,
    read_image,
    to_tensor,
    to_uint8,
    write_image,
)
from ldm.data.photo import read_photo

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, 255 - GREY, GREY.T], axis=-1)


def save(path: Path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    read = read_image(path)
    assert read.dtype == np.uint8 and read.ndim == 3 and read.shape[2] == 3
    return read


def test_grey_and_bilevel_images_become_three_channels(tmp_path):
    assert np.array_equal(save(tmp_path / "l.png", Image.fromarray(GREY)), np.stack([GREY] * 3, -1))
    assert np.unique(save(tmp_path / "1.png", Image.fromarray(GREY).convert("1"))).tolist() == [0, 255]


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_composited_over_white(tmp_path, alpha):
    expected = (RGB.astype(float) * alpha + 255.0 * (255 - alpha)) / 255
    layer = np.full((8, 8), alpha, np.uint8)
    rgba = save(tmp_path / "rgba.png", Image.fromarray(np.dstack([RGB, layer])))
    assert np.abs(rgba - expected).max() <= 1
    la = save(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(layer)]))
    assert np.abs(la - expected[..., :1]).max() <= 1


def test_palette_images_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 250])
    image.putdata([0, 1])
    assert save(tmp_path / "p.png", image).tolist() == [[[200, 10, 20], [30, 40, 250]]]
    read = save(tmp_path / "pt.png", image, transparency=1)
    assert read.tolist() == [[[200, 10, 20], [255, 255, 255]]]
    read = save(tmp_path / "pa.png", image, transparency=bytes([255, 0]))
    assert read.tolist() == [[[200, 10, 20], [255, 255, 255]]]


def test_colour_key_becomes_white(tmp_path):
    read = save(tmp_path / "key.png", Image.fromarray(RGB), transparency=tuple(RGB[3, 4].tolist()))
    assert read[3, 4].tolist() == [255, 255, 255] and np.array_equal(read[0], RGB[0])


def test_cmyk_is_converted_to_rgb(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = (0, 255, 255, 0)  # magenta and yellow: red
    read = save(tmp_path / "cmyk.jpg", Image.fromarray(pixels, "CMYK"), quality=100)
    assert np.abs(read[4, 2].astype(int) - [255, 255, 255]).max() < 4
    assert np.abs(read[4, 13].astype(int) - [255, 0, 0]).max() < 4
    assert np.array_equal(save(tmp_path / "cmyk.tif", Image.fromarray(pixels, "CMYK"))[0, 12], [255, 0, 0])


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    expected = np.rint(deep / 257)
    for name in ("g.png", "g.tif"):
        assert cv2.imwrite(str(tmp_path / name), deep)
        assert np.array_equal(read_image(tmp_path / name)[..., 1], expected)
    assert np.array_equal(save(tmp_path / "i.tif", Image.fromarray(deep.astype(np.int32)))[..., 0], expected)


def test_float_grey_in_0_1_is_scaled_and_clipped(tmp_path):
    values = np.array([[-0.5, 0.0, 0.5, 1.0, 3.0]], np.float32)
    assert save(tmp_path / "f.tif", Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # white is top left in the scene
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # shown by turning clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = save(tmp_path / "e.jpg", Image.fromarray(np.ascontiguousarray(stored)), exif=exif, quality=95)
    assert read.shape == upright.shape and np.abs(read.astype(int) - upright).mean() < 2


# Red, green and blue primaries (columns) in XYZ under D50, the white point of ICC profiles.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256  # of Adobe RGB (1998)


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Build a display profile of version 2.1 (ICC.1:1998-09): header, tag table, tag data."""
    content, table, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(content), b"", 0x02100000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp").ljust(44, b"\0")
    header = (header + struct.pack(">3I", 63190, 65536, 54061)).ljust(128, b"\0")  # D50 in 1/65536
    return header + struct.pack(">I", len(tags)) + table + content


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


CURVE = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * GAMMA))
WHITE = {b"wtpt": xyz([0.9642, 1.0, 0.8249])}
ADOBE_RGB = icc_profile(
    b"RGB ",
    WHITE
    | {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE.T, strict=True)}
    | {b"rTRC": CURVE, b"gTRC": CURVE, b"bTRC": CURVE},
)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Encode linear light in [0, 1] with the sRGB curve (IEC 61966-2-1) to 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_in_srgb(image: np.ndarray) -> np.ndarray:
    return encoded((image / 255) ** GAMMA @ (np.linalg.inv(SRGB) @ ADOBE).T)


def test_icc_profile_is_converted_to_srgb(tmp_path):
    expected = adobe_in_srgb(RGB)
    assert np.abs(expected - RGB).max() > 20
    for name, options in (("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True})):
        read = save(tmp_path / name, Image.fromarray(RGB), icc_profile=ADOBE_RGB, **options)
        assert np.abs(read - expected).max() < 2
    half = np.dstack([RGB, np.full((8, 8), 128, np.uint8)])
    read = save(tmp_path / "rgba.png", Image.fromarray(half), icc_profile=ADOBE_RGB)
    assert np.abs(read - (128 * expected + 127 * 255) / 255).max() < 2
    photo = read_photo(tmp_path / "rgba.png")
    rgba = photo.with_alpha(photo.pixels)
    assert np.abs(rgba[..., :3] - expected).max() < 2 and (rgba[..., 3] == 128).all()
    palette = Image.fromarray(RGB).quantize(16)
    colours = np.array(palette.convert("RGB"))
    read = save(tmp_path / "p.png", palette, icc_profile=ADOBE_RGB)
    assert np.abs(read - adobe_in_srgb(colours)).max() < 2
    grey = icc_profile(b"GRAY", WHITE | {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * 1.8))})
    read = save(tmp_path / "l.png", Image.fromarray(GREY), icc_profile=grey)
    assert np.abs(read - encoded((GREY / 255) ** 1.8)[..., None]).max() < 2


def test_srgb_and_unusable_profiles_leave_pixels_unchanged(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for number, data in enumerate((srgb, lab, b"no profile", ADOBE_RGB[:150], bytes(500))):
        read = save(tmp_path / f"{number}.png", Image.fromarray(RGB), icc_profile=data)
        assert np.array_equal(read, RGB), number
    assert np.array_equal(  # an RGB profile in a grey image
        save(tmp_path / "l.png", Image.fromarray(GREY), icc_profile=ADOBE_RGB)[..., 0], GREY
    )
    with Image.open(tmp_path / "2.png") as image:
        assert image.info["icc_profile"] == b"no profile"  # the profile is in the file


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_image_size_respects_exif_and_megapixels_are_limited(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.zeros((8, 20, 3), np.uint8)).save(path, exif=exif)
    assert image_size(path) == (8, 20) and read_image(path, 0.00016).shape == (20, 8, 3)
    with pytest.raises(ValueError, match=f"cannot read image .*a.{suffix}: it has 0.0 megapixels, more than"):
        read_image(path, 0.00015)


def test_unreadable_files_raise_with_their_names(tmp_path):
    whole = tmp_path / "whole.png"
    write_image(whole, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cut, text, empty = tmp_path / "cut.png", tmp_path / "text.jpg", tmp_path / "empty.png"
    cut.write_bytes(whole.read_bytes()[:5000])
    text.write_text("this is no picture")
    empty.write_bytes(b"")
    for path in (cut, text, empty):
        with pytest.raises(ValueError, match=f"cannot read image .*{path.name}"):
            read_image(path)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="image not found"):
        read_image(tmp_path)


def test_writing_is_exact_and_atomic(tmp_path):
    path = tmp_path / "blank space 图像.png"
    write_image(path, RGB)
    assert np.array_equal(read_image(path), RGB)
    with pytest.raises(TypeError):
        write_image(path, np.zeros((4, 4, 3), np.complex64))  # not an image: the old file is kept
    assert np.array_equal(read_image(path), RGB)
    with pytest.raises(OSError, match="no_folder"):
        write_image(tmp_path / "no_folder" / "a.png", RGB)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tensor_range_and_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), levels)
    assert np.array_equal(to_uint8(tensor.bfloat16().float() * 0 + 3.0), np.full((16, 16, 3), 255))
    assert to_uint8(torch.full((3, 1, 1), 0.6 / 127.5 - 1)).ravel().tolist() == [1, 1, 1]  # rounded


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_raise(value, tmp_path):
    """Neither results nor preview grids may contain them."""
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite .* precision 32 or bf16"):
        to_uint8(image)
    with pytest.raises(ValueError, match="not finite"):
        ImageLogger(tmp_path / "images").write(
            SimpleNamespace(global_step=1, loggers=[]), "train", {"a": image[None]}
        )
    assert not (tmp_path / "images").exists()


def test_natural_order():
    names = ["frame_10.png", "frame_2.png", "Frame_1.png", "a/2/x", "a/10/x", "10", "x²", "9"]
    ordered = sorted(names, key=natural_key)
    assert sorted(names[::-1], key=natural_key) == ordered
    assert sorted(["a", "B", "b", "A"], key=natural_key) == ["A", "a", "B", "b"]  # deterministic
    assert ordered == ["9", "10", "a/2/x", "a/10/x", "Frame_1.png", "frame_2.png", "frame_10.png", "x²"]


def test_list_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("b10.PNG", "b9.jpg", "sub/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.tif").touch()
    (tmp_path / "sub" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["b9.jpg", "b10.PNG", "elsewhere/d.tif", "sub/c.webp"]
    with pytest.raises(FileNotFoundError, match="folder not found.*nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no images.*folder.png"):
        list_images(tmp_path / "folder.png")


def test_tool_folders_and_symlink_loops_are_skipped(tmp_path):
    """Each real folder is listed once, under its real path if that is inside the searched folder."""
    folder, outside = tmp_path / "photos", tmp_path / "outside"
    left = [".ipynb_checkpoints", "__MACOSX", ".AppleDouble", "@eaDir", ".hidden", "#recycle", "__pycache__"]
    left += ["$RECYCLE.BIN", "System Volume Information", "lost+found", ".Trash-1000"]
    for name in ("here", *left):
        (folder / name / "below").mkdir(parents=True)
        (folder / name / "a.png").touch()
        (folder / name / "below" / "b.png").touch()
    outside.mkdir()
    for name in ("c.png", "._c.png"):
        (outside / name).touch()
    for link, target in {"a": folder / "here", "loop": folder, "here/up": tmp_path, "x": outside}.items():
        (folder / link).symlink_to(target, target_is_directory=True)
    (outside / "back").symlink_to(folder, target_is_directory=True)
    for name in ("self", "self.png"):
        (folder / name).symlink_to(name)
    found = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert found == ["here/a.png", "here/below/b.png", "self.png", "x/c.png"]
    with pytest.raises(FileNotFoundError, match="image not found: .*self.png"):
        read_image(folder / "self.png")
    relative = os.path.relpath(folder)
    assert [str(path) for path in list_images(relative)] == [f"{relative}/{name}" for name in found]


def test_unreadable_folder_gives_a_warning(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match="left out, it cannot be opened: .*locked"):
        assert list_images(tmp_path) == [tmp_path / "a.png"]


def test_unsupported_formats_give_a_warning(tmp_path):
    for name in ("a.HEIC", "b.heic", "c.jxl", "d.CR2", "e.psd", "notes.txt", ".f.heic", "g"):
        (tmp_path / name).touch()
    told = r"5 left out: 2 .heic, 1 \.\w+, 1 \.\w+, 1 \.\w+ \(not read here: convert them to PNG or JPEG\)"
    with pytest.raises(FileNotFoundError, match=f"no images .* in {tmp_path}; {told}"):
        list_images(tmp_path)
    (tmp_path / "h.png").touch()
    with pytest.warns(UserWarning, match=f"{tmp_path}: {told}") as warned:
        assert list_images(tmp_path) == [tmp_path / "h.png"]
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"cannot read image .*a.HEIC: .HEIC files are not read, convert it"):
        read_image(tmp_path / "a.HEIC")


LOSSLESS = "png apng bmp dib gif tif tiff webp jp2 j2k jpx ppm pnm tga qoi pcx sgi"


@pytest.mark.parametrize("ending", [*LOSSLESS.split(), *"jpg jpeg jpe jfif mpo avif".split()])
def test_every_supported_format_is_read(tmp_path, ending):
    path = tmp_path / f"a.{ending.upper()}"
    smooth = np.tile(np.linspace(40, 200, 32).astype(np.uint8)[:, None, None], (1, 48, 3))
    options = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(ending, {})
    form = {"apng": "PNG", "dib": "DIB", "jpx": "JPEG2000", "pnm": "PPM", "qoi": "QOI"}.get(ending)
    Image.fromarray(smooth).save(path, format=form, **options)
    assert list_images(tmp_path) == [path] and image_size(path) == (48, 32)
    limit = 0 if ending in LOSSLESS.split() else 3
    assert np.abs(read_image(path).astype(int) - smooth).max() <= limit


def test_float_pfm_and_16_bit_pgm_are_scaled(tmp_path):
    for white, name in ((1.0, "a.pfm"), (255.0, "b.pfm")):
        values = np.float32([[0, 0.5, 1.0]]) * white
        assert save(tmp_path / name, Image.fromarray(values))[0, :, 0].tolist() == [0, 128, 255]
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "c.pgm"), deep)
    assert np.array_equal(read_image(tmp_path / "c.pgm")[..., 0], np.rint(deep / 257))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "avif"])
def test_first_of_several_frames_is_read_with_a_warning(tmp_path, ending):
    frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (200, 100, 50)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=f"a.{ending}: only the first of 3 frames is read"):
        assert np.abs(read_image(tmp_path / f"a.{ending}").astype(int) - 200).max() < 4
    frames[0].save(tmp_path / "b.mpo", save_all=True, append_images=frames[1:])  # as phones write them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(read_image(tmp_path / "b.mpo").astype(int) - 200).max() < 4


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_image_size_reads_only_the_png_header(tmp_path, monkeypatch):
    """Even an image far above the size limit is not decoded."""
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 20000, 8, 2, 0, 0, 0))
    start += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path.write_bytes(start + chunk(b"IDAT", b"no pixels") + chunk(b"IEND", b""))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert image_size(path) == (20000, 30000)
    with pytest.raises(ValueError, match="it has 600.0 megapixels, more than 24"):
        read_image(path, 24)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot read image .*a.png: (?!.*bomb)"):
        read_image(path)


def test_file_deleted_after_listing_raises(tmp_path):
    write_image(tmp_path / "a.png", RGB)
    path = list_images(tmp_path)[0]
    path.unlink()
    for read in (read_image, image_size, read_photo):
        with pytest.raises(FileNotFoundError, match=f"image not found: {path}"):
            read(path)


def test_caption_file_with_upper_case_extension_is_read(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "b.TXT").write_text("a  cat\n")
    assert [read_caption(tmp_path / name) for name in ("a.png", "b.png")] == ["", "a cat"]
    assert check_captions([tmp_path / "a.png", tmp_path / "b.png"])
