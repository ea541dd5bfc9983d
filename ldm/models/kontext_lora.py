"""What the training of a Kontext LoRA keeps and shows: latents, previews, files, the demonstration's data."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.degraded import DegDataset
from ldm.data.image import photographs, read_image, to_uint8, write_image
from ldm.metrics import psnr, ssim
from ldm.models.kontext import FluxAutoencoder, prompt_file, write_tiny_folder
from ldm.modules.lora import LORA_FILE, save_lora

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


def preview(restore: Callable, dataset: DegDataset, settings: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Rows of damaged, restored and clean pictures; the mean PSNR of the first two against the third, and the
    mean SSIM of the second."""
    options = {"steps": settings.preview_steps, "guidance": settings.preview_guidance}
    rows, scores = [], {"val/psnr": [], "val/psnr_input": [], "val/ssim": []}
    for index in range(min(settings.preview_images, len(dataset))):
        control, target = (to_uint8(dataset[index][name]) for name in ("control", "target"))
        restored = restore(control, resolution=settings.resolution, **options)
        rows.append(np.hstack([control, restored, target]))
        scores["val/psnr"].append(psnr(restored, target))
        scores["val/psnr_input"].append(psnr(control, target))
        scores["val/ssim"].append(ssim(restored, target))
    return np.vstack(rows), {name: float(np.mean(values)) for name, values in scores.items()}


def save_outputs(adapter: nn.ModuleDict, settings: Any, step: int, best: bool) -> None:
    """The (averaged) LoRA: the latest, as the one file that diffusers takes from the folder of the run, a
    snapshot, and best/ if no preview had a higher PSNR."""
    metadata = {"base": "FLUX.1-Kontext-dev", "prompt": settings.instance_prompt, "steps": step}
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
    """Write photographs and a tiny model folder with random weights, where the user gave no others."""
    if settings.hr_root == defaults["hr_root"]:
        settings.hr_root.mkdir(parents=True, exist_ok=True)
        for path in photographs():
            image = cv2.resize(read_image(path), None, fx=0.5, fy=0.5)
            write_image(settings.hr_root / f"{path.stem}.png", image)
    if settings.pretrained_model_name_or_path == defaults["pretrained_model_name_or_path"]:
        cache = prompt_file(settings.output_dir, settings.instance_prompt)
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_tiny_folder(settings.pretrained_model_name_or_path, cache, settings.instance_prompt)
