"""Linear layers stored in 4 bits by bitsandbytes (Dettmers et al., QLoRA, 2023): a quarter of bfloat16."""

import torch
from torch import Tensor, nn

from ldm.util import check_package


def store_in_nf4(model: nn.Module, linears: dict[str, nn.Linear], dtype: torch.dtype) -> dict[str, nn.Linear]:
    """Replace the linears, given by name, with empty ones of bitsandbytes (NF4) that compute in `dtype`.

    Returns these by their weights' names. Raises ValueError if bitsandbytes is not installed.
    """
    check_package("bitsandbytes", "nf4")
    from bitsandbytes.nn import Linear4bit

    stored = {}
    for name, linear in linears.items():
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        stored[f"{name}.weight"] = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        model.set_submodule(name, stored[f"{name}.weight"])
    return stored


def nf4_weight(weight: Tensor) -> nn.Parameter:
    """Convert (out, in) to the parameter of such a linear, on its device: 64 numbers share a scale."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(weight.device)
