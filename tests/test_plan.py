"""benchmarks/plan.py: counts on fake tensors agree with real steps on a CPU."""

from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks import plan
from benchmarks.fake_cuda import fake_tensors, to_fake
from harness.settings import read_settings
from ldm.modules.diffusionmodules.util import GroupNormSiLU
from tests.test_cuda import DBGAN, DEBLUR, SRN, build

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA: it has no fake CUDA tensors"
)


def measured_peak(work) -> int:
    """Return the peak of allocated CPU memory in bytes, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (plan.srn, replace(SRN, width=16, crop_size=128, batch_size=4)),
        (partial(plan.dbgan, stage="blur"), replace(DBGAN, width=16, crop_size=64)),
    ],
)
def test_counted_peak_memory_matches_measured_peak(make, settings):
    def two_steps() -> None:
        step, _ = make(settings, "cpu")
        step()
        step()

    with fake_tensors(like_cuda=True) as count:
        two_steps()
    real = measured_peak(two_steps)
    assert real > 2e7 and abs(count.peak - real) < 0.1 * real


def test_counted_flops_and_memory_match_formula():
    with fake_tensors(like_cuda=True) as count:
        linear, x = torch.nn.Linear(64, 32), torch.empty(128, 64)
        held = count.held
        loss = linear(x).sum()
        loss.backward()
        assert count.flops == 2 * 2 * 128 * 64 * 32  # forward, and the gradient of the weight
        assert held == 4 * (64 * 32 + 32 + 128 * 64)
        del loss, x
        assert count.held == 2 * 4 * (64 * 32 + 32)  # weights and gradients


def test_rms_norm_is_one_kernel_also_when_recomputed():
    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (128,), torch.empty(128, device=x.device), eps=1e-6)

    with fake_tensors() as on_cuda:
        x = torch.empty(64, 128, device="cuda")
        on_cuda.restart()
        norm(x)
    with fake_tensors(like_cuda=True) as count:
        x = torch.empty(64, 128, requires_grad=True)
        loss = checkpoint(norm, x, use_reentrant=False).sum()
        forward = count.kernels - 1  # the sum
        count.restart()
        loss.backward()
    assert on_cuda.kernels == forward == 1
    assert count.kernels == 3  # gradient of the sum, recomputed norm, gradient of the norm


def test_silu_after_group_norm_restores_channels_last_without_copy():
    """CUDA's GroupNorm copies channels_last input to NCHW; no second copy is needed after it."""
    norm = GroupNormSiLU(32)
    with fake_tensors(like_cuda=True) as count:
        weights = [p.data for p in to_fake(norm, "cpu").parameters()]
        x = torch.empty(2, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        count.restart()
        h = norm(x)
        assert count.kernels == 3 and h.is_contiguous(memory_format=torch.channels_last)
        count.restart()
        h.backward(torch.empty_like(h))
    # silu, norm and one copy; the norm's kernel also gives the gradients of scale and shift
    assert count.kernels == 3 and len(weights) == 2


@pytest.mark.slow
def test_step_of_every_script_is_counted_and_printed(capsys):
    words = {
        "srn": "--width 8 --crop_size 32 --batch_size 2 --card 3060",
        "dbgan": "--width 8 --blocks 1 --crop_size 32 --perceptual_loss_weight 0",
        "deblur": "--config_path models/cldm_tiny_deblur.yaml --image_size 64 --optimizer adamw8bit",
        "inpaint": "--config_path models/cldm_tiny_inpaint.yaml --image_size 64 --cache_latents",
    }
    for name, flags in words.items():
        plan.main(read_settings(plan.COMMANDS, words=[name, *flags.split()]))
    shown = capsys.readouterr().out
    assert shown.count("(counted)") == 6 and "3060: fits" in shown


def test_kontext_step_is_counted():
    settings = plan.Kontext(resolution=32, batch_size=1, accumulate_grad_batches=1)
    with fake_tensors(like_cuda=True) as count:
        build(plan.kontext, settings, "cpu").step()
    assert count.flops > 0 and count.kernels > 500


def test_swap_that_fits_finds_number_of_blocks():
    counts = [plan.swap_that_fits(26.3, False, room) for room in (24.0, 16.0, 10.0)]
    assert counts == sorted(counts) and 1 < counts[0] < counts[2] <= 57
    assert plan.swap_that_fits(14.7, True, 11.8) < plan.swap_that_fits(26.3, False, 11.8)
    assert plan.swap_that_fits(26.3, False, 1.0) is None


def test_unknown_card_raises_with_list_of_known_cards():
    with pytest.raises(
        ValueError, match="--card 2080 is not known: give one of h200, .*5090, .*4070, .*3080"
    ):
        plan.main(plan.SRN(card="2080"))


def layers(fused: bool | None, device: str) -> plan.Work:
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        network(torch.empty(1, 4)).sum().backward()
        optimizer.step()

    return plan.Work(step, {"optimizer": optimizer})


def test_optimizer_kernels_depend_on_fused_setting():
    """True: one kernel plus the step counter. None: foreach kernels on CUDA. False: one tensor at a time."""
    kernels = [plan.count_step(partial(layers, fused), "cpu").kernels for fused in (True, None, False)]
    lists, one_by_one = kernels[1] - kernels[0], kernels[2] - kernels[0]
    assert 5 < lists < 20
    assert one_by_one > 40 * 5


def test_srn_is_counted_with_fused_optimizer():
    with fake_tensors(like_cuda=True):
        assert build(plan.srn, SRN, "cpu").parts["optimizer"].param_groups[0]["fused"]


def test_benchmark_inputs_are_not_zero():
    """GPU timings need realistic inputs."""
    settings = replace(DEBLUR, deblur_loss_weight=0.0, precision="32")
    batch = plan.control_batch(settings, plan.control_model(settings, "cpu"), "cpu")
    assert all(batch[name].std() > 0.5 for name in ("jpg", "hint", "noise_0"))
    assert batch["timestep"].float().std() > 100
