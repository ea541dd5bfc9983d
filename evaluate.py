"""Score a folder of restored pictures against the sharp ones, with the blurry ones as the baseline.

    python evaluate.py --restored restored --sharp photos/sharp --blurry photos/blur --prefix deblurred_ \\
        --output report.json --html report.html

PSNR and SSIM are of uint8 RGB images with a data range of 255, per image, then averaged (ldm/metrics.py).
Pictures are matched by their path in the folder without its extension; in a GoPro tree by sequence and frame,
in a folder of tool_make_deblur_dataset.py by number.
"""

import base64
import csv
import html
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ldm.checkpoint import describe, write_atomically
from ldm.data.image import list_images, read_image, side_by_side
from ldm.metrics import psnr, rgb_shift, ssim
from ldm.profile import PROFILE, cost_lines, read_profile, weights_lines
from ldm.settings import run_main

WORST = 5
# Folders of one kind inside a data set, and what the names in them begin with: GoPro's, then
# tool_make_deblur_dataset.py's.
FOLDERS = {
    "blur": {"blur": "", "blur_images": "blur_"},
    "sharp": {"sharp": "", "clear_images": "clear_"},
}


@dataclass
class Settings:
    """Score restored pictures against the sharp ones."""

    restored: Path  # folder of restored pictures
    sharp: Path  # folder of sharp pictures
    blurry: Path | None = None  # folder of the blurry pictures, for the baseline and the gain
    prefix: str = ""  # what the names of the restored have before those of the sharp, such as deblurred_
    suffix: str = ""  # and behind, before the extension
    output: Path | None = None  # write all numbers to this .json, and those of each image to a .csv beside it
    html: Path | None = None  # write a page with the worst five pictures
    checkpoint_path: Path | None = None  # the weights behind the pictures: their hash and step are reported


def index_folder(folder: Path, kind: str, prefix: str = "", suffix: str = "") -> dict[str, Path]:
    """Pictures of a folder by name: path without extension, prefix, suffix and the FOLDERS of this kind.

    Where some have such a parent only these count. Raises ValueError if two have one name, or none has the
    prefix and suffix.
    """
    begins = FOLDERS[kind]
    paths = {path: path.relative_to(folder) for path in list_images(folder)}
    of_kind = {path: place for path, place in paths.items() if not begins.keys().isdisjoint(place.parts[:-1])}
    named: dict[str, Path] = {}
    for path, place in (of_kind or paths).items():
        stem = place.stem
        if not (stem.startswith(prefix) and stem.endswith(suffix)):
            continue
        stem = stem.removeprefix(prefix).removesuffix(suffix).removeprefix(begins.get(path.parent.name, ""))
        name = "/".join([*(part for part in place.parts[:-1] if part not in begins), stem])
        if name in named:
            raise ValueError(f"{named[name]} and {path} have the same name, {name}")
        named[name] = path
    if not named:
        raise ValueError(f"no picture in {folder} has the prefix {prefix!r} and the suffix {suffix!r}")
    return named


def score(name: str, paths: dict[str, Path]) -> dict:
    """Metrics of one picture, or the reason why it is skipped."""
    try:
        images = {kind: read_image(path) for kind, path in paths.items()}
        restored, sharp = images["restored"], images["sharp"]
        row = {"name": name, "psnr": psnr(restored, sharp), "ssim": ssim(restored, sharp)}
        row |= dict(zip(("shift_r", "shift_g", "shift_b"), rgb_shift(restored, sharp), strict=True))
        if "blurry" in images:
            row["psnr_blurry"] = psnr(images["blurry"], sharp)
            row["ssim_blurry"] = ssim(images["blurry"], sharp)
    except (ValueError, FileNotFoundError) as error:  # the second of a link that leads nowhere
        return {"name": name, "skipped": str(error)}
    return row


def evaluate(settings: Settings) -> tuple[dict, list[dict], dict[str, dict[str, Path]]]:
    """The report, one row of metrics per picture, and the files of each.

    Raises ValueError if no pair can be scored.
    """
    made = describe_making(settings)
    folders = {
        "restored": index_folder(settings.restored, "blur", settings.prefix, settings.suffix),
        "sharp": index_folder(settings.sharp, "sharp"),
    }
    if settings.blurry:
        folders["blurry"] = index_folder(settings.blurry, "blur")
    names = [name for name in folders["sharp"] if all(name in folder for folder in folders.values())]
    files = {name: {kind: folder[name] for kind, folder in folders.items()} for name in names}
    if not files:
        examples = ", ".join(f"{kind} {next(iter(folder))}" for kind, folder in folders.items())
        raise ValueError(f"no names in common; the first ones are: {examples} (see --prefix and --suffix)")
    with ThreadPoolExecutor() as threads:
        rows = list(tqdm(threads.map(score, files, files.values()), "scoring", len(files), unit="image"))
    skipped = {row["name"]: row["skipped"] for row in rows if "skipped" in row}
    rows = sorted((row for row in rows if "skipped" not in row), key=lambda row: row["psnr"])
    if not rows:
        raise ValueError(f"none of {len(files)} pairs can be scored: {next(iter(skipped.values()))}")
    unmatched = {kind: len(folder) - len(files) for kind, folder in folders.items()}
    pairs = {"found": len(files), "used": len(rows), "skipped": skipped, "without_partner": unmatched}
    report = {"pairs": pairs, **means(rows), "worst": [row["name"] for row in rows[:WORST]]}
    return report | made, rows, files


def means(rows: list[dict]) -> dict:
    """Means of per-image values, and the gain over the blurry pictures."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "name"}
    report = {"psnr": mean["psnr"], "ssim": mean["ssim"]}
    report["rgb_shift"] = [mean["shift_r"], mean["shift_g"], mean["shift_b"]]
    if "psnr_blurry" in mean:
        report |= {"psnr_blurry": mean["psnr_blurry"], "ssim_blurry": mean["ssim_blurry"]}
        report["psnr_gain"] = mean["psnr"] - mean["psnr_blurry"]
        report["ssim_gain"] = mean["ssim"] - mean["ssim_blurry"]
    return report


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
    for name, form in (("psnr", "{:.3f} dB"), ("ssim", "{:.4f}")):
        line = f"{name.upper()}      {form.format(report[name])}"
        if f"{name}_blurry" in report:
            signed = form.replace(":", ":+")
            line += f"   blurry {form.format(report[f'{name}_blurry'])}"
            line += f"   gain {signed.format(report[f'{name}_gain'])}"
        lines.append(line)
    shift = " ".join(f"{value:+.2f}" for value in report["rgb_shift"])
    lines += [f"RGB shift {shift} (of 255)", f"worst     {', '.join(report['worst'])}"]
    lines += cost_lines(report["profile"]) if "profile" in report else []
    lines += weights_lines(report["checkpoint"]) if "checkpoint" in report else []
    return "\n".join(lines)


def is_json(value: object) -> bool:
    """Whether json can hold it: equal pictures have an infinite PSNR."""
    return not isinstance(value, float) or math.isfinite(value)


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["name"]))
    return text.getvalue()


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
        title = (
            f"{html.escape(row['name'])}: {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f} ({', '.join(kinds)})"
        )
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
        plain = {key: value if is_json(value) else str(value) for key, value in report.items()}
        outputs[settings.output] = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        outputs[settings.output.with_suffix(".csv")] = as_csv(rows)
    if settings.html:
        outputs[settings.html] = as_html(report, rows, files)
    for path, text in outputs.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        print(f"written   {path}")


if __name__ == "__main__":
    run_main(main, Settings)
