"""Features of images, for probes: of a backbone, of a tokenizer's codewords.

N images, F feature width, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.codewords import bag_of_codes, mean_codewords
from pecobook.analysis.reconstruction import encode_all
from pecobook.models.weights import Backbone


@torch.inference_mode()
def backbone_features(
    backbone: Backbone, images: Tensor, *, batch_size: int = 256, every_layer: bool = False
) -> dict[str, Tensor]:
    """Pooled features, one set a layer that is worth probing.

    A transformer gives the mean of its patch tokens after each of its upper blocks (the best layer of a masked image
    model lies in the middle: its last ones serve the prediction); any other network gives its own pooled output.

    Args:
        backbone: the network and its normalisation.
        images: float (N, 3, H, W) in [0, 1], of the size the network takes.
        batch_size: images at once.
        every_layer: of a transformer, all blocks, and beside the mean (`block 6 mean`) the class token (`block 6
            class`) where there is one.

    Returns:
        name of the set to float (N, F) on the CPU.
    """
    network = backbone.network.eval()
    device = next(network.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (backbone.mean, backbone.std))
    layers = _every_layer if every_layer else _layers
    found: dict[str, list[Tensor]] = {}
    for chunk in torch.split(images, batch_size):
        for name, value in layers(network, (chunk.to(device) - mean) / std).items():
            found.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _is_transformer(network: nn.Module) -> bool:
    return hasattr(network, "blocks") and hasattr(network, "patch_embed")


def _layers(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    if not _is_transformer(network):
        return {"output": network(images)}
    depth = len(network.blocks)  # type: ignore[arg-type]
    indices = sorted({round(depth * share) - 1 for share in (0.5, 0.75, 1.0)})
    layers = network.forward_intermediates(  # type: ignore[operator]
        images, indices=indices, intermediates_only=True, output_fmt="NLC"
    )
    return {f"block {index + 1}": layer.mean(1) for index, layer in zip(indices, layers, strict=True)}


def _every_layer(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    if not _is_transformer(network):
        return {"output": network(images)}
    layers = network.forward_intermediates(  # type: ignore[operator]
        images, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    found: dict[str, Tensor] = {}
    for number, (patches, prefix) in enumerate(layers, start=1):
        found[f"block {number} mean"] = patches.mean(1)
        if prefix is not None and prefix.shape[1]:
            found[f"block {number} class"] = prefix[:, 0]
    return found


def tokenizer_features(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """Average-pooled codewords (paper, Table 4) and bags of codes of float (N, 3, H, W) in [0, 1]."""
    codes = encode_all(tokenizer, images)
    return {
        "mean codeword": mean_codewords(codes, tokenizer.codebook),
        "bag of codes": bag_of_codes(codes, len(tokenizer.codebook)),
    }
