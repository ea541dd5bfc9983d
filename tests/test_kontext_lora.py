import csv
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import infer
import train_kontext_lora as script
from ldm import checkpoint
from ldm.alignment import measure_movement
from ldm.data.image import photographs, read_image, write_image
from ldm.metrics import psnr
from ldm.models.kontext import (
    TRANSFORMER,
    load_autoencoder,
    load_flux,
    load_restorer,
    restore_image,
)
from ldm.models.prompts import prompt_file
from ldm.modules.flux import pack, unpack
from ldm.modules.lora import LORA_FILE, MODELSPEC, load_lora, make_lora
from tests.tiny_flux import write_tiny_folder
from train_kontext_lora import SIGMAS, Settings, draw_noise, flow_loss, learning_rate_factor, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write photographs, a tiny model folder and an embedded prompt."""
    folder = tmp_path_factory.mktemp("kontext")
    (folder / "photos").mkdir()
    for path in photographs(("chelsea.png", "coffee.png")):
        write_image(folder / "photos" / path.name, cv2.resize(read_image(path), None, fx=0.2, fy=0.2))
    write_tiny_folder(folder / "model", folder, "restore")
    return folder


def make_settings(folder: Path, output_dir: Path, **values) -> Settings:
    shutil.copytree(folder / "cache", output_dir / "cache", dirs_exist_ok=True)
    settings = Settings(
        pretrained_model_name_or_path=folder / "model",
        hr_root=folder / "photos",
        output_dir=output_dir,
        instance_prompt="restore",
        resolution=32,
        rank=4,
        batch_size=2,
        accumulate_grad_batches=1,
        max_steps=4,
        learning_rate=3e-3,
        save_steps=4,
        preview_steps=1,
        num_workers=0,
    )
    return replace(settings, **values)


def trained(output_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(output_dir / "checkpoints" / "last.ckpt")["state_dict"]


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the relative distance of the up matrices; Adam amplifies rounding errors of some elements."""
    names = [name for name in weights if name.endswith("lora_up.weight")]
    ours, theirs = (torch.cat([w[name].flatten() for name in names]) for w in (weights, others))
    assert ours.abs().max() > 1e-3
    return ((ours - theirs).norm() / ours.norm()).item()


def kill_at(step: int, settings: Settings, monkeypatch) -> None:
    """Run for `step` steps, then interrupt."""
    advance = script.Run.advance

    def killed(run, *arguments):
        if run.step == step:
            raise KeyboardInterrupt
        advance(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            main(settings)


def test_killed_run_resumes_exactly(folder, tmp_path, monkeypatch):
    main(make_settings(folder, tmp_path / "whole", save_steps=2))
    broken = make_settings(folder, tmp_path / "broken", save_steps=2)
    kill_at(3, broken, monkeypatch)
    torch.manual_seed(12345)  # another random state before resuming
    main(broken)
    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for name in (LORA_FILE, "snapshots/lora_0000002.safetensors", "snapshots/lora_0000004.safetensors"):
        files = [checkpoint.read_weights(tmp_path / run / name) for run in ("whole", "broken")]
        assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    with pytest.raises(ValueError, match="rank was 4, is 8"):
        main(replace(broken, rank=8))


def test_base_model_of_other_sizes_is_trained_and_used(folder, tmp_path):
    settings = make_settings(folder, tmp_path / "run", max_steps=1)
    settings.pretrained_model_name_or_path = tmp_path / "model"
    write_tiny_folder(tmp_path / "model", settings.output_dir, "restore", channels=6)
    main(settings)
    restore = load_restorer(tmp_path / "model", settings.output_dir / LORA_FILE)
    image = read_image(folder / "photos" / "coffee.png")
    assert restore(image, steps=1).shape == image.shape


def caption_settings(folder: Path, output_dir: Path) -> Settings:
    """Add a caption and its embedding to one of the two photographs."""
    settings = make_settings(folder, output_dir, captions=True, save_steps=2)
    photos = shutil.copytree(folder / "photos", output_dir.parent / "photos", dirs_exist_ok=True)
    (photos / "coffee.txt").write_text("a cup")
    generator = torch.Generator().manual_seed(0)
    shapes = {"t5": (1, 16, 48), "pooled": (1, 32)}
    embeddings = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    checkpoint.write_weights(prompt_file(output_dir, "a cup"), embeddings, {"prompt": "a cup"})
    return replace(settings, hr_root=photos)


def test_captions_change_the_result_and_resume_exactly(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "flow_loss", lambda m, *a, **k: (seen.append(a), flow_loss(m, *a, **k))[1])
    main(caption_settings(folder, tmp_path / "whole"))
    assert {len(prompt["t5"]) for _, _, prompt, *_ in seen} == {1, 2}
    kill_at(3, caption_settings(folder, tmp_path / "broken"), monkeypatch)
    main(caption_settings(folder, tmp_path / "broken"))
    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "broken")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    image = read_image(folder / "photos" / "coffee.png")
    by_prompt = [
        load_restorer(folder / "model", tmp_path / "whole", prompt)(image, steps=1)
        for prompt in ("restore", "a cup")
    ]
    assert not np.array_equal(*by_prompt)


def test_accumulated_steps_equal_one_large_batch(folder, tmp_path):
    common = {"max_steps": 2}
    main(make_settings(folder, tmp_path / "a", batch_size=4, **common))
    main(make_settings(folder, tmp_path / "b", batch_size=1, accumulate_grad_batches=4, **common))
    assert (
        distance(trained(tmp_path / "a"), trained(tmp_path / "b")) < 5e-3
    )  # rounding differs between batches of 4 and 1


def test_swapped_blocks_give_same_weights(folder, tmp_path):
    main(make_settings(folder, tmp_path / "a", max_steps=2))
    main(make_settings(folder, tmp_path / "b", max_steps=2, blocks_to_swap=5))
    ours, theirs = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    common = {"max_steps": 2}
    main(make_settings(folder, tmp_path / "one", batch_size=2, **common))
    settings = make_settings(folder, tmp_path / "two", batch_size=1, devices=2, **common)
    values = {name: value for name, value in vars(settings).items() if not isinstance(value, bool)}
    flags = [f"--{name}={value}" for name, value in values.items() if value != getattr(Settings(), name)]
    subprocess.run([sys.executable, "train_kontext_lora.py", *flags], check=True)
    assert distance(trained(tmp_path / "one"), trained(tmp_path / "two")) < 1e-3


def test_overfits_one_batch(folder):
    torch.manual_seed(0)
    model = load_flux(folder / "model" / TRANSFORMER)
    adapter = make_lora(model, "all", 16, 16)
    optimizer = torch.optim.AdamW(adapter.parameters(), 3e-3)
    prompt = checkpoint.read_weights(prompt_file(folder, "restore"))
    target, control = torch.randn(2, 4, 16, 4, 4)
    sigma, noise = draw_noise(range(4), (16, 4, 4))
    losses = []
    for _ in range(60):
        loss, _ = flow_loss(model, target, control, prompt, sigma, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_loss_of_a_perfect_network_is_zero():
    target, control = torch.randn(2, 3, 16, 4, 4)
    sigma, noise = draw_noise([5, 6, 7], (16, 4, 4))
    prompt = {"t5": torch.zeros(1, 2, 8), "pooled": torch.zeros(1, 8)}

    def perfect(img, timesteps, guidance, **_):
        x, given = (unpack(tokens, 4, 4) for tokens in img.chunk(2, dim=1))
        assert torch.equal(given, control) and torch.equal(guidance, torch.ones(3))
        level = timesteps[:, None, None, None]
        torch.testing.assert_close(x, (1 - level) * target + level * noise)
        velocity = noise - target
        return torch.cat([pack(velocity), torch.full_like(img[:, :4], 1e9)], dim=1)

    loss, estimate = flow_loss(perfect, target, control, prompt, sigma, noise)
    assert loss < 1e-10
    torch.testing.assert_close(estimate, target, rtol=1e-4, atol=1e-4)
    wrong, _ = flow_loss(lambda **k: perfect(**k) + 0.5, target, control, prompt, sigma, noise)
    assert wrong.item() == pytest.approx(0.25, rel=1e-4)


def test_validation_loss_is_deterministic_and_falls_in_training(folder, tmp_path):
    settings = make_settings(folder, tmp_path)
    prompt = checkpoint.read_weights(prompt_file(folder, "restore"))
    autoencoder, model = script.load_models(settings, torch.device("cpu"))
    data = script.load_data(settings)[1]
    before, again = (script.validation_loss(model, autoencoder, lambda texts: prompt, data) for _ in range(2))
    assert before == again and len(before) == 6
    assert before["loss"] == pytest.approx(np.mean([before[f"loss_{s}"] for s in SIGMAS]))
    main(replace(settings, max_steps=12, save_steps=6, ema_decay=0.0, batch_size=4))
    rows = list(csv.DictReader((tmp_path / "logs" / "metrics.csv").open()))
    assert before["loss"] > float(rows[0]["val/loss"]) > float(rows[1]["val/loss"])


def test_timesteps_and_noise_depend_only_on_the_sample():
    together, alone = draw_noise([1, 2, 3], (16, 4, 4)), draw_noise([2], (16, 4, 4))
    assert torch.equal(together[0][1:2], alone[0]) and torch.equal(together[1][1:2], alone[1])
    sigmas, _ = draw_noise(range(2000), (1, 2, 2))
    assert sigmas.logit().mean().abs() < 0.07 and sigmas.logit().std() == pytest.approx(1, abs=0.05)


def test_learning_rate_schedules():
    rates = {
        name: [learning_rate_factor(step, 110, name, 10) for step in (0, 4, 9, 10, 60, 109)]
        for name in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.1, 0.5, 1, 1, 1, 1]
    assert rates["linear"] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.01])
    assert rates["cosine"] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0.000247], abs=1e-5)


def test_perceptual_term_uses_only_low_noise_and_has_gradients(folder, monkeypatch):
    monkeypatch.setattr(script, "PERCEPTUAL_CROP", 32)
    autoencoder = load_autoencoder(folder / "model" / "ae.safetensors")
    sizes = []

    def distance(restored, clean):
        sizes.append(tuple(restored.shape))
        return (restored - clean).square().mean(dim=(1, 2, 3))

    target = torch.randn(3, 3, 64, 64).tanh()
    batch, sigma = {"target": target, "seed": torch.tensor([3, 4, 5])}, torch.tensor([0.2, 0.9, 0.4])
    estimate = torch.randn(3, 16, 8, 8, requires_grad=True)
    term = script.perceptual_term(autoencoder, distance, estimate, batch, sigma)
    term.backward()
    assert sizes == [(2, 3, 32, 32)]
    assert (
        (estimate.grad[1] == 0).all()
        and estimate.grad[0].abs().max() > 0
        and estimate.grad[2].abs().max() > 0
    )
    assert (estimate.grad[0] != 0).any(dim=0).sum() == 16  # the crop's 4 x 4 latent pixels
    monkeypatch.setattr(script, "PERCEPTUAL_CROP", 256)
    whole = script.perceptual_term(autoencoder, distance, estimate, batch, sigma)
    with torch.no_grad():
        parts = distance(autoencoder.decode(estimate[[0, 2]]), target[[0, 2]])
    assert whole.item() == pytest.approx(((0.8 * parts[0] + 0.6 * parts[1]) / 3).item(), rel=1e-4)
    assert script.perceptual_term(autoencoder, distance, estimate, batch, torch.ones(3)) == 0


def test_perceptual_loss_is_logged(folder, tmp_path, monkeypatch):
    class Distance(nn.Module):
        def forward(self, restored, clean):
            return (restored - clean).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr(script, "PerceptualLoss", Distance)
    main(make_settings(folder, tmp_path, perceptual_loss=True, max_steps=1))
    assert "perceptual" in (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0]


class PixelAutoencoder(nn.Module):
    """Lossless autoencoder that moves 8x8 squares to channels."""

    def encode(self, image):
        return F.pixel_unshuffle(image, 8)

    def decode(self, latent):
        return F.pixel_shuffle(latent, 8)


def copy_control(img, timesteps, **_):
    """Return the velocity of a flow that ends at the control image."""
    latent, control = img.chunk(2, dim=1)
    return torch.cat([(latent - control) / timesteps[:, None, None], control], dim=1)


PROMPT = {"t5": torch.zeros(1, 2, 8), "pooled": torch.zeros(1, 8)}


@pytest.mark.parametrize("size", [(64, 96), (50, 71), (1, 1), (7, 200)])
def test_identity_network_returns_the_input(size):
    image = cv2.resize(read_image(photographs(("coffee.png",))[0]), size[::-1], interpolation=cv2.INTER_AREA)
    restored = restore_image(copy_control, PixelAutoencoder(), PROMPT, image, steps=3)
    assert restored.dtype == np.uint8 and np.abs(restored.astype(int) - image).max() <= 1


@pytest.mark.parametrize("size", [(96, 160), (130, 71)])
def test_tiles_have_no_seams(size):
    """With a pixelwise network, tiles equal the whole image at every pixel."""
    image = cv2.resize(read_image(photographs(("coffee.png",))[0]), size[::-1], interpolation=cv2.INTER_AREA)
    options = {"steps": 2, "resolution": 32, "tile": 64, "overlap": 32}
    seen = []

    def network(img, **rest):
        seen.append(img.shape[1])
        return copy_control(img, **rest)

    restored = restore_image(network, PixelAutoencoder(), PROMPT, image, **options)
    assert restored.shape == image.shape and np.abs(restored.astype(int) - image).max() <= 1
    assert max(seen) <= 2 * (64 // 16) ** 2 and len(seen) > 2 * 2
    small = restore_image(network, PixelAutoencoder(), PROMPT, image, **{**options, "resolution": 512})
    assert np.array_equal(small, restore_image(network, PixelAutoencoder(), PROMPT, image, steps=2))


def test_tile_velocities_are_blended_smoothly():
    """Each tile predicts its own constant; the blend changes gradually from one to the other."""
    values = iter(range(1000))

    def network(img, timesteps, **_):
        return torch.full_like(img, 0.2 * (next(values) % 2) - 0.1)

    image = np.full((16, 192, 3), 128, np.uint8)
    options = {"steps": 1, "resolution": 16, "tile": 112, "overlap": 32}
    noise = restore_image(lambda img, **_: 0 * img, PixelAutoencoder(), PROMPT, image, **options)
    moved = restore_image(network, PixelAutoencoder(), PROMPT, image, **options).astype(int) - noise
    columns = np.median(moved, axis=(0, 2))[::8]
    assert 8 < np.ptp(columns) and np.abs(np.diff(columns)).max() <= 0.55 * np.ptp(columns)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"resolution": 8}, {"tile": 100}, {"tile": 64, "overlap": 64}]
)
def test_bad_options_raise(options):
    with pytest.raises(ValueError, match="at least 1 step and a resolution of 16|must be multiples of 16"):
        restore_image(copy_control, PixelAutoencoder(), PROMPT, np.zeros((32, 32, 3), np.uint8), **options)


@pytest.mark.parametrize("options", [{}, {"resolution": 120}, {"resolution": 64, "tile": 64, "overlap": 32}])
def test_restoring_does_not_shift_or_zoom(options):
    image = cv2.resize(read_image(photographs(("coffee.png",))[0]), (211, 137), interpolation=cv2.INTER_AREA)
    restored = restore_image(copy_control, PixelAutoencoder(), PROMPT, image, steps=2, **options)
    moved = measure_movement(restored, image)
    assert moved.shift < 0.1 and abs(moved.scale - 100) < 0.1


def test_command_restores_with_and_without_lora(folder, tmp_path, monkeypatch):
    settings = make_settings(folder, tmp_path / "run")
    main(settings)
    arguments = ["infer.py", "kontext", "--pretrained_model_name_or_path", str(folder / "model")]
    arguments += [
        "--lora_path",
        str(settings.output_dir / LORA_FILE),
        "--input",
        str(folder / "photos"),
    ]
    arguments += ["--num_inference_steps", "2", "--device", "cpu"]
    for name, more in {"lora": [], "without": ["--lora_scale", "0"], "again": []}.items():
        monkeypatch.setattr(sys, "argv", [*arguments, "--output_dir", str(tmp_path / name), *more])
        infer.run_main(infer.restore_files, infer.COMMANDS)
    lora, without, again = (
        read_image(tmp_path / name / "coffee.png") for name in ("lora", "without", "again")
    )
    assert lora.shape == read_image(folder / "photos" / "coffee.png").shape
    assert np.array_equal(lora, again) and not np.array_equal(lora, without)


def test_movement_is_printed_and_undone_on_request(tmp_path, monkeypatch, capsys):
    image = read_image(photographs(("coffee.png",))[0])[60:260, 100:360]
    there = np.float32([[1, 0, 4], [0, 1, -2.5]])
    moved = cv2.warpAffine(image, there, image.shape[1::-1], flags=cv2.INTER_CUBIC)
    monkeypatch.setattr("ldm.models.kontext.load_restorer", lambda *_, **__: lambda image, **__: moved)
    options = {"input": Path("a.png"), "output_dir": tmp_path, "device": "cpu"}
    kept = infer.Kontext(**options).restorer()(image, Path("a.png"))
    assert np.array_equal(kept, moved)
    printed = capsys.readouterr().out.splitlines()[-1]
    shift = [float(word) for word in printed.split()[2:4]]
    assert printed.startswith("a.png: shift +") and printed.endswith(" %")
    assert shift == pytest.approx([4, -2.5], abs=0.1)
    undone = infer.Kontext(**options, align=True).restorer()(image, Path("a.png"))
    assert psnr(moved, image) < 25 and psnr(undone, image) > 35
    assert capsys.readouterr().out.rstrip().endswith(" %, undone")


def test_unmeasurable_preview_movement_is_nan(folder, tmp_path, monkeypatch):
    settings = make_settings(folder, tmp_path, resolution=48, degradation_types="noise", noise_level=0.02)
    dataset = script.load_data(settings)[1]
    prompts = {"t5": torch.zeros(1)}
    for restore, shift in ((lambda *parts, **_: parts[3], 0), (lambda *parts, **_: parts[3] * 0, math.nan)):
        monkeypatch.setattr(script, "restore_image", restore)
        scores = script.preview(None, None, lambda _: prompts, dataset, settings)[1]
        assert scores["shift_px"] == pytest.approx(shift, abs=0.1, nan_ok=True)
        assert scores["scale_percent"] == pytest.approx(100 + shift, abs=0.5, nan_ok=True)


def test_restorer_needs_a_prompt(folder, tmp_path):
    with pytest.raises(ValueError, match="a prompt is needed: there is no LoRA"):
        load_restorer(folder / "model")
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json MISSING"):
        load_restorer(folder / "model", prompt="never embedded", prompt_cache=tmp_path / "prompt.safetensors")


def test_lora_metadata_describes_the_training(folder, tmp_path):
    main(make_settings(folder, tmp_path, lora_targets="attn", max_steps=1))
    _, metadata = load_lora(load_flux(folder / "model" / TRANSFORMER), tmp_path / LORA_FILE)
    assert metadata == {
        "base": "FLUX.1-Kontext-dev",
        "prompt": "restore",
        "steps": "1",
        "rank": "4",
        "alpha": "4",
        "lora_targets": "attn",
        "resolution": "32",
        **MODELSPEC,
    }
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"


def test_run_folder_can_be_loaded_by_diffusers(folder, tmp_path):
    """The top folder has one LoRA; it and those in subfolders load with the embedded prompt."""
    from diffusers.loaders.lora_base import _best_guess_weight_name

    main(make_settings(folder, tmp_path, save_steps=2))
    assert [path.name for path in tmp_path.glob("*lora*.safetensors")] == [LORA_FILE]
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert len(snapshots) == 2 and (tmp_path / "best" / LORA_FILE).is_file()
    assert _best_guess_weight_name(tmp_path) == _best_guess_weight_name(tmp_path / "best") == LORA_FILE
    header = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/psnr", "val/psnr_input", "val/ssim", "val/loss", "val/loss_0.1", "val/loss_0.9"} <= {*header}
    assert {"val/shift_px", "val/scale_percent"} <= {*header}
    assert {"train/loss", "train/images/s", "train/learning_rate"} <= {*header}
    prompt = checkpoint.read_weights(prompt_file(folder, "restore"))
    for lora in (tmp_path, tmp_path / "best", snapshots[0]):
        assert torch.equal(load_restorer(folder / "model", lora).args[2]["t5"], prompt["t5"])


def test_training_starts_from_a_lora_with_8_bit_weights(folder, tmp_path):
    main(make_settings(folder, tmp_path / "first", max_steps=1))
    lora = tmp_path / "first" / LORA_FILE
    more = {"resume_lora": lora, "base_precision": "fp8", "learning_rate": 0.0, "max_steps": 1}
    main(make_settings(folder, tmp_path / "second", **more))
    before, after = (checkpoint.read_weights(tmp_path / n / LORA_FILE) for n in ("first", "second"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    shutil.rmtree(tmp_path / "first")  # not read when resuming
    main(make_settings(folder, tmp_path / "second", **more))


def test_examples_only_writes_examples_and_does_not_train(folder, tmp_path):
    main(make_settings(folder, tmp_path, examples_only=True, pretrained_model_name_or_path=Path("absent")))
    assert read_image(tmp_path / "images" / "examples.png").shape == (64, 64, 3)
    assert not (tmp_path / "checkpoints").exists()


def test_demo_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {"max_steps": 2, "save_steps": 2, "batch_size": 2}
    monkeypatch.setattr(script, "PREVIEW_IMAGES", 2)
    main(Settings(demo=True, **script.DEMO | few))
    printed = capsys.readouterr().out
    assert "this run's LoRA: psnr" in printed and "the included LoRA: psnr" in printed
    assert "python infer.py kontext" in printed and "lora_path" in printed
    assert read_image("outputs/kontext_demo/images/demo.png").shape == (2 * 128, 4 * 128, 3)
    held_out = {path.name for path in Path("outputs/kontext_demo/held_out").iterdir()}
    assert len(held_out) == 6 and not held_out & {
        path.name for path in Path("outputs/kontext_demo/photos").iterdir()
    }


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"resolution": 100}, "resolution must be a multiple of 16, not 100"),
        ({"resolution": 512}, "2 of 2 images are smaller than 512 px"),
        (
            {"degradation_types": "noise,rain"},
            "unknown degradation rain: choose from downsample",
        ),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), not 1.0"),
        ({"preview_steps": 0}, "preview_steps must be at least 1"),
        ({"blocks_to_swap": 7}, r"blocks_to_swap must lie in 0 ... 6 \(all blocks\), not 7"),
        ({"blocks_to_swap": 2, "compile": True}, "blocks_to_swap does not work with --compile"),
        ({"blocks_to_swap": 2, "gradient_checkpointing": False}, "needs --gradient_checkpointing"),
        ({"rank": 500}, "rank must lie in 1 ... 128, not 500"),
        ({"hr_root": Path("absent")}, "no clean photographs at absent: give --hr_root"),
        ({"captions": True}, "no image in .*photos has a caption"),
    ],
)
def test_bad_values_raise(folder, tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(make_settings(folder, tmp_path, **values))


def test_bad_files_raise(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="flux1-kontext-dev.safetensors MISSING; ae.safetensors MISSING"
    ):
        main(make_settings(folder, tmp_path / "a", pretrained_model_name_or_path=tmp_path))
    with pytest.raises(FileNotFoundError, match="tokenizer_2/tokenizer.json MISSING"):
        main(make_settings(folder, tmp_path / "b", instance_prompt="not embedded"))
    shutil.copytree(folder / "model", tmp_path / "cut")
    file = tmp_path / "cut" / TRANSFORMER
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="flux1-kontext-dev.safetensors is damaged"):
        main(make_settings(folder, tmp_path / "c", pretrained_model_name_or_path=tmp_path / "cut"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        main(make_settings(folder, tmp_path / "d", hr_root=tmp_path / "empty"))
