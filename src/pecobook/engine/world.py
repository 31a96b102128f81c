"""The processes of a run as started by torchrun or srun, read from the environment.

The module does not import torch, so that the command line knows its rank before any large import.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NamedTuple

from pecobook.errors import ConfigError


class World(NamedTuple):
    """The processes that a launcher has started for one run, and this process's place among them."""

    launcher: str
    """torchrun or srun."""
    rank: int
    size: int
    local_rank: int
    """Rank among the processes on this machine."""
    local_size: int
    """Number of processes on this machine."""

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return max(1, self.size // self.local_size)


def launched() -> World | None:
    """Return the processes that torchrun or srun has started together, or None if this process is on its own.

    torchrun comes first, since srun may start one torchrun per machine. A batch script, `salloc` and an interactive
    shell are single processes although Slurm sets some of its variables there.

    Raises:
        ConfigError: srun has started unequal numbers of tasks on the nodes.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "LOCAL_WORLD_SIZE" in env:
        rank, local_rank, _ = _number("RANK", 0), _number("LOCAL_RANK", 0), _number("MASTER_PORT", 29500)
        size, local_size = _number("WORLD_SIZE", 1, least=1), _number("LOCAL_WORLD_SIZE", 1, least=1)
        if rank >= size or local_rank >= local_size:
            raise ConfigError(
                f"The environment says RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local_rank} of "
                f"LOCAL_WORLD_SIZE={local_size}, which cannot be: start with torchrun, or unset them."
            )
        return World("torchrun", rank, size, local_rank, local_size)
    size = _number("SLURM_STEP_NUM_TASKS", 1)
    if size == 1 or not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"} <= env.keys():
        return None
    tasks = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    node = int(env.get("SLURM_NODEID", "0"))
    if node >= len(tasks) or _is_left_from_another_step(tasks[node]):
        return None
    if len(set(tasks)) > 1:
        raise _for_all(
            f"srun started {', '.join(map(str, tasks))} tasks on the nodes: give every node equally many, with "
            "--ntasks-per-node."
        )
    return World("srun", int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), tasks[node])


def _number(name: str, default: int, *, least: int = 0) -> int:
    """Return the number in an environment variable. Raises ConfigError if it contains anything else."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise _for_all(f"The environment variable {name} is '{text}', not a number from {least}: unset it.")
    return int(text)


def _for_all(message: str) -> ConfigError:
    """Return an error that every process of the run raises."""
    error = ConfigError(message)
    error.on_all_ranks = True
    return error


def _tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeats or 1)
    return counts


def _is_left_from_another_step(tasks_here: int) -> bool:
    """Return whether a step's variables describe processes other than this one and its siblings.

    sbatch passes the variables of the step it is called in on to its script, which is a single process; and of the
    tasks of `srun --pty` only the first has a terminal.
    """
    numbers = os.environ.get("SLURM_GTIDS", "")  # the tasks on this node; always set anew
    stale = bool(numbers) and len(numbers.split(",")) != tasks_here
    return stale or ("SLURM_PTY_PORT" in os.environ and sys.stdin is not None and sys.stdin.isatty())


def environment_without_launcher() -> dict[str, str]:
    """Return the environment of a child process that is a separate run, even under torchrun or srun."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"}
    names |= {"TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"}
    return {name: value for name, value in os.environ.items() if name not in names}


def is_leader() -> bool:
    """Return whether this process is the first of its run, according to the launcher's environment variables."""
    world = launched()
    if world is not None:
        return world.rank == 0
    if "WORLD_SIZE" not in os.environ:  # a rank left over from something else
        return True
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def is_first_on_machine() -> bool:
    """Return whether this process is the first of its run on its machine, and does what one can do for all."""
    world = launched()
    return os.environ.get("LOCAL_RANK", "0") == "0" if world is None else world.local_rank == 0


def printing_rank() -> int:
    """Return the rank of the process that prints an error that all have; works even if `launched` fails."""
    try:
        stepped = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        return int(os.environ.get("RANK") or (stepped and os.environ.get("SLURM_PROCID")) or 0)
    except ValueError:
        return 0


def check_flags(world: World, devices: str, num_nodes: int) -> None:
    """Raise ConfigError if --devices or --num-nodes contradicts what the launcher has started."""
    processes = f"{world.local_size} process{'es' if world.local_size > 1 else ''} on each machine"
    machines = f"processes on {world.num_nodes} machine{'s' if world.num_nodes > 1 else ''}"
    for flag, agrees, given, started in (
        ("--devices", devices in ("auto", str(world.local_size)), devices, processes),
        ("--num-nodes", num_nodes in (1, world.num_nodes), num_nodes, machines),  # 1 is the default
    ):
        if not agrees:
            raise _for_all(f"{flag} {given}: {world.launcher} has started {started}. Leave {flag} out.")
