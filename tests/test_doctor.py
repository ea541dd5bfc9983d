"""Reports of `python -m harness.doctor`: this machine, damaged weights, missing packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import doctor
from ldm.checkpoint import read_metadata
from tests.tiny_flux import write_tiny_folder

REAL = doctor.MODELS


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """Copy the included weights."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in doctor.INCLUDED:
        copy = shutil.copytree if (REAL / name).is_dir() else shutil.copy
        copy(REAL / name, folder / name)
    monkeypatch.setattr(doctor, "MODELS", folder)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    return folder


def test_no_problem_with_included_weights(models, capsys):
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 30 and "PROBLEM" not in text
    for part in ("works: DBGAN restored a test image", "srn_deblur.safetensors: SRN, 86 tensors"):
        assert part in text
    assert f"torch {torch.__version__}" in text and "small_kontext: FLUX: transformer and autoencoder" in text


@pytest.mark.slow
def test_damaged_or_missing_default_weights_fail_the_main_job(models, capsys):
    path = models / doctor.BEST
    path.write_bytes(path.read_bytes()[:-1000])
    assert doctor.main() == 1
    text = capsys.readouterr().out
    problem = f"{path} is damaged or not a safetensors file"
    assert f"main job  FAILS: error: {problem}" in text and f"{doctor.BEST}: PROBLEM: {problem}" in text
    assert f"next      get these included files anew: {doctor.BEST}" in text
    assert "python infer.py" not in text
    path.unlink()
    assert f"checkpoint not found: {path}" in doctor.describe(path, "DBGAN")


@pytest.mark.slow
def test_main_job_reports_wrong_shapes(models):
    path = models / doctor.BEST
    wrong = {**load_file(path), "deblur.last.bias": torch.zeros(5)}
    save_file(wrong, path, read_metadata(path))
    expected = f"{path} does not fit RestorationUNet: last.bias is (5,)"
    assert doctor.try_main_job().startswith(f"error: {expected}")


def test_user_files_are_identified_and_problems_reported(models):
    shutil.copy(models / "bgan.safetensors", models / "dbgan.safetensors")
    shutil.copy(models / "small_diffusion.safetensors", models / "v1-5.safetensors")
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, models / "mine.ckpt")
    write_tiny_folder(models / doctor.FLUX, models / "run", "mend")
    (models / "small_kontext" / "ae.safetensors").unlink()
    lines = doctor.check_weights()
    assert "dbgan.safetensors: PROBLEM: BGAN, not DBGAN" in lines
    assert "v1-5.safetensors: Stable Diffusion, 339 tensors" in lines
    assert "mine.ckpt: of an unknown kind (other.weight), 1 tensors" in lines
    found = {line.partition(":")[0]: line for line in lines}
    assert "text_encoder/config.json MISSING" in found[doctor.FLUX]
    assert "ae.safetensors MISSING" in found["small_kontext"]
    steps = doctor.next_steps(["all"], lines, "")
    assert steps == [
        "get these included files anew: dbgan.safetensors, small_kontext",
        "python infer.py --input photo.jpg",
    ]


def test_flux_file_with_wrong_shapes_is_reported(models):
    path = models / "small_kontext" / "ae.safetensors"
    shutil.copy(models / "small_kontext" / "flux1-kontext-dev.safetensors", path)
    assert "ae.safetensors does not fit FluxAutoencoder" in doctor.describe(path.parent, "FLUX")


def test_package_versions_that_differ_from_pins_are_reported(monkeypatch):
    real = doctor.find_version
    versions = {"numpy": "1.0", "gradio": "", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "find_version", lambda name: versions.get(name, real(name)))
    summary, numpy, gradio = doctor.check_packages()
    assert summary == "19 of 21 are as pinned in requirements.txt"
    assert numpy.startswith("numpy 1.0 instead of 2.") and numpy.endswith("; needed by: Every script")
    assert gradio.startswith("gradio is missing instead of 6.") and gradio.endswith("gradio_restore.py")
    assert doctor.next_steps([summary, numpy], [], "x")[0] == "uv pip install -r requirements.txt"


@pytest.mark.parametrize("name", ["torch", "einops"])
def test_missing_package_is_reported(name):
    code = f"""
import sys
sys.modules[{name!r}] = None  # cannot be imported
from harness import doctor
doctor.try_main_job = lambda: "no"
sys.exit(doctor.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=doctor.ROOT)
    assert run.returncode == 1 and run.stderr == ""
    assert f"PROBLEM: import of {name}" in run.stdout and "main job  FAILS: no" in run.stdout
