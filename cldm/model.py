"""From yaml and weights to models: `create_model`, `load_state_dict`, and what opens trained ControlNets."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint import MODELS, read_metadata, read_trained, read_weights, repository_path
from ldm.util import instantiate_from_config, listing, read_yaml

UNET, CONTROL = "model.diffusion_model.", "control_model."
FIRST = "input_blocks.0.0.weight"  # of both
SMALL = "the small model that comes along"
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 16: SMALL}


def read_config(path: str | Path) -> dict:
    """The `model` part of a yaml file as plain dictionaries.

    Raises FileNotFoundError, or ValueError if the file is no yaml or has no `model`.
    """
    path = repository_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model configuration not found: {path}")
    config = read_yaml(path)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} has no `model` entry")
    return config["model"]


class SkipInit(TorchFunctionMode):
    """Leaves parameters as they were allocated: for models whose every weight is read from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


def create_model(config_path: str | Path) -> nn.Module:
    """Build the model that a yaml file describes, on the CPU, with fresh weights."""
    return instantiate_from_config(read_config(config_path))


def create_filled_model(config: Mapping, weights: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """Build the model of `config` with `weights`, which must have its tensors (see `check_weights`)."""
    with torch.device("meta"):  # a file that does not fit is found before memory is taken
        check_weights(instantiate_from_config(config).state_dict(), weights, source)
    with SkipInit():
        model = instantiate_from_config(config)
    own = model.state_dict()
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return model


def load_state_dict(path: str | Path, location: str = "cpu") -> dict[str, Tensor]:
    """State dict of a .safetensors, .ckpt or .pth file (see ldm.checkpoint.read_weights)."""
    return read_weights(path, location)


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError that names `source` and what is missing or has another shape than in `own`.

    `position_ids` and the schedule's tables may be missing: they follow from the configuration. Tensors of
    other names are passed over.
    """
    needed = [name for name in own if "." in name and not name.endswith("position_ids")]
    missing = [name for name in needed if name not in weights]
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or shapes:
        problem = f"misses {listing(missing)}" if missing else f"has other shapes: {listing(shapes)}"
        found, wanted = family(weights), family(own)
        families = f" (the file is {found}, the model is {wanted})" if found != wanted else ""
        raise ValueError(f"{source} does not fit this model{families}: it {problem}")


def family(weights: Mapping[str, Tensor]) -> str:
    """What a state dict is, judged by its keys and shapes."""
    telling = {"double_blocks.": "FLUX", "down_blocks.": "a diffusers file", "lora_": "a LoRA"}
    telling["conditioner."] = "Stable Diffusion XL"
    for part, name in telling.items():
        if any(part in key for key in weights):
            return name
    context = next((v.shape[1] for k, v in weights.items() if k.endswith("attn2.to_k.weight")), None)
    if context is None:
        return "of an unknown kind"
    kind = FAMILIES.get(context, f"a latent diffusion model with context_dim {context}")
    control = any(name.startswith(CONTROL) for name in weights)
    if any(name.startswith(UNET) for name in weights):
        return f"{kind} with a ControlNet" if control else kind
    return f"a ControlNet for {kind}"


def add_control(
    weights: Mapping[str, Tensor], config: Mapping, source: str | Path
) -> tuple[dict[str, Tensor], Counter, dict[str, list[str]]]:
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
    for name in target:
        twin = UNET + name.removeprefix(CONTROL)
        if name in weights:
            result[name], kind = weights[name], "kept"
        elif name.startswith(CONTROL) and twin in weights:
            result[name], kind = weights[twin].clone(), "copied"
        else:
            fresh = fresh or fresh_weights(config)
            result[name], kind = fresh[name], "added"
            names["added"].append(name)
        counts[kind] += 1
    check_weights(target, result, source)
    names["ignored"] = [name for name in weights if name not in target]
    counts["ignored"] = len(names["ignored"])
    return result, counts, names


def check_fit(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str | Path) -> None:
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


def fresh_weights(config: Mapping) -> dict[str, Tensor]:
    """A new ControlLDM's tensors: its ControlNet initialised, its schedule and position_ids computed.

    The rest, which comes from the file, is left unset.
    """
    with SkipInit():
        fresh = instantiate_from_config(config).state_dict()
    control = instantiate_from_config(config["params"]["control_stage_config"]).state_dict()
    return {**fresh, **{CONTROL + name: value for name, value in control.items()}}


def widen_input(weights: Mapping[str, Tensor], name: str, channels: int) -> dict[str, Tensor]:
    """A state dict whose convolution `name` takes at least `channels`: the new ones have weight zero.

    Weights of something else stay as they are.
    """
    if name not in weights or weights[name].ndim != 4 or weights[name].shape[1] >= channels:
        return dict(weights)
    missing = channels - weights[name].shape[1]
    return {**weights, name: F.pad(weights[name], (0, 0, 0, 0, 0, missing))}


def hint_latent_channels(weights: Mapping[str, Tensor], config: Mapping | None = None) -> int:
    """How many channels of the hint's latent a ControlNet takes beside x, judged by the UNet's in the same
    state dict, or by the configuration it was trained with; 0 if neither is there."""
    if config:
        return config["params"]["control_stage_config"]["params"].get("hint_latent_channels", 0)
    if not {CONTROL + FIRST, UNET + FIRST} <= weights.keys():
        return 0
    return weights[CONTROL + FIRST].shape[1] - weights[UNET + FIRST].shape[1]


def with_hint_latent(config: Mapping, channels: int) -> dict:
    """The configuration of a ControlLDM whose ControlNet takes so many channels of the hint's latent."""
    params = config["params"]
    stage = params["control_stage_config"]
    stage = {**stage, "params": {**stage["params"], "hint_latent_channels": channels}}
    return {**config, "params": {**params, "control_stage_config": stage}}


def read_control(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """`ldm.checkpoint.read_trained`, with the `base` that the metadata of a .safetensors file name; a
    ControlNet's bare names get their prefix, `control_model.`"""
    weights, content = read_trained(path)
    if Path(path).suffix == ".safetensors":
        content["base"] = read_metadata(path).get("base")
    if any(name.startswith(("zero_convs.", "input_hint_block.")) for name in weights):
        weights = {CONTROL + name: value for name, value in weights.items()}
    return weights, content


def wanted_base(
    weights: Mapping[str, Tensor], content: Mapping, path: str | Path, base_path: str | Path | None
) -> Path | None:
    """The Stable Diffusion file that a ControlNet read by `read_control` from `path` is put on: `base_path`,
    else the one that it names; None if it is whole. Raises ValueError if it needs one and there is none."""
    if any(name.startswith(UNET + "input_blocks.") for name in weights):
        return None
    base_path = base_path or content.get("base")
    if base_path is None:
        raise ValueError(f"{path} is a ControlNet alone: give its Stable Diffusion file as --base_path")
    return repository_path(base_path)


def open_control_model(
    path: str | Path, base_path: str | Path | None = None, config_path: str | Path | None = None
) -> nn.Module:
    """A ControlLDM, ready to sample, from any of three kinds of file:

    - a checkpoint of our training scripts, which names its own base file and configuration;
    - a full file in lllyasviel's layout (UNet, ControlNet, autoencoder, text tower);
    - a ControlNet alone (`control_model.*`, or these keys bare), with `base_path`, a Stable Diffusion file.
    `base_path` and `config_path` win over what a checkpoint names.
    Raises FileNotFoundError or ValueError that says what is missing.
    """
    weights, content = read_control(path)
    config = content.get("config")
    if not any(name.startswith(CONTROL) for name in weights):
        raise ValueError(f"{path} holds no ControlNet: it is {family(weights)}")
    base_path = wanted_base(weights, content, path, base_path)
    if base_path is not None:
        weights, path = {**read_weights(base_path), **weights}, f"{path} on {base_path}"
    if config_path is not None or config is None:
        config = read_config(config_path or config_for(weights, path))
    if any(".hint_attention." in name for name in weights):
        config = {**config, "target": "cldm.deblur.DeblurControlNetWithAttention"}
    if hint_latent_channels(weights) > 0:
        config = with_hint_latent(config, hint_latent_channels(weights))
    model = create_filled_model(config, weights, path).eval()
    model.prompt = content["settings"].get("prompt", "")
    return model


def config_for(weights: Mapping[str, Tensor], path: str | Path) -> Path:
    """The yaml in models/ that fits a state dict; raises ValueError if none does.

    Stable Diffusion 2.1's two variants look alike: the 512-px one is taken.
    """
    configs = {"Stable Diffusion 1": "cldm_v15.yaml", "Stable Diffusion 2": "cldm_v21.yaml"}
    configs[SMALL] = "small_diffusion.yaml"
    kind = family(weights).removesuffix(" with a ControlNet")
    if kind not in configs:
        raise ValueError(f"{path} is {kind}: give the yaml configuration that fits it")
    return MODELS / configs[kind]
