"""Blocks whose frozen weights wait in CPU memory until they are used."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class BlockSwap:
    """Runs blocks one after another, the last `count` of them on weights fetched from CPU memory.

    A block is fetched while the one before it runs, on a stream of its own (CUDA), and its copy is let go
    once nothing needs it: after a forward, or after the block's backward. Host to device only: the weights
    are frozen. What is trained stays where it is. A backward pass must recompute the blocks (activation
    checkpointing), else it keeps the copies of them all. Copies are memory of the stream that computes, and
    a fetch waits for what computes already: two are on the device however far ahead the program is.
    Raises ValueError for a count outside 0 ... len(blocks).
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int):
        if not 0 <= count <= len(blocks):
            raise ValueError(f"blocks_to_swap must lie in 0 ... {len(blocks)} (all blocks), not {count}")
        self.blocks = list(blocks)[len(blocks) - count :]
        self.places = {block: place for place, block in enumerate(self.blocks)}
        self._ready: dict[int, dict[str, Tensor]] = {}  # copies that have been asked for
        self._stream: torch.cuda.Stream | None = None
        self._direction = 1  # where the next block is: ahead in a forward, behind in a backward

    def start(self, device: torch.device) -> None:
        """A forward pass on `device` begins."""
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            torch.cuda.current_stream(device).wait_stream(self._stream)  # for copies that nobody came for
        self._direction = 1
        self._ready.clear()
        self._fetch(0, device)

    def run(self, block: nn.Module, *inputs: Tensor):
        """block(*inputs)."""
        place, device = self.places.get(block), inputs[0].device
        if place is None:
            return block(*inputs)
        self._fetch(place, device)
        weights = self._ready.pop(place)
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        self._fetch(place + self._direction, device)
        if place == len(self.blocks) - 1:
            self._direction = -1  # what comes next, if anything does, is the backward pass
        return functional_call(block, weights, inputs)

    def _fetch(self, place: int, device: torch.device) -> None:
        if not 0 <= place < len(self.blocks) or place in self._ready:
            return
        frozen = {n: p.data for n, p in self.blocks[place].named_parameters() if not p.requires_grad}
        self._ready[place] = copies = {name: self.room(weight, device) for name, weight in frozen.items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # who had that room may compute yet
        with torch.cuda.stream(self._stream):  # of None: as it is
            for name, weight in frozen.items():
                copies[name].copy_(weight, non_blocking=True)

    @staticmethod
    def room(weight: Tensor, device: torch.device) -> Tensor:
        """An empty tensor on the device for a waiting weight."""
        return torch.empty_like(weight, device=device)
