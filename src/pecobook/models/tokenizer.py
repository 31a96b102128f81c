"""The tokenizer: encoder, codebook and decoder, and how it is saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, first_line
from pecobook.models.autoencoder import Decoder, Encoder
from pecobook.models.nearest import nearest_codeword
from pecobook.models.quantizer import VectorQuantizer
from pecobook.models.vit_autoencoder import ViTDecoder, ViTEncoder
from pecobook.models.weights import read_export, write_export
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.devices import exporting

_CARD = """---
library_name: pecobook
tags: [vector-quantization, image-tokenizer, peco]
---
# A perceptual tokenizer

{codewords} codewords of dimension {dim}; one token for {stride} x {stride} pixels; trained at {size} pixels.
{origin}
```python
from pecobook import PerceptualTokenizer
tokenizer = PerceptualTokenizer.from_pretrained("{path}")
codes = tokenizer.encode(images)  # float (B, {channels}, H, W) in [0, 1] -> int64 (B, H / {stride}, W / {stride})
```
"""


class PerceptualTokenizer(nn.Module):
    """Images to codes and back.

    Args:
        config: its shape.
        quantizer: the codebook; None makes one with the default settings.
    """

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

    def save_pretrained(self, folder: str | Path, *, shown_path: str = "path/to/this/folder", origin: str = "") -> None:
        """Write `model.safetensors`, `config.json` and a model card.

        The card's example loads from `shown_path`, and `origin` is a paragraph on how it was trained.
        """
        state = {name: value for name, value in self.state_dict().items() if name not in TRAINING_ONLY}
        card = _CARD.format(
            codewords=self.config.num_codewords,
            dim=self.config.model.latent_dim,
            stride=self.stride,
            size=self.image_size,
            path=shown_path,
            channels=self.in_channels,
            origin=f"\n{origin}\n" if origin else "",
        )
        write_export(Path(folder), {"kind": "tokenizer", **to_dict(self.config)}, state, card)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> PerceptualTokenizer:
        """Load from a run folder, an export folder, or `owner/name` on the Hugging Face hub; in evaluation mode.

        Raises:
            WeightsError: there is none, it is damaged, or it is not a tokenizer.
        """
        folder = Path(source)
        if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/")):
            folder = _download(str(source))
        config, state = read_export(folder)
        if config.pop("kind", None) != "tokenizer":
            raise WeightsError(f"'{source}' is not a tokenizer: give the folder of a codebook run.")
        try:
            tokenizer = cls(replace(TokenizerConfig(), config))
            missing, unknown = tokenizer.load_state_dict(state, strict=False)
        except (ConfigError, RuntimeError) as error:
            raise WeightsError(f"The tokenizer in '{source}' is damaged: {error}") from None
        if unknown or set(missing) - TRAINING_ONLY:
            raise WeightsError(
                f"The tokenizer in '{source}' is damaged: {sorted(set(missing) - TRAINING_ONLY) or unknown}"
            )
        return tokenizer.eval().requires_grad_(False)

    def export_onnx(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `encoder.onnx` and `decoder.onnx`; see `pecobook.models.onnx`. Raises PecobookError."""
        from pecobook.models.onnx import export_onnx

        return export_onnx(self, folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the Hugging Face hub as `owner/name`; returns the address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, shown_path=repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)


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


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["model.safetensors", "config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(f"There is no run '{repo_id}' here, and the hub gives none ({first_line(error)}).") from None


def build_autoencoder(config: AutoencoderConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the kind that `config` names."""
    if config.kind == "vit":
        return ViTEncoder(config), ViTDecoder(config)
    return Encoder(config), Decoder(config)
