"""Read files that list pairs: json lines and two-column lists."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ldm.data.scenes import path_side

CAPTIONS = ("caption", "text", "prompt")  # keys of a line's caption; the first present one is used
Paths = tuple[Path, Path]  # blurry, sharp


def read_json_list(file: Path, data_root: str | Path | None = None) -> list[tuple[Path, Path, dict]]:
    """Read pairs and records of a blur_types.json; bare names may lie in blur_images and clear_images."""
    pairs = []
    for where, record in json_lines(file):
        blurry = _find(where, file, data_root, record["blur_image"], "blur_images")
        sharp = _find(where, file, data_root, record["clear_image"], "clear_images")
        _check_different(where, blurry, sharp)
        pairs.append((blurry, sharp, record))
    return pairs


def json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield each record with its "file:number" for messages. Raises ValueError for an invalid line."""
    for where, line in _lines(file):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a line of JSON ({error})") from error
        if not isinstance(record, dict) or not _are_texts(record, "blur_image", "clear_image"):
            raise ValueError(f"{where}: expected an object with the paths blur_image and clear_image")
        for key in ("blur_type", "source", *CAPTIONS):
            if key in record and not _are_texts(record, key):
                raise ValueError(f"{where}: {key} must be a text")
        yield where, record


def _are_texts(record: dict, *keys: str) -> bool:
    return all(isinstance(record.get(key), str) for key in keys)


def read_list(file: Path, data_root: str | Path | None = None) -> tuple[list[Paths], bool]:
    """Read the pairs of a two-column list, and whether the file names tell which column is blurry.

    Raises ValueError if the names contradict each other.
    """
    pairs, orders = [], {}  # orders: side of the first column -> the first line that tells it
    for where, line in _lines(file):
        names = _columns(where, line)
        first = _first_side(where, *names)
        if first:
            orders.setdefault(first, where)
        pairs.append([_find(where, file, data_root, name) for name in names])
        _check_different(where, *pairs[-1])
    if len(orders) > 1:
        raise ValueError(
            f"the sharp image comes first in {orders['sharp']}, the blurry one in {orders['blurry']}: "
            "a list has one order"
        )
    if "sharp" in orders:
        pairs = [pair[::-1] for pair in pairs]
    return [(blurry, sharp) for blurry, sharp in pairs], bool(orders)


def _first_side(where: str, first: str, second: str) -> str:
    """Return the side ("sharp" or "blurry") of the first of two paths, "" if the names do not tell."""
    sides = (path_side(first, second), path_side(second, first))
    if sides[0] and sides[0] == sides[1]:
        raise ValueError(f"{where}: both columns are {sides[0]} images by their names")
    opposite = {"sharp": "blurry", "blurry": "sharp", "": ""}
    return sides[0] or opposite[sides[1]]


def _columns(where: str, line: str) -> list[str]:
    """Split a line into its two paths, separated by a tab or a space; double quotes may enclose a path."""
    separator = "\t" if "\t" in line else " "
    try:
        names = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) != 2:
        raise ValueError(f"{where}: expected two paths, got {len(names)} (separate by a tab, or quote them)")
    return names


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file, except empty lines and comments, each with its "file:number"."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            yield f"{file}:{number}", line.strip()


def _find(where: str, file: Path, data_root: str | Path | None, name: str, inside: str = "") -> Path:
    """Find the first existing file `name` below `data_root`, the list's folder or the current folder.

    A bare name may also lie in the subfolder `inside` of these.
    """
    roots = [*([Path(data_root)] if data_root else []), file.parent, Path()]
    folders = ["", inside] if inside and Path(name).name == name else [""]
    paths = [root / folder / name for root in roots for folder in folders]
    for path in paths:
        if os.path.isfile(path):  # also False for invalid names
            return path
    raise FileNotFoundError(f"{where}: image not found: {', nor '.join(dict.fromkeys(map(str, paths)))}")


def _check_different(where: str, blurry: Path, sharp: Path) -> None:
    if os.path.realpath(blurry) == os.path.realpath(sharp):
        raise ValueError(f"{where}: the blurry and the sharp image are one file, {sharp}")
