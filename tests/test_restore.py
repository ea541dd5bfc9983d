"""Restoring photographs with a ControlNet at tiny size, published ControlNets, and the export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import infer
from cldm.cldm import ControlNet
from cldm.model import (
    CONFIGS,
    SD1,
    check_weights,
    create_model,
    family,
    open_control_model,
    read_config,
)
from cldm.restore import Sampling, Tiles, coarse, deblur_image, fix_color
from harness.settings import read_settings
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from ldm.data.photo import read_note
from ldm.metrics import psnr
from ldm.util import instantiate_from_config
from tests.fill import fill
from tool_export_control import Settings as ExportSettings
from tool_export_control import main as export

CONFIG = "models/cldm_tiny_deblur.yaml"


@pytest.fixture(scope="module")
def model():
    return fill(create_model(CONFIG)).eval()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> Path:
    """Save one model as a full file, as separate base and ControlNet, and as a training checkpoint."""
    folder = tmp_path_factory.mktemp("weights")
    weights = model.state_dict()
    control = {k: v for k, v in weights.items() if k.startswith("control_model.")}
    base = {k: v for k, v in weights.items() if not k.startswith("control_model.")}
    checkpoint.write_weights(folder / "full.ckpt", weights)
    checkpoint.write_weights(folder / "base.safetensors", base)
    checkpoint.write_weights(folder / "control.safetensors", control)
    bare = {k.removeprefix("control_model."): v for k, v in control.items()}
    checkpoint.write_weights(folder / "bare.pth", bare)
    ours = {
        "state_dict": {k: torch.zeros_like(v) for k, v in control.items()},
        "ema": {"average": control},
        "config": read_config(CONFIG),
        "base": str(folder / "base.safetensors"),
    }
    checkpoint.save(folder / "ours.ckpt", ours)
    return folder


SAMPLING = Sampling("a photograph", steps=2)


def photograph(height: int, width: int) -> np.ndarray:
    return read_image(photographs()[0])[100 : 100 + height, 60 : 60 + width]


@pytest.mark.parametrize("size", [(70, 133), (33, 20)])
def test_any_size_is_kept_and_result_depends_on_seed(model, size):
    image = photograph(*size)
    first, again = deblur_image(model, image, SAMPLING), deblur_image(model, image, SAMPLING)
    other = deblur_image(model, image, replace(SAMPLING, seed=1))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_each_option_changes_the_result(model):
    image = photograph(64, 64)
    plain = deblur_image(model, image, SAMPLING)
    changes = (
        {"guidance_scale": 3.0},
        {"control_scale": 0.0},
        {"strength": 0.5},
        {"method": "unipc"},
        {"color_fix": False},
    )
    for change in changes:
        assert not np.array_equal(plain, deblur_image(model, image, replace(SAMPLING, **change))), change
    assert np.array_equal(plain, deblur_image(model, image, SAMPLING))  # no state is kept


def test_self_ensemble_has_higher_psnr_than_one_sample():
    """Uses the included small model and two squares of a photo outside its training set."""
    model = open_control_model("models/small_deblur.safetensors", "models/small_diffusion.safetensors")
    plain = Sampling("a sharp, detailed, high-quality photograph", steps=2, color_fix=False)
    for y, x in ((60, 20), (100, 260)):
        sharp = read_image(photographs(("coffee.png",))[0])[y : y + 128, x : x + 100]
        blurry = cv2.GaussianBlur(sharp, (0, 0), 2)
        one = deblur_image(model, blurry, plain)
        mean = deblur_image(model, blurry, replace(plain, self_ensemble=True))
        assert mean.shape == sharp.shape  # not square: padded before rotation
        assert psnr(mean, sharp) > psnr(one, sharp) + 0.3


def test_tiles_cover_the_image_and_blend_in_float32():
    tiles = Tiles((20, 13), 8, 4)
    picture = torch.rand(1, 3, 20, 13)
    assert torch.allclose(tiles.blend(lambda y, x: picture[..., y, x]), picture, atol=1e-6)
    large = tiles.blend(lambda y, x: picture[..., y, x].repeat_interleave(8, 2).repeat_interleave(8, 3), 8)
    assert torch.allclose(large, picture.repeat_interleave(8, 2).repeat_interleave(8, 3), atol=1e-6)
    half = tiles.blend(lambda y, x: picture[..., y, x].bfloat16())
    assert half.dtype == torch.float32  # bfloat16 sums have errors of up to two levels


def test_tiled_restoration_has_no_seams_and_fixed_tile_size(model, monkeypatch):
    image = photograph(192, 256)
    seen = []
    apply = type(model).apply_model

    def watched(self, x, t, cond):
        seen.append(tuple(x.shape[-2:]))
        return apply(self, x, t, cond)

    monkeypatch.setattr(type(model), "apply_model", watched)
    tiled = deblur_image(model, image, replace(SAMPLING, tile=128, overlap=64, color_fix=False))
    assert tiled.shape == image.shape and set(seen) == {(16, 16)}
    columns = np.abs(np.diff(tiled.astype(float), axis=1)).mean((0, 2))
    assert columns.max() < 4 * np.median(columns)
    for change in ({"tile": 100}, {"tile": 64, "overlap": 64}, {"tile": -64}, {"tile": 128, "overlap": 32}):
        with pytest.raises(ValueError, match="multiples of 64"):
            deblur_image(model, image, replace(SAMPLING, **change))


def test_color_fix_removes_a_cast_and_keeps_detail():
    image = photograph(200, 200)
    cast = (image.astype(float) * [0.8, 1.0, 0.9] + [30, 0, 5]).clip(0, 255).astype(np.uint8)
    fixed = fix_color(cast, image)
    inside = (slice(40, -40), slice(40, -40))
    assert np.abs(cast[inside].mean((0, 1)) - image[inside].mean((0, 1))).max() > 5
    assert np.abs(fixed[inside].mean((0, 1)) - image[inside].mean((0, 1))).max() < 0.5
    sharp = cv2.Laplacian(fixed, cv2.CV_64F).std()
    assert sharp == pytest.approx(cv2.Laplacian(cast, cv2.CV_64F).std(), rel=0.05)
    assert np.array_equal(fix_color(image, image), image)
    assert coarse(np.full((50, 50, 3), 7, np.float32), 5) == pytest.approx(7)


@pytest.mark.slow
def test_every_file_format_loads_the_same_model(files, model):
    config, base = CONFIG, files / "base.safetensors"
    opened = [
        open_control_model(files / "full.ckpt", config_path=config),
        open_control_model(files / "control.safetensors", base, config),
        open_control_model(files / "bare.pth", base, config),
        open_control_model(files / "ours.ckpt"),
    ]
    for other in opened:
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(ValueError, match="ControlNet alone: its base_path is missing, .* context_dim 32"):
        open_control_model(files / "control.safetensors", config_path=config)
    with pytest.raises(ValueError, match="holds no ControlNet"):
        open_control_model(files / "base.safetensors", config_path=config)
    with pytest.raises(ValueError, match="does not fit this model"):
        open_control_model(files / "full.ckpt", config_path="models/cldm_v15.yaml")
    with pytest.raises(ValueError, match="context_dim 32.*yaml"):
        open_control_model(files / "full.ckpt")


# ---- published ControlNets: control_v11p_sd15_inpaint and control_v11f1e_sd15_tile on Stable Diffusion 1.5


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write tiny files with the names, wrappers and keys of the published ones.

    They have the text width of Stable Diffusion 1.5, whose configuration is replaced by theirs.
    """
    folder = tmp_path_factory.mktemp("published")
    config = read_config("models/cldm_tiny_inpaint.yaml")
    config["target"] = "cldm.cldm.ControlLDM"
    for stage in ("unet_config", "control_stage_config"):
        config["params"][stage]["params"]["context_dim"] = 768
    config["params"]["cond_stage_config"]["params"]["width"] = 768
    (folder / "v15.yaml").write_text(yaml.safe_dump({"model": config}))
    weights = fill(create_model(folder / "v15.yaml")).state_dict()
    control = {name: value for name, value in weights.items() if name.startswith("control_model.")}
    base = {name: value for name, value in weights.items() if "." in name and name not in control}
    base["model_ema.decay"] = torch.tensor(0.9)
    checkpoint.write_weights(folder / "v1-5-pruned-emaonly.safetensors", base)
    torch.save({"state_dict": base, "global_step": 840000}, folder / "v1-5-pruned.ckpt")
    bare = {name.removeprefix("control_model."): value.half() for name, value in control.items()}
    checkpoint.write_weights(folder / "control_v11p_sd15_inpaint_fp16.safetensors", bare)
    for name in ("control_v11p_sd15_inpaint", "control_v11f1e_sd15_tile"):
        torch.save(control, folder / f"{name}.pth")  # no wrapper
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, SD1, str(folder / "v15.yaml"))
        yield folder


@pytest.mark.parametrize(
    ("system", "control", "base", "size"),
    [
        ("inpaint", "control_v11p_sd15_inpaint.pth", "v1-5-pruned-emaonly.safetensors", (64, 100)),
        ("inpaint", "control_v11p_sd15_inpaint_fp16.safetensors", "v1-5-pruned.ckpt", (64, 64)),
        ("deblur", "control_v11f1e_sd15_tile.pth", "v1-5-pruned-emaonly.safetensors", (64, 100)),
    ],
)
def test_published_controlnets_get_the_published_hint_format(
    published, tmp_path, monkeypatch, system, control, base, size
):
    """As in gradio_inpaint.py of ControlNet 1.1, the hint is RGB / 255, and -255 / 255 in the hole; for the
    tile model it is the image itself. Image and mask are padded to multiples of 64."""
    hints = []
    features = ControlNet.hint_features
    monkeypatch.setattr(
        ControlNet, "hint_features", lambda self, hint: hints.append(hint) or features(self, hint)
    )
    photo, mask = photograph(*size), np.zeros(size, np.uint8)
    mask[16:40, size[1] - 30 :] = 255
    write_image(tmp_path / "photo.png", photo)
    write_image(tmp_path / "mask.png", mask)
    words = ["--checkpoint_path", str(published / control), "--base_path", str(published / base)]
    words += [
        "--input",
        str(tmp_path / "photo.png"),
        "--output_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    if system == "inpaint":
        words += ["--input_mask", str(tmp_path / "mask.png")]
    words = infer.with_subcommand([*words, "--num_inference_steps", "1", "--device", "cpu"])
    assert words[0] == system
    infer.restore_files(read_settings(infer.COMMANDS, words=words))

    expected = photo.astype(np.float32)
    if system == "inpaint":
        expected[mask > 127] = -255
    expected = np.pad(expected, ((0, 0), (0, -size[1] % 64), (0, 0)), mode="edge") / 255
    assert hints[0].shape[1] == 3
    assert np.abs(hints[0][0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_published_controlnet_with_missing_or_wrong_base_raises(published, files, tmp_path):
    control, base = published / "control_v11f1e_sd15_tile.pth", published / "v1-5-pruned.ckpt"
    write_image(tmp_path / "a.png", photograph(64, 64))
    command = infer.Deblur(input=tmp_path / "a.png", output_dir=tmp_path / "out", checkpoint_path=control)
    missing = r"tile.pth is a ControlNet alone: its base_path is missing, .* Stable Diffusion 1 \(v1-5"
    for path, message in (
        (None, missing),
        (tmp_path / "gone.ckpt", "checkpoint not found: .*gone.ckpt"),
        (
            files / "base.safetensors",
            "tile.pth needs .* Stable Diffusion 1: .* a latent diffusion model .* 32",
        ),
        (control, "needs a base_path that is Stable Diffusion 1: .* is a ControlNet for Stable Diffusion 1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            infer.restore_files(replace(command, base_path=path))
    torch.save({"controlnet_down_blocks.0.weight": torch.ones(1)}, tmp_path / "diffusers.bin")
    with pytest.raises(ValueError, match="diffusers.bin holds no ControlNet .*: it is a diffusers file"):
        infer.restore_files(replace(command, checkpoint_path=tmp_path / "diffusers.bin", base_path=base))


def test_published_keys_and_shapes_fit_at_full_size():
    """The ControlNet has 340 tensors; the Stable Diffusion 1.5 file lacks the schedule."""
    keys = json.loads((Path(__file__).parent / "reference" / "keys_cldm_v15.json").read_text())
    weights = {name: torch.empty(shape, device="meta") for name, shape in keys.items() if "." in name}
    control = {name: value for name, value in weights.items() if name.startswith("control_model.")}
    assert len(control) == 340 and family(control) == "a ControlNet for Stable Diffusion 1"
    with torch.device("meta"):
        own = instantiate_from_config(read_config("models/cldm_v15.yaml")).state_dict()
    check_weights(own, weights, "v1-5-pruned.ckpt")


def test_included_small_model_is_the_default(tmp_path, monkeypatch, capsys):
    small = fill(create_model("models/small_diffusion.yaml")).state_dict()
    config = Path("models/small_diffusion.yaml").read_text()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small_diffusion.yaml").write_text(config)
    write_image(tmp_path / "a.png", photograph(64, 64))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path / "models")
    settings = {"input": Path("a.png"), "device": "cpu", "num_inference_steps": 1}
    commands = infer.Deblur(**settings), infer.Inpaint(**settings, outpaint=(0, 0, 8, 0))
    for kind, command in zip(("deblur", "inpaint"), commands, strict=True):
        with pytest.raises(FileNotFoundError, match=f"models/small_{kind}.safetensors is missing"):
            infer.restore_files(command)
    control = {name: value for name, value in small.items() if name.startswith("control_model.")}
    base = {name: value for name, value in small.items() if name not in control}
    checkpoint.write_weights(tmp_path / "models" / "small_diffusion.safetensors", base)
    for kind, command in zip(("deblur", "inpaint"), commands, strict=True):
        about = {"base": "models/small_diffusion.safetensors"}
        checkpoint.write_weights(tmp_path / "models" / f"small_{kind}.safetensors", control, about)
        infer.restore_files(command)
        assert f"docs/{kind}.md), give --checkpoint_path" in capsys.readouterr().out
    assert read_image("outputs/inference/a.png").shape == (64, 64, 3)
    assert read_image("outputs/inference/inpainted.png").shape == (64, 72, 3)


def test_command_restores_a_folder_and_keeps_unchanged_results(files, tmp_path, capsys):
    source = tmp_path / "my photos 照片"
    source.mkdir()
    write_image(source / "a b.png", photograph(80, 64))
    write_image(source / "ü.png", photograph(64, 64)[..., 0])
    (source / "notes.txt").write_text("not an image")
    words = ["deblur", "--checkpoint_path", str(files / "ours.ckpt"), "--scheduler", "dpmpp_2m"]
    words += ["--input", str(source), "--output_dir", str(tmp_path / "out"), "--comparison"]
    command = read_settings(infer.COMMANDS, words=[*words, "--num_inference_steps", "1", "--device", "cpu"])
    for summary in ("2 made, 0 kept (unchanged)", "0 made, 2 kept (unchanged)"):
        infer.restore_files(command)
        assert summary in capsys.readouterr().out
    assert read_image(tmp_path / "out" / "a b.png").shape == (80, 64, 3)
    assert read_image(tmp_path / "out_comparison" / "ü.png").shape[1] > 128


def test_result_note_names_the_current_base(files, tmp_path, monkeypatch):
    """The checkpoint file may be replaced by one with another base or, as a full file, without one."""
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", photograph(64, 64))
    monkeypatch.chdir(tmp_path)
    command = infer.Deblur(input=Path("in"), checkpoint_path=Path("c.ckpt"), num_inference_steps=1)
    ours = checkpoint.load(files / "ours.ckpt", mmap=False)
    whole = checkpoint.read_weights(files / "full.ckpt")
    for name, weights in (("first", ours["state_dict"]), ("second", ours["state_dict"]), ("gone", whole)):
        if name != "gone":
            shutil.copy(files / "base.safetensors", f"{name}.safetensors")
        checkpoint.save("c.ckpt", {**ours, "state_dict": weights, "base": f"{name}.safetensors"})
        infer.restore_files(command)
        assert (f"{name}.safetensors" in read_note("outputs/inference/a.png")) == (name != "gone")
        Path(f"{name}.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("half", [False, True])
def test_exported_controlnet_equals_ours_in_diffusers(tmp_path, half):
    """The diffusers converter supports only SD 1.5's depth, so only the width is reduced."""
    from diffusers import ControlNetModel

    from cldm.cldm import ControlNet

    sizes = {
        "in_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "context_dim": 768,
    }
    control = fill(ControlNet(**sizes)).eval()
    weights = {f"control_model.{name}": value for name, value in control.state_dict().items()}
    checkpoint.save(tmp_path / "ours.ckpt", {"state_dict": weights})
    export(ExportSettings(tmp_path / "ours.ckpt", tmp_path / "control.safetensors", half=half))
    (tmp_path / "config").mkdir()
    widths = (32, 64, 128, 128)
    ControlNetModel(cross_attention_dim=768, block_out_channels=widths).save_config(tmp_path / "config")
    theirs = ControlNetModel.from_single_file(
        str(tmp_path / "control.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    ).eval()
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([400]), torch.randn(1, 77, 768)
    hint = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        ours = control(x, hint, t, context)
        down, middle = theirs.float()(x, t, context, hint, return_dict=False)
    for mine, other in zip(ours, [*down, middle], strict=True):
        assert (mine - other).abs().max() < (2e-2 if half else 1e-4) * mine.abs().max()


def test_export_has_standard_key_names_and_bad_paths_raise(files, tmp_path):
    export(ExportSettings(files / "ours.ckpt", tmp_path / "a.safetensors", half=True))
    weights = checkpoint.read_weights(tmp_path / "a.safetensors")
    assert all(name.startswith("control_model.") and v.dtype == torch.float16 for name, v in weights.items())
    average = checkpoint.load(files / "ours.ckpt")["ema"]["average"]
    assert weights.keys() == average.keys()
    assert all(torch.equal(value, average[name].half()) for name, value in weights.items())
    for settings, message in (
        (ExportSettings(files / "full.ckpt", tmp_path / "a.safetensors"), "exists already"),
        (ExportSettings(files / "full.ckpt", tmp_path / "b.ckpt"), "must be a .safetensors"),
        (ExportSettings(files / "base.safetensors", tmp_path / "c.safetensors"), "holds no ControlNet"),
        (ExportSettings(tmp_path / "none.ckpt", tmp_path / "c.safetensors"), "none.ckpt"),
        (ExportSettings(files / "full.ckpt", tmp_path / "no" / "c.safetensors"), "folder not found"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export(settings)


def test_hint_attention_is_exported_only_on_request(tmp_path):
    content = {
        "control_model.zero_convs.0.0.weight": torch.ones(1),
        "control_model.hint_attention.gate": torch.ones(1),
    }
    checkpoint.save(tmp_path / "x.ckpt", {"state_dict": content})
    with pytest.raises(ValueError, match="--use_attention.*ignore.*--allow_extra"):
        export(ExportSettings(tmp_path / "x.ckpt", tmp_path / "x.safetensors"))
    export(ExportSettings(tmp_path / "x.ckpt", tmp_path / "x.safetensors", allow_extra=True))
    assert len(checkpoint.read_weights(tmp_path / "x.safetensors")) == 2
