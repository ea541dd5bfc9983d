"""Training data for restoration by FLUX.1 Kontext: clean photographs, degraded on the fly, or real pairs."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.captions import read_caption
from ldm.data.image import UNREADABLE, image_size, list_images, read_image, to_tensor, to_uint8
from ldm.data.pairs import check_alike, find_pairs
from ldm.data.stream import Key, first_samples, item_seed, split_key
from ldm.modules.image_degradation.degrade import DEGRADATIONS, Value, check_degradation, degrade
from ldm.util import listing

TOKEN = 16  # pixels along a side
RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 21 / 9)  # longer to shorter side of a bucket
ORDERS = ("fixed", "given", "random")


class DegDataset(Dataset):
    """Photographs and their degraded versions, cropped alike.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, holds `control` (degraded) and `target`
    (clean), each float32 (3, resolution, resolution) in [-1, 1], `prompts`, `name` (the clean file) and
    `seed`, on which everything random about the sample depends. Each image comes `repeats` times an epoch.
    The shorter side is scaled to `resolution` unless `native_crop` crops at full scale; without `random_crop`
    the crop is the middle. With `lr_data_root` the controls are real degraded images, those that
    `find_pairs(lr_data_root, hr_data_root)` finds, instead of synthetic ones.

    With `buckets` a sample is (3, h, w), the one of `bucket_sizes` nearest to its shape (`group`).
    The prompt is `instance_prompt`, or with `captions` the text of NAME.txt beside the clean or the degraded
    image, where there is one.

    `lr_scale` is the factor lost to downsampling, `noise_level` the standard deviation in [0, 1] units,
    `blur_radius` the standard deviation of the Gaussian in pixels, `jpeg_quality` 1 to 100,
    `degradation_strength` that of the other kinds (KINDS), 0 to 1: each a number, or a pair from which it is
    drawn for every image. For order and rounds see `degrade`.
    Raises ValueError for an unknown degradation or value, images smaller than their crops, pairs of unequal
    size, captions that are no text.
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
        degradation_strength: Value = (0.2, 0.8),
        degradation_order: str = "fixed",
        degradation_rounds: int = 1,
        buckets: bool = False,
        captions: bool = False,
    ):
        self.types = DEGRADATIONS if degradation_types is None else tuple(degradation_types)
        self.values = {
            "lr_scale": lr_scale,
            "noise_level": noise_level,
            "blur_radius": blur_radius,
            "jpeg_quality": jpeg_quality,
            "degradation_strength": degradation_strength,
        }
        check_degradation(self.types, self.values)
        if min(repeats, degradation_rounds) < 1:
            raise ValueError(
                f"repeats and degradation_rounds must be at least 1, not {repeats}, {degradation_rounds}"
            )
        if degradation_order not in ORDERS:
            raise ValueError(f"degradation_order must be one of {ORDERS}, not {degradation_order!r}")
        if resolution < TOKEN or resolution % TOKEN:
            raise ValueError(f"resolution must be a multiple of {TOKEN}, not {resolution}")
        self.order, self.rounds = degradation_order, degradation_rounds
        self.repeats, self.seed = repeats, seed
        self.random_crop, self.random_flip, self.native_crop = random_crop, random_flip, native_crop
        if lr_data_root:
            pairs = find_pairs(lr_data_root, hr_data_root, blurred=False)
            self.targets = [pair.sharp for pair in pairs]
            self.controls = [pair.blurry for pair in pairs]
        else:
            self.targets, self.controls = list_images(hr_data_root), None
        sizes = bucket_sizes(resolution) if buckets else [(resolution, resolution)]
        self.sizes = _crop_sizes(self.targets, sizes)
        _crop_sizes(self.controls or [], sizes)
        self.instance_prompt = instance_prompt
        self.prompts = [instance_prompt] * len(self.targets)
        self.captioned = 0  # images whose prompt is a caption
        if captions:
            self._read_captions()

    def __len__(self) -> int:
        return len(self.targets) * self.repeats

    def group(self, key: Key) -> tuple[int, int]:
        """Height and width of a sample: a batch has samples of one size."""
        return self.sizes[split_key(key)[1] % len(self.targets)]

    def describe(self) -> str:
        """Say in a line what the dataset holds."""
        text = f"{len(self.targets)} images"
        counts = Counter(self.sizes)
        if len(counts) > 1:
            text += ", " + ", ".join(f"{w}x{h}: {count}" for (h, w), count in sorted(counts.items()))
        lacking = len(self.targets) - self.captioned
        if self.captioned and lacking:
            text += f"; {lacking} without a caption take the prompt"
        return text

    def _read_captions(self) -> None:
        controls = self.controls or self.targets
        for number, (target, control) in enumerate(zip(self.targets, controls, strict=True)):
            caption = read_caption(target, control)
            if caption:
                self.prompts[number] = caption
                self.captioned += 1

    def __getitem__(self, key: Key) -> dict:
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        index = split_key(key)[1] % len(self.targets)
        target = read_image(self.targets[index])
        control = target
        if self.controls:
            control = read_image(self.controls[index])
            check_alike(self.controls[index], self.targets[index], control.shape, target.shape)
        crop = self._draw_crop(*target.shape[:2], self.sizes[index], rng)
        target, control = crop(target), crop(control)
        if self.controls is None:
            control = self.apply_degradation(control, rng)
        return {
            "control": to_tensor(control),
            "target": to_tensor(target),
            "prompts": self.prompts[index],
            "name": str(self.targets[index]),
            "seed": seed,
        }

    def apply_degradation(
        self, img: np.ndarray | Image.Image, rng: np.random.Generator | None = None
    ) -> np.ndarray | Image.Image:
        """Return a degraded copy of an image, uint8 (h, w, 3) or Pillow's, of the same type and size."""
        rng = np.random.default_rng() if rng is None else rng
        pixels = np.asarray(img.convert("RGB") if isinstance(img, Image.Image) else img)
        degraded = degrade(pixels, rng, self.types, **self.values, order=self.order, rounds=self.rounds)
        return Image.fromarray(degraded) if isinstance(img, Image.Image) else degraded

    def _draw_crop(
        self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator
    ) -> Callable:
        """Draw one scale, crop and flip, as a function to apply to both images."""
        h, w = size
        scale = 1.0 if self.native_crop else max(h / height, w / width)
        height, width = max(h, round(height * scale)), max(w, round(width * scale))
        y, x = (height - h) // 2, (width - w) // 2
        if self.random_crop:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        step = -1 if self.random_flip and rng.random() < 0.5 else 1

        def crop(image: np.ndarray) -> np.ndarray:
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return image[y : y + h, x : x + w][:, ::step]

        return crop


def example_sheet(dataset: Dataset, count: int = 6) -> np.ndarray:
    """Rows of control and target, uint8 (rows * h, 2 * w, 3), to compare with one's own degraded images."""
    items = first_samples(dataset, count)
    return stack_rows([np.hstack([to_uint8(item["control"]), to_uint8(item["target"])]) for item in items])


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack uint8 images (h, w, 3) below each other, those that are narrower than others on white."""
    width = max(row.shape[1] for row in rows)
    white = {"borderType": cv2.BORDER_CONSTANT, "value": (255, 255, 255)}
    return np.vstack([cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], **white) for row in rows])


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Heights and widths of at most resolution^2 pixels, multiples of 16, near to RATIOS; no size twice."""
    side = resolution // TOKEN
    longer = [round(side * ratio**0.5) for ratio in RATIOS]
    sides = [(side * side // n * TOKEN, n * TOKEN) for n in longer if n <= side * side]
    return list(dict.fromkeys([*sides, *(size[::-1] for size in sides)]))


def _crop_sizes(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Height and width of the crop from each image: the one of `sizes` nearest in shape, which must fit."""
    chosen, small = [], []
    for path in paths:
        try:
            width, height = image_size(path)  # the header alone
        except UNREADABLE:
            chosen.append(None)  # training says so when it comes to the image
            continue
        errors = [abs(math.log(height * w / (width * h))) for h, w in sizes]
        chosen.append(sizes[int(np.argmin(errors))])
        if height < chosen[-1][0] or width < chosen[-1][1]:
            small.append(f"{path} ({width}x{height})")
    if small:
        least = f"{sizes[0][1]} px" if len(sizes) == 1 else "their buckets"
        raise ValueError(
            f"{len(small)} of {len(paths)} images are smaller than {least}: "
            f"{listing(small, 3)}. Take them out or lower the resolution"
        )
    # an unreadable image is replaced by another, which the largest bucket has for sure
    counts = Counter(size for size in chosen if size) or Counter(sizes)
    largest, _ = counts.most_common(1)[0]
    return [size or largest for size in chosen]
