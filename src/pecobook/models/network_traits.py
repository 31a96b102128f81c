"""The capabilities of a timm network, determined from the network itself and not from its name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.models.networks import create_network


@dataclasses.dataclass(frozen=True)
class NetworkTraits:
    """Properties of a timm network that determine which arguments it is built with."""

    is_plain: bool
    """Whether the network is a plain transformer: one token per patch, the same width in all blocks."""
    takes_size: bool
    """Whether the network is built for one image size, its argument `img_size`."""
    pools_mean: bool
    """Whether it is a plain transformer that can pool the mean of its patches (`global_pool="avg"`)."""
    pools_token: bool
    """Whether it is such a transformer, and pools its class token unless told otherwise."""
    norm_moves: bool
    """Whether the position of the last norm, before or after the mean, must be given too (`use_fc_norm`)."""
    any_size: dict[str, Any]
    """Arguments that make the network take images of any size; empty if there are none."""


def without_memory(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """Build a timm network without memory and time for weights, and without a head unless `args` ask for one.

    Raises:
        WeightsError: timm cannot build it.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return create_network(name, **({"num_classes": 0} | (args or {})))


@functools.lru_cache(maxsize=64)
def _traits(name: str, args: str) -> NetworkTraits:
    return traits_of(without_memory(name, json.loads(args)))


def network_traits(name: str, args: dict[str, Any] | None = None) -> NetworkTraits:
    """Return the traits of timm's `name` with `args`, from a network built without memory for weights.

    If the network cannot be built, no trait holds: building it with weights then reports why.
    """
    arguments = {key: value for key, value in (args or {}).items() if key != "img_size"}
    try:
        return _traits(name.removeprefix("timm:"), json.dumps(arguments, sort_keys=True))
    except Exception:  # unknown names and arguments, which `create_network` reports
        return NetworkTraits(False, False, False, False, False, {})


def traits_of(network: nn.Module) -> NetworkTraits:
    """Return the traits of a network."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    accepted = _arguments(network)
    settings = getattr(network, "pretrained_cfg", None) or {}
    is_plain = isinstance(network, (VisionTransformer, Beit, Eva, VisionTransformerRelPos)) and has_patch_tokens(
        network
    )
    # The heads of a distilled network read its two class tokens.
    pools_mean = is_plain and "global_pool" in accepted and not hasattr(network, "head_dist")
    return NetworkTraits(
        is_plain=is_plain,
        takes_size="img_size" in accepted and (is_plain or bool(settings.get("fixed_input_size"))),
        pools_mean=pools_mean,
        pools_token=pools_mean and getattr(network, "global_pool", "") == "token",
        norm_moves=isinstance(network, Beit),
        any_size={name: True for name in ("dynamic_img_size", "dynamic_img_pad") if name in accepted},
    )


def unseen(network: nn.Module) -> dict[str, str]:
    """Return what a network computes and no weight shows, by layer: its class, its settings, its number of heads.

    Two networks with weights of the same names and shapes can differ in activations, epsilons, strides and heads.
    """
    found = {}
    for name, module in network.named_modules():
        kind, heads = type(module).__name__, getattr(module, "num_heads", None)
        if not kind.startswith(("Identity", "Drop")):  # rates of dropout change only training
            found[name] = f"{kind}({module.extra_repr()})" + (f" of {heads} heads" if heads else "")
    return found


def differing_layer(network: nn.Module, other: nn.Module) -> str:
    """Return in words a layer that computes something else with its weights in `other`; empty if there is none."""
    ours, theirs = unseen(network), unseen(other)
    layers = (layer for layer, value in ours.items() if theirs.get(layer, value) != value)
    return next((f"{layer or 'network'} is {theirs[layer]} there and {ours[layer]} here" for layer in layers), "")


def _arguments(network: nn.Module) -> set[str]:
    """Return the argument names of a network's class and its base classes."""
    constructors = [vars(cls)["__init__"] for cls in type(network).__mro__ if "__init__" in vars(cls)]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def has_patch_tokens(network: nn.Module) -> bool:
    """Return whether `network` is a transformer whose blocks all process one token per patch of a grid."""
    return (
        hasattr(network, "blocks")
        and hasattr(getattr(network, "patch_embed", None), "grid_size")
        and isinstance(getattr(network, "num_prefix_tokens", None), int)
        and isinstance(getattr(network, "embed_dim", None), int)
    )


def trained_size(name: str, state: dict[str, Tensor]) -> int | None:
    """Return the image side, in pixels, that the position tables of `state` are for; None for timm's default side."""
    network: Any = without_memory(name)
    if not has_patch_tokens(network):
        return None
    rows, columns = network.patch_embed.grid_size
    tables: tuple[tuple[str, int, Callable[[int], int]], ...] = (
        ("pos_embed", 1, lambda side: side * side),
        ("relative_position_bias_table", 0, lambda side: (2 * side - 1) ** 2),
    )
    for ending, dim, count in tables:
        ours = next((value for key, value in network.state_dict().items() if key.endswith(ending)), None)
        theirs = next((value for key, value in state.items() if key.endswith(ending) and value.ndim > dim), None)
        if ours is None or theirs is None or rows != columns or ours.shape == theirs.shape:
            continue
        extra = ours.shape[dim] - count(rows)  # class tokens
        side = next((side for side in range(1, 1024) if count(side) + extra == theirs.shape[dim]), None)
        if side is not None and side != rows:
            return int(side * network.patch_embed.patch_size[0])
    return None
