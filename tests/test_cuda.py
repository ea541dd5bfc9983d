"""What would happen on CUDA, on fake tensors: devices, types, waits and resumed states of every system."""

import inspect
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import T5Config, T5EncoderModel

import infer
import train_dbgan
import train_kontext_lora
import train_srn
import tutorial_train_deblur
import tutorial_train_inpaint
from benchmarks import plan
from benchmarks.fake_cuda import fake_tensors, to_fake
from cldm.model import create_model
from cldm.restore import open_restorer
from ldm.data.image import write_image
from ldm.models.kontext import FluxAutoencoder, load_autoencoder
from ldm.models.prompts import run_by_layers
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.flux import FluxParams
from ldm.modules.swap import BlockSwap

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA: it has no fake CUDA tensors"
)
ROOT = Path(__file__).parent.parent
FLUX = FluxParams(64, 64, 32, 48, 128, 4.0, 4, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12))
AUTOENCODER = {"ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "z_channels": 16}

SMALL = {"image_size": 64, "batch_size": 2, "ema_decay": 0.9}
DEBLUR = tutorial_train_deblur.Settings(config_path=str(ROOT / "models/cldm_tiny_deblur.yaml"), **SMALL)
INPAINT = tutorial_train_inpaint.Settings(config_path=str(ROOT / "models/cldm_tiny_inpaint.yaml"), **SMALL)
SRN = train_srn.Settings(width=8, crop_size=32, batch_size=2)
DBGAN = train_dbgan.Settings(width=8, blocks=1, crop_size=32, batch_size=2)
KONTEXT = train_kontext_lora.Settings(resolution=32, batch_size=1, accumulate_grad_batches=2)

WORKS = {
    "deblur": (plan.controlnet, DEBLUR),
    "inpaint": (plan.controlnet, INPAINT),
    "srn": (plan.srn, SRN),
    "dbgan blur": (partial(plan.dbgan, stage="blur"), DBGAN),
    "dbgan deblur": (partial(plan.dbgan, stage="deblur"), DBGAN),
}
FORMS = {  # in one precision each
    "deblur, attention, checkpointed": (
        plan.controlnet,
        replace(
            DEBLUR, use_attention=True, cache_latents=True, gradient_checkpointing=True, precision="bf16"
        ),
    ),
    "deblur, hint as latent": (
        plan.controlnet,
        replace(DEBLUR, hint_as_latent=True, cache_latents=True, max_grad_norm=1.0, precision="16"),
    ),
    "inpaint, decoder too": (
        plan.controlnet,
        replace(INPAINT, sd_locked=False, hint_channels=4, precision="bf16"),
    ),
    "srn, clipped": (plan.srn, replace(SRN, residual=True, max_grad_norm=1.0, precision="16")),
    "dbgan content": (partial(plan.dbgan, stage="deblur", phase=0), replace(DBGAN, precision="bf16")),
    "dbgan paired": (partial(plan.dbgan, stage="paired"), replace(DBGAN, precision="16")),
    "kontext": (plan.kontext, KONTEXT),
    "kontext, fp8": (plan.kontext, replace(KONTEXT, base_precision="fp8", gradient_checkpointing=False)),
}


def build(make, settings, device: str = "cuda") -> plan.Work:
    """A training step on fake CUDA tensors, of tiny networks."""
    with (
        mock.patch("benchmarks.plan.FluxParams", lambda: FLUX),
        mock.patch("ldm.models.kontext.FluxParams", lambda **sizes: FLUX),
        mock.patch("benchmarks.plan.FluxAutoencoder", lambda: FluxAutoencoder(AUTOENCODER)),
        mock.patch("ldm.models.kontext.FluxAutoencoder", lambda config: FluxAutoencoder(AUTOENCODER)),
    ):
        return plan.without_files(make, settings, device)


def on_cpu(state):
    """A state as a checkpoint gives it back."""
    return tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, state)


def check_step(make, settings) -> None:
    """Two steps, the second without a wait for the device, and a third after what a checkpoint gives back."""
    with fake_tensors() as count:
        work = build(make, settings)
        work.step()
        count.restart()
        work.step()
        assert count.syncs == 0, f"a step waits {count.syncs} times for the device"
        check_parts(work)
        for part in work.parts.values():
            part.load_state_dict(on_cpu(part.state_dict()))
        work.step()
        check_parts(work)


def check_parts(work: plan.Work) -> None:
    """Everything is on CUDA, and the optimizer has seen a gradient of all that is trained."""
    parameters, optimizer = list(work.parts["state_dict"].parameters()), work.parts["optimizer"]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert trained and all(parameter.is_cuda for parameter in parameters)
    assert all(optimizer.state[parameter]["exp_avg"].is_cuda for parameter in trained)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("deblur", "32"),
        ("deblur", "16"),
        ("inpaint", "bf16"),
        ("srn", "32"),
        ("dbgan blur", "16"),
        ("dbgan deblur", "bf16"),
    ],
)
def test_a_training_step_runs_on_cuda_and_resumes_there(name, precision):
    make, settings = WORKS[name]
    check_step(make, replace(settings, precision=precision))


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_the_training_steps_do_so_too(name):
    check_step(*FORMS[name])


@pytest.mark.slow
def test_a_step_of_the_real_controlnet_runs_on_cuda():
    settings = tutorial_train_deblur.Settings(precision="bf16", image_size=128, batch_size=1)
    with fake_tensors() as count:
        build(plan.controlnet, settings).step()
        assert count.flops > 1e11


def test_a_mix_of_devices_raises():
    with fake_tensors(), pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        torch.empty(3, device="cuda") + torch.empty(3)


def test_blocks_that_wait_are_fetched_while_the_one_before_computes(monkeypatch):
    """What each stream waits for: a copy is used once it is there, and its room again once it was used."""
    log = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda stream: log.append(f"{stream.name} copies") or nullcontext()
    )
    there, fetched = "main waits for side", ["side waits for main", "side copies"]
    with fake_tensors():
        x = torch.empty(1, 4, device="cuda")
        blocks = [to_fake(nn.Linear(4, 4).requires_grad_(False), "cpu") for _ in range(3)]
        swap = BlockSwap([to_fake(nn.Linear(4, 4)), *blocks], 3)
        for _ in range(2):
            swap.start(x.device)
            for block in blocks:
                x = swap.run(block, x)
            for block in reversed(blocks):  # as a backward pass recomputes them
                x = swap.run(block, x)
            assert x.is_cuda and all(not block.weight.is_cuda for block in blocks)
            forward = [there, *fetched, there, *fetched, there, *fetched, there]
            assert log == [*forward, *fetched, there, *fetched, there, *fetched, there]
            log.clear()


# ---- restorers ---------------------------------------------------------------------------------------------


def tiny_control_model(config: str):
    with torch.device("meta"):
        model = create_model(ROOT / "models" / config)
    return to_fake(model, "cpu").eval()


def options(command, tmp_path, **more):
    return command(output_dir=tmp_path, checkpoint_path=Path(__file__), **more)


@pytest.mark.parametrize(("precision", "tile"), [("32", 0), ("bf16", 64), ("16", 0)])
def test_one_pass_networks_restore_on_cuda(tmp_path, precision, tile):
    networks = {
        infer.SRN: ("train_srn.load_network", lambda path: train_srn.SRNDeblurNet(8).eval()),
        infer.DBGAN: ("train_dbgan.load_generator", lambda *a: train_dbgan.DBGANGenerator(8, 1).eval()),
        infer.BGAN: ("train_dbgan.load_generator", lambda *a: train_dbgan.BGANGenerator(8, 1).eval()),
    }
    for command, (name, make) in networks.items():
        how = {"input": tmp_path, "precision": precision, "tile": tile, "overlap": 16}
        with fake_tensors(), mock.patch(name, make):
            restore = options(command, tmp_path, **how).restorer()
            assert restore(np.zeros((90, 150, 3), np.uint8), Path("a.png")).shape == (90, 150, 3)


TILED = {"tile": 64, "overlap": 0, "strength": 0.5, "guidance_scale": 2.0}


@pytest.mark.parametrize(("precision", "how"), [("bf16", {}), ("16", TILED)])
def test_the_deblurring_controlnet_restores_on_cuda(tmp_path, precision, how):
    how = {"input": tmp_path, "precision": precision, "num_inference_steps": 2, **how}
    with (
        fake_tensors(),
        mock.patch("cldm.restore.open_control_model", lambda *a: tiny_control_model("cldm_tiny_deblur.yaml")),
    ):
        restore = options(infer.Deblur, tmp_path, prompt="a cat", **how).restorer()
        assert restore(np.zeros((90, 150, 3), np.uint8), Path("a.png")).shape == (90, 150, 3)


@pytest.mark.parametrize(("precision", "strength"), [("bf16", 1.0), ("16", 0.5)])
def test_the_inpainting_controlnet_restores_on_cuda(tmp_path, precision, strength):
    mask, photo = tmp_path / "mask.png", tmp_path / "photo.png"
    image = np.zeros((90, 150, 3), np.uint8)
    write_image(photo, image)
    write_image(mask, np.pad(np.full((20, 20, 3), 255, np.uint8), ((9, 61), (9, 121), (0, 0))))
    how = {"input": photo, "input_mask": mask, "precision": precision, "num_inference_steps": 2}
    with (
        fake_tensors(),
        mock.patch(
            "cldm.restore.open_control_model", lambda *a: tiny_control_model("cldm_tiny_inpaint.yaml")
        ),
    ):
        restore = options(infer.Inpaint, tmp_path, strength=strength, **how).restorer()
        assert restore(image, photo).shape == (90, 150, 3)


def test_t5_stays_in_main_memory_and_passes_layer_by_layer():
    """Its 9.5 GB would not leave room on a card that the swapped transformer fits on."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 12, "num_heads": 4}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=40, **sizes)).eval()
    with fake_tensors() as count:
        to_fake(model, "cpu")
        weights = count.held
        count.peak = weights
        states = list(run_by_layers(model, torch.zeros(5, 8, dtype=torch.long), "cuda"))
        assert [state.shape for state in states] == [(1, 8, 64)] * 5
        assert not any(tensor.is_cuda for tensor in (*states, *model.parameters()))
        assert count.peak - weights < weights / 3


def test_the_controlnet_is_cast_before_the_device_holds_it():
    """In float32 it takes more of a card than in the precision that it restores in."""
    model, moved = tiny_control_model("cldm_tiny_deblur.yaml"), []
    model.to = lambda *where, **how: moved.append(model.control_model.input_blocks[0][0].weight.dtype)
    with mock.patch("cldm.restore.open_control_model", lambda *files: model):
        open_restorer(Path(), None, None, torch.device("cuda"), torch.bfloat16)
    assert moved == [torch.bfloat16]


def test_the_autoencoder_of_kontext_is_in_bf16_and_channels_last_on_cuda():
    def open_tiny(path):
        model = FluxAutoencoder(AUTOENCODER)
        return model, model.state_dict()

    with fake_tensors(), mock.patch("ldm.models.kontext.open_autoencoder", open_tiny):
        weight = load_autoencoder(Path("ae.safetensors"), "cuda").decoder.conv_in.weight
        assert weight.is_cuda and weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_autoencoders_attention_gets_what_fused_kernels_take(monkeypatch, layout):
    real, strides = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *qkv: strides.extend(x.stride(-1) for x in qkv) or real(*qkv),
    )
    AttnBlock(32)(torch.ones(1, 32, 4, 4).to(memory_format=layout))
    assert strides == [1, 1, 1]


@pytest.mark.parametrize("base_precision", ["bf16", "fp8"])
def test_kontext_restores_on_cuda(base_precision):
    from ldm.models.kontext import restore_image

    settings = replace(KONTEXT, base_precision=base_precision)
    with fake_tensors():
        networks = []
        with mock.patch("benchmarks.plan.Work", lambda step, parts: networks.append(step)):
            build(plan.kontext, settings)
        made = inspect.getclosurevars(networks[0]).nonlocals
        image = np.zeros((40, 56, 3), np.uint8)
        restored = restore_image(
            made["model"], made["autoencoder"], made["prompt"], image, steps=2, resolution=64
        )
        assert restored.shape == image.shape
