"""Training on two processes: resumed runs, and weights that are split over the processes (FSDP)."""

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cldm.deblur import add_hint_latent
from cldm.model import open_control_model, read_config
from cldm.sharding import ShardedStrategy, check_sharding, split_like, whole
from ldm import checkpoint
from ldm.data.image import read_image
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import make_adamw
from tests.test_deblur import CONFIG, last, make_place, rows, same, small_settings
from tutorial_train_deblur import Settings, main


def run_rank(rank: int, port: int, runs: list[Settings]) -> None:
    """What torchrun or Slurm would start: one of the processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ.update(where)
    for settings in runs:
        main(settings)


def run_on_two(work: Callable, *arguments: object) -> None:
    """`work(rank, port, *arguments)` in each of two processes, which must both end well and in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=work, args=(rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Settings]:
    """Three steps: by one process, by two with copies or parts of the model, and by two after a stop."""
    folder = tmp_path_factory.mktemp("processes")
    one = replace(small_settings(make_place(folder), folder), batch_size=4, max_steps=3)
    one = replace(one, accumulate_grad_batches=1)
    one = replace(one, hint_as_latent=True, max_grad_norm=0.5)
    split = replace(one, batch_size=2, devices=2, strategy="fsdp", output_dir=str(folder / "fsdp"))
    copies = replace(split, strategy="ddp", val_fraction=0.0, val_steps=9, output_dir=str(folder / "ddp"))
    runs = {"fsdp": split, "ddp": copies}
    again = {f"{name}_resumed": replace(s, output_dir=s.output_dir + "_resumed") for name, s in runs.items()}
    stopped = [replace(settings, max_steps=1) for settings in again.values()]
    main(one)
    run_on_two(run_rank, [*runs.values(), *stopped, *again.values()])
    return {"one": one, **runs, **again}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_on_two_processes_equals_the_uninterrupted_one(done, kind):
    whole, resumed = last(done[kind]), last(done[f"{kind}_resumed"])
    assert whole["global_step"] == resumed["global_step"] == 3
    for part in ("state_dict", "optimizer_states", "ema", "callbacks"):
        assert same(whole[part], resumed[part]), part
    assert rows(done[kind]) == rows(done[f"{kind}_resumed"])


def test_a_split_run_leaves_what_one_process_leaves(done):
    one, two = last(done["one"]), last(done["fsdp"])
    start = add_hint_latent(read_config(CONFIG), checkpoint.read_weights(done["one"].resume_path))[1]
    assert one.keys() == two.keys()
    for ours, theirs in (
        (one["state_dict"], two["state_dict"]),
        (one["ema"]["average"], two["ema"]["average"]),
    ):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():  # Adam turns rounding of near-zero gradients into whole steps
            assert (value - theirs[name]).norm() < 0.02 * (value - start[name]).norm(), name
    mine, theirs = one["optimizer_states"][0], two["optimizer_states"][0]
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    for n, values in mine["state"].items():
        error = (values["exp_avg"] - theirs["state"][n]["exp_avg"]).norm()
        assert error < 1e-3 * values["exp_avg"].norm()
    for name in ("val/psnr", "val/loss"):
        scores = [float(row[name]) for row in rows(done["fsdp"]) if row[name]]
        expected = [float(row[name]) for row in rows(done["one"]) if row[name]]
        assert scores == pytest.approx(expected, rel=1e-2) and len(scores) == 1


def test_a_split_run_leaves_pictures_and_a_model_that_opens(done):
    folder = tuple(done["fsdp"].output_dir + f"/images/{name}_0000002.png" for name in ("train", "val"))
    assert all(read_image(path).std() > 10 for path in folder)
    model = open_control_model(done["fsdp"].output_dir + "/checkpoints/last.ckpt")
    average = last(done["fsdp"])["ema"]["average"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in average.items())


def test_one_process_continues_what_two_began(done, tmp_path):
    settings = replace(done["fsdp"], devices=1, strategy="auto", max_steps=4)
    before = last(settings)["state_dict"]
    main(settings)
    after = last(settings)["state_dict"]
    assert last(settings)["global_step"] == 4
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.fixture
def mesh():
    """One process alone, for which weights are split like for many."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("split_first", [True, False])
def test_optimizer_states_pass_between_split_and_whole_weights(mesh, split_first):
    """Split weights lie contiguously and whole ones in channels_last; fused kernels mind the difference."""

    def begin(split: bool, weights: dict) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        network.load_state_dict(weights)
        if split:
            fully_shard(network.to(memory_format=torch.contiguous_format), mesh=mesh)
        return network, make_adamw(network.parameters(), "adamw", 1e-2, 0.0, fused=True)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.arange(108.0).sin().view(1, 3, 6, 6)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    first, optimizer = begin(split_first, nn.Conv2d(3, 4, 3).state_dict())
    step(first, optimizer)
    weights, moments = copy.deepcopy((whole(first.state_dict()), whole(optimizer.state_dict())))
    step(first, optimizer)
    second, optimizer = begin(not split_first, weights)
    kind = DDPStrategy if split_first else ShardedStrategy
    strategy = kind(parallel_devices=[torch.device("cpu")])
    strategy.optimizers = [optimizer]
    strategy.load_optimizer_state_dict({"optimizer_states": [moments]})
    step(second, optimizer)
    assert torch.allclose(whole(second.weight), whole(first.weight), atol=1e-6)


def test_plain_tensors_are_whole_already():
    value = {"a": [torch.ones(2), 3], "b": (1, 2)}
    assert same(whole(value), value)
    assert split_like(torch.ones(2), value["a"][0]) is value["a"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 1}, "needs 2 or more, not 1"),
        ({"precision": "16"}, "precision bf16 or 32, not in 16"),
        ({"optimizer": "adamw8bit"}, "the optimizer adamw, not with adamw8bit"),
    ],
)
def test_what_split_weights_cannot_do_is_refused(change, message):
    given = {"devices": 2, "precision": "32", "optimizer": "adamw", **change}
    with pytest.raises(ValueError, match=message):
        check_sharding(*given.values())


def run_with_nan_in_rank_1(rank: int, port: int, settings: Settings, answers: Path) -> None:
    if rank == 1:
        step = LatentDiffusion.training_step
        LatentDiffusion.training_step = lambda *arguments: step(*arguments) * float("nan")
    try:
        run_rank(rank, port, [settings])
    except ValueError as error:
        (answers / f"{rank}.txt").write_text(str(error))


def test_a_loss_that_is_not_finite_in_one_process_stops_them_all(tmp_path):
    settings = replace(
        small_settings(make_place(tmp_path), tmp_path), devices=2, max_steps=3, val_fraction=0.0
    )
    run_on_two(run_with_nan_in_rank_1, settings, tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert "training stopped" in first and "its batch: that of another process" in first
    assert "loss = nan at step" in second and ".png" in second
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
