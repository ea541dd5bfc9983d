"""The deblurring ControlNet: losses, and training with tutorial_train_deblur.py at tiny size."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import tool_export_control
import tutorial_train_deblur
import tutorial_train_inpaint
from cldm.callbacks import AtomicCheckpointIO
from cldm.deblur import (
    ChannelSpatialAttention,
    DeblurControlNet,
    add_attention,
    gradient_l1,
)
from cldm.model import add_hint_latent, create_model, open_control_model, read_config
from cldm.restore import Sampling, deblur_image
from cldm.training import choose_precision, prepare_model, rate_schedule
from ldm import checkpoint
from ldm.data.image import read_image, to_uint8, write_image
from ldm.metrics import psnr
from ldm.models.autoencoder import DiagonalGaussianDistribution
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config, log_txt_as_img
from tests.fill import fill, relative_error
from tests.test_device import MAPS, mapped
from tool_make_deblur_dataset import Settings as MakeSettings
from tool_make_deblur_dataset import make_dataset
from tutorial_train_deblur import Settings, find_crops, main

CONFIG = "models/cldm_tiny_deblur.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_test_files(tmp_path_factory.mktemp("deblur"))


@pytest.fixture
def settings(place, tmp_path) -> Settings:
    return small_settings(place, tmp_path)


@pytest.fixture(scope="module")
def first_step(place, tmp_path_factory) -> Path:
    """Train for one step and return the run's folder."""
    settings = replace(small_settings(place, tmp_path_factory.mktemp("first")), max_steps=1)
    main(settings)
    return Path(settings.output_dir)


@pytest.fixture
def stopped(settings, first_step) -> Settings:
    """Return the settings of a run that has done one of its two steps."""
    shutil.copytree(first_step, settings.output_dir)
    return settings


def make_test_files(folder: Path) -> Path:
    """Write a small data set and initial weights."""
    make_dataset(MakeSettings(output_dir=str(folder / "data"), num_samples=8, image_size=64, num_workers=1))
    checkpoint.write_weights(folder / "start.safetensors", fill(create_model(CONFIG)).state_dict())
    return folder


def small_settings(place: Path, folder: Path) -> Settings:
    """Return settings for two steps on the small data set, with every cheap feature on."""
    return Settings(
        data_root=str(place / "data"),
        image_size=64,
        val_fraction=0.2,
        val_samples=2,
        num_workers=0,
        resume_path=str(place / "start.safetensors"),
        config_path=CONFIG,
        perceptual_loss_weight=0.0,
        batch_size=2,
        accumulate_grad_batches=2,
        learning_rate=1e-4,
        max_steps=2,
        output_dir=str(folder / "run"),
        log_steps=1,
        save_steps=1,
        val_steps=2,
        val_ddim_steps=2,
        ema_decay=0.9,
    )


def last(settings: Settings) -> dict:
    return checkpoint.load(Path(settings.output_dir) / "checkpoints" / "last.ckpt")


def rows(settings: Settings) -> list[dict]:
    return list(csv.DictReader((Path(settings.output_dir) / "logs" / "metrics.csv").open()))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_resumed_run_equals_uninterrupted_run(settings, tmp_path):
    main(replace(settings, max_steps=4))
    whole, whole_rows = last(settings), rows(settings)
    stopped = replace(settings, output_dir=str(tmp_path / "stopped"))
    for steps in (1, 2, 3, 4):
        main(replace(stopped, max_steps=steps, num_workers=steps % 2))
    resumed = last(stopped)
    assert whole["global_step"] == resumed["global_step"] == 4
    for part in ("state_dict", "optimizer_states", "ema", "random", "callbacks"):
        assert same(whole[part], resumed[part]), part
    assert whole_rows == rows(stopped)
    assert [row["step"] for row in whole_rows] == ["1", "2", "2", "3", "4", "4"]
    assert all(name in whole_rows[0] for name in ("train/loss", "train/loss_simple"))
    assert all(float(whole_rows[0][f"train/deblur_{name}_loss"]) > 0 for name in ("l1", "mse", "gradient"))
    assert float(whole_rows[2]["val/psnr"]) > 0 and float(whole_rows[2]["val/loss"]) > 0
    images = sorted(path.name for path in (Path(settings.output_dir) / "images").iterdir())
    assert images == [f"{kind}_{step:07d}.png" for kind in ("train", "val") for step in (2, 4)]
    assert read_image(Path(settings.output_dir) / "images" / images[0]).std() > 10


def tile(grid: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cut one image out of a grid of 64-pixel squares."""
    y, x = 4 + 68 * row, 4 + 68 * column
    return grid[y : y + 64, x : x + 64].astype(int)


def test_validation_grid_shows_blurry_restored_sharp_and_prompt(settings):
    settings = replace(settings, val_fraction=0.4)
    main(settings)
    folder = Path(settings.output_dir)
    grid = read_image(folder / "images" / "val_0000002.png")
    assert grid.shape == (2 * 68 + 4, 4 * 68 + 4, 3)
    _, held_out, pairs = find_crops(settings)
    batch = default_collate([held_out[0], held_out[1]])
    average = DeblurControlNet.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    restored = average.restore(batch, settings.val_ddim_steps)
    prompt = to_uint8(log_txt_as_img((64, 64), [settings.prompt])[0])
    scores = []
    for row, pair in enumerate(pairs[-2:]):
        sharp = read_image(pair.sharp)
        assert (tile(grid, row, 0) == read_image(pair.blurry)).all()
        assert abs(tile(grid, row, 1) - to_uint8(restored[row])).max() <= 1
        assert (tile(grid, row, 2) == sharp).all()
        assert (tile(grid, row, 3) == prompt).all()
        scores.append(psnr(tile(grid, row, 1).astype(np.uint8), sharp))
    assert float(rows(settings)[2]["val/psnr"]) == pytest.approx(np.mean(scores), abs=1e-3)


def test_checkpoint_holds_only_trained_weights_and_loads(settings):
    main(settings)
    content = last(settings)
    model = create_model(CONFIG)
    assert content["state_dict"].keys() == {
        f"control_model.{n}" for n, _ in model.control_model.named_parameters()
    }
    path = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    opened = DeblurControlNet.load_from_checkpoint(path)
    start = checkpoint.read_weights(settings.resume_path)
    for name, value in opened.state_dict().items():
        trained = content["ema"]["average"].get(name)
        assert torch.equal(value, start[name] if trained is None else trained), name
    moved = [n for n, v in content["state_dict"].items() if not torch.equal(v, start[n])]
    assert len(moved) == len(content["state_dict"])
    latents = opened.sample(
        cond={"c_concat": [torch.rand(1, 3, 64, 128)], "c_crossattn": ["a photograph"]},
        batch_size=2,
        ddim_steps=2,
        unconditional_guidance_scale=3.0,
    )
    assert latents.shape == (2, 16, 8, 16)
    with pytest.raises(ValueError, match="holds a DeblurControlNet"):
        from cldm.deblur import DeblurControlNetWithAttention

        DeblurControlNetWithAttention.load_from_checkpoint(path)


def test_best_checkpoint_is_kept_when_scores_get_worse(settings, monkeypatch):
    settings = replace(settings, val_samples=1, val_steps=1)
    for steps, score in ((1, 12.0), (2, 11.0), (3, 11.5)):
        monkeypatch.setattr("cldm.cldm.psnr", lambda *pair, score=score: score)
        main(replace(settings, max_steps=steps))
    best = checkpoint.load(Path(settings.output_dir) / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 1 and last(settings)["global_step"] == 3


class Syncs(TorchDispatchMode):
    """Counter of reads of tensor values, each of which would synchronize with a CUDA device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_training_synchronizes_with_device_only_when_logging(settings, monkeypatch):
    settings = replace(settings, max_steps=6, log_steps=3, val_fraction=0.0, save_steps=6, val_steps=6)
    settings = replace(settings, max_grad_norm=1.0, lr_scheduler="linear", hint_as_latent=True)
    step, seen = DeblurControlNet.training_step, []
    with Syncs() as syncs:

        def counted(model, *arguments):
            seen.append((model.global_step, syncs.count))
            return step(model, *arguments)

        monkeypatch.setattr(DeblurControlNet, "training_step", counted)
        main(settings)
    between = {(a[0], b[0]): b[1] - a[1] for a, b in zip(seen, seen[1:], strict=False)}
    assert {pair for pair, count in between.items() if count} == {(2, 3)}  # two batches per step
    assert len(seen) == 12 and rows(settings)[0]["step"] == "3"


def test_checkpoints_are_written_in_the_background(tmp_path, monkeypatch):
    files, go, save = AtomicCheckpointIO(), threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, content: go.wait() and save(path, content))
    weight = torch.zeros(3)
    files.save_checkpoint({"weight": weight, "settings": {"a": (1, "b")}}, tmp_path / "last.ckpt")
    weight += 1  # the next step
    assert not (tmp_path / "last.ckpt").exists()
    go.set()
    files.wait()
    content = checkpoint.load(tmp_path / "last.ckpt")
    assert torch.equal(content["weight"], torch.zeros(3)) and content["settings"] == {"a": (1, "b")}


def test_failed_checkpoint_write_stops_the_run(stopped, monkeypatch):
    def full(path, content):
        raise OSError(f"cannot save {path}: the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="cannot save .*last.ckpt: the disk is full"):
        main(replace(stopped, val_steps=4))
    assert last(stopped)["global_step"] == 1


def test_non_finite_weights_are_not_saved(stopped, monkeypatch):
    step = DeblurControlNet.shared_step

    def broken(model, batch):
        loss, values = step(model, batch)
        weight = model.control_model.zero_convs[0][0].weight
        weight.register_hook(lambda gradient: gradient * float("nan"))
        return loss, values

    monkeypatch.setattr(DeblurControlNet, "shared_step", broken)
    with pytest.raises(ValueError, match="is not finite"):
        main(stopped)
    assert last(stopped)["global_step"] == 1


def test_plain_control_ldm_config_is_accepted(settings, tmp_path):
    """models/cldm_v21.yaml is such a configuration."""
    text = Path(CONFIG).read_text().replace("cldm.deblur.DeblurControlNet", "cldm.cldm.ControlLDM")
    lines = [line for line in text.splitlines() if "loss_weight" not in line]
    (tmp_path / "plain.yaml").write_text("\n".join(lines))
    main(replace(settings, config_path=str(tmp_path / "plain.yaml"), max_steps=1))
    path = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    assert isinstance(open_control_model(path), DeblurControlNet)


def test_sharp_images_without_pairs_are_blurred_on_the_fly(settings, place):
    sharp = str(place / "data" / "clear_images")
    on_the_fly = replace(settings, data_root=sharp, blur_on_the_fly=True, use_augmentation=True)
    main(on_the_fly)
    assert float(rows(on_the_fly)[-1]["val/psnr_blurry"]) < 60
    with pytest.raises(FileNotFoundError, match="no pairs"):
        main(replace(settings, data_root=sharp, output_dir=settings.output_dir + "x"))


def test_resuming_in_another_precision_raises(stopped):
    with pytest.raises(ValueError, match="precision was '32', is 'bf16'. To continue it: "):
        main(replace(stopped, precision="bf16"))


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says what is mapped")
def test_resumed_run_keeps_no_file_memory_mapped(stopped, monkeypatch):
    """Windows cannot replace a mapped file, and Linux does not free its disk space."""
    found = []
    step = LatentDiffusion.training_step

    def look(*arguments):
        found.extend(mapped(Path(stopped.output_dir)) + mapped(Path(stopped.resume_path)))
        return step(*arguments)

    monkeypatch.setattr(LatentDiffusion, "training_step", look)
    main(replace(stopped, val_fraction=0.2, val_steps=9))
    assert last(stopped)["global_step"] == 2 and found == []


def test_resuming_with_other_settings_raises(stopped):
    with pytest.raises(ValueError, match="learning_rate was 0.0001, is 0.001"):
        main(replace(stopped, learning_rate=1e-3))


def test_resuming_with_another_yaml_raises(stopped, monkeypatch):
    changed = read_config(CONFIG)
    changed["params"]["deblur_crop"] = 16
    monkeypatch.setattr(tutorial_train_deblur, "read_config", lambda path: changed)
    with pytest.raises(ValueError, match="another model: its yaml configuration has changed"):
        main(stopped)


def test_resuming_with_other_data_raises(stopped, tmp_path):
    data = shutil.copytree(stopped.data_root, tmp_path / "data")
    pairs = (data / "blur_types.json").read_text().splitlines()
    pairs = [line for line in pairs if json.loads(line)["source"] != json.loads(pairs[0])["source"]]
    (data / "blur_types.json").write_text("\n".join(pairs))
    with pytest.raises(ValueError, match=r"; samples was \d+, is \d+"):  # after the changed folder name
        main(replace(stopped, data_root=str(data)))


@pytest.mark.parametrize("script", [tutorial_train_deblur, tutorial_train_inpaint])
def test_option_aliases_are_accepted(script):
    def read(line: str):
        return tyro.cli(script.Settings, args=line.split(), use_underscores=True)

    same = "--output_dir x --seed 1 --batch_size 2 --accumulate_grad_batches 3"
    ours = read(f"--devices 2 --max_epochs 5 --precision bf16-mixed --max_steps 7 {same}")
    assert ours == read(f"--gpus 2 --num_epochs 5 --precision bf16-mixed --max_steps 7 {same}")
    assert (ours.devices, ours.max_epochs, ours.precision) == (2, 5, "bf16-mixed")
    for precision in ("16", "bf16", "32", "16-mixed", "32-true", "auto", "fp16", "no"):
        assert read(f"--precision {precision}").precision == precision
    theirs = read("--pretrained_model_name_or_path a/b --mixed_precision fp16 --resolution 768")
    assert (theirs.resume_path, theirs.precision, theirs.image_size) == ("a/b", "fp16", 768)


def test_missing_optimizer_package_raises_before_loading(settings, monkeypatch):
    monkeypatch.setattr("ldm.util.find_spec", lambda name: None)
    monkeypatch.setattr(tutorial_train_deblur, "load_state_dict", lambda path: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="adamw8bit needs a package: pip install bitsandbytes"):
        main(replace(settings, optimizer="adamw8bit"))


def test_unlocked_decoder_is_trained_and_saved(settings):
    main(replace(settings, max_steps=1, sd_locked=False, ema_decay=0.0))
    names = last(settings)["state_dict"]
    assert {name.split(".")[2] for name in names if name.startswith("model.")} == {"output_blocks", "out"}


def test_overfits_one_batch(place):
    model = create_model(CONFIG).train()
    model.load_state_dict(checkpoint.read_weights(place / "start.safetensors"))
    model.deblur_loss_weight, model.learning_rate = 0.0, 1e-3
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(30):
        loss, _ = model.shared_step(deblur_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_attention_is_identity_at_start_and_gets_trained(settings, place):
    x = torch.randn(2, 48, 8, 8)
    assert torch.equal(ChannelSpatialAttention(48)(x), x)
    config = read_config(CONFIG)
    config["target"] = "cldm.deblur.DeblurControlNetWithAttention"
    torch.manual_seed(0)
    model, plain = instantiate_from_config(config), create_model(CONFIG)
    start = checkpoint.read_weights(place / "start.safetensors")
    model.load_state_dict(add_attention(start))
    plain.load_state_dict(start)
    cond = {"c_crossattn": [torch.randn(1, 7, 32)], "c_concat": [torch.rand(1, 3, 64, 64)]}
    noisy, t = torch.randn(1, 16, 8, 8), torch.tensor([500])
    assert torch.equal(model.apply_model(noisy, t, cond), plain.apply_model(noisy, t, cond))

    main(replace(settings, use_attention=True))
    path = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    attention = open_control_model(path).control_model.hint_attention
    assert attention.gate.abs().max() > 0
    assert (attention.spatial.weight != 0).any()


def test_hint_latent_has_no_effect_at_start(place):
    start, config = checkpoint.read_weights(place / "start.safetensors"), read_config(CONFIG)
    plain, (wide, weights) = create_model(CONFIG), add_hint_latent(config, start)
    plain.load_state_dict(start)
    model = instantiate_from_config(wide)
    assert model.control_model.input_blocks[0][0].weight[:, 16:].abs().max() == 0
    model.load_state_dict(weights)
    cond = {"c_crossattn": [torch.randn(1, 7, 32)], "c_concat": [torch.rand(1, 3, 64, 64)]}
    noisy, t = torch.randn(1, 16, 8, 8), torch.tensor([500])
    assert relative_error(model.apply_model(noisy, t, cond), plain.apply_model(noisy, t, cond)) < 1e-5
    torch.nn.init.normal_(model.control_model.input_blocks[0][0].weight)
    given = {**cond, "c_latent": model.hint_latent(cond)}
    assert torch.equal(model.apply_model(noisy, t, given), model.apply_model(noisy, t, cond))
    given["c_latent"] = torch.zeros(1, 16, 8, 8)
    assert not torch.equal(model.apply_model(noisy, t, given), model.apply_model(noisy, t, cond))


@pytest.mark.slow
def test_hint_latent_is_trained_cached_saved_and_used(settings, tmp_path):
    settings = replace(settings, hint_as_latent=True, use_attention=True)
    main(replace(settings, max_steps=1, val_steps=1))
    main(replace(settings, val_steps=1))
    cached = replace(settings, cache_latents=True, val_steps=1, output_dir=str(tmp_path / "cached"))
    main(cached)
    for name in ("train/loss_simple", "val/loss", "val/psnr"):  # float16 latents against float32 ones
        pairs = [(a[name], b[name]) for a, b in zip(rows(settings), rows(cached), strict=True) if a[name]]
        assert pairs and all(float(a) == pytest.approx(float(b), rel=2e-2) for a, b in pairs)
    path = Path(cached.output_dir) / "checkpoints" / "last.ckpt"
    model = open_control_model(path)
    assert model.control_model.input_blocks[0][0].weight[:, 16:].abs().max() > 0
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    whole, tiles = (
        deblur_image(model, image, Sampling("", steps=2, tile=tile, overlap=0)) for tile in (0, 64)
    )
    assert whole.shape == tiles.shape == image.shape
    model.hint_latent = lambda cond: torch.zeros(1, 16, 8, 16)  # the hint latent has an effect
    model.encode_first_stage = lambda image: DiagonalGaussianDistribution(torch.zeros(1, 32, 8, 16))
    assert (deblur_image(model, image, Sampling("", steps=2)) != whole).any()
    # other runs and other tools reject it
    with pytest.raises(ValueError, match="hint_as_latent was True, is False"):
        main(replace(cached, hint_as_latent=False))
    export = tool_export_control.Settings(path, tmp_path / "control.safetensors")
    with pytest.raises(ValueError, match="hint attention|--use_attention"):
        tool_export_control.main(export)
    content = checkpoint.load(path, mmap=False)
    weights = {name: v for name, v in content["state_dict"].items() if "hint_attention" not in name}
    checkpoint.save(tmp_path / "plain.ckpt", {**content, "state_dict": weights, "ema": None})
    export.checkpoint_path = tmp_path / "plain.ckpt"
    with pytest.raises(ValueError, match="--hint_as_latent or --coarse_fill: its input has 16 channels"):
        tool_export_control.main(export)
    export.allow_extra = True
    tool_export_control.main(export)  # the export names no configuration: shapes decide
    opened = open_control_model(export.output_path, cached.resume_path, CONFIG)
    assert opened.sees_hint_latent


def test_learning_rate_and_gradient_clipping_follow_settings(settings):
    settings = replace(settings, max_grad_norm=1e-3, lr_scheduler="cosine")
    settings = replace(settings, val_fraction=0.0, ema_decay=0.0)
    for steps, factor in ((1, 1.0), (3, 0.5 * (1 + np.cos(np.pi * 2 / 3)))):
        main(replace(settings, max_steps=steps))
        optimizer = last(settings)["optimizer_states"][0]
        (group,) = optimizer["param_groups"]
        assert group["lr"] == pytest.approx(1e-4 * factor) and group["weight_decay"] == 0.01
        if steps == 1:
            moments = [state["exp_avg"].double() for state in optimizer["state"].values()]
            norm = torch.stack([moment.norm() for moment in moments]).norm() / (1 - group["betas"][0])
            assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("name", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_learning_rate_schedules(name, end):
    schedule = rate_schedule(name, 100)
    rates = [schedule(step) for step in range(102)]
    warmup = [1.0] * 4 if name == "constant" else [0.25, 0.5, 0.75, 1.0]
    assert rates[:5] == [*warmup, 1.0]
    assert rates[-1] == rates[-2] == pytest.approx(end)
    assert rates[52] == pytest.approx((1 + end) / 2)


def test_optimizer_is_not_fused_if_half_precision_gradients_are_clipped():
    """A fused optimizer unscales float16 gradients itself, after clipping; Lightning refuses to clip with it,
    also in bf16."""
    model = create_model(CONFIG)
    for precision, clips, fused in (
        ("16", True, None),  # False would select torch's slow for-loop implementation
        ("16", False, True),
        ("bf16", True, None),
        ("32", True, True),
    ):
        prepare_model(model, precision, clips, 1, gradient_checkpointing=False)
        optimizer = model.configure_optimizers()
        assert optimizer.defaults["fused"] is fused
        assert bool(fused) == bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def captioned(folder: Path, data: str) -> Path:
    """Copy the data and add a caption to the first line of its list."""
    data = Path(shutil.copytree(data, folder / "captioned"))
    lines = [json.loads(line) for line in (data / "blur_types.json").read_text().splitlines()]
    lines[0]["text"] = "a cat after {blur_type}"
    (data / "blur_types.json").write_text("\n".join(map(json.dumps, lines)))
    return data


def test_captions_of_pairs_replace_the_prompt(settings, tmp_path, monkeypatch):
    data = captioned(tmp_path, settings.data_root)
    pairs = [json.loads(line) for line in (data / "blur_types.json").read_text().splitlines()]
    (data / pairs[1]["clear_image"]).with_suffix(".txt").write_text("two\nlines \u00e9", encoding="utf-8")
    settings = replace(settings, data_root=str(data), val_fraction=0.0)
    monkeypatch.setattr(tutorial_train_deblur, "PROMPT_DROPOUT", 0.0)
    train, _, _ = find_crops(settings)
    texts = [train[n]["txt"] for n in range(8)]
    kind = pairs[0]["blur_type"].replace("_", " ")
    assert texts == [f"a cat after {kind}", "two lines \u00e9", *[settings.prompt] * 6]
    monkeypatch.setattr(tutorial_train_deblur, "PROMPT_DROPOUT", 1.0)
    dropped, _, _ = find_crops(settings)
    assert {dropped[n]["txt"] for n in range(8)} == {""}
    main(replace(settings, cache_latents=True, max_steps=1))
    (data / pairs[2]["blur_image"]).with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"blur_\d+.txt is not text in UTF-8"):
        find_crops(settings)


def test_non_string_caption_raises(settings, tmp_path):
    data = captioned(tmp_path, settings.data_root)
    text = (data / "blur_types.json").read_text().replace('"a cat after {blur_type}"', "7")
    (data / "blur_types.json").write_text(text)
    with pytest.raises(ValueError, match="blur_types.json:1: .* must be a text"):
        find_crops(replace(settings, data_root=str(data)))


def test_pixel_losses_match_their_formulas():
    model = create_model(CONFIG)
    sharp = torch.rand(2, 3, 16, 16) * 2 - 1
    restored = sharp + torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)
    total, terms = model.deblur_losses(restored, sharp, torch.tensor([1.0, 0.5]))
    assert terms["deblur_l1_loss"].item() == pytest.approx((0.1 + 0.5 * 0.2) / 2, rel=1e-4)
    assert terms["deblur_mse_loss"].item() == pytest.approx((0.01 + 0.5 * 0.04) / 2, rel=1e-4)
    assert terms["deblur_gradient_loss"].item() == pytest.approx(0, abs=1e-6)
    assert total.item() == pytest.approx(0.1 + 0.015, rel=1e-4)
    ramp = torch.arange(16.0).expand(1, 3, 16, 16) * 0.5 + torch.arange(16.0)[:, None] * 0.25
    assert gradient_l1(ramp).item() == pytest.approx(0.75)


def deblur_batch(size: int = 64) -> dict:
    torch.manual_seed(1)
    image = torch.rand(2, size, size, 3) * 2 - 1
    return {"jpg": image, "hint": (image + 1) / 2, "txt": ["a", ""], "seed": torch.tensor([5, 6])}


def test_total_loss_is_weighted_sum_and_reaches_control_model(place):
    model = create_model(CONFIG).train()
    model.load_state_dict(checkpoint.read_weights(place / "start.safetensors"))
    model.perceptual_loss_weight, model.deblur_loss_weight = 0.5, 2.0
    model.perceptual = lambda a, b: (a - b).square().mean(dim=(1, 2, 3)) * 3
    loss, values = model.shared_step(deblur_batch())
    parts = [values[f"deblur_{name}_loss"] for name in ("l1", "mse", "perceptual", "gradient")]
    expected = values["loss_simple"] + 2.0 * sum(
        weight * part for weight, part in zip((1, 1, 0.5, 0.1), parts, strict=True)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    values["total_deblur_loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("control_model."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("weighted", [True, False])
def test_pixel_losses_are_weighted_by_alpha_bar_if_configured(weighted, monkeypatch):
    config, seen = read_config(CONFIG), []
    config["params"]["weight_by_alpha_bar"] = weighted
    model = instantiate_from_config(config).train()

    def deblur_losses(restored, sharp, weights):
        seen.append(weights)
        return torch.zeros(()), {}

    monkeypatch.setattr(model, "deblur_losses", deblur_losses)
    model.shared_step(deblur_batch() | {"timestep": torch.tensor([0, 999])})
    wanted = model.alphas_cumprod[[0, 999]] if weighted else torch.ones(2)
    assert torch.equal(seen[0], wanted)


def test_pixel_losses_on_every_second_step_are_doubled(place, settings, monkeypatch):
    model = create_model(CONFIG).train()
    model.load_state_dict(checkpoint.read_weights(place / "start.safetensors"))
    model.perceptual_loss_weight, model.deblur_every = 0.0, 2
    seen = []
    for step in (0, 1):
        monkeypatch.setattr(DeblurControlNet, "global_step", step)
        loss, values = model.shared_step(deblur_batch())
        pixels = values.get("total_deblur_loss", torch.ones(())).item()
        seen.append((loss - values["loss_simple"]).item() / pixels)
    assert seen == [0.0, pytest.approx(2.0, rel=1e-4)]
    monkeypatch.undo()
    main(replace(settings, deblur_every=2))
    logged = [row["train/total_deblur_loss"] for row in rows(settings) if row["train/loss"]]
    assert logged[0] == "" and float(logged[1]) > 0


@pytest.mark.parametrize(
    ("given", "cuda", "bf16", "expected"),
    [
        ("auto", False, False, "32"),
        ("auto", True, False, "16"),
        ("auto", True, True, "bf16"),
        ("fp16", True, True, "16"),
        ("no", True, True, "32"),
        ("16-mixed", False, False, "16"),
    ],
)
def test_auto_precision_follows_the_device(tmp_path, monkeypatch, given, cuda, bf16, expected):
    monkeypatch.setattr("cldm.training.choose_device", lambda: torch.device("cuda" if cuda else "cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert choose_precision(given, tmp_path / "last.ckpt") == expected


@pytest.mark.slow
def test_auto_precision_keeps_that_of_the_resumed_run(settings):
    settings = replace(settings, precision="bf16", val_fraction=0.0, gradient_checkpointing=True)
    main(replace(settings, max_steps=1))
    path = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    assert choose_precision("auto", path) == "bf16"
    main(replace(settings, precision="auto"))
    content = last(settings)
    assert content["global_step"] == 2 and content["settings"]["precision"] == "bf16"
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_losses_of_zero_weight_are_not_computed(place, monkeypatch):
    model = create_model(CONFIG).train()
    model.deblur_loss_weight = 0.0
    monkeypatch.setattr(model, "decode_first_stage", lambda latent: pytest.fail("decoded for nothing"))
    _, values = model.shared_step(deblur_batch())
    assert values.keys() == {"loss", "loss_simple"}
    monkeypatch.undo()
    model.deblur_loss_weight, model.perceptual_loss_weight = 1.0, 0.0
    monkeypatch.setattr(model, "perceptual", lambda a, b: pytest.fail("computed for nothing"))
    model.shared_step(deblur_batch())


def test_loss_crop_is_aligned_and_depends_on_seed(place):
    model = create_model(CONFIG).train()
    model.deblur_crop = 3
    latents = torch.arange(64.0).reshape(1, 1, 8, 8).expand(2, 1, 8, 8)
    pixels = latents.repeat_interleave(8, 2).repeat_interleave(8, 3)
    windows = [model._aligned_crop(deblur_batch(), latents, pixels) for _ in range(2)]
    for x0, sharp in windows:
        assert x0.shape == (2, 1, 3, 3)
        assert torch.equal(x0.repeat_interleave(8, 2).repeat_interleave(8, 3), sharp)
    assert torch.equal(windows[0][0], windows[1][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume_path": "models/nothing.ckpt"}, r"tool_add_control.py .*models/nothing.ckpt.*demonstration"),
        ({"data_root": "training/nothing"}, "tool_make_deblur_dataset.py"),
        ({"precision": "8"}, "precision must be one of 32, 16, bf16"),
        ({"precision": "fp16"}, "precision 16 needs a CUDA device"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"val_samples": 0}, "val_samples must be at least 1"),
        ({"val_ddim_steps": 5000}, r"val_ddim_steps must be in \[1, 1000\]"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"deblur_every": 0}, "deblur_every must be at least 1"),
        ({"max_steps": 0, "max_epochs": 0}, "max_epochs must be at least 1"),
        ({"image_size": 100}, "image_size must be a multiple of 64, not 100"),
        ({"config_path": "models/nothing.yaml"}, "models/nothing.yaml"),
        ({"config_path": "models/cldm_v15.yaml"}, "does not fit this model"),
        ({"cache_latents": True, "use_augmentation": True}, "--cache_latents needs crops that stay"),
    ],
)
def test_bad_settings_raise_before_training(settings, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(replace(settings, **change))
    assert not (Path(settings.output_dir) / "logs").exists()


def test_non_finite_loss_stops_the_run_and_names_the_images(stopped, monkeypatch):
    before = (Path(stopped.output_dir) / "checkpoints" / "last.ckpt").read_bytes()
    step = DeblurControlNet.shared_step

    def broken(model, batch):
        loss, values = step(model, batch)
        return loss * float("nan"), values

    monkeypatch.setattr(DeblurControlNet, "shared_step", broken)
    with pytest.raises(
        ValueError, match=r"loss = nan at step 1; its batch: .*blur_\d+\.png, .*last good checkpoint"
    ):
        main(stopped)
    assert (Path(stopped.output_dir) / "checkpoints" / "last.ckpt").read_bytes() == before


def test_cached_latents_give_same_losses_and_are_rebuilt_when_stale(settings, tmp_path):
    settings = replace(settings, prompt="remove {blur_type}")
    main(settings)
    cached = replace(settings, cache_latents=True, output_dir=str(tmp_path / "cached"))
    main(cached)
    fresh_rows, cached_rows = rows(settings), rows(cached)
    for name in ("train/loss_simple", "val/loss"):  # float16 moments against float32 ones
        pairs = [(a[name], b[name]) for a, b in zip(fresh_rows, cached_rows, strict=True) if a[name]]
        assert pairs and all(float(a) == pytest.approx(float(b), rel=2e-2) for a, b in pairs)
    cache = Path(cached.output_dir) / "cache" / "train_latents.h5"
    stamp = cache.stat().st_mtime_ns
    main(replace(cached, max_steps=3))
    assert cache.stat().st_mtime_ns == stamp
    main(replace(cached, max_steps=1, image_size=128, output_dir=cached.output_dir + "x"))
    picture = sorted(Path(settings.data_root, "clear_images").iterdir())[0]
    write_image(picture, read_image(picture))  # same pixels, new modification time
    main(replace(cached, max_steps=4))
    assert cache.stat().st_mtime_ns != stamp


@pytest.mark.parametrize("part", ["loops", "random", "weight", "shape"])
def test_incomplete_checkpoint_does_not_resume(stopped, part):
    path = Path(stopped.output_dir) / "checkpoints" / "last.ckpt"
    content = checkpoint.load(path, mmap=False)
    weights, name = content["state_dict"], "control_model.zero_convs.0.0.weight"
    if part == "weight":
        del weights[name]
    elif part == "shape":
        weights[name] = weights[name][:1]
    else:
        del content[part]
    checkpoint.save(path, content)
    with pytest.raises(ValueError, match=f"last.ckpt .*{name if part in ('weight', 'shape') else part}"):
        main(stopped)


def command(settings: Settings, *more: str) -> list[str]:
    flags = []
    for name, value in vars(settings).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif value != "":
            flags += [f"--{name}", str(value)]
    return [sys.executable, "tutorial_train_deblur.py", *flags, *more]


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    one = replace(
        settings, batch_size=4, accumulate_grad_batches=1, max_steps=3, save_steps=3, val_fraction=0.0
    )
    one = replace(one, ema_decay=0.0)
    main(one)
    two = replace(one, batch_size=2, devices=2, output_dir=str(tmp_path / "two"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command(two), capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(re.findall("finished at step 3", run.stdout)) == 1
    start, ones, twos = (
        checkpoint.read_weights(one.resume_path),
        last(one)["state_dict"],
        last(two)["state_dict"],
    )
    for (
        name,
        value,
    ) in ones.items():  # Adam amplifies rounding errors of near-zero gradients
        assert (value - twos[name]).norm() < 0.02 * (value - start[name]).norm(), name
    assert [row["step"] for row in rows(two)] == ["1", "2", "3"]


@pytest.mark.slow
def test_demo_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = replace(tutorial_train_deblur.DEMO_DATA, num_samples=12)
    monkeypatch.setattr(tutorial_train_deblur, "DEMO_DATA", data)
    few = tutorial_train_deblur.DEMO | {
        "batch_size": 2,
        "val_samples": 2,
        "val_steps": 1,
        "val_ddim_steps": 1,
    }
    main(Settings(demo=True, **few | {"max_steps": 1, "val_steps": 9}))  # ends before validation
    assert not Path("outputs/deblur_demo/checkpoints/best.ckpt").exists()
    start = Path("outputs/deblur_demo/control_small_ini.safetensors")
    stamp = start.stat().st_mtime_ns
    main(Settings(demo=True, **few | {"max_steps": 2}))
    printed = capsys.readouterr().out
    assert "adds a ControlNet" in printed and "resuming" in printed and "finished at step 2" in printed
    assert printed.count("this run: PSNR") == printed.count("included weights: PSNR") == 2
    assert start.stat().st_mtime_ns == stamp
    assert read_image("outputs/deblur_demo/images/demo.png").shape[1] >= 4 * 128
