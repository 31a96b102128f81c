"""A stage on its devices: synchronised norms, compilation, Fabric's wrapper, and the precision of its communication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pecobook.settings.training import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def prepare_module(fabric: Fabric, stage: nn.Module, config: TrainConfig) -> Any:
    """Return `stage`, compiled where the settings say so, wrapped for the devices of `fabric`."""
    if fabric.device.type == "cuda" and fabric.world_size > 1:
        from timm.layers import convert_sync_batchnorm

        # timm's function, since torch's drops the activation inside some of timm's norms.
        stage = convert_sync_batchnorm(stage)
    if config.compile:
        stage.compile()
    model = fabric.setup_module(stage)
    if config.communication == "bf16":
        compress_gradients(model)
    return model


def compress_gradients(model: Any) -> None:
    """Let DDP exchange the gradients of a model that Fabric has set up in bf16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    copied = model._forward_module
    if isinstance(copied, DistributedDataParallel):
        copied.register_comm_hook(None, bf16_compress_hook)
