"""One training step of our ControlNet against diffusers' with the same weights: time and ratio, in one run.

    python -m benchmarks.controlnet_step                        # reduced width on a CPU, full SD 1.5 on CUDA
    python -m benchmarks.controlnet_step --batch_size 16 --precision bf16
    python -m benchmarks.controlnet_step --compile              # compile ours; takes minutes more

In a step, ControlNet and UNet predict the noise in cached latents and AdamW updates the ControlNet; the UNet
is frozen. Both sides have the same weights, inputs and precision, and their steps alternate. diffusers is
used as in its own training script (train_controlnet.py: networks frozen by requires_grad_, AdamW's defaults,
autocast), ours as in our training scripts. Needs requirements-dev.txt.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from benchmarks.head import begin, in_turn, randomize_zero_weights, ratio, seconds
from cldm.cldm import ControlledUnetModel, ControlNet

CUDA = torch.cuda.is_available()
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


@dataclass
class Settings:
    batch_size: int = 16 if CUDA else 2  # images per step
    image_size: int = 512 if CUDA else 256  # pixels
    width: int = 320 if CUDA else 64  # channels at the finest level; 320 is SD 1.5
    precision: str = "32"  # 32, bf16 or 16; bf16 and 16 also store the frozen UNet in this precision
    steps: int = 10  # number of timed steps of each, after two for warmup
    compile: bool = False  # compile our two networks, not those of diffusers


def set_backend_flags() -> None:
    """Enable TF32 and cuDNN benchmarking, as the ControlNet trainer does (cldm/training.py)."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = torch.cuda.is_available()


def our_networks(settings: Settings, device: str) -> tuple[nn.Module, nn.Module]:
    """Create a frozen UNet and a ControlNet, both without zero weights."""
    sizes = {
        "in_channels": 4,
        "model_channels": settings.width,
        "attention_resolutions": [1, 2, 4],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "context_dim": 768,
    }
    with torch.device(device):
        unet = randomize_zero_weights(ControlledUnetModel(**sizes))
        control_net = randomize_zero_weights(ControlNet(**sizes))
    return unet.requires_grad_(False), control_net


def our_step(unet: nn.Module, control: nn.Module, settings: Settings, device: str) -> Step:
    """Return a function that runs one of our training steps on a batch and returns the loss."""
    unet.to(memory_format=torch.channels_last)
    control.to(memory_format=torch.channels_last)
    if settings.precision != "32":
        unet.to(DTYPES[settings.precision])
    if settings.compile:
        control.compile()
        unet.compile()
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5, fused=True)

    def predict(batch: Batch) -> torch.Tensor:
        context = batch["context"]
        added = control(batch["noisy"], batch["hint"], batch["t"], context)
        return unet(batch["noisy"], batch["t"], context, added)

    return training_step(predict, optimizer, settings, device)


def their_step(our_unet: nn.Module, our_control: nn.Module, settings: Settings, device: str) -> Step:
    """Return the same step with diffusers' networks, which get copies of our weights."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    from tests.test_oracles import transfer

    w = settings.width
    sizes = {"block_out_channels": (w, 2 * w, 4 * w, 4 * w), "cross_attention_dim": 768}
    with torch.device(device):
        unet = UNet2DConditionModel(**sizes).requires_grad_(False)
        control = ControlNetModel(**sizes)
    transfer(our_unet, unet)
    transfer(our_control, control)
    if settings.precision != "32":
        unet.to(dtype=DTYPES[settings.precision])
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5)

    def predict(batch: Batch) -> torch.Tensor:
        dtype = unet.dtype
        context, hint, t = batch["context"], batch["hint"], batch["t"]
        down, middle = control(batch["noisy"], t, context, hint, return_dict=False)
        return unet(
            batch["noisy"].to(dtype),
            t,
            context.to(dtype),
            down_block_additional_residuals=[h.to(dtype) for h in down],
            mid_block_additional_residual=middle.to(dtype),
        ).sample

    return training_step(predict, optimizer, settings, device)


DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


def training_step(
    predict: Callable[[Batch], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    device: str,
) -> Step:
    """Return a training step: autocast, loss, backward, optimizer."""
    half = DTYPES.get(settings.precision)

    def step(batch: Batch) -> torch.Tensor:
        with torch.autocast(device, half) if half else nullcontext():
            output = predict(batch)
        loss = F.mse_loss(output.float(), batch["noise"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_batch(settings: Settings, device: str) -> Batch:
    """Create random latents, noise, hints and text embeddings."""
    b, side = settings.batch_size, settings.image_size // 8
    return {
        "noisy": torch.randn(b, 4, side, side, device=device),
        "noise": torch.randn(b, 4, side, side, device=device),
        "hint": torch.rand(b, settings.image_size, settings.image_size, 3, device=device).permute(0, 3, 1, 2),
        "t": torch.linspace(0, 999, b, device=device).long(),
        "context": torch.randn(b, 77, 768, device=device),
    }


def make_pair(settings: Settings, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Return our step and diffusers', on the same batch and from the same weights; each returns the loss."""
    networks = our_networks(settings, device)
    theirs = their_step(*networks, settings, device)
    ours = our_step(*networks, settings, device)
    batch = make_batch(settings, device)
    return {"ours": partial(ours, batch), "diffusers": partial(theirs, batch)}


def main(settings: Settings) -> None:
    """Print a table and the ratio."""
    begin()
    set_backend_flags()
    print(settings)
    works = make_pair(settings, "cuda" if CUDA else "cpu")
    if settings.compile:
        print(f"torch.compile: the first step takes {seconds(works['ours']):.0f} s")
    times = in_turn(works, settings.steps, 2)
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:10s} {1000 * median:8.1f} ms/step  {settings.batch_size / median:7.2f} images/s")
    print(f"ours / diffusers: {ratio(times['ours'], times['diffusers'])} of the time, median and quartiles")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
