"""Runs of the plain training loops: the folder of a run, its logs, checkpoints, resume and error messages.

fabric = start_fabric(devices, precision, seed)
parts = {"state_dict": network, "optimizer": optimizer, "ema": ema}
run = Run(fabric, output_dir, recorded, parts, may_change=("num_workers",))
for batch in run.batches(run.loader(dataset, batch_size, steps, seed, num_workers), steps):
    ...                                         # forward, backward, optimizer step
    run.advance({"loss": loss}, batch["name"])  # counts the step, watches for NaN
    if run.step % log_every == 0:
        run.log(run.means() | evaluate(...))    # TensorBoard and logs/metrics.csv
        run.save(score)                         # last.ckpt, and best.ckpt if none scored higher
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from harness.flags import lightning_precision
from harness.loading import make_loader
from harness.logs import MetricsCsv, check_finite, progress_bar, stop_message, summary
from harness.settings import check_settings, plain
from ldm import checkpoint
from ldm.data.image import write_image
from ldm.data.stream import DATA, PLACE, SampleStream, check_same
from ldm.device import choose_device, describe_start
from ldm.util import flush_denormals, match_layout, settle_precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # imported where a run starts: it takes seconds

CHECK_EVERY = 10  # steps between two checks of the losses: each check waits for the device


def start_fabric(devices: int = 1, precision: str = "32", seed: int = 0, on_cuda: str = "") -> "Fabric":
    """Launch and seed a Fabric: on CUDA if available, else on the CPU; with DDP for several processes.

    `devices` is the number per machine. A script that sets its precision on CUDA itself gives it as
    `on_cuda`, for the printed line only. Raises ValueError for a precision other than 32, 16 and bf16 (or
    Lightning's names of these), and for 16 on a CPU.
    """
    from lightning_fabric import Fabric

    flush_denormals()
    torch.backends.cudnn.benchmark = True  # its fastest algorithm for crops of one size
    device = choose_device()
    precision = settle_precision(lightning_precision(precision), device)
    nodes = launched_nodes()
    fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, precision=precision)
    fabric.launch()
    fabric.print(describe_start(device, on_cuda if on_cuda and device.type == "cuda" else precision))
    fabric.seed_everything(seed, verbose=False)
    return fabric


def launched_nodes() -> int:
    """Return the number of machines that torchrun or srun started this run on; 1 without either."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.detect():
        return int(os.environ.get("SLURM_NNODES", 1))
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def average_gradients(fabric: "Fabric", optimizer: torch.optim.Optimizer) -> None:
    """Replace every gradient that `optimizer` is about to use by its mean over the processes, as DDP does.

    Gradients of one dtype are exchanged as one tensor: hundreds of small exchanges would be slower.
    """
    if fabric.world_size == 1:
        return
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        mean = fabric.all_reduce(torch.cat([gradient.flatten() for gradient in same]))
        parts = mean.split([gradient.numel() for gradient in same])
        torch._foreach_copy_(same, [part.view(g.shape) for part, g in zip(parts, same, strict=True)])


def rank_zero_first(fabric: "Fabric", work: Callable[[], Any]) -> Any:
    """Call `work` on rank 0, then on the others, which may read what it wrote. Returns the result of `work`.

    Fabric's own rank_zero_first waits forever for a process that has ended.
    """
    for first in (True, False):
        if fabric.is_global_zero == first:
            result = work()
        fabric.barrier()
    return result


def unscale_gradients(fabric: "Fabric", optimizer: torch.optim.Optimizer) -> None:
    """Undo float16 loss scaling of the gradients, to clip them. Fabric's own refuses fused optimizers."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    if scaler is not None:
        scaler.unscale_(getattr(optimizer, "optimizer", optimizer))


def last_checkpoint(output_dir: str | Path) -> Path:
    """Return the path of the last checkpoint of a run in this folder. If it exists, the run is resumed, and
    the weights that it started from are not read again."""
    return Path(output_dir) / "checkpoints" / "last.ckpt"


class Run:
    """Training run in `output_dir`, resumed at its last checkpoint if there is one.

    `recorded`, a dataclass or a dict, holds the run's settings and facts about its data; a value that differs
    from the checkpoint's raises ValueError, unless its name is in `may_change`. `parts` are the objects with
    state (`state_dict`, `load_state_dict`); "state_dict" is the network, not wrapped by Fabric, so that the
    files have its own names. Log before saving: a resumed run drops the rows of steps after its checkpoint
    and writes them again.
    """

    def __init__(
        self,
        fabric: "Fabric",
        output_dir: str | Path,
        recorded: Any,
        parts: dict,
        may_change: Iterable[str] = (),
    ):
        self.fabric = fabric
        self.folder = Path(output_dir)
        self.recorded = plain(recorded)
        self.parts = {**parts, "precision": fabric.strategy.precision}
        self.last_checkpoint = last_checkpoint(output_dir)
        self.best_checkpoint = self.last_checkpoint.with_name("best.ckpt")
        self.step = 0
        self.best = -math.inf  # highest score so far
        self.samples_per_step = 1
        self._resumed_samples: int | None = None  # samples per step of the run that is resumed
        self._sums: dict[str, float] = {}  # sums of the metrics since the last means()
        self._count = 0  # number of steps in the sums
        self._seconds, self._steps = 0.0, 0  # training time since the last means()
        self._mark = 0.0  # when the present step began
        self._pending: list[tuple[int, dict, list]] = []  # steps whose losses are not yet checked for NaN
        self._bar: tqdm | None = None
        for name in ("logs", "images", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self.last_checkpoint.is_file():
            self._resume({"output_dir", *may_change})
        check_same(self.step, PLACE)
        if fabric.is_global_zero:
            self.csv = MetricsCsv(self.folder / "logs" / "metrics.csv", self.step or -1)
            from lightning_fabric.loggers import TensorBoardLogger

            self.board = TensorBoardLogger(self.folder / "logs", "", "", purge_step=self.step + 1)

    def loader(
        self, dataset: Dataset, batch_size: int, steps: int, seed: int, num_workers: int = 0
    ) -> DataLoader:
        """Return the batches from the current step to step `steps`, in the order of SampleStream.

        `batch_size` is that of each process. A run of n processes with batches of b sees the same samples in
        each step as one process with batches of n * b.

        Raises ValueError if the processes see different data, or the resumed run had other samples per step.
        """
        world_size = self.fabric.world_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.samples_per_step = joint = batch_size * world_size
        if self._resumed_samples not in (None, joint):
            raise ValueError(
                f"{self.last_checkpoint} was trained with {self._resumed_samples} samples a step, this run "
                f"has {batch_size} on each of {world_size} processes: batch_size counts those of one device"
            )
        check_same(len(dataset), DATA)
        stream = SampleStream(
            len(dataset),
            seed,
            start=self.step * joint,
            total=steps * joint,
            rank=self.fabric.global_rank,
            world_size=world_size,
        )
        loader = make_loader(dataset, batch_size, num_workers, stream)
        return self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def batches(self, loader: Iterable, steps: int) -> Iterator:
        """Yield the loader's batches, with a progress bar that `advance` updates."""
        with progress_bar(steps, self.step, self.fabric.is_global_zero) as self._bar:
            self._mark = time.perf_counter()
            for batch in loader:
                step = self.step
                yield batch
                if self.step != step:  # what came after `advance` (evaluation, saving) is not training time
                    self._mark = time.perf_counter()
            self._check_losses()

    def advance(self, metrics: Mapping[str, torch.Tensor], files: Iterable[str] = ()) -> None:
        """Count an optimizer step; `metrics` are its losses and other scalars, `files` those of its batch.

        Raises ValueError (within CHECK_EVERY steps) if a metric is NaN or infinite.
        """
        self.step += 1
        self._steps += 1
        values = {name: torch.as_tensor(value).detach().float() for name, value in metrics.items()}
        self._pending.append((self.step, values, list(files)))
        if len(self._pending) >= CHECK_EVERY:
            self._check_losses()
        if self._bar is not None:
            now = time.perf_counter()
            self._seconds += now - self._mark
            self._mark = now
            self._bar.update()

    def _check_losses(self) -> None:
        """Add the pending losses to the means. Raises ValueError if one is NaN or infinite in any process."""
        problem = ""
        values: dict[str, float] = {}
        for step, metrics, files in self._pending:
            values = {name: value.item() for name, value in metrics.items()}
            bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
            if bad and not problem:
                problem = f"{', '.join(bad)} at step {step}; its batch: {', '.join(files) or 'unknown files'}"
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._count += 1
        self._pending = []
        if values and self._bar is not None:
            shown = {**values, "images/s": self._rate()}
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        # Every process stops if one of them has a problem: the others would wait for it forever.
        problems = torch.tensor(float(bool(problem)), device=self.fabric.device)
        if self.fabric.all_reduce(problems, reduce_op="sum").item() > 0:
            raise ValueError(stop_message(problem or "NaN in another process", self.last_checkpoint))

    def _rate(self) -> float:
        return self._steps * self.samples_per_step / max(self._seconds, 1e-9)

    def means(self) -> dict[str, float]:
        """Return the means of the metrics over processes and the steps since the last call, and images/s."""
        self._check_losses()
        means = {name: value / self._count for name, value in self._sums.items()}
        if self.fabric.world_size > 1:
            device = self.fabric.device
            sums = {name: torch.tensor(value, device=device) for name, value in means.items()}
            means = {name: value.item() for name, value in self.fabric.all_reduce(sums).items()}
        means["images/s"] = self._rate()
        self._sums, self._count = {}, 0
        self._seconds, self._steps = 0.0, 0
        return means

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write one row to logs/metrics.csv and to TensorBoard, at the present step."""
        if self.fabric.is_global_zero:
            self.csv.append({"step": self.step, **metrics})
            self.board.log_metrics(metrics, self.step)

    def log_image(self, name: str, image: np.ndarray) -> None:
        """Write uint8 (h, w, 3) to images/NAME_STEP.png and to TensorBoard."""
        if self.fabric.is_global_zero:
            write_image(self.folder / "images" / f"{name}_{self.step:07d}.png", image)
            self.board.experiment.add_image(name, image, self.step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line once, above the progress bar."""
        if self.fabric.is_global_zero:
            tqdm.write(text)

    def save(self, score: float | None = None) -> None:
        """Write last.ckpt, and best.ckpt if `score` is higher than all scores before.

        Raises ValueError if a weight is not finite (nothing is written) and OSError if the disk is full; in
        both cases the existing files stay intact.
        """
        self._check_losses()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        check_finite(state["state_dict"], self.step)
        paths = [self.last_checkpoint]
        if score is not None and score > self.best:
            self.best = score
            # best.ckpt first: a run that is killed between the two files repeats this step.
            paths.insert(0, self.best_checkpoint)
        own = {"random": checkpoint.random_states(), "sums": self._sums, "count": self._count}
        state |= {
            "step": self.step,
            "best": self.best,
            "settings": self.recorded,
            "samples_per_step": self.samples_per_step,
            "processes": self.gather(own),
        }
        if self.fabric.is_global_zero:
            for path in paths:
                checkpoint.save(path, state)
        self.fabric.barrier()

    def gather(self, content: Any) -> list:
        """Collect the contents of all processes, in the order of their ranks."""
        if self.fabric.world_size == 1:
            return [content]
        contents = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(contents, content)
        return contents

    def _resume(self, may_change: set[str]) -> None:
        path = self.last_checkpoint
        state = checkpoint.load(path, mmap=False)  # Windows cannot replace a mapped file when saving
        needed = (*self.parts, "step", "settings", "processes", "samples_per_step")
        missing = [name for name in needed if name not in state]
        if "settings" in state and not isinstance(state["settings"], dict):
            missing.append("settings")
        if missing:
            raise ValueError(f"{path} is from another script: it lacks {', '.join(missing)}")
        check_settings(state["settings"], self.recorded, may_change, path)
        try:
            self._restore(state)
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not fit this run or is damaged: {reason}") from error
        self.say(f"resuming {path} at step {self.step}")

    def _restore(self, state: dict) -> None:
        """Restore the state of all parts, and of this process if the number of processes is the same."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                match_layout(part)
        self.step = int(state["step"])
        self.best = float(state["best"])
        self._resumed_samples = int(state["samples_per_step"])
        if len(state["processes"]) == self.fabric.world_size:
            own = state["processes"][self.fabric.global_rank]
            self._sums = own["sums"]
            self._count = own["count"]
            checkpoint.restore_random_states(own["random"])

    def finish(self, what_next: str) -> None:
        """Close the logs; print where everything is and what to run next."""
        if self.fabric.is_global_zero:
            self.board.finalize("success")
        self.say(summary(self.folder, self.step, what_next, f" ({self.best:.3f})"))
