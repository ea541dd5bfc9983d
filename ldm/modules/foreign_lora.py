"""LoRAs of other trainers for FLUX, by the names and on the fused linears that ours have.

Read are peft's names below `transformer.` (diffusers, ai-toolkit, SimpleTuner: q, k and v apart) and below
`diffusion_model.` (the original's own fused linears), with lora_A / lora_B or lora_down / lora_up.
"""

import json
import re

import torch
from torch import Tensor

# The parts of each fused linear, in order, and what stands alone: diffusers' name -> the original's.
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
ALONE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
KEY = re.compile(
    r"(?:transformer|diffusion_model)\.(\w+_blocks|transformer_blocks)\.(\d+)\.(.+?)\."
    r"(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))"
)


def to_kohya(
    weights: dict[str, Tensor], sizes: dict[str, tuple[int, int]], metadata: dict[str, str]
) -> dict[str, Tensor] | None:
    """kohya's names and fused linears of a foreign LoRA; None if its names are not known.

    `sizes` are (out, in) of the model's fused linears by name. LoRAs of q, k, v become one, whose up matrix
    is block-diagonal: the same change of the weight, of rank up to the sum of theirs. Where a file has no
    alpha, peft's own in diffusers' `metadata` counts, else it is the rank. Raises ValueError for DoRA (the
    direction and length of weights apart), which is no sum, and for what is not complete.
    """
    peft = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    scale = peft.get("transformer.lora_alpha", 1) / peft.get("transformer.r", 1) if peft else 1.0
    if any("dora_scale" in name or "lora_magnitude" in name for name in weights):
        raise ValueError("it is a DoRA, which scales the base's weights as well: only plain LoRAs are read")
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, value in weights.items():
        match = KEY.fullmatch(key)
        place = match and _place(*match.group(1, 2, 3))
        if place is None:
            return None
        kind = {"A": "down", "n": "down", "B": "up", "p": "up", None: "alpha"}[match[4] and match[4][-1]]
        parts.setdefault(place[0], {}).setdefault(place[1], {})[kind] = value
    fused = {}
    for name, found in parts.items():
        stem = "lora_unet_" + name.replace(".", "_")
        down, up = _fuse(name, found, sizes.get(name, (0, 0)), scale)
        fused |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        fused[f"{stem}.alpha"] = torch.tensor(float(len(down)))  # the scales are in the up matrices
    return fused


def _place(block: str, number: str, name: str) -> tuple[str, int] | None:
    """The fused linear and which part of it a foreign name means; part -1 is the whole."""
    if block in BLOCKS.values():
        return f"{block}.{number}.{name}", -1
    if block not in BLOCKS:
        return None
    single = block.startswith("single")
    for linear, parts in FUSED.items():
        if name in parts and single == (linear == "linear1"):
            return f"{BLOCKS[block]}.{number}.{linear}", parts.index(name)
    return (f"{BLOCKS[block]}.{number}.{ALONE[name]}", -1) if name in ALONE else None


def _fuse(name: str, found: dict[int, dict], size: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Down (rank, in) and up (out, rank) of a fused linear of `size`, whose delta is up @ down."""
    out, width = size
    downs, ups = [], []
    for part, lora in sorted(found.items()):
        if not {"down", "up"} <= lora.keys():
            raise ValueError(f"it is not complete: a half of {name} is missing")
        down, up = lora["down"].float(), lora["up"].float()
        up = up * (lora["alpha"].item() / len(down) if "alpha" in lora else scale)
        if part >= 0:  # q, k, v are as wide as the input, the MLP is the rest
            rows = torch.zeros(out, up.shape[1])
            start = part * width
            if rows[start : start + len(up)].shape != up.shape:
                raise ValueError(f"it belongs to another base: part {part} of {name} has {len(up)} outputs")
            rows[start : start + len(up)] = up
            up = rows
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1)
