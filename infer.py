"""Restore pictures of any size with any of the systems here, one subcommand each.

    python infer.py deblur --input photo.jpg --output_dir restored --checkpoint_path best.ckpt
    python infer.py srn --input photo.jpg --output_dir restored
    python infer.py srn --input FOLDER --output_dir restored --checkpoint_path models/my.safetensors
    python infer.py dbgan --input photo.jpg --output_dir restored --checkpoint_path dbgan.safetensors
    python infer.py bgan --input sharp.jpg --output_dir blurred --checkpoint_path bgan.safetensors
    python infer.py kontext --input photo.jpg --output_dir restored --lora_path lora.safetensors
    python infer.py inpaint --input_image photo.jpg --input_mask mask.png --output_dir filled
        --checkpoint_path outputs/RUN/final_model/model.ckpt

Results are PNG files under the names of their sources; those that exist are not made again. `--profile` also
measures what one picture costs, for evaluate.py.
`python infer.py srn --help` lists the options.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from zlib import crc32

import numpy as np
import torch
import tyro
from tqdm import tqdm

from ldm import checkpoint
from ldm.data.image import EXTENSIONS, list_images, read_image, read_rgba, side_by_side, write_image
from ldm.data.stream import item_seed
from ldm.profile import PROFILE, cost_lines, measure, weights_lines, write_profile
from ldm.settings import plain, run_main
from ldm.util import half_dtype

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
    profile: bool = False  # also measure the work on one picture, for evaluate.py: OUTPUT_DIR/profile.json
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one

    LESS_MEMORY: ClassVar[str] = "a --tile of 768 or less"  # what helps if a picture is too large

    def restorer(self) -> Restorer:
        """Load the network; called once there is something to do. What it returns reads the options anew for
        every picture, so that they may change; those about loading are read here alone."""
        raise NotImplementedError

    def progress(self, steps: list) -> Iterable:
        """Steps of one picture under a progress bar."""
        return tqdm(steps, desc="steps", leave=False)

    def weights(self) -> Path:
        """The file that a profile names."""
        return self.checkpoint_path

    def result_name(self, name: Path) -> Path:
        """Where the result of a picture goes, below the output folder."""
        return name.with_name(f"{self.output_prefix}{name.stem}.png")

    def comparison_path(self, target: Path) -> Path:
        """Where the comparison that belongs to a result goes."""
        folder = self.output_dir.with_name(f"{self.output_dir.name}_comparison")
        return folder / target.relative_to(self.output_dir)

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        """What a comparison shows."""
        return side_by_side([image, restored])

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
    num_inference_steps: int = 50  # sampling steps
    scheduler: Literal["ddim", "ddpm", "unipc", "dpmpp_2m", "euler_a"] = "ddim"  # 20 steps do for the others
    guidance_scale: float = 1.0  # above 1 follows the prompt more, in twice the time
    control_scale: float = 1.0  # weight of the ControlNet
    strength: float = 1.0  # below 1 starts from the blurry picture, noised by so much
    seed: int = 0  # the same seed gives the same picture
    prompt: str | None = None  # None takes the one of the training
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
        half = half_dtype(self.precision)
        if half is not None:
            model.model.diffusion_model.to(half)
            model.control_model.to(half)
        torch.set_float32_matmul_precision("high")

        def restore(image: np.ndarray, path: Path) -> np.ndarray:
            prompt = model.prompt.replace("{blur_type}", "blur") if self.prompt is None else self.prompt
            sampling = Sampling(
                prompt,
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
            with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
                return deblur_image(model, image, sampling, self.progress)

        return restore


@dataclass(kw_only=True)
class OnePass(Files):
    """Options of networks that make a picture in one pass."""

    tile: int = 1536  # larger pictures go through in squares of that size; 0 = always in one piece
    overlap: int = 128  # pixels over which the squares are blended
    precision: Literal["32", "16", "bf16"] = "32"  # of the computation; 32 is exact

    def how(self) -> dict[str, Any]:
        """These options as ldm.tiling.restore_picture takes them."""
        names = ("precision", "tile", "overlap", "progress")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class SRN(OnePass):
    """Deblur with SRN-DeblurNet (docs/srn.md)."""

    checkpoint_path: Path = Path("models/srn_deblur.safetensors")  # or a .ckpt or .pth
    output_prefix: str = "deblurred_"  # before the names of the results
    self_ensemble: bool = False  # mean over the 8 flips and turns: a little better, 8 times slower

    def restorer(self) -> Restorer:
        from train_srn import load_network, restore_image

        if not self.checkpoint_path.is_file():
            raise FileNotFoundError(
                f"checkpoint not found: {self.checkpoint_path}; train_srn.py makes one (--demo a small one): "
                "give its srn_deblur.safetensors as --checkpoint_path"
            )
        network = load_network(self.checkpoint_path).to(self.torch_device())
        return lambda image, path: restore_image(network, image, self.self_ensemble, **self.how())


@dataclass(kw_only=True)
class Kontext(Files):
    """Restore with FLUX.1 Kontext and a LoRA of train_kontext_lora.py (docs/kontext.md)."""

    pretrained_model_name_or_path: Path = Path("models/FLUX.1-Kontext-dev")  # the model folder
    lora_path: Path | None = None  # without it the model as it is
    lora_scale: float = 1.0  # strength of the LoRA
    prompt: str = ""  # empty: the one that the LoRA was trained with
    num_inference_steps: int = 30  # sampling steps
    guidance_scale: float = 2.5  # how much the prompt counts
    resolution: int = 1024  # larger pictures are restored at that many pixels squared, and scaled back
    seed: int = 0  # the same seed gives the same picture
    base_precision: Literal["bf16", "fp8"] = "bf16"  # storage of the transformer; fp8 halves it

    LESS_MEMORY = "a smaller --resolution"

    def weights(self) -> Path:
        from ldm.models.kontext import TRANSFORMER

        return self.lora_path or self.pretrained_model_name_or_path / TRANSFORMER

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
        return lambda image, path: restore(
            image,
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            resolution=self.resolution,
            seed=self.seed,
            progress=self.progress,
        )


@dataclass(kw_only=True)
class Inpaint(Files):
    """Fill holes with a ControlNet of tutorial_train_inpaint.py on Stable Diffusion (docs/inpaint.md).

    One picture becomes inpainted.png, and comparison.png beside it: input, mask, output.
    """

    input: Annotated[Path, tyro.conf.arg(name="input_image")]  # a picture, or a folder with all below it
    input_mask: Path  # white = fill; one mask for all, or a folder: NAME or NAME_mask
    checkpoint_path: Path  # ours, a full ControlNet file, or a ControlNet alone (then give --base_path)
    base_path: Path | None = None  # Stable Diffusion file; None takes the one the checkpoint names
    config_path: Path | None = None  # yaml of the model; None takes the checkpoint's, or one that fits
    comparison: bool = True  # also show input, mask and output side by side
    num_inference_steps: int = 50  # sampling steps
    scheduler: Literal["ddpm", "ddim", "unipc", "dpmpp_2m", "euler_a"] = "ddpm"  # 20 steps do for the others
    seed: int = 42  # the same seed gives the same picture
    prompt: str = ""  # what the hole should hold
    negative_prompt: str = ""  # what guidance leads away from
    guidance_scale: float = 7.5  # above 1 follows the prompt more, in twice the time
    control_scale: float = 1.0  # weight of the ControlNet
    strength: float = 1.0  # below 1 starts from what is in the hole, noised by so much
    mask_blur: int = 4  # pixels around the hole over which old and new blend; all others stay as they are
    grow_mask: int = 0  # pixels by which the hole is made larger first
    only_masked_padding: int = -1  # 0 or more: work on the hole and so many pixels around it
    resolution: int = 512  # then the shorter side is scaled up to that many pixels
    color_fix: bool = True  # move the colours of the filling to those around it
    precision: Literal["32", "16", "bf16"] = "32"  # of the computation; 32 is exact

    LESS_MEMORY = "--precision 16, or --only_masked_padding 32"

    def result_name(self, name: Path) -> Path:
        return super().result_name(name if self.input.is_dir() else name.with_name("inpainted"))

    def comparison_path(self, target: Path) -> Path:
        return super().comparison_path(target) if self.input.is_dir() else target.with_name("comparison.png")

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        mask = np.repeat(255 * self.mask_of(path, image)[..., None], 3, axis=2)
        return side_by_side([image, mask, restored[..., :3]])

    def restorer(self) -> Restorer:
        from cldm.inpaint import Inpainting, inpaint_image
        from cldm.model import open_control_model
        from ldm.data.inpaint import find_mask

        for source, _ in list_jobs(self):  # one that is missing is found before hours are spent
            find_mask(self.input_mask, self.name_of(source))
        device = self.torch_device()
        model = open_control_model(self.checkpoint_path, self.base_path, self.config_path).to(device)
        half = half_dtype(self.precision)
        names = [field.name for field in fields(Inpainting) if hasattr(self, field.name)]

        def restore(image: np.ndarray, path: Path) -> np.ndarray:
            options = {name: getattr(self, name) for name in names}
            options = Inpainting(**options, steps=self.num_inference_steps, method=self.scheduler)
            mask, rgba = self.mask_of(path, image), read_rgba(path)
            image = image if rgba is None else rgba
            with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
                return inpaint_image(model, image, mask, options, self.progress)

        return restore

    def name_of(self, path: Path) -> Path:
        """A picture's path below the input folder."""
        return path.relative_to(self.input) if self.input.is_dir() else Path(path.name)

    def mask_of(self, path: Path, image: np.ndarray) -> np.ndarray:
        """The mask of a picture: uint8 (h, w), 1 in the hole."""
        from ldm.data.inpaint import find_mask, read_mask, resize_mask

        found = find_mask(self.input_mask, self.name_of(path))
        return resize_mask(read_mask(found), image.shape[:2], found)


@dataclass(kw_only=True)
class DBGAN(OnePass):
    """Deblur with a DBGAN of train_dbgan.py (docs/dbgan.md)."""

    checkpoint_path: Path  # dbgan.safetensors of a run, or its last.ckpt or best.ckpt
    output_prefix: str = "deblurred_"  # before the names of the results

    def restorer(self) -> Restorer:
        from train_dbgan import load_generator, restore_image

        network = load_generator(self.checkpoint_path, "deblur").to(self.torch_device())
        return lambda image, path: restore_image(network, image, **self.how())


@dataclass(kw_only=True)
class BGAN(OnePass):
    """Make realistic blur from sharp photographs with a BGAN of train_dbgan.py (docs/dbgan.md)."""

    checkpoint_path: Path  # bgan.safetensors of a run, or its last.ckpt or best.ckpt
    output_prefix: str = "blurred_"  # before the names of the results
    seed: int = 0  # with the file's name it decides on the blur

    def restorer(self) -> Restorer:
        from train_dbgan import blur_image, load_generator

        network = load_generator(self.checkpoint_path, "blur").to(self.torch_device())

        def blur(image: np.ndarray, path: Path) -> np.ndarray:
            seed = item_seed(self.seed, crc32(path.name.encode()))
            return blur_image(network, image, seed, **self.how())

        return blur


COMMANDS = {
    "deblur": Deblur,
    "srn": SRN,
    "kontext": Kontext,
    "dbgan": DBGAN,
    "bgan": BGAN,
    "inpaint": Inpaint,
}


def is_result(path: Path, files: Files) -> bool:
    """Whether a picture below the input folder was written by an earlier call."""
    folder = files.output_dir.resolve()
    if folder == files.input.resolve():
        return bool(files.output_prefix) and path.name.startswith(files.output_prefix)
    return not {folder, folder.with_name(f"{folder.name}_comparison")}.isdisjoint(path.resolve().parents)


def list_jobs(files: Files) -> list[tuple[Path, Path]]:
    """Sources and their targets. Raises ValueError if two sources have one target or a target is a source."""
    if files.input.is_dir():
        sources = [path for path in list_images(files.input) if not is_result(path, files)]
        if files.pattern != Files.pattern:
            try:
                wanted = set(files.input.glob(files.pattern))
            except NotImplementedError as error:
                raise ValueError(f"--pattern is relative to --input, not {files.pattern}") from error
            sources = [path for path in sources if path in wanted]
        names = [path.relative_to(files.input) for path in sources]
    elif files.input.is_file() and files.input.suffix.lower() in EXTENSIONS:
        sources, names = [files.input], [Path(files.input.name)]
    else:
        raise FileNotFoundError(f"no picture and no folder: {files.input}")
    targets = [files.output_dir / files.result_name(name) for name in names]
    if not sources:
        raise FileNotFoundError(f"no picture in {files.input} matches {files.pattern}, results left out")
    jobs = list(zip(sources, targets, strict=True))
    check_targets(jobs)
    return jobs


def check_targets(jobs: list[tuple[Path, Path]]) -> None:
    """Raise ValueError if the result of a picture would overwrite a picture or another result."""
    sources = {source.resolve() for source, _ in jobs}
    makers: dict[Path, Path] = {}
    for source, target in jobs:
        place = target.resolve()
        if place in sources:
            raise ValueError(
                f"the result of {source} would overwrite {target}: "
                "give another --output_dir or --output_prefix"
            )
        if place in makers:
            raise ValueError(
                f"{makers[place]} and {source} would both become {target}: rename one, or choose by --pattern"
            )
        makers[place] = source


def restore_files(files: Files) -> None:
    """Restore every picture that has no result yet; a broken one is named in the end and stops no other."""
    jobs = list_jobs(files)
    todo = [(source, target) for source, target in jobs if files.overwrite or not target.exists()]
    there = next(folder for folder in (files.output_dir, *files.output_dir.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):  # found before a large model is loaded
        raise ValueError(f"--output_dir {files.output_dir}: {there} is no folder that can be written to")
    restore = files.restorer() if todo or files.profile else None
    failures = []
    for source, target in (progress := tqdm(todo, "restoring", unit="image")):
        progress.set_postfix_str(source.name)
        failures += restore_one(files, restore, source, target)
    print(f"{len(todo) - len(failures)} restored, {len(jobs) - len(todo)} existed: {files.output_dir}")
    made = next(((source, target) for source, target in jobs if target.exists()), None)
    if files.profile and made:
        profile = profile_one(files, restore, *made)
        print("\n".join([*cost_lines(profile), *weights_lines(profile["checkpoint"])]))
    if failures:
        raise ValueError(f"{len(failures)} of {len(todo)} could not be restored: {'; '.join(failures[:3])}")


def restore_one(files: Files, restore: Restorer, source: Path, target: Path) -> list[str]:
    """Restore a picture and write the result; what is wrong if it cannot be read or is too large."""
    try:
        image = read_image(source)
    except (ValueError, FileNotFoundError) as error:  # the second of a link that leads nowhere
        return [str(error)]
    try:
        restored = restore(image, source)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        size = f"{image.shape[1]} x {image.shape[0]} pixels"
        return [f"{source}: {size} need more memory than the device has, give {files.LESS_MEMORY}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    if files.comparison:
        beside = files.comparison_path(target)
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_image(beside, files.compare(image, restored, source))
    write_image(target, restored)
    return []


def profile_one(files: Files, restore: Restorer, source: Path, target: Path) -> dict:
    """Measure the restoration of one picture again, and keep what was found beside the results.

    Raises ValueError if `target` is not what the present options and weights make of `source`.
    """
    image = read_image(source)
    again = restore(image, source)
    there = read_image(target) if again.shape[2] == 3 else read_rgba(target)
    if there is None or there.shape != again.shape or np.abs(there.astype(float) - again).mean() > 1:
        raise ValueError(f"{target} was made with other options or weights: --overwrite makes it anew")
    about = {"picture": str(source), "size": image.shape[1::-1], "options": plain(files)}
    profile = about | measure(lambda: restore(image, source), files.torch_device())
    profile["checkpoint"] = checkpoint.describe(files.weights())
    write_profile(files.output_dir / PROFILE, profile)
    return profile


if __name__ == "__main__":
    run_main(restore_files, COMMANDS)
