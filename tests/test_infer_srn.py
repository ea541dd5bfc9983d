import re
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import infer
from harness.jobs import list_jobs
from harness.settings import run_main
from ldm.checkpoint import write_weights
from ldm.data.image import photographs, read_image, to_tensor, write_image
from ldm.metrics import psnr
from ldm.modules.image_degradation.blur import random_blur
from train_srn import SRNDeblurNet, load_network, restore, restore_image

FORM = '{"residual": true}'
SHIPPED = Path(__file__).parent.parent / "models" / "srn_deblur.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a tiny network that changes its input slightly."""
    torch.manual_seed(0)
    network = SRNDeblurNet(2, residual=True)
    torch.nn.init.normal_(network.outblock.conv[0].weight, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "srn.safetensors"
    write_weights(path, network.state_dict(), {"settings": FORM})
    return path, network.eval()


@pytest.fixture
def photos(tmp_path):
    """Write a folder of images of odd sizes and modes, and a text file."""
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


def test_folder_is_restored_with_its_subfolders(photos, weights, capsys):
    infer.restore_files(command(photos, weights, comparison=True))
    out = photos.parent / "out"
    names = {"deblurred_a.png", "deblurred_grey.png", "trip to 北京/deblurred_deep.png"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == names
    image = read_image(photos / "a.png")
    with torch.no_grad():
        expected = restore(weights[1], to_tensor(image)[None])[0].clamp(-1, 1)
    expected = ((expected + 1) * 127.5).round().permute(1, 2, 0).numpy()  # rounded, not truncated
    restored = read_image(out / "deblurred_a.png")
    assert np.abs(restored - expected).max() <= 1 and (restored != expected).mean() < 1e-3
    assert np.abs(restored.astype(int) - image).max() > 1
    with Image.open(out / "deblurred_grey.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (41, 30))
    assert read_image(photos.parent / "out_comparison/deblurred_a.png").shape == (37, 104, 3)
    assert "3 made, 0 kept (unchanged)" in capsys.readouterr().out


def test_only_changed_results_are_computed_again(photos, weights, capsys):
    def run(**changes):
        infer.restore_files(command(photos, weights, **changes))
        return capsys.readouterr().out

    foreign = photos.parent / "out" / "deblurred_a.png"
    foreign.parent.mkdir()
    foreign.write_bytes(b"of something else")
    assert "3 made, 0 kept (unchanged)" in run()
    assert "0 made, 3 kept (unchanged)" in run()
    assert "0 made, 3 kept (unchanged)" in run(pattern="**/*", device="auto")  # same pixels
    assert "3 made, 0 kept (unchanged)" in run(comparison=True)  # comparisons were missing
    assert "0 made, 3 kept (unchanged)" in run(comparison=True)
    assert "3 made, 0 kept (unchanged)" in run(tile=32, overlap=16)  # another option
    assert "0 made, 3 kept (unchanged)" in run(tile=32, overlap=16)
    image = read_image(photos / "a.png")
    write_image(photos / "a.png", 255 - image)  # another image under the same name
    assert "1 made, 2 kept (unchanged)" in run(tile=32, overlap=16)
    other = weights[0].with_stem("other")
    write_weights(other, {k: v * 0.9 for k, v in weights[1].state_dict().items()}, {"settings": FORM})
    assert "3 made, 0 kept (unchanged)" in run(checkpoint_path=other)
    assert "3 made, 0 kept (unchanged)" in run(checkpoint_path=other, overwrite=True)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        run(checkpoint_path=other.with_stem("none"))


def test_single_image_is_always_computed_again(photos, weights, capsys):
    for _ in range(2):
        infer.restore_files(command(photos / "a.png", weights))
        assert "1 made, 0 kept (unchanged), 0 left out, 0 failed" in capsys.readouterr().out
    kept = [path.name for path in (photos / "out").iterdir()]
    assert kept == ["deblurred_a.png"]  # no temporary file is left


def test_shards_contain_every_image_once(photos, weights, capsys):
    seen = []
    for shard in ("1/2", "2/2", "1/2"):
        infer.restore_files(command(photos, weights, shard=shard))
        seen.append(capsys.readouterr().out)
    assert "2 made, 0 kept (unchanged)" in seen[0] and "of all 3, 2 are there" in seen[0]
    assert "1 made, 0 kept (unchanged)" in seen[1] and "of all 3, 3 are there" in seen[1]
    assert "0 made, 2 kept (unchanged)" in seen[2]
    for shard in ("3/2", "0/2", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match=f"shard must be i/n .* not {shard}"):
            infer.restore_files(command(photos, weights, shard=shard))
    infer.restore_files(
        command(photos, weights, shard="5/9", output_dir=photos.parent / "none")
    )  # an empty shard
    assert "0 made" in capsys.readouterr().out


def test_subcommand_is_chosen_by_the_checkpoint(weights, tmp_path, model, monkeypatch, capsys):
    control = {k: v for k, v in model.state_dict().items() if k.startswith("control_model.")}
    bare = {k.removeprefix("control_model."): v for k, v in control.items()}
    lora = {"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(1, 1)}
    named = {
        "module.inblock.conv.0.weight": ("srn", {}),
        "deblur.head.weight": ("dbgan", {}),
        "blur.head.weight": ("bgan", {}),
    }
    files = {tmp_path / f"{kind}.pth": ({key: torch.zeros(1)}, kind) for key, (kind, _) in named.items()}
    files |= {tmp_path / "a.safetensors": (control, "deblur"), tmp_path / "b.pth": (bare, "deblur")}
    files |= {tmp_path / "control_v11p_sd15_inpaint.pth": (bare, "inpaint")}
    files |= {tmp_path / "lora.safetensors": (lora, "kontext")}
    authors = {"module.intro.weight": torch.zeros(2, 3, 3, 3), "module.encoders.3.0.beta": torch.zeros(1)}
    files |= {tmp_path / "NAFNet-GoPro.pth": (authors, "dbgan")}
    for path, (content, kind) in files.items():
        write_weights(path, content)
        assert infer.system_of(path) == kind, path
    assert infer.system_of(weights[0]) == "srn"
    with pytest.raises(ValueError, match="is a folder without pytorch_lora_weights.safetensors: give a file"):
        infer.system_of(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert infer.system_of(tmp_path) == "kontext"
    words = ["--input", "a.png", f"--checkpoint-path={weights[0]}"]
    assert infer.with_subcommand(words) == ["srn", *words[:2], "--checkpoint-path", str(weights[0])]
    words = ["--checkpoint_path", str(tmp_path / "lora.safetensors")]
    assert infer.with_subcommand(words) == ["kontext", "--lora_path", words[1]]
    words = ["--checkpoint_path", str(tmp_path)]  # a run's folder, then a model folder
    assert infer.with_subcommand(words) == ["kontext", "--lora_path", words[1]]
    (tmp_path / "flux1-kontext-dev.safetensors").touch()
    assert infer.with_subcommand(words) == ["kontext", "--pretrained_model_name_or_path", words[1]]
    assert infer.with_subcommand(["--input_mask", "m.png"])[0] == "inpaint"
    assert infer.with_subcommand(["srn", "--input", "a"]) == ["srn", "--input", "a"]
    write_weights(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": torch.zeros(1)})
    assert infer.system_of(tmp_path / "vae.safetensors") == "network"  # which reports an unknown network
    assert infer.with_subcommand(["--input", "a.png"]) == [infer.BEST, "--input", "a.png"]
    with pytest.raises(ValueError, match="give --input, or one of deblur, .* first"):
        infer.with_subcommand(["--output_dir", "a"])
    write_image(tmp_path / "photo.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(sys, "argv", ["infer.py", "--checkpoint_path", str(weights[0]), "--input_image"])
    sys.argv += [str(tmp_path / "photo.png"), "--output_dir", str(tmp_path / "out")]
    run_main(infer.restore_files, infer.COMMANDS, complete=infer.with_subcommand)
    assert "1 made" in capsys.readouterr().out


def test_jobs_of_single_image_pattern_and_earlier_results(photos, weights):
    jobs, _ = list_jobs(command(photos / "a.png", weights, output_dir=photos, output_prefix="new_"))
    assert jobs == [(photos / "a.png", photos / "new_a.png")]
    jobs, left_out = list_jobs(command(photos, weights, pattern="*/deep*"))
    assert [source.name for source, _ in jobs] == ["deep.png"]
    assert set(left_out.values()) == {"not of the pattern */deep*"} and len(left_out) == 2
    within = command(photos, weights, output_dir=photos / "out")
    (photos / "out").mkdir()
    write_image(photos / "out" / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))
    (photos / "out_comparison").mkdir()
    write_image(photos / "out_comparison" / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))
    assert len(list_jobs(within)[0]) == 3  # earlier results are not inputs
    infer.restore_files(command(photos / "a.png", weights, output_dir=photos))
    beside = command(photos, weights, output_dir=photos, pattern="*.png")
    jobs, left_out = list_jobs(beside)
    assert jobs == [(photos / "a.png", photos / "deblurred_a.png")]
    assert left_out[photos / "deblurred_a.png"] == "result of an earlier run"
    write_image(photos / "deblurred_a.png", np.zeros((4, 4, 3), np.uint8))  # a photo of that name
    with pytest.raises(ValueError, match="the result of .*a.png would overwrite .*deblurred_a.png"):
        list_jobs(beside)
    with pytest.raises(ValueError, match="the result of .*a.png would overwrite .*deblurred_a.png"):
        list_jobs(command(photos / "a.png", weights, output_dir=photos))


def test_unreadable_image_does_not_stop_the_others(photos, weights, monkeypatch, capsys):
    (photos / "broken.jpg").write_text("a text file")
    (photos / "gone.jpg").symlink_to("nowhere")
    arguments = ["--input", photos, "--output_dir", photos / "out", "--checkpoint_path", weights[0]]
    monkeypatch.setattr(sys, "argv", ["infer.py", "srn", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_main(infer.restore_files, infer.COMMANDS)
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "3 made" in captured.out
    assert captured.err.splitlines()[-1] == "error: 2 of 5 images failed: they are listed above"
    failures = [line for line in captured.out.splitlines() if line.startswith("  failed: ")]
    assert len(failures) == 2 and "broken.jpg" in failures[0] and "gone.jpg" in failures[1]


def test_out_of_memory_image_does_not_stop_the_others(photos, weights, monkeypatch, capsys):
    def short_of_memory(network, image, *options, **more):
        if image.shape == (37, 50, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return image

    monkeypatch.setattr("train_srn.restore_image", short_of_memory)
    with pytest.raises(ValueError, match="1 of 3 images failed"):
        infer.restore_files(command(photos, weights))
    printed = capsys.readouterr().out
    assert "2 made" in printed
    assert re.search("failed: .*a.png: 50 x 37 pixels need more memory than .*: give a --tile", printed)


def test_cpu_out_of_memory_gives_the_same_error(photos, weights, monkeypatch):
    """NumPy raises MemoryError, torch a plain RuntimeError."""
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr("train_srn.restore_image", Mock(side_effect=error))
        with pytest.raises(ValueError, match="a.png: 50 x 37 pixels need more memory"):
            infer.restore_files(command(photos / "a.png", weights))


def test_long_name_or_deleted_image_does_not_stop_the_others(photos, weights, capsys):
    """Two of five fail: an output name is too long, an input is deleted during the run."""
    write_image(photos / f"{'m' * 241}.png", np.zeros((8, 8, 3), np.uint8))  # 255 with the prefix
    write_image(photos / f"{'n' * 245}.png", np.zeros((8, 8, 3), np.uint8))
    options = command(photos, weights)
    restorer = options.restorer

    def deletes_a_picture():
        restore = restorer()
        (photos / "grey.jpg").unlink()
        return restore

    options.restorer = deletes_a_picture
    with pytest.raises(ValueError, match="2 of 5 images failed"):
        infer.restore_files(options)
    printed = capsys.readouterr().out
    assert "3 made, 0 kept (unchanged), 0 left out, 2 failed" in printed
    assert re.search(r"failed: .*grey.jpg", printed) and "File name too long" in printed
    assert (photos.parent / "out" / f"deblurred_{'m' * 241}.png").is_file()


def test_non_finite_results_are_not_written(photos, weights, tmp_path, capsys):
    broken = {name: value.clone() for name, value in weights[1].state_dict().items()}
    next(iter(broken.values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="nan.safetensors is not written: its weight .* is not finite"):
        write_weights(tmp_path / "nan.safetensors", broken, {"settings": FORM})
    save_file(broken, tmp_path / "nan.safetensors", {"settings": FORM})
    for _ in range(2):  # the second run keeps nothing as unchanged
        with pytest.raises(ValueError, match="3 of 3 images failed"):
            infer.restore_files(command(photos, [tmp_path / "nan.safetensors"]))
        printed = capsys.readouterr().out
        assert "0 made, 0 kept (unchanged), 0 left out, 3 failed" in printed
        assert (
            "is not finite (NaN or infinity): it overflows in 16 bits (use precision 32 or bf16)" in printed
        )
        assert not list(photos.parent.glob("out/**/*.*"))


def test_hidden_colours_do_not_affect_visible_pixels(tmp_path):
    """SRN's receptive field is large: black pixels under the transparency would cost the gain in PSNR."""
    sharp = read_image(photographs(("coffee.png",))[0])[40:232, 100:292]
    blurry = random_blur(sharp, np.random.default_rng(0), ["gaussian_blur"], scale=0.5)[0]
    visible = np.hypot(*(np.mgrid[:192, :192] - 96)) < 68
    cut_out = np.dstack([blurry * visible[..., None], 255 * visible.astype(np.uint8)])
    Image.fromarray(cut_out).save(tmp_path / "a.png")
    infer.restore_files(infer.SRN(input=tmp_path / "a.png", output_dir=tmp_path / "out", device="cpu"))
    with Image.open(tmp_path / "out" / "deblurred_a.png") as picture:
        restored = np.array(picture)
    assert np.array_equal(restored[..., 3], cut_out[..., 3])
    errors = [
        np.square(image[visible].astype(float) - sharp[visible]).mean()
        for image in (blurry, restored[..., :3])
    ]
    assert 10 * np.log10(errors[0] / errors[1]) > 2


def test_same_input_and_output_folder_is_restored_once(photos, weights, capsys):
    (photos / "a.png").unlink()  # a result without a prefix would be written over it
    (photos / "trip to 北京" / "deep.png").unlink()
    for summary in ("1 made, 0 kept", "0 made, 1 kept"):
        infer.restore_files(command(photos, weights, output_dir=photos, output_prefix=""))
        assert summary in capsys.readouterr().out
    infer.restore_files(command(photos, weights, output_dir=photos, output_prefix="", self_ensemble=True))
    printed = capsys.readouterr().out
    assert "1 made, 0 kept (unchanged), 1 left out, 0 failed" in printed
    assert "left out 1, result of an earlier run: grey.png" in printed


@pytest.mark.parametrize(("platform", "differ"), [("linux", True), ("darwin", False), ("win32", False)])
def test_names_differing_only_in_case_raise_off_linux(photos, weights, monkeypatch, platform, differ):
    write_image(photos / "A.png", np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr("sys.platform", platform)
    if differ:
        assert len(list_jobs(command(photos, weights))[0]) == 4
    else:
        with pytest.raises(ValueError, match="would both become"):
            list_jobs(command(photos, weights))


def test_tiled_result_is_close_to_whole_image_result(weights):
    """Away from the borders the PSNR differs by less than 0.1 dB."""
    sharp = read_image(photographs(("rocket.jpg",))[0])[100:228, 200:392]
    blurry = (sharp.astype(np.float32) * 0.9 + 10).astype(np.uint8)
    whole = restore_image(weights[1], blurry)
    tiled = restore_image(weights[1], blurry, tile=96, overlap=48)
    inside = slice(16, -16), slice(16, -16)
    assert abs(psnr(tiled[inside], sharp[inside]) - psnr(whole[inside], sharp[inside])) < 0.1
    assert psnr(tiled, whole) > 40


def test_self_ensemble_commutes_with_rotation(weights):
    blurry = read_image(photographs(("coffee.png",))[0])[:48, :64]
    restored = restore_image(weights[1], blurry, self_ensemble=True)
    turned = restore_image(weights[1], np.rot90(blurry), self_ensemble=True)
    assert np.abs(np.rot90(restored).astype(int) - turned).max() <= 1
    plain = restore_image(weights[1], np.rot90(blurry)).astype(int)
    assert np.abs(np.rot90(restore_image(weights[1], blurry)) - plain).max() > 1  # without it: not equal


def test_bad_input_raises(photos, weights, tmp_path):
    with pytest.raises(ValueError, match="cannot read image .*notes.txt"):
        infer.restore_files(command(photos / "notes.txt", weights))
    with pytest.raises(FileNotFoundError, match=r"input none does not exist \(the current folder is /"):
        list_jobs(command(Path("none"), weights, output_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match="checkpoint not found: .*none.ckpt; train_srn.py makes one"):
        infer.restore_files(command(photos, weights, checkpoint_path=tmp_path / "none.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"nothing to restore in .*: left out 3, .* pattern \*.gif"):
        list_jobs(command(photos, weights, pattern="*.gif"))
    with pytest.raises(ValueError, match="pattern must be relative to the input folder, not /a"):
        list_jobs(command(photos, weights, pattern="/a*.png"))
    with pytest.raises(ValueError, match="the result of .*a.png would overwrite .*a.png: choose another"):
        list_jobs(command(photos, weights, output_dir=photos, output_prefix=""))
    write_image(photos / "a.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="a.jpg and .*a.png would both become .*deblurred_a.png: rename"):
        list_jobs(command(photos, weights))
    with pytest.raises(ValueError, match=r"quality must be in \[1, 100\], not 0"):
        infer.restore_files(command(photos / "a.png", weights, quality=0))
    with pytest.raises(ValueError, match="tile 64 and overlap 128"):
        infer.restore_files(command(photos / "a.png", weights, tile=64))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match=f"'{folder}'"):
            infer.restore_files(command(photos / "a.png", weights, output_dir=folder))
    other = tmp_path / "other.safetensors"
    write_weights(other, {"unet.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no SRN-DeblurNet: its first key is unet.weight"):
        infer.restore_files(command(photos / "a.png", weights, checkpoint_path=other))


@pytest.mark.parametrize("size", [(3, 3), (1, 5000)])
def test_included_network_takes_any_size(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    restored = restore_image(load_network(SHIPPED), image, tile=1536, overlap=128)
    assert restored.shape == image.shape and restored.dtype == np.uint8


def test_damaged_weights_raise_with_file_name(photos, tmp_path):
    whole = SHIPPED.read_bytes()
    for content in (whole[:100_000], b"a text file"):
        (tmp_path / "torn.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="torn.safetensors is damaged or not a safetensors file"):
            infer.restore_files(command(photos / "a.png", [tmp_path / "torn.safetensors"]))


def test_unusual_images_keep_size_bit_depth_and_transparency(weights, tmp_path, capsys):
    """The images are tiny, narrow, grey, transparent or of 16 bits."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    pictures = {
        "tiny": rng.integers(0, 256, (3, 3, 3), dtype=np.uint8),
        "narrow": rng.integers(0, 256, (1, 500, 3), dtype=np.uint8),
        "grey": rng.integers(0, 256, (20, 30), dtype=np.uint8),
        "alpha": rng.integers(0, 256, (20, 30, 4), dtype=np.uint8),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    deep = rng.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "in" / "deep.tif"), deep)
    infer.restore_files(command(tmp_path / "in", weights, output_prefix=""))
    assert "5 made, 0 kept (unchanged)" in capsys.readouterr().out
    for name, pixels in pictures.items():
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.size == pixels.shape[1::-1]
            if name == "alpha":
                assert np.array_equal(np.array(picture)[..., 3], pixels[..., 3])
    restored = cv2.imread(str(tmp_path / "out" / "deep.png"), cv2.IMREAD_UNCHANGED)
    assert restored.dtype == np.uint16 and (restored % 257 > 0).mean() > 0.9
    assert (
        np.abs(restored.astype(float) / 257 - read_image(tmp_path / "out" / "deep.png")[..., ::-1]).max() < 1
    )
    (tmp_path / "in" / "tiny.jpg").write_bytes((tmp_path / "in" / "tiny.png").read_bytes())
    with pytest.raises(ValueError, match=r"tiny.jpg and .*tiny.png would both become .*tiny.jpg: rename"):
        infer.restore_files(command(tmp_path / "in", weights, output_prefix="", format="jpg"))
