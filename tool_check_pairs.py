"""Check a data set of blurry and sharp pairs before training on it.

    python tool_check_pairs.py --data training/GOPRO_Large
    python tool_check_pairs.py --data blurry --sharp_dir sharp

Prints what is wrong, the worst first, and writes pairs.csv (all measures of all pairs) and worst.jpg (the ten
worst pairs: blurry, sharp, difference times 4). Exit code 1 if a pair is certainly wrong: see CERTAIN.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import cv2
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree
from tqdm import tqdm

from harness.logs import as_csv
from harness.settings import run_main
from ldm.alignment import measure_movement
from ldm.checkpoint import write_atomically
from ldm.data.image import read_image, side_by_side, write_whole
from ldm.data.pairs import Pair, find_pairs, sharpness
from ldm.data.scenes import COMMON, split_of, words
from ldm.metrics import known_mean, rgb_shift

CERTAIN = ("unreadable", "sizes differ", "swapped", "in two splits")
KINDS = (*CERTAIN, "equal sides", "duplicate", "scene in two splits", "shifted", "scaled", "colour shifted")
SHARPER = 1.2  # ratio of sharpness above which the sides count as swapped; noise or low texture give less
SHIFT = 2.0  # pixels by which the middle, or a corner by scaling, may move: real blur moves it by about 1
SCALE = 0.2  # percent above which a pair counts as scaled, if its corners move enough
COLOUR = 2.0  # levels of 255 above which the mean of a channel counts as shifted
SIDE = 1024  # longest side in pixels at which sharpness is measured
THUMB = 16  # side of the thumbnails that find copies of an image
COPY = 1.0  # levels: root mean square difference of thumbnails below which two images are copies
FLAT = 4.0  # levels: standard deviation below which a thumbnail tells nothing
LINES, SHOWN, WIDTH = 20, 10, 400  # lines of the table, pairs of the sheet, width of its images in pixels


@dataclass
class Settings:
    """Find swapped, shifted, scaled, duplicated, leaking and damaged pairs."""

    data: Path  # pairs in any form that training reads: a tree, a list file, or the blurry images
    sharp_dir: Path | None = None  # folder of the sharp images, if --data holds the blurry ones
    output_dir: Path = Path("outputs/pairs")  # folder for pairs.csv and worst.jpg


@dataclass
class Checked:
    """Pair with its measures (columns of pairs.csv) and findings: kind -> (amount, text)."""

    pair: Pair
    values: dict = field(default_factory=dict)
    findings: dict[str, tuple[float, str]] = field(default_factory=dict)
    digests: tuple[str, str] = ("", "")  # SHA-256 of the pixels, blurry and sharp
    thumbs: np.ndarray | None = None  # (2, THUMB * THUMB), grey levels

    def rank(self) -> tuple:
        """Return a sort key: the worst kind first, then the largest amount, then the largest shift."""
        worst = [(KINDS.index(kind), -amount) for kind, (amount, _) in self.findings.items()]
        shift = math.hypot(self.values.get("shift_x", 0), self.values.get("shift_y", 0))
        return min(worst, default=(len(KINDS), 0)), -shift if math.isfinite(shift) else 0


def check_pair(pair: Pair, root: Path) -> Checked:
    """Read and measure one pair. Its name and split are taken from its path relative to `root`."""
    name = PurePath(os.path.relpath(pair.blurry, root))
    about = {"blurry": pair.blurry, "sharp": pair.sharp, "split": split_of(name)}
    checked = Checked(pair, {"name": name.as_posix(), "scene": PurePath(pair.group).name, **about})
    try:
        blurry, sharp = read_image(pair.blurry), read_image(pair.sharp)
    except (ValueError, OSError) as error:
        checked.findings["unreadable"] = (0, str(error))
        return checked
    checked.digests = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in (blurry, sharp))
    checked.thumbs = np.stack([thumbnail(image) for image in (blurry, sharp)])
    height, width = sharp.shape[:2]
    checked.values |= {"width": width, "height": height}
    if blurry.shape != sharp.shape:
        text = f"{blurry.shape[1]}x{blurry.shape[0]} and {width}x{height} pixels"
        checked.findings["sizes differ"] = (0, text)
        return checked
    measure(checked, blurry, sharp)
    return checked


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Return the grey levels of uint8 (h, w, 3) at THUMB x THUMB pixels, flattened."""
    small = cv2.resize(image, (THUMB, THUMB), interpolation=cv2.INTER_AREA)
    return small.mean(axis=2).ravel()


def reduced(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Shrink an image to a longest side of `side` pixels, if it is larger."""
    scale = side / max(image.shape[:2])
    return image if scale >= 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def measure(checked: Checked, blurry: np.ndarray, sharp: np.ndarray) -> None:
    """Compare the two images of a pair, uint8 (h, w, 3) of one size, and note the result in `checked`."""
    ratio = sharpness(reduced(blurry)) / max(sharpness(reduced(sharp)), 1e-6)
    moved = measure_movement(blurry, sharp)
    red, green, blue = rgb_shift(blurry, sharp)
    values, found = checked.values, checked.findings
    values |= {"sharpness_ratio": ratio, "shift_x": moved.x, "shift_y": moved.y}
    values |= {"scale_percent": moved.scale, "red": red, "green": green, "blue": blue}
    largest = max(abs(red), abs(green), abs(blue))
    if ratio > SHARPER:
        found["swapped"] = (ratio, f"the blurry side is {ratio:.2f} times as sharp")
    if checked.digests[0] == checked.digests[1]:
        found["equal sides"] = (0, "both images are the same")
    if moved.shift > SHIFT:
        found["shifted"] = (moved.shift, f"by {moved.x:+.1f} {moved.y:+.1f} pixels")
    zoom = abs(moved.scale - 100)  # percent
    if zoom > SCALE and zoom / 100 * math.hypot(*sharp.shape[:2]) / 2 > SHIFT:
        found["scaled"] = (zoom, f"to {moved.scale:.2f} %")
    if largest > COLOUR:
        found["colour shifted"] = (largest, f"by {red:+.1f} {green:+.1f} {blue:+.1f} levels")


# ---- duplicates --------------------------------------------------------------------------------------------


def find_copies(rows: Sequence[Checked]) -> None:
    """Note images that are in two pairs, which is certainly wrong if the pairs are in different splits.

    Copies have equal pixels, or thumbnails that differ by less than COPY (another format or size). Only equal
    pixels count for images without texture, and within a scene, whose frames may look alike.
    """
    rows = [row for row in rows if row.thumbs is not None]
    if len(rows) < 2:
        return
    radius = COPY * THUMB
    tree = cKDTree(np.stack([row.thumbs[1] for row in rows]))
    for one, other in sorted(tree.query_pairs(radius)):
        a, b = rows[one], rows[other]
        alike = a.thumbs[1].std() > FLAT
        splits = {a.values["split"], b.values["split"]} - {""}
        if len(splits) == 2:
            kind, same = "in two splits", alike or a.digests[1] == b.digests[1]
        else:
            alike = alike and a.pair.group != b.pair.group
            alike = alike and np.linalg.norm(a.thumbs[0] - b.thumbs[0]) < radius
            kind, same = "duplicate", alike or a.digests[0] == b.digests[0]
        if same:
            a.findings.setdefault(kind, (0, f"same image as {b.values['name']}"))
            b.findings.setdefault(kind, (0, f"same image as {a.values['name']}"))


def find_shared_scenes(rows: Sequence[Checked]) -> None:
    """Note scenes whose name is in several splits, except names like IMG_1 or of numbers only."""
    splits = defaultdict(set)
    for row in rows:
        splits[row.values["scene"]].add(row.values["split"])
    for row in rows:
        scene, split = row.values["scene"], row.values["split"]
        others = splits[scene] - {split, ""}
        if split and others and words(scene) - COMMON:
            row.findings["scene in two splits"] = (0, f"{scene} is also in {', '.join(sorted(others))}")


# ---- report ------------------------------------------------------------------------------------------------


def as_text(rows: Sequence[Checked]) -> str:
    """Format the worst pairs, one a line, then the number of pairs with each finding, and the means."""
    wrong = [row for row in rows if row.findings]
    lines = []
    for number, row in enumerate(wrong[:LINES], start=1):
        found = sorted(row.findings.items(), key=lambda item: KINDS.index(item[0]))
        texts = "; ".join(f"{kind}: {text}" for kind, (_, text) in found)
        lines.append(f"{number:3}  {row.values['name']}  {texts}")
    if len(wrong) > LINES:
        lines.append(f"     and {len(wrong) - LINES} more, in pairs.csv")
    counts = Counter(kind for row in rows for kind in row.findings)
    lines.append(f"{len(rows)} pairs, {len(rows) - len(wrong)} without findings")
    lines += [f"  {kind:20} {counts[kind]}" for kind in KINDS]
    names = ("shift_x", "shift_y", "scale_percent", "red", "green", "blue")
    means = [known_mean(row.values.get(name, math.nan) for row in rows) for name in names]
    lines.append(
        "mean: shift {:+.2f} {:+.2f} pixels, scale {:.2f} %, colour {:+.2f} {:+.2f} {:+.2f} levels".format(
            *means
        )
    )
    return "\n".join(lines)


def make_sheet(rows: Sequence[Checked]) -> np.ndarray | None:
    """Make numbered rows of blurry, sharp and difference (times 4, if of one size); None without any."""
    strips = []
    readable = [(n, row) for n, row in enumerate(rows, start=1) if "unreadable" not in row.findings]
    for number, row in readable[:SHOWN]:
        images = [reduced(read_image(path), WIDTH) for path in (row.pair.blurry, row.pair.sharp)]
        if images[0].shape == images[1].shape:
            images.append(cv2.convertScaleAbs(cv2.absdiff(*images), alpha=4))
        strip = side_by_side(images)
        cv2.putText(strip, str(number), (4, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 0), 2)
        strips.append(strip)
    return stack_rows(strips) if strips else None


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack uint8 images (h, w, 3) below each other; narrower ones are padded with white."""
    width = max(row.shape[1] for row in rows)
    white = {"borderType": cv2.BORDER_CONSTANT, "value": (255, 255, 255)}
    return np.vstack([cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], **white) for row in rows])


def main(settings: Settings) -> None:
    """Check all pairs and write the report. Raises ValueError if a pair is certainly wrong."""
    # Pairs; their names are relative to the folder that holds all of them
    pairs = find_pairs(settings.data, settings.sharp_dir, blurred=False)
    root = Path(os.path.commonpath([os.path.abspath(pair.blurry.parent) for pair in pairs]))
    settings.output_dir.mkdir(parents=True, exist_ok=True)

    # Check each pair alone, then compare the pairs
    with ThreadPoolExecutor() as threads:
        found = threads.map(check_pair, pairs, [root] * len(pairs))
        rows = list(tqdm(found, "checking", len(pairs), unit="pair"))
    find_copies(rows)
    find_shared_scenes(rows)
    rows.sort(key=Checked.rank)

    # Report
    print(as_text(rows))
    table = [{"findings": "; ".join(row.findings), **row.values} for row in rows]
    text = as_csv([*max(table, key=len)], table)  # a pair that was not measured has fewer columns
    files = [settings.output_dir / "pairs.csv"]
    write_atomically(files[0], lambda temporary: temporary.write_text(text, encoding="utf-8"))
    sheet = make_sheet(rows)
    if sheet is not None:
        files.append(settings.output_dir / "worst.jpg")
        write_whole(files[1], lambda temporary: Image.fromarray(sheet).save(temporary, "JPEG", quality=90))
    print(f"written: {', '.join(map(str, files))}")
    certain = [row for row in rows if row.findings.keys() & {*CERTAIN}]
    if certain:
        raise ValueError(f"{len(certain)} of {len(rows)} pairs are certainly wrong ({', '.join(CERTAIN)})")


if __name__ == "__main__":
    run_main(main, Settings)
