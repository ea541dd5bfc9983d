import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import write_weights
from ldm.models.kontext import (
    FluxAutoencoder,
    load_autoencoder,
    load_flux,
    save_flux,
)
from ldm.models.prompts import Prompts, cached_prompt, check_folder, encode_prompt, prompt_file
from ldm.modules.fp8 import Fp8Linear
from ldm.modules.lora import make_lora
from ldm.modules.swap import BlockSwap
from tests.fill import draw, fill, relative_error
from tests.test_flux import ARRAYS, CONFIG, REFERENCE, full_output, shapes_of, tiny_flux, tiny_inputs

TINY_AE = {name: CONFIG["ae"][name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")}


def test_autoencoder_keys_and_shapes_match_release():
    with torch.device("meta"):
        model = FluxAutoencoder()
    assert shapes_of(model) == json.loads((REFERENCE / "keys_flux_ae.json").read_text())
    keys = json.loads((REFERENCE / "flux_tiny_keys.json").read_text())
    expected = {name[3:]: shape for name, shape in keys.items() if name.startswith("ae.")}
    assert shapes_of(FluxAutoencoder(TINY_AE)) == expected


@torch.no_grad()
def test_autoencoder_matches_reference():
    model = fill(FluxAutoencoder(TINY_AE))
    b, (h, w) = CONFIG["batch"], CONFIG["latent_hw"]
    image = draw("input:flux_image", (b, 3, 8 * h, 8 * w)).tanh()
    assert relative_error(model.encode(image), ARRAYS["ae.encode"]) < 1e-4
    assert relative_error(model.decode(tiny_inputs()["flux_latent"]), ARRAYS["ae.decode"]) < 1e-4


def tiny_output(model):
    return full_output(model, tiny_inputs(), torch.tensor([0.25, 0.9]), torch.tensor([1.0, 3.5]))


@torch.no_grad()
def test_loaded_network_equals_saved_network(tmp_path):
    save_flux(tmp_path / "flux.safetensors", tiny_flux())
    model = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32)
    assert torch.equal(tiny_output(model), tiny_output(tiny_flux()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    half = load_flux(tmp_path / "flux.safetensors", dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert relative_error(tiny_output(half).float(), ARRAYS["flux.out_full"]) < 0.03


@torch.no_grad()
def test_fp8_storage_covers_block_linears_with_small_error(tmp_path):
    save_flux(tmp_path / "flux.safetensors", tiny_flux())
    model = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32, fp8=True)
    eight_bit = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert len(eight_bit) == 2 * 10 + 2 * 3
    assert all(m.weight.dtype == torch.float8_e4m3fn for m in eight_bit)
    error = (tiny_output(model) - torch.from_numpy(ARRAYS["flux.out_full"])).norm()
    assert error / np.linalg.norm(ARRAYS["flux.out_full"]) < 0.1


def test_fp8_gradients_are_equal_with_checkpointing(tmp_path):
    save_flux(tmp_path / "flux.safetensors", tiny_flux())
    model = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32, fp8=True)
    model.img_in.weight.requires_grad_(True)
    gradients = []
    for model.checkpointing in (False, True):
        model.img_in.weight.grad = None
        tiny_output(model).square().mean().backward()
        gradients.append(model.img_in.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = make_lora(model, "attn", 4, 4)
    for name, parameter in adapter.named_parameters():
        parameter.data = draw(f"lora:{name}", parameter.shape) / 8
    y = tiny_output(model)
    y.square().mean().backward()
    return y.detach(), torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_swapped_blocks_give_same_gradients_with_at_most_two_copies(tmp_path, monkeypatch, fp8, count):
    save_flux(tmp_path / "flux.safetensors", tiny_flux())
    live, most = weakref.WeakSet(), []

    def room(weight, device):
        copy = torch.empty_like(weight)
        live.add(copy.untyped_storage())
        most.append(sum(storage.nbytes() for storage in live))
        return copy

    monkeypatch.setattr(BlockSwap, "room", staticmethod(room))
    results = []
    for blocks in (0, count):
        model = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32, fp8=fp8, blocks_to_swap=blocks)
        model.checkpointing = True
        results.append(gradients(model))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    blocks = [*model.double_blocks, *model.single_blocks][-count:]
    frozen = [sum(p.nbytes for p in b.parameters() if not p.requires_grad) for b in blocks]
    assert 0 < max(most) <= sum(sorted(frozen)[-2:]) and len(most) > len(frozen)
    with torch.no_grad():
        assert torch.equal(tiny_output(model), results[0][0])  # without gradients too
    with pytest.raises(ValueError, match=r"blocks_to_swap must lie in 0 ... 4 \(all blocks\), not 6"):
        load_flux(tmp_path / "flux.safetensors", blocks_to_swap=6)


PEAK = """
import resource, sys, torch
from ldm.models.kontext import load_flux
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_flux(sys.argv[1], dtype=torch.bfloat16, fp8=True)
print(peak() - before)
"""


@pytest.mark.slow
def test_cpu_memory_stays_below_twice_the_file_size(tmp_path):
    from ldm.modules.flux import Flux, FluxParams

    sizes = FluxParams(hidden_size=1024, num_heads=8, depth=1, depth_single_blocks=4)
    with torch.device("meta"):
        model = Flux(sizes)
    state = {
        name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    path = tmp_path / "flux.safetensors"
    save_flux(path, model)
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 * path.stat().st_size


def test_damaged_or_foreign_files_raise_with_their_names(tmp_path):
    whole = tmp_path / "flux.safetensors"
    save_flux(whole, tiny_flux())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        load_flux(cut)
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load_flux(tmp_path / "absent.safetensors")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not fit Flux: img_in.weight is missing"):
        load_flux(tmp_path / "other.safetensors")
    weights = load_file(whole)
    weights["img_in.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "shape.safetensors", {"flux_params": json.dumps(vars(tiny_flux().params))})
    with pytest.raises(ValueError, match=r"img_in.bias is \(3,\), not \(64,\)"):
        load_flux(tmp_path / "shape.safetensors")


def test_autoencoder_is_loaded_from_file(tmp_path):
    model = fill(FluxAutoencoder(TINY_AE))
    save_file(model.state_dict(), tmp_path / "ae.safetensors", {"ddconfig": json.dumps(TINY_AE)})
    latent = tiny_inputs()["flux_latent"]
    with torch.no_grad():
        found = load_autoencoder(tmp_path / "ae.safetensors").decode(latent)
        assert torch.allclose(found, model.decode(latent), atol=1e-5)  # in another memory format


def test_missing_files_are_listed(tmp_path):
    for name in ("transformer/diffusion_pytorch_model.safetensors", "ae.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as error:
        check_folder(tmp_path, ["flux1-kontext-dev.safetensors", "ae.safetensors"])
    assert "flux1-kontext-dev.safetensors MISSING; ae.safetensors found" in str(error.value)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    """Save tiny random text encoders and a tokenizer with transformers, in the layout of a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("kontext")
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5EncoderModel(config).bfloat16().save_pretrained(folder / "text_encoder_2", max_shard_size="4KB")
    words = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in "restore this old photograph".split())]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer_2")
    config = CLIPTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, projection_dim=24
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    path = folder / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": w.clone() for name, w in load_file(path).items()
    }
    save_file(
        weights, path, {"format": "pt"}
    )  # the released file has this prefix; transformers 5 no longer writes it
    return folder


@torch.no_grad()
def test_prompt_embeddings_equal_transformers(text_folder):
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    from ldm.modules.encoders.modules import tokenize

    prompt = "restore this old photograph"
    ours = encode_prompt(text_folder, prompt)
    ids = AutoTokenizer.from_pretrained(text_folder / "tokenizer_2")(
        prompt, padding="max_length", max_length=512, return_tensors="pt"
    ).input_ids
    assert ids[0, :6].tolist() == [3, 4, 5, 6, 1, 0]
    t5 = T5EncoderModel.from_pretrained(text_folder / "text_encoder_2", dtype=torch.float32)(ids)[0]
    assert ours["t5"].shape == (1, 512, 32)
    assert relative_error(ours["t5"].float(), t5) < 0.05  # bfloat16 against float32
    clip = CLIPTextModel.from_pretrained(text_folder / "text_encoder")(tokenize([prompt])).pooler_output
    assert ours["pooled"].shape == (1, 24)
    assert relative_error(ours["pooled"].float(), clip) < 0.01


def test_prompt_is_encoded_once(text_folder, tmp_path):
    cache = tmp_path / "prompt.safetensors"
    first = cached_prompt(cache, text_folder, "old photograph")
    again = cached_prompt(cache, tmp_path / "no folder is needed", "old photograph")
    assert torch.equal(first["t5"], again["t5"]) and torch.equal(first["pooled"], again["pooled"])
    for broken in ({"t5": first["t5"]}, {**first, "pooled": first["pooled"][0]}):
        write_weights(cache, broken, {"prompt": "old photograph"})
        assert torch.equal(cached_prompt(cache, text_folder, "old photograph")["pooled"], first["pooled"])
    other = cached_prompt(cache, text_folder, "restore this")
    assert not torch.equal(first["t5"], other["t5"])
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json MISSING"):
        cached_prompt(cache, tmp_path, "a prompt that is not in the cache")


def test_several_prompts_are_encoded_once_and_stacked(text_folder, tmp_path):
    texts = ["old photograph", "restore this", ""]
    prompts = Prompts(tmp_path, text_folder, [*texts, texts[0]])
    again = Prompts(tmp_path, tmp_path / "no folder is needed", texts)
    both = again([texts[1], texts[0], texts[1]])
    assert both["t5"].shape == (3, 512, 32) and both["pooled"].shape == (3, 24)
    for row, text in enumerate((texts[1], texts[0])):
        alone = encode_prompt(text_folder, text)
        assert all(torch.equal(both[name][row], value[0]) for name, value in alone.items())
    assert prompts(["", ""])["t5"].shape == (1, 512, 32)
    assert not torch.equal(prompts([""])["pooled"], prompts([texts[0]])["pooled"])
    prompt_file(tmp_path, texts[0]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="safetensors"):
        Prompts(tmp_path, text_folder, texts)


def test_damaged_text_encoder_raises_with_its_name(text_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "folder")
    shard = max((tmp_path / "folder" / "text_encoder_2").glob("model*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="text_encoder_2.* is damaged"):
        encode_prompt(tmp_path / "folder", "restore this")
