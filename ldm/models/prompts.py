"""Encode FLUX's prompts once with T5 and CLIP from the model folder, and cache them in a run's folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ldm.checkpoint import fill, read_metadata, read_weights, write_weights
from ldm.modules.encoders.modules import CLIPTextModel, tokenize

TEXT_FILES = (
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model*.safetensors",
    "tokenizer_2/tokenizer.json",
)
LARGEST = 10**6  # largest number accepted in a config.json
ROWS = 4  # prompts that T5 encodes at once


def check_folder(folder: str | Path, files: Iterable[str]) -> Path:
    """Return the folder as a Path. Raises FileNotFoundError that lists which expected files are missing."""
    folder = Path(folder)
    found = {name: any(folder.glob(name)) for name in files}
    if not all(found.values()):
        listing = "; ".join(f"{name} {'found' if there else 'MISSING'}" for name, there in found.items())
        raise FileNotFoundError(
            f"the model folder {folder} is not complete: {listing}. Expected is a download of "
            "black-forest-labs/FLUX.1-Kontext-dev (see docs/kontext.md)"
        )
    return folder


def encode_prompt(folder: str | Path, prompt: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Encode a prompt as {"t5": (1, 512, 4096), "pooled": (1, 768)}, bfloat16 on the CPU.

    T5's sizes and its number of tokens (n_positions) are those of its config.json. It also attends to padding
    (no attention mask), as in the original.
    """
    [embeddings] = encode_prompts(folder, [prompt], device)
    return embeddings


def encode_prompts(
    folder: str | Path, prompts: Sequence[str], device: str | torch.device = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Yield the encodings of several prompts in order, each like that of `encode_prompt`."""
    folder = check_folder(folder, TEXT_FILES)
    with naming(folder / "text_encoder"):
        pooled = _encode_clip(folder / "text_encoder", prompts, device)
    with naming(folder / "text_encoder_2"):
        t5, ids = _load_t5(folder, prompts)
    for number, states in enumerate(run_by_layers(t5, ids, device)):
        yield {"t5": states, "pooled": pooled[number]}


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Turn errors of any type (json, tokenizers, transformers) into a ValueError that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} is damaged or not complete: {reason[0]}") from error


@torch.no_grad()
def _load_t5(folder: Path, prompts: Sequence[str]) -> tuple[nn.Module, Tensor]:
    """Load T5 on the CPU, and return it with the token ids (prompts, 512). Raises errors of any type."""
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

    here = folder / "text_encoder_2"
    length = read_config(here).get("n_positions", 512)
    for path in sorted(here.glob("model*.safetensors")):
        read_metadata(path)  # transformers' own errors do not name the file
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    model, found = T5EncoderModel.from_pretrained(
        here, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{min(found['missing_keys'])} is missing")
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    if ids.max() >= model.config.vocab_size:
        raise ValueError("tokenizer_2/tokenizer.json is not of this T5, which knows fewer words")
    return model, ids


@torch.no_grad()
def _encode_clip(here: Path, prompts: Sequence[str], device: str | torch.device) -> list[Tensor]:
    """Return CLIP's pooled output (1, 768) of each prompt, bfloat16 on the CPU."""
    config = read_config(here)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = CLIPTextModel(*(config[name] for name in names))
    path = here / "model.safetensors"
    weights = read_weights(path)
    for name, value in model.state_dict().items():
        if name.endswith("position_ids"):  # not every file has them
            weights.setdefault(name, value)
    fill(model, weights, path).to(device).float()
    return [model(tokenize([prompt]).to(device))[1].bfloat16().cpu() for prompt in prompts]


def read_config(folder: Path) -> dict:
    """Read a network's config.json. Raises ValueError for numbers that would exhaust memory."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in config.items():
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{name} in config.json cannot be {value}")
    return config


class Fetched(nn.Module):
    """Layer that runs on `device` with a temporary copy of its weights."""

    def __init__(self, layer: nn.Module, device: str | torch.device):
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        weights = {name: value.to(self.device) for name, value in self.layer.named_parameters()}
        return functional_call(self.layer, weights, inputs, named)


@torch.no_grad()
def run_by_layers(model: nn.Module, ids: Tensor, device: str | torch.device) -> Iterator[Tensor]:
    """Yield the last hidden states of a T5, (1, tokens, dim) in bfloat16 on the CPU, for each row of ids.

    Its 9.5 GB do not fit on every GPU: each layer is on `device` only while it processes a few rows.
    """
    encoder = model.encoder
    encoder.block = nn.ModuleList(Fetched(block, device) for block in encoder.block)
    encoder.final_layer_norm = Fetched(encoder.final_layer_norm, device)
    for some in ids.split(ROWS):
        states = model(inputs_embeds=model.shared(some).to(device)).last_hidden_state
        yield from states.bfloat16().cpu().split(1)


def cached_prompt(
    cache: str | Path, folder: str | Path, prompt: str, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read a prompt's embeddings from the file `cache`, or encode the prompt and write them there."""
    found = _read_cache(Path(cache), prompt, folder)
    if found is None:
        found = encode_prompt(folder, prompt, device)
        _write_cache(Path(cache), prompt, folder, found)
    return found


def _encoders(folder: str | Path) -> str:
    """Return an identifier of a folder's text encoders, "" if it has none."""
    path = Path(folder) / "text_encoder_2" / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


def _read_cache(cache: Path, prompt: str, folder: str | Path) -> dict[str, Tensor] | None:
    about = read_metadata(cache) if cache.is_file() else {}
    if about.get("prompt") != prompt:
        return None
    made_by, here = about.get("encoders"), _encoders(folder)
    if made_by and here and made_by != here:
        return None  # of another model
    found = read_weights(cache)
    is_whole = {name: value.ndim for name, value in found.items()} == {"t5": 3, "pooled": 2}
    return found if is_whole else None


def _write_cache(cache: Path, prompt: str, folder: str | Path, embeddings: dict[str, Tensor]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_weights(cache, embeddings, {"prompt": prompt, "encoders": _encoders(folder)})


def prompt_file(run: Path, prompt: str) -> Path:
    """Return the path of the file in a run's folder that caches the embeddings of a prompt."""
    return run / "cache" / f"prompt_{hashlib.sha256(prompt.encode()).hexdigest()[:12]}.safetensors"


class Prompts:
    """Embeddings of several prompts, each encoded once and cached in the run's folder `run`.

    prompts(texts) returns {"t5": (b, tokens, dim), "pooled": (b, dim)} of b texts on the device, b = 1 if all
    are the same. Raises the same errors as `encode_prompt`.
    """

    def __init__(
        self, run: Path, folder: str | Path, texts: Iterable[str], device: str | torch.device = "cpu"
    ):
        self.run, self.device = run, device
        self.read = lru_cache(maxsize=32)(self._read)  # 4 MB each for FLUX
        new = [
            text for text in dict.fromkeys(texts) if _read_cache(prompt_file(run, text), text, folder) is None
        ]
        if new:
            made = tqdm(encode_prompts(folder, new, device), "encoding prompts", len(new), leave=False)
            for text, embeddings in zip(new, made, strict=True):
                _write_cache(prompt_file(run, text), text, folder, embeddings)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if len(set(texts)) == 1:
            return self.read(texts[0])
        found = [self.read(text) for text in texts]
        return {name: torch.cat([each[name] for each in found]) for name in ("t5", "pooled")}

    def _read(self, text: str) -> dict[str, Tensor]:
        embeddings = read_weights(prompt_file(self.run, text))
        return {name: value.to(self.device) for name, value in embeddings.items()}
