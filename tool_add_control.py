"""Turn a Stable Diffusion file into one that a ControlNet's training starts from.

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt

Each ControlNet tensor begins as a copy of the UNet's tensor of the same name; what the UNet lacks (the hint
block, the zero convolutions) gets its own initialisation. Works for Stable Diffusion 1.5 and 2.1, told apart
by the weights; reads and writes .ckpt, .pth and .safetensors. About 4.3 GB (SD 1.5) are read and 5.7 written.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from cldm.model import SkipInit, config_for, family, listing, load_state_dict, read_config
from ldm.checkpoint import write_weights
from ldm.settings import run_main
from ldm.util import instantiate_from_config

UNET, CONTROL = "model.diffusion_model.", "control_model."


@dataclass
class Settings:
    input_path: Annotated[Path, tyro.conf.Positional]
    """Stable Diffusion weights: .ckpt, .pth or .safetensors"""
    output_path: Annotated[Path, tyro.conf.Positional]
    """file to write; its suffix chooses the format"""
    config: Path | None = None
    """yaml of the model; by default the one in models/ that fits the weights"""
    overwrite: bool = False
    """replace the output if it exists"""


def add_control(
    weights: Mapping[str, torch.Tensor], config: Mapping, source: str | Path
) -> tuple[dict[str, torch.Tensor], Counter, dict[str, list[str]]]:
    """State dict of the ControlLDM of `config`, started from Stable Diffusion's `weights`.

    Also returns how many tensors were copied, kept, added and ignored, and the names of the last two.
    Raises ValueError if `weights` (from `source`) do not fit.
    """
    with torch.device("meta"):
        target = instantiate_from_config(config).state_dict()
    check_fit(weights, target, source)
    result, names = {}, {"added": [], "ignored": []}
    counts = Counter(ignored=0)
    fresh = None
    for name, like in target.items():
        twin = UNET + name.removeprefix(CONTROL)
        if name in weights:
            result[name], kind = weights[name], "kept"
        elif name.startswith(CONTROL) and twin in weights:
            result[name], kind = weights[twin].clone(), "copied"
        else:
            fresh = fresh or fresh_weights(config)
            result[name], kind = fresh[name], "added"
            names["added"].append(name)
        if result[name].shape != like.shape:
            shapes = f"{tuple(result[name].shape)}, not {tuple(like.shape)}"
            raise ValueError(f"{source} does not fit this configuration: {name} has shape {shapes}")
        counts[kind] += 1
    names["ignored"] = [name for name in weights if name not in target]
    counts["ignored"] = len(names["ignored"])
    return result, counts, names


def check_fit(weights: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], source) -> None:
    """Raise ValueError that names the keys that tell, if `weights` are not what is wanted."""
    kind = family(weights)
    if any(name.startswith(CONTROL) for name in weights):
        raise ValueError(f"{source} is {kind}: it has a ControlNet already ({CONTROL}*)")
    if not any(name.startswith(UNET + "input_blocks.") for name in weights):
        raise ValueError(
            f"{source} is {kind}, not a Stable Diffusion 1.5 or 2.1 file: it lacks {UNET}input_blocks.*; "
            f"it begins with {listing(sorted(weights))}"
        )
    needed = [name for name in target if "." in name and not name.startswith(CONTROL)]
    missing = [name for name in needed if name not in weights and not name.endswith("position_ids")]
    if missing:
        raise ValueError(f"{source} ({kind}) does not fit this configuration: it lacks {listing(missing)}")


def fresh_weights(config: Mapping) -> dict[str, torch.Tensor]:
    """A new ControlLDM's tensors: its ControlNet initialised, its schedule and position_ids computed.

    The rest, which comes from the file, is left unset.
    """
    with SkipInit():
        fresh = instantiate_from_config(config).state_dict()
    control = instantiate_from_config(config["params"]["control_stage_config"]).state_dict()
    return {**fresh, **{CONTROL + name: value for name, value in control.items()}}


def group_names(names: list[str]) -> list[str]:
    """Names up to their second dot, with counts: what a person wants to read."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    return [f"{group} ({count})" for group, count in groups.items()]


def main(settings: Settings) -> None:
    """Read, add the ControlNet, write, report."""
    output = settings.output_path
    if output.exists() and not settings.overwrite:
        raise ValueError(f"{output} exists already: remove it or pass --overwrite")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder not found: {output.parent}")
    weights = load_state_dict(settings.input_path)
    config = read_config(settings.config or config_for(weights, settings.input_path))
    result, counts, names = add_control(weights, config, settings.input_path)
    write_weights(output, result)
    print(f"{settings.input_path} is {family(weights)}")
    print(f"kept      {counts['kept']:5d} tensors")
    print(f"copied    {counts['copied']:5d} tensors into {CONTROL}*")
    print(f"added     {counts['added']:5d} tensors: {', '.join(group_names(names['added'])) or 'none'}")
    print(f"ignored   {counts['ignored']:5d} tensors: {', '.join(group_names(names['ignored'])) or 'none'}")
    print(f"written to {output}\nnext: python tutorial_train_deblur.py --resume_path {output}")


if __name__ == "__main__":
    run_main(main, Settings)
