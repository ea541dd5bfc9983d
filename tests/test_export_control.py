"""Errors of the ControlNet export, and its warnings about tools that read the file."""

import pytest
import torch

import tool_export_control as tool
from ldm import checkpoint


def write(path, hint_channels=3, context=768):
    weights = {
        "zero_convs.0.0.weight": torch.zeros(4, 4, 1, 1),
        "input_hint_block.0.weight": torch.zeros(16, hint_channels, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, context),
    }
    checkpoint.write_weights(path, {f"control_model.{name}": value for name, value in weights.items()})
    return path


def test_four_hint_channels_raise_unless_allowed(tmp_path):
    path = write(tmp_path / "run.safetensors", hint_channels=4)
    with pytest.raises(ValueError, match="--hint_channels 4: other tools give three.*--allow_extra"):
        tool.main(tool.Settings(path, tmp_path / "control_inpaint.safetensors"))
    tool.main(tool.Settings(path, tmp_path / "control_inpaint.safetensors", allow_extra=True))


def test_warnings_about_file_name_and_stable_diffusion_2(tmp_path, capsys):
    tool.main(tool.Settings(write(tmp_path / "run.safetensors"), tmp_path / "mine.safetensors"))
    printed = capsys.readouterr().out
    assert "control_sd15_inpaint_mine.safetensors is shown under Inpaint" in printed and "2.x" not in printed
    second = write(tmp_path / "run2.safetensors", context=1024)
    tool.main(tool.Settings(second, tmp_path / "control_sd21_blur_mine.safetensors"))
    printed = capsys.readouterr().out
    assert "A1111's menus" not in printed and "A1111 computes such ControlNets wrongly" in printed
