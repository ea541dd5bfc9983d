import sys

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from ldm.checkpoint import write_weights
from ldm.data.image import photographs, read_image, to_tensor, write_image
from ldm.metrics import psnr
from ldm.settings import run_main
from train_srn import SRNDeblurNet, restore, restore_image

FORM = '{"residual": true}'


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny network that changes its input a little."""
    torch.manual_seed(0)
    network = SRNDeblurNet(2, residual=True)
    torch.nn.init.normal_(network.outblock.conv[0].weight, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "srn.safetensors"
    write_weights(path, network.state_dict(), {"settings": FORM})
    return path, network.eval()


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of odd sizes and modes, a text file among them."""
    folder = tmp_path / "photos"
    (folder / "trip to 北京").mkdir(parents=True)
    coffee = read_image(photographs(("coffee.png",))[0])
    write_image(folder / "a.png", coffee[:37, :50])
    Image.fromarray(coffee[:30, :41, 0]).save(folder / "grey.jpg")
    Image.fromarray(coffee[:33, :20, 1].astype(np.uint16) * 257).save(folder / "trip to 北京" / "deep.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def command(photos, weights, **changes):
    places = {"input": photos, "output_dir": photos.parent / "out", "checkpoint_path": weights[0]}
    return infer.SRN(**{**places, "device": "cpu", **changes})


def test_a_folder_is_restored_with_its_tree(photos, weights, capsys):
    infer.restore_files(command(photos, weights, comparison=True))
    out = photos.parent / "out"
    names = {"deblurred_a.png", "deblurred_grey.png", "trip to 北京/deblurred_deep.png"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == names
    image = read_image(photos / "a.png")
    with torch.no_grad():
        expected = restore(weights[1], to_tensor(image)[None])[0].clamp(-1, 1)
    expected = ((expected + 1) * 127.5).round().permute(1, 2, 0).numpy()  # rounded, not cut off
    restored = read_image(out / "deblurred_a.png")
    assert np.abs(restored - expected).max() <= 1 and (restored != expected).mean() < 1e-3
    assert np.abs(restored.astype(int) - image).max() > 1
    with Image.open(out / "deblurred_grey.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (41, 30))
    assert read_image(photos.parent / "out_comparison/deblurred_a.png").shape == (37, 104, 3)
    assert "3 restored, 0 existed" in capsys.readouterr().out


def test_what_exists_is_not_made_again(photos, weights, capsys):
    kept = photos.parent / "out" / "deblurred_a.png"
    kept.parent.mkdir()
    kept.write_bytes(b"mine")
    infer.restore_files(command(photos, weights))
    assert kept.read_bytes() == b"mine" and "2 restored, 1 existed" in capsys.readouterr().out
    infer.restore_files(command(photos, weights, overwrite=True))
    assert read_image(kept).shape == (37, 50, 3)


def test_one_picture_and_a_pattern(photos, weights):
    jobs = infer.list_jobs(command(photos / "a.png", weights, output_dir=photos, output_prefix="new_"))
    assert jobs == [(photos / "a.png", photos / "new_a.png")]
    jobs = infer.list_jobs(command(photos, weights, pattern="*/deep*"))
    assert [source.name for source, _ in jobs] == ["deep.png"]
    within = command(photos, weights, output_dir=photos / "out")
    (photos / "out").mkdir()
    write_image(photos / "out" / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))
    (photos / "out_comparison").mkdir()
    write_image(photos / "out_comparison" / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))
    assert len(infer.list_jobs(within)) == 3  # earlier results are no input
    write_image(photos / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))
    beside = command(photos, weights, output_dir=photos, pattern="*.png")
    assert infer.list_jobs(beside) == [(photos / "a.png", photos / "deblurred_a.png")]


def test_a_broken_picture_stops_no_other(photos, weights, monkeypatch, capsys):
    (photos / "broken.jpg").write_text("a text file")
    (photos / "gone.jpg").symlink_to("nowhere")
    arguments = ["--input", photos, "--output_dir", photos / "out", "--checkpoint_path", weights[0]]
    monkeypatch.setattr(sys, "argv", ["infer.py", "srn", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_main(infer.restore_files, infer.COMMANDS)
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "3 restored" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: 2 of 5 could not be restored: ")
    assert "broken.jpg" in last and "gone.jpg" in last


def test_a_picture_too_large_for_the_memory_stops_no_other(photos, weights, monkeypatch, capsys):
    def short_of_memory(network, image, *options, **more):
        if image.shape == (37, 50, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return image

    monkeypatch.setattr("train_srn.restore_image", short_of_memory)
    with pytest.raises(ValueError, match="1 of 3 .*a.png: 50 x 37 pixels need more memory .* --tile"):
        infer.restore_files(command(photos, weights))
    assert "2 restored" in capsys.readouterr().out


def test_tiles_agree_with_the_whole_picture(weights):
    """With a network of small reach: away from the borders the PSNR differs by less than 0.1 dB."""
    sharp = read_image(photographs(("rocket.jpg",))[0])[100:228, 200:392]
    blurry = (sharp.astype(np.float32) * 0.9 + 10).astype(np.uint8)
    whole = restore_image(weights[1], blurry)
    tiled = restore_image(weights[1], blurry, tile=96, overlap=48)
    inside = slice(16, -16), slice(16, -16)
    assert abs(psnr(tiled[inside], sharp[inside]) - psnr(whole[inside], sharp[inside])) < 0.1
    assert psnr(tiled, whole) > 40


def test_self_ensemble_commutes_with_turning(weights):
    blurry = read_image(photographs(("coffee.png",))[0])[:48, :64]
    restored = restore_image(weights[1], blurry, self_ensemble=True)
    turned = restore_image(weights[1], np.rot90(blurry), self_ensemble=True)
    assert np.abs(np.rot90(restored).astype(int) - turned).max() <= 1
    plain = restore_image(weights[1], np.rot90(blurry)).astype(int)
    assert np.abs(np.rot90(restore_image(weights[1], blurry)) - plain).max() > 1  # a network alone does not


def test_bad_input(photos, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no picture and no folder: .*notes.txt"):
        infer.list_jobs(command(photos / "notes.txt", weights))
    with pytest.raises(FileNotFoundError, match="checkpoint not found: .*none.ckpt; train_srn.py makes one"):
        infer.restore_files(command(photos, weights, checkpoint_path=tmp_path / "none.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"no picture in .* matches \*.gif"):
        infer.list_jobs(command(photos, weights, pattern="*.gif"))
    with pytest.raises(ValueError, match="--pattern is relative to --input, not /a"):
        infer.list_jobs(command(photos, weights, pattern="/a*.png"))
    with pytest.raises(ValueError, match="the result of .*a.png would overwrite .*a.png: give another"):
        infer.list_jobs(command(photos, weights, output_dir=photos, output_prefix=""))
    write_image(photos / "a.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="a.jpg and .*a.png would both become .*deblurred_a.png: rename"):
        infer.list_jobs(command(photos, weights))
    with pytest.raises(ValueError, match="tile 64 and overlap 128"):
        infer.restore_files(command(photos / "a.png", weights, tile=64))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir .*file/out: .*file is no folder that can be written"):
        infer.restore_files(command(photos / "a.png", weights, output_dir=tmp_path / "file" / "out"))
    other = tmp_path / "other.safetensors"
    write_weights(other, {"unet.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no SRN-DeblurNet: its first key is unet.weight"):
        infer.restore_files(command(photos / "a.png", weights, checkpoint_path=other))
