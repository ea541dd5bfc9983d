"""tool_add_control.py on small files with the real key names, wrappers and defects of published files."""

import pickle
from pathlib import Path

import pytest
import torch

from cldm.model import config_for, create_filled_model, create_model, family, read_config
from ldm.checkpoint import read_weights, write_weights
from tests.fill import fill
from tool_add_control import Settings, add_control, main

CONFIG = "models/cldm_tiny_deblur.yaml"


@pytest.fixture(scope="module")
def diffusion() -> dict[str, torch.Tensor]:
    """Create the state dict of a tiny Stable Diffusion model, without a ControlNet."""
    model = fill(create_model(CONFIG))
    return {k: v for k, v in model.state_dict().items() if not k.startswith("control_model.")}


@pytest.fixture
def base(diffusion, tmp_path) -> Path:
    """Write these weights with the extra EMA keys of published files and without the keys they often lack."""
    weights = {k: v for k, v in diffusion.items() if not k.endswith("position_ids") and k != "logvar"}
    path = tmp_path / "v1-5-pruned.ckpt"
    write_weights(
        path, {**weights, "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(1)}
    )
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_output_is_complete_and_encoder_is_copied(base, diffusion, tmp_path, capsys, suffix):
    output = tmp_path / f"control_ini{suffix}"
    main(Settings(base, output, Path(CONFIG)))
    weights = read_weights(output)
    model = create_model(CONFIG)
    assert weights.keys() == model.state_dict().keys()
    own = create_filled_model(read_config(CONFIG), weights, output).state_dict()
    copied = 0
    for name, value in weights.items():
        assert torch.equal(own[name], value)
        twin = "model.diffusion_model." + name.removeprefix("control_model.")
        if name in diffusion and name != "logvar":
            assert torch.equal(value, diffusion[name]), name
        elif name.startswith("control_model.") and twin in diffusion:
            assert torch.equal(value, diffusion[twin]), name
            copied += 1
    assert (weights["control_model.zero_convs.0.0.weight"] == 0).all()
    assert weights["control_model.input_hint_block.0.weight"].std() > 0.01
    printed = capsys.readouterr().out
    assert f"copied    {copied:5d} tensors" in printed
    assert "ignored       2 tensors: model_ema.decay (1), model_ema.num_updates (1)" in printed
    assert "control_model.input_hint_block (16)" in printed and "control_model.zero_convs" in printed
    assert "logvar (1)" in printed
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_bare_state_dict_without_wrapper(base, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(read_weights(base), bare)
    main(Settings(bare, tmp_path / "out.ckpt", Path(CONFIG)))
    assert "control_model.zero_convs.0.0.weight" in read_weights(tmp_path / "out.ckpt")


class Evil:
    def __reduce__(self):
        return print, ("code of the file was run",)


def write_text(path: Path) -> None:
    path.write_text("no weights in here")


def write_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))  # as torch.save writes it


def write_other(path: Path) -> None:
    write_weights(path, {"down_blocks.0.resnets.0.norm1.weight": torch.ones(3)})


def write_flux(path: Path) -> None:
    write_weights(path, {"double_blocks.0.img_attn.qkv.weight": torch.ones(3)})


def write_empty(path: Path) -> None:
    torch.save({"epoch": 3}, path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.ckpt", None, "x.ckpt"),
        ("x.ckpt", write_text, "damaged or not a checkpoint"),
        ("x.safetensors", write_text, "damaged or not a safetensors file"),
        ("x.ckpt", write_code, "holds code"),
        ("x.safetensors", write_other, "a diffusers file.*down_blocks"),
        ("x.safetensors", write_flux, "is FLUX"),
        ("x.ckpt", write_empty, "no tensors"),
    ],
)
def test_bad_input_raises_and_writes_no_output(tmp_path, capsys, name, write, message):
    if write:
        write(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(Settings(tmp_path / name, tmp_path / "out.ckpt", Path(CONFIG)))
    assert "was run" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ([name] if write else [])


def test_truncated_file_raises_with_its_name(base, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(base.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"cut.ckpt is damaged"):
        main(Settings(cut, tmp_path / "out.ckpt", Path(CONFIG)))


def test_existing_output_is_overwritten_only_on_request(base, tmp_path):
    output = tmp_path / "out.ckpt"
    output.write_text("precious")
    with pytest.raises(ValueError, match="exists already.*--overwrite"):
        main(Settings(base, output, Path(CONFIG)))
    assert output.read_text() == "precious"
    main(Settings(base, output, Path(CONFIG), overwrite=True))
    with pytest.raises(FileNotFoundError, match="output folder not found"):
        main(Settings(base, tmp_path / "none" / "out.ckpt", Path(CONFIG)))
    with pytest.raises(ValueError, match="has a ControlNet already"):
        main(Settings(output, tmp_path / "again.ckpt", Path(CONFIG)))


def test_missing_or_misshapen_tensors_raise_with_their_names(base, tmp_path):
    weights = read_weights(base)
    del weights["first_stage_model.decoder.conv_in.weight"]
    missing = "file does not fit this model: first_stage_model.decoder.conv_in.weight is missing"
    with pytest.raises(ValueError, match=missing):
        add_control(weights, read_config(CONFIG), "file")
    with pytest.raises(ValueError, match="does not fit this model .*is missing|, not "):
        main(Settings(base, tmp_path / "out.ckpt", Path("models/cldm_v15.yaml")))


def test_model_family_is_recognized():
    def sd(context: int) -> dict[str, torch.Tensor]:
        name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        return {name: torch.empty(320, context)}

    assert family(sd(768)) == "Stable Diffusion 1" and config_for(sd(768), "x").name == "cldm_v15.yaml"
    assert family(sd(1024)) == "Stable Diffusion 2" and config_for(sd(1024), "x").name == "cldm_v21.yaml"
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        config_for(sd(2048), "x")


def test_checkpoint_with_lightning_callback_key_loads(base, tmp_path):
    """The original .ckpt files of Stable Diffusion have a Lightning class as a dictionary key."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    content = {"state_dict": read_weights(base), "callbacks": {ModelCheckpoint: {"best": torch.tensor(1.0)}}}
    torch.save(content, tmp_path / "official.ckpt")
    assert read_weights(tmp_path / "official.ckpt").keys() == content["state_dict"].keys()
