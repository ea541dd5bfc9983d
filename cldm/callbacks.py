"""What a ControlNet's training run keeps: checkpoints, the average of the weights, snapshots of the model."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from cldm.sharding import split_like, whole
from harness.endings import check_finite
from ldm import checkpoint
from ldm.modules.ema import EMA


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through ldm.checkpoint: a file is whole or not there; reads without running pickled code.

    A thread writes a copy in CPU memory while training goes on. One file at a time: `wait` returns when it
    is there, and raises what went wrong. Saving waits first; so does the process before it exits.
    """

    def __init__(self):
        super().__init__()
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def save_checkpoint(self, content: dict, path: str | Path, storage_options: Any = None) -> None:
        self.wait()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        copy = apply_to_collection(content, Tensor, lambda t: t.detach().to("cpu", copy=True))
        self.pending = self.thread.submit(checkpoint.save, path, copy)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict:
        self.wait()
        return checkpoint.load(path, mmap=False)

    def wait(self) -> None:
        """Return when the last file is written; raises OSError that names it if it could not be."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        self.wait()


class Checkpoints(Callback):
    """Stops at a loss that is not finite; keeps last.ckpt and, by the best `val/psnr`, best.ckpt in `folder`.

    A checkpoint holds the trained parameters (the model leaves out the frozen ones), optimizer, step, random
    states, settings, and what it takes to build the model again: its configuration and its base file.
    """

    def __init__(self, folder: str | Path, save_steps: int, val_steps: int, log_steps: int, about: Mapping):
        self.folder, self.about = Path(folder), dict(about)
        self.save_steps, self.val_steps = save_steps, val_steps  # val_steps 0: no validation
        self.best, self.last_step, self.log_steps = -math.inf, -1, log_steps
        self.losses: list[tuple[Tensor, int, list[str]]] = []  # of batches that nobody has looked at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        self.losses.append((outputs["loss"], step, batch.get("path", ["unknown files"])))
        validated = self.val_steps and step % self.val_steps == 0  # then the checkpoint comes after it
        if step != self.last_step and (step % self.log_steps == 0 or validated or self.due(trainer)):
            self.look(trainer)
        if step != self.last_step and not validated and self.due(trainer):
            self.save(trainer, "last.ckpt")
        self.last_step = step

    def look(self, trainer: pl.Trainer) -> None:
        """Raise ValueError that names the first batch whose loss is not finite; this waits for the device."""
        finite = torch.stack([loss for loss, _, _ in self.losses]).isfinite().tolist()
        if trainer.strategy.reduce_boolean_decision(not all(finite), all=False):  # all processes stop
            last = self.folder / "last.ckpt"
            trainer.strategy.checkpoint_io.wait()
            kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was saved yet"
            loss, step, files = self.losses[-1 if all(finite) else finite.index(False)]
            files = "that of another process" if all(finite) else ", ".join(files)
            what = f"loss = {float(loss)} at step {step}; its batch: {files}"
            raise ValueError(f"training stopped: {what}; {kept}")
        self.losses = []

    def on_validation_start(self, trainer, pl_module) -> None:
        trainer.strategy.checkpoint_io.wait()  # workers that start now should find one thread

    def on_validation_end(self, trainer, pl_module) -> None:
        score = trainer.callback_metrics.get("val/psnr")
        if score is not None and float(score) > self.best:
            self.best = float(score)
            self.save(trainer, "best.ckpt")
        if self.due(trainer):
            self.save(trainer, "last.ckpt")

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether last.ckpt is to be of this step: one of every `save_steps`, and the last of the run."""
        step = trainer.global_step
        return step > 0 and (step % self.save_steps == 0 or step == trainer.max_steps)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint; raises ValueError, and leaves the old one, if a parameter is not finite."""
        trained = {k: p for k, p in trainer.lightning_module.named_parameters() if p.requires_grad}
        check_finite(whole(trained), trainer.global_step)
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


class AverageWeights(Callback):
    """Keeps an exponential moving average of the trained parameters and validates with it."""

    def __init__(self, decay: float):
        self.decay, self.ema, self.state, self.last_step, self.context = decay, None, None, 0, None

    def on_train_start(self, trainer, pl_module) -> None:
        self.ema, self.last_step = EMA(pl_module, self.decay), trainer.global_step
        if self.state:
            average = {k: split_like(v, self.state["average"][k]) for k, v in self.ema.average.items()}
            self.ema.load_state_dict({**self.state, "average": average})
            self.state = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.ema.update(pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        if self.ema is not None:
            self.context = self.ema.applied(pl_module)
            self.context.__enter__()

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None

    def on_save_checkpoint(self, trainer, pl_module, content: dict) -> None:
        content["ema"] = whole(self.ema.state_dict())

    def on_load_checkpoint(self, trainer, pl_module, content: dict) -> None:
        self.state = content.get("ema")


class Snapshots(Callback):
    """Every `save_steps` steps leaves the model, without the optimizer, in `folder`/checkpoint-STEP."""

    def __init__(self, folder: Path, save_steps: int):
        self.folder, self.save_steps, self.step = folder, save_steps, 0

    def keep(self, trainer: pl.Trainer, *_: object) -> None:
        """Copy the model out of last.ckpt as soon as that is of this step."""
        step, last = trainer.global_step, self.folder / "checkpoints" / "last.ckpt"
        due = step != self.step and step % self.save_steps == 0 and trainer.is_global_zero
        if due:
            trainer.strategy.checkpoint_io.wait()
        if due and last.is_file() and checkpoint.load(last)["global_step"] == step:
            self.step = step
            keep_model(self.folder, self.folder / f"checkpoint-{step}")

    on_train_batch_end = keep
    on_validation_end = keep  # the checkpoint of a validated step comes after its validation
    on_train_start = on_fit_end = keep  # a run that was killed between a checkpoint and its snapshot


@rank_zero_only
def keep_model(run: Path, target: Path) -> Path:
    """Copy what it takes to use the model from the run's last checkpoint to `target`/model.ckpt."""
    content = checkpoint.load(run / "checkpoints" / "last.ckpt")
    wanted = ("state_dict", "ema", "config", "base", "settings", "global_step")
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.save(target / "model.ckpt", {name: content[name] for name in wanted if name in content})
    return target / "model.ckpt"
