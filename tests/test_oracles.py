"""Our networks give the same outputs as those of diffusers, transformers and open_clip."""

import re

import pytest
import torch

from cldm.cldm import ControlledUnetModel, ControlNet
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, tokenize
from tests.fill import draw, fill, relative_error

SIZES = {
    "in_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4],
    "num_heads": 4,
    "context_dim": 24,
}
BLOCKS = {
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,  # diffusers' name for the number of heads
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def diffusers_block(name: str, per_level: int, levels: int) -> str:
    """Return the diffusers name of a parameter of our UNet or ControlNet."""
    fixed = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "middle_block_out.0": "controlnet_mid_block",
        "input_hint_block.0": "controlnet_cond_embedding.conv_in",
        "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    }
    name = re.sub(r"^zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", name)
    hint = re.match(r"input_hint_block\.(\d+)\.", name)
    if hint and 0 < int(hint[1]) < 14:
        return name.replace(hint[0], f"controlnet_cond_embedding.blocks.{int(hint[1]) // 2 - 1}.")
    for ours, theirs in fixed.items():
        if name.startswith(ours + "."):
            name = name.replace(ours, theirs, 1)
    down = re.match(r"input_blocks\.(\d+)\.(\d)\.", name)
    if down:
        level, index = divmod(int(down[1]) - 1, per_level + 1)
        part = ("resnets", "attentions")[int(down[2])]
        name = name.replace(down[0], f"down_blocks.{level}.{part}.{index}.", 1)
        name = re.sub(r"resnets\.\d+\.op", "downsamplers.0.conv", name)
    up = re.match(r"output_blocks\.(\d+)\.(\d)\.", name)
    if up:
        level, index = divmod(int(up[1]), per_level + 1)
        if ".conv." in name[len(up[0]) - 1 :]:
            name = name.replace(up[0] + "conv", f"up_blocks.{level}.upsamplers.0.conv", 1)
        else:
            part = ("resnets", "attentions")[int(up[2])]
            name = name.replace(up[0], f"up_blocks.{level}.{part}.{index}.", 1)
    for ours, theirs in RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{re.escape(ours)}\.", rf"\1.{theirs}.", name)
    return name


def transfer(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy our weights to the diffusers network; all parameters of both must match."""
    weights = {diffusers_block(name, 2, 3): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return {
        "x": draw("x", (2, 4, 16, 8)),  # not square
        "t": torch.tensor([3, 700]),
        "context": draw("context", (2, 7, 24)),
        "hint": draw("hint", (2, 3, 128, 64)).sigmoid(),
    }


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_unet_and_controlnet_equal_diffusers(inputs, linear):
    from diffusers import ControlNetModel, UNet2DConditionModel

    sizes = {**SIZES, "use_linear_in_transformer": linear}
    unet = fill(ControlledUnetModel(**sizes)).eval()
    control = fill(ControlNet(**sizes)).eval()
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    theirs = UNet2DConditionModel(
        down_block_types=down, up_block_types=up, use_linear_projection=linear, **BLOCKS
    ).eval()
    their_control = ControlNetModel(down_block_types=down, use_linear_projection=linear, **BLOCKS).eval()
    transfer(unet, theirs)
    transfer(control, their_control)

    x, t, context, hint = (inputs[name] for name in ("x", "t", "context", "hint"))
    added = control(x, hint, t, context)
    their_down, their_mid = their_control(x, t, context, hint, return_dict=False)
    for mine, other in zip(added, [*their_down, their_mid], strict=True):
        assert relative_error(mine, other) < 1e-4
    expected = theirs(
        x, t, context, down_block_additional_residuals=their_down, mid_block_additional_residual=their_mid
    )
    assert relative_error(unet(x, t, context, added), expected.sample) < 1e-4
    assert relative_error(unet(x, t, context), theirs(x, t, context).sample) < 1e-4


def diffusers_autoencoder_name(name: str) -> str:
    name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = re.sub(r"down\.(\d)\.block", r"down_blocks.\1.resnets", name)
    name = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", name)
    name = re.sub(r"up\.(\d)\.block", lambda m: f"up_blocks.{2 - int(m[1])}.resnets", name)
    name = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{2 - int(m[1])}.upsamplers.0", name)
    parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    name = re.sub(r"mid\.attn_1\.(\w+)", lambda m: f"mid_block.attentions.0.{parts[m[1]]}", name)
    return name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")


@torch.no_grad()
@pytest.mark.parametrize(("channels", "quant"), [(4, True), (16, False)])
def test_autoencoder_equals_diffusers(channels, quant):
    from diffusers import AutoencoderKL as TheirAutoencoder

    config = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": channels}
    ours = fill(AutoencoderKL(config, channels, use_quant_conv=quant)).eval()
    theirs = TheirAutoencoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()
    weights = {diffusers_autoencoder_name(name): value for name, value in ours.state_dict().items()}
    weights = {k: v.flatten(1) if re.search(r"attentions.*to_.*weight", k) else v for k, v in weights.items()}
    theirs.load_state_dict(weights, strict=True)
    image = draw("image", (2, 3, 32, 48)).tanh()
    posterior, expected = ours.encode(image), theirs.encode(image).latent_dist
    assert relative_error(posterior.mean, expected.mean) < 1e-4
    assert relative_error(posterior.logvar, expected.logvar) < 1e-4
    latent = draw("latent", (2, channels, 8, 12))
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) < 1e-4


PROMPTS = ["a photograph of a CAT, sitting", "", "naïve — 猫 & <b>bold</b>"]


@torch.no_grad()
def test_clip_text_encoder_equals_transformers():
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = fill(FrozenCLIPEmbedder(width=32, hidden=64, layers=3, heads=4)).eval()
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        eos_token_id=49407,
    )
    theirs = CLIPTextModel(config).eval()
    names = theirs.state_dict().keys()
    weights = {}
    for name, value in ours.transformer.state_dict().items():
        name = name if name in names else name.removeprefix("text_model.")
        if not name.endswith("position_ids"):
            weights[name] = value
    theirs.load_state_dict(weights, strict=True)
    ids = tokenize(PROMPTS)
    expected = theirs(ids)
    assert relative_error(ours(PROMPTS), expected.last_hidden_state) < 1e-4
    assert relative_error(ours.transformer(ids)[1], expected.pooler_output) < 1e-4


@torch.no_grad()
def test_open_clip_text_encoder_equals_open_clip():
    import open_clip

    ours = FrozenOpenCLIPEmbedder(width=32, heads=4, layers=3, layer="penultimate")
    fill(ours)
    ids = open_clip.tokenize(PROMPTS)
    assert torch.equal(tokenize(PROMPTS, padding=0), ids)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 16}
    theirs = open_clip.CLIP(1024, vision, text).eval()  # two blocks, since "penultimate" skips our last one
    weights = {k: v for k, v in ours.model.state_dict().items() if "resblocks.2." not in k}
    theirs.load_state_dict(weights, strict=False)
    h = theirs.token_embedding(ids) + theirs.positional_embedding
    expected = theirs.ln_final(theirs.transformer(h, attn_mask=theirs.attn_mask))
    assert relative_error(ours(PROMPTS), expected) < 1e-4


def test_long_prompt_is_truncated_with_a_warning():
    with pytest.warns(UserWarning, match="longer than 77 tokens, ignored: 'word"):
        ids = tokenize(["word " * 90])
    assert ids.shape == (1, 77) and ids[0, -1] == 49407


def test_unknown_layer_raises():
    with pytest.raises(ValueError, match="'middle'"):
        FrozenOpenCLIPEmbedder(layer="middle")
