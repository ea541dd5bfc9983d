"""Add a ControlNet to a Stable Diffusion file, for training to start from.

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt

Each ControlNet tensor begins as a copy of the UNet's tensor of the same name; those that the UNet lacks (the
hint block, the zero convolutions) are initialised. Works for Stable Diffusion 1.5 and 2.1, told apart by the
weights; reads and writes .ckpt, .pth and .safetensors. Reads about 4.3 GB (SD 1.5) and writes 5.7 GB.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cldm.model import CONTROL, add_control, config_for, family, load_state_dict, read_config
from harness.settings import check_new, run_main
from ldm.checkpoint import write_weights


@dataclass
class Settings:
    input_path: Annotated[Path, tyro.conf.Positional]  # Stable Diffusion weights: .ckpt, .pth or .safetensors
    output_path: Annotated[Path, tyro.conf.Positional]  # file to write; its suffix chooses the format
    config: Path | None = None  # yaml of the model; None takes the one in models/ that fits the weights
    overwrite: bool = False  # replace the output file if it exists


def group_names(names: list[str]) -> list[str]:
    """Group names by their part before the second dot, with counts, for a short list."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    return [f"{group} ({count})" for group, count in groups.items()]


def main(settings: Settings) -> None:
    """Read, add the ControlNet, write, report."""
    output = check_new(settings.output_path, settings.overwrite)
    weights = load_state_dict(settings.input_path)
    config = read_config(settings.config or config_for(weights, settings.input_path))
    result, names = add_control(weights, config, settings.input_path)
    write_weights(output, result)
    print(f"{settings.input_path} is {family(weights)}")
    print(f"kept      {len(names['kept']):5d} tensors")
    print(f"copied    {len(names['copied']):5d} tensors into {CONTROL}*")
    for kind in ("added", "ignored"):
        print(f"{kind:9s} {len(names[kind]):5d} tensors: {', '.join(group_names(names[kind])) or 'none'}")
    print(f"written to {output}\nnext: python tutorial_train_deblur.py --resume_path {output}")


if __name__ == "__main__":
    run_main(main, Settings)
