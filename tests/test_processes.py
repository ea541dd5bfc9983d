"""Training on two nodes, simulated by forked processes on the loopback address: equal weights, a node that
dies, different data or output folders."""

import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from harness.run import average_gradients, rank_zero_first, start_fabric
from harness.settings import is_lost_peer
from ldm import checkpoint
from tests.faults import tiny_runs
from tests.faults.tiny_runs import command, make_test_files, prepare_output, require_success, run, script

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked: no CUDA")
# Flags of the tiny runs: LONG ones are killed during training, SHORT ones take a few steps.
LONG = {
    "deblur": {"max_steps": 24, "val_steps": 100, "val_fraction": 0.0, "save_steps": 2},
    "srn": {"epochs": 24, "val_images": 1},
    "kontext": {"max_train_steps": 24, "save_every": 2},
}
SHORT = {
    "deblur": {"max_steps": 3, "val_steps": 9, "val_fraction": 0.0, "save_steps": 3},
    "srn": {"epochs": 2},
    "kontext": {"max_train_steps": 3, "save_every": 3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Create the inputs of tiny runs in a separate process, so that this one starts no threads."""
    folder = tmp_path_factory.mktemp("processes")
    require_success(run(partial(make_test_files, folder / "place"), folder / "log"))
    return folder / "place"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_machine(rank: int, port: int, work: Callable[[], None]) -> Callable[[], None]:
    """Wrap `work` to run in the environment of node `rank` of torchrun --nnodes 2 --nproc_per_node 1."""
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
    where |= {
        "GROUP_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }

    def run_there() -> None:
        os.environ.update({name: str(value) for name, value in where.items()})
        work()

    return run_there


def start_both(works: list[Callable[[], None]], log: Path) -> list[int]:
    port = free_port()
    return [
        tiny_runs.start(as_machine(rank, port, work), log.with_name(f"{log.name}{rank}"))
        for rank, work in enumerate(works)
    ]


def end_both(pids: list[int], log: Path, seconds: float = 120) -> list[tuple[int | None, str]]:
    """Wait for both processes; return their exit codes and standard error outputs."""
    results = []
    for rank, pid in enumerate(pids):
        code = tiny_runs.wait(pid, seconds)
        if code is None:
            tiny_runs.kill(pid)
        results.append((code, log.with_name(f"{log.name}{rank}.err").read_text(errors="replace")))
    return results


def two_machines(words: list[str], log: Path) -> None:
    for code, said in end_both(start_both([script(words)] * 2, log), log):
        assert code == 0, said[-2000:]


def last(folder: Path) -> dict:
    return checkpoint.load(folder / "checkpoints" / "last.ckpt", mmap=False)


def step_of(folder: Path) -> int:
    state = last(folder)
    return state.get("global_step", state.get("step"))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", SHORT)
def test_two_nodes_equal_one_process(place, tmp_path, trainer):
    """One process with twice the batch size sees the same joint batches."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        prepare_output(trainer, place, folder)
    batch = "train_batch_size" if trainer == "kontext" else "batch_size"
    require_success(
        run(script(command(trainer, place, folders[0], **SHORT[trainer], **{batch: 4})), tmp_path / "log")
    )
    two_machines(command(trainer, place, folders[1], **SHORT[trainer]), tmp_path / "log")
    one, two = (last(folder) for folder in folders)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", LONG)
def test_run_ends_with_one_error_when_a_node_dies_and_resumes(place, tmp_path, trainer):
    folder, log = tmp_path / "run", tmp_path / "log"
    prepare_output(trainer, place, folder)
    words = command(trainer, place, folder, **LONG[trainer])
    pids = start_both([script(words)] * 2, log)
    path = folder / "checkpoints" / "last.ckpt"
    while not path.is_file() and tiny_runs.wait(pids[0], 0.05) is None:
        pass
    tiny_runs.kill(pids[1])
    (code, said), *_ = end_both(pids[:1], log, 60)
    assert code == 1, said[-2000:]
    assert said.splitlines()[-1].startswith("error: another process of this run ended"), said[-2000:]

    stopped_at = step_of(folder)
    two_machines(words, log)
    assert stopped_at < step_of(folder) and step_of(folder) % 24 == 0


@pytest.mark.parametrize(("trainer", "flag", "lost"), [("inpaint", "--image_dir", 1), ("srn", "--data", 9)])
def test_different_data_on_one_node_raises(place, tmp_path, trainer, flag, lost):
    """With fewer images both report the difference; without images, the other reports the lost process."""
    words = command(trainer, place, tmp_path / "run")
    where = words.index(flag) + 1
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(words[where], elsewhere)
    for path in sorted(elsewhere.rglob("*.png"))[:lost]:
        path.unlink()
    other = [*words[:where], str(elsewhere), *words[where + 1 :]]
    ends = end_both(start_both([script(words), script(other)], tmp_path / "log"), tmp_path / "log")
    assert [code for code, _ in ends] == [1, 1]
    first, second = (said.splitlines()[-1] for _, said in ends)
    if lost == 1:
        assert "the processes do not see the same data: they found [" in first and second == first
    else:
        assert "error: another process of this run ended" in first
        assert "error: no images" in second and str(elsewhere) in second


@pytest.mark.parametrize("trainer", ["srn", "deblur"])
def test_separate_output_folders_raise(place, tmp_path, trainer):
    """Otherwise one node would resume and the other start again."""
    before, after = {"srn": ({"batch_size": 4}, {}), "deblur": ({}, {"max_steps": 6})}[trainer]
    folders = [tmp_path / "run", tmp_path / "elsewhere"]
    require_success(
        run(script(command(trainer, place, folders[0], **SHORT[trainer] | before)), tmp_path / "log")
    )
    flags = SHORT[trainer] | after
    works = [script(command(trainer, place, folder, **flags)) for folder in folders]
    for code, said in end_both(start_both(works, tmp_path / "log"), tmp_path / "log"):
        assert code == 1 and "all machines must see one output folder" in said.splitlines()[-1], said[-2000:]


def wait_for_the_dead(rank: int) -> None:
    fabric = start_fabric()
    if rank:
        os._exit(9)
    rank_zero_first(fabric, lambda: None)


def test_rank_zero_does_not_wait_for_an_ended_process(tmp_path):
    works = [partial(wait_for_the_dead, rank) for rank in range(2)]
    (code, said), (other, _) = end_both(start_both(works, tmp_path / "log"), tmp_path / "log", 30)
    assert (code, other) == (1, 9) and is_lost_peer(RuntimeError(said)), said


def average_on(rank: int, answers: Path) -> None:
    """Average gradients that differ by process and dtype, and save the results."""
    fabric = start_fabric()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (4, 3, 2, 2))]
    parameters.append(torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)))
    parameters.append(torch.nn.Parameter(torch.zeros(1)))  # without a gradient
    for number, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.full_like(parameter, number + 10.0 * rank)
    parameters[2].grad = parameters[2].grad.to(memory_format=torch.channels_last)
    parameters[2].grad[1, 2, 0, 1] = 4.0 * rank
    calls, reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **options: calls.append(1) or reduce(*args, **options)
    average_gradients(fabric, torch.optim.SGD(parameters, 0.1))
    content = {
        "calls": len(calls),
        "gradients": [p.grad for p in parameters[:-1]],
        "none": parameters[-1].grad,
    }
    torch.save(content, answers / f"{rank}.pt")


def test_gradients_are_averaged_in_one_all_reduce_per_dtype(tmp_path):
    log = tmp_path / "log"
    works = [partial(average_on, rank, tmp_path) for rank in range(2)]
    for code, said in end_both(start_both(works, log), log):
        assert code == 0, said[-2000:]
    for rank in range(2):
        content = torch.load(tmp_path / f"{rank}.pt")
        assert content["calls"] == 2 and content["none"] is None
        means = [5.0, 6.0, 7.0, 8.0]
        for number, (mean, gradient) in enumerate(zip(means, content["gradients"], strict=True)):
            expected = torch.full_like(gradient, mean)
            if number == 2:
                expected[1, 2, 0, 1] = 2.0
                assert gradient.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(gradient, expected)
