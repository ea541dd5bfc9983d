"""What `python -m harness.doctor` says of this machine, of damaged weights and of missing packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import doctor


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A copy of SRN's included weights."""
    copy = Path(shutil.copy(doctor.SRN, tmp_path))
    monkeypatch.setattr(doctor, "SRN", copy)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    return copy


def test_all_is_well_here(weights, capsys):
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 20 and "works: SRN restored a test image" in text
    assert f"torch {torch.__version__}" in text and "next      python infer.py" in text


def test_without_srn_the_main_job_fails(weights, capsys):
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert f"main job  FAILS: error: {weights} is damaged or not a safetensors file" in text
    assert "python infer.py" not in text


def test_packages_of_other_versions_are_named(monkeypatch):
    real = doctor.find_version
    versions = {"numpy": "1.0", "gradio": "", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "find_version", lambda name: versions.get(name, real(name)))
    summary, numpy, gradio = doctor.check_packages()
    assert summary == "19 of 21 are as pinned in requirements.txt"
    assert numpy.startswith("numpy 1.0 instead of 2.") and numpy.endswith("; needed by: Every script")
    assert gradio.startswith("gradio is missing instead of 6.") and gradio.endswith("gradio_restore.py")


def test_a_missing_torch_is_listed():
    code = """
import sys
sys.modules["torch"] = None  # cannot be imported
from harness import doctor
doctor.try_main_job = lambda: "no"
sys.exit(doctor.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=doctor.ROOT)
    assert run.returncode == 1 and run.stderr == ""
    assert "cannot be used: import of torch" in run.stdout and "main job  FAILS: no" in run.stdout
