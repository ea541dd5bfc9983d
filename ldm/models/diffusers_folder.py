"""Read FLUX's networks from the folders of diffusers: `transformer/` and `vae/` of a download.

Their tensors have other names, and fused linear layers are stored in parts. Tensors are memory-mapped; parts
are joined one tensor at a time.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import check_fit
from ldm.models.prompts import naming, read_config
from ldm.modules.flux import FluxParams

# Modules of a block: the original's name -> diffusers' names (for a fused linear its parts, in order).
DOUBLE_BLOCK = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE_BLOCK = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
    "linear2": ["proj_out"],
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE_BLOCK),
    "single_blocks": ("single_transformer_blocks", SINGLE_BLOCK),
}
NOT_IN_BLOCKS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
# Parts of the autoencoder's tensor names, replaced in this order; the decoder's levels are also reversed.
AUTOENCODER_NAMES = {
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    "mid.attn_1.": "mid_block.attentions.0.to_",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    ".down.": ".down_blocks.",
    ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm_out.": ".conv_norm_out.",
}
# Values in the autoencoder's config.json that the code assumes.
AUTOENCODER_FACTS = {
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "in_channels": 3,
    "out_channels": 3,
    "norm_num_groups": 32,
}
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


class Joined:
    """Tensor stored in parts along its first dimension, which are joined by `to`."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def to(self, device: str | torch.device) -> Tensor:
        return torch.cat([part.to(device) for part in self.parts])


# ---- files -------------------------------------------------------------------------------------------------


def list_weights(folder: Path) -> list[str]:
    """List the names of a network's weight files: those in its index, or the single one.

    For shards without an index the missing index is listed. Raises ValueError if the index is damaged.
    """
    if not (folder / INDEX).is_file():
        return [INDEX] if any(folder.glob(f"{Path(FILE).stem}-*")) else [FILE]
    with naming(folder / INDEX):
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted({Path(name).name for name in index["weight_map"].values()})


def read_folder(folder: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read the tensors of all files of a network, each file with `read`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    tensors = {}
    for name in list_weights(folder):
        tensors |= read(folder / name)
    return tensors


def read_sizes(folder: Path, kind: str) -> dict[str, Any]:
    """Read a network's config.json. Raises ValueError if it is damaged or not of diffusers' class `kind`."""
    with naming(folder / "config.json"):
        config = read_config(folder)
    if config.get("_class_name") != kind:
        raise ValueError(f"{folder / 'config.json'} is of {config.get('_class_name')}, not of {kind}")
    return config


# ---- transformer -------------------------------------------------------------------------------------------


def flux_params(folder: Path) -> FluxParams:
    """Read the sizes in the config.json of `transformer/`; missing ones default to Kontext's.

    Raises ValueError for a config.json that is damaged or of another network.
    """
    config = read_sizes(folder, "FluxTransformer2DModel")
    names = {
        "in_channels": "in_channels",
        "vec_in_dim": "pooled_projection_dim",
        "context_in_dim": "joint_attention_dim",
        "num_heads": "num_attention_heads",
        "depth": "num_layers",
        "depth_single_blocks": "num_single_layers",
    }
    default = FluxParams()
    with naming(folder / "config.json"):
        sizes = {ours: int(config.get(theirs, getattr(default, ours))) for ours, theirs in names.items()}
        if min(sizes.values()) < 1:
            raise ValueError(f"its sizes must be positive, not {min(sizes.values())}")
        head = int(config.get("attention_head_dim", sum(default.axes_dim)))
        return FluxParams(
            **sizes,
            out_channels=sizes["in_channels"],
            hidden_size=sizes["num_heads"] * head,
            axes_dim=tuple(map(int, config.get("axes_dims_rope", default.axes_dim))),
            guidance_embed=bool(config.get("guidance_embeds", default.guidance_embed)),
        )


def flux_sources(name: str) -> list[str]:
    """Return the names in `transformer/` of the tensors that make up the original's tensor `name`."""
    module, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if "_blocks." not in module:
        return [f"{NOT_IN_BLOCKS[module]}.{kind}"]
    block, number, part = module.split(".", 2)
    theirs, modules = BLOCKS[block]
    return [f"{theirs}.{number}.{source}.{kind}" for source in modules[part]]


def flux_weights(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor | Joined]:
    """Return the tensors of `transformer/` under the names of a Flux's state dict `own`.

    Raises ValueError, with diffusers' names, if they do not fit.
    """
    width = len(own["img_in.weight"])
    wanted = {}
    for name, value in own.items():
        sources = flux_sources(name)
        if len(sources) == 1:
            wanted[sources[0]] = value
        else:  # q, k, v, and in a single block the MLP
            parts = value.split([width] * 3 + [len(value) - 3 * width] * (len(sources) - 3))
            wanted |= zip(sources, parts, strict=True)
    check_fit(wanted, tensors, folder, "Flux")
    weights = {}
    for name in own:
        parts = [tensors[source] for source in flux_sources(name)]
        if name.startswith("final_layer.adaLN_modulation"):  # theirs: scale, shift; ours: shift, scale
            parts = parts[0].chunk(2)[::-1]
        weights[name] = Joined(parts) if len(parts) > 1 else parts[0]
    return weights


# ---- autoencoder -------------------------------------------------------------------------------------------


def autoencoder_sizes(folder: Path) -> dict[str, Any]:
    """Read the arguments of Encoder and Decoder from the config.json of `vae/`.

    Raises ValueError if it is damaged, of another network, or of latents other than FLUX's.
    """
    config, path = read_sizes(folder, "AutoencoderKL"), folder / "config.json"
    for name, value in AUTOENCODER_FACTS.items():
        if config.get(name) != value:
            raise ValueError(f"{path}: {name} must be {value}, not {config.get(name)}")
    with naming(path):
        widths = [int(width) for width in config["block_out_channels"]]
        first = widths[0]
        if len(widths) != 4 or any(width % first for width in widths):  # a latent pixel is 8 x 8 pixels
            raise ValueError(f"block_out_channels must be 4 multiples of the first, not {widths}")
        return {
            "ch": first,
            "ch_mult": [width // first for width in widths],
            "num_res_blocks": int(config["layers_per_block"]),
            "z_channels": int(config["latent_channels"]),
        }


def autoencoder_weights(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors of `vae/` under the names of a FluxAutoencoder's state dict `own`.

    Raises ValueError, with diffusers' names, if they do not fit.
    """
    levels = len({name.split(".")[2] for name in own if name.startswith("decoder.up.")})
    sources, wanted = {}, {}
    for name, value in own.items():
        source = name
        for ours, theirs in AUTOENCODER_NAMES.items():
            source = source.replace(ours, theirs)
        source = re.sub(r"\.up\.(\d)", lambda level: f".up_blocks.{levels - 1 - int(level[1])}", source)
        sources[name] = source
        is_linear = "attentions" in source and value.ndim == 4  # ours are 1x1 convolutions
        wanted[source] = value[..., 0, 0] if is_linear else value
    check_fit(wanted, tensors, folder, "FluxAutoencoder")
    return {name: tensors[source].view(own[name].shape) for name, source in sources.items()}
