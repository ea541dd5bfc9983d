"""Restore pictures of any size with any of the systems here, one subcommand each.

    python infer.py deblur --input photo.jpg --output_dir restored --checkpoint_path best.ckpt
    python infer.py srn --input photo.jpg --output_dir restored
    python infer.py srn --input FOLDER --output_dir restored --checkpoint_path models/my.safetensors
    python infer.py kontext --input photo.jpg --output_dir restored --lora_path lora.safetensors

Results are PNG files under the names of their sources; those that exist are not made again.
`python infer.py srn --help` lists the options.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from ldm.data.image import EXTENSIONS, list_images, read_image, side_by_side, write_image
from ldm.run import run_main

# What a subcommand makes: a function from a uint8 picture (h, w, 3) and its path to the restored picture.
Restorer = Callable[[np.ndarray, Path], np.ndarray]


@dataclass(kw_only=True)
class Files:
    """Options of every subcommand: which pictures, and where the results go."""

    input: Path  # a picture, or a folder with all below it
    output_dir: Path  # the tree below a folder is kept
    output_prefix: str = ""  # before the names of the results
    pattern: str = "**/*"  # in a folder only these, such as "*/blur/*"
    comparison: bool = False  # also write input and result side by side, to OUTPUT_DIR_comparison
    overwrite: bool = False  # make results again that exist
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one

    def restorer(self) -> Restorer:
        """Load the network. Called once there is something to do."""
        raise NotImplementedError

    def torch_device(self) -> torch.device:
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise ValueError("--device cuda: torch finds no CUDA device here")
        return torch.device("cuda" if available and self.device != "cpu" else "cpu")


@dataclass(kw_only=True)
class Deblur(Files):
    """Deblur with a ControlNet of tutorial_train_deblur.py on Stable Diffusion (docs/deblur.md)."""

    checkpoint_path: Path  # ours, a full ControlNet file, or a ControlNet alone (then give --base_path)
    base_path: Path | None = None  # Stable Diffusion file; None takes the one the checkpoint names
    config_path: Path | None = None  # yaml of the model; None takes the checkpoint's, or one that fits
    num_inference_steps: int = 50
    scheduler: Literal["ddim", "ddpm", "unipc", "dpmpp_2m", "euler_a"] = "ddim"  # 20 steps do for the others
    guidance_scale: float = 1.0  # above 1 follows the prompt more, in twice the time
    control_scale: float = 1.0  # weight of the ControlNet
    strength: float = 1.0  # below 1 starts from the blurry picture, noised by so much
    seed: int = 0
    prompt: str = "a sharp, detailed, high-quality photograph"
    negative_prompt: str = ""  # what guidance leads away from
    tile: int = 0  # pixels of the squares that large pictures go through in (768, say); 0 = in one piece
    overlap: int = 128  # pixels over which the squares are blended
    color_fix: bool = True  # keep the colours of the input
    precision: Literal["32", "16", "bf16"] = "32"  # of the computation; 32 is exact

    def restorer(self) -> Restorer:
        from cldm.model import open_control_model
        from cldm.restore import Sampling, deblur_image

        device = self.torch_device()
        model = open_control_model(self.checkpoint_path, self.base_path, self.config_path).to(device)
        half = {"16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        sampling = Sampling(
            self.prompt,
            self.negative_prompt,
            self.num_inference_steps,
            self.scheduler,
            self.guidance_scale,
            self.control_scale,
            self.strength,
            self.seed,
            self.tile,
            self.overlap,
            self.color_fix,
        )
        progress = partial(tqdm, desc="steps", leave=False)

        def restore(image: np.ndarray, path: Path) -> np.ndarray:
            with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
                return deblur_image(model, image, sampling, progress)

        return restore


@dataclass(kw_only=True)
class SRN(Files):
    """Deblur with SRN-DeblurNet (docs/srn.md)."""

    checkpoint_path: Path = Path("models/srn_deblur.safetensors")  # or a .ckpt or .pth
    output_prefix: str = "deblurred_"  # before the names of the results
    tile: int = 1536  # larger pictures go through in squares of that size; 0 = always in one piece
    overlap: int = 128  # pixels over which the squares are blended
    self_ensemble: bool = False  # mean over the 8 flips and turns: a little better, 8 times slower
    precision: Literal["32", "16", "bf16"] = "32"  # of the computation; 32 is exact

    def restorer(self) -> Restorer:
        from train_srn import load_network, restore_image

        if not self.checkpoint_path.is_file():
            raise FileNotFoundError(
                f"checkpoint not found: {self.checkpoint_path}; train_srn.py makes one (--demo a small one): "
                "give its srn_deblur.safetensors as --checkpoint_path"
            )
        network = load_network(self.checkpoint_path).to(self.torch_device())
        options = {
            "precision": self.precision,
            "tile": self.tile,
            "overlap": self.overlap,
            "self_ensemble": self.self_ensemble,
        }
        return lambda image, path: restore_image(network, image, **options)


@dataclass(kw_only=True)
class Kontext(Files):
    """Restore with FLUX.1 Kontext and a LoRA of train_kontext_lora.py (docs/kontext.md)."""

    pretrained_model_name_or_path: Path = Path("models/FLUX.1-Kontext-dev")  # the model folder
    lora_path: Path | None = None  # without it the model as it is
    lora_scale: float = 1.0  # strength of the LoRA
    prompt: str = ""  # empty: the one that the LoRA was trained with
    num_inference_steps: int = 30
    guidance_scale: float = 2.5
    resolution: int = 1024  # larger pictures are restored at that many pixels squared, and scaled back
    seed: int = 0
    base_precision: Literal["bf16", "fp8"] = "bf16"  # storage of the transformer; fp8 halves it

    def restorer(self) -> Restorer:
        from ldm.models.kontext import load_restorer

        restore = load_restorer(
            self.pretrained_model_name_or_path,
            self.lora_path,
            self.prompt,
            prompt_cache=self.output_dir / ".prompt.safetensors",
            lora_scale=self.lora_scale,
            device=self.torch_device(),
            fp8=self.base_precision == "fp8",
        )
        options = {
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "resolution": self.resolution,
            "seed": self.seed,
            "progress": partial(tqdm, desc="steps", leave=False),
        }
        return lambda image, path: restore(image, **options)


COMMANDS = {"deblur": Deblur, "srn": SRN, "kontext": Kontext}


def is_result(path: Path, files: Files) -> bool:
    """Whether a picture below the input folder was written by an earlier call."""
    folder = files.output_dir.resolve()
    if folder == files.input.resolve():
        return bool(files.output_prefix) and path.name.startswith(files.output_prefix)
    return folder in path.resolve().parents


def list_jobs(files: Files) -> list[tuple[Path, Path]]:
    """Sources and their targets. Raises ValueError if two sources have one target or a target is a source."""
    if files.input.is_dir():
        sources = [path for path in list_images(files.input) if not is_result(path, files)]
        if files.pattern != Files.pattern:
            wanted = set(files.input.glob(files.pattern))
            sources = [path for path in sources if path in wanted]
        names = [path.relative_to(files.input) for path in sources]
    elif files.input.is_file() and files.input.suffix.lower() in EXTENSIONS:
        sources, names = [files.input], [Path(files.input.name)]
    else:
        raise FileNotFoundError(f"no picture and no folder: {files.input}")
    targets = [files.output_dir / name.with_name(f"{files.output_prefix}{name.stem}.png") for name in names]
    seen = {source.resolve(): source for source in sources}
    for source, target in zip(sources, targets, strict=True):
        if target.resolve() in seen:
            raise ValueError(
                f"{seen[target.resolve()]} would be overwritten, or written twice by {source}: "
                "choose another --output_dir or --output_prefix"
            )
        seen[target.resolve()] = source
    if not sources:
        raise FileNotFoundError(f"no picture in {files.input} matches {files.pattern}, results left out")
    return list(zip(sources, targets, strict=True))


def restore_files(files: Files) -> None:
    """Restore every picture that has no result yet; a broken one is named in the end and stops no other."""
    jobs = list_jobs(files)
    todo = [(source, target) for source, target in jobs if files.overwrite or not target.exists()]
    failures = []
    restore = files.restorer() if todo else None
    for source, target in (progress := tqdm(todo, "restoring", unit="image")):
        progress.set_postfix_str(source.name)
        try:
            image = read_image(source)
        except ValueError as error:
            failures.append(str(error))
            continue
        restored = restore(image, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if files.comparison:
            folder = files.output_dir.with_name(f"{files.output_dir.name}_comparison")
            beside = folder / target.relative_to(files.output_dir)
            beside.parent.mkdir(parents=True, exist_ok=True)
            write_image(beside, side_by_side([image, restored]))
        write_image(target, restored)
    print(f"{len(todo) - len(failures)} restored, {len(jobs) - len(todo)} existed: {files.output_dir}")
    if failures:
        raise ValueError(f"{len(failures)} of {len(todo)} could not be read: {'; '.join(failures[:3])}")


if __name__ == "__main__":
    run_main(restore_files, COMMANDS)
