"""Read and write weights and training states: safetensors or pickles without code, written atomically."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parent.parent / "models"  # of the repository
SUFFIXES = (".safetensors", ".ckpt", ".pth")
# Keys under which files store their state dict: Lightning's, BasicSR's (EMA weights first), others'.
WRAPPERS = ("state_dict", "params_ema", "params-ema", "params", "model_state_dict", "model", "net")
FULL = 2**20  # bytes: a disk with less free space is reported as full
# Lightning classes that Stable Diffusion's original .ckpt files reference.
LIGHTNING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning_fabric.utilities.data.AttributeDict",
)


def repository_path(path: str | Path) -> Path:
    """Return `path`, or the same path below the repository's root if only that exists.

    So models/srn_deblur.safetensors is found from any working directory.
    """
    shipped = MODELS.parent / path
    return shipped if shipped.exists() and not Path(path).exists() else Path(path)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, then move that file to `path` in one step.

    After any failure (full disk, kill) `path` holds either its complete old or its complete new content.
    Raises an OSError that names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # fixed name: a killed run's leftover is overwritten
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))  # the only way to read the umask
        os.chmod(temporary, 0o666 & ~mask)  # safetensors creates files that only the owner can read
        os.replace(temporary, path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < FULL  # torch does not report it
        reason = "the disk is full" if full else error
        raise OSError(f"cannot save {path} (what was there before is intact): {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | Path, content: dict) -> None:
    """Save tensors, numbers, strings and containers of them with torch.save, atomically."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load(path: str | Path, device: str = "cpu", mmap: bool = True) -> dict:
    """Load a checkpoint written by `save`, Lightning or CompVis; pickled code is refused.

    With `mmap` tensors are read from the file when they are used: it must not be replaced meanwhile.
    Raises FileNotFoundError, or ValueError if the file is damaged, not a checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES)[:6]
        there = f"; beside it are {', '.join(beside)}" if beside else ""
        raise FileNotFoundError(f"checkpoint not found: {path}{there}")
    known = [(type("Shell", (), {}), name) for name in LIGHTNING]  # replaced by empty classes: no code runs
    known += [np.dtype, np.ndarray, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]
    try:
        with open(path, "rb") as file:
            mmap = mmap and file.read(2) == b"PK"  # zip archive; torch cannot map the format before 2020
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        code = re.search(r"Unsupported (?:global|class): GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{path} holds code, not only weights, and is not loaded: {code[1]}") from error
        raise ValueError(f"{path} is damaged or not a checkpoint") from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError) as error:
        reason = "" if isinstance(error, LookupError) else f": {error}"  # its message is only a key
        raise ValueError(f"{path} is damaged or not a checkpoint{reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return content


def read_weights(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .ckpt or .pth file, without its wrapper (WRAPPERS).

    Raises FileNotFoundError, or ValueError if the file is damaged or holds no tensors.
    """
    return _read(Path(path), device)[0]


def read_trained(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the weights to use from a file (EMA weights where present), and the file's content.

    The content always has the training's `settings`, {} if the file has none; a .safetensors file holds them
    as json in its metadata. Raises the same errors as `read_weights`.
    """
    weights, content = _read(Path(path))
    if Path(path).suffix == ".safetensors":
        return weights, {"settings": read_settings(path)}
    content = dict(content)
    for name in ("ema", "settings"):
        content[name] = content.get(name) or {}
        if not isinstance(content[name], dict):
            raise ValueError(f"{path} is damaged: its {name} are a {type(content[name]).__name__}")
    return {**weights, **content["ema"].get("average", {})}, content


def _read(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """Read the tensors of a file, and all of its content ({} for a .safetensors file)."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path, device=device), {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    content = load(path, device)
    wrapped = next((content[name] for name in WRAPPERS if name in content), content)
    values = wrapped.items() if isinstance(wrapped, dict) else ()
    weights = {name: value for name, value in values if isinstance(value, Tensor) and isinstance(name, str)}
    if not weights:
        raise ValueError(f"{path} is not a checkpoint: it holds no tensors")
    return weights, content


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file, {} if it has none. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_shapes(path: str | Path) -> dict[str, Tensor]:
    """Read the names and shapes of a file's weights as meta tensors; of a .safetensors file only the header.

    Raises the same errors as `read_weights`.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {name: value.to("meta") for name, value in read_weights(path).items()}
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def read_settings(path: str | Path, name: str = "settings") -> dict:
    """Read the dictionary stored as json under `name` in a .safetensors file's metadata, {} if there is none.

    Raises ValueError that names the file if it is not a dictionary.
    """
    try:
        settings = json.loads(read_metadata(path).get(name, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its metadata {name!r} are not json: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: its metadata {name!r} are not a dictionary")
    return settings


def write_weights(path: str | Path, weights: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a state dict as .safetensors, or with torch.save under `state_dict` for any other suffix.

    Raises ValueError if a weight is not finite; then nothing is written.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path} is not written: its weight {name} is not finite (NaN or infinity)")
    if Path(path).suffix != ".safetensors":
        return save(path, {"state_dict": weights})
    weights = {name: value.contiguous() for name, value in weights.items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary, about))


def write_half(path: str | Path, weights: dict[str, Tensor], training: dict, **facts: str) -> None:
    """Write weights in half precision as a .safetensors file to use and share.

    Its metadata holds the settings of the `training` as json, and `facts` about the file, which
    infer.facts_of reads.
    """
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    write_weights(path, half, {"settings": json.dumps(training), **facts})


def check_fit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str | Path, model: str = "this model"
) -> None:
    """Raise ValueError that names `path` and `model` if names or shapes of `weights` differ from `own`."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} does not belong" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more like these" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not fit {model}: {', '.join(wrong[:3])}{more}")


def fill(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Load weights read from `path` into `network` and return it. Raises ValueError if they do not fit."""
    check_fit(network.state_dict(), weights, path, type(network).__name__)
    network.load_state_dict(weights)
    return network


def fingerprint(network: nn.Module | None) -> str:
    """Return a short hash of a network's weights, "" without one: a resumed run must use the same BGAN."""
    if network is None:
        return ""
    arrays = (value.cpu().numpy().tobytes() for value in network.state_dict().values())
    return hashlib.sha256(b"".join(arrays)).hexdigest()[:16]


def random_states() -> dict:
    """Return the states of Python's, numpy's and torch's random generators, in a form `save` can write."""
    version, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random_states(states: dict) -> None:
    """Restore the random generators to the states that `random_states` returned."""
    random.setstate(states["python"])
    version, keys, *rest = states["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
