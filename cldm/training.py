"""Code shared by the ControlNet scripts: start of a run, resumable data, Lightning's Trainer, resuming."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from cldm.callbacks import AtomicCheckpointIO, Checkpoints, EMACallback, LossCheck
from cldm.cldm import ControlLDM
from cldm.logger import ImageLogger, MetricsLogger, ProgressBar
from cldm.model import check_weights
from harness.flags import lightning_precision
from harness.loading import make_loader
from harness.run import launched_nodes
from harness.settings import check_settings
from ldm import checkpoint
from ldm.data.stream import DATA, PLACE, SampleStream, check_same, item_generator
from ldm.device import choose_device, describe_start
from ldm.util import flush_denormals, half_dtype, learning_rate_factor, settle_precision

# Entries that a checkpoint needs so that `fit` can resume it, with their types.
PARTS = dict.fromkeys("loops settings config state_dict callbacks random StreamData".split(), dict)
PARTS |= {"optimizer_states": list, "lr_schedulers": list}
PARTS |= {"epoch": int, "global_step": int, "pytorch-lightning_version": str}
# Settings that may change when a run is resumed; a change of any other raises an error.
MAY_CHANGE = {*"output_dir max_steps max_epochs devices compile num_workers".split()}
MAY_CHANGE |= {*"gradient_checkpointing log_steps save_steps val_steps val_ddim_steps".split()}
# Warnings of Lightning about things that are intended here.
MEANT = (".*in eval mode at the start", ".*LeafSpec.*", ".*many workers.*", ".*transfer_batch_to_device.*")


# ---- start -------------------------------------------------------------------------------------------------


def begin(precision: str, seed: int, last: Path) -> str:
    """Choose the precision (see `choose_precision`), print it and the device, seed all random generators.

    Returns the precision: 32, 16 or bf16. Raises ValueError for 16 on a CPU.
    """
    device = choose_device()
    precision = settle_precision(choose_precision(precision, last), device)
    rank_zero_only(print)(describe_start(device, precision))
    pl.seed_everything(seed, verbose=False)
    flush_denormals()
    return precision


def choose_precision(precision: str, last: Path) -> str:
    """Convert any name of a precision to 32, 16 or bf16. Raises ValueError for an unknown name.

    `auto` is the precision of the checkpoint `last` if a run is resumed. For a new run it is bf16 on GPUs
    that support it, 16 on other GPUs, and 32 on a CPU.
    """
    precision = {"fp16": "16", "no": "32"}.get(precision, precision)  # accelerate's names
    if precision == "auto":
        device = choose_device()
        precision = "32" if device.type == "cpu" else settle_precision("auto", device, "16")
        saved = checkpoint.load(last).get("settings") if last.is_file() else None
        if isinstance(saved, dict):
            precision = saved.get("precision", precision)
    return lightning_precision(precision).split("-")[0]


def check_image_size(size: int) -> None:
    """Raise ValueError unless `size` is a multiple of 64: the UNet halves the latents three times."""
    if size % 64 or size <= 0:
        raise ValueError(f"image_size must be a multiple of 64, not {size}")


def check_start_file(path: str | Path) -> None:
    """Raise FileNotFoundError that says how to get the file that training starts from, if it is missing."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} not found: it is Stable Diffusion with a ControlNet added. Get v1-5-pruned.ckpt (or "
            ".safetensors) of Stable Diffusion 1.5, for instance from Hugging Face, put it into models/, "
            f"then run `python tool_add_control.py ./models/v1-5-pruned.ckpt {path}`. The script's "
            "demonstration runs without it"
        )


def count_steps(max_steps: int, max_epochs: int, samples: int, samples_per_step: int) -> int:
    """Return the number of optimizer steps: `max_steps` if above 0, else that of `max_epochs` epochs."""
    if max_steps > 0:
        return max_steps
    if max_epochs < 1:
        raise ValueError(f"max_epochs must be at least 1, not {max_epochs}")
    return math.ceil(max_epochs * samples / samples_per_step)


# ---- data --------------------------------------------------------------------------------------------------


class WithNoise(Dataset):
    """Dataset that adds the random values of a training step to the items of `dataset`, in the workers.

    Each item gets `timestep`, `noise_0` to sample the latent and `noise_1` of the diffusion step, both
    (channels, h / 8, w / 8): see LatentDiffusion.noise_of.
    """

    def __init__(self, dataset: Dataset, model: ControlLDM):
        self.dataset, self.timesteps = dataset, model.num_timesteps
        self.channels = model.model.diffusion_model.out[-1].out_channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        item = self.dataset[key]
        generators = [item_generator(item["seed"] + salt) for salt in range(3)]
        h, w = (side // 8 for side in item["jpg"].shape[:2])
        noises = [torch.randn(self.channels, h, w, generator=generator) for generator in generators[:2]]
        timestep = torch.randint(0, self.timesteps, (), generator=generators[2])
        return {**item, "noise_0": noises[0], "noise_1": noises[1], "timestep": timestep}


class StreamData(pl.LightningDataModule):
    """Training data as one endless stream that resumes where it stopped, and held-out data in order."""

    def __init__(
        self,
        model: ControlLDM,
        train: Dataset,
        held_out: Dataset | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        samples_per_step: int,
    ):
        super().__init__()
        self.train = WithNoise(train, model)
        self.held_out = None if held_out is None else WithNoise(held_out, model)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.samples_per_step = samples_per_step  # over all processes
        self.samples_seen, self.start_step = 0, 0  # at the start of this process

    def train_dataloader(self) -> DataLoader:
        check_same(len(self.train), DATA)
        check_same(self.samples_seen, PLACE)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        stream = SampleStream(len(self.train), self.seed, self.samples_seen, None, rank, world_size)
        return make_loader(self.train, self.batch_size, self.num_workers, stream)

    def val_dataloader(self) -> DataLoader | list:
        if self.held_out is None:
            return []
        return make_loader(self.held_out, self.batch_size, self.num_workers)

    def state_dict(self) -> dict:
        step = self.trainer.global_step
        seen = self.samples_seen + (step - self.start_step) * self.samples_per_step
        return {"samples_seen": seen, "step": step}

    def load_state_dict(self, state: Mapping) -> None:
        self.samples_seen, self.start_step = state["samples_seen"], state["step"]


# ---- model and Trainer -------------------------------------------------------------------------------------


def prepare_model(
    model: ControlLDM,
    precision: str,
    clips: bool,
    processes: int,
    gradient_checkpointing: bool,
    compiled: bool = False,
) -> None:
    """Prepare a model for training: channels_last layout, frozen parts stored in the training precision.

    `clips` is True if gradients are clipped, `processes` is the number of processes that train together;
    with `compiled` torch.compile compiles ControlNet and UNet at their first call.
    """
    half = half_dtype(precision)
    # the fused kernel unscales gradients itself, too late for clipping: Lightning refuses both, in bf16 too
    model.fused_optimizer = True if half is None or not clips else None
    unet = model.model.diffusion_model
    model.control_model.use_checkpoint = unet.use_checkpoint = gradient_checkpointing
    if half is not None:
        for part in unet.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.to(half)
        if half == torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False):
            model.first_stage_model.to(torch.bfloat16)  # its activations overflow in float16
    # not with DDP, which exchanges gradients during the backward pass, nor if activations are recomputed
    alone = processes == 1 and not gradient_checkpointing
    model.cast_together = half is not None and alone and not compiled  # a compiler fuses the casts itself
    model.to(memory_format=torch.channels_last)
    if compiled:
        model.control_model.compile()
        unet.compile()


def rate_schedule(name: str, steps: int) -> Callable[[int], float]:
    """Return learning-rate multiplier by step; "linear" and "cosine" warm up for 4 % of the steps."""
    warmup = 0 if name == "constant" else steps // 25
    return partial(learning_rate_factor, steps=steps, schedule=name, warmup=warmup)


def make_trainer(
    model: ControlLDM,
    folder: Path,
    about: Mapping,
    precision: str,
    max_steps: int,
    images_per_step: int,
    accumulate: int,
    max_grad_norm: float,
    ema_decay: float,
    log_steps: int,
    save_steps: int,
    val_steps: int,
    validates: bool,
    devices: int,
) -> pl.Trainer:
    """Create Lightning's Trainer for a run in `folder`; checkpoints also hold `about`.

    Our callbacks replace Lightning's checkpoints and progress bar, and our stream replaces its samplers.
    An `ema_decay` or `max_grad_norm` of 0 turns EMA or clipping off.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # without its advertisements
    for text in MEANT:
        warnings.filterwarnings("ignore", text)
    torch.set_float32_matmul_precision("high")  # TF32 where there is CUDA
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [EMACallback(ema_decay)] if ema_decay else []
    callbacks += [
        MetricsLogger(folder / "logs" / "metrics.csv", log_steps),
        LossCheck(checkpoints / "last.ckpt", log_steps, save_steps, val_steps),
        ImageLogger(folder / "images", val_steps),
        Checkpoints(checkpoints, save_steps, val_steps if validates else 0, about),
        ProgressBar(images_per_step, log_steps),
    ]
    nodes = launched_nodes()
    strategy = "auto"  # DDP for several processes
    if model.only_mid_control and devices * nodes > 1:  # the skips' zero convolutions get no gradients
        strategy = "ddp_find_unused_parameters_true"
    return pl.Trainer(
        accelerator=choose_device().type,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=lightning_precision(precision),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=TensorBoardLogger(folder, name="", version="logs"),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=max_grad_norm or None,
        log_every_n_steps=log_steps,
        val_check_interval=val_steps * accumulate,
        limit_val_batches=None if validates else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # embeddings made in validation are used in training
        benchmark=True,  # cuDNN's fastest algorithm for crops of one size
        default_root_dir=folder,
    )


def fit(trainer: pl.Trainer, model: ControlLDM, data: StreamData, last: Path, about: Mapping) -> None:
    """Train to the run's last step, starting from the checkpoint `last` if it exists.

    Raises ValueError if the checkpoint is damaged or from a run with other settings or yaml than `about`.
    """
    resumes = last.is_file()
    if resumes:
        check_resumed(model, last, about)
    try:
        trainer.fit(model, data, ckpt_path=last if resumes else None, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io.wait()


def check_resumed(model: ControlLDM, path: Path, about: Mapping) -> None:
    """Raise ValueError if the checkpoint `path` does not fit this run.

    Its tensors are memory-mapped from a file that the run will replace, so none of them is kept.
    """
    content = checkpoint.load(path)
    lacks = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    lacks += [name for name, value in content.items() if PARTS.get(name) is dict and not value]
    if not isinstance(content.get("ema", {}), dict):
        lacks.append("ema")
    if lacks:
        raise ValueError(f"{path} is damaged or from another script: it lacks {', '.join(lacks)}")
    check_settings(content["settings"], dict(about["settings"]), MAY_CHANGE, path)
    if content["config"] != about["config"]:
        raise ValueError(f"{path} is of a run with another model: its yaml configuration has changed since")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    there = {k: v for k, v in content["state_dict"].items() if isinstance(v, torch.Tensor)}
    check_weights(trained, there, path)
    rank_zero_only(print)(f"resuming {path} at step {content['global_step']}")
