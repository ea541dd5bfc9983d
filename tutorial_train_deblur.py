"""Train a ControlNet that deblurs photographs, on Stable Diffusion 1.5 or 2.1.

    python tutorial_train_deblur.py --demo                      # installation check: minutes, on any computer

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt
    python tool_make_deblur_dataset.py --source_dir PHOTOS --output_dir ./training/deblur --num_samples 10000
    python tutorial_train_deblur.py --data_root ./training/deblur --batch_size 4 --precision bf16

Method: ControlNet (Zhang et al. 2023) with the blurry photograph as hint, plus losses on the decoded image
(see cldm/deblur.py). With SD 1.5 expect pictures that follow the hint after 3 to 7 thousand steps, suddenly
("sudden convergence"); a logical batch of 64 to 128 (accumulate_grad_batches) is better than more steps.
Judge by the grids and val/psnr, not by the training loss. After a stop the same command resumes exactly.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from cldm.cache import cache_latents, drop_encoders
from cldm.deblur import DeblurControlNet, add_attention
from cldm.demo import make_demo_base
from cldm.model import create_filled_model, load_state_dict, read_config
from cldm.training import StreamData, fit, lightning_precision, prepare_model, report
from ldm.checkpoint import write_weights
from ldm.data.paired import BlurDataset, Pair, PairedDataset, find_pairs, split_pairs
from ldm.data.pairs import check_sizes, has_pairs
from ldm.data.stream import item_generator
from ldm.settings import run_main
from ldm.validation import sharp_pairs
from tool_add_control import add_control
from tool_make_deblur_dataset import Settings as MakeSettings
from tool_make_deblur_dataset import make_dataset

# ---- settings: edit here, or override on the command line -------------------------------------------------


@dataclass
class Settings:
    """Train a ControlNet to deblur."""

    demo: bool = False  # tiny networks, scikit-image's photographs, minutes on a CPU: checks the installation
    output_dir: str = "./outputs/deblur"  # checkpoints, pictures and logs; an old run in it is resumed

    data_root: str = "./training/deblur"  # folder of tool_make_deblur_dataset.py, GoPro tree, blurry pictures
    sharp_root: str = ""  # sharp pictures, matched to data_root's by name; empty: data_root holds both
    json_file: str = ""  # json lines, or a list of `blurry sharp` lines, relative to data_root
    image_size: int = 512  # pixels of the square crop, a multiple of 64
    val_fraction: float = 0.05  # part of the source photographs held out for validation, 0 for none
    val_samples: int = 16  # validate on at most that many pairs
    prompt: str = "a sharp, detailed, high-quality photograph"  # {blur_type} in it becomes "motion blur" etc.
    prompt_dropout: float = 0.1  # part of the training prompts that is left empty, so that guidance works
    use_augmentation: bool = False  # random crop, flips, turns and colour jitter, alike for both pictures
    blur_on_the_fly: bool = False  # take only the sharp pictures, and blur them anew every time
    num_workers: int = 4  # processes that read and decode pictures

    resume_path: str = "./models/control_sd15_ini.ckpt"  # Stable Diffusion + ControlNet: tool_add_control.py
    config_path: str = "./models/cldm_v15_deblur.yaml"
    use_attention: bool = False  # channel and spatial attention on the hint features; no other tool reads it
    sd_locked: bool = True  # False trains the UNet's decoder too: then use learning_rate 2e-6
    only_mid_control: bool = False  # steer the UNet's middle block only: faster, weaker
    deblur_loss_weight: float = 1.0  # of the losses on the decoded image; 0 switches them off
    perceptual_loss_weight: float = 0.1  # of the VGG-19 distance among them
    deblur_crop: int = 32  # side of the decoded crop in latents (one is 8 pixels), 0 for the whole image

    batch_size: int = 4  # of each GPU
    accumulate_grad_batches: int = 1  # batches to one optimizer step
    learning_rate: float = 1e-5
    max_epochs: int = 10  # passes over the data
    max_steps: int = -1  # optimizer steps; above 0 it replaces max_epochs
    seed: int = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bits: a quarter of its memory (bitsandbytes, CUDA)
    ema_decay: float = 0.0  # of an average of the trained weights, which is validated and used; 0 for none

    gpus: int = 1  # of each machine (processes on a CPU)
    num_nodes: int = 1  # machines
    strategy: Literal["auto", "ddp"] = "auto"  # several GPUs: DDP
    precision: str = "32"  # 16, bf16 or 32, or Lightning's names
    gradient_checkpointing: bool = False  # less memory, a third more time
    cache_latents: bool = False  # compute latents and text embeddings once; needs crops that stay
    compile: bool = False  # torch.compile: minutes at the start, faster steps

    log_steps: int = 10  # optimizer steps from one row of metrics to the next
    logger_freq: int = 500  # to a grid of training pictures
    save_steps: int = 500  # to a checkpoint
    val_steps: int = 500  # to a validation
    val_ddim_steps: int = 20  # sampling steps of each validation picture


DEMO = {
    "output_dir": "./outputs/deblur_demo",
    "data_root": "./outputs/deblur_demo/data",
    "image_size": 64,
    "val_fraction": 0.2,
    "val_samples": 8,
    "num_workers": 0,
    "resume_path": "./outputs/deblur_demo/control_tiny_ini.safetensors",
    "config_path": str(Path(__file__).parent / "models" / "cldm_tiny_deblur.yaml"),
    "sd_locked": False,
    "perceptual_loss_weight": 0.0,
    "deblur_crop": 2,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "max_steps": 450,
    "ema_decay": 0.98,
    "logger_freq": 150,
    "save_steps": 150,
    "val_steps": 150,
    "val_ddim_steps": 10,
}
DEMO_STEPS = 300, 300  # of teaching the tiny autoencoder, then the tiny UNet


# ---- data ----------------------------------------------------------------------------------------------


class DeblurDataset(Dataset):
    """Crops under the names that a ControlNet's training expects.

    Items: jpg (h, w, 3) sharp in [-1, 1], hint (h, w, 3) blurry in [0, 1], txt the prompt, path, seed.
    """

    def __init__(self, crops: Dataset, prompt: str, prompt_dropout: float = 0.0):
        self.crops, self.prompt, self.prompt_dropout = crops, prompt, prompt_dropout

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        item = self.crops[key]
        dropped = torch.rand((), generator=item_generator(item["seed"] + 5)) < self.prompt_dropout
        return {
            "jpg": item["sharp"].permute(1, 2, 0),
            "txt": "" if dropped else fill_prompt(self.prompt, item["blur_type"]),
            "hint": (item["blurry"].permute(1, 2, 0) + 1) / 2,
            "path": item["path"],
            "seed": item["seed"],
        }


def fill_prompt(prompt: str, blur_type: str) -> str:
    """The prompt of a pair: {blur_type} in it becomes "motion blur" and the like."""
    return prompt.replace("{blur_type}", blur_type.replace("_", " ") or "blur")


def find_crops(settings: Settings) -> tuple[Dataset, Dataset | None, list[Pair]]:
    """Training crops, held-out crops (None without any), and the pairs of the first, then of the second.

    Raises ValueError or FileNotFoundError that names the file, the line or the pair that is wrong.
    """
    root = Path(settings.data_root)
    if not root.exists():
        raise FileNotFoundError(
            f"no data at {root}: make some with `python tool_make_deblur_dataset.py --source_dir PHOTOS "
            f"--output_dir {root}`, or try `python tutorial_train_deblur.py --demo`"
        )
    if settings.blur_on_the_fly and not (settings.json_file or settings.sharp_root or has_pairs(root)):
        pairs = sharp_pairs(root)
    elif settings.json_file:
        pairs = find_pairs(settings.json_file, data_root=root)
    else:
        pairs = find_pairs(root, settings.sharp_root or None)
    check_sizes(pairs)
    held_out = []
    if settings.val_fraction > 0:
        pairs, held_out = split_pairs(pairs, settings.val_fraction, settings.seed)
    few = held_out[:: -(-len(held_out) // settings.val_samples)] if held_out else []

    def crops(pairs: list[Pair], blur: bool, **options) -> Dataset:
        if blur:
            sharp = sorted({pair.sharp for pair in pairs})
            return BlurDataset(sharp, settings.image_size, settings.seed, **options)
        return PairedDataset(pairs, settings.image_size, settings.seed, **options)

    jitter = 0.1 * settings.use_augmentation
    train = crops(pairs, settings.blur_on_the_fly, augment=settings.use_augmentation, color_jitter=jitter)
    train = DeblurDataset(train, settings.prompt, settings.prompt_dropout)
    if not few:
        return train, None, pairs
    validation = crops(few, few[0].blurry == few[0].sharp)
    return train, DeblurDataset(validation, settings.prompt), [*pairs, *few]


def with_cached_latents(
    model: DeblurControlNet, datasets: list[Dataset | None], pairs: list[Pair], settings: Settings
) -> list[Dataset | None]:
    """The data sets with latents from a cache in the run's folder; the model's encoders are let go."""
    files = [(str(pair.sharp), pair.sharp.stat().st_size, pair.sharp.stat().st_mtime_ns) for pair in pairs]
    base = Path(settings.resume_path).stat()
    about = {"files": files, "size": settings.image_size, "model": (base.st_size, base.st_mtime_ns)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cached = []
    for name, dataset in zip(("train", "val"), datasets, strict=True):
        path = Path(settings.output_dir) / "cache" / f"{name}_latents.h5"
        about = {**about, "set": name}
        make = partial(cache_latents, model, dataset, path, about, settings.batch_size, settings.num_workers)
        cached.append(dataset and make(device))
    types = {pair.blur_type for pair in pairs}
    drop_encoders(model, {"", *(fill_prompt(settings.prompt, blur_type) for blur_type in types)})
    return cached


def check_start(settings: Settings) -> None:
    """Find mistakes before anything is loaded.

    Raises ValueError for a number out of range, and FileNotFoundError that says how to get the file that
    training starts from, if it is missing.
    """
    lightning_precision(settings.precision)
    counts = "batch_size accumulate_grad_batches gpus num_nodes val_samples".split()
    intervals = "log_steps logger_freq save_steps val_steps val_ddim_steps".split()
    for name in [*counts, *intervals, *(["max_epochs"] if settings.max_steps <= 0 else [])]:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")
    if settings.val_ddim_steps > 1000:
        raise ValueError(f"val_ddim_steps must be at most 1000, not {settings.val_ddim_steps}")
    if settings.deblur_crop < 0:
        raise ValueError(f"deblur_crop must not be negative, but is {settings.deblur_crop}")
    for name in ("ema_decay", "prompt_dropout"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {getattr(settings, name)}")
    if settings.image_size % 64 or settings.image_size <= 0:
        raise ValueError(f"image_size must be a multiple of 64, not {settings.image_size}")
    if settings.cache_latents and (settings.use_augmentation or settings.blur_on_the_fly):
        raise ValueError("--cache_latents needs crops that stay: switch off augmentation and blur on the fly")
    if not settings.demo and not Path(settings.resume_path).is_file():
        raise FileNotFoundError(
            f"{settings.resume_path} not found: it is Stable Diffusion with a ControlNet added. Get "
            "v1-5-pruned.ckpt (or .safetensors) of Stable Diffusion 1.5, for instance from Hugging Face, put "
            "it into models/, then run `python tool_add_control.py ./models/v1-5-pruned.ckpt "
            f"{settings.resume_path}`. To see everything run without it: "
            "`python tutorial_train_deblur.py --demo`"
        )


def demo_settings(settings: Settings) -> Settings:
    """The demonstration's settings, except where the user gave others; makes its data."""
    print(
        "This demonstration checks the installation: a tiny model learns for a few minutes. It shows every "
        "stage of training and is no restorer; that takes Stable Diffusion's weights and a GPU."
    )
    make_dataset(MakeSettings(output_dir=DEMO["data_root"], num_samples=240, image_size=64))
    torch.set_num_threads(1)  # tiny networks: more threads would only wait for each other
    untouched = [name for name in DEMO if getattr(settings, name) == getattr(Settings(), name)]
    return replace(settings, **{name: DEMO[name] for name in untouched})


def make_demo_start(settings: Settings, config: dict, dataset: Dataset) -> None:
    """Teach the tiny model that stands in for Stable Diffusion, and add a ControlNet to it."""
    start = Path(settings.resume_path)
    base = start.with_name("tiny_diffusion.safetensors")
    make_demo_base(base, config, dataset, *DEMO_STEPS)
    if not start.is_file():
        write_weights(start, add_control(load_state_dict(base), config, base)[0])


def main(settings: Settings) -> None:
    """Train, then say where everything is."""
    # Settings: what can be wrong is found before anything is loaded
    if settings.demo:
        settings = demo_settings(settings)
    check_start(settings)
    config = read_config(settings.config_path)
    with_attention = "WithAttention" if settings.use_attention else ""
    config["target"] = f"cldm.deblur.DeblurControlNet{with_attention}"
    for name in ("deblur_loss_weight", "perceptual_loss_weight", "deblur_crop", "only_mid_control"):
        config["params"][name] = getattr(settings, name)

    # Seed and data
    pl.seed_everything(settings.seed, verbose=False)
    train, validation, pairs = find_crops(settings)
    if settings.demo:
        make_demo_start(settings, config, train)

    # Model
    weights = load_state_dict(settings.resume_path)
    if settings.use_attention:
        weights = add_attention(weights)
    model = create_filled_model(config, weights, settings.resume_path)
    model.validation_ddim_steps = settings.val_ddim_steps
    if settings.deblur_loss_weight and settings.perceptual_loss_weight:
        model.load_perceptual()

    # Latents and embeddings, if they are to be computed once
    if settings.cache_latents:
        train, validation = with_cached_latents(model, [train, validation], pairs, settings)

    # Training, resumed where it stopped
    prepare_model(model, settings)
    trainer = fit(model, StreamData(train, validation, settings), settings, config)

    # Summary
    checkpoint = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    what_next = f"python infer.py deblur --checkpoint_path {checkpoint} --input PHOTOS --output_dir restored"
    report(trainer, settings, what_next)


if __name__ == "__main__":
    run_main(main, Settings)
