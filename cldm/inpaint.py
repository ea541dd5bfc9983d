"""Inpainting ControlNet: image grids and scores in training, and filling holes in whole photographs."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.restore import MULTIPLE, SamplingOptions
from ldm.data.image import to_tensor, to_uint8
from ldm.data.inpaint import make_hint
from ldm.holes import fill_classically
from ldm.models.diffusion.ddpm import image_of
from ldm.tiling import fill_hidden, fill_smoothly, pad_to_multiple

Filler = Callable[[np.ndarray, np.ndarray], np.ndarray]
RING = 8  # pixels on either side of a hole's boundary


class InpaintControlNet(ControlLDM):
    """ControlLDM whose hint is the image with -1 in its hole (ldm.data.inpaint.make_hint).

    Batches also hold `mask` (b, h, w, 1), 1 in the hole.
    """

    preview_guidance = 1.0

    @torch.no_grad()
    def log_images(self, batch: Mapping, max_images: int = 4, ddim_steps: int = 20) -> dict[str, Tensor]:
        """Return the columns of the training grid, each (b, 3, 8h, 8w) in [-1, 1].

        `result` is the whole sampled image, `composite` the ground truth with the result in its hole.
        """
        images = super().log_images(batch, max_images, ddim_steps)
        mask = image_of(batch, "mask")[:max_images]
        result, truth = images["sample"], images["truth"]
        return {
            "masked": images["control"],
            "mask": mask.expand(-1, 3, -1, -1) * 2 - 1,
            "result": result,
            "composite": torch.where(mask > 0.5, result, truth),
            "truth": truth,
            "prompt": images["conditioning"],
        }

    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Log `val/loss` and means over the images: `val/psnr` and `val/ssim` of the composites as uint8, and
        the `hole_scores` of the composites and of OpenCV's Telea method (`val/*_telea`)."""
        super().validation_step(batch, batch_idx)
        _, pairs = self.compare(batch, batch_idx, "composite", "truth")
        masks = image_of(batch, "mask")
        scores = []
        for (composite, truth), hole in zip(pairs, (masks[:, 0] > 0.5).cpu().numpy(), strict=True):
            telea = hole_scores(fill_classically(truth, hole, "telea"), truth, hole)
            ours = hole_scores(composite, truth, hole)
            scores.append(ours | {f"{name}_telea": value for name, value in telea.items()})
        values = {f"val/{name}": float(np.mean([each[name] for each in scores])) for name in scores[0]}
        self.log_dict(values, batch_size=len(pairs), sync_dist=True)


def hole_scores(composite: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> dict[str, float]:
    """Score an inpainted image in its hole.

    Images are uint8 (h, w, 3), the hole is bool (h, w). Returns `psnr_hole` in dB and `gradients_hole`, the
    energy of the gradients relative to the ground truth, both over the pixels of the hole. A blurred fill
    scores high in the first and low in the second.
    """
    energy = max(gradient_energy(truth)[hole].mean(), 1e-10)
    difference = (composite[hole].astype(float) - truth[hole]) / 255
    return {
        "psnr_hole": float(-10 * np.log10(max((difference**2).mean(), 1e-10))),
        "gradients_hole": float(gradient_energy(composite)[hole].mean() / energy),
    }


def gradient_energy(image: np.ndarray) -> np.ndarray:
    """Compute the squared gradient magnitude (h, w) of the grey values of uint8 (h, w, 3)."""
    dy, dx = np.gradient(image.mean(axis=2))
    return dy**2 + dx**2


# ---- whole photographs -------------------------------------------------------------------------------------


@dataclass
class Inpainting(SamplingOptions):
    """Options for filling a hole: see `python infer.py inpaint --help`."""

    method: str = "ddpm"
    guidance_scale: float = 7.5
    seed: int = 42
    mask_blur: int = 4
    grow_mask: int = 0
    only_masked_padding: int = -1
    resolution: int = 512


def inpaint_image(
    model: ControlLDM, image: np.ndarray, mask: np.ndarray, options: Inpainting, progress: Callable = iter
) -> np.ndarray:
    """Fill the hole of uint8 (h, w, 3 or 4) with a model; see `fill_holes`.

    Warns if the hole is the whole image. Raises what `fill_holes` raises, and ValueError for an option out
    of range.
    """
    return fill_holes(image, mask, options, partial(fill, model, options=options, progress=progress))


def fill_holes(image: np.ndarray, mask: np.ndarray, options: Inpainting, filler: Filler) -> np.ndarray:
    """Fill the hole of uint8 (h, w, 3), or (h, w, 4) with alpha; mask (h, w) is not 0 in the hole.

    Pixels farther than `mask_blur` from the hole (grown by `grow_mask`) are unchanged, bit for bit; filled
    pixels are opaque. With an empty mask the image is returned unchanged, with a warning.
    filler(part, hole) takes a part (h, w, 3) of the image and its hole (h, w), 1 inside, and returns the part
    filled. Raises ValueError if mask and image differ in size, or for an option out of range.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape}, the image {image.shape[:2]} (height, width)")
    if options.mask_blur < 0 or options.grow_mask < 0 or options.only_masked_padding < -1:
        raise ValueError("mask_blur and grow_mask must be 0 or more, only_masked_padding -1 or more")
    hole = (mask > 0).astype(np.uint8)
    if not hole.any():
        warnings.warn("the mask is black: there is nothing to fill", stacklevel=2)
        return image.copy()
    if options.grow_mask:
        hole = (distance_to(hole) <= options.grow_mask).astype(np.uint8)
    result = image.copy()
    seen = fill_hidden(image[..., :3], image[..., 3]) if image.shape[2] == 4 else image
    for y, x in regions_of(hole, options.only_masked_padding, options.mask_blur):
        filled = filler(np.ascontiguousarray(seen[y, x]), hole[y, x])
        result[y, x] = paste(image[y, x], filled, hole[y, x], options.mask_blur)
    return result


def expand(image: np.ndarray, mask: np.ndarray, sides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pad image and mask by `sides` pixels (left, top, right, bottom), all marked as hole (outpainting).

    Raises ValueError for a negative number of pixels.
    """
    if min(sides) < 0:
        raise ValueError(f"outpainting adds 0 or more pixels to each side, not {sides}")
    border = [sides[n] for n in (1, 3, 0, 2)]  # top, bottom, left, right
    image = cv2.copyMakeBorder(image, *border, cv2.BORDER_REPLICATE)
    return image, cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT, value=1)


def regions_of(hole: np.ndarray, padding: int, blur: int) -> list[tuple[slice, slice]]:
    """Return the parts of the image to work on: all of it for padding -1, else one part for each hole.

    A part reaches `padding` + `blur` pixels beyond its hole; parts that overlap or touch are merged.
    """
    height, width = hole.shape
    if padding < 0:
        return [(slice(0, height), slice(0, width))]
    parts, grow = hole, padding + blur
    while True:
        boxes = cv2.connectedComponentsWithStats(parts, connectivity=8)[2][1:, :4]
        grown = np.zeros_like(hole)
        for x, y, w, h in boxes:
            grown[max(0, y - grow) : y + h + grow, max(0, x - grow) : x + w + grow] = 1
        if np.array_equal(grown, parts):  # all parts are rectangles that do not touch
            return [(slice(y, y + h), slice(x, x + w)) for x, y, w, h in boxes]
        parts, grow = grown, 0


def distance_to(hole: np.ndarray) -> np.ndarray:
    """Compute the distance in pixels from each pixel to the hole, 0 inside: float32 (h, w)."""
    return cv2.distanceTransform((hole == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def paste(image: np.ndarray, filled: np.ndarray, hole: np.ndarray, blur: int) -> np.ndarray:
    """Paste `filled` (h, w, 3) into the hole of `image` (h, w, 3 or 4), blended over `blur` pixels outside.

    Pixels at a distance of `blur` or more from the hole are those of `image`, bit for bit.
    """
    weight = np.clip(1 - distance_to(hole) / max(blur, 1), 0, 1)[..., None]
    if image.shape[2] == 4:
        filled = np.dstack([filled, np.full(hole.shape, 255, np.uint8)])
    blend = np.rint(weight * filled + (1 - weight) * image).astype(np.uint8)
    return np.where(weight > 0, blend, image)


@torch.inference_mode()
def fill(
    model: ControlLDM, image: np.ndarray, hole: np.ndarray, options: Inpainting, progress: Callable
) -> np.ndarray:
    """Fill the hole (h, w) of uint8 (h, w, 3) with the model; return a whole image of the same size.

    For a model trained with a coarse fill the hole is filled by that method first; sampling with strength
    below 1 starts from this. Known latents, which have no pixel in the hole, are put back at every step.
    """
    if hole.all():
        warnings.warn("the mask is white everywhere: the whole image is replaced", stacklevel=2)
    size = image.shape[:2]
    factor = 1.0
    if options.only_masked_padding >= 0:  # scaled by area: by its shorter side a long region would be huge
        factor = max(1.0, options.resolution / math.sqrt(size[0] * size[1]))
    height, width = (int(side * factor + 1e-6) for side in size)
    scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    scaled_hole = cv2.resize(hole, (width, height), interpolation=cv2.INTER_NEAREST)
    is_filled = model.coarse_fill != "none"
    if is_filled:
        scaled = fill_classically(scaled, scaled_hole, model.coarse_fill)
    known = scaled
    if options.strength == 1 and not is_filled:
        known = fill_smoothly(scaled.astype(np.float32), scaled_hole)

    def on_device(image: np.ndarray) -> Tensor:
        return pad_to_multiple(to_tensor(image)[None], MULTIPLE).to(model.device)

    # padded by repeating the edge, like the image: otherwise the hole's content would be seen in the padding
    mask = pad_to_multiple(torch.from_numpy(scaled_hole)[None, None].float(), MULTIPLE).to(model.device)
    keep = 1 - F.max_pool2d(mask, 8)
    start = model.encode_first_stage(on_device(known)).mode().float() * model.scale_factor
    channels = model.control_model.input_hint_block[0].in_channels
    hint = make_hint(on_device(scaled), mask, channels, is_filled)
    more = {"x0": start, "mask": keep, "generator": options.generator()}
    latents = options.sample(model, {"c_concat": [hint]}, progress, **more)
    result = model.decode_first_stage(keep * start + (1 - keep) * latents)
    result = to_uint8(result[0, :, :height, :width])
    if options.color_fix:
        result = match_border(result, scaled, scaled_hole)
    return cv2.resize(result, size[::-1], interpolation=cv2.INTER_AREA if factor > 1 else cv2.INTER_NEAREST)


def match_border(result: np.ndarray, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Shift the colours of `result` so that they match those of `image` around the hole; all uint8.

    The difference outside is continued smoothly into the hole (Perez et al. 2003, with a cheaper membrane).
    """
    if hole.all():
        return result
    difference = fill_smoothly(image.astype(np.float32) - result, hole)
    difference = cv2.GaussianBlur(difference, None, RING)  # shifts colours, not texture
    return np.rint((result + difference).clip(0, 255)).astype(np.uint8)
