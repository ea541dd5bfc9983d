import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.modules.nafnet import NAFNet
from tests.fill import draw, fill, relative_error

REFERENCE = Path(__file__).parent / "reference"
FULL = "width_32_enc_1_1_1_28_mid_1_dec_1_1_1_1"
TINY = (8, [1, 2], 1, [1, 1])


def test_output_matches_reference():
    """The sides of the image are not multiples of 4, so it is zero-padded and cropped."""
    image = torch.sigmoid(draw("input:image", (1, 3, 30, 36)))
    with torch.no_grad():
        restored = fill(NAFNet(*TINY)).eval()(image)
    assert relative_error(restored, np.load(REFERENCE / "generators.npz")["nafnet.tiny"]) < 1e-4


def test_keys_parameters_and_flops_match_the_paper():
    manifest = json.loads((REFERENCE / "nafnet_keys.json").read_text())
    with torch.device("meta"):
        networks = {
            "tiny": NAFNet(*TINY),
            "width_32_enc_1_1_1_28_mid_1_dec_1_1_1_1": NAFNet(),
            "": NAFNet(64),
        }
    counts = [sum(value.numel() for value in network.parameters()) for network in networks.values()]
    assert counts[1:] == [17_111_907, 67_888_835]
    image = torch.zeros(1, 3, 256, 256, device="meta")
    for name, gmac in ((FULL, 16), ("", 65)):  # of the paper, which also counts norms and scalings
        with FlopCounterMode(display=False) as counter:
            networks[name](image)
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.035)
    for name, expected in manifest.items():
        assert {k: list(v.shape) for k, v in networks[name].state_dict().items()} == expected


def test_overfits_one_batch():
    torch.manual_seed(0)
    network, image = NAFNet(*TINY), torch.rand(2, 3, 16, 16)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (network(image) - image.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(ValueError, match="2 encoder stages do not match 1 decoders"):
        NAFNet(8, [1, 2], 1, [1])
