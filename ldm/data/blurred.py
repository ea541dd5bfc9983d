"""Training data from sharp photos and dead leaves that are blurred on the fly, with real pairs among them."""

from collections.abc import Sequence
from pathlib import Path

from ldm.data.dead_leaves import DeadLeaves
from ldm.data.paired import BlurDataset, ConcatSource, CropDataset, ImageFiles, MixedDataset, PairedDataset
from ldm.data.pairs import check_sizes, find_pairs
from ldm.data.realistic_blur import RealisticBlurDataset

LEAVES_MARGIN = 64  # pixels by which dead leaves are larger than a crop


def blurred_photos(
    photos: Sequence[Path],
    dead_leaves: int,
    size: int,
    seed: int,
    realistic: bool = True,
    repeats: int = 1,
    candidates: int = 1,
    pairs: Path | None = None,
    pairs_fraction: float = 0.1,
    cache: bool = False,
    blur_scale: float = 1.0,
    **options: float,
) -> CropDataset:
    """Crops of sharp photos, each `repeats` times in an epoch, and of `dead_leaves` new images an epoch.

    The blur is that of real cameras, or with `realistic` off one of four simple kinds, `blur_scale` times as
    large as usual. Of `candidates` random crops the sharpest is taken. `pairs_fraction` of the crops are of
    real pairs, if `pairs` names some. `options` are those of CropDataset. Raises FileNotFoundError or
    ValueError if there are no such pairs, or the sizes of one differ.
    """
    leaves = DeadLeaves(size + LEAVES_MARGIN, dead_leaves, seed)
    sources = ConcatSource((ImageFiles(photos, cache), repeats), (leaves, 1))
    if realistic:
        dataset = RealisticBlurDataset(sources, size, seed, candidates, **options)
    else:
        no_vignette = (0.0, 0.0)  # light falls off towards the corners of a photo, not of a crop
        dataset = BlurDataset(
            sources, size, seed, candidates=candidates, field=no_vignette, scale=blur_scale, **options
        )
    if pairs is None:
        return dataset
    found = find_pairs(pairs)
    check_sizes(found)
    real = PairedDataset(found, size, seed, cache=cache, match_colors=True, **options)
    return MixedDataset(dataset, real, pairs_fraction)
