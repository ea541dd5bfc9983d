"""LoRA: small trained additions to frozen linear layers (Hu et al. 2021), and their files.

Files use the names of the kohya scripts, lora_unet_double_blocks_0_img_attn_qkv.{lora_down.weight,
lora_up.weight, alpha}, which diffusers, ComfyUI and Forge read for FLUX.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import check_fit, fill, read_metadata, read_weights, write_weights

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
# Metadata that Forge and other file browsers show (Stability AI's ModelSpec 1.0.0).
MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.implementation": "https://github.com/black-forest-labs/flux",
    "modelspec.title": "restoration LoRA of FLUX.1 Kontext",
}
KEY = re.compile(r"lora_unet_(double|single)_blocks_\d+_\w+\.(lora_down\.weight|lora_up\.weight|alpha)")

# Fused linears by name. A single block's linear1 is q, k, v and the first MLP layer, linear2 the outputs.
ATTENTION = r"_attn\.(qkv|proj)$|\.linear[12]$"
MLP, MODULATION = r"_mlp\.[02]$", r"\.(\w+_mod|modulation)\.lin$"
TARGETS = {"attn": ATTENTION, "attn_mlp": f"{ATTENTION}|{MLP}", "all": f"{ATTENTION}|{MLP}|{MODULATION}"}


class LoRA(nn.Module):
    """Low-rank part of one linear layer in float32, with the parameter names of kohya's files."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must lie in 1 ... {min(in_features, out_features)}, not {rank}")
        self.lora_down = nn.Linear(in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)  # no effect at the start
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank
        self.strength = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + strength * scale * up(down(x)) in x's dtype, the sum fused in (Hu et al. 2021)."""
        h = F.linear(x, self.lora_down.weight.to(x.dtype)).flatten(0, -2)  # (tokens, rank)
        up = self.lora_up.weight.to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), h, up, alpha=self.strength * self.scale).view_as(y)


class LoRALinear(nn.Module):
    """Frozen linear layer and its LoRA."""

    def __init__(self, base: nn.Module, lora: LoRA):
        super().__init__()
        self.base, self.lora = base, lora

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x, self.base(x))


def kohya_name(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of the blocks by name."""
    return {n: m for n, m in model.named_modules() if "_blocks." in n and hasattr(m, "in_features")}


def add_lora(model: nn.Module, ranks: dict[str, tuple[int, float]]) -> nn.ModuleDict:
    """Wrap the linears in `ranks`, name -> (rank, alpha); return the LoRAs, with a file's state dict keys."""
    adapter, linears = nn.ModuleDict(), block_linears(model)
    for name, (rank, alpha) in ranks.items():
        base = linears[name]
        lora = LoRA(base.in_features, base.out_features, rank, alpha).to(base.weight.device)
        model.set_submodule(name, LoRALinear(base, lora))
        adapter[kohya_name(name)] = lora
    return adapter


def make_lora(model: nn.Module, targets: str, rank: int, alpha: float) -> nn.ModuleDict:
    """Add a new LoRA to the linears that TARGETS[targets] matches."""
    names = [name for name in block_linears(model) if re.search(TARGETS[targets], name)]
    return add_lora(model, dict.fromkeys(names, (rank, alpha)))


def save_lora(path: Path, lora: nn.ModuleDict, metadata: dict, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a kohya file: `lora_unet_*.{lora_down.weight, lora_up.weight, alpha}` and text metadata."""
    weights = {}
    for name, value in lora.state_dict().items():
        value = value.detach().cpu()
        weights[name] = value if name.endswith("alpha") else value.to(dtype)
    texts = {name: str(value) for name, value in metadata.items()}
    write_weights(path, weights, texts | MODELSPEC)


def lora_file(path: str | Path) -> Path:
    """Return the path of the LoRA in a folder; any other path is returned unchanged."""
    return Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights and metadata of a LoRA file, or of the one in a run's folder.

    Raises ValueError if it is not a LoRA of FLUX with kohya's names.
    """
    path = lora_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a LoRA file: its name must end in .safetensors")
    weights = read_weights(path)
    for name in weights:
        if name.startswith(("transformer.", "diffusion_model.")):
            raise ValueError(
                f"{path} has the names of another trainer ({name}): "
                "convert it first with python -m extras.convert_lora IN OUT"
            )
        if not KEY.fullmatch(name):
            raise ValueError(f"{path} is not a LoRA of FLUX with kohya's names: it holds {name}")
    return weights, read_metadata(path)


def load_lora(model: nn.Module, path: Path, strength: float = 1.0) -> tuple[nn.ModuleDict, dict[str, str]]:
    """Add the LoRA of a file, with any targets, ranks and alphas; return it and its metadata.

    Raises ValueError if it is incomplete, or belongs to a network of other sizes.
    """
    weights, metadata = read_lora(path)
    names = {kohya_name(name): name for name in block_linears(model)}
    ranks = {}
    for stem in dict.fromkeys(key.partition(".")[0] for key in weights):
        down = weights.get(f"{stem}.lora_down.weight")
        if stem not in names or down is None:
            raise ValueError(f"{path} is a LoRA of another base, or not complete: {stem}")
        alpha = weights.setdefault(f"{stem}.alpha", torch.tensor(float(len(down))))
        if alpha.numel() != 1:
            raise ValueError(f"{path} is damaged: {stem}.alpha is no number")
        ranks[names[stem]] = (len(down), alpha.item())
    adapter = fill(add_lora(model, ranks), weights, path)
    for lora in adapter.values():
        lora.strength = strength
    return adapter.requires_grad_(False).eval(), metadata


def start_from(adapter: nn.ModuleDict, path: Path) -> None:
    """Copy the LoRA of a file into a new one. Raises ValueError if targets, rank or base differ."""
    weights = read_lora(path)[0]
    check_fit(adapter.state_dict(), weights, path, "the LoRA of this run")
    for stem, lora in adapter.items():
        # alpha may differ: the up matrix is scaled so that the weight update stays the same
        factor = weights[f"{stem}.alpha"].item() / lora.alpha.item()
        weights[f"{stem}.lora_up.weight"] = weights[f"{stem}.lora_up.weight"].float() * factor
        weights[f"{stem}.alpha"] = lora.alpha
    adapter.load_state_dict(weights)
