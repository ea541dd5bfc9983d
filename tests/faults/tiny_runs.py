"""Training runs that take seconds, and processes that run a script.

Processes are forked from one that has imported everything, so that they start in milliseconds; they can be
killed, limited and measured like any other process.
"""

import atexit
import logging
import multiprocessing.util
import os
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks must not have a thread pool

import numpy as np
import torch
from tqdm import tqdm

import evaluate  # noqa: F401  (imported once, here, for all processes)
import extras.export_onnx  # noqa: F401
import infer  # noqa: F401
import tool_add_control  # noqa: F401
import tool_export_control  # noqa: F401
import tool_make_dbgan_dataset
import tool_make_mask  # noqa: F401
import tutorial_train_deblur  # noqa: F401
from cldm.model import create_model
from extras import train_small_base  # noqa: F401
from ldm import checkpoint
from ldm.data.image import list_images, photographs, read_image, write_image
from ldm.models.prompts import prompt_file
from ldm.modules.image_degradation.blur import random_blur
from tests.tiny_flux import write_tiny_folder
from tool_make_deblur_dataset import Settings as PairSettings
from tool_make_deblur_dataset import make_dataset
from train_dbgan import DBGANGenerator
from train_srn import SRNDeblurNet
from tutorial_train_inpaint import cut_photographs

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent.parent
TRAINERS = ("deblur", "inpaint", "srn", "dbgan", "kontext")
# Variants with other inputs: trainer and flags ("@x" is a path below `place`).
VARIANTS = {
    "srn_init": ("srn", {"init_weights": "@srn.safetensors"}),
    "dbgan_init": ("dbgan", {"init_weights": "@dbgan.safetensors"}),
    "kontext_captions": ("kontext", {"hr_root": "@captioned", "captions": True, "blocks_to_swap": 3}),
}
RUNS = (*TRAINERS, *VARIANTS, "base")  # base is extras/train_small_base.py
PATIENCE = 600  # seconds until a run counts as hanging; train_small_base takes minutes on a busy machine
CAPTION = "a picture"  # caption of one training image of Kontext


# ---- processes -------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Exit code (-9 after kill -9, None if it did not end in time) and output of a process."""

    code: int | None
    out: str
    err: str


def script(arguments: Iterable[object]) -> Callable[[], None]:
    """Return a function that does what `python SCRIPT ARGUMENTS` does."""
    name, *rest = map(str, arguments)

    def run() -> None:
        sys.argv = [name, *rest]
        os.chdir(ROOT)
        runpy.run_path(str(ROOT / name), run_name="__main__")

    return run


def start(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a new process group with output in LOG.out and LOG.err; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    tqdm.set_lock(threading.RLock())  # a shared lock would stay locked if its owner is killed
    try:
        os.setsid()
        for stream, suffix in ((1, ".out"), (2, ".err")):
            file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # as Python opens it
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):  # not pytest's
            for handler in getattr(logger, "handlers", ()):
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        code = _call(work)
    finally:
        os._exit(code)  # never return into the forked copy of the caller


def _call(work: Callable[[], None]) -> int:
    """Run `work` like the interpreter: print uncaught exceptions, clean up, return the exit code."""
    code = 0
    atexit._clear()  # these callbacks belong to the parent process
    atexit.register(multiprocessing.util._exit_function)
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a process; return its exit code (-N after signal N), or None if it is still running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill(pid: int) -> int:
    """Kill a process and its workers with SIGKILL; return -9, or its exit code if it ended before."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has not called setsid yet, or has ended
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run(work: Callable[[], None], log: Path, seconds: float = PATIENCE) -> Result:
    """Run `work` to its end, or kill it after `seconds`; remaining workers are killed too."""
    pid = start(work, log)
    code = wait(pid, seconds)
    if code is None:
        kill(pid)
    else:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    texts = (log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
    return Result(code, *texts)


def require_success(result: Result) -> Result:
    """Return `result`; raise RuntimeError unless the process succeeded."""
    if result.code != 0:
        raise RuntimeError(f"exit code {result.code}: {result.err[-2000:]}")
    return result


# ---- data and commands -----------------------------------------------------------------------------------


def make_test_files(place: Path) -> None:
    """Write all inputs of the tiny runs below `place`."""
    place.mkdir(parents=True, exist_ok=True)
    make_dataset(PairSettings(output_dir=str(place / "pairs"), num_samples=8, image_size=64, num_workers=1))
    cut_photographs(place / "photos", 8)
    cut_photographs(place / "real", 6)
    for kind in ("deblur", "inpaint"):
        torch.manual_seed(0)
        model = create_model(ROOT / "models" / f"cldm_tiny_{kind}.yaml")
        checkpoint.write_weights(place / f"{kind}.safetensors", model.state_dict())
    for number, name in enumerate(("coffee.png", "rocket.jpg", "astronaut.png")):
        image = read_image(photographs((name,))[0])
        for frame in range(3):
            sharp = image[100 + frame : 148 + frame, 200:256]
            blurry = random_blur(
                sharp, np.random.default_rng(10 * number + frame), ["motion_blur"], scale=0.3
            )[0]
            for kind, picture in (("blur", blurry), ("sharp", sharp)):
                folder = place / "gopro" / f"GOPR{number}" / kind
                folder.mkdir(parents=True, exist_ok=True)
                write_image(folder / f"{frame:06d}.png", picture)
    tool_make_dbgan_dataset.main(  # pairs
        tool_make_dbgan_dataset.Settings(
            place / "train.h5",
            place / "valid.h5",
            deblur_train_data=place / "gopro",
            deblur_valid_data=place / "gopro",
            patch_size=32,
        )
    )
    write_tiny_folder(place / "flux", place, "restore")
    _make_starts(place)


def _make_starts(place: Path) -> None:
    """Write the initial weights and captions of the variants."""
    torch.manual_seed(1)
    checkpoint.write_weights(place / "srn.safetensors", SRNDeblurNet(2).state_dict())
    weights = {f"deblur.{key}": value for key, value in DBGANGenerator(4, 1).state_dict().items()}
    form = {"generator": "dbgan", "width": 4, "blocks": 1}
    checkpoint.write_half(place / "dbgan.safetensors", weights, form)
    (place / "captioned").mkdir()
    embeddings = {"t5": torch.randn(1, 16, 48), "pooled": torch.randn(1, 32)}
    checkpoint.write_weights(prompt_file(place, CAPTION), embeddings, {"prompt": CAPTION})
    for path in list_images(place / "real"):
        write_image(place / "captioned" / path.name, read_image(path))
    (place / "captioned" / "001.txt").write_text(CAPTION)


def in_place(changes: dict, place: Path) -> dict:
    """Replace values that begin with @ by paths below `place`."""
    return {name: place / value[1:] if str(value)[:1] == "@" else value for name, value in changes.items()}


def command(name: str, place: Path, output_dir: Path, workers: int = 0, **changes: object) -> list[str]:
    """Return the command of a tiny run; `changes` are flags, True and False for switches."""
    if name in VARIANTS:
        name, flags = VARIANTS[name]
        return command(name, place, output_dir, workers, **in_place(flags, place), **changes)
    control = {
        "image_size": 64,
        "val_samples": 2,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "max_steps": 6,
        "log_steps": 1,
        "save_steps": 1,
        "val_steps": 2,
        "val_ddim_steps": 1,
        "ema_decay": 0.9,
        "resume_path": place / f"{name}.safetensors",
        "config_path": ROOT / "models" / f"cldm_tiny_{name}.yaml",
    }
    gopro = {
        "val_fraction": 0.3,
        "log_epoch": 1,
        "crop_size": 16,
        "val_crop": 32,
        "batch_size": 2,
    }
    dbgan = {"blocks": 1, "perceptual_loss_weight": 0, "epochs": 2, "accumulate": 1}
    kontext = {"hr_root": place / "photos", "pretrained_model_name_or_path": place / "flux"}
    kontext |= {"instance_prompt": "restore", "resolution": 32, "rank": 2, "train_batch_size": 2}
    kontext |= {"gradient_accumulation_steps": 1, "max_train_steps": 6, "learning_rate": 3e-3}
    kontext |= {"save_every": 1, "preview_steps": 1}
    base = {"photos": place / "photos", "models": output_dir / "models", "pieces": 8, "batch_size": 1}
    base |= {"warmup": 1, "precision": 32, "save_steps": 1}
    base |= {"autoencoder_steps": 2, "unet_steps": 3, "flux_steps": 3}
    start = {
        "deblur": ["tutorial_train_deblur.py"],
        "inpaint": ["tutorial_train_inpaint.py"],
        "srn": ["train_srn.py"],
        "dbgan": ["train_dbgan.py", "all"],
        "kontext": ["train_kontext_lora.py"],
        "base": ["extras/train_small_base.py", "all"],
    }[name]
    flags = {
        "deblur": control | {"data_root": place / "pairs", "perceptual_loss_weight": 0, "val_fraction": 0.2},
        "inpaint": control | {"image_dir": place / "photos", "precision": "32"},
        "srn": gopro | {"data": place / "gopro", "width": 2, "epochs": 4, "val_images": 2},
        "dbgan": gopro
        | dbgan
        | {"data": place / "gopro", "blur_data": place / "real", "width": 4, "learning_rate": 1e-3},
        "kontext": kontext,
        "base": base,
    }[name]
    own = {} if name == "base" else {"num_workers": workers}
    flags |= {"output_dir": output_dir, **own, **changes}
    return [*start, *as_flags(flags)]


def as_flags(flags: dict[str, object]) -> list[str]:
    """Convert to `--name value`, and True and False to `--name` and `--no_name`."""
    words = []
    for name, value in flags.items():
        words += (
            [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", value]
        )
    return [str(word) for word in words]


def prepare_output(name: str, place: Path, output_dir: Path) -> None:
    """Create a run's folder; Kontext gets embedded prompts, since it has no text encoders."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if name.startswith("kontext"):
        shutil.copytree(place / "cache", output_dir / "cache", dirs_exist_ok=True)
