"""The model folder of FLUX.1 Kontext [dev]: transformer, autoencoder and two text encoders, read from disk.

Weights are memory-mapped and go straight into place: nothing is initialised first, nothing is copied twice.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.checkpoint import read_weights, write_weights
from ldm.data.image import to_tensor, to_uint8
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.modules import CLIPTextModel, tokenize
from ldm.modules.flux import Flux, FluxParams, sample, schedule

TRANSFORMER = "flux1-kontext-dev.safetensors"
AUTOENCODER = "ae.safetensors"
TEXT_FILES = (
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model*.safetensors",
    "tokenizer_2/tokenizer.json",
)
T5_LENGTH = 512
AUTOENCODER_CONFIG = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16}


def check_folder(folder: str | Path, files: Iterable[str]) -> Path:
    """The folder as a Path. Raises FileNotFoundError that lists every expected file and which are there."""
    folder, files = Path(folder), list(files)
    found = {name: any(folder.glob(name)) for name in files}
    if not all(found.values()):
        listing = "; ".join(f"{name} {'found' if found[name] else 'MISSING'}" for name in files)
        raise FileNotFoundError(
            f"the model folder {folder} is not complete: {listing}. Expected is a download of "
            "black-forest-labs/FLUX.1-Kontext-dev (see docs/kontext.md)"
        )
    return folder


class FluxAutoencoder(AutoencoderKL):
    """Image (b, 3, 8h, 8w) in [-1, 1] <-> latent (b, 16, h, w) of about unit variance."""

    scale_factor, shift_factor = 0.3611, 0.1159

    def __init__(self, config: dict | None = None):
        super().__init__(config or AUTOENCODER_CONFIG, use_quant_conv=False)

    def encode(self, image: Tensor) -> Tensor:
        """The mode of the posterior, shifted and scaled."""
        return self.scale_factor * (super().encode(image).mode() - self.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        return super().decode(latent / self.scale_factor + self.shift_factor)


class Fp8Matmul(torch.autograd.Function):
    """x @ weight.T for an 8-bit weight that is widened when it is used, and again for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None


class Fp8Linear(nn.Module):
    """A frozen linear layer in float8 e4m3 with one scale per output row, computed in the input's dtype.

    The scales are powers of two: widening to bfloat16 and scaling are exact, only the storage rounds.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(out_features))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = Fp8Matmul.apply(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> float8 e4m3 (out, in) and float32 scale (out,) with weight = float8 * scale, nearly."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    largest = weight.abs().amax(dim=1).float().clamp(min=1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(largest / limit)))
    return (weight.float() / scale[:, None]).clamp(-limit, limit).to(torch.float8_e4m3fn), scale


def load_flux(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> Flux:
    """A frozen transformer from a file; with `fp8` the linears of its blocks are stored in 8 bits.

    Sizes are Kontext's unless the file's metadata holds "flux_params" (see `save_flux`). `progress` may wrap
    the list of names in a progress bar. Raises FileNotFoundError, ValueError for a damaged or foreign file.
    """
    weights = read_weights(path)
    with safe_open(path, framework="pt") as file:
        sizes = json.loads((file.metadata() or {}).get("flux_params", "{}"))
    with torch.device("meta"):
        model = Flux(FluxParams(**sizes))
        check_weights(model, weights, path)
        eight_bit = _store_blocks_in_fp8(model) if fp8 else set()
    state = {}
    for name in progress(list(weights)):
        value = weights.pop(name).to(device)
        if name in eight_bit:
            state[name], state[f"{name}_scale"] = quantize(value)
        else:
            state[name] = value.to(dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _store_blocks_in_fp8(model: Flux) -> set[str]:
    names = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "_blocks." in name:
            parent, _, child = name.rpartition(".")
            replacement = Fp8Linear(module.in_features, module.out_features, module.bias is not None)
            setattr(model.get_submodule(parent), child, replacement)
            names.add(f"{name}.weight")
    return names


def check_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError that names the file if names or shapes differ from the model's."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not expected" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(value.shape)}, expected {expected[name]}"
        for name, value in weights.items()
        if name in expected and tuple(value.shape) != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}")


def save_flux(path: str | Path, model: Flux) -> None:
    """Write a transformer whose sizes `load_flux` then reads from the file."""
    write_weights(path, model.state_dict(), {"flux_params": json.dumps(vars(model.params))})


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> FluxAutoencoder:
    """The frozen autoencoder in float32, of the usual sizes unless the metadata holds "ddconfig"."""
    weights = read_weights(path)
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("ddconfig", "{}"))
    with torch.device("meta"):
        model = FluxAutoencoder(config)
    check_weights(model, weights, path)
    model.load_state_dict(
        {name: value.to(device, torch.float32) for name, value in weights.items()}, assign=True
    )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def encode_prompt(folder: str | Path, prompt: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The prompt as {"t5": (1, 512, 4096), "pooled": (1, 768)}, bfloat16 on the CPU.

    T5 sees the padding too (no attention mask), as in the original. The encoders are freed before it returns.
    """
    folder = check_folder(folder, TEXT_FILES)
    return {"t5": _encode_t5(folder, prompt, device), "pooled": _encode_clip(folder, prompt, device)}


def _encode_t5(folder: Path, prompt: str, device: str | torch.device) -> Tensor:
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(T5_LENGTH)
    words = tokenizer.encode(prompt).ids
    ids = torch.tensor([words + [0] * (T5_LENGTH - len(words))])  # (1, 512)
    try:
        model = T5EncoderModel.from_pretrained(
            folder / "text_encoder_2", dtype=torch.bfloat16, local_files_only=True
        )
    except SafetensorError as error:
        raise ValueError(f"a file in {folder / 'text_encoder_2'} is damaged: {error}") from error
    return model.to(device)(ids.to(device)).last_hidden_state.bfloat16().cpu()


def _encode_clip(folder: Path, prompt: str, device: str | torch.device) -> Tensor:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    model = CLIPTextModel(
        width=config["hidden_size"],
        hidden=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
    )
    path = folder / "text_encoder" / "model.safetensors"
    position_ids = {
        name: value for name, value in model.state_dict().items() if name.endswith("position_ids")
    }
    weights = {**position_ids, **read_weights(path)}
    check_weights(model, weights, path)
    model.load_state_dict(weights)
    return model.to(device).float()(tokenize([prompt]).to(device))[1].bfloat16().cpu()


def cached_prompt(
    cache: str | Path, folder: str | Path, prompt: str, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """What `encode_prompt` returns, from the file `cache` if that is of the same prompt, else put into it."""
    if Path(cache).is_file():
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("prompt") == prompt:
                return read_weights(cache)
    embeddings = encode_prompt(folder, prompt, device)
    write_weights(cache, embeddings, {"prompt": prompt})
    return embeddings


@torch.no_grad()
def restore_image(
    model: Callable,
    autoencoder: FluxAutoencoder,
    prompt: dict[str, Tensor],
    image: np.ndarray,
    steps: int = 30,
    guidance: float = 2.5,
    resolution: int = 1024,
    seed: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """Restore a uint8 picture (h, w, 3) of any size: the same size comes back, aligned to the pixel.

    Pictures of more than resolution^2 pixels are restored at that many and scaled back. The sides are made
    multiples of 16 by reflection, which is cut off again: nothing is stretched and nothing is lost.
    """
    height, width = image.shape[:2]
    scale = min(1.0, resolution / math.sqrt(height * width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA) if (h, w) != (height, width) else image
    padded = cv2.copyMakeBorder(small, 0, -h % 16, 0, -w % 16, cv2.BORDER_REFLECT)
    device = prompt["t5"].device
    control = autoencoder.encode(to_tensor(padded)[None].to(device))  # (1, 16, h / 8, w / 8)
    noise = torch.randn(control.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    timesteps = schedule(steps, control.shape[-2] * control.shape[-1] // 4)
    latent = sample(model, noise, control, prompt["t5"], prompt["pooled"], timesteps, guidance, progress)
    restored = to_uint8(autoencoder.decode(latent)[0])[:h, :w]
    if (h, w) == (height, width):
        return restored
    return cv2.resize(restored, (width, height), interpolation=cv2.INTER_CUBIC)
