"""Derive from file names whether an image is blurry or sharp, and which scene it belongs to."""

import re
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

# Words in the names of folders: GoPro and REDS have blur and sharp, RealBlur blur and gt, DVD input and gt,
# MPRNet and Restormer input and target, BasicSR lq and gt, tool_make_deblur_dataset.py blur and clear.
BLURRY = {*"blur blurry blurred input lq".split()}
SHARP = {*"sharp gt target clear clean hq".split()}
UNUSED = {"gamma", "avg"}  # GoPro's blur_gamma and RSBlur's avg_blur, further versions of the blurry images
# SRN's folder of sharp images beside its blurry ones; elsewhere this name may be a data set or a result.
DEBLURRED = re.compile(r"deblur(red)?(_lin)?", re.IGNORECASE)
# Words of folders that are not scenes: splits and data sets (MPRNet's train/GoPro/input).
SPLITS = {*"train training val valid validation test testing eval close ups long shot".split()}
SPLITS |= {*"gopro hide realblur rsblur dvd reds dataset datasets large j r".split()}
# Words in a folder's name -> its split.
SPLIT_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF |= dict.fromkeys(("val", "valid", "validation", "eval"), "val")
# Generic names that cameras and people give to unrelated images.
COMMON = {*"img image dsc dscf dscn pxl p photo picture pic scan".split(), *SHARP, *BLURRY}
AFFIX = "|".join(sorted(SHARP | BLURRY))


def words(name: str) -> set[str]:
    """Return the words of letters in a name, in lower case."""
    return set(re.findall("[a-z]+", name.lower()))


def side(name: str) -> str:
    """Return the side that a folder or file has by its name: "sharp", "blurry", or "" if unclear."""
    found = words(name)
    is_sharp, is_blurry = bool(found & SHARP), bool(found & BLURRY)
    if is_sharp == is_blurry or found & UNUSED:
        return ""
    return "sharp" if is_sharp else "blurry"


def path_side(path: str | PurePath, other: str | PurePath) -> str:
    """Return the side of a path: by the nearest folder that its counterpart does not share, else its name."""
    path, others = PurePath(path), PurePath(other).parts
    names = [*(part for part in reversed(path.parts[:-1]) if part not in others), path.stem]
    return next((found for found in map(side, names) if found), "")


def split_of(path: PurePath) -> str:
    """Return the split that a folder of a relative path names: "train", "val" or "test", or "" if none does.

    Folders of a single scene (reds_train_001) do not count.
    """
    for folder in path.parts[:-1]:
        found = words(folder) & SPLIT_OF.keys()
        if found and not _is_numbered(folder):
            return SPLIT_OF[min(found)]
    return ""


def place(path: PurePath) -> PurePosixPath:
    """Strip a relative path of its extension and the words of its side: s1/gt/gt_2.png becomes s1/2."""
    stem = re.sub(rf"^({AFFIX})[_-]+|[_-]+({AFFIX})$", "", path.stem, flags=re.IGNORECASE)
    folders = (part for part in path.parts[:-1] if not side(part) and not DEBLURRED.fullmatch(part))
    return PurePosixPath(*folders, stem or path.stem)


def scenes(places: Sequence[PurePosixPath]) -> list[str]:
    """Return the scene of each image of a data set, given its `place`.

    The scene is the folder. In a folder of a split (train, test) or data set (GoPro), or in none, it is the
    sequence in the file name (SEQ in SEQ_000047, SEQ_000047_s001, 47fromSEQ), else the image is its own
    scene. Numbers after a date or after generic camera names (IMG_1) do not form a sequence.
    """
    sequences = [_sequence(where.name) for where in places]
    known = {sequence for sequence in sequences if sequence}
    result = []
    for where, sequence in zip(places, sequences, strict=True):
        if any(_is_scene(folder) for folder in where.parts[:-1]):
            result.append(where.parent.as_posix())
            continue
        # A single word without digits that all sequences share, as in frame_1, is not a scene's name.
        alone = len(known) == 1 and not re.search(r"\d", sequence)
        if alone or not sequence:
            sequence = re.sub(r"_s\d+$", "", where.name)
        result.append((where.parent / sequence).as_posix())
    return result


def _is_scene(folder: str) -> bool:
    """Return True for the folder of one scene (reds_train_001), False for a split or data set (train2017)."""
    found = words(folder)
    return not found or bool(found - SPLITS) or _is_numbered(folder)


def _is_numbered(folder: str) -> bool:
    return bool(re.search(r"[_-]\d{2,}$", folder))


def _sequence(stem: str) -> str:
    """Return the sequence in an image's name, without the frame number; "" if there is none."""
    stem = re.sub(r"_s\d+$", "", stem)  # the number of a crop
    if hide := re.fullmatch(r"\d+from(.+)", stem):
        return hide[1]
    found = re.fullmatch(r"(.+?)[_-]+\d+", stem)
    if not found or re.search(r"(19|20)\d{6}$", found[1]):
        return ""
    if not re.search(r"\d", found[1]) and words(found[1]) & COMMON:
        return ""
    return found[1]
