"""Time and memory of the five systems at full size with random weights: stages of benchmarks/gpu.py.

A section yields cases, the smallest first; a case is measured when it is called, so that the others still run
if one does not fit. TF32 and cuDNN are set as in the training scripts.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

import train_dbgan
import train_srn
import tutorial_train_deblur
from benchmarks import controlnet_step, kontext_step, plan
from benchmarks.head import Case, Row, in_turn, ratio, seconds
from harness.run import start_fabric
from ldm.modules.flux import FluxParams

TINY_FLUX = FluxParams(64, 64, 32, 48, 128, 4.0, 4, depth=1, depth_single_blocks=2, axes_dim=(8, 12, 12))
PART_OF_FLUX = FluxParams(depth=2, depth_single_blocks=4)  # a tenth, so that diffusers fits too


def timed(
    name: str, make: Callable[[], Callable[[], object]], images: int, aims: tuple[float, float], tiny: bool
) -> Case:
    """Create a case for median time (images/s, or ms if `images` is 0) and peak memory of a step."""

    def rows() -> list[Row]:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step = make()
        for _ in range(1 if tiny else 2):
            step()
        taken = statistics.median(seconds(step) for _ in range(1 if tiny else 10))
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        speed = Row(name, 1000 * taken, "ms", aims[0])
        if images:
            speed = Row(name, images / taken, "images/s", aims[0], more=True)
        return [speed, Row(name, peak, "GB", aims[1])]

    return Case(name, rows)


def compared(
    name: str, make: Callable[[], dict[str, Callable[[], object]]], tiny: bool, check: bool = False
) -> Case:
    """Create a case that alternates our step and a peer's; with `check`, first losses must agree."""

    def rows() -> list[Row]:
        works = make()
        found = []
        if check:
            ours, theirs = (work().item() for work in works.values())
            found.append(Row(name, abs(ours - theirs) / theirs, "apart, first losses", 0.01))
        times = in_turn(works, 1 if tiny else 10, 1 if tiny else 2)
        return [*found, Row(name, ratio(*times.values()), "of the time")]

    return Case(name, rows)


def controlnet(tiny: bool, device: str) -> Iterator[Case]:
    """Yield cases of the deblurring ControlNet without pixel losses: ratio to diffusers, speed, memory."""
    controlnet_step.set_backend_flags()
    few = tutorial_train_deblur.Settings(
        precision="bf16", cache_latents=True, deblur_loss_weight=0, batch_size=4
    )
    if tiny:
        few = replace(few, config_path="models/cldm_tiny_deblur.yaml", image_size=64, batch_size=1)
    many = replace(few, batch_size=2 if tiny else 32)
    peer = controlnet_step.Settings(few.batch_size, image_size=512, width=320, precision="bf16")
    if tiny:
        peer = replace(peer, image_size=64, width=32, precision="32")

    def against(settings: controlnet_step.Settings) -> Case:
        name = f"ControlNet, {settings.precision}, batch {settings.batch_size}, ours against diffusers"
        return compared(name, partial(controlnet_step.make_pair, settings, device), tiny, check=True)

    def alone(title: str, settings: tutorial_train_deblur.Settings, *aims: float) -> Case:
        name = f"ControlNet, bf16, cached latents, batch {settings.batch_size}{title}"
        return timed(name, lambda: plan.controlnet(settings, device).step, settings.batch_size, aims, tiny)

    yield against(peer)
    yield alone(", checkpointing", replace(few, gradient_checkpointing=True), 0, 10.5)
    yield alone("", few, 0, 14)
    if not tiny:
        yield against(replace(peer, batch_size=16))
    yield alone("", many, 100, 44)


def srn(tiny: bool, device: str) -> Iterator[Case]:
    """Yield cases of SRN: restoring an image of 1280 x 720, and a training step."""
    start_fabric()
    h, w = (64, 96) if tiny else (720, 1280)

    def restoring(half: bool) -> Callable[[], torch.Tensor]:
        network = train_srn.SRNDeblurNet(8 if tiny else 32).eval()
        network.to(device, memory_format=torch.channels_last)  # as in infer.py
        blurry = torch.rand(1, 3, h, w, device=device) * 2 - 1

        def restore() -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                return train_srn.restore(network, blurry)

        return restore

    yield timed(f"SRN restores {w} x {h}, bf16", partial(restoring, True), 0, (30, 0), tiny)
    yield timed(f"SRN restores {w} x {h}, 32", partial(restoring, False), 0, (0, 0), tiny)
    settings = train_srn.Settings(precision="bf16")
    if tiny:
        settings = replace(settings, width=8, crop_size=32, batch_size=2)
    name = f"SRN trains, bf16, batch {settings.batch_size}"
    yield timed(name, lambda: plan.srn(settings, device).step, settings.batch_size, (0, 4.5), tiny)


def dbgan(tiny: bool, device: str) -> Iterator[Case]:
    """Yield the case of a training step of BGAN and its inverse network, with the defaults of `blur`."""
    start_fabric()
    settings = train_dbgan.Settings(perceptual_loss_weight=0.0)
    if tiny:
        settings = replace(settings, width=8, blocks=1, crop_size=32, accumulate_grad_batches=1)
    images = settings.batch_size * settings.accumulate_grad_batches
    make = partial(plan.dbgan, settings, device, "blur")
    yield timed("DBGAN blur, defaults", lambda: make().step, images, (0, 12), tiny)


def kontext(tiny: bool, device: str) -> Iterator[Case]:
    """Yield cases of Kontext's LoRA: a tenth of the model against diffusers + peft, then all of it."""
    start_fabric()
    side, words = (64, 16) if tiny else (512, 512)
    whole, part = (TINY_FLUX, TINY_FLUX) if tiny else (FluxParams(), PART_OF_FLUX)

    def pair() -> dict[str, Callable[[], None]]:
        data = kontext_step.inputs(part, side, words, device)
        model = kontext_step.random_flux(part, device, torch.float32)
        peer = kontext_step.peer_step(model, data)
        return {"ours": kontext_step.our_work(model, data).step, "peer": peer}

    def alone(fp8: bool, swap: int) -> Callable[[], None]:
        dtype = torch.float32 if tiny else torch.bfloat16
        model = kontext_step.random_flux(whole, device, dtype, fp8, swap)
        return kontext_step.our_work(model, kontext_step.inputs(whole, side, words, device)).step

    yield compared("Kontext LoRA, a tenth, float32, ours against diffusers + peft", pair, tiny)
    most = whole.depth + whole.depth_single_blocks - 2
    name = "Kontext LoRA, 512 px, batch 1"
    yield timed(f"{name}, fp8, {most} blocks swapped", partial(alone, True, most), 0, (0, 6), tiny)
    yield timed(f"{name}, fp8", partial(alone, True, 0), 0, (330, 18), tiny)
    yield timed(f"{name}, bf16", partial(alone, False, 0), 0, (300, 30), tiny)
