"""The command line as the scripts read it."""

import importlib
from pathlib import Path

import pytest

from harness.settings import read_settings

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
