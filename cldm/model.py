"""Building models from yaml and filling them: `model.load_state_dict(load_state_dict(path))` and stricter ways."""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import read_weights
from ldm.util import instantiate_from_config

SHOWN = 6  # how many names an error lists


def read_config(path: str | Path) -> dict:
    """The `model` part of a yaml file as plain dictionaries.

    Raises FileNotFoundError, or ValueError if the file is no yaml or has no `model`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model configuration not found: {path}")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml and omegaconf raise their own families of errors
        raise ValueError(f"{path} is not a yaml configuration: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} has no `model` entry")
    return config["model"]


def create_model(config_path: str | Path, **overrides) -> nn.Module:
    """Build the model that a yaml file describes, on the CPU; `overrides` replace its parameters."""
    return instantiate_from_config(read_config(config_path), **overrides)


def load_state_dict(path: str | Path, location: str = "cpu") -> dict[str, torch.Tensor]:
    """State dict of a .safetensors, .ckpt or .pth file (see ldm.checkpoint.read_weights)."""
    return read_weights(path, location)


def fill_model(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Load `weights` into `model`; every parameter must be there, `position_ids` and extra tensors need not.

    Raises ValueError that names `source` and what is missing or has another shape.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("position_ids")]
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or shapes:
        hint = diagnose(own, weights)
        problem = f"misses {listing(missing)}" if missing else f"has other shapes: {listing(shapes)}"
        raise ValueError(f"{source} does not fit this model{hint}: it {problem}")
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)


def listing(names: list[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def family(weights: Mapping[str, torch.Tensor]) -> str:
    """What a state dict is, judged by its keys and shapes; "" if it is nothing known here."""
    context = next((v.shape[1] for k, v in weights.items() if k.endswith("attn2.to_k.weight")), None)
    kinds = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
    if any(name.startswith(("double_blocks.", "model.diffusion_model.double_blocks.")) for name in weights):
        return "FLUX"
    if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in weights):
        return "a diffusers UNet or ControlNet folder's file"
    if any("lora_" in name for name in weights):
        return "a LoRA"
    if context is None:
        return ""
    kind = kinds.get(context, f"a latent diffusion model with context_dim {context}")
    with_control = any(name.startswith("control_model.") for name in weights)
    with_unet = any(name.startswith("model.diffusion_model.") for name in weights)
    if with_control and with_unet:
        return f"{kind} with a ControlNet"
    return kind if with_unet else f"a ControlNet for {kind}"


def diagnose(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """For an error: which family the file and the model are of, if they differ; else ""."""
    found, wanted = family(weights), family(own)
    return f" (the file is {found or 'of an unknown kind'}, the model is {wanted})" if found != wanted else ""
