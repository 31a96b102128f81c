"""A stage on its devices: replicas or shards, synchronised norms, compilation, and communication precision."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pecobook.settings.training import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def strategy(config: TrainConfig, num_devices: int) -> Any:
    """Return Fabric's strategy for a total number of devices."""
    if config.strategy == "fsdp":
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        shard = partial(_shard, low=config.communication == "bf16")
        return ModelParallelStrategy(shard, data_parallel_size=num_devices, tensor_parallel_size=1)
    if num_devices == 1:
        return "auto"
    from lightning_fabric.strategies.ddp import DDPStrategy

    # Stages keep their buffers equal on all ranks; DDP's broadcast would overwrite statistics of other ranks.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _shard(module: nn.Module, mesh: Any, *, low: bool) -> nn.Module:
    """Shard a module with FSDP2: every trainable timm transformer block is one unit, all other modules another.

    With `low`, the processes gather bf16 copies of the weights. Gradients are summed in fp32, and inputs are not cast,
    since some of them are random draws and box corners.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if low else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh["data_parallel"], "mp_policy": policy}
    for child in module.modules():
        if type(child).__name__ == "Block" and any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, **options)
    fully_shard(module, **options)  # in place
    return module


def prepare_module(fabric: Fabric, stage: nn.Module, config: TrainConfig) -> Any:
    """Return `stage`, compiled if the settings say so, wrapped for the devices of `fabric`."""
    if fabric.device.type == "cuda" and fabric.world_size > 1:
        from timm.layers import convert_sync_batchnorm

        # timm's function, since torch's drops the activation inside some of timm's norms.
        stage = convert_sync_batchnorm(stage)
    if config.compile:
        # CUDA graphs, which the plain mode "max-autotune" adds, gain nothing at the sizes that are trained on GPUs.
        stage.compile(**({} if config.compile_mode == "default" else {"mode": "max-autotune-no-cudagraphs"}))
    model = fabric.setup_module(stage)
    if config.communication == "bf16":
        _compress_gradients(model)
    return model


def _compress_gradients(model: Any) -> None:
    """Make DDP exchange the gradients of a model that Fabric has set up in bf16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    copied = model._forward_module
    if isinstance(copied, DistributedDataParallel):
        copied.register_comm_hook(None, bf16_compress_hook)
