"""Export a trained ControlNet alone, for diffusers, A1111 and ComfyUI.

    python tool_export_control.py outputs/deblur/checkpoints/best.ckpt control_deblur.safetensors --half

The file holds `control_model.*` and nothing else: 1.4 GB for SD 1.5, 0.7 with --half. Put it into A1111's
models/ControlNet or ComfyUI's models/controlnet; diffusers opens it with ControlNetModel.from_single_file
(see docs/deblur.md). EMA weights are exported where the checkpoint has them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from cldm.model import CONTROL, UNET, hint_latent_channels, read_control
from harness.settings import check_new, run_main
from ldm.checkpoint import write_weights
from ldm.util import listing


@dataclass
class Settings:
    # checkpoint of tutorial_train_*.py, or a full ControlNet file
    checkpoint_path: Annotated[Path, tyro.conf.Positional]
    output_path: Annotated[Path, tyro.conf.Positional]  # file to write, with the suffix .safetensors
    half: bool = False  # store float16: half the size, and the type that most tools use
    # export even what other tools cannot use: hint attention or latent, 4 channels, a trained UNet
    allow_extra: bool = False
    overwrite: bool = False  # replace the output file if it exists


def control_alone(weights: Mapping[str, Tensor], config: Mapping | None) -> tuple[dict[str, Tensor], str]:
    """Extract the ControlNet, its names without prefix, and why it differs in other tools ("" if not)."""
    control = {k.removeprefix(CONTROL): value for k, value in weights.items() if k.startswith(CONTROL)}
    if extra := [name for name in control if name.startswith("hint_attention.")]:
        return control, (
            f"was trained with --use_attention: other tools would ignore {listing(extra)} and restore "
            "differently"
        )
    unlocked = any(name.startswith(UNET + "output_blocks.") for name in weights)
    if unlocked and UNET + "input_blocks.0.0.weight" not in weights:
        return control, (
            "was trained with --no_sd_locked: its ControlNet belongs to a changed UNet and restores "
            "differently with another"
        )
    if (latent := hint_latent_channels(weights, config)) > 0:
        return control, (
            f"was trained with --hint_as_latent or --coarse_fill: its input has {latent} channels that other "
            "tools do not give it"
        )
    if (channels := control["input_hint_block.0.weight"].shape[1]) != 3:
        return control, (
            f"was trained with --hint_channels {channels}: other tools give three, and stop with an error"
        )
    return control, ""


def main(settings: Settings) -> None:
    """Read, check, write, report."""
    output = check_new(settings.output_path, settings.overwrite, ".safetensors")
    weights, content = read_control(settings.checkpoint_path)
    control, differs = control_alone(weights, content.get("config"))
    if differs and not settings.allow_extra:
        raise ValueError(f"{settings.checkpoint_path} {differs}. Pass --allow_extra to export it anyway")
    dtype = torch.float16 if settings.half else torch.float32
    content = {CONTROL + name: value.to(dtype) for name, value in control.items()}
    write_weights(output, content, {"format": "pt", "source": settings.checkpoint_path.name})
    size = output.stat().st_size / 1e6
    print(f"{len(content)} tensors, {size:.1f} MB, written to {output}")
    print("next: copy it to A1111's models/ControlNet or ComfyUI's models/controlnet")
    if not {"inpaint", "blur"} & {*re.findall("[a-z]+", output.stem.lower())}:
        print(
            f"A1111's menus go by words in the name: control_sd15_inpaint_{output.name} is shown under "
            f"Inpaint, control_sd15_blur_{output.name} under Tile"
        )
    if any(value.shape[-1] == 1024 for name, value in control.items() if name.endswith("attn2.to_k.weight")):
        print(
            "it is for Stable Diffusion 2.x: A1111 computes such ControlNets wrongly (8 heads in every "
            "block); diffusers needs the configuration in docs/tools.md"
        )


if __name__ == "__main__":
    run_main(main, Settings)
