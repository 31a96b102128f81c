"""4M's tokenizers, recognised by weight names: a ViT encoder, a codebook and, if there is one, a ViT decoder.

4M (arXiv 2312.06647, 2406.09406) draws images with a pixel decoder or, in its published tokenizer for RGB images, with
a diffusion model. Only the encoder and the codebook of the latter are read: it gives codes, but cannot draw. The shape
of the network is inferred from the weights.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import load_state, read_checkpoint
from pecobook.models.nearest import nearest_codeword
from pecobook.models.public_tokenizers import weights_file
from pecobook.models.tokenizer import ForeignTokenizer

_HEAD = 64  # channels of an attention head, in all of 4M's sizes
_NORM = partial(nn.LayerNorm, eps=1e-6)
_CONVNEXT = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}


class _Transformer(nn.Module):
    """Blocks of a ViT with positions, and an MLP with tanh after them if the weights have one."""

    def __init__(self, state: dict[str, Tensor], side: str) -> None:
        super().__init__()
        _, width, rows, columns = state[f"{side}.pos_emb"].shape
        blocks = {int(name.split(".")[2]) for name in state if name.startswith(f"{side}.blocks.")}
        self.pos_emb = nn.Parameter(torch.zeros(1, width, rows, columns))
        ratio = state[f"{side}.blocks.0.mlp.fc1.weight"].shape[0] / width
        self.blocks = nn.Sequential(
            *(Block(width, width // _HEAD, mlp_ratio=ratio, qkv_bias=True, norm_layer=_NORM) for _ in blocks)
        )
        self.has_mlp = f"{side}.norm_mlp.weight" in state
        if self.has_mlp:
            self.norm_mlp = _NORM(width)
            self.post_mlp = Mlp(width, state[f"{side}.post_mlp.fc1.weight"].shape[0], act_layer=nn.Tanh)

    def transform(self, x: Tensor) -> Tensor:
        """Transform tokens (B, W, h, w) to (B, W, h, w)."""
        positions = F.interpolate(self.pos_emb, size=x.shape[-2:], mode="bicubic", align_corners=False)
        tokens = self.blocks((x + positions).flatten(2).transpose(1, 2))  # (B, h w, W)
        if self.has_mlp:
            tokens = tokens + self.post_mlp(self.norm_mlp(tokens))
        return cast("Tensor", tokens.transpose(1, 2).reshape(x.shape))


class _Encoder(_Transformer):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state, "encoder")
        width, channels, patch, _ = state["encoder.proj.weight"].shape
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to features (B, W, h, w)."""
        return self.transform(self.proj(images))


class _Decoder(_Transformer):
    def __init__(self, state: dict[str, Tensor], patch: int) -> None:
        super().__init__(state, "decoder")
        self.patch = patch
        self.out_proj = nn.Linear(self.pos_emb.shape[1], 3 * patch * patch)
        self.out_conv = nn.Sequential()
        if "decoder.out_conv.0.conv_dw.weight" in state:  # smooths the borders of patches
            self.out_conv = nn.Sequential(ConvNeXtBlock(3), ConvNeXtBlock(3))

    def forward(self, x: Tensor) -> Tensor:
        """Decode features (B, W, h, w) to images (B, 3, h P, w P) in [-1, 1]."""
        pixels = self.out_proj(self.transform(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3 P^2, h, w)
        return cast("Tensor", self.out_conv(F.pixel_shuffle(pixels, self.patch)))


class FourMTokenizer(ForeignTokenizer):
    """A 4M tokenizer for RGB images.

    Args:
        state: the weights, as `_state` returns them.
        by_direction: whether codewords are chosen by cosine rather than by distance.

    Raises:
        KeyError: a weight that determines a shape is missing.
    """

    codebook: Tensor
    """Codewords, float (K, D)."""

    def __init__(self, state: dict[str, Tensor], *, by_direction: bool) -> None:
        super().__init__()
        self.by_direction = by_direction
        self.encoder = _Encoder(state)
        self.stride = state["encoder.proj.weight"].shape[-1]
        self.image_size = self.encoder.pos_emb.shape[-1] * self.stride
        self.num_codewords, dim = state["codebook"].shape
        self.quant_proj = nn.Conv2d(state["encoder.proj.weight"].shape[0], dim, 1)
        self.register_buffer("codebook", torch.zeros(self.num_codewords, dim))
        self.predicts = "" if "decoder.out_proj.weight" in state else "the condition of a diffusion model"
        """What is predicted instead of pixels."""
        if not self.predicts:
            self.decoder = _Decoder(state, self.stride)
            self.post_quant_proj = nn.Conv2d(dim, self.decoder.pos_emb.shape[1], 1)

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.quant_proj(self.encoder(images * 2 - 1)).float()  # (B, D, h, w)
        B, D, h, w = latents.shape
        # The nearest unit vector does not depend on the length of the latent vector.
        codewords = F.normalize(self.codebook, dim=1) if self.by_direction else self.codebook
        return nearest_codeword(latents.permute(0, 2, 3, 1).reshape(-1, D), codewords).view(B, h, w)

    def _decode(self, codes: Tensor) -> Tensor:
        codewords = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        return cast("Tensor", (self.decoder(self.post_quant_proj(codewords)).float() + 1) / 2).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> FourMTokenizer:
        """Load a weights file, or the one in a folder.

        Raises:
            WeightsError: the file is missing or damaged, or is not a 4M tokenizer for RGB images.
        """
        file = weights_file("fourm", str(source))
        weights = read_checkpoint(str(file)).state
        state = _state(weights, file)
        try:  # 4M's codebook by distance also holds averages, the one by direction does not
            tokenizer = cls(state, by_direction="quantize._codebook.embed_avg" not in weights)
        except (KeyError, IndexError, ValueError) as error:
            raise WeightsError(f"The weights of '{file}' are no tokenizer of 4M: {error}.") from None
        load_state(tokenizer, state, source=str(file))
        return tokenizer.eval().requires_grad_(False)


def _state(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the weights to use: codewords as `codebook`, ConvNeXt blocks under timm's names. Raises WeightsError."""
    codewords = weights.get("quantize._codebook.embed")
    first = weights.get("encoder.proj.weight")
    if codewords is None or first is None or "encoder.pos_emb" not in weights:
        raise WeightsError(
            f"'{file}' is no tokenizer of 4M with a ViT as encoder: an encoder or a codebook is missing."
        )
    if "cls_emb.weight" in weights or first.shape[1] != 3 or first.shape[-1] == 1:
        what = "classes" if "cls_emb.weight" in weights else f"{first.shape[1]} channels, patches of {first.shape[-1]}"
        raise WeightsError(f"'{file}' is a tokenizer of 4M for another kind of input ({what}), not for RGB images.")
    if "quantize.project_in.weight" in weights:
        raise WeightsError(f"'{file}' has several codes a patch; only tokenizers with one are read.")
    parts: tuple[str, ...] = ("encoder.", "quant_proj.")
    if "decoder.out_proj.weight" in weights:
        parts = (*parts, "decoder.", "post_quant_proj.")
    kept = {_in_timm(name): value for name, value in weights.items() if name.startswith(parts)}
    return {**kept, "codebook": codewords}


def _in_timm(name: str) -> str:
    """Return the timm name of a ConvNeXt block's weight; other names stay."""
    match = re.fullmatch(r"(decoder\.out_conv\.\d+)\.(\w+)(.*)", name)
    return name if match is None else f"{match[1]}.{_CONVNEXT.get(match[2], match[2])}{match[3]}"
