"""Devices, precision and strategy: from settings to a running Fabric.

`lightning-fabric` is imported here, when a run starts, and nowhere else at import time.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
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
    """Whether this process is the first of its run, known from the launcher's variables before anything starts."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def device_count(config: TrainConfig) -> int:
    """Processes of this run on each machine. Raises ConfigError when the machine cannot give that many."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has already decided
        return int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.devices == "auto":
        return gpus or 1
    wanted = int(config.devices)
    if gpus and wanted > gpus:
        raise ConfigError(f"--devices {wanted}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}.")
    return wanted


def world_size(config: TrainConfig) -> int:
    """Processes of the whole run."""
    if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return device_count(config) * config.num_nodes


def resolve_precision(config: TrainConfig) -> str:
    """fp32, bf16 or fp16, with auto resolved. Raises ConfigError for fp16 without a GPU."""
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
    """Images a device holds at once. Raises ConfigError when the global batch cannot be shared out evenly."""
    world = world_size(config)
    if config.batch_size % world:
        raise ConfigError(f"--batch-size {config.batch_size} cannot be shared evenly by {world} devices.")
    share = config.batch_size // world
    if config.micro_batch_size < 0:
        raise ConfigError(f"--micro-batch-size must be 0 (the share whole) or above, not {config.micro_batch_size}.")
    largest = config.micro_batch_size or share
    # The largest divisor of the share that fits: every accumulation step then holds equally many images.
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)


def check_min_batch(config: TrainConfig) -> None:
    """Raise ConfigError where a device holds one image at once, which a contrastive loss has nothing to tell from."""
    if micro_batch_size(config) < 2:
        flag = "--micro-batch-size" if config.micro_batch_size else "--batch-size"
        raise ConfigError(f"{flag}: a device must hold at least 2 images at once, to tell them apart.")


def start(config: TrainConfig) -> Fabric:
    """Start the processes and return their Fabric.

    Args:
        config: settings whose precision is resolved (`resolve_precision`).
    """
    from lightning_fabric import Fabric

    _filter_warnings()
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=device_count(config),
        num_nodes=max(1, world_size(config) // device_count(config)),
        strategy=_strategy(config),
        plugins=[_precision(config.precision)],
    )
    fabric.launch()
    return fabric


@contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """To train within: kernels of a GPU that give the same bits each time. PyTorch warns of those that have none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _filter_warnings() -> None:
    """Keep from the screen what libraries say that no user can act on."""
    # PyTorch 2.15 renames an argument that Lightning's oldest PyTorch must still be given by its old name.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated")
    # Gradients of 1 x 1 convolutions come in another memory order than DDP's buckets: a copy, and no error.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Before PyTorch 2.14: `engine.attention` is meant to take the place of a rule.
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    # What is fp32 under autocast is meant to be: losses, averages, distances.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)


def _precision(name: str) -> Any:
    """Fabric's precision, but for one thing: a batch keeps its numbers.

    Fabric turns every float of a batch into half precision. Images come as integers and networks choose for themselves,
    so that would only round what must not be: the draws that name a view, and the corners of boxes.
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

        return ModelParallelStrategy(_shard, data_parallel_size=world_size(config), tensor_parallel_size=1)
    if world_size(config) == 1:
        return "auto"
    from lightning_fabric.strategies.ddp import DDPStrategy

    # Buffers are kept equal by the stages that own them; DDP's broadcast would overwrite statistics of other ranks.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: every trainable transformer block of timm is a unit, the rest another."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for child in module.modules():
        if type(child).__name__ == "Block" and any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)  # in place
    return module
