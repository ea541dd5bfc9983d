"""LoRA: small trained additions to frozen linear layers (Hu et al. 2021), and their files.

A file has the names of the kohya scripts, lora_unet_double_blocks_0_img_attn_qkv.{lora_down.weight,
lora_up.weight, alpha}, which diffusers, ComfyUI and Forge read for FLUX.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import read_metadata, read_weights, write_weights
from ldm.modules.foreign_lora import to_kohya

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder

# Fused linears by name. A single block's linear1 holds q, k, v and half of its MLP, linear2 the other halves.
ATTENTION = r"_attn\.(qkv|proj)$|\.linear[12]$"
MLP, MODULATION = r"_mlp\.[02]$", r"\.(\w+_mod|modulation)\.lin$"
TARGETS = {"attn": ATTENTION, "attn_mlp": f"{ATTENTION}|{MLP}", "all": f"{ATTENTION}|{MLP}|{MODULATION}"}


class LoRA(nn.Module):
    """The low-rank part of one linear layer; named and stored as in kohya's files, float32."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must lie in 1 ... {min(in_features, out_features)}, not {rank}")
        self.lora_down = nn.Linear(in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)  # at the start nothing changes
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.dropout, self.rank, self.scale, self.strength = dropout, rank, alpha / rank, 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scale * up(down(x)) in the dtype of x, the sum fused into the last product (Hu et al. 2021)."""
        x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, self.lora_down.weight.to(x.dtype)).flatten(0, -2)  # (tokens, rank)
        up = self.lora_up.weight.to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), h, up, alpha=self.strength * self.scale).view_as(y)


class LoRALinear(nn.Module):
    """A frozen linear layer and its LoRA."""

    def __init__(self, base: nn.Module, lora: LoRA):
        super().__init__()
        self.base, self.lora = base, lora

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x, self.base(x))


def kohya_name(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks by name."""
    return {n: m for n, m in model.named_modules() if "_blocks." in n and hasattr(m, "in_features")}


def add_lora(model: nn.Module, ranks: dict[str, tuple[int, float]], dropout: float = 0.0) -> nn.ModuleDict:
    """Wrap the linears that `ranks` names (rank, alpha); the LoRAs, whose state dict is that of a file."""
    adapter, linears = nn.ModuleDict(), block_linears(model)
    for name, (rank, alpha) in ranks.items():
        base = linears[name]
        lora = LoRA(base.in_features, base.out_features, rank, alpha, dropout).to(base.weight.device)
        model.set_submodule(name, LoRALinear(base, lora))
        adapter[kohya_name(name)] = lora
    return adapter


def make_lora(model: nn.Module, targets: str, rank: int, alpha: float, dropout: float = 0.0) -> nn.ModuleDict:
    """A new LoRA on the linears that TARGETS[targets] matches."""
    names = [name for name in block_linears(model) if re.search(TARGETS[targets], name)]
    return add_lora(model, dict.fromkeys(names, (rank, alpha)), dropout)


def save_lora(path: Path, lora: nn.ModuleDict, metadata: dict, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a kohya file: `lora_unet_*.{lora_down.weight, lora_up.weight, alpha}` and text metadata."""
    weights = {name: value.detach().cpu() for name, value in lora.state_dict().items()}
    weights = {name: value if name.endswith("alpha") else value.to(dtype) for name, value in weights.items()}
    write_weights(path, weights, {name: str(value) for name, value in metadata.items()})


def lora_file(path: str | Path) -> Path:
    """The LoRA in a folder; anything but a folder stays as it is."""
    return Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)


def read_lora(
    path: Path, sizes: dict[str, tuple[int, int]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a LoRA file, or of the one in the folder of a run.

    With `sizes`, (out, in) of the model's linears, those of other trainers are read too, by kohya's names.
    Raises ValueError if it is not a LoRA of FLUX.
    """
    path = lora_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a LoRA file: its name must end in .safetensors")
    weights = read_weights(path)
    form = re.compile(r"lora_unet_(double|single)_blocks_\d+_\w+\.(lora_down\.weight|lora_up\.weight|alpha)")
    foreign = [name for name in weights if not form.fullmatch(name)]
    if foreign and sizes is not None:
        try:
            known = to_kohya(weights, sizes, read_metadata(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        weights, foreign = known or weights, [] if known else foreign
    if foreign:
        raise ValueError(f"{path} is not a LoRA of FLUX with kohya's names: it holds {foreign[0]}")
    return weights, read_metadata(path)


def load_lora(model: nn.Module, path: Path, strength: float = 1.0) -> tuple[nn.ModuleDict, dict[str, str]]:
    """Add the LoRA of a file, whatever its targets, ranks and alphas; also its metadata.

    Raises ValueError if it belongs to a network of other sizes.
    """
    linears = block_linears(model)
    weights, metadata = read_lora(path, {n: (m.out_features, m.in_features) for n, m in linears.items()})
    names = {kohya_name(name): name for name in linears}
    ranks = {}
    for stem in dict.fromkeys(key.partition(".")[0] for key in weights):
        down, up = weights.get(f"{stem}.lora_down.weight"), weights.get(f"{stem}.lora_up.weight")
        linear = linears.get(names.get(stem))
        if linear is None or down is None or up is None or down.ndim != 2 or up.ndim != 2:
            raise ValueError(f"{path} is a LoRA of another base, or not complete: {stem}")
        if up.shape[1] != len(down):
            raise ValueError(f"{path} is damaged: {stem} is of rank {len(down)} and of {up.shape[1]}")
        if (down.shape[1], up.shape[0]) != (linear.in_features, linear.out_features):
            there, here = f"{down.shape[1]} -> {len(up)}", f"{linear.in_features} -> {linear.out_features}"
            raise ValueError(f"{path} is a LoRA of another base: {stem} is {there}, here it is {here}")
        alpha = weights.setdefault(f"{stem}.alpha", torch.tensor(float(len(down))))
        if alpha.numel() != 1:
            raise ValueError(f"{path} is damaged: {stem}.alpha is no number")
        ranks[names[stem]] = (len(down), alpha.item())
    adapter = add_lora(model, ranks)
    adapter.load_state_dict(weights)
    for lora in adapter.values():
        lora.strength = strength
    return adapter.requires_grad_(False).eval(), metadata


def start_from(adapter: nn.ModuleDict, path: Path) -> None:
    """Copy the LoRA of a file into a new one. Raises ValueError if targets, rank or alpha differ."""
    weights, expected = read_lora(path)[0], adapter.state_dict()
    name = next((name for name in expected if name not in weights), None)
    name = name or next((name for name in weights if name not in expected), None)
    if name:
        raise ValueError(f"{path} has other targets than --lora_targets, or another base: {name}")
    for name, value in expected.items():
        if value.shape != weights[name].shape:
            rank = len(weights[name]) if "down" in name else weights[name].shape[-1]
            raise ValueError(f"{path} has another rank or base: {name} is of rank {rank}, not as --rank asks")
        if name.endswith("alpha") and not torch.isclose(value.cpu(), weights[name].float()):
            raise ValueError(f"{path} has alpha {weights[name].item():g}, --alpha is {value.item():g}")
    adapter.load_state_dict(weights)
