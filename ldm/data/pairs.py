"""Pairs of a blurry and a sharp picture: finding them on disk, splitting them by source."""

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.image import image_size, list_images, natural_key

JSONL = "blur_types.json"  # the list that tool_make_deblur_dataset.py writes
CAPTIONS = ("caption", "text", "prompt")  # names of a line's caption, the first that is there counts


@dataclass(frozen=True)
class Pair:
    """Two pictures of one scene; `group` names the photograph or sequence they come from."""

    blurry: Path
    sharp: Path
    blur_type: str = ""
    group: str = ""
    caption: str = ""  # what the pair's line says


def find_pairs(
    source: str | Path, sharp_dir: str | Path | None = None, data_root: str | Path | None = None
) -> list[Pair]:
    """Pairs in natural order, from whatever `source` is:

    - a folder, with `sharp_dir` another: files of the same relative path and stem are pairs;
    - a folder made by tool_make_deblur_dataset.py, or its blur_types.json (any .json or .jsonl);
    - a GoPro tree: every folder below `source` that holds `blur` and `sharp` (`blur_gamma` is not used);
    - a list file, one pair a line, blurry first: two paths with a tab between them, or with a space, and then
      a path that has spaces itself stands in double quotes; lines that are empty or begin with # are skipped.
    Paths inside a file are relative to `data_root`, or to the file's own folder.

    Raises FileNotFoundError or ValueError that names the file, the line or the picture without partner.
    """
    source = Path(source)
    if sharp_dir is not None:
        pairs, single = match_folders(source, sharp_dir)
        _refuse_singles(single)
    elif source.is_dir():
        pairs = (
            _jsonl_pairs(source / JSONL, data_root) if (source / JSONL).is_file() else _gopro_pairs(source)
        )
    elif source.is_file():
        read = _jsonl_pairs if source.suffix.lower() in (".json", ".jsonl") else _list_pairs
        pairs = read(source, data_root)
    else:
        raise FileNotFoundError(f"no such data set: {source}")
    if not pairs:
        raise FileNotFoundError(f"no pairs in {source}")
    return sorted(pairs, key=lambda pair: natural_key(pair.blurry))


def match_folders(blurry_dir: str | Path, sharp_dir: str | Path) -> tuple[list[Pair], list[Path]]:
    """Pairs of the same relative path and stem in two folders, and the pictures that have no partner.

    Pictures in a subfolder are taken for one sequence (one group), others each for a group of its own.
    """
    blurry, sharp = _by_stem(Path(blurry_dir)), _by_stem(Path(sharp_dir))
    groups = {stem: stem.rpartition("/")[0] or stem for stem in blurry}
    pairs = [Pair(path, sharp[stem], group=groups[stem]) for stem, path in blurry.items() if stem in sharp]
    single = [
        path for stem, path in [*blurry.items(), *sharp.items()] if stem not in blurry or stem not in sharp
    ]
    return pairs, single


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = {}
    for path in list_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in paths:
            raise ValueError(f"two pictures of one name in {folder}: {paths[stem].name} and {path.name}")
        paths[stem] = path
    return paths


def _refuse_singles(single: list[Path]) -> None:
    if single:
        more = f" and {len(single) - 3} more" if len(single) > 3 else ""
        raise ValueError(f"pictures without a partner: {', '.join(map(str, single[:3]))}{more}")


def _gopro_pairs(root: Path) -> list[Pair]:
    pairs = []
    for blurry in [path for path in (root / "blur", *root.rglob("*/blur")) if path.is_dir()]:
        found, single = match_folders(blurry, blurry.with_name("sharp"))
        _refuse_singles(single)
        group = blurry.parent.relative_to(root).as_posix()
        pairs += [
            Pair(pair.blurry, pair.sharp, group=pair.group if group == "." else group) for pair in found
        ]
    if not pairs:
        raise FileNotFoundError(
            f"no pairs in {root}: expected {JSONL}, or folders blur and sharp in it or below it "
            "(for two folders of other names give both)"
        )
    return pairs


def _jsonl_pairs(file: Path, data_root: str | Path | None) -> list[Pair]:
    pairs = []
    for where, record in json_lines(file):
        blurry, sharp = _existing(
            where, data_root or file.parent, record["blur_image"], record["clear_image"]
        )
        caption = next((record[key] for key in CAPTIONS if key in record), "")
        group = record.get("source", str(sharp))
        pairs.append(Pair(blurry, sharp, record.get("blur_type", ""), group, caption))
    return pairs


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


def _list_pairs(file: Path, data_root: str | Path | None) -> list[Pair]:
    pairs = []
    for where, line in _lines(file):
        names = (
            [name.strip().strip('"') for name in line.split("\t")] if "\t" in line else _unquote(where, line)
        )
        if len(names) != 2:
            raise ValueError(
                f"{where}: expected two paths, got {len(names)} (put a tab between them, or paths in quotes)"
            )
        blurry, sharp = _existing(where, data_root or file.parent, *names)
        if blurry.parent.name == "sharp":
            raise ValueError(f"{where}: the blurry picture comes first, this line begins with {names[0]}")
        sequence = sharp.parent.parent if sharp.parent.name == "sharp" else sharp
        pairs.append(Pair(blurry, sharp, group=str(sequence)))
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


def _existing(where: str, root: str | Path, *names: str) -> list[Path]:
    paths = [Path(root) / name for name in names]
    for path in paths:
        if not os.path.isfile(path):  # False as well for names that no file can have
            raise FileNotFoundError(f"{where}: image not found: {path}")
    return paths


def has_pairs(folder: Path) -> bool:
    """Whether a folder holds pairs that `find_pairs` finds without further help."""
    return (folder / JSONL).is_file() or (folder / "blur").is_dir() or any(folder.rglob("*/blur"))


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Read all pictures' headers; raises ValueError for one that is no picture or a pair of two sizes."""
    for pair in tqdm(pairs, "checking sizes", leave=False, disable=len(pairs) < 1000):
        if image_size(pair.blurry) != image_size(pair.sharp):
            (w, h), (sharp_w, sharp_h) = image_size(pair.blurry), image_size(pair.sharp)
            raise ValueError(
                f"the pictures of a pair differ in size: {pair.blurry} is {w}x{h}, "
                f"{pair.sharp} is {sharp_w}x{sharp_h} (width x height)"
            )


def sharp_pairs(folder: str | Path | None) -> list[Pair]:
    """Each sharp picture below a folder, paired with itself: that is how one to be blurred is written.

    In a GoPro tree these are the pictures in folders named `sharp`, a sequence being one group; elsewhere
    they are all pictures, each a group of its own. Without a folder there are none.
    """
    if folder is None:
        return []
    paths, top = list_images(folder), Path(folder)
    in_tree = [path for path in paths if path.parent.name == "sharp" and path.parent != top]
    sequences = {path: path.parent.parent for path in in_tree}
    return [
        Pair(path, path, group=str(path if sequences.get(path, top) == top else sequences[path]))
        for path in in_tree or paths
    ]


def split_pairs(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and held-out pairs: `fraction` of the groups (at least one), chosen by `seed`.

    No group is on both sides. Raises ValueError if `fraction` is not in [0, 1) or there is only one group.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), got {fraction}")
    groups = sorted({pair.group for pair in pairs}, key=natural_key)
    if fraction and len(groups) < 2:
        raise ValueError(f"cannot hold out a part: all pairs come from one source, {groups[0]!r}")
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction else 0
    held_out = {groups[index] for index in np.random.default_rng(seed).permutation(len(groups))[:count]}
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]
