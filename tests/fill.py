"""Repeatable weights and inputs, seeded by name: two implementations agree without a weight file."""

import zlib

import numpy as np
import torch


def draw(name: str, shape, salt: str = "") -> torch.Tensor:
    """Sample a standard normal float32 tensor, seeded by the CRC-32 of `salt + name`."""
    values = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


@torch.no_grad()
def fill(module: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    """Sample every parameter: scaled by fan-in (2-D and up), 0.1 (biases) or near 1 (norms)."""
    for name, parameter in module.named_parameters():
        values = draw(name, parameter.shape, salt)
        if parameter.ndim >= 2:
            values = values / float(np.prod(parameter.shape[1:])) ** 0.5
        else:
            values = 0.1 * values if name.endswith("bias") else 1 + 0.1 * values
        parameter.copy_(values)
    return module


def relative_error(actual: torch.Tensor, expected) -> float:
    """Return max |difference| / max |expected| of two finite arrays of the same shape."""
    expected = torch.as_tensor(expected)
    assert tuple(actual.shape) == tuple(expected.shape), (tuple(actual.shape), tuple(expected.shape))
    assert torch.isfinite(actual).all()
    return (
        (actual.detach().cpu().double() - expected.double()).abs().max() / expected.double().abs().max()
    ).item()
