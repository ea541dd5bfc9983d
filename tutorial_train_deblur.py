"""Train a ControlNet that deblurs photographs, on Stable Diffusion 1.5 or 2.1.

    python tutorial_train_deblur.py --demo                      # installation check: minutes, on any computer

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt
    python tool_make_deblur_dataset.py --source_dir PHOTOS --output_dir ./training/deblur --num_samples 10000
    python tutorial_train_deblur.py --data_root ./training/deblur --batch_size 4

Method: ControlNet (Zhang et al. 2023) with the blurry photograph as hint, plus losses on the decoded image
(see cldm/deblur.py). With SD 1.5 expect pictures that follow the hint after 3 to 7 thousand steps, suddenly
("sudden convergence"); a logical batch of 64 to 128 (accumulate_grad_batches) is better than more steps.
Judge by the grids and val/psnr, not by the training loss. After a stop the same command resumes exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cldm.cache import with_cached_latents
from cldm.deblur import add_attention, add_hint_latent
from cldm.demo import MODELS, make_demo_start, pixels, show_demo
from cldm.model import create_filled_model, load_state_dict, read_config
from cldm.restore import Sampling, deblur_image
from cldm.training import StreamData, begin, fit, prepare_model, report
from harness import flags
from harness.settings import check_counts, run_main
from ldm.data.captions import check_captions, read_caption
from ldm.data.paired import BlurDataset, PairedDataset
from ldm.data.pairs import Pair, check_sizes, find_pairs, has_pairs, sharp_pairs, split_pairs
from ldm.data.stream import item_generator
from ldm.metrics import psnr, ssim
from tool_make_deblur_dataset import Settings as MakeSettings
from tool_make_deblur_dataset import make_dataset

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train a ControlNet to deblur."""

    demo: bool = False  # tiny networks, scikit-image's photographs, minutes on a CPU: checks the installation
    output_dir: str = "./outputs/deblur"  # checkpoints, pictures and logs; an old run in it is resumed

    data_root: str = "./training/deblur"  # folder of tool_make_deblur_dataset.py, GoPro tree, blurry pictures
    sharp_root: str = ""  # sharp pictures, matched to data_root's by name; empty: data_root holds both
    json_file: str = ""  # json lines, or a list of `blurry sharp` lines, relative to data_root
    image_size: flags.ImageSize = 512  # pixels of the square crop, a multiple of 64
    # of pairs without a caption in their json line or in NAME.txt; {blur_type} becomes "motion blur" etc.
    prompt: str = "a sharp, detailed, high-quality photograph"

    resume_path: flags.StartPath = "./models/control_sd15_ini.ckpt"  # Stable Diffusion by tool_add_control.py
    config_path: str = "./models/cldm_v15_deblur.yaml"  # yaml of the model

    batch_size: flags.BatchSize = 4  # of each device
    learning_rate: float = 1e-5  # the highest, at the end of the warm-up
    max_epochs: flags.MaxEpochs = 10  # passes over the data
    max_steps: flags.MaxSteps = -1  # optimizer steps; above 0 it replaces max_epochs

    precision: flags.AnyPrecision = "auto"  # bf16 where CUDA has it, else 16, on a CPU 32; frozen parts too
    cache_latents: bool = False  # compute latents and text embeddings once; needs crops that stay
    devices: flags.Devices = 1  # GPUs of each machine (processes on a CPU)

    val_fraction: float = 0.05  # part of the source photographs held out for validation, 0 for none
    val_samples: int = 16  # validate on at most that many pairs
    prompt_dropout: float = 0.1  # part of the training prompts that is left empty, so that guidance works
    use_augmentation: bool = False  # random crop, flips, turns and colour jitter, alike for both pictures
    blur_on_the_fly: bool = False  # take only the sharp pictures, and blur them anew every time
    num_workers: int = 4  # processes that read and decode pictures

    use_attention: bool = False  # channel and spatial attention on the hint features; no other tool reads it
    hint_as_latent: bool = False  # the ControlNet also sees the hint's latent; no other tool reads that
    sd_locked: bool = True  # False trains the UNet's decoder too: then use learning_rate 2e-6
    only_mid_control: bool = False  # steer the UNet's middle block only: faster, weaker
    deblur_loss_weight: float = 1.0  # of the losses on the decoded image; 0 switches them off
    perceptual_loss_weight: float = 0.1  # of the VGG-19 distance among them
    deblur_every: int = 1  # steps from one with these losses, that many times as heavy, to the next
    weight_by_alpha_bar: bool = True  # each item's count less the noisier its latent
    deblur_crop: int = 32  # side of the decoded crop in latents (one is 8 pixels), 0 for the whole image

    accumulate_grad_batches: flags.Accumulate = 1  # batches to one optimizer step
    lr_scheduler: flags.LRScheduler = "constant"  # its course after the warm-up
    lr_warmup_steps: int = 0  # steps over which the learning rate rises
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 0.0  # highest global norm of the gradients, 0 for no limit
    seed: int = 0  # of the data's order, first weights and noise
    optimizer: flags.AdamW = "adamw"  # 8 bits: a quarter of its memory (bitsandbytes, CUDA)
    ema_decay: float = 0.0  # of an average of the trained weights, which is validated and used; 0 for none

    num_nodes: int = 1  # machines
    strategy: flags.Strategy = "auto"  # several devices: ddp copies the model to each, fsdp splits it
    gradient_checkpointing: bool = False  # less memory, a third more time
    compile: bool = False  # torch.compile: minutes at the start, faster steps

    log_steps: int = 10  # optimizer steps from one row of metrics to the next
    logger_freq: int = 500  # to a grid of training pictures
    save_steps: int = 500  # to a checkpoint
    val_steps: int = 500  # to a validation
    val_ddim_steps: int = 20  # sampling steps of each validation picture
    val_strength: float = 1.0  # below 1 they start from the blurry picture, noised by so much


DEMO = {
    "output_dir": "./outputs/deblur_demo",
    "data_root": "./outputs/deblur_demo/data",
    "image_size": 128,
    "val_fraction": 0.34,
    "val_samples": 12,
    "num_workers": 1,
    "resume_path": "./outputs/deblur_demo/control_small_ini.safetensors",
    "config_path": str(MODELS / "small_diffusion.yaml"),
    "hint_as_latent": True,
    "sd_locked": False,
    "deblur_loss_weight": 0.0,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_steps": 500,
    "ema_decay": 0.98,
    "cache_latents": True,
    "logger_freq": 250,
    "save_steps": 250,
    "val_steps": 250,
    "val_ddim_steps": 2,
}
DEMO_DATA = MakeSettings(
    output_dir=DEMO["data_root"], num_samples=720, image_size=128, sharpest_of=2, blur_scale=0.6
)
SHIPPED = MODELS / "small_deblur.safetensors"
LOSSES = "deblur_loss_weight perceptual_loss_weight deblur_every deblur_crop weight_by_alpha_bar".split()


# ---- data --------------------------------------------------------------------------------------------------


class DeblurDataset(Dataset):
    """Crops under the names that a ControlNet's training expects.

    Items: jpg (h, w, 3) sharp in [-1, 1], hint (h, w, 3) blurry in [0, 1], txt the prompt, path, seed.
    `prompts` has those of pictures with a caption, by their path; the others have `prompt`.
    """

    def __init__(self, crops: Dataset, prompt: str, prompt_dropout: float, prompts: Mapping[str, str]):
        self.crops, self.prompt, self.prompt_dropout, self.prompts = crops, prompt, prompt_dropout, prompts

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        item = self.crops[key]
        (drawn,) = torch.rand(1, generator=item_generator(item["seed"] + 5)).tolist()
        return {
            "jpg": item["sharp"].permute(1, 2, 0),
            "txt": "" if drawn < self.prompt_dropout else self.prompt_of(item["path"], item["blur_type"]),
            "hint": (item["blurry"].permute(1, 2, 0) + 1) / 2,
            "path": item["path"],
            "seed": item["seed"],
        }

    def prompt_of(self, path: str | Path, blur_type: str) -> str:
        """The prompt of a pair: {blur_type} in it becomes "motion blur" and the like."""
        prompt = self.prompts.get(str(path), self.prompt)
        return prompt.replace("{blur_type}", blur_type.replace("_", " ") or "blur")


def find_captions(pairs: list[Pair]) -> dict[str, str]:
    """Captions of pairs that have one, by the path of the blurry picture."""
    check_captions([path for pair in pairs for path in (pair.sharp, pair.blurry)])
    captions = {str(pair.blurry): pair.caption or read_caption(pair.sharp, pair.blurry) for pair in pairs}
    return {path: caption for path, caption in captions.items() if caption}


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
    captions = find_captions([*pairs, *few])
    if settings.blur_on_the_fly:
        captions |= {str(p.sharp): captions[str(p.blurry)] for p in pairs if str(p.blurry) in captions}
    train = DeblurDataset(train, settings.prompt, settings.prompt_dropout, captions)
    if not few:
        return train, None, pairs
    validation = crops(few, few[0].blurry == few[0].sharp)
    return train, DeblurDataset(validation, settings.prompt, 0.0, captions), [*pairs, *few]


# ---- demonstration -----------------------------------------------------------------------------------------


def score_item(item: dict, restored: np.ndarray) -> dict[str, float]:
    blurry, sharp = pixels(item["hint"], "hint"), pixels(item["jpg"])
    psnrs = {"PSNR": psnr(restored, sharp), "PSNR of the blurry": psnr(blurry, sharp)}
    return psnrs | {"SSIM": ssim(restored, sharp), "SSIM of the blurry": ssim(blurry, sharp)}


def check(settings: Settings) -> None:
    """Raise ValueError for what cldm.training.check_start does not look at."""
    check_counts(settings, "val_samples deblur_every")
    check_counts(settings, "deblur_crop", least=0)
    if not 0 < settings.val_strength <= 1:
        raise ValueError(f"val_strength must lie in (0, 1], not {settings.val_strength}")
    if settings.cache_latents and settings.blur_on_the_fly:
        raise ValueError("--cache_latents needs crops that stay: --no_blur_on_the_fly")


def main(settings: Settings) -> None:
    """Train, then say where everything is."""
    # Settings and seed: what can be wrong is found before anything is loaded
    settings = begin(settings)
    check(settings)
    config = read_config(settings.config_path)
    with_attention = "WithAttention" if settings.use_attention else ""
    config["target"] = f"cldm.deblur.DeblurControlNet{with_attention}"
    for name in ("only_mid_control", *LOSSES):
        config["params"][name] = getattr(settings, name)

    # Data
    if settings.demo and settings.data_root == DEMO["data_root"]:
        make_dataset(DEMO_DATA)
    train, validation, pairs = find_crops(settings)
    if settings.demo:
        make_demo_start(settings.resume_path, config)

    # Model
    weights = load_state_dict(settings.resume_path)
    if settings.use_attention:
        weights = add_attention(weights)
    if settings.hint_as_latent:
        config, weights = add_hint_latent(config, weights)
    model = create_filled_model(config, weights, settings.resume_path)
    del weights  # up to 6 GB, mapped from the file
    model.validation_ddim_steps, model.validation_strength = settings.val_ddim_steps, settings.val_strength
    if settings.deblur_loss_weight and settings.perceptual_loss_weight:
        model.load_perceptual()

    # Latents and embeddings, if they are to be computed once
    if settings.cache_latents:
        prompts = {"", *(train.prompt_of(pair.blurry, pair.blur_type) for pair in pairs)}
        files = [pair.sharp for pair in pairs]
        train, validation = with_cached_latents(model, [train, validation], files, prompts, settings)

    # Training, resumed where it stopped
    prepare_model(model, settings)
    trainer = fit(model, StreamData(train, validation, settings), settings, config)

    # Summary
    checkpoint = Path(settings.output_dir) / "checkpoints" / "last.ckpt"
    what_next = f"python infer.py deblur --checkpoint_path {checkpoint} --input PHOTOS --output_dir restored"
    report(trainer, settings, what_next)
    if settings.demo and validation is not None:
        sampling = Sampling(settings.prompt, steps=settings.val_ddim_steps, strength=settings.val_strength)
        sampling.self_ensemble = True  # after minutes single samples have grain
        print("Restored as by infer.py deblur --self_ensemble: the mean over 8 flips and turns")

        def restore(model: torch.nn.Module, item: dict) -> np.ndarray:
            return deblur_image(model, pixels(item["hint"], "hint"), sampling)

        show_demo(SHIPPED, validation, Path(settings.output_dir), restore, score_item)


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
