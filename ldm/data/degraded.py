"""Training data for restoration by FLUX.1 Kontext: clean photographs, degraded on the fly, or real pairs."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.captions import check_captions, read_caption
from ldm.data.image import UNREADABLE, image_size, list_images, read_image, to_tensor, to_uint8
from ldm.data.pairs import check_alike, find_pairs
from ldm.data.stream import first_samples, item_seed
from ldm.modules.image_degradation.damage import DEGRADATIONS, Value, check_damage, damage_sheet, degrade
from ldm.util import listing

TOKEN = 16  # pixels along a side
RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 21 / 9)  # longer to shorter side of a bucket


class DegDataset(Dataset):
    """Photographs and their degraded versions, cut alike.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, holds `control` (degraded) and `target`
    (clean), each float32 (3, resolution, resolution) in [-1, 1], `prompts`, `name` (the clean file),
    `index` (which picture) and `seed`, on which everything random about the sample depends. Each picture
    comes `repeats` times an epoch. The shorter side is scaled to `resolution` unless `native_crop` cuts at
    full scale; without `random_crop` the cut is in the middle. With `lr_data_root` the controls are real
    damaged pictures, those that `find_pairs(lr_data_root, hr_data_root)` finds, instead of synthetic ones.

    With `buckets` a sample is (3, h, w), of `bucket_sizes` the one nearest to its picture's shape; `group`
    tells which. The prompt is `instance_prompt`, or with `captions` what NAME.txt beside the clean or the
    damaged picture says, if there is one; `caption_dropout` of the samples have an empty prompt.

    `lr_scale` is the factor lost to downsampling, `noise_level` the standard deviation in [0, 1] units,
    `blur_radius` the standard deviation of the Gaussian in pixels, `jpeg_quality` 1 to 100, `damage_strength`
    that of the other kinds (KINDS): each a number, or a pair from which it is drawn for every picture. Order
    and rounds as in `ldm.modules.image_degradation.damage.degrade`.
    Raises ValueError for an unknown degradation or value, pictures smaller than what is cut from them, pairs
    of unequal size, captions that are no text.
    """

    def __init__(
        self,
        hr_data_root: str | Path,
        instance_prompt: str,
        lr_scale: Value = 8,
        repeats: int = 1,
        degradation_types: Sequence[str] | None = None,
        noise_level: Value = 0.05,
        blur_radius: Value = 1.0,
        jpeg_quality: Value = 75,
        resolution: int = 512,
        random_crop: bool = True,
        random_flip: bool = True,
        native_crop: bool = False,
        lr_data_root: str | Path | None = None,
        seed: int = 0,
        damage_strength: Value = (0.2, 0.8),
        degradation_order: str = "fixed",
        degradation_rounds: int = 1,
        buckets: bool = False,
        captions: bool = False,
        caption_dropout: float = 0.0,
    ):
        self.types = DEGRADATIONS if degradation_types is None else tuple(degradation_types)
        self.values = {"lr_scale": lr_scale, "noise_level": noise_level, "blur_radius": blur_radius}
        self.values |= {"jpeg_quality": jpeg_quality, "damage_strength": damage_strength}
        check_damage(self.types, self.values)
        for name, value in (("repeats", repeats), ("degradation_rounds", degradation_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if degradation_order not in ("fixed", "given", "random"):
            raise ValueError(f"degradation_order must be fixed, given or random, not {degradation_order!r}")
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), not {caption_dropout}")
        if resolution < TOKEN or resolution % TOKEN:
            raise ValueError(f"resolution must be a multiple of 16, not {resolution}")
        self.order, self.rounds = degradation_order, degradation_rounds
        if lr_data_root:
            pairs = find_pairs(lr_data_root, hr_data_root, blurred=False)
            self.targets, self.controls = [p.sharp for p in pairs], [p.blurry for p in pairs]
        else:
            self.targets, self.controls = list_images(hr_data_root), None
        sizes = bucket_sizes(resolution) if buckets else [(resolution, resolution)]
        self.sizes = _cut_sizes(self.targets, sizes)
        _cut_sizes(self.controls or [], sizes)
        self.captioned, self.caption_dropout = 0, caption_dropout
        self.instance_prompt, self.prompts = instance_prompt, [instance_prompt] * len(self.targets)
        if captions:
            self._read_captions()
        self.repeats, self.seed = repeats, seed
        self.random_crop, self.random_flip, self.native_crop = random_crop, random_flip, native_crop

    @property
    def fixed_targets(self) -> bool:
        """Whether a picture's target is the same in every epoch, so that its latent may be kept."""
        return not (self.random_crop or self.random_flip)

    @property
    def fixed_controls(self) -> bool:
        """The same of the control: synthetic damage is new in every epoch."""
        return self.fixed_targets and self.controls is not None

    def __len__(self) -> int:
        return len(self.targets) * self.repeats

    def group(self, key: int | tuple[int, int]) -> tuple[int, int]:
        """Height and width of a sample: those of a batch must be the same."""
        return self.sizes[(key[1] if isinstance(key, tuple) else key) % len(self.targets)]

    def describe(self) -> str:
        """What it holds, in a line."""
        text = f"{len(self.targets)} pictures"
        if len(counts := Counter(self.sizes)) > 1:
            text += ", " + ", ".join(f"{w}x{h}: {n}" for (h, w), n in sorted(counts.items()))
        lacking = len(self.targets) - self.captioned
        return f"{text}; {lacking} without a caption take the prompt" if self.captioned and lacking else text

    def _read_captions(self) -> None:
        check_captions([*self.targets, *(self.controls or [])])
        beside = zip(self.targets, self.controls or self.targets, strict=True)
        found = [read_caption(*pair) for pair in beside]
        self.captioned = sum(map(bool, found))
        self.prompts = [own or prompt for own, prompt in zip(found, self.prompts, strict=True)]

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        index = (key[1] if isinstance(key, tuple) else key) % len(self.targets)
        target = read_image(self.targets[index])
        control = read_image(self.controls[index]) if self.controls else target
        if self.controls:
            check_alike(self.controls[index], self.targets[index], control.shape, target.shape)
        cut = self._draw_cut(*target.shape[:2], self.sizes[index], rng)
        target, control = cut(target), cut(control)
        if self.controls is None:
            control = self.apply_degradation(control, rng)
        apart = np.random.default_rng([seed, 1])  # `rng` stays as it was
        return {
            "control": to_tensor(control),
            "target": to_tensor(target),
            "prompts": "" if apart.random() < self.caption_dropout else self.prompts[index],
            "name": str(self.targets[index]),
            "index": index,
            "seed": seed,
        }

    def apply_degradation(
        self, img: np.ndarray | Image.Image, rng: np.random.Generator | None = None
    ) -> np.ndarray | Image.Image:
        """A damaged copy of a picture, uint8 (h, w, 3) or Pillow's, of the same type and size."""
        rng = np.random.default_rng() if rng is None else rng
        pixels = np.asarray(img.convert("RGB") if isinstance(img, Image.Image) else img)
        damaged = degrade(pixels, rng, self.types, **self.values, order=self.order, rounds=self.rounds)
        return Image.fromarray(damaged) if isinstance(img, Image.Image) else damaged

    def _draw_cut(self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator) -> Callable:
        """One scale, crop and flip, as a function that is then applied to both pictures."""
        h, w = size
        scale = 1.0 if self.native_crop else max(h / height, w / width)
        height, width = max(h, round(height * scale)), max(w, round(width * scale))
        y, x = (height - h) // 2, (width - w) // 2
        if self.random_crop:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        step = -1 if self.random_flip and rng.random() < 0.5 else 1

        def cut(image: np.ndarray) -> np.ndarray:
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return image[y : y + h, x : x + w][:, ::step]

        return cut


def example_sheet(dataset: Dataset, count: int = 6) -> np.ndarray:
    """Rows of control and target, uint8 (rows * h, 2 * w, 3), to hold against one's own damaged pictures."""
    items = first_samples(dataset, count)
    return stack_rows([np.hstack([to_uint8(item["control"]), to_uint8(item["target"])]) for item in items])


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures (h, w, 3) below each other, those that are narrower than others on white."""
    width = max(row.shape[1] for row in rows)
    white = {"borderType": cv2.BORDER_CONSTANT, "value": (255, 255, 255)}
    return np.vstack([cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], **white) for row in rows])


def kinds_sheet(dataset: DegDataset, side: int = 192) -> np.ndarray:
    """A row for each kind of damage: a picture, then it with less and with more of that kind alone."""
    clean = to_uint8(first_samples(dataset, 1)[0]["target"])
    small = cv2.resize(clean, (side, side), interpolation=cv2.INTER_AREA) if len(clean) > side else clean
    return damage_sheet(small, dataset.types, dataset.values) if dataset.types else small


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Heights and widths of at most resolution^2 pixels, multiples of 16, near to RATIOS; no size twice."""
    side = resolution // TOKEN
    longer = [round(side * ratio**0.5) for ratio in RATIOS]
    sides = [(side * side // n * TOKEN, n * TOKEN) for n in longer if n <= side * side]
    return list(dict.fromkeys([*sides, *(size[::-1] for size in sides)]))


def _cut_sizes(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Height and width of what is cut from each picture: of `sizes` the nearest in shape, which must fit."""
    chosen, small = [], []
    for path in paths:
        try:
            width, height = image_size(path)  # the header alone
        except UNREADABLE:
            chosen.append(None)  # training says so
            continue
        errors = [abs(math.log(height * w / (width * h))) for h, w in sizes]
        chosen.append(sizes[int(np.argmin(errors))])
        if height < chosen[-1][0] or width < chosen[-1][1]:
            small.append(f"{path} ({width}x{height})")
    if small:
        least = f"{sizes[0][1]} px" if len(sizes) == 1 else "their buckets"
        raise ValueError(
            f"{len(small)} of {len(paths)} pictures are smaller than {least}: "
            f"{listing(small, 3)}. Take them out or lower --resolution"
        )
    counts = Counter(size for size in chosen if size) or Counter(sizes)
    most, _ = counts.most_common(1)[0]  # in the largest bucket another image can take the place
    return [size or most for size in chosen]
