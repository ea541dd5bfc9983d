"""Convert a FLUX LoRA of another trainer to this project's form: kohya's names on the original fused linears.

    python -m extras.convert_lora other.safetensors ours.safetensors
    python infer.py kontext --lora_path ours.safetensors --prompt "what it was trained with" --input PHOTOS

Reads peft's names below `transformer.` (diffusers, ai-toolkit, SimpleTuner: separate q, k and v) and below
`diffusion_model.` (the original fused linears), with lora_A / lora_B or lora_down / lora_up. The converted
file also opens in ComfyUI, Forge and diffusers.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from harness.settings import check_new, run_main
from ldm.checkpoint import read_metadata, read_weights, write_weights
from ldm.models.diffusers_folder import BLOCKS
from ldm.modules.lora import kohya_name

WIDTHS = {"qkv": 3, "linear1": 7}  # outputs / inputs of a fused linear: q, k, v, and FLUX's MLP of 4
KEY = re.compile(
    r"(?:transformer|diffusion_model)\.(\w+_blocks|transformer_blocks)\.(\d+)\.(.+?)\."
    r"(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))"
)
KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", None: "alpha"}


@dataclass
class Settings:
    """Convert a FLUX LoRA of another trainer."""

    source: tyro.conf.Positional[Path]  # LoRA file of another trainer (.safetensors)
    output: tyro.conf.Positional[Path]  # file to write (.safetensors)
    overwrite: bool = False  # replace the output file if it exists


def convert(weights: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Rename a foreign LoRA to kohya's names and fuse its linears.

    Separate LoRAs of q, k, v become one with a block-diagonal up matrix: the same change of the weight, with
    the sum of their ranks. A missing alpha is taken from peft's settings in diffusers' `metadata`, else it is
    the rank. Raises ValueError for unknown names, for DoRA (separate direction and length of weights), which
    is not additive, and for an incomplete LoRA.
    """
    peft = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    scale = peft.get("transformer.lora_alpha", 1) / peft.get("transformer.r", 1) if peft else 1.0
    if any("dora_scale" in name or "lora_magnitude" in name for name in weights):
        raise ValueError("it is a DoRA, which scales the base's weights as well: only plain LoRAs are read")
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}  # fused linear -> part -> down, up, alpha
    for key, value in weights.items():
        match = KEY.fullmatch(key)
        place = find_place(match[1], match[2], match[3]) if match else None
        if place is None:
            raise ValueError(f"its names are not known: it holds {key}")
        linear, part = place
        parts.setdefault(linear, {}).setdefault(part, {})[KINDS[match[4]]] = value
    converted = {}
    for linear, found in parts.items():
        stem = kohya_name(linear)
        down, up = fuse(linear, found, scale)
        converted[f"{stem}.lora_down.weight"] = down.contiguous()
        converted[f"{stem}.lora_up.weight"] = up.contiguous()
        converted[f"{stem}.alpha"] = torch.tensor(float(len(down)))  # the scales are in the up matrices
    return converted


def find_place(block: str, number: str, name: str) -> tuple[str, int] | None:
    """Find the fused linear, and its part (-1: the whole), for a foreign name; None if it is unknown."""
    if block in BLOCKS:
        return f"{block}.{number}.{name}", -1
    for ours, (theirs, modules) in BLOCKS.items():
        for linear, parts in modules.items():
            if block == theirs and name in parts:
                return f"{ours}.{number}.{linear}", parts.index(name) if len(parts) > 1 else -1
    return None


def fuse(linear: str, found: dict[int, dict[str, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """Return down (rank, in) and up (out, rank) of a fused linear; they change its weight by up @ down."""
    downs, ups = [], []
    for part, lora in sorted(found.items()):
        if "down" not in lora or "up" not in lora:
            raise ValueError(f"it is not complete: a half of {linear} is missing")
        down, up = lora["down"].float(), lora["up"].float()
        up = up * (lora["alpha"].item() / len(down) if "alpha" in lora else scale)
        if part >= 0:  # q, k, v are as wide as the input, the MLP is the rest
            width = down.shape[1]
            rows = torch.zeros(WIDTHS[linear.rpartition(".")[2]] * width, up.shape[1])
            start = part * width
            if rows[start : start + len(up)].shape != up.shape:
                raise ValueError(f"it is not of FLUX: part {part} of {linear} has {len(up)} outputs")
            rows[start : start + len(up)] = up
            up = rows
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1)


def main(settings: Settings) -> None:
    output = check_new(settings.output, settings.overwrite, ".safetensors")
    metadata = read_metadata(settings.source)
    try:
        weights = convert(read_weights(settings.source), metadata)
    except ValueError as error:
        raise ValueError(f"{settings.source} cannot be converted: {error}") from error
    write_weights(output, weights, {"converted_from": settings.source.name})
    print(f"{output}: a LoRA of {len(weights) // 3} layers")


if __name__ == "__main__":
    run_main(main, Settings)
