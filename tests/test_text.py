"""CLIP's text model against reference outputs."""

import json

import numpy as np
import torch

from ldm.modules.encoders.modules import CLIPTextModel, tokenize
from tests.conftest import REFERENCE
from tests.fill import fill, relative_error


@torch.no_grad()
def test_clip_text_model_matches_reference():
    config = json.loads((REFERENCE / "clip_text_tiny.json").read_text())
    arrays = np.load(REFERENCE / "clip_text_tiny.npz")
    model = fill(
        CLIPTextModel(
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            layers=config["layers"],
            heads=config["heads"],
        )
    )
    ids = tokenize(config["prompts"])
    assert ids.tolist() == arrays["ids"].tolist()
    hidden, pooled = model(ids)
    assert relative_error(hidden, arrays["last_hidden_state"]) < 1e-4
    assert relative_error(pooled, arrays["pooled"]) < 1e-4
