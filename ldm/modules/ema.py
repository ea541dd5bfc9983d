"""Exponential moving average (EMA) of trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """EMA of the trainable parameters of `module`, kept in float32 on their device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the average is useful from the start.
    With a decay of 0 it equals the parameters.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {decay}")
        self.decay = decay
        self.updates = 0
        self._module: nn.Module | None = None  # module of the last update, and its parameters
        self._parameters: list[nn.Parameter] = []  # found once: modules are deep trees
        self.average = {
            name: parameter.detach().float().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._module is not module:
            parameters = dict(module.named_parameters())
            self._module = module
            self._parameters = [parameters[name] for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), [p.float() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give `module` the EMA weights within this context, and restore its own afterwards."""
        parameters = dict(module.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.average}
        self._copy(self.average, parameters)
        try:
            yield
        finally:
            self._copy(own, parameters)

    @staticmethod
    @torch.no_grad()
    def _copy(values: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict:
        return {"decay": self.decay, "updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.decay = state["decay"]
        self.updates = state["updates"]
        for name, value in self.average.items():
            value.copy_(state["average"][name])
