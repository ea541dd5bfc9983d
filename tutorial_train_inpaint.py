"""Train a ControlNet that fills holes in photographs, on Stable Diffusion 1.5 or 2.1.

    python tutorial_train_inpaint.py --demo               # installation check: minutes, on any computer
    python tutorial_train_inpaint.py --image_dir PHOTOS --show_data      # samples of the training data

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt
    python tutorial_train_inpaint.py --image_dir ./training/coco/train2017 \\
        --ann_file ./training/coco/annotations/instances_train2017.json --batch_size 4

Method: ControlNet (Zhang et al. 2023); its hint is the image with -1 in the hole, as for
control_v11p_sd15_inpaint (--init_control starts from that file). Any folder of photographs will do:
rectangles and strokes need no annotations. Expect 50 to 100 thousand steps, which are 1.7 to 3.4 epochs of
COCO at batch 4. Judge by images/val_*.png and val/psnr, not by the training loss. A run has its own folder;
after a stop the same command with --output_dir THAT_FOLDER resumes exactly.
"""

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pytorch_lightning.utilities import rank_zero_only

from cldm.cache import with_cached_latents
from cldm.demo import MODELS, announce_demo, make_demo_start, pixels, show_demo
from cldm.inpaint import Inpainting, hole_scores, inpaint_image
from cldm.model import (
    CONTROL,
    FIRST,
    HINT,
    add_hint_latent,
    check_weights,
    create_filled_model,
    load_state_dict,
    read_config,
    read_control,
    widen_input,
    with_hint,
)
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
from harness.flags import Count, Decay, Fraction, Range, Weight, Whole
from harness.logs import summary
from harness.run import last_checkpoint, launched_nodes
from harness.scores import describe_distances, local_distances
from harness.settings import check_optimizer, check_ranges, plain, run_main
from ldm import checkpoint
from ldm.data.crop import ScaledCrop
from ldm.data.image import photographs, read_image, side_by_side, write_image
from ldm.data.inpaint import CocoInpaintingDataset, MaskType
from ldm.data.masks import check_masks, list_photographs
from ldm.holes import METHODS, CoarseFill, fill_classically
from tool_export_control import control_alone

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train a ControlNet to fill holes."""

    # ---- data
    ann_file: str = ""  # COCO's instances_*.json, for holes in the shape of objects
    # folder of photographs, whose subfolders are searched too
    image_dir: Annotated[str, tyro.conf.arg(aliases=["--data_root"])] = "./training/coco/train2017"
    mask_dir: str = ""  # folder of masks of your own, white where the hole is
    # kind of holes; None: object with ann_file, folder with mask_dir, else mixed
    mask_type: MaskType | None = None
    mask_ratio: tuple[float, float] = (0.1, 0.3)  # smallest and largest fraction of the crop in the hole
    captions_file: str = ""  # COCO's captions_*.json, for prompts
    prompt: str = ""  # prompt of images without a caption in captions_file or in NAME.txt beside them
    prompt_dropout: Fraction = 0.5  # fraction of the training prompts that is left empty
    image_size: flags.ImageSize = 512  # side of the square crops in pixels, a multiple of 64
    use_augmentation: bool = True  # crop anywhere and flip half the crops; else crop the middle
    val_samples: Whole = 16  # number of images held out for validation, 0 for none
    num_workers: Whole = 4  # number of processes that read and decode images

    # ---- model
    resume_path: flags.StartPath = "./models/control_sd15_ini.ckpt"  # starting weights by tool_add_control.py
    config_path: str = "./models/cldm_v15.yaml"  # yaml of the model, of the same family as resume_path
    init_control: str = ""  # file of a ControlNet to start from, such as control_v11p_sd15_inpaint.pth
    # 4 adds the mask to the hint; other tools do not read that
    hint_channels: Annotated[int, Range(3, 4)] = 3
    # fill each hole by this method first; the ControlNet also gets the mask and the filled image's latent
    coarse_fill: CoarseFill = "none"
    sd_locked: bool = True  # freeze the UNet's decoder; to train it too, use learning_rate 2e-6
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time

    # ---- training
    batch_size: flags.BatchSize = 4  # number of images in a batch of each device
    learning_rate: Weight = 1e-5  # peak learning rate, reached after warmup
    max_epochs: flags.MaxEpochs = 100  # number of epochs, if max_steps is not above 0
    max_steps: flags.MaxSteps = -1  # number of optimizer steps; above 0 it replaces max_epochs
    accumulate_grad_batches: flags.Accumulate = 1  # number of batches in one optimizer step
    precision: flags.AnyPrecision = "auto"  # auto: bf16 or 16 on GPUs, 32 on CPUs; frozen weights use it too
    cache_latents: bool = False  # compute latents and text embeddings once; crops must not change
    lr_scheduler: flags.LRScheduler = "constant"  # learning-rate schedule; all but constant warm up
    max_grad_norm: Weight = 0.0  # largest global norm of the gradients, 0 for no clipping
    optimizer: flags.AdamW = "adamw"  # adamw8bit takes a quarter of the state's memory (bitsandbytes, CUDA)
    ema_decay: Decay = 0.0  # EMA decay; EMA weights are used for validation and export, 0 for none
    seed: int = 0  # random seed of data order, fresh weights and noise
    devices: flags.Devices = 1  # number of GPUs in each machine (processes on a CPU)
    compile: bool = False  # use torch.compile: minutes at the start, then faster steps

    # ---- logging
    output_dir: str = ""  # folder of the run, to resume it; empty: outputs/controlnet_inpainting_TIME
    log_steps: Count = 50  # number of optimizer steps between rows of metrics
    save_steps: Count = 1000  # number of optimizer steps between checkpoints
    val_steps: Count = 1000  # number of optimizer steps between validations, and between image grids
    val_ddim_steps: Annotated[int, Range(1, 1000)] = 20  # number of sampling steps of a validation image
    show_data: bool = False  # write samples of the training data to data_sample.png, and do not train
    demo: bool = False  # check the installation: tiny networks, included photos, minutes on a CPU


DEMO = {
    "output_dir": "./outputs/inpaint_demo",
    "image_dir": "./outputs/inpaint_demo/data",
    "image_size": 128,
    "val_samples": 12,
    "use_augmentation": False,
    "num_workers": 1,
    "resume_path": "./outputs/inpaint_demo/control_small_ini.safetensors",
    "config_path": str(MODELS / "small_diffusion.yaml"),
    "sd_locked": False,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "max_grad_norm": 1.0,
    "max_steps": 600,
    "ema_decay": 0.98,
    "precision": "32",
    "log_steps": 10,
    "save_steps": 300,
    "val_steps": 300,
    "val_ddim_steps": 10,
}
INCLUDED = MODELS / "small_inpaint.safetensors"  # trained weights, for comparison
RUN_VARIABLE = "CONTROLNET_INPAINTING_RUN"  # tells the other processes of a run its folder


def check(settings: Settings) -> None:
    """Raise ValueError or FileNotFoundError for invalid settings, before anything is loaded."""
    check_ranges(settings)
    check_image_size(settings.image_size)
    check_optimizer(settings.optimizer)
    if settings.cache_latents and settings.use_augmentation:
        raise ValueError("--cache_latents needs crops that stay: --no_use_augmentation")
    if not settings.demo:
        check_start_file(settings.resume_path)


# ---- data --------------------------------------------------------------------------------------------------


def find_images(settings: Settings) -> tuple[CocoInpaintingDataset, CocoInpaintingDataset | None]:
    """Return training data, and held-out data (None if there are none).

    Raises FileNotFoundError or ValueError that names what is missing or wrong.
    """
    if not Path(settings.image_dir).is_dir():
        raise FileNotFoundError(
            f"no photographs at {settings.image_dir}: give --image_dir a folder of them, such as COCO's "
            "train2017, or try `python tutorial_train_inpaint.py --demo`"
        )
    paths = list_photographs(settings.image_dir, settings.mask_dir or None)
    if settings.val_samples >= len(paths):
        raise ValueError(f"val_samples must be below the {len(paths)} images, not {settings.val_samples}")
    order = np.random.default_rng(settings.seed).permutation(len(paths))
    held_out = set(order[: settings.val_samples].tolist())
    options = {
        "captions_file": settings.captions_file,
        "mask_dir": settings.mask_dir,
        "mask_type": settings.mask_type,
        "mask_ratio": settings.mask_ratio,
        "size": settings.image_size,
        "seed": settings.seed,
        "prompt": settings.prompt,
        "hint_channels": hint_channels(settings),
        "coarse_fill": settings.coarse_fill,
    }
    train = CocoInpaintingDataset(
        settings.image_dir,
        ann_file=settings.ann_file,
        augment=settings.use_augmentation,
        prompt_dropout=settings.prompt_dropout,
        paths=[path for n, path in enumerate(paths) if n not in held_out],
        **options,
    )
    check_masks([os.fsdecode(path) for path in train.masks])
    if not held_out:
        return train, None
    few = [paths[n] for n in sorted(held_out)]
    ann_file = settings.ann_file if train.mask_type == "object" else None
    try:
        validation = CocoInpaintingDataset(
            settings.image_dir, ann_file=ann_file, prompt_dropout=0.0, paths=few, **options
        )
    except ValueError as error:
        raise ValueError(f"held-out images: {error}; try another --seed or --val_samples") from error
    return train, validation


def show_data(settings: Settings, output: Path = Path("data_sample.png")) -> None:
    """Write samples of the training data, each a row of image, mask and hint; print their prompts."""
    data, _ = find_images(replace(settings, val_samples=0))
    rows = []
    for index in np.linspace(0, len(data) - 1, min(8, len(data)), dtype=int).tolist():
        item = data[index]
        mask = np.repeat(pixels(item["mask"] * 2 - 1), 3, axis=2)
        rows.append(side_by_side([pixels(item["jpg"]), mask, pixels(item["hint"], "hint")]))
        print(f"{item['path']}: hole {item['mask'].mean():.1%}, prompt {item['txt']!r}")
    write_image(output, np.vstack(rows))
    print(f"{len(data)} photographs; samples are in {output}")


# ---- model and run -----------------------------------------------------------------------------------------


def starting_weights(settings: Settings, resumes: bool) -> dict[str, torch.Tensor]:
    """Read Stable Diffusion with a ControlNet: the file's own, or for a new run that of `init_control`."""
    weights = load_state_dict(settings.resume_path)
    if settings.init_control and not resumes:
        control, _ = read_control(settings.init_control)
        control = {name: value for name, value in control.items() if name.startswith(CONTROL)}
        if HINT not in control:
            raise ValueError(f"{settings.init_control} holds no ControlNet")
        # the numbers of input channels may differ: `widen_input` adds those that are missing
        own = {name: value for name, value in weights.items() if name.startswith(CONTROL)}
        inputs = {name: control.get(name, own[name]) for name in (HINT, CONTROL + FIRST)}
        check_weights({**own, **inputs}, control, settings.init_control)
        weights = {**weights, **control}
    return widen_input(weights, HINT, hint_channels(settings))


def hint_channels(settings: Settings) -> int:
    """Return the number of hint channels: RGB, and the mask if requested or if holes are filled coarsely."""
    return settings.hint_channels if settings.coarse_fill == "none" else 4


def run_folder(settings: Settings) -> str:
    """Return the folder of the run: the one that is given, or a new one named after the time.

    Raises ValueError if none is given and processes are started separately: each would name its own.
    """
    if settings.output_dir:
        return settings.output_dir
    if RUN_VARIABLE not in os.environ or "LOCAL_RANK" not in os.environ:
        if "LOCAL_RANK" in os.environ or launched_nodes() > 1:
            raise ValueError("give --output_dir where processes are started apart (torchrun, Slurm)")
        os.environ[RUN_VARIABLE] = time.strftime("outputs/controlnet_inpainting_%Y%m%d_%H%M%S")
    return os.environ[RUN_VARIABLE]


@rank_zero_only
def save_final_model(run: Path) -> None:
    """Save the last model, without the optimizer, in `run`/final_model.

    The ControlNet alone is written beside it if other tools can use it.
    """
    content = checkpoint.load(last_checkpoint(run))
    wanted = ("state_dict", "ema", "config", "base", "settings", "global_step")
    model = run / "final_model" / "model.ckpt"
    model.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(model, {name: content[name] for name in wanted if name in content})
    path = model.with_name("controlnet.safetensors")
    weights, content = read_control(model)
    control, differs = control_alone(weights, content.get("config"))
    if differs:
        print(f"no {path.name} for other tools is written: the run {differs}")
    else:
        checkpoint.write_weights(path, {CONTROL + name: value for name, value in control.items()})


# ---- demonstration -----------------------------------------------------------------------------------------


def cut_photographs(folder: Path, count: int, size: int = 128) -> None:
    """Write `count` random squares of scikit-image's photographs, scaled to `size`; existing files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [read_image(path) for path in photographs()]
    for n in range(count):
        rng, image = np.random.default_rng(n), images[n % len(images)]
        side = int(rng.integers(2 * size, min(image.shape[:2])))
        y, x = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        square = image[y : y + side, x : x + side]
        if not (folder / f"{n:03d}.png").is_file():
            write_image(folder / f"{n:03d}.png", ScaledCrop.fit(square.shape, size).cut(square))


def score_item(item: dict, filled: np.ndarray) -> dict[str, float]:
    """Compute the scores of the hole, and LPIPS and DISTS if their networks are on this machine."""
    truth = pixels(item["jpg"])
    return hole_scores(filled, truth, item["mask"][..., 0].numpy() > 0.5) | local_distances(filled, truth)


def compare_with_included(settings: Settings, validation: CocoInpaintingDataset) -> None:
    """Fill the held-out holes with this run's ControlNet, with the included one, and without a model."""
    options = Inpainting(steps=settings.val_ddim_steps, mask_blur=0)

    def fill(model: torch.nn.Module, item: dict) -> np.ndarray:
        return inpaint_image(model, pixels(item["jpg"]), item["mask"][..., 0].numpy(), options)

    def fill_without_model(item: dict, method: str) -> np.ndarray:
        return fill_classically(pixels(item["jpg"]), item["mask"][..., 0].numpy(), method)

    others = {method: partial(fill_without_model, method=method) for method in METHODS}
    show_demo(INCLUDED, validation, Path(settings.output_dir), fill, score_item, others)
    rank_zero_only(print)(f"  {describe_distances()}")


# ---- the run -----------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Train, then print where the results are."""
    if settings.show_data:
        return show_data(settings)

    # Settings and seed: mistakes are found before anything is loaded
    if settings.demo:
        announce_demo()
    settings = replace(settings, output_dir=run_folder(settings))
    folder, last = Path(settings.output_dir), last_checkpoint(settings.output_dir)
    check(settings)
    settings = replace(settings, precision=begin(settings.precision, settings.seed, last))
    config = read_config(settings.config_path)
    config["target"] = "cldm.inpaint.InpaintControlNet"  # any configuration of the family will do
    config = with_hint(config, hint_channels=hint_channels(settings))

    # Data: crops with a hole each; the same seed holds out the same images
    if settings.demo and settings.image_dir == DEMO["image_dir"]:
        cut_photographs(Path(DEMO["image_dir"]), 240)
    train, validation = find_images(settings)
    processes = settings.devices * launched_nodes()
    images_per_step = settings.batch_size * settings.accumulate_grad_batches * processes
    steps = count_steps(settings.max_steps, settings.max_epochs, len(train), images_per_step)

    # Model: Stable Diffusion with a ControlNet that starts as a copy of its encoder, or as init_control
    if settings.demo:
        make_demo_start(settings.resume_path, config)
    weights = starting_weights(settings, resumes=last.is_file())
    if settings.coarse_fill != "none":
        config, weights = add_hint_latent(config, weights)
    model = create_filled_model(config, weights, settings.resume_path)
    del weights  # up to 6 GB, mapped from the file
    model.sd_locked = settings.sd_locked
    model.validation_ddim_steps = settings.val_ddim_steps

    # Latents and embeddings, if they are computed once (those of captions are too many to remember)
    if settings.cache_latents:
        prompts = None if settings.captions_file or train.captions_beside else {"", settings.prompt}
        train, validation = with_cached_latents(
            model,
            {"train": train, "val": validation},
            files=[*train.paths, *(validation.paths if validation else [])],
            prompts=prompts,
            folder=folder / "cache",
            base=settings.resume_path,
            image_size=settings.image_size,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            hints_stay=False,
        )

    # Optimizer: AdamW over the ControlNet (and the UNet's decoder), made by ControlLDM.configure_optimizers
    model.optimizer, model.learning_rate = settings.optimizer, settings.learning_rate
    model.learning_rate_factor = rate_schedule(settings.lr_scheduler, steps)
    clips = settings.max_grad_norm > 0
    prepare_model(
        model, settings.precision, clips, processes, settings.gradient_checkpointing, settings.compile
    )

    # Training: for each batch Lightning calls model.training_step, whose loss is LatentDiffusion.p_losses,
    # and backward; after accumulate_grad_batches batches it calls optimizer.step
    data = StreamData(
        model, train, validation, settings.batch_size, settings.num_workers, settings.seed, images_per_step
    )
    known = {**plain(settings), "samples": len(train)}
    about = {"config": dict(config), "base": str(settings.resume_path), "settings": known}
    trainer = make_trainer(
        model,
        folder,
        about,
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
    rank_zero_only(print)(f"run: {folder} (resume it with --output_dir {folder})")
    fit(trainer, model, data, last, about)  # resumed where it stopped

    # Summary
    save_final_model(folder)
    final = folder / "final_model" / "model.ckpt"
    what_next = f"python infer.py inpaint --checkpoint_path {final} --input_image PHOTO --input_mask MASK"
    rank_zero_only(print)(summary(folder, trainer.global_step, f"{what_next} --output_dir filled"))
    if settings.demo and validation is not None:
        compare_with_included(settings, validation)


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
