"""ControlLDM against the original's key manifests and numbers."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers import make_steps
from ldm.modules.diffusionmodules.util import make_ddim_sampling_parameters, make_ddim_timesteps
from ldm.util import instantiate_from_config
from tests.conftest import REFERENCE
from tests.fill import relative_error


@pytest.mark.parametrize("name", ["v15", "v21"])
def test_state_dict_equals_the_originals(name):
    expected = json.loads((REFERENCE / f"keys_cldm_{name}.json").read_text())
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.load(f"models/cldm_{name}.yaml").model)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


def test_tiny_state_dict_equals_the_originals(model):
    expected = json.loads((REFERENCE / "cldm_tiny_keys.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


def conditioning(r, name="context"):
    return {"c_crossattn": [r[name]], "c_concat": [r["hint"]]}


@torch.no_grad()
def test_network_numbers(model, reference):
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
    model.only_mid_control, model.control_scales = False, model.guess_mode_scales()
    assert relative_error(model.apply_model(r["x_noisy"], r["t"], cond), r["apply_model.guess_scales"]) < 1e-4


@torch.no_grad()
def test_autoencoder_numbers(model, reference):
    r, vae = reference, model.first_stage_model
    posterior = model.encode_first_stage(r["image"])
    assert relative_error(vae.quant_conv(vae.encoder(r["image"])), r["vae.moments"]) < 1e-4
    assert relative_error(posterior.mode(), r["vae.mode"]) < 1e-4
    assert relative_error(posterior.kl(), r["vae.kl"]) < 1e-4
    assert relative_error(model.decode_first_stage(r["latent"]), r["vae.decode"]) < 1e-4


@torch.no_grad()
def test_diffusion_numbers(model, reference):
    r = reference
    for name, expected in r.items():
        if name.startswith("schedule."):
            assert relative_error(getattr(model, name.removeprefix("schedule.")), expected) < 1e-5, name
    assert relative_error(model.q_sample(r["x_start"], r["t"], r["noise"]), r["q_sample"]) < 1e-5
    _, losses = model.p_losses(r["x_start"], conditioning(r), r["t"], r["noise"])
    for name in ("loss_simple", "loss_vlb", "loss"):
        assert relative_error(losses[name], r[f"p_losses.{name}"]) < 1e-4, name
    mean = model.p_mean_variance(r["x_noisy"], conditioning(r), r["t"])[0]
    assert relative_error(mean, r["ddpm.posterior_mean_at_t"]) < 1e-4


def test_sampling_numbers(model, reference):
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


def test_sampler_tables(model, reference):
    alphacums = model.alphas_cumprod.double().numpy()
    for count in (5, 20):
        assert make_ddim_timesteps(count).tolist() == reference[f"ddim{count}.timesteps"].tolist()
    _, alphas, alphas_prev = make_ddim_sampling_parameters(alphacums, make_ddim_timesteps(5), 0.0)
    assert np.allclose(alphas, reference["ddim5.alphas"])
    assert np.allclose(alphas_prev, reference["ddim5.alphas_prev"])
    sigmas, _, _ = make_ddim_sampling_parameters(alphacums, make_ddim_timesteps(10), 0.7)
    assert np.allclose(sigmas, reference["ddim10.eta07.sigmas"])
    steps = make_steps(alphacums, 5)
    assert [step.alpha for step in steps] == alphas[::-1].tolist()
    assert [step.alpha_next for step in steps] == alphas_prev[::-1].tolist()


@pytest.mark.parametrize("count", [1, 3, 7, 50, 300, 999, 1000])
def test_any_number_of_steps(count):
    timesteps = make_ddim_timesteps(count)
    assert len(timesteps) == count and timesteps[0] >= 0 and timesteps[-1] <= 999
    assert (np.diff(timesteps) > 0).all()


@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_numbers_of_steps(count):
    with pytest.raises(ValueError, match=str(count)):
        make_ddim_timesteps(count)
