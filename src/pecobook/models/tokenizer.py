"""The tokenizer: encoder, codebook and decoder, and how it is saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pecobook.models.autoencoder import Decoder, Encoder
from pecobook.models.export import Card, Exported
from pecobook.models.nearest import nearest_codeword
from pecobook.models.quantizer import VectorQuantizer
from pecobook.models.vit_autoencoder import ViTDecoder, ViTEncoder
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.devices import exporting


class PerceptualTokenizer(Exported):
    """Images to codes and back.

    Args:
        config: its shape.
        quantizer: the codebook; None makes one with the default settings.
    """

    kind = "tokenizer"
    comes_from = "codebook"

    def __init__(self, config: TokenizerConfig, quantizer: VectorQuantizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_autoencoder(config.model)
        self.quantizer = quantizer or VectorQuantizer(config.num_codewords, config.model.latent_dim)

    @property
    def codebook(self) -> Tensor:
        """Codewords, float (K, D)."""
        return self.quantizer.codebook

    @property
    def num_codewords(self) -> int:
        """K."""
        return self.config.num_codewords

    @property
    def in_channels(self) -> int:
        """Channels of its images."""
        return self.config.model.in_channels

    @property
    def stride(self) -> int:
        """Pixels of the image for one token."""
        return self.config.model.stride

    @property
    def image_size(self) -> int:
        """Side of the images it was trained at, pixels."""
        return self.config.image_size

    def latent(self, images: Tensor) -> Tensor:
        """Encoder output before quantisation: float (B, 3, H, W) in [0, 1] to (B, D, h, w)."""
        channels, height, width = images.shape[-3:]
        if channels != self.in_channels:
            raise ValueError(f"Images must have {self.in_channels} channels, not {channels}.")
        if height % self.stride or width % self.stride:
            raise ValueError(f"Images must be multiples of {self.stride} pixels, not {height} x {width}.")
        return self.encoder(images * 2 - 1)  # type: ignore[no-any-return]

    def render(self, quantized: Tensor) -> Tensor:
        """Decoder output, not clamped: (B, D, h, w) to (B, 3, H, W), about [0, 1]."""
        return (self.decoder(quantized) + 1) / 2  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch_size: int = 256) -> Tensor:
        """Codes of float (B, C, H, W) in [0, 1]: int64 (B, H / f, W / f).

        Args:
            images: on any device; codes come back to it.
            batch_size: images at once on the tokenizer's device.

        Raises:
            ValueError: a side is no multiple of the stride f, or the number of channels is another.
        """
        return in_parts(self._encode, images, batch_size, self.codebook.device)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, batch_size: int = 256) -> Tensor:
        """Images of codes int64 (B, h, w): float (B, C, h f, w f) in [0, 1]. Arguments as `encode`'s."""
        return in_parts(self._decode, codes, batch_size, self.codebook.device)

    def _encode(self, images: Tensor) -> Tensor:
        z = self.latent(images)
        B, D, h, w = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, D)
        return nearest_codeword(vectors, self.codebook).view(B, h, w)

    def _decode(self, codes: Tensor) -> Tensor:
        return self.render(self.quantizer.lookup(codes)).float().clamp(0, 1)

    # ------------------------------------------------------------------------------------------------ saving, loading

    def settings(self) -> dict[str, Any]:
        """Its shape, as plain values."""
        return to_dict(self.config)

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """The tokenizer of this shape, with random weights. Raises ConfigError."""
        return cls(replace(TokenizerConfig(), settings))

    @classmethod
    def is_exported(cls, name: str) -> bool:
        """Whether more than training reads it."""
        return name not in TRAINING_ONLY

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load from a run folder, an export folder, or `owner/name` on the Hugging Face hub.

        It is in evaluation mode, and its parameters take no gradient.

        Raises:
            WeightsError: there is none, it is damaged, or it is not a tokenizer.
        """
        return super().from_pretrained(source).requires_grad_(False)

    def lines(self, source: str) -> str:
        """Python that loads it from the folder `source`, or from the hub's repository of that name."""
        return f'from pecobook import PerceptualTokenizer\ntokenizer = PerceptualTokenizer.from_pretrained("{source}")'

    def card(self, origin: str) -> Card:
        """Its size, and how it was trained."""
        size = (
            f"{self.num_codewords} codewords of dimension {self.config.model.latent_dim}; "
            f"one token for {self.stride} x {self.stride} pixels; trained at {self.image_size} pixels."
        )
        return Card(
            title="A perceptual tokenizer",
            text=f"{size}\n\n{origin}" if origin else size,
            usage=f"codes = tokenizer.encode(images)  # float (B, {self.in_channels}, H, W) in [0, 1] -> "
            f"int64 (B, H / {self.stride}, W / {self.stride})",
            tags=("vector-quantization", "image-tokenizer", "peco"),
        )

    def export_onnx(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `encoder.onnx` and `decoder.onnx`; see `pecobook.models.onnx`. Raises PecobookError."""
        from pecobook.models.onnx import export_onnx

        return export_onnx(self, folder)


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """`function` of rows (N, ...) on any device, `batch_size` of them at a time on `device`; back where rows are."""
    if exporting():  # the number of rows stays open
        return function(rows)
    parts = [function(part.to(device)) for part in torch.split(rows, batch_size)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(rows.device)


# Statistics that only training reads: an export holds the codebook alone.
TRAINING_ONLY = frozenset(
    f"quantizer.{name}" for name in ("ema_count", "ema_sum", "idle", "usage", "unused", "num_updates", "num_revived")
)


def build_autoencoder(config: AutoencoderConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the kind that `config` names."""
    if config.kind == "vit":
        return ViTEncoder(config), ViTDecoder(config)
    return Encoder(config), Decoder(config)
