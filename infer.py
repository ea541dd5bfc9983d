"""Restore pictures of any size with any of the systems here, one subcommand each.

    python infer.py --input photo.jpg                                   # with the best weights in models/
    python infer.py srn --input photo.jpg                               # with SRN's weights in models/
    python infer.py --checkpoint_path FILE --input photo.jpg            # the file says which system it is of
    python infer.py deblur --input photo.jpg --output_dir restored --checkpoint_path best.ckpt
    python infer.py srn --input FOLDER --output_dir restored --checkpoint_path models/my.safetensors
    python infer.py dbgan --input photo.jpg --output_dir restored --checkpoint_path dbgan.safetensors
    python infer.py bgan --input sharp.jpg --output_dir blurred --checkpoint_path bgan.safetensors
    python infer.py kontext --input photo.jpg --output_dir restored --lora_path outputs/kontext_lora
    python infer.py inpaint --input_image photo.jpg --input_mask mask.png --output_dir filled
        --checkpoint_path outputs/RUN/final_model/model.ckpt

Results have the names of their sources and say in their EXIF what they were made from. In a folder those of
the same picture, weights and options are not made again. `--profile` also measures what one picture costs,
for evaluate.py.
`python infer.py srn --help` lists the options.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from zlib import crc32

import numpy as np
import torch
import tyro

from harness.jobs import Files, Job, Restorer, restore_files
from harness.settings import run_main
from ldm import checkpoint
from ldm.checkpoint import repository_path
from ldm.data.image import read_rgba, side_by_side
from ldm.data.picture import identity
from ldm.data.stream import item_seed
from ldm.models.diffusion.samplers import METHODS
from ldm.util import autocast, half_dtype, settle_precision

Precision = Literal["auto", "32", "16", "bf16"]
Sampler = Literal[*METHODS]


@dataclass(kw_only=True)
class ControlNet(Files):
    """Options of ControlNets on Stable Diffusion."""

    # ours, a full ControlNet file, or a ControlNet alone (then give --base_path); None takes the small one
    checkpoint_path: Path | None = None
    base_path: Path | None = None  # Stable Diffusion file; None takes the one the checkpoint names
    config_path: Path | None = None  # yaml of the model; None takes the checkpoint's, or one that fits
    num_inference_steps: int | None = None  # sampling steps; None: as the file says, else 50
    control_scale: float = 1.0  # weight of the ControlNet
    negative_prompt: str = ""  # what guidance leads away from
    # keep the colours of the input, in a hole those around it; not for files that say that they keep them
    color_fix: bool = True
    # precision of the computation; auto: bf16 where the device computes in it, 16 on older GPUs, else 32
    precision: Precision = "auto"

    KIND: ClassVar[str] = ""  # of the included model's file

    def settled_precision(self) -> str:
        return settle_precision(self.precision, self.torch_device(), "16")

    def sampling_steps(self) -> int:
        """Sampling steps, by default those that suit the file."""
        return self.num_inference_steps or number_in(self.weights(), "sampling_steps", 50)

    def as_now(self, kind: type) -> Any:
        """`kind` (Sampling or Inpainting) with these options as they are now."""
        names = [field.name for field in fields(kind) if field.name in vars(self)]
        options = {name: getattr(self, name) for name in names}
        return kind(**options, steps=self.sampling_steps(), method=self.scheduler)

    def weights(self) -> Path:
        return self.checkpoint_path or small_file(self.KIND)

    def made_from(self, source: Path) -> list[Path]:
        path = self.weights()
        wanted = base_of(path, self.base_path, identity(path))
        return [source, path, *(file for file in (wanted, self.config_path) if file)]

    def open(self) -> torch.nn.Module:
        """The model on its device, in the type of the computation."""
        from cldm.restore import open_restorer

        path = self.weights()
        if self.checkpoint_path is None:
            print(
                f"{path}: the small model that is included, to see how this works. The real one is a "
                f"ControlNet on Stable Diffusion: train it (docs/{self.KIND}.md), give --checkpoint_path"
            )
        dtype = half_dtype(self.settled_precision())
        return open_restorer(path, self.base_path, self.config_path, self.torch_device(), dtype)


def facts_of(path: Path) -> dict[str, str]:
    """What the metadata of a .safetensors file say about it: the `sampling_steps` that suit it, whether it
    `keeps_colors`, the `image_size` it was trained on; {} for other files.

    One that cannot be read fails when it is loaded.
    """
    try:
        return checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}
    except ValueError:
        return {}


def number_in(path: Path, fact: str, otherwise: int) -> int:
    """A whole number among the facts of a file, `otherwise` if it is not there."""
    text = facts_of(path).get(fact, "")
    return int(text) if text.isdecimal() else otherwise


def small_file(name: str) -> Path:
    """A small model that comes with the project. Raises FileNotFoundError if it is not there."""
    path = repository_path(f"models/small_{name}.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the small model that is taken without --checkpoint_path: give your own file"
        )
    return path


@lru_cache(maxsize=8)
def base_of(path: Path, base: Path | None, content: str) -> Path | None:
    """cldm.model.wanted_base of a file, which is read once for each `content` (ldm.data.picture.identity):
    another may come under its name."""
    from cldm.model import read_control, wanted_base

    return wanted_base(*read_control(path), path, base)


@dataclass(kw_only=True)
class Deblur(ControlNet):
    """Deblur with a ControlNet of tutorial_train_deblur.py on Stable Diffusion (docs/deblur.md)."""

    scheduler: Sampler = "ddim"  # 20 steps do for the others
    guidance_scale: float = 1.0  # above 1 follows the prompt more, in twice the time
    strength: float = 1.0  # below 1 starts from the blurry picture, noised by so much
    fidelity: float = 0.0  # 0 to 1: how far every step is drawn towards the coarse of the input
    self_ensemble: bool = False  # mean over the 8 flips and turns: truer, less texture, 8 times slower
    cleaner: Path | None = None  # weights of SRN or DBGAN, whose result is restored instead of the input
    seed: int = 0  # the same seed gives the same picture
    prompt: str | None = None  # None takes the one of the training
    tile: int = 0  # large pictures go through in tiles of so many pixels at most (768, say); 0 = in one piece
    overlap: int = 128  # pixels over which the tiles are blended

    KIND = "deblur"

    def made_from(self, source: Path) -> list[Path]:
        return super().made_from(source) + ([self.cleaner] if self.cleaner else [])

    def restorer(self) -> Restorer:
        from cldm.restore import Sampling, deblur_image

        model = self.open()
        clean = self.open_cleaner() if self.cleaner else lambda image, path: image

        def restore(image: np.ndarray, path: Path) -> np.ndarray:
            sampling = self.as_now(Sampling)
            sampling.color_fix &= "keeps_colors" not in facts_of(self.weights())
            if self.prompt is None:
                sampling.prompt = model.prompt.replace("{blur_type}", "blur")
            with autocast(model):
                return deblur_image(model, clean(image, path), sampling, self.progress)

        return restore

    def open_cleaner(self) -> Restorer:
        """The network of --cleaner. Raises ValueError if it is of another system."""
        command = {"srn": SRN, "dbgan": DBGAN}.get(kind := system_of(self.cleaner))
        if command is None:
            raise ValueError(f"--cleaner takes weights of SRN or DBGAN, {self.cleaner} is of {kind}")
        return command(input=self.input, checkpoint_path=self.cleaner, device=self.device).restorer()


@dataclass(kw_only=True)
class OnePass(Files):
    """Options of networks that make a picture in one pass."""

    tile: int = 1536  # larger pictures go through in equal tiles of at most that size; 0 = in one piece
    overlap: int = 128  # pixels over which the tiles are blended
    precision: Precision = "auto"  # of the computation; auto: bf16 where there is it, else 32: exact

    DEEP = True

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
        """A network on its device, in the layout that convolutions are fastest in."""
        return network.to(self.torch_device(), memory_format=torch.channels_last)

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
        network = self.place(load_network(self.checkpoint_path))
        return lambda image, path: restore_image(network, image, self.self_ensemble, **self.how())


KONTEXT = "models/FLUX.1-Kontext-dev", "models/small_kontext"  # the real one, the small one


@dataclass(kw_only=True)
class Kontext(Files):
    """Restore with FLUX.1 Kontext and a LoRA of train_kontext_lora.py (docs/kontext.md)."""

    # the model folder; None takes models/FLUX.1-Kontext-dev, or the small model where that is not
    pretrained_model_name_or_path: Path | None = None
    lora_path: Path | None = None  # a file, or the folder of a run; without it the model as it is
    lora_scale: float = 1.0  # strength of the LoRA
    prompt: str = ""  # empty: the one that the LoRA was trained with
    num_inference_steps: int | None = None  # sampling steps; None: as the file says, else 30
    guidance_scale: float = 2.5  # how much the prompt counts
    # larger pictures are restored at that many pixels squared, and scaled back; None: as the file says, else
    # 1024
    resolution: int | None = None
    seed: int = 0  # the same seed gives the same picture
    # pixels of the squares that larger pictures go through in (1024, say); 0 = shrunk; None: as the file
    # says, else 0
    tile: int | None = None
    overlap: int = 128  # pixels over which the squares are blended, at most half of one
    # storage of the transformer; fp8 halves it, nf4 halves that (bitsandbytes)
    base_precision: Literal["bf16", "fp8", "nf4"] = "bf16"
    blocks_to_swap: int = 0  # the last so many blocks wait in CPU memory: less of the GPU's, slower

    LESS_MEMORY = "a smaller --resolution or --tile, or --blocks_to_swap"

    def weights(self) -> Path:
        from ldm.models.kontext import TRANSFORMER
        from ldm.modules.lora import lora_file

        folder, lora = self.files()
        return lora_file(lora or folder / TRANSFORMER)

    def files(self) -> tuple[Path, Path | None]:
        """The model folder, and the LoRA's file if there is one: the small model has its own."""
        folder, lora = self.pretrained_model_name_or_path, self.lora_path
        if folder is None:
            real, included = (repository_path(name) for name in KONTEXT)
            small = included.exists() and not real.exists()
            folder = included if small else real
            lora = small_file("kontext_lora") if small and lora is None else lora
        return folder, lora

    def made_from(self, source: Path) -> list[Path]:
        from ldm.models.kontext import TRANSFORMER

        return [*super().made_from(source), self.files()[0] / TRANSFORMER]

    def settled_precision(self) -> str:
        return "bf16" if self.torch_device().type == "cuda" else "32"

    def restorer(self) -> Restorer:
        from ldm.models.kontext import load_restorer

        folder, lora = self.files()
        if self.pretrained_model_name_or_path is None and folder == repository_path(KONTEXT[1]):
            print(f"{folder}: the included small model; the real one is {KONTEXT[0]} (docs/kontext.md)")
        restore = load_restorer(
            folder,
            lora,
            self.prompt,
            prompt_cache=self.output_dir / ".prompt.safetensors",
            lora_scale=self.lora_scale,
            device=self.torch_device(),
            fp8=self.base_precision == "fp8",
            blocks_to_swap=self.blocks_to_swap,
            nf4=self.base_precision == "nf4",
        )
        return lambda image, path: restore(image, **self.work())

    def work(self) -> dict[str, Any]:
        """These options, as they are now, for ldm.models.diffusion.flow.restore_image."""
        from ldm.models.kontext import TRANSFORMER

        file = self.files()[0] / TRANSFORMER
        steps = self.num_inference_steps or number_in(file, "sampling_steps", 30)
        tile = number_in(file, "image_size", 0) if self.tile is None else self.tile
        resolution = self.resolution or number_in(file, "image_size", 1024)
        overlap = min(self.overlap, tile // 2) if tile else self.overlap
        how = {"guidance": self.guidance_scale, "seed": self.seed, "progress": self.progress}
        return {**how, "steps": steps, "resolution": resolution, "tile": tile, "overlap": overlap}


@dataclass(kw_only=True)
class Inpaint(ControlNet):
    """Fill holes with a ControlNet of tutorial_train_inpaint.py on Stable Diffusion (docs/inpaint.md).

    One picture becomes inpainted.png, and comparison.png beside it: input, mask, output.
    """

    # a picture, or a folder with all below it
    input: Annotated[Path, tyro.conf.arg(name="input_image", aliases=["--input"])]
    input_mask: Path | None = None  # white = fill; one mask for all, or a folder: NAME_mask or NAME
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)  # pixels to add: left, top, right, bottom
    comparison: bool = True  # also show input, mask and output side by side
    scheduler: Sampler = "ddpm"  # 20 steps do for the others
    seed: int = 42  # the same seed gives the same picture
    prompt: str = ""  # what the hole should hold
    guidance_scale: float = 7.5  # above 1 follows the prompt more, in twice the time
    strength: float = 1.0  # below 1 starts from what is in the hole, noised by so much
    mask_blur: int = 4  # pixels around the hole over which old and new blend; all others stay as they are
    grow_mask: int = 0  # pixels by which the hole is made larger first
    only_masked_padding: int = -1  # 0 or more: work on each hole and so many pixels around it
    resolution: int = 512  # then a smaller region is scaled up to that many pixels squared

    KIND = "inpaint"
    LESS_MEMORY = "--precision 16, or --only_masked_padding 32"
    ELSEWHERE = f"{Files.ELSEWHERE} masks"

    def photographs(self, paths: list[Path]) -> list[Path]:
        from ldm.data.masks import without_masks

        return without_masks(paths, self.input, self.input_mask)

    def check(self, jobs: list[Job]) -> None:
        from ldm.data.masks import MaskFolder, read_mask

        super().check(jobs)
        if self.input_mask is None and not any(self.outpaint):
            raise ValueError("give --input_mask, a picture that is white where to fill, or --outpaint")
        if self.input_mask and not self.input_mask.exists():
            raise FileNotFoundError(f"mask not found: {self.input_mask}")
        if self.input_mask and self.input_mask.is_file():
            read_mask(self.input_mask)
        elif self.input_mask:  # listed once for all; one that is missing is found before hours are spent
            folder = self.input if self.input.is_dir() else self.input.parent
            self.masks = MaskFolder(self.input_mask, folder)
            for source, _ in jobs:
                self.mask_path(source)

    def made_from(self, source: Path) -> list[Path]:
        return super().made_from(source) + ([self.mask_path(source)] if self.input_mask else [])

    def mask_path(self, source: Path) -> Path | None:
        """The mask of a picture. Raises FileNotFoundError if a folder has none, ValueError for several."""
        if self.input_mask is None or not self.input_mask.is_dir():
            return self.input_mask
        return self.masks.find(source.relative_to(self.input) if self.input.is_dir() else Path(source.name))

    def result_name(self, name: Path) -> Path:
        return super().result_name(name if self.input.is_dir() else name.with_name("inpainted"))

    def comparison_path(self, target: Path) -> Path:
        single = target.with_stem("comparison")
        return super().comparison_path(target) if self.input.is_dir() else single

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        image, mask = self.task(image, path)
        return side_by_side([image, np.repeat(255 * mask[..., None], 3, axis=2), restored])

    def task(self, image: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The picture, larger where outpainting makes it so, and its mask: uint8 (h, w), 1 in the hole."""
        from cldm.inpaint import expand
        from ldm.data.masks import read_mask, resize_mask

        found = self.mask_path(path)
        mask = np.zeros(image.shape[:2], np.uint8)
        if found:
            mask = resize_mask(read_mask(found), image.shape[:2], found)
        return expand(image, mask, self.outpaint)

    def restorer(self) -> Restorer:
        from cldm.inpaint import Inpainting, inpaint_image

        model = self.open()

        def restore(image: np.ndarray, path: Path) -> np.ndarray:
            rgba = read_rgba(path)
            with autocast(model):
                task = self.task(image if rgba is None else rgba, path)
                return inpaint_image(model, *task, self.as_now(Inpainting), self.progress)

        return restore


@dataclass(kw_only=True)
class DBGAN(OnePass):
    """Deblur with a DBGAN of train_dbgan.py (docs/dbgan.md)."""

    checkpoint_path: Path = Path("models/dbgan.safetensors")  # or a run's, or its last.ckpt or best.ckpt
    output_prefix: str = "deblurred_"  # before the names of the results

    def restorer(self) -> Restorer:
        from train_dbgan import load_generator, restore_image

        network = self.place(load_generator(self.checkpoint_path, "deblur"))
        return lambda image, path: restore_image(network, image, **self.how())


@dataclass(kw_only=True)
class BGAN(OnePass):
    """Make realistic blur from sharp photographs with a BGAN of train_dbgan.py (docs/dbgan.md)."""

    checkpoint_path: Path = Path("models/bgan.safetensors")  # or a run's, or its last.ckpt or best.ckpt
    output_prefix: str = "blurred_"  # before the names of the results
    seed: int = 0  # with the file's name it decides on the blur

    def restorer(self) -> Restorer:
        from train_dbgan import blur_image, load_generator

        network = self.place(load_generator(self.checkpoint_path, "blur"))

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
BEST = "srn"  # its included weights remove the most real motion blur: docs/weights.md


# ---- a command line without a subcommand -------------------------------------------------------------------


def system_of(path: Path) -> str:
    """The subcommand that a file or folder of weights is for, by its keys and what our scripts note in it.

    Raises FileNotFoundError, or ValueError if it is of none.
    """
    from ldm.models.kontext import TRANSFORMER
    from ldm.modules.generators import authors_form
    from ldm.modules.lora import LORA_FILE

    if path.is_dir():
        if (path / LORA_FILE).is_file() or (path / TRANSFORMER).is_file():
            return "kontext"
        raise ValueError(f"{path} is a folder without {LORA_FILE}: give a file, say checkpoints/best.ckpt")
    weights, content = checkpoint.read_trained(path)
    begins = {name.removeprefix("module.").partition(".")[0] for name in weights}
    for prefix, command in (("inblock", "srn"), ("deblur", "dbgan"), ("blur", "bgan")):
        if prefix in begins:
            return command
    if begins & {"control_model", "zero_convs", "input_hint_block"}:
        about = f"{content.get('config', {}).get('target')} {content['settings'].keys()} {path.name}"
        return "inpaint" if "inpaint" in about.lower() or "mask_ratio" in about else "deblur"
    if any(".lora_" in name or name.startswith("lora_") for name in weights):
        return "kontext"
    if authors_form({name.removeprefix("module."): value.shape for name, value in weights.items()}):
        return "dbgan"
    raise ValueError(f"{path} is of none of {', '.join(COMMANDS)}: its first key is {next(iter(weights))}")


def with_subcommand(words: list[str]) -> list[str]:
    """A command line with its subcommand: if there is none --checkpoint_path says it, or --input_mask.

    With --input alone it is the one whose included weights restore real photos best.
    Raises ValueError without any of these.
    """
    if not words or words[0] in COMMANDS or {"-h", "--help"} & {*words}:
        return words
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = [word.replace("-", "_").replace("__", "--", 1) for word in words]
    if {"--input_mask", "--outpaint"} & {*options}:
        return ["inpaint", *words]
    flags = {"--checkpoint_path", "--lora_path", "--pretrained_model_name_or_path"}
    at = next((index for index, word in enumerate(options[:-1]) if word in flags), None)
    if at is None and "--input" in options:
        print(f"no subcommand given: restoring with {BEST} and its included weights")
        return [BEST, *words]
    if at is None:
        raise ValueError(f"give --input, or one of {', '.join(COMMANDS)} first")
    command = system_of(repository_path(words[at + 1])) if options[at] == "--checkpoint_path" else "kontext"
    if command == "kontext" and options[at] == "--checkpoint_path":
        from ldm.models.kontext import TRANSFORMER

        folder = (repository_path(words[at + 1]) / TRANSFORMER).is_file()
        words[at] = "--pretrained_model_name_or_path" if folder else "--lora_path"
    return [command, *words]


if __name__ == "__main__":
    run_main(restore_files, COMMANDS, complete=with_subcommand)
