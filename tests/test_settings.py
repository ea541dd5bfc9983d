"""The command line as the scripts read it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from harness.settings import check_settings, read_settings

TRAINING = "tutorial_train_deblur tutorial_train_inpaint train_srn train_dbgan train_kontext_lora".split()


def as_words(name, value):
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", str(value)]


@pytest.mark.parametrize("script", TRAINING)
def test_flags_beside_demo_count(script):
    """Also those whose value is what it would be without --demo; and all that is not given is the demo's."""
    module = importlib.import_module(script)
    settings, demo = module.Settings, module.DEMO
    chosen = read_settings(settings, demo, ["--demo"])
    assert chosen == settings(demo=True, **demo)
    usual = settings()
    assert read_settings(settings, demo, []) == usual
    for name in demo:
        value = getattr(usual, name)
        chosen = read_settings(settings, demo, ["--demo", *as_words(name, value)])
        assert chosen == settings(demo=True, **demo | {name: value}), name


def test_flags_beside_demo_count_from_python_too(tmp_path, monkeypatch, capsys):
    """The Kontext demonstration trains on the photographs that it is given."""
    module = importlib.import_module("train_kontext_lora")
    monkeypatch.chdir(tmp_path)
    words = "--demo --hr_root absent --batch_size 4".split()
    with pytest.raises(FileNotFoundError, match="absent"):
        module.main(read_settings(module.Settings, module.DEMO, words))
    assert not Path("outputs/kontext_demo/photos").exists()


@dataclass
class Knobs:
    """Turn knobs."""

    often: int = 1  # the one that is turned
    MORE: ClassVar[None] = None
    seldom: int = 2  # another


def test_the_help_shows_what_is_used_most(capsys):
    printed = []
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            read_settings(Knobs, words=[word])
        printed.append(capsys.readouterr().out)
    assert all("--often" in text and "the one that is turned" in text for text in printed)
    assert "--seldom" not in printed[0] and "1 more: --help_all" in printed[0]
    assert "--seldom" in printed[1] and "another" in printed[1]
    assert read_settings(Knobs, words=["--seldom", "5"]) == Knobs(seldom=5)


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
def test_other_settings_are_refused_with_both_ways_on(saved, now, way):
    common = {"epochs": 3, "num_workers": 8}
    path = Path("run/checkpoints/last.ckpt")
    check_settings({**common, **saved}, {**common, **saved, "num_workers": 0}, {"num_workers"}, path)
    with pytest.raises(ValueError) as problem:
        check_settings({**common, **saved}, {**common, **now}, set(), path)
    assert str(problem.value).startswith("run/checkpoints/last.ckpt is of a run with other settings: ")
    assert way in str(problem.value)
