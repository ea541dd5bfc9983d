"""Pictures with holes for training an inpainting network, on COCO or any folder of photographs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import check_captions, read_caption
from ldm.data.coco import CocoRecords
from ldm.data.image import read_image, to_tensor
from ldm.data.masks import MaskFolder, list_photographs, read_hole, same_shape
from ldm.data.stream import item_generator, item_seed
from ldm.modules.image_degradation.masks import fit_area, pixel_limits, random_mask

MaskType = Literal["rectangle", "irregular", "mixed", "object", "folder"]
USABLE = 0.25  # an object this much smaller than the smallest hole is not grown into one
Key = int | tuple[int, int]


def make_hint(image: Tensor, mask: Tensor, channels: int = 3) -> Tensor:
    """What an inpainting ControlNet sees: RGB in [0, 1] with -1 in the hole, and the mask as 4th channel if
    `channels` is 4. It is the convention of control_v11p_sd15_inpaint.

    image (..., 3, h, w) in [-1, 1] and mask (..., 1, h, w), a hole where above 0.5 -> (..., channels, h, w).
    """
    hole = mask > 0.5
    hint = torch.where(hole, -1.0, (image + 1) / 2)
    return torch.cat([hint, hole.to(hint)], dim=-3) if channels == 4 else hint


class CocoInpaintingDataset(Dataset):
    """Square crops with a hole each, under the names that a ControlNet's training expects.

    `dataset[(epoch, index)]` (or `dataset[index]`, which is epoch 0) is a dictionary of jpg (h, w, 3) in
    [-1, 1], mask (h, w, 1) with 1 in the hole, hint (h, w, hint_channels) as `make_hint` says (the masked
    image), txt the prompt, path and the item's `seed`, on which all that is random depends.

    The shorter side is scaled to `size`; the crop is the middle, or with `augment` anywhere and flipped half
    the time. `mask_type`: "rectangle", "irregular", "mixed" (see masks.py); "object", shapes from `ann_file`,
    and mixed holes for pictures that have none of use; "folder", masks from `mask_dir` (white is the hole):
    the picture's own (see MaskFolder), else any. All holes cover `mask_ratio` of the crop: shapes of other
    sizes are grown or shrunk. Prompts are one of the picture's captions in `captions_file`, or NAME.txt
    beside it, or `prompt`; a part `prompt_dropout` of them is left empty. `paths` are pictures in `image_dir`
    to use instead of all.

    Raises FileNotFoundError or ValueError that names what is missing or wrong.
    """

    def __init__(
        self,
        image_dir: str | Path,
        ann_file: str | Path | None = None,
        captions_file: str | Path | None = None,
        mask_dir: str | Path | None = None,
        mask_type: MaskType | None = None,
        mask_ratio: Sequence[float] = (0.1, 0.3),
        size: int = 512,
        seed: int = 0,
        augment: bool = False,
        prompt: str = "",
        prompt_dropout: float = 0.5,
        hint_channels: int = 3,
        paths: Sequence[Path] | None = None,
    ):
        self.size, self.seed, self.augment = size, seed, augment
        self.mask_ratio, self.hint_channels = tuple(mask_ratio), hint_channels
        self.prompt, self.prompt_dropout = prompt, prompt_dropout
        self.mask_type = mask_type or ("object" if ann_file else "folder" if mask_dir else "mixed")
        if size < 64 or size % 64:
            raise ValueError(f"image size must be a multiple of 64, not {size}")
        pixel_limits(size, size, self.mask_ratio)
        paths = list_photographs(image_dir, mask_dir) if paths is None else list(paths)
        # bytes in one array: a list of objects would be copied into every worker by its reference counts
        self.paths = np.array([os.fsencode(path) for path in paths])
        names = [path.name for path in paths]
        self.objects = self.captions = None
        if self.mask_type == "object":
            self.objects, self.object_rows = self._records(ann_file, "objects", names)
        if captions_file:
            self.captions, self.caption_rows = self._records(captions_file, "captions", names)
        self.captions_beside = check_captions(paths)
        self.masks = np.array([])
        if self.mask_type == "folder":
            if not mask_dir:
                raise ValueError("masks of type `folder` need mask_dir")
            self._find_masks(MaskFolder(mask_dir, image_dir), [path.relative_to(image_dir) for path in paths])

    def _find_masks(self, folder: MaskFolder, names: list[Path]) -> None:
        """Keep all masks, and of each picture which are its own: those of its path, or of its name alone."""
        rows = {path: row for row, path in enumerate(folder.paths)}
        own = [folder.of(name) or folder.of(Path(name.name)) for name in names]
        self.masks = np.array([os.fsencode(path) for path in folder.paths])
        self.own_masks = np.array([rows[path] for paths in own for path in paths], np.int32)
        self.own_start = np.cumsum([0, *map(len, own)])

    @staticmethod
    def _records(path: str | Path | None, kind: str, names: list[str]) -> tuple[CocoRecords, np.ndarray]:
        if not path:
            raise ValueError("masks of type `object` need ann_file")
        records = CocoRecords(path, kind)
        rows = records.rows(names)
        if (rows < 0).all():
            raise ValueError(f"{path} names none of the {len(names)} pictures, such as {names[0]}")
        return records, rows

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> dict:
        index = key[1] if isinstance(key, tuple) else key
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        path = os.fsdecode(self.paths[index])
        image = read_image(path)
        window = Window.draw(image.shape[:2], self.size, rng if self.augment else None)
        image = to_tensor(window.cut(image))
        mask = torch.from_numpy(self._mask(index, window, rng))[None].float()
        hint = make_hint(image, mask, self.hint_channels)
        return {
            "jpg": image.permute(1, 2, 0),
            "txt": self._prompt(index, path, seed),
            "hint": hint.permute(1, 2, 0),
            "mask": mask.permute(1, 2, 0),
            "path": path,
            "seed": seed,
        }

    def _prompt(self, index: int, path: str, seed: int) -> str:
        generator = item_generator(seed + 5)
        prompt = (read_caption(path) if self.captions_beside else "") or self.prompt
        texts = self.captions.of(self.caption_rows[index]) if self.captions else []
        if texts:
            prompt = texts[int(torch.randint(len(texts), (), generator=generator))].decode()
        return "" if torch.rand((), generator=generator) < self.prompt_dropout else prompt

    def _mask(self, index: int, window: "Window", rng: np.random.Generator) -> np.ndarray:
        if self.mask_type == "folder":
            return fit_area(self._own_mask(index, window, rng), self.mask_ratio)
        if self.mask_type == "object":
            mask = self._object_mask(index, window, rng)
            if mask is not None:
                return mask
        kind = "mixed" if self.mask_type == "object" else self.mask_type
        return random_mask(self.size, self.size, rng, kind, self.mask_ratio)

    def _own_mask(self, index: int, window: "Window", rng: np.random.Generator) -> np.ndarray:
        """The part of a mask that the window shows: one of the picture's own, or any if it has none.

        If the hole lies outside the window, the mask is cut where its hole is.
        """
        start, end = self.own_start[index : index + 2]
        row = self.own_masks[rng.integers(start, end)] if end > start else rng.integers(len(self.masks))
        mask = read_hole(os.fsdecode(self.masks[row]))
        if same_shape(mask.shape, window.source):
            window = replace(window, source=mask.shape)
        else:
            window = Window.draw(mask.shape, self.size, rng if self.augment else None)
        hole = window.cut_mask(mask)
        return hole if hole.any() else window.over(mask).cut_mask(mask)

    def _object_mask(self, index: int, window: "Window", rng: np.random.Generator) -> np.ndarray | None:
        """The first object, in random order, that is large enough in the window."""
        row = self.object_rows[index]
        records = self.objects.of(row)
        least, _ = pixel_limits(self.size, self.size, self.mask_ratio)
        for n in rng.permutation(len(records)):
            mask = self.objects.mask(row, records[n])
            if mask.shape != window.source:  # turned by its EXIF tag, say
                return None
            mask = window.cut_mask(mask)
            if cv2.countNonZero(mask) >= max(1, USABLE * least):
                return fit_area(mask, self.mask_ratio)
        return None


@dataclass(frozen=True)
class Window:
    """A square of `size` in a picture of `source` (h, w) whose shorter side is scaled to `size`."""

    source: tuple[int, int]
    scaled: tuple[int, int]
    size: int
    y: int
    x: int
    flip: bool

    @classmethod
    def draw(cls, source: tuple[int, int], size: int, rng: np.random.Generator | None) -> "Window":
        """The middle, or anywhere and perhaps flipped by `rng`."""
        factor = size / min(source)
        h, w = (max(size, round(side * factor)) for side in source)
        if rng is None:
            return cls(tuple(source), (h, w), size, (h - size) // 2, (w - size) // 2, False)
        y, x = int(rng.integers(h - size + 1)), int(rng.integers(w - size + 1))
        return cls(tuple(source), (h, w), size, y, x, bool(rng.integers(2)))

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The window's content from uint8 (h, w, 3) or (h, w)."""
        shrinks = self.scaled[0] < self.source[0]
        if self.scaled != self.source:
            method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            image = cv2.resize(image, self.scaled[::-1], interpolation=method)
        image = image[self.y : self.y + self.size, self.x : self.x + self.size]
        return np.ascontiguousarray(image[:, ::-1] if self.flip else image)

    def cut_mask(self, mask: np.ndarray) -> np.ndarray:
        """The window's content from a mask of 0 and 1, as such; a hole too thin for this scale is kept."""
        part = self.cut(mask.astype(np.float32))
        hole = part > 0.5
        return (hole if hole.any() else part > 0).astype(np.uint8)

    def over(self, mask: np.ndarray) -> "Window":
        """This window moved over a pixel of a mask's hole, the middle one in reading order."""
        pixels = np.argwhere(mask)
        middle = pixels[len(pixels) // 2] * self.scaled // mask.shape
        y, x = np.clip(middle - self.size // 2, 0, np.subtract(self.scaled, self.size)).tolist()
        return replace(self, y=y, x=x)
