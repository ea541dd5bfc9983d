"""What brings what in the small deblurring ControlNet: how it is trained, and how it is sampled.

    python -m benchmarks.small_ablation train --steps 300    # the demonstration's training and its variants
    python -m benchmarks.small_ablation sample               # the ControlNet in models/, sampled in many ways

Tables for docs/deblur.md. Trained on the demonstration's pairs of four photographs, scored on pairs of the
two held out; `sample` scores pairs of all six photographs inside scikit-image: the file knows none of them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.data import Dataset

import tutorial_train_deblur as script
from benchmarks.fidelity import Pictures, row
from cldm.demo import BASE, make_demo_start, pixels
from cldm.model import open_control_model, read_config
from cldm.restore import Sampling, deblur_image
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
    "4 steps, colours not fixed": {"steps": 4, "color_fix": False},
    "4 steps, fidelity 0.5": {"steps": 4, "fidelity": 0.5},
    "4 steps, fidelity 1": {"steps": 4, "fidelity": 1.0},
    "4 steps, guidance 2": {"steps": 4, "guidance_scale": 2.0},
}


@dataclass
class Settings:
    """Print one of the two tables."""

    what: tyro.conf.Positional[Literal["train", "sample"]]
    folder: Path = Path("outputs/small_ablation")  # pairs and runs; finished runs are not made again
    steps: int = 300  # of each training
    checkpoint_path: Path = Path("models/small_deblur.safetensors")  # that is sampled
    seed: int = 0  # of the sampling


def pictures_of(dataset: Dataset) -> Pictures:
    items = [dataset[index] for index in range(len(dataset))]
    return [(pixels(item["hint"], "hint"), pixels(item["jpg"])) for item in items]


def score(
    name: str, model: torch.nn.Module, pictures: Pictures, spacing: str = "trailing", **options
) -> None:
    model.timestep_spacing = spacing
    sampling = Sampling(prompt=script.Settings.prompt, **options)
    row(name, pictures, lambda blurry: deblur_image(model, blurry, sampling), ())


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
        score(name, model, pictures, seed=settings.seed, **options)
    for number, (name, options) in enumerate(VARIANTS.items() if settings.what == "train" else ()):
        run = script.Settings(**own | {"output_dir": str(settings.folder / f"run_{number}")} | options)
        script.main(run)
        model = open_control_model(Path(run.output_dir) / "checkpoints" / "last.ckpt")
        score(name, model, pictures, steps=run.val_ddim_steps, seed=settings.seed)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
