"""Score a folder of restored images against the sharp ones, with the blurry ones as the baseline.

    python evaluate.py --restored restored --sharp photos/sharp --blurry photos/blur --prefix deblurred_ \\
        --output report.json

PSNR and SSIM are computed on uint8 RGB images (data range 255), per image, then averaged (ldm/metrics.py);
flags add the metrics of other papers (harness/scores.py). Images are matched by their path in the folder
without extension; in a tree (GoPro, RealBlur, HIDE, input/target) by scene and frame, and in a folder of
tool_make_deblur_dataset.py by number.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.logs import as_csv
from harness.scores import ABOUT, BACKBONES, SCORES, Values, deep_metric, plain
from harness.settings import run_main
from ldm.checkpoint import write_atomically
from ldm.data.image import list_images, read_image
from ldm.data.scenes import place, side
from ldm.metrics import known_mean, rgb_shift

WORST = 5  # number of images that are named as the worst


@dataclass
class Settings:
    """Score restored images against the sharp ones."""

    restored: Path  # folder of the restored images
    sharp: Path  # folder of the sharp images
    blurry: Path | None = None  # folder of the blurry images, for the baseline and the gain
    prefix: str = ""  # text before the names of the restored images, such as deblurred_
    suffix: str = ""  # text behind the names of the restored images, before the extension
    ssim3d: bool = False  # also compute the SSIM of the published GoPro tables, with a window over channels
    y: bool = False  # also compute PSNR and SSIM of the Y channel
    align: bool = False  # also compute PSNR and SSIM after RealBlur's alignment
    shift: bool = False  # also measure how far images are shifted (pixels) and zoomed (percent)
    lpips: bool = False  # also compute LPIPS (AlexNet): torchvision downloads the network, 233 MB
    dists: bool = False  # also compute DISTS (VGG-16): torchvision downloads the network, 528 MB
    output: Path | None = None  # .json file to write all numbers to, with a .csv of each image beside it


def index_folder(folder: Path, kind: str, prefix: str = "", suffix: str = "") -> dict[str, Path]:
    """Index images by name: path without extension, prefix, suffix and words such as blur or gt.

    If some images are in folders of this `kind` (see ldm.data.scenes.side), only these count; else if some
    are in folders of no kind, only those (as in HIDE). Raises ValueError if two images have the same name, or
    none has the prefix and suffix.
    """
    paths = list_images(folder)
    kinds = {path: {*map(side, path.relative_to(folder).parts[:-1])} - {""} for path in paths}
    of_kind = [path for path in paths if kind in kinds[path]]
    of_none = [path for path in paths if not kinds[path]]
    named: dict[str, Path] = {}
    for path in of_kind or of_none or paths:
        if not (path.stem.startswith(prefix) and path.stem.endswith(suffix)):
            continue
        stem = path.stem.removeprefix(prefix).removesuffix(suffix)
        where = place(path.relative_to(folder).with_name(f"{stem}.png"))
        name = (where if side(path.parent.name) else where.with_name(stem)).as_posix()
        if name in named:
            raise ValueError(f"{named[name]} and {path} have the same name, {name}")
        named[name] = path
    if not named:
        raise ValueError(f"no image in {folder} has the prefix {prefix!r} and the suffix {suffix!r}")
    return named


def find_files(settings: Settings) -> tuple[dict[str, dict[str, Path]], dict[str, int]]:
    """Find the files of each image, by name, then kind; and how many of each kind are unmatched.

    If no names match, file names without folders are compared, if unique (HIDE has one folder of sharp
    images). Raises ValueError if there is no image to score.
    """
    folders = {
        "restored": index_folder(settings.restored, "blurry", settings.prefix, settings.suffix),
        "sharp": index_folder(settings.sharp, "sharp"),
    }
    if settings.blurry:
        folders["blurry"] = index_folder(settings.blurry, "blurry")
    short = {}
    for kind, folder in folders.items():
        short[kind] = {name.split("/")[-1]: path for name, path in folder.items()}
    unique = all(len(short[kind]) == len(folder) for kind, folder in folders.items())
    for index in (folders, short) if unique else (folders,):
        names = [name for name in index["sharp"] if all(name in folder for folder in index.values())]
        files = {name: {kind: folder[name] for kind, folder in index.items()} for name in names}
        if files:
            return files, {kind: len(folder) - len(files) for kind, folder in index.items()}
    examples = ", ".join(f"{kind} {next(iter(folder))}" for kind, folder in folders.items())
    raise ValueError(f"no names in common; the first ones are: {examples} (see --prefix and --suffix)")


def score(name: str, paths: dict[str, Path], scores: list[Callable]) -> dict:
    """Return the metrics of one image, or the reason why it is skipped."""
    try:
        images = {kind: read_image(path) for kind, path in paths.items()}
        restored, sharp = images["restored"], images["sharp"]
        row = {"name": name, **figures(scores, restored, sharp)}
        row["shift_r"], row["shift_g"], row["shift_b"] = rgb_shift(restored, sharp)
        if "blurry" in images:
            row |= figures(scores, images["blurry"], sharp, "_blurry")
    except (ValueError, FileNotFoundError) as error:  # the second for a broken link
        return {"name": name, "skipped": str(error)}
    return row


def figures(scores: list[Callable], image: np.ndarray, sharp: np.ndarray, suffix: str = "") -> Values:
    values = {}
    for compute in scores:
        for name, value in compute(image, sharp).items():
            values[name + suffix] = value
    return values


def evaluate(settings: Settings) -> tuple[dict, list[dict], dict[str, dict[str, Path]]]:
    """Return the report, one row of metrics per image, and the files of each.

    Raises ValueError if no pair can be scored.
    """
    chosen = [name for name in SCORES if getattr(settings, name)]
    for name in chosen:
        if name in BACKBONES:
            deep_metric(name)  # fails before the work if its network is missing
    scores = [plain, *(SCORES[name] for name in chosen)]
    files, unmatched = find_files(settings)
    with ThreadPoolExecutor() as threads:
        found = threads.map(partial(score, scores=scores), files, files.values())
        rows = list(tqdm(found, "scoring", len(files), unit="image"))
    skipped = {row["name"]: row["skipped"] for row in rows if "skipped" in row}
    rows = sorted((row for row in rows if "skipped" not in row), key=lambda row: row["psnr"])
    if not rows:
        raise ValueError(f"none of {len(files)} pairs can be scored: {next(iter(skipped.values()))}")
    pairs = {"found": len(files), "used": len(rows), "skipped": skipped, "unmatched": unmatched}
    report = {"pairs": pairs, **means(rows), "worst": [row["name"] for row in rows[:WORST]]}
    return report, rows, files


def means(rows: list[dict]) -> dict:
    """Average the metrics of all images; add the gains over the blurry images, and the definitions."""
    mean = {name: known_mean(row[name] for row in rows) for name in rows[0] if name != "name"}
    names = [name for name in ABOUT if name in mean]
    report = {name: mean[name] for name in names}
    report["rgb_shift"] = [mean["shift_r"], mean["shift_g"], mean["shift_b"]]
    for name in names:
        if f"{name}_blurry" in mean:
            report[f"{name}_blurry"] = mean[f"{name}_blurry"]
            report[f"{name}_gain"] = mean[name] - mean[f"{name}_blurry"]
    return report | {"definitions": {name: ABOUT[name] for name in names}}


def as_text(report: dict) -> str:
    """Format the report as lines to print."""
    pairs = report["pairs"]
    alone = ", ".join(f"{count} {kind}" for kind, count in pairs["unmatched"].items() if count)
    lines = [f"pairs     {pairs['found']} found, {pairs['used']} used, {len(pairs['skipped'])} skipped"]
    if alone:
        lines[0] += f"; unmatched: {alone}"
    lines += [f"  skipped {name}: {reason}" for name, reason in pairs["skipped"].items()]
    for name in report["definitions"]:
        digits, unit = (3, " dB") if name.startswith("psnr") else (4, "")
        line = f"{name.upper():<12} {report[name]:.{digits}f}{unit}"
        if f"{name}_blurry" in report:
            line += f"   blurry {report[f'{name}_blurry']:.{digits}f}{unit}"
            line += f"   gain {report[f'{name}_gain']:+.{digits}f}{unit}"
        lines.append(line)
    shift = " ".join(f"{value:+.2f}" for value in report["rgb_shift"])
    lines += [f"RGB shift {shift} (of 255)", f"worst     {', '.join(report['worst'])}"]
    lines += [f"{name.upper()}: {about}" for name, about in report["definitions"].items()]
    return "\n".join(lines)


def as_json(report: dict) -> str:
    """Format the report as JSON; the infinite PSNR of equal images, which JSON lacks, becomes a string."""
    finite = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in report.items()
    }
    return json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def main(settings: Settings) -> None:
    if settings.output and not settings.output.parent.is_dir():
        raise FileNotFoundError(f"folder not found: {settings.output.parent}")
    if settings.output and settings.output.suffix != ".json":
        raise ValueError(f"--output is a .json file (a .csv is written beside it), not {settings.output}")
    report, rows, files = evaluate(settings)
    print(as_text(report))
    outputs = {}
    if settings.output:
        by_name = sorted(rows, key=lambda row: row["name"])
        outputs[settings.output] = as_json(report)
        outputs[settings.output.with_suffix(".csv")] = as_csv([*rows[0]], by_name)
    for path, text in outputs.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        print(f"written   {path}")


if __name__ == "__main__":
    run_main(main, Settings)
