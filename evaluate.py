"""Score a folder of restored pictures against the sharp ones, with the blurry ones as the baseline.

    python evaluate.py --restored restored --sharp photos/sharp --blurry photos/blur --prefix deblurred_ \\
        --output report.json --html report.html

PSNR and SSIM are of uint8 RGB images with a data range of 255, per image, then averaged (ldm/metrics.py); the
flags add the figures of other papers (harness/scores.py). Pictures are matched by their path in the folder
without its extension; in a tree (GoPro, RealBlur, HIDE, input/target) by scene and frame, in a folder of
tool_make_deblur_dataset.py by number.
"""

import base64
import html
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from harness.logs import as_csv
from harness.profile import PROFILE, cost_lines, read_profile, weights_lines
from harness.scores import ABOUT, SCORES, Values, deep_network, load_baseline, plain, timed
from harness.settings import run_main
from ldm.checkpoint import describe, write_atomically
from ldm.data.image import list_images, read_image, side_by_side
from ldm.data.scenes import place, side
from ldm.metrics import rgb_shift

WORST = 5


@dataclass
class Settings:
    """Score restored pictures against the sharp ones."""

    restored: Path  # folder of restored pictures
    sharp: Path  # folder of sharp pictures
    blurry: Path | None = None  # folder of the blurry pictures, for the baseline and the gain
    prefix: str = ""  # what the names of the restored have before those of the sharp, such as deblurred_
    suffix: str = ""  # and behind, before the extension
    ssim3d: bool = False  # also the SSIM of the published GoPro tables, with a window over the channels too
    y: bool = False  # also PSNR and SSIM of the Y channel
    align: bool = False  # also PSNR and SSIM after RealBlur's alignment
    lpips: bool = False  # also LPIPS (AlexNet): torchvision downloads the network, 233 MB
    dists: bool = False  # also DISTS (VGG-16): torchvision downloads the network, 528 MB
    # also restore the blurry pictures by these: blur kernels (Wiener's filter), files of networks (spandrel)
    baseline: tuple[Path, ...] = ()
    output: Path | None = None  # write all numbers to this .json, and those of each image to a .csv beside it
    html: Path | None = None  # write a page with the worst five pictures
    checkpoint_path: Path | None = None  # the weights behind the pictures: their hash and step are reported


def index_folder(folder: Path, kind: str, prefix: str = "", suffix: str = "") -> dict[str, Path]:
    """Pictures of a folder by name: path without extension, prefix, suffix and what tells the kind.

    Where some are in folders of this `kind` (see ldm.data.scenes.side) only these count, else where some are
    in folders of no kind only those: HIDE's. Raises ValueError if two have one name, or none has the prefix
    and suffix.
    """
    paths = {path: path.relative_to(folder) for path in list_images(folder)}
    kinds = {path: {*map(side, where.parts[:-1])} - {""} for path, where in paths.items()}
    of_kind = {path: where for path, where in paths.items() if kind in kinds[path]}
    of_none = {path: where for path, where in paths.items() if not kinds[path]}
    named: dict[str, Path] = {}
    for path, where in (of_kind or of_none or paths).items():
        stem = path.stem
        if not (stem.startswith(prefix) and stem.endswith(suffix)):
            continue
        stem = stem.removeprefix(prefix).removesuffix(suffix)
        told = place(where.with_name(f"{stem}.png"))
        name = (told if side(path.parent.name) else told.with_name(stem)).as_posix()
        if name in named:
            raise ValueError(f"{named[name]} and {path} have the same name, {name}")
        named[name] = path
    if not named:
        raise ValueError(f"no picture in {folder} has the prefix {prefix!r} and the suffix {suffix!r}")
    return named


def find_files(settings: Settings) -> tuple[dict[str, dict[str, Path]], dict[str, int]]:
    """The files of each picture, by name, then kind; and how many of each kind have no partner.

    If no names agree those of the files alone do, without folders: HIDE has one folder of sharp pictures.
    Raises ValueError if there is no picture to score.
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


def score(name: str, paths: dict[str, Path], scores: list[Callable], baselines: dict[str, Callable]) -> dict:
    """Metrics of one picture, or the reason why it is skipped."""
    try:
        images = {kind: read_image(path) for kind, path in paths.items()}
        restored, sharp, blurry = images["restored"], images["sharp"], images.get("blurry")
        row = {"name": name, **figures(scores, restored, sharp)}
        row |= dict(zip(("shift_r", "shift_g", "shift_b"), rgb_shift(restored, sharp), strict=True))
        if blurry is not None:
            row |= figures(scores, blurry, sharp, "_blurry")
        for label, restore in baselines.items():
            result, seconds, memory = timed(restore, blurry)
            row |= figures(scores, result, sharp, f"_{label}")
            row |= {f"s_{label}": seconds, f"MiB_{label}": memory}
    except (ValueError, FileNotFoundError) as error:  # the second of a link that leads nowhere
        return {"name": name, "skipped": str(error)}
    return row


def figures(scores: list[Callable], image: np.ndarray, sharp: np.ndarray, suffix: str = "") -> Values:
    """What `scores` find, named with a suffix."""
    return {f"{name}{suffix}": value for one in scores for name, value in one(image, sharp).items()}


def evaluate(settings: Settings) -> tuple[dict, list[dict], dict[str, dict[str, Path]]]:
    """The report, one row of metrics per picture, and the files of each.

    Raises ValueError if no pair can be scored.
    """
    made = describe_making(settings)
    if settings.baseline and not settings.blurry:
        raise ValueError("--baseline restores the blurry pictures: give --blurry")
    for name in ("lpips", "dists"):
        if getattr(settings, name):
            deep_network(name)
    baselines = {path.stem: load_baseline(path) for path in settings.baseline}
    scores = [plain, *(one for name, one in SCORES.items() if getattr(settings, name))]
    files, unmatched = find_files(settings)
    with ThreadPoolExecutor(1 if baselines else None) as threads:  # what is timed runs alone
        found = threads.map(partial(score, scores=scores, baselines=baselines), files, files.values())
        rows = list(tqdm(found, "scoring", len(files), unit="image"))
    skipped = {row["name"]: row["skipped"] for row in rows if "skipped" in row}
    rows = sorted((row for row in rows if "skipped" not in row), key=lambda row: row["psnr"])
    if not rows:
        raise ValueError(f"none of {len(files)} pairs can be scored: {next(iter(skipped.values()))}")
    pairs = {"found": len(files), "used": len(rows), "skipped": skipped, "without_partner": unmatched}
    report = {"pairs": pairs, **means(rows, list(baselines)), "worst": [row["name"] for row in rows[:WORST]]}
    return report | made, rows, files


def means(rows: list[dict], baselines: list[str]) -> dict:
    """Means of per-image values, the gain over the blurry pictures, baselines, and what the figures are."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "name"}
    names = [name for name in ABOUT if name in mean]
    report = {name: mean[name] for name in names}
    report["rgb_shift"] = [mean["shift_r"], mean["shift_g"], mean["shift_b"]]
    for name in names if "psnr_blurry" in mean else ():
        report[f"{name}_blurry"] = mean[f"{name}_blurry"]
        report[f"{name}_gain"] = mean[name] - mean[f"{name}_blurry"]
    if baselines:
        kept = (*names, "s", "MiB")
        report["baselines"] = {label: {n: mean[f"{n}_{label}"] for n in kept} for label in baselines}
    return report | {"definitions": {name: ABOUT[name] for name in names}}


def describe_making(settings: Settings) -> dict:
    """What is known of how the pictures were made: their `checkpoint`, and their `profile` (infer.py's).

    Raises ValueError if the profile is damaged or names other weights than the settings.
    """
    made = {}
    if settings.checkpoint_path:
        made["checkpoint"] = describe(settings.checkpoint_path)
    path = settings.restored / PROFILE
    if path.is_file():
        profile = read_profile(path)
        weights = profile.pop("checkpoint")
        if made and made["checkpoint"]["sha256"] != weights["sha256"]:
            raise ValueError(f"--checkpoint_path {settings.checkpoint_path} is not what {path} names")
        made |= {"profile": profile, "checkpoint": weights}
    return made


def as_text(report: dict) -> str:
    """The report as lines to print."""
    pairs = report["pairs"]
    alone = ", ".join(f"{count} {kind}" for kind, count in pairs["without_partner"].items() if count)
    lines = [f"pairs     {pairs['found']} found, {pairs['used']} used, {len(pairs['skipped'])} skipped"]
    lines[0] += f"; without partner: {alone}" if alone else ""
    lines += [f"  skipped {name}: {reason}" for name, reason in pairs["skipped"].items()]
    for name in report["definitions"]:
        form = "{:.3f} dB" if name.startswith("psnr") else "{:.4f}"
        line = f"{name.upper():<12} {form.format(report[name])}"
        if f"{name}_blurry" in report:
            signed = form.replace(":", ":+")
            line += f"   blurry {form.format(report[f'{name}_blurry'])}"
            line += f"   gain {signed.format(report[f'{name}_gain'])}"
        lines.append(line)
    for label, values in report.get("baselines", {}).items():
        line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(f"baseline  {label}: {line}")
    shift = " ".join(f"{value:+.2f}" for value in report["rgb_shift"])
    lines += [f"RGB shift {shift} (of 255)", f"worst     {', '.join(report['worst'])}"]
    lines += cost_lines(report["profile"]) if "profile" in report else []
    lines += weights_lines(report["checkpoint"]) if "checkpoint" in report else []
    lines += [f"{name.upper()}: {about}" for name, about in report["definitions"].items()]
    return "\n".join(lines)


def as_html(report: dict, rows: list[dict], files: dict[str, dict[str, Path]]) -> str:
    """A page that needs no other file: the report and the worst pictures, blurry, restored, sharp."""
    parts = []
    for row in rows[:WORST]:
        paths = files[row["name"]]
        kinds = [kind for kind in ("blurry", "restored", "sharp") if kind in paths]
        strip = side_by_side([read_image(paths[kind]) for kind in kinds])
        scale = min(1, 1800 / strip.shape[1])
        strip = cv2.resize(strip, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".jpg", strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        source = base64.b64encode(data.tobytes()).decode()
        scores = f"{row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}"
        title = f"{html.escape(row['name'])}: {scores} ({', '.join(kinds)})"
        parts.append(f'<h2>{title}</h2><img src="data:image/jpeg;base64,{source}" style="max-width:100%">')
    return (
        '<!DOCTYPE html><html><head><meta charset="utf-8"><title>Restored pictures</title></head>'
        '<body style="font-family:sans-serif;margin:2em"><h1>Restored pictures</h1>'
        f"<pre>{html.escape(as_text(report))}</pre>{''.join(parts)}</body></html>\n"
    )


def main(settings: Settings) -> None:
    outputs = {}
    for path in (settings.output, settings.html):
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"folder not found: {path.parent}")
    if settings.output and settings.output.suffix != ".json":
        raise ValueError(f"--output is a .json file (a .csv is written beside it), not {settings.output}")
    report, rows, files = evaluate(settings)
    print(as_text(report))
    if settings.output:
        plain = {}
        for key, value in report.items():  # equal pictures have an infinite PSNR, which json cannot hold
            plain[key] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
        outputs[settings.output] = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        by_name = sorted(rows, key=lambda row: row["name"])
        outputs[settings.output.with_suffix(".csv")] = as_csv([*rows[0]], by_name)
    if settings.html:
        outputs[settings.html] = as_html(report, rows, files)
    for path, text in outputs.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        print(f"written   {path}")


if __name__ == "__main__":
    run_main(main, Settings)
