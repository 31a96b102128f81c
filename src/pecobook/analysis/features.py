"""Image features for probes: the features of a backbone, and the features made of a tokenizer's codes.

Shapes: N images, F features, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.codewords import bag_of_codes, mean_codewords
from pecobook.analysis.reconstruction import encode_all
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
            and, if there is one, the class token (`block 6 class`).

    Returns:
        the features of each layer, float (N, F) on the CPU, by the name of the layer.
    """
    network = backbone.network.eval()
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (backbone.mean, backbone.std))
    features: dict[str, list[Tensor]] = {}
    for chunk in torch.split(images, 256):
        for name, value in _layers(network, (chunk.to(device) - mean) / std, every_layer).items():
            features.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(parts) for name, parts in features.items()}


def _layers(network: nn.Module, images: Tensor, every_layer: bool) -> dict[str, Tensor]:
    if not (hasattr(network, "blocks") and hasattr(network, "patch_embed")):
        return {"output": network(images)}
    depth = len(network.blocks)  # type: ignore[arg-type]
    indices = sorted({round(depth * share) - 1 for share in (0.5, 0.75, 1.0)})
    if every_layer:
        indices = list(range(depth))
    layers = network.forward_intermediates(  # type: ignore[operator]
        images, indices=indices, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    features: dict[str, Tensor] = {}
    for index, (patches, prefix) in zip(indices, layers, strict=True):
        features[f"block {index + 1}" + (" mean" if every_layer else "")] = patches.mean(1)
        if every_layer and prefix is not None and prefix.shape[1]:
            features[f"block {index + 1} class"] = prefix[:, 0]
    return features


def tokenizer_features(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """Compute average-pooled codewords (paper, Table 4) and bags of codes of images, float (N, 3, H, W) in [0, 1]."""
    codes = encode_all(tokenizer, images)
    return {
        "mean codeword": mean_codewords(codes, tokenizer.codebook),
        "bag of codes": bag_of_codes(codes, len(tokenizer.codebook)),
    }
