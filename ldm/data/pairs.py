"""Pairs of a blurry and a sharp picture: finding them on disk, splitting them by scene."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from tqdm import tqdm

from ldm.data.image import (
    EXTENSIONS,
    UNREADABLE,
    image_size,
    list_images,
    natural_key,
    read_image,
    subfolders,
)
from ldm.data.lists import CAPTIONS, read_json_list, read_list
from ldm.data.scenes import place, scenes, side, sides
from ldm.util import listing

JSONL = "blur_types.json"  # the list that tool_make_deblur_dataset.py writes
SAMPLE = 9  # pairs whose sharpness is compared


@dataclass(frozen=True)
class Pair:
    """Two pictures of one scene; `group` names the photograph or sequence they come from."""

    blurry: Path
    sharp: Path
    blur_type: str = ""
    group: str = ""
    caption: str = ""  # what the pair's line says


def find_pairs(
    source: str | Path,
    sharp_dir: str | Path | None = None,
    data_root: str | Path | None = None,
    blurred: bool = True,
) -> list[Pair]:
    """Pairs in natural order, from whatever `source` is:

    - a folder (or lmdb), with `sharp_dir` another: files of the same relative path and stem are pairs;
    - a folder made by tool_make_deblur_dataset.py, or its blur_types.json (any .json or .jsonl);
    - a tree: every folder at or below `source` that holds one folder of blurry and one of sharp pictures, by
      their names (blur, input, lq | sharp, gt, target: see ldm/data/scenes.py; `blur_gamma` is not used);
    - HIDE: folders of blurry pictures, and one of all sharp ones in `source` or beside it;
    - a list file, one pair a line: two paths with a tab between them, or with a space, and then a path that
      has spaces itself stands in double quotes; lines that are empty or begin with # are skipped. The names
      tell which column is the sharp one, else the blurry one is first. BasicSR's meta_info lists too.
    A list that is not in the current folder is looked for in `data_root`. Paths inside a file are relative to
    `data_root`, else to the file's own folder or the current one.

    Raises FileNotFoundError or ValueError that names the file, the line or the picture without partner, or
    says that the pairs are reversed (with `blurred`: if names tell nothing, by a sample of the pictures).
    """
    source = Path(source)
    if not source.exists() and data_root:
        if not (Path(data_root) / source).is_file():
            raise FileNotFoundError(f"no such file: {source}, nor {Path(data_root) / source}")
        source = Path(data_root) / source
    told = True
    if sharp_dir is not None:
        told = _folders_told(source, Path(sharp_dir))
        pairs, single = match_folders(source, sharp_dir)
        _refuse_singles(single)
    elif source.is_dir():
        in_list = (source / JSONL).is_file()
        pairs = _json_pairs(source / JSONL, data_root) if in_list else _tree_pairs(source)
    elif source.suffix.lower() in (".json", ".jsonl"):
        pairs = _json_pairs(source, data_root)
    elif source.is_file():
        found, told = read_list(source, data_root)
        pairs = _grouped([pair[:2] for pair in found])
    else:
        raise FileNotFoundError(f"no such data set: {source}")
    if not pairs:
        raise FileNotFoundError(f"no pairs in {source}")
    pairs = sorted(pairs, key=lambda pair: natural_key(pair.blurry))
    if blurred and not told:
        _refuse_reversed(pairs, source)
    return pairs


def match_folders(blurry_dir: str | Path, sharp_dir: str | Path) -> tuple[list[Pair], list[Path]]:
    """Pairs of the same relative path and stem in two folders, and the pictures that have no partner.

    If no two have the same, blur_1 and gt_1 are partners too. A picture's group is its scene
    (ldm.data.scenes). Raises ValueError if the two are one folder.
    """
    check_apart(blurry_dir, sharp_dir)
    blurry, sharp = _by_stem(Path(blurry_dir)), _by_stem(Path(sharp_dir))
    if not blurry.keys() & sharp.keys():
        blurry, sharp = _by_stem(Path(blurry_dir), place), _by_stem(Path(sharp_dir), place)
    groups = dict(zip(blurry, scenes([PurePosixPath(stem) for stem in blurry]), strict=True))
    pairs = [Pair(path, sharp[stem], group=groups[stem]) for stem, path in blurry.items() if stem in sharp]
    both = blurry.keys() & sharp.keys()
    single = [path for stem, path in [*blurry.items(), *sharp.items()] if stem not in both]
    return pairs, single


def check_apart(blurry: str | Path, sharp: str | Path) -> None:
    """Raise ValueError if the folders of blurry and of sharp images are one, perhaps by a link."""
    if os.path.realpath(blurry) == os.path.realpath(sharp):
        raise ValueError(f"the blurry and the sharp images are one folder, {sharp}: give two")


def _by_stem(folder: Path, name: Callable = lambda path: path.with_suffix("")) -> dict[str, Path]:
    paths = {}
    for path in list_images(folder):
        stem = name(path.relative_to(folder)).as_posix()
        if stem in paths:
            raise ValueError(f"two pictures of one name in {folder}: {paths[stem].name} and {path.name}")
        paths[stem] = path
    return paths


def _refuse_singles(single: list[Path]) -> None:
    if single:
        raise ValueError(f"pictures without a partner: {listing(single, 3)}")


def _grouped(pairs: Sequence[tuple[Path, Path]], root: Path | None = None) -> list[Pair]:
    """Pairs with their scenes, told by the paths of the sharp pictures from `root`, or from where all are."""
    places = [place(sharp.relative_to(root) if root else Path(os.path.abspath(sharp))) for _, sharp in pairs]
    common = os.path.commonpath([where.parent for where in places]) if places and not root else ""
    groups = scenes([where.relative_to(common) for where in places])
    return [Pair(*pair, group=group) for pair, group in zip(pairs, groups, strict=True)]


def _json_pairs(file: Path, data_root: str | Path | None) -> list[Pair]:
    found = read_json_list(file, data_root)
    plain = _grouped([pair[:2] for pair in found])
    return [
        replace(
            pair,
            blur_type=record.get("blur_type", ""),
            group=record.get("source", pair.group),
            caption=next((record[key] for key in CAPTIONS if key in record), ""),
        )
        for pair, (_, _, record) in zip(plain, found, strict=True)
    ]


# ---- trees -------------------------------------------------------------------------------------------------


def _tree_pairs(root: Path) -> list[Pair]:
    """Pairs of all folders at or below `root` that hold two folders of the two kinds; else HIDE's."""
    pairs = []
    folders = _pair_folders(root)
    for blurry, sharp in folders if any(sharp for _, sharp in folders) else ():
        if sharp is None:
            raise FileNotFoundError(f"no folder of sharp pictures (gt, sharp, target) beside {blurry}")
        found, single = match_folders(blurry, sharp)
        _refuse_singles(single)
        pairs += [(pair.blurry, pair.sharp) for pair in found]
    if pairs:
        return _grouped(pairs, root)
    pairs = _shared_sharp(root)
    if not pairs:
        raise FileNotFoundError(
            f"no pairs in {root}: expected {JSONL}, or folders blur and sharp (input and target, lq and "
            "gt) in it or below it (for two folders of other names give both)"
        )
    return _grouped(pairs)


def _pair_folders(here: Path, searched: set[str] | None = None) -> list[tuple[Path, Path | None]]:
    """Folders of blurry and of sharp pictures side by side, in `here` or below; None for one that is missing.

    Links are followed, but no folder is `searched` twice. Raises ValueError for several folders of a kind.
    """
    searched = set() if searched is None else searched
    if os.path.realpath(here) in searched:
        return []
    searched.add(os.path.realpath(here))
    names = [folder.name for folder in subfolders(here)]
    copies = {name for name in names if name.removesuffix(".lmdb") != name and name[:-5] in names}
    told = sides(sorted({*names} - copies, key=natural_key))
    blurry, sharp = ([here / name for name in told if told[name] == kind] for kind in ("blurry", "sharp"))
    found = []
    if blurry and sharp:
        if len(blurry) + len(sharp) > 2:
            several = ", ".join(path.name for path in [*blurry, *sharp])
            raise ValueError(f"{here} has several folders of one kind, {several}: give one of each kind")
        found = [(blurry[0], sharp[0])]
    paired = {*found[0]} if found else set()
    for folder in sorted((here / name for name in told), key=Path.is_symlink):  # real folders first
        if folder not in paired and folder.suffix != ".lmdb":
            found += _pair_folders(folder, searched)
    if blurry and not sharp and not found:
        found = [(blurry[0], None)]
    return found


def _shared_sharp(root: Path) -> list[tuple[Path, Path]]:
    """Pairs of HIDE: one folder of all sharp pictures in `root`, or beside or above it, matched by name."""
    for top in (root, *root.absolute().parents[:2]):
        folders = [path for path in top.iterdir() if side(path.name) == "sharp" and _holds_pictures(path)]
        if len(folders) != 1 or root.absolute().is_relative_to(folders[0].absolute()):
            continue
        sharp = {path.stem: path for path in list_images(folders[0])}
        blurry = [path for path in list_images(root) if not path.is_relative_to(folders[0])]
        single = [path for path in blurry if path.stem not in sharp]
        if len(single) < len(blurry):
            _refuse_singles(single)
            return [(path, sharp[path.stem]) for path in blurry]
    return []


def _holds_pictures(folder: Path) -> bool:
    """Whether it is a folder with pictures directly in it, or an lmdb."""
    if not folder.is_dir() or folder.suffix == ".lmdb":
        return folder.is_dir()
    return any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def has_pairs(folder: Path) -> bool:
    """Whether a folder holds pairs that `find_pairs` finds without further help."""
    return (folder / JSONL).is_file() or any(sharp for _, sharp in _pair_folders(folder))


# ---- checks ------------------------------------------------------------------------------------------------


def _folders_told(blurry_dir: Path, sharp_dir: Path) -> bool:
    """Whether the names of two folders tell their sides. Raises ValueError if they tell the contrary."""
    sides = side(blurry_dir.name), side(sharp_dir.name)
    if sides == ("sharp", "blurry"):
        raise ValueError(
            f"{blurry_dir} holds sharp pictures by its name and {sharp_dir} blurry ones: exchange them"
        )
    return sides in (("blurry", "sharp"), ("blurry", ""), ("", "sharp"))


def _refuse_reversed(pairs: Sequence[Pair], source: Path) -> None:
    """Raise ValueError if the blurry pictures are sharper than their partners in most of a sample."""
    sample = [pairs[n] for n in np.linspace(0, len(pairs) - 1, min(SAMPLE, len(pairs))).astype(int)]
    sharper = [pair for pair in sample if _is_sharper(pair.blurry, pair.sharp)]
    if len(sharper) > 0.7 * len(sample):
        raise ValueError(
            f"{source}: the pairs are reversed: in {len(sharper)} of {len(sample)} the blurry picture is "
            f"sharper than its partner, such as {sharper[0].blurry} than {sharper[0].sharp}"
        )


def _is_sharper(blurry: Path, sharp: Path) -> bool:
    try:
        return _gradient(blurry) > 1.05 * _gradient(sharp)
    except UNREADABLE:  # training reports it
        return False


def _gradient(path: Path) -> float:
    """Mean size of the differences of neighbouring pixels of the grey, noise being smoothed away first."""
    grey = cv2.GaussianBlur(read_image(path).mean(axis=2), (0, 0), 1.0)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Read all headers; raises ValueError for a pair of two sizes. Damaged files are left to training."""
    for pair in tqdm(pairs, "checking sizes", leave=False, disable=len(pairs) < 1000):
        try:
            shapes = [image_size(path)[::-1] for path in (pair.blurry, pair.sharp)]
        except UNREADABLE:
            continue
        check_alike(pair.blurry, pair.sharp, *shapes)


def check_alike(blurry: Path, sharp: Path, shape: Sequence[int], sharp_shape: Sequence[int]) -> None:
    """Raise ValueError that names both pictures of a pair if their shapes (h, w, ...) differ."""
    if tuple(shape) != tuple(sharp_shape):
        (h, w, *_), (sharp_h, sharp_w, *_) = shape, sharp_shape
        raise ValueError(
            f"the pictures of a pair differ in size: {blurry} is {w}x{h}, "
            f"{sharp} is {sharp_w}x{sharp_h} (width x height)"
        )


def sharp_pairs(folder: str | Path | None) -> list[Pair]:
    """Each sharp picture below a folder, paired with itself: that is how one to be blurred is written.

    In a tree of pairs, or of `sharp` folders, these are the pictures in such folders, grouped by scene;
    elsewhere they are all pictures, each a group of its own, or a sequence where the names tell one.
    Without a folder: none.
    """
    if folder is None:
        return []
    top = Path(folder)
    paths = list_images(top)
    sharp_folders = {sharp for _, sharp in _pair_folders(top) if sharp}
    in_tree = [
        path
        for path in paths
        if "sharp" in map(side, path.relative_to(top).parts[:-1]) or sharp_folders.intersection(path.parents)
    ]
    if in_tree and (len(in_tree) == len(paths) or sharp_folders):
        return _grouped([(path, path) for path in in_tree], top)
    names = scenes([PurePosixPath(path.stem) for path in paths])
    return [Pair(path, path, group=str(path.parent / name)) for path, name in zip(paths, names, strict=True)]


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
