"""The list of pinned requirements, its use in documented commands, and portability to Windows."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm import checkpoint
from ldm.data.dead_leaves import DeadLeaves
from ldm.data.degraded import DegDataset
from ldm.data.image import photographs, read_image, write_image
from ldm.data.inpaint import CocoInpaintingDataset
from ldm.data.paired import BlurDataset, ConcatSource, ImageFiles, PairedDataset
from ldm.data.pairs import Pair
from ldm.data.stream import Readable
from tutorial_train_deblur import DeblurDataset

ROOT = Path(__file__).parent.parent


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_every_requirement_is_pinned():
    for line in [*pins("requirements.txt"), *pins("requirements-dev.txt")[1:]]:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][0-9a-z.\-+]*(; .+)?", line), line
    assert pins("requirements-dev.txt")[0] == "-r requirements.txt"
    names = [
        line.split("==")[0].lower()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in pins(name)
    ]
    assert len(names) == len(set(names))


def test_conda_environment_uses_requirements_txt():
    environment = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yaml"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]


def test_ci_runs_the_second_readme_command():
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert "--demo" in commands[0] and "pytest" in commands[1]
    run = (ROOT / ".ci" / "run").read_text()
    assert commands[1].strip() in run and "python -m pytest -q -m slow" in run


NOT_ON_WINDOWS = """
import os, pathlib, runpy, signal, sys
import multiprocessing
root = sys.argv[1]

def import_scripts():
    for path in sorted(pathlib.Path(root).glob("*.py")):
        __import__(path.stem)

if __name__ == "__main__":
    sys.path.insert(0, root)
    import_scripts()  # and the packages, whose own use of the names below is none of ours
    for name, module in [*sys.modules.items()]:
        file = str(getattr(module, "__file__", ""))
        if file.startswith(root) and "site-packages" not in file:  # the environment may lie in the root
            del sys.modules[name]
    for name in "fork register_at_fork getuid geteuid getloadavg statvfs sched_getaffinity killpg".split():
        delattr(os, name)
    for name in "SIGKILL SIGALRM SIGHUP SIGUSR1".split():
        delattr(signal, name)
    for name in "resource fcntl pwd grp termios".split():
        sys.modules[name] = None  # cannot be imported
    import_scripts()
    __import__("benchmarks.head").head.begin()
    multiprocessing.set_start_method("spawn")  # Windows has no other
    sys.modules["train_srn"].main(sys.modules["train_srn"].Settings(
        output_dir=pathlib.Path("run"), dead_leaves=4, max_steps=2, crop_size=16, width=2, batch_size=2,
        val_crop=32, val_images=1, num_workers=1, cache=True, sharp_dir=pathlib.Path("photos"),
    ))
"""


@pytest.mark.slow
def test_scripts_run_without_modules_missing_on_windows(tmp_path):
    """All are imported, and one trains two steps with spawned data workers."""
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(photographs(("coffee.png", "rocket.jpg"))):
        write_image(tmp_path / "photos" / f"{number}.png", read_image(path)[:48, :64])
    (tmp_path / "windows.py").write_text(NOT_ON_WINDOWS)
    command = [sys.executable, "windows.py", str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] == 2


def test_datasets_can_be_pickled_for_spawned_workers(tmp_path):
    """Unpickled datasets give the same items, also with state that workers share."""
    photos = photographs(("coffee.png", "rocket.jpg"))
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(photos):
        write_image(tmp_path / "photos" / f"{number}.png", read_image(path)[:96, :128])
    pairs = [Pair(path, path) for path in photos]
    sets = [
        PairedDataset(pairs, 16, 0, cache=True),
        BlurDataset(ConcatSource((ImageFiles(photos), 1), (DeadLeaves(32, 2, 0), 1)), 16, 0),
        CocoInpaintingDataset(tmp_path / "photos", size=64),
        DeblurDataset(PairedDataset(pairs, 16, 0), "", 0.5, {}),
        DegDataset(tmp_path / "photos", "mend", resolution=32, degradation_types=["noise"]),
    ]
    for dataset in sets:
        again = pickle.loads(pickle.dumps(Readable(dataset)))[(3, 1)]
        expected = dataset[(3, 1)]
        assert all(torch.equal(v, again[k]) for k, v in expected.items() if isinstance(v, torch.Tensor))
