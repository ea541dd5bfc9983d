"""Order of training samples, a pure function of seed and position; substitutes for unreadable ones."""

import sys
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ldm.data.image import UNREADABLE

Key = int | tuple[int, int]  # index of a sample, or epoch and index


def split_key(key: Key) -> tuple[int, int]:
    """Return the epoch and index of a sample; a plain index means epoch 0."""
    return key if isinstance(key, tuple) else (0, key)


class SampleStream(Sampler):
    """Sampler of the keys (epoch, index) of a whole training run; each epoch is a fresh permutation.

    Position p of the stream is sample p % length of epoch p // length; rank r of `world_size` takes every
    p = r (mod world_size). A run that resumes after n samples (over all ranks) passes `start=n` and sees
    exactly the samples of the uninterrupted run; joint batches do not depend on the number of processes.
    The stream ends at position `total` (samples over all ranks), or never if that is None.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        start: int = 0,
        total: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if length < 1:
            raise ValueError("the training set is empty")
        self.length, self.seed, self.start, self.total = length, seed, start, total
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        left = None if self.total is None else max(0, self.total - self.start)
        return islice(self._keys(self.start), self.rank, left, self.world_size)

    def _keys(self, position: int) -> Iterator[tuple[int, int]]:
        for epoch in count(position // self.length):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for index in order[position % self.length :]:
                yield epoch, int(index)
            position = 0

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("an endless stream has no length")
        return max(0, -(-(self.total - self.start - self.rank) // self.world_size))


class Readable(Dataset):
    """Wrapper of `dataset` that substitutes other samples for those with damaged or missing images.

    The substitute depends on the key alone, so that a resumed run sees the same samples. Each process reports
    each file once.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        """Return a sample or its substitute. Raises ValueError if no sample of the epoch can be read."""
        problems = []
        for candidate in self._candidates(key):
            try:
                sample = self.dataset[candidate]
            except UNREADABLE as error:
                problems.append(str(error))
            else:
                for problem in problems:
                    warn(f"{problem}: another image takes its place")
                return sample
        raise ValueError(f"none of {len(problems)} training images can be read; the first: {problems[0]}")

    def _candidates(self, key: Key) -> Iterator[Key]:
        """Yield the key, then all others of its epoch in an order that depends on the key alone."""
        yield key
        epoch, index = split_key(key)
        for other in np.random.default_rng([epoch, index]).permutation(len(self)).tolist():
            if other != index:
                yield epoch, other


def first_samples(dataset: Dataset, count: int) -> list:
    """Return the first `count` samples, or all if there are fewer, with substitutes for unreadable ones."""
    source = Readable(dataset)
    return [source[index] for index in range(min(count, len(dataset)))]


def readable(source: Any, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Yield `numbers` and their items in `source`, skipping those with damaged or missing images."""
    for number in numbers:
        try:
            yield number, source[number]
        except UNREADABLE as error:
            warn(f"{error}: it is left out")


_warned: set[str] = set()


def warn(text: str) -> None:
    """Print a warning once, on a line of its own below a progress bar, also from a DataLoader's process."""
    if text not in _warned:
        _warned.add(text)
        print(f"\nwarning: {text}", file=sys.stderr, flush=True)


def item_seed(seed: int, key: Key) -> int:
    """Return the seed in [0, 2^63) for all random choices of one sample."""
    epoch, index = split_key(key)
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> 1)


def item_generator(seed: int) -> torch.Generator:
    """Return a CPU generator for the noise of one sample, so that it is the same on every device."""
    return torch.Generator().manual_seed(seed)


DATA = "the processes do not see the same data: they found {} training images"
PLACE = "the processes would go on after {} steps or samples: all machines must see one output folder"


def check_same(value: int, problem: str) -> None:
    """Raise ValueError unless all processes have the same `value`; `problem` is formatted with all values."""
    if not torch.distributed.is_initialized():
        return
    values = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise ValueError(problem.format(values))
