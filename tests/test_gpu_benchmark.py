"""The benchmark for whoever has a GPU, tried without one; and what the benchmarks have in common."""

import json

import pytest
import torch

from benchmarks import gpu, head


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


def test_what_does_not_fit_stops_no_other(monkeypatch):
    def full(tiny, device):
        yield gpu.Row("before", 1.0, "s", 2.0)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "SECTIONS", (full, lambda tiny, device: iter([gpu.Row("b", 5, "s", 9, True)])))
    rows = list(gpu.collect(True, "cpu"))
    assert [row.value for row in rows] == [1.0, "out of memory", 5]
    assert [row.met for row in rows] == ["yes", "", "no"]


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
