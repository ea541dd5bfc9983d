"""Export a trained ControlNet alone, for diffusers, A1111 and ComfyUI.

    python tool_export_control.py outputs/deblur/checkpoints/best.ckpt control_deblur.safetensors --half

The file holds `control_model.*` and nothing else: 1.4 GB for SD 1.5, 0.7 with --half. Put it into A1111's
models/ControlNet or ComfyUI's models/controlnet; diffusers opens it with ControlNetModel.from_single_file
(see docs/deblur.md). The average (EMA) is exported where the checkpoint has one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from cldm.model import family, hint_latent_channels, listing, read_control
from ldm.checkpoint import write_weights
from ldm.settings import run_main

PREFIX, UNET = "control_model.", "model.diffusion_model."


@dataclass
class Settings:
    checkpoint_path: Annotated[Path, tyro.conf.Positional]
    """a checkpoint of tutorial_train_*.py, or a full ControlNet file"""
    output_path: Annotated[Path, tyro.conf.Positional]
    """file to write, .safetensors"""
    half: bool = False
    """store float16: half the size, what most tools use"""
    prefix: str = PREFIX
    """what each name begins with; "" for bare names"""
    allow_extra: bool = False
    """export all the same what other tools leave out: hint attention, hint latent, a trained UNet decoder"""
    overwrite: bool = False
    """replace the output if it exists"""


def main(settings: Settings) -> None:
    """Read, check, write, report."""
    output = settings.output_path
    if output.suffix != ".safetensors":
        raise ValueError(f"the output must be a .safetensors file, not {output}")
    if output.exists() and not settings.overwrite:
        raise ValueError(f"{output} exists already: remove it or pass --overwrite")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder not found: {output.parent}")
    weights, content = read_control(settings.checkpoint_path)
    control = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    if "zero_convs.0.0.weight" not in control:
        raise ValueError(f"{settings.checkpoint_path} holds no ControlNet: it is {family(weights)}")
    extra = [name for name in control if name.startswith("hint_attention.")]
    if extra and not settings.allow_extra:
        raise ValueError(
            f"{settings.checkpoint_path} was trained with --use_attention: other tools would ignore "
            f"{listing(extra)} and restore differently. Pass --allow_extra to export it all the same"
        )
    unlocked = any(name.startswith(UNET + "output_blocks.") for name in weights)
    if unlocked and UNET + "input_blocks.0.0.weight" not in weights and not settings.allow_extra:
        raise ValueError(
            f"{settings.checkpoint_path} was trained with --no_sd_locked: its ControlNet belongs to a "
            "changed UNet and restores differently with another. Pass --allow_extra to export it all the same"
        )
    latent = hint_latent_channels(weights, content.get("config"))
    if latent > 0 and not settings.allow_extra:
        raise ValueError(
            f"{settings.checkpoint_path} was trained with --hint_as_latent: its input has {latent} "
            "channels that other tools do not give it. Pass --allow_extra to export it all the same"
        )
    dtype = torch.float16 if settings.half else torch.float32
    content = {settings.prefix + name: value.to(dtype) for name, value in control.items()}
    write_weights(output, content, {"format": "pt", "source": settings.checkpoint_path.name})
    size = output.stat().st_size / 1e6
    print(f"{len(content)} tensors, {size:.1f} MB, written to {output}")
    print("next: copy it to A1111's models/ControlNet or ComfyUI's models/controlnet")


if __name__ == "__main__":
    run_main(main, Settings)
