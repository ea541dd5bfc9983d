"""Inpainting photographs with the ControlNet at tiny size, and without a model."""

import json
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from cldm.inpaint import (
    Inpainting,
    distance_to,
    expand,
    fill_smoothly,
    hole_scores,
    inpaint_image,
    match_border,
    regions_of,
)
from cldm.model import create_model, read_config, widen_input
from harness.jobs import list_jobs
from harness.settings import read_settings
from ldm import checkpoint
from ldm.data.image import photographs, read_image, to_tensor, write_image
from ldm.data.inpaint import make_hint
from ldm.data.photo import read_note
from ldm.holes import fill_classically
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config
from tests.fill import fill

CONFIG = "models/cldm_tiny_inpaint.yaml"
HINT = "control_model.input_hint_block.0.weight"
OPTIONS = Inpainting(steps=2, resolution=64)


@pytest.fixture(scope="module")
def model():
    return fill(create_model(CONFIG)).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.ckpt"
    checkpoint.save(path, {"state_dict": model.state_dict(), "config": read_config(CONFIG)})
    return path


def photograph(height: int, width: int) -> np.ndarray:
    return read_image(photographs()[0])[100 : 100 + height, 60 : 60 + width]


def hole_in(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, (width // 2, height // 2), min(height, width) // 5, 255, -1)
    return mask


@pytest.mark.parametrize("size", [(70, 133), (33, 20)])
@pytest.mark.parametrize("change", [{"mask_blur": 0}, {"grow_mask": 5}, {"only_masked_padding": 6}])
def test_pixels_outside_the_feathered_mask_are_unchanged(model, size, change):
    image, mask = photograph(*size), hole_in(*size)
    options = replace(OPTIONS, **change)
    result = inpaint_image(model, image, mask, options)
    assert result.shape == image.shape and result.dtype == np.uint8
    distance = distance_to(mask)
    outside = distance > options.grow_mask + options.mask_blur
    assert outside.any() and np.array_equal(result[outside], image[outside])
    hole = distance <= options.grow_mask
    assert (result[hole] != image[hole]).any(axis=-1).mean() > 0.9
    assert np.array_equal(result, inpaint_image(model, image, mask, options))


def test_feather_blends_filling_into_the_image(model):
    image, mask = photograph(96, 96), hole_in(96, 96)
    hard = inpaint_image(model, image, mask, replace(OPTIONS, mask_blur=0)).astype(float)
    soft = inpaint_image(model, image, mask, replace(OPTIONS, mask_blur=8)).astype(float)
    distance = distance_to(mask)
    assert np.array_equal(hard[distance == 0], soft[distance == 0])
    assert np.array_equal(hard[distance >= 1], image[distance >= 1])
    moved = [np.abs(soft - image)[(distance > d) & (distance <= d + 2)].mean() for d in (0, 2, 4, 6)]
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0


def test_each_option_changes_the_filling(model):
    image, mask = photograph(64, 64), hole_in(64, 64)
    plain = inpaint_image(model, image, mask, OPTIONS)
    changes = [
        {"seed": 1},
        {"prompt": "a cat"},
        {"control_scale": 0.0},
        {"strength": 0.5},
        {"method": "unipc"},
    ]
    changes += [{"color_fix": False}, {"steps": 3}, {"mask_blur": 2}, {"grow_mask": 2}]
    for change in changes:
        assert not np.array_equal(plain, inpaint_image(model, image, mask, replace(OPTIONS, **change))), (
            change
        )
    guided = replace(OPTIONS, prompt="a cat")
    assert not np.array_equal(
        inpaint_image(model, image, mask, guided),
        inpaint_image(model, image, mask, replace(guided, guidance_scale=1.0)),
    )
    assert np.array_equal(plain, inpaint_image(model, image, mask, OPTIONS))  # no state is kept


def test_hole_content_has_no_effect(model):
    """With strength 1 the filling depends only on the surroundings."""
    image, mask = photograph(64, 64), hole_in(64, 64)
    other = np.where(mask[..., None] > 0, 255 - image, image)
    results = [
        inpaint_image(model, picture, mask, replace(OPTIONS, mask_blur=0)) for picture in (image, other)
    ]
    assert np.array_equal(*results)


def test_known_latents_are_restored_outside_cells_touching_the_hole(model, monkeypatch):
    seen = {}

    def sample(self, steps, batch_size, shape, cond, x0, mask, **options):
        seen.update(x0=x0, mask=mask, hint=cond["c_concat"][0])
        return torch.full_like(x0, 7.0), {}

    monkeypatch.setattr(DDIMSampler, "sample", sample)
    monkeypatch.setattr(
        model, "decode_first_stage", lambda z: seen.update(z=z) or torch.zeros(1, 3, 128, 128)
    )
    mask = np.zeros((100, 100), np.uint8)
    mask[15, 40] = mask[56:72, 56:71] = 255
    inpaint_image(model, photograph(100, 100), mask, OPTIONS)
    free = torch.zeros(16, 16)
    free[1, 5] = 1
    free[7:9, 7:9] = 1
    assert torch.equal(seen["mask"][0, 0], 1 - free)
    assert torch.equal(seen["z"], torch.where(free > 0, torch.tensor(7.0), seen["x0"]))
    assert (seen["hint"][0, :, 15, 40] == -1).all() and (seen["hint"] == -1).sum() == 3 * (1 + 16 * 15)


def test_all_black_and_all_white_masks_give_warnings(model):
    image = photograph(64, 80)
    with pytest.warns(UserWarning, match="mask is black"):
        assert np.array_equal(inpaint_image(model, image, np.zeros((64, 80), np.uint8), OPTIONS), image)
    with pytest.warns(UserWarning, match="white everywhere: the whole image is replaced"):
        everything = inpaint_image(model, image, np.ones((64, 80), np.uint8), OPTIONS)
    assert everything.shape == image.shape and everything.std() > 0


@pytest.mark.parametrize(("place", "padding"), [((0, 0), -1), ((63, 63), 8), ((31, 17), 8)])
def test_one_pixel_hole_is_filled_anywhere(model, place, padding):
    image, mask = photograph(64, 64), np.zeros((64, 64), np.uint8)
    mask[place] = 1
    result = inpaint_image(model, image, mask, replace(OPTIONS, mask_blur=0, only_masked_padding=padding))
    assert (result[place] != image[place]).any()
    assert np.array_equal(result[mask == 0], image[mask == 0])


def test_transparency_is_kept_outside_and_removed_inside_the_hole(model):
    image = np.dstack([photograph(64, 64), np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))])
    mask = hole_in(64, 64)
    result = inpaint_image(model, image, mask, OPTIONS)
    outside = distance_to(mask) > OPTIONS.mask_blur
    assert np.array_equal(result[outside], image[outside])
    assert (result[mask > 0][:, 3] == 255).all()


def test_bad_options_raise(model):
    image = photograph(64, 64)
    with pytest.raises(ValueError, match=r"mask is \(64, 65\), the image \(64, 64\)"):
        inpaint_image(model, image, np.ones((64, 65), np.uint8), OPTIONS)
    changes = [{"mask_blur": -1}, {"grow_mask": -1}, {"only_masked_padding": -2}]
    changes += [{"method": "euler"}, {"strength": 1.5}]
    for change in changes:
        with pytest.raises(ValueError, match="must be|must lie"):
            inpaint_image(model, image, hole_in(64, 64), replace(OPTIONS, **change))


def test_fill_smoothly_interpolates_the_surroundings():
    y, x = np.mgrid[:80, :100].astype(np.float32)
    ramp = np.dstack([y, x, y + x])
    hole = hole_in(80, 100)
    filled = fill_smoothly(ramp, hole)
    assert np.array_equal(filled[hole == 0], ramp[hole == 0])
    assert np.abs(filled - ramp).max() < 12 and np.abs(filled - ramp)[hole > 0].mean() < 4
    assert np.allclose(fill_smoothly(np.full((33, 57, 3), 9, np.float32), hole[:33, :57]), 9)
    assert (fill_smoothly(ramp, np.ones_like(hole)) == 127.5).all()


def test_match_border_removes_a_colour_cast():
    image = photograph(128, 128)
    hole = hole_in(128, 128)
    cast = (image.astype(float) * 0.8 + [25, 0, 10]).clip(0, 255).astype(np.uint8)
    fixed = match_border(cast, image, hole)
    before, after = (np.abs(a.astype(float) - image)[hole > 0].mean() for a in (cast, fixed))
    assert after < 0.4 * before
    assert np.abs(match_border(image, image, hole).astype(int) - image).max() == 0


def test_widened_hint_input_gives_same_output_at_start(model):
    config = read_config(CONFIG)
    config["params"]["control_stage_config"]["params"]["hint_channels"] = 4
    wide = instantiate_from_config(config)
    wide.load_state_dict(widen_input(model.state_dict(), HINT, 4))
    image, mask = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 1, 64, 64).round()
    noisy, t, text = torch.randn(1, 16, 8, 8), torch.tensor([500]), torch.randn(1, 7, 32)
    outputs = [
        m.apply_model(noisy, t, {"c_crossattn": [text], "c_concat": [make_hint(image, mask, channels)]})
        for m, channels in ((model, 3), (wide, 4))
    ]
    assert torch.allclose(*outputs, atol=1e-5)
    assert widen_input(model.state_dict(), HINT, 3).keys() == model.state_dict().keys()
    assert widen_input({"a": torch.zeros(1)}, HINT, 4).keys() == {"a"}
    result = inpaint_image(wide.eval(), photograph(64, 64), hole_in(64, 64), OPTIONS)
    assert result.shape == (64, 64, 3)


def test_holes_get_separate_regions_unless_close():
    hole = np.zeros((100, 120), np.uint8)
    hole[5:10, 5:15] = hole[60:70, 90:95] = hole[60:64, 100:110] = 1
    assert regions_of(hole, -1, 4) == [(slice(0, 100), slice(0, 120))]
    parts = sorted(regions_of(hole, 6, 4), key=lambda part: part[0].start)
    assert parts == [(slice(0, 20), slice(0, 25)), (slice(50, 80), slice(80, 120))]
    assert len(regions_of(hole, 0, 0)) == 3
    hole[:] = 1
    assert regions_of(hole, 6, 4) == [(slice(0, 100), slice(0, 120))]


def test_only_masked_padding_fills_each_hole_separately(model, monkeypatch):
    seen = []

    def fill_grey(model, image, hole, options, progress):
        seen.append(hole.sum())
        return np.full_like(image, 7)

    monkeypatch.setattr("cldm.inpaint.fill", fill_grey)
    image, mask = photograph(64, 256), np.zeros((64, 256), np.uint8)
    mask[20:30, 20:30] = mask[30:34, 220:230] = 1
    result = inpaint_image(model, image, mask, Inpainting(only_masked_padding=8, mask_blur=0))
    assert sorted(seen) == [40, 100] and (result[mask > 0] == 7).all()
    assert np.array_equal(result[mask == 0], image[mask == 0])


@pytest.mark.parametrize("size", [(6, 300), (30, 40), (80, 90)])
def test_region_size_is_limited_by_resolution(model, monkeypatch, size):
    seen = []

    def watched(image):
        seen.append(image.shape[:2])
        return to_tensor(image)

    monkeypatch.setattr("cldm.inpaint.to_tensor", watched)
    image, mask = photograph(100, 310), np.zeros((100, 310), np.uint8)
    mask[5 : 5 + size[0], 5 : 5 + size[1]] = 1
    options = replace(OPTIONS, only_masked_padding=0, mask_blur=0, steps=1)
    assert inpaint_image(model, image, mask, options).shape == image.shape
    pixels = {height * width for height, width in seen}
    assert len(pixels) == 1 and 0.9 * 64**2 < pixels.pop() <= max(64**2, size[0] * size[1])


def test_hidden_colours_do_not_reach_the_network(model):
    mask, alpha = hole_in(64, 64), np.full((64, 64), 255, np.uint8)
    alpha[:, 40:] = 0
    results = []
    for under in (0, 255):
        image = np.dstack([np.where(alpha[..., None] > 0, photograph(64, 64), under).astype(np.uint8), alpha])
        results.append(inpaint_image(model, image, mask, replace(OPTIONS, mask_blur=0)))
        assert np.array_equal(results[-1][mask == 0], image[mask == 0])
    assert np.array_equal(results[0][mask > 0], results[1][mask > 0])


def test_outpainting_adds_masked_pixels(model):
    image, mask = photograph(40, 50), np.zeros((40, 50), np.uint8)
    mask[3, 4] = 1
    larger, hole = expand(image, mask, (8, 0, 16, 24))
    assert larger.shape == (64, 74, 3) and hole.sum() == 64 * 74 - 40 * 50 + 1
    assert np.array_equal(larger[:40, 8:58], image) and hole[3, 12] == 1
    filled = inpaint_image(model, larger, hole, OPTIONS)
    known = distance_to(hole) > OPTIONS.mask_blur
    assert filled.shape == larger.shape and np.array_equal(filled[known], larger[known])
    with pytest.raises(ValueError, match="0 or more pixels"):
        expand(image, mask, (-1, 0, 0, 0))


def test_command_fills_one_image(weights, tmp_path):
    image = Image.fromarray(np.dstack([photograph(70, 90), np.full((70, 90), 200, np.uint8)]))
    image.save(tmp_path / "a photo.png")
    write_image(tmp_path / "mask.png", np.repeat(hole_in(70, 90)[..., None], 3, axis=2))
    words = ["inpaint", "--checkpoint_path", str(weights), "--num_inference_steps", "1", "--device", "cpu"]
    words += ["--input_image", str(tmp_path / "a photo.png"), "--input_mask", str(tmp_path / "mask.png")]
    infer.restore_files(read_settings(infer.COMMANDS, words=[*words, "--output_dir", str(tmp_path / "out")]))
    with Image.open(tmp_path / "out" / "inpainted.png") as result:
        assert result.mode == "RGBA" and result.size == (90, 70)
        outside = distance_to(hole_in(70, 90)) > 4
        assert np.array_equal(np.array(result)[outside], np.array(image)[outside])
    assert read_image(tmp_path / "out" / "comparison.png").shape == (70, 278, 3)


def test_command_fills_a_folder(weights, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, photograph(64, 64))
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "a_mask.png", hole_in(64, 64))
    settings = infer.Inpaint(
        input=tmp_path / "in",
        input_mask=tmp_path / "masks",
        output_dir=tmp_path / "out",
        checkpoint_path=weights,
        num_inference_steps=1,
    )
    with pytest.raises(ValueError, match="1 of 2 images failed"):  # a missing mask does not stop the others
        infer.restore_files(settings)
    printed = capsys.readouterr().out
    assert "1 made, 0 kept (unchanged), 0 left out, 1 failed" in printed and "no mask for b.png" in printed
    write_image(tmp_path / "masks" / "b.png", hole_in(128, 128))
    with pytest.warns(UserWarning, match="it is resized"):
        infer.restore_files(settings)
    assert "1 made, 1 kept (unchanged)" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    assert sorted(path.name for path in (tmp_path / "out_comparison").iterdir()) == ["a.png", "b.png"]
    with pytest.raises(FileNotFoundError, match="none.ckpt"):  # results of other weights do not count
        infer.restore_files(replace(settings, checkpoint_path=Path("none.ckpt")))
    with pytest.raises(FileNotFoundError, match="mask not found: .*gone.png"):
        infer.restore_files(replace(settings, input_mask=tmp_path / "gone.png"))
    with pytest.raises(ValueError, match="give --input_mask, .* or --outpaint"):
        infer.restore_files(replace(settings, input_mask=None))
    write_image(tmp_path / "masks" / "a_mask.png", hole_in(64, 32))  # another mask, of another shape
    with pytest.raises(ValueError, match="1 of 1 images failed"):
        infer.restore_files(settings)
    printed = capsys.readouterr().out
    assert "0 made, 1 kept (unchanged), 0 left out, 1 failed" in printed
    assert "a_mask.png is 32x64, its image 64x64" in printed


def test_outpainting_beyond_format_limit_raises_before_restoring(weights, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", photograph(8, 8))
    monkeypatch.setattr(infer.Inpaint, "restorer", lambda self: pytest.fail)
    options = {"outpaint": (16383, 0, 0, 0), "format": "webp", "output_dir": tmp_path / "out"}
    command = infer.Inpaint(input=tmp_path / "a.png", checkpoint_path=weights, comparison=False, **options)
    with pytest.raises(ValueError, match="16391 x 8 pixels, WEBP holds 16383 a side"):
        infer.restore_files(command)


def test_command_accepts_photos_and_masks_in_one_folder(weights, tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, photograph(64, 64))
    write_image(tmp_path / "a_mask.png", hole_in(64, 64))
    write_image(tmp_path / "b_mask001.png", hole_in(64, 64)[::-1] & 1)
    options = {"checkpoint_path": weights, "num_inference_steps": 1, "mask_blur": 0, "comparison": False}
    settings = infer.Inpaint(
        input=tmp_path, input_mask=tmp_path, output_dir=tmp_path / "out", pattern="a*", **options
    )
    infer.restore_files(settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    kept = hole_in(64, 64) == 0
    result, image = read_image(tmp_path / "out" / "a.png"), photograph(64, 64)
    assert np.array_equal(result[kept], image[kept]) and (result != image).any()
    single = replace(settings, input=tmp_path / "a.png", pattern=infer.Inpaint.pattern)
    infer.restore_files(single)
    assert np.array_equal(read_image(tmp_path / "out" / "inpainted.png"), result)
    with pytest.raises(ValueError, match="b_mask001.png: the brightest value of this mask is 1 of 255"):
        infer.restore_files(replace(single, input_mask=tmp_path / "b_mask001.png"))
    jobs, left_out = list_jobs(replace(single, input=tmp_path, input_mask=tmp_path / "b.png"))
    assert [source.name for source, _ in jobs] == ["a.png"]
    assert {path.name: why for path, why in left_out.items() if path.parent == tmp_path} == dict.fromkeys(
        ("a_mask.png", "b.png", "b_mask001.png"), "a mask"
    )


@pytest.mark.parametrize("method", ["telea", "biharmonic"])
def test_command_fills_without_a_model(tmp_path, monkeypatch, method):
    """Filling hole by hole equals filling all at once; other pixels, including alpha, are unchanged."""
    monkeypatch.setattr(infer, "small_file", lambda name: pytest.fail("no weights are needed"))
    alpha = np.tile(np.arange(128, 255, dtype=np.uint8), (110, 1))
    image, mask = np.dstack([photograph(110, 127), alpha]), np.zeros((110, 127), np.uint8)
    mask[0, 0] = mask[109, 126] = mask[20, 100] = 255
    cv2.line(mask, (10, 60), (60, 70), 255, 3)
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["inpaint", "--method", method, "--input_image", str(tmp_path / "photo.png")]
    words += ["--input_mask", str(tmp_path / "mask.png"), "--output_dir", str(tmp_path / "out")]
    infer.restore_files(read_settings(infer.COMMANDS, words=words))
    result = np.array(Image.open(tmp_path / "out" / "inpainted.png"))
    assert np.array_equal(result[mask == 0], image[mask == 0])
    whole = fill_classically(image[..., :3], mask, method)
    assert np.abs(result[..., :3].astype(int) - whole).max() <= 1 and (result[mask > 0, 3] == 255).all()
    assert (result[mask > 0, :3] != image[mask > 0, :3]).any(axis=-1).mean() > 0.5
    assert json.loads(read_note(tmp_path / "out" / "inpainted.png"))["options"]["method"] == method
    assert read_image(tmp_path / "out" / "comparison.png").shape[0] == 110


def test_changed_method_fills_a_folder_again(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", photograph(64, 64))
    Image.fromarray(hole_in(64, 64)).save(tmp_path / "mask.png")
    options = {"input_mask": tmp_path / "mask.png", "output_dir": tmp_path / "out", "grow_mask": 2}
    command = infer.Inpaint(input=tmp_path / "in", method="telea", **options)
    for made, method in ((1, "telea"), (0, "telea"), (1, "biharmonic")):
        infer.restore_files(replace(command, method=method))
        assert f"{made} made, {1 - made} kept" in capsys.readouterr().out
    changed = (read_image(tmp_path / "out" / "a.png") != photograph(64, 64)).any(axis=-1)
    assert not changed[distance_to(hole_in(64, 64)) > 2].any()
    assert changed[distance_to(hole_in(64, 64)) == 2].any()


def test_model_free_filling_of_empty_and_full_masks(tmp_path):
    write_image(tmp_path / "a.png", photograph(64, 64))
    options = {"input_mask": tmp_path / "mask.png", "output_dir": tmp_path / "out", "method": "biharmonic"}
    command = infer.Inpaint(input=tmp_path / "a.png", **options)
    Image.new("L", (64, 64), 0).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match="mask is black"):
        infer.restore_files(command)
    assert np.array_equal(read_image(tmp_path / "out" / "inpainted.png"), photograph(64, 64))
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="a.png: all of it is hole: --method biharmonic has nothing to fill"):
        infer.restore_files(command)


UNREAD = {"checkpoint_path": Path("a.ckpt"), "base_path": Path("b.ckpt"), "config_path": Path("c.yaml")}
UNREAD |= {"num_inference_steps": 1, "control_scale": 2.0, "negative_prompt": "x", "color_fix": False}
UNREAD |= {"precision": "32", "scheduler": "ddim", "seed": 1, "prompt": "x", "guidance_scale": 1.0}
UNREAD |= {"strength": 0.5, "mask_blur": 0, "only_masked_padding": 32, "resolution": 64}
UNREAD |= {"device": "cuda"}
READ = """input input_mask method output_dir output_prefix pattern shard format quality comparison overwrite
outpaint grow_mask""".split()


def test_options_without_effect_on_model_free_filling_raise(tmp_path):
    write_image(tmp_path / "a.png", photograph(64, 64))
    command = infer.Inpaint(input=tmp_path / "a.png", method="telea", outpaint=(0, 0, 4, 0))
    command.output_dir = tmp_path / "out"
    assert {field.name for field in fields(command)} == {*UNREAD, *READ}
    for name, value in UNREAD.items():
        flag = "--no_color_fix" if name == "color_fix" else f"--{name}"
        with pytest.raises(ValueError, match=f"--method telea fills without a model: leave out {flag}"):
            infer.restore_files(replace(command, **{name: value}))
    infer.restore_files(command)
    assert read_image(tmp_path / "out" / "inpainted.png").shape == (64, 68, 3)


def test_hole_scores_of_ground_truth_and_flat_filling():
    """The ground truth has the best scores; a constant colour has no gradients."""
    rng = np.random.default_rng(0)
    truth = cv2.resize(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (64, 64))
    hole = np.zeros((64, 64), bool)
    hole[20:40, 16:44] = True
    same = hole_scores(truth, truth, hole)
    assert same["psnr_hole"] == 100 and same["gradients_hole"] == 1
    flat = np.where(hole[..., None], 128, truth).astype(np.uint8)
    scores = hole_scores(flat, truth, hole)
    error = np.square((truth[hole].astype(float) - 128) / 255).mean()
    assert np.isclose(scores["psnr_hole"], -10 * np.log10(error))
    assert scores["gradients_hole"] < 0.5
