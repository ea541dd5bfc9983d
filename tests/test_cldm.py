"""ControlLDM against the original's keys, shapes and reference outputs."""

import copy
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from omegaconf import OmegaConf

from cldm.cldm import ControlLDM
from cldm.model import read_config
from cldm.training import prepare_model
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers import ddim_sigma, make_steps
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.util import GroupNormSiLU, make_ddim_timesteps
from ldm.modules.kernels import GatedGELU, SiLUChannelsLast
from ldm.util import instantiate_from_config
from tests.conftest import REFERENCE, tiny_arguments
from tests.fill import fill, relative_error


@pytest.mark.parametrize("name", ["v15", "v21"])
def test_state_dict_keys_and_shapes_match_original(name):
    expected = json.loads((REFERENCE / f"keys_cldm_{name}.json").read_text())
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.load(f"models/cldm_{name}.yaml").model)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


def test_tiny_state_dict_keys_and_shapes_match_original(model):
    expected = json.loads((REFERENCE / "cldm_tiny_keys.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


def test_silu_after_group_norm_keeps_channels_last(monkeypatch):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SiLUChannelsLast.apply, x)
    assert torch.allclose(SiLUChannelsLast.apply(x), F.silu(x), rtol=1e-12)
    norm = fill(GroupNormSiLU(8))
    results = []
    for kernel in (
        F.group_norm,
        lambda *arguments: torch.group_norm(*arguments).contiguous(),
    ):  # layout of the CPU's output, of CUDA's
        monkeypatch.setattr(F, "group_norm", kernel)
        x = torch.linspace(-3, 3, 2 * 8 * 20).reshape(2, 8, 4, 5).to(memory_format=torch.channels_last)
        h = norm(x.requires_grad_())
        (h**2).sum().backward()
        assert h.is_contiguous(memory_format=torch.channels_last)
        results.append((h, x.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def conditioning(r, name="context"):
    return {"c_crossattn": [r[name]], "c_concat": [r["hint"]]}


@torch.no_grad()
def test_network_outputs_match_reference(model, reference):
    r = reference
    controls = model.control_model(r["x_noisy"], r["hint"], r["t"], r["context"])
    assert len(controls) == 5
    for index, control in enumerate(controls):
        assert relative_error(control, r[f"control.{index}"]) < 1e-4
    assert (
        relative_error(model.model.diffusion_model(r["x_noisy"], r["t"], r["context"]), r["unet.plain"])
        < 1e-4
    )
    cond = conditioning(r)
    assert relative_error(model.apply_model(r["x_noisy"], r["t"], cond), r["apply_model"]) < 1e-4
    model.only_mid_control = True
    assert relative_error(model.apply_model(r["x_noisy"], r["t"], cond), r["apply_model.only_mid"]) < 1e-4
    model.only_mid_control = False
    model.control_scales = [0.825 ** (4 - i) for i in range(5)]  # the original's guess mode
    assert relative_error(model.apply_model(r["x_noisy"], r["t"], cond), r["apply_model.guess_scales"]) < 1e-4


@torch.no_grad()
def test_autoencoder_outputs_match_reference(model, reference):
    r, vae = reference, model.first_stage_model
    posterior = model.encode_first_stage(r["image"])
    assert relative_error(vae.quant_conv(vae.encoder(r["image"])), r["vae.moments"]) < 1e-4
    assert relative_error(posterior.mode(), r["vae.mode"]) < 1e-4
    assert relative_error(model.decode_first_stage(r["latent"]), r["vae.decode"]) < 1e-4


@torch.no_grad()
def test_schedule_and_losses_match_reference(model, reference):
    r = reference
    for name, expected in r.items():
        if name.startswith("schedule.") and "lvlb" not in name:
            assert relative_error(getattr(model, name.removeprefix("schedule.")), expected) < 1e-5, name
    assert relative_error(model.q_sample(r["x_start"], r["t"], r["noise"]), r["q_sample"]) < 1e-5
    _, losses = model.p_losses(r["x_start"], conditioning(r), r["t"], r["noise"])
    for name in ("loss_simple", "loss"):
        assert relative_error(losses[name], r[f"p_losses.{name}"]) < 1e-4, name


def test_ddim_samples_match_reference(model, reference):
    r, sampler, shape = reference, DDIMSampler(model), reference["x_T"].shape[1:]
    five, _ = sampler.sample(
        5,
        2,
        shape,
        conditioning(r),
        x_T=r["x_T"],
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=conditioning(r, "uncond_context"),
    )
    assert relative_error(five, r["ddim5.cfg3"]) < 1e-3
    twenty, _ = sampler.sample(20, 2, shape, conditioning(r), x_T=r["x_T"])
    assert relative_error(twenty, r["ddim20.cfg1"]) < 1e-3


def test_sampler_tables_match_reference(model, reference):
    alphacums = model.alphas_cumprod.double().numpy()
    for count in (5, 20):
        assert make_ddim_timesteps(count).tolist() == reference[f"ddim{count}.timesteps"].tolist()
    steps = make_steps(alphacums, 5)[::-1]
    assert np.allclose([step.alpha for step in steps], reference["ddim5.alphas"])
    assert np.allclose([step.alpha_next for step in steps], reference["ddim5.alphas_prev"])
    sigmas = [0.7 * ddim_sigma(step) for step in make_steps(alphacums, 10)[::-1]]
    assert np.allclose(sigmas, reference["ddim10.eta07.sigmas"])


@pytest.mark.parametrize("count", [1, 3, 7, 50, 300, 999, 1000])
def test_ddim_timesteps_for_any_step_count(count):
    timesteps = make_ddim_timesteps(count)
    assert len(timesteps) == count and timesteps[0] >= 0 and timesteps[-1] <= 999
    assert (np.diff(timesteps) > 0).all()


@pytest.mark.parametrize("count", [0, 1001])
def test_invalid_step_count_raises(count):
    with pytest.raises(ValueError, match=str(count)):
        make_ddim_timesteps(count)


def loss_of(model, r, size=(8, 8)) -> torch.Tensor:
    height, width = size
    torch.manual_seed(0)
    x, noise = torch.randn(2, 4, height, width), torch.randn(2, 4, height, width)
    hint = torch.rand(2, 3, 8 * height, 8 * width)
    cond = {"c_crossattn": [r["context"]], "c_concat": [hint]}
    return model.p_losses(x, cond, r["t"], noise)[0]


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_only_control_model_gets_gradients_unless_unlocked(model, reference):
    loss_of(model, reference).backward()
    found = gradients(model)
    assert found.keys() == {f"control_model.{name}" for name, _ in model.control_model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    model.zero_grad(set_to_none=True)
    model.sd_locked = False
    loss_of(model, reference).backward()
    unlocked = {name.split(".")[2] for name in gradients(model) if name.startswith("model.")}
    assert unlocked == {"output_blocks", "out"}


def test_checkpointing_preserves_outputs_and_gradients(model, reference):
    plain = loss_of(model, reference)
    plain.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    model.control_model.use_checkpoint = model.model.diffusion_model.use_checkpoint = True
    again = loss_of(model, reference)
    again.backward()
    assert torch.equal(plain, again)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7), name


def test_zero_initialized_control_model_has_no_effect(reference):
    model = fill(ControlLDM(**tiny_arguments()))
    for name, parameter in model.control_model.named_parameters():
        if name.startswith(("zero_convs", "middle_block_out")):
            torch.nn.init.zeros_(parameter)
    r = reference
    with torch.no_grad():
        steered = model.apply_model(r["x_noisy"], r["t"], conditioning(r))
    assert torch.equal(steered, model.model.diffusion_model(r["x_noisy"], r["t"], r["context"]))


@torch.no_grad()
def test_batch_items_are_independent(model, reference):
    x, t = torch.randn(3, 4, 8, 16), torch.tensor([0, 400, 999])
    context, hint = torch.randn(3, 7, 24), torch.rand(3, 3, 64, 128)

    def apply(items: slice) -> torch.Tensor:
        cond = {"c_crossattn": [context[items]], "c_concat": [hint[items]]}
        return model.apply_model(x[items], t[items], cond)

    together = apply(slice(0, 3))
    for index in range(3):
        assert relative_error(apply(slice(index, index + 1)), together[index : index + 1]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_half_precision_frozen_weights_is_finite(model, reference, dtype):
    model.model.diffusion_model.to(dtype)
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, reference)
        image = model.decode_first_stage(reference["latent"])
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(image).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    if dtype == torch.float16:
        assert image.dtype == torch.float32


def test_unsupported_sizes_raise(model, reference):
    with pytest.raises(ValueError, match="multiples of 16 pixels, not 64 x 72"):
        loss_of(model, reference, (8, 9))
    with pytest.raises(ValueError, match="does not fit latents"):
        model.control_model(
            torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32), reference["t"], reference["context"]
        )


def test_v_prediction_agrees_with_noise_prediction(model, reference):
    r = reference
    x_t, v = model.q_sample(r["x_start"], r["t"], r["noise"]), model.get_v(r["x_start"], r["noise"], r["t"])
    assert relative_error(model.predict_start_from_v(x_t, r["t"], v), r["x_start"]) < 1e-4
    assert relative_error(model.predict_eps_from_v(x_t, r["t"], v), r["noise"]) < 1e-4
    assert relative_error(model.predict_start_from_noise(x_t, r["t"], r["noise"]), r["x_start"]) < 1e-3


@pytest.fixture
def v_model() -> ControlLDM:
    """Create the v-prediction model of models/cldm_v21_768v.yaml (768 px) with tiny networks."""
    config = read_config("models/cldm_v21_768v.yaml")
    small = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "context_dim": 24}
    small |= {"attention_resolutions": [2], "num_head_channels": 16}
    for name in ("unet_config", "control_stage_config"):
        config["params"][name]["params"] |= small
    config["params"]["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 1]}
    config["params"]["cond_stage_config"] = None
    return fill(instantiate_from_config(config)).eval()


def v_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def test_v_prediction_training_step_matches_published_formula(v_model):
    torch.manual_seed(0)
    batch = {"jpg": torch.rand(2, 64, 64, 3) * 2 - 1, "hint": torch.rand(2, 64, 64, 3)}
    batch |= {"txt": torch.randn(2, 7, 24), "seed": torch.tensor([5, 9])}
    v_model.train()
    loss, _ = v_model.shared_step(batch)
    loss.backward()
    assert gradients(v_model).keys() == {
        f"control_model.{name}" for name, _ in v_model.control_model.named_parameters()
    }
    start, cond = v_model.get_input(batch)
    noise, t = v_model.noise_of(batch, start, salt=1), v_model.timesteps_of(batch, 2)
    scheduler = v_scheduler()
    output = v_model.apply_model(scheduler.add_noise(start, noise, t), t, cond)
    expected = (output - scheduler.get_velocity(start, noise, t)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_v_prediction_sampling_matches_diffusers(v_model):
    torch.manual_seed(0)
    x = x_T = torch.randn(2, 4, 8, 8)
    cond = {"c_crossattn": [torch.randn(2, 7, 24)], "c_concat": [torch.rand(2, 3, 64, 64)]}
    ours, _ = DDIMSampler(v_model).sample(5, 2, (4, 8, 8), cond, x_T=x_T)
    scheduler = v_scheduler()
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        x = scheduler.step(v_model.apply_model(x, t.expand(2), cond), t, x).prev_sample
    assert relative_error(ours, x) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_weights_together_gives_same_gradients(model, reference, dtype):
    losses, steps = [], []
    for together in (False, True):
        model.cast_together = together
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, cache_enabled=False):
            loss = loss_of(model, reference)
        loss.backward()
        losses.append(loss.item())
        steps.append(gradients(model))
    assert losses[0] == losses[1] and steps[0].keys() == steps[1].keys()
    for name, gradient in steps[0].items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, steps[1][name]), name


def test_control_model_and_unet_are_compiled_on_request(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    prepare_model(model, "bf16", False, 1, gradient_checkpointing=False)
    assert not compiled and model.cast_together
    prepare_model(model, "bf16", False, 1, gradient_checkpointing=False, compiled=True)
    assert compiled == [model.control_model, model.model.diffusion_model] and not model.cast_together


@pytest.mark.parametrize("sd_locked", [True, False])
def test_frozen_weights_are_stored_in_half_precision(model, reference, sd_locked):
    model.sd_locked = sd_locked
    prepare_model(model, "bf16", clips=False, processes=1, gradient_checkpointing=False)
    for part in (model.control_model, model.model, model.first_stage_model):
        for name, parameter in part.named_parameters():
            wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
            assert parameter.dtype == wanted, name
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, reference).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients(model).keys() == trained
    assert any(name.startswith("model.") for name in trained) != sd_locked


def test_bf16_autoencoder_runs_in_bf16_under_float16_autocast(model, reference):
    with torch.autocast("cpu", torch.float16):
        exact = model.decode_first_stage(reference["latent"])
        model.first_stage_model.to(torch.bfloat16)
        image = model.decode_first_stage(reference["latent"])
    assert exact.dtype == torch.float32 and image.dtype == torch.bfloat16
    assert relative_error(image.float(), exact.detach()) < 0.05


def test_fused_self_attention_projection_matches_separate_ones():
    torch.manual_seed(0)
    attention, x = CrossAttention(16, None, 2, 8), torch.randn(2, 40, 16, requires_grad=True)
    results = []
    for context in (None, x):  # x as its own context: three matrix products
        output = attention(x, context)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in attention.parameters())])
        x.grad = None
        attention.zero_grad(set_to_none=True)
    assert all(relative_error(a, b.detach()) < 1e-5 for a, b in zip(*results, strict=True))


def test_gated_gelu_matches_formula_and_gradient():
    both = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    x, gate = both.chunk(2, dim=-1)
    assert torch.equal(GatedGELU.apply(both), x * torch.nn.functional.gelu(gate))
    assert torch.autograd.gradcheck(GatedGELU.apply, both)


def test_text_is_embedded_once_per_prompt(model):
    calls = []

    class Tower(torch.nn.Module):
        def encode(self, prompts):
            calls.append(list(prompts))
            return torch.stack([torch.full((7, 24), float(len(prompt))) for prompt in prompts])

    model.cond_stage_model = Tower()
    first = model.get_learned_conditioning(["a", "bb", "a"])
    second = model.get_learned_conditioning(["bb", "ccc"])
    assert calls == [["a", "bb"], ["ccc"]]
    assert first[:, 0, 0].tolist() == [1, 2, 1] and second[:, 0, 0].tolist() == [2, 3]


def test_noise_and_timesteps_depend_only_on_item_seed(model):
    like = torch.empty(3, 4, 8, 8)
    noise = model.noise_of({"seed": torch.tensor([7, 8, 7])}, like, salt=1)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    t = model.timesteps_of({"seed": torch.arange(200)}, 200)
    assert 0 <= t.min() < 60 and 940 < t.max() < 1000
    assert model.timesteps_of({}, 5).shape == (5,)


def test_sampling_without_unconditional_hint(model, reference):
    r = reference
    uncond = {"c_crossattn": [r["uncond_context"]], "c_concat": None}
    latents, _ = DDIMSampler(model).sample(
        2,
        2,
        (4, 8, 8),
        conditioning(r),
        x_T=r["x_T"],
        unconditional_guidance_scale=2.0,
        unconditional_conditioning=uncond,
    )
    assert torch.isfinite(latents).all()


def test_sampling_from_an_image_with_strength_or_mask(model, reference):
    r, sampler = reference, DDIMSampler(model)
    same, _ = sampler.sample(10, 2, (4, 8, 8), conditioning(r), x0=r["x_start"], strength=0.0)
    assert torch.allclose(same, r["x_start"], atol=1e-5)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    kept, _ = sampler.sample(50, 2, (4, 8, 8), conditioning(r), x0=r["x_start"], mask=mask)
    assert (kept - r["x_start"])[..., :4].abs().max() < (kept - r["x_start"])[..., 4:].abs().max()
    with pytest.raises(ValueError, match="need x0"):
        sampler.sample(10, 2, (4, 8, 8), conditioning(r), strength=0.5)
    with pytest.raises(ValueError, match="'nonsense'"):
        sampler.sample(10, 2, (4, 8, 8), conditioning(r), method="nonsense")


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="scale_facto"):
        ControlLDM(**tiny_arguments(), scale_facto=1.0)
    with pytest.raises(ValueError, match="'x0'"):
        ControlLDM(**tiny_arguments(), parameterization="x0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_value_in_sampled_image_raises(model, monkeypatch, value):
    """A clamped infinity would look like a white pixel."""
    image = torch.zeros(1, 3, 64, 64)
    image[0, 1, 2, 3] = value
    monkeypatch.setattr(model, "decode_first_stage", lambda latents: image)
    batch = {"hint": torch.rand(1, 64, 64, 3), "txt": torch.randn(1, 7, 24)}
    with pytest.raises(ValueError, match="sampled image is not finite"):
        model.restore(batch, 1)


class FewBatches(torch.utils.data.Dataset):
    """Data set in the format of lllyasviel's ControlNet tutorial."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(64, 64, 3, generator=generator)
        return {"jpg": image * 2 - 1, "hint": image, "txt": torch.zeros(7, 24)}


def test_plain_lightning_trainer_updates_weights(model, tmp_path):
    before = copy.deepcopy(model.control_model.state_dict())
    loader = torch.utils.data.DataLoader(FewBatches(), batch_size=2)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader)
    assert trainer.global_step == 2
    after = model.control_model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_frozen_encoder_records_no_graph(model, reference):
    r, seen = reference, []
    for block in model.model.diffusion_model.input_blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.apply_model(r["x_noisy"], r["t"], conditioning(r))
    assert seen and not any(seen)
