"""Models from yaml and weights: `create_model`, `load_state_dict`, and opening trained ControlNets."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint import MODELS, check_fit, read_metadata, read_trained, read_weights, repository_path
from ldm.holes import CoarseFill
from ldm.util import instantiate_from_config, listing, read_yaml

UNET, CONTROL = "model.diffusion_model.", "control_model."
FIRST = "input_blocks.0.0.weight"  # first convolution of UNet and ControlNet
HINT = CONTROL + "input_hint_block.0.weight"  # first convolution of the hint
SD1, SD2, SMALL = "Stable Diffusion 1", "Stable Diffusion 2", "the included small model"
FAMILIES = {768: SD1, 1024: SD2, 2048: "Stable Diffusion XL", 16: SMALL}  # by context_dim
CONFIGS = {SD1: "cldm_v15.yaml", SD2: "cldm_v21.yaml", SMALL: "small_diffusion.yaml"}
BASES = {SD1: "v1-5-pruned-emaonly.safetensors", SD2: "v2-1_512-ema-pruned.safetensors"}  # for example
ON, WITH = "a ControlNet for ", " with a ControlNet"  # before and after the name of a family
OTHER_FILES = {  # by a part of their tensors' names
    "double_blocks.": "FLUX",
    "down_blocks.": "a diffusers file",
    "lora_": "a LoRA",
    "conditioner.": "Stable Diffusion XL",
}


# ---- models from yaml --------------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict:
    """Read the `model` part of a yaml file as plain dictionaries.

    Raises FileNotFoundError, or ValueError if the file is not yaml or has no `model`.
    """
    path = repository_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model configuration not found: {path}")
    config = read_yaml(path)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} has no `model` entry")
    return config["model"]


class SkipInit(TorchFunctionMode):
    """Context that skips the random initialisation of new parameters: their values come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


def create_model(config_path: str | Path) -> nn.Module:
    """Build the model that a yaml file describes, on the CPU, with fresh weights."""
    return instantiate_from_config(read_config(config_path))


def create_filled_model(config: Mapping, weights: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """Build the model of `config` with `weights`, which must fit it (see `check_weights`)."""
    with torch.device("meta"):  # weights that do not fit raise before memory is allocated
        check_weights(instantiate_from_config(config).state_dict(), weights, source)
    with SkipInit():
        model = instantiate_from_config(config)
    own = model.state_dict()
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return model


# ---- weights -----------------------------------------------------------------------------------------------


def load_state_dict(path: str | Path, location: str = "cpu") -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .ckpt or .pth file (see ldm.checkpoint.read_weights)."""
    return read_weights(path, location)


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError that names `source` and the tensors that do not fit the state dict `own` of a model.

    `position_ids` and the schedule's tables may be missing: they follow from the configuration. Tensors with
    unknown names are ignored, unless they belong to a ControlNet.
    """
    needed = {name for name in own if "." in name and not name.endswith("position_ids")}
    wanted = {name: value for name, value in own.items() if name in needed or name in weights}
    given = {name: value for name, value in weights.items() if name in own or name.startswith(CONTROL)}
    model, found, right = "this model", family(weights), family(own)
    if found != right:
        model += f" (the file is {found}, the model is {right})"
    check_fit(wanted, given, source, model)


def family(weights: Mapping[str, Tensor]) -> str:
    """Return the name of a state dict's model family, recognised from its keys and shapes."""
    for part, name in OTHER_FILES.items():
        if any(part in key for key in weights):
            return name
    context = next((v.shape[1] for k, v in weights.items() if k.endswith("attn2.to_k.weight")), None)
    if context is None:
        return "of an unknown kind"
    kind = FAMILIES.get(context, f"a latent diffusion model with context_dim {context}")
    control = any(name.startswith(CONTROL) for name in weights)
    if any(name.startswith(UNET) for name in weights):
        return kind + WITH if control else kind
    return ON + kind


def config_for(weights: Mapping[str, Tensor], path: str | Path) -> Path:
    """Find the yaml in models/ that fits a state dict; raises ValueError if none does.

    The two variants of Stable Diffusion 2.1 cannot be told apart: the 512-pixel one is assumed.
    """
    kind = family(weights).removesuffix(WITH)
    if kind not in CONFIGS:
        raise ValueError(f"{path} is {kind}: give the yaml configuration that fits it")
    return MODELS / CONFIGS[kind]


def widen_input(weights: Mapping[str, Tensor], name: str, channels: int) -> dict[str, Tensor]:
    """Extend convolution `name` of a state dict to at least `channels` inputs; new ones have zero weight."""
    if name not in weights or weights[name].ndim != 4 or weights[name].shape[1] >= channels:
        return dict(weights)
    missing = channels - weights[name].shape[1]
    return {**weights, name: F.pad(weights[name], (0, 0, 0, 0, 0, missing))}


# ---- a ControlNet added to Stable Diffusion ----------------------------------------------------------------


def add_control(
    weights: Mapping[str, Tensor], config: Mapping, source: str | Path
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Make the state dict of the ControlLDM of `config` from Stable Diffusion's `weights`.

    Each ControlNet tensor is a copy of the UNet's tensor of the same name, or newly initialised if the UNet
    has none. Also returns the names of the tensors that were kept, copied, added and ignored.
    Raises ValueError if `weights` (from the file `source`) do not fit or already hold a ControlNet.
    """
    kind = family(weights)
    if any(name.startswith(CONTROL) for name in weights):
        raise ValueError(f"{source} is {kind}: it has a ControlNet already ({CONTROL}*)")
    if not any(name.startswith(UNET + "input_blocks.") for name in weights):
        raise ValueError(
            f"{source} is {kind}, not a Stable Diffusion 1.5 or 2.1 file: it lacks {UNET}input_blocks.*; "
            f"it begins with {listing(sorted(weights))}"
        )
    with torch.device("meta"):
        target = instantiate_from_config(config).state_dict()
    check_weights({k: v for k, v in target.items() if not k.startswith(CONTROL)}, weights, source)

    fresh = fresh_weights(config)
    result: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {"kept": [], "copied": [], "added": []}
    for name in target:
        twin = UNET + name.removeprefix(CONTROL)
        if name in weights:
            kind, value = "kept", weights[name]
        elif name.startswith(CONTROL) and twin in weights:
            kind, value = "copied", weights[twin].clone()
        else:
            kind, value = "added", fresh[name]
        result[name] = value
        names[kind].append(name)
    names["ignored"] = [name for name in weights if name not in target]
    check_weights(target, result, source)
    return result, names


def fresh_weights(config: Mapping) -> dict[str, Tensor]:
    """Return the state dict of a new ControlLDM: ControlNet initialised, schedule and position_ids computed.

    All other tensors are uninitialised: their values come from a file.
    """
    with SkipInit():
        fresh = instantiate_from_config(config).state_dict()
    control = instantiate_from_config(config["params"]["control_stage_config"]).state_dict()
    return {**fresh, **{CONTROL + name: value for name, value in control.items()}}


# ---- the channels of a ControlNet's hint -------------------------------------------------------------------


def hint_latent_channels(weights: Mapping[str, Tensor], config: Mapping | None = None) -> int:
    """Return the number of channels of the hint's latent that a ControlNet takes in addition to x.

    Read from its configuration, else from the input widths of ControlNet and UNet in the state dict; else 0.
    """
    if config:
        return config["params"]["control_stage_config"]["params"].get("hint_latent_channels", 0)
    if not {CONTROL + FIRST, UNET + FIRST} <= weights.keys():
        return 0
    return weights[CONTROL + FIRST].shape[1] - weights[UNET + FIRST].shape[1]


def with_hint(config: Mapping, **channels: int) -> dict:
    """Return a copy of `config` with the ControlNet's `hint_channels` or `hint_latent_channels` replaced."""
    params = config["params"]
    stage = params["control_stage_config"]
    stage = {**stage, "params": {**stage["params"], **channels}}
    return {**config, "params": {**params, "control_stage_config": stage}}


def add_hint_latent(config: Mapping, weights: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Extend a ControlLDM's configuration and state dict: its ControlNet then also takes the hint's latent.

    The new input channels have zero weight: the model's output does not change.
    """
    params = config["params"]
    channels = params["first_stage_config"]["params"]["embed_dim"]
    own = params["control_stage_config"]["params"]["in_channels"]
    config = with_hint(config, hint_latent_channels=channels)
    return config, widen_input(weights, CONTROL + FIRST, own + channels)


# ---- trained ControlNets -----------------------------------------------------------------------------------


def read_control(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read a trained ControlNet like `ldm.checkpoint.read_trained`, with its prefix on every name.

    The second result also holds the `base` that the metadata of a .safetensors file name. Raises ValueError
    also if the file holds no ControlNet.
    """
    weights, content = read_trained(path)
    if Path(path).suffix == ".safetensors":
        content["base"] = read_metadata(path).get("base")
    if any(name.startswith(("zero_convs.", "input_hint_block.")) for name in weights):
        weights = {CONTROL + name: value for name, value in weights.items()}
    if CONTROL + "zero_convs.0.0.weight" not in weights:
        raise ValueError(f"{path} holds no ControlNet (names {CONTROL}*): it is {family(weights)}")
    return weights, content


def wanted_base(
    weights: Mapping[str, Tensor], content: Mapping, path: str | Path, base_path: str | Path | None
) -> Path | None:
    """Find the Stable Diffusion file that a ControlNet read by `read_control` from `path` needs.

    It is `base_path`, else the one that the file names; None if the file holds a UNet itself.
    Raises ValueError if neither is given.
    """
    if any(name.startswith(UNET + "input_blocks.") for name in weights):
        return None
    base_path = base_path or content.get("base")
    if base_path is None:
        kind = family(weights).removeprefix(ON)
        raise ValueError(
            f"{path} is a ControlNet alone: its base_path is missing, a whole file of {kind} "
            f"({BASES.get(kind, 'with its UNet')}; docs/models.md)"
        )
    return repository_path(base_path)


def open_control_model(
    path: str | Path, base_path: str | Path | None = None, config_path: str | Path | None = None
) -> nn.Module:
    """Open a ControlLDM, ready to sample, from any of three kinds of file:

    - a checkpoint of our training scripts, which names its own base file and configuration;
    - a full file in lllyasviel's layout (UNet, ControlNet, autoencoder, text tower);
    - a ControlNet alone (keys with or without `control_model.`), with a Stable Diffusion file `base_path`.

    `base_path` and `config_path` take precedence over those of a checkpoint.
    Raises FileNotFoundError or ValueError that says what is missing, or that the base is of another family.
    """
    weights, content = read_control(path)
    config = content.get("config")
    base_path = wanted_base(weights, content, path, base_path)
    if base_path is not None:
        base = read_weights(base_path)
        needed, given = family(weights).removeprefix(ON).removesuffix(WITH), family(base).removesuffix(WITH)
        if needed != given:
            raise ValueError(f"{path} needs a base_path that is {needed}: {base_path} is {given}")
        weights, path = {**base, **weights}, f"{path} on {base_path}"
    if config_path is not None or config is None:
        config = read_config(config_path or config_for(weights, path))
        channels = {"hint_channels": weights[HINT].shape[1]}
        config = with_hint(config, **channels, hint_latent_channels=hint_latent_channels(weights))
    model = create_filled_model(config, weights, path).eval()
    model.prompt = content["settings"].get("prompt", "")
    model.coarse_fill = content["settings"].get("coarse_fill", "none")
    if model.coarse_fill not in get_args(CoarseFill):
        raise ValueError(f"{path}: coarse_fill must be one of {listing(get_args(CoarseFill))}")
    return model
