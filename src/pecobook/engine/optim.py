"""Optimizers over parameter groups: weight decay by parameter and learning rate by layer follow timm's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pecobook.engine.schedule import warmup_constant, warmup_cosine, warmup_poly, warmup_steps
from pecobook.settings.durations import steps
from pecobook.settings.training import BaseOptimConfig

# Weight decay skips position tables, single tokens and codewords, every vector (biases, norms, LayerScale), and what a
# timm network itself names.
NO_DECAY = (
    *("*codebook", "*pos_embed", "*cls_token", "*reg_token", "*dist_token", "*mask_token"),
    "*relative_position_bias_table",
)


def no_weight_decay(module: nn.Module) -> tuple[str, ...]:
    """Return name patterns of weights without decay: `NO_DECAY`, and those that the networks in `module` name."""
    own = []
    for prefix, network in module.named_modules():
        names = getattr(network, "no_weight_decay", None)
        if callable(names):
            # A name may be that of a weight or of a module, whose weights then have no decay.
            start = f"{prefix}." if prefix else ""
            own += [pattern for name in sorted(names()) for pattern in (f"{start}{name}", f"{start}{name}.*")]
    return (*NO_DECAY, *own)


def parameter_groups(module: nn.Module, config: BaseOptimConfig) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters of `module`, in the form that torch optimizers take."""
    from timm.optim import param_groups_weight_decay

    patterns = no_weight_decay(module)
    return list(param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=patterns))


def layer_decay_groups(network: nn.Module, config: BaseOptimConfig) -> list[dict[str, Any]]:
    """Return a timm network's parameter groups, whose learning rate falls by `layer_decay` per layer downwards.

    Layer l of L uses lr x layer_decay^(L - l); timm's networks define their layers.
    """
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(
        network, config.weight_decay, no_weight_decay_list=no_weight_decay(network), layer_decay=config.layer_decay
    )
    return list(groups)


def dense_groups(
    network: nn.Module, above: Iterable[nn.Module], config: BaseOptimConfig, *, frozen: bool = False
) -> list[dict[str, Any]]:
    """Return groups of a backbone with layer-wise rates; its last layer is one decay below the heads (BEiT's rule).

    Args:
        network: a timm network.
        above: the modules on top of the network, which use the full rate.
        config: learning rate, weight decay and layer decay.
        frozen: whether the network is not trained.
    """
    groups = parameter_groups(nn.ModuleList(above), config)
    if not frozen:
        scaled = layer_decay_groups(network, config)
        groups += [{**group, "lr_scale": group.get("lr_scale", 1.0) * config.layer_decay} for group in scaled]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], config: BaseOptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build the optimizer. A `fused` step, one kernel, takes a third of the time but excludes clipping in fp16."""
    if config.name == "lars":
        from timm.optim import Lars

        # Groups without weight decay (biases, norms) are not scaled by their trust ratio, as in MoCo v3.
        lars: torch.optim.Optimizer = Lars(groups, lr=config.lr, momentum=config.betas[0], trust_coeff=0.001)
        return lars
    kinds: dict[str, type[torch.optim.Adam] | type[torch.optim.AdamW]]
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return kinds[config.name](groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def peak_learning_rate(config: BaseOptimConfig, batch_size: int) -> float:
    """Return the learning rate after the warm-up: lr, scaled to the global batch if `lr_batch_size` is set."""
    return config.lr * (batch_size / config.lr_batch_size if config.lr_batch_size else 1.0)


def learning_rates(config: BaseOptimConfig, *, total: int, num_images: int, batch_size: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step.

    Args:
        config: the schedule and the durations of its parts.
        total: number of steps in the training.
        num_images: images in one epoch.
        batch_size: images in one step, over all devices.
    """
    sizes = {"num_images": num_images, "batch_size": batch_size, "total": total}
    warmup = steps(config.warmup, **sizes, name="optim.warmup")
    peak, final = peak_learning_rate(config, batch_size), config.final_lr
    if config.schedule == "steps":
        milestones = tuple(steps(text, **sizes, name="optim.milestones") for text in config.milestones)
        return lambda step: warmup_steps(step, warmup=warmup, peak=peak, milestones=milestones)
    if config.schedule == "poly":
        power = config.power
        return lambda step: warmup_poly(step, total=total, warmup=warmup, peak=peak, final=final, power=power)
    if config.schedule == "constant":
        cooldown = total - cooldown_start(config, **sizes)
        return lambda step: warmup_constant(step, total=total, warmup=warmup, peak=peak, cooldown=cooldown, final=final)
    return lambda step: warmup_cosine(step, total=total, warmup=warmup, peak=peak, final=final)


def cooldown_start(config: BaseOptimConfig, *, total: int, num_images: int, batch_size: int) -> int:
    """Return the number of steps before the cooldown, `total` without one. The arguments are those of `learning_rates`.

    Until then a constant schedule has the same rates for any length of the training.
    """
    sizes = {"num_images": num_images, "batch_size": batch_size, "total": total}
    return max(total - steps(config.cooldown, **sizes, name="optim.cooldown"), 0)


def warmup_warning(config: BaseOptimConfig, *, total: int, num_images: int, batch_size: int) -> str | None:
    """Return a warning if the training ends before the warm-up does. The arguments are those of `learning_rates`."""
    sizes = {"num_images": num_images, "batch_size": batch_size, "total": total}
    warmup, cooldown = steps(config.warmup, **sizes, name="optim.warmup"), cooldown_start(config, **sizes)
    if warmup <= total:
        cut = (
            f"--optim.cooldown {config.cooldown} begins at step {cooldown:,}, before --optim.warmup ends at {warmup:,}"
        )
        return None if warmup <= cooldown else f"The learning rate never reaches its peak: {cut}. Give shorter ones."
    return (
        f"The learning rate never reaches its peak: --optim.warmup {config.warmup} takes {warmup:,} steps but the "
        f"training {total:,}, so it ends at {total / warmup:.0%} of the peak. Give a shorter warm-up "
        "(--optim.warmup 5%) or a longer training (--max-steps)."
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
