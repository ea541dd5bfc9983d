"""Estimate memory and speed of one full-size training step on a given card, without a GPU.

    python -m benchmarks.plan deblur --batch_size 32 --precision bf16 --cache_latents --card h200
    python -m benchmarks.plan inpaint | srn | dbgan | kontext      # with any flag of the training script

The step of the training script runs on fake tensors (benchmarks/fake_cuda.py), which need no files, no GPU
and hardly any memory. Operations are counted as torch launches them without --compile: TFLOP, GB (10^9 bytes)
read and written, kernels, and peak memory of all tensors. CUDA's context, cuDNN's workspace and the
allocator's rounding add about 1 GB. Lower bounds of the time are the matrix products at the card's dense rate
and the traffic at its bandwidth; an efficient step takes 1.2 to 2 times the larger of the two.
"""

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torchvision.models import vgg19

import train_dbgan
import train_kontext_lora
import train_srn
import tutorial_train_deblur
import tutorial_train_inpaint
from benchmarks.fake_cuda import Count, fake_tensors, is_fake, to_fake
from benchmarks.head import randomize_zero_weights
from cldm.cache import drop_encoders
from cldm.cldm import ControlLDM
from cldm.model import add_hint_latent, read_config
from cldm.training import choose_precision, prepare_model
from harness.flags import lightning_precision
from harness.settings import run_main
from ldm.models.kontext import TRANSFORMER, FluxAutoencoder
from ldm.modules.ema import EMA
from ldm.modules.flux import Flux, FluxParams
from ldm.modules.fp8 import store_in_fp8
from ldm.modules.lora import block_linears
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import half_dtype, instantiate_from_config, make_adamw

OVERHEAD = 1.0  # GB: CUDA's context, cuDNN's workspace, rounding


class Work(NamedTuple):
    """A training step as a function, and the parts that a checkpoint contains."""

    step: Callable[[], None]
    parts: dict[str, Any]


class Card(NamedTuple):
    """Data sheet of a card: memory in GB, dense TFLOP/s in 16 bits and in TF32, bandwidth in TB/s."""

    memory: float
    half: float
    tf32: float
    bandwidth: float


CARDS = {
    "h200": Card(150, 989, 495, 4.8),
    "h100": Card(85, 989, 495, 3.35),
    "a100": Card(85, 312, 156, 2.04),
    "5090": Card(34.3, 209, 105, 1.79),
    "5080": Card(17.1, 113, 56.3, 0.96),
    "5070ti": Card(17.1, 87.9, 43.9, 0.896),
    "5070": Card(12.8, 61.7, 30.9, 0.672),
    "5060": Card(8.6, 38.4, 19.2, 0.448),
    "4090": Card(25.7, 165, 83, 1.01),
    "4080": Card(17.1, 97.5, 48.7, 0.717),
    "4070": Card(12.8, 58.3, 29.1, 0.504),
    "4060": Card(8.6, 30.2, 15.1, 0.272),
    "3090": Card(25.7, 71, 35.6, 0.936),
    "3080": Card(10.7, 59.5, 29.8, 0.76),
    "3070": Card(8.6, 40.6, 20.3, 0.448),
    "3060": Card(12.8, 25.5, 12.7, 0.36),
}


# ---- the steps of the five scripts, on any device ----------------------------------------------------------


def fake_fabric(precision: str, device: str) -> Fabric:
    """Create a Fabric for a device that may be fake, with this precision."""
    fabric = Fabric(accelerator="cpu")
    fabric._strategy._root_device = torch.device(device)
    fabric._strategy.accelerator.setup_device = lambda device: None
    kind = lightning_precision(precision)
    if kind != "32-true":
        scaler = torch.amp.GradScaler(device) if kind == "16-mixed" else None
        fabric._precision = fabric._strategy._precision = MixedPrecision(kind, device, scaler)
    return fabric


class EightBit(torch.optim.Optimizer):
    """Stand-in for bitsandbytes' AdamW8bit, with the same two bytes of state per parameter."""

    def __init__(self, parameters, lr: float, **options):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            for name in () if state else ("first", "second"):
                state[name] = torch.empty(parameter.shape, dtype=torch.uint8, device=parameter.device)
            for value in (*state.values(), parameter):
                value.add_(1)


def control_model(settings: Any, device: str) -> ControlLDM:
    """Create the model that the deblurring or inpainting script trains."""
    config = read_config(settings.config_path)
    config["target"] = "cldm.inpaint.InpaintControlNet"
    if is_deblurring(settings):
        attention = "WithAttention" if settings.use_attention else ""
        config["target"] = f"cldm.deblur.DeblurControlNet{attention}"
        for name in ("deblur_loss_weight", "perceptual_loss_weight"):  # in every step: the worst case
            config["params"][name] = getattr(settings, name)
    config["params"]["control_stage_config"]["params"]["hint_channels"] = hint_channels(settings)
    if getattr(settings, "hint_as_latent", False) or getattr(settings, "coarse_fill", "none") != "none":
        config, _ = add_hint_latent(config, {})
    with torch.device("meta" if is_fake() else device):
        model = instantiate_from_config(config)
    model = to_fake(model, device) if is_fake() else randomize_zero_weights(model)
    if config["params"].get("perceptual_loss_weight") and config["params"]["deblur_loss_weight"]:
        model.load_perceptual()
    if settings.cache_latents:
        prompts = None if getattr(settings, "captions_file", "") else {""}
        drop_encoders(model, prompts, hints_stay=is_deblurring(settings))
    model.sd_locked, model.optimizer = settings.sd_locked, settings.optimizer
    model.learning_rate = settings.learning_rate
    clips = settings.max_grad_norm > 0
    prepare_model(model.train(), settings.precision, clips, settings.devices, settings.gradient_checkpointing)
    return model


def is_deblurring(settings: Any) -> bool:
    """Return True for settings of the deblurring script, False for the inpainting script."""
    return isinstance(settings, tutorial_train_deblur.Settings)


def hint_channels(settings: Any) -> int:
    return 3 if is_deblurring(settings) else tutorial_train_inpaint.hint_channels(settings)


def control_batch(settings: Any, model: ControlLDM, device: str) -> dict:
    """Create a batch as from the data loader."""
    b, side = settings.batch_size, settings.image_size
    channels = model.model.diffusion_model.out[-1].out_channels
    sizes = {"jpg": (side, side, 3), "hint": (side, side, hint_channels(settings))}
    sizes |= dict.fromkeys(("noise_0", "noise_1"), (channels, side // 8, side // 8))
    if settings.cache_latents:
        sizes["moments"] = (2 * channels, side // 8, side // 8)
    if settings.cache_latents and model.sees_hint_latent and is_deblurring(settings):
        sizes["hint_mean"] = (channels, side // 8, side // 8)
    tensors = {name: torch.randn(b, *size, device=device) for name, size in sizes.items()}
    timesteps = torch.linspace(0, 999, b, device=device).long()
    return {**tensors, "timestep": timesteps, "txt": [""] * b, "seed": [0] * b}


def controlnet(settings: Any, device: str) -> Work:
    """Build a step of the deblurring or the inpainting ControlNet."""
    settings = replace(settings, precision=choose_precision(settings.precision, Path()))
    model, parts = control_model(settings, device), settings.accumulate_grad_batches
    optimizer, trained = model.configure_optimizers(), [p for p in model.parameters() if p.requires_grad]
    ema = EMA(model, settings.ema_decay) if settings.ema_decay else None
    half, batch = half_dtype(settings.precision), control_batch(settings, model, device)
    scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)

    def step() -> None:
        for part in range(parts):
            with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
                loss = model.shared_step(batch)[0] / parts
            if part == 0:  # like Lightning, which clears gradients after the forward pass
                optimizer.zero_grad()
            scaler.scale(loss).backward()
        if settings.max_grad_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update(model)

    return Work(step, {"state_dict": model, "optimizer": optimizer} | ({"ema": ema} if ema else {}))


def srn(settings: train_srn.Settings, device: str) -> Work:
    """Build a step of SRN-DeblurNet."""
    fabric = fake_fabric(settings.precision, device)
    network = train_srn.SRNDeblurNet(settings.width, settings.residual, settings.sampling)
    network.to(device, memory_format=torch.channels_last)
    optimizer = train_srn.make_optimizer(network, settings)
    if settings.optimizer == "adam":
        optimizer.param_groups[0]["fused"] = True  # as in the script on CUDA
    trained, optimizer = fabric.setup(network, optimizer)
    ema = EMA(network, train_srn.EMA_DECAY)
    images = 2 * torch.rand(2, settings.batch_size, 3, *[settings.crop_size] * 2, device=device) - 1
    batch = {"blurry": images[0], "sharp": images[1]}

    def step() -> None:
        train_srn.train_step(fabric, trained, optimizer, batch, settings)
        ema.update(network)

    return Work(step, {"state_dict": network, "optimizer": optimizer.optimizer, "ema": ema})


def dbgan(settings: train_dbgan.Settings, device: str, stage: str = "blur", phase: int = -1) -> Work:
    """Build a step of a stage of BGAN and DBGAN; `phase` is an index into the stage's losses."""
    fabric = fake_fabric(settings.precision, device)
    perceptual = None
    if settings.perceptual_loss_weight and stage != "blur":
        perceptual = PerceptualLoss().to(device)
    alone = replace(settings, generated_fraction=0.0, compile=False)
    models = train_dbgan.make_models(alone, stage, perceptual, torch.device(device))
    if stage == "deblur" and settings.generated_fraction:
        blurrer = train_dbgan.first_generator("blur", settings, stage).eval()
        models.blurrer = blurrer.requires_grad_(False).to(device)
    generators = models.generators
    parameters = [*generators.parameters(), *models.discriminators.parameters()]
    optimizer = fabric.setup_optimizers(torch.optim.Adam(parameters, settings.learning_rate, fused=True))
    ema = EMA(generators, train_dbgan.EMA_DECAY)
    parts, size = settings.accumulate_grad_batches, settings.crop_size
    images = 2 * torch.rand(2, parts * settings.batch_size, 3, size, size, device=device) - 1
    batch = {"blurry": images[0], "sharp": images[1]}
    losses = partial(train_dbgan.STAGES[stage].losses[phase], models, settings)

    def step() -> None:
        train_dbgan.train_step(fabric, optimizer, batch, parts, losses, settings.max_grad_norm)
        ema.update(generators)

    networks = {"state_dict": generators, "discriminators": models.discriminators}
    return Work(step, {**networks, "optimizer": optimizer.optimizer, "ema": ema, **models.pools})


def kontext(settings: train_kontext_lora.Settings, device: str) -> Work:
    """Build a step of the Kontext LoRA."""
    if settings.perceptual_loss:
        raise ValueError("the perceptual loss cannot be counted: what it decodes depends on the noise drawn")
    script = train_kontext_lora
    autoencoder, model = script.load_models(settings, torch.device("cuda"))
    to_fake(model, device), to_fake(autoencoder, device)
    adapter = script.add_trained_lora(model, replace(settings, compile=False), torch.device(device))
    optimizer = make_adamw(adapter.parameters(), "adamw", settings.learning_rate, script.WEIGHT_DECAY)
    ema = EMA(adapter, settings.ema_decay)
    params, side = model.params, settings.resolution
    count = settings.batch_size * settings.accumulate_grad_batches
    prompt = {
        "t5": torch.empty(1, 512, params.context_in_dim, dtype=torch.bfloat16, device=device),
        "pooled": torch.empty(1, params.vec_in_dim, dtype=torch.bfloat16, device=device),
    }
    images = torch.empty(2, count, 3, side, side, device=device)
    seeds = torch.randint(9, (count,), generator=torch.Generator())
    batch = {"target": images[0], "control": images[1], "seed": seeds}
    fabric = fake_fabric("32", device)

    def step() -> None:
        script.train_step(model, autoencoder, None, prompt, batch, settings.batch_size)
        script.update(fabric, adapter, optimizer, settings.learning_rate)
        ema.update(adapter)

    parts = {"state_dict": adapter, "optimizer": optimizer, "ema": ema}
    if model.swap:
        parts["offloaded"] = offloaded_weights(model)
    return Work(step, parts)


def offloaded_weights(model: Flux) -> list[torch.Tensor]:
    """List the frozen weights of the blocks that are offloaded to CPU memory."""
    parameters = (parameter for block in model.swap.blocks for parameter in block.parameters())
    return [parameter for parameter in parameters if not parameter.requires_grad]


# ---- stand-ins for files -----------------------------------------------------------------------------------


def _weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Create weights with the names and shapes of Kontext's files."""
    with torch.device("meta"):
        model = Flux(FluxParams()) if path.name == TRANSFORMER else FluxAutoencoder()
    dtype = torch.bfloat16 if path.name == TRANSFORMER else torch.float32
    return {name: torch.empty(value.shape, dtype=dtype) for name, value in model.state_dict().items()}


def without_files(make: Callable[..., Work], *arguments: Any) -> Work:
    """Call make(*arguments) with weights that need no file, and with EightBit for bitsandbytes."""
    bitsandbytes = types.ModuleType("bitsandbytes.optim")
    bitsandbytes.AdamW8bit = EightBit
    modules = {"bitsandbytes": types.ModuleType("bitsandbytes"), "bitsandbytes.optim": bitsandbytes}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch("ldm.modules.perceptual._read_features", lambda file: vgg19()),
        mock.patch("ldm.models.kontext.read_weights", _weights_of),
        mock.patch("ldm.models.kontext.read_settings", lambda *arguments: {}),
        mock.patch("train_kontext_lora.tqdm", lambda values, **options: values),
    ):
        return make(*arguments)


# ---- counting and printing ---------------------------------------------------------------------------------


def count_step(make: Callable[..., Work], *arguments: Any) -> Count:
    """Count the second of two steps of make(*arguments) as on CUDA."""
    with fake_tensors(like_cuda=True) as count:
        step, parts = without_files(make, *arguments)
        count.leave_on_host(parts.get("offloaded", ()))
        for group in parts["optimizer"].param_groups:
            count.trained += sum(p.numel() for p in group["params"] if p.requires_grad)
            if group.get("fused", True) is None and group["foreach"] is None:
                group["foreach"] = True  # torch's default on CUDA
        step()
        if not parts["optimizer"].param_groups[0].get("fused"):  # the step counter stays on the CPU
            states = parts["optimizer"].state.values()
            count.leave_on_host(state["step"] for state in states if "step" in state)
        count.restart()
        step()
    return count


def bounds(count: Count, card: Card, precision: str) -> tuple[float, float]:
    """Return lower bounds in seconds for the matrix products and for the memory traffic."""
    rate = card.tf32 if precision[:2] in ("32", "no") else card.half
    return count.tflop / rate, count.gigabytes / (1000 * card.bandwidth)


def find_card(name: str) -> Card | None:
    """Return a card by name, or None for "". Raises ValueError with the known names for others."""
    if name and name not in CARDS:
        raise ValueError(f"--card {name} is not known: give one of {', '.join(CARDS)}")
    return CARDS[name] if name else None


def show(title: str, count: Count, images: int, precision: str, card: str) -> None:
    """Print a counted step and its bounds on a card."""
    peak = count.peak_gb
    print(
        f"{title}: {count.tflop:.1f} TFLOP, {count.gigabytes:.0f} GB moved, {count.kernels} kernels, "
        f"peak {peak:.1f} GB (counted); {count.trained / 1e6:.2f} M numbers are trained"
    )
    found = find_card(card)
    if found:
        products, traffic = bounds(count, found, precision)
        fits = "fits" if peak + OVERHEAD <= found.memory else "does NOT fit"
        print(
            f"  {card}: {fits} ({peak + OVERHEAD:.1f} of {found.memory:g} GB with the context); a step takes "
            f"{1000 * products:.0f} ms at least for its products, {1000 * traffic:.0f} ms for its traffic: "
            f"at most {images / max(products, traffic):.1f} images/s"
        )


def swap_that_fits(peak: float, fp8: bool, room: float) -> int | None:
    """Return the fewest Kontext blocks to offload for a peak within `room` GB; None if that is impossible.

    Copies of two blocks are on the device at the same time.
    """
    with torch.device("meta"):
        model = Flux(FluxParams())
        if fp8:
            store_in_fp8(model, block_linears(model))
    sizes = [
        sum(p.numel() * (2 if p.dtype == torch.float32 else 1) for p in block.parameters()) / 1e9
        for block in (*model.double_blocks, *model.single_blocks)
    ]
    for count in range(1, len(sizes) + 1):
        offloaded = sizes[-count:]
        if peak - sum(offloaded) + 2 * max(offloaded) <= room:
            return count
    return None


# ---- the command -------------------------------------------------------------------------------------------


STEPS = {"Deblur": controlnet, "Inpaint": controlnet, "SRN": srn, "Kontext": kontext}


@dataclass
class OnCard:
    card: str = ""  # does the step fit on this NVIDIA card: h200, 4090, 3060, ... (a wrong name lists all)

    def plans(self) -> Iterator[tuple[str, Callable, int]]:
        """Yield a title, a function that builds the step, and its number of images, for each step."""
        name, parts = type(self).__name__, getattr(self, "accumulate_grad_batches", 1)
        yield f"{name}, {parts} x {self.batch_size}", partial(STEPS[name], self), parts * self.batch_size


@dataclass
class Deblur(OnCard, tutorial_train_deblur.Settings):
    """Count a step of tutorial_train_deblur.py."""


@dataclass
class Inpaint(OnCard, tutorial_train_inpaint.Settings):
    """Count a step of tutorial_train_inpaint.py."""


@dataclass
class SRN(OnCard, train_srn.Settings):
    """Count a step of train_srn.py."""


@dataclass
class DBGAN(OnCard, train_dbgan.Settings):
    """Count a step of train_dbgan.py, in every phase of its mode."""

    def plans(self) -> Iterator[tuple[str, Callable, int]]:
        images = self.batch_size * self.accumulate_grad_batches
        for stage in ("blur", "deblur") if self.mode == "all" else (self.mode,):
            for phase, losses in enumerate(train_dbgan.STAGES[stage].losses):
                name = f"DBGAN {stage}, {losses.__name__}, {self.accumulate_grad_batches} x {self.batch_size}"
                yield name, partial(dbgan, self, stage=stage, phase=phase), images


@dataclass
class Kontext(OnCard, train_kontext_lora.Settings):
    """Count a step of train_kontext_lora.py."""


COMMANDS = {"deblur": Deblur, "inpaint": Inpaint, "srn": SRN, "dbgan": DBGAN, "kontext": Kontext}


def main(settings: Deblur | Inpaint | SRN | DBGAN | Kontext) -> None:
    """Count the steps and print the results."""
    find_card(settings.card)
    precision = getattr(settings, "precision", "bf16")
    for title, make, images in settings.plans():
        count, card = count_step(make, "cpu"), find_card(settings.card)
        show(title, count, images, precision, settings.card)
        if card and isinstance(settings, Kontext) and not settings.blocks_to_swap:
            room, fp8 = card.memory - OVERHEAD, settings.base_precision == "fp8"
            blocks = 0 if count.peak_gb <= room else swap_that_fits(count.peak_gb, fp8, room)
            found = {None: "no number of them fits", 0: "none is needed"}.get(blocks, f"{blocks} make it fit")
            print(f"  --blocks_to_swap: {found} (of 57; with gradient checkpointing)")


if __name__ == "__main__":
    run_main(main, COMMANDS)
