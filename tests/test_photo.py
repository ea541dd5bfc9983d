"""Results keep the input's EXIF, ICC profile, bit depth and transparency, and a note on their origin."""

import warnings

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from harness.jobs import Command, restore_one
from harness.provenance import content_hash
from ldm.data.image import photographs, read_image
from ldm.data.photo import check_fits, read_note, read_photo, write_photo

TAGS, IFD = ExifTags.Base, ExifTags.IFD


def photograph(height: int, width: int) -> np.ndarray:
    return read_image(photographs()[0])[100 : 100 + height, 60 : 60 + width]


def camera_exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[TAGS.Orientation], exif[TAGS.Model], exif[TAGS.DateTime] = (
        orientation,
        "Camera",
        "2026:01:02 03:04:05",
    )
    exif.get_ifd(IFD.Exif).update({TAGS.DateTimeOriginal: "2020:01:02 03:04:05", TAGS.ISOSpeedRatings: 200})
    exif.get_ifd(IFD.Exif).update({TAGS.MakerNote: b"offsets", TAGS.ExifImageWidth: 40})
    exif.get_ifd(IFD.GPSInfo)[1] = "N"
    return exif


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("source", ["jpg", "tif", "png"])
def test_exif_is_kept_and_orientation_applied(tmp_path, ending, source):
    path, target = tmp_path / f"in.{source}", tmp_path / f"out.{ending}"
    Image.fromarray(photograph(30, 40)).save(path, exif=camera_exif())
    picture = read_photo(path)
    assert np.array_equal(picture.pixels, read_image(path)) and picture.pixels.shape == (40, 30, 3)
    write_photo(target, picture.pixels, picture, "a note", quality=90)
    with Image.open(target) as image:
        exif = image.getexif()
        assert exif[TAGS.Model] == "Camera" and exif[TAGS.DateTime] == "2026:01:02 03:04:05"
        assert TAGS.Orientation not in exif and image.size == (30, 40)
        if source != "tif":  # Pillow does not write these to a TIFF
            sub = exif.get_ifd(IFD.Exif)
            assert sub[TAGS.DateTimeOriginal] == "2020:01:02 03:04:05" and sub[TAGS.ISOSpeedRatings] == 200
            assert not {TAGS.MakerNote, TAGS.ExifImageWidth} & {*sub} and exif.get_ifd(IFD.GPSInfo)[1] == "N"
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[ending]
    assert read_note(target) == "a note"
    assert np.abs(read_image(target).astype(int) - picture.pixels).mean() < 4
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_damaged_exif_is_dropped_with_a_warning(tmp_path):
    Image.fromarray(photograph(8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken")
    with pytest.warns(UserWarning):
        picture = read_photo(tmp_path / "a.jpg")
    write_photo(tmp_path / "b.jpg", picture.pixels, picture, "r")
    assert read_note(tmp_path / "b.jpg") == "r"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("source", ["png", "tif"])
def test_16_bit_depth_is_kept(tmp_path, channels, source):
    deep = np.random.default_rng(0).integers(0, 65536, (9, 14, channels), dtype=np.uint16)
    path = tmp_path / f"in.{source}"
    cv2.imwrite(str(path), deep if channels == 1 else deep[..., [2, 1, 0, 3][:channels]])
    picture = read_photo(path, deep=True)
    assert np.array_equal(picture.pixels, np.repeat(deep, 3, 2) if channels == 1 else deep[..., :3])
    assert (picture.alpha is None) == (channels < 4)
    picture.exif[TAGS.Model] = "Camera"
    write_photo(tmp_path / "out.png", picture.with_alpha(picture.pixels), picture, "made")
    again = read_photo(tmp_path / "out.png", deep=True)
    assert np.array_equal(again.pixels, picture.pixels) and again.exif[TAGS.Model] == "Camera"
    assert read_note(tmp_path / "out.png") == "made"
    if channels == 4:
        assert np.array_equal(again.alpha, deep[..., 3])
    assert read_photo(path).pixels.dtype == np.uint8
    write_photo(tmp_path / "out.jpg", picture.with_alpha(picture.pixels), picture)
    assert read_image(tmp_path / "out.jpg").shape == (9, 14, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["png", "tif"])
def test_orientation_is_applied_to_16_bit_images(tmp_path, orientation, source):
    """The orientation is the same as in the 8-bit reader."""
    path = tmp_path / f"in.{source}"
    deep = photograph(12, 18).astype(np.uint16) * 257
    cv2.imwrite(str(path), deep[..., ::-1])
    exif = Image.Exif()
    exif[TAGS.Orientation] = orientation
    if source == "png":
        from ldm.data.photo import _deep_png

        path.write_bytes(_deep_png(deep, None, exif.tobytes()))
    else:
        tags = path.read_bytes()  # OpenCV writes no orientation, Pillow no 16 bits
        import tifffile

        with tifffile.TiffWriter(path) as writer:
            writer.write(deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        assert path.read_bytes() != tags
    upright = read_photo(path, deep=True).pixels
    assert upright.dtype == np.uint16 and np.array_equal(upright // 257, read_image(path))


def test_icc_profile_is_kept(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photograph(8, 8)).save(tmp_path / "a.png", icc_profile=lab)
    Image.fromarray(photograph(8, 8)).save(tmp_path / "b.png")
    for name, tagged in (("a", True), ("b", False)):
        picture = read_photo(tmp_path / f"{name}.png")
        for ending in ("png", "jpg", "webp"):
            write_photo(tmp_path / f"{name}2.{ending}", picture.pixels, picture)
            with Image.open(tmp_path / f"{name}2.{ending}") as image:
                assert bool(image.info.get("icc_profile")) == tagged
    deep = photograph(8, 8).astype(np.uint16) * 257
    picture.profile = b"a profile of its own"
    write_photo(tmp_path / "c.png", deep, picture)
    assert read_photo(tmp_path / "c.png", deep=True).profile == picture.profile


def test_transparency_is_kept_or_composited_over_white_in_jpeg(tmp_path):
    rgba = np.dstack([photograph(8, 8), np.full((8, 8), 128, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    picture = read_photo(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, rgba[..., :3]) and np.array_equal(
        picture.shown(), read_image(tmp_path / "a.png")
    )
    write_photo(tmp_path / "b.png", picture.with_alpha(picture.pixels), picture)
    again = read_photo(tmp_path / "b.png")
    assert np.array_equal(again.with_alpha(again.pixels), rgba)
    write_photo(tmp_path / "b.jpg", picture.with_alpha(picture.pixels), picture, quality=100)
    assert np.abs(read_image(tmp_path / "b.jpg").astype(int) - picture.shown()).mean() < 4


def test_image_too_large_for_its_format_raises(tmp_path):
    picture = read_photo(photographs()[0])
    with pytest.raises(ValueError, match="long.webp: WEBP cannot hold this image"):
        write_photo(tmp_path / "long.webp", np.zeros((1, 16384, 3), np.uint8), picture)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ending", "most"), [("jpg", 65500), ("webp", 16383)])
def test_size_limit_of_each_format(tmp_path, ending, most):
    """check_fits knows the encoder's limit and needs no image."""
    picture = read_photo(photographs()[0])
    path = tmp_path / f"a.{ending}"
    write_photo(path, np.zeros((1, most, 3), np.uint8), picture)
    with pytest.raises((ValueError, OSError)):
        write_photo(path, np.zeros((1, most + 1, 3), np.uint8), picture)
    check_fits(path, 1, most)
    check_fits(tmp_path / "a.png", 1, most + 1)
    for size in ((1, most + 1), (most + 1, 1)):
        with pytest.raises(ValueError, match=f"a.{ending}: .* pixels, (JPEG|WEBP) holds {most} a side"):
            check_fits(path, *size)


@pytest.mark.parametrize(("width", "comparison"), [(16384, False), (9000, True)])
def test_result_too_large_for_its_format_raises_before_restoring(tmp_path, width, comparison):
    source, target = tmp_path / "a.png", tmp_path / "out" / "a.webp"
    Image.new("RGB", (width, 1)).save(source)
    command = Command(input=source, output_dir=target.parent, format="webp", comparison=comparison)
    with pytest.raises(ValueError, match="a.webp: .*WEBP holds 16383 a side"):
        restore_one(command, pytest.fail, source, target, "")


def test_content_hash_depends_only_on_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1")
    known = content_hash(path)
    path.write_bytes(b"2")
    assert content_hash(path) != known
    path.write_bytes(b"1")
    assert content_hash(path) == known and content_hash(tmp_path / "none") == "missing"
    assert read_note(path) == "" and read_note(tmp_path / "none") == ""


def test_damaged_files_are_read_or_raise_one_error(tmp_path):
    """1 to 8 bytes of an image with EXIF are changed; it raises one error or can be written again."""
    rng, read = np.random.default_rng(0), 0
    for ending in ("jpg", "png", "tif", "webp"):
        Image.fromarray(photograph(12, 12)).save(tmp_path / f"in.{ending}", exif=camera_exif())
        content = (tmp_path / f"in.{ending}").read_bytes()
        for _ in range(30):
            broken = bytearray(content)
            for at in rng.integers(0, min(400, len(broken)), rng.integers(1, 9)):
                broken[at] = rng.integers(256)
            path = tmp_path / f"broken.{ending}"
            path.write_bytes(broken)
            read_note(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    picture = read_photo(path, deep=True)
                except ValueError as error:
                    assert str(error).startswith("cannot read image")
                    continue
            write_photo(tmp_path / "out.png", picture.with_alpha(picture.pixels), picture, "made")
            assert read_note(tmp_path / "out.png") == "made"
            read += 1
    assert read > 10
