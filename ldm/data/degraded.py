"""Training data for restoration by FLUX.1 Kontext: clean photographs, degraded on the fly, or real pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.image import list_images, read_image, to_tensor, to_uint8
from ldm.data.pairs import find_pairs
from ldm.data.stream import item_seed
from ldm.modules.image_degradation.damage import DEGRADATIONS, Value, check_damage, damage_sheet, degrade


class DegDataset(Dataset):
    """Photographs and their degraded versions, cut alike.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, holds `control` (degraded) and `target`
    (clean), each float32 (3, resolution, resolution) in [-1, 1], `prompts`, `name` (the clean file),
    `index` (which picture) and `seed`, on which everything random about the sample depends. Each picture
    comes `repeats` times an epoch. The shorter side is scaled to `resolution` unless `native_crop` cuts at
    full scale; without `random_crop` the cut is in the middle. With `lr_data_root` the controls are real
    damaged pictures, those that `find_pairs(lr_data_root, hr_data_root)` finds, instead of synthetic ones.

    `lr_scale` is the factor lost to downsampling, `noise_level` the standard deviation in [0, 1] units,
    `blur_radius` the standard deviation of the Gaussian in pixels, `jpeg_quality` 1 to 100, `damage_strength`
    that of the other kinds (KINDS): each a number, or a pair from which it is drawn for every picture. Order
    and rounds as in `ldm.modules.image_degradation.damage.degrade`.
    Raises ValueError for an unknown degradation or value, pictures too small, pairs of unequal size.
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
    ):
        self.types = DEGRADATIONS if degradation_types is None else tuple(degradation_types)
        self.values = {"lr_scale": lr_scale, "noise_level": noise_level, "blur_radius": blur_radius}
        self.values |= {"jpeg_quality": jpeg_quality, "damage_strength": damage_strength}
        check_damage(self.types, self.values)
        for name, value in (("repeats", repeats), ("degradation_rounds", degradation_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if resolution < 16 or resolution % 16:
            raise ValueError(f"resolution must be a multiple of 16, not {resolution}")
        self.order, self.rounds = degradation_order, degradation_rounds
        if lr_data_root:
            pairs = find_pairs(lr_data_root, hr_data_root, blurred=False)
            self.targets, self.controls = [p.sharp for p in pairs], [p.blurry for p in pairs]
        else:
            self.targets, self.controls = list_images(hr_data_root), None
        _check_sizes([*self.targets, *(self.controls or [])], resolution)
        self.prompt, self.repeats, self.resolution, self.seed = instance_prompt, repeats, resolution, seed
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

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        index = (key[1] if isinstance(key, tuple) else key) % len(self.targets)
        target = read_image(self.targets[index])
        control = read_image(self.controls[index]) if self.controls else target
        if control.shape != target.shape:
            sizes = [f"{path} is {w}x{h}" for path, (h, w, _) in self._pair(index, control, target)]
            raise ValueError(f"the pictures of a pair differ in size: {', '.join(sizes)} (width x height)")
        cut = self._draw_cut(*target.shape[:2], rng)
        target, control = cut(target), cut(control)
        if self.controls is None:
            control = self.apply_degradation(control, rng)
        return {
            "control": to_tensor(control),
            "target": to_tensor(target),
            "prompts": self.prompt,
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

    def _pair(self, index: int, control: np.ndarray, target: np.ndarray):
        return (self.controls[index], control.shape), (self.targets[index], target.shape)

    def _draw_cut(self, height: int, width: int, rng: np.random.Generator) -> Callable:
        """One scale, crop and flip, as a function that is then applied to both pictures."""
        n = self.resolution
        scale = 1.0 if self.native_crop else n / min(height, width)
        height, width = max(n, round(height * scale)), max(n, round(width * scale))
        y, x = (height - n) // 2, (width - n) // 2
        if self.random_crop:
            y, x = int(rng.integers(height - n + 1)), int(rng.integers(width - n + 1))
        step = -1 if self.random_flip and rng.random() < 0.5 else 1

        def cut(image: np.ndarray) -> np.ndarray:
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return image[y : y + n, x : x + n][:, ::step]

        return cut


def example_sheet(dataset: Dataset, count: int = 6) -> np.ndarray:
    """Rows of control and target, uint8 (rows * h, 2 * w, 3), to hold against one's own damaged pictures."""
    items = [dataset[index] for index in range(min(count, len(dataset)))]
    return np.vstack([np.hstack([to_uint8(item["control"]), to_uint8(item["target"])]) for item in items])


def kinds_sheet(dataset: DegDataset, side: int = 192) -> np.ndarray:
    """A row for each kind of damage: a picture, then it with less and with more of that kind alone."""
    clean = to_uint8(dataset[0]["target"])
    small = cv2.resize(clean, (side, side), interpolation=cv2.INTER_AREA) if len(clean) > side else clean
    return damage_sheet(small, dataset.types, dataset.values) if dataset.types else small


def _check_sizes(paths: Sequence[Path], resolution: int) -> None:
    small = []
    for path in paths:
        try:
            with Image.open(path) as image:  # the header alone
                if min(image.size) < resolution:
                    small.append(f"{path} ({image.width}x{image.height})")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read image {path}: {error}") from error
    if small:
        more = f" and {len(small) - 3} more" if len(small) > 3 else ""
        raise ValueError(
            f"{len(small)} of {len(paths)} pictures are smaller than {resolution} px: "
            f"{', '.join(small[:3])}{more}. Take them out or lower --resolution"
        )
