"""A short version of the fault tests in tests/faults: kills, a full disk, malformed inputs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from ldm import checkpoint
from tests.faults import __main__ as faults
from tests.faults import bad_inputs, damage, input_slots
from tests.faults.tiny_runs import (
    Result,
    command,
    make_test_files,
    prepare_output,
    require_success,
    run,
    script,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked: no CUDA")
# Names in SLOTS of fast cases, for every kind of input file.
QUICK = (
    "srn --data",
    "dbgan blur --blur_data",
    "kontext --hr_root",
    "infer srn folder",
    "evaluate --sharp",
    "tool_make_deblur_dataset source",
    "tool_make_mask --image",
    "srn --data json lines",
    "srn --data list",
    "dbgan paired --data h5",
    "infer srn weights",
    "infer kontext weights",
)
# Slots with an image, or a mask, of each of the five trainers.
IN_TRAINING = ("deblur --data_root", "inpaint --image_dir", "inpaint --mask_dir", "srn --data")
IN_TRAINING += ("dbgan paired --data", "kontext --hr_root")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Create the inputs of tiny runs in a separate process, so that this one starts no threads."""
    folder = tmp_path_factory.mktemp("faults")
    require_success(run(partial(make_test_files, folder / "place"), folder / "log"))
    return folder / "place"


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "count"), [("srn_init", 3), ("kontext_captions", 3)])
def test_killed_runs_equal_uninterrupted_run(place, tmp_path, trainer, count):
    tally = faults.kills(trainer, place, tmp_path, 3, count, tqdm(disable=True))
    assert tally["kills"] == count and tally["runs"] >= 1


@pytest.mark.slow
def test_killed_rank_ends_the_other_and_resumed_run_is_equal(place, tmp_path):
    tally = faults.rank_kills("srn", place, tmp_path, 0, 1, tqdm(disable=True))
    assert tally["kills"] == 1 and tally["runs"] >= 1


def test_full_disk_loses_no_data(place, tmp_path):
    said = faults.fill_disk("srn", place, tmp_path, part=0.0, nth=4)
    assert said.startswith("error: ") and ("No space left" in said or "cannot" in said)


@pytest.fixture(scope="module")
def ready(place, tmp_path_factory) -> Path:
    """Add trained files to `place`."""
    input_slots.make_ready(place, tmp_path_factory.mktemp("ready"), ("srn", "kontext"))
    return place


@pytest.mark.parametrize("number", range(24))
def test_malformed_inputs_are_read_or_give_one_error_line(ready, tmp_path, number, monkeypatch):
    quick = [slot for slot in input_slots.SLOTS if slot.name in QUICK]
    assert len(quick) == len(QUICK)
    monkeypatch.setattr(bad_inputs, "SLOTS", quick)
    name, problem, result = bad_inputs.try_one(number, 5, ready, tmp_path)
    assert not problem, f"{name}: {result.err}"


@pytest.mark.parametrize("name", IN_TRAINING)
def test_training_skips_damaged_image_with_one_warning(ready, tmp_path, name):
    case = next(slot for slot in input_slots.SLOTS if slot.name == name).build(tmp_path, ready)
    damage.truncated(case.victim, np.random.default_rng(0))
    result = require_success(run(script(case.arguments), tmp_path / "log"))
    told = [line for line in result.err.splitlines() if line.startswith("warning: cannot read image")]
    assert len({*told}) == 1 and f" {case.victim}: " in told[0], result.err


# ---- the checks themselves detect faults


def test_checks_detect_differences_and_lost_progress(place, tmp_path):
    prepare_output("srn", place, tmp_path / "a")
    require_success(run(script(command("srn", place, tmp_path / "a")), tmp_path / "log"))
    require_success(run(script(command("srn", place, tmp_path / "b", learning_rate=2e-4)), tmp_path / "log"))
    with pytest.raises(ValueError, match="checkpoints/best.ckpt differs in state_dict"):
        faults.check_equal(tmp_path / "a", tmp_path / "b")
    steps = tmp_path / "steps"
    faults.check_progress(tmp_path / "a", steps)
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    content = path.read_bytes()
    checkpoint.save(path, {**checkpoint.load(path, mmap=False), "step": 3})
    with pytest.raises(ValueError, match="last.ckpt was of step 12 and is of step 3"):
        faults.check_progress(tmp_path / "a", steps)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        faults.check_progress(tmp_path / "a", steps)
    path.unlink()
    with pytest.raises(ValueError, match="other files: checkpoints/last.ckpt"):
        faults.check_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("code", "err", "expected"),
    [
        (1, "warning\nerror: cannot read x.png\n", ""),
        (0, "", ""),
        (None, "", "it hangs"),
        (-11, "", "exit code -11"),
        (1, "Traceback (most recent call last):\nKeyError: 1\n", "a traceback"),
        (1, "nothing\n", "0 lines begin with error:"),
        (1, "error: a\nerror: b\n", "2 lines begin with error:"),
        (0, "error: a\n", "an error line and exit code 0"),
    ],
)
def test_complaint_detects_bad_endings(code, err, expected):
    assert bad_inputs.complaint(Result(code, "", err)).startswith(expected)
    assert bool(bad_inputs.complaint(Result(code, "", err))) == bool(expected)


def test_half_done_detects_partial_outputs_and_executed_code(tmp_path):
    (tmp_path / "out").mkdir()
    victim = tmp_path / "out" / "a.png"
    victim.write_bytes(b"\x89PNG")
    assert bad_inputs.half_done(tmp_path, victim) == ""
    assert bad_inputs.half_done(tmp_path, tmp_path / "b.png").startswith("half-written: cannot read image")
    (tmp_path / damage.MARKER).touch()
    assert bad_inputs.half_done(tmp_path, victim) == "code from a file was run"


def test_hostile_pickle_runs_without_weights_only(tmp_path):
    """The pickle is a real attack: torch.load without weights_only executes it."""
    path = tmp_path / "a.ckpt"
    damage.hostile_pickle(path, np.random.default_rng(0))
    run(partial(torch.load, path, weights_only=False), tmp_path / "log")
    assert (tmp_path / damage.MARKER).exists()
