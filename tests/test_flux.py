import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ldm.models.diffusion.flow import sample, schedule
from ldm.modules.attention import rotary_embedding
from ldm.modules.flux import (
    Flux,
    FluxParams,
    pack,
    predict_velocity,
    token_ids,
    unpack,
)
from ldm.modules.kernels import Rotate
from ldm.modules.lora import make_lora
from tests.fill import draw, fill, relative_error

REFERENCE = Path(__file__).parent / "reference"
CONFIG = json.loads((REFERENCE / "flux_tiny.json").read_text())
ARRAYS = np.load(REFERENCE / "flux_tiny.npz")


def tiny_params() -> FluxParams:
    return FluxParams(**{**CONFIG["flux"], "axes_dim": tuple(CONFIG["flux"]["axes_dim"])})


def tiny_flux() -> Flux:
    return fill(Flux(tiny_params())).requires_grad_(False)


def tiny_inputs() -> dict[str, torch.Tensor]:
    b, (h, w) = CONFIG["batch"], CONFIG["latent_hw"]
    shapes = {
        "flux_latent": (b, 16, h, w),
        "flux_control_latent": (b, 16, h, w),
        "t5": (b, CONFIG["txt_len"], CONFIG["flux"]["context_in_dim"]),
        "clip_pooled": (b, CONFIG["flux"]["vec_in_dim"]),
    }
    return {name: draw(f"input:{name}", shape) for name, shape in shapes.items()}


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def test_full_size_keys_and_shapes_match_release():
    with torch.device("meta"):
        model = Flux(FluxParams())
    assert shapes_of(model) == json.loads((REFERENCE / "keys_flux_kontext_dev.json").read_text())


def test_tiny_keys_and_shapes_match_reference():
    keys = json.loads((REFERENCE / "flux_tiny_keys.json").read_text())
    assert shapes_of(tiny_flux()) == {
        name: shape for name, shape in keys.items() if not name.startswith("ae.")
    }


def full_output(model, inputs, timesteps, guidance):
    latent, control = inputs["flux_latent"], inputs["flux_control_latent"]
    return model(
        img=torch.cat([pack(latent), pack(control)], dim=1),
        img_ids=torch.cat([token_ids(latent, 0), token_ids(control, 1)], dim=1),
        txt=inputs["t5"],
        txt_ids=torch.zeros(*inputs["t5"].shape[:2], 3),
        timesteps=timesteps,
        y=inputs["clip_pooled"],
        guidance=guidance,
    )


def test_output_matches_reference():
    output = full_output(tiny_flux(), tiny_inputs(), torch.tensor([0.25, 0.9]), torch.tensor([1.0, 3.5]))
    assert relative_error(output, ARRAYS["flux.out_full"]) < 1e-4
    assert relative_error(output[:, :6], ARRAYS["flux.out_target"]) < 1e-4


def test_velocity_is_the_target_part_of_the_output():
    inputs = tiny_inputs()
    velocity = predict_velocity(
        tiny_flux(), *inputs.values(), timesteps=torch.tensor([0.25, 0.9]), guidance=torch.tensor([1.0, 3.5])
    )
    assert velocity.dtype == torch.float32
    assert relative_error(pack(velocity), ARRAYS["flux.out_target"]) < 1e-4


def test_schedules_match_reference():
    assert relative_error(schedule(28, 4096), ARRAYS["flux.schedule28_1024px"]) < 1e-6
    assert relative_error(schedule(4, 6), ARRAYS["flux.schedule4_tiny"]) < 1e-6


def test_sampler_matches_reference():
    inputs = tiny_inputs()
    latent, control, t5, pooled = inputs.values()
    model = tiny_flux()
    velocity = lambda x, t: predict_velocity(model, x, control, t5, pooled, t, guidance=2.5)  # noqa: E731
    result = sample(velocity, latent, schedule(4, 6))
    assert relative_error(pack(result), ARRAYS["flux.denoise4"]) < 1e-3


def test_unpack_inverts_pack_and_token_order_is_as_documented():
    latent = torch.arange(2 * 16 * 6 * 4.0).reshape(2, 16, 6, 4)
    tokens = pack(latent)
    assert torch.equal(unpack(tokens, 6, 4), latent)
    assert torch.equal(
        tokens[0, 1, :4], latent[0, 0, :2, 2:].flatten()
    )  # second token: same rows, next columns
    assert token_ids(latent, 1)[1].tolist() == [[1, y, x] for y in range(3) for x in range(2)]


def test_rotary_embedding_is_exact_at_large_positions():
    ids = torch.tensor([[[1.0, 97.0, 42.0]]])
    cos, sin = (values[0, 0, 0].numpy() for values in rotary_embedding(ids, (16, 56, 56), 10_000))
    exact = []
    for position, dim in zip((1, 97, 42), (16, 56, 56), strict=True):
        exact.append(np.exp(1j * position * 10_000.0 ** (-np.arange(0, dim, 2) / dim)))
    exact = np.concatenate(exact)
    assert np.abs(cos[0::2] + 1j * sin - exact).max() < 1e-5 and np.array_equal(cos[0::2], cos[1::2])


def test_rotation_equals_complex_multiplication_with_gradient():
    x, grad = draw("x", (2, 3, 5, 8)).requires_grad_(), draw("grad", (2, 3, 5, 8))
    cos, sin = rotary_embedding(draw("ids", (2, 5, 3)), (2, 2, 4), 100)
    turned = Rotate.apply(x, cos, sin)
    turned.backward(grad)
    angle = torch.complex(cos[..., 0::2], sin)
    for value, expected in (
        (turned, torch.view_as_complex(x.detach().unflatten(-1, (-1, 2))) * angle),
        (x.grad, torch.view_as_complex(grad.unflatten(-1, (-1, 2))) * angle.conj()),
    ):
        torch.testing.assert_close(value, torch.view_as_real(expected).flatten(-2))
    half = Rotate.apply(x.detach().bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), turned.detach()) < 0.01


def test_checkpointing_preserves_gradients():
    model, inputs = tiny_flux(), tiny_inputs()
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model.double_blocks[0].img_attn.qkv.requires_grad_(True)
        full_output(model, inputs, torch.tensor([0.2, 0.6]), torch.ones(2)).square().mean().backward()
        gradients.append(model.double_blocks[0].img_attn.qkv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_compiles_to_one_graph(checkpointing):
    """Blocks are compiled as by --compile, with a LoRA; fullgraph=True raises on a graph break."""
    model, inputs, results = tiny_flux(), tiny_inputs(), []
    adapter = fill(make_lora(model, "all", 2, 2.0))
    model.checkpointing = checkpointing
    blocks, counter = [*model.double_blocks, *model.single_blocks], CompileCounter()
    torch._dynamo.reset()
    for compiled in (False, True):
        if compiled:
            for block in blocks:
                block.compile(backend=counter, fullgraph=True)
        adapter.zero_grad()
        output = full_output(model, inputs, torch.tensor([0.2, 0.6]), torch.ones(2))
        output.square().mean().backward()
        results.append([output.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())])
    assert 2 <= counter.frame_count <= len(blocks)  # similar blocks may share a graph
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def diffusers_state_dict(model: Flux) -> dict[str, torch.Tensor]:
    """Rename our weights for diffusers, whose network serves as the oracle."""
    names = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    }
    block_names = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
    }
    fused = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    dim, state = model.params.hidden_size, {}
    for name, value in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        kind = "weight" if kind == "scale" else kind
        if stem == "final_layer.adaLN_modulation.1":  # ours: shift, scale; theirs: scale, shift
            state[f"norm_out.linear.{kind}"] = torch.cat(value.chunk(2)[::-1])
        elif "_blocks." in stem:
            block, index, stem = stem.split(".", 2)
            prefix = (
                "transformer_blocks." if block == "double_blocks" else "single_transformer_blocks."
            ) + index
            parts = fused.get(stem)
            sizes = [dim] * 3 + [value.shape[0] - 3 * dim] if parts else None
            pieces = value.split(sizes[: len(parts)]) if parts else [value]
            for part, piece in zip(parts or [block_names[stem]], pieces, strict=True):
                state[f"{prefix}.{part}.{kind}"] = piece
        else:
            state[f"{names[stem]}.{kind}"] = value
    return state


def diffusers_flux(model: Flux):
    from diffusers import FluxTransformer2DModel

    p = model.params
    oracle = FluxTransformer2DModel(
        in_channels=p.in_channels,
        num_layers=p.depth,
        num_single_layers=p.depth_single_blocks,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_attention_heads=p.num_heads,
        joint_attention_dim=p.context_in_dim,
        pooled_projection_dim=p.vec_in_dim,
        guidance_embeds=True,
        axes_dims_rope=p.axes_dim,
    )
    oracle.load_state_dict(diffusers_state_dict(model), strict=True)
    return oracle.eval().requires_grad_(False)


def diffusers_output(oracle, inputs, timesteps, guidance):
    latent, control = inputs["flux_latent"], inputs["flux_control_latent"]
    return oracle(
        hidden_states=torch.cat([pack(latent), pack(control)], dim=1),
        encoder_hidden_states=inputs["t5"],
        pooled_projections=inputs["clip_pooled"],
        timestep=timesteps,
        guidance=guidance,
        img_ids=torch.cat([token_ids(latent, 0), token_ids(control, 1)], dim=1)[0],
        txt_ids=torch.zeros(inputs["t5"].shape[1], 3),
        return_dict=False,
    )[0]


def test_output_equals_diffusers():
    model, inputs = fill(Flux(tiny_params()), salt="oracle:"), tiny_inputs()
    inputs["flux_control_latent"] = draw("input:larger", (2, 16, 8, 10))  # a control image of another size
    conditions = torch.tensor([0.1, 0.7]), torch.tensor([2.5, 1.0])
    output = full_output(model, inputs, *conditions)
    assert output.shape == (2, 6 + 20, 64)
    assert relative_error(output, diffusers_output(diffusers_flux(model), inputs, *conditions)) < 1e-4


def test_inconsistent_axes_dim_raises():
    with pytest.raises(ValueError, match="axes_dim"):
        FluxParams(hidden_size=64, num_heads=2, axes_dim=(8, 12, 16))


def test_sampling_equals_diffusers_pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    shift = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shift)
    model, inputs = tiny_flux(), tiny_inputs()
    pipeline = FluxKontextPipeline(scheduler, *[None] * 5, transformer=diffusers_flux(model))
    pipeline.set_progress_bar_config(disable=True)
    noise, control = draw("noise", (2, 16, 8, 10)), draw("control", (2, 16, 8, 10))
    theirs = pipeline(
        image=control,
        prompt_embeds=inputs["t5"],
        pooled_prompt_embeds=inputs["clip_pooled"],
        latents=pack(noise),
        height=64,
        width=80,
        max_area=64 * 80,
        _auto_resize=False,
        num_inference_steps=6,
        guidance_scale=2.5,
        output_type="latent",
    ).images
    text = inputs["t5"], inputs["clip_pooled"]
    velocity = lambda x, t: predict_velocity(model, x, control, *text, t, guidance=2.5)  # noqa: E731
    ours = sample(velocity, noise, schedule(6, 20))
    assert relative_error(pack(ours), theirs) < 1e-3
