"""What a restoration is said to cost, against counts by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evaluate
import infer
from harness.profile import count_macs, peak_resident_memory
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from train_srn import SRNDeblurNet


def srn_macs(width: int, height: int, length: int) -> int:
    """Of SRN at `height` x `length` pixels, both multiples of 16, convolution by convolution."""

    def conv(inputs, outputs, pixels):  # 5x5: a transposed one counts the pixels it reads
        return 25 * inputs * outputs * pixels

    def resblocks(channels, pixels):
        return 6 * conv(channels, channels, pixels)

    total = 0
    for scale in (1, 4, 16):
        full = height * length // scale
        half, quarter = full // 4, full // 16
        w = width
        total += conv(6, w, full) + resblocks(w, full)
        total += conv(w, 2 * w, half) + resblocks(2 * w, half)
        total += conv(2 * w, 4 * w, quarter) + resblocks(4 * w, quarter)
        total += conv(8 * w, 16 * w, quarter)  # the ConvLSTM
        total += resblocks(4 * w, quarter) + conv(4 * w, 2 * w, quarter)
        total += resblocks(2 * w, half) + conv(2 * w, w, half)
        total += resblocks(w, full) + conv(w, 3, full)
    return total


@pytest.fixture
def command(tmp_path):
    """`infer.py srn` with a tiny network on pictures of 30 x 40 (padded to 32 x 48) and 16 x 16."""
    torch.manual_seed(0)
    network = SRNDeblurNet(2)
    checkpoint.save(tmp_path / "srn.ckpt", {"state_dict": network.state_dict(), "step": 7})
    image = read_image(photographs()[0])
    for name, size in (("a", (30, 40)), ("b", (16, 16))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        write_image(tmp_path / "photos" / f"{name}.png", image[: size[0], : size[1]])
    places = {"input": tmp_path / "photos", "output_dir": tmp_path / "out", "output_prefix": ""}
    return infer.SRN(**places, checkpoint_path=tmp_path / "srn.ckpt", device="cpu", profile=True)


def test_the_published_network_has_the_known_size():
    """101.9 GMAC at 256 pixels for the five by five network of width 32."""
    assert srn_macs(32, 256, 256) == pytest.approx(101.9e9, rel=1e-3)


def test_a_profile_is_written_and_reported(command, capsys):
    infer.restore_files(command)
    path = command.output_dir / "profile.json"
    profile = json.loads(path.read_text())
    assert profile["macs"] == srn_macs(2, 32, 48) and profile["size"] == [40, 30]
    assert profile["seconds"] > 0 and profile["device"].startswith("CPU, ")
    assert 50e6 < profile["peak_memory"] <= peak_resident_memory()
    assert profile["options"]["tile"] == 1536 and profile["torch"] == torch.__version__
    assert profile["checkpoint"] == checkpoint.describe(command.checkpoint_path)
    assert (profile["checkpoint"]["step"], profile["image"]) == (7, str(command.input / "a.png"))
    line = f"{srn_macs(2, 32, 48) / 1e9:.3f} GMAC"
    assert line in capsys.readouterr().out

    places = {"restored": command.output_dir, "sharp": command.input}
    report, page = command.output_dir / "report.json", command.output_dir / "report.html"
    evaluate.main(evaluate.Settings(**places, output=report, html=page))
    sha256 = profile["checkpoint"]["sha256"]
    for text in (capsys.readouterr().out, page.read_text()):
        assert line in text and "40 x 30" in text and sha256 in text and "step 7" in text
    content = json.loads(report.read_text())
    assert content["profile"]["macs"] == profile["macs"] and content["checkpoint"]["sha256"] == sha256

    checkpoint.save(command.output_dir / "other.ckpt", {"state_dict": {"a": torch.zeros(1)}})
    other = evaluate.Settings(**places, checkpoint_path=command.output_dir / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is not what .*profile.json names"):
        evaluate.main(other)


def test_what_is_there_is_profiled_too(command, capsys):
    command.profile = False
    infer.restore_files(command)
    command.profile = True
    infer.restore_files(command)
    assert "0 made, 2 kept (unchanged)" in capsys.readouterr().out
    assert json.loads((command.output_dir / "profile.json").read_text())["macs"] == srn_macs(2, 32, 48)
    write_image(command.output_dir / "a.png", np.zeros((30, 40, 3), np.uint8))
    infer.restore_files(command)
    assert "1 made, 1 kept (unchanged)" in capsys.readouterr().out


def test_steps_tiles_and_attention_count():
    linear, mixer = nn.Linear(8, 4), nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, q, k = torch.zeros(5, 8), torch.zeros(2, 4, 6, 16), torch.zeros(2, 4, 9, 16)
    with torch.no_grad():
        assert count_macs(lambda: [linear(x) for _ in range(3)]) == 3 * 5 * 8 * 4
        assert count_macs(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 4 * 6 * 9 * 16)
        y = torch.zeros(1, 10, 16)
        expected = 10 * 16 * 4 * 16 + 2 * (10 * 10 * 16)
        assert count_macs(lambda: mixer(y, y, y, need_weights=False)) == expected
    assert count_macs(lambda: None) == 0 and torch.backends.mha.get_fastpath_enabled()


def test_a_broken_profile_is_named(command):
    command.output_dir.mkdir()
    path = command.output_dir / "profile.json"
    write_image(command.output_dir / "a.png", read_image(command.input / "a.png"))
    for content in (b'{"macs": 3}', b"{", b"[]", b"\xff\xfe", b'{"checkpoint": null}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"profile.json is no profile of infer.py"):
            evaluate.main(evaluate.Settings(command.output_dir, command.input))
