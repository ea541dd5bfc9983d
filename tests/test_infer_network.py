"""infer.py network: third-party checkpoints through spandrel, on tiny networks with random weights."""

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from ldm.modules.generators import check_precision, load_foreign, restore_foreign
from ldm.modules.nafnet import NAFNet
from tests.fill import fill

spandrel = pytest.importorskip("spandrel")
from spandrel.architectures.Compact import Compact  # noqa: E402


def make_nafnet() -> dict[str, torch.Tensor]:
    """Create NAFNet weights with two middle blocks, a form that train_dbgan.py does not have."""
    return fill(NAFNet(8, (1, 1, 1, 1), 2, (1, 1, 1, 1))).state_dict()


def make_compact(channels: int = 3) -> dict[str, torch.Tensor]:
    """Create weights of Real-ESRGAN's compact 2x network: four convolutions, radius 4 pixels."""
    torch.manual_seed(0)
    network = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=2)
    return network.state_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write files as published: NAFNet in `params`, Real-ESRGAN in `params_ema` besides other `params`."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint.save(folder / "nafnet.pth", {"params": make_nafnet()})
    compact = make_compact()
    others = {name: torch.zeros_like(value) for name, value in compact.items()}
    checkpoint.save(folder / "x2.pth", {"params": others, "params_ema": compact})
    return folder


def command(source, weights, **changes):
    places = {"input": source, "output_dir": source.parent / "out", "checkpoint_path": weights}
    return infer.Network(**{**places, "device": "cpu", **changes})


def photograph(height: int, width: int) -> np.ndarray:
    return read_image(photographs(("coffee.png",))[0])[100 : 100 + height, 60 : 60 + width]


def own_output(path, image: np.ndarray) -> np.ndarray:
    """Restore a uint8 or uint16 image (h, w, 3) with spandrel alone; return floats in [0, 1]."""
    network = spandrel.ModelLoader().load_from_file(path)
    top = np.iinfo(image.dtype).max
    restored = network(torch.from_numpy(image.astype(np.float32) / top).permute(2, 0, 1)[None])
    return restored[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("name", "scale"), [("nafnet.pth", 1), ("x2.pth", 2)])
def test_16_bit_results_equal_spandrel(files, tmp_path, name, scale):
    image = photograph(37, 50).astype(np.uint16) * 257 + np.arange(50, dtype=np.uint16)[:, None]
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    infer.restore_files(command(tmp_path / "a.png", files / name))
    restored = cv2.imread(str(tmp_path / "out" / "restored_a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert restored.dtype == np.uint16 and restored.shape == (37 * scale, 50 * scale, 3)
    assert np.abs(restored / 65535 - own_output(files / name, image)).max() <= 1e-5
    assert restored.std() > 1000


def test_tiles_equal_whole_image_outside_blended_overlaps(files):
    network, image = load_foreign(files / "x2.pth"), photograph(70, 70)
    whole = restore_foreign(network, image)
    tiled = restore_foreign(network, image, tile=48, overlap=16)  # tiles at 0 and 22 overlap in 22 to 48
    alone = np.r_[0:36, 2 * 52 : 140]  # outside the blended region and the receptive radius
    assert np.array_equal(tiled[np.ix_(alone, alone)], whole[np.ix_(alone, alone)])
    assert np.abs(tiled.astype(int) - whole).max() <= 4
    plain = restore_foreign(network, np.full((70, 70, 3), 100, np.uint8), tile=48, overlap=16)
    assert (
        np.ptp(plain[16:-16, 16:-16], axis=(0, 1)).max() <= 1 + np.ptp(plain[20:30, 20:30], axis=(0, 1)).max()
    )


def test_upscaling_keeps_transparency_and_is_repeated_only_on_change(files, tmp_path, capsys):
    """The comparison image is upscaled too; nothing is computed again until a file changes."""
    folder = tmp_path / "in"
    folder.mkdir()
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, :15] = 255
    Image.fromarray(np.dstack([photograph(20, 30), alpha])).save(folder / "cut.png")
    write_image(folder / "one.png", photograph(1, 9))
    infer.restore_files(command(folder, files / "x2.pth", comparison=True))
    assert "x2.pth: RealESRGAN Compact, scale 2" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "restored_cut.png") as result:
        values = np.array(result)
    assert values.shape == (40, 60, 4)
    assert (values[:, :29, 3] == 255).all() and (values[:, 31:, 3] == 0).all()
    with Image.open(tmp_path / "out_comparison" / "restored_cut.png") as result:
        assert result.size == (60 + 4 + 60, 40)
        shown = np.array(result)[:, :28].astype(int)
    assert np.abs(shown[::2, ::2] - photograph(20, 30)[:, :14]).mean() < 8
    assert read_image(tmp_path / "out" / "restored_one.png").shape == (2, 18, 3)
    infer.restore_files(command(folder, files / "x2.pth", comparison=True))
    assert "0 made, 2 kept (unchanged)" in capsys.readouterr().out
    infer.restore_files(command(folder, files / "nafnet.pth", comparison=True))
    assert "2 made, 0 kept (unchanged)" in capsys.readouterr().out


def test_subcommand_is_chosen_by_the_checkpoint(files):
    for name in ("nafnet.pth", "x2.pth"):
        words = ["--checkpoint_path", str(files / name), "--input", "a.png"]
        assert infer.with_subcommand(words) == ["network", *words]


def test_unsupported_networks_raise(files, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", photograph(8, 8))

    def message(path, content):
        torch.save(content, tmp_path / path)
        with pytest.raises(ValueError, match=path) as error:
            infer.restore_files(command(tmp_path / "a.png", tmp_path / path))
        return str(error.value)

    unknown = message("unknown.pth", {"decoder.conv_in.weight": torch.zeros(1)})
    assert "holds no network that spandrel 0" in unknown and "its first key is decoder.conv_in" in unknown
    lame = {name: value for name, value in make_nafnet().items() if name != "ending.bias"}
    assert "ending.bias" in message("lame.pth", lame)
    assert "1 input and 1 output channels, not 3" in message("grey.pth", make_compact(channels=1))
    assert "holds code, not only weights" in message("code.pth", {"params": NAFNet(8, [1], 1, [1])})
    loader = spandrel.ModelLoader
    for purpose, words in (("Inpainting", "fills holes and needs"), ("FaceSR", "restores cut-out faces")):
        found = SimpleNamespace(purpose=purpose, architecture=SimpleNamespace(name="LaMa"))
        monkeypatch.setattr(loader, "load_from_state_dict", lambda self, weights, found=found: found)
        assert f"holds LaMa, which {words}" in message("other.pth", make_nafnet())
    with pytest.raises(FileNotFoundError, match="checkpoint not found: .*none.pth; beside it are"):
        infer.restore_files(command(tmp_path / "a.png", files / "none.pth"))


def test_missing_spandrel_raises_with_install_command(files, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", photograph(8, 8))
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ValueError, match="nafnet.pth, .*, needs a package: pip install spandrel$"):
        infer.restore_files(command(tmp_path / "a.png", files / "nafnet.pth"))


def test_extra_architectures_are_registered_if_installed(files, monkeypatch):
    seen = []
    extra = SimpleNamespace(__spec__=object(), install=lambda **options: seen.append(options))
    monkeypatch.setitem(sys.modules, "spandrel_extra_arches", extra)
    load_foreign(files / "nafnet.pth")
    assert seen == [{"ignore_duplicates": True}]


def test_unsupported_precision_raises_and_auto_falls_back(monkeypatch):
    name = SimpleNamespace(name="AuraSR")
    network = SimpleNamespace(
        device=torch.device("cpu"), architecture=name, supports_half=False, supports_bfloat16=False
    )
    monkeypatch.setattr("ldm.util.cpu_computes_in_bf16", lambda: True)
    assert [check_precision(network, precision) for precision in ("auto", "32")] == ["32", "32"]
    with pytest.raises(ValueError, match="AuraSR does not support precision bf16: use 32"):
        check_precision(network, "bf16")
    network.supports_bfloat16 = True
    assert [check_precision(network, precision) for precision in ("auto", "bf16")] == ["auto", "bf16"]
