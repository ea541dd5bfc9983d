"""Export SRN or DBGAN to ONNX, for images of any size.

    python -m extras.export_onnx models/srn_deblur.safetensors srn.onnx

One input `blurry`, one output `restored`, both float32 (1, 3, h, w) in [0, 1], RGB. The file is written only
if onnxruntime and PyTorch agree on images of three sizes. Needs three packages:
`pip install onnx onnxscript onnxruntime`.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from harness.settings import check_new, run_main
from ldm.checkpoint import read_weights
from train_dbgan import load_generator
from train_srn import SRNDeblurNet, load_network, pyramid

SIZES = (70, 90), (33, 101), (64, 128)  # (h, w) of the images compared
TOLERANCE = 1e-4  # of values in [0, 1]


@dataclass
class Settings:
    # file of train_srn.py, or of train_dbgan.py's deblurring generator
    checkpoint_path: Annotated[Path, tyro.conf.Positional]
    # .onnx file to write
    output_path: Annotated[Path, tyro.conf.Positional]
    overwrite: bool = False  # replace the output file if it exists


class AnySize(nn.Module):
    """Wrapper that restores (1, 3, h, w) in [0, 1], h and w at least 16, to the same size, clamped.

    The edge is repeated until the network's `multiple` divides both sides, as in ldm.tiling.pad_to_multiple.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, blurry: Tensor) -> Tensor:
        h, w = blurry.shape[-2:]
        padded = blurry.index_select(2, self.padded(h)).index_select(3, self.padded(w))
        if isinstance(self.network, SRNDeblurNet):
            restored = (self.network(*pyramid(2 * padded - 1))[0] + 1) / 2
        else:
            restored = self.network(padded)
        return restored[:, :, :h, :w].clamp(0, 1)

    def padded(self, length: int) -> Tensor:
        """Return the indices along one side, the last one repeated as padding."""
        multiple = self.network.multiple
        return torch.arange((length + multiple - 1) // multiple * multiple).clamp(max=length - 1)


def open_network(path: Path) -> nn.Module:
    """Load SRN's network or DBGAN's deblurring generator. Raises ValueError for any other file."""
    weights = read_weights(path)
    if any(name.startswith(("control_model.", "zero_convs.")) for name in weights):
        raise ValueError(f"{path} is a ControlNet, which has no ONNX export: use tool_export_control.py")
    if any(name.removeprefix("module.").startswith("inblock.") for name in weights):
        return load_network(path)
    return load_generator(path, "deblur")


@torch.no_grad()
def compare(path: Path, network: nn.Module) -> float:
    """Return the largest difference between onnxruntime and PyTorch on random images of SIZES."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in SIZES:
        blurry = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        (restored,) = session.run(None, {"blurry": blurry.numpy()})
        largest = max(largest, float((torch.from_numpy(restored) - network(blurry)).abs().max()))
    return largest


def main(settings: Settings) -> None:
    """Check, export, compare, report."""
    output = check_new(settings.output_path, settings.overwrite, ".onnx")
    network = AnySize(open_network(settings.checkpoint_path)).eval()
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(f"the export needs packages: pip install {' '.join(missing)}")
    sides = {n: torch.export.Dim(name, min=16, max=16384) for n, name in ((2, "height"), (3, "width"))}
    temporary = output.with_name(f".{output.name}.tmp.onnx")
    try:
        torch.onnx.export(
            network,
            (torch.rand(1, 3, *SIZES[0]),),
            str(temporary),
            input_names=["blurry"],
            output_names=["restored"],
            dynamo=True,
            dynamic_shapes={"blurry": sides},
            external_data=False,
            verbose=False,
        )
        difference = compare(temporary, network)
        if difference > TOLERANCE:
            raise ValueError(f"not written: onnxruntime differs by {difference:.1e} of 1 from PyTorch")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    size = output.stat().st_size / 1e6
    print(f"{size:.1f} MB, at most {difference:.1e} of 1 from PyTorch, written to {output}")


if __name__ == "__main__":
    run_main(main, Settings)
