"""The one list of pins, and that the documents' commands use it."""

import re
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_every_requirement_is_an_exact_pin():
    for line in [*pins("requirements.txt"), *pins("requirements-dev.txt")[1:]]:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][0-9a-z.\-+]*(; .+)?", line), line
    assert pins("requirements-dev.txt")[0] == "-r requirements.txt"
    names = [
        line.split("==")[0].lower()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in pins(name)
    ]
    assert len(names) == len(set(names))


def test_conda_repeats_no_pin():
    environment = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yaml"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]


def test_ci_runs_the_readmes_second_command():
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert "--demo" in commands[0] and "pytest" in commands[1]
    assert commands[1].strip() in (ROOT / ".ci" / "run").read_text()
