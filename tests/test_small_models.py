"""The included small models reach the scores recorded when they were trained (docs/weights.md)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import infer
from benchmarks import small_holes
from cldm.inpaint import Inpainting, hole_scores, inpaint_image
from cldm.restore import fix_color
from extras.train_small_base import KEEP, square
from ldm.alignment import measure_movement
from ldm.checkpoint import read_metadata, read_settings, read_weights, write_weights
from ldm.data.image import photographs, read_image
from ldm.holes import METHODS, fill_classically
from ldm.metrics import psnr
from ldm.models.kontext import load_restorer
from ldm.modules.image_degradation.blur import random_blur
from ldm.modules.image_degradation.degrade import degrade
from ldm.modules.image_degradation.masks import random_mask

MODELS = Path("models")
# mean gain in dB over the two squares; slight blur, like this gaussian blur, gets worse
GAINS = {"gaussian_blur": -0.65, "motion_blur": 1.26, "degradation": 4.55}
FILLED = -0.14  # dB above Telea in the holes


@pytest.fixture(scope="module")
def squares() -> list[np.ndarray]:
    """Crop squares of two photographs outside the training sets of all models."""
    rng = np.random.default_rng(7)
    return [square(read_image(path), rng) for path in photographs(("astronaut.png", "coffee.png"))]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mean_gain(restore, squares: list[np.ndarray], worse: list[np.ndarray]) -> float:
    pairs = [
        (restore(image, Path("a.png")), image, sharp) for image, sharp in zip(worse, squares, strict=True)
    ]
    return float(np.mean([psnr(restored, sharp) - psnr(image, sharp) for restored, image, sharp in pairs]))


@pytest.mark.parametrize("kind", ["gaussian_blur", "motion_blur"])
def test_small_controlnet_deblurs(kind, squares):
    blurry = [random_blur(sharp, np.random.default_rng(3), [kind], scale=0.6)[0] for sharp in squares]
    restore = infer.Deblur(input=Path("a.png"), device="cpu").restorer()
    assert mean_gain(restore, squares, blurry) > GAINS[kind] - 0.1


def test_metadata_not_file_name_sets_steps_base_and_color_fix(squares, tmp_path):
    """The included ControlNet needs no color fix; without this metadata the input's colours are kept."""
    included = MODELS / "small_deblur.safetensors"
    named, silent = tmp_path / "other.safetensors", tmp_path / "small_deblur.safetensors"
    shutil.copy(included, named)
    settings = {"settings": read_metadata(included)["settings"]}  # with the prompt
    write_weights(silent, read_weights(included), settings)
    commands = [
        infer.Deblur(checkpoint_path=path, input=Path("a.png"), device="cpu") for path in (named, silent)
    ]
    assert [command.sampling_steps() for command in commands] == [2, 50]
    with pytest.raises(ValueError, match="is a ControlNet alone: its base_path is missing"):
        commands[1].restorer()
    commands[1].base_path, commands[1].num_inference_steps = MODELS / "small_diffusion.safetensors", 2
    pictures = [command.restorer()(squares[0], Path("a.png")) for command in commands]
    kept = fix_color(pictures[0], squares[0])
    assert not np.array_equal(*pictures) and np.abs(kept.astype(int) - pictures[1]).max() <= 2
    assert infer.Inpaint(input=Path("a.png")).sampling_steps() == 10
    work = infer.Kontext(input=Path("a.png")).work()
    assert (work["steps"], work["resolution"], work["tile"]) == (2, 128, 128)


def test_small_controlnet_fills_holes(squares):
    model = infer.Inpaint(input=Path("a.png"), device="cpu").open()
    scores = []
    for number, image in enumerate(squares):
        mask = random_mask(128, 128, np.random.default_rng(number), "mixed", (0.1, 0.3))
        filled = inpaint_image(model, image, mask, Inpainting(steps=10, mask_blur=0))
        assert np.array_equal(filled[mask == 0], image[mask == 0])
        pair = filled, fill_classically(image, mask, "telea")
        scores.append([hole_scores(each, image, mask > 0)["psnr_hole"] for each in pair])
    gain = np.mean([ours - telea for ours, telea in scores])
    assert gain > FILLED - 0.1


@pytest.mark.slow
def test_small_holes_table_has_default_and_classical_fills(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # no networks for LPIPS and DISTS
    names = photographs(("coffee.png",))
    monkeypatch.setattr(small_holes, "photographs", lambda: names)
    small_holes.main(small_holes.Settings(squares=1, seed=5))
    printed = capsys.readouterr().out
    assert f"dists: left out, {tmp_path}" in printed
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[0] == "|"]
    shown = {name: (psnr, texture) for name, psnr, texture in rows[2:]}
    rng = np.random.default_rng(5)
    image, mask = square(read_image(names[0]), rng), random_mask(128, 128, rng, "mixed", (0.1, 0.3))
    command = infer.Inpaint(input=Path("a.png"), device="cpu", mask_blur=0)
    filled = inpaint_image(command.open(), image, mask, command.options_for(Inpainting))
    fills = {"10 steps, the default": filled}
    fills |= {name: fill_classically(image, mask, name) for name in METHODS}
    for name, filled in fills.items():
        scores = hole_scores(filled, image, mask > 0)
        assert shown[name] == tuple(f"{score:.2f}" for score in scores.values())
    assert len(shown) == 9 + len(METHODS) == len(set(shown.values()))


def test_small_lora_undoes_degradation(squares, tmp_path):
    kinds = {"types": ("downsample", "noise"), "lr_scale": 2, "noise_level": 0.1}
    degraded = [degrade(sharp, np.random.default_rng(5), **kinds) for sharp in squares]
    command = infer.Kontext(input=Path("a.png"), output_dir=tmp_path, num_inference_steps=2, device="cpu")
    assert mean_gain(command.restorer(), squares, degraded) > GAINS["degradation"] - 0.1


def test_small_transformer_does_not_shift_or_zoom(squares, tmp_path):
    """Shift and zoom are the most frequent complaints about editing models."""
    restore = load_restorer(MODELS / "small_kontext", None, KEEP, tmp_path / "prompt.safetensors")
    for image in squares:
        kept = restore(image, steps=4, guidance=1.0, resolution=128)
        moved = measure_movement(kept, image)
        assert psnr(kept, image) > 28 and moved.shift < 0.1 and abs(moved.scale - 100) < 0.1


def test_prompt_embedded_by_another_model_is_embedded_again(squares, tmp_path):
    other = {"t5": torch.zeros(1, 8, 48), "pooled": torch.zeros(1, 32)}
    about = {"prompt": "restore this degraded photograph", "encoders": "another model's"}
    write_weights(tmp_path / ".prompt.safetensors", other, about)
    command = infer.Kontext(input=Path("a.png"), output_dir=tmp_path, num_inference_steps=1, device="cpu")
    assert command.restorer()(squares[0], Path("a.png")).shape == squares[0].shape


def test_included_weights_are_small_and_have_settings():
    files = [*MODELS.glob("small_*.safetensors"), *MODELS.glob("small_kontext/**/*.safetensors")]
    assert len(files) >= 7 and all(path.stat().st_size < 12e6 for path in files)
    for name in ("small_deblur", "small_inpaint", "small_diffusion"):
        assert read_settings(MODELS / f"{name}.safetensors")
