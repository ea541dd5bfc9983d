"""What the ControlNet scripts share: data in a resumable order, checkpoints, EMA, Lightning's Trainer."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from cldm.cldm import ControlLDM
from cldm.logger import CsvRows, ImageLogger, Progress
from ldm import checkpoint
from ldm.data.stream import SampleStream
from ldm.modules.ema import EMA
from ldm.run import check_finite
from ldm.settings import check_settings, plain

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements, and warnings about what is meant here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*in eval mode at the start",
        ".*LeafSpec.*",
        ".*many workers.*",
        ".*transfer_batch_to_device.*",
    ):
        warnings.filterwarnings("ignore", text)


def lightning_precision(precision: str) -> str:
    """Lightning's name for a precision: 16, bf16 and 32 stand for 16-mixed, bf16-mixed and 32-true.

    Raises ValueError for others.
    """
    precision = PRECISIONS.get(precision, precision)
    if precision not in PRECISIONS.values():
        raise ValueError(f"precision must be 16, bf16 or 32 (or Lightning's names), not {precision!r}")
    return precision


class StreamData(pl.LightningDataModule):
    """Training data as one endless stream that resumes where its checkpoint stood; held-out data as it is."""

    def __init__(self, train: Dataset, held_out: Dataset | None, settings: Any):
        super().__init__()
        self.train, self.held_out, self.settings = train, held_out, settings
        self.samples_seen, self.start_step = 0, 0  # at the start of this process

    def samples_per_step(self) -> int:
        """Samples in one optimizer step, over all processes."""
        s = self.settings
        return s.batch_size * s.accumulate_grad_batches * s.gpus * s.num_nodes

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        stream = SampleStream(
            len(self.train),
            self.settings.seed,
            start=self.samples_seen,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return self._loader(self.train, sampler=stream)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.held_out is None else self._loader(self.held_out)

    def _loader(self, dataset: Dataset, **options) -> DataLoader:
        workers = self.settings.num_workers
        return DataLoader(
            dataset,
            self.settings.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: starting to iterate must not move the global random state
            **options,
        )

    def state_dict(self) -> dict:
        step = self.trainer.global_step
        seen = self.samples_seen + (step - self.start_step) * self.samples_per_step()
        return {"samples_seen": seen, "step": step}

    def load_state_dict(self, state: Mapping) -> None:
        self.samples_seen, self.start_step = state["samples_seen"], state["step"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through ldm.checkpoint: a file is whole or not there; reads without running pickled code."""

    def save_checkpoint(self, content: dict, path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, content)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict:
        return checkpoint.load(path, mmap=False)


class Checkpoints(Callback):
    """Stops at a loss that is not finite; keeps last.ckpt and, by the best `val/psnr`, best.ckpt in `folder`.

    A checkpoint holds the trained parameters (the model leaves out the frozen ones), optimizer, step, random
    states, settings, and what it takes to build the model again: its configuration and its base file.
    """

    def __init__(self, folder: str | Path, save_steps: int, val_steps: int, about: Mapping):
        self.folder, self.about = Path(folder), dict(about)
        self.save_steps, self.val_steps = save_steps, val_steps  # val_steps 0: no validation
        self.best, self.last_step = -math.inf, -1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not torch.isfinite(outputs["loss"]):
            last = self.folder / "last.ckpt"
            kept = f"the last good checkpoint is {last}" if last.is_file() else "nothing was saved yet"
            files = ", ".join(batch.get("path", ["unknown files"]))
            raise ValueError(
                f"training stopped: loss {float(outputs['loss'])} at step {trainer.global_step}; "
                f"its batch: {files}; {kept}"
            )
        step = trainer.global_step
        validated = self.val_steps and step % self.val_steps == 0  # then the checkpoint comes after it
        if step != self.last_step and not validated:
            self.save_if_due(trainer)
        self.last_step = step

    def on_validation_end(self, trainer, pl_module) -> None:
        score = trainer.callback_metrics.get("val/psnr")
        if score is not None and float(score) > self.best:
            self.best = float(score)
            self.save(trainer, "best.ckpt")
        self.save_if_due(trainer)

    def save_if_due(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt every `save_steps` steps and at the end of the run."""
        step = trainer.global_step
        if step and (step % self.save_steps == 0 or step == trainer.max_steps):
            self.save(trainer, "last.ckpt")

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint; raises ValueError, and leaves the old one, if a parameter is not finite."""
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


class AverageWeights(Callback):
    """Keeps an exponential moving average of the trained parameters and validates with it."""

    def __init__(self, decay: float):
        self.decay, self.ema, self.state, self.last_step, self.context = decay, None, None, 0, None

    def on_train_start(self, trainer, pl_module) -> None:
        self.ema, self.last_step = EMA(pl_module, self.decay), trainer.global_step
        if self.state:
            self.ema.load_state_dict(self.state)

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
        content["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, trainer, pl_module, content: dict) -> None:
        self.state = content.get("ema")


# What a resumed run may set anew; anything else would make it another run.
MAY_CHANGE = {
    "output_dir",
    "max_steps",
    "max_epochs",
    "num_epochs",
    "gpus",
    "devices",
    "num_nodes",
    "strategy",
    "num_workers",
    "logger_freq",
    "log_steps",
    "save_steps",
    "val_steps",
    "val_ddim_steps",
    "compile",
    "gradient_checkpointing",
}


def prepare_model(model: ControlLDM, settings: Any) -> None:
    """Make a model ready for training; frozen parts are stored in half precision if the run computes so."""
    model.sd_locked, model.only_mid_control = settings.sd_locked, settings.only_mid_control
    model.learning_rate, model.optimizer = settings.learning_rate, settings.optimizer
    unet = model.model.diffusion_model
    model.control_model.use_checkpoint = unet.use_checkpoint = settings.gradient_checkpointing
    half = HALF.get(lightning_precision(settings.precision))
    if half == torch.float16 and not torch.cuda.is_available():
        half = torch.bfloat16  # as Lightning does
    if half is not None and settings.sd_locked:
        unet.to(half)
    if half == torch.bfloat16:  # float16 overflows in the autoencoder: it stays in float32 then
        model.first_stage_model.to(half)
    model.to(memory_format=torch.channels_last)
    if settings.compile:
        model.control_model.compile()
        unet.compile()


def steps_of(settings: Any, samples: int) -> int:
    """Optimizer steps of the run: `max_steps`, or else what `max_epochs` passes over `samples` take."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_step = settings.batch_size * settings.accumulate_grad_batches * settings.gpus * settings.num_nodes
    return math.ceil(settings.max_epochs * samples / per_step)


def fit(
    model: ControlLDM, data: StreamData, settings: Any, config: Mapping, more: Sequence[Callback] = ()
) -> pl.Trainer:
    """Train until the run's last step, from `output_dir`/checkpoints/last.ckpt if it is there.

    `more` callbacks are called after those that every run has.
    Raises ValueError if that checkpoint was made with settings that may not change within a run.
    """
    quiet_lightning()
    torch.set_float32_matmul_precision("high")  # TF32 where there is CUDA
    folder = Path(settings.output_dir)
    last = folder / "checkpoints" / "last.ckpt"
    step = 0
    if last.is_file():
        content = checkpoint.load(last)
        check_settings(content.get("settings", {}), plain(settings), MAY_CHANGE, last)
        step = content["global_step"]
        del content  # it is mapped from the file, which is about to be replaced
        rank_zero_only(print)(f"resuming {last} at step {step}")
    about = {"config": dict(config), "base": str(settings.resume_path), "settings": plain(settings)}
    callbacks = [AverageWeights(settings.ema_decay)] if settings.ema_decay else []
    callbacks += [
        CsvRows(folder / "logs" / "metrics.csv", settings.log_steps, step),
        ImageLogger(folder / "images", settings.logger_freq),
        Checkpoints(
            folder / "checkpoints",
            settings.save_steps,
            settings.val_steps if data.held_out is not None else 0,
            about,
        ),
        Progress(data.samples_per_step()),
        *more,
    ]
    strategy = settings.strategy
    if settings.only_mid_control and strategy in ("auto", "ddp") and settings.gpus * settings.num_nodes > 1:
        strategy = "ddp_find_unused_parameters_true"
    trainer = pl.Trainer(
        accelerator="auto",
        devices=settings.gpus,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=lightning_precision(settings.precision),
        max_steps=steps_of(settings, len(data.train)),
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        val_check_interval=settings.val_steps * settings.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=None if data.held_out is not None else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_steps,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # embeddings made in validation are used in training
        benchmark=torch.cuda.is_available(),
        default_root_dir=folder,
    )
    trainer.fit(model, data, ckpt_path=last if last.is_file() else None, weights_only=False)
    return trainer


def report(trainer: pl.Trainer, settings: Any, what_next: str) -> None:
    """Say where everything is and what to run next."""
    folder = Path(settings.output_dir)
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    rank_zero_only(print)(
        f"finished at step {trainer.global_step}\n"
        f"  checkpoints  {last}{f' and {best.name}' if best.is_file() else ''}\n"
        f"  pictures     {folder / 'images'}\n"
        f"  curves       {folder / 'logs' / 'metrics.csv'}, or: tensorboard --logdir {folder / 'logs'}\n"
        f"next: {what_next}"
    )
