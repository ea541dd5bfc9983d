"""What brings what in the small deblurring ControlNet: how it is trained, and how it is sampled.

    python -m benchmarks.small_ablation train --steps 300    # the demonstration's training and its variants
    python -m benchmarks.small_ablation sample               # the ControlNet in models/, sampled in many ways
    python -m benchmarks.small_ablation parameterization     # v against eps, each on a young base

Tables for docs/deblur.md. Trained on the demonstration's pairs of four photographs, scored on pairs of the
two held out; `parameterization` first teaches a UNet for each, for `base_steps`, from the pictures that
train_small_base.py cut. `sample` scores pairs of all six photographs inside scikit-image: the file knows none
of them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from torch.utils.data import Dataset

import train_small_base as base
import tutorial_train_deblur as script
from benchmarks.fidelity import Pictures, row
from cldm import demo
from cldm.demo import BASE, make_demo_start, pixels
from cldm.model import load_state_dict, open_control_model, read_config
from cldm.restore import Sampling, deblur_image
from harness.run import start_fabric
from ldm.checkpoint import read_trained, write_weights
from tool_make_deblur_dataset import make_dataset

VARIANTS = {
    "as the demonstration": {},
    "without --hint_as_latent": {"hint_as_latent": False},
    "decoder locked": {"sd_locked": True},
    "both": {"hint_as_latent": False, "sd_locked": True},
    "with the pixel losses": {"deblur_loss_weight": 1.0, "perceptual_loss_weight": 0.0, "deblur_crop": 4},
}
SAMPLINGS = {
    **{f"{steps} steps": {"steps": steps} for steps in (1, 2, 4, 10, 50)},
    "4 steps, leading": {"steps": 4, "spacing": "leading"},
    "20 steps of dpmpp_2m": {"steps": 20, "method": "dpmpp_2m"},
    "4 steps of ddpm": {"steps": 4, "method": "ddpm"},
    "half of 8 steps from the blurry picture (strength 0.5)": {"steps": 8, "strength": 0.5},
    "2 steps, colours kept": {"steps": 2, "color_fix": True},
    "2 steps, mean over 8 flips and turns": {"steps": 2, "self_ensemble": True},
    "the same, colours kept": {"steps": 2, "self_ensemble": True, "color_fix": True},
    "4 steps, fidelity 0.5": {"steps": 4, "fidelity": 0.5},
    "4 steps, fidelity 1": {"steps": 4, "fidelity": 1.0},
    "4 steps, guidance 2": {"steps": 4, "guidance_scale": 2.0},
}


@dataclass
class Settings:
    """Print one of the tables."""

    what: tyro.conf.Positional[Literal["train", "sample", "parameterization"]]
    folder: Path = Path("outputs/small_ablation")  # pairs and runs; finished runs are not made again
    steps: int = 300  # of each training
    checkpoint_path: Path = Path("models/small_deblur.safetensors")  # that is sampled
    seed: int = 0  # of the sampling
    base_steps: int = 1500  # of each UNet of `parameterization`
    pieces: Path = Path("outputs/small_base")  # the folder of train_small_base.py


def pictures_of(dataset: Dataset) -> Pictures:
    items = [dataset[index] for index in range(len(dataset))]
    return [(pixels(item["hint"], "hint"), pixels(item["jpg"])) for item in items]


def score(
    name: str, model: torch.nn.Module, pictures: Pictures, spacing: str = "trailing", **options
) -> None:
    model.timestep_spacing = spacing
    sampling = Sampling(prompt=script.Settings.prompt, **options)
    row(name, pictures, lambda blurry: deblur_image(model, blurry, sampling), ())


def young_base(settings: Settings, parameterization: str) -> tuple[Path, Path]:
    """The small base with a UNet of that parameterization, taught for `base_steps`; and its configuration."""
    folder = settings.folder / parameterization
    config, file = folder / "small.yaml", folder / "base.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(base.CONFIG.read_text().replace(": v\n", f": {parameterization}\n"))
        pieces, captions = (np.load(settings.pieces / f"{name}.npy") for name in ("pieces", "captions"))
        own = base.Settings(output_dir=folder, unet_steps=settings.base_steps, seed=settings.seed)
        with mock.patch.object(base, "CONFIG", config):
            base.teach_unet(start_fabric(precision="bf16", seed=own.seed), own, pieces, captions)
        weights = load_state_dict(BASE)
        learned = read_trained(folder / "unet" / "checkpoints" / "last.ckpt")[0]
        write_weights(file, weights | {f"model.{name}": value for name, value in learned.items()})
    return file, config


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    data = replace(script.DEMO_DATA, output_dir=str(settings.folder / "data"), workers=1)
    make_dataset(data)
    own = script.DEMO | {
        "data_root": data.output_dir,
        "resume_path": str(settings.folder / "start.safetensors"),
    }
    own |= {"max_steps": settings.steps, "val_steps": settings.steps, "save_steps": settings.steps}
    make_demo_start(
        own["resume_path"], read_config(own["config_path"]) | {"target": "cldm.deblur.DeblurControlNet"}
    )
    if settings.what == "sample":
        pictures = pictures_of(script.find_crops(script.Settings(**own | {"val_fraction": 0.0}))[0])[::20]
        model = open_control_model(settings.checkpoint_path, BASE)
    else:
        pictures = pictures_of(script.find_crops(script.Settings(**own | {"val_samples": 48}))[1])
    print("| | PSNR | SSIM |\n|---|---|---|")
    row("blurry", pictures, lambda blurry: blurry, ())
    for name, options in SAMPLINGS.items() if settings.what == "sample" else ():
        score(name, model, pictures, **{"seed": settings.seed, "color_fix": False} | options)
    for number, (name, options) in enumerate(VARIANTS.items() if settings.what == "train" else ()):
        run = script.Settings(**own | {"output_dir": str(settings.folder / f"run_{number}")} | options)
        script.main(run)
        model = open_control_model(Path(run.output_dir) / "checkpoints" / "last.ckpt")
        score(name, model, pictures, steps=run.val_ddim_steps, seed=settings.seed)
    for name in ("v", "eps") if settings.what == "parameterization" else ():
        file, config = young_base(settings, name)
        own |= {"resume_path": str(file.with_name("start.safetensors")), "config_path": str(config)}
        with mock.patch.object(demo, "BASE", file):
            target = {"target": "cldm.deblur.DeblurControlNet"}
            make_demo_start(own["resume_path"], read_config(config) | target)
        run = script.Settings(**own | {"output_dir": str(file.with_name("run"))})
        script.main(run)
        model = open_control_model(Path(run.output_dir) / "checkpoints" / "last.ckpt")
        for steps in (1, 2, 4):
            score(f"{name}, {steps} steps", model, pictures, steps=steps, seed=settings.seed)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
