"""Devices, precision and strategy: start a Fabric from the settings.

`lightning-fabric` is imported only in this module and in `wrapping`, and only when a run starts.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from pecobook.data.stream import default_workers
from pecobook.engine.join import join, lists_for_children, told_of_lost_processes, watch_children
from pecobook.engine.signals import from_the_start, stop_requested
from pecobook.engine.world import World, check_flags, is_leader, launched
from pecobook.engine.wrapping import strategy
from pecobook.errors import ConfigError
from pecobook.settings.training import TrainConfig
from pecobook.utils.devices import apple_computes_bf16, cores, cpu_prefers_bf16, device
from pecobook.utils.distributed import gather_objects, long_on_first_rank, on_all_ranks, sharing
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.parent import child_environment
from pecobook.utils.printer import show

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Checked(Protocol):
    """The result of a preflight."""

    @property
    def config(self) -> Any:
        """The settings, with the resolved precision."""


R = TypeVar("R", bound=Checked)

_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def device_count(config: TrainConfig) -> int:
    """Return the number of processes per machine.

    Raises:
        ConfigError: the machine has fewer GPUs, or the flags contradict what torchrun or srun has started.
    """
    world = launched()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world is not None:
        check_flags(world, config.devices, config.num_nodes)
        if gpus and gpus < world.local_size and not (world.launcher == "srun" and gpus == 1):  # --gpus-per-task=1
            raise ConfigError(
                f"{world.launcher} has started {world.local_size} processes on a machine with "
                f"{gpus} GPU{'s' if gpus > 1 else ''}: start one for each GPU."
            )
        return world.local_size
    if config.devices == "auto":
        return gpus or 1
    devices = int(config.devices)
    if gpus and devices > gpus:
        raise ConfigError(f"--devices {devices}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}.")
    if not gpus and devices > 8 * (os.cpu_count() or 1):
        raise ConfigError(f"--devices {devices}: this machine has {os.cpu_count()} cores; give at most one for each.")
    return devices


def total_devices(config: TrainConfig) -> int:
    """Return the number of devices of the run on all machines; each has one process."""
    devices, world = device_count(config), launched()
    if world is not None:
        return world.size
    if config.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"--num-nodes {config.num_nodes}: start the processes on all machines with torchrun or srun.")
    return devices * config.num_nodes


def num_workers(config: TrainConfig) -> int:
    """Return the number of data-loading processes of this process; `--workers -1` divides the cores among processes."""
    if config.workers >= 0:
        return config.workers
    world, processes = launched(), device_count(config)
    if world is not None and world.launcher == "srun":
        allocated = int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))
        if len(cores()) * world.local_size <= allocated:  # each task is bound to its own cores
            processes = 1
    return default_workers(processes)


def resolve_precision(config: TrainConfig) -> str:
    """Return fp32, bf16 or fp16, with auto resolved. Raises ConfigError for an unavailable precision."""
    kind, precision = _kind(config), str(config.precision)
    if precision == "auto":
        faster = {"cuda": torch.cuda.is_bf16_supported, "mps": apple_computes_bf16}.get(kind, cpu_prefers_bf16)
        precision = "bf16" if faster(**{"including_emulation": False} if kind == "cuda" else {}) else "fp32"
    if precision == "fp16" and kind != "cuda":
        raise ConfigError("--precision fp16 needs a GPU of NVIDIA: use bf16 or fp32 here.")
    if precision == "bf16" and kind == "mps" and not apple_computes_bf16():
        raise ConfigError("--precision bf16 needs macOS 14 or newer on Apple's GPUs: use fp32 here.")
    return precision


def _kind(config: TrainConfig) -> str:
    """Return the kind of device of a run: cuda, mps or cpu."""
    alone = launched() is None and config.devices in ("auto", "1") and config.num_nodes == 1
    return device(1 if alone else 2).type


def check_low_precision(config: TrainConfig) -> None:
    """Raise ConfigError if part of a training should be in bf16 but its (resolved) precision is another one."""
    if getattr(config, "residual", "fp32") == "bf16" and config.precision != "bf16":
        raise ConfigError(f"--residual bf16: the precision is {config.precision} here: give --precision bf16 too.")
    if config.communication == "bf16" and config.strategy == "fsdp" and config.precision != "bf16":
        raise ConfigError(
            "--communication bf16 gives each device weights in bf16 under --strategy fsdp, and the precision is "
            f"{config.precision}: give --precision bf16 too."
        )


def micro_batch_size(config: TrainConfig) -> int:
    """Return the number of images a device holds at once. Raises ConfigError if devices would get unequal shares."""
    num_devices = total_devices(config)
    if config.batch_size % num_devices:
        raise ConfigError(f"--batch-size {config.batch_size} cannot be shared evenly by {num_devices} devices.")
    share = config.batch_size // num_devices
    max_size = min(config.micro_batch_size or share, share)
    # The largest divisor of the share that fits: every accumulation step then holds equally many images.
    return next(size for size in range(max_size, 0, -1) if share % size == 0)


def check_min_batch(config: TrainConfig) -> None:
    """Raise ConfigError if a device holds only one image at once: a contrastive loss compares it with others."""
    if micro_batch_size(config) < 2:
        flag = "--micro-batch-size" if config.micro_batch_size else "--batch-size"
        raise ConfigError(f"{flag}: a device must hold at least 2 images at once, to contrast them.")


class Begun(NamedTuple, Generic[R]):
    """A run whose processes have started and whose folder exists."""

    fabric: Fabric
    ready: R
    """The result of the preflight."""
    lock: FolderLock | None
    """The lock of the folder, on the first process."""


def begin(config: TrainConfig, preflight: Callable[[], R], prepare: Callable[[R], FolderLock]) -> Begun[R]:
    """Check everything, create the folder on the first process, and start or join the processes of the run.

    Processes that torchrun or srun has started meet first, so that all end if one refuses. Processes that this one has
    to start follow once everything is checked.

    Raises:
        PecobookError: on all processes, if one of them cannot start.
        SystemExit: with code 130 on all processes, if a signal has asked one of them to stop.
    """
    world = launched()
    fabric = None
    if world is not None:  # before the preflight, which resolves the precision too
        fabric = start(dataclasses.replace(config, precision=resolve_precision(config)))  # type: ignore[arg-type]
    locks: list[FolderLock] = []
    with lists_for_children(starts_others=_are_several(config)) as lists:  # until the others have joined
        with sharing(lists, is_first=is_leader()):  # rank 0 lists folders of images for all
            ready = on_all_ranks(preflight)
        try:
            if fabric is not None or is_leader():  # a process that the first one has started joins later
                _stop_if_asked()
                long_on_first_rank(lambda: locks.append(prepare(ready)))
            return Begun(fabric or start(ready.config), ready, locks[0] if locks else None)
        except BaseException:
            for lock in locks:
                lock.release()
            raise


def _stop_if_asked() -> None:
    """Exit with code 130 on all processes if a signal has asked one of them to stop."""
    if any(gather_objects(stop_requested())):
        show("Stopped before the first step.")
        raise SystemExit(130)


def _are_several(config: TrainConfig) -> bool:
    try:
        return total_devices(config) > 1
    except ConfigError:  # the preflight reports it
        return False


@contextmanager
def signals(config: TrainConfig) -> Iterator[None]:
    """Handle signals and lost processes in this context, in which a run with these settings starts and trains.

    See `engine.signals.from_the_start` and `engine.join.told_of_lost_processes`.
    """
    with from_the_start(several=_are_several(config)), told_of_lost_processes():
        yield


def start(config: TrainConfig, *, alone: bool = False) -> Fabric:
    """Start the processes of the run, or join those already started, and return their Fabric.

    Args:
        config: settings with a resolved precision (`resolve_precision`).
        alone: whether this process works without others, even if torchrun or srun has started several.
    """
    with _without_torchmetrics():
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.launchers import subprocess_script

    _filter_warnings()
    if alone:
        return _start_alone(config)
    devices = device_count(config)
    nodes = max(1, total_devices(config) // devices)
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        # srun has given each process a GPU that only it sees: each counts as a machine with one GPU.
        devices, nodes = 1, devices * nodes
    kind = _kind(config)
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy(config, total_devices(config)),
        plugins=[precision_plugin(config.precision, kind), *_cluster_environment(devices)],
    )
    world = launched()
    if world is not None and world.size > 1 and not torch.distributed.is_initialized():
        _join(fabric, world)
    elif world is None and devices * nodes > 1:  # Fabric starts the other processes
        os.environ.update(child_environment())
        subprocess_script._launch_process_observer = watch_children  # type: ignore[assignment]
    fabric.launch()
    # Fabric registers this only for NCCL. A thread of gloo that outlives Python aborts a process that has finished.
    atexit.register(_leave_process_group)
    return fabric


def _join(fabric: Fabric, world: World) -> None:
    strategy: Any = fabric.strategy
    environment = strategy.cluster_environment
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if fabric.device.type == "cuda":
        torch.cuda.set_device(fabric.device)
    join(world, fabric.device)


@contextmanager
def _without_torchmetrics() -> Iterator[None]:
    """Hide torchmetrics in this context, in which Lightning is imported.

    Lightning imports it to read its version, for a feature that is not used here; together with transformers and
    scipy.signal, which torchmetrics imports, that takes two seconds of CPU time.
    """
    if "torchmetrics" in sys.modules:
        yield
        return
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torchmetrics"]


def _start_alone(config: TrainConfig) -> Fabric:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    world, gpus = launched(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Fabric(
        accelerator=device().type,
        devices=[world.local_rank % gpus if world else 0] if gpus else 1,
        plugins=[precision_plugin(config.precision, device().type), LightningEnvironment()],
    )


def _cluster_environment(devices: int) -> list[Any]:
    """Return Fabric's plugin for processes under Slurm, or an empty list if Fabric detects them by itself."""
    world = launched()
    if world is not None and world.launcher == "srun":
        return [_srun_environment(world, own_gpus=devices != world.local_size)]
    if world is None and "SLURM_JOB_ID" in os.environ:
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment

        return [LightningEnvironment()]  # Fabric would take a batch script for one task of many
    return []


def _srun_environment(world: World, *, own_gpus: bool) -> Any:
    """Return Fabric's plugin for srun tasks; a task that sees only its own GPU counts as a machine."""
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    class Srun(ClusterEnvironment):
        creates_processes_externally = True
        main_address = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(
            os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        )
        main_port = int(os.environ.get("MASTER_PORT") or _port_of_step())

        @staticmethod
        def detect() -> bool:
            return True

        def world_size(self) -> int:
            return world.size

        def set_world_size(self, size: int) -> None:
            pass  # srun has decided

        def global_rank(self) -> int:
            return world.rank

        def set_global_rank(self, rank: int) -> None:
            pass

        def local_rank(self) -> int:
            return 0 if own_gpus else world.local_rank

        def node_rank(self) -> int:
            return world.rank if own_gpus else int(os.environ.get("SLURM_NODEID", "0"))

    return Srun()


def _port_of_step() -> int:
    """Return a port that all tasks of a step compute, and that other steps and jobs on the machine rarely share."""
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10_000 + (31 * job + step) % 20_000


def _leave_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def deterministic(device: torch.device, enabled: bool, *, one_size: bool = False) -> Iterator[None]:
    """Use deterministic GPU kernels within the context. PyTorch warns about operations without such a kernel.

    If this is off and all images have `one_size`, cuDNN benchmarks its kernels for each convolution at the first step
    and uses the fastest, which may be another one after a resume.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tried = torch.backends.cudnn.benchmark
    if enabled and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first matrix product
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = tried or (one_size and not enabled and device.type == "cuda")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tried
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _filter_warnings() -> None:
    """Hide library warnings that a user can do nothing about."""
    # PyTorch 2.15 renames an argument, and Lightning still passes the old name, which older versions of PyTorch need.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")
    # Gradients of 1 x 1 convolutions have another memory layout than DDP's buckets, which costs only a copy.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # PyTorch before 2.14 warns that a rule is overridden, which `engine.attention` does on purpose.
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    # Losses, averages and distances are computed in fp32 under autocast on purpose.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    # A single process on a machine with Slurm is what the user asked for.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    for name in ("lightning_fabric", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


def precision_plugin(name: str, kind: str) -> Any:
    """Return Fabric's precision plugin for a kind of device, modified so that the numbers in a batch are not rounded.

    Fabric converts every float in a batch to half precision. Images arrive as integers and networks convert them, so
    the conversion would only round values that must stay exact: the random draws that define a view, and box corners.
    """
    from lightning_fabric.plugins.precision import MixedPrecision, Precision

    class Autocast(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    if name == "fp32":
        return Precision()
    return Autocast(_PRECISIONS[name], kind)  # type: ignore[arg-type]
