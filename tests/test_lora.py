import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.models.kontext import load_flux, save_flux
from ldm.modules.flux import Flux, FluxParams
from ldm.modules.lora import (
    LORA_FILE,
    MODELSPEC,
    LoRA,
    kohya_name,
    load_lora,
    make_lora,
    read_lora,
    save_lora,
    start_from,
)
from tests.fill import draw, relative_error
from tests.test_flux import diffusers_flux, diffusers_output, full_output, tiny_flux, tiny_inputs

CONDITIONS = torch.tensor([0.25, 0.9]), torch.tensor([1.0, 3.5])


def random_lora(model: Flux, targets: str = "all", rank: int = 4, alpha: float = 7.0):
    """Create a LoRA with a clear effect: its up matrices are random too."""
    adapter = make_lora(model, targets, rank, alpha)
    for name, parameter in adapter.named_parameters():
        parameter.data = draw(f"lora:{name}", parameter.shape) / parameter.shape[1] ** 0.5
    return adapter.eval()


def output(model: Flux) -> torch.Tensor:
    with torch.no_grad():
        return full_output(model, tiny_inputs(), *CONDITIONS)


def test_number_of_layers_and_parameters_of_each_target():
    with torch.device("meta"):
        counts = {}
        for targets in ("attn", "attn_mlp", "all"):
            adapter = make_lora(Flux(FluxParams()), targets, 16, 16)
            counts[targets] = len(adapter), sum(p.numel() for p in adapter.parameters())
    assert {name: layers for name, (layers, _) in counts.items()} == {
        "attn": 19 * 4 + 38 * 2,
        "attn_mlp": 19 * 8 + 38 * 2,
        "all": 19 * 10 + 38 * 3,
    }
    attention = 2 * (3072 + 9216 + 3072 + 3072)  # qkv and proj of two streams, features in and out
    assert counts["attn"][1] == 16 * (19 * attention + 38 * (3072 + 21504 + 15360 + 3072))
    assert 57e6 < counts["all"][1] < 77e6


def test_new_lora_has_no_effect_and_only_it_is_trained():
    model = tiny_flux()
    before = output(model)
    adapter = make_lora(model, "all", 4, 4)
    assert torch.equal(output(model), before)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    full_output(model, tiny_inputs(), *CONDITIONS).square().mean().backward()
    assert all(lora.lora_up.weight.grad.abs().max() > 0 for lora in adapter.values())


def test_lora_adds_scaled_low_rank_product():
    lora = LoRA(24, 40, rank=3, alpha=6)
    torch.nn.init.normal_(lora.lora_up.weight)
    x, y = draw("x", (2, 5, 24)), draw("y", (2, 5, 40))
    torch.testing.assert_close(lora(x, y), y + x @ (2.0 * lora.lora_up.weight @ lora.lora_down.weight).T)


def test_lora_works_on_8_bit_weights(tmp_path):
    save_flux(tmp_path / "flux.safetensors", tiny_flux())
    model = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32, fp8=True)
    plain = output(model)
    random_lora(model)
    assert relative_error(output(model), plain) > 0.1


@pytest.mark.parametrize("targets", ["attn", "attn_mlp", "all"])
def test_saved_lora_loads_with_same_output(tmp_path, targets):
    model, path = tiny_flux(), tmp_path / "lora.safetensors"
    adapter = random_lora(model, targets)
    save_lora(path, adapter, {"rank": 4, "prompt": "restore"}, torch.float32)
    other = tiny_flux()
    loaded, metadata = load_lora(other, path)
    assert metadata == {"rank": "4", "prompt": "restore", **MODELSPEC}
    assert torch.equal(output(other), output(model))
    assert loaded.keys() == adapter.keys()
    assert all(value.dtype == torch.float32 for value in load_file(path).values())
    half = tiny_flux()
    load_lora(half, path, strength=0.0)
    assert torch.equal(output(half), output(tiny_flux()))


def test_bf16_file_keeps_alpha(tmp_path):
    adapter = random_lora(tiny_flux(), alpha=7.0)
    save_lora(tmp_path / "lora.safetensors", adapter, {})
    weights = load_file(tmp_path / "lora.safetensors")
    stem = kohya_name("double_blocks.0.img_attn.qkv")
    assert weights[f"{stem}.lora_up.weight"].dtype == torch.bfloat16
    assert weights[f"{stem}.lora_up.weight"].shape == (192, 4) and weights[f"{stem}.alpha"].item() == 7


def test_diffusers_pipeline_gives_the_same_output(tmp_path):
    """linear1 is left out, since the converter assumes the full model's sizes for it: see the next test."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    model = tiny_flux()
    oracle = diffusers_flux(model)
    adapter = random_lora(model, rank=6, alpha=9.0)
    for name, lora in adapter.items():
        if name.endswith("linear1"):
            lora.lora_up.weight.data.zero_()
    weights = {name: lora for name, lora in adapter.items() if not name.endswith("linear1")}
    save_lora(tmp_path / LORA_FILE, torch.nn.ModuleDict(weights), {"rank": 6}, torch.float32)
    pipeline = FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer=oracle
    )
    pipeline.load_lora_weights(str(tmp_path))
    theirs = diffusers_output(pipeline.transformer, tiny_inputs(), *CONDITIONS)
    assert relative_error(output(tiny_flux()), theirs) > 0.1  # it has an effect
    assert relative_error(output(model), theirs) < 1e-4


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (5, 8.0), (16, 1.0)])
def test_diffusers_converts_single_blocks_exactly(tmp_path, rank, alpha):
    from diffusers import FluxKontextPipeline

    stem, x = "lora_unet_single_blocks_3_linear1", draw("x", (1, 3072))
    lora = LoRA(3072, 21504, rank, alpha)
    torch.nn.init.normal_(lora.lora_up.weight)
    expected = lora(x, torch.zeros(1, 21504)).split((3072, 3072, 3072, 12288), dim=1)
    save_lora(tmp_path / "lora.safetensors", torch.nn.ModuleDict({stem: lora}), {}, torch.float32)
    converted = FluxKontextPipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    assert len(converted) == 2 * len(names)
    for name, y in zip(names, expected, strict=True):
        prefix = f"transformer.single_transformer_blocks.3.{name}"
        theirs = x @ converted[f"{prefix}.lora_A.weight"].T @ converted[f"{prefix}.lora_B.weight"].T
        torch.testing.assert_close(theirs, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [4.0, 7.0])
def test_training_starts_from_a_file_with_any_alpha(tmp_path, alpha):
    path = tmp_path / "lora.safetensors"
    model, again = tiny_flux(), tiny_flux()
    save_lora(path, random_lora(model, alpha=alpha), {}, torch.float32)
    adapter = make_lora(again, "all", 4, 4.0)
    start_from(adapter, path)
    assert relative_error(output(again), output(model)) < 1e-6
    assert all(lora.alpha == 4 for lora in adapter.values())
    with pytest.raises(ValueError, match=r"does not fit .*lora_down.weight is \(4, 64\), not \(8, 64\)"):
        start_from(make_lora(tiny_flux(), "all", 8, 8.0), path)
    for targets in ("attn", "attn_mlp"):
        with pytest.raises(ValueError, match="does not fit the LoRA of this run"):
            start_from(make_lora(tiny_flux(), targets, 4, 4.0), path)


def test_foreign_or_damaged_files_raise(tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ValueError, match="rank must lie in 1 ... 64, not 0"):
        make_lora(tiny_flux(), "attn", 0, 1.0)
    save_file({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(ValueError, match="not a LoRA of FLUX with kohya's names: it holds lora_unet_down"):
        read_lora(path)
    save_file({"transformer.single_transformer_blocks.0.proj_out.lora_A.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(ValueError, match="another trainer .*proj_out.* python -m extras.convert_lora IN OUT"):
        load_lora(tiny_flux(), path)
    save_file({"unet.down_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(ValueError, match="not a LoRA of FLUX"):
        load_lora(tiny_flux(), path)
    sizes = FluxParams(64, 64, 24, 40, 128, 4.0, 4, depth=1, depth_single_blocks=1, axes_dim=(8, 12, 12))
    save_lora(path, random_lora(Flux(sizes)), {})
    with pytest.raises(
        ValueError, match=r"does not fit ModuleDict: .*lora_down.weight is \(4, 128\), not \(4, 64\)"
    ):
        load_lora(tiny_flux(), path)
    deeper = FluxParams(64, 64, 24, 40, 64, 4.0, 2, depth=2, depth_single_blocks=3, axes_dim=(8, 12, 12))
    save_lora(path, random_lora(Flux(deeper)), {})
    with pytest.raises(ValueError, match="another base, or not complete: lora_unet_single_blocks_2"):
        load_lora(tiny_flux(), path)
    save_lora(path, random_lora(tiny_flux()), {})
    weights = {
        name: value for name, value in load_file(path).items() if not name.endswith("qkv.lora_up.weight")
    }
    save_file(weights, path)
    with pytest.raises(
        ValueError, match="does not fit .*double_blocks_0_img_attn_qkv.lora_up.weight is missing"
    ):
        load_lora(tiny_flux(), path)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    for name, value, message in (
        ("lora_down.weight", torch.zeros(4, 64, 2), "does not fit .*lora_down.weight is"),
        ("lora_up.weight", torch.zeros(64, 9), r"lora_up.weight is \(64, 9\), not \(64, 4\)"),
        ("alpha", torch.zeros(2), "is damaged: .*alpha is no number"),
    ):
        save_lora(path, random_lora(tiny_flux()), {})
        save_file({**load_file(path), f"{stem}.{name}": value}, path)
        with pytest.raises(ValueError, match=message):
            load_lora(tiny_flux(), path)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        load_lora(tiny_flux(), tmp_path / "last.ckpt")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        read_lora(path)
