"""Time a training step of a FLUX.1 Kontext LoRA against diffusers + peft, on a small network.

    python -m benchmarks.kontext_step                 # on a CPU or a GPU, in float32
    python -m benchmarks.kontext_step --compile       # ours with torch.compile; the peer is never compiled

A step is forward, backward and AdamW on a given latent, with every block checkpointed and a LoRA of rank 16
on attention and MLPs. Both sides have the same weights and their steps alternate; medians are printed. For
full size on a GPU, use `python -m benchmarks.gpu`. Needs requirements-dev.txt.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from benchmarks.head import begin, in_turn, ratio, seconds
from benchmarks.plan import Work
from ldm.modules.flux import Flux, FluxParams, pack, token_ids
from ldm.modules.fp8 import store_in_fp8
from ldm.modules.lora import block_linears, make_lora
from ldm.modules.swap import BlockSwap
from train_kontext_lora import draw_noise, flow_loss

SMALL = FluxParams(64, 64, 128, 256, 512, 4.0, 4, depth=3, depth_single_blocks=6)


@dataclass
class Settings:
    repeats: int = 10  # number of times that each step is measured
    compile: bool = False  # compile our blocks, as the training script's --compile does


def random_flux(
    params: FluxParams, device: str, dtype: torch.dtype, fp8: bool = False, blocks_to_swap: int = 0
) -> Flux:
    """Create a frozen network of random weights on the device; the last blocks may be offloaded to CPU."""
    with torch.device("meta"):
        model = Flux(params)
        if fp8:
            store_in_fp8(model, block_linears(model))
    state, offloaded = {}, set()
    if blocks_to_swap:
        model.swap = BlockSwap([*model.double_blocks, *model.single_blocks], blocks_to_swap)
        offloaded = model.swap.parameter_names(model)
    for name, value in model.state_dict().items():
        kind = value.dtype if value.dtype == torch.float8_e4m3fn else dtype
        std = value[0].numel() ** -0.5 if value.ndim > 1 else 0.0  # scales are 1, biases 0
        filled = torch.randn(value.shape, device=device, dtype=dtype).mul_(std).add_(name.endswith("scale"))
        state[name] = filled.to(kind)
        if name in offloaded and device == "cuda":
            state[name] = state[name].cpu().pin_memory()
    model.load_state_dict(state, assign=True)
    model.checkpointing = True
    return model.requires_grad_(False)


def inputs(params: FluxParams, resolution: int, words: int, device: str) -> tuple:
    """Create target and control latents, prompt, sigma and noise of one image."""
    side = resolution // 8
    channels = params.in_channels // 4
    target, control = torch.randn(2, 1, channels, side, side, device=device)
    prompt = {
        "t5": torch.randn(1, words, params.context_in_dim, device=device),
        "pooled": torch.randn(1, params.vec_in_dim, device=device),
    }
    sigma, noise = draw_noise([0], (channels, side, side))
    return target, control, prompt, sigma.to(device), noise.to(device)


def our_work(model: Flux, data: tuple) -> Work:
    """Return the step of train_kontext_lora.py, and the parts that it updates."""
    adapter = make_lora(model, "attn_mlp", 16, 16).to(data[0].device)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4)

    def step() -> None:
        flow_loss(model, *data)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(step, {"state_dict": adapter, "optimizer": optimizer})


def peer_step(flux: Flux, data: tuple) -> Callable[[], None]:
    """Return the same step with diffusers' transformer, with copies of the weights, and peft's LoRA."""
    from peft import LoraConfig

    from tests.test_flux import diffusers_flux

    with data[0].device:
        model = diffusers_flux(flux)
    model.enable_gradient_checkpointing()
    double = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff\w*\.net\.(0\.proj|2)"
    single = r"attn\.(to_q|to_k|to_v)|proj_mlp|proj_out"
    targets = rf"transformer_blocks\.\d+\.({double})|single_transformer_blocks\.\d+\.({single})"
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    target, control, prompt, sigma, noise = data

    def step() -> None:
        level = sigma[:, None, None, None]
        tokens = pack((1 - level) * target + level * noise)
        velocity = model(
            hidden_states=torch.cat([tokens, pack(control)], dim=1),
            encoder_hidden_states=prompt["t5"],
            pooled_projections=prompt["pooled"],
            timestep=sigma,
            guidance=torch.ones(1, device=target.device),
            img_ids=torch.cat([token_ids(target, 0), token_ids(control, 1)], dim=1)[0],
            txt_ids=torch.zeros(prompt["t5"].shape[1], 3, device=target.device),
            return_dict=False,
        )[0][:, : tokens.shape[1]]
        (velocity - pack(noise - target)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(settings: Settings) -> None:
    """Print both sides' times and their ratio."""
    begin()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = inputs(SMALL, 256, 64, device)
    model = random_flux(SMALL, device, torch.float32)
    peer = peer_step(model, data)
    steps = {"ours": our_work(model, data).step, "diffusers + peft": peer}
    if settings.compile:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile()
        print(f"torch.compile: the first step takes {seconds(steps['ours']):.0f} s")
    times = in_turn(steps, settings.repeats)
    print(f"float32, 576 tokens, hidden size {SMALL.hidden_size}")
    for name, values in times.items():
        print(f"{name:>18}: {statistics.median(values):.3f} s/step")
    shown = ratio(times["ours"], times["diffusers + peft"])
    print(f"ours / diffusers + peft: {shown} of the time, median and quartiles")


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
