"""The frozen text towers of Stable Diffusion 1 (CLIP ViT-L/14) and 2 (OpenCLIP ViT-H/14)."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import LayerNorm32

START, END = 49406, 49407  # the begin and end tokens of CLIP's vocabulary


@cache
def load_tokenizer() -> Any:
    """Load CLIP's tokenizer; its vocabulary is in the package, so nothing is downloaded."""
    import open_clip  # takes seconds, and cached prompts do not need it

    return open_clip.SimpleTokenizer()


def tokenize(prompts: Sequence[str], max_length: int = 77, padding: int = END) -> Tensor:
    """Convert prompts to int64 tokens (b, max_length); longer prompts are truncated, with a warning."""
    tokenizer = load_tokenizer()
    ids = torch.full((len(prompts), max_length), padding)
    for row, prompt in zip(ids, prompts, strict=True):
        words = tokenizer.encode(prompt)
        if len(words) > max_length - 2:
            cut = tokenizer.decode(words[max_length - 2 :])
            warnings.warn(f"prompt longer than {max_length} tokens, ignored: {cut!r}", stacklevel=2)
        words = [START, *words[: max_length - 2], END]
        row[: len(words)] = torch.tensor(words)
    return ids


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # (b, heads, n, d)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers around the quick GELU, x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads)
        self.layer_norm1 = LayerNorm32(width)
        self.mlp = CLIPMLP(width, hidden)
        self.layer_norm2 = LayerNorm32(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Token and position embeddings; `position_ids` is a buffer because weight files contain it."""

    def __init__(self, width: int, max_length: int, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.register_buffer("position_ids", torch.arange(max_length)[None])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding(self.position_ids[:, : ids.shape[1]])


class CLIPTextModel(nn.Module):
    """CLIP's text tower (Radford et al. 2021): ids (b, n) -> hidden (b, n, width), pooled (b, width).

    `hidden` is the last hidden state, `pooled` its row at the first end token. The defaults are ViT-L/14's.
    """

    def __init__(
        self,
        width: int = 768,
        hidden: int = 3072,
        layers: int = 12,
        heads: int = 12,
        max_length: int = 77,
        vocabulary: int = 49408,
    ):
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.embeddings = CLIPEmbeddings(width, max_length, vocabulary)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(CLIPLayer(width, heads, hidden) for _ in range(layers))
        self.text_model.final_layer_norm = LayerNorm32(width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            h = layer(h)
        h = self.text_model.final_layer_norm(h)
        first_end = (ids == END).int().argmax(dim=1)
        return h, h[torch.arange(len(h), device=h.device), first_end]


class FrozenCLIPEmbedder(nn.Module):
    """Text tower of Stable Diffusion 1: prompts -> last hidden state (b, 77, 768) of CLIP ViT-L/14.

    The size arguments are for small configurations; the weights are in the model's checkpoint.
    """

    def __init__(self, max_length: int = 77, **sizes: int):
        super().__init__()
        self.max_length = max_length
        self.transformer = CLIPTextModel(max_length=max_length, **sizes)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        device = self.transformer.text_model.final_layer_norm.weight.device
        return self.transformer(tokenize(prompts, self.max_length).to(device))[0]

    encode = forward


class FrozenOpenCLIPEmbedder(nn.Module):
    """Text tower of Stable Diffusion 2 (OpenCLIP ViT-H-14): prompts -> hidden state (b, 77, width).

    `layer` "penultimate" skips the last transformer block, "last" does not; the final norm follows either.
    The size arguments are for small configurations. Raises ValueError for another layer.
    """

    def __init__(
        self, arch: str = "ViT-H-14", max_length: int = 77, layer: str = "penultimate", **sizes: int
    ):
        super().__init__()
        if layer not in ("last", "penultimate"):
            raise ValueError(f"layer must be 'last' or 'penultimate', not {layer!r}")
        import open_clip

        config = open_clip.get_model_config(arch)
        self.max_length, self.layer = max_length, layer
        self.model = open_clip.transformer.TextTransformer(
            output_dim=config["embed_dim"], **{**config["text_cfg"], "context_length": max_length, **sizes}
        )
        self.model.logit_scale = nn.Parameter(torch.zeros(()))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        model = self.model
        ids = tokenize(prompts, self.max_length, padding=0).to(model.positional_embedding.device)
        h = model.token_embedding(ids) + model.positional_embedding
        blocks = model.transformer.resblocks
        for block in blocks[: len(blocks) - (self.layer == "penultimate")]:
            h = block(h, attn_mask=model.attn_mask.to(h.dtype))
        return model.ln_final(h)

    encode = forward
