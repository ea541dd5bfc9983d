"""Images with holes for training an inpainting network, from COCO or any folder of photos."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import check_captions, read_caption
from ldm.data.coco import CocoRecords
from ldm.data.crop import ScaledCrop
from ldm.data.image import read_image, to_tensor
from ldm.data.masks import MaskFolder, list_photographs, read_hole, same_shape
from ldm.data.stream import Key, item_generator, item_seed, split_key
from ldm.holes import CoarseFill, fill_classically
from ldm.modules.image_degradation.masks import fit_area, pixel_limits, random_mask

MaskType = Literal["rectangle", "irregular", "mixed", "object", "folder"]
USABLE = 0.25  # objects below this fraction of the smallest hole's area are not grown into one


def make_hint(image: Tensor, mask: Tensor, channels: int = 3, is_filled: bool = False) -> Tensor:
    """Make the input of an inpainting ControlNet like control_v11p_sd15_inpaint: RGB in [0, 1], hole -1.

    image (..., 3, h, w) in [-1, 1] and mask (..., 1, h, w), hole where above 0.5 -> (..., channels, h, w).
    With 4 `channels` the mask is the fourth. If the hole already `is_filled`, coarsely by another method, it
    is kept instead of set to -1.
    """
    hole = mask > 0.5
    hint = (image + 1) / 2
    if not is_filled:
        hint = torch.where(hole, -1.0, hint)
    return torch.cat([hint, hole.to(hint)], dim=-3) if channels == 4 else hint


class CocoInpaintingDataset(Dataset):
    """Square crops with one hole each, in the dictionary format of ControlNet training.

    `dataset[(epoch, index)]` (or `dataset[index]`, which is epoch 0) is a dictionary of jpg (h, w, 3) in
    [-1, 1], mask (h, w, 1) with 1 in the hole, hint (h, w, hint_channels) from `make_hint` (the masked
    image), txt (the prompt), path, and `seed`, which determines all random choices.

    The shorter side is scaled to `size`; the crop is centred, or with `augment` at a random position and
    flipped half the time. `mask_type` is "rectangle", "irregular" or "mixed" (see masks.py in
    image_degradation); "object" (shapes from `ann_file`; mixed holes for images without a usable shape); or
    "folder" (masks from `mask_dir`, white is the hole: the image's own, see MaskFolder, else any). Holes
    whose fraction of the crop lies outside `mask_ratio` are grown or shrunk. The prompt is one of the image's
    captions in `captions_file`, else NAME.txt beside it, else `prompt`; with probability `prompt_dropout` it
    is empty. `coarse_fill` is a method of ldm.holes that fills the hole of the hint, instead of -1.
    `paths` are the images in `image_dir` to use, by default all.

    Raises FileNotFoundError or ValueError that names the missing or wrong item.
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
        coarse_fill: CoarseFill = "none",
        paths: Sequence[Path] | None = None,
    ):
        self.size, self.seed, self.augment, self.coarse_fill = size, seed, augment, coarse_fill
        self.mask_ratio, self.hint_channels = tuple(mask_ratio), hint_channels
        self.prompt, self.prompt_dropout = prompt, prompt_dropout
        self.mask_type = mask_type or ("object" if ann_file else "folder" if mask_dir else "mixed")
        if size < 64 or size % 64:
            raise ValueError(f"the image size must be a multiple of 64, not {size}")
        pixel_limits(size, size, self.mask_ratio)
        paths = list_photographs(image_dir, mask_dir) if paths is None else list(paths)
        # bytes in one array: a list of objects would be copied into every worker by its reference counts
        self.paths = np.array([os.fsencode(path) for path in paths])
        names = [path.name for path in paths]
        self.objects = self.captions = None
        if self.mask_type == "object":
            if not ann_file:
                raise ValueError("masks of type `object` need ann_file")
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
        """Store all masks and the rows of each image's own, matched by its path or else its name alone."""
        rows = {path: row for row, path in enumerate(folder.paths)}
        own, starts = [], [0]
        for name in names:
            paths = folder.of(name) or folder.of(Path(name.name))
            own += [rows[path] for path in paths]
            starts.append(len(own))
        self.masks = np.array([os.fsencode(path) for path in folder.paths])
        self.own_masks = np.array(own, np.int32)
        self.own_starts = np.array(starts)

    @staticmethod
    def _records(path: str | Path, kind: str, names: list[str]) -> tuple[CocoRecords, np.ndarray]:
        """Read the records of a COCO json, and the row of each image in them (-1: none)."""
        records = CocoRecords(path, kind)
        rows = records.rows(names)
        if (rows < 0).all():
            raise ValueError(f"{path} names none of the {len(names)} images, such as {names[0]}")
        return records, rows

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> dict:
        index = split_key(key)[1]
        seed = item_seed(self.seed, key)
        rng = np.random.default_rng(seed)
        path = os.fsdecode(self.paths[index])
        image = read_image(path)
        crop = ScaledCrop.fit(image.shape, self.size, rng if self.augment else None)
        image = crop.cut(image)
        hole = self._mask(index, crop, rng)
        mask = torch.from_numpy(hole)[None].float()
        if self.coarse_fill == "none":
            hint = make_hint(to_tensor(image), mask, self.hint_channels)
        else:
            filled = to_tensor(fill_classically(image, hole, self.coarse_fill))
            hint = make_hint(filled, mask, self.hint_channels, is_filled=True)
        return {
            "jpg": to_tensor(image).permute(1, 2, 0),
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
            prompt = texts[int(torch.randint(len(texts), (), generator=generator))]
        return "" if torch.rand((), generator=generator) < self.prompt_dropout else prompt

    def _mask(self, index: int, crop: ScaledCrop, rng: np.random.Generator) -> np.ndarray:
        """Return the mask of a crop, uint8 (size, size): 1 in the hole."""
        if self.mask_type == "folder":
            return fit_area(self._own_mask(index, crop, rng), self.mask_ratio)
        if self.mask_type != "object":
            return random_mask(self.size, self.size, rng, self.mask_type, self.mask_ratio)
        mask = self._object_mask(index, crop, rng)
        if mask is None:
            mask = random_mask(self.size, self.size, rng, "mixed", self.mask_ratio)
        return mask

    def _own_mask(self, index: int, crop: ScaledCrop, rng: np.random.Generator) -> np.ndarray:
        """Return the crop of one of the image's own masks, or of any mask if it has none.

        If the hole lies outside the crop, the mask is cropped at its hole instead.
        """
        start, end = self.own_starts[index : index + 2]
        row = self.own_masks[rng.integers(start, end)] if end > start else rng.integers(len(self.masks))
        mask = read_hole(os.fsdecode(self.masks[row]))
        if same_shape(mask.shape, crop.source):
            crop = replace(crop, source=mask.shape)
        else:
            crop = ScaledCrop.fit(mask.shape, self.size, rng if self.augment else None)
        hole = crop.cut_mask(mask)
        return hole if hole.any() else crop.over_hole(mask).cut_mask(mask)

    def _object_mask(self, index: int, crop: ScaledCrop, rng: np.random.Generator) -> np.ndarray | None:
        """Return the mask of the first object, in random order, that is large enough in the crop, or None."""
        row = self.object_rows[index]
        records = self.objects.of(row)
        least, _ = pixel_limits(self.size, self.size, self.mask_ratio)
        for n in rng.permutation(len(records)):
            mask = self.objects.mask(row, records[n])
            if mask.shape != crop.source:  # for example if rotated by its EXIF tag
                return None
            mask = crop.cut_mask(mask)
            if cv2.countNonZero(mask) >= max(1, USABLE * least):
                return fit_area(mask, self.mask_ratio)
        return None
