"""Image features of a backbone, for probes.

Shapes: N images, F features, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecobook.models.network_traits import traits_of
from pecobook.models.weights import Backbone


@torch.inference_mode()
def backbone_features(backbone: Backbone, images: Tensor, *, every_layer: bool = False) -> dict[str, Tensor]:
    """Compute pooled features of several layers.

    For a transformer, the features are the mean of the patch tokens after some of the upper blocks. (The best layer of
    a masked image model is in the middle, because the last layers serve the prediction.) For any other network, the
    features are the pooled output.

    Args:
        backbone: the network and the normalisation of the input.
        images: float (N, 3, H, W) in [0, 1], with the input size of the network.
        every_layer: for a transformer, return the features of all blocks: the mean of the patch tokens (`block 6 mean`)
            and, if the network pools a class token, that token (`block 6 class`).

    Returns:
        the features of each layer, float (N, F) on the CPU, by the name of the layer.
    """
    network = backbone.network.eval()
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (backbone.mean, backbone.std))
    features: dict[str, list[Tensor]] = {}
    for chunk in torch.split(images, 256):
        for name, value in layer_features(network, (chunk.to(device) - mean) / std, every_layer).items():
            features.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(parts) for name, parts in features.items()}


def layer_features(network: nn.Module, images: Tensor, every_layer: bool) -> dict[str, Tensor]:
    """Return the features of `backbone_features` for one batch of normalised images, on their device."""
    if not traits_of(network).is_plain:
        return {"output": network(images)}
    depth = len(network.blocks)  # type: ignore[arg-type]
    indices = sorted({round(depth * share) - 1 for share in (0.5, 0.75, 1.0)})
    if every_layer:
        indices = list(range(depth))
    has_prefix = bool(network.num_prefix_tokens)
    layers = network.forward_intermediates(  # type: ignore[operator]
        images, indices=indices, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=has_prefix
    )
    features: dict[str, Tensor] = {}
    for index, layer in zip(indices, layers, strict=True):
        patches, prefix = layer if has_prefix else (layer, None)
        features[f"block {index + 1}" + (" mean" if every_layer else "")] = patches.mean(1)
        if every_layer and prefix is not None and pools_class_token(network):
            features[f"block {index + 1} class"] = prefix[:, 0]
    return features


def pools_class_token(network: nn.Module) -> bool:
    """Return whether a transformer's feature is its class token, that is, whether training has shaped its output.

    Masked modelling, and fine-tuning on the mean of the patches, do not shape it.
    """
    return getattr(network, "global_pool", "") == "token"


class EveryLayer(nn.Module):
    """A network as a probe reads it: normalised images to the features of every layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of every layer, (N, F) each, by name."""
        return layer_features(self.network, images, every_layer=True)
