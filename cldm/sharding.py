"""Strategy `fsdp`: ControlNet and UNet split over the processes (FSDP2, torch's `fully_shard`)."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential


class ShardedStrategy(DDPStrategy):
    """Splits every weight, its gradient, EMA weight and optimizer state over the processes.

    A block is put together while it computes. Checkpoints hold whole tensors: they are those of a run that is
    not split.
    """

    def configure_ddp(self) -> None:
        """Split the model, in place of wrapping it in DDP."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for network in (self.model.control_model, self.model.model.diffusion_model):
            network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
            for block in network.modules():
                if isinstance(block, TimestepEmbedSequential):
                    fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh, reshard_after_forward=True)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The trained parameters: ControlLDM.on_save_checkpoint keeps no others."""
        return whole({name: p for name, p in self.model.named_parameters() if p.requires_grad})

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                n: {name: split_like(parameters[n], value) for name, value in values.items()}
                for n, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def whole(value: Any) -> Any:
    """Put each split tensor in containers of tensors together, on the CPU; all processes must call it."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().cpu()
    if isinstance(value, Mapping):
        return {name: whole(part) for name, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def split_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of `value`, if that belongs to a split `parameter` and has its shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def check_sharding(processes: int, precision: str, optimizer: str) -> None:
    """Raise ValueError for what does not work on split weights."""
    if processes < 2:
        raise ValueError("strategy fsdp splits the weights over devices: it needs 2 or more, not 1")
    if precision == "16":
        raise ValueError("strategy fsdp works in precision bf16 or 32, not in 16")
    if optimizer != "adamw":
        raise ValueError(f"strategy fsdp works with the optimizer adamw, not with {optimizer}")
