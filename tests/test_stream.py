"""The stream of training samples: each once per epoch, resumable, equal for any number of processes."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from harness.loading import make_loader
from ldm.data import stream
from ldm.data.decode import DamagedImage
from ldm.data.stream import Readable, SampleStream, first_samples, item_generator, item_seed, readable


class Echo(Dataset):
    """Dataset that returns the key and its seed."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"epoch": key[0], "index": key[1], "seed": item_seed(3, key)}


def test_every_epoch_is_a_new_permutation():
    keys = list(SampleStream(50, seed=0, total=200))
    epochs = [[index for epoch, index in keys if epoch == e] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert keys == list(SampleStream(50, seed=0, total=200))
    assert keys != list(SampleStream(50, seed=1, total=200))


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20, 30])
def test_resumed_stream_is_the_rest_of_the_stream(start):
    whole = list(SampleStream(7, seed=5, total=30))
    assert list(SampleStream(7, seed=5, start=start, total=30)) == whole[start:]
    assert (
        list(islice(SampleStream(7, seed=5, start=start), 30 - start)) == whole[start:]
    )  # the same without a total


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("start", [0, 6])
def test_ranks_divide_the_same_stream(world_size, start):
    whole = list(SampleStream(7, seed=5, start=start, total=31))
    streams = [SampleStream(7, 5, start, 31, rank, world_size) for rank in range(world_size)]
    ranks = [list(stream) for stream in streams]
    assert [len(stream) for stream in streams] == [len(keys) for keys in ranks]
    for position, key in enumerate(whole):
        assert ranks[position % world_size][position // world_size] == key


def test_batches_do_not_depend_on_number_of_workers():
    def batches(workers: int) -> list[dict]:
        stream = SampleStream(7, seed=1, total=20)
        return [
            {name: value.tolist() for name, value in batch.items()}
            for batch in DataLoader(Echo(), batch_size=3, sampler=stream, num_workers=workers)
        ]

    assert batches(0) == batches(2)
    assert len(batches(0)) == 7


def test_stream_length():
    assert len(SampleStream(7, 0, total=20)) == 20
    assert len(SampleStream(7, 0, start=18, total=20)) == 2
    assert len(SampleStream(7, 0, start=25, total=20)) == 0
    with pytest.raises(TypeError, match="endless"):
        len(SampleStream(7, 0))
    with pytest.raises(ValueError, match="empty"):
        SampleStream(0, 0)


def test_item_seeds_differ_and_fit_in_a_signed_integer():
    keys = [(seed, (epoch, index)) for seed in range(5) for epoch in range(20) for index in range(20)]
    seeds = {item_seed(seed, key) for seed, key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert item_seed(4, 9) == item_seed(4, (0, 9)) == item_seed(4, (0, np.int64(9)))
    torch.tensor(max(seeds))  # fits in int64
    bits = np.array([[seed >> bit & 1 for bit in range(62)] for seed in seeds])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06  # every bit is random


def test_item_generator_depends_on_seed():
    one, same, other = (torch.randn(5, generator=item_generator(seed)) for seed in (11, 11, 12))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---- unreadable samples


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(stream, "_warned", set())


class Torn(Echo):
    """Dataset with some unreadable samples."""

    def __init__(self, torn: tuple[int, ...]):
        self.torn = torn

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        key = key if isinstance(key, tuple) else (0, key)
        if key[1] in self.torn:
            raise (DamagedImage if key[1] % 2 else FileNotFoundError)(f"cannot read {key[1]}.png")
        return super().__getitem__(key)


def test_unreadable_sample_is_replaced_depending_only_on_key(capsys):
    torn = Readable(Torn((1, 4)))
    found = {epoch: [torn[(epoch, index)]["index"] for index in range(7)] for epoch in range(20)}
    assert all(indices[n] == n for indices in found.values() for n in (0, 2, 3, 5, 6))
    stand_ins = {indices[n] for indices in found.values() for n in (1, 4)}
    assert stand_ins == {0, 2, 3, 5, 6}  # different replacements
    assert torn[(3, 1)]["epoch"] == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert sorted(told) == [f"warning: cannot read {n}.png: another image takes its place" for n in (1, 4)]
    again = Readable(Torn((1, 4)))
    assert [again[(epoch, 1)]["index"] for epoch in reversed(range(20))] == [
        found[epoch][1] for epoch in reversed(range(20))
    ]


def test_no_readable_sample_raises():
    with pytest.raises(ValueError, match=r"none of 7 training images can be read; the first: cannot read 3"):
        Readable(Torn(tuple(range(7))))[(0, 3)]


def test_other_errors_are_not_caught():
    dataset = Torn(())
    dataset.torn = None
    with pytest.raises(TypeError):
        Readable(dataset)[(0, 3)]


def test_first_samples_returns_readable_samples():
    assert [item["index"] for item in first_samples(Torn((5,)), 3)] == [0, 1, 2]
    assert len(first_samples(Torn((5,)), 30)) == 7


def test_workers_use_same_replacements_and_warn_once_each(capfd):
    loader = make_loader(Torn((1, 4)), 1, 2, SampleStream(7, seed=0, total=28))
    found = [batch["index"].tolist() for batch in loader]
    told = capfd.readouterr().err
    for number in (1, 4):
        assert 1 <= told.count(f"cannot read {number}.png") <= 2
    alone = make_loader(Torn((1, 4)), 1, 0, SampleStream(7, seed=0, total=28))
    assert [batch["index"].tolist() for batch in alone] == found


def test_skipped_sample_is_reported_once(capsys):
    for _ in range(2):
        assert [number for number, _ in readable(Torn((1, 4)), range(6))] == [0, 2, 3, 5]
    assert capsys.readouterr().err.count("cannot read 1.png: it is left out") == 1
