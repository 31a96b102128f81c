"""The perceptual tokenizer: encoder, codebook and decoder, with saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.autoencoder import Decoder, Encoder
from pecobook.models.control_quantizers import ControlQuantizer, build_quantizer
from pecobook.models.export import Card, Exported
from pecobook.models.quantizer import VectorQuantizer
from pecobook.models.snippets import TO_GREY, quoted, read_image_call
from pecobook.models.vit_autoencoder import ViTDecoder, ViTEncoder
from pecobook.settings.changes import complete
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig, VectorQuantizerConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.devices import exporting
from pecobook.utils.images import as_images, check_shape


class PerceptualTokenizer(Exported):
    """Encodes images as codes and decodes codes to images.

    Args:
        config: architecture of the encoder and the decoder, and size of the codebook.
        quantizer: the codebook; None builds one with the default settings.
    """

    kind = "tokenizer"
    trained_by = "codebook"

    def __init__(self, config: TokenizerConfig, quantizer: VectorQuantizer | ControlQuantizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_autoencoder(config.model, config.features)
        if quantizer is None:
            codes = {"num_codewords": config.num_codewords, "kind": config.quantizer, "levels": config.levels}
            quantizer = build_quantizer(replace(VectorQuantizerConfig(), codes), config.model.latent_dim)
        self.quantizer = quantizer

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
        """Number of channels of the images."""
        return self.config.model.in_channels

    @property
    def predicts(self) -> str:
        """What the decoder predicts instead of pixels, in words; empty for a tokenizer that draws images."""
        return f"features of {self.config.teacher}" if self.config.features else ""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        return next(self.encoder.parameters())

    @property
    def stride(self) -> int:
        """Side of the image patch that one token represents, in pixels."""
        return self.config.model.stride

    @property
    def image_size(self) -> int:
        """Side of the training images, in pixels."""
        return self.config.image_size

    def encode_latents(self, images: Tensor) -> Tensor:
        """Return the encoder output before quantisation: float (B, C, H, W) in [0, 1] to (B, D, h, w)."""
        check_shape(images, (self.in_channels,), self.stride)
        return self.encoder((images * 2 - 1).to(self.dtype))  # type: ignore[no-any-return]

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Return the decoder output, not clamped: (B, D, h, w) to (B, C, H, W), about [0, 1], or to features."""
        if self.config.features:
            return self.decoder(quantized)  # type: ignore[no-any-return]
        return (self.decoder(quantized) + 1) / 2  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch_size: int = 256, check: bool = True) -> Tensor:
        """Encode images: float (B, C, H, W) in [0, 1] to codes int64 (B, H / f, W / f), with stride f.

        Args:
            images: on any device; the codes are returned on the same device. uint8 in 0..255 and half-precision floats
                are accepted too.
            batch_size: number of images encoded at a time on the tokenizer's device.
            check: also check the values, which waits for a GPU.

        Raises:
            ValueError: the shape is not (B, C, H, W), a side is not a multiple of the stride f, or the values are not
                images in [0, 1].
        """
        images = as_images(images, (self.in_channels,), self.stride, check=check)
        return apply_in_batches(self._encode, images, batch_size, self._weight.device)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, batch_size: int = 256) -> Tensor:
        """Decode codes int64 (B, h, w) to images, float (B, C, h f, w f) in [0, 1].

        Args:
            codes: on any device, of any integer type; the images are returned on the same device.
            batch_size: number of images decoded at a time on the tokenizer's device.

        Raises:
            ValueError: the shape is not (B, h, w), or the values are not codes in [0, K).
            WeightsError: the decoder predicts features, not pixels.
        """
        require_pixels(self, "This tokenizer", "decode codes to images: use features_of(codes)")
        codes = as_codes(codes, self.num_codewords)
        return apply_in_batches(self._decode, codes, batch_size, self._weight.device)

    @torch.no_grad()
    def features_of(self, codes: Tensor, *, batch_size: int = 256) -> Tensor:
        """Return the features that the decoder predicts for codes int64 (B, h, w): float (B, F, h, w).

        Their direction at each position matches the network's features; their length has no meaning.

        Raises:
            ValueError: as in `decode`.
            WeightsError: the decoder draws images.
        """
        if not self.config.features:
            raise WeightsError("This tokenizer draws images and predicts no features: use decode(codes).")
        codes = as_codes(codes, self.num_codewords)
        return apply_in_batches(self._features, codes, batch_size, self._weight.device)

    def _features(self, codes: Tensor) -> Tensor:
        return self.decode_latents(self.quantizer.lookup(codes)).float()

    def _encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.encode_latents(images))

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decode_latents(self.quantizer.lookup(codes)).float().clamp(0, 1)

    # ------------------------------------------------------------------------------------------------ saving, loading

    def settings(self) -> dict[str, Any]:
        """Return `config` as JSON values; as in earlier exports, the quantizer `ema` is not named."""
        settings = to_dict(self.config)
        if settings["quantizer"] == "ema":
            del settings["quantizer"], settings["levels"]
        if not settings["features"]:
            del settings["features"], settings["teacher"]
        return settings

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the tokenizer that `settings` describes, with random weights. Raises ConfigError."""
        return cls(replace(TokenizerConfig(), complete(settings, to_dict(TokenizerConfig()))))

    @classmethod
    def is_exported(cls, name: str) -> bool:
        """Return whether an export includes the weight of this name: all but the buffers that only training reads."""
        return name not in TRAINING_ONLY_BUFFERS

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str = "") -> Self:
        """Load as `Exported.from_pretrained` does; the tokenizer's parameters take no gradient."""
        return super().from_pretrained(source, revision=revision).requires_grad_(False)

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the tokenizer; `source` is a folder or a repository on the Hugging Face hub."""
        grey, sides = TO_GREY if self.in_channels == 1 else "", f"H / {self.stride}, W / {self.stride}"
        return f"""\
from pecobook import PerceptualTokenizer, read_image

tokenizer = PerceptualTokenizer.from_pretrained({quoted(source)})
images = {read_image_call(self.value_range, self.image_size)}[None] / 255  # the central square
{grey}codes = tokenizer.encode(images)  # float (B, C, H, W) in [0, 1] -> int64 (B, {sides})
print(codes)"""

    def card(self, origin: str) -> Card:
        """Return the model card: sizes, and how the tokenizer was trained."""
        size = (
            f"{self.num_codewords} codewords of dimension {self.config.model.latent_dim}; "
            f"one token for {self.stride} x {self.stride} pixels; trained at {self.image_size} pixels."
        )
        size += f" Its decoder predicts {self.predicts}, not pixels." if self.predicts else ""
        return Card(
            title="A perceptual tokenizer",
            text=f"{size}\n\n{origin}" if origin else size,
            tags=("vector-quantization", "image-tokenizer", "peco"),
        )

    def export_onnx(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `encoder.onnx` and `decoder.onnx`. See `pecobook.models.onnx`. Raises PecobookError."""
        from pecobook.models.onnx import export_onnx

        return export_onnx(self, folder)


def as_codes(codes: Any, num_codewords: int) -> Tensor:
    """Return codes as int64 (B, h, w). Raises ValueError for another shape, floats, or values outside [0, K)."""
    if not isinstance(codes, Tensor):
        raise ValueError(
            f"Codes must be a tensor (B, h, w), not {type(codes).__name__}: torch.as_tensor converts them."
        )
    if codes.ndim != 3:
        remedy = ": for one image give codes[None], for rows of codes codes.view(B, h, w)" if codes.ndim == 2 else ""
        raise ValueError(f"Codes must have the shape (B, h, w), not {tuple(codes.shape)}{remedy}.")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"Codes must be integers, not {codes.dtype}.")
    numbers: Tensor = codes.long()
    if not exporting() and not torch.compiler.is_compiling() and numbers.numel() and not numbers.is_meta:
        low, high = (int(value) for value in numbers.aminmax())
        if low < 0 or high >= num_codewords:
            raise ValueError(f"Codes must lie in [0, {num_codewords}), not in [{low}, {high}].")
    return numbers


def apply_in_batches(
    function: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Apply `function` to rows (N, ...) in batches of `batch_size` on `device`.

    The rows may be on any device, and the result is returned on it.
    """
    if exporting():  # the number of rows stays dynamic
        return function(rows)
    outputs = [function(batch.to(device)) for batch in torch.split(rows, batch_size)]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(rows.device)


class ForeignTokenizer(nn.Module):
    """The common part of third-party tokenizers: `encode` and `decode`, a few RGB images at a time.

    Subclasses have `codebook`, `num_codewords` and `stride`, and process one batch in `_encode` and `_decode`.
    """

    @torch.no_grad()
    def encode(self: Any, images: Tensor, *, batch_size: int = 64, check: bool = True) -> Tensor:
        """Encode images: float (B, 3, H, W) in [0, 1] to codes int64 (B, H / f, W / f), with stride f.

        Raises:
            ValueError: as in `PerceptualTokenizer.encode`.
        """
        images = as_images(images, (3,), self.stride, check=check)
        encoded: Tensor = apply_in_batches(self._encode, images, batch_size, self.codebook.device)
        return encoded

    @torch.no_grad()
    def decode(self: Any, codes: Tensor, *, batch_size: int = 64) -> Tensor:
        """Decode codes int64 (B, h, w) to images, float (B, 3, h f, w f) in [0, 1].

        Raises:
            WeightsError: the tokenizer does not decode to pixels.
        """
        require_pixels(self, "This tokenizer", "decode codes to images")
        decoded: Tensor = apply_in_batches(
            self._decode, as_codes(codes, self.num_codewords), batch_size, self.codebook.device
        )
        return decoded


# Statistics of the quantizer that only training reads. Exports omit them: they contain only the codebook.
TRAINING_ONLY_BUFFERS = frozenset(
    f"quantizer.{name}" for name in ("ema_count", "ema_sum", "idle", "usage", "unused", "num_updates", "num_revived")
)


def build_autoencoder(config: AutoencoderConfig, features: int = 0) -> tuple[nn.Module, nn.Module]:
    """Build the encoder and the decoder of type `config.kind`; the decoder draws images or predicts features."""
    if config.kind == "vit":
        return ViTEncoder(config), ViTDecoder(config, features)
    return Encoder(config), Decoder(config, features)


def require_pixels(tokenizer: Any, name: str, purpose: str) -> None:
    """Raise WeightsError if a tokenizer's decoder predicts features: "NAME predicts ... and cannot PURPOSE."."""
    if predicts := getattr(tokenizer, "predicts", ""):
        raise WeightsError(f"{name} predicts {predicts}, not pixels, and cannot {purpose}.")
