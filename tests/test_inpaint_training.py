"""Training with tutorial_train_inpaint.py at tiny size, and tool_make_mask.py."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import tool_make_mask
import tutorial_train_inpaint
from cldm.inpaint import InpaintControlNet, Inpainting, inpaint_image
from cldm.model import create_model, open_control_model
from ldm import checkpoint
from ldm.data.image import read_image, to_uint8, write_image
from ldm.holes import fill_classically
from ldm.util import log_txt_as_img
from tests.fill import fill
from tests.test_deblur import same, tile
from tutorial_train_inpaint import Settings, cut_photographs, find_images, main, run_folder

CONFIG = "models/cldm_tiny_inpaint.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Write a few images with captions, and initial weights."""
    folder = tmp_path_factory.mktemp("inpaint")
    cut_photographs(folder / "photos", 6, 64)
    checkpoint.write_weights(folder / "start.safetensors", fill(create_model(CONFIG)).state_dict())
    images = [{"id": n, "file_name": f"{n:03d}.png", "height": 64, "width": 64} for n in range(6)]
    boxes = [{"image_id": n, "segmentation": [[9, 9, 40, 9, 40, 40, 9, 40]]} for n in range(6)]
    captions = [{"image_id": n, "caption": f"picture {n}"} for n in range(6)]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


@pytest.fixture
def settings(place, tmp_path) -> Settings:
    return small_settings(place, tmp_path)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Settings:
    """Train once; return the settings of the run, which tests must not modify."""
    settings = small_settings(place, tmp_path_factory.mktemp("finished"))
    main(settings)
    return settings


def small_settings(place: Path, folder: Path) -> Settings:
    """Return settings for two steps on the small data set, with every cheap feature on."""
    return Settings(
        image_dir=str(place / "photos"),
        image_size=64,
        val_samples=2,
        num_workers=0,
        resume_path=str(place / "start.safetensors"),
        config_path=CONFIG,
        batch_size=2,
        accumulate_grad_batches=2,
        learning_rate=1e-4,
        precision="32",
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


def test_resumed_run_equals_uninterrupted_run(settings, place, tmp_path):
    settings = replace(
        settings, ann_file=str(place / "instances.json"), captions_file=str(place / "captions.json")
    )
    main(replace(settings, max_steps=3))
    stopped = replace(settings, output_dir=str(tmp_path / "stopped"))
    main(replace(stopped, max_steps=1))
    main(replace(stopped, max_steps=3))
    whole, resumed = last(settings), last(stopped)
    assert whole["global_step"] == resumed["global_step"] == 3
    for part in ("state_dict", "optimizer_states", "ema", "random"):
        assert same(whole[part], resumed[part]), part
    assert rows(settings) == rows(stopped)
    names = ["psnr", "ssim", "loss", "psnr_hole", "gradients_hole", "gradients_hole_telea"]
    values = [float(rows(settings)[2][f"val/{name}"]) for name in names]
    assert all(np.isfinite(values)) and min(values) > 0
    folder = Path(settings.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "final_model", "images", "logs"}
    assert read_image(folder / "images" / "val_0000002.png").shape == (2 * 68 + 4, 6 * 68 + 4, 3)
    assert any("tfevents" in path.name for path in (folder / "logs").iterdir())


def test_validation_grid_has_documented_columns(finished):
    settings = finished
    folder = Path(settings.output_dir)
    grid = read_image(folder / "images" / "val_0000002.png")
    _, held_out = find_images(settings)
    batch = default_collate([held_out[0], held_out[1]])
    result = open_control_model(folder / "final_model" / "model.ckpt").restore(batch, settings.val_ddim_steps)
    prompt = to_uint8(log_txt_as_img((64, 64), [settings.prompt])[0])
    for row in range(2):
        truth = read_image(batch["path"][row])
        hole = batch["mask"][row].numpy() > 0.5  # (64, 64, 1)
        masked, mask, made, composite, shown_truth, text = (tile(grid, row, n) for n in range(6))
        assert (masked == np.where(hole, 0, truth)).all()
        assert (mask == 255 * hole).all() and 0 < hole.mean() < 1
        assert abs(made - to_uint8(result[row])).max() <= 1
        assert (composite == np.where(hole, made, truth)).all()
        assert (shown_truth == truth).all() and (text == prompt).all()


def test_exported_weights_load_and_initialize_another_run(finished, tmp_path, capsys):
    settings = finished
    folder, average = Path(settings.output_dir), last(settings)["ema"]["average"]
    final = open_control_model(folder / "final_model" / "model.ckpt")
    assert isinstance(final, InpaintControlNet)
    assert all(torch.equal(final.state_dict()[name], value) for name, value in average.items())
    control = checkpoint.read_weights(folder / "final_model" / "controlnet.safetensors")
    assert control.keys() == {name for name in final.state_dict() if name.startswith("control_model.")}
    assert all(torch.equal(control[name], value) for name, value in average.items())
    assert "optimizer_states" not in checkpoint.load(folder / "final_model" / "model.ckpt")
    # another run's ControlNet as the start, with the mask as fourth channel
    more = replace(settings, output_dir=str(tmp_path / "run"), hint_channels=4, max_steps=1)
    start = shutil.copy(folder / "final_model" / "controlnet.safetensors", tmp_path / "start.safetensors")
    main(replace(more, init_control=str(start)))
    wide = last(more)["state_dict"]["control_model.input_hint_block.0.weight"]
    assert wide.shape[1] == 4 and wide[:, 3].abs().max() > 0
    assert (wide[:, :3] - control["control_model.input_hint_block.0.weight"]).abs().max() < 1e-3
    assert not Path(
        more.output_dir, "final_model", "controlnet.safetensors"
    ).exists()  # other tools cannot read 4
    assert (
        "no controlnet.safetensors for other tools is written: the run was trained with --hint_channels 4"
        in (capsys.readouterr().out)
    )
    name = "control_model.zero_convs.0.0.bias"
    torn = {key: value for key, value in control.items() if key != name}
    for wrong in (torn, {**control, name: torch.zeros(3)}):
        checkpoint.write_weights(tmp_path / "torn.safetensors", wrong)
        torn_start = replace(
            more, init_control=str(tmp_path / "torn.safetensors"), output_dir=str(tmp_path / "b")
        )
        with pytest.raises(
            ValueError, match="torn.safetensors does not fit this model: .*zero_convs.0.0.bias"
        ):
            main(torn_start)
    start.unlink()  # not read when resuming
    main(replace(more, init_control=str(start), max_steps=2))
    assert last(more)["global_step"] == 2


def test_overfits_one_batch(place):
    model = create_model(CONFIG).train()
    model.load_state_dict(checkpoint.read_weights(place / "start.safetensors"))
    model.learning_rate = 1e-3
    torch.manual_seed(1)
    batch = {"jpg": torch.rand(2, 64, 64, 3) * 2 - 1, "txt": ["a", ""], "seed": torch.tensor([5, 6])}
    batch["hint"] = (batch["jpg"] + 1) / 2
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(30):
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_caption_files_replace_the_prompt(settings, place, tmp_path):
    photos = shutil.copytree(place / "photos", tmp_path / "photos")
    (photos / "002.txt").write_text("a boat", encoding="utf-8-sig")
    settings = replace(
        settings, image_dir=str(photos), val_samples=0, prompt="a photograph", prompt_dropout=0.0
    )
    train, _ = find_images(settings)
    assert [train[n]["txt"] == "a boat" for n in range(6)] == [n == 2 for n in range(6)]
    assert train[0]["txt"] == "a photograph"
    (photos / "003.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"003.txt is not text in UTF-8"):
        find_images(settings)


def test_show_data_writes_samples_and_does_not_train(settings, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = {"ann_file": str(place / "instances.json"), "captions_file": str(place / "captions.json")}
    main(replace(settings, show_data=True, val_samples=99, **more))
    assert read_image(tmp_path / "data_sample.png").shape == (6 * 64, 200, 3)
    printed = capsys.readouterr().out
    assert printed.count("hole ") == 6 and "6 photographs; samples are in data_sample.png" in printed
    assert not Path(settings.output_dir).exists()


@pytest.mark.parametrize("value", [0, 1])
def test_mask_without_hole_raises_before_training(settings, tmp_path, value):
    (tmp_path / "masks").mkdir()
    for n in range(3):
        write_image(tmp_path / "masks" / f"{n}.png", np.full((8, 8), 255 if n < 2 else value, np.uint8))
    with pytest.raises(ValueError, match=f"2.png.* brightest value .*is {value} of 255"):
        main(replace(settings, mask_dir=str(tmp_path / "masks")))
    assert not Path(settings.output_dir).exists()


def test_masks_beside_photos_are_not_training_images(settings, place, tmp_path):
    photos = shutil.copytree(place / "photos", tmp_path / "photos")
    write_image(photos / "001_mask001.png", np.full((64, 64), 255, np.uint8))
    settings = replace(settings, image_dir=str(photos), val_samples=0)
    for mask_dir in ("", str(photos)):
        train, _ = find_images(replace(settings, mask_dir=mask_dir))
        assert len(train) == 6 and len(train.masks) == bool(mask_dir)


@pytest.mark.parametrize("captions", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cached_latents_give_same_losses(settings, place, captions):
    settings = replace(settings, use_augmentation=False, max_steps=1, val_steps=1)
    settings = replace(settings, captions_file=str(place / "captions.json") if captions else "")
    main(settings)
    cached = replace(settings, cache_latents=True, output_dir=settings.output_dir + "c")
    main(cached)
    for name in ("train/loss", "val/loss"):
        values = [[float(row[name]) for row in rows(s) if row[name]] for s in (settings, cached)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=2e-2)
    with pytest.raises(ValueError, match="--no_use_augmentation"):
        main(replace(cached, use_augmentation=True, output_dir=settings.output_dir + "d"))


@pytest.mark.slow
def test_coarse_fill_is_trained_cached_saved_and_used(settings, tmp_path):
    """The ControlNet's hint is the image filled by Telea's method, with the mask, and their latent."""
    settings = replace(settings, coarse_fill="telea", use_augmentation=False, val_steps=1)
    train, _ = find_images(settings)
    item = train[0]
    hole = item["mask"][..., 0].numpy() > 0
    filled = fill_classically(to_uint8(item["jpg"].permute(2, 0, 1)), hole, "telea")
    assert np.array_equal(to_uint8(item["hint"].permute(2, 0, 1)[:3] * 2 - 1), filled)
    assert np.array_equal(item["hint"][..., 3], hole)

    main(replace(settings, max_steps=1))
    main(settings)  # resumed
    cached = replace(settings, cache_latents=True, output_dir=str(tmp_path / "cached"))
    main(cached)
    with h5py.File(tmp_path / "cached" / "cache" / "train_latents.h5") as file:
        assert set(file) == {"moments"}  # hints are not cached, since holes change in training
    losses = [
        [float(row["val/loss"]) for row in rows(each) if row["val/loss"]] for each in (settings, cached)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    weights = last(settings)["state_dict"]
    assert weights["control_model.input_blocks.0.0.weight"].shape[1] == 32  # 2 x 16 latent channels
    folder = Path(settings.output_dir)
    assert not (folder / "final_model" / "controlnet.safetensors").exists()

    # the checkpoint and the exported file have the same weights
    model = open_control_model(folder / "final_model" / "model.ckpt")
    whole = {**checkpoint.read_weights(settings.resume_path), **model.state_dict()}
    shared = tmp_path / "shared.safetensors"
    checkpoint.write_half(shared, whole, checkpoint.load(folder / "checkpoints" / "last.ckpt")["settings"])
    opened = open_control_model(shared, config_path=CONFIG)
    assert model.coarse_fill == opened.coarse_fill == "telea"
    image, options = to_uint8(item["jpg"].permute(2, 0, 1)), Inpainting(steps=2, mask_blur=0)
    restored = [inpaint_image(each, image, hole, options) for each in (model, opened)]
    assert np.abs(restored[0].astype(int) - restored[1]).max() <= 3  # half precision
    other = np.where(hole[..., None], 255 - image, image)
    assert np.array_equal(inpaint_image(model, other, hole, options), restored[0])
    inpaint_image(model, image, np.ones((64, 64)), replace(options, strength=0.5))  # the whole image as hole

    checkpoint.write_half(tmp_path / "wrong.safetensors", whole, {"coarse_fill": "magic"})
    with pytest.raises(ValueError, match="wrong.safetensors: coarse_fill must be one of"):
        open_control_model(tmp_path / "wrong.safetensors", config_path=CONFIG)

    # a run initialized with its ControlNet
    again = replace(settings, output_dir=str(tmp_path / "again"), init_control=str(shared), max_steps=1)
    main(again)
    ours, theirs = last(again)["state_dict"], checkpoint.read_weights(shared)
    name = "control_model.input_blocks.0.0.weight"
    assert (ours[name] - theirs[name]).abs().max() < 1e-3


def test_plain_control_ldm_config_trains_and_validates(settings, tmp_path):
    """models/cldm_v21_768v.yaml is such a configuration, with v-prediction."""
    text = Path(CONFIG).read_text().replace("cldm.inpaint.InpaintControlNet", "cldm.cldm.ControlLDM")
    assert "parameterization: v" in text
    (tmp_path / "plain.yaml").write_text(text)
    main(replace(settings, config_path=str(tmp_path / "plain.yaml"), max_steps=1, val_steps=1))
    folder = Path(settings.output_dir)
    assert isinstance(open_control_model(folder / "checkpoints" / "best.ckpt"), InpaintControlNet)
    assert float(rows(settings)[-1]["val/psnr"]) > 0
    assert (folder / "images" / "val_0000001.png").is_file()


def test_default_output_folder_is_new_and_shared_by_ranks(settings, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(tutorial_train_inpaint.RUN_VARIABLE, "of an earlier run")
    settings = replace(settings, output_dir="")
    folder = run_folder(settings)
    assert re.fullmatch(r"outputs/controlnet_inpainting_\d{8}_\d{6}", folder)
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process started by rank 0
    assert run_folder(settings) == folder
    monkeypatch.delenv(tutorial_train_inpaint.RUN_VARIABLE)
    with pytest.raises(ValueError, match="give --output_dir"):
        run_folder(settings)
    assert run_folder(replace(settings, output_dir="x")) == "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume_path": "models/nothing.ckpt"}, r"tool_add_control.py .*models/nothing.ckpt.*demonstration"),
        ({"image_dir": "training/nothing"}, "no photographs at training/nothing"),
        ({"precision": "8"}, "precision must be one of 32, 16, bf16"),
        ({"image_size": 100}, "multiple of 64, not 100"),
        ({"mask_ratio": (0.4, 0.2)}, "mask ratio"),
        ({"val_samples": 6}, "val_samples must be below the 6 images, not 6"),
        ({"hint_channels": 5}, r"hint_channels must be in \[3, 4\], not 5"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"ann_file": "none.json"}, "none.json"),
        ({"config_path": "models/cldm_v15.yaml"}, "does not fit this model"),
        ({"init_control": "none.safetensors"}, "none.safetensors"),
    ],
)
def test_bad_settings_raise_before_training(settings, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(replace(settings, **change))
    assert not Path(settings.output_dir).exists()


def test_tool_make_mask_writes_masks(tmp_path):
    write_image(tmp_path / "in.png", np.zeros((60, 80, 3), np.uint8))
    make = tool_make_mask.Settings(tmp_path / "mask.png", image=tmp_path / "in.png", kind="irregular")
    tool_make_mask.main(make)
    mask = read_image(tmp_path / "mask.png")[..., 0]
    assert mask.shape == (60, 80) and set(np.unique(mask)) == {0, 255} and 0.1 <= (mask > 0).mean() <= 0.3
    tool_make_mask.main(replace(make, image=None, size=(40, 30), box=(10, 5, 20, 30)))
    mask = read_image(tmp_path / "mask.png")[..., 0]
    assert mask.shape == (30, 40) and (mask[5:30, 10:20] == 255).all() and (mask > 0).sum() == 250
    tool_make_mask.main(replace(make, output_path=tmp_path / "masks", image=tmp_path))
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["in_mask.png", "mask_mask.png"]
    tool_make_mask.main(replace(make, output_path=tmp_path, image=tmp_path))  # beside the images
    tool_make_mask.main(replace(make, output_path=tmp_path, image=tmp_path))
    assert {path.name for path in tmp_path.glob("in*")} == {"in.png", "in_mask.png"}
    assert not read_image(tmp_path / "in.png").any()
    with pytest.raises(ValueError, match="would overwrite its image: .*in.png"):
        tool_make_mask.main(replace(make, output_path=tmp_path / "in.png"))
    for change in ({"image": None}, {"size": (5, 5)}, {"box": (0, 0, 81, 10)}, {"box": (5, 5, 5, 9)}):
        with pytest.raises(ValueError, match="not both|not inside an image"):
            tool_make_mask.main(replace(make, **change))
