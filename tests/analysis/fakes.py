"""A tokenizer and a masked model that are so simple that their correct output is known."""

import torch
from torch import Tensor, nn


class GreyTokenizer(nn.Module):
    """Encodes each patch of `stride` pixels as one of K grey levels; decoding and encoding keep the codes."""

    codebook: Tensor

    def __init__(self, levels: int = 8, stride: int = 4, image_size: int = 16) -> None:
        super().__init__()
        self.levels = self.num_codewords = levels
        self.stride, self.image_size = stride, image_size
        self.register_buffer("codebook", torch.linspace(0, 1, levels)[:, None].repeat(1, 2))
        self.modes: list[bool] = []

    def encode(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        mean = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.stride)[:, 0]
        return (mean * (self.levels - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        grey = self.codebook[codes, 0].repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)
        return grey[:, None].expand(-1, 3, -1, -1).contiguous()


class Oracle(nn.Module):
    """Predicts the correct code plus `shift`."""

    def __init__(self, tokenizer: GreyTokenizer, shift: int = 0) -> None:
        super().__init__()
        self.tokenizer, self.shift = tokenizer, shift

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        answer = (self.tokenizer.encode(images)[mask] + self.shift) % self.tokenizer.levels
        return torch.nn.functional.one_hot(answer, self.tokenizer.levels).float()
