"""What the ControlNet scripts share: checks, data in a resumable order, Lightning's Trainer, the summary."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from cldm.callbacks import AtomicCheckpointIO, AverageWeights, Checkpoints
from cldm.cldm import ControlLDM
from cldm.demo import announce_demo
from cldm.logger import CsvRows, ImageLogger, Progress
from cldm.model import check_weights
from cldm.sharding import ShardedStrategy, check_sharding
from harness.endings import summary
from harness.flags import lightning_precision
from harness.loading import make_loader
from harness.settings import check_counts, check_fractions, check_optimizer, check_settings, plain
from ldm import checkpoint
from ldm.data.stream import DATA, PLACE, SampleStream, check_same, item_generator
from ldm.device import choose_device, describe_start
from ldm.util import flush_denormals, half_dtype, learning_rate_factor, settle_precision

COUNTS = (  # settings that must be at least 1
    "batch_size accumulate_grad_batches devices num_nodes "
    "log_steps logger_freq save_steps val_steps val_ddim_steps"
)
# Of a checkpoint, with their types.
PARTS = dict.fromkeys("loops settings state_dict callbacks random StreamData".split(), dict)
PARTS |= {"epoch": int, "global_step": int, "pytorch-lightning_version": str}
PARTS |= {"optimizer_states": list, "lr_schedulers": list}
# What a resumed run may set anew; anything else would make it another run. Checkpoints of earlier versions
# have the devices as `gpus`, and max_epochs as `num_epochs`.
MAY_CHANGE = set(
    "output_dir max_steps max_epochs num_epochs gpus devices num_nodes strategy num_workers compile "
    "gradient_checkpointing log_steps logger_freq save_steps val_steps val_ddim_steps "
    "val_strength".split()
)


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements, and warnings about what is meant here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    meant = ".*in eval mode at the start", ".*LeafSpec.*", ".*many workers.*", ".*transfer_batch_to_device.*"
    for text in meant:
        warnings.filterwarnings("ignore", text)


def with_precision(settings: Any) -> Any:
    """The settings with a precision that is settled: `auto` is the one that the run began with, or for a new
    run what suits the GPU, on a CPU 32; accelerate's fp16 and no are 16 and 32."""
    precision = {"fp16": "16", "no": "32"}.get(settings.precision, settings.precision)
    if precision == "auto":
        last = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
        saved = checkpoint.load(last).get("settings") if last.is_file() else None
        new = "32" if choose_device().type == "cpu" else settle_precision("auto", choose_device(), "16")
        precision = saved.get("precision", "32") if isinstance(saved, dict) else new
    return replace(settings, precision=precision)


def begin(settings: Any) -> Any:
    """The settings, checked, with a precision that is settled; from here on all that is random is seeded."""
    if settings.demo:
        announce_demo()
    settings = with_precision(settings)
    rank_zero_only(print)(describe_start(choose_device(), settings.precision))
    check_start(settings)
    pl.seed_everything(settings.seed, verbose=False)
    flush_denormals()
    return settings


def check_start(settings: Any) -> None:
    """Find mistakes that both scripts' users make before anything is loaded.

    Raises ValueError for a setting out of range or an optimizer that is not installed, and FileNotFoundError
    that says how to get the file that training starts from, if it is missing.
    """
    precision = lightning_precision(settings.precision)
    check_counts(settings, COUNTS if settings.max_steps > 0 else f"{COUNTS} max_epochs")
    if settings.val_ddim_steps > 1000:
        raise ValueError(f"val_ddim_steps must be at most 1000, not {settings.val_ddim_steps}")
    if settings.image_size % 64 or settings.image_size <= 0:
        raise ValueError(f"image_size must be a multiple of 64, not {settings.image_size}")
    for name in ("learning_rate", "lr_warmup_steps", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name} must not be negative, but is {getattr(settings, name)}")
    check_fractions(settings, "ema_decay", whole=False)
    check_fractions(settings, "prompt_dropout")
    if settings.cache_latents and settings.use_augmentation:
        raise ValueError("--cache_latents needs crops that stay: --no_use_augmentation")
    check_optimizer(settings.optimizer)
    if settings.strategy == "fsdp":
        check_sharding(settings)
    if not settings.demo and not Path(settings.resume_path).is_file():
        raise FileNotFoundError(
            f"{settings.resume_path} not found: it is Stable Diffusion with a ControlNet added. Get "
            "v1-5-pruned.ckpt (or .safetensors) of Stable Diffusion 1.5, for instance from Hugging Face, put "
            "it into models/, then run `python tool_add_control.py ./models/v1-5-pruned.ckpt "
            f"{settings.resume_path}`. To see everything run without it, give --demo"
        )
    settle_precision(precision, choose_device())


class WithNoise(Dataset):
    """`dataset` with what is drawn for each item's training step, where it is read: its `timestep`, `noise_0`
    of its latent and `noise_1` of the step, both (channels, h / 8, w / 8). See LatentDiffusion.noise_of."""

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
    """Training data as one endless stream that resumes where its checkpoint stood; held-out data as it is."""

    def __init__(self, train: Dataset, held_out: Dataset | None, settings: Any):
        super().__init__()
        self.train, self.held_out, self.settings = train, held_out, settings
        self.samples_seen, self.start_step = 0, 0  # at the start of this process

    def train_dataloader(self) -> DataLoader:
        check_same(len(self.train), DATA)
        check_same(self.samples_seen, PLACE)
        place = self.samples_seen, None, self.trainer.global_rank, self.trainer.world_size
        return self._loader(self.train, SampleStream(len(self.train), self.settings.seed, *place))

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.held_out is None else self._loader(self.held_out)

    def _loader(self, dataset: Dataset, stream: SampleStream | None = None) -> DataLoader:
        return make_loader(dataset, self.settings.batch_size, self.settings.num_workers, stream)

    def state_dict(self) -> dict:
        step = self.trainer.global_step
        seen = self.samples_seen + (step - self.start_step) * samples_per_step(self.settings)
        return {"samples_seen": seen, "step": step}

    def load_state_dict(self, state: Mapping) -> None:
        self.samples_seen, self.start_step = state["samples_seen"], state["step"]


def prepare_model(model: ControlLDM, settings: Any) -> None:
    """Make a model ready for training; frozen parts are stored in half precision if the run computes so."""
    model.sd_locked, model.only_mid_control = settings.sd_locked, settings.only_mid_control
    model.learning_rate, model.optimizer = settings.learning_rate, settings.optimizer
    model.weight_decay = settings.weight_decay
    # the fused kernel unscales gradients itself, too late for clipping: Lightning refuses that for bf16 too
    may_fuse = half_dtype(settings.precision) is None or not settings.max_grad_norm
    model.fused_optimizer = True if may_fuse else None
    unet = model.model.diffusion_model
    model.control_model.use_checkpoint = unet.use_checkpoint = settings.gradient_checkpointing
    half = half_dtype(settings.precision)
    if half is not None:
        for part in unet.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.to(half)
        if half == torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False):
            model.first_stage_model.to(torch.bfloat16)  # in which it computes then: float16 overflows in it
    alone = settings.devices * settings.num_nodes == 1  # several send gradients while others are computed
    model.cast_together = half is not None and alone and not settings.gradient_checkpointing
    model.cast_together = model.cast_together and not settings.compile
    model.to(memory_format=torch.channels_last)
    if settings.compile:
        model.control_model.compile()
        unet.compile()


def samples_per_step(settings: Any) -> int:
    """Samples in one optimizer step, over all processes."""
    processes = settings.devices * settings.num_nodes
    return settings.batch_size * settings.accumulate_grad_batches * processes


def steps_of(settings: Any, samples: int) -> int:
    """Optimizer steps of the run: `max_steps`, or else what `max_epochs` passes over `samples` take."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.max_epochs * samples / samples_per_step(settings))


def comparable(settings: Any) -> dict:
    """Settings as `check_settings` compares them: one spelling of the precision."""
    values = plain(settings)
    return {**values, "precision": lightning_precision(values.get("precision", "32"))}


def unsaid(settings: Any) -> dict:
    """Defaults of the script's settings: what a checkpoint of an earlier version, which lacks them, did."""
    return {**{field.name: field.default for field in fields(settings)}, "precision": "32"}


def check_parts(content: Mapping, path: Path) -> None:
    """Raise ValueError unless a checkpoint has what `fit` writes."""
    lacks = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    lacks += [name for name, value in content.items() if PARTS.get(name) is dict and not value]
    lacks += [] if isinstance(content.get("ema", {}), dict) else ["ema"]
    if lacks:
        raise ValueError(f"{path} is damaged or from another script: it lacks {', '.join(lacks)}")


def check_resumed(model: ControlLDM, settings: Any, samples: int, path: Path) -> int:
    """The step that the checkpoint `path` was saved at. Raises ValueError if it does not fit this run.

    What is loaded is mapped from the file, which the run is about to replace: none of it is kept.
    """
    content = checkpoint.load(path)
    check_parts(content, path)
    before = {"samples": samples, **unsaid(settings), **content["settings"]}
    check_settings(comparable(before), {**comparable(settings), "samples": samples}, MAY_CHANGE, path)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    there = {k: v for k, v in content["state_dict"].items() if isinstance(v, torch.Tensor)}
    check_weights(trained, there, path)
    rank_zero_only(print)(f"resuming {path} at step {content['global_step']}")
    return content["global_step"]


def fit(
    model: ControlLDM, data: StreamData, settings: Any, config: Mapping, more: Sequence[Callback] = ()
) -> pl.Trainer:
    """Train until the run's last step, from `output_dir`/checkpoints/last.ckpt if it is there.

    `more` callbacks are called after those that every run has.
    Raises ValueError if that checkpoint was made with settings that may not change within a run, or is not
    whole.
    """
    quiet_lightning()
    data.train = WithNoise(data.train, model)
    data.held_out = data.held_out and WithNoise(data.held_out, model)
    torch.set_float32_matmul_precision("high")  # TF32 where there is CUDA
    folder = Path(settings.output_dir)
    last = folder / "checkpoints" / "last.ckpt"
    samples = len(data.train)
    step = check_resumed(model, settings, samples, last) if last.is_file() else 0
    known = {**plain(settings), "samples": samples}
    about = {"config": dict(config), "base": str(settings.resume_path), "settings": known}
    val_steps = settings.val_steps if data.held_out is not None else 0
    callbacks = [
        *([AverageWeights(settings.ema_decay)] if settings.ema_decay else []),
        CsvRows(folder / "logs" / "metrics.csv", settings.log_steps, step),
        ImageLogger(folder / "images", settings.logger_freq),
        Checkpoints(folder / "checkpoints", settings.save_steps, val_steps, settings.log_steps, about),
        Progress(samples_per_step(settings), settings.log_steps),
        *more,
    ]
    strategy = ShardedStrategy() if settings.strategy == "fsdp" else settings.strategy
    if settings.only_mid_control and settings.devices * settings.num_nodes > 1 and isinstance(strategy, str):
        strategy = "ddp_find_unused_parameters_true"
    steps = steps_of(settings, samples)
    if settings.lr_scheduler != "constant" or settings.lr_warmup_steps:
        model.learning_rate_factor = partial(learning_rate_factor, settings=settings, steps=steps)
    files = AtomicCheckpointIO()
    trainer = pl.Trainer(
        accelerator=choose_device().type,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=lightning_precision(settings.precision),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.max_grad_norm or None,
        val_check_interval=settings.val_steps * settings.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=None if data.held_out is not None else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_steps,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        callbacks=callbacks,
        plugins=[files],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # embeddings made in validation are used in training
        benchmark=True,  # cuDNN's fastest algorithm for crops of one size
        default_root_dir=folder,
    )
    try:
        trainer.fit(model, data, ckpt_path=last if last.is_file() else None, weights_only=False)
    finally:
        files.wait()
    return trainer


def report(trainer: pl.Trainer, settings: Any, what_next: str) -> None:
    """Say where everything is and what to run next."""
    rank_zero_only(print)(summary(Path(settings.output_dir), trainer.global_step, what_next))
