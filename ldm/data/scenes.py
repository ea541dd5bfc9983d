"""Facts from image names: the side of a pair that one belongs to, and the scene it comes from."""

import re
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

# Words in the names of folders: GoPro and REDS have blur and sharp, RealBlur blur and gt, DVD input and gt,
# MPRNet and Restormer input and target, BasicSR lq and gt, tool_make_deblur_dataset.py blur and clear.
BLURRY = {*"blur blurry blurred input lq".split()}
SHARP = {*"sharp gt target clear clean hq".split()}
UNUSED = {"gamma", "avg"}  # GoPro's blur_gamma and RSBlur's avg_blur, further versions of the blurry images
# SRN's folder of sharp images, beside its blurry ones; elsewhere this may be a data set or a result.
DEBLURRED = re.compile(r"deblur(red)?(_lin)?", re.IGNORECASE)
# Folders that are no scenes: parts of data sets, and data sets (MPRNet's train/GoPro/input).
SPLITS = {*"train training val valid validation test testing eval close ups long shot".split()}
SPLITS |= {*"gopro hide realblur rsblur dvd reds dataset datasets large j r".split()}
# Words that name the split of a folder, and the split.
SPLIT_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF |= dict.fromkeys(("val", "valid", "validation", "eval"), "val")
# Names that cameras and people give to images that have nothing in common.
COMMON = {*"img image dsc dscf dscn pxl p photo picture pic scan".split(), *SHARP, *BLURRY}
AFFIX = "|".join(sorted(SHARP | BLURRY))


def words(name: str) -> set[str]:
    """The words of letters in a name, in lower case."""
    return set(re.findall("[a-z]+", name.lower()))


def side(name: str) -> str:
    """The side that a folder or file of this name holds: "sharp", "blurry", or "" if that is not told."""
    found = words(name)
    is_sharp, is_blurry = bool(found & SHARP), bool(found & BLURRY)
    if is_sharp == is_blurry or found & UNUSED:
        return ""
    return "sharp" if is_sharp else "blurry"


def path_side(path: str | PurePath, other: str | PurePath) -> str:
    """The side of a path that its counterpart does not share: from the nearest folder, else from the name."""
    path, others = PurePath(path), PurePath(other).parts
    names = [*(part for part in reversed(path.parts[:-1]) if part not in others), path.stem]
    return next((found for found in map(side, names) if found), "")


def split_of(path: PurePath) -> str:
    """The split that a folder of a relative path names: "train", "val" or "test", or "" if none does.

    The folder of one scene (reds_train_001) names none.
    """
    for folder in path.parts[:-1]:
        found = words(folder) & SPLIT_OF.keys()
        if found and not _is_numbered(folder):
            return SPLIT_OF[min(found)]
    return ""


def place(path: PurePath) -> PurePosixPath:
    """A relative path without extension and without the words of its side: s1/gt/gt_2.png becomes s1/2."""
    stem = re.sub(rf"^({AFFIX})[_-]+|[_-]+({AFFIX})$", "", path.stem, flags=re.IGNORECASE)
    folders = (part for part in path.parts[:-1] if not side(part) and not DEBLURRED.fullmatch(part))
    return PurePosixPath(*folders, stem or path.stem)


def scenes(places: Sequence[PurePosixPath]) -> list[str]:
    """The scene of each image of a data set, from its `place`.

    It is the folder. In a folder of a split (train, test) or data set (GoPro), or in none, it is the sequence
    that the name begins with (SEQ_000047, SEQ_000047_s001, 47fromSEQ); else the image is a scene of its own.
    Numbers behind a date, and behind names that cameras give to all images (IMG_1), make no sequence.
    """
    sequences = [_sequence(where.name) for where in places]
    known = {sequence for sequence in sequences if sequence}
    result = []
    for where, sequence in zip(places, sequences, strict=True):
        if any(_is_scene(folder) for folder in where.parts[:-1]):
            result.append(where.parent.as_posix())
            continue
        # One word without digits that begins all names, as in frame_1, tells nothing.
        alone = len(known) == 1 and not re.search(r"\d", sequence)
        if alone or not sequence:
            sequence = re.sub(r"_s\d+$", "", where.name)
        result.append((where.parent / sequence).as_posix())
    return result


def _is_scene(folder: str) -> bool:
    """True for the folder of one scene, False for a split or data set: reds_train_001, train2017."""
    found = words(folder)
    return not found or bool(found - SPLITS) or _is_numbered(folder)


def _is_numbered(folder: str) -> bool:
    return bool(re.search(r"[_-]\d{2,}$", folder))


def _sequence(stem: str) -> str:
    """The part of an image's name before the number of its frame; "" without such a number."""
    stem = re.sub(r"_s\d+$", "", stem)  # the number of a crop
    if hide := re.fullmatch(r"\d+from(.+)", stem):
        return hide[1]
    found = re.fullmatch(r"(.+?)[_-]+\d+", stem)
    if not found or re.search(r"(19|20)\d{6}$", found[1]):
        return ""
    if not re.search(r"\d", found[1]) and words(found[1]) & COMMON:
        return ""
    return found[1]
