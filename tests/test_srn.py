import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import train_srn
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from tests.fill import draw, fill, relative_error
from train_srn import Settings, SRNDeblurNet, load_network, main, pyramid, restore, scale_losses

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"
TINY = {
    "crop_size": 16,
    "width": 2,
    "batch_size": 2,
    "epochs": 2,
    "log_epoch": 1,
    "num_workers": 0,
    "val_crop": 32,
    "val_images": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def network():
    return fill(SRNDeblurNet()).eval()


@pytest.fixture
def pairs(tmp_path):
    """A GoPro tree of two sequences: odd sizes, one picture smaller than the crop."""
    for sequence, name in (("GOPR1", "coffee.png"), ("GOPR2", "rocket.jpg")):
        image = read_image(photographs((name,))[0])[:60, :90]
        for kind in ("blur", "sharp", "blur_gamma"):
            folder = tmp_path / "data" / sequence / kind
            folder.mkdir(parents=True)
            for frame in (1, 2, 10):
                write_image(
                    folder / f"{frame:06d}.png", image[: 11 + 4 * frame, frame:] // (2 - (kind == "sharp"))
                )
    return tmp_path / "data"


def settings(folder, **changes):
    return Settings(output_dir=folder / "run", **{**TINY, **changes})


def test_keys_are_the_reproductions(network):
    expected = json.loads((REFERENCE / "srn_keys.json").read_text())
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == expected
    assert sum(value.numel() for value in network.parameters()) == pytest.approx(10.25e6, rel=1e-3)


def test_outputs_are_the_reproductions(network):
    expected = np.load(REFERENCE / "srn.npz")
    blurry = [torch.tanh(draw(f"input:srn_b{n + 1}", (1, 3, 64 >> n, 96 >> n))) for n in range(3)]
    with torch.no_grad():
        for name, restored in zip(("i1", "i2", "i3"), network(*blurry), strict=True):
            assert relative_error(restored, expected[name]) < 1e-4


def test_variants_differ_where_they_should():
    blurry = pyramid(torch.rand(2, 3, 32, 48) * 2 - 1)
    plain, official = fill(SRNDeblurNet(2)), fill(SRNDeblurNet(2, coarsest="blurry", detach=True))
    assert not torch.allclose(plain(*blurry)[2], official(*blurry)[2])
    for network, flows in ((plain, True), (official, False)):
        calls = []
        network.step = lambda *inputs, own=network.step, calls=calls: (calls.append(inputs), own(*inputs))[1]
        network(*blurry)
        estimate = calls[1][1]  # what the second scale starts from
        assert estimate.requires_grad == flows and estimate.shape == (2, 3, 16, 24)
    residual = SRNDeblurNet(2, residual=True)
    for restored, scale in zip(residual(*blurry), blurry, strict=True):
        assert torch.equal(restored, scale)  # training starts from the blurry image


@pytest.mark.parametrize("size", [(16, 32), (17, 31), (1, 1), (40, 5)])
def test_any_size_and_dtype(size):
    network = fill(SRNDeblurNet(2)).to(torch.float64)
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    restored = restore(network, image)
    assert restored.shape == image.shape and restored.dtype == torch.float64
    h, w = size
    padded = F.pad(image, (0, -w % 16, 0, -h % 16), mode="replicate")
    with torch.no_grad():
        assert torch.equal(restored, network(*pyramid(padded))[0][..., :h, :w])
    with pytest.raises(ValueError, match=r"multiples of 16, not \(24, 32\)"):
        network(*pyramid(torch.zeros(1, 3, 24, 32, dtype=torch.float64)))


def test_pyramid_is_pillows_antialiased_bilinear():
    image = read_image(photographs(("chelsea.png",))[0])[:64, :96]
    scales = pyramid(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    for scale, n in zip(scales, (1, 2, 4), strict=True):
        expected = np.asarray(Image.fromarray(image).resize((96 // n, 64 // n), Image.BILINEAR), np.float32)
        assert np.abs(scale[0].permute(1, 2, 0).numpy() - expected).max() <= 1  # Pillow rounds to uint8


def test_loss_is_the_sum_of_the_scales_mean_squares():
    sharp = [torch.zeros(1, 3, n, n) for n in (8, 4, 2)]
    restored = [torch.full_like(s, value) for s, value in zip(sharp, (1.0, 2.0, 3.0), strict=True)]
    assert sum(scale_losses(restored, sharp)).item() == 1 + 4 + 9


def test_learning_rates():
    step, power = Settings(), Settings(schedule="power")
    rates = [train_srn.learning_rate_factor(n, 7, 14000, step) for n in (0, 7 * 500 - 1, 7 * 500, 7 * 1999)]
    assert rates == pytest.approx([1, 1, 0.3, 0.3**3])
    rates = [train_srn.learning_rate_factor(n, 10, 100, power) for n in (0, 50, 100)]
    assert rates == pytest.approx([1, 0.5**0.3, 0])


def test_lstm_gradients_alone_are_clipped_to_norm_3():
    torch.manual_seed(0)
    fabric = train_srn.start_fabric()
    network = fill(SRNDeblurNet(2))
    wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.0))

    def norms(factor):
        batch = {"blurry": torch.rand(1, 3, 16, 16), "sharp": factor * torch.rand(1, 3, 16, 16)}
        train_srn.train_step(fabric, wrapped, optimizer, batch, Settings())
        lstm = torch.stack([p.grad.norm() for p in network.convlstm.parameters()]).norm()
        return lstm.item(), network.outblock.conv[0].bias.grad.norm().item()

    assert 0 < norms(1)[0] < 2.9  # small ones are left alone
    lstm, rest = norms(1e5)
    assert lstm == pytest.approx(3, rel=1e-3) and rest > 100


def test_it_learns_one_batch():
    torch.manual_seed(0)
    fabric = train_srn.start_fabric()
    network = SRNDeblurNet(4)
    network, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=3e-3))
    sharp = F.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, 16)
    batch = {"blurry": F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), "reflect"), 5, 1), "sharp": sharp}
    step = partial(train_srn.train_step, fabric, network, optimizer, batch, Settings())
    losses = [step()["mse"].item() for _ in range(80)]
    assert losses[-1] < 0.25 * F.mse_loss(batch["blurry"], sharp).item() < losses[0]


def test_training_on_a_gopro_tree(pairs, tmp_path, capsys):
    main(settings(tmp_path, data=pairs, val_fraction=0.5))
    printed = capsys.readouterr().out
    assert "3 training images, 4 steps; 2 held out" in printed  # whole sequences are held out
    assert printed.count("eval psnr") == 3 and "next: python infer.py srn --checkpoint_path" in printed
    run = tmp_path / "run"
    with open(run / "logs" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    gain = float(rows[1]["val/psnr"]) - float(rows[1]["val/psnr_blurry"])
    assert float(rows[1]["gain/psnr"]) == pytest.approx(gain)
    for step in (2, 4):
        assert read_image(run / "images" / f"sample_{step:07d}.png").shape[1] == 3 * 32 + 2 * 4
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_exported_file_is_the_best_network(pairs, tmp_path):
    main(settings(tmp_path, data=pairs, val_fraction=0.5, residual=True, coarsest="blurry"))
    exported = load_network(tmp_path / "run" / "srn_deblur.safetensors")
    best = load_network(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert exported.residual and exported.coarsest == "blurry"
    average = checkpoint.load(tmp_path / "run/checkpoints/best.ckpt")["ema"]["average"]
    for (name, value), other in zip(best.state_dict().items(), exported.state_dict().values(), strict=True):
        assert torch.equal(value, average[name]) and torch.allclose(value, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("extra", [{}, {"dead_leaves": 4}])
def test_training_on_sharp_pictures(pairs, tmp_path, extra):
    main(settings(tmp_path, sharp_dir=pairs / "GOPR1" / "sharp", val_fraction=0.3, epochs=1, **extra))
    with open(tmp_path / "run" / "logs" / "metrics.csv") as file:
        _, row = csv.DictReader(file)
    assert float(row["val/psnr"]) > 0 and "gain/psnr_motion_blur" in row or "gain/psnr_lens_blur" in row


def same_weights(a, b):
    a, b = (checkpoint.load(path / "run" / "checkpoints" / "last.ckpt") for path in (a, b))
    assert a["step"] == b["step"] and a["state_dict"].keys() == b["state_dict"].keys()
    for part in ("state_dict",):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    averages = a["ema"]["average"], b["ema"]["average"]
    return all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


def test_a_killed_run_resumes_exactly(tmp_path):
    """kill -9 in the middle, the same command again: weights, average and metrics as if it never happened."""
    flags = {**TINY, "dead_leaves": 8, "epochs": 12, "crop_size": 16, "num_workers": 1, "demo": True}

    def command(folder):
        words = [f"--{name}={value}" for name, value in flags.items() if name != "demo"]
        return [sys.executable, ROOT / "train_srn.py", *words, "--output_dir", folder / "run"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
    table = tmp_path / "killed" / "run" / "logs" / "metrics.csv"
    while process.poll() is None and not (table.is_file() and len(table.read_text().splitlines()) > 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = checkpoint.load(tmp_path / "killed" / "run" / "checkpoints" / "last.ckpt")["step"]
    assert 4 <= step < 48
    chosen = {**flags, "demo": False}
    for name in ("killed", "whole"):
        main(Settings(output_dir=tmp_path / name / "run", **chosen))
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    rows = []
    for name in ("killed", "whole"):
        with open(tmp_path / name / "run" / "logs" / "metrics.csv") as file:
            rows.append(
                [{k: v for k, v in row.items() if k != "train/images/s"} for row in csv.DictReader(file)]
            )
    assert rows[0] == rows[1] and len(rows[0]) == 13  # one before the first step


def test_max_steps_replaces_epochs(tmp_path, capsys):
    chosen = {"dead_leaves": 8, "width": 2, "crop_size": 16, "val_images": 2, "val_crop": 32, "batch_size": 2}
    main(Settings(output_dir=tmp_path, max_steps=3, num_workers=0, schedule="power", **chosen))
    state = checkpoint.load(tmp_path / "checkpoints" / "last.ckpt")
    assert state["step"] == 3 and state["scheduler"]["_last_lr"] == [0.0]


def test_files_with_module_in_their_keys_load(network, tmp_path):
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    checkpoint.write_weights(tmp_path / "wild.pth", weights)
    loaded = load_network(tmp_path / "wild.pth")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    del weights["module.convlstm.conv.bias"]
    checkpoint.write_weights(tmp_path / "torn.pth", weights)
    with pytest.raises(ValueError, match="torn.pth does not fit SRNDeblurNet: convlstm.conv.bias is missing"):
        load_network(tmp_path / "torn.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to train on"),
        ({"data": "data", "dead_leaves": 3}, "--dead_leaves goes with"),
        ({"data": "data", "crop_size": 40}, "crop_size must be a multiple of 16, not 40"),
        ({"data": "data", "val_images": 0}, "nothing to evaluate on"),
        ({"data": "missing"}, "missing"),
        ({"sharp_dir": "empty"}, "no images"),
        ({"data": "data", "val_fraction": 0.5, "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings(pairs, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    paths = {k: tmp_path / v if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(settings(tmp_path, **paths))


def test_bad_pairs(pairs, tmp_path):
    blurry, sharp = pairs / "GOPR1/blur", pairs / "GOPR1/sharp"
    lines = [f'"{blurry / f"{n:06d}.png"}" "{sharp / f"{n:06d}.png"}"' for n in (10, 1, 2)]
    file = tmp_path / "my list.txt"
    file.write_text("\n".join([*lines, f"{blurry / '000001.png'} {sharp / 'gone.png'}"]))
    with pytest.raises(FileNotFoundError, match=r"my list.txt:4: image not found: .*gone.png"):
        main(settings(tmp_path, data=file))
    file.write_text("")
    with pytest.raises(FileNotFoundError, match="no pairs in .*my list.txt"):
        main(settings(tmp_path, data=file))
    write_image(blurry / "000010.png", np.zeros((20, 20, 3), np.uint8))
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"000010.png is 20x20, .*000010.png is 80x51"):
        main(settings(tmp_path, data=file, val_sharp_dir=sharp))
    with pytest.raises(ValueError, match=r"000010.png is 20x20, its partner .*000010.png 80x51 pixels"):
        main(settings(tmp_path, data=file, val_data=blurry, val_sharp_dir=sharp, val_images=3))


def test_mixed_file_kinds_train(pairs, tmp_path):
    """Grey and 16-bit PNG beside RGB."""
    grey = read_image(pairs / "GOPR1/sharp/000002.png")[..., 0]
    Image.fromarray(grey).save(pairs / "GOPR1/sharp/000002.png")
    Image.fromarray(grey.astype(np.uint16) * 128).save(pairs / "GOPR1/blur/000002.png")
    main(settings(tmp_path, data=pairs, val_fraction=0.5, epochs=1))


def test_other_settings_or_data_do_not_resume(pairs, tmp_path):
    chosen = settings(tmp_path, data=pairs, val_fraction=0.5, epochs=1)
    main(chosen)
    with pytest.raises(ValueError, match="width was 2, is 4"):
        main(settings(tmp_path, data=pairs, val_fraction=0.5, epochs=1, width=4))
    for kind in ("blur", "sharp"):
        for sequence in ("GOPR1", "GOPR2"):
            (pairs / sequence / kind / "000010.png").unlink()
    with pytest.raises(ValueError, match="samples was 3, is 2"):
        main(chosen)
