"""Blocks whose frozen weights wait in main memory until they are used."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class BlockSwap:
    """Runs blocks one after another, the last `count` of them on weights fetched from main memory.

    A block is fetched while the one before it runs, on a stream of its own (CUDA), and its copy is let go
    once nothing needs it: after a forward, or after the block's backward. Host to device only: the weights
    are frozen. What is trained stays where it is. A backward pass must recompute the blocks (activation
    checkpointing), else it keeps the copies of them all.
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
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
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
            now = torch.cuda.current_stream(device)
            now.wait_stream(self._stream)
            for weight in weights.values():
                weight.record_stream(now)
        self._fetch(place + self._direction, device)
        if place == len(self.blocks) - 1:
            self._direction = -1  # what comes next, if anything does, is the backward pass
        return functional_call(block, weights, inputs)

    def _fetch(self, place: int, device: torch.device) -> None:
        if not 0 <= place < len(self.blocks) or place in self._ready:
            return
        frozen = {name: p for name, p in self.blocks[place].named_parameters() if not p.requires_grad}
        with torch.cuda.stream(self._stream):  # of None: as it is
            self._ready[place] = {name: self.move(weight.data, device) for name, weight in frozen.items()}

    @staticmethod
    def move(weight: Tensor, device: torch.device) -> Tensor:
        """The copy of a waiting weight on the device."""
        return weight.to(device, non_blocking=True)
