"""What the training of a Kontext LoRA keeps and shows: latents, previews, files, the demonstration's data."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.degraded import DegDataset, stack_rows
from ldm.data.image import photographs, read_image, to_uint8, write_image
from ldm.data.stream import first_samples, item_generator
from ldm.metrics import psnr, ssim
from ldm.models.diffusion.flow import restore_image
from ldm.models.kontext import FluxAutoencoder
from ldm.models.prompts import Prompts
from ldm.modules.lora import LORA_FILE, save_lora

HELD_OUT = ("chelsea", "coffee")  # by the demonstration
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the held-out loss
# What Forge and other browsers of files show (Stability AI's ModelSpec 1.0.0).
MODELSPEC = {
    "sai_model_spec": "1.0.0",
    "architecture": "flux-1-dev/lora",
    "implementation": "https://github.com/black-forest-labs/flux",
    "title": "restoration LoRA of FLUX.1 Kontext",
}


@torch.no_grad()
def encode(autoencoder: FluxAutoencoder, images: Tensor, indices: Tensor, cache: dict | None) -> Tensor:
    """Latents (b, 16, h, w) of images; with a cache each picture index is encoded once and kept."""
    if cache is None:
        return autoencoder.encode(images)
    new = [row for row, index in enumerate(indices.tolist()) if index not in cache]
    if new:
        cache |= zip(indices[new].tolist(), autoencoder.encode(images[new]).cpu(), strict=True)
    return torch.stack([cache[index] for index in indices.tolist()]).to(images.device)


def validate(
    model: Callable,
    autoencoder: FluxAutoencoder,
    prompts: Prompts,
    previews: Mapping[str, DegDataset],
    loss: Callable[..., tuple[Tensor, Tensor]],
    settings: Any,
) -> tuple[np.ndarray, dict[str, float]]:
    """The preview of every task, and its figures: val/psnr and the like, of several tasks val/TASK/psnr and
    the means over them. `loss` takes model, target, control, prompt, sigma and noise (`flow_loss`)."""
    pictures, scores = [], {}
    for task, dataset in previews.items():
        picture, found = preview(partial(restore_image, model, autoencoder), prompts, dataset, settings)
        found |= held_out_loss(partial(loss, model), autoencoder, prompts, dataset, settings.preview_images)
        pictures.append(picture)
        scores |= {f"val/{task}/{name}" if task else f"val/{name}": value for name, value in found.items()}
    if len(pictures) > 1 or "" not in previews:
        means = {name: [scores[f"val/{task}/{name}"] for task in previews] for name in found}
        scores |= {f"val/{name}": float(np.mean(values)) for name, values in means.items()}
    return stack_rows(pictures), scores


def preview(
    restore: Callable, prompts: Prompts, dataset: DegDataset, settings: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """Rows of damaged, restored and clean pictures; the mean PSNR of the first two against the third, and the
    mean SSIM of the second.

    restore(prompt, control, ...) is `restore_image`.
    """
    options = {"steps": settings.preview_steps, "guidance": settings.preview_guidance}
    rows, scores = [], []
    for item in first_samples(dataset, settings.preview_images):
        control, target = (to_uint8(item[name]) for name in ("control", "target"))
        prompt = prompts([item["prompts"]])
        restored = restore(prompt, control, resolution=settings.resolution, **options)
        rows.append(np.hstack([control, restored, target]))
        scores.append([psnr(restored, target), psnr(control, target), ssim(restored, target)])
    means = np.mean(scores, axis=0).tolist()
    return stack_rows(rows), dict(zip(("psnr", "psnr_input", "ssim"), means, strict=True))


@torch.no_grad()
def held_out_loss(
    loss: Callable, autoencoder: FluxAutoencoder, prompts: Prompts, dataset: DegDataset, count: int
) -> dict[str, float]:
    """Loss of the first `count` pictures at fixed noise and noise levels, and its mean: it can be compared
    from one save to the next, as the training loss cannot."""
    losses = {f"loss_{sigma}": [] for sigma in SIGMAS}
    for item in first_samples(dataset, count):
        prompt = prompts([item["prompts"]])
        device = prompt["t5"].device
        images = (item[name][None].to(device) for name in ("target", "control"))
        target, control = (autoencoder.encode(image) for image in images)
        noise = torch.randn(target.shape, generator=item_generator(item["seed"])).to(device)
        for sigma, found in zip(SIGMAS, losses.values(), strict=True):
            level = torch.tensor([sigma], device=device)
            found.append(loss(target, control, prompt, level, noise)[0].item())
    means = {name: sum(found) / len(found) for name, found in losses.items()}
    return means | {"loss": sum(means.values()) / len(means)}


def save_outputs(adapter: nn.ModuleDict, settings: Any, step: int, best: bool, said: dict[str, str]) -> None:
    """The (averaged) LoRA: the latest, as the one file that diffusers takes from the folder of the run, a
    snapshot, and best/ if no preview had a higher PSNR. `said` are the prompts by task."""
    metadata = {"base": "FLUX.1-Kontext-dev", "prompt": next(iter(said.values())), "steps": step}
    metadata |= {"tasks": json.dumps(said)} if len({*said.values()}) > 1 else {}
    metadata |= {n: getattr(settings, n) for n in ("rank", "alpha", "lora_targets", "resolution")}
    metadata |= {f"modelspec.{name}": value for name, value in MODELSPEC.items()}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.lora_dtype]
    names = [f"snapshots/lora_{step:07d}.safetensors", *[f"best/{LORA_FILE}"] * best, LORA_FILE]
    for path in (settings.output_dir / name for name in names):
        path.parent.mkdir(exist_ok=True)
        save_lora(path, adapter, metadata, dtype)


def peak_memory(device: torch.device) -> dict[str, float]:
    return {"memory_gb": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def make_demo(settings: Any, defaults: dict[str, Any]) -> None:
    """Write scikit-image's photographs, half as large, where the user gave no others: four to train on, and
    three squares of each of the other two."""
    for name, held_out in (("hr_root", False), ("validation_root", True)):
        folder = getattr(settings, name)
        if folder != defaults[name]:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for path in (path for path in photographs() if (path.stem in HELD_OUT) is held_out):
            image = cv2.resize(read_image(path), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            side, (h, w) = settings.resolution, image.shape[:2]
            y, places = (h - side) // 2, (0, (w - side) // 2, w - side)
            parts = [image[y : y + side, x : x + side] for x in places] if held_out else [image]
            for number, part in enumerate(parts):
                write_image(folder / f"{path.stem}_{number}.png", part)
