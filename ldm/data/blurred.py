"""Training data from sharp photos and dead leaves, blurred on the fly and mixed with real pairs."""

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
    """Make a data set of crops: each photo `repeats` times an epoch, and `dead_leaves` new images an epoch.

    The blur is that of RealisticBlurDataset, or with `realistic` off one of BlurDataset's four simple kinds,
    `blur_scale` times as large as usual. The sharpest of `candidates` random crops is used. If `pairs` is
    given, the fraction `pairs_fraction` of the crops comes from these real pairs. `options` are passed to
    CropDataset. Raises FileNotFoundError or ValueError if `pairs` holds none, or the sizes of a pair differ.
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
    real = PairedDataset(found, size, seed, cache=cache, **options)
    return MixedDataset(dataset, real, pairs_fraction)
