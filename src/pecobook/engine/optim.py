"""Optimizers over parameter groups: weight decay where it belongs, learning rate by layer, both by timm's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pecobook.engine.schedule import warmup_cosine, warmup_poly, warmup_steps
from pecobook.settings.durations import steps
from pecobook.settings.training import BaseOptimConfig

# Position tables, single tokens and codewords take no weight decay, beside every vector (biases, norms, LayerScale).
NO_DECAY = ("*codebook", "*pos_embed", "*cls_token", "*mask_token", "*relative_position_bias_table")


def parameter_groups(module: nn.Module, config: BaseOptimConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of `module`, ready for a torch optimizer."""
    from timm.optim import param_groups_weight_decay

    return list(param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=NO_DECAY))


def layer_decay_groups(network: nn.Module, config: BaseOptimConfig) -> list[dict[str, Any]]:
    """The same for a timm network, with a learning rate that falls by `layer_decay` from each layer to the one below.

    Layer l of L learns at lr x layer_decay^(L - l); timm's networks know their layers.
    """
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(
        network, config.weight_decay, no_weight_decay_list=NO_DECAY, layer_decay=config.layer_decay
    )
    return list(groups)


def dense_groups(
    network: nn.Module, above: Iterable[nn.Module], config: BaseOptimConfig, *, frozen: bool = False
) -> list[dict[str, Any]]:
    """Groups of a backbone with layer-wise rates, its last layer one decay below what stands on it (BEiT's rule).

    Args:
        network: a timm network.
        above: what learns at the full rate.
        config: rates and decay.
        frozen: whether the network does not learn.
    """
    groups = parameter_groups(nn.ModuleList(above), config)
    if not frozen:
        own = layer_decay_groups(network, config)
        groups += [{**group, "lr_scale": group.get("lr_scale", 1.0) * config.layer_decay} for group in own]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], config: BaseOptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer. `fused` makes it one kernel, which takes a third of the time; under fp16 it cannot be clipped."""
    if config.name == "lars":
        from timm.optim import Lars

        # Groups without weight decay (biases, norms) are not scaled by their trust ratio, as in MoCo v3.
        lars: torch.optim.Optimizer = Lars(groups, lr=config.lr, momentum=config.betas[0], trust_coeff=0.001)
        return lars
    kinds: dict[str, type[torch.optim.Adam] | type[torch.optim.AdamW]]
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return kinds[config.name](groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def peak_learning_rate(config: BaseOptimConfig, batch_size: int) -> float:
    """The rate after the warm-up: lr, in proportion to the global batch where lr is meant for another."""
    return config.lr * (batch_size / config.lr_batch_size if config.lr_batch_size else 1.0)


def learning_rates(config: BaseOptimConfig, *, total: int, num_images: int, batch_size: int) -> Callable[[int], float]:
    """The learning rate as a function of the step.

    Args:
        config: the schedule, and durations of its parts.
        total: steps of the training.
        num_images: images in one epoch.
        batch_size: images in one step, over all devices.
    """
    how = {"num_images": num_images, "batch_size": batch_size, "total": total}
    warmup = steps(config.warmup, **how, name="optim.warmup")
    peak, final = peak_learning_rate(config, batch_size), config.final_lr
    if config.schedule == "steps":
        falls = tuple(steps(text, **how, name="optim.milestones") for text in config.milestones)
        return lambda step: warmup_steps(step, warmup=warmup, peak=peak, falls=falls)
    if config.schedule == "poly":
        power = config.power
        return lambda step: warmup_poly(step, total=total, warmup=warmup, peak=peak, final=final, power=power)
    return lambda step: warmup_cosine(step, total=total, warmup=warmup, peak=peak, final=final)


def warmup_warning(config: BaseOptimConfig, *, total: int, num_images: int, batch_size: int) -> str | None:
    """A line for the user when the training ends before the warm-up does. Arguments as of `learning_rates`."""
    warmup = steps(config.warmup, num_images=num_images, batch_size=batch_size, total=total, name="optim.warmup")
    if warmup <= total:
        return None
    return (
        f"The learning rate never reaches its peak: --optim.warmup {config.warmup} makes {warmup:,} steps and the "
        f"training {total:,}, so it ends at {total / warmup:.0%} of it. Give a shorter warm-up (--optim.warmup 5%) "
        "or a longer training (--max-steps)."
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
