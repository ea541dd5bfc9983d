"""Custom autograd functions: the plain formula in fewer passes over memory.

Memory traffic limits these operations, not arithmetic, and autograd alone would read and write more:

- GatedGELU writes both halves of its gradient into one tensor; autograd computes them apart and joins them.
- SiLUChannelsLast restores the channels_last layout of a map: CUDA's group_norm returns NCHW for a
  channels_last input, and every convolution after it would convert it, forward and backward.
- CastTogether casts all weights of a network in one kernel; autocast launches one for each weight.
- Rotate reads the values three times in all; slicing and stacking would make copies.

While `torch.compile` traces them, GEGLU and GroupNormSiLU use the plain formula, which the compiler fuses.

Known problem of PyTorch 2.13 on a CPU: the backward pass of group_norm ends in a segmentation fault if its
input is channels_last and needs no gradient while the norm's weights do. A trained norm must therefore follow
a trained layer, as all of them do here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class GatedGELU(torch.autograd.Function):
    """(..., 2 d) -> (..., d): the first half times the GELU of the second."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        x, gate = both.chunk(2, dim=-1)
        gate = F.gelu(gate)
        ctx.save_for_backward(both, gate)
        return x * gate

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        both, activated = ctx.saved_tensors
        x, gate = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        of_x, of_gate = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_x)
        torch.ops.aten.gelu_backward.grad_input(gradient * x, gate, grad_input=of_gate)
        return result


class SiLUChannelsLast(torch.autograd.Function):
    """SiLU of an NCHW tensor, returned as channels_last; its gradient is NCHW."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x, out=torch.empty_like(x, memory_format=torch.channels_last))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x, grad_input=torch.empty_like(x))


class CastTogether(torch.autograd.Function):
    """Cast of weights to another dtype; their gradients are float32."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        full = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        if given:
            torch._foreach_copy_(full, given)
        rest = iter(full)
        return None, *(None if gradient is None else next(rest) for gradient in gradients)


class Rotate(torch.autograd.Function):
    """Rotation of neighbours (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin): attention.rotary_embedding."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = torch.mul(x, cos, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        turned[..., 0::2].addcmul_(x[..., 1::2], sin, value=-1)
        turned[..., 1::2].addcmul_(x[..., 0::2], sin)
        return turned

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotate.apply(gradient, cos, -sin), None, None  # rotated back
