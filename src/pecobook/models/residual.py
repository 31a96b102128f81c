"""The residual stream of a transformer in bf16.

Under autocast the products of a block are in bf16, but the tokens passed between blocks are in fp32: the class token
and the position table, which are fp32 weights, promote the patches, and LayerScale promotes what a block adds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError


def keep_residuals_low(blocks: Iterable[nn.Module] | None, name: str) -> None:
    """Make timm transformer blocks take, add and return tokens in bf16 whenever autocast is on.

    Args:
        blocks: the blocks of a network; None if it has none.
        name: name of the network, for the message.

    Raises:
        WeightsError: the network is not a sequence of blocks that each add the output of attention and of an MLP.
    """
    blocks = list(blocks or ())
    if not blocks or not all(hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks):
        raise WeightsError(f"--residual bf16 is for ViTs and BEiTs; '{name}' has other blocks: leave it out.")
    for block in blocks:
        block.register_forward_pre_hook(lambda _block, inputs: (_cast(inputs[0]), *inputs[1:]))
        for branch in (block.drop_path1, block.drop_path2):  # the last module of what a block adds
            branch.register_forward_hook(lambda _branch, _inputs, added: _cast(added))  # type: ignore[union-attr]


def _cast(tokens: Tensor) -> Tensor:
    return tokens.to(torch.bfloat16) if torch.is_autocast_enabled(tokens.device.type) else tokens
