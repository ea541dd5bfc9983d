"""Reading and validating command-line settings."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import flags
from harness.settings import check_ranges, check_settings, read_settings

TRAINING = "tutorial_train_deblur tutorial_train_inpaint train_srn train_dbgan train_kontext_lora".split()


def as_words(name, value):
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", str(value)]


@pytest.mark.parametrize("script", TRAINING)
def test_flags_override_demo_settings(script):
    """A flag wins even if its value is the default without --demo; other settings are the demo's."""
    module = importlib.import_module(script)
    settings, demo = module.Settings, module.DEMO
    usual = settings()
    assert read_settings(settings, demo, ["--demo"]) == settings(demo=True, **demo)
    assert read_settings(settings, demo, []) == usual
    words = [word for name in demo for word in as_words(name, getattr(usual, name))]
    given = {name: getattr(usual, name) for name in demo}
    assert read_settings(settings, demo, ["--demo", *words]) == settings(demo=True, **given)


def test_kontext_demo_uses_the_given_photos(tmp_path, monkeypatch, capsys):
    """--hr_root overrides the demo's own photos."""
    module = importlib.import_module("train_kontext_lora")
    monkeypatch.chdir(tmp_path)
    words = "--demo --hr_root absent --batch_size 4".split()
    with pytest.raises(FileNotFoundError, match="absent"):
        module.main(read_settings(module.Settings, module.DEMO, words))
    assert not Path("outputs/kontext_demo/photos").exists()


@dataclass
class Ranges:
    count: flags.Count = 1
    fraction: flags.Fraction = 0.5
    decay: flags.Decay = 0.9
    weight: flags.Weight = 1.0


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("count", 0, "at least 1"),
        ("fraction", 1.5, r"in \[0, 1\]"),
        ("fraction", float("nan"), r"in \[0, 1\]"),
        ("decay", 1.0, r"in \[0, 1\)"),
        ("weight", -1.0, "at least 0"),
        ("weight", float("inf"), "finite and at least 0"),
    ],
)
def test_out_of_range_value_raises_with_its_name(name, value, limits):
    check_ranges(Ranges())
    with pytest.raises(ValueError, match=f"{name} must be .*{limits}, not {value}"):
        check_ranges(Ranges(**{name: value}))


@pytest.mark.parametrize(
    ("saved", "now", "way"),
    [
        ({"width": 32}, {"width": 16}, "To continue it: --width 32. To start anew: another --output_dir"),
        ({"cache": False}, {"cache": True}, "To continue it: --no_cache. To"),
        ({"sizes": (1, 2)}, {"sizes": ()}, "To continue it: --sizes 1 2. To"),
        ({"data": "a", "seed": 0}, {"data": None, "seed": 1}, "To continue it: --data a, --seed 0. To"),
        (
            {"samples": 12},
            {"samples": 11},
            "samples was 12, is 11. To continue it: the same number of training",
        ),
        ({"blurrer": "a"}, {"blurrer": "b"}, "blurrer was 'a', is 'b'. To continue it: the old ones"),
    ],
)
def test_changed_settings_raise_with_both_remedies(saved, now, way):
    common = {"epochs": 3, "num_workers": 8}
    path = Path("run/checkpoints/last.ckpt")
    check_settings({**common, **saved}, {**common, **saved, "num_workers": 0}, {"num_workers"}, path)
    with pytest.raises(ValueError) as problem:
        check_settings({**common, **saved}, {**common, **now}, set(), path)
    assert str(problem.value).startswith("run/checkpoints/last.ckpt is of a run with other settings: ")
    assert way in str(problem.value)
