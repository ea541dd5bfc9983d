"""benchmarks/gpu.py at tiny size without a GPU, and the functions that the benchmarks share."""

import json
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from benchmarks import gpu, gpu_figures, head
from benchmarks.fake_cuda import fake_tensors
from benchmarks.gpu_figures import Case, Row

FIGURES = (gpu_figures.srn, gpu_figures.dbgan, gpu_figures.controlnet, gpu_figures.kontext)


def test_missing_gpu_raises(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here: `python -m benchmarks.plan` counts"):
        gpu.main(gpu.Settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_stage_runs_at_tiny_size(tmp_path, monkeypatch, capfd):
    """Runs the processes, checks, figures and training command of a GPU run."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gpu.main(gpu.Settings(tmp_path, tiny=True))
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in gpu.LIMITS}
    assert all(stages.values()) and len(rows) >= 50
    wrong = [row for row in rows if row["stage"] != "machine" and not row["unit"]]
    assert [row["what"] for row in wrong] == ["deblurring network, weights"], wrong
    assert (tmp_path / "training" / "deblur" / "dbgan.safetensors").is_file()
    exact = [row for row in stages["checks"] if row["unit"] != "dB"]  # limits in dB are for full size
    assert len(exact) >= 22 and all(row["met"] == "yes" for row in exact), exact
    assert capfd.readouterr().out.count("| of the time |") == 2
    with pytest.raises(ValueError, match="report.jsonl exists: give another --output_dir"):
        gpu.main(gpu.Settings(tmp_path, tiny=True))


class Stream:
    """Stand-in for a CUDA stream."""

    def __init__(self, device: object):
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA: no fake tensors"
)
@pytest.mark.parametrize("section", FIGURES)
def test_every_figure_runs_on_fake_cuda_tensors(monkeypatch, section):
    """Mixed devices or dtypes, in our networks or the peers', raise as on a GPU."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(gpu_figures, "start_fabric", lambda: None)
    monkeypatch.setattr(gpu_figures.controlnet_step, "set_backend_flags", lambda: None)
    with fake_tensors():
        rows = [row for case in section(True, "cuda") for row in case.rows()]
    assert len(rows) >= 2 and all(row.value == 5.0 for row in rows if row.unit == "GB")


def test_both_sides_start_from_the_same_nonzero_weights():
    pytest.importorskip("diffusers")
    settings = gpu_figures.controlnet_step.Settings(1, image_size=64, width=32)
    networks = gpu_figures.controlnet_step.our_networks(settings, "cpu")
    for network in networks:
        assert all(parameter.any() for parameter in network.parameters() if parameter.ndim > 1)
    works = gpu_figures.controlnet_step.make_pair(settings, "cpu")
    ours, theirs = (work().item() for work in works.values())
    assert ours == pytest.approx(theirs, rel=1e-4)


def full() -> list[Row]:
    raise torch.OutOfMemoryError


def broken() -> list[Row]:
    raise RuntimeError("two devices\nand more")


def test_failed_case_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def sound() -> list[Row]:
        return [Row("a", 1.0, "s", 2.0), Row("b", 5, "s", 9, True)]

    cases = [Case("large", full), Case("sick", broken), Case("sound", sound)]
    monkeypatch.setattr(gpu, "cases_of", lambda stage, settings, seconds: cases)
    gpu.run_stage("srn", gpu.Settings(tmp_path), 1.0)
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == ["out of memory", "failed: two devices", 1.0, 5]
    assert [row["met"] for row in rows] == ["", "", "yes", "no"]
    assert capsys.readouterr().out.count("| srn |") == 4


@pytest.mark.slow
def test_crashed_or_hanging_stage_is_reported():
    assert gpu.in_process(partial(os._exit, 7), 60) == "ended with exit code 7"
    assert gpu.in_process(partial(gpu.time.sleep, 60), 0.1) == "stopped after 0 s"
    assert gpu.in_process(partial(min, 1, 2), 60) == ""


def test_begin_prints_the_machine_and_warns_of_load(monkeypatch, capsys):
    for load, warned in ((0.1, False), (0.4, True)):
        monkeypatch.setattr(head.os, "getloadavg", lambda load=load: (load, 0, 0))
        head.begin()
        shown = capsys.readouterr().out
        assert f"load before the start {load:.2f}" in shown and ("WARNING" in shown) == warned
        assert head.processor() in shown


def test_in_turn_alternates_and_ratio_is_computed_per_pair():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = head.in_turn(works, 3)
    assert order == list("ab" * 4) and [len(taken) for taken in times.values()] == [3, 3]
    assert head.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == "0.500 (0.500 to 0.500, 3 pairs)"
