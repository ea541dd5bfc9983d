"""One training step of our ControlNet against diffusers': time, images/s and peak memory, in one run.

    python -m benchmarks.controlnet_step                        # reduced width on a CPU, full SD 1.5 on CUDA
    python -m benchmarks.controlnet_step --batch_size 16 --precision bf16
    python -m benchmarks.controlnet_step --compile              # ours as --compile trains it: minutes more

A step: ControlNet and UNet predict the noise in cached latents, the loss goes back to the ControlNet, AdamW
moves it. Same shapes, batch and precision for both; only the ControlNet is trained. They take turns (on CUDA
one goes after the other, so that the peak memory is each one's own). diffusers is used as its own training
script uses it (train_controlnet.py: networks frozen by requires_grad_, AdamW's defaults, autocast). What both
compute is counted beside, with the time that it takes at least at this machine's measured rates.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
import tyro

from benchmarks.head import begin, bound, in_turn, rates, ratio, seconds, shares
from cldm.cldm import ControlledUnetModel, ControlNet


@dataclass
class Settings:
    # 0: 2 on a CPU, 16 on CUDA.
    batch_size: int = 0
    # Pixels; 0: 256 on a CPU, 512 on CUDA.
    image_size: int = 0
    # Channels at the finest level; 320 is SD 1.5; 0: 64 on a CPU, 320 on CUDA.
    width: int = 0
    # 32, bf16 or 16; bf16 stores the frozen UNet in half precision, as our training does.
    precision: str = "32"
    # Counted steps of each, after two that are not.
    steps: int = 10
    # torch.compile of our two networks, as the training scripts' --compile does it; the peer stays as it is.
    compile: bool = False


def our_step(settings: Settings, device: str) -> Callable[[dict], float]:
    """A function that takes one of our training steps on a batch and returns the loss."""
    sizes = {
        "in_channels": 4,
        "model_channels": settings.width,
        "attention_resolutions": [1, 2, 4],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "context_dim": 768,
    }
    unet = ControlledUnetModel(**sizes).requires_grad_(False).to(device, memory_format=torch.channels_last)
    control = ControlNet(**sizes).to(device, memory_format=torch.channels_last)
    if settings.precision != "32":
        unet.to(DTYPES[settings.precision])
    if settings.compile:
        control.compile()
        unet.compile()
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5, fused=True)

    def predict(batch: dict) -> torch.Tensor:
        context = batch["context"]
        added = control(batch["noisy"], batch["hint"], batch["t"], context)
        return unet(batch["noisy"], batch["t"], context, added)

    return training_step(predict, optimizer, settings, device)


def their_step(settings: Settings, device: str) -> Callable[[dict], float]:
    """The same with diffusers' networks."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    w = settings.width
    sizes = {"block_out_channels": (w, 2 * w, 4 * w, 4 * w), "cross_attention_dim": 768}
    unet = UNet2DConditionModel(**sizes).requires_grad_(False).to(device)
    control = ControlNetModel(**sizes).to(device)
    if settings.precision != "32":
        unet.to(dtype=DTYPES[settings.precision])
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5)

    def predict(batch: dict) -> torch.Tensor:
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
    predict: Callable[[dict], torch.Tensor], optimizer: torch.optim.Optimizer, settings: Settings, device: str
) -> Callable[[dict], float]:
    """What both have in common: autocast, loss, backward, optimizer."""
    half = DTYPES.get(settings.precision)

    def step(batch: dict) -> float:
        with torch.autocast(device, half) if half else nullcontext():
            output = predict(batch)
        loss = F.mse_loss(output.float(), batch["noise"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    return step


def make_batch(settings: Settings, device: str) -> dict[str, torch.Tensor]:
    """Random latents, noise, hints and text embeddings."""
    b, side = settings.batch_size, settings.image_size // 8
    return {
        "noisy": torch.randn(b, 4, side, side, device=device),
        "noise": torch.randn(b, 4, side, side, device=device),
        "hint": torch.rand(b, settings.image_size, settings.image_size, 3, device=device).permute(0, 3, 1, 2),
        "t": torch.randint(0, 1000, (b,), device=device),
        "context": torch.randn(b, 77, 768, device=device),
    }


def main(settings: Settings) -> None:
    """Print a table and the ratio."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    begin()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    settings.batch_size = settings.batch_size or (16 if cuda else 2)
    settings.image_size = settings.image_size or (512 if cuda else 256)
    settings.width = settings.width or (320 if cuda else 64)
    print(settings)
    makers, times, memory = {"ours": our_step, "diffusers": their_step}, {}, {}
    batch, plainly = make_batch(settings, device), replace(settings, compile=False)
    machine = rates(device, DTYPES.get(settings.precision, torch.float32))
    for name, make in makers.items():
        print(bound(name, step := partial(make(plainly, device), batch), machine))
        if not cuda:
            print(shares(name, step))
    if settings.compile:
        started = seconds(partial(our_step(settings, device), batch))
        print(f"torch.compile: the first step takes {started:.0f} s")
    if cuda:  # one after the other: peak memory is each one's own
        for name, make in makers.items():
            torch.cuda.reset_peak_memory_stats()
            times |= in_turn({name: partial(make(settings, device), batch)}, settings.steps, 2)
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.empty_cache()
    else:
        works = {name: partial(make(settings, device), batch) for name, make in makers.items()}
        times = in_turn(works, settings.steps, 2)
    for name, values in times.items():
        median = statistics.median(values)
        peak = f"{memory[name]:.1f} GB peak" if cuda else ""
        print(
            f"{name:10s} {1000 * median:8.1f} ms/step  {settings.batch_size / median:7.2f} images/s  {peak}"
        )
    print(f"ours / diffusers: {ratio(times['ours'], times['diffusers'])} of the time, median and quartiles")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
