"""Mask files: which pixels are the hole, and which mask belongs to which photo."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ldm.data import masks
from ldm.data.image import photographs, read_image, write_image
from ldm.data.masks import MaskFolder, check_masks, list_photographs, read_hole, read_mask, resize_mask

SQUARE = np.zeros((40, 60), np.uint8)
SQUARE[10:20, 5:30] = 1


def layer(colour: tuple[int, ...], alpha: np.ndarray) -> np.ndarray:
    return np.dstack([np.full((*alpha.shape, 3), colour, np.uint8), alpha])


def write_all(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, 255 * SQUARE)


def test_white_paint_on_a_transparent_layer_is_the_hole(tmp_path):
    write_image(tmp_path / "m.png", layer((255, 255, 255), 255 * SQUARE))
    assert np.array_equal(read_mask(tmp_path / "m.png"), SQUARE)
    hidden = layer((255, 255, 255), 255 * SQUARE)
    hidden[SQUARE == 0, :3] = 90  # hidden colours are ignored
    write_image(tmp_path / "m.png", hidden)
    assert np.array_equal(read_mask(tmp_path / "m.png"), SQUARE)
    Image.fromarray(np.dstack([255 * SQUARE, 255 * SQUARE]), "LA").save(tmp_path / "la.png")
    assert np.array_equal(read_mask(tmp_path / "la.png"), SQUARE)
    Image.fromarray(hidden).save(tmp_path / "m.webp", quality=60)
    far = cv2.distanceTransform(SQUARE, cv2.DIST_L2, 3) + cv2.distanceTransform(1 - SQUARE, cv2.DIST_L2, 3)
    assert np.array_equal(read_mask(tmp_path / "m.webp")[far > 2], SQUARE[far > 2])


def test_soft_brush_is_thresholded_at_half(tmp_path):
    soft = cv2.GaussianBlur(255 * SQUARE, None, 2)
    write_image(tmp_path / "layer.png", layer((255, 255, 255), soft))
    write_image(tmp_path / "grey.png", soft)
    for name in ("layer.png", "grey.png"):
        assert np.array_equal(read_mask(tmp_path / name), (soft > 127).astype(np.uint8))


@pytest.mark.parametrize("number", range(6))
def test_transparent_part_of_a_photo_is_the_hole(tmp_path, number):
    image = cv2.resize(read_image(photographs()[number]), (60, 40), interpolation=cv2.INTER_AREA)
    write_image(tmp_path / "m.png", np.dstack([image, 255 * (1 - SQUARE)]))
    assert np.array_equal(read_mask(tmp_path / "m.png"), SQUARE)


@pytest.mark.parametrize(
    ("colour", "seen"), [((0, 0, 0), r"\(0, 0, 0\)"), ((255, 0, 0), r"\(255, 0, 0\)"), (None, "everywhere")]
)
def test_ambiguous_transparency_raises(tmp_path, colour, seen):
    alpha = 255 * SQUARE if colour else 0 * SQUARE
    write_image(tmp_path / "m.png", layer(colour or (255, 255, 255), alpha))
    with pytest.raises(ValueError, match=f"m.png.*{seen}.*white .255. on black, without transparency"):
        read_mask(tmp_path / "m.png")


def test_black_and_white_with_transparent_margins_raises(tmp_path):
    alpha = np.zeros_like(SQUARE)
    alpha[5:30, 3:50] = 255
    write_image(tmp_path / "m.png", np.dstack([*[255 * SQUARE] * 3, alpha]))
    with pytest.raises(ValueError, match=r"m.png: what is not transparent is neither"):
        read_mask(tmp_path / "m.png")


def test_uniform_half_transparency_is_ignored(tmp_path):
    write_image(tmp_path / "m.png", np.dstack([*[255 * SQUARE] * 3, np.full_like(SQUARE, 128)]))
    assert np.array_equal(read_mask(tmp_path / "m.png"), SQUARE)


def test_colour_photo_raises(tmp_path):
    write_image(tmp_path / "photo.png", read_image(photographs()[0]))
    with pytest.raises(ValueError, match="photo.png is an image in colour without transparency, not a mask"):
        read_mask(tmp_path / "photo.png")


def test_masks_of_any_mode_are_binarised(tmp_path):
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    write_image(tmp_path / "grey.png", grey)
    write_image(tmp_path / "rgb.png", np.repeat(grey[..., None], 3, axis=2))
    for name in ("grey.png", "rgb.png"):
        assert np.array_equal(read_mask(tmp_path / name), (grey > 127).astype(np.uint8))
    Image.fromarray(SQUARE * 255).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(SQUARE.astype(np.uint16) * 65535).save(tmp_path / "deep.png")
    Image.fromarray(SQUARE.astype(np.float32)).save(tmp_path / "float.tif")
    inverted = Image.fromarray(1 - SQUARE, "P")  # index 0 is white
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    inverted.save(tmp_path / "palette.png")
    for name in ("bits.png", "deep.png", "float.tif", "palette.png"):
        assert np.array_equal(read_mask(tmp_path / name), SQUARE), name


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_jpeg_noise_leaves_no_stray_pixels(tmp_path, quality):
    mask = np.zeros((256, 256), np.uint8)
    cv2.circle(mask, (100, 100), 40, 255, -1)
    cv2.line(mask, (10, 240), (240, 10), 255, 3)
    Image.fromarray(mask).convert("RGB").save(tmp_path / "m.jpg", quality=quality)
    assert np.array_equal(read_mask(tmp_path / "m.jpg"), mask // 255)


@pytest.mark.parametrize("value", [1, 127])
def test_mask_without_white_raises_with_its_brightest_value(tmp_path, value):
    write_image(tmp_path / "m.png", value * SQUARE)
    with pytest.raises(ValueError, match=f"m.png: the brightest value of this mask is {value} of 255"):
        read_mask(tmp_path / "m.png")


def test_training_masks_must_have_a_hole(tmp_path, monkeypatch):
    write_image(tmp_path / "black.png", 0 * SQUARE)
    assert not read_mask(tmp_path / "black.png").any()
    with pytest.raises(ValueError, match="black.png has no hole .* brightest value is 0 of 255"):
        read_hole(tmp_path / "black.png")
    monkeypatch.setattr(masks, "CHECKED", 10)
    read = []
    monkeypatch.setattr(masks, "read_hole", read.append)
    for count in (0, 1, 10, 11, 99, 1000):
        read.clear()
        check_masks([Path(f"{n}.png") for n in range(count)])
        assert min(count, 10) >= len(read) >= min(count, 6)


def test_mask_of_same_aspect_ratio_is_resized():
    with pytest.warns(UserWarning, match="m.png is 60x40, its image 120x80 .*: it is resized"):
        assert np.array_equal(resize_mask(SQUARE, (80, 120), "m.png"), SQUARE.repeat(2, 0).repeat(2, 1))
    dot = np.zeros((400, 600), np.uint8)
    dot[399, 0] = 1
    with pytest.warns(UserWarning, match="it is resized"):
        small = resize_mask(dot, (40, 60), "m.png")
    assert small.sum() == small[39, 0] == 1  # a hole of one pixel is not lost
    with pytest.raises(ValueError, match="m.png is 60x40, its image 40x60 .*same shape"):
        resize_mask(SQUARE, (60, 40), "m.png")


def test_masks_in_a_separate_folder(tmp_path):
    write_all(tmp_path, "a.png", "sub/b_mask.png", "c.png", "c_mask.png", "d_mask1.png", "d_mask2.png")
    folder = MaskFolder(tmp_path, tmp_path.parent)
    assert folder.find(Path("a.jpg")) == tmp_path / "a.png"
    assert folder.find(Path("sub/b.webp")) == tmp_path / "sub" / "b_mask.png"
    assert folder.find(Path("c.png")) == tmp_path / "c_mask.png"
    assert [path.name for path in folder.of(Path("d.png"))] == ["d_mask1.png", "d_mask2.png"]
    with pytest.raises(ValueError, match="d.png has 2 masks, .*d_mask1.png and .*d_mask2.png"):
        folder.find(Path("d.png"))
    with pytest.raises(FileNotFoundError, match="no mask for b.png in .*: it would be b_mask"):
        folder.find(Path("b.png"))


def test_photos_and_masks_in_one_folder(tmp_path):
    write_all(
        tmp_path, "a.jpg.png", "a.jpg_mask.png", "b.png", "b_mask001.png", "man_with_mask.png", "_mask.png"
    )
    found = list_photographs(tmp_path)
    assert [path.name for path in found] == ["_mask.png", "a.jpg.png", "b.png", "man_with_mask.png"]
    folder = MaskFolder(tmp_path, tmp_path / "." / ".." / tmp_path.name)
    assert [path.name for path in folder.paths] == ["a.jpg_mask.png", "b_mask001.png"]
    assert folder.find(Path("b.png")) == tmp_path / "b_mask001.png"
    with pytest.raises(FileNotFoundError, match="no mask for man_with_mask.png"):
        folder.find(Path("man_with_mask.png"))


def test_mask_folder_inside_photo_folder_and_vice_versa(tmp_path):
    write_all(tmp_path, "a.png", "masks/a.png")
    assert list_photographs(tmp_path, tmp_path / "masks") == [tmp_path / "a.png"]
    assert list_photographs(tmp_path, tmp_path / "masks" / "a.png") == [tmp_path / "a.png"]
    assert len(list_photographs(tmp_path, tmp_path)) == 2
    below = MaskFolder(tmp_path / "masks", tmp_path)
    assert below.find(Path("a.png")) == tmp_path / "masks" / "a.png"
    assert MaskFolder(tmp_path, tmp_path / "masks").paths == [tmp_path / "a.png"]
    write_all(tmp_path, "only/x.png")
    with pytest.raises(FileNotFoundError, match="no photos in .*: all images there are masks"):
        list_photographs(tmp_path / "only", tmp_path / "only" / "x.png")
    with pytest.raises(FileNotFoundError, match="no masks in .*: beside a photo NAME"):
        MaskFolder(tmp_path / "only", tmp_path / "only")


def test_mask_folder_is_listed_once(tmp_path, monkeypatch):
    write_all(tmp_path, *(f"{n}_mask.png" for n in range(20)))
    listed = []
    real = masks.list_images
    monkeypatch.setattr(masks, "list_images", lambda folder: listed.append(folder) or real(folder))
    folder = MaskFolder(tmp_path, tmp_path.parent)
    assert {folder.find(Path(f"{n}.jpg")).name for n in range(20)} == {f"{n}_mask.png" for n in range(20)}
    assert listed == [tmp_path]
