"""Training data for restoration by FLUX.1 Kontext: clean photographs, degraded on the fly, or real pairs."""

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

TOKEN = 16  # side in pixels


class DegDataset(Dataset):
    """Photographs and their degraded versions with identical crops.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, holds `control` (degraded) and `target`
    (clean), each float32 (3, resolution, resolution) in [-1, 1], `prompts`, `name` (the clean file) and
    `seed`, which determines all random choices. Each image appears `repeats` times an epoch.
    The shorter side is scaled to `resolution` unless `native_crop` crops at full scale; without `random_crop`
    the crop is centred. With `lr_data_root` the controls are the real degraded images that
    `find_pairs(lr_data_root, hr_data_root)` finds, instead of synthetic ones.

    The prompt is `instance_prompt`, or with `captions` the text of NAME.txt beside the clean or the degraded
    image, if there is one.

    `lr_scale` is the downsampling factor, `noise_level` the standard deviation in [0, 1] units,
    `blur_radius` the standard deviation of the Gaussian in pixels, `jpeg_quality` 1 to 100,
    `degradation_strength` the strength of the other kinds (KINDS), 0 to 1: each a number, or a range to
    sample from for every image.
    Raises ValueError for an unknown degradation, a value out of range, images smaller than their crops, pairs
    of unequal size, or captions that are not text.
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
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {repeats}")
        if resolution < TOKEN or resolution % TOKEN:
            raise ValueError(f"resolution must be a multiple of {TOKEN}, not {resolution}")
        self.repeats, self.resolution, self.seed = repeats, resolution, seed
        self.random_crop, self.random_flip, self.native_crop = random_crop, random_flip, native_crop
        if lr_data_root:
            pairs = find_pairs(lr_data_root, hr_data_root, blurred=False)
            self.targets = [pair.sharp for pair in pairs]
            self.controls = [pair.blurry for pair in pairs]
        else:
            self.targets, self.controls = list_images(hr_data_root), None
        check_large(self.targets, resolution)
        check_large(self.controls or [], resolution)
        self.instance_prompt = instance_prompt
        self.prompts = [instance_prompt] * len(self.targets)
        self.captioned = 0  # images whose prompt is a caption
        if captions:
            self._read_captions()

    def __len__(self) -> int:
        return len(self.targets) * self.repeats

    def describe(self) -> str:
        """Return a one-line summary of the dataset."""
        text = f"{len(self.targets)} images"
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
        crop = self._draw_crop(*target.shape[:2], rng)
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
        """Return a degraded copy of an image, uint8 (h, w, 3) or Pillow image, of the same type and size."""
        rng = np.random.default_rng() if rng is None else rng
        pixels = np.asarray(img.convert("RGB") if isinstance(img, Image.Image) else img)
        degraded = degrade(pixels, rng, self.types, **self.values)
        return Image.fromarray(degraded) if isinstance(img, Image.Image) else degraded

    def _draw_crop(self, height: int, width: int, rng: np.random.Generator) -> Callable:
        """Choose a scale, crop and flip, and return a function that applies them to an image."""
        side = self.resolution
        scale = 1.0 if self.native_crop else side / min(height, width)
        height, width = max(side, round(height * scale)), max(side, round(width * scale))
        y, x = (height - side) // 2, (width - side) // 2
        if self.random_crop:
            y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        step = -1 if self.random_flip and rng.random() < 0.5 else 1

        def crop(image: np.ndarray) -> np.ndarray:
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return image[y : y + side, x : x + side][:, ::step]

        return crop


def example_sheet(dataset: Dataset, count: int = 6) -> np.ndarray:
    """Return rows of control and target, uint8 (rows * h, 2 * w, 3), to compare with one's own images."""
    items = first_samples(dataset, count)
    return np.vstack([np.hstack([to_uint8(item["control"]), to_uint8(item["target"])]) for item in items])


def check_large(paths: Sequence[Path], resolution: int) -> None:
    """Read all headers. Raises ValueError if a side of an image is shorter than `resolution` pixels."""
    small = []
    for path in paths:
        try:
            width, height = image_size(path)
        except UNREADABLE:  # training reports it
            continue
        if min(width, height) < resolution:
            small.append(f"{path} ({width}x{height})")
    if small:
        raise ValueError(
            f"{len(small)} of {len(paths)} images are smaller than {resolution} px: "
            f"{listing(small, 3)}. Take them out or lower the resolution"
        )
