"""The ONNX export of SRN and DBGAN equals PyTorch at any size; other files raise an error."""

import numpy as np
import pytest
import torch

import extras.export_onnx as tool
from ldm import checkpoint
from train_dbgan import DBGANGenerator, load_generator
from train_srn import SRNDeblurNet, load_network, restore

FORM = {"generator": "dbgan", "width": 8, "blocks": 1}


def write(path, kind):
    torch.manual_seed(0)
    if kind == "srn":
        checkpoint.write_weights(path, SRNDeblurNet(4).state_dict())
    else:
        network = DBGANGenerator(8, 1)
        weights = {f"deblur.{name}": value for name, value in network.state_dict().items()}
        checkpoint.write_half(path, weights, FORM)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["srn", "dbgan"])
def test_onnx_output_equals_pytorch(kind, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = write(tmp_path / f"{kind}.safetensors", kind)
    tool.main(tool.Settings(path, tmp_path / "out.onnx"))
    assert "of 1 from PyTorch, written to" in capsys.readouterr().out
    session = runtime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    blurry = torch.rand(1, 3, 51, 37)
    with torch.no_grad():
        if kind == "srn":
            expected = (restore(load_network(path), 2 * blurry - 1) + 1) / 2
        else:
            expected = load_generator(path, "deblur")(blurry)
    (restored,) = session.run(None, {"blurry": blurry.numpy()})
    assert np.abs(restored - expected.clamp(0, 1).numpy()).max() < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{kind}.safetensors", "out.onnx"])
    with pytest.raises(ValueError, match="out.onnx exists already"):
        tool.main(tool.Settings(path, tmp_path / "out.onnx"))


def test_unsupported_files_raise(tmp_path, monkeypatch):
    path = write(tmp_path / "srn.safetensors", "srn")
    with pytest.raises(ValueError, match="must be a .onnx file"):
        tool.main(tool.Settings(path, tmp_path / "out.pt"))
    control = {"control_model.zero_convs.0.0.weight": torch.zeros(4, 4, 1, 1)}
    checkpoint.write_weights(tmp_path / "control.safetensors", control)
    with pytest.raises(ValueError, match="control.safetensors is a ControlNet, .*tool_export_control.py"):
        tool.main(tool.Settings(tmp_path / "control.safetensors", tmp_path / "out.onnx"))
    checkpoint.write_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="other.safetensors holds no deblurring generator"):
        tool.main(tool.Settings(tmp_path / "other.safetensors", tmp_path / "out.onnx"))
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs packages: pip install onnx onnxscript onnxruntime"):
        tool.main(tool.Settings(path, tmp_path / "out.onnx"))
    assert not (tmp_path / "out.onnx").exists()
