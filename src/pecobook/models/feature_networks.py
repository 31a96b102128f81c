"""Frozen networks that give features: timm's, torchvision's, a run of pecobook, or any module of yours.

B batch, L layers, C_l H_l W_l shape of layer l's features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError, did_you_mean, first_line
from pecobook.models.checkpoints import read_weights
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, load_backbone


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network cut to what its features need, and the input it was made for."""

    network: nn.Module
    """Normalised images (B, 3, H, W) to a list of L features (B, C_l, H_l, W_l), in the order of the layers."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    """Side it works at, pixels; None when any will do."""


def load_feature_network(network: str | nn.Module, layers: Sequence[int | str], weights: str | None) -> FeatureNetwork:
    """Open a feature network; random weights come from torch's global generator.

    Args:
        network: `timm:NAME`, `torchvision:NAME`, a run of pecobook (contrast, pretrain or finetune), or a module, whose
            layers are node names.
        layers: numbers from 1 (blocks of a transformer, stages of a convolutional network), or, for torchvision and
            modules, names of nodes (`features.12`).
        weights: None for the network's own, a local file, or `random`.

    Raises:
        WeightsError: unknown network or layer, or weights missing or not fitting.
    """
    if not layers:
        raise WeightsError("--perceptual.layers is empty: name at least one layer.")
    if isinstance(network, nn.Module):
        return FeatureNetwork(
            NodeFeatures(network, [str(layer) for layer in layers]), IMAGENET_MEAN, IMAGENET_STD, None
        )
    if network.startswith("torchvision:"):
        return _open_torchvision(network.removeprefix("torchvision:"), layers, weights)
    backbone = load_backbone(network, weights=weights)
    is_vit = hasattr(backbone.network, "blocks") and hasattr(backbone.network, "patch_embed")
    features = TimmFeatures(backbone.network, feature_indices(backbone.network, layers, network))
    return FeatureNetwork(features, backbone.mean, backbone.std, backbone.image_size if is_vit else None)


class TimmFeatures(nn.Module):
    """Intermediate features of a timm network, which loses what comes after the last of them.

    Args:
        network: a timm network.
        indices: timm's numbers of the features.
    """

    def __init__(self, network: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.network, self.indices = network, tuple(indices)
        self.network.prune_intermediate_layers(sorted(indices), prune_norm=True, prune_head=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) to L tensors (B, C_l, H_l, W_l)."""
        order = sorted(set(self.indices))
        found = self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=order, intermediates_only=True, output_fmt="NCHW", stop_early=True
        )
        by_index = dict(zip(order, found, strict=True))
        return [by_index[index] for index in self.indices]


class NodeFeatures(nn.Module):
    """Features of any traceable network at named nodes (torchvision.models.feature_extraction).

    Args:
        network: the network; its in-place activations are made ordinary ones, lest they change what a node gave.
        nodes: names of nodes, as `get_graph_node_names` lists them; the last node of a module may go by its name.

    Raises:
        WeightsError: no such node, or a network that cannot be traced.
    """

    def __init__(self, network: nn.Module, nodes: Sequence[str]) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        super().__init__()
        self.nodes = tuple(nodes)
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        try:
            known = get_graph_node_names(network.eval())[1]
            wrong = [node for node in nodes if not any(one == node or one.startswith(f"{node}.") for one in known)]
            if wrong:
                raise WeightsError(
                    f"--perceptual.layers: {type(network).__name__} has no node '{wrong[0]}'."
                    f"{did_you_mean(wrong[0], known)} Its nodes run from {known[1]} to {known[-1]}."
                )
            self.network = create_feature_extractor(network, list(nodes))
        except (TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{type(network).__name__} cannot be traced for features: {first_line(error)}") from None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) to L tensors (B, C_l, H_l, W_l)."""
        found = self.network(images)
        return [found[node] for node in self.nodes]


def _open_torchvision(name: str, layers: Sequence[int | str], weights: str | None) -> FeatureNetwork:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        near = did_you_mean(name, torchvision.models.list_models(module=torchvision.models))
        raise WeightsError(f"torchvision has no network '{name}'.{near}")
    mean, std, given = IMAGENET_MEAN, IMAGENET_STD, None
    if weights is None:
        given = torchvision.models.get_model_weights(name).DEFAULT
        preset = given.transforms()
        mean, std = tuple(preset.mean), tuple(preset.std)
    try:
        network = torchvision.models.get_model(name, weights=given)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"The weights of torchvision's '{name}' cannot be fetched ({first_line(error)}).\n"
            "Check the network, give a local file with --perceptual.weights, or ask for random ones."
        ) from None
    if weights not in (None, "random"):
        from pecobook.models.checkpoints import load_state

        load_state(network, read_weights(weights), source=weights)
    return FeatureNetwork(NodeFeatures(network, stage_nodes(network, layers, name)), mean, std, None)


def stage_nodes(network: nn.Module, layers: Sequence[int | str], name: str) -> list[str]:
    """Node names of layers, numbers from 1 being stages: `layer1`..., or what comes before each pooling of `features`.

    Raises:
        WeightsError: a number where the network has no such stage.
    """
    features: Any = getattr(network, "features", None)
    stages = [f"layer{number}" for number in range(1, 9) if hasattr(network, f"layer{number}")]
    if not stages and isinstance(features, nn.Sequential):
        names = list(features._modules)
        pools = [number for number, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        # SqueezeNet pools right after its first activation, VGG and AlexNet end with a pooling.
        ends = [pool - 1 for pool in pools] + ([len(features) - 1] if pools and pools[-1] < len(features) - 1 else [])
        # DenseNet names its layers, and pools between its blocks in other ways.
        stages = [f"features.{names[end]}" for end in ends] if names[0] == "0" else []
    nodes = []
    for layer in layers:
        if isinstance(layer, str) and not layer.isdigit():
            nodes.append(layer)
        elif 1 <= int(layer) <= len(stages):
            nodes.append(stages[int(layer) - 1])
        else:
            known = f"stages 1 to {len(stages)}" if stages else "no numbered stages: give names of nodes"
            raise WeightsError(f"--perceptual.layers {layer}: torchvision's '{name}' has {known}.")
    return nodes


def feature_indices(network: nn.Module, layers: Sequence[int | str], name: str) -> list[int]:
    """Timm's feature indices of 1-based layers. Raises WeightsError for a layer the network lacks."""
    if not hasattr(network, "forward_intermediates"):
        raise WeightsError(f"timm's '{name}' gives no intermediate features: choose another perceptual network.")
    if hasattr(network, "blocks") and hasattr(network, "patch_embed"):
        count, first = len(network.blocks), 0  # type: ignore[arg-type]
    else:
        modules = [str(info["module"]) for info in network.feature_info]  # type: ignore[union-attr]
        # timm counts a ResNet's stem as a feature of its own; the paper's stage 1 comes after it. Of a VGG it counts
        # the last pooling, too.
        first = 0 if modules[0].startswith(("stages", "layer", "features", "blocks")) else 1
        count = len(modules) - first
    wrong = [layer for layer in layers if not (str(layer).isdigit() and 1 <= int(layer) <= count)]
    if wrong or not layers:
        shown = " ".join(map(str, layers))
        raise WeightsError(f"--perceptual.layers {shown}: '{name}' has layers 1 to {count}.")
    return [int(layer) - 1 + first for layer in layers]


def check_feature_maps(features: Sequence[Tensor], layers: Sequence[int | str]) -> None:
    """Raise WeightsError unless every feature is a map (B, C, H, W)."""
    for layer, feature in zip(layers, features, strict=True):
        if not isinstance(feature, torch.Tensor) or feature.ndim != 4:
            shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
            raise WeightsError(
                f"--perceptual.layers {layer} gives {shape}, not maps (B, C, H, W): choose a node before the pooling, "
                "and for transformers a network of timm."
            )
