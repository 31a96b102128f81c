"""Masked image modelling: a timm ViT that reads an image with patches hidden and names the hidden codes.

PeCo, equations 6 and 7: masked patches are replaced by one learnable mask token, and a K-way linear classifier reads
the last hidden vector at the masked positions. The transformer is timm's and stays timm's: the mask token takes its
place in the output of `patch_embed`, so a pre-trained backbone is a plain timm state dict.

B batch, N = h w patches, M masked patches in the whole batch, K codewords.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError


class MaskedImageModel(nn.Module):
    """A timm ViT with a mask token and a K-way head.

    Args:
        backbone: a timm vision transformer without head (`num_classes=0`), with `patch_embed`, `blocks` and
            `forward_features`.
        vocab_size: K, codewords of the tokenizer.

    Raises:
        WeightsError: the backbone is no transformer of patches.
    """

    def __init__(self, backbone: nn.Module, vocab_size: int) -> None:
        super().__init__()
        if not (hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks")):
            raise WeightsError(f"{type(backbone).__name__} has no patches to mask: choose a ViT or BEiT of timm.")
        width = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._mask: Tensor | None = None
        backbone.patch_embed.register_forward_hook(self._hide)  # type: ignore[union-attr]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.backbone.patch_embed.grid_size  # type: ignore[union-attr, misc]
        return int(rows), int(columns)

    def _hide(self, _module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        """Put the mask token where the mask is True: (B, N, D) or (B, h, w, D) to the same."""
        if self._mask is None:
            return patches
        mask = self._mask.view(*patches.shape[:-1], 1)
        return torch.where(mask, self.mask_token.to(patches.dtype), patches)

    def hidden(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Last hidden vectors of all patches, (B, N, D); no patch is hidden when `mask` is None."""
        self._mask = mask
        try:
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        finally:
            self._mask = None
        if isinstance(self.backbone.norm, nn.Identity):  # timm then keeps the last norm for after the pooling
            tokens = self.backbone.fc_norm(tokens)  # type: ignore[operator]
        return tokens[:, tokens.shape[1] - self.grid[0] * self.grid[1] :]  # type: ignore[no-any-return]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Logits at masked positions.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            mask: bool (B, h, w), True where masked.

        Returns:
            (M, K), images in order, positions row by row.
        """
        hidden = self.hidden(images, mask)  # (B, N, D)
        return self.head(hidden[mask.flatten(1)])  # type: ignore[no-any-return]


def initialise_beit(backbone: nn.Module) -> None:
    """BEiT's initialisation: truncated normals of 0.02, and block i's output projections divided by sqrt(2 i)."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for number, block in enumerate(backbone.blocks, start=1):  # type: ignore[arg-type]
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * number) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)
