"""Evaluation on held-out pictures while a network trains: the same pictures and the same blur every time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from harness.run import Run
from ldm.data.crop import at_least
from ldm.data.image import read_image, side_by_side
from ldm.data.pairs import Pair, check_alike
from ldm.data.stream import readable
from ldm.metrics import psnr, radial_power, rgb_shift, spectrum_distance, ssim
from ldm.modules.image_degradation.blur import BLUR_TYPES, random_blur

SPECTRUM = 128  # pixels, of the squares whose spectra are compared


class HeldOut:
    """At most `limit` of the pairs, the same in every run of this seed, whole or `crop` pixels in the middle.

    A picture paired with itself is blurred with each of `blur_types`; `blur_options` as in `random_blur`.
    Raises ValueError if nothing is left.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        limit: int,
        seed: int,
        crop: int = 0,
        blur_types: Sequence[str] = tuple(BLUR_TYPES),
        **blur_options: float,
    ):
        self.seed, self.crop, self.blur_options = seed, crop, blur_options
        pairs = [
            replace(pair, blur_type=blur_type)
            for pair in pairs
            for blur_type in (blur_types if pair.blurry == pair.sharp else [pair.blur_type])
        ]
        if not pairs or limit < 1:
            raise ValueError("nothing to evaluate on: no held-out pictures, or a limit of none")
        order = np.random.default_rng(seed).permutation(len(pairs))
        self.pairs = [pairs[index] for index in sorted(order[:limit])]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Blurry and sharp, uint8 (h, w, 3). Raises ValueError if their sizes differ."""
        pair = self.pairs[number]
        sharp = read_image(pair.sharp)
        if pair.blurry == pair.sharp:
            rng = np.random.default_rng([self.seed, number])
            blurry = random_blur(sharp, rng, [pair.blur_type], **self.blur_options)[0]
        else:
            blurry = read_image(pair.blurry)
        check_alike(pair.blurry, pair.sharp, blurry.shape, sharp.shape)
        return middle(blurry, self.crop), middle(sharp, self.crop)

    def evaluate(
        self, restore: Callable[[np.ndarray], np.ndarray], run: Run
    ) -> tuple[dict[str, float], np.ndarray]:
        """`psnr`, `ssim`, `psnr_BLUR_TYPE`, `mse` of values in [-1, 1] (means of per-image values),
        `rgb_shift` (the largest mean shift of a channel, in 1/255); a picture: blurry, restored, sharp.

        `restore` maps a uint8 picture to one of the same size. The processes of `run` share the work.
        """
        rows, shown = [], {k * (len(self) // 4) + k for k in range(4)}  # the shift by k varies the blur type
        mine = range(run.fabric.global_rank, len(self), run.fabric.world_size)
        mine = tqdm(mine, "evaluating", leave=False, disable=not run.fabric.is_global_zero)
        for number, (blurry, sharp) in readable(self, mine):
            restored = restore(blurry)
            row = {"number": number, "blur_type": self.pairs[number].blur_type}
            row |= {"psnr": psnr(restored, sharp), "ssim": ssim(restored, sharp)}
            row["mse"] = 4 * 10 ** (-row["psnr"] / 10)
            row["rgb_shift"] = rgb_shift(restored, sharp)
            if number in shown:
                row["picture"] = side_by_side([middle(image, 320) for image in (blurry, restored, sharp)])
            rows.append(row)
        rows = [row for part in run.gather(rows) for row in part]
        if not rows:
            raise ValueError(f"none of the held-out images can be read, such as {self.pairs[0].sharp}")
        rows.sort(key=lambda row: row["number"])
        return _means(rows), _stack([row["picture"] for row in rows if "picture" in row])


class Spectra:
    """Is the spectrum of blurred pictures that of real ones? Measured on the middle of held-out pictures.

    `real` are pictures by number; without them the blurry ones of the pairs serve.
    """

    def __init__(self, held_out: HeldOut, real: Sequence[np.ndarray] | None = None):
        pairs = [pair for _, pair in readable(held_out, range(len(held_out)))]
        self.sharp, blurry = [sharp for _, sharp in pairs], [blurry for blurry, _ in pairs]
        if real is not None:
            order = np.random.default_rng(held_out.seed).permutation(len(real))[: len(pairs)]
            blurry = [image for _, image in readable(real, order.tolist())]
        self.real, self.plain = self._powers(blurry), self._powers(self.sharp)

    def __call__(self, blur: Callable[[np.ndarray, int], np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
        """Distances to the real blurred pictures in decades of power: `spectrum/sharp` of the sharp ones,
        `spectrum/generated` of what `blur` makes of them (uint8 picture, its number); a picture of both."""
        made = [blur(image, number) for number, image in enumerate(self.sharp)]
        distances = {
            "spectrum/sharp": spectrum_distance(self.plain, self.real),
            "spectrum/generated": spectrum_distance(self._powers(made), self.real),
        }
        both = list(zip(self.sharp, made, strict=True))[:: -(-len(made) // 4)]
        return distances, _stack([side_by_side([middle(image, 320) for image in row]) for row in both])

    @staticmethod
    def _powers(images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([radial_power(middle(at_least(image, SPECTRUM), SPECTRUM)) for image in images])


def _means(rows: list[dict]) -> dict[str, float]:
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("psnr", "ssim", "mse")}
    means["rgb_shift"] = float(np.abs(np.mean([row["rgb_shift"] for row in rows], axis=0)).max())
    for blur_type in sorted({row["blur_type"] for row in rows} - {""}):
        values = [row["psnr"] for row in rows if row["blur_type"] == blur_type]
        means[f"psnr_{blur_type}"] = float(np.mean(values))
    return means


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(side_by_side([p.transpose(1, 0, 2) for p in pictures]).transpose(1, 0, 2))


def middle(image: np.ndarray, size: int) -> np.ndarray:
    """The middle `size` x `size` pixels, or all if the picture is smaller or `size` is 0."""
    h, w = image.shape[:2]
    size = size or max(h, w)
    y, x = max(0, h - size) // 2, max(0, w - size) // 2
    return image[y : y + size, x : x + size]


def report(scores: dict[str, float], blurry: dict[str, float]) -> dict[str, float]:
    """For the log: the scores, those of the blurry pictures, and the gains in PSNR."""
    values = {f"val/{name}": value for name, value in scores.items()}
    values |= {f"val/{name}_blurry": value for name, value in blurry.items()}
    return values | {
        f"gain/{name}": scores[name] - blurry[name] for name in scores if name.startswith("psnr")
    }


def line(values: dict[str, float], scores: dict[str, float], blurry: dict[str, float]) -> str:
    """One evaluation for the reader: the rate, scores beside those of the blurry pictures, spectra."""
    text = f"{values['train/images/s']:.1f} images/s, " if values else ""
    text += ", ".join(
        f"eval {name.replace('_', ' ')}: {scores[name]:{form}} (blurry {blurry[name]:{form}})"
        for name, form in (("psnr", ".2f"), ("ssim", ".4f"), ("rgb_shift", ".2f"))
    )
    if "spectrum/generated" in values:
        text += f", spectrum: {values['spectrum/generated']:.3f} (sharp {values['spectrum/sharp']:.3f})"
    return text
