"""Report what this machine has for these scripts, what is missing, and what to do next, on one screen.

    python -m harness.doctor

Exit code 1 if the main job fails: python infer.py --input photo.jpg with the included DBGAN, which is tried
on a tiny image. Other weights are checked by tensor names and shapes, without reading the tensors.
Packages that may be missing are imported only where they are used.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
BEST, FLUX = "dbgan.safetensors", "FLUX.1-Kontext-dev"
INCLUDED = {  # files included in models/, and the kind that each must be
    "srn_deblur.safetensors": "SRN",
    BEST: "DBGAN",
    "bgan.safetensors": "BGAN",
    "small_diffusion.safetensors": "Stable Diffusion",
    "small_deblur.safetensors": "ControlNet",
    "small_inpaint.safetensors": "ControlNet",
    "small_kontext_lora.safetensors": "LoRA of FLUX",
    "small_kontext": "FLUX",
}
KINDS = {  # by the prefix of tensor names; a ControlNet's file may also hold its Stable Diffusion
    "inblock.": "SRN",
    "deblur.": "DBGAN",
    "blur.": "BGAN",
    "control_model.": "ControlNet",
    "model.diffusion_model.": "Stable Diffusion",
    "double_blocks.": "transformer of FLUX",
    "lora_unet_": "LoRA of FLUX",
    "features.": "VGG-19",
}
OPTIONAL = {
    "bitsandbytes": "adamw8bit",
    "imagecodecs": "compressed TIFF files",
    "onnxruntime": "ONNX export",
    "spandrel": "networks of other authors",
}


def check_system() -> list[str]:
    """Describe Python, operating system, free disk space, and the NVIDIA driver with its GPUs."""
    free = shutil.disk_usage(ROOT).free / 1e9
    lines = [f"Python {platform.python_version()}, {platform.platform()}, {free:.0f} GB free on the disk"]
    if shutil.which("nvidia-smi") is None:
        return [*lines, "no NVIDIA driver: nvidia-smi is not there"]
    query = "--query-gpu=name,memory.total,driver_version"
    run = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    return lines + [f"GPU, memory, driver: {line}" for line in (run.stdout or run.stderr).splitlines()]


def check_torch() -> list[str]:
    """Describe the device that torch computes on, its memory and precision, and why it is not CUDA."""
    try:
        import torch

        from ldm.device import choose_device, cpu_computes_in_bf16, describe_start, main_memory
        from ldm.util import settle_precision
    except (ImportError, OSError) as error:  # OSError: a library of torch's own
        return [f"cannot be used: {error}"]
    device = choose_device()
    on_cuda = device.type == "cuda"
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else cpu_computes_in_bf16()
    facts = f"built for CUDA: {torch.version.cuda or 'no'}; native bf16: {'yes' if bf16 else 'no'}"
    return [
        f"{facts}; CPU memory: {main_memory() / 1e9:.0f} GB",
        describe_start(device, settle_precision("auto", device)),
    ]


def check_packages() -> list[str]:
    """Count the packages, and list those missing or not of the pinned version, each with what needs it."""
    wrong, count = [], 0
    for part in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n\n"):
        heading, *lines = part.strip().splitlines()
        pins = [line.partition(";")[0].split("==") for line in lines if not line.startswith("#")]
        count += len(pins)
        for name, pin in pins:
            found = find_version(name)
            if found.partition("+")[0] != pin.strip():  # torch's builds: 2.13.0+cpu
                wanted = f"{found or 'is missing'} instead of {pin.strip()}"
                wrong.append(f"{name} {wanted}; needed by: {heading.strip('# ')}")
    return [f"{count - len(wrong)} of {count} are as pinned in requirements.txt", *wrong]


def find_version(package: str) -> str:
    """Return the version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def check_weights() -> list[str]:
    """Describe each included file and folder, and the user's own in models/, in one line each."""
    own = sorted(path.name for path in MODELS.glob("*") if path.suffix in (".safetensors", ".ckpt", ".pth"))
    folders = [FLUX] if (MODELS / FLUX).is_dir() else []
    names = dict.fromkeys([*INCLUDED, *own, *folders])
    return [f"{name}: {describe(MODELS / name, INCLUDED.get(name))}" for name in names]


def describe(path: Path, wanted: str | None) -> str:
    """Describe a file or model folder, or what is wrong with it; its kind must be `wanted` if given."""
    try:
        from ldm.checkpoint import read_shapes

        if path.is_dir():
            from ldm.models import kontext
            from ldm.models.prompts import TEXT_FILES, check_folder

            check_folder(kontext.check_networks(path), TEXT_FILES)
            kontext.open_flux(kontext.find_network(path, kontext.TRANSFORMER), read_shapes)
            kontext.open_autoencoder(kontext.find_network(path, kontext.AUTOENCODER), read_shapes)
            return "FLUX: transformer and autoencoder fit, text encoders are there"
        names = tuple(read_shapes(path))
    except (ImportError, ValueError, OSError) as error:
        return f"PROBLEM: {error}"
    kinds = [kind for start, kind in KINDS.items() if any(name.startswith(start) for name in names)]
    kind = kinds[0] if kinds else f"of an unknown kind ({names[0]})"
    return f"PROBLEM: {kind}, not {wanted}" if wanted not in (None, kind) else f"{kind}, {len(names)} tensors"


def try_main_job() -> str:
    """Restore a tiny image with the included DBGAN; return the error message, empty if it worked."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "gray.ppm"
        image.write_bytes(b"P6 64 64 255\n" + bytes([128]) * 3 * 64**2)
        command = [sys.executable, str(ROOT / "infer.py"), "dbgan", "--input", str(image)]
        command += ["--output_dir", folder, "--checkpoint_path", str(MODELS / BEST)]
        run = subprocess.run(command, capture_output=True, text=True)
    return (run.stderr.strip().splitlines() or ["no message"])[-1] if run.returncode else ""


def next_steps(packages: list[str], weights: list[str], problem: str) -> list[str]:
    """List what to install, download or run next, the most urgent first."""
    steps = ["uv pip install -r requirements.txt"] if packages[1:] else []
    broken = [line.partition(":")[0] for line in weights if ": PROBLEM: " in line]
    if {*broken} & {*INCLUDED}:
        steps.append(f"get these included files anew: {', '.join(sorted({*broken} & {*INCLUDED}))}")
    if not problem:
        steps.append("python infer.py --input photo.jpg")
    if sum("Stable Diffusion, " in line for line in weights) < 2:  # one is included
        steps.append("for ControlNets: put Stable Diffusion 1.5 into models/ (docs/deblur.md)")
    if not (MODELS / FLUX).is_dir():
        steps.append(f"for Kontext: download black-forest-labs/{FLUX} to models/{FLUX} (docs/kontext.md)")
    return steps


def main() -> int:
    argparse.ArgumentParser(description="Check this machine, packages and weights.").parse_args()
    packages, weights = check_packages(), check_weights()
    optional = [f"{name} {find_version(name) or 'is missing'} ({use})" for name, use in OPTIONAL.items()]
    problem = try_main_job()
    parts = {
        "system": check_system(),
        "torch": check_torch(),
        "packages": [*packages, "optional: " + ", ".join(optional)],
        "weights": weights,
        "main job": [f"FAILS: {problem}" if problem else "works: DBGAN restored a test image"],
        "next": next_steps(packages, weights, problem),
    }
    for title, lines in parts.items():
        for number, line in enumerate(lines):
            print(f"{'' if number else title:10}{line}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
