"""Many pictures through one network: which become which files, what is made already, what is shared out."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from harness.profile import PROFILE, cost_lines, measure, weights_lines, write_profile
from harness.settings import plain
from ldm import checkpoint
from ldm.data.image import EXTENSIONS, list_images, over_white, side_by_side, to_8_bit
from ldm.data.picture import check_fits, make_record, read_picture, read_record, write_picture
from ldm.util import compute_dtype

Job = tuple[Path, Path]  # a source and its target
# What a subcommand of infer.py makes: a function from a picture (h, w, 3), uint16 if the file is and the
# subcommand is DEEP, else uint8, and its path to the restored picture.
Restorer = Callable[[np.ndarray, Path], np.ndarray]


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
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise ValueError("--device cuda: torch finds no CUDA device here")
        return torch.device("cuda" if available and self.device != "cpu" else "cpu")

    def compute_dtype(self) -> torch.dtype | None:
        """The 16-bit type of the computation. Without one a CUDA device is kept from rounding to TF32."""
        dtype = compute_dtype(self.precision, self.torch_device())
        torch.backends.cudnn.allow_tf32 = dtype is not None
        torch.set_float32_matmul_precision("highest" if dtype is None else "high")
        return dtype


def is_result(path: Path, files: Files) -> bool:
    """Whether a picture below the input folder was written by an earlier call."""
    folder = files.output_dir.resolve()
    if folder == files.input.resolve():
        return bool(files.output_prefix) and path.name.startswith(files.output_prefix)
    return not {folder, folder.with_name(f"{folder.name}_comparison")}.isdisjoint(path.resolve().parents)


def list_jobs(files: Files) -> list[Job]:
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


def is_same(files: Files, source: Path, target: Path) -> bool:
    """Whether a result, and the comparison if that is wanted, is what would be made of the picture now."""
    wanted = [target, files.comparison_path(target)] if files.comparison else [target]
    return target.exists() and {read_record(path) for path in wanted} == {files.record(source)}


def restore_files(files: Files) -> None:
    """Restore one picture, or those of a folder that have no result of the same making yet.

    A broken one is named in the end and stops no other.
    """
    every = list_jobs(files)
    jobs = share_of(every, files.shard)
    files.check(jobs)
    always = files.overwrite or not files.input.is_dir()
    todo = [job for job in jobs if always or not is_same(files, *job)]
    remade, failures = 0, []
    restore = files.restorer() if todo or (files.profile and jobs) else None
    for source, target in (progress := tqdm(todo, "restoring", unit="image")):
        progress.set_postfix_str(source.name)
        there = target.exists()
        problems = restore_one(files, restore, source, target)
        remade += there and not problems
        failures += problems
    made = len(todo) - len(failures) - remade
    shared = f"; of all {len(every)}, {sum(target.exists() for _, target in every)} are there"
    print(
        f"{made} made, {len(jobs) - len(todo)} same, {remade} remade: {files.output_dir}"
        f"{shared if len(every) > len(jobs) else ''}"
    )
    done = next(((source, target) for source, target in jobs if target.exists()), None)
    if files.profile and done:
        profile = profile_one(files, restore, done[0])
        print("\n".join([*cost_lines(profile), *weights_lines(profile["checkpoint"])]))
    if failures:
        raise ValueError(f"{len(failures)} of {len(todo)} could not be restored: {'; '.join(failures[:3])}")


def restore_one(files: Files, restore: Restorer, source: Path, target: Path) -> list[str]:
    """Restore a picture and write the result; what is wrong if it cannot be read or is too large."""
    try:
        picture = read_picture(source, files.DEEP and files.format == "png")
        check_fits(target, *picture.pixels.shape[:2])
        if files.comparison and files.format != "png":
            shown = picture.shown()
            check_fits(target, *files.compare(shown, shown, source).shape[:2])
    except (ValueError, FileNotFoundError) as error:  # the second of a link that leads nowhere
        return [str(error)]
    try:
        restored = picture.with_alpha(restore(picture.pixels, source))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        size = f"{picture.pixels.shape[1]} x {picture.pixels.shape[0]} pixels"
        return [f"{source}: {size} need more memory than the device has, give {files.LESS_MEMORY}"]
    pictures = {target: restored}
    if files.comparison:
        shown = over_white(to_8_bit(restored))
        pictures = {files.comparison_path(target): files.compare(picture.shown(), shown, source), **pictures}
    for path, pixels in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_picture(path, pixels, picture, files.record(source), files.quality)
        except ValueError as error:
            return [str(error)]
    return []


def profile_one(files: Files, restore: Restorer, source: Path) -> dict:
    """Measure the restoration of one picture again, and keep what was found beside the results."""
    image = read_picture(source, files.DEEP and files.format == "png").pixels
    about = {"picture": str(source), "size": image.shape[1::-1], "options": plain(files)}
    profile = about | measure(lambda: restore(image, source), files.torch_device())
    profile["checkpoint"] = checkpoint.describe(files.weights())
    write_profile(files.output_dir / PROFILE, profile)
    return profile


def parse_shard(shard: str) -> tuple[int, int]:
    """`2/4` -> (2, 4). Raises ValueError for anything else than i/n with 1 <= i <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"--shard must be i/n with i from 1 to n, such as 2/4, not {shard}")
    return i, n


def share_of(items: Sequence, shard: str) -> Sequence:
    """Every n-th item from the i-th on, for a shard `i/n`: n processes have each item exactly once."""
    i, n = parse_shard(shard)
    return items[i - 1 :: n]


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
