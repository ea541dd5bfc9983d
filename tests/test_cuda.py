"""Every system on fake CUDA tensors: devices, dtypes, synchronizations and resumed states."""

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
FORMS = {  # each in one precision
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
    """Build a training step of tiny networks on fake CUDA tensors."""
    with (
        mock.patch("benchmarks.plan.FluxParams", lambda: FLUX),
        mock.patch("ldm.models.kontext.FluxParams", lambda **sizes: FLUX),
        mock.patch("benchmarks.plan.FluxAutoencoder", lambda: FluxAutoencoder(AUTOENCODER)),
        mock.patch("ldm.models.kontext.FluxAutoencoder", lambda config: FluxAutoencoder(AUTOENCODER)),
    ):
        return plan.without_files(make, settings, device)


def on_cpu(state):
    """Move a state to the CPU, as loading a checkpoint does."""
    return tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, state)


def check_step(make, settings) -> None:
    """Take two steps, the second without synchronization, and a third after loading the saved state."""
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
    """Check that parameters and optimizer state are on CUDA and that every trained parameter was updated."""
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
def test_training_step_runs_and_resumes_on_cuda(name, precision):
    make, settings = WORKS[name]
    check_step(make, replace(settings, precision=precision))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_training_step_variants_run_and_resume_on_cuda(name):
    check_step(*FORMS[name])


@pytest.mark.slow
def test_full_size_controlnet_step_runs_on_cuda():
    settings = tutorial_train_deblur.Settings(precision="bf16", image_size=128, batch_size=1)
    with fake_tensors() as count:
        build(plan.controlnet, settings).step()
        assert count.flops > 1e11


def test_mixed_devices_raise():
    with fake_tensors(), pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        torch.empty(3, device="cuda") + torch.empty(3)


def test_next_swapped_block_is_copied_while_current_one_computes(monkeypatch):
    """A block runs after its copy has finished, and its buffer is overwritten only after it has run."""
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
            for block in reversed(blocks):  # the recomputation of a backward pass
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
def test_feed_forward_networks_restore_on_cuda(tmp_path, precision, tile):
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


@pytest.mark.parametrize(
    ("precision", "how"), [pytest.param("bf16", {}, marks=pytest.mark.slow), ("16", TILED)]
)
def test_deblurring_controlnet_restores_on_cuda(tmp_path, precision, how):
    how = {"input": tmp_path, "precision": precision, "num_inference_steps": 2, **how}
    with (
        fake_tensors(),
        mock.patch("cldm.restore.open_control_model", lambda *a: tiny_control_model("cldm_tiny_deblur.yaml")),
    ):
        restore = options(infer.Deblur, tmp_path, prompt="a cat", **how).restorer()
        assert restore(np.zeros((90, 150, 3), np.uint8), Path("a.png")).shape == (90, 150, 3)


@pytest.mark.parametrize(("precision", "strength"), [("bf16", 1.0), ("16", 0.5)])
def test_inpainting_controlnet_restores_on_cuda(tmp_path, precision, strength):
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


def test_t5_stays_in_cpu_memory_and_runs_layer_by_layer():
    """On a card that just fits the swapped transformer there is no room for T5's 9.5 GB."""
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


def test_controlnet_is_cast_before_moving_to_device():
    """Moving it in float32 would need more GPU memory than restoring in half precision."""
    model, moved = tiny_control_model("cldm_tiny_deblur.yaml"), []
    model.to = lambda *where, **how: moved.append(model.control_model.input_blocks[0][0].weight.dtype)
    with mock.patch("cldm.restore.open_control_model", lambda *files: model):
        open_restorer(Path(), None, None, torch.device("cuda"), torch.bfloat16)
    assert moved == [torch.bfloat16]


def test_kontext_autoencoder_is_bf16_and_channels_last_on_cuda():
    def open_tiny(path):
        model = FluxAutoencoder(AUTOENCODER)
        return model, model.state_dict()

    with fake_tensors(), mock.patch("ldm.models.kontext.open_autoencoder", open_tiny):
        weight = load_autoencoder(Path("ae.safetensors"), "cuda").decoder.conv_in.weight
        assert weight.is_cuda and weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autoencoder_attention_inputs_suit_fused_kernels(monkeypatch, layout):
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
