"""What the names of pictures tell: which side of a pair one is, and from which scene it comes."""

import re
from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath

SHARP = {"gt", "target", "sharp", "clean", "clear", "hq"}
BLURRY = {"blur", "blurry", "blurred", "input", "lq"}
# SRN's folder of sharp images, beside its blurry ones; elsewhere this may be a data set or a result.
DEBLURRED = re.compile(r"deblur(red)?(_lin)?", re.IGNORECASE)
SPLITS = {*"train training val valid validation test testing eval close ups long shot".split()}
# And of data sets, whose folders are no scenes either: MPRNet's train/GoPro/input.
SPLITS |= {*"gopro hide realblur dvd reds dataset datasets large j r".split()}
# What cameras and people call pictures that have nothing in common.
COMMON = {*"img image dsc dscf dscn pxl p photo picture pic scan".split(), *SHARP, *BLURRY}
AFFIX = "|".join(sorted(SHARP | BLURRY))


def words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def side(name: str) -> str:
    """Which pictures a folder or file of this name holds: "sharp", "blurry", or "" if that is not told.

    GoPro's `blur_gamma` tells nothing: it is not used.
    """
    found = words(name)
    told = [kind for kind, known in (("sharp", SHARP), ("blurry", BLURRY)) if found & known]
    return told[0] if len(told) == 1 and "gamma" not in found else ""


def sides(names: Sequence[str]) -> dict[str, str]:
    """The side of each of the folders that lie beside each other: beside blur or blur_lin, deblur and
    deblurred_lin count as sharp if no other folder does."""
    found = {name: side(name) for name in names}
    blurry = any(found[name] == "blurry" and name.lower().startswith("blur") for name in names)
    if blurry and "sharp" not in found.values():
        found |= {name: "sharp" for name in names if DEBLURRED.fullmatch(name)}
    return found


def path_side(path: str | PurePath, other: str | PurePath) -> str:
    """The side that a path tells by what `other`, its partner, has not: the nearest folder, then the name."""
    path, others = PurePath(path), PurePath(other).parts
    names = [*(part for part in reversed(path.parts[:-1]) if part not in others), path.stem]
    return next((told for told in map(side, names) if told), "")


def place(path: PurePath) -> PurePosixPath:
    """A relative path without extension and without what tells its side: s1/gt/gt_2.png becomes s1/2."""
    stem = re.sub(rf"^({AFFIX})[_-]+|[_-]+({AFFIX})$", "", path.stem, flags=re.IGNORECASE)
    folders = (part for part in path.parts[:-1] if not side(part) and not DEBLURRED.fullmatch(part))
    return PurePosixPath(*folders, stem or path.stem)


def scenes(places: Sequence[PurePosixPath]) -> list[str]:
    """The scene of each picture of a data set, from its `place`.

    It is the folder; in a folder of a split (train, test) or data set (GoPro), or in none, the sequence that
    the name begins with (SEQ_000047, SEQ_000047_s001, 47fromSEQ); else the picture is a scene of its own.
    Numbers behind a date, and behind what cameras call every picture (IMG_1), make no sequence.
    """
    sequences = [_sequence(where.name) for where in places]
    known = {sequence for sequence in sequences if sequence}
    result = []
    for where, sequence in zip(places, sequences, strict=True):
        if any(_is_scene(part) for part in where.parts[:-1]):
            result.append(where.parent.as_posix())
            continue
        alone = len(known) == 1 and not re.search(r"\d", sequence)  # one word tells nothing
        name = re.sub(r"_s\d+$", "", where.name) if alone or not sequence else sequence
        result.append((where.parent / name).as_posix())
    return result


def _is_scene(folder: str) -> bool:
    """If a folder holds one scene, not a split or a data set: reds_train_001 does, train2017 does not."""
    return bool(words(folder) - SPLITS or not words(folder) or re.search(r"[_-]\d{2,}$", folder))


def _sequence(stem: str) -> str:
    """What a picture's name has before the number of its frame; "" without such a number."""
    stem = re.sub(r"_s\d+$", "", stem)  # of a crop
    if hide := re.fullmatch(r"\d+from(.+)", stem):
        return hide[1]
    found = re.fullmatch(r"(.+?)[_-]+\d+", stem)
    if not found or re.search(r"(19|20)\d{6}$", found[1]):
        return ""
    if not re.search(r"\d", found[1]) and words(found[1]) & COMMON:
        return ""
    return found[1]
