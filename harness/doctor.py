"""What this machine has for these scripts, what is missing, and what to do next: on one screen.

    python -m harness.doctor

Exit code 1 if the main job fails, restoring with the included SRN (python infer.py --input photo.jpg): a tiny
image is restored to see. Packages that may be missing are imported only where they are used.
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
SRN = ROOT / "models" / "srn_deblur.safetensors"
OPTIONAL = {
    "bitsandbytes": "adamw8bit",
    "imagecodecs": "compressed TIFF files",
    "onnxruntime": "ONNX export",
    "spandrel": "networks of other authors",
}


def check_system() -> list[str]:
    """Python, operating system, free disk space, and the NVIDIA driver with its GPUs."""
    free = shutil.disk_usage(ROOT).free / 1e9
    lines = [f"Python {platform.python_version()}, {platform.platform()}, {free:.0f} GB free on the disk"]
    if shutil.which("nvidia-smi") is None:
        return [*lines, "no NVIDIA driver: nvidia-smi is not there"]
    query = "--query-gpu=name,memory.total,driver_version"
    run = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    return lines + [f"GPU, memory, driver: {line}" for line in (run.stdout or run.stderr).splitlines()]


def check_torch() -> list[str]:
    """The device that torch computes on, its memory and precision, and why that is not CUDA."""
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
    """Packages that are missing or of another version than the pinned one, each with what needs it."""
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
    """Version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def try_main_job() -> str:
    """Restore a tiny image with the included SRN; returns what went wrong, empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "gray.ppm"
        image.write_bytes(b"P6 64 64 255\n" + bytes([128]) * 3 * 64**2)
        command = [sys.executable, str(ROOT / "infer.py"), "srn", "--input", str(image)]
        command += ["--output_dir", folder, "--checkpoint_path", str(SRN)]
        run = subprocess.run(command, capture_output=True, text=True)
    return (run.stderr.strip().splitlines() or ["no message"])[-1] if run.returncode else ""


def main() -> int:
    argparse.ArgumentParser(description="Check this machine and its packages.").parse_args()
    packages = check_packages()
    optional = [f"{name} {find_version(name) or 'is missing'} ({use})" for name, use in OPTIONAL.items()]
    problem = try_main_job()
    steps = ["uv pip install -r requirements.txt"] if packages[1:] else []
    if not problem:
        steps.append("python infer.py --input photo.jpg")
    parts = {
        "system": check_system(),
        "torch": check_torch(),
        "packages": [*packages, "optional: " + ", ".join(optional)],
        "main job": [f"FAILS: {problem}" if problem else "works: SRN restored a test image"],
        "next": steps,
    }
    for title, lines in parts.items():
        for number, line in enumerate(lines):
            print(f"{'' if number else title:10}{line}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
