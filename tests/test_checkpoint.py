"""Checkpoint files are complete or absent, even if writing them fails or is killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ldm import checkpoint


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_saved_weights_load_unchanged(tmp_path, name):
    weights = {"x": torch.randn(3, 4), "y": torch.arange(5), "z": torch.randn(4, 3).t()}
    checkpoint.write_weights(tmp_path / name, weights)
    again = checkpoint.read_weights(tmp_path / name)
    assert again.keys() == weights.keys()
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "params", "params-ema", "model_state_dict", "model", "net"]
)
def test_weights_are_found_in_common_wrappers(tmp_path, wrapper):
    checkpoint.save(tmp_path / "a.pth", {wrapper: {"x": torch.ones(2)}, "epoch": 3})
    assert checkpoint.read_weights(tmp_path / "a.pth")["x"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_full_disk_keeps_the_old_file(tmp_path, name):
    """A file-size limit simulates the full disk."""
    checkpoint.write_weights(tmp_path / name, {"x": torch.ones(10)})
    before = (tmp_path / name).read_bytes()
    code = (
        "import resource, sys, torch\n"
        "from ldm import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    checkpoint.write_weights(sys.argv[1], {'x': torch.ones(1_000_000)})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True)
    assert f"cannot save {tmp_path / name} (what was there before is intact)" in run.stdout, run.stderr
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_error_message_reports_full_disk(tmp_path, monkeypatch):
    def write(temporary):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 14769920 vs 14769812")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    with pytest.raises(OSError, match=r"a.ckpt \(what was there before is intact\): the disk is full$"):
        checkpoint.write_atomically(tmp_path / "a.ckpt", write)
    with pytest.raises(OSError, match=r"cannot save .*unexpected pos"):
        checkpoint.write_atomically(tmp_path / "no_folder" / "a.ckpt", write)


def test_kill_while_saving_leaves_a_complete_file(tmp_path):
    path = tmp_path / "a.ckpt"
    code = (
        "import sys, torch\n"
        "from ldm import checkpoint\n"
        "for step in range(10_000):\n"
        "    checkpoint.save(sys.argv[1], {'step': step, 'x': torch.full((500_000,), float(step))})\n"
    )
    for pause in (0.0, 0.03, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code, path])
        while not path.is_file():
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = checkpoint.load(path)
        assert (content["x"] == content["step"]).all()
        path.unlink()


def test_random_states_are_restored(tmp_path):
    checkpoint.save(tmp_path / "states.ckpt", checkpoint.random_states())
    draws = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "states.ckpt"))
    assert draws == (random.random(), np.random.rand(), torch.rand(1).item())


def test_missing_or_damaged_files_raise_with_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        checkpoint.load(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        checkpoint.read_weights(tmp_path / "none.safetensors")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(FileNotFoundError, match="not found: .*none.pth; beside it are model.ckpt$"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list.ckpt is not a checkpoint: it holds a list"):
        checkpoint.load(tmp_path / "list.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(ValueError, match=r"empty.ckpt is damaged"):
        checkpoint.load(tmp_path / "empty.ckpt")
    for content in ({}, {"a": 1}, {3: torch.zeros(1)}, {"state_dict": [torch.zeros(1)]}, {"state_dict": "x"}):
        torch.save(content, tmp_path / "none.ckpt")
        with pytest.raises(ValueError, match=r"none.ckpt is not a checkpoint: it holds no tensors"):
            checkpoint.read_weights(tmp_path / "none.ckpt")
    checkpoint.save(tmp_path / "cut.ckpt", {"state_dict": {"x": torch.zeros(5000)}})
    whole = (tmp_path / "cut.ckpt").read_bytes()
    for length in (1, 100, 5000, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.ckpt is damaged"):
            checkpoint.load(tmp_path / "cut.ckpt")
