"""What `pecobook embed` computes for a batch of images: vectors from a backbone, or of a tokenizer's codewords.

Shapes: B images, F features, C channels, P = h w patches, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pecobook.analysis.codewords import bag_of_codes, mean_codewords
from pecobook.analysis.features import pools_class_token
from pecobook.commands.extract import check_reads, names_tokenizer, open_backbone
from pecobook.errors import ConfigError
from pecobook.models.export import read_settings
from pecobook.models.network_traits import traits_of
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.models.weights import Backbone
from pecobook.settings.embed import EmbedConfig, Pool
from pecobook.utils.devices import device
from pecobook.utils.printer import say


class Features(NamedTuple):
    """A function of images, and what a reader of its results must know."""

    compute: Callable[[Tensor], dict[str, Tensor]]
    """Maps float (B, 3, S, S) in [0, 1] to `embedding` float (B, F) or (B, P, C), on the host, and with --codes to
    `codes` int64 (B, h, w) and `histogram` float (B, K)."""
    image_size: int
    """S, pixels."""
    words: str
    """A description of the vectors."""
    weights: str
    """A hash of the weights."""


def load_features(config: EmbedConfig) -> Features:
    """Load the network of --backbone.

    Raises:
        PecobookError: the network does not exist, cannot read such images, or has no such block or token.
    """
    if names_tokenizer(config.backbone):
        return _of_tokenizer(config)
    if config.codes:
        raise ConfigError(f"--codes is for tokenizers; '{config.backbone}' is none.")
    return _of_backbone(config)


def _of_tokenizer(config: EmbedConfig) -> Features:
    tokenizer = load_tokenizer(config.backbone)
    if config.pool not in ("auto", "mean", "none") or config.layer or config.weights:
        raise ConfigError("A tokenizer has no class token, --layer or --weights: its codewords are its features.")
    size = config.image_size or tokenizer.image_size
    if size % tokenizer.stride:
        raise ConfigError(f"The tokenizer reads multiples of {tokenizer.stride} pixels, not {size}: see --image-size.")
    weights = fingerprint(tokenizer)
    tokenizer = tokenizer.to(device()).eval()
    codebook = tokenizer.codebook.detach().float().cpu()

    @torch.inference_mode()
    def compute(images: Tensor) -> dict[str, Tensor]:
        codes = tokenizer.encode(images.to(device()), check=False).cpu()
        vectors = codebook[codes.flatten(1)] if config.pool == "none" else mean_codewords(codes, codebook)
        more = {"codes": codes, "histogram": bag_of_codes(codes, len(codebook))} if config.codes else {}
        return {"embedding": vectors, **more}

    words = "the codeword of each patch" if config.pool == "none" else "the mean of the codewords"
    return Features(compute, size, words, weights)


def _of_backbone(config: EmbedConfig) -> Features:
    backbone, size = open_backbone(config, seed=0)
    weights = fingerprint(backbone.network)
    reader, words = _reader(config, backbone)
    check_reads(reader, size, config.backbone)
    mean, std = (torch.tensor(values, device=device())[:, None, None] for values in (backbone.mean, backbone.std))

    @torch.inference_mode()
    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"embedding": reader((images.to(device()) - mean) / std).float().cpu()}

    return Features(compute, size, words, weights)


def _reader(config: EmbedConfig, backbone: Backbone) -> tuple[nn.Module, str]:
    """Return the module that maps normalised images to features, and a description of these."""
    network = backbone.network
    if not traits_of(network).is_plain:
        if config.layer or config.pool in ("class", "both"):
            raise ConfigError(
                f"'{config.backbone}' has no blocks of tokens: leave --layer out, and --pool {config.pool}."
            )
        if config.pool == "none":
            return PatchMap(network), "the vector of each position of the last feature map"
        return network, "the pooled output"
    depth, has_prefix = len(network.blocks), bool(network.num_prefix_tokens)  # type: ignore[arg-type]
    if config.layer > depth:
        raise ConfigError(f"--layer: '{config.backbone}' has {depth} blocks, not {config.layer}.")
    masked = Path(config.backbone).is_dir() and bool(read_settings(config.backbone).get("target"))
    layer = config.layer or (round(0.75 * depth) if masked else depth)
    pool = ("class" if pools_class_token(network) else "mean") if config.pool == "auto" else config.pool
    if pool in ("class", "both") and not has_prefix:
        raise ConfigError(f"'{config.backbone}' has no class token: give --pool mean or none.")
    if pool in ("class", "both") and not pools_class_token(network):
        say(f"{config.backbone} pools the mean of its patches: the output of its class token was not trained.")
    what = {"mean": "the mean of the patches", "class": "the class token", "none": "the vector of each patch"}
    words = f"{what.get(pool, 'the mean of the patches and the class token')} after block {layer} of {depth}"
    return Block(network, layer, pool, is_last=layer == depth), words


class Block(nn.Module):
    """A transformer up to one block: normalised images to pooled tokens (B, F), or to patches (B, P, C)."""

    def __init__(self, network: nn.Module, layer: int, pool: Pool, *, is_last: bool) -> None:
        super().__init__()
        self.network, self.layer, self.pool, self.is_last = network, layer, pool, is_last

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S). The network's final norm is applied only after the last block, as in the network itself."""
        has_prefix = bool(self.network.num_prefix_tokens)
        (layer,) = self.network.forward_intermediates(  # type: ignore[operator]
            images,
            indices=[self.layer - 1],
            intermediates_only=True,
            output_fmt="NLC",
            return_prefix_tokens=has_prefix,
            norm=self.is_last,
        )
        patches, prefix = layer if has_prefix else (layer, None)
        if self.pool == "none":
            return patches  # type: ignore[no-any-return]
        parts: list[Any] = [] if self.pool == "class" else [patches.mean(1)]
        if prefix is not None and self.pool in ("class", "both"):
            parts.append(prefix[:, 0])
        return torch.cat(parts, 1)


class PatchMap(nn.Module):
    """A network without tokens: normalised images to the vectors of its last feature map, (B, P, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S)."""
        features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        if features.ndim == 4 and features.shape[1] != getattr(self.network, "num_features", features.shape[1]):
            features = features.permute(0, 3, 1, 2)  # Swin and others put channels last
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
