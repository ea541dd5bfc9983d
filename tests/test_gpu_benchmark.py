"""The benchmark for whoever has a GPU, tried without one; and what the benchmarks have in common."""

import json
import re
from contextlib import nullcontext

import pytest
import torch

from benchmarks import gpu, head
from benchmarks.fake_cuda import fake_tensors
from benchmarks.plan import fake_fabric


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here: `python -m benchmarks.plan` counts"):
        gpu.main(gpu.Settings(tmp_path / "report.json"))
    assert not (tmp_path / "report.json").exists()


def test_every_section_runs_at_tiny_size(tmp_path, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    gpu.main(gpu.Settings(tmp_path / "report.json", tiny=True))
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) >= 15 and report["tiny"]
    numbers = [row["value"] for row in report["rows"] if row["unit"] != "of the time"]
    assert all(isinstance(number, float) for number in numbers), report["rows"]
    assert capsys.readouterr().out.count("| of the time |") == 2


class Stream:
    """A CUDA stream that is not there."""

    def __init__(self, device: object):
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA: no fake tensors"
)
@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_every_section_runs_on_fake_cuda_tensors(monkeypatch, section):
    """Ours and the peers': a mix of devices or types, which only a GPU would show, raises."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(gpu.srn_benchmark, "start_fabric", lambda precision: fake_fabric(precision, "cuda"))
    with fake_tensors():
        rows = list(section(True, "cuda"))
    assert len(rows) >= 2 and all(row.value == 5.0 for row in rows if row.unit == "GB")


def test_what_does_not_fit_stops_no_other(monkeypatch):
    def full(tiny, device):
        yield gpu.Row("before", 1.0, "s", 2.0)
        raise torch.OutOfMemoryError

    def broken(tiny, device):
        yield gpu.Row("of one", 2.0, "s")
        raise RuntimeError("two devices\nand more")

    def sound(tiny, device):
        yield gpu.Row("b", 5, "s", 9, True)

    monkeypatch.setattr(gpu, "SECTIONS", (full, broken, sound))
    rows = list(gpu.collect(True, "cpu"))
    assert [row.value for row in rows] == [1.0, "out of memory", 2.0, "failed: two devices", 5]
    assert [row.met for row in rows] == ["yes", "", "", "", "no"]


def test_the_head_names_the_machine_and_warns_of_a_load(monkeypatch, capsys):
    for load, warned in ((0.1, False), (0.4, True)):
        monkeypatch.setattr(head.os, "getloadavg", lambda load=load: (load, 0, 0))
        head.begin()
        shown = capsys.readouterr().out
        assert f"load before the start {load:.2f}" in shown and ("WARNING" in shown) == warned
        assert head.processor() in shown


def test_works_take_turns_and_ratios_are_of_pairs():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = head.in_turn(works, 3)
    assert order == list("ab" * 4) and [len(taken) for taken in times.values()] == [3, 3]
    assert head.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == "0.500 (0.500 to 0.500, 3 pairs)"


def test_what_arithmetic_bounds_is_counted_and_said():
    machine = head.rates("cpu", torch.float32, repeats=1)
    assert machine.product > 1e-3 and machine.convolution > 1e-3
    linear, convolution = torch.nn.Linear(1000, 1000), torch.nn.Conv2d(10, 10, 10)

    def step() -> None:
        linear(torch.ones(500, 1000))
        convolution(torch.ones(1, 10, 259, 259))

    said = head.bound("ours", step, head.Rates(product=0.1, convolution=0.05))
    products, convolutions = 2 * 500 * 1000**2 / 1e12, 2 * 10 * 10 * 100 * 250**2 / 1e12
    assert said.startswith(f"ours: {products + convolutions:.3g} TFLOP a step, {convolutions:.3g} of them")
    assert said.endswith(f"{1000 * (10 * products + 20 * convolutions):.0f} ms at least")


def test_time_in_the_kernels_that_both_sides_call_is_told_from_all_else():
    query, image, weight = torch.randn(1, 8, 512, 8), torch.randn(1, 16, 64, 64), torch.randn(16, 16, 3, 3)
    matrix = torch.randn(1000, 1000)
    works = [
        lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query),
        lambda: torch.nn.functional.conv2d(image, weight),
        lambda: matrix @ matrix,
        lambda: torch.randn(2000, 1000).tanh(),
    ]
    for place, work in enumerate(works):
        parts = [float(number) for number in re.findall(r"\d+\.?\d*", head.shares("ours", work))]
        assert parts[0] == pytest.approx(sum(parts[1:]), rel=0.05)
        assert len(parts) == 5 and parts[1 + place] == max(parts[1:])
