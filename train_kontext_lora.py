"""FLUX.1 Kontext [dev] taught to undo your own kind of damage: a LoRA, trained and explained in one file.

Black Forest Labs: FLUX.1 Kontext, 2025; Hu et al.: LoRA, 2021; Lipman et al.: Flow Matching, 2022.

    python train_kontext_lora.py --hr_root my_photos                        # damage is made on the fly
    python train_kontext_lora.py --hr_root clean --lr_root damaged          # real pairs
    python train_kontext_lora.py --tasks tasks.yaml                         # several tasks, by prompt
    python train_kontext_lora.py --demo                                     # minutes on two CPU cores

The same command again resumes a stopped run. The result, pytorch_lora_weights.safetensors, loads in diffusers
(by the name of its folder), ComfyUI and Forge. What the model folder needs, memory and time: docs/kontext.md.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from harness import flags
from harness.run import Run, average_gradients, last_checkpoint, rank_zero_first, start_fabric
from harness.settings import check_counts, check_fractions, check_optimizer, plain, run_main
from ldm.checkpoint import MODELS
from ldm.data.degraded import DegDataset, example_sheet, kinds_sheet
from ldm.data.image import write_image
from ldm.data.stream import item_generator
from ldm.data.tasks import make_data
from ldm.models.diffusion.flow import restore_image, shift_timesteps
from ldm.models.kontext import (
    AUTOENCODER,
    TRANSFORMER,
    FluxAutoencoder,
    load_autoencoder,
    load_flux,
    own_dtype,
)
from ldm.models.kontext_lora import encode, make_demo, peak_memory, preview, save_outputs, validate
from ldm.models.prompts import Prompts, check_folder
from ldm.modules.ema import EMA
from ldm.modules.flux import Flux, predict_velocity
from ldm.modules.lora import load_lora, make_lora, start_from
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import check_package, learning_rate_factor, make_adamw

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train a LoRA of FLUX.1 Kontext on photographs."""

    demo: bool = False  # the small model that comes along, scikit-image's photographs, minutes on a CPU
    pretrained_model_name_or_path: Path = Path("models/FLUX.1-Kontext-dev")  # the model folder

    hr_root: Path = Path("training/photos")  # clean photographs
    lr_root: Path | None = None  # their damaged versions; without it damage is made on the fly
    tasks: Path | None = None  # a yaml of several tasks: folders, prompts, damage (ldm/data/tasks.py)
    output_dir: Path = Path("outputs/kontext_lora")  # an old run in it is resumed
    instance_prompt: str = "restore this degraded photograph"  # used in training and in restoring

    resolution: int = 512  # of the square training pictures, a multiple of 16
    # downsample, noise, blur, jpeg; motion_blur, colour_noise, film_grain, scratches, fading, low_light, haze
    degradation_types: str = "downsample,noise,blur"

    rank: int = 16  # of the LoRA: more learns more and takes more memory
    resume_lora: Path | None = None  # start from this LoRA file

    batch_size: flags.BatchSize = 4  # of each device
    accumulate_grad_batches: flags.Accumulate = 4  # batches to one optimizer step
    max_steps: flags.MaxSteps = 3000  # optimizer steps
    learning_rate: float = 1e-4  # the highest, at the end of the warm-up

    # storage of the frozen network: fp8 halves it, nf4 halves that (bitsandbytes)
    base_precision: Literal["bf16", "fp8", "nf4"] = "bf16"
    blocks_to_swap: int = 0  # the last so many blocks wait in CPU memory: less of the GPU's, slower
    devices: flags.Devices = 1  # GPUs of each machine (processes on a CPU)

    validation_root: Path | None = None  # clean photographs for previews; without it, those of hr_root
    captions: bool = False  # a picture's prompt is NAME.txt beside it, where there is one
    caption_dropout: float = 0.0  # part of the samples whose prompt is empty

    buckets: bool = False  # no squares: sizes near to the pictures' shapes, of as many pixels
    random_crop: bool = True  # without it the middle is cut
    random_flip: bool = True  # left and right
    native_crop: bool = False  # cut at full scale instead of shrinking to `resolution` first
    repeats: int = 1  # how often each picture comes in an epoch
    lr_scale: flags.NumberOrRange = 8  # factor of the downsampling; it and the next may be ranges: LOW,HIGH
    noise_level: flags.NumberOrRange = 0.05  # standard deviation, 1 = white
    blur_radius: flags.NumberOrRange = 1.0  # standard deviation in pixels
    jpeg_quality: flags.NumberOrRange = 75  # 1 to 100
    damage_strength: flags.NumberOrRange = (
        0.2,
        0.8,
    )  # of those from motion_blur on, 0 to 1
    degradation_order: Literal["fixed", "given", "random"] = "fixed"  # given: as in --degradation_types
    degradation_rounds: int = 1  # how often the chain of damage is run through
    examples_only: bool = False  # write images/examples.png (damaged | clean), images/kinds.png, and stop

    alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    dropout: float = 0.0  # part of the LoRA's input that is left out in training
    lora_targets: Literal["attn", "attn_mlp", "all"] = "attn_mlp"  # linears: see ldm/modules/lora.py

    lr_scheduler: flags.LRScheduler = "constant"  # its course after the warm-up
    lr_warmup_steps: int = 0  # steps over which the learning rate rises
    optimizer: flags.AdamW = "adamw"  # 8 bits: a quarter of its memory (bitsandbytes, CUDA)
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 1.0  # highest global norm of the gradients
    ema_decay: float = 0.99  # of the averaged LoRA, which previews use and files hold; 0 for none
    # noise levels trained most
    timestep_sampling: Literal["logit_normal", "uniform", "shifted"] = "logit_normal"
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"  # of the noise levels' losses
    guidance: float = 1.0  # the value the network is told in training
    perceptual_loss: bool = False  # VGG-19 distance of the decoded estimate, at little noise
    perceptual_weight: float = 0.1  # of the VGG-19 distance
    perceptual_every: int = 4  # steps from one to the next
    perceptual_crop: int = 256  # pixels, a multiple of 8
    seed: int = 0  # of the data's order, first weights and noise

    gradient_checkpointing: bool = True  # less memory, a third more time
    compile: bool = False  # torch.compile of the blocks: minutes at the start, faster steps
    shard_base: bool = False  # split the frozen network over the devices (FSDP) instead of copying it
    num_nodes: int = 1  # machines
    num_workers: int = 4  # processes that prepare pictures

    # steps to a preview, a checkpoint and a snapshot of the LoRA
    save_steps: Annotated[int, tyro.conf.arg(aliases=["--save_every"])] = 500
    lora_dtype: Literal["fp32", "bf16"] = "bf16"  # of these files
    preview_images: int = 4  # pictures in a preview
    preview_steps: int = 20  # sampling steps of a preview
    preview_guidance: float = 2.5  # guidance of a preview


DEMO_DIR = Path("outputs/kontext_demo")
DEMO = {
    "output_dir": DEMO_DIR,
    "pretrained_model_name_or_path": MODELS / "small_kontext",
    "hr_root": DEMO_DIR / "photos",
    "validation_root": DEMO_DIR / "held_out",
    "resolution": 128,
    "native_crop": True,
    "repeats": 50,
    "degradation_types": "downsample,noise",
    "lr_scale": 2,
    "noise_level": 0.1,
    "lora_targets": "all",
    "batch_size": 8,
    "accumulate_grad_batches": 1,
    "gradient_checkpointing": False,
    "max_steps": 400,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "num_workers": 0,
    "save_steps": 200,
    "preview_steps": 2,
    "preview_guidance": 1.0,
    "preview_images": 6,
}
SHIPPED = MODELS / "small_kontext_lora.safetensors"
# What may differ when a run is resumed: it changes speed or reports, not the weights (beyond rounding).
MAY_CHANGE = (
    "num_workers compile gradient_checkpointing blocks_to_swap shard_base save_steps lora_dtype "
    "examples_only validation_root preview_images preview_steps preview_guidance"
).split()

# ---- loss --------------------------------------------------------------------------------------------------


def draw_noise(seeds: Iterable[int], shape: tuple, sampling: str) -> tuple[Tensor, Tensor]:
    """Sigma (b,) in [0.001, 1] and noise (b, *shape) of samples, from their own seeds, on the CPU."""
    sigmas, noises = [], []
    for seed in seeds:
        generator = item_generator(int(seed))
        if sampling == "uniform":
            sigma = torch.rand((), generator=generator)
        else:
            sigma = torch.randn((), generator=generator).sigmoid()
        if sampling == "shifted":
            sigma = shift_timesteps(sigma, shape[-2] * shape[-1] // 4)
        sigmas.append(sigma.clamp(min=1e-3))
        noises.append(torch.randn(shape, generator=generator))
    return torch.stack(sigmas), torch.stack(noises)


def loss_weight(sigma: Tensor, weighting: str) -> Tensor:
    """(b,) weights of the noise levels (Esser et al. 2024, section 3.1)."""
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def flow_loss(
    model: Callable, target: Tensor, control: Tensor, prompt: dict, sigma: Tensor, noise: Tensor, s: Settings
) -> tuple[Tensor, Tensor]:
    """Weighted flow-matching loss, averaged per item, and the estimate of the clean latents (b, 16, h, w).

    On the straight line x = (1 - sigma) target + sigma noise the velocity is noise - target.
    """
    level = sigma[:, None, None, None]
    x = (1 - level) * target + level * noise
    velocity = predict_velocity(model, x, control, prompt["t5"], prompt["pooled"], sigma, s.guidance)
    error = (velocity - (noise - target)).square().mean(dim=(1, 2, 3))  # (b,)
    return (loss_weight(sigma, s.weighting) * error).mean(), x - level * velocity


def perceptual_term(
    autoencoder: nn.Module, distance: nn.Module, estimate: Tensor, batch: dict, sigma: Tensor, crop: int
) -> Tensor:
    """(1 - sigma) * VGG distance of a crop of the decoded estimate, of the items with sigma < 0.5 alone."""
    keep = sigma < 0.5
    if not keep.any():
        return estimate.new_zeros(())
    n = min(crop // 8, *estimate.shape[-2:])
    generator = item_generator(int(batch["seed"][0]))
    y, x = (int(torch.randint(size - n + 1, (), generator=generator)) for size in estimate.shape[-2:])
    restored = autoencoder.decode(estimate[keep, :, y : y + n, x : x + n])
    clean = batch["target"][keep, :, 8 * y : 8 * (y + n), 8 * x : 8 * (x + n)]
    return ((1 - sigma[keep]) * distance(restored, clean)).sum() / len(sigma)


# ---- data and previews -------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise ValueError for a value that would fail only later."""
    check_counts(settings, "rank batch_size accumulate_grad_batches max_steps save_steps devices num_nodes")
    check_counts(settings, "perceptual_every preview_images preview_steps")
    check_optimizer(settings.optimizer)
    check_fractions(settings, "ema_decay dropout", whole=False)
    if settings.base_precision == "nf4":
        check_package("bitsandbytes", "--base_precision nf4")
    processes = settings.devices * settings.num_nodes
    if settings.shard_base and (processes < 2 or settings.base_precision != "bf16"):
        raise ValueError("--shard_base needs --devices 2 or more and --base_precision bf16")
    whole = settings.gradient_checkpointing and not (settings.shard_base or settings.compile)
    if settings.blocks_to_swap and not whole:
        need = "--gradient_checkpointing, and neither --shard_base nor --compile"
        raise ValueError(f"--blocks_to_swap needs {need}")
    if settings.perceptual_crop < 16 or settings.perceptual_crop % 8:
        raise ValueError(f"perceptual_crop must be 16, 24, 32, ..., not {settings.perceptual_crop}")


# ---- networks and training step ----------------------------------------------------------------------------


def load_models(folder: Path, settings: Settings, device: torch.device) -> tuple[FluxAutoencoder, Flux]:
    """The frozen autoencoder and transformer."""
    autoencoder = load_autoencoder(folder / AUTOENCODER, device)
    autoencoder.decoder.use_checkpoint = True
    model = load_flux(
        folder / TRANSFORMER,
        "cpu" if settings.shard_base else device,
        own_dtype(device),
        fp8=settings.base_precision == "fp8",
        progress=partial(tqdm, desc="loading the transformer", unit="tensors"),
        blocks_to_swap=settings.blocks_to_swap,
        nf4=settings.base_precision == "nf4",
    )
    model.checkpointing = settings.gradient_checkpointing
    return autoencoder, model


def train_step(
    model: Callable,
    autoencoder: FluxAutoencoder,
    distance: PerceptualLoss | None,
    prompt: dict[str, Tensor],
    batch: dict,
    caches: tuple[dict | None, dict | None],
    settings: Settings,
) -> dict[str, Tensor]:
    """Gradients of one step's pictures, `batch_size` at a time; the mean losses. `prompt` is one for all, or
    has a row for each picture."""
    batch = batch | {name: batch[name].cpu() for name in ("seed", "index")}
    losses = []
    for rows in torch.arange(len(batch["seed"])).split(settings.batch_size):
        part = {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}
        words = {name: value[rows] if len(value) > 1 else value for name, value in prompt.items()}
        share = len(rows) / len(batch["seed"])
        target = encode(autoencoder, part["target"], part["index"], caches[0])
        control = encode(autoencoder, part["control"], part["index"], caches[1])
        drawn = draw_noise(part["seed"], target.shape[1:], settings.timestep_sampling)
        sigma, noise = (values.to(target.device) for values in drawn)
        loss, estimate = flow_loss(model, target, control, words, sigma, noise, settings)
        terms = {"loss": loss}
        if distance is not None:
            crop = settings.perceptual_crop
            terms["perceptual"] = perceptual_term(autoencoder, distance, estimate, part, sigma, crop)
            loss = loss + settings.perceptual_weight * terms["perceptual"]
        (share * loss).backward()
        losses.append({name: share * value.detach() for name, value in terms.items()})
    return {name: sum(terms[name] for terms in losses) for name in losses[0]}


def add_trained_lora(model: Flux, settings: Settings, device: torch.device) -> nn.ModuleDict:
    """A LoRA on the model, new or from --resume_lora; then the model is sharded and compiled if asked for."""
    how = settings.lora_targets, settings.rank, settings.alpha, settings.dropout
    adapter = make_lora(model, *how).to(device)
    if settings.resume_lora and not last_checkpoint(settings.output_dir).is_file():
        start_from(adapter, settings.resume_lora)
    blocks = (*model.double_blocks, *model.single_blocks)
    if settings.shard_base:
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for part in (*blocks, model):  # each process keeps a part of the frozen weights; the LoRA stays whole
            whole = set(adapter.parameters())
            fully_shard(part, mesh=mesh, reshard_after_forward=part is not model, ignored_params=whole)
        model.to(device)
    if settings.compile:
        for block in blocks:
            block.compile()
    return adapter


def update(
    fabric: Fabric, adapter: nn.ModuleDict, optimizer: torch.optim.Optimizer, rate: float, s: Settings
) -> None:
    """One optimizer step. The base is frozen, so that only the LoRA's gradients pass between processes."""
    average_gradients(fabric, optimizer)
    nn.utils.clip_grad_norm_(adapter.parameters(), s.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


# ---- the whole run -----------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    if settings.demo:
        make_demo(settings, DEMO)
    check(settings)

    # Seed and devices
    fabric = start_fabric(settings.devices, settings.num_nodes, seed=settings.seed, on_cuda="bf16")
    (images := settings.output_dir / "images").mkdir(parents=True, exist_ok=True)

    # Data
    dataset, previews, tasks = make_data(settings)
    for task, part in dataset.datasets.items():
        suffix = f"_{task}.png" if task else ".png"
        write_image(images / f"examples{suffix}", example_sheet(part))
        if settings.examples_only:
            write_image(images / f"kinds{suffix}", kinds_sheet(part))
            print(f"{images}: damaged | clean: examples{suffix}; kind by kind: kinds{suffix}")
    if settings.examples_only:
        return

    # The prompts, and the network with everything frozen but the LoRA
    folder = check_folder(settings.pretrained_model_name_or_path, (TRANSFORMER, AUTOENCODER))
    texts = [*dataset.prompts, *(text for part in previews.values() for text in part.prompts)]
    prompts = rank_zero_first(fabric, partial(Prompts, settings.output_dir, folder, texts, fabric.device))
    distance = PerceptualLoss().to(fabric.device) if settings.perceptual_loss else None
    autoencoder, model = load_models(folder, settings, fabric.device)
    adapter = add_trained_lora(model, settings, fabric.device)

    # Optimizer, average, resume
    how = settings.optimizer, settings.learning_rate, settings.weight_decay
    optimizer = make_adamw(adapter.parameters(), *how)
    ema = EMA(adapter, settings.ema_decay)
    parts = {"state_dict": adapter, "optimizer": optimizer, "ema": ema}
    known = {**plain(settings), "samples": len(dataset), "tasks": tasks}
    run = Run(fabric, settings.output_dir, known, parts, MAY_CHANGE)
    count = sum(parameter.numel() for parameter in adapter.parameters())
    run.say(f"{dataset.describe()}\n{count / 1e6:.2f} M LoRA parameters on {len(adapter)} layers")

    # Loop
    steps = settings.max_steps
    batch_size = settings.batch_size * settings.accumulate_grad_batches
    loader = run.loader(dataset, batch_size, steps, settings.seed, settings.num_workers)
    caches = tuple({} if fixed else None for fixed in dataset.fixed)
    start = time.perf_counter()
    for batch in run.batches(loader, steps):
        adapter.train()
        use = distance if run.step % settings.perceptual_every == 0 else None
        prompt = prompts(batch["prompts"])
        metrics = train_step(model, autoencoder, use, prompt, batch, caches, settings)
        rate = settings.learning_rate * learning_rate_factor(run.step, settings, steps)
        update(fabric, adapter, optimizer, rate, settings)
        ema.update(adapter)
        seconds, start = time.perf_counter() - start, time.perf_counter()
        pixels = batch["target"][0, 0].numel()
        tokens = run.samples_per_step * (prompt["t5"].shape[1] + 2 * pixels // 16**2)
        run.advance({**metrics, "tokens/s": tokens / seconds, **peak_memory(fabric.device)}, batch["name"])
        if run.step % settings.save_steps and run.step != steps:
            continue

        # Preview, log and save the averaged LoRA
        report = {f"train/{name}": value for name, value in run.means().items()}
        scores = {}
        with ema.applied(adapter):
            adapter.eval()
            if fabric.is_global_zero or settings.shard_base:
                loss = partial(flow_loss, s=replace(settings, weighting="none"))
                picture, scores = validate(model, autoencoder, prompts, previews, loss, settings)
                run.picture("preview", picture)
                report |= scores
            if fabric.is_global_zero:
                said = {task: part.instance_prompt for task, part in previews.items()}
                save_outputs(adapter, settings, run.step, scores["val/psnr"] > run.best, said)
        run.log(report | {"train/learning_rate": rate})
        run.save(scores.get("val/psnr"))
        start = time.perf_counter()

    if settings.demo and fabric.is_global_zero:
        show_demo(settings, previews[""], run)
    run.finish(
        f"python infer.py kontext --pretrained_model_name_or_path {settings.pretrained_model_name_or_path} "
        f"--lora_path {settings.output_dir} --input PHOTOS --output_dir restored"
    )


# ---- demonstration -----------------------------------------------------------------------------------------


def show_demo(settings: Settings, previews: DegDataset, run: Run) -> None:
    """Restore the held-out pictures with the run's LoRA and with the one that comes along.

    Prints their scores and writes images/demo.png: damaged, restored by the first and the second, clean.
    """
    folder, text = settings.pretrained_model_name_or_path, settings.instance_prompt
    loras = {"these minutes": settings.output_dir / "best", "the one that comes along": SHIPPED}
    pictures = []
    for name, lora in loras.items():
        autoencoder, model = load_models(folder, settings, run.fabric.device)
        load_lora(model, lora)
        prompts = Prompts(settings.output_dir, folder, [text], run.fabric.device)
        restore = partial(restore_image, model, autoencoder)
        picture, scores = preview(restore, prompts, previews, settings)
        run.say(f"  {name}: {', '.join(f'{key} {value:.2f}' for key, value in scores.items())}")
        pictures.append(np.hsplit(picture, 3))
    damaged, ours, clean = pictures[0]
    path = settings.output_dir / "images" / "demo.png"
    write_image(path, np.hstack([damaged, ours, pictures[1][1], clean]))
    run.say(f"  damaged, these two, clean: {path}")


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
