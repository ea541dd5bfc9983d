"""Everything that has an aim, measured on the GPU at hand in 10 minutes at most.

    python -m benchmarks.gpu

Random weights at full size; diffusers (and peft) in the same run where there is a peer: `pip install -r
requirements-dev.txt`. What does not fit is reported as such. Writes gpu_report.json and prints a table to
paste into an issue. The times that are aimed at are an H200's; memory is torch's peak, to which CUDA's
context comes (about 0.5 GB). `--tiny` runs the same on tiny networks, on any device, in a minute.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import train_dbgan
import train_srn
import tutorial_train_deblur
from benchmarks import controlnet_step, kontext_step, plan
from benchmarks import srn as srn_benchmark
from benchmarks.head import begin, in_turn, processor, ratio, seconds
from harness.settings import run_main
from ldm.modules.flux import FluxParams

LIMIT = 540  # seconds after which nothing new is begun
TINY_FLUX = FluxParams(64, 64, 32, 48, 128, 4.0, 4, depth=1, depth_single_blocks=2, axes_dim=(8, 12, 12))
PART_OF_FLUX = FluxParams(depth=2, depth_single_blocks=4)  # a tenth, for the peer's sake: it fits everywhere


@dataclass
class Settings:
    """Measure all aims on this machine's GPU."""

    output: Path = Path("gpu_report.json")  # the report
    tiny: bool = False  # tiny networks on any device: whether it runs at all


class Row(NamedTuple):
    """One figure; `aim` 0 where there is none, `more` where more is better."""

    what: str
    value: float | str
    unit: str
    aim: float = 0
    more: bool = False

    @property
    def met(self) -> str:
        if not self.aim or isinstance(self.value, str):
            return ""
        return "yes" if (self.value >= self.aim if self.more else self.value <= self.aim) else "no"


def measure(make: Callable[[], Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Median seconds and peak GB of what `make` gives."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(2):
        step()
    taken = statistics.median(seconds(step) for _ in range(repeats))
    return taken, torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


def controlnet_rows(tiny: bool, device: str) -> Iterator[Row]:
    """The deblurring ControlNet, without pixel losses at batch 32, with the savings at batch 4."""
    full = tutorial_train_deblur.Settings(
        precision="bf16", cache_latents=True, deblur_loss_weight=0, batch_size=32
    )
    if tiny:
        full = replace(full, config_path="models/cldm_tiny_deblur.yaml", image_size=64, batch_size=2)
    taken, peak = measure(lambda: plan.controlnet(full, device).step, 2 if tiny else 10)
    name = f"ControlNet, bf16, cached latents, batch {full.batch_size}"
    yield Row(name, full.batch_size / taken, "images/s", 100, more=True)
    yield Row(name, peak, "GB", 40)
    few = replace(full, batch_size=2 if tiny else 4)
    for title, settings, aim in (
        ("batch 4", few, 12.0),
        ("batch 4, checkpointing", replace(few, gradient_checkpointing=True), 9.0),
    ):
        taken, peak = measure(lambda s=settings: plan.controlnet(s, device).step, 3)
        yield Row(f"ControlNet, bf16, cached latents, {title}", peak, "GB", aim)
    sizes = {"batch_size": 2, "image_size": 64, "width": 32} if tiny else {"batch_size": 16}
    sizes = {"image_size": 512, "width": 320, **sizes}
    peer = controlnet_step.Settings(**sizes, precision="32" if tiny else "bf16")
    makers = {"ours": controlnet_step.our_step, "diffusers": controlnet_step.their_step}
    batch = controlnet_step.make_batch(peer, device)
    steps = {name: make(peer, device) for name, make in makers.items()}
    times = in_turn({n: lambda s=step: s(batch) for n, step in steps.items()}, 2 if tiny else 10, 2)
    yield Row(
        f"ControlNet, {peer.precision}, batch {peer.batch_size}, ours / diffusers",
        ratio(times["ours"], times["diffusers"]),
        "of the time",
    )


def kontext_rows(tiny: bool, device: str) -> Iterator[Row]:
    """Kontext's LoRA at 512 pixels, batch 1, checkpointed; and a tenth of it against diffusers + peft."""
    dtype, side = (torch.float32, 64) if tiny else (torch.bfloat16, 512)
    params = TINY_FLUX if tiny else FluxParams()

    def step(fp8: bool, swap: int) -> Callable[[], None]:
        model = kontext_step.random_flux(params, device, dtype, fp8, swap)
        return kontext_step.our_step(model, kontext_step.inputs(params, side, 16 if tiny else 512, device))

    most = params.depth + params.depth_single_blocks - 2
    for name, fp8, swap, time_aim, memory_aim in (
        ("bf16", False, 0, 0.30, 28),
        ("fp8", True, 0, 0.33, 16),
        (f"fp8, {most} blocks swapped", True, most, 0, 10),
    ):
        taken, peak = measure(lambda fp8=fp8, swap=swap: step(fp8, swap), 2 if tiny else 10)
        yield Row(f"Kontext LoRA, {name}, 512 px, batch 1", taken, "s", time_aim)
        yield Row(f"Kontext LoRA, {name}, 512 px, batch 1", peak, "GB", memory_aim)
    part = TINY_FLUX if tiny else PART_OF_FLUX
    data = kontext_step.inputs(part, side, 16 if tiny else 512, device)
    with torch.device(device):
        steps = {
            "ours": kontext_step.our_step(kontext_step.random_flux(part, device, torch.float32), data),
            "peer": kontext_step.peer_step(part, data),
        }
    times = in_turn(steps, 2 if tiny else 10, 2)
    yield Row(
        "Kontext LoRA, a tenth of the blocks, 32, ours / diffusers + peft",
        ratio(times["ours"], times["peer"]),
        "of the time",
    )


def dbgan_rows(tiny: bool, device: str) -> Iterator[Row]:
    """BGAN and its way back at the defaults of `blur`."""
    settings = train_dbgan.Settings(perceptual_loss_weight=0.0)
    if tiny:
        settings = replace(settings, width=8, blocks=1, blur_blocks=1, crop_size=32, discriminator_width=8)
    taken, peak = measure(lambda: plan.dbgan(settings, device, "blur").step, 2 if tiny else 5)
    images = settings.batch_size * settings.accumulate_grad_batches
    yield Row("DBGAN blur, defaults", peak, "GB", 12)
    yield Row("DBGAN blur, defaults", images / taken, "images/s")


def srn_rows(tiny: bool, device: str) -> Iterator[Row]:
    """SRN: a restored picture of 1280 x 720, and a training step."""
    h, w = (64, 96) if tiny else (720, 1280)
    for name, form in {"bf16, channels_last": ("bf16", True, False), "32": ("32", False, False)}.items():
        taken, peak = measure(lambda f=form: srn_benchmark.restoring(h, w, *f), 3 if tiny else 20)
        yield Row(f"SRN restores {w} x {h}, {name}", 1000 * taken, "ms", 30 if "bf16" in name else 0)
        yield Row(f"SRN restores {w} x {h}, {name}", peak, "GB")
    settings = train_srn.Settings(precision="bf16", channels_last=True)
    if tiny:
        settings = replace(settings, width=8, crop_size=32, batch_size=2)
    taken, peak = measure(lambda: plan.srn(settings, device).step, 2 if tiny else 10)
    yield Row(f"SRN trains, bf16, batch {settings.batch_size}", settings.batch_size / taken, "images/s")


SECTIONS = (srn_rows, dbgan_rows, controlnet_rows, kontext_rows)


def collect(tiny: bool, device: str) -> Iterator[Row]:
    """All rows; a section that does not fit or cannot run says so and stops no other."""
    start = time.monotonic()
    for section in SECTIONS:
        name = section.__name__.removesuffix("_rows")
        if time.monotonic() - start > LIMIT:
            yield Row(name, "left out: the time is up", "")
            continue
        try:
            yield from section(tiny, device)
        except torch.OutOfMemoryError:
            yield Row(name, "out of memory", "")
        except ImportError as error:
            yield Row(name, f"no peer: {error}", "")
        except RuntimeError as error:  # the report of the others is worth having; this one says what broke
            yield Row(name, f"failed: {str(error).splitlines()[0]}", "")


def main(settings: Settings) -> None:
    """Measure, print the table, write the report."""
    if not (torch.cuda.is_available() or settings.tiny):
        raise ValueError("torch finds no CUDA device here: `python -m benchmarks.plan` counts without one")
    begin()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    print("| what | measured | unit | aim | met |\n|---|---|---|---|---|")
    rows = []
    for row in collect(settings.tiny, "cuda" if torch.cuda.is_available() else "cpu"):
        value = row.value if isinstance(row.value, str) else f"{row.value:.3g}"
        print(f"| {row.what} | {value} | {row.unit} | {row.aim or ''} | {row.met} |", flush=True)
        rows.append({**row._asdict(), "met": row.met})
    about = {"machine": processor(), "torch": torch.__version__, "cuda": torch.version.cuda}
    settings.output.write_text(json.dumps({**about, "tiny": settings.tiny, "rows": rows}, indent=2))
    print(f"written: {settings.output}")


if __name__ == "__main__":
    run_main(main, Settings)
