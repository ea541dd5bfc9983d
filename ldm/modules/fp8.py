"""Linear layers stored in 8 bits: half the memory of bfloat16, for frozen weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp8Linear(nn.Module):
    """Frozen linear layer stored in float8 e4m3 with one scale, computed in the input's dtype.

    Converting to bfloat16 is exact, and the scale is a power of two that is applied to the product, so only
    storing rounds. The converted weight is kept for the gradient of the input; with activation checkpointing
    only the weights of one block at a time are kept.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, 1.0
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return self.scale * F.linear(x, weight)
        y = torch.addmm(self.bias, x.flatten(0, -2), weight.T, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)


def quantize(weight: Tensor) -> tuple[Tensor, float]:
    """Round (out, in) to float8 e4m3 (out, in) and a power of two, so that weight is about float8 * scale.

    Three bits of mantissa are kept down to 2^-14 of the largest value, so one scale per row has no benefit.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    largest = weight.abs().amax().float().clamp(min=1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(largest / limit)))
    return (weight.float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale.item()


def store_in_fp8(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, Fp8Linear]:
    """Replace the linears, given by name, by empty `Fp8Linear` layers; return these by weight name."""
    stored = {}
    for name, linear in linears.items():
        stored[f"{name}.weight"] = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        model.set_submodule(name, stored[f"{name}.weight"])
    return stored
