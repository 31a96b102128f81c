"""The processes that torchrun or srun has started, from the variables that Slurm 22.05 sets in each situation."""

from __future__ import annotations

import os

import pytest
import torch

from pecobook.engine import launch
from pecobook.engine.world import World, environment_without_launcher, is_leader, launched, printing_rank
from pecobook.errors import ConfigError
from pecobook.settings.training import TrainConfig

# Task 3 of `srun --nodes 2 --ntasks-per-node 2` in a job of 2 nodes.
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "n[0-1]",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GTIDS": "2,3",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_launched__by_srun_or_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    assert is_leader()
    set_variables(monkeypatch, STEP)
    world = launched()
    assert world == World("srun", rank=3, size=4, local_rank=1, local_size=2)
    assert world.num_nodes == 2
    assert not is_leader()
    config = TrainConfig()
    assert (launch.device_count(config), launch.total_devices(config)) == (2, 4)
    with pytest.raises(ConfigError, match=r"--devices 4: srun has started 2 processes on each machine\. Leave --devic"):
        launch.device_count(TrainConfig(devices="4"))
    # srun starts one torchrun on each machine, which starts the processes.
    set_variables(monkeypatch, {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"})
    assert launched() == World("torchrun", rank=5, size=16, local_rank=5, local_size=8)


@pytest.mark.parametrize(
    "variables",
    [
        # a batch script of a job of 2 tasks
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"},
        # a shell of salloc
        {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "2"},
        # one task
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"},
        # a batch script that was submitted within a step of 2 tasks, whose variables it inherits
        {
            **STEP,
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_GTIDS": "0",
        },
    ],
    ids=["batch", "salloc", "one task", "batch from a step"],
)
def test_launched__a_single_process_under_slurm(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {"SLURM_JOB_ID": "41", **variables})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launched() is None
    assert is_leader()
    assert launch.total_devices(TrainConfig()) == 1
    (environment,) = launch._cluster_environment(1)
    assert not environment.creates_processes_externally


def test_environment_without_launcher__is_that_of_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` and `reproduce` train each run as a process of its own."""
    set_variables(monkeypatch, {**STEP, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    environment = environment_without_launcher()
    assert environment["SLURM_JOB_ID"] == "41"
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    assert launched() is None
    assert is_leader()


def test_launched__refuses_unequal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {**STEP, "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"})
    with pytest.raises(ConfigError, match=r"srun started 2, 2, 1 tasks on the nodes: .* --ntasks-per-node"):
        launched()


def test_cluster_environment__meets_at_the_first_node_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {**STEP, "SLURM_STEP_NODELIST": "gpu[03,05-07]"})
    (environment,) = launch._cluster_environment(2)
    assert environment.main_address == "gpu03"  # not of the job
    assert environment.main_port == 10_000 + 31 * 41 + 2
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (3, 1, 1)
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert launch._cluster_environment(2)[0].main_port == 12345
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    monkeypatch.delenv("MASTER_PORT")
    assert launch._cluster_environment(2)[0].main_port == 10_000 + 31 * 41 + 3


def test_cluster_environment__a_process_with_a_gpu_of_its_own_is_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1` hides the other GPUs of the machine from each task."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    set_variables(monkeypatch, STEP)
    assert launch.total_devices(TrainConfig()) == 4
    (environment,) = launch._cluster_environment(1)
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (3, 0, 3)


@pytest.mark.parametrize(("seen", "allocated", "workers"), [(12, 24, 11), (24, 24, 11), (24, 0, 11), (2, 4, 1)])
def test_num_workers__of_tasks_that_are_bound_to_cores_or_share_them(
    monkeypatch: pytest.MonkeyPatch, seen: int, allocated: int, workers: int
) -> None:
    set_variables(monkeypatch, {**STEP, "SLURM_CPUS_ON_NODE": str(allocated)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in ("pecobook.engine.launch", "pecobook.data.stream"):
        monkeypatch.setattr(f"{module}.cores", lambda: tuple(range(seen)))
    assert launch.num_workers(TrainConfig()) == (workers if workers > 1 else 0)
    assert launch.num_workers(TrainConfig(workers=3)) == 3


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"^The environment variable WORLD_SIZE is 'two', not a number from 1: unset it\.$"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
    ],
)
def test_launched__refuses_an_environment_that_cannot_be(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for name, value in {**whole, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launched()
    assert printing_rank() in (0, 1, 2)
