"""Train a ControlNet that deblurs photographs, on Stable Diffusion 1.5 or 2.1.

    python tutorial_train_deblur.py --demo                      # installation check: minutes, on any computer

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt
    python tool_make_deblur_dataset.py --source_dir PHOTOS --output_dir ./training/deblur --num_samples 10000
    python tutorial_train_deblur.py --data_root ./training/deblur --batch_size 4

Method: ControlNet (Zhang et al. 2023) with the blurry photograph as hint, plus losses on the decoded image
(see cldm/deblur.py). With SD 1.5 the output starts to follow the hint abruptly after 3,000 to 7,000 steps
("sudden convergence"). A batch of 64 to 128 images for each step helps more than more steps: add
--accumulate_grad_batches 16 to the command (16 x 4 = 64) and raise --max_epochs: epochs have fewer steps.
Judge by the image grids and val/psnr, not by the training loss. The same command again resumes a stopped run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Dataset

from cldm.cache import with_cached_latents
from cldm.deblur import add_attention
from cldm.demo import MODELS, announce_demo, make_demo_start, pixels, show_demo
from cldm.model import add_hint_latent, create_filled_model, load_state_dict, read_config
from cldm.restore import Sampling, deblur_image
from cldm.training import (
    StreamData,
    begin,
    check_image_size,
    check_start_file,
    count_steps,
    fit,
    make_trainer,
    prepare_model,
    rate_schedule,
)
from harness import flags
from harness.flags import Count, Decay, Range, Weight, Whole
from harness.logs import summary
from harness.run import last_checkpoint, launched_nodes
from harness.settings import check_optimizer, check_ranges, plain, run_main
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

    # ---- data
    data_root: str = "./training/deblur"  # pairs (tool_make_deblur_dataset.py, GoPro), or blurry images
    sharp_root: str = ""  # folder of sharp images, matched by file name; empty: data_root has both kinds
    json_file: str = ""  # list of pairs: json lines or `blurry sharp` lines, paths relative to data_root
    image_size: flags.ImageSize = 512  # side of the square crops in pixels, a multiple of 64
    # prompt of pairs without a caption (json line, NAME.txt); {blur_type} in it becomes "motion blur" etc.
    prompt: str = "a sharp, detailed, high-quality photograph"
    use_augmentation: bool = False  # random crop, flips, rotations and colour jitter, alike for both images
    blur_on_the_fly: bool = False  # use only the sharp images, with new random blur in every epoch
    # fraction of the source photos held out for validation; 0 for none
    val_fraction: Annotated[float, Range(0, 1, include_most=False)] = 0.05
    val_samples: Count = 16  # largest number of held-out pairs to validate on
    num_workers: Whole = 4  # number of processes that read and decode images

    # ---- model

    # checkpoint to start from, made by tool_add_control.py; an existing run in output_dir is resumed instead
    resume_path: flags.StartPath = "./models/control_sd15_ini.ckpt"
    config_path: str = "./models/cldm_v15.yaml"  # yaml of the model, of the same family as resume_path
    sd_locked: bool = True  # freeze the UNet's decoder; off: train it too, with learning_rate 2e-6
    use_attention: bool = False  # add attention to the hint features (CBAM); other tools ignore it
    hint_as_latent: bool = False  # also give the ControlNet the hint's VAE latent; other tools cannot use it
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time

    # ---- training
    batch_size: flags.BatchSize = 4  # number of images in a batch of each device
    learning_rate: Weight = 1e-5  # peak learning rate of the trained weights
    max_epochs: flags.MaxEpochs = 10  # number of epochs, if max_steps is not above 0
    max_steps: flags.MaxSteps = -1  # number of optimizer steps; above 0 it replaces max_epochs
    accumulate_grad_batches: flags.Accumulate = 1  # number of batches in one optimizer step
    precision: flags.AnyPrecision = "auto"  # auto: bf16 or 16 on GPUs, 32 on CPUs; frozen weights use it too
    cache_latents: bool = False  # compute latents and text embeddings once; crops must not change
    deblur_loss_weight: Weight = 1.0  # weight of the losses on the decoded image, 0 to switch them off
    perceptual_loss_weight: Weight = 0.1  # weight of the VGG-19 distance among the losses on the image
    deblur_every: Count = 1  # apply the losses of the decoded image every N-th step, N times as strong
    lr_scheduler: flags.LRScheduler = "constant"  # schedule; linear and cosine warm up and fall to zero
    max_grad_norm: Weight = 0.0  # largest global norm of the gradients, 0 for no clipping
    optimizer: flags.AdamW = "adamw"  # adamw8bit takes a quarter of the state's memory (bitsandbytes, CUDA)
    ema_decay: Decay = 0.0  # EMA decay; EMA weights are used for validation and export, 0 for none
    seed: int = 0  # random seed of data order, fresh weights and noise
    devices: flags.Devices = 1  # number of GPUs in each machine (processes on a CPU)
    compile: bool = False  # use torch.compile: minutes at the start, then faster steps

    # ---- logging
    output_dir: str = "./outputs/deblur"  # folder of checkpoints, images and logs; a run in it is resumed
    log_steps: Count = 10  # number of optimizer steps between rows of metrics
    save_steps: Count = 500  # number of optimizer steps between checkpoints
    val_steps: Count = 500  # number of optimizer steps between validations, each with image grids
    val_ddim_steps: Annotated[int, Range(1, 1000)] = 20  # number of sampling steps of a validation image
    demo: bool = False  # check the installation: tiny networks, included photos, minutes on a CPU


PROMPT_DROPOUT = 0.1  # fraction of training prompts replaced by "", for classifier-free guidance
PROMPT_STREAM = 5  # added to an item's seed for prompt dropout; noise, timestep and decoded crop use 0 to 3
LOSS_SETTINGS = ("deblur_loss_weight", "perceptual_loss_weight", "deblur_every")  # of DeblurControlNet
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
    "max_grad_norm": 1.0,
    "max_steps": 500,
    "ema_decay": 0.98,
    "cache_latents": True,
    "save_steps": 250,
    "val_steps": 250,
    "val_ddim_steps": 2,
}
DEMO_DATA = MakeSettings(
    output_dir=DEMO["data_root"], num_samples=720, image_size=128, sharpest_of=2, blur_scale=0.6
)
INCLUDED_CONTROLNET = MODELS / "small_deblur.safetensors"  # pretrained, for comparison in the demo


def check(settings: Settings) -> None:
    """Raise ValueError or FileNotFoundError for invalid settings, before anything is loaded."""
    check_ranges(settings)
    check_image_size(settings.image_size)
    check_optimizer(settings.optimizer)
    if settings.cache_latents and (settings.use_augmentation or settings.blur_on_the_fly):
        raise ValueError("--cache_latents needs crops that stay: --no_use_augmentation, --no_blur_on_the_fly")
    if not settings.demo:
        check_start_file(settings.resume_path)


# ---- data --------------------------------------------------------------------------------------------------


class DeblurDataset(Dataset):
    """Crops of a PairedDataset or BlurDataset under the names that ControlLDM reads.

    Items: jpg, the sharp crop (h, w, 3) in [-1, 1]; hint, the blurry one (h, w, 3) in [0, 1]; txt, the
    prompt; path and seed. `captions` maps paths to prompts of their own; all other images have `prompt`.
    A fraction `prompt_dropout` of the prompts is empty, chosen by the item's seed.
    """

    def __init__(self, crops: Dataset, prompt: str, prompt_dropout: float, captions: Mapping[str, str]):
        self.crops = crops
        self.prompt = prompt
        self.prompt_dropout = prompt_dropout
        self.captions = captions

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        item = self.crops[key]
        generator = item_generator(item["seed"] + PROMPT_STREAM)
        (value,) = torch.rand(1, generator=generator).tolist()  # item() would count as a wait for the device
        dropped = value < self.prompt_dropout
        return {
            "jpg": item["sharp"].permute(1, 2, 0),
            "txt": "" if dropped else self.prompt_of(item["path"], item["blur_type"]),
            "hint": (item["blurry"].permute(1, 2, 0) + 1) / 2,
            "path": item["path"],
            "seed": item["seed"],
        }

    def prompt_of(self, path: str | Path, blur_type: str) -> str:
        """Return the prompt of a pair; {blur_type} in it becomes "motion blur" etc."""
        prompt = self.captions.get(str(path), self.prompt)
        return prompt.replace("{blur_type}", blur_type.replace("_", " ") or "blur")


def find_captions(pairs: list[Pair]) -> dict[str, str]:
    """Return the captions of pairs that have one, by the path of the blurry image."""
    check_captions([path for pair in pairs for path in (pair.sharp, pair.blurry)])
    captions = {str(pair.blurry): pair.caption or read_caption(pair.sharp, pair.blurry) for pair in pairs}
    return {path: caption for path, caption in captions.items() if caption}


def find_all_pairs(settings: Settings) -> list[Pair]:
    """Find pairs on disk, or sharp images paired with themselves, to be blurred on the fly."""
    root = Path(settings.data_root)
    if not root.exists():
        raise FileNotFoundError(
            f"no data at {root}: make some with `python tool_make_deblur_dataset.py --source_dir PHOTOS "
            f"--output_dir {root}`, or try `python tutorial_train_deblur.py --demo`"
        )
    if settings.json_file:
        return find_pairs(settings.json_file, data_root=root)
    if settings.blur_on_the_fly and not settings.sharp_root and not has_pairs(root):
        return sharp_pairs(root)
    return find_pairs(root, settings.sharp_root or None)


def find_crops(settings: Settings) -> tuple[Dataset, Dataset | None, list[Pair]]:
    """Return training crops, held-out crops (None if there are none), and the pairs of both.

    Raises ValueError or FileNotFoundError that names the file, the line or the pair that is wrong.
    """
    pairs = find_all_pairs(settings)
    check_sizes(pairs)
    validation_pairs: list[Pair] = []
    if settings.val_fraction > 0:
        pairs, held_out = split_pairs(pairs, settings.val_fraction, settings.seed)
        every = math.ceil(len(held_out) / settings.val_samples)
        validation_pairs = held_out[::every]  # evenly spaced, at most val_samples

    captions = find_captions([*pairs, *validation_pairs])
    if settings.blur_on_the_fly:  # the items then have the path of the sharp image
        for pair in pairs:
            if str(pair.blurry) in captions:
                captions[str(pair.sharp)] = captions[str(pair.blurry)]

    jitter = 0.1 if settings.use_augmentation else 0.0
    options = {"augment": settings.use_augmentation, "color_jitter": jitter}
    crops = make_crops(pairs, settings, settings.blur_on_the_fly, **options)
    train = DeblurDataset(crops, settings.prompt, PROMPT_DROPOUT, captions)
    if not validation_pairs:
        return train, None, pairs
    only_sharp_files = validation_pairs[0].blurry == validation_pairs[0].sharp
    crops = make_crops(validation_pairs, settings, only_sharp_files)
    return train, DeblurDataset(crops, settings.prompt, 0.0, captions), [*pairs, *validation_pairs]


def make_crops(pairs: list[Pair], settings: Settings, blur_sharp: bool, **options) -> Dataset:
    """Return crops of pairs, or with `blur_sharp` of their sharp images, which are blurred on the fly."""
    if not blur_sharp:
        return PairedDataset(pairs, settings.image_size, settings.seed, **options)
    sharp = sorted({pair.sharp for pair in pairs})
    return BlurDataset(sharp, settings.image_size, settings.seed, **options)


# ---- demonstration -----------------------------------------------------------------------------------------


def score_item(item: dict, restored: np.ndarray) -> dict[str, float]:
    """Compute PSNR and SSIM of a restored image and of its input."""
    blurry, sharp = pixels(item["hint"], "hint"), pixels(item["jpg"])
    return {
        "PSNR": psnr(restored, sharp),
        "PSNR of the blurry": psnr(blurry, sharp),
        "SSIM": ssim(restored, sharp),
        "SSIM of the blurry": ssim(blurry, sharp),
    }


def compare_with_included(settings: Settings, validation: Dataset) -> None:
    """Restore the held-out pairs with this run's ControlNet and with the included one."""
    sampling = Sampling(settings.prompt, steps=settings.val_ddim_steps)
    sampling.self_ensemble = True  # after minutes of training single samples have grain
    print("Restored as by infer.py deblur --self_ensemble: the mean over 8 flips and rotations")

    def restore(model: torch.nn.Module, item: dict) -> np.ndarray:
        return deblur_image(model, pixels(item["hint"], "hint"), sampling)

    show_demo(INCLUDED_CONTROLNET, validation, Path(settings.output_dir), restore, score_item)


# ---- the run -----------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Train, then print where the results are."""
    # Settings and seed: wrong settings are reported before weights or images are loaded
    if settings.demo:
        announce_demo()
    folder = Path(settings.output_dir)
    last = last_checkpoint(folder)
    check(settings)
    settings = replace(settings, precision=begin(settings.precision, settings.seed, last))
    config = read_config(settings.config_path)
    config["target"] = "cldm.deblur.DeblurControlNet"  # in place of the yaml's ControlLDM
    if settings.use_attention:
        config["target"] = "cldm.deblur.DeblurControlNetWithAttention"
    config["params"] |= {name: getattr(settings, name) for name in LOSS_SETTINGS}

    # Data: pairs of crops; the same seed holds out the same pairs
    if settings.demo and settings.data_root == DEMO["data_root"]:
        make_dataset(DEMO_DATA)
    train, validation, pairs = find_crops(settings)
    processes = settings.devices * launched_nodes()
    images_per_step = settings.batch_size * settings.accumulate_grad_batches * processes
    steps = count_steps(settings.max_steps, settings.max_epochs, len(train), images_per_step)

    # Model: Stable Diffusion with a ControlNet that starts as a copy of the UNet's encoder
    if settings.demo:
        make_demo_start(settings.resume_path, config)
    weights = load_state_dict(settings.resume_path)
    if settings.use_attention:
        weights = add_attention(weights)
    if settings.hint_as_latent:
        config, weights = add_hint_latent(config, weights)
    model = create_filled_model(config, weights, settings.resume_path)
    del weights  # free up to 6 GB
    model.sd_locked = settings.sd_locked
    model.validation_ddim_steps = settings.val_ddim_steps
    if settings.deblur_loss_weight and settings.perceptual_loss_weight:
        model.load_perceptual()

    # Cache of latents and text embeddings
    if settings.cache_latents:
        prompts = {"", *(train.prompt_of(pair.blurry, pair.blur_type) for pair in pairs)}
        train, validation = with_cached_latents(
            model,
            {"train": train, "val": validation},
            files=[pair.sharp for pair in pairs],
            prompts=prompts,
            folder=folder / "cache",
            base=settings.resume_path,
            image_size=settings.image_size,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
        )

    # Optimizer: AdamW over the ControlNet (and the UNet's decoder), made by ControlLDM.configure_optimizers
    model.optimizer = settings.optimizer
    model.learning_rate = settings.learning_rate
    model.learning_rate_factor = rate_schedule(settings.lr_scheduler, steps)
    clips = settings.max_grad_norm > 0
    prepare_model(
        model, settings.precision, clips, processes, settings.gradient_checkpointing, settings.compile
    )

    # Training: what Lightning does with each batch, in model.training_step (ldm/models/diffusion/ddpm.py)
    # - z = VAE.encode(jpg); t = random timestep; noise; z_t = z with the noise of timestep t added (q_sample)
    # - prediction = UNet(z_t, t, text, control=ControlNet(z_t, t, text, hint)): apply_model (cldm/cldm.py)
    # - loss = mean square of prediction - noise (of v in v-models): diffusion_loss
    # - plus the losses on the decoded image: DeblurControlNet.extra_losses (cldm/deblur.py)
    # - backward
    # - after accumulate_grad_batches batches: learning rate of this step, clipping, optimizer.step(), EMA
    data = StreamData(
        model, train, validation, settings.batch_size, settings.num_workers, settings.seed, images_per_step
    )
    run_settings = {**plain(settings), "samples": len(train)}
    run_info = {"config": dict(config), "base": str(settings.resume_path), "settings": run_settings}
    trainer = make_trainer(
        model,
        folder,
        run_info,
        settings.precision,
        max_steps=steps,
        images_per_step=images_per_step,
        accumulate=settings.accumulate_grad_batches,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay,
        log_steps=settings.log_steps,
        save_steps=settings.save_steps,
        val_steps=settings.val_steps,
        validates=validation is not None,
        devices=settings.devices,
    )
    fit(trainer, model, data, last, run_info)  # continues from the checkpoint `last` if there is one

    # Summary
    what_next = f"python infer.py deblur --checkpoint_path {last} --input PHOTOS --output_dir restored"
    rank_zero_only(print)(summary(folder, trainer.global_step, what_next))
    if settings.demo and validation is not None:
        compare_with_included(settings, validation)


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
