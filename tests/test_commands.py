"""The README and docs: every command is parsed and runs, every flag exists and has a help line."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import infer
import tutorial_train_deblur
from harness.settings import read_settings
from ldm import checkpoint
from ldm.data import demo
from ldm.data.image import write_image
from ldm.models.prompts import prompt_file
from ldm.modules.blind_wiener import BlindWiener
from ldm.modules.generators import make_mprnet, make_nafnet
from ldm.modules.nafnet import NAFNet
from tests.faults import tiny_runs
from tests.tiny_flux import write_tiny_folder
from train_srn import SRNDeblurNet

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("README*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "training" / "README.md",
]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(ROOT / "ldm" / "data").glob("*.py"), *(ROOT / "extras").glob("*.py")]
    if "    run_main(" in path.read_text(encoding="utf-8")
)


def module_of(script):
    name = script.removesuffix(".py").replace("/", ".")
    return importlib.import_module("tests.faults.__main__" if name == "tests.faults" else name)


def settings_of(script):
    """Return the settings class of a script, or a dictionary of one class per subcommand."""
    module = module_of(script)
    return getattr(module, "COMMANDS", None) or module.Settings


def explanations(settings):
    """Return the help line of each option."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        read_settings(settings, words=["--help"])
    lines = text.getvalue().splitlines()
    column = next(line.index("show this help") for line in lines if "show this help" in line)
    found, option = {}, None
    for line in lines:
        if re.match(r"\W{0,4}--?\w", line):
            option = line.strip("│ ").split()[0].rstrip(",")
            found[option] = line[column:] if line[column - 1] == " " else ""
        elif option and not line[:column].strip("│ "):
            found[option] += line[column:]
    return {name: re.sub(r"\((default|required).*", "", line).strip("│ ") for name, line in found.items()}


def all_settings():
    for script in SCRIPTS:
        settings = settings_of(script)
        if isinstance(settings, dict):
            yield from ((f"{script} {name}", one) for name, one in settings.items())
        else:
            yield script, settings


def commands():
    """Yield (page, command) for every command line that calls one of our scripts, in page order."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        script = r"python (?:[\w/.]+\.py\b|-m (?:benchmarks|extras|ldm|tests)\.[\w.]*\w)"
        found = re.findall(rf"^(?: {{4}}|.*&& .*)?.*?(?<!`){script}.*$", text, re.M)
        found += re.findall(rf"`({script}[^`]*)`", text)
        yield from ((page.name, " ".join(line.split())) for line in found)


NO_WORK = ([], ["--help"])  # no arguments, or only help


def split(line):
    """Return script and arguments; add infer.py's subcommand where the checkpoint would determine it."""
    script, *words = shlex.split(line[line.rindex("python ") :], comments=True)[1:]
    if script == "infer.py" and words not in NO_WORK and words[0].startswith("--"):
        given = "srn" if "--checkpoint_path" in words else infer.BEST
        words = ["inpaint" if "--input_mask" in words else given, *words]
    return (words[0], words[1:]) if script == "-m" else (script, words)


COMMANDS = {}
for where, command in commands():
    COMMANDS.setdefault(command, where)
COMMANDS = [*COMMANDS.items()]
IDS = [f"{page}: {line[:60]}" for line, page in COMMANDS]


@pytest.mark.parametrize(("line", "page"), COMMANDS, ids=IDS)
def test_every_command_in_the_docs_is_parsed(line, page):
    script, words = split(line)
    if words not in NO_WORK:
        read_settings(settings_of(script), words=words)


@cache
def flags_of(settings):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        read_settings(settings, words=["--help"])
    return {*re.findall(r"--\w+", text.getvalue())}


OTHERS = """python torch-backend no-project allow-existing logdir nodes ntasks-per-node gpus-per-node nnodes
nproc_per_node node_rank master_addr master_port local-dir collect-only check cov""".split()
# flags of uv, tensorboard, srun, torchrun, hf, pytest and ruff


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_named_in_the_docs_exists(page):
    known = set().union(*(flags_of(settings) for _, settings in all_settings()))
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "faults").glob("*.py")]
    measuring = "".join(path.read_text(encoding="utf-8") for path in files)
    for flag in sorted({*re.findall(r"(?<![\w-])--([a-z][\w-]+)", page.read_text(encoding="utf-8"))}):
        of_those = re.search(rf"--{flag}\b|^ +{flag}: ", measuring, re.M)
        assert f"--{flag}" in known or flag in OTHERS or of_those, f"{page.name}: --{flag}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_its_own_help_line(script):
    for name, settings in all_settings():
        if name.split()[0] == script:
            lines = explanations(settings)
            assert "--help" in lines or "-h" in lines
            silent = [option for option, line in lines.items() if not line]
            assert not silent, f"{name}: {silent}"
            assert len({*lines.values()}) == len(lines), f"{name}: {sorted(lines.values())}"


# ---- running the commands: these flags are appended for tiny networks and small images

TINY = ROOT / "models" / "cldm_tiny_deblur.yaml"
FEW = "--batch_size 2 --num_workers 0 --precision 32"
CONTROL = (
    f"{FEW} --image_size 64 --max_steps 2 --save_steps 2 --val_samples 2 --val_steps 2 --val_ddim_steps 1"
)
PLAIN = f"{FEW} --max_steps 1 --crop_size 32 --val_crop 32 --no_compile"
SMALL = {
    "tutorial_train_deblur.py": f"{CONTROL} --config_path {TINY} --val_fraction 0.3 "
    "--perceptual_loss_weight 0",
    "tutorial_train_inpaint.py": f"{CONTROL} --config_path {TINY.with_stem('cldm_tiny_inpaint')}",
    "train_srn.py": f"{PLAIN} --width 2 --val_images 1",  # 2 channels, times 16 with --sampling
    "train_dbgan.py": f"{PLAIN} --width 4 --blocks 1 --accumulate 1 --perceptual_loss_weight 0",
    "train_kontext_lora.py": "--max_steps 1 --resolution 32 --rank 2 --batch_size 1 --accumulate 1 "
    "--num_workers 0 --preview_steps 1",
    "extras.train_small_base": "--photos PHOTOS --pieces 6 --autoencoder_steps 1 --unet_steps 1 "
    "--flux_steps 1 --warmup 1 --batch_size 2 --precision 32 --models written",
    "extras.train_blind_wiener": "--crops 8 --held_out 4 --steps 1 --warmup 1 --batch_size 2",
    "extras.convert_lora": "--overwrite",
    "tool_add_control.py": f"--config {TINY} --overwrite",
    "tool_export_control.py": "--overwrite",
    "infer.py": "--overwrite",
    "tool_make_deblur_dataset.py": "--num_samples 8 --image_size 64 --num_workers 1 --blur_scale 0.3",
    "tool_make_dbgan_dataset.py": "--patch_size 32",
}
FEW_STEPS = f"{FEW} --max_steps 2 --save_steps 2 --val_steps 2 --val_samples 2"
SHORT = {  # commands on the included small models
    "tutorial_train_deblur.py": f"{FEW_STEPS} --val_fraction 0.3",
    "tutorial_train_inpaint.py": FEW_STEPS,
    "tool_add_control.py": "--overwrite",
}
# not run here: several devices or nodes, the server and the export (tested elsewhere), slow commands
ELSEWHERE = (
    "srun ",
    "torchrun ",
    "--devices ",
    "gradio_restore.py",
    "-m extras.export_onnx",
    "-m benchmarks.",
    "-m tests.",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Create a folder with tiny versions of all files that the commands name."""
    folder = tmp_path_factory.mktemp("commands")
    place = folder / "place"
    tiny_runs.make_test_files(place)
    copies = {"gopro": "gopro/train gopro/test training/GOPRO_Large/train training/GOPRO_Large/test PAIRS"}
    copies |= {
        "photos": "PHOTOS HELD_OUT photos photos/train photos/held_out my_photos sharp_photos clean damaged",
        "real": "RWBI/train RWBI/valid",
    }
    copies |= {"gopro/GOPR0/blur": "BLURRY photos/blur", "gopro/GOPR0/sharp": "SHARP photos/sharp"}
    for source, names in copies.items():
        for name in names.split():
            shutil.copytree(place / source, folder / name)
    prompt = "restore this degraded photograph"
    (folder / "restored").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_image(folder / "photo.jpg", picture)
    write_image(folder / "kernel.png", picture[:5, :5])
    for path in (folder / "SHARP").iterdir():
        shutil.copy(path, folder / "restored" / f"deblurred_{path.name}")
    weights = checkpoint.read_weights(place / "deblur.safetensors")
    base = {name: value for name, value in weights.items() if not name.startswith("control_model.")}
    (folder / "models").mkdir()
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "v2-1_512-ema-pruned.safetensors"):
        checkpoint.write_weights(folder / "models" / name, base)
    published = {
        "control_v11p_sd15_inpaint": {name: weights[name] for name in weights if name not in base},
        "control_v11f1e_sd15_tile": {name: weights[name] for name in weights if name not in base},
        "NAFNet-GoPro-width64": {"params": make_nafnet(8, 2).state_dict()},
        "model_deblurring": {"state_dict": make_mprnet(12, 2).state_dict()},
        "model_params": SRNDeblurNet(2).state_dict(),
    }
    for name, content in published.items():
        checkpoint.save(folder / "models" / f"{name}.pth", content)
    checkpoint.write_weights(folder / "models" / "srn_deblur.safetensors", SRNDeblurNet(2).state_dict())
    wiener = folder / "outputs" / "blind_wiener"
    wiener.mkdir(parents=True)
    checkpoint.write_weights(wiener / "blind_wiener.safetensors", BlindWiener().state_dict())
    nafnet = NAFNet(4, [1], 2, [1]).state_dict()  # key names of the NAFNet authors
    checkpoint.save(folder / "models" / "NAFNet-SIDD-width32.pth", {"params": nafnet})
    flux = folder / "models" / "FLUX.1-Kontext-dev"
    (folder / "outputs" / "kontext_lora").mkdir(parents=True)
    for path in (ROOT / "models").glob("small_*"):
        (folder / "models" / path.name).symlink_to(path)
    run = folder / "outputs" / "kontext_lora"
    write_tiny_folder(flux, run, prompt)
    shutil.copy(prompt_file(run, prompt), folder / "restored" / ".prompt.safetensors")
    foreign = {"lora_A": torch.zeros(2, 128), "lora_B": torch.zeros(128, 2)}
    names = {name: f"transformer.transformer_blocks.0.attn.to_q.{name}.weight" for name in foreign}
    checkpoint.write_weights(folder / "other.safetensors", {names[name]: foreign[name] for name in foreign})
    return folder


RUNS = {}  # (script, *arguments) -> the first command line with them
for line, page in COMMANDS:
    script, words = split(line)
    if words not in NO_WORK and not any(word in line for word in ELSEWHERE):
        mark = [pytest.mark.slow] if script == "extras.train_small_base" else []
        RUNS.setdefault((script, *words), pytest.param(line, marks=mark, id=f"{page}: {line[:60]}"))


@pytest.mark.parametrize("line", RUNS.values())
def test_every_command_runs(line, workplace, monkeypatch, capsys):
    """Commands run in page order in one folder, because later ones use the outputs of earlier ones."""
    script, words = split(line)
    if script == "infer.py" and words[0] == "network":
        pytest.importorskip("spandrel")
    samples = script == "infer.py" and words[0] in ("deblur", "inpaint", "kontext")
    if samples and "--method" not in words:
        words += ["--num_inference_steps", "1"]
    if "--base_path" in words:
        words += ["--config_path", str(TINY)]
    if script == "tutorial_train_inpaint.py" and "--demo" not in words:
        words += ["--output_dir", "RUN"]
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(demo, "LEAVES", 20)
    few = replace(tutorial_train_deblur.DEMO_DATA, num_samples=12, num_workers=1)
    monkeypatch.setattr(tutorial_train_deblur, "DEMO_DATA", few)
    module = module_of(script)
    main = module.restore_files if script == "infer.py" else module.main
    real = "small_" in line or ("--demo" in words and script.startswith("tutorial"))
    words += (SHORT if real else SMALL).get(script, SMALL.get(script, "")).split()
    if script == "train_dbgan.py" and "unet" in line:
        words += ["--crop_size", "64"]
    settings = read_settings(settings_of(script), getattr(module, "DEMO", None), words)
    if script.startswith(("train_", "tutorial_")):  # the pages show several runs with one output folder
        for part in ("checkpoints", "blur", "deblur"):
            shutil.rmtree(Path(settings.output_dir) / part, ignore_errors=True)
    main(settings)
