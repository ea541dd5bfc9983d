"""Train a ControlNet that fills holes in photographs, on Stable Diffusion 1.5 or 2.1.

    python tutorial_train_inpaint.py --demo               # installation check: minutes, on any computer
    python tutorial_train_inpaint.py --image_dir PHOTOS --show_data      # samples of the training data

    python tool_add_control.py ./models/v1-5-pruned.ckpt ./models/control_sd15_ini.ckpt
    python tutorial_train_inpaint.py --image_dir ./training/coco/train2017 \\
        --ann_file ./training/coco/annotations/instances_train2017.json --batch_size 4

Method: ControlNet (Zhang et al. 2023); its hint is the picture with -1 in the hole, as
control_v11p_sd15_inpaint has it (--init_control starts from that file). Any folder of photographs will do:
rectangles and strokes need no annotations. Expect 50 to 100 thousand steps, which are 1.7 to 3.4 passes over
COCO at batch 4. Judge by images/val_*.png and val/psnr, not by the training loss. A run has its own folder;
after a stop the same command with --output_dir THAT_FOLDER resumes exactly.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pytorch_lightning.utilities import rank_zero_only

from cldm.cache import with_cached_latents
from cldm.callbacks import Snapshots, keep_model
from cldm.demo import MODELS, make_demo_start, pixels, show_demo
from cldm.inpaint import Inpainting, hole_scores, inpaint_image
from cldm.model import create_filled_model, load_state_dict, read_config, read_control, widen_input
from cldm.training import StreamData, begin, fit, prepare_model, report
from harness import flags
from harness.run import last_checkpoint
from harness.settings import run_main
from ldm.checkpoint import write_weights
from ldm.data.crop import ScaledCrop
from ldm.data.image import photographs, read_image, side_by_side, write_image
from ldm.data.inpaint import CocoInpaintingDataset, MaskType
from ldm.data.masks import check_masks, list_photographs
from ldm.util import listing
from tool_export_control import alone

# ---- settings: edit here, or override on the command line --------------------------------------------------


@dataclass
class Settings:
    """Train a ControlNet to fill holes."""

    demo: bool = False  # tiny networks, scikit-image's photographs, minutes on a CPU: checks the installation
    output_dir: str = ""  # an old run in it is resumed; empty: outputs/controlnet_inpainting_TIME
    show_data: bool = False  # write data_sample.png, eight samples of the training data, and do not train

    # photographs, in this folder and below it
    image_dir: Annotated[str, tyro.conf.arg(aliases=["--data_root"])] = "./training/coco/train2017"
    ann_file: str = ""  # COCO's instances_*.json, for holes in the shape of objects
    mask_dir: str = ""  # masks of your own, white where the hole is
    mask_type: MaskType | None = None  # None: object if there is ann_file, folder if mask_dir, else mixed
    mask_ratio: tuple[float, float] = (0.1, 0.3)  # smallest and largest part of the picture that is a hole
    image_size: flags.ImageSize = 512  # pixels of the square crop, a multiple of 64
    prompt: str = ""  # of pictures without captions, which are in captions_file or in NAME.txt beside them

    resume_path: flags.StartPath = "./models/control_sd15_ini.ckpt"  # Stable Diffusion by tool_add_control.py
    config_path: str = "./models/cldm_v15_inpaint.yaml"  # yaml of the model

    batch_size: flags.BatchSize = 4  # of each device
    learning_rate: float = 1e-5  # the highest, at the end of the warm-up
    max_epochs: flags.MaxEpochs = 100  # passes over the data
    max_steps: flags.MaxSteps = -1  # optimizer steps; above 0 it replaces max_epochs

    precision: flags.AnyPrecision = "auto"  # bf16 where CUDA has it, else 16, on a CPU 32; frozen parts too
    cache_latents: bool = False  # compute latents and text embeddings once; needs crops that stay
    devices: flags.Devices = 1  # GPUs of each machine (processes on a CPU)

    captions_file: str = ""  # COCO's captions_*.json, for prompts
    use_augmentation: bool = True  # crops anywhere, flipped half the time; else from the middle
    prompt_dropout: float = 0.5  # part of the training prompts that is left empty
    val_samples: int = 16  # pictures held out for validation, 0 for none
    num_workers: int = 4  # processes that read and decode pictures

    init_control: str = ""  # a ControlNet to start from, such as control_v11p_sd15_inpaint.pth
    hint_channels: int = 3  # 4 adds the mask to the hint; other tools do not read that
    sd_locked: bool = True  # False trains the UNet's decoder too: then use learning_rate 2e-6
    only_mid_control: bool = False  # steer the UNet's middle block only: faster, weaker

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

    log_steps: int = 50  # optimizer steps from one row of metrics to the next
    logger_freq: int = 1000  # to a grid of training pictures
    save_steps: int = 1000  # to a checkpoint
    val_steps: int = 1000  # to a validation
    val_ddim_steps: int = 20  # sampling steps of each validation picture


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
    "lr_warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_steps": 600,
    "ema_decay": 0.98,
    "precision": "32",
    "log_steps": 10,
    "logger_freq": 300,
    "save_steps": 300,
    "val_steps": 300,
    "val_ddim_steps": 10,
}
SHIPPED = MODELS / "small_inpaint.safetensors"
HINT = "control_model.input_hint_block.0.weight"  # may have a channel more or less
RUN_VARIABLE = "CONTROLNET_INPAINTING_RUN"  # tells the other processes of a run its folder

# ---- data --------------------------------------------------------------------------------------------------


def find_pictures(settings: Settings) -> tuple[CocoInpaintingDataset, CocoInpaintingDataset | None]:
    """Training data, and held-out data (None without any).

    Raises FileNotFoundError or ValueError that names what is missing or wrong.
    """
    if not Path(settings.image_dir).is_dir():
        raise FileNotFoundError(
            f"no photographs at {settings.image_dir}: give --image_dir a folder of them, such as COCO's "
            "train2017, or try `python tutorial_train_inpaint.py --demo`"
        )
    paths = list_photographs(settings.image_dir, settings.mask_dir or None)
    most, count = len(paths) - 1, settings.val_samples
    if not 0 <= count <= most:
        raise ValueError(f"val_samples must be 0 ... {most}, less than the pictures, not {count}")
    order = np.random.default_rng(settings.seed).permutation(len(paths))
    held_out = set(order[:count].tolist())
    names = "ann_file captions_file mask_dir mask_type mask_ratio seed prompt hint_channels".split()
    options = {name: getattr(settings, name) for name in names} | {"size": settings.image_size}
    train = CocoInpaintingDataset(
        settings.image_dir,
        augment=settings.use_augmentation,
        prompt_dropout=settings.prompt_dropout,
        paths=[path for n, path in enumerate(paths) if n not in held_out],
        **options,
    )
    check_masks([os.fsdecode(path) for path in train.masks])
    if not held_out:
        return train, None
    few = [paths[n] for n in sorted(held_out)]
    options["ann_file"] = options["ann_file"] if train.mask_type == "object" else None
    try:
        return train, CocoInpaintingDataset(settings.image_dir, prompt_dropout=0.0, paths=few, **options)
    except ValueError as error:
        raise ValueError(f"held-out pictures: {error}; try another --seed or --val_samples") from error


def show_data(settings: Settings, output: Path = Path("data_sample.png")) -> None:
    """Write samples of the training data, each a row of photograph, mask and hint; print their prompts."""
    data, _ = find_pictures(replace(settings, val_samples=0))
    rows = []
    for index in np.linspace(0, len(data) - 1, min(8, len(data)), dtype=int).tolist():
        item = data[index]
        mask = np.repeat(pixels(item["mask"] * 2 - 1), 3, axis=2)
        rows.append(side_by_side([pixels(item["jpg"]), mask, pixels(item["hint"], "hint")]))
        print(f"{item['path']}: hole {item['mask'].mean():.1%}, prompt {item['txt']!r}")
    write_image(output, np.vstack(rows))
    print(f"{len(data)} photographs; samples are in {output}")


# ---- model and run -----------------------------------------------------------------------------------------


def starting_weights(settings: Settings) -> dict[str, torch.Tensor]:
    """Stable Diffusion with a ControlNet: the file's own, or the one of `init_control`."""
    weights = load_state_dict(settings.resume_path)
    if settings.init_control and not last_checkpoint(settings.output_dir).is_file():
        control, _ = read_control(settings.init_control)
        control = {name: value for name, value in control.items() if name.startswith("control_model.")}
        if not control:
            raise ValueError(f"{settings.init_control} holds no ControlNet")
        own = {n: v.shape for n, v in weights.items() if n.startswith("control_model.") and n != HINT}
        wrong = [name for name, shape in own.items() if name not in control or control[name].shape != shape]
        if wrong or HINT not in control:
            raise ValueError(
                f"{settings.init_control} is no ControlNet for {settings.resume_path}: it lacks, or has "
                f"another shape for, {listing(wrong or [HINT])}"
            )
        weights = {**weights, **control}
    return widen_input(weights, HINT, settings.hint_channels)


def run_folder(settings: Settings) -> str:
    """The run's folder: the one that is given, or a new one named after the time.

    Raises ValueError where processes started apart would each name their own.
    """
    if settings.output_dir:
        return settings.output_dir
    if RUN_VARIABLE not in os.environ or "LOCAL_RANK" not in os.environ:
        if "LOCAL_RANK" in os.environ or settings.num_nodes > 1:
            raise ValueError("give --output_dir where processes are started apart (torchrun, Slurm)")
        os.environ[RUN_VARIABLE] = time.strftime("outputs/controlnet_inpainting_%Y%m%d_%H%M%S")
    return os.environ[RUN_VARIABLE]


@rank_zero_only
def keep_final_model(run: Path) -> None:
    """The last model in `run`/final_model, and its ControlNet alone for other tools, if they can use it."""
    model, path = keep_model(run, run / "final_model"), run / "final_model" / "controlnet.safetensors"
    weights, content = read_control(model)
    control, differs = alone(weights, content.get("config"), model)
    if differs:
        return print(f"no {path.name} for other tools is written: the run {differs}")
    write_weights(path, {f"control_model.{name}": value for name, value in control.items()})


# ---- demonstration -----------------------------------------------------------------------------------------


def cut_photographs(folder: Path, count: int, size: int = 128) -> None:
    """Write random squares of the photographs inside scikit-image, scaled to `size`, or what is missing."""
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
    """Scores of the hole, ours and those of OpenCV's Telea (see hole_scores)."""
    return hole_scores(filled, pixels(item["jpg"]), item["mask"][..., 0] > 0.5)


def main(settings: Settings) -> None:
    """Train, then say where everything is."""
    if settings.show_data:
        return show_data(settings)

    # Settings and seed: what can be wrong is found before anything is loaded
    settings = begin(settings)
    if settings.hint_channels not in (3, 4):
        raise ValueError(f"hint_channels must be 3 or 4, not {settings.hint_channels}")
    settings = replace(settings, output_dir=run_folder(settings))
    config = read_config(settings.config_path)
    config["target"] = "cldm.inpaint.InpaintControlNet"  # any configuration of the family will do
    config["params"]["only_mid_control"] = settings.only_mid_control
    for name in ("deblur_loss_weight", "perceptual_loss_weight"):
        config["params"].pop(name, None)

    # Data
    if settings.demo and settings.image_dir == DEMO["image_dir"]:
        cut_photographs(Path(DEMO["image_dir"]), 240)
    train, validation = find_pictures(settings)
    if settings.demo:
        make_demo_start(settings.resume_path, config)

    # Model
    config["params"]["control_stage_config"]["params"]["hint_channels"] = settings.hint_channels
    model = create_filled_model(config, starting_weights(settings), settings.resume_path)
    model.validation_ddim_steps = settings.val_ddim_steps

    # Latents and embeddings, if they are to be computed once (those of captions are too many to remember)
    if settings.cache_latents:
        prompts = None if settings.captions_file or train.captions_beside else {"", settings.prompt}
        files = [*train.paths, *(validation.paths if validation else [])]
        train, validation = with_cached_latents(model, [train, validation], files, prompts, settings)

    # Training, resumed where it stopped
    prepare_model(model, settings)
    folder = Path(settings.output_dir)
    rank_zero_only(print)(f"run: {folder} (resume it with --output_dir {folder})")
    snapshots = Snapshots(folder, settings.save_steps)
    trainer = fit(model, StreamData(train, validation, settings), settings, config, [snapshots])

    # Summary
    keep_final_model(folder)
    final = folder / "final_model" / "model.ckpt"
    what_next = f"python infer.py inpaint --checkpoint_path {final} --input_image PHOTO --input_mask MASK"
    report(trainer, settings, f"{what_next} --output_dir filled")
    if settings.demo and validation is not None:
        options = Inpainting(steps=settings.val_ddim_steps, mask_blur=0)

        def fill(model: torch.nn.Module, item: dict) -> np.ndarray:
            return inpaint_image(model, pixels(item["jpg"]), item["mask"][..., 0].numpy(), options)

        show_demo(SHIPPED, validation, folder, fill, score_item)


if __name__ == "__main__":
    run_main(main, Settings, DEMO)
