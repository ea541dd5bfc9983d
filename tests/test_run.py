import csv
import errno
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from torch import nn

from harness.logs import MetricsCsv
from harness.run import Run, launched_nodes, start_fabric
from harness.settings import run_main
from ldm import checkpoint
from ldm.checkpoint import read_trained
from ldm.modules.ema import EMA

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    output_dir: Path = Path("outputs/test")
    learning_rate: float = 0.1
    sizes: list[int] = field(default_factory=lambda: [3, 4])
    num_workers: int = 0


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, key):
        epoch, index = key
        return {"x": torch.full((2,), epoch + index / 10), "name": f"file_{index}.png"}


def train(folder, steps=8, stop_at=None, save_every=4, poison=None, **changes):
    """Train for `steps` steps with noise from the global generator, whose state resuming must restore."""
    settings = Settings(output_dir=folder, **changes)
    fabric = start_fabric(seed=3)
    network = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    ema = EMA(network, 0.9)
    parts = {"state_dict": network, "optimizer": optimizer, "ema": ema}
    run = Run(fabric, folder, settings, parts, may_change=("num_workers",))
    for batch in run.batches(run.loader(Points(), 4, steps, 7, settings.num_workers), steps):
        loss = (network(batch["x"] + torch.randn(2)) - 1).square().mean()
        if run.step + 1 == poison:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(network)
        run.advance({"loss": loss}, batch["name"])
        if run.step == stop_at:
            return run
        if run.step % 3 == 0:
            means = run.means()
            run.log({"train/loss": means["loss"]})
        if run.step % save_every == 0:
            run.log({"score": -run.step})
            run.save(score=-run.step)
    run.finish("python infer.py")
    return run


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("stop_at", [5, 7])
def test_resumed_run_equals_uninterrupted_run(tmp_path, stop_at):
    train(tmp_path / "whole")
    train(tmp_path / "parts", stop_at=stop_at)
    assert checkpoint.load(tmp_path / "parts/checkpoints/last.ckpt")["step"] == 4
    run = train(tmp_path / "parts", num_workers=1)
    assert run.step == 8
    whole = checkpoint.load(tmp_path / "whole/checkpoints/last.ckpt")
    parts = checkpoint.load(tmp_path / "parts/checkpoints/last.ckpt")
    for state in (whole, parts):
        del state["settings"]["output_dir"], state["settings"]["num_workers"]
    assert same(whole, parts)
    tables = [(tmp_path / name / "logs/metrics.csv").read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    steps = [int(row["step"]) for row in csv.DictReader(tables[0].splitlines())]
    assert steps == [3, 4, 6, 8]


def test_best_checkpoint_is_kept_and_finished_run_does_not_train(tmp_path, capsys):
    train(tmp_path)
    before = checkpoint.load(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint.load(tmp_path / "checkpoints/best.ckpt")["step"] == 4  # the scores fall: -4, -8
    assert before["step"] == 8 and before["best"] == -4
    train(tmp_path)
    assert same(checkpoint.load(tmp_path / "checkpoints/last.ckpt"), before)
    assert "next: python infer.py" in capsys.readouterr().out


def test_run_killed_between_two_checkpoints_keeps_the_best(tmp_path, monkeypatch):
    save, written = checkpoint.save, []

    def killed(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    train(tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints/best.ckpt")["step"] == 4


def test_nan_loss_raises_with_step_and_files_and_keeps_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"loss = nan at step 6; its batch: file_\d.png, .*last.ckpt"):
        train(tmp_path, poison=6, steps=20, save_every=4)
    state = checkpoint.load(tmp_path / "checkpoints/last.ckpt")
    assert state["step"] == 4 and all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_non_finite_weights_are_not_saved(tmp_path):
    network = nn.Linear(1, 1)
    run = Run(start_fabric(), tmp_path, {}, {"state_dict": network})
    run.save()
    nn.init.constant_(network.weight, float("inf"))
    with pytest.raises(ValueError, match="weight weight is not finite"):
        run.save()
    assert torch.isfinite(checkpoint.load(run.last_checkpoint)["state_dict"]["weight"]).all()


def test_resuming_with_other_settings_raises(tmp_path):
    train(tmp_path, steps=4)
    train(tmp_path / "whole", steps=4)
    with pytest.raises(ValueError, match=r"learning_rate was 0.1, is 0.2"):
        train(tmp_path, steps=4, learning_rate=0.2)
    with pytest.raises(ValueError, match=r"it lacks optimizer"):
        checkpoint.save(tmp_path / "checkpoints/last.ckpt", {"state_dict": {}})
        train(tmp_path)
    with pytest.raises(ValueError, match=r"it lacks settings"):
        state = checkpoint.load(tmp_path / "whole/checkpoints/last.ckpt")
        checkpoint.save(tmp_path / "checkpoints/last.ckpt", state | {"settings": "x"})
        train(tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("state_dict", {"weight": torch.zeros(5, 5), "bias": torch.zeros(1)}),
        ("state_dict", {"weight": torch.zeros(1, 2)}),
        ("optimizer", {}),
        ("ema", None),
        ("processes", [{}]),
        ("step", []),
    ],
)
def test_checkpoint_that_does_not_fit_raises(tmp_path, part, value):
    train(tmp_path, steps=4)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.save(path, {**checkpoint.load(path, mmap=False), part: value})
    with pytest.raises(ValueError, match="last.ckpt does not fit this run or is damaged"):
        train(tmp_path, steps=4)


@pytest.mark.parametrize("part", ["ema", "settings"])
def test_checkpoint_parts_of_wrong_type_raise(tmp_path, part):
    checkpoint.save(tmp_path / "a.ckpt", {"state_dict": {"x": torch.zeros(1)}, part: 1.5})
    with pytest.raises(ValueError, match=f"a.ckpt is damaged: its {part} are a float"):
        read_trained(tmp_path / "a.ckpt")


def test_invalid_settings_in_metadata_raise(tmp_path):
    for text in ("{", "[1]"):
        checkpoint.write_weights(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, {"settings": text})
        with pytest.raises(ValueError, match="w.safetensors is damaged: its metadata 'settings' are no"):
            read_trained(tmp_path / "w.safetensors")


def test_images_are_logged_to_the_run_folder(tmp_path):
    run = Run(start_fabric(), tmp_path, {}, {"state_dict": nn.Linear(1, 1)})
    run.step = 12
    run.log_image("sample", np.zeros((4, 6, 3), np.uint8))
    assert (tmp_path / "images/sample_0000012.png").is_file()


def test_read_trained_returns_ema_weights(tmp_path):
    train(tmp_path, steps=4)
    weights, content = read_trained(tmp_path / "checkpoints/last.ckpt")
    settings = content["settings"]
    state = checkpoint.load(tmp_path / "checkpoints/last.ckpt")
    assert torch.equal(weights["weight"], state["ema"]["average"]["weight"])
    assert not torch.equal(weights["weight"], state["state_dict"]["weight"])
    assert settings["learning_rate"] == 0.1 and settings["output_dir"] == str(tmp_path)
    checkpoint.write_weights(tmp_path / "w.safetensors", weights)
    assert read_trained(tmp_path / "w.safetensors")[1] == {"settings": {}}


def train_plainly(devices, folder):
    """Train for three steps without noise, on one or two processes."""
    fabric = start_fabric(devices, seed=3)
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    run = Run(fabric, folder, {}, {"state_dict": network, "optimizer": optimizer})
    wrapped, optimizer = fabric.setup(network, optimizer)
    for batch in run.batches(run.loader(Points(), 4 // devices, 3, 7), 3):
        loss = (wrapped(batch["x"]) - 1).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        run.advance({"loss": loss}, batch["name"])
    run.log({"loss": run.means()["loss"]})
    run.save()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Joint batches and averaged gradients are the same, so the weights agree; logs are written once."""
    train_plainly(1, tmp_path / "1")
    script = tmp_path / "two.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    script.write_text(
        f"import sys; sys.path[:0] = {paths}; import test_run; test_run.train_plainly(2, sys.argv[1])"
    )
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path / "2"]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    one, two = (checkpoint.load(tmp_path / name / "checkpoints/last.ckpt") for name in "12")
    assert two["step"] == 3 and len(two["processes"]) == 2
    for name, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][name], atol=1e-6)
    rows = [list(csv.DictReader((tmp_path / name / "logs/metrics.csv").open())) for name in "12"]
    assert len(rows[0]) == len(rows[1]) == 1
    assert float(rows[0][0]["loss"]) == pytest.approx(float(rows[1][0]["loss"]), abs=1e-5)


def test_bad_batch_size_and_precision_raise(tmp_path):
    run = Run(start_fabric(), tmp_path, {}, {"state_dict": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        run.loader(Points(), 0, 1, 0)
    with pytest.raises(ValueError, match="precision must be one of 32, 16, bf16, not 'fp8'"):
        start_fabric(precision="fp8")


def test_metrics_csv_drops_later_and_incomplete_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsCsv(path, 0)
    table.append({"step": 1, "a": 0.5})
    table.append({"step": 2, "b": 1.5})
    table.append({"step": 3, "a": 2.5})
    assert path.read_text() == "step,a,b\n1,0.5,\n2,,1.5\n3,2.5,\n"
    with pytest.raises(ValueError, match="metrics.csv is damaged"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "metrics.csv").write_bytes(b"\xff\xfe\n\xff\n")
        MetricsCsv(tmp_path / "other" / "metrics.csv", 2)
    path.write_text(path.read_text() + "2,7")  # killed in the middle of a row
    MetricsCsv(path, 2).append({"step": 3, "a": 4})
    assert path.read_text() == "step,a,b\n1,0.5,\n2,,1.5\n3,4,\n"


def test_error_is_one_line_with_exit_code_1(monkeypatch, capsys):
    def main(settings):
        raise FileNotFoundError(f"no\nsuch file: {settings.output_dir}")

    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", "here", "--sizes", "5", "6"])
    with pytest.raises(SystemExit) as stop:
        run_main(main, Settings)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: no such file: here\n"


def test_full_disk_error_is_one_line_with_file_or_hint(monkeypatch, capsys, tmp_path):
    def main(settings):
        thread = threading.Thread(target=tensorboard_writes)
        thread.start()
        thread.join()
        tensorboard_writes()

    def tensorboard_writes():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit):
        run_main(main, Settings)
    said, hint = "No space left on device", "make space for the output, then run the same command again"
    assert capsys.readouterr().err == f"error: [Errno 28] {said}: {hint}\n"
    table = MetricsCsv(tmp_path / "metrics.csv", 0)
    table.append({"step": 1})
    table.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        table.append({"step": 2})


def test_error_in_a_loader_worker_is_one_line(monkeypatch, capsys, tmp_path):
    class Broken(Points):
        def __getitem__(self, key):
            raise ValueError("cannot read image broken.png")

    def main(settings):
        run = Run(start_fabric(), tmp_path, {}, {"state_dict": nn.Linear(1, 1)})
        list(run.batches(run.loader(Broken(), 2, 1, 0, num_workers=1), 1))

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit):
        run_main(main, Settings)
    assert capsys.readouterr().err.splitlines()[-1] == "error: ValueError: cannot read image broken.png"


def test_denormals_are_flushed():
    start_fabric()
    assert (torch.tensor([1e-30]) * 1e-10).item() == 0.0


def test_ema_with_decay_0_equals_the_parameters():
    network = nn.Linear(3, 2)
    ema = EMA(network, 0.0)
    with torch.no_grad():
        network.weight.add_(torch.randn(2, 3))
    ema.update(network)
    assert torch.equal(ema.average["weight"], network.weight)
    with pytest.raises(ValueError, match="ema_decay must lie in"):
        EMA(network, 1.0)


class Threads(Points):
    def __getitem__(self, key):
        return {"threads": cv2.getNumThreads()}


def test_loader_workers_use_one_opencv_thread(tmp_path):
    run = Run(start_fabric(), tmp_path, {}, {"state_dict": nn.Linear(1, 1)})
    before = cv2.getNumThreads()
    batches = list(run.loader(Threads(), 2, 2, 0, num_workers=1))
    assert max(batch["threads"].max().item() for batch in batches) <= 1 and cv2.getNumThreads() == before


def test_number_of_nodes_is_read_from_the_launcher(monkeypatch):
    assert launched_nodes() == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # set by torchrun
    assert launched_nodes() == 3
    monkeypatch.setattr(SLURMEnvironment, "detect", lambda: True)
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert launched_nodes() == 2
