"""Devices, precision and strategy: start a Fabric from the settings.

`lightning-fabric` is imported in this module alone, and only when a run starts.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pecobook.errors import ConfigError
from pecobook.settings.training import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def is_leader() -> bool:
    """Return whether this process is the first of its run, by the environment variables of the launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def say(lines: Iterable[str]) -> None:
    """Write lines to the screen, once for all processes of a run."""
    if is_leader():
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def device_count(config: TrainConfig) -> int:
    """Return the number of processes on each machine. Raises ConfigError when the machine has fewer GPUs."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has already decided
        return int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.devices == "auto":
        return gpus or 1
    devices = int(config.devices)
    if gpus and devices > gpus:
        raise ConfigError(f"--devices {devices}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}.")
    return devices


def total_devices(config: TrainConfig) -> int:
    """Return the number of devices of the run on all machines; each has a process."""
    if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return device_count(config) * config.num_nodes


def resolve_precision(config: TrainConfig) -> str:
    """Return fp32, bf16 or fp16, with auto resolved. Raises ConfigError for fp16 without a GPU."""
    cuda = torch.cuda.is_available()
    if config.precision == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
        )
        return "bf16" if native else "fp32"
    if config.precision == "fp16" and not cuda:
        raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 here.")
    return config.precision


def micro_batch_size(config: TrainConfig) -> int:
    """Return the number of images a device holds at once. Raises ConfigError when devices would get unequal shares."""
    num_devices = total_devices(config)
    if config.batch_size % num_devices:
        raise ConfigError(f"--batch-size {config.batch_size} cannot be shared evenly by {num_devices} devices.")
    share = config.batch_size // num_devices
    max_size = min(config.micro_batch_size or share, share)
    # The largest divisor of the share that fits: every accumulation step then holds equally many images.
    return next(size for size in range(max_size, 0, -1) if share % size == 0)


def check_min_batch(config: TrainConfig) -> None:
    """Raise ConfigError where a device holds one image at once: a contrastive loss compares an image with others."""
    if micro_batch_size(config) < 2:
        flag = "--micro-batch-size" if config.micro_batch_size else "--batch-size"
        raise ConfigError(f"{flag}: a device must hold at least 2 images at once, to contrast them.")


def start(config: TrainConfig) -> Fabric:
    """Start the processes of the run and return their Fabric.

    Args:
        config: settings whose precision is resolved (`resolve_precision`).
    """
    from lightning_fabric import Fabric

    _filter_warnings()
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=device_count(config),
        num_nodes=max(1, total_devices(config) // device_count(config)),
        strategy=_strategy(config),
        plugins=[precision_plugin(config.precision)],
    )
    fabric.launch()
    # Fabric registers this for NCCL alone. A thread of gloo that outlives Python aborts a process that has finished.
    atexit.register(_leave_process_group)
    return fabric


def _leave_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def deterministic(device: torch.device, enabled: bool) -> Iterator[None]:
    """Use deterministic GPU kernels within the context. PyTorch warns of operations that have no such kernel."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if enabled and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first matrix product
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _filter_warnings() -> None:
    """Hide warnings of libraries that a user can do nothing about."""
    # PyTorch 2.15 renames an argument, and Lightning still passes the old name, which older versions of PyTorch need.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")
    # Gradients of 1 x 1 convolutions come in another memory order than DDP's buckets: this costs a copy, no error.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # PyTorch before 2.14 warns that a rule is overridden, which `engine.attention` does on purpose.
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    # Losses, averages and distances are computed in fp32 under autocast on purpose.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)


def precision_plugin(name: str) -> Any:
    """Return Fabric's precision plugin, changed so that the numbers of a batch are not rounded.

    Fabric converts every float of a batch to half precision. Images come as integers and networks convert them, so the
    conversion would only round values that must stay exact: the draws that define a view, and the corners of boxes.
    """
    from lightning_fabric.plugins.precision import MixedPrecision, Precision

    class Autocast(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    if name == "fp32":
        return Precision()
    return Autocast(_PRECISIONS[name], "cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]


def _strategy(config: TrainConfig) -> Any:
    if config.strategy == "fsdp":
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        return ModelParallelStrategy(_shard, data_parallel_size=total_devices(config), tensor_parallel_size=1)
    if total_devices(config) == 1:
        return "auto"
    from lightning_fabric.strategies.ddp import DDPStrategy

    # Stages keep their buffers equal on all ranks; DDP's broadcast would overwrite statistics of other ranks.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module by FSDP2: every trainable transformer block of timm is one unit, all other modules another."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for child in module.modules():
        if type(child).__name__ == "Block" and any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)  # in place
    return module
