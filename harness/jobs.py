"""Restore one image or the images of a folder: common options, paths of the results, and the loop."""

import errno
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from harness.flags import Range
from harness.provenance import Provenance
from harness.settings import check_ranges
from ldm import checkpoint
from ldm.data.decode import to_8_bit
from ldm.data.image import list_images, over_white, side_by_side
from ldm.data.photo import Photo, check_fits, read_note, read_photo, resize_to, write_photo
from ldm.data.shards import share_of
from ldm.device import choose_device, describe_start
from ldm.tiling import fill_hidden
from ldm.util import listing, settle_precision

Job = tuple[Path, Path]  # a source and its target
# A loaded network: restore(image, path, progress) takes an image (h, w, 3) and the path it was read from, and
# returns the restored image. Both are uint16 if the file is, the subcommand is DEEP and the result is a PNG,
# else uint8. `progress` wraps the list of steps or tiles, as show_steps does.
Restorer = Callable[..., np.ndarray]
# Errors after which the next image is tried; torch raises its own errors as RuntimeError.
PROBLEMS = (ValueError, OSError, RuntimeError, MemoryError, cv2.error)


@dataclass(kw_only=True)
class Command:
    """Base class of infer.py's subcommands: the common options, and methods that a system may override.

    A system must define `restorer`, and `inputs` if its results depend on more files than `weights`.
    """

    # image to restore, or a folder with all images below it
    input: Annotated[Path, tyro.conf.arg(aliases=["--input_image"])]
    output_dir: Path = Path("outputs/inference")  # folder of the results, which keeps the tree of the input
    output_prefix: str = ""  # text before the names of the results
    pattern: str = "**/*"  # restore only files of a folder that match, such as "*/blur/*"
    shard: str = "1/1"  # i/n restores every n-th image from the i-th on, for n processes on one folder
    format: Literal["png", "jpg", "webp"] = "png"  # file format of the results
    quality: Annotated[int, Range(1, 100)] = 95  # quality of jpg and webp results, 1 to 100
    comparison: bool = False  # also write input and result side by side, to OUTPUT_DIR_comparison
    overwrite: bool = False  # restore all images of a folder again, even unchanged ones
    device: Literal["auto", "cuda", "cpu"] = "auto"  # device that computes; auto: cuda if there is one

    LESS_MEMORY: ClassVar[str] = "make the tiles smaller"  # what helps if an image is too large
    DEEP: ClassVar[bool] = False  # True if 16-bit images stay 16-bit
    SEES_ALPHA: ClassVar[bool] = False  # True if the network takes transparency as a fourth channel
    PANELS: ClassVar[int] = 2  # number of images in a comparison
    # Options that change no pixel of a result.
    ELSEWHERE: ClassVar[str] = "output_prefix pattern shard comparison overwrite device"

    def __post_init__(self) -> None:
        """Find files of models in the repository if they are not in the current folder."""
        for field in fields(self):
            path = getattr(self, field.name)
            if isinstance(path, Path) and field.name not in ("input", "input_mask", "output_dir"):
                setattr(self, field.name, checkpoint.repository_path(path))

    def restorer(self) -> Restorer:
        """Load the network and return it as a Restorer. The Restorer reads the options again for every image,
        so that the web page can change them; options about loading are read only here."""
        raise NotImplementedError

    def weights(self) -> Path | None:
        """Return the file of the trained weights; None if no weights are needed."""
        return self.checkpoint_path

    def inputs(self) -> list[Path]:
        """Return the files, apart from images, that all results depend on."""
        return [self.weights()]

    def inputs_of(self, source: Path) -> list[Path]:
        """Return the images that one result depends on. Raises FileNotFoundError if one cannot be found."""
        return [source]

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for invalid options before anything is loaded."""

    def photographs(self, paths: list[Path]) -> list[Path]:
        """Return the images to restore, without masks; `paths` are all images below the input folder."""
        return paths

    def result_name(self, name: Path) -> Path:
        """Return the path of an image's result, relative to the output folder."""
        return name.with_name(f"{self.output_prefix}{name.stem}.{self.format}")

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the result of an image of this size."""
        return height, width

    def comparison_path(self, target: Path) -> Path:
        """Return the path of a result's comparison image."""
        folder = self.output_dir.with_name(f"{self.output_dir.name}_comparison")
        return folder / target.relative_to(self.output_dir)

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        """Return PANELS images of the result's size side by side; all uint8 (h, w, 3)."""
        return side_by_side([resize_to(image, restored), restored])

    def torch_device(self) -> torch.device:
        return choose_device(self.device)

    def settled_precision(self) -> str:
        """Return the precision of the computation: 32, bf16 or 16."""
        return settle_precision(self.precision, self.torch_device())


# ---- sources and targets -----------------------------------------------------------------------------------


def list_jobs(command: Command) -> tuple[list[Job], dict[Path, str]]:
    """List sources with their targets, and the images that are left out, each with the reason.

    Raises ValueError if two sources have one target, or a target would overwrite a user's file.
    """
    folder, left_out = command.input, {}
    if folder.is_dir():
        sources, left_out = find_sources(command)
        if not sources:
            reasons = "; ".join(summarise(left_out))
            raise FileNotFoundError(f"nothing to restore in {folder}: left out {reasons}")
    elif folder.exists():
        sources, folder = [command.input], command.input.parent
    else:
        raise FileNotFoundError(f"input {folder} does not exist (the current folder is {Path.cwd()})")
    jobs = [(path, command.output_dir / command.result_name(path.relative_to(folder))) for path in sources]
    check_targets(jobs)
    return jobs, left_out


def find_sources(command: Command) -> tuple[list[Path], dict[Path, str]]:
    """Find the images of a folder to restore, and those that are left out, each with the reason."""
    paths = list_images(command.input)
    photographs = set(command.photographs(paths))
    wanted = set(paths)
    if command.pattern != Command.pattern:
        try:
            wanted = set(command.input.glob(command.pattern))
        except NotImplementedError as error:
            raise ValueError(
                f"pattern must be relative to the input folder, not {command.pattern}"
            ) from error
    left_out = {}
    for path in paths:
        if path not in wanted:
            left_out[path] = f"not of the pattern {command.pattern}"
        elif path not in photographs:
            left_out[path] = "a mask"
        elif is_result(path, command):
            left_out[path] = "result of an earlier run"
    return [path for path in paths if path not in left_out], left_out


def is_result(path: Path, command: Command) -> bool:
    """Return True if an image below the input folder was written by an earlier run."""
    folder = command.output_dir.resolve()
    if folder == command.input.resolve():
        return bool(read_note(path))
    return not {folder, folder.with_name(f"{folder.name}_comparison")}.isdisjoint(path.resolve().parents)


def check_targets(jobs: Sequence[Job]) -> None:
    """Raise ValueError if a result would overwrite a source, a user's file beside it, or another result."""
    sources = {source.resolve() for source, _ in jobs}
    makers: dict[str, Path] = {}
    for source, target in jobs:
        place = target.resolve()
        name = on_disk(place)
        beside = place.parent == source.resolve().parent and os.path.exists(place)
        if place in sources or (beside and not read_note(place)):
            raise ValueError(
                f"the result of {source} would overwrite {target}: choose another output folder or prefix"
            )
        if name in makers:
            raise ValueError(
                f"{makers[name]} and {source} would both become {target}: rename one, or choose by a pattern"
            )
        makers[name] = source


def on_disk(path: Path) -> str:
    """Return the text by which the file system compares a path: lower case on Windows and macOS."""
    return str(path).casefold() if sys.platform in ("win32", "darwin") else str(path)


# ---- restoring ---------------------------------------------------------------------------------------------


def restore_files(command: Command) -> None:
    """Restore one image, or the images of a folder whose result is missing or was made from other inputs.

    If an image fails, the others go on. At the end prints how many images were made, kept, left out and
    failed, and raises ValueError if any failed.
    """
    check_ranges(command)
    every, left_out = list_jobs(command)
    jobs = share_of(every, command.shard)
    command.check()
    command.output_dir.mkdir(parents=True, exist_ok=True)  # a folder that is read-only fails before loading
    is_folder = command.input.is_dir()
    provenance = Provenance(command, hashed=is_folder)
    todo = jobs
    if is_folder and not command.overwrite:
        todo = [job for job in jobs if not is_made(command, provenance, *job)]
    restore = None
    if todo:
        print(describe_start(command.torch_device(), command.settled_precision(), command.device))
        restore = command.restorer()
    failed = restore_all(command, restore, todo, provenance)
    if failed and not is_folder:
        raise ValueError(failed[command.input])
    there = sum(os.path.exists(target) for _, target in every)
    shared = f"; of all {len(every)}, {there} are there" if len(every) > len(jobs) else ""
    print(
        f"{command.output_dir}: {len(todo) - len(failed)} made, {len(jobs) - len(todo)} kept (unchanged), "
        f"{len(left_out)} left out, {len(failed)} failed{shared}"
    )
    for line in summarise(left_out):
        print(f"  left out {line}")
    for problem in failed.values():
        print(f"  failed: {problem}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} images failed: they are listed above")


def is_made(command: Command, provenance: Provenance, source: Path, target: Path) -> bool:
    """Return True if the result, and the comparison if wanted, exist and are up to date."""
    made = [target, command.comparison_path(target)] if command.comparison else [target]
    return provenance.is_unchanged(source, made)


def summarise(left_out: dict[Path, str]) -> list[str]:
    """Return a line for each reason: how many images, the reason, the first names."""
    names = defaultdict(list)
    for path, reason in left_out.items():
        names[reason].append(path.name)
    return [f"{len(found)}, {reason}: {listing(found, 3)}" for reason, found in names.items()]


def restore_all(
    command: Command, restore: Restorer | None, jobs: Sequence[Job], provenance: Provenance
) -> dict[Path, str]:
    """Restore images one after the other; return the error message, one line, of each that fails."""
    failed: dict[Path, str] = {}
    for source, target in (progress := tqdm(jobs, "restoring", unit="image")):
        progress.set_postfix_str(source.name)
        try:
            restore_one(command, restore, source, target, provenance.of(source))
        except PROBLEMS as error:
            disk_is_full = getattr(error, "errno", None) == errno.ENOSPC  # all other images would fail too
            if disk_is_full or os.environ.get("TRACEBACK"):
                raise
            reason = " ".join(str(error).split())
            failed[source] = reason if str(source) in reason else f"{source}: {reason}"
    return failed


def restore_one(command: Command, restore: Restorer, source: Path, target: Path, note: str) -> None:
    """Restore an image and write the result. Raises one of PROBLEMS if that fails."""
    photo = read_photo(source, command.DEEP and command.format == "png")
    height, width = command.result_size(*photo.pixels.shape[:2])
    panels = command.PANELS * (width + 4) if command.comparison else width
    check_fits(target, height, max(width, panels))
    try:
        restored = run_restorer(restore, photo, source, command.SEES_ALPHA)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        size = f"{photo.pixels.shape[1]} x {photo.pixels.shape[0]} pixels"
        raise ValueError(f"{size} need more memory than the device has: {command.LESS_MEMORY}") from error
    written = {target: restored}
    if command.comparison:
        shown = over_white(to_8_bit(restored))
        written[command.comparison_path(target)] = command.compare(photo.shown(), shown, source)
    for path, pixels in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_photo(path, pixels, photo, note, command.quality)


def show_steps(steps: list) -> Iterable:
    """Wrap the steps of one image in a progress bar."""
    return tqdm(steps, desc="steps", leave=False)


def run_restorer(
    restore: Restorer, photo: Photo, path: Path, sees_alpha: bool, progress: Callable = show_steps
) -> np.ndarray:
    """Restore an image and keep its transparency. A network without alpha gets hidden colours filled in.

    Raises torch.OutOfMemoryError if GPU or CPU memory is short; the latter has other errors by default.
    """
    image = photo.with_alpha(photo.pixels) if sees_alpha else fill_hidden(photo.pixels, photo.alpha)
    try:
        return photo.with_alpha(restore(image, path, progress))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
