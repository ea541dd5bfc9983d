"""Choose the device, explain why it is not CUDA, and describe it when a command starts."""

import os
import re
import sys

import torch

DRIVERS = {"12": 525, "13": 580}  # oldest NVIDIA driver by the major version of CUDA
INSTALL = "uv pip install --reinstall torch torchvision --torch-backend="


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device for `wanted`: cuda, cpu, or auto (CUDA if this torch can use it, else the CPU).

    Apple's MPS is never chosen: nothing here was tested on it. Raises ValueError with the reason if cuda is
    wanted but not usable.
    """
    problem = why_no_cuda() if wanted != "cpu" else ""
    if wanted == "cuda" and problem:
        raise ValueError(f"there is no CUDA device to use: {problem}")
    return torch.device("cpu" if wanted == "cpu" or problem else "cuda")


def why_no_cuda() -> str:
    """Return why this torch cannot compute on CUDA, and a remedy; "" if it can."""
    if torch.cuda.is_available():
        return why_no_kernels()
    if sys.platform == "darwin":
        return "a Mac has none, and its own GPU (MPS) is not used: nothing here was tested on it"
    if torch.version.cuda is None:
        return f"this torch is built without it; for an NVIDIA GPU run `{INSTALL}auto`"
    try:
        torch.cuda.init()
        reason = "no device was found"
    except RuntimeError as error:
        reason = str(error).split(". ")[0].rstrip(".")
    driver = DRIVERS.get(torch.version.cuda.split(".")[0])
    needs = f"it needs an NVIDIA GPU and driver{f' {driver} or newer' if driver else ''}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES={hidden} says which GPUs are seen"
    return f"{reason} (this torch is built for CUDA {torch.version.cuda}: {needs}{shown})"


def why_no_kernels() -> str:
    """Return why this torch's kernels do not run on the current CUDA device, and a remedy; "" if they do."""
    if torch.version.cuda is None:  # AMD's ROCm
        return ""
    card, built = torch.cuda.get_device_capability(), []
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list())):
        made_for = divmod(int(number), 10)
        # compute_ is PTX, which is compiled for newer GPUs when it is loaded
        same_major = kind == "compute" or made_for[0] == card[0]
        if same_major and made_for <= card:
            return ""
        built.append(made_for)
    if not built:
        return ""
    helps = (
        f"`{INSTALL}cu126` has those of older GPUs" if card < min(built) else "a newer torch may have them"
    )
    name = torch.cuda.get_device_name()
    return f"{name} (sm_{card[0]}{card[1]}) has no kernels in torch {torch.__version__}; {helps}"


def cpu_computes_in_bf16() -> bool:
    """Return whether the CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def describe_start(device: torch.device, precision: str, wanted: str = "auto") -> str:
    """Return the start line of a command: device, memory, precision, threads, torch, and why not CUDA."""
    precision = precision.split("-")[0]  # Lightning's names, such as 16-mixed
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, memory = about.name, about.total_memory
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            precision += " (emulated: this GPU has none, which is slow)"
    else:
        name, memory = "the CPU", main_memory()
    size = f" ({memory / 1e9:.0f} GB)" if memory else ""
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    line = f"computing on {name}{size}, precision {precision}, {threads}, torch {torch.__version__}"
    missing = why_no_cuda() if device.type == "cpu" and wanted == "auto" else ""
    return f"{line}; not on CUDA: {missing}" if missing else line


def main_memory() -> int:
    """Return the size of the CPU memory in bytes; 0 if the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
