"""DALL-E's discrete VAE, BEiT's tokenizer and the paper's baseline (Ramesh et al., arXiv 2102.12092, appendix A).

Convolutional encoder to 8,192 logits at an eighth of the resolution, whose largest is the token; a decoder that begins
with the token's embedding. Names of weights are those of the public files, so that their state dicts load as they are.

B batch, h w latent grid.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.checkpoints import load_state, read_weights
from pecobook.models.tokenizer import apply_in_batches

_NUM_BLOCKS = 8  # four groups of two; the residual paths are scaled by its square


class DalleTokenizer(nn.Module):
    """DALL-E's tokenizer, as `PerceptualTokenizer` is one: images in [0, 1] to codes and back.

    Args:
        width: channels of the first group; the published one has 256.
        num_codewords: K; the published one has 8192.
        embedding: D, the decoder's first width; 128.
    """

    def __init__(self, width: int = 256, num_codewords: int = 8192, embedding_dim: int = 128) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        encoder = _Stack(_Conv(3, width, 7), [width, *widths], _Conv(widths[-1], num_codewords, 1), (3, 3, 3, 1))
        first = _Conv(num_codewords, embedding_dim, 1)
        decoder = _Stack(first, [embedding_dim, *widths[::-1]], _Conv(width, 6, 1), (1, 3, 3, 3))
        self.encoder = nn.Sequential(OrderedDict(blocks=encoder))
        self.decoder = nn.Sequential(OrderedDict(blocks=decoder))

    stride = 8
    image_size = 112  # 14 x 14 tokens, as BEiT uses it

    @property
    def codebook(self) -> Tensor:
        """What a token stands for: the decoder's embedding of it, float (K, D)."""
        return self._decoder.input.w[:, :, 0, 0].t()

    @property
    def _decoder(self) -> _Stack:
        return cast("_Stack", self.decoder[0])

    @property
    def num_codewords(self) -> int:
        """K."""
        return len(self.codebook)

    def logits(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] to (B, K, H / 8, W / 8)."""
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"Images must be multiples of {self.stride} pixels, not {height} x {width}.")
        encoder = cast("_Stack", self.encoder[0])
        x = encoder.input(0.8 * images + 0.1)  # its pixels stay away from 0 and 1
        for number, group in enumerate(encoder.groups()):
            x = group(x)
            x = F.max_pool2d(x, 2) if number < 3 else x
        return encoder.output(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Codes of float (B, 3, H, W) in [0, 1]: int64 (B, H / 8, W / 8).

        Raises:
            ValueError: a side is no multiple of 8.
        """
        return apply_in_batches(lambda part: self.logits(part).argmax(1), images, batch_size, self.codebook.device)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, batch_size: int = 64) -> Tensor:
        """Images of codes int64 (B, h, w): float (B, 3, 8 h, 8 w) in [0, 1]."""
        return apply_in_batches(self._decode, codes, batch_size, self.codebook.device)

    def _decode(self, codes: Tensor) -> Tensor:
        # The 1 x 1 convolution of a one-hot map, without the map.
        x = F.embedding(codes, self.codebook).permute(0, 3, 1, 2) + self._decoder.input.b[:, None, None]
        for number, group in enumerate(self._decoder.groups()):
            x = group(x)
            x = F.interpolate(x, scale_factor=2, mode="nearest") if number < 3 else x
        mean = self._decoder.output(x)[:, :3]  # the other three tell its spread
        return ((torch.sigmoid(mean.float()) - 0.1) / 0.8).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DalleTokenizer:
        """Load `encoder` and `decoder` (.safetensors, .pt or .pth: plain state dicts) from a folder.

        The public `encoder.pkl` and `decoder.pkl` are whole pickled modules, which can run code when they are read;
        pecobook does not read them. Convert each once, in a place you trust, where the package `dall_e` is installed:
        `torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "encoder.pt")`.

        Raises:
            WeightsError: a file is missing, no plain state dict, or does not fit.
        """
        states = {}
        for part in ("encoder", "decoder"):
            found = [Path(folder) / f"{part}{suffix}" for suffix in (".safetensors", ".pt", ".pth")]
            files = [file for file in found if file.is_file()]
            if not files:
                raise WeightsError(
                    f"'{folder}' holds no {part}.safetensors, {part}.pt or {part}.pth of DALL-E's tokenizer.\n"
                    f"Of the public {part}.pkl make one, once, where you trust it and the package dall_e is installed: "
                    f'torch.save(torch.load("{part}.pkl", weights_only=False).state_dict(), "{part}.pt")'
                )
            states[part] = read_weights(str(files[0]))
        try:
            K, width = states["encoder"]["blocks.output.conv.w"].shape[:2]
            shape = {"width": width // 8, "num_codewords": K, "embedding": len(states["decoder"]["blocks.input.w"])}
        except KeyError as error:
            raise WeightsError(f"'{folder}' holds no weights of DALL-E's tokenizer: {error} is missing.") from None
        tokenizer = cls(**shape)
        for part, state in states.items():
            load_state(getattr(tokenizer, part), state, source=f"{folder}/{part}")
        return tokenizer.eval().requires_grad_(False)


class _Conv(nn.Module):
    """A convolution of odd side that keeps the size, its weights named w and b."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        deviation = 1 / math.sqrt(in_channels * side**2)
        self.w = nn.Parameter(torch.randn(out_channels, in_channels, side, side) * deviation)
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """A skip path, a 1 x 1 convolution where widths differ, and a bottleneck of four convolutions."""

    def __init__(self, in_channels: int, out_channels: int, sides: tuple[int, int, int, int]) -> None:
        super().__init__()
        hidden = out_channels // 4
        widths = [in_channels, hidden, hidden, hidden, out_channels]
        self.id_path = _Conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for number, side in enumerate(sides, start=1):
            path[f"relu_{number}"] = nn.ReLU()
            path[f"conv_{number}"] = _Conv(widths[number - 1], widths[number], side)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.res_path(x) / _NUM_BLOCKS**2  # type: ignore[no-any-return]


class _Stack(nn.Module):
    """`input`, `group_1` to `group_4` of two blocks each, `output`; widths has five numbers."""

    def __init__(self, first: _Conv, widths: list[int], last: _Conv, sides: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.input = first
        for number in range(1, 5):
            before, width = widths[number - 1 : number + 1]
            blocks: OrderedDict[str, nn.Module] = OrderedDict(
                block_1=_Block(before, width, sides), block_2=_Block(width, width, sides)
            )
            self.add_module(f"group_{number}", nn.Sequential(blocks))
        self.output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))

    def groups(self) -> list[nn.Module]:
        return [self.get_submodule(f"group_{number}") for number in range(1, 5)]
