"""Many pictures through one network: which become which files, what is made already, what is shared out."""

import contextlib
import errno
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from harness.profile import PROFILE, cost_lines, measure, weights_lines, write_profile
from harness.settings import plain
from ldm import checkpoint
from ldm.checkpoint import repository_path
from ldm.data.decode import to_8_bit
from ldm.data.image import EXTENSIONS, list_images, over_white, side_by_side
from ldm.data.picture import Picture, check_fits, make_record, read_picture, read_record, write_picture
from ldm.data.shards import share_of
from ldm.device import choose_device, describe_start
from ldm.tiling import fill_hidden
from ldm.util import listing, settle_precision

Job = tuple[Path, Path]  # a source and its target
# What a subcommand of infer.py makes: a function from a picture (h, w, 3), uint16 if the file is and the
# subcommand is DEEP, else uint8, and its path to the restored picture.
Restorer = Callable[[np.ndarray, Path], np.ndarray]
# What may be wrong with one picture of many; the errors of torch and OpenCV have no classes of their own.
PROBLEMS = (ValueError, OSError, RuntimeError, MemoryError, cv2.error)
VERSION = 2  # of the pictures that this code makes of the same files and options: noted in each result


@dataclass(kw_only=True)
class Files:
    """Options of every subcommand of infer.py: which pictures, and where the results go."""

    # a picture, or a folder with all below it
    input: Annotated[Path, tyro.conf.arg(aliases=["--input_image"])]
    output_dir: Path = Path("outputs/inference")  # the tree below a folder is kept
    output_prefix: str = ""  # before the names of the results
    pattern: str = "**/*"  # in a folder only these, such as "*/blur/*"
    shard: str = "1/1"  # i/n: only every n-th picture from the i-th on, for n processes on one folder
    format: Literal["png", "jpg", "webp"] = "png"  # of the results
    quality: int = 95  # of jpg and webp, 1 to 100
    comparison: bool = False  # also write input and result side by side, to OUTPUT_DIR_comparison
    overwrite: bool = False  # make results again that are of the same making
    profile: bool = False  # also measure the work on one picture, for evaluate.py: OUTPUT_DIR/profile.json
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is one

    LESS_MEMORY: ClassVar[str] = "a --tile of 768 or less"  # what helps if a picture is too large
    DEEP: ClassVar[bool] = False  # whether 16-bit pictures stay so
    # Options that make no other pixels.
    ELSEWHERE: ClassVar[str] = "output_prefix pattern shard comparison overwrite profile device"
    # Options that name files of models.
    MODELS: ClassVar[str] = "checkpoint_path base_path config_path cleaner"
    MODELS += " pretrained_model_name_or_path lora_path"

    def __post_init__(self) -> None:
        for name in self.MODELS.split():
            if path := getattr(self, name, None):
                setattr(self, name, repository_path(path))

    def check(self, jobs: list[Job]) -> None:
        """Raise ValueError or FileNotFoundError for what is wrong before anything is loaded."""
        check_output(self.output_dir)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be 1 to 100, not {self.quality}")

    def restorer(self) -> Restorer:
        """Load the network; called once there is something to do. What it returns reads the options anew for
        every picture, so that they may change; those about loading are read here alone."""
        raise NotImplementedError

    def progress(self, steps: list) -> Iterable:
        """Steps of one picture under a progress bar."""
        return tqdm(steps, desc="steps", leave=False)

    def photographs(self, paths: list[Path]) -> list[Path]:
        """Of the images below the input folder those that are no masks."""
        return paths

    def weights(self) -> Path:
        """The file that a profile names."""
        return self.checkpoint_path

    def made_from(self, source: Path) -> list[Path]:
        """All files that a result depends on."""
        return [source, self.weights()]

    def record(self, source: Path) -> str:
        """What the result of a picture is made from. Raises FileNotFoundError if a file of it is missing."""
        values = {name: value for name, value in vars(self).items() if name not in self.ELSEWHERE.split()}
        options = {name: value for name, value in values.items() if not isinstance(value, Path | Callable)}
        options["version"] = VERSION
        return make_record(type(self).__name__, options, self.made_from(source))

    def result_name(self, name: Path) -> Path:
        """Where the result of a picture goes, below the output folder."""
        return name.with_name(f"{self.output_prefix}{name.stem}.{self.format}")

    def comparison_path(self, target: Path) -> Path:
        """Where the comparison that belongs to a result goes."""
        folder = self.output_dir.with_name(f"{self.output_dir.name}_comparison")
        return folder / target.relative_to(self.output_dir)

    def compare(self, image: np.ndarray, restored: np.ndarray, path: Path) -> np.ndarray:
        """What a comparison shows; all uint8 (h, w, 3)."""
        return side_by_side([image, restored])

    def torch_device(self) -> torch.device:
        return choose_device(self.device)

    def settled_precision(self) -> str:
        """The precision of the computation: 32, bf16 or 16."""
        return settle_precision(self.precision, self.torch_device())


def is_result(path: Path, files: Files) -> bool:
    """Whether a picture below the input folder was written by an earlier call."""
    folder = files.output_dir.resolve()
    if folder == files.input.resolve():
        return bool(read_record(path))
    return not {folder, folder.with_name(f"{folder.name}_comparison")}.isdisjoint(path.resolve().parents)


def find_sources(files: Files) -> tuple[list[Path], dict[Path, str]]:
    """The images to restore; and those that are left out, each with the reason."""
    if not files.input.is_dir():
        check_picture(files.input)
        return [files.input], {}
    paths, left_out = list_images(files.input), {}
    wanted, photographs = set(paths), set(files.photographs(paths))
    if files.pattern != Files.pattern:
        try:
            wanted = set(files.input.glob(files.pattern))
        except NotImplementedError as error:
            raise ValueError(f"--pattern is relative to --input, not {files.pattern}") from error
    for path in paths:
        if path not in wanted:
            left_out[path] = f"not of --pattern {files.pattern}"
        elif path not in photographs:
            left_out[path] = "a mask"
        elif is_result(path, files):
            left_out[path] = "result of an earlier run"
    return [path for path in paths if path not in left_out], left_out


def check_picture(path: Path) -> None:
    """Raise FileNotFoundError or ValueError if a path is no picture by its name."""
    if not path.exists():
        seen_from = "" if path.is_absolute() else f" in the current folder, {Path.cwd()}"
        raise FileNotFoundError(f"--input {path} does not exist{seen_from}")
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(
            f"--input {path} is no image: its name must end with {', '.join(sorted(EXTENSIONS))}"
        )


def list_jobs(files: Files) -> tuple[list[Job], dict[Path, str]]:
    """Sources and their targets, and what is left out (see `find_sources`).

    Raises ValueError if two sources have one target or a target is a source.
    """
    sources, left_out = find_sources(files)
    if not sources:
        raise FileNotFoundError(
            f"nothing to restore in {files.input}: left out {'; '.join(summed_up(left_out))}"
        )
    folder = files.input if files.input.is_dir() else files.input.parent
    jobs = [(path, files.output_dir / files.result_name(path.relative_to(folder))) for path in sources]
    check_targets(jobs)
    return jobs, left_out


def is_same(files: Files, source: Path, target: Path) -> bool:
    """Whether a result, and the comparison if that is wanted, is what would be made of the picture now."""
    wanted = [target, files.comparison_path(target)] if files.comparison else [target]
    try:
        return os.path.exists(target) and {read_record(path) for path in wanted} == {files.record(source)}
    except FileNotFoundError:  # a file it is made from is missing: to be found, and told, when it is made
        return False


def restore_files(files: Files) -> None:
    """Restore one image, or those of a folder that have no result of the same making yet.

    One that fails stops no other; at the end it says what was made, kept, left out and failed, and raises
    ValueError if something failed.
    """
    every, left_out = list_jobs(files)
    jobs = share_of(every, files.shard)
    files.check(jobs)
    always = files.overwrite or not files.input.is_dir()
    todo = [job for job in jobs if always or not is_same(files, *job)]
    restore = open_restorer(files) if todo or (files.profile and jobs) else None
    failed = restore_all(files, restore, todo)
    if failed and not files.input.is_dir():
        raise ValueError(failed[files.input])
    there = sum(os.path.exists(target) for _, target in every)
    shared = f"; of all {len(every)}, {there} are there" if len(every) > len(jobs) else ""
    print(
        f"{files.output_dir}: {len(todo) - len(failed)} made, {len(jobs) - len(todo)} kept (unchanged), "
        f"{len(left_out)} left out, {len(failed)} failed{shared}"
    )
    for line in summed_up(left_out):
        print(f"  left out {line}")
    for problem in failed.values():
        print(f"  failed: {problem}")
    done = next((source for source, target in jobs if os.path.exists(target) and source not in failed), None)
    if files.profile and done:
        profile = profile_one(files, restore, done)
        print("\n".join([*cost_lines(profile), *weights_lines(profile["checkpoint"])]))
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} images failed: they are listed above")


def open_restorer(files: Files) -> Restorer:
    """What `files.restorer` returns, after a line that says what computes."""
    print(describe_start(files.torch_device(), files.settled_precision(), files.device))
    return files.restorer()


def summed_up(left_out: dict[Path, str]) -> list[str]:
    """A line for each reason: how many images, the reason, the first names."""
    names = defaultdict(list)
    for path, reason in left_out.items():
        names[reason].append(path.name)
    return [f"{len(found)}, {reason}: {listing(found, 3)}" for reason, found in names.items()]


def restore_all(files: Files, restore: Restorer | None, jobs: Sequence[Job]) -> dict[Path, str]:
    """Restore images one after the other; what is wrong with those that fail, in a line each."""
    failed: dict[Path, str] = {}
    for source, target in (progress := tqdm(jobs, "restoring", unit="image")):
        progress.set_postfix_str(source.name)
        try:
            restore_one(files, restore, source, target)
        except PROBLEMS as error:
            if os.environ.get("TRACEBACK") or disk_is_full(error):
                raise
            reason = " ".join(str(error).split())
            failed[source] = reason if str(source) in reason else f"{source}: {reason}"
    return failed


def disk_is_full(error: BaseException) -> bool:
    """Whether there is no space left, which no other picture would find either."""
    return errno.ENOSPC in {getattr(each, "errno", None) for each in (error, error.__cause__)}


def restore_one(files: Files, restore: Restorer, source: Path, target: Path) -> None:
    """Restore a picture and write the result. Raises one of PROBLEMS if that fails."""
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # a name that is too long is found before the work
    record = files.record(source)
    picture = read_picture(source, files.DEEP and files.format == "png")
    check_fits(target, *picture.pixels.shape[:2])
    if files.comparison and files.format != "png":
        shown = picture.shown()
        check_fits(target, *files.compare(shown, shown, source).shape[:2])
    try:
        restored = run_restorer(restore, picture, source)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        size = f"{picture.pixels.shape[1]} x {picture.pixels.shape[0]} pixels"
        raise ValueError(f"{size} need more memory than the device has, give {files.LESS_MEMORY}") from error
    pictures = {target: restored}
    if files.comparison:
        shown = over_white(to_8_bit(restored))
        pictures = {files.comparison_path(target): files.compare(picture.shown(), shown, source), **pictures}
    for path, pixels in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, pixels, picture, record, files.quality)


def run_restorer(restore: Restorer, picture: Picture, path: Path) -> np.ndarray:
    """What a network makes of a picture, with its transparency. The network sees no hidden colours.

    Raises torch.OutOfMemoryError wherever memory is short: CPU memory has errors of other kinds.
    """
    try:
        return picture.with_alpha(restore(fill_hidden(picture.pixels, picture.alpha), path))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def profile_one(files: Files, restore: Restorer, source: Path) -> dict:
    """Measure the restoration of one picture again, and keep what was found beside the results."""
    picture = read_picture(source, files.DEEP and files.format == "png")
    about = {"picture": str(source), "size": picture.pixels.shape[1::-1], "options": plain(files)}
    profile = about | measure(lambda: run_restorer(restore, picture, source), files.torch_device())
    profile["checkpoint"] = checkpoint.describe(files.weights())
    write_profile(files.output_dir / PROFILE, profile)
    return profile


def check_output(folder: Path) -> None:
    """Raise ValueError if a folder is none that can be written to: found before a large model is loaded."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--output_dir {folder}: {there} is no folder that can be written to")


def check_targets(jobs: Sequence[Job]) -> None:
    """Raise ValueError if the result of a picture would overwrite a picture or another result."""
    sources = {source.resolve() for source, _ in jobs}
    makers: dict[Path, Path] = {}
    for source, target in jobs:
        place = target.resolve()
        beside = place.parent == source.resolve().parent and os.path.exists(place)
        if place in sources or (beside and not read_record(place)):
            raise ValueError(
                f"the result of {source} would overwrite {target}: "
                "give another --output_dir or --output_prefix"
            )
        if place in makers:
            raise ValueError(
                f"{makers[place]} and {source} would both become {target}: rename one, or choose by --pattern"
            )
        makers[place] = source
    spellings: dict[str, Path] = {}
    for place, source in makers.items():
        other = spellings.setdefault(str(place).casefold(), source)
        if other != source and ignores_case(place.parent):
            raise ValueError(
                f"{other} and {source} would both become {place.name} in {place.parent}, where capital and "
                "small letters are the same: rename one, or choose by --pattern"
            )


def ignores_case(folder: Path) -> bool:
    """Whether the disk of a folder, which need not exist yet, takes `a.png` and `A.png` for one file."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(prefix="case_", dir=there) as file:
        return os.path.exists(there / Path(file.name).name.upper())
