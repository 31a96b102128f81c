"""Features of images, for probes: of a backbone, of a tokenizer's codewords.

N images, F feature width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.codewords import bag_of_codes, mean_codewords
from pecobook.analysis.reconstruction import encode_all
from pecobook.data.images import ImageSource
from pecobook.data.stream import central_crops
from pecobook.data.views import to_float
from pecobook.engine.log import Progress
from pecobook.models.weights import Backbone

Features = Callable[[Tensor], dict[str, Tensor]]
"""Float images (B, 3, S, S) in [0, 1] to named features (B, ...) on the host."""


def extract(
    source: ImageSource, size: int, limit: int, features: Features, what: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features of central crops, batch by batch, so that no more than a batch of pixels is held; shows progress.

    Args:
        source: images.
        size: side of the crops, pixels.
        limit: most images; a fixed permutation chooses them.
        features: of a batch.
        what: is extracted, for the progress line.

    Returns:
        name to (N, ...), real numbers in half precision where they fit, and labels int64 (N,) where there are some.
    """
    found: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    progress = Progress(total=min(limit, len(source)), start=0, name=what, quiet=False)
    for done, batch in central_crops(source, size, limit=limit):
        if "image" in batch:
            for name, value in features(to_float(batch["image"])).items():
                fits = value.is_floating_point() and value.abs().max() < 6e4
                found.setdefault(name, []).append(value.half() if fits else value)
            labels += [batch["label"]] if "label" in batch else []
        progress.show(done, {})
    progress.close()
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return joined, None if source.labels is None else torch.cat(labels)


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
