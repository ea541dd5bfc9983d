"""Block swapping: frozen weights offloaded to CPU memory, fetched to the GPU when their block runs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class BlockSwap:
    """Runner of consecutive blocks, the last `count` of them with weights fetched from CPU memory.

    A block is fetched on a separate CUDA stream while the block before it runs. Its copy is freed after its
    forward pass, or after its backward pass. The weights are frozen, so they are copied only to the device
    and never back; trained parameters stay on the device. The backward pass must recompute the blocks
    (activation checkpointing), or the copies of all blocks are kept. Copies are allocated on the computing
    stream, and a fetch waits for the kernels queued before it: at most two copies exist at a time.
    Raises ValueError for a count outside 0 ... len(blocks).
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int):
        if not 0 <= count <= len(blocks):
            raise ValueError(f"blocks_to_swap must lie in 0 ... {len(blocks)} (all blocks), not {count}")
        self.blocks = list(blocks)[len(blocks) - count :]
        self.places = {block: place for place, block in enumerate(self.blocks)}
        self._ready: dict[int, dict[str, Tensor]] = {}  # copies being fetched, by place
        self._stream: torch.cuda.Stream | None = None
        self._direction = 1  # of the next block: 1 in a forward pass, -1 in a backward pass

    def parameter_names(self, model: nn.Module) -> set[str]:
        """Return the names of the swapped blocks' parameters in `model`."""
        swapped = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in swapped}

    def start(self, device: torch.device) -> None:
        """Prepare for a forward pass on `device`."""
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            torch.cuda.current_stream(device).wait_stream(self._stream)  # fetches that were never used
        self._direction = 1
        self._ready.clear()
        self._fetch(0, device)

    def run(self, block: nn.Module, *inputs: Tensor):
        """Return block(*inputs), with fetched weights if the block is swapped."""
        place, device = self.places.get(block), inputs[0].device
        if place is None:
            return block(*inputs)
        self._fetch(place, device)
        weights = self._ready.pop(place)
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._fetch(place + self._direction, device)
        if place == len(self.blocks) - 1:
            self._direction = -1  # a backward pass may follow
        return functional_call(block, weights, inputs)

    def _fetch(self, place: int, device: torch.device) -> None:
        if not 0 <= place < len(self.blocks) or place in self._ready:
            return
        frozen = {n: p.data for n, p in self.blocks[place].named_parameters() if not p.requires_grad}
        self._ready[place] = copies = {name: self.room(weight, device) for name, weight in frozen.items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # kernels may still use that memory
        with torch.cuda.stream(self._stream):  # None: the current stream
            for name, weight in frozen.items():
                copies[name].copy_(weight, non_blocking=True)

    @staticmethod
    def room(weight: Tensor, device: torch.device) -> Tensor:
        """Return an empty tensor on the device for a swapped weight."""
        return torch.empty_like(weight, device=device)
