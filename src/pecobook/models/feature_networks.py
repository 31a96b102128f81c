"""Frozen networks that return features: a timm or torchvision network, a pecobook run, or any module.

B batch, L layers, C_l H_l W_l shape of layer l's features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, did_you_mean, first_line
from pecobook.models.checkpoints import is_head, left_aside, load_state, read_checkpoint
from pecobook.models.dry_run import refusing
from pecobook.models.makers import (
    Normalisation,
    neighbour_normalisation,
    overridden,
    with_flags,
)
from pecobook.models.network_traits import has_patch_tokens, network_traits, traits_of
from pecobook.models.networks import downloads
from pecobook.models.weights import load_backbone
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD

LAST = "last"
"""Given instead of layers: the output of the last layer, after the network's final norm."""


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network truncated after the layers that its features need, and the input that it expects."""

    network: nn.Module
    """Maps normalised images (B, 3, H, W) to a list of L features (B, C_l, H_l, W_l), in the order of the layers."""
    mean: tuple[float, ...]
    """Mean for normalising the input, RGB in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation for normalising the input, RGB in [0, 1]."""
    input_size: int | None
    """Side of the images that the network requires, in pixels; None if it takes any size."""
    notes: tuple[str, ...] = ()
    """Lines that tell the user what was loaded from where."""
    patch: int = 0
    """Side of a plain transformer's patches, in pixels; 0 for any other network."""


def load_feature_network(
    network: str | nn.Module,
    layers: Sequence[int | str],
    weights: str | None,
    *,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    input_size: int = 0,
) -> FeatureNetwork:
    """Load a feature network; random weights are drawn from torch's global generator.

    Args:
        network: `timm:NAME`, `torchvision:NAME`, a pecobook run (contrast, pretrain or finetune), or a module.
        layers: numbers from 1 (blocks of a transformer, stages of a convolutional network); for torchvision networks
            also node names (`features.12`), for a module only node names. `last` on its own is the output of the last
            layer of timm networks and runs, after the final norm.
        weights: None for the network's pre-trained weights, a local file, or `random`.
        mean: mean for normalising the input; if empty, that of the weights, or ImageNet's for a module.
        std: standard deviation for normalising the input, likewise.
        input_size: side of the images that a plain transformer should read, in pixels: its positions are interpolated
            to this size. 0 keeps its own.

    Raises:
        WeightsError: the network or a layer is unknown, or the weights are missing or do not fit.
    """
    if not layers:
        raise WeightsError("--perceptual.layers is empty: name at least one layer.")
    if isinstance(network, nn.Module):
        return FeatureNetwork(
            NodeFeatures(network, [str(layer) for layer in layers]), mean or IMAGENET_MEAN, std or IMAGENET_STD, None
        )
    if network.startswith("torchvision:"):
        return _open_torchvision(network.removeprefix("torchvision:"), layers, weights, mean, std)
    # The encoder of SAM keeps its own size: it resamples its positions for each image.
    resampled = input_size and (not network.startswith("timm:") or network_traits(network).is_plain)
    backbone = load_backbone(network, weights=weights, image_size=input_size if resampled else None, mean=mean, std=std)
    traits = traits_of(backbone.network)
    patch_embed: Any = getattr(backbone.network, "patch_embed", None)
    patch = int(patch_embed.patch_size[0]) if traits.is_plain else 0
    if patch and input_size % patch:
        fitting = max(round(input_size / patch), 1) * patch
        raise ConfigError(
            f"--perceptual.input-size {input_size}: '{network}' has patches of {patch} pixels: give {fitting}."
        )
    with refusing(network, "return the features of its layers"):
        indices = feature_indices(backbone.network, layers, network)
        features = TimmFeatures(backbone.network, indices, norm=tuple(layers) == (LAST,))
    notes = tuple(with_flags(note, "--perceptual.") for note in backbone.notes)
    size = backbone.image_size if traits.takes_size else None
    return FeatureNetwork(features, backbone.mean, backbone.std, size, notes, patch)


class TimmFeatures(nn.Module):
    """Returns intermediate features of a timm network, and removes the layers after the last of them.

    Args:
        network: a timm network.
        indices: timm's feature indices.
        norm: whether features pass through the network's final norm.
    """

    def __init__(self, network: nn.Module, indices: Sequence[int], *, norm: bool = False) -> None:
        super().__init__()
        self.network, self.indices, self.norm = network, tuple(indices), norm
        self.network.prune_intermediate_layers(sorted(indices), prune_norm=not norm, prune_head=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features: normalised images (B, 3, H, W) to L tensors (B, C_l, H_l, W_l)."""
        order = sorted(set(self.indices))
        features = self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=order, norm=self.norm, intermediates_only=True, output_fmt="NCHW", stop_early=True
        )
        by_index = dict(zip(order, features, strict=True))
        return [by_index[index] for index in self.indices]


class NodeFeatures(nn.Module):
    """Returns the features of any traceable network at named nodes (torchvision.models.feature_extraction).

    Args:
        network: the network; its in-place activations are made out-of-place, since they would overwrite a node's
            output.
        nodes: node names, as `get_graph_node_names` lists them; the name of a module means its last node.

    Raises:
        WeightsError: there is no such node, or the network cannot be traced.
    """

    def __init__(self, network: nn.Module, nodes: Sequence[str]) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        super().__init__()
        self.nodes = tuple(nodes)
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        try:
            names = get_graph_node_names(network.eval())[1]
            unknown = [node for node in nodes if not any(name == node or name.startswith(f"{node}.") for name in names)]
            if unknown:
                raise WeightsError(
                    f"--perceptual.layers: {type(network).__name__} has no node '{unknown[0]}'."
                    f"{did_you_mean(unknown[0], names)} The nodes range from {names[1]} to {names[-1]}."
                )
            self.network = create_feature_extractor(network, list(nodes))
        except (TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{type(network).__name__} cannot be traced for features: {first_line(error)}") from None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features: normalised images (B, 3, H, W) to L tensors (B, C_l, H_l, W_l)."""
        features = self.network(images)
        return [features[node] for node in self.nodes]


def _open_torchvision(
    name: str, layers: Sequence[int | str], weights: str | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> FeatureNetwork:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        suggestion = did_you_mean(name, torchvision.models.list_models(module=torchvision.models))
        raise WeightsError(f"torchvision has no network '{name}'.{suggestion}")
    normalisation = Normalisation(IMAGENET_MEAN, IMAGENET_STD, "torchvision's default")
    notes: list[str] = []
    own: Any = torchvision.models.get_model_weights(name)
    pretrained = next((entry for entry in own if Path(entry.url).name == Path(weights or "").name), own.DEFAULT)
    if weights != "random":
        preset = pretrained.transforms()
        normalisation = Normalisation(tuple(preset.mean), tuple(preset.std), f"torchvision's settings of {pretrained}")
    try:
        network = torchvision.models.get_model(name, weights=pretrained if weights is None and downloads() else None)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"The weights of torchvision's '{name}' cannot be downloaded ({first_line(error)}).\n"
            "Check the internet connection, give a local file with --perceptual.weights, or use random weights."
        ) from None
    if weights not in (None, "random"):
        # Files of self-supervised networks have no head, and the features come before it.
        needs_head = any(is_head(str(layer)) for layer in layers)
        if hasattr(network, "transform_input"):  # as torchvision sets it for its weights of Inception and GoogLeNet
            network.transform_input = True
        checkpoint = read_checkpoint(weights)
        left = load_state(network, checkpoint.state, source=weights, needs_head=needs_head)
        notes = [note for note in (left_aside(weights, checkpoint, left),) if note]
        normalisation = neighbour_normalisation(weights) or normalisation
    normalisation = overridden(normalisation, mean, std)
    features = NodeFeatures(network, stage_nodes(network, layers, name))
    notes.append(with_flags(normalisation.line(f"torchvision:{name}"), "--perceptual."))
    return FeatureNetwork(features, normalisation.mean, normalisation.std, None, tuple(notes))


def stage_nodes(network: nn.Module, layers: Sequence[int | str], name: str) -> list[str]:
    """Return the node names of layers of a torchvision network.

    Args:
        network: a torchvision network.
        layers: stages as numbers from 1, or node names, which are returned unchanged. Stages are `layer1`...; in a
            network with `features`, each stage ends before a pooling layer.
        name: torchvision's name of the network, for error messages.

    Raises:
        WeightsError: the network has no stage with this number.
    """
    features: Any = getattr(network, "features", None)
    stages = [f"layer{number}" for number in range(1, 9) if hasattr(network, f"layer{number}")]
    if not stages and isinstance(features, nn.Sequential):
        names = list(features._modules)
        pools = [number for number, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        # SqueezeNet pools right after its first activation; VGG and AlexNet end with a pooling layer.
        ends = [pool - 1 for pool in pools] + ([len(features) - 1] if pools and pools[-1] < len(features) - 1 else [])
        # DenseNet gives its layers names instead of numbers, and pools in its transition layers.
        stages = [f"features.{names[end]}" for end in ends] if names[0] == "0" else []
    nodes = []
    for layer in layers:
        if isinstance(layer, str) and not layer.isdigit():
            nodes.append(layer)
        elif 1 <= int(layer) <= len(stages):
            nodes.append(stages[int(layer) - 1])
        else:
            choices = f"stages 1 to {len(stages)}" if stages else "no numbered stages: give names of nodes"
            raise WeightsError(f"--perceptual.layers {layer}: torchvision's '{name}' has {choices}.")
    return nodes


def feature_indices(network: nn.Module, layers: Sequence[int | str], name: str) -> list[int]:
    """Return timm's feature indices for layers counted from 1, or for `last`.

    Raises WeightsError if the network has no such layer.
    """
    if not hasattr(network, "forward_intermediates"):
        raise WeightsError(f"timm's '{name}' returns no intermediate features: choose another perceptual network.")
    if has_patch_tokens(network):
        count, first = len(network.blocks), 0  # type: ignore[arg-type]
    else:
        modules = [str(info["module"]) for info in network.feature_info]  # type: ignore[union-attr]
        # timm counts the stem of a ResNet as a feature; the paper's stage 1 comes after the stem. For a VGG, timm also
        # counts the last pooling layer.
        first = 0 if modules[0].startswith(("stages", "layer", "features", "blocks")) else 1
        count = len(modules) - first
    if tuple(layers) == (LAST,):
        return [count - 1 + first]
    invalid = [layer for layer in layers if not (str(layer).isdigit() and 1 <= int(layer) <= count)]
    if invalid or not layers:
        raise WeightsError(f"--perceptual.layers {' '.join(map(str, layers))}: '{name}' has layers 1 to {count}.")
    return [int(layer) - 1 + first for layer in layers]


def check_feature_maps(features: Sequence[Tensor], layers: Sequence[int | str]) -> None:
    """Raise WeightsError if a feature is not a map (B, C, H, W)."""
    for layer, feature in zip(layers, features, strict=True):
        if not isinstance(feature, torch.Tensor) or feature.ndim != 4:
            shape = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
            raise WeightsError(
                f"--perceptual.layers {layer} returns {shape}, not a map (B, C, H, W): choose a node before the "
                "pooling, and for transformers a network of timm."
            )
