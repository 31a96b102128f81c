"""DALL-E's discrete VAE (Ramesh et al., arXiv 2102.12092, appendix A): BEiT's tokenizer and the paper's baseline.

The convolutional encoder computes 8,192 logits at an eighth of the resolution; the index of the largest logit is the
token. The decoder starts with an embedding of the tokens. The weights have the names of the public files, so that their
state dicts load unchanged.

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
from pecobook.models.tokenizer import ForeignTokenizer
from pecobook.utils.images import check_shape

_NUM_BLOCKS = 8  # four groups of two blocks; residual paths are divided by the square of this number


class DalleTokenizer(ForeignTokenizer):
    """DALL-E's tokenizer with the interface of `PerceptualTokenizer`: encodes images in [0, 1] and decodes codes.

    Args:
        width: number of channels in the first group; 256 in the published tokenizer.
        num_codewords: K; 8192 in the published tokenizer.
        embedding_dim: D, number of input channels of the decoder's first group; 128 in the published tokenizer.
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
    image_size = 112  # 14 x 14 tokens, as in BEiT

    @property
    def codebook(self) -> Tensor:
        """The decoder's embedding of each token, float (K, D)."""
        return self._decoder.input.w[:, :, 0, 0].t()

    @property
    def _decoder(self) -> _Stack:
        return cast("_Stack", self.decoder[0])

    @property
    def num_codewords(self) -> int:
        """K."""
        return len(self.codebook)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of all codewords: float (B, 3, H, W) in [0, 1] to (B, K, H / 8, W / 8)."""
        check_shape(images, (3,), self.stride)
        encoder = cast("_Stack", self.encoder[0])
        x = encoder.input(0.8 * images + 0.1)  # DALL-E maps pixels from [0, 1] to [0.1, 0.9]
        for number, group in enumerate(encoder.groups()):
            x = group(x)
            x = F.max_pool2d(x, 2) if number < 3 else x
        return encoder.output(x)  # type: ignore[no-any-return]

    def _encode(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1)

    def _decode(self, codes: Tensor) -> Tensor:
        # This equals a 1 x 1 convolution of a one-hot map, without building the map.
        x = F.embedding(codes, self.codebook).permute(0, 3, 1, 2) + self._decoder.input.b[:, None, None]
        for number, group in enumerate(self._decoder.groups()):
            x = group(x)
            x = F.interpolate(x, scale_factor=2, mode="nearest") if number < 3 else x
        mean = self._decoder.output(x)[:, :3]  # the other three channels are the scale
        return ((torch.sigmoid(mean.float()) - 0.1) / 0.8).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DalleTokenizer:
        """Load `encoder` and `decoder` from a folder: plain state dicts as .safetensors, .pt or .pth files.

        The public `encoder.pkl` and `decoder.pkl` are complete pickled modules; their weights are read without running
        any code that such files can contain.

        Raises:
            WeightsError: a file is missing, is not a plain state dict, or does not fit the network.
        """
        states = {}
        for part in ("encoder", "decoder"):
            candidates = [Path(folder) / f"{part}{suffix}" for suffix in (".safetensors", ".pt", ".pth", ".pkl")]
            files = [file for file in candidates if file.is_file()]
            if not files:
                raise WeightsError(
                    f"'{folder}' contains no {part}.pkl of DALL-E's tokenizer, nor .safetensors, .pt or .pth.\n"
                    f"Download it from https://cdn.openai.com/dall-e/{part}.pkl."
                )
            states[part] = read_weights(str(files[0]))
        try:
            K, width = states["encoder"]["blocks.output.conv.w"].shape[:2]
            embedding_dim = len(states["decoder"]["blocks.input.w"])
        except KeyError as error:
            raise WeightsError(f"'{folder}' contains no weights of DALL-E's tokenizer: {error} is missing.") from None
        tokenizer = cls(width // 8, K, embedding_dim)
        for part, state in states.items():
            load_state(getattr(tokenizer, part), state, source=f"{folder}/{part}")
        return tokenizer.eval().requires_grad_(False)


class _Conv(nn.Module):
    """A convolution with an odd kernel side that keeps the image size; its parameters are named w and b."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        std = 1 / math.sqrt(in_channels * side**2)
        self.w = nn.Parameter(torch.randn(out_channels, in_channels, side, side) * std)
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """A residual block: a bottleneck of four convolutions and a shortcut, a 1 x 1 convolution if the widths differ."""

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
    """An encoder or decoder: `input`, then `group_1` to `group_4` of two blocks each, then `output`.

    Args:
        first: input convolution.
        widths: five numbers of channels: at the input, then after each group.
        last: output convolution.
        sides: kernel sides of the four convolutions of a block.
    """

    def __init__(self, first: _Conv, widths: list[int], last: _Conv, sides: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.input = first
        for number in range(1, 5):
            width_in, width_out = widths[number - 1 : number + 1]
            blocks: OrderedDict[str, nn.Module] = OrderedDict(
                block_1=_Block(width_in, width_out, sides), block_2=_Block(width_out, width_out, sides)
            )
            self.add_module(f"group_{number}", nn.Sequential(blocks))
        self.output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))

    def groups(self) -> list[nn.Module]:
        return [self.get_submodule(f"group_{number}") for number in range(1, 5)]
