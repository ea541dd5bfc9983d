"""Pairs of a blurry and a sharp image: find them on disk, check them, split them by scene."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from tqdm import tqdm

from ldm.data.image import EXTENSIONS, UNREADABLE, image_size, list_images, natural_key, read_image, walk
from ldm.data.lists import CAPTIONS, read_json_list, read_list
from ldm.data.scenes import DEBLURRED, place, scenes, side
from ldm.util import listing

JSONL = "blur_types.json"  # the list that tool_make_deblur_dataset.py writes
SAMPLE = 9  # pairs whose sharpness is compared
Paths = tuple[Path, Path]  # blurry, sharp


@dataclass(frozen=True)
class Pair:
    """Two images of one scene; `group` names the photo or sequence they come from."""

    blurry: Path
    sharp: Path
    blur_type: str = ""
    group: str = ""
    caption: str = ""  # from the pair's line in a list


def find_pairs(
    source: str | Path,
    sharp_dir: str | Path | None = None,
    data_root: str | Path | None = None,
    blurred: bool = True,
) -> list[Pair]:
    """Find pairs, in natural order. `source` is one of:

    - a folder, with `sharp_dir` as the second one: files of the same relative path are pairs, regardless of
      their extensions (see match_folders);
    - a folder made by tool_make_deblur_dataset.py, or its blur_types.json (any .json or .jsonl);
    - a tree: every folder at or below `source` that holds one folder of blurry and one of sharp images,
      recognised by words in their names (BLURRY and SHARP in ldm/data/scenes.py);
    - HIDE: folders of blurry images, and one folder of all sharp images in, beside or above `source`;
    - a list file with one pair per line: two paths separated by a tab, or by a space if paths that contain
      spaces are in double quotes; empty lines and lines that begin with # are skipped. The file names tell
      which column is sharp; if they do not, the blurry one is first.
    A list that is not in the current folder is looked for in `data_root`. Paths inside a file are relative to
    `data_root`, else to the file's own folder or the current one.

    Raises FileNotFoundError or ValueError that names the file, the line or the unmatched image, or reports
    reversed pairs (with `blurred`, and if names do not tell, by comparing the sharpness of a sample).
    """
    source = _located(Path(source), data_root)
    names_tell = True
    if sharp_dir is not None:
        sides = (side(source.name), side(Path(sharp_dir).name))
        names_tell = sides in (("blurry", "sharp"), ("blurry", ""), ("", "sharp"))
        pairs = _grouped(match_folders(source, sharp_dir), Path(sharp_dir))
    elif source.is_dir():
        file = source / JSONL
        pairs = _json_pairs(file, data_root) if file.is_file() else _tree_pairs(source)
    elif source.suffix.lower() in (".json", ".jsonl"):
        pairs = _json_pairs(source, data_root)
    elif source.is_file():
        found, names_tell = read_list(source, data_root)
        pairs = _grouped(found)
    else:
        raise FileNotFoundError(f"no such data set: {source}")
    if not pairs:
        raise FileNotFoundError(f"no pairs in {source}")
    pairs = sorted(pairs, key=lambda pair: natural_key(pair.blurry))
    if blurred and not names_tell:
        _check_sharpness(pairs, source)
    return pairs


def _located(source: Path, data_root: str | Path | None) -> Path:
    """Return `source`, or if it does not exist the list file of that name in `data_root`."""
    if source.exists() or not data_root:
        return source
    inside = Path(data_root) / source
    if not inside.is_file():
        raise FileNotFoundError(f"no such file: {source}, nor {inside}")
    return inside


def match_folders(blurry_dir: str | Path, sharp_dir: str | Path) -> list[Paths]:
    """Match the images of two folders by relative path, ignoring extensions and words such as blur and gt.

    So a/blur_1.png and a/gt_1.png form a pair, and so do the images of two folders with one image each
    (RSBlur). Raises ValueError if both are the same folder, or for images without a counterpart.
    """
    check_apart(blurry_dir, sharp_dir)
    blurry, sharp = _by_place(Path(blurry_dir)), _by_place(Path(sharp_dir))
    if len(blurry) == len(sharp) == 1:
        return [(*blurry.values(), *sharp.values())]
    single = [path for name, path in blurry.items() if name not in sharp]
    single += [path for name, path in sharp.items() if name not in blurry]
    _refuse_singles(single)
    return [(path, sharp[name]) for name, path in blurry.items()]


def _by_place(folder: Path) -> dict[PurePosixPath, Path]:
    paths = {}
    for path in list_images(folder):
        name = place(path.relative_to(folder))
        if name in paths:
            raise ValueError(f"two images of one name in {folder}: {paths[name].name} and {path.name}")
        paths[name] = path
    return paths


def check_apart(blurry: str | Path, sharp: str | Path) -> None:
    """Raise ValueError if the folders of blurry and sharp images are the same one, directly or by a link."""
    if os.path.realpath(blurry) == os.path.realpath(sharp):
        raise ValueError(f"the blurry and the sharp images are one folder, {sharp}: give two")


def _refuse_singles(single: list[Path]) -> None:
    if single:
        raise ValueError(f"images without a counterpart: {listing(single, 3)}")


def _grouped(pairs: Sequence[Paths], root: Path | None = None) -> list[Pair]:
    """Add scenes to pairs, from the sharp images' paths relative to `root` or to their common folder."""
    places = [place(sharp.relative_to(root) if root else Path(os.path.abspath(sharp))) for _, sharp in pairs]
    if places and not root:
        common = os.path.commonpath([where.parent for where in places])
        places = [where.relative_to(common) for where in places]
    return [Pair(*pair, group=group) for pair, group in zip(pairs, scenes(places), strict=True)]


def _json_pairs(file: Path, data_root: str | Path | None) -> list[Pair]:
    found = read_json_list(file, data_root)
    pairs = _grouped([(blurry, sharp) for blurry, sharp, _ in found])
    for index, (_, _, record) in enumerate(found):
        pairs[index] = replace(
            pairs[index],
            blur_type=record.get("blur_type", ""),
            group=record.get("source", pairs[index].group),
            caption=next((record[key] for key in CAPTIONS if key in record), ""),
        )
    return pairs


# ---- trees -------------------------------------------------------------------------------------------------


def _tree_pairs(root: Path) -> list[Pair]:
    """Find the pairs of all folders at or below `root` that hold a folder of each side, else HIDE's."""
    found, lone = _pair_folders(root)
    if found and lone:
        other = "sharp" if side(lone[0].name) == "blurry" else "blurry"
        raise FileNotFoundError(f"no folder of {other} images beside {lone[0]}")
    pairs = [pair for folders in found for pair in match_folders(*folders)]
    if pairs:
        return _grouped(pairs, root)
    pairs = _shared_sharp(root)
    if not pairs:
        raise FileNotFoundError(
            f"no pairs in {root}: expected {JSONL}, or folders blur and sharp (input and target, lq and "
            "gt) in it or below it (for two folders of other names give both)"
        )
    return _grouped(pairs)


def _pair_folders(root: Path) -> tuple[list[Paths], list[Path]]:
    """Find adjacent folders of blurry and sharp images at or below `root`, and folders without a counterpart.

    Raises ValueError if there are several folders of a side.
    """
    found = []
    lone = []
    for here, folders, _ in walk(root):
        blurry = [name for name in folders if side(name) == "blurry"]
        sharp = [name for name in folders if side(name) == "sharp"]
        if not sharp and any(name.lower().startswith("blur") for name in blurry):  # SRN's data
            sharp = [name for name in folders if DEBLURRED.fullmatch(name)]
        if not blurry or not sharp:
            lone += [here / name for name in [*blurry, *sharp] if _holds_images(here / name)]
            continue
        if len(blurry) + len(sharp) > 2:
            several = ", ".join([*blurry, *sharp])
            raise ValueError(f"{here} has several folders of one kind, {several}: give one of each kind")
        found.append((here / blurry[0], here / sharp[0]))
        folders[:] = [name for name in folders if name not in (blurry[0], sharp[0])]
    return found, lone


def _shared_sharp(root: Path) -> list[Paths]:
    """Match HIDE's pairs by name: one folder in, beside or above `root` holds all sharp images."""
    for top in (root, *root.absolute().parents[:2]):
        folders = [path for path in top.iterdir() if side(path.name) == "sharp" and _holds_images(path)]
        if len(folders) != 1 or root.absolute().is_relative_to(folders[0].absolute()):
            continue
        sharp = {path.stem: path for path in list_images(folders[0])}
        blurry = [path for path in list_images(root) if not path.is_relative_to(folders[0])]
        single = [path for path in blurry if path.stem not in sharp]
        if len(single) < len(blurry):
            _refuse_singles(single)
            return [(path, sharp[path.stem]) for path in blurry]
    return []


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def has_pairs(folder: Path) -> bool:
    """Return True if a folder holds blur_types.json or a tree of pairs (see `find_pairs`)."""
    return (folder / JSONL).is_file() or bool(_pair_folders(folder)[0])


def sharp_pairs(folder: str | Path | None) -> list[Pair]:
    """Pair each sharp image below a folder with itself, to be blurred later.

    In a tree of pairs these are the images in the sharp folders, grouped by scene; elsewhere they are all
    images, each its own group unless the names form a sequence. Returns [] without a folder.
    """
    if folder is None:
        return []
    top = Path(folder)
    paths = list_images(top)
    sharp_folders = {sharp for _, sharp in _pair_folders(top)[0]}
    if sharp_folders:
        in_tree = []
        for path in paths:
            names = path.relative_to(top).parts[:-1]
            if "sharp" in map(side, names) or sharp_folders.intersection(path.parents):
                in_tree.append((path, path))
        return _grouped(in_tree, top)
    names = scenes([PurePosixPath(path.stem) for path in paths])
    return [Pair(path, path, group=str(path.parent / name)) for path, name in zip(paths, names, strict=True)]


# ---- checks ------------------------------------------------------------------------------------------------


def _check_sharpness(pairs: Sequence[Pair], source: Path) -> None:
    """Raise ValueError if the blurry images are sharper than their counterparts in most of a sample."""
    chosen = np.linspace(0, len(pairs) - 1, min(SAMPLE, len(pairs))).astype(int)
    sharper = [pairs[n] for n in chosen if _is_sharper(pairs[n].blurry, pairs[n].sharp)]
    if len(sharper) > 0.7 * len(chosen):
        raise ValueError(
            f"{source}: the pairs are reversed: in {len(sharper)} of {len(chosen)} the blurry image is "
            f"sharper than its counterpart, such as {sharper[0].blurry} than {sharper[0].sharp}"
        )


def _is_sharper(blurry: Path, sharp: Path) -> bool:
    try:
        return sharpness(read_image(blurry)) > 1.05 * sharpness(read_image(sharp))
    except UNREADABLE:  # training reports it
        return False


def sharpness(image: np.ndarray) -> float:
    """Return the mean grey difference of vertical plus horizontal neighbours of smoothed uint8 (h, w, 3)."""
    grey = cv2.GaussianBlur(image.mean(axis=2), (0, 0), 1.0)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Read all headers. Raises ValueError if a pair's sizes differ. Damaged files are left to training."""
    for pair in tqdm(pairs, "checking sizes", leave=False, disable=len(pairs) < 1000):
        try:
            blurry, sharp = image_size(pair.blurry), image_size(pair.sharp)
        except UNREADABLE:
            continue
        check_alike(pair.blurry, pair.sharp, blurry[::-1], sharp[::-1])


def check_alike(blurry: Path, sharp: Path, shape: Sequence[int], sharp_shape: Sequence[int]) -> None:
    """Raise ValueError that names both images of a pair if their shapes (h, w, ...) differ."""
    if tuple(shape) != tuple(sharp_shape):
        raise ValueError(
            f"the images of a pair differ in size: {blurry} is {shape[1]}x{shape[0]}, "
            f"{sharp} is {sharp_shape[1]}x{sharp_shape[0]} (width x height)"
        )


def split_pairs(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and held-out pairs: `fraction` of the groups, chosen by `seed`.

    At least one group is held out, unless `fraction` is 0, and no group is on both sides. Raises ValueError
    if `fraction` is not in [0, 1) or there is only one group.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), got {fraction}")
    if not fraction:
        return list(pairs), []
    groups = sorted({pair.group for pair in pairs}, key=natural_key)
    if len(groups) < 2:
        raise ValueError(f"cannot hold out a part: all pairs come from one source, {groups[0]!r}")
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    chosen = np.random.default_rng(seed).permutation(len(groups))[:count]
    held_out = {groups[index] for index in chosen}
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]
