"""Restore images of any size with any of the systems here, one subcommand each.

    python infer.py --input photo.jpg                                   # with the best weights in models/
    python infer.py srn --input photo.jpg                               # with SRN's weights in models/
    python infer.py --checkpoint_path FILE --input photo.jpg            # the file says which system it is of
    python infer.py deblur --input photo.jpg --output_dir restored --checkpoint_path best.ckpt
    python infer.py srn --input FOLDER --output_dir restored --checkpoint_path models/my.safetensors
    python infer.py dbgan --input photo.jpg --output_dir restored --checkpoint_path dbgan.safetensors
    python infer.py bgan --input sharp.jpg --output_dir blurred --checkpoint_path bgan.safetensors
    python infer.py network --input photo.jpg --output_dir restored --checkpoint_path NAFNet-SIDD-width32.pth
    python infer.py kontext --input photo.jpg --output_dir restored --lora_path outputs/kontext_lora
    python infer.py inpaint --input_image photo.jpg --input_mask mask.png --output_dir filled
        --checkpoint_path outputs/RUN/final_model/model.ckpt

Results have the names of their sources and say in their EXIF what they were made from. In a folder, results
of the same image, weights and options are not made again. `python infer.py srn --help` lists the options.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from zlib import crc32

import numpy as np
import torch
import tyro
from tqdm import tqdm

from harness.flags import Count, Fraction, Range, Whole
from harness.jobs import Command, Restorer, restore_files, show_steps
from harness.settings import as_flag, run_main
from ldm import checkpoint
from ldm.alignment import measure_movement, undo_movement
from ldm.checkpoint import repository_path
from ldm.data.image import side_by_side
from ldm.data.stream import item_seed
from ldm.models.diffusion.samplers import METHODS
from ldm.util import autocast, half_dtype, settle_precision

Precision = Literal["auto", "32", "16", "bf16"]
Sampler = Literal[*METHODS]


def facts_of(path: Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file, such as the `sampling_steps` that suit it, whether it
    `keeps_colors`, and the `image_size` it was trained on; {} for other files.

    A damaged file also gives {}; it raises an error when it is loaded.
    """
    try:
        return checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}
    except ValueError:
        return {}


def number_in(path: Path, fact: str, otherwise: int) -> int:
    """Read the integer `fact` from the metadata of a file; return `otherwise` if it is not there."""
    text = facts_of(path).get(fact, "")
    return int(text) if text.isdecimal() else otherwise


def small_file(name: str) -> Path:
    """Find a small model that is included in the repository. Raises FileNotFoundError if it is not there."""
    path = repository_path(f"models/small_{name}.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the small model that is used without --checkpoint_path: give your own file"
        )
    return path


# ---- networks that restore an image in one pass ------------------------------------------------------------


@dataclass(kw_only=True)
class OnePass(Command):
    """Options of networks that restore an image in one pass."""

    tile: Whole = 1536  # largest tile side in pixels, for images that are larger; 0 restores in one piece
    overlap: Whole = 128  # pixels over which neighbouring tiles are blended
    precision: Precision = "auto"  # precision of the computation; auto: bf16 where the device has it, else 32

    DEEP = True
    LESS_MEMORY = "give a --tile of 768 or less"

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
        """Move a network to its device, in the layout that convolutions are fastest in."""
        return network.to(self.torch_device(), memory_format=torch.channels_last)

    def tiling(self) -> dict[str, Any]:
        """Return these options as ldm.tiling.restore_photo takes them."""
        return {"precision": self.precision, "tile": self.tile, "overlap": self.overlap}


@dataclass(kw_only=True)
class SRN(OnePass):
    """Deblur with SRN-DeblurNet of train_srn.py (docs/srn.md)."""

    # weights file of train_srn.py, or a .ckpt or .pth with the same keys
    checkpoint_path: Path = Path("models/srn_deblur.safetensors")
    output_prefix: str = "deblurred_"  # text before the names of the results
    self_ensemble: bool = False  # mean over 8 flips and rotations: slightly better, 8 times slower

    def restorer(self) -> Restorer:
        from train_srn import load_network, restore_image

        if not self.checkpoint_path.is_file():
            raise FileNotFoundError(
                f"checkpoint not found: {self.checkpoint_path}; train_srn.py makes one (--demo a small one): "
                "give its srn_deblur.safetensors as --checkpoint_path"
            )
        network = self.place(load_network(self.checkpoint_path))

        def restore(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            return restore_image(network, image, self.self_ensemble, progress=progress, **self.tiling())

        return restore


@dataclass(kw_only=True)
class DBGAN(OnePass):
    """Deblur with a DBGAN of train_dbgan.py (docs/dbgan.md)."""

    # weights file of a run: dbgan.safetensors, last.ckpt or best.ckpt
    checkpoint_path: Path = Path("models/dbgan.safetensors")
    output_prefix: str = "deblurred_"  # text before the names of the results

    def restorer(self) -> Restorer:
        from train_dbgan import load_generator, restore_image

        network = self.place(load_generator(self.checkpoint_path, "deblur"))

        def restore(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            return restore_image(network, image, progress=progress, **self.tiling())

        return restore


@dataclass(kw_only=True)
class BGAN(OnePass):
    """Make realistic blur from sharp photos with a BGAN of train_dbgan.py (docs/dbgan.md)."""

    # weights file of a run: bgan.safetensors, last.ckpt or best.ckpt
    checkpoint_path: Path = Path("models/bgan.safetensors")
    output_prefix: str = "blurred_"  # text before the names of the results
    seed: int = 0  # random seed; the blur depends on it and on the file's name

    def restorer(self) -> Restorer:
        from train_dbgan import blur_image, load_generator

        network = self.place(load_generator(self.checkpoint_path, "blur"))

        def blur(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            seed = item_seed(self.seed, crc32(path.name.encode()))
            return blur_image(network, image, seed, progress=progress, **self.tiling())

        return blur


@dataclass(kw_only=True)
class Network(OnePass):
    """Restore or enlarge with a network of other authors that spandrel recognises (docs/infer.md)."""

    checkpoint_path: Path  # weights file as its authors published it: NAFNet, SwinIR, Real-ESRGAN, ...
    output_prefix: str = "restored_"  # text before the names of the results
    tile: Whole = 512  # largest tile side in pixels of the input; 0 restores in one piece
    overlap: Whole = 64  # pixels of the input over which neighbouring tiles are blended

    LESS_MEMORY = "give a smaller --tile"
    scale = 1  # how many times larger the results of the loaded network are

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        return self.scale * height, self.scale * width

    def restorer(self) -> Restorer:
        from ldm.modules.generators import check_precision, load_foreign, restore_foreign

        network = load_foreign(self.checkpoint_path).to(self.torch_device())
        self.scale = network.scale
        precision = check_precision(network, self.precision)
        print(f"{self.checkpoint_path}: {network.architecture.name}, scale {network.scale}")

        def restore(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            options = {**self.tiling(), "precision": precision}
            return restore_foreign(network, image, progress=progress, **options)

        return restore


# ---- ControlNets on Stable Diffusion -----------------------------------------------------------------------


@dataclass(kw_only=True)
class ControlNet(Command):
    """Options of ControlNets on Stable Diffusion."""

    # our checkpoint, a full ControlNet file, or a ControlNet alone (with --base_path); None: the small model
    checkpoint_path: Path | None = None
    base_path: Path | None = None  # Stable Diffusion file; None takes the one that the checkpoint names
    config_path: Path | None = None  # yaml of the model; None takes the checkpoint's, or one that fits
    num_inference_steps: int | None = None  # number of sampling steps; None: as the file says, else 50
    control_scale: float = 1.0  # strength of the ControlNet, 1 as trained
    negative_prompt: str = ""  # prompt that guidance leads away from
    # keep the colours of the input, or in a hole those around it; off for weights marked keeps_colors
    color_fix: bool = True
    # precision of the computation; auto: bf16 where the device has it, 16 on older GPUs, else 32
    precision: Precision = "auto"

    KIND: ClassVar[str] = ""  # name of the included model: deblur or inpaint

    def settled_precision(self) -> str:
        return settle_precision(self.precision, self.torch_device(), "16")

    def sampling_steps(self) -> int:
        return self.num_inference_steps or number_in(self.weights(), "sampling_steps", 50)

    def options_for(self, kind: type) -> Any:
        """Create a `kind` (Sampling or Inpainting) from the current values of these options."""
        names = [field.name for field in fields(kind) if field.name in vars(self)]
        options = {name: getattr(self, name) for name in names}
        options |= {"steps": self.sampling_steps(), "method": self.scheduler}
        return kind(**options)

    def weights(self) -> Path:
        return self.checkpoint_path or small_file(self.KIND)

    def inputs(self) -> list[Path]:
        from cldm.model import read_control, wanted_base

        path = self.weights()
        base = wanted_base(*read_control(path), path, self.base_path)
        return [path, *(file for file in (base, self.config_path) if file)]

    def open(self) -> torch.nn.Module:
        """Load the model onto its device, in the dtype of the chosen precision."""
        from cldm.restore import open_restorer

        path = self.weights()
        if self.checkpoint_path is None:
            print(
                f"{path}: the small model that is included, to see how this works. The real one is a "
                f"ControlNet on Stable Diffusion: train it (docs/{self.KIND}.md), give --checkpoint_path"
            )
        dtype = half_dtype(self.settled_precision())
        return open_restorer(path, self.base_path, self.config_path, self.torch_device(), dtype)


@dataclass(kw_only=True)
class Deblur(ControlNet):
    """Deblur with a ControlNet of tutorial_train_deblur.py on Stable Diffusion (docs/deblur.md)."""

    scheduler: Sampler = "ddim"  # sampling algorithm; ddim and ddpm need 50 steps, the others 20
    guidance_scale: float = 1.0  # guidance scale; above 1 follows the prompt more, in twice the time
    strength: Fraction = 1.0  # noise level to start from; below 1 starts from the blurry image
    self_ensemble: bool = False  # mean over 8 flips and rotations: truer, less texture, 8 times slower
    seed: int = 0  # random seed; the same seed gives the same image
    prompt: str | None = None  # text that describes the image; None takes the training prompt
    tile: Whole = 0  # tile side in pixels for large images (768, say); 0 restores in one piece
    overlap: Whole = 128  # pixels over which neighbouring tiles are blended

    KIND = "deblur"
    LESS_MEMORY = "give a --tile of 768 or less"

    def restorer(self) -> Restorer:
        from cldm.restore import Sampling, deblur_image

        model = self.open()

        def restore(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            sampling = self.options_for(Sampling)
            if "keeps_colors" in facts_of(self.weights()):
                sampling.color_fix = False
            if self.prompt is None:
                sampling.prompt = model.prompt.replace("{blur_type}", "blur")
            with autocast(model):
                return deblur_image(model, image, sampling, progress)

        return restore


@dataclass(kw_only=True)
class Inpaint(ControlNet):
    """Fill holes with a ControlNet of tutorial_train_inpaint.py, or without a model (docs/inpaint.md).

    For one image the result is inpainted.png, with comparison.png beside it: input, mask, output.
    """

    # image to fill, or a folder with all images below it
    input: Annotated[Path, tyro.conf.arg(name="input_image", aliases=["--input"])]
    # mask that is white where to fill: one for all images, or a folder of NAME_mask or NAME
    input_mask: Path | None = None
    # method of filling: diffusion with the ControlNet, or one without a model, for scratches
    method: Literal["diffusion", "telea", "biharmonic"] = "diffusion"
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)  # pixels to add at left, top, right and bottom
    comparison: bool = True  # also show input, mask and output side by side
    scheduler: Sampler = "ddpm"  # sampling algorithm; ddim and ddpm need 50 steps, the others 20
    seed: int = 42  # random seed; the same seed gives the same image
    prompt: str = ""  # text that describes what the hole should hold
    guidance_scale: float = 7.5  # guidance scale; above 1 follows the prompt more, in twice the time
    strength: Fraction = 1.0  # noise level to start from; below 1 starts from what is in the hole
    mask_blur: Whole = 4  # pixels around the hole over which old and new are blended
    grow_mask: Whole = 0  # pixels by which the hole is made larger first
    # pixels around each hole that are worked on, hole by hole; -1 works on the whole image
    only_masked_padding: Annotated[int, Range(-1)] = -1
    resolution: Count = 512  # regions cut with padding are scaled up to about N x N pixels

    KIND = "inpaint"
    LESS_MEMORY = "give --precision 16, or --only_masked_padding 32; instead of --method biharmonic telea"
    SEES_ALPHA = True
    PANELS = 3
    # Options that are not read without a model.
    OF_A_MODEL: ClassVar[str] = (
        "checkpoint_path base_path config_path num_inference_steps control_scale negative_prompt color_fix "
        "precision scheduler seed prompt guidance_scale strength mask_blur only_masked_padding resolution "
        "device"
    )
    MARGIN: ClassVar[int] = 16  # pixels around a hole on which Telea's result depends

    def photographs(self, paths: list[Path]) -> list[Path]:
        from ldm.data.masks import without_masks

        return without_masks(paths, self.input, self.input_mask)

    def check(self) -> None:
        from ldm.data.masks import MaskFolder, read_mask

        if self.method != "diffusion":
            self.refuse_options_of_a_model()
        if self.input_mask is None and not any(self.outpaint):
            raise ValueError("give --input_mask, an image that is white where to fill, or --outpaint")
        if self.input_mask and not self.input_mask.exists():
            raise FileNotFoundError(f"mask not found: {self.input_mask}")
        if self.input_mask and self.input_mask.is_file():
            read_mask(self.input_mask)
        elif self.input_mask:  # listed once for all images
            folder = self.input if self.input.is_dir() else self.input.parent
            self.masks = MaskFolder(self.input_mask, folder)

    def refuse_options_of_a_model(self) -> None:
        """Raise ValueError that names the model's options that differ from their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        values = {name: getattr(self, name) for name in self.OF_A_MODEL.split()}
        unread = [as_flag(name, value) for name, value in values.items() if value != defaults[name]]
        if unread:
            raise ValueError(f"--method {self.method} fills without a model: leave out {', '.join(unread)}")

    def weights(self) -> Path | None:
        return super().weights() if self.method == "diffusion" else None

    def inputs(self) -> list[Path]:
        return super().inputs() if self.method == "diffusion" else []

    def torch_device(self) -> torch.device:
        return super().torch_device() if self.method == "diffusion" else torch.device("cpu")

    def settled_precision(self) -> str:
        return super().settled_precision() if self.method == "diffusion" else "32"

    def inputs_of(self, source: Path) -> list[Path]:
        return [source, self.mask_path(source)] if self.input_mask else [source]

    def mask_path(self, source: Path) -> Path | None:
        """Find the mask of an image. Raises FileNotFoundError if there is none, ValueError for several."""
        if self.input_mask is None or not self.input_mask.is_dir():
            return self.input_mask
        return self.masks.find(source.relative_to(self.input) if self.input.is_dir() else Path(source.name))

    def result_name(self, name: Path) -> Path:
        return super().result_name(name if self.input.is_dir() else name.with_name("inpainted"))

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        left, top, right, bottom = self.outpaint
        return height + top + bottom, width + left + right

    def comparison_path(self, target: Path) -> Path:
        return super().comparison_path(target) if self.input.is_dir() else target.with_stem("comparison")

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        image, mask = self.task(image, path)
        return side_by_side([image, np.repeat(255 * mask[..., None], 3, axis=2), restored])

    def task(self, image: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, padded for outpainting, and its mask: uint8 (h, w), 1 in the hole."""
        from cldm.inpaint import expand
        from ldm.data.masks import read_mask, resize_mask

        mask = np.zeros(image.shape[:2], np.uint8)
        file = self.mask_path(path)
        if file:
            mask = resize_mask(read_mask(file), image.shape[:2], file)
        return expand(image, mask, self.outpaint)

    def restorer(self) -> Restorer:
        from cldm.inpaint import Inpainting, inpaint_image

        if self.method != "diffusion":
            return self.fill_without_model
        model = self.open()

        def restore(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            image, mask = self.task(image, path)
            with autocast(model):
                return inpaint_image(model, image, mask, self.options_for(Inpainting), progress)

        return restore

    def fill_without_model(
        self, image: np.ndarray, path: Path, progress: Callable = show_steps
    ) -> np.ndarray:
        """Fill an image by `method`, hole by hole. Raises ValueError if the whole image is hole."""
        from cldm.inpaint import Inpainting, fill_holes
        from ldm.holes import fill_classically

        def fill(part: np.ndarray, hole: np.ndarray) -> np.ndarray:
            if hole.all():
                raise ValueError(f"all of it is hole: --method {self.method} has nothing to fill it from")
            return fill_classically(part, hole, self.method)

        image, mask = self.task(image, path)
        options = Inpainting(mask_blur=0, grow_mask=self.grow_mask, only_masked_padding=self.MARGIN)
        return fill_holes(image, mask, options, fill)


# ---- Kontext -----------------------------------------------------------------------------------------------

KONTEXT, SMALL_KONTEXT = "models/FLUX.1-Kontext-dev", "models/small_kontext"


@dataclass(kw_only=True)
class Kontext(Command):
    """Restore with FLUX.1 Kontext and a LoRA of train_kontext_lora.py (docs/kontext.md)."""

    # model folder; None takes models/FLUX.1-Kontext-dev, or the small model if that is missing
    pretrained_model_name_or_path: Path | None = None
    lora_path: Path | None = None  # LoRA file, or the folder of a run; None uses the model as it is
    lora_scale: float = 1.0  # strength of the LoRA, 1 as trained
    prompt: str = ""  # instruction to the model; empty takes the one that the LoRA was trained with
    num_inference_steps: int | None = None  # number of sampling steps; None: as the file says, else 30
    guidance_scale: float = 2.5  # guidance scale: how much the prompt counts
    # larger images are restored at this size squared, then scaled back; None: as the file says, else 1024
    resolution: int | None = None
    seed: int = 0  # random seed; the same seed gives the same image
    # tile side in pixels for larger images (1024, say); 0 shrinks them; None: as the file says, else 0
    tile: int | None = None
    overlap: Whole = 128  # pixels over which tiles are blended, at most half a tile
    align: bool = False  # undo a small shift or zoom of the result against its input
    base_precision: Literal["bf16", "fp8"] = "bf16"  # storage of the transformer; fp8 halves its memory
    blocks_to_swap: Whole = 0  # number of blocks offloaded to CPU memory: less GPU memory, slower

    LESS_MEMORY = "give a smaller --resolution or --tile, or --blocks_to_swap"

    def weights(self) -> Path:
        from ldm.modules.lora import lora_file

        lora = self.files()[1]
        return lora_file(lora) if lora else self.transformer()

    def files(self) -> tuple[Path, Path | None]:
        """Return the model folder, and the LoRA or None; the small model has its own LoRA."""
        folder, lora = self.pretrained_model_name_or_path, self.lora_path
        if folder is None:
            folder, small = repository_path(KONTEXT), repository_path(SMALL_KONTEXT)
            if small.exists() and not folder.exists():
                return small, lora or small_file("kontext_lora")
        return folder, lora

    def transformer(self) -> Path:
        """Return the transformer's file, or its folder in diffusers' layout."""
        from ldm.models.kontext import TRANSFORMER, find_network

        return find_network(self.files()[0], TRANSFORMER)

    def inputs(self) -> list[Path]:
        return [self.weights(), self.transformer()]

    def sampling_steps(self) -> int:
        return self.num_inference_steps or number_in(self.transformer(), "sampling_steps", 30)

    def settled_precision(self) -> str:
        return "bf16" if self.torch_device().type == "cuda" else "32"

    def restorer(self) -> Restorer:
        from ldm.models.kontext import load_restorer

        folder, lora = self.files()
        if self.pretrained_model_name_or_path is None and folder == repository_path(SMALL_KONTEXT):
            print(f"{folder}: the included small model; the real one is {KONTEXT} (docs/kontext.md)")
        restore = load_restorer(
            folder,
            lora,
            self.prompt,
            prompt_cache=self.output_dir / ".prompt.safetensors",
            lora_scale=self.lora_scale,
            device=self.torch_device(),
            fp8=self.base_precision == "fp8",
            blocks_to_swap=self.blocks_to_swap,
        )

        def run(image: np.ndarray, path: Path, progress: Callable = show_steps) -> np.ndarray:
            restored = restore(image, progress=progress, **self.work())
            moved = measure_movement(restored, image)
            undo = self.align and moved.is_known
            tqdm.write(f"{path.name}: {moved}{', undone' if undo else ''}")
            return undo_movement(restored, image, moved) if undo else restored

        return run

    def work(self) -> dict[str, Any]:
        """Return the current options as arguments of ldm.models.diffusion.flow.restore_image."""
        file = self.transformer()
        tile = number_in(file, "image_size", 0) if self.tile is None else self.tile
        return {
            "steps": self.sampling_steps(),
            "guidance": self.guidance_scale,
            "resolution": self.resolution or number_in(file, "image_size", 1024),
            "seed": self.seed,
            "tile": tile,
            "overlap": min(self.overlap, tile // 2) if tile else self.overlap,
        }


COMMANDS = {
    "deblur": Deblur,
    "srn": SRN,
    "kontext": Kontext,
    "dbgan": DBGAN,
    "bgan": BGAN,
    "network": Network,
    "inpaint": Inpaint,
}
BEST = "dbgan"  # its included weights remove the most real motion blur: docs/weights.md


# ---- a command line without a subcommand -------------------------------------------------------------------


def system_of(path: Path) -> str:
    """Return the subcommand for a file or folder of weights, recognised by its keys and metadata.

    A file of no known system is for `network`. Raises FileNotFoundError, or ValueError for a folder of no
    known system.
    """
    from ldm.models.kontext import TRANSFORMER, find_network
    from ldm.modules.generators import authors_form
    from ldm.modules.lora import LORA_FILE

    if path.is_dir():
        if (path / LORA_FILE).is_file() or find_network(path, TRANSFORMER).exists():
            return "kontext"
        raise ValueError(f"{path} is a folder without {LORA_FILE}: give a file, say checkpoints/best.ckpt")
    weights, content = checkpoint.read_trained(path)
    shapes = {name.removeprefix("module."): value.shape for name, value in weights.items()}
    begins = {name.partition(".")[0] for name in shapes}
    for prefix, command in (("inblock", "srn"), ("deblur", "dbgan"), ("blur", "bgan")):
        if prefix in begins:
            return command
    if begins & {"control_model", "zero_convs", "input_hint_block"}:
        target = content.get("config", {}).get("target", "")
        inpaints = "inpaint" in f"{target} {path.name}".lower() or "mask_ratio" in content["settings"]
        return "inpaint" if inpaints else "deblur"
    if any(".lora_" in name or name.startswith("lora_") for name in weights):
        return "kontext"
    return "dbgan" if authors_form(shapes) else "network"


def with_subcommand(words: list[str]) -> list[str]:
    """Add a missing subcommand to a command line, by options such as --checkpoint_path and --input_mask.

    With --input alone it is BEST, whose included weights restore real photos best. Raises ValueError if no
    option decides.
    """
    if not words or words[0] in COMMANDS or {"-h", "--help"} & {*words}:
        return words
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = [word.replace("-", "_").replace("__", "--", 1) for word in words]
    if "--input_mask" in options or "--outpaint" in options:
        return ["inpaint", *words]
    if "--lora_path" in options or "--pretrained_model_name_or_path" in options:
        return ["kontext", *words]
    if "--checkpoint_path" in options[:-1]:
        at = options.index("--checkpoint_path")
        path = repository_path(words[at + 1])
        command = system_of(path)
        if command == "kontext":
            from ldm.models.kontext import TRANSFORMER, find_network

            is_model = find_network(path, TRANSFORMER).exists()
            words[at] = "--pretrained_model_name_or_path" if is_model else "--lora_path"
        return [command, *words]
    if "--input" in options:
        print(f"no subcommand given: restoring with {BEST} and its included weights")
        return [BEST, *words]
    raise ValueError(f"give --input, or one of {', '.join(COMMANDS)} first")


if __name__ == "__main__":
    run_main(restore_files, COMMANDS, complete=with_subcommand)
