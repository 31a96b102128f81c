"""Loads any tokenizer by name and gives it a common interface: pecobook's, DALL-E's, diffusers', 4M's and VQGANs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import WeightsError, first_line
from pecobook.models.given_networks import GivenTokenizer
from pecobook.models.nearest import nearest_codeword
from pecobook.models.public_tokenizers import LAYOUTS, load_public_model
from pecobook.models.tokenizer import TRAINING_ONLY_BUFFERS, ForeignTokenizer, PerceptualTokenizer
from pecobook.utils.given import given
from pecobook.utils.images import as_images

FOREIGN = ("dalle", "diffusers", "fourm", *LAYOUTS)
"""The prefixes, before the colon, of the names of third-party tokenizers."""


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer.

    Args:
        source: a codebook run, an export folder or `owner/name` on the hub; `dalle:FOLDER` for DALL-E's discrete VAE;
            `diffusers:FOLDER` or `diffusers:owner/name` for a diffusers VQModel; `taming:FILE` or `llamagen:FILE` for a
            public checkpoint of taming-transformers' VQGAN or of LlamaGen's VQ, `fourm:FILE` for one of 4M's.

    Returns:
        an nn.Module in evaluation mode with the methods `encode` (float (B, 3, H, W) in [0, 1] to int64 (B, H / f, W /
        f)) and `decode` (the inverse), and the attributes `codebook` (K, D), `num_codewords` K, `stride` f and
        `image_size`, the side of the training images. Both methods accept tensors on any device and take `batch_size`,
        the number of images processed at a time on the tokenizer's device; with `check=False`, `encode` does not check
        the values of the images, which would wait for a GPU.

    Raises:
        WeightsError: the tokenizer is missing or damaged, or `source` is not a tokenizer.
    """
    kind, _, location = str(source).partition(":")
    if (module := given("tokenizer", str(source))) is not None:
        return GivenTokenizer(module)
    if kind == "dalle":
        from pecobook.models.dalle import DalleTokenizer

        return DalleTokenizer.from_pretrained(location)
    if kind == "diffusers":
        return DiffusersTokenizer.from_pretrained(location)
    if kind == "fourm":
        from pecobook.models.fourm import FourMTokenizer

        return FourMTokenizer.from_pretrained(location)
    if kind in LAYOUTS:
        return DiffusersTokenizer(load_public_model(kind, location)).eval().requires_grad_(False)
    tokenizer = PerceptualTokenizer.from_pretrained(source)
    return tokenizer if tokenizer.in_channels == 3 else GreyTokenizer(tokenizer).eval().requires_grad_(False)


class GreyTokenizer(nn.Module):
    """Gives a tokenizer of grey images an RGB interface: encodes the luma of RGB images, decodes to grey RGB images.

    Args:
        tokenizer: a tokenizer with 1 channel.

    Raises:
        WeightsError: the tokenizer has more than 1 channel.
    """

    def __init__(self, tokenizer: PerceptualTokenizer) -> None:
        super().__init__()
        if tokenizer.in_channels != 1:
            raise WeightsError(f"Images are read as RGB or grey; this tokenizer has {tokenizer.in_channels} channels.")
        self.tokenizer = tokenizer
        self.num_codewords, self.stride = tokenizer.num_codewords, tokenizer.stride
        self.image_size, self.value_range = tokenizer.image_size, tokenizer.value_range
        self.predicts = tokenizer.predicts

    @property
    def codebook(self) -> Tensor:
        """Codewords, float (K, D)."""
        return self.tokenizer.codebook

    def encode(self, images: Tensor, *, batch_size: int = 256, check: bool = True) -> Tensor:
        """Encode images: float (B, 3, H, W) in [0, 1] to codes int64 (B, H / f, W / f)."""
        from torchvision.transforms.functional import rgb_to_grayscale  # as in training

        images = as_images(images, (3,), self.stride, check=check)
        return self.tokenizer.encode(rgb_to_grayscale(images), batch_size=batch_size, check=False)

    def decode(self, codes: Tensor, *, batch_size: int = 256) -> Tensor:
        """Decode codes int64 (B, h, w) to images, float (B, 3, h f, w f) in [0, 1], with three equal channels."""
        return self.tokenizer.decode(codes, batch_size=batch_size).expand(-1, 3, -1, -1)


def fingerprint(tokenizer: nn.Module) -> str:
    """Return a hash of the tokenizer's weights, 16 hexadecimal digits, without the buffers that only training reads."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        if name not in TRAINING_ONLY_BUFFERS:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()[:16]


class DiffusersTokenizer(ForeignTokenizer):
    """A diffusers VQModel, such as the VQGANs of latent diffusion, taming-transformers and LlamaGen.

    Args:
        model: the diffusers model; its images are RGB in [-1, 1], those of aMUSEd's in [0, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        # Of the settings in diffusers' files, this one alone tells aMUSEd's models from the others.
        is_amused = getattr(self.model.config, "lookup_from_codebook", False)
        self.scale, self.shift = (1, 0) if is_amused else (2, -1)

    @property
    def codebook(self) -> Tensor:
        """Codewords, float (K, D)."""
        return self.model.quantize.embedding.weight  # type: ignore[no-any-return]

    @property
    def num_codewords(self) -> int:
        """K."""
        return len(self.codebook)

    @property
    def stride(self) -> int:
        """Side of the image patch that one token represents, in pixels."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def image_size(self) -> int:
        """Side of the training images, in pixels."""
        return int(self.model.config.sample_size)

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images * self.scale + self.shift).latents  # (B, D, h, w)
        B, D, h, w = latents.shape
        return nearest_codeword(latents.permute(0, 2, 3, 1).reshape(-1, D), self.codebook).view(B, h, w)

    def _decode(self, codes: Tensor) -> Tensor:
        codewords = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        spatial = self.model.config.norm_type == "spatial"  # MoVQ's decoder also takes the codewords themselves
        images = self.model.decoder(self.model.post_quant_conv(codewords), codewords if spatial else None)
        return cast("Tensor", ((images.float() - self.shift) / self.scale).clamp(0, 1))

    @classmethod
    def from_pretrained(cls, source: str) -> DiffusersTokenizer:
        """Load a VQModel from a folder or from `owner/name` on the hub, or from a subfolder.

        The subfolders `vqvae`, `vqmodel` and `movq` are tried in this order.

        Raises:
            WeightsError: diffusers is not installed, or finds no VQModel there.
        """
        try:
            from diffusers import VQModel
        except ImportError:
            raise WeightsError(
                "Tokenizers of diffusers need the package diffusers: pip install 'pecobook[diffusers]'."
            ) from None
        load: Any = VQModel.from_pretrained
        first_error: Exception | None = None
        for subfolder in (None, "vqvae", "vqmodel", "movq"):
            try:
                return cls(load(source, subfolder=subfolder, low_cpu_mem_usage=False)).eval().requires_grad_(False)
            except (OSError, ValueError) as error:
                first_error = first_error or error
        raise WeightsError(f"diffusers finds no VQModel at '{source}' ({first_line(first_error or ValueError())}).")
