"""Linear layers stored in 8 bits: half the memory of bfloat16, for weights that stay as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def store_in_fp8(model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
    """Replace the linears, given by name, with empty `Fp8Linear` ones; the names of their weights."""
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        replacement = Fp8Linear(linear.in_features, linear.out_features, linear.bias is not None)
        setattr(model.get_submodule(parent), child, replacement)
    return {f"{name}.weight" for name in linears}
