"""Files that name pairs: json lines, lists of two or three columns, BasicSR's meta_info."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from ldm.data.image import EXTENSIONS
from ldm.data.scenes import path_side, side

CAPTIONS = ("caption", "text", "prompt")  # names of a line's caption, the first that is there counts
META_LINE = re.compile(r"(.+\.\w+) +\(\d+, ?\d+, ?\d+\)( +\d+)?")
Found = tuple[Path, Path, dict]  # blurry, sharp, what else the line says


def read_json_list(file: Path, data_root: str | Path | None = None) -> list[Found]:
    """Pairs of a blur_types.json. Bare names may also lie in blur_images and clear_images."""
    found = []
    for where, record in json_lines(file):
        blurry = _find(where, file, data_root, record["blur_image"], "blur_images")
        sharp = _find(where, file, data_root, record["clear_image"], "clear_images")
        found.append((*_different(where, blurry, sharp), record))
    return found


def json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """Records of a data set, each with "file:number" for messages; ValueError for a line that is none."""
    for where, line in _lines(file):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a line of JSON ({error})") from error
        names = [record.get(key) for key in ("blur_image", "clear_image")] if isinstance(record, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: expected an object with the paths blur_image and clear_image")
        if not all(isinstance(record.get(key, ""), str) for key in ("blur_type", "source")):
            raise ValueError(f"{where}: blur_type and source must be texts")
        if not all(isinstance(record.get(key, ""), str) for key in CAPTIONS):
            raise ValueError(f"{where}: {', '.join(CAPTIONS)} must be texts")
        yield where, record


def read_list(file: Path, data_root: str | Path | None = None) -> tuple[list[Found], bool]:
    """Pairs of a list of columns, and whether the names tell which column is the blurry one.

    Raises ValueError where they contradict each other.
    """
    lines = list(_lines(file))
    metas = [META_LINE.fullmatch(line) for _, line in lines]
    if lines and all(metas):
        names = [(where, meta[1]) for (where, _), meta in zip(lines, metas, strict=True)]
        return _meta_pairs(file, names, data_root), True
    rows = [(where, _columns(where, line)) for where, line in lines]
    orders = {}  # side of the first column -> the first line that tells it
    for where, names in rows:
        orders.setdefault(_first_side(where, *names), where)
    orders.pop("", None)
    if len(orders) > 1:
        raise ValueError(
            f"the sharp picture comes first in {orders['sharp']}, the blurry one in {orders['blurry']}: "
            "a list has one order"
        )
    if rows and not orders:
        rank_zero_only(print)(
            f"{file}: no name tells sharp from blurry pictures (gt, sharp, target | blur, input, lq); "
            f"the first column is taken for the blurry ones, the second for the sharp: {' '.join(rows[0][1])}"
        )
    step = -1 if "sharp" in orders else 1
    found = []
    for where, names in rows:
        paths = [_find(where, file, data_root, name) for name in names[::step]]
        found.append((*_different(where, *paths), {}))
    return found, bool(orders)


def _first_side(where: str, first: str, second: str) -> str:
    """The side of the first of two paths, "" if no name tells it."""
    sides = path_side(first, second), path_side(second, first)
    if sides[0] and sides[0] == sides[1]:
        raise ValueError(f"{where}: both columns are {sides[0]} pictures by their names")
    return sides[0] or {"sharp": "blurry", "blurry": "sharp", "": ""}[sides[1]]


def _columns(where: str, line: str) -> list[str]:
    """The two paths of a line; a third column counts only if the other two do not tell their sides."""
    names = [name.strip().strip('"') for name in line.split("\t")] if "\t" in line else _unquote(where, line)
    if len(names) == 3:
        pictures = [name for name in names if Path(name).suffix.lower() in EXTENSIONS]
        told = [name for name in pictures if side(Path(name).parent.name)]
        names = next((two for two in (pictures, told) if len(two) == 2), names)
    if len(names) != 2:
        raise ValueError(f"{where}: expected two paths, got {len(names)} (separate by a tab, or quote them)")
    return names


def _meta_pairs(file: Path, names: list[tuple[str, str]], data_root: str | Path | None) -> list[Found]:
    """Pairs of BasicSR's meta_info: one name a line, for a folder of sharp and one of blurry pictures."""
    root = Path(data_root or file.parent)
    folders = {
        kind: [p for p in root.iterdir() if p.is_dir() and side(p.name) == kind and not p.suffix]
        for kind in ("blurry", "sharp")
    }
    if any(len(found) != 1 for found in folders.values()):
        raise ValueError(
            f"{file} is a meta_info list: {root} must have one folder of blurry pictures (lq, blur, input) "
            "and one of sharp ones (gt, sharp, target)"
        )
    pairs = []
    for where, name in names:
        paths = [_find(where, file, found[0], name) for found in folders.values()]
        pairs.append((*paths, {}))
    return pairs


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are neither empty nor a comment, each with "file:number"."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            yield f"{file}:{number}", line.strip()


def _unquote(where: str, line: str) -> list[str]:
    words = shlex.shlex(line, posix=True)
    words.whitespace_split, words.commenters, words.escape, words.quotes = True, "", "", '"'
    try:
        return list(words)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _find(where: str, file: Path, data_root: str | Path | None, name: str, inside: str = "") -> Path:
    """The file of a name: below data_root; else below the list's folder, or the current one, but not both.

    A bare name may also lie in the folder `inside` of these.
    """
    places = ["", inside] if inside and Path(name).name == name else [""]
    tried = []
    for roots in [[data_root], [file.parent, ""]] if data_root else [[file.parent, ""]]:
        paths = [Path(root) / folder / name for root in roots for folder in places]
        tried += paths
        # isfile: False as well for names that no file can have
        found = {os.path.realpath(path): path for path in paths if os.path.isfile(path)}
        if len(found) > 1:
            both = " and ".join(map(str, found.values()))
            raise ValueError(f"{where}: {name} may be {both}: write the whole path, or remove one")
        if found:
            return next(iter(found.values()))
    raise FileNotFoundError(f"{where}: image not found: {', nor '.join(dict.fromkeys(map(str, tried)))}")


def _different(where: str, blurry: Path, sharp: Path) -> tuple[Path, Path]:
    if os.path.realpath(blurry) == os.path.realpath(sharp):
        raise ValueError(f"{where}: the blurry and the sharp picture are one file, {sharp}")
    return blurry, sharp
