"""LoRAs of other trainers give the same output after conversion."""

import pytest
import torch
from safetensors.torch import save_file

from extras.convert_lora import Settings, main
from ldm.modules.lora import LORA_FILE, block_linears, kohya_name, load_lora
from tests.fill import draw, relative_error
from tests.test_flux import diffusers_flux, diffusers_output, tiny_flux, tiny_inputs
from tests.test_lora import CONDITIONS, output, random_lora


@pytest.mark.parametrize("alpha", [4, 10])
def test_converted_diffusers_lora_gives_same_output(tmp_path, alpha):
    from diffusers import FluxKontextPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = tiny_flux()
    trained = diffusers_flux(model)
    parts = (
        r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|norm1?(_context)?\.linear"
    )
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=rf".*_blocks\..*({parts}|\d\.proj_out)")
    trained.add_adapter(config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = draw(f"lora:{name}", parameter.shape) / 8
    about = {"r": 4, "lora_alpha": alpha, "target_modules": []} if alpha != 4 else None
    FluxKontextPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(trained), transformer_lora_adapter_metadata=about
    )
    theirs = diffusers_output(trained, tiny_inputs(), *CONDITIONS)
    main(Settings(tmp_path / LORA_FILE, tmp_path / "ours.safetensors"))
    adapter, _ = load_lora(model, tmp_path / "ours.safetensors")
    assert len(adapter) == len(block_linears(tiny_flux()))
    assert relative_error(output(tiny_flux()), theirs) > 0.05  # it has an effect
    assert relative_error(output(model), theirs) < 1e-4


def test_peft_names_are_converted_and_unsupported_files_raise(tmp_path):
    source, converted = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    model = tiny_flux()
    adapter = random_lora(model, alpha=4.0)  # equal to the rank: scale 1
    names = {kohya_name(name): name for name in block_linears(tiny_flux())}
    weights = {}
    for stem, lora in adapter.items():
        weights[f"diffusion_model.{names[stem]}.lora_A.weight"] = lora.lora_down.weight.data
        weights[f"diffusion_model.{names[stem]}.lora_B.weight"] = lora.lora_up.weight.data
    save_file(weights, source)
    main(Settings(source, converted))
    other = tiny_flux()
    load_lora(other, converted)
    assert relative_error(output(other), output(model)) < 1e-5
    with pytest.raises(ValueError, match="ours.safetensors exists already: remove it or pass --overwrite"):
        main(Settings(source, converted))
    dora = {"diffusion_model.double_blocks.0.img_attn.proj.dora_scale": torch.ones(64, 1)}
    half = dict([*weights.items()][1:])
    unknown = {"unet.down_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}
    beginning = "transformer.single_transformer_blocks.0.attn.to_k"
    wide = {f"{beginning}.lora_A.weight": torch.zeros(4, 8), f"{beginning}.lora_B.weight": torch.zeros(99, 4)}
    for content, message in (
        (weights | dora, "it is a DoRA"),
        (half, "it is not complete: a half of double_blocks"),
        (unknown, "its names are not known: it holds unet.down"),
        (wide, "it is not of FLUX: part 1 of single_blocks.0.linear1 has 99 outputs"),
    ):
        save_file(content, source)
        with pytest.raises(ValueError, match=f"theirs.safetensors cannot be converted: {message}"):
            main(Settings(source, converted, overwrite=True))
