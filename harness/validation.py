"""Validation on held-out images while a network trains: the same images and the same blur every time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.run import Run
from ldm.data.crop import at_least
from ldm.data.image import photographs, read_image, side_by_side
from ldm.data.pairs import Pair, check_alike, find_pairs, split_pairs
from ldm.data.patches import Patches, check_paired, is_patches
from ldm.data.stream import readable
from ldm.metrics import psnr, radial_power, rgb_shift, spectrum_distance, ssim
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur

SPECTRUM = 128  # side of the squares whose spectra are compared, in pixels
SMALLEST = 11  # side of the smallest image that SSIM can score
SHOWN = 320  # largest side of an image in a grid, in pixels


class HeldOut:
    """Held-out pairs: at most `limit`, chosen by `seed`; whole images, or their middle `crop` pixels.

    An image paired with itself is blurred with each of the blur types, `blur_scale` times as much as usual.
    Raises ValueError if no pair is left.
    """

    def __init__(self, pairs: Sequence[Pair], limit: int, seed: int, crop: int = 0, blur_scale: float = 1.0):
        self.seed, self.crop, self.blur_scale = seed, crop, blur_scale
        everything = []
        for pair in pairs:
            types = BLUR_TYPES if pair.blurry == pair.sharp else [pair.blur_type]
            everything += [replace(pair, blur_type=blur_type) for blur_type in types]
        if not everything or limit < 1:
            raise ValueError("nothing to evaluate on: no held-out images, or a limit of none")
        order = np.random.default_rng(seed).permutation(len(everything))
        self.chosen = sorted(order[:limit].tolist())
        self.pairs = [everything[index] for index in self.chosen]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a blurry and a sharp image, uint8 (h, w, 3). Raises ValueError if their sizes differ."""
        blurry, sharp = self.read(number)
        return middle(blurry, self.crop), middle(sharp, self.crop)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a whole pair; an image paired with itself is blurred."""
        pair = self.pairs[number]
        sharp = read_image(pair.sharp)
        if pair.blurry == pair.sharp:
            rng = np.random.default_rng([self.seed, number])
            blurry = random_blur(sharp, rng, [pair.blur_type], scale=self.blur_scale)[0]
        else:
            blurry = read_image(pair.blurry)
        check_alike(pair.blurry, pair.sharp, blurry.shape, sharp.shape)
        return blurry, sharp

    def evaluate(
        self, restore: Callable[[np.ndarray], np.ndarray], run: Run
    ) -> tuple[dict[str, float], np.ndarray]:
        """Return the scores of restored images, and an image grid of blurry, restored and sharp.

        Scores are means over the images of `psnr`, `ssim`, `psnr_BLUR_TYPE` and `mse` (of values in [-1, 1]),
        and `rgb_shift`, the largest mean shift of a channel in units of 1/255. `restore` maps a uint8 image
        to one of the same size. The processes of `run` share the work.
        """
        shown = {k * (len(self) // 4) + k for k in range(4)}  # the shift by k varies the blur type
        mine = range(run.fabric.global_rank, len(self), run.fabric.world_size)
        mine = tqdm(mine, "evaluating", leave=False, disable=not run.fabric.is_global_zero)
        rows = []
        for number, (blurry, sharp) in readable(self, mine):
            restored = restore(blurry)
            similarity = psnr(restored, sharp)
            row = {
                "number": number,
                "blur_type": self.pairs[number].blur_type,
                "psnr": similarity,
                "ssim": ssim(restored, sharp),
                "mse": 4 * 10 ** (-similarity / 10),
                "rgb_shift": rgb_shift(restored, sharp),
            }
            if number in shown:
                row["image"] = side_by_side([middle(image, SHOWN) for image in (blurry, restored, sharp)])
            rows.append(row)
        rows = [row for part in run.gather(rows) for row in part]
        if not rows:
            raise ValueError(f"none of the held-out images can be read, such as {self.pairs[0].sharp}")
        rows.sort(key=lambda row: row["number"])
        return _means(rows), _stack([row["image"] for row in rows if "image" in row])


class HeldOutPatches(HeldOut):
    """Held-out pairs from a file of paired patches (ldm.data.patches)."""

    def __init__(self, path: Path, limit: int, seed: int, crop: int = 0):
        self.blurry, self.sharp = Patches(path, "blur"), Patches(path, "sharp")
        check_paired(self.blurry, self.sharp)
        if self.sharp.size < SMALLEST:
            raise ValueError(
                f"{path}: patches of {self.sharp.size} pixels cannot be scored, it takes {SMALLEST}"
            )
        names = [Path(self.blurry.name(index)) for index in range(len(self.blurry))]
        super().__init__([Pair(name, Path(f"{name} sharp")) for name in names], limit, seed, crop)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a pair of patches."""
        index = self.chosen[number]
        return self.blurry[index], self.sharp[index]


def open_held_out(
    pairs: list[Pair],
    val_data: Path | None,
    fraction: float,
    limit: int,
    seed: int,
    crop: int = 0,
    blur_scale: float = 1.0,
) -> tuple[list[Pair], HeldOut]:
    """Split `pairs` into those to train on and those to validate on.

    Validation uses the pairs of `val_data` if given (a file of patches, or anything that find_pairs takes),
    else a `fraction` of `pairs`; if there are no pairs, scikit-image's photos, which are blurred.
    """
    if is_patches(val_data):
        return pairs, HeldOutPatches(val_data, limit, seed, crop)
    if val_data:
        held_out = find_pairs(val_data)
    elif pairs:
        pairs, held_out = split_pairs(pairs, fraction, seed)
    else:
        held_out = [Pair(path, path) for path in photographs()]
    return pairs, HeldOut(held_out, limit, seed, crop, blur_scale)


class Spectra:
    """Comparison of the power spectra of generated and real blurred images, each in the image's middle.

    `real` is a sequence of real blurred images; None uses the blurry images of the held-out pairs.
    """

    def __init__(self, held_out: HeldOut, real: Sequence[np.ndarray] | None = None):
        pairs = [pair for _, pair in readable(held_out, range(len(held_out)))]
        self.sharp = [sharp for _, sharp in pairs]
        if real is None:
            blurry = [blurry for blurry, _ in pairs]
        else:
            order = np.random.default_rng(held_out.seed).permutation(len(real))[: len(pairs)]
            blurry = [image for _, image in readable(real, order.tolist())]
        self.real_powers = _powers(blurry)
        self.sharp_powers = _powers(self.sharp)

    def __call__(self, blur: Callable[[np.ndarray, int], np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
        """Return distances to the real blurred images, in decades of power: `spectrum/sharp` for the sharp
        images, `spectrum/generated` for blur(uint8 image, number) of each; and a grid of both."""
        made = [blur(image, number) for number, image in enumerate(self.sharp)]
        distances = {
            "spectrum/sharp": spectrum_distance(self.sharp_powers, self.real_powers),
            "spectrum/generated": spectrum_distance(_powers(made), self.real_powers),
        }
        step = -(-len(made) // 4)  # at most four rows
        rows = zip(self.sharp[::step], made[::step], strict=True)
        return distances, _stack([side_by_side([middle(image, SHOWN) for image in row]) for row in rows])


def _powers(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([radial_power(middle(at_least(image, SPECTRUM), SPECTRUM)) for image in images])


def _means(rows: list[dict]) -> dict[str, float]:
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("psnr", "ssim", "mse")}
    means["rgb_shift"] = float(np.abs(np.mean([row["rgb_shift"] for row in rows], axis=0)).max())
    for blur_type in sorted({row["blur_type"] for row in rows} - {""}):
        values = [row["psnr"] for row in rows if row["blur_type"] == blur_type]
        means[f"psnr_{blur_type}"] = float(np.mean(values))
    return means


def _stack(images: list[np.ndarray]) -> np.ndarray:
    turned = side_by_side([image.transpose(1, 0, 2) for image in images])
    return np.ascontiguousarray(turned.transpose(1, 0, 2))


def middle(image: np.ndarray, size: int) -> np.ndarray:
    """Return the middle `size` x `size` pixels, or all if the image is smaller or `size` is 0."""
    h, w = image.shape[:2]
    size = size or max(h, w)
    y, x = max(0, h - size) // 2, max(0, w - size) // 2
    return image[y : y + size, x : x + size]


def report(scores: dict[str, float], blurry: dict[str, float]) -> dict[str, float]:
    """Return the scores, those of the blurry images, and the gains in PSNR, by their names in the log."""
    values = {f"val/{name}": value for name, value in scores.items()}
    values |= {f"val/{name}_blurry": value for name, value in blurry.items()}
    return values | {
        f"gain/{name}": scores[name] - blurry[name] for name in scores if name.startswith("psnr")
    }


def line(values: dict[str, float], scores: dict[str, float], blurry: dict[str, float]) -> str:
    """Format a validation as one line: images/s, scores beside those of the blurry images, spectra."""
    parts = [f"{values['train/images/s']:.1f} images/s"] if values else []
    for name, form in (("psnr", ".2f"), ("ssim", ".4f"), ("rgb_shift", ".2f")):
        title = name.replace("_", " ")
        parts.append(f"eval {title}: {scores[name]:{form}} (blurry {blurry[name]:{form}})")
    if "spectrum/generated" in values:
        generated, sharp = values["spectrum/generated"], values["spectrum/sharp"]
        parts.append(f"spectrum: {generated:.3f} (sharp {sharp:.3f})")
    return ", ".join(parts)
