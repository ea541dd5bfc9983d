"""Choice of device and precision, start messages, and optimizer states that change memory format."""

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import infer
from harness.jobs import restore_files
from harness.run import Run, start_fabric
from ldm import checkpoint
from ldm.data.image import write_image
from ldm.device import choose_device, cpu_computes_in_bf16, describe_start, why_no_cuda
from ldm.modules.swap import BlockSwap
from ldm.tiling import restore_photo
from ldm.util import compute_dtype, make_adamw, settle_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Return a function that simulates a GPU: card(capability, architectures, bf16)."""

    def pretend(capability=(9, 0), built=("sm_75", "sm_80", "sm_90", "sm_120"), bf16=True):
        about = type("About", (), {"name": "Card", "total_memory": 24 * 10**9})
        for name, value in {
            "is_available": True,
            "get_device_capability": capability,
            "get_arch_list": list(built),
            "get_device_name": "Card",
            "get_device_properties": about,
            "is_bf16_supported": bf16,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *a, found=value, **k: found)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return pretend


@pytest.fixture
def no_card(monkeypatch):
    """Return a function that simulates torch's failure to find a GPU: no_card(reason)."""

    def pretend(reason="Found no NVIDIA driver on your system. Please check ...", built="13.0"):
        def fail():
            raise RuntimeError(reason)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", fail)
        monkeypatch.setattr(torch.version, "cuda", built)

    return pretend


# ---- the device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "says"),
    [
        ((7, 5), ["sm_75", "sm_90"], ""),
        ((8, 9), ["sm_75", "sm_80"], ""),  # kernels of an older minor version run
        ((12, 1), ["sm_90", "compute_90"], ""),  # PTX, compiled at load time
        ((7, 0), ["sm_75", "sm_90"], r"Card \(sm_70\) has no kernels .*--torch-backend=cu126"),
        ((6, 1), ["sm_60", "sm_75"], ""),
        ((8, 0), ["sm_75", "sm_86"], "a newer torch may have them"),
        ((11, 0), ["sm_90", "sm_100", "sm_120"], "a newer torch may have them"),
    ],
)
def test_gpu_without_kernels_is_not_used(card, capability, built, says):
    card(capability, built)
    if not says:
        assert why_no_cuda() == "" and choose_device().type == "cuda"
        return
    assert choose_device().type == "cpu"
    with pytest.raises(ValueError, match=f"no CUDA device to use: .*{says}"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("reason", "built", "says"),
    [
        (
            "Found no NVIDIA driver on your system. Please",
            "13.0",
            "Found no NVIDIA driver.*driver 580 or newer",
        ),
        (
            "The NVIDIA driver is too old (found version 12040). Please",
            "12.6",
            "too old.*driver 525 or newer",
        ),
        ("", None, "built without it.*--torch-backend=auto"),
    ],
)
def test_missing_cuda_is_explained_on_one_line(no_card, monkeypatch, reason, built, says):
    no_card(reason, built)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ValueError, match=says) as error:
        choose_device("cuda")
    assert "\n" not in str(error.value)
    assert choose_device() == choose_device("cpu") == CPU


def test_cuda_visible_devices_is_named_if_it_hides_gpus(no_card, monkeypatch):
    no_card("No CUDA GPUs are available")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES=-1" in why_no_cuda()


def test_mps_is_never_used(no_card, monkeypatch):
    no_card()
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == start_fabric().device == CPU
    assert "MPS" in describe_start(CPU, "32")


def test_start_line_describes_device_and_precision(card, no_card, capsys):
    no_card()
    line = describe_start(CPU, "32-true")
    assert line.startswith("computing on the CPU (") and "precision 32, " in line
    assert f"thread, torch {torch.__version__}; not on CUDA: Found no NVIDIA driver" in line.replace(
        "threads", "thread"
    )
    assert "not on CUDA" not in describe_start(CPU, "32", wanted="cpu")
    start_fabric(precision="bf16")
    assert "precision bf16, " in capsys.readouterr().out
    card()
    assert describe_start(CUDA, "bf16-mixed").startswith("computing on Card (24 GB), precision bf16, ")
    card((7, 5), bf16=False)
    assert "precision bf16 (emulated: " in describe_start(CUDA, "bf16")


def test_infer_prints_start_line_first(tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    command = infer.SRN(input=tmp_path / "a.png", output_dir=tmp_path / "out", device="cpu", precision="32")
    monkeypatch.setattr(infer.SRN, "restorer", lambda self: lambda image, path, progress: image)
    restore_files(command)
    assert capsys.readouterr().out.startswith("computing on the CPU (")


# ---- precisions --------------------------------------------------------------------------------------------


def test_auto_precision_follows_the_device(card, monkeypatch):
    for bf16, found, of_controlnet in ((True, torch.bfloat16, "bf16"), (False, None, "16")):
        card(bf16=bf16)
        assert compute_dtype("auto", CUDA) is found  # SRN's activations come close to overflow in float16
        assert infer.Deblur(input=Path("a.png")).settled_precision() == of_controlnet
    for known, found in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: {"avx512_bf16": known})
        monkeypatch.setattr("ldm.util.cpu_computes_in_bf16", cpu_computes_in_bf16)
        assert compute_dtype("auto", CPU) is found


@pytest.mark.parametrize("precision", ["16", "16-mixed"])
def test_float16_on_cpu_raises(precision, tmp_path):
    with pytest.raises(ValueError, match=f"precision {precision} needs a CUDA device.*give bf16 or 32"):
        settle_precision(precision, CPU)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        start_fabric(precision=precision)
    write_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        restore_files(infer.SRN(input=tmp_path / "a.png", output_dir=tmp_path, device="cpu", precision="16"))


@pytest.mark.parametrize(("kind", "precision"), [(np.uint8, "32"), (np.uint16, "auto"), (np.uint16, "bf16")])
def test_float32_does_not_use_tf32(monkeypatch, kind, precision):
    """`auto` processes 16-bit images in float32 even where 8-bit images use bf16."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr("ldm.util.cpu_computes_in_bf16", lambda: True)
    monkeypatch.setattr(cudnn, "benchmark", True)

    def look(x):
        seen.append((cudnn.allow_tf32, torch.get_float32_matmul_precision(), cudnn.benchmark))
        return x

    before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        restore_photo(np.zeros((8, 8, 3), kind), look, CPU, precision)
        assert seen == [(precision == "bf16", "high" if precision == "bf16" else "highest", False)]
        assert (cudnn.allow_tf32, torch.get_float32_matmul_precision(), cudnn.benchmark) == (
            True,
            "high",
            True,
        )
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_too_many_blocks_to_swap_raise():
    with pytest.raises(ValueError, match=r"blocks_to_swap must lie in 0 ... 2 \(all blocks\), not 3"):
        BlockSwap([nn.Linear(1, 1), nn.Linear(1, 1)], 3)


# ---- optimizer states --------------------------------------------------------------------------------------

LAST, FIRST = torch.channels_last, torch.contiguous_format


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        network(torch.arange(108.0).sin().view(1, 3, 6, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("before", "after"), [(FIRST, LAST), (LAST, FIRST)])
@pytest.mark.parametrize("through", ["make_adamw", "Run"])
def test_fused_optimizer_resumes_in_another_memory_format(tmp_path, through, before, after):
    """It reads weights and moments in memory order, which may differ in the checkpoint."""

    def begin(layout):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        if through == "make_adamw":
            return network, make_adamw(network.parameters(), "adamw", 1e-2, 0.0, fused=True)
        return network, torch.optim.Adam(network.parameters(), 1e-2, fused=True)

    whole, optimizer = begin(before)
    steps(whole, optimizer, 3)
    weights, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 3)

    resumed, optimizer = begin(after)
    if through == "Run":
        fabric, parts = start_fabric(), {"state_dict": resumed, "optimizer": optimizer}
        run = Run(fabric, tmp_path, {}, parts)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        run.step = 3
        run.save()
        Run(fabric, tmp_path, {}, parts)
    else:
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    assert optimizer.state[resumed.weight]["exp_avg"].stride() == resumed.weight.stride()
    steps(resumed, optimizer, 3)
    assert torch.allclose(resumed.weight, whole.weight, atol=1e-6)


# ---- files that a run replaces -----------------------------------------------------------------------------

MAPS = Path("/proc/self/maps")


def mapped(folder: Path) -> list[str]:
    """List a folder's files that this process has memory-mapped, including deleted ones."""
    gc.collect()
    return [line for line in MAPS.read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says what is mapped")
def test_resumed_run_keeps_no_checkpoint_memory_mapped(tmp_path):
    """Windows cannot replace a mapped file, and Linux does not free its disk space."""
    network = nn.Linear(2000, 2000)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2000)).sum().backward()
    optimizer.step()
    fabric, parts = start_fabric(), {"state_dict": network, "optimizer": optimizer}
    Run(fabric, tmp_path, {}, parts).save()
    content = checkpoint.load(tmp_path / "checkpoints" / "last.ckpt")
    assert mapped(tmp_path)
    del content
    Run(fabric, tmp_path, {}, parts)
    assert not mapped(tmp_path)
