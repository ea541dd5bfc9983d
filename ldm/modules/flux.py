"""FLUX.1 Kontext: a flow-matching transformer over text, target and control tokens.

Parameters are named as in flux1-kontext-dev.safetensors (Black Forest Labs, 2025: "FLUX.1 Kontext: Flow
Matching for In-Context Image Generation and Editing in Latent Space"). In reading order: embeddings,
attention, blocks, the network, and functions for its inputs. Sampling is in ldm/models/diffusion/flow.py,
autoencoder and files in ldm/models/kontext.py, text encoders in ldm/models/prompts.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import rotary_embedding
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.kernels import Rotate
from ldm.modules.swap import BlockSwap


@dataclass
class FluxParams:
    """Sizes of the transformer; the defaults are FLUX.1 Kontext [dev], 11.9 billion parameters."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768  # CLIP-L pooled
    context_in_dim: int = 4096  # T5 XXL
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # of each head: image number, y, x
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self):
        if sum(self.axes_dim) * self.num_heads != self.hidden_size:
            raise ValueError(f"axes_dim {self.axes_dim} x {self.num_heads} heads is not {self.hidden_size}")


def attention(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Compute self-attention over all tokens: q, k, v (b, heads, n, d) each -> (b, n, heads * d)."""
    q, k = Rotate.apply(q, *rotation), Rotate.apply(k, *rotation)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, eps=1e-6)  # computed in float32 inside


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=num_heads)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """Attention parameters of one stream; `attention` itself spans both streams."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(x), self.num_heads)


class Modulation(nn.Module):
    """Shift, scale and gate (`count` of them in all) from the conditioning vector, each (b, 1, dim)."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply layer norm without its own parameters, then the given scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class DoubleStreamBlock(nn.Module):
    """Block with separate weights for text and image tokens and a joint attention."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        mlp_dim = int(dim * mlp_ratio)
        for stream in ("img", "txt"):
            mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU("tanh"), nn.Linear(mlp_dim, dim))
            self.add_module(f"{stream}_mod", Modulation(dim, 6))
            self.add_module(f"{stream}_attn", SelfAttention(dim, num_heads, qkv_bias))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rotation: tuple) -> tuple[Tensor, Tensor]:
        img_shift, img_scale, img_gate, *img_mlp = self.img_mod(vec)
        txt_shift, txt_scale, txt_gate, *txt_mlp = self.txt_mod(vec)
        img_qkv = self.img_attn(modulate(img, img_shift, img_scale))
        txt_qkv = self.txt_attn(modulate(txt, txt_shift, txt_scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        txt_mixed, img_mixed = attention(q, k, v, rotation).split([txt.shape[1], img.shape[1]], dim=1)

        img = torch.addcmul(img, img_gate, self.img_attn.proj(img_mixed))
        txt = torch.addcmul(txt, txt_gate, self.txt_attn.proj(txt_mixed))
        img = torch.addcmul(img, img_mlp[2], self.img_mlp(modulate(img, *img_mlp[:2])))
        txt = torch.addcmul(txt, txt_mlp[2], self.txt_mlp(modulate(txt, *txt_mlp[:2])))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Block with shared weights for all tokens: attention and MLP in parallel between two fused linears."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads, self.split = num_heads, [3 * dim, int(dim * mlp_ratio)]
        self.linear1 = nn.Linear(dim, sum(self.split))
        self.linear2 = nn.Linear(dim + self.split[1], dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, vec: Tensor, rotation: tuple) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.split, dim=-1)
        mixed = attention(*self.norm(qkv, self.num_heads), rotation)
        both = torch.cat([mixed, F.gelu(mlp, approximate="tanh")], dim=-1)
        return torch.addcmul(x, gate, self.linear2(both))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """FLUX's transformer; with `checkpointing` blocks are recomputed in the backward pass to save memory."""

    def __init__(self, params: FluxParams):
        super().__init__()
        self.params, self.checkpointing = params, False
        self.swap: BlockSwap | None = None  # runs the blocks if some are offloaded to CPU memory
        dim, heads, ratio = params.hidden_size, params.num_heads, params.mlp_ratio
        self.img_in = nn.Linear(params.in_channels, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(256, dim) if params.guidance_embed else None
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, heads, ratio, params.qkv_bias) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, heads, ratio) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(dim, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """Predict the velocity of every image token, (b, n, out_channels) in the dtype of the weights.

        img (b, n, in_channels), txt (b, m, context_in_dim), ids (b, n | m, 3), timesteps (b,) in [0, 1],
        y (b, vec_in_dim) the pooled CLIP embedding, guidance (b,).
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(self._sinusoids(timesteps)) + self.vector_in(y.to(dtype))
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(self._sinusoids(guidance))
        ids = torch.cat([txt_ids, img_ids], dim=1)
        rotation = rotary_embedding(ids, self.params.axes_dim, self.params.theta)
        if self.swap:
            self.swap.start(img.device)
        img, txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))  # (b, n, dim), (b, m, dim)
        for block in self.double_blocks:
            img, txt = self._run(block, img, txt, vec, rotation)
        x = torch.cat([txt, img], dim=1)  # (b, m + n, dim)
        for block in self.single_blocks:
            x = self._run(block, x, vec, rotation)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _sinusoids(self, values: Tensor) -> Tensor:
        return timestep_embedding(1000 * values.float(), 256).to(self.img_in.weight.dtype)

    def _run(self, block: nn.Module, *inputs: Tensor):
        call = partial(self.swap.run, block) if self.swap else block
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(call, *inputs, use_reentrant=False)
        return call(*inputs)


def pack(latent: Tensor) -> Tensor:
    """Turn each 2x2 square of latent pixels into one token: (b, c, h, w) -> (b, h * w / 4, 4 * c)."""
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack` for a latent of height x width."""
    h, w = height // 2, width // 2
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h, w=w, ph=2, pw=2)


def token_ids(latent: Tensor, image_number: int) -> Tensor:
    """Return (image number, y, x) of each latent token, float32 (b, n, 3), for a latent (b, c, h, w).

    The image number of targets is 0.
    """
    b, _, h, w = latent.shape
    places = (torch.arange(side // 2, device=latent.device) for side in (h, w))
    y, x = torch.meshgrid(*places, indexing="ij")
    ids = torch.stack([torch.full_like(y, image_number), y, x], dim=-1).float()
    return repeat(ids, "h w axes -> b (h w) axes", b=b)


def predict_velocity(
    model: Callable,
    latent: Tensor,
    control: Tensor,
    t5: Tensor,
    pooled: Tensor,
    timesteps: Tensor,
    guidance: float | Tensor,
) -> Tensor:
    """Predict noise - clean for latents (b, 16, h, w) at `timesteps` (b,), given the control latents.

    The control tokens follow the target tokens, and their part of the output is dropped. t5 (1 or b, m, dim)
    and pooled (1 or b, dim) are the prompt. Returns float32 in the shape of `latent`.
    """
    b, _, h, w = latent.shape
    tokens = pack(latent)
    txt = t5.expand(b, -1, -1)
    output = model(
        img=torch.cat([tokens, pack(control)], dim=1),
        img_ids=torch.cat([token_ids(latent, 0), token_ids(control, 1)], dim=1),
        txt=txt,
        txt_ids=torch.zeros(*txt.shape[:2], 3, device=latent.device),
        timesteps=timesteps,
        y=pooled.expand(b, -1),
        guidance=torch.as_tensor(guidance, dtype=torch.float32, device=latent.device).expand(b),
    )
    return unpack(output[:, : tokens.shape[1]].float(), h, w)
