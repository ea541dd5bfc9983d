"""Callbacks for ControlNet training: checkpoints, EMA weights, and stopping at a loss that is not finite."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from cldm.logger import StepCallback
from harness.logs import check_finite, stop_message
from ldm import checkpoint
from ldm.modules.ema import EMA


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes files atomically (ldm.checkpoint) and reads them without running any code.

    A checkpoint is copied to CPU memory, and a thread writes the copy while training goes on. Only one file
    is written at a time: saving, loading and the end of a run wait for the previous one.
    """

    def __init__(self):
        super().__init__()
        self.thread = ThreadPoolExecutor(1)
        self.pending = None

    def save_checkpoint(self, content: dict, path: str | Path, storage_options: Any = None) -> None:
        self.wait()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        copy = apply_to_collection(content, Tensor, lambda t: t.detach().to("cpu", copy=True))
        self.pending = self.thread.submit(checkpoint.save, path, copy)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict:
        self.wait()
        return checkpoint.load(path, mmap=False)

    def wait(self) -> None:
        """Wait until the last file is written. Raises OSError that names the file if writing failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        self.wait()


class LossCheck(StepCallback):
    """Callback that stops training if a loss is not finite.

    The losses are checked before the weights are saved or used for sampling: every `log_steps`, `save_steps`
    and `val_steps` steps, and at the end. `last` is the path of the last checkpoint, for the message.
    """

    def __init__(self, last: Path, log_steps: int, save_steps: int, val_steps: int):
        self.last, self.intervals = last, (log_steps, save_steps, val_steps)
        self.losses: list[tuple[Tensor, int, list[str]]] = []  # unchecked losses with step and files

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append((outputs["loss"], trainer.global_step, batch.get("path", ["unknown files"])))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer, model, batch) -> None:
        """Raise ValueError that names the first batch whose loss is not finite. Synchronises with the GPU."""
        step = trainer.global_step
        if step != trainer.max_steps and all(step % interval for interval in self.intervals):
            return
        finite = torch.stack([loss for loss, _, _ in self.losses]).isfinite().tolist()
        if trainer.strategy.reduce_boolean_decision(not all(finite), all=False):  # all processes stop
            trainer.strategy.checkpoint_io.wait()
            loss, step, files = self.losses[-1 if all(finite) else finite.index(False)]
            names = "that of another process" if all(finite) else ", ".join(files)
            problem = f"loss = {float(loss)} at step {step}; its batch: {names}"
            raise ValueError(stop_message(problem, self.last))
        self.losses = []


class Checkpoints(StepCallback):
    """Callback that writes last.ckpt, and best.ckpt at the highest `val/psnr` so far, to `folder`.

    A checkpoint holds the trained parameters (not the frozen ones), optimizer, step, random states, and
    `about`: the settings, and the configuration and base file needed to build the model again.
    `val_steps` is 0 for a run without validation.
    """

    def __init__(self, folder: Path, save_steps: int, val_steps: int, about: Mapping):
        self.folder = folder
        self.save_steps, self.val_steps = save_steps, val_steps
        self.about = dict(about)
        self.best = -math.inf

    def on_step(self, trainer, model, batch) -> None:
        validated = self.val_steps > 0 and trainer.global_step % self.val_steps == 0
        if self.due(trainer) and not validated:  # a validated step is saved after its validation
            self.save(trainer, "last.ckpt")

    def on_validation_start(self, trainer, pl_module) -> None:
        trainer.strategy.checkpoint_io.wait()  # workers are forked next: no thread may be writing

    def on_validation_end(self, trainer, pl_module) -> None:
        score = trainer.callback_metrics.get("val/psnr")
        if score is not None and float(score) > self.best:
            self.best = float(score)
            self.save(trainer, "best.ckpt")
        if self.due(trainer):
            self.save(trainer, "last.ckpt")

    def due(self, trainer: pl.Trainer) -> bool:
        """Return True if last.ckpt must be written: every `save_steps` steps and at the end of the run."""
        step = trainer.global_step
        return step > 0 and (step % self.save_steps == 0 or step == trainer.max_steps)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint. Raises ValueError and keeps the old file if a parameter is not finite."""
        trained = {k: p for k, p in trainer.lightning_module.named_parameters() if p.requires_grad}
        check_finite(trained, trainer.global_step)
        trainer.save_checkpoint(self.folder / name)

    def on_save_checkpoint(self, trainer, pl_module, content: dict) -> None:
        content.update(self.about, random=checkpoint.random_states())

    def on_load_checkpoint(self, trainer, pl_module, content: dict) -> None:
        if trainer.world_size == 1:
            checkpoint.restore_random_states(content["random"])

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping) -> None:
        self.best = state["best"]


class EMACallback(StepCallback):
    """Callback that maintains EMA weights of the trained parameters and validates with them."""

    def __init__(self, decay: float):
        self.decay = decay
        self.ema: EMA | None = None
        self.state: dict | None = None  # from a checkpoint, loaded when training starts
        self.context = None  # active while the model has the EMA weights

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.ema = EMA(pl_module, self.decay)
        if self.state:
            self.ema.load_state_dict(self.state)
            self.state = None

    def on_step(self, trainer, model, batch) -> None:
        self.ema.update(model)

    def on_validation_start(self, trainer, pl_module) -> None:
        if self.ema is not None:
            self.context = self.ema.applied(pl_module)
            self.context.__enter__()

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None

    def on_save_checkpoint(self, trainer, pl_module, content: dict) -> None:
        content["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, trainer, pl_module, content: dict) -> None:
        self.state = content.get("ema")
