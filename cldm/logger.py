"""What a training run shows and keeps: pictures, metrics, progress."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from cldm.sharding import ShardedStrategy
from harness.metrics_csv import MetricsCsv
from ldm.data.image import to_uint8, write_image
from ldm.metrics import psnr, ssim


def log_txt_as_img(size: tuple[int, int], texts: list[str]) -> Tensor:
    """Texts written black on white, wrapped: (b, 3, height, width) in [-1, 1] for size (width, height)."""
    pictures = []
    for text in texts:
        picture = Image.new("RGB", size, "white")
        points = max(8, size[0] // 16)
        per_line = max(1, int(size[0] / (0.55 * points)))
        lines = "\n".join(text[i : i + per_line] for i in range(0, len(text), per_line))
        ImageDraw.Draw(picture).text((4, 4), lines, fill="black", font=ImageFont.load_default(points))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures)


def compared(
    model: pl.LightningModule, batch: Mapping, batch_idx: int, made: str, truth: str
) -> tuple[dict[str, Tensor], list[tuple[np.ndarray, np.ndarray]], dict[str, float]]:
    """A validation batch: the columns of `log_images`, `made` and `truth` of them as pairs of uint8, and the
    means of these, `val/psnr` and `val/ssim`. The first batch's pictures are kept to be shown."""
    images = model.log_images(batch, len(batch[model.first_stage_key]), model.validation_ddim_steps)
    if batch_idx == 0:
        model.validation_images = {name: value[:4] for name, value in images.items()}
    pairs = [(to_uint8(a), to_uint8(b)) for a, b in zip(images[made], images[truth], strict=True)]
    scores = {"val/psnr": psnr, "val/ssim": ssim}
    return images, pairs, {name: float(np.mean([f(*pair) for pair in pairs])) for name, f in scores.items()}


class ImageLogger(Callback):
    """Every `batch_frequency` optimizer steps writes a grid of what the model makes of the current batch.

    Pictures go to `folder`/NAME_STEP.png and to TensorBoard, from the first process only. The model's
    `log_images(batch, max_images)` gives the columns.
    """

    def __init__(self, folder: str | Path, batch_frequency: int = 2000, max_images: int = 4):
        self.folder, self.batch_frequency, self.max_images = Path(folder), batch_frequency, max_images
        self.last_step = -1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step in (0, self.last_step) or step % self.batch_frequency:
            return
        self.last_step = step
        if trainer.is_global_zero or isinstance(trainer.strategy, ShardedStrategy):  # split: all must compute
            with trainer.precision_plugin.val_step_context():
                images = pl_module.log_images(batch, self.max_images)
            if trainer.is_global_zero:
                self.write(trainer, "train", images)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero and pl_module.validation_images:
            self.write(trainer, "val", pl_module.validation_images)

    def write(self, trainer: pl.Trainer, name: str, images: dict[str, Tensor]) -> None:
        """Write a row for each item, a column for each of `images` (b, 3, h, w) in [-1, 1], under `name`."""
        columns = [value.detach().float().cpu() for value in images.values()]
        rows, step = torch.stack(columns, dim=1).flatten(0, 1), trainer.global_step
        grid = to_uint8(make_grid(rows, nrow=len(columns), padding=4, pad_value=1.0))  # (H, W, 3)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_image(self.folder / f"{name}_{step:07d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, grid, step, dataformats="HWC")


class CsvRows(Callback):
    """Appends the model's losses every `log_steps` optimizer steps, and each validation, to `path`.

    Losses go to Lightning's loggers too.

    A row is on disk before the checkpoint of its step (this callback comes before the one that saves), and a
    run that resumes at `step` drops the rows after it: none is lost, none is there twice.
    """

    def __init__(self, path: Path, log_steps: int, step: int):
        self.path, self.log_steps, self.last_step, self.table = path, log_steps, step, None

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.table = MetricsCsv(self.path, self.last_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self.table and step > self.last_step and step % self.log_steps == 0:
            values = {f"train/{name}": value.item() for name, value in pl_module.train_values.items()}
            self.table.append({"step": step, **values})
            for logger in trainer.loggers:
                logger.log_metrics(values, step)
        self.last_step = step

    def on_validation_end(self, trainer, pl_module) -> None:
        if self.table:
            metrics = trainer.callback_metrics.items()
            values = {name: float(value) for name, value in metrics if name.startswith("val/")}
            self.table.append({"step": trainer.global_step, **values})


class Progress(Callback):
    """A bar over the optimizer steps, by the first process; every `log_steps` with loss and images/s."""

    def __init__(self, images_per_step: int, log_steps: int):
        self.images_per_step, self.log_steps, self.bar = images_per_step, log_steps, None

    def on_train_start(self, trainer, pl_module) -> None:
        look = {"disable": not trainer.is_global_zero, "unit": "step", "dynamic_ncols": True}
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="training", **look)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.bar.n:
            return
        self.bar.update(step - self.bar.n)
        if step % self.log_steps == 0:  # looking at the loss waits for the device
            rate = (self.bar.format_dict["rate"] or 0.0) * self.images_per_step
            text = f"loss {float(pl_module.train_values['loss']):.4f}, {rate:.3g} images/s"
            self.bar.set_postfix_str(text, refresh=False)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_end(self, trainer, pl_module) -> None:
        self.bar.close()
