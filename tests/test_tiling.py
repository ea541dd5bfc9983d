import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm.tiling import fill_hidden, pad_to_multiple, restore_photo, restore_tiled, self_ensemble, tile_spans


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_hidden_colours_are_filled_from_their_surroundings(dtype):
    """The result does not depend on the hidden values, and visible values do not change."""
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(top // 2, top, (40, 50, 3), dtype=dtype)
    alpha = np.full((40, 50), top, dtype)
    alpha[10:30, 15:] = 0
    alpha[0, 0] = 1  # nearly transparent counts as visible
    results = []
    for under in (0, top):
        pixels[alpha == 0] = under
        results.append(fill_hidden(pixels.copy(), alpha))
        assert np.array_equal(results[-1][alpha > 0], pixels[alpha > 0]) and results[-1].dtype == dtype
    assert np.array_equal(*results) and results[0].min() >= top // 2
    assert fill_hidden(pixels, None) is pixels and fill_hidden(pixels, alpha * 0) is pixels


def test_padding_repeats_the_edge():
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (1, 1, 4, 4)
    assert torch.equal(padded[..., :2, :3], image)
    assert padded[0, 0, 3].tolist() == [3, 4, 5, 5]
    assert pad_to_multiple(torch.zeros(1, 3, 1, 1), 16).shape == (1, 3, 16, 16)
    assert pad_to_multiple(padded, 4) is padded


def test_self_ensemble_is_equivariant_to_flips_and_rotations():
    image = torch.rand(2, 3, 5, 8)

    def lopsided(x: torch.Tensor) -> torch.Tensor:
        return x + torch.linspace(0, 1, x.shape[3])

    def mean(x: torch.Tensor) -> torch.Tensor:
        return self_ensemble(lopsided, x)

    assert torch.allclose(self_ensemble(lambda x: 2 * x, image), 2 * image)
    assert torch.allclose(mean(torch.rot90(image, 1, (2, 3))), torch.rot90(mean(image), 1, (2, 3)))
    assert torch.allclose(mean(image.flip(3)), mean(image).flip(3))
    assert torch.allclose(mean(image), image + 0.5)  # each ramp is averaged with its mirror image
    assert self_ensemble(lambda x: x.bfloat16(), image).dtype == torch.float32


@pytest.mark.parametrize(("length", "tile", "overlap"), [(100, 32, 8), (33, 32, 8), (32, 32, 8), (7, 32, 8)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_tiles_cover_the_length_and_overlap(length, tile, overlap, multiple):
    spans = tile_spans(length, tile, overlap, multiple)
    assert spans[0].start == 0 and spans[-1].stop == length
    assert {span.stop - span.start for span in spans} == {spans[0].stop} and spans[0].stop <= tile
    pairs = list(zip(spans, spans[1:], strict=False))
    assert all(overlap <= a.stop - b.start < tile for a, b in pairs)


def test_equal_tiles_have_little_overhead():
    """2560 x 1600 in tiles of at most 1536 costs 1.13 times the image; fixed squares would cost 2.3 times."""

    def cost(width, height, tile, overlap):
        sides = [tile_spans(length, tile, overlap, 16) for length in (width, height)]
        return np.prod([len(spans) * spans[0].stop for spans in sides]) / (width * height)

    assert cost(2560, 1600, 1536, 128) < 1.15
    assert cost(1280, 720, 384, 64) < 1.45


def test_single_tile_is_not_copied_and_many_are_blended_in_float32():
    image = torch.rand(1, 3, 20, 20)
    assert restore_tiled(image, lambda x: x, 32, 8).data_ptr() == image.data_ptr()
    assert restore_tiled(image, lambda x: x.bfloat16(), 16, 8).dtype == torch.float32


def test_local_operation_is_equal_in_tiles():
    """Identity gives the image; a blur of radius 2 differs little in spite of wrong tile edges."""
    image = torch.rand(2, 3, 70, 53)
    assert torch.allclose(restore_tiled(image, lambda x: x, 32, 8), image, atol=1e-6)

    def blur(x):
        return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)

    difference = (restore_tiled(image, blur, 32, 16) - blur(image)).abs()
    assert difference.max() < 0.02 and difference.mean() < 1e-3


def test_upscaled_tiles_make_an_upscaled_image():
    image = torch.rand(1, 3, 70, 53)
    enlarged = restore_tiled(image, lambda x: F.interpolate(x, scale_factor=3), 32, 8, scale=3)
    assert torch.allclose(enlarged, F.interpolate(image, scale_factor=3), atol=1e-6)


def test_seams_are_smooth():
    """Tiles differ by 1 in brightness, neighbouring pixels by far less."""
    tiles = iter(range(100))
    blended = restore_tiled(torch.zeros(1, 1, 32, 200), lambda x: x + next(tiles), 32, 16)
    assert (blended[..., 1:] - blended[..., :-1]).abs().max() < 0.2


def test_tile_not_larger_than_overlap_raises():
    for tile, overlap in ((0, 0), (16, 16), (16, -1)):
        with pytest.raises(ValueError, match=f"tile {tile} and overlap {overlap}"):
            restore_tiled(torch.zeros(1, 1, 8, 8), lambda x: x, tile, overlap)


def test_restore_photo_reports_tiles_and_keeps_values():
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    seen = []

    def progress(corners):
        seen.extend(corners)
        return corners

    cpu = torch.device("cpu")
    whole = restore_photo(image, lambda part: part, cpu)
    tiled = restore_photo(image, lambda part: part, cpu, tile=32, overlap=8, progress=progress)
    assert np.array_equal(whole, image) and np.array_equal(tiled, image)
    assert [(y.start, x.start) for y, x in seen] == [(y, x) for y in (0, 8) for x in (0, 19, 38)]


def test_16_bit_images_keep_their_values():
    image = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    same = restore_photo(image, lambda part: part, torch.device("cpu"), "auto", tile=16, overlap=8)
    assert same.dtype == np.uint16 and np.array_equal(same, image)
