import torch

from ldm.modules.fp8 import Fp8Linear, quantize
from tests.fill import draw


def test_quantization_error_is_at_most_half_a_float8_step():
    weight = torch.randn(8, 256) * torch.logspace(-2, 0, 8)[:, None]
    eight, scale = quantize(weight)
    widened = eight.float() * scale
    step = torch.maximum(weight.abs() / 16, weight.abs().max() * 2.0**-17)  # 3 bits of mantissa; subnormals
    assert ((widened - weight).abs() <= step).all()
    assert ((widened - weight).norm(dim=1) < 0.04 * weight.norm(dim=1)).all()  # in small rows too
    assert torch.equal(widened.bfloat16().float(), widened)  # widening is exact
    assert torch.equal(quantize(torch.zeros(2, 4))[0].float(), torch.zeros(2, 4))


def test_fp8_linear_output_and_gradient_match_linear():
    linear, eight = torch.nn.Linear(32, 16), Fp8Linear(32, 16)
    weight, scale = quantize(linear.weight.detach())
    eight.load_state_dict({"weight": weight, "bias": linear.bias.detach()})
    eight.scale, linear.weight.data = scale, weight.float() * scale
    gradients = []
    for layer in (linear, eight):
        x = draw("x", (3, 5, 32)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
