"""FLUX.1 Kontext [dev] fine-tuned to undo your own kind of degradation: a LoRA, explained in one file.

Black Forest Labs: FLUX.1 Kontext, 2025; Hu et al.: LoRA, 2021; Lipman et al.: Flow Matching, 2022.

    python train_kontext_lora.py --hr_root my_photos                        # degraded on the fly
    python train_kontext_lora.py --hr_root clean --lr_root damaged          # real pairs
    python train_kontext_lora.py --demo                                     # minutes on two CPU cores

The same command again resumes a stopped run. The result, pytorch_lora_weights.safetensors, loads in diffusers
(by the name of its folder), ComfyUI and Forge. What the model folder needs, memory and time: docs/kontext.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from harness import flags
from harness.run import Run, average_gradients, last_checkpoint, rank_zero_first, start_fabric
from harness.settings import check_ranges, plain, run_main
from ldm.alignment import measure_movement
from ldm.checkpoint import MODELS
from ldm.data.degraded import DegDataset, example_sheet
from ldm.data.image import photographs, read_image, to_uint8, write_image
from ldm.data.stream import first_samples, item_generator
from ldm.metrics import known_mean, psnr, ssim
from ldm.models import kontext
from ldm.models.diffusion.flow import restore_image
from ldm.models.prompts import Prompts
from ldm.modules.ema import EMA
from ldm.modules.flux import Flux, predict_velocity
from ldm.modules.lora import LORA_FILE, load_lora, make_lora, save_lora, start_from
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import learning_rate_factor, make_adamw

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # slow to import, and not needed to restore an image

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train a LoRA of FLUX.1 Kontext on photographs."""

    demo: bool = False  # fine-tune the included small model on scikit-image's photographs, minutes on a CPU

    # ---- data
    hr_root: Path = Path("training/photos")  # folder of clean photographs
    lr_root: Path | None = None  # folder of their degraded versions; None degrades them on the fly
    instance_prompt: str = "restore this degraded photograph"  # prompt to train and to restore with
    resolution: int = 512  # side of the square training crops in pixels, a multiple of 16
    # any of downsample, noise, blur, jpeg, motion_blur, low_light, film_grain, fading, scratches
    degradation_types: str = "downsample,noise,blur"
    lr_scale: flags.NumberOrRange = 8  # downsampling factor, 1 to 64; LOW,HIGH draws it for each image
    noise_level: flags.NumberOrRange = 0.05  # standard deviation of the noise (1 = white), or LOW,HIGH
    blur_radius: flags.NumberOrRange = 1.0  # standard deviation of the blur in pixels, or LOW,HIGH
    jpeg_quality: flags.NumberOrRange = 75  # quality of JPEG compression, 1 to 100, or LOW,HIGH
    # strength of the degradations without a value of their own, 0 to 1, or LOW,HIGH
    degradation_strength: flags.NumberOrRange = (0.2, 0.8)
    validation_root: Path | None = None  # clean photographs for previews and scores; None takes hr_root
    captions: bool = False  # take an image's prompt from NAME.txt beside it, where there is one
    native_crop: bool = False  # crop at full scale instead of shrinking to the resolution first
    num_workers: int = 4  # number of processes that prepare batches

    # ---- model
    pretrained_model_name_or_path: Path = Path("models/FLUX.1-Kontext-dev")  # folder of the FLUX weights
    rank: flags.Count = 16  # rank of the LoRA, and its alpha; higher learns more and takes more memory
    lora_targets: Literal["attn", "attn_mlp", "all"] = "attn_mlp"  # linear layers that get a LoRA
    resume_lora: Path | None = None  # LoRA file to start from, of the same rank and targets
    base_precision: Literal["bf16", "fp8"] = "bf16"  # storage of the frozen network; fp8 halves its memory
    blocks_to_swap: flags.Whole = 0  # number of blocks offloaded to CPU memory: less GPU memory, slower

    # ---- training
    batch_size: flags.BatchSize = 4  # batch size of each device, limited by its memory
    accumulate_grad_batches: flags.Accumulate = 4  # number of batches per optimizer step
    max_steps: Annotated[flags.MaxSteps, flags.Range(1)] = 3000  # number of optimizer steps to train
    learning_rate: flags.Weight = 1e-4  # peak learning rate, reached after warmup
    lr_scheduler: flags.LRScheduler = "constant"  # learning-rate schedule after the warmup
    lr_warmup_steps: flags.Whole = 0  # number of steps over which the learning rate rises
    ema_decay: flags.Decay = 0.99  # decay of the EMA weights, used for previews and files; 0 turns EMA off
    perceptual_loss: bool = False  # add the VGG-19 distance of the decoded estimate to the loss
    gradient_checkpointing: bool = True  # recompute activations: much less memory, a third more time
    compile: bool = False  # compile the blocks: minutes at the start, then faster steps
    devices: flags.Devices = 1  # number of GPUs of each machine (processes on a CPU)
    seed: int = 0  # random seed of data order, degradation, weight init and noise

    # ---- logging
    output_dir: Path = Path("outputs/kontext_lora")  # folder of the run; an old run in it is resumed
    # number of steps between previews, checkpoints and snapshots of the LoRA
    save_steps: Annotated[flags.Count, tyro.conf.arg(aliases=["--save_every"])] = 500
    preview_steps: flags.Count = 20  # number of sampling steps of a preview
    examples_only: bool = False  # write images/examples.png (degraded | clean) to look at, then stop


DEMO_DIR = Path("outputs/kontext_demo")
DEMO = {
    "output_dir": DEMO_DIR,
    "pretrained_model_name_or_path": MODELS / "small_kontext",
    "hr_root": DEMO_DIR / "photos",
    "validation_root": DEMO_DIR / "held_out",
    "resolution": 128,
    "native_crop": True,
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
}
HELD_OUT = ("chelsea", "coffee")  # photographs that the demo does not train on
INCLUDED_LORA = MODELS / "small_kontext_lora.safetensors"
# Settings that may differ when a run is resumed: they change speed or reports, not weights (up to rounding).
MAY_CHANGE = """num_workers compile gradient_checkpointing blocks_to_swap save_steps examples_only
validation_root preview_steps""".split()
GUIDANCE = 1.0  # guidance scale that the network gets in training
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
PERCEPTUAL_WEIGHT = 0.1
PERCEPTUAL_EVERY = 4  # steps: decoding is expensive
PERCEPTUAL_CROP = 256  # pixels
PREVIEW_IMAGES = 6
PREVIEW_GUIDANCE = 2.5  # the default of infer.py
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the validation loss


def check(settings: Settings) -> None:
    """Raise ValueError or FileNotFoundError for invalid settings that would fail only later."""
    check_ranges(settings)
    if not settings.hr_root.exists():
        raise FileNotFoundError(f"no clean photographs at {settings.hr_root}: give --hr_root (or try --demo)")
    # without checkpointing the backward pass would keep the fetched copies of all blocks
    if settings.blocks_to_swap and not settings.gradient_checkpointing:
        raise ValueError("--blocks_to_swap needs --gradient_checkpointing")
    if settings.blocks_to_swap and settings.compile:
        raise ValueError("--blocks_to_swap does not work with --compile")


# ---- loss --------------------------------------------------------------------------------------------------


def draw_noise(seeds: Iterable[int], shape: tuple) -> tuple[Tensor, Tensor]:
    """Sample sigma (b,) in [0.001, 1] and noise (b, *shape) from the samples' own seeds, on the CPU.

    Sigma is logit-normal: most training goes to the middle noise levels (Esser et al. 2024, section 3.1).
    """
    sigmas, noises = [], []
    for seed in seeds:
        generator = item_generator(int(seed))
        sigmas.append(torch.randn((), generator=generator).sigmoid().clamp(min=1e-3))
        noises.append(torch.randn(shape, generator=generator))
    return torch.stack(sigmas), torch.stack(noises)


def flow_loss(
    model: Callable, target: Tensor, control: Tensor, prompt: dict, sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the flow-matching loss, and the estimate of the clean latents (b, 16, h, w).

    On the straight line x = (1 - sigma) target + sigma noise the velocity is noise - target.
    """
    level = sigma[:, None, None, None]
    x = (1 - level) * target + level * noise
    velocity = predict_velocity(model, x, control, prompt["t5"], prompt["pooled"], sigma, GUIDANCE)
    error = (velocity - (noise - target)).square().mean(dim=(1, 2, 3))  # (b,)
    return error.mean(), x - level * velocity


def perceptual_term(
    autoencoder: nn.Module, distance: nn.Module, estimate: Tensor, batch: dict, sigma: Tensor
) -> Tensor:
    """Compute the VGG-19 distance of a crop of the decoded estimate, weighted by 1 - sigma.

    Only samples with sigma < 0.5 count: at more noise the estimate is too blurred to compare details.
    """
    keep = sigma < 0.5
    if not keep.any():
        return estimate.new_zeros(())
    height, width = estimate.shape[-2:]
    side = min(PERCEPTUAL_CROP // 8, height, width)
    generator = item_generator(int(batch["seed"][0]))
    y = int(torch.randint(height - side + 1, (), generator=generator))
    x = int(torch.randint(width - side + 1, (), generator=generator))
    restored = autoencoder.decode(estimate[keep, :, y : y + side, x : x + side])
    clean = batch["target"][keep, :, 8 * y : 8 * (y + side), 8 * x : 8 * (x + side)]
    return ((1 - sigma[keep]) * distance(restored, clean)).sum() / len(sigma)


# ---- networks and training step ----------------------------------------------------------------------------


def load_models(settings: Settings, device: torch.device) -> tuple[kontext.FluxAutoencoder, Flux]:
    """Load the frozen autoencoder and transformer."""
    folder = settings.pretrained_model_name_or_path
    autoencoder = kontext.load_autoencoder(kontext.find_network(folder, kontext.AUTOENCODER), device)
    autoencoder.decoder.use_checkpoint = True
    model = kontext.load_flux(
        kontext.find_network(folder, kontext.TRANSFORMER),
        device,
        kontext.own_dtype(device),
        fp8=settings.base_precision == "fp8",
        progress=partial(tqdm, desc="loading the transformer", unit="tensors"),
        blocks_to_swap=settings.blocks_to_swap,
    )
    model.checkpointing = settings.gradient_checkpointing
    return autoencoder, model


def add_trained_lora(model: Flux, settings: Settings, device: torch.device) -> nn.ModuleDict:
    """Add a LoRA to the model, new or from --resume_lora, and compile the model's blocks on request."""
    adapter = make_lora(model, settings.lora_targets, settings.rank, alpha=settings.rank).to(device)
    if settings.resume_lora and not last_checkpoint(settings.output_dir).is_file():
        start_from(adapter, settings.resume_lora)
    if settings.compile:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile()
    return adapter


def train_step(
    model: Callable,
    autoencoder: kontext.FluxAutoencoder,
    distance: PerceptualLoss | None,
    prompt: dict[str, Tensor],
    batch: dict,
    batch_size: int,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one optimizer step, `batch_size` samples at a time; return the mean losses.

    `prompt` has one row for all samples, or a row for each.
    """
    seeds = batch["seed"].cpu()
    means: dict[str, Tensor] = {}
    for rows in torch.arange(len(seeds)).split(batch_size):
        share = len(rows) / len(seeds)
        part = {"seed": seeds[rows], "target": batch["target"][rows], "control": batch["control"][rows]}
        words = {name: value[rows] if len(value) > 1 else value for name, value in prompt.items()}

        # Latents of both images, noise from each sample's own seed
        with torch.no_grad():
            target = autoencoder.encode(part["target"])  # (b, 16, h / 8, w / 8)
            control = autoencoder.encode(part["control"])
        sigma, noise = draw_noise(part["seed"], target.shape[1:])
        sigma, noise = sigma.to(target.device), noise.to(target.device)

        # Losses and gradients
        loss, estimate = flow_loss(model, target, control, words, sigma, noise)
        terms = {"loss": loss}
        if distance is not None:
            terms["perceptual"] = perceptual_term(autoencoder, distance, estimate, part, sigma)
            loss = loss + PERCEPTUAL_WEIGHT * terms["perceptual"]
        (share * loss).backward()
        for name, value in terms.items():
            means[name] = means.get(name, 0) + share * value.detach()
    return means


def update(fabric: "Fabric", adapter: nn.ModuleDict, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take one optimizer step. The base is frozen: processes exchange only the LoRA's gradients."""
    average_gradients(fabric, optimizer)
    nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


# ---- validation and files ----------------------------------------------------------------------------------


def validate(
    run: Run,
    model: Callable,
    autoencoder: kontext.FluxAutoencoder,
    prompts: Prompts,
    previews: DegDataset,
    settings: Settings,
) -> dict[str, float]:
    """Restore and log the first images of `previews` on rank 0; return their scores ({} on other ranks)."""
    if not run.fabric.is_global_zero:
        return {}
    image, scores = preview(model, autoencoder, prompts, previews, settings)
    scores |= validation_loss(model, autoencoder, prompts, previews)
    run.log_image("preview", image)
    return {f"val/{name}": value for name, value in scores.items()}


def preview(
    model: Callable,
    autoencoder: kontext.FluxAutoencoder,
    prompts: Prompts,
    dataset: DegDataset,
    settings: Settings,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return rows of degraded, restored and clean images, and the mean scores of the restored ones."""
    rows, scores = [], []
    for item in first_samples(dataset, PREVIEW_IMAGES):
        control, target = to_uint8(item["control"]), to_uint8(item["target"])
        restored = restore_image(
            model,
            autoencoder,
            prompts([item["prompts"]]),
            control,
            steps=settings.preview_steps,
            guidance=PREVIEW_GUIDANCE,
            resolution=settings.resolution,
        )
        rows.append(np.hstack([control, restored, target]))
        moved = measure_movement(restored, target)
        scores.append(
            {
                "psnr": psnr(restored, target),
                "psnr_input": psnr(control, target),
                "ssim": ssim(restored, target),
                "shift_px": moved.shift,
                "scale_percent": moved.scale,
            }
        )
    return np.vstack(rows), {name: known_mean(row[name] for row in scores) for name in scores[0]}


@torch.no_grad()
def validation_loss(
    model: Callable, autoencoder: kontext.FluxAutoencoder, prompts: Prompts, dataset: DegDataset
) -> dict[str, float]:
    """Return the loss of the preview's images at fixed noise and noise levels, and its mean over the levels.

    Unlike the training loss, which has new noise at every step, it can be compared between saves.
    """
    losses = {f"loss_{sigma}": [] for sigma in SIGMAS}
    for item in first_samples(dataset, PREVIEW_IMAGES):
        prompt = prompts([item["prompts"]])
        device = prompt["t5"].device
        target = autoencoder.encode(item["target"][None].to(device))
        control = autoencoder.encode(item["control"][None].to(device))
        noise = torch.randn(target.shape, generator=item_generator(item["seed"])).to(device)
        for sigma in SIGMAS:
            level = torch.tensor([sigma], device=device)
            loss, _ = flow_loss(model, target, control, prompt, level, noise)
            losses[f"loss_{sigma}"].append(loss.item())
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return means | {"loss": sum(means.values()) / len(means)}


def save_outputs(adapter: nn.ModuleDict, settings: Settings, step: int, is_best: bool) -> None:
    """Write the LoRA (its EMA weights): the latest, a snapshot, and best/ if its preview PSNR `is_best`.

    Only the latest LoRA lies at the top of the folder, where diffusers looks for it.
    """
    metadata = {
        "base": "FLUX.1-Kontext-dev",
        "prompt": settings.instance_prompt,
        "steps": step,
        "rank": settings.rank,
        "alpha": settings.rank,
        "lora_targets": settings.lora_targets,
        "resolution": settings.resolution,
    }
    names = [f"snapshots/lora_{step:07d}.safetensors", LORA_FILE]
    if is_best:
        names.append(f"best/{LORA_FILE}")
    for name in names:
        path = settings.output_dir / name
        path.parent.mkdir(exist_ok=True)
        save_lora(path, adapter, metadata)


# ---- the whole run -----------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    # Checks, seed and devices
    if settings.demo:
        make_demo(settings)
    check(settings)
    fabric = start_fabric(settings.devices, seed=settings.seed, on_cuda="bf16")

    # Data, and examples to look at: the degradation should look like that of your own photographs
    dataset, previews = load_data(settings)
    write_examples(dataset, settings)
    if settings.examples_only:
        return

    # Prompts first, while no transformer takes memory; then the networks, all frozen but the LoRA
    folder = kontext.check_networks(settings.pretrained_model_name_or_path)
    texts = [*dataset.prompts, *previews.prompts]
    prompts = rank_zero_first(fabric, partial(Prompts, settings.output_dir, folder, texts, fabric.device))
    distance = PerceptualLoss().to(fabric.device) if settings.perceptual_loss else None
    autoencoder, model = load_models(settings, fabric.device)
    adapter = add_trained_lora(model, settings, fabric.device)

    # Optimizer, EMA, resume
    optimizer = make_adamw(adapter.parameters(), "adamw", settings.learning_rate, WEIGHT_DECAY)
    ema = EMA(adapter, settings.ema_decay)
    parts = {"state_dict": adapter, "optimizer": optimizer, "ema": ema}
    about = {**plain(settings), "samples": len(dataset)}
    run = Run(fabric, settings.output_dir, about, parts, MAY_CHANGE)
    count = sum(parameter.numel() for parameter in adapter.parameters())
    run.say(f"{dataset.describe()}\n{count / 1e6:.2f} M LoRA parameters on {len(adapter)} layers")

    # Loop
    steps = settings.max_steps
    batch_size = settings.batch_size * settings.accumulate_grad_batches
    loader = run.loader(dataset, batch_size, steps, settings.seed, settings.num_workers)
    for batch in run.batches(loader, steps):
        adapter.train()
        prompt = prompts(batch["prompts"])
        perceptual = distance if run.step % PERCEPTUAL_EVERY == 0 else None
        metrics = train_step(model, autoencoder, perceptual, prompt, batch, settings.batch_size)
        factor = learning_rate_factor(run.step, steps, settings.lr_scheduler, settings.lr_warmup_steps)
        rate = settings.learning_rate * factor
        update(fabric, adapter, optimizer, rate)
        ema.update(adapter)
        if fabric.device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(fabric.device) / 2**30
        run.advance(metrics, batch["name"])

        # Preview, files and checkpoint: of the EMA weights
        if run.step % settings.save_steps == 0 or run.step == steps:
            report = {f"train/{name}": value for name, value in run.means().items()}
            with ema.applied(adapter):
                adapter.eval()
                scores = validate(run, model, autoencoder, prompts, previews, settings)
                if fabric.is_global_zero:
                    save_outputs(adapter, settings, run.step, scores["val/psnr"] > run.best)
            run.log(report | scores | {"train/learning_rate": rate})
            run.save(scores.get("val/psnr"))

    if settings.demo and fabric.is_global_zero:
        show_demo(settings, previews, run)
    run.finish(
        f"python infer.py kontext --pretrained_model_name_or_path {settings.pretrained_model_name_or_path} "
        f"--lora_path {settings.output_dir} --input PHOTOS --output_dir restored"
    )


def load_data(settings: Settings) -> tuple[DegDataset, DegDataset]:
    """Return the training set, and the preview set, whose crops are fixed and not flipped."""
    names = "instance_prompt lr_scale noise_level blur_radius jpeg_quality degradation_strength".split()
    names += "resolution native_crop captions seed".split()
    options = {name: getattr(settings, name) for name in names}
    kinds = [kind.strip() for kind in settings.degradation_types.split(",") if kind.strip()]
    options |= {"degradation_types": kinds, "lr_data_root": settings.lr_root}
    train = DegDataset(settings.hr_root, **options)
    if settings.captions and not train.captioned:
        raise ValueError(f"no image in {settings.hr_root} has a caption (NAME.txt beside NAME.png)")
    options |= {"random_crop": False, "random_flip": False}
    if settings.validation_root:
        options["lr_data_root"] = None
    return train, DegDataset(settings.validation_root or settings.hr_root, **options)


def write_examples(dataset: DegDataset, settings: Settings) -> None:
    """Write degraded and clean samples of the data to images/examples.png."""
    path = settings.output_dir / "images" / "examples.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, example_sheet(dataset))
    if settings.examples_only:
        print(f"{path}: degraded | clean")


# ---- demonstration -----------------------------------------------------------------------------------------


def make_demo(settings: Settings) -> None:
    """Write scikit-image's photographs at half size: four to train on, and three squares each of two others.

    Folders that the user gave instead are not touched.
    """
    side = settings.resolution
    for path in photographs():
        folder = DEMO["validation_root"] if path.stem in HELD_OUT else DEMO["hr_root"]
        if folder not in (settings.hr_root, settings.validation_root):
            continue
        image = cv2.resize(read_image(path), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        parts = [image]
        if path.stem in HELD_OUT:
            height, width = image.shape[:2]
            rows = image[(height - side) // 2 :][:side]
            parts = [rows[:, x : x + side] for x in (0, (width - side) // 2, width - side)]
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts):
            write_image(folder / f"{path.stem}_{number}.png", part)


def show_demo(settings: Settings, dataset: DegDataset, run: Run) -> None:
    """Restore the held-out images with the run's LoRA and with the included one.

    Prints their scores and writes images/demo.png: degraded, restored by either LoRA, clean.
    """
    folder, device = settings.pretrained_model_name_or_path, run.fabric.device
    prompts = Prompts(settings.output_dir, folder, [settings.instance_prompt], device)
    loras = {"this run's LoRA": settings.output_dir / "best", "the included LoRA": INCLUDED_LORA}
    columns = []
    for name, lora in loras.items():
        autoencoder, model = load_models(settings, device)
        load_lora(model, lora)
        image, scores = preview(model, autoencoder, prompts, dataset, settings)
        run.say(f"  {name}: {', '.join(f'{key} {value:.2f}' for key, value in scores.items())}")
        columns.append(np.hsplit(image, 3))
    degraded, restored, clean = columns[0]
    path = settings.output_dir / "images" / "demo.png"
    write_image(path, np.hstack([degraded, restored, columns[1][1], clean]))
    run.say(f"  degraded, restored by each, clean: {path}")


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
