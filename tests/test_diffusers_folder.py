"""FLUX networks from folders in diffusers format: equal outputs, and errors of bad folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
from harness.jobs import restore_files
from harness.provenance import content_hash
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from ldm.models.diffusers_folder import INDEX, Joined, autoencoder_weights, flux_weights
from ldm.models.kontext import (
    AUTOENCODER,
    TRANSFORMER,
    FluxAutoencoder,
    check_networks,
    find_network,
    load_autoencoder,
    load_flux,
    open_autoencoder,
    open_flux,
)
from ldm.modules.flux import Flux, FluxParams
from ldm.modules.fp8 import Fp8Linear
from tests.fill import draw, fill, relative_error
from tests.test_flux import diffusers_flux, diffusers_output, full_output, tiny_flux, tiny_inputs
from tests.test_kontext import PEAK
from tests.tiny_flux import VAE
from train_kontext_lora import Settings, load_models

diffusers = pytest.importorskip("diffusers")
CONDITIONS = torch.tensor([0.25, 0.9]), torch.tensor([1.0, 3.5])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Save tiny random networks with diffusers, the transformer in shards."""
    folder = tmp_path_factory.mktemp("flux")
    transformer = diffusers_flux(tiny_flux())
    transformer.save_pretrained(folder / "transformer", max_shard_size="300KB")
    fill(diffusers.AutoencoderKL(**VAE)).save_pretrained(folder / "vae")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(model_folder, tmp_path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "flux")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@torch.no_grad()
@pytest.mark.parametrize(
    "storage", [{}, {"blocks_to_swap": 2}, {"fp8": True}, {"fp8": True, "blocks_to_swap": 4}]
)
def test_transformer_equals_diffusers(model_folder, storage):
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(model_folder / "transformer").eval()
    expected = diffusers_output(theirs, tiny_inputs(), *CONDITIONS)
    model = load_flux(model_folder / "transformer", dtype=torch.float32, **storage)
    output = full_output(model, tiny_inputs(), *CONDITIONS)
    assert relative_error(output, expected) < (0.1 if "fp8" in storage else 1e-4)
    stored = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(stored) == (26 if "fp8" in storage else 0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_autoencoder_equals_diffusers(model_folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(model_folder / "vae").eval()
    model = load_autoencoder(model_folder / "vae")
    image, latent = draw("image", (2, 3, 32, 48)).tanh(), draw("latent", (2, 16, 4, 6))
    encoded = 0.3611 * (theirs.encode(image).latent_dist.mode() - 0.1159)
    assert relative_error(model.encode(image), encoded) < 1e-4
    assert relative_error(model.decode(latent), theirs.decode(latent / 0.3611 + 0.1159).sample) < 1e-4


def test_full_size_keys_and_shapes_match_diffusers():
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(guidance_embeds=True).state_dict()
        widths = {**VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        their_autoencoder = diffusers.AutoencoderKL(**widths).state_dict()
        model, autoencoder = Flux(FluxParams()).state_dict(), FluxAutoencoder().state_dict()
    assert flux_weights(model, theirs, Path("transformer")).keys() == model.keys()
    weights = autoencoder_weights(autoencoder, their_autoencoder, Path("vae"))
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in autoencoder.items()
    }


@torch.no_grad()
def test_single_file_without_index_or_guidance_loads(tmp_path):
    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 24, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
    theirs = fill(diffusers.FluxTransformer2DModel(in_channels=32, guidance_embeds=False, **sizes)).eval()
    theirs.save_pretrained(tmp_path)
    inputs = tiny_inputs()
    inputs |= {"flux_latent": draw("latent", (2, 8, 4, 6)), "flux_control_latent": draw("c", (2, 8, 4, 6))}
    inputs |= {"t5": draw("t5", (2, 5, 24)), "clip_pooled": draw("pooled", (2, 8))}
    expected = diffusers_output(theirs, inputs, CONDITIONS[0], None)
    assert relative_error(full_output(load_flux(tmp_path), inputs, *CONDITIONS), expected) < 1e-4


def test_only_fused_layers_are_joined_lazily(model_folder):
    weights = open_flux(model_folder / "transformer")[1]
    joined = {name for name, value in weights.items() if isinstance(value, Joined)}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in joined} == {"qkv", "linear1", "1"}


@pytest.mark.slow
def test_cpu_memory_stays_below_twice_the_folder_size(tmp_path):
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=4, num_attention_heads=8, guidance_embeds=True
        )
    model = model.bfloat16().to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 * size


def test_single_file_is_preferred_to_folder(copy):
    assert find_network(copy, TRANSFORMER) == copy / "transformer"
    assert find_network(copy, AUTOENCODER) == check_networks(copy) / "vae"
    (copy / AUTOENCODER).touch()
    assert find_network(copy, AUTOENCODER) == copy / AUTOENCODER
    (copy / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{TRANSFORMER} MISSING; {AUTOENCODER} found"):
        check_networks(copy)


def test_missing_or_damaged_files_raise_with_their_names(copy):
    folder = copy / "transformer"
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        load_flux(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"transformer/{shard.name} MISSING; transformer/.* found"):
        check_networks(copy)
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_flux(folder)
    (folder / INDEX).write_text('{"weight_map": {"x_embedder.bias": 3}}')
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        check_networks(copy)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"transformer/{INDEX} MISSING"):
        check_networks(copy)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"num_layers": 3},
            r"transformer does not fit Flux: transformer_blocks.2.norm1.linear.weight is miss",
        ),
        ({"num_layers": 1}, r"does not fit Flux: transformer_blocks.1.\S+ does not belong"),
        ({"joint_attention_dim": 50}, r"context_embedder.weight is \(64, 40\), not \(64, 50\)"),
        ({"attention_head_dim": 30}, r"config.json is damaged or not complete: axes_dim"),
        (
            {"num_attention_heads": 0},
            r"config.json is damaged or not complete: its sizes must be positive, not 0",
        ),
        ({"pooled_projection_dim": 10**9}, r"config.json is damaged or not complete: pooled_projection_dim"),
        ({"_class_name": "SD3Transformer2DModel"}, "config.json is of SD3Transformer2DModel, not of Flux"),
    ],
)
def test_wrong_transformer_config_raises(copy, values, message):
    edit(copy / "transformer" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load_flux(copy / "transformer")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scaling_factor": 0.18215}, r"vae.config.json: scaling_factor must be 0.3611, not 0.18215"),
        ({"shift_factor": None}, r"shift_factor must be 0.1159, not None"),
        (
            {"latent_channels": 4},
            r"vae does not fit FluxAutoencoder: encoder.conv_out.weight is \(32, 96, 3, 3\)",
        ),
        ({"block_out_channels": [32, 64, 96]}, r"block_out_channels must be 4 multiples of the first"),
        ({"layers_per_block": 2}, r"encoder.down_blocks.0.resnets.1.norm1.weight is missing"),
        ({"block_out_channels": [0] * 4}, r"config.json is damaged or not complete"),
    ],
)
def test_wrong_autoencoder_config_raises(copy, values, message):
    edit(copy / "vae" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(copy / "vae")


def test_invalid_config_and_unexpected_tensors_raise(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "quant_conv.bias": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match="vae does not fit FluxAutoencoder: quant_conv.bias does not belong"):
        load_autoencoder(copy / "vae")
    (copy / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="transformer.config.json is damaged or not complete"):
        load_flux(copy / "transformer")


def test_headers_suffice_to_validate_a_folder(copy):
    for find, file in ((open_flux, TRANSFORMER), (open_autoencoder, AUTOENCODER)):
        model, weights = find(find_network(copy, file), checkpoint.read_shapes)
        assert weights.keys() == model.state_dict().keys()
    edit(copy / "transformer" / "config.json", num_layers=3)
    with pytest.raises(ValueError, match="transformer_blocks.2.norm1.linear.weight is missing"):
        open_flux(copy / "transformer", checkpoint.read_shapes)


def test_infer_restores_from_folder_and_detects_changed_shards(copy, tmp_path):
    """A changed shard causes the result to be computed again."""
    inputs = tiny_inputs()
    prompt = {"t5": inputs["t5"][:1], "pooled": inputs["clip_pooled"][:1]}
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", read_image(photographs()[0])[:40, :56])
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write_weights(out / ".prompt.safetensors", prompt, {"prompt": "mend"})
    options = {"prompt": "mend", "num_inference_steps": 2, "device": "cpu"}
    command = infer.Kontext(
        input=tmp_path / "photos", output_dir=out, pretrained_model_name_or_path=copy, **options
    )
    restore_files(command)
    first = read_image(out / "a.png")
    assert first.shape == (40, 56, 3)
    written = (out / "a.png").stat().st_mtime_ns
    restore_files(command)
    assert (out / "a.png").stat().st_mtime_ns == written
    shard = sorted((copy / "transformer").glob("*.safetensors"))[0]
    before = content_hash(copy / "transformer")
    save_file({name: 0.9 * value for name, value in load_file(shard).items()}, shard)
    assert content_hash(copy / "transformer") != before
    restore_files(command)
    assert np.abs(read_image(out / "a.png").astype(int) - first).max() > 0
    words = ["--checkpoint_path", str(copy)]
    assert infer.with_subcommand(words) == ["kontext", "--pretrained_model_name_or_path", words[1]]


def test_training_loads_the_folder(model_folder):
    settings = Settings(pretrained_model_name_or_path=model_folder, base_precision="fp8")
    autoencoder, model = load_models(settings, torch.device("cpu"))
    assert autoencoder.config["z_channels"] == 16 and model.checkpointing
    assert len(model.double_blocks) == tiny_flux().params.depth
