"""Shared fixtures: the tiny model of the reference outputs."""

import copy
import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads slow tiny networks down

import numpy as np
import pytest
import torch

from cldm.cldm import ControlLDM
from tests.fill import draw, fill

REFERENCE = Path(__file__).parent / "reference"
TINY = json.loads((REFERENCE / "cldm_tiny.json").read_text())


def tiny_arguments() -> dict:
    """Return the arguments of the reference ControlLDM."""
    control = {**TINY["net"], "hint_channels": TINY["hint_channels"]}
    return {
        "unet_config": {"target": "cldm.cldm.ControlledUnetModel", "params": TINY["net"]},
        "control_stage_config": {"target": "cldm.cldm.ControlNet", "params": control},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ddconfig": TINY["ddconfig"], "embed_dim": 4},
        },
        "cond_stage_config": None,
        "only_mid_control": False,
    }


@pytest.fixture(autouse=True)
def _auto_is_32(monkeypatch):
    """Make `--precision auto` 32 on every CPU, also on one with fast bf16."""
    monkeypatch.setattr("ldm.util.cpu_computes_in_bf16", lambda: False)


@pytest.fixture(scope="session")
def _filled_model() -> ControlLDM:
    return fill(ControlLDM(**tiny_arguments())).eval()


@pytest.fixture
def model(_filled_model) -> ControlLDM:
    """Return the tiny ControlLDM with the reference weights; each test gets its own copy."""
    return copy.deepcopy(_filled_model)


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    """Return the reference arrays and the inputs they were computed from."""
    arrays = {
        name: torch.from_numpy(np.asarray(a)) for name, a in np.load(REFERENCE / "cldm_tiny.npz").items()
    }
    b, (h, w), n = TINY["batch"], TINY["latent_hw"], TINY["hint_channels"]
    latents = {
        name: draw(f"input:{name}", (b, 4, h, w)) for name in ("x_noisy", "latent", "x_start", "noise", "x_T")
    }
    return {
        **arrays,
        **latents,
        "context": draw("input:context", (b, 7, TINY["net"]["context_dim"])),
        "uncond_context": draw("input:uncond_context", (b, 7, TINY["net"]["context_dim"])),
        "hint": draw("input:hint", (b, n, 8 * h, 8 * w)).sigmoid(),
        "image": draw("input:image", (b, 3, 8 * h, 8 * w)).tanh(),
        "t": torch.tensor([1, 500]),
    }
