"""Load the transformer and autoencoder of FLUX.1 Kontext [dev] from its model folder.

Weights are memory-mapped and assigned directly: networks are not initialised first, nothing is copied twice.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import check_fit, read_metadata, read_settings, read_weights, write_weights
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_folder import (
    Joined,
    autoencoder_sizes,
    autoencoder_weights,
    flux_params,
    flux_weights,
    list_weights,
    read_folder,
)
from ldm.models.diffusion.flow import restore_image
from ldm.models.prompts import cached_prompt, check_folder, prompt_file
from ldm.modules.flux import Flux, FluxParams
from ldm.modules.fp8 import quantize, store_in_fp8
from ldm.modules.lora import block_linears, load_lora, lora_file
from ldm.modules.swap import BlockSwap

TRANSFORMER = "flux1-kontext-dev.safetensors"
AUTOENCODER = "ae.safetensors"
FOLDERS = {TRANSFORMER: "transformer", AUTOENCODER: "vae"}  # of diffusers
AUTOENCODER_CONFIG = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16}


class FluxAutoencoder(AutoencoderKL):
    """Autoencoder: image (b, 3, 8h, 8w) in [-1, 1] <-> latent (b, 16, h, w) of about unit variance.

    `config` holds the arguments of Encoder and Decoder, by default FLUX's.
    """

    scale_factor, shift_factor = 0.3611, 0.1159

    def __init__(self, config: dict | None = None):
        config = dict(config or AUTOENCODER_CONFIG)
        super().__init__(config, use_quant_conv=False)
        self.config = config

    def encode(self, image: Tensor) -> Tensor:
        """Return the posterior's mode, shifted and scaled: float32, computed in the dtype of the weights."""
        mode = super().encode(image.to(self.encoder.conv_in.weight.dtype)).mode()
        return self.scale_factor * (mode.float() - self.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image of a latent: float32, computed in the dtype of the weights."""
        latent = latent / self.scale_factor + self.shift_factor
        return super().decode(latent.to(self.decoder.conv_in.weight.dtype)).float()


def own_dtype(device: str | torch.device) -> torch.dtype:
    """Return the dtype that FLUX computes in: bfloat16 on CUDA (float16 overflows), float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def find_network(folder: str | Path, file: str) -> Path:
    """Find TRANSFORMER or AUTOENCODER in a model folder: the file, or diffusers' folder if only that exists.

    If neither exists, the path of the missing file is returned.
    """
    path, theirs = Path(folder) / file, Path(folder) / FOLDERS[file]
    return theirs if (theirs / "config.json").is_file() and not path.is_file() else path


def check_networks(folder: str | Path) -> Path:
    """Return a model folder as a Path. Raises FileNotFoundError that lists which of its files are missing."""
    files = []
    for file in (TRANSFORMER, AUTOENCODER):
        path = find_network(folder, file)
        files += [f"{path.name}/{name}" for name in list_weights(path)] if path.is_dir() else [file]
    return check_folder(folder, files)


def open_flux(path: Path, read: Callable | None = None) -> tuple[Flux, dict[str, Tensor | Joined]]:
    """Return a transformer on the meta device and its weights; `read` (read_weights) reads each file.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of another network.
    """
    read = read or read_weights
    if path.is_dir():
        with torch.device("meta"):
            model = Flux(flux_params(path))
        return model, flux_weights(model.state_dict(), read_folder(path, read), path)
    weights = read(path)
    with torch.device("meta"):
        model = Flux(FluxParams(**read_settings(path, "flux_params")))
    check_fit(model.state_dict(), weights, path, "Flux")
    return model, weights


def load_flux(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    progress: Callable[[list], Iterable] = iter,
    blocks_to_swap: int = 0,
) -> Flux:
    """Load a frozen transformer; with `fp8` the linears of its blocks are stored in 8 bits.

    `path` is a file or a diffusers folder; `dtype` defaults to `own_dtype`. Sizes come from the folder's
    config.json, or from "flux_params" in the file's metadata (see `save_flux`), by default Kontext's.
    `progress` may wrap the list of names in a progress bar. The last `blocks_to_swap` blocks are offloaded to
    (pinned) CPU memory and fetched when they run.
    Raises FileNotFoundError, or ValueError for a file that is damaged or of another network.
    """
    dtype = dtype or own_dtype(device)
    model, weights = open_flux(Path(path))
    with torch.device("meta"):
        eight_bit = store_in_fp8(model, block_linears(model)) if fp8 else {}
        if blocks_to_swap:
            model.swap = BlockSwap([*model.double_blocks, *model.single_blocks], blocks_to_swap)
    offloaded = model.swap.parameter_names(model) if model.swap else set()
    on_cuda = torch.device(device).type == "cuda"
    state = {}
    for name in progress(list(weights)):
        value = weights.pop(name).to(device)
        if name in eight_bit:
            state[name], eight_bit[name].scale = quantize(value)
        else:
            state[name] = value.to(dtype)
        if name in offloaded and on_cuda:
            state[name] = state[name].cpu().pin_memory()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def save_flux(path: str | Path, model: Flux, **facts: str) -> None:
    """Write a transformer with its sizes, for `load_flux`, and `facts` in the metadata."""
    write_weights(path, model.state_dict(), {"flux_params": json.dumps(vars(model.params)), **facts})


def open_autoencoder(path: Path, read: Callable | None = None) -> tuple[FluxAutoencoder, dict[str, Tensor]]:
    """Return an autoencoder on the meta device and its weights; arguments and errors as in `open_flux`."""
    read = read or read_weights
    if path.is_dir():
        with torch.device("meta"):
            model = FluxAutoencoder(autoencoder_sizes(path))
        return model, autoencoder_weights(model.state_dict(), read_folder(path, read), path)
    weights = read(path)
    with torch.device("meta"):
        model = FluxAutoencoder(read_settings(path, "ddconfig"))
    check_fit(model.state_dict(), weights, path, "FluxAutoencoder")
    return model, weights


def load_autoencoder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> FluxAutoencoder:
    """Load the frozen autoencoder from a file or diffusers' folder; `dtype` defaults to `own_dtype`.

    Sizes come from the folder's config.json, or from "ddconfig" in the file's metadata, by default FLUX's.
    Raises the same errors as `load_flux`.
    """
    dtype = dtype or own_dtype(device)
    model, weights = open_autoencoder(Path(path))
    model.load_state_dict({name: value.to(device, dtype) for name, value in weights.items()}, assign=True)
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def load_restorer(
    folder: str | Path,
    lora_path: str | Path | None = None,
    prompt: str = "",
    prompt_cache: str | Path = "prompt.safetensors",
    lora_scale: float = 1.0,
    device: str | torch.device = "cpu",
    **storage: Any,
) -> Callable[..., np.ndarray]:
    """Return `restore_image` with its model, autoencoder and prompt set from a model folder and a LoRA.

    The LoRA is a file or a run's folder. `prompt` defaults to the one in the LoRA's metadata; its embedding
    is read from the run's folder, or else from `prompt_cache`, which is written if needed. `storage` holds
    the options `fp8` and `blocks_to_swap` of `load_flux`. Raises FileNotFoundError if a file is missing, and
    ValueError if there is no prompt.
    """
    folder = check_networks(folder)
    if lora_path and not lora_file(lora_path).is_file():
        raise FileNotFoundError(f"LoRA not found: {lora_file(lora_path)}")
    prompt = prompt or lora_prompt(lora_path)
    runs = [Path(lora_path), *list(Path(lora_path).parents)[:2]] if lora_path else []
    kept = [path for path in (prompt_file(run, prompt) for run in runs) if path.is_file()]
    embeddings = cached_prompt(kept[0] if kept else prompt_cache, folder, prompt, device)
    embeddings = {name: value.to(device) for name, value in embeddings.items()}
    autoencoder = load_autoencoder(find_network(folder, AUTOENCODER), device)
    model = load_flux(
        find_network(folder, TRANSFORMER), device, progress=partial(tqdm, desc="loading"), **storage
    )
    if lora_path:
        load_lora(model, lora_path, lora_scale)
    return partial(restore_image, model, autoencoder, embeddings)


def lora_prompt(lora_path: str | Path | None) -> str:
    """Return the prompt that a LoRA was trained with. Raises ValueError if there is none."""
    if not lora_path:
        raise ValueError("a prompt is needed: there is no LoRA that could name one")
    path = lora_file(lora_path)
    prompt = read_metadata(path).get("prompt")
    if not prompt:
        raise ValueError(f"a prompt is needed: {path} names none; is it a LoRA of FLUX?")
    return prompt
