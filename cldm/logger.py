"""Callbacks that report on ControlNet training: image grids, metrics, the progress bar."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from harness.logs import MetricsCsv, progress_bar
from ldm.data.image import to_uint8, write_image


class StepCallback(Callback):
    """Callback whose `on_step` is called after each optimizer step, not after each accumulated batch."""

    last_step = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.on_step(trainer, pl_module, batch)

    def on_step(self, trainer: pl.Trainer, model: pl.LightningModule, batch: dict) -> None:
        raise NotImplementedError


class ImageLogger(StepCallback):
    """Callback that writes a grid of images every `batch_frequency` optimizer steps and after validation.

    Rank 0 writes grids to `folder`/NAME_STEP.png and to TensorBoard. The columns are those of the model's
    `log_images(batch, max_images)`, or its `validation_images`.
    """

    def __init__(self, folder: str | Path, batch_frequency: int = 2000, max_images: int = 4):
        self.folder = Path(folder)
        self.batch_frequency = batch_frequency
        self.max_images = max_images

    def on_step(self, trainer, model, batch) -> None:
        if trainer.global_step % self.batch_frequency:
            return
        if trainer.is_global_zero:
            with trainer.precision_plugin.val_step_context():
                images = model.log_images(batch, self.max_images)
            self.write(trainer, "train", images)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero and pl_module.validation_images:
            self.write(trainer, "val", pl_module.validation_images)

    def write(self, trainer: pl.Trainer, name: str, images: dict[str, Tensor]) -> None:
        """Write grid `name`: a row for each item, a column for each of `images` (b, 3, h, w) in [-1, 1]."""
        columns = [value.detach().float().cpu() for value in images.values()]
        rows, step = torch.stack(columns, dim=1).flatten(0, 1), trainer.global_step
        grid = to_uint8(make_grid(rows, nrow=len(columns), padding=4, pad_value=1.0))  # (H, W, 3)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_image(self.folder / f"{name}_{step:07d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, grid, step, dataformats="HWC")


class MetricsLogger(StepCallback):
    """Callback that appends the model's losses every `log_steps` optimizer steps, and validations, to `path`.

    Losses also go to Lightning's loggers. A row is on disk before the checkpoint of its step (this callback
    must come before the one that saves), and a resumed run drops the rows after its step, so that no row is
    lost or repeated.
    """

    def __init__(self, path: Path, log_steps: int):
        self.path = path
        self.log_steps = log_steps
        self.table: MetricsCsv | None = None  # only on rank 0

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.table = MetricsCsv(self.path, trainer.global_step)

    def on_step(self, trainer, model, batch) -> None:
        step = trainer.global_step
        if self.table and step % self.log_steps == 0:
            values = {f"train/{name}": value.item() for name, value in model.train_values.items()}
            self.table.append({"step": step, **values})
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.table:
            metrics = trainer.callback_metrics.items()
            values = {name: float(value) for name, value in metrics if name.startswith("val/")}
            self.table.append({"step": trainer.global_step, **values})


class ProgressBar(StepCallback):
    """Progress bar over the optimizer steps; updates loss and images/s every `log_steps` steps."""

    def __init__(self, images_per_step: int, log_steps: int):
        self.images_per_step = images_per_step
        self.log_steps = log_steps
        self.bar = None

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.bar = progress_bar(trainer.max_steps, trainer.global_step, trainer.is_global_zero)

    def on_step(self, trainer, model, batch) -> None:
        self.bar.update()
        if trainer.global_step % self.log_steps == 0:  # reading the loss waits for the device
            rate = (self.bar.format_dict["rate"] or 0.0) * self.images_per_step
            text = f"loss {float(model.train_values['loss']):.4f}, {rate:.3g} images/s"
            self.bar.set_postfix_str(text, refresh=False)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_end(self, trainer, pl_module) -> None:
        self.bar.close()
