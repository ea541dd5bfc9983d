"""How fast a FLUX.1 Kontext LoRA trains: seconds per step, share of the machine's matmul rate, memory.

    python -m benchmarks.kontext_step                 # CUDA: full size, random weights, about 10 minutes
    python -m benchmarks.kontext_step --compile       # the same with torch.compile
    python -m benchmarks.kontext_step --device cpu    # a small network against diffusers + peft

A step is forward, backward and AdamW on a given latent, with every block checkpointed and LoRA of rank 16 on
attention and MLPs. TFLOP are counted by torch (recomputation included), the matmul rate is measured just
before in bfloat16. On a CPU (float32) ours and the peer's steps alternate; shown are medians, and what both
compute with the time that it takes at least. The peer is never compiled.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.head import begin, bound, in_turn, rates, ratio, seconds, shares
from ldm.modules.flux import Flux, FluxParams, pack, token_ids
from ldm.modules.fp8 import store_in_fp8
from ldm.modules.lora import block_linears, make_lora
from ldm.modules.swap import BlockSwap
from train_kontext_lora import Settings as Training
from train_kontext_lora import draw_noise, flow_loss

SMALL = FluxParams(64, 64, 128, 256, 512, 4.0, 4, depth=3, depth_single_blocks=6)


@dataclass
class Settings:
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 10
    compile: bool = False
    # Pictures on a GPU; on a CPU one of 256 px is used.
    resolutions: tuple[int, ...] = (512, 768, 1024)


def random_flux(
    params: FluxParams, device: str, dtype: torch.dtype, fp8: bool = False, blocks_to_swap: int = 0
) -> Flux:
    """A frozen network of random weights, made on the device; the last blocks may wait in main memory."""
    with torch.device("meta"):
        model = Flux(params)
        if fp8:
            store_in_fp8(model, block_linears(model))
    state, waiting = {}, set()
    if blocks_to_swap:
        model.swap = BlockSwap([*model.double_blocks, *model.single_blocks], blocks_to_swap)
        waiting = {id(weight) for block in model.swap.blocks for weight in block.parameters()}
    waiting = {name for name, weight in model.named_parameters() if id(weight) in waiting}
    for name, value in model.state_dict().items():
        kind = value.dtype if value.dtype == torch.float8_e4m3fn else dtype
        std = value[0].numel() ** -0.5 if value.ndim > 1 else 0.0  # scales are 1, biases 0
        filled = torch.randn(value.shape, device=device, dtype=dtype).mul_(std).add_(name.endswith("scale"))
        state[name] = filled.to(kind)
        if name in waiting and device == "cuda":
            state[name] = state[name].cpu().pin_memory()
    model.load_state_dict(state, assign=True)
    model.checkpointing = True
    return model.requires_grad_(False)


def inputs(params: FluxParams, resolution: int, words: int, device: str) -> tuple:
    """Target and control latents, prompt, sigma and noise of one picture."""
    side = resolution // 8
    target, control = torch.randn(2, 1, 16, side, side, device=device)
    prompt = {
        "t5": torch.randn(1, words, params.context_in_dim, device=device),
        "pooled": torch.randn(1, params.vec_in_dim, device=device),
    }
    sigma, noise = draw_noise([0], (16, side, side), "logit_normal")
    return target, control, prompt, sigma.to(device), noise.to(device)


def our_step(model: Flux, data: tuple) -> Callable[[], None]:
    """The step of train_kontext_lora.py."""
    adapter = make_lora(model, "attn_mlp", 16, 16).to(data[0].device)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4)

    def step() -> None:
        flow_loss(model, *data, Training())[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compile_blocks(model: Flux) -> None:
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile()


def peer_step(params: FluxParams, data: tuple) -> Callable[[], None]:
    """The same step with diffusers' transformer and peft's LoRA."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    model = FluxTransformer2DModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=True,
        axes_dims_rope=params.axes_dim,
    ).requires_grad_(False)
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


def on_cuda(settings: Settings) -> None:
    rate = rates("cuda", torch.bfloat16).product
    print(f"bfloat16 matmul {rate:.0f} TFLOP/s")
    print(f"{'base':>5} {'px':>5} {'s/step':>8} {'TFLOP':>6} {'TFLOP/s':>8} {'of matmul':>9} {'peak GB':>8}")
    for precision in ("bf16", "fp8"):
        for resolution in settings.resolutions:
            took, flops, peak = measure(precision, resolution, settings)
            print(
                f"{precision:>5} {resolution:>5} {took:>8.3f} {flops:>6.0f} {flops / took:>8.0f} "
                f"{flops / took / rate:>9.0%} {peak:>8.1f}",
                flush=True,
            )


def measure(precision: str, resolution: int, settings: Settings) -> tuple[float, float, float]:
    """Seconds, TFLOP and peak GB of one step at full size."""
    torch.cuda.empty_cache()
    params = FluxParams()
    model = random_flux(params, "cuda", torch.bfloat16, precision == "fp8")
    step = our_step(model, inputs(params, resolution, 512, "cuda"))
    with FlopCounterMode(display=False) as counter:
        step()
    if settings.compile:
        compile_blocks(model)
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    took = statistics.median(seconds(step) for _ in range(settings.repeats))
    return took, counter.get_total_flops() / 1e12, torch.cuda.max_memory_allocated() / 2**30


def on_cpu(settings: Settings) -> None:
    data = inputs(SMALL, 256, 64, "cpu")
    model = random_flux(SMALL, "cpu", torch.float32)
    steps = {"ours": our_step(model, data), "diffusers + peft": peer_step(SMALL, data)}
    machine = rates("cpu", torch.float32)
    for name, step in steps.items():
        print(bound(name, step, machine))
        print(shares(name, step))
    if settings.compile:
        compile_blocks(model)
        print(f"torch.compile: the first step takes {seconds(steps['ours']):.0f} s")
    times = in_turn(steps, settings.repeats)
    print(f"float32, 576 tokens, hidden size {SMALL.hidden_size}")
    for name, values in times.items():
        print(f"{name:>18}: {statistics.median(values):.3f} s/step")
    shown = ratio(times["ours"], times["diffusers + peft"])
    print(f"ours / diffusers + peft: {shown} of the time, median and quartiles")


def main(settings: Settings) -> None:
    begin()
    torch.manual_seed(0)
    (on_cuda if settings.device == "cuda" else on_cpu)(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
