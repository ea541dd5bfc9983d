import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_srn
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.losses import fft_loss, pixel_loss
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
    """Write a GoPro tree of two sequences with odd sizes and one image smaller than the crop."""
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


def test_keys_and_shapes_match_reproduction(network):
    expected = json.loads((REFERENCE / "srn_keys.json").read_text())
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == expected
    assert sum(value.numel() for value in network.parameters()) == pytest.approx(10.25e6, rel=1e-3)


def test_published_network_has_101_9_gmac():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        SRNDeblurNet()(*(torch.empty(1, 3, side, side) for side in (256, 128, 64)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(101.9, rel=1e-3)


def test_outputs_match_reproduction(network):
    expected = np.load(REFERENCE / "srn.npz")
    blurry = [torch.tanh(draw(f"input:srn_b{n + 1}", (1, 3, 64 >> n, 96 >> n))) for n in range(3)]
    with torch.no_grad():
        for name, restored in zip(("i1", "i2", "i3"), network(*blurry), strict=True):
            assert relative_error(restored, expected[name]) < 1e-4


def test_residual_network_starts_as_identity():
    blurry = pyramid(torch.rand(2, 3, 32, 48) * 2 - 1)
    for restored, scale in zip(SRNDeblurNet(2, residual=True)(*blurry), blurry, strict=True):
        assert torch.equal(restored, scale)


@pytest.mark.parametrize("size", [(16, 32), (17, 31), (1, 1), (40, 5)])
def test_restore_accepts_any_size_and_dtype(size):
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


def test_pyramid_equals_pillow_antialiased_bilinear():
    image = read_image(photographs(("chelsea.png",))[0])[:64, :96]
    scales = pyramid(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    for scale, n in zip(scales, (1, 2, 4), strict=True):
        expected = np.asarray(Image.fromarray(image).resize((96 // n, 64 // n), Image.BILINEAR), np.float32)
        assert np.abs(scale[0].permute(1, 2, 0).numpy() - expected).max() <= 1  # Pillow rounds to uint8


def test_loss_is_the_sum_of_mse_over_scales():
    sharp = [torch.zeros(1, 3, n, n) for n in (8, 4, 2)]
    restored = [torch.full_like(s, value) for s, value in zip(sharp, (1.0, 2.0, 3.0), strict=True)]
    assert sum(scale_losses(restored, sharp)).item() == 1 + 4 + 9


def test_other_losses_match_their_formulas():
    made, real = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    difference = (made - real).double()
    assert pixel_loss(made, real, "l1").item() == pytest.approx(difference.abs().mean().item())
    charbonnier = (difference**2 + 1e-6).sqrt().mean().item()
    assert pixel_loss(made, real, "charbonnier").item() == pytest.approx(charbonnier)
    squares = [(image**2).mean().item() for image in difference]
    expected = sum(math.log(square + 4e-6) for square in squares) / len(squares)
    assert pixel_loss(made, real, "psnr").item() == pytest.approx(expected)
    spectrum = np.fft.rfft2(difference.numpy())
    distance = np.abs([spectrum.real, spectrum.imag]).mean()
    assert fft_loss(made, real).item() == pytest.approx(distance, rel=1e-5)
    assert fft_loss(made.bfloat16(), real).dtype == torch.float32
    both = scale_losses([made], [real], "l1", 0.1)[0].item()
    assert both == pytest.approx(pixel_loss(made, real, "l1").item() + 0.1 * fft_loss(made, real).item())


def test_sampling_unshuffles_pixels():
    """The network runs on unshuffled images (24 input, 12 output channels), at a quarter of the FLOPs."""
    network = fill(SRNDeblurNet(2, sampling=True, residual=True))
    blurry = pyramid(torch.rand(1, 3, 32, 64) * 2 - 1)
    calls = []
    network.inblock.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    restored = network(*blurry)
    assert [tuple(x.shape) for x in calls] == [(1, 24, n, 2 * n) for n in (4, 8, 16)]
    assert torch.equal(calls[0][0, :4], F.pixel_unshuffle(blurry[2], 2)[0, :4])
    assert [i.shape for i in restored] == [b.shape for b in blurry]
    assert restore(network, torch.zeros(1, 3, 17, 40)).shape == (1, 3, 17, 40)
    with pytest.raises(ValueError, match=r"multiples of 32, not \(16, 32\)"):
        network(*pyramid(torch.zeros(1, 3, 16, 32)))


def test_xavier_keeps_zero_residual_output():
    torch.manual_seed(0)
    network = SRNDeblurNet(4, residual=True)
    train_srn.xavier(network)
    weight = network.convlstm.conv.weight
    assert weight.std().item() == pytest.approx((2 / (96 * 25)) ** 0.5, rel=0.05)
    assert weight.abs().max() > 2.5 * weight.std()  # normal: a uniform distribution ends at 1.7
    assert network.convlstm.conv.bias.any() and not network.outblock.conv[0].weight.any()


def test_learning_rate_schedules():
    factor = partial(train_srn.learning_rate_factor, steps_per_epoch=7, steps=14000, schedule="step")
    assert [factor(n) for n in (0, 7 * 500 - 1, 7 * 500, 7 * 1999)] == pytest.approx([1, 1, 0.3, 0.3**3])
    power = partial(train_srn.learning_rate_factor, steps_per_epoch=10, steps=100, schedule="power")
    assert [power(n) for n in (0, 50, 100)] == pytest.approx([1, 0.5**0.3, 0])
    cosine = partial(power, schedule="cosine")
    assert [cosine(n) for n in (0, 25, 50, 100)] == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0])


def test_only_lstm_gradients_are_clipped_to_norm_3():
    torch.manual_seed(0)
    fabric = train_srn.start_fabric()
    network = fill(SRNDeblurNet(2))
    wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.0))

    def norms(factor):
        batch = {"blurry": torch.rand(1, 3, 16, 16), "sharp": factor * torch.rand(1, 3, 16, 16)}
        train_srn.train_step(fabric, wrapped, optimizer, batch, Settings())
        lstm = torch.stack([p.grad.norm() for p in network.convlstm.parameters()]).norm()
        return lstm.item(), network.outblock.conv[0].bias.grad.norm().item()

    assert 0 < norms(1)[0] < 2.9  # small gradients are unchanged
    lstm, rest = norms(1e5)
    assert lstm == pytest.approx(3, rel=1e-3) and rest > 100


def test_max_grad_norm_clips_all_gradients():
    torch.manual_seed(0)
    fabric = train_srn.start_fabric()
    network = fill(SRNDeblurNet(2))
    wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.0))
    batch = {"blurry": torch.rand(1, 3, 16, 16), "sharp": 1e4 * torch.rand(1, 3, 16, 16)}
    train_srn.train_step(fabric, wrapped, optimizer, batch, Settings(max_grad_norm=0.5))
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-3)


def test_optimizer_settings_are_applied():
    network = SRNDeblurNet(2)
    sgd = train_srn.make_optimizer(network, Settings(optimizer="sgd", momentum=0.8, nesterov=False))
    assert sgd.defaults["momentum"] == 0.8 and not sgd.defaults["nesterov"]
    adam = train_srn.make_optimizer(network, Settings(weight_decay=1e-3))
    assert adam.defaults["weight_decay"] == 1e-3


def test_fused_optimizer_steps_in_float16():
    """This is the case of --precision 16 on CUDA; Fabric's own unscaling rejects fused optimizers."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu"))
    network = fill(SRNDeblurNet(2))
    before = network.outblock.conv[0].bias.detach().clone()
    fused = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    wrapped, optimizer = fabric.setup(network, fused)
    batch = {"blurry": torch.rand(1, 3, 16, 16), "sharp": torch.rand(1, 3, 16, 16)}
    for _ in range(4):  # steps are skipped until the scale of 65536 is low enough not to overflow
        train_srn.train_step(fabric, wrapped, optimizer, batch, Settings())
    lstm = torch.stack([p.grad.norm() for p in network.convlstm.parameters()]).norm()
    assert 0 < lstm < 3.01  # unscaled
    assert not torch.equal(network.outblock.conv[0].bias, before)


def test_overfits_one_batch():
    torch.manual_seed(0)
    fabric = train_srn.start_fabric()
    network = SRNDeblurNet(4)
    network, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=3e-3))
    sharp = F.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, 16)
    batch = {"blurry": F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), "reflect"), 5, 1), "sharp": sharp}
    step = partial(train_srn.train_step, fabric, network, optimizer, batch, Settings())
    losses = [step()["mse"].item() for _ in range(80)]
    assert losses[-1] < 0.25 * F.mse_loss(batch["blurry"], sharp).item() < losses[0]


def test_training_on_a_gopro_tree_writes_logs_and_checkpoints(pairs, tmp_path, capsys):
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


def test_exported_file_has_the_best_ema_weights(pairs, tmp_path):
    main(settings(tmp_path, data=pairs, val_fraction=0.5, residual=True))
    exported = load_network(tmp_path / "run" / "srn_deblur.safetensors")
    best = load_network(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert exported.residual and not exported.sampling
    average = checkpoint.load(tmp_path / "run/checkpoints/best.ckpt")["ema"]["average"]
    for (name, value), other in zip(best.state_dict().items(), exported.state_dict().values(), strict=True):
        assert torch.equal(value, average[name]) and torch.allclose(value, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("extra", [{}, {"dead_leaves": 4, "realistic_blur": False}])
def test_training_on_sharp_images(pairs, tmp_path, extra):
    main(settings(tmp_path, sharp_dir=pairs / "GOPR1" / "sharp", val_fraction=0.3, epochs=1, **extra))
    with open(tmp_path / "run" / "logs" / "metrics.csv") as file:
        _, row = csv.DictReader(file)
    assert float(row["val/psnr"]) > 0 and any(name.startswith("gain/psnr_") for name in row)


def same_weights(a, b):
    a, b = (checkpoint.load(path / "run" / "checkpoints" / "last.ckpt") for path in (a, b))
    assert a["step"] == b["step"] and a["state_dict"].keys() == b["state_dict"].keys()
    for part in ("state_dict",):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    averages = a["ema"]["average"], b["ema"]["average"]
    return all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


@pytest.mark.slow
def test_killed_run_resumes_exactly(tmp_path):
    """After kill -9 and the same command, weights, EMA and metrics equal those of an uninterrupted run."""
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
    assert rows[0] == rows[1] and len(rows[0]) == 13  # 12 epochs and one row before the first step


def test_other_options_resume_exactly_and_batch_size_is_per_device(tmp_path, monkeypatch):
    recipe = {"dead_leaves": 6, "loss": "charbonnier", "fft_loss_weight": 0.1, "max_grad_norm": 1.0}
    chosen = {**TINY, **recipe, "schedule": "cosine", "init": "xavier", "max_steps": 8}
    main(Settings(output_dir=tmp_path / "whole" / "run", **chosen))
    advance = train_srn.Run.advance

    def stop(run, *arguments):
        advance(run, *arguments)
        if run.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_srn.Run, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        main(Settings(output_dir=tmp_path / "parts" / "run", **chosen))
    monkeypatch.undo()
    message = "was trained with 2 samples a step, this run has 4 on each of 1 process.*those of one device"
    with pytest.raises(ValueError, match=message):
        main(Settings(output_dir=tmp_path / "parts" / "run", **{**chosen, "batch_size": 4}))
    main(Settings(output_dir=tmp_path / "parts" / "run", **chosen))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_training_starts_from_weights(tmp_path, capsys):
    torch.manual_seed(1)
    network = SRNDeblurNet(2)
    wild = {f"module.{name}": value for name, value in network.state_dict().items()}
    checkpoint.write_weights(tmp_path / "wild.pth", wild)
    chosen = {**TINY, "dead_leaves": 4, "max_steps": 1, "learning_rate": 1e-9}
    main(settings(tmp_path, **{**chosen, "init_weights": tmp_path / "wild.pth"}))
    trained = load_network(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name, value in network.state_dict().items():
        assert torch.allclose(value, trained.state_dict()[name], atol=1e-6)
    for other, message in (
        ({"width": 4}, "wild.pth: its width is 2, this run's 4"),
        ({"residual": True}, "wild.pth: its residual is False, this run's True"),
    ):
        with pytest.raises(ValueError, match=message):
            main(settings(tmp_path / "other", **{**chosen, **other, "init_weights": tmp_path / "wild.pth"}))
    (tmp_path / "notes.txt").write_text("no weights")
    checkpoint.write_weights(tmp_path / "judge.pth", {"features.0.weight": torch.zeros(1)})
    for name, message in (
        ("notes.txt", "notes.txt is damaged or not a checkpoint"),
        ("judge.pth", "judge.pth holds no SRN-DeblurNet: its first key is features"),
        ("gone.pth", "checkpoint not found: .*gone.pth"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(settings(tmp_path / "other", **{**chosen, "init_weights": tmp_path / name}))
    (tmp_path / "wild.pth").unlink()  # not read when resuming
    main(settings(tmp_path, **{**chosen, "init_weights": tmp_path / "wild.pth"}))


def test_weights_with_module_prefix_load(network, tmp_path):
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
        ({"data": "data", "dead_leaves": 3}, "--dead_leaves and --pairs go with images blurred on the fly"),
        ({"data": "data", "pairs": "data"}, "--dead_leaves and --pairs go with images blurred on the fly"),
        ({"data": "data", "crop_size": 40}, "crop_size must be a multiple of 16, not 40"),
        ({"data": "data", "sampling": True}, "crop_size must be a multiple of 32, not 16"),
        ({"dead_leaves": 4, "pairs_fraction": 1.5}, r"pairs_fraction must be in \[0, 1\], not 1.5"),
        ({"data": "data", "crop_candidates": 0}, "crop_candidates must be at least 1, not 0"),
        ({"data": "data", "val_images": 0}, "val_images must be at least 1, not 0"),
        ({"data": "missing"}, "missing"),
        ({"sharp_dir": "empty"}, "no images"),
        ({"data": "data", "val_fraction": 0.5, "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_raise(pairs, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    paths = {k: tmp_path / v if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(settings(tmp_path, **paths))


def test_bad_pairs_raise(pairs, tmp_path):
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
        main(settings(tmp_path, data=file, val_data=pairs / "GOPR2", batch_size=1))
    with pytest.raises(ValueError, match=r"000010.png is 20x20, .*000010.png is 80x51"):
        main(settings(tmp_path, data=file, val_data=file, val_images=3))


def test_damaged_image_is_skipped_and_run_resumes_exactly(pairs, tmp_path, monkeypatch, capsys):
    """The file may be replaced by an empty one: both are replaced by another image."""
    chosen = {"data": pairs, "val_data": pairs, "epochs": 2, "num_workers": 1}
    victim = pairs / "GOPR1" / "sharp" / "000002.png"
    victim.write_bytes(victim.read_bytes()[:-200])
    main(settings(tmp_path / "whole", **chosen))
    advance = train_srn.Run.advance

    def stop(run, *arguments):
        advance(run, *arguments)
        if run.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_srn.Run, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        main(settings(tmp_path / "parts", **chosen))
    monkeypatch.undo()
    victim.unlink()
    partner = victim.parents[1] / "blur" / victim.name
    shutil.move(partner, tmp_path / "kept.png")
    with pytest.raises(
        ValueError, match="samples was 6, is 5.*an empty file in the place of one that is gone"
    ):
        main(settings(tmp_path / "parts", **chosen))
    shutil.move(tmp_path / "kept.png", partner)
    victim.touch()
    main(settings(tmp_path / "parts", **chosen))
    whole, parts = (
        checkpoint.load(tmp_path / name / "run" / "checkpoints" / "last.ckpt") for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 6
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_resuming_with_other_settings_or_data_raises(pairs, tmp_path):
    chosen = settings(tmp_path, data=pairs, val_fraction=0.5, epochs=1)
    main(chosen)
    with pytest.raises(
        ValueError, match="width was 2, is 4. To continue it: --width 2. To start anew: another"
    ):
        main(settings(tmp_path, data=pairs, val_fraction=0.5, epochs=1, width=4))
    for kind in ("blur", "sharp"):
        for sequence in ("GOPR1", "GOPR2"):
            (pairs / sequence / kind / "000010.png").unlink()
    with pytest.raises(ValueError, match="samples was 3, is 2"):
        main(chosen)


def test_training_on_realistic_blur_mixed_with_real_pairs(pairs, tmp_path):
    chosen = {"sharp_dir": pairs, "pairs": pairs, "val_data": pairs, "realistic_blur": True}
    main(settings(tmp_path, **chosen, pairs_fraction=0.5, max_steps=4))
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] == 4
