"""What train_srn.py and the stages of train_dbgan.py train on and are scored on, by their settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.settings import check_counts, check_fractions
from harness.validation import HeldOut, middle
from ldm.data.dead_leaves import DeadLeaves
from ldm.data.paired import (
    BlurDataset,
    ConcatSource,
    CropDataset,
    ImageFiles,
    MixedDataset,
    PairedDataset,
)
from ldm.data.pairs import Pair, check_apart, check_sizes, find_pairs, sharp_pairs, split_pairs
from ldm.data.patches import Patches, Source, SourceDataset, check_paired, is_patches, open_source
from ldm.data.realistic_blur import RealisticBlurDataset

SMALLEST = 11  # pixels that SSIM needs
Data = tuple[CropDataset, HeldOut]


def open_data(settings: Any, stage: str) -> Data:
    """What a stage of train_dbgan.py trains on, and what is held out, by that script's settings.

    Pairs come from `data` (what `find_pairs` takes, or a file of paired patches); without it they are made of
    the sharp pictures in `sharp_dir` and of dead leaves. `blur` takes each sharp picture with any of
    `blur_data`. Raises ValueError if something is not given, or too little for a batch.
    """
    size, seed, cache, data = settings.crop_size, settings.seed, settings.cache, settings.data
    check_pictures(settings, (size,), 16)
    pairs, held_out = _split(settings)
    look = {"augment": True, "color_jitter": settings.color_jitter}
    photographs, smallest = [pair.sharp for pair in pairs], None
    if stage == "blur":
        photographs = [path for path in photographs for _ in range(1 if data else settings.photo_crops)]
        blurry, sharp = open_unpaired(settings, photographs)
        look["candidates"] = settings.crop_candidates if settings.sharp_dir else 1
        dataset = SourceDataset(blurry, sharp, size, seed, **look)
        smallest = min(len(blurry), len(sharp))
    elif is_patches(data):
        dataset = SourceDataset(
            Patches(data, "blur"), Patches(data, "sharp"), size, seed, paired=True, **look
        )
    elif data:
        dataset = PairedDataset(pairs, size, seed, cache=cache, **look)
    elif photographs or settings.dead_leaves:
        dataset = blurred_anew(settings, photographs, size, extra_pairs(settings), **look)
    else:
        raise ValueError(
            f"the stage `{stage}` needs pairs: give --data, --sharp_dir or --dead_leaves (or try --demo)"
        )
    smallest = len(dataset) if smallest is None else smallest
    if smallest < settings.batch_size:
        raise ValueError(f"{smallest} images for `{stage}` are fewer than a batch of {settings.batch_size}")
    return dataset, held_out


def check_pictures(settings: Any, sizes: Sequence[int], multiple: int) -> None:
    """Raise ValueError for settings of pictures that would fail only later; `sizes` are those of crops."""
    check_counts(settings, "photo_crops crop_candidates")
    for size in sizes:
        if size < multiple or size % multiple:
            raise ValueError(f"crop_size must be a multiple of {multiple}, not {size}")
    check_fractions(settings, "sharp_fraction jpeg_probability pairs_fraction")
    if settings.data and settings.dead_leaves:
        raise ValueError("--dead_leaves goes with --sharp_dir or alone, not with the pairs of --data")
    if settings.data and settings.pairs:
        raise ValueError("--pairs goes with --sharp_dir or --dead_leaves, not with the pairs of --data")


def camera(settings: Any) -> dict[str, Any]:
    """How pictures are blurred on the fly."""
    return {"blur_types": settings.blur_types, "scale": settings.blur_scale}


def blurred_anew(
    settings: Any, photographs: Sequence[Path], largest: int, pairs: Sequence[Pair] = (), **look: Any
) -> CropDataset:
    """Crops, at most `largest` pixels wide, of sharp photographs and of dead leaves, blurred on the fly, and
    the fraction `pairs_fraction` of crops of `pairs` (see `extra_pairs`)."""
    leaves = DeadLeaves(largest + 64, settings.dead_leaves, settings.seed)
    sources = ConcatSource((ImageFiles(photographs, settings.cache), settings.photo_crops), (leaves, 1))
    size, seed = settings.crop_size, settings.seed
    if settings.realistic_blur:
        dataset = RealisticBlurDataset(sources, size, seed, settings.crop_candidates, **look)
    else:
        options = {name: getattr(settings, name) for name in ("jpeg_probability", "sharp_fraction")}
        options |= {"candidates": settings.crop_candidates, "field": (0.0, 0.0), **camera(settings)}
        dataset = BlurDataset(sources, size, seed, **options, **look)
    if not pairs:
        return dataset
    real = PairedDataset(pairs, size, seed, cache=settings.cache, match_colors=True, **look)
    return MixedDataset(dataset, real, settings.pairs_fraction)


def extra_pairs(settings: Any) -> list[Pair]:
    """Pairs on disk that are mixed among crops blurred on the fly; none if the fraction is 0."""
    if not settings.pairs:
        return []
    found = find_pairs(settings.pairs)
    check_sizes(found)
    return found if settings.pairs_fraction else []


def _split(settings: Any) -> tuple[list[Pair], HeldOut]:
    """Pairs on disk to train on (sharp pictures with themselves, to be blurred) and what is held out:
    `val_data`, or the part `val_fraction` of them."""
    limits, pairs, held_out = (settings.val_images, settings.seed, settings.val_crop), [], []
    if not is_patches(settings.data):
        pairs = find_pairs(settings.data) if settings.data else sharp_pairs(settings.sharp_dir)
    if is_patches(settings.val_data):
        return pairs, HeldOutPatches(settings.val_data, *limits)
    if settings.val_data:
        held_out = find_pairs(settings.val_data)
    elif pairs:
        pairs, held_out = split_pairs(pairs, settings.val_fraction, settings.seed)
    if not held_out:
        raise ValueError(
            "nothing to evaluate on: give --val_data, or --data or --sharp_dir as folders (or try --demo)"
        )
    return pairs, HeldOut(held_out, *limits, **camera(settings))


def open_unpaired(settings: Any, photographs: list[Path]) -> tuple[Source, Source]:
    """Real blurred pictures, and sharp ones: of `sharp_dir`, else of the pairs, else of the same file."""
    if not settings.blur_data:
        raise ValueError("the stage `blur` needs --blur_data: real blurred photographs (or try --demo)")
    for other in (settings.data, settings.sharp_dir):
        if other and not is_patches(other):  # a file has both sides
            check_apart(settings.blur_data, other)
    blurry = open_source(settings.blur_data, "blur", settings.cache)
    if settings.data and settings.sharp_dir:
        photographs = [pair.sharp for pair in sharp_pairs(settings.sharp_dir)]
    if photographs:
        return blurry, ImageFiles(photographs, settings.cache)
    for path in (settings.data, settings.blur_data):
        if is_patches(path):
            return blurry, Patches(path, "sharp")
    raise ValueError("the stage `blur` needs sharp photographs: give --sharp_dir or --data")


class HeldOutPatches(HeldOut):
    """Held-out pairs (harness.validation.HeldOut) from a file of paired patches."""

    def __init__(self, path: str | Path, limit: int, seed: int, crop: int = 0):
        self.blurry, self.sharp = Patches(path, "blur"), Patches(path, "sharp")
        check_paired(self.blurry, self.sharp)
        if self.sharp.size < SMALLEST:
            raise ValueError(
                f"{path}: patches of {self.sharp.size} pixels cannot be scored, it takes {SMALLEST}"
            )
        names = [Path(self.blurry.name(index)) for index in range(len(self.blurry))]
        super().__init__([Pair(name, Path(f"{name} sharp")) for name in names], limit, seed, crop)
        order = np.random.default_rng(seed).permutation(len(names))
        self.chosen = sorted(order[:limit].tolist())

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.chosen[number]
        return middle(self.blurry[index], self.crop), middle(self.sharp[index], self.crop)
