"""Prompts of FLUX: encoded by T5 and CLIP from the model folder, once, and kept in the folder of a run."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
LARGEST = 10**6  # number in a config.json
ROWS = 4  # prompts that T5 encodes at once


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


def encode_prompt(folder: str | Path, prompt: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The prompt as {"t5": (1, 512, 4096), "pooled": (1, 768)}, bfloat16 on the CPU.

    T5's sizes and its number of tokens (n_positions) are those of its config.json. It sees the padding too
    (no attention mask), as in the original. The encoders are freed before it returns.
    """
    [embeddings] = encode_prompts(folder, [prompt], device)  # to its end: that frees the encoders
    return embeddings


def encode_prompts(
    folder: str | Path, prompts: Sequence[str], device: str | torch.device = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """What `encode_prompt` returns for each, one after the other."""
    folder = check_folder(folder, TEXT_FILES)
    pooled = _encode_clip(folder, prompts, device)
    for number, t5 in enumerate(_encode_t5(folder, prompts, device)):
        yield {"t5": t5, "pooled": pooled[number]}


def _read_sizes(path: Path, *names: str) -> dict:
    """A text encoder's config.json. Raises ValueError unless these of its values are sizes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    values = config.values() if isinstance(config, dict) else ()
    wrong = [name for name in names if not isinstance(config, dict) or not isinstance(config.get(name), int)]
    wrong += [name for name in names if not wrong and config[name] < 1]
    if wrong or any(isinstance(value, int) and value > LARGEST for value in values):
        raise ValueError(f"{path} is damaged: {', '.join(wrong) or 'one of its numbers'} cannot be a size")
    return config


@torch.no_grad()
def _encode_t5(folder: Path, prompts: Sequence[str], device: str | torch.device) -> Iterator[Tensor]:
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

    here, words = folder / "text_encoder_2", folder / "tokenizer_2" / "tokenizer.json"
    length = {"n_positions": 512, **_read_sizes(here / "config.json")}["n_positions"]
    files = sorted(here.glob("model*.safetensors*"))
    for path in files:
        _read_sizes(path) if path.suffix == ".json" else read_metadata(path)
    try:
        tokenizer = Tokenizer.from_file(str(words))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{words} is damaged: {error}") from error
    try:
        model, found = T5EncoderModel.from_pretrained(
            here, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
        lacks = found["missing_keys"]
    except Exception as error:  # of every kind that Python has
        lacks = [str(error) or type(error).__name__]
    if lacks:
        names = ", ".join(path.name for path in [*files, here / "config.json"])
        raise ValueError(f"T5 in {here} is damaged or not whole ({names}): {'; '.join(sorted(lacks)[:3])}")
    if max(map(max, filter(None, rows)), default=0) >= model.config.vocab_size:
        raise ValueError(f"{words} is not that of the T5 beside it, which knows fewer words")
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])  # (prompts, 512)
    yield from run_by_layers(model, ids, device)


class Fetched(nn.Module):
    """A layer whose weights stay where they are; each call has a copy of them on `device`."""

    def __init__(self, layer: nn.Module, device: str | torch.device):
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        weights = {name: value.to(self.device) for name, value in self.layer.named_parameters()}
        return functional_call(self.layer, weights, inputs, named)


@torch.no_grad()
def run_by_layers(model: nn.Module, ids: Tensor, device: str | torch.device) -> Iterator[Tensor]:
    """The last hidden states of a T5 on the CPU, (1, tokens, dim) in bfloat16 there, for each row of ids.

    Its 9.5 GB do not fit on every GPU: each layer is on `device` only while it computes a few rows.
    """
    encoder = model.encoder
    encoder.block = nn.ModuleList(Fetched(block, device) for block in encoder.block)
    encoder.final_layer_norm = Fetched(encoder.final_layer_norm, device)
    for some in ids.split(ROWS):
        states = model(inputs_embeds=model.shared(some).to(device)).last_hidden_state
        yield from states.bfloat16().cpu().split(1)


@torch.no_grad()
def _encode_clip(folder: Path, prompts: Sequence[str], device: str | torch.device) -> list[Tensor]:
    here = folder / "text_encoder"
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    width, hidden, layers, heads = map(_read_sizes(here / "config.json", *names).get, names)
    if width % heads:
        raise ValueError(f"{here / 'config.json'} is damaged: {heads} heads do not divide {width} channels")
    model = CLIPTextModel(width, hidden, layers, heads)
    path = here / "model.safetensors"
    position_ids = {
        name: value for name, value in model.state_dict().items() if name.endswith("position_ids")
    }
    weights = {**position_ids, **read_weights(path)}
    fill(model, weights, path).to(device).float()
    return [model(tokenize([prompt]).to(device))[1].bfloat16().cpu() for prompt in prompts]


def cached_prompt(
    cache: str | Path, folder: str | Path, prompt: str, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """What `encode_prompt` returns, from the file `cache` if that is of the same prompt, else put into it."""
    found = _read_cache(Path(cache), prompt, folder)
    if found is None:
        found = encode_prompt(folder, prompt, device)
        _write_cache(Path(cache), prompt, folder, found)
    return found


def _encoders(folder: str | Path) -> str:
    """What tells a folder's text encoders from those of another model; "" if they are not there."""
    path = Path(folder) / "text_encoder_2" / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


def _read_cache(cache: Path, prompt: str, folder: str | Path) -> dict[str, Tensor] | None:
    about = read_metadata(cache) if cache.is_file() else {}
    if about.get("prompt") != prompt:
        return None
    made_by, here = about.get("encoders"), _encoders(folder)
    if made_by and here and made_by != here:
        return None  # another model's: it is made anew
    found = read_weights(cache)
    whole = {name: value.ndim for name, value in found.items()} == {"t5": 3, "pooled": 2}
    return found if whole else None  # damaged: it is made anew


def _write_cache(cache: Path, prompt: str, folder: str | Path, embeddings: dict[str, Tensor]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_weights(cache, embeddings, {"prompt": prompt, "encoders": _encoders(folder)})


def prompt_file(run: Path, prompt: str) -> Path:
    """Where the folder of a run keeps the embedding of a prompt: cache/, or as it was, beside the LoRA."""
    old = run / "prompt.safetensors"
    if old.is_file() and read_metadata(old).get("prompt") == prompt:
        return old
    return run / "cache" / f"prompt_{hashlib.sha256(prompt.encode()).hexdigest()[:12]}.safetensors"


class Prompts:
    """The embeddings of several prompts, each encoded once and kept in the folder `run` of a run.

    prompts(texts) gives {"t5": (b, tokens, dim), "pooled": (b, dim)} of b texts on the device, b = 1 if all
    are the same. Raises what `encode_prompt` does.
    """

    def __init__(
        self, run: Path, folder: str | Path, texts: Iterable[str], device: str | torch.device = "cpu"
    ):
        self.run, self.device = run, device
        self.read = lru_cache(maxsize=32)(self._read)  # of FLUX's own 4 MB each
        new = [t for t in dict.fromkeys(texts) if _read_cache(prompt_file(run, t), t, folder) is None]
        if new:
            made = tqdm(encode_prompts(folder, new, device), "encoding prompts", len(new), leave=False)
            for text, embeddings in zip(new, made, strict=True):
                _write_cache(prompt_file(run, text), text, folder, embeddings)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = [self.read(text) for text in (texts[:1] if len({*texts}) == 1 else texts)]
        return {name: torch.cat([one[name] for one in found]) for name in ("t5", "pooled")}

    def _read(self, text: str) -> dict[str, Tensor]:
        return {n: v.to(self.device) for n, v in read_weights(prompt_file(self.run, text)).items()}
