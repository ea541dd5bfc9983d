"""Build objects from yaml (`target` names a class, `params` its arguments), precisions and optimizers."""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

from ldm.device import cpu_computes_in_bf16


def get_obj_from_str(string: str) -> Any:
    """Import the class or function that a dotted path names.

    Raises ValueError if the module or the name in it does not exist.
    """
    module, _, name = string.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"target {string!r} cannot be imported: {error}") from error


def instantiate_from_config(config: Mapping) -> Any:
    """Call the class or function that `config["target"]` names with `config["params"]`.

    Raises ValueError if there is no target, or if it does not accept the params.
    """
    if "target" not in config:
        raise ValueError(f"a configuration needs a `target`, this one has only {sorted(map(str, config))}")
    try:
        return get_obj_from_str(config["target"])(**(config.get("params") or {}))
    except TypeError as error:
        raise ValueError(f"the configuration's params do not fit {config['target']}: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """Read a yaml file as plain dictionaries and lists. Raises ValueError if it is not valid yaml."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml and omegaconf raise their own families of errors
        raise ValueError(f"{path} is not a yaml configuration: {' '.join(str(error).split())}") from error


def listing(names: Iterable, shown: int = 6) -> str:
    """Join the first `shown` names, and the number of the others."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_package(name: str, what: str) -> None:
    """Raise ValueError if the package `name`, which `what` needs, is not installed."""
    if find_spec(name) is None:
        raise ValueError(f"{what} needs a package: pip install {name}")


def flush_denormals() -> None:
    """Treat numbers below 1e-38 as 0 on a CPU; call it before the first computation, as threads inherit it.

    Gradients become that small in training, and CPUs compute many times slower with them.
    """
    torch.set_flush_denormal(True)


def settle_precision(precision: str, device: torch.device, older_gpu: str = "32") -> str:
    """Return the precision to use; `auto` is bf16 if the device has it, else `older_gpu` on CUDA or 32.

    Raises ValueError for 16 on a CPU, where it is many times slower than 32.
    """
    if precision == "auto":
        cuda = device.type == "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_computes_in_bf16()
        return "bf16" if has_bf16 else older_gpu if cuda else "32"
    if precision.startswith("16") and device.type == "cpu":
        raise ValueError(
            f"precision {precision} needs a CUDA device, and this run is on the CPU: give bf16 or 32"
        )
    return precision


def half_dtype(precision: str) -> torch.dtype | None:
    """Return the 16-bit dtype of a precision (16, bf16, 32, or Lightning's names), None for 32."""
    return {"16": torch.float16, "bf16": torch.bfloat16, "32": None}[precision.split("-")[0]]


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit dtype to restore in on `device`, None for 32 (see `settle_precision`)."""
    return half_dtype(settle_precision(precision, device))


@contextmanager
def computing_in(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Set up restoring images of any size in a 16-bit dtype, or with None in float32, within this context.

    On CUDA float32 is then not rounded to TF32.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.benchmark = False  # or it would try all algorithms again for every new size
    if dtype is None:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul = before
        torch.set_float32_matmul_precision(matmul)


def autocast(model: torch.nn.Module) -> AbstractContextManager:
    """Return `computing_in` for the 16-bit dtype of any of a model's weights, or float32 if there is none."""
    halves = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    return computing_in(halves.pop() if halves else None, next(model.parameters()).device)


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the loaded states of an optimizer the same memory layout as its parameters.

    Fused kernels traverse a parameter and its states in memory order; the order in a file may differ
    (channels_last or not, split over processes or not), which on a CPU mixes up the states without an error.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def make_adamw(
    parameters: Iterable[torch.nn.Parameter], name: str, rate: float, decay: float, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Make an AdamW; "adamw8bit" has 8-bit states (bitsandbytes, CUDA). Raises ValueError for other names.

    With `fused` None torch chooses the kernels, on CUDA those for many tensors at once; False forces kernels
    for single tensors.
    """
    if name == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=fused)
        optimizer.register_load_state_dict_post_hook(match_layout)
        return optimizer
    if name != "adamw8bit":
        raise ValueError(f"optimizer must be adamw or adamw8bit, not {name!r}")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, rate, weight_decay=decay)


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """Return the learning-rate multiplier at `step` (0, 1, 2, ...) of a run of `steps` steps.

    It rises over `warmup` steps; then `schedule` keeps it ("constant") or lowers it to 0 ("linear",
    "cosine").
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def log_txt_as_img(size: tuple[int, int], texts: Iterable[str]) -> torch.Tensor:
    """Draw texts black on white, wrapped: (b, 3, height, width) in [-1, 1] for size (width, height)."""
    images = []
    for text in texts:
        image = Image.new("RGB", size, "white")
        points = max(8, size[0] // 16)
        per_line = max(1, int(size[0] / (0.55 * points)))
        lines = "\n".join(text[i : i + per_line] for i in range(0, len(text), per_line))
        ImageDraw.Draw(image).text((4, 4), lines, fill="black", font=ImageFont.load_default(points))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(images)
