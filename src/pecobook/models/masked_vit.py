"""Masked image modelling: a timm ViT reads an image with masked patches and predicts the codes of the masked patches.

PeCo, equations 6 and 7: one learnable mask token replaces the masked patches, and a K-way linear classifier predicts
each code from the last hidden vector at the masked position. The transformer is an unmodified timm network: a hook
inserts the mask token into the output of `patch_embed`, so a pre-trained backbone is a plain timm state dict.

`VisibleOnlyModel` is the accelerated training of Table 8, as in MAE: the transformer reads only the visible patches,
and the mask tokens enter in a light decoder.

B batch, N = h w patches, M masked patches per image, K codewords.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pecobook.errors import WeightsError
from pecobook.models.network_traits import has_patch_tokens
from pecobook.settings.pretrain import DecoderConfig


def masked_positions(mask: Tensor, num_masked: int) -> Tensor:
    """Return the positions of the masked patches in row-major order: bool (B, h, w) to int64 (B, M).

    Each image must have M = `num_masked` masked patches. Unlike indexing by the mask, this returns a statically known
    shape, so no step waits for the device.
    """
    return mask.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_masked]


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Select values (B, N, ...) at positions int64 (B, M). Returns (B M, ...), ordered by image."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, positions].flatten(0, 1)


class MaskedImageModel(nn.Module):
    """A timm ViT with a mask token and a K-way head.

    Args:
        backbone: a timm vision transformer without a head (`num_classes=0`), with `patch_embed`, `blocks` and
            `forward_features`.
        vocab_size: K, number of codewords of the tokenizer; for other targets, number of target values of one patch.

    Raises:
        WeightsError: the backbone is not a transformer on patches, or pools the patches with attention.
    """

    def __init__(self, backbone: nn.Module, vocab_size: int) -> None:
        super().__init__()
        check_has_patches(backbone)
        _check_no_attention_pool(backbone)
        width = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, vocab_size)
        _init_beit_normal(self.mask_token)
        _init_beit_normal(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._mask: Tensor | None = None
        backbone.patch_embed.register_forward_hook(self._insert_mask_token)  # type: ignore[union-attr]
        self._last_block = _LastBlock(backbone)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.backbone)

    def _insert_mask_token(self, _module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        """Replace patches (B, N, D) or (B, h, w, D) with the mask token where the mask is True. Keeps the shape."""
        if self._mask is None:
            return patches
        mask = self._mask.view(*patches.shape[:-1], 1)
        return torch.where(mask, self.mask_token.to(patches.dtype), patches)

    def hidden(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last hidden vectors of all patches, (B, N, D); if `mask` is None, no patch is masked."""
        return self._run(images, mask)[:, self._num_prefix :]

    @property
    def _num_prefix(self) -> int:
        return int(self.backbone.num_prefix_tokens)  # type: ignore[arg-type]

    def _run(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last hidden vectors after the final norm.

        Returns:
            (B, prefix + N, D); (B, M, D) if `self._last_block.positions` is set.
        """
        self._mask = mask
        try:
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        finally:
            self._mask = None
        return _apply_final_norm(self.backbone, tokens)

    def forward(
        self, images: Tensor, mask: Tensor, num_masked: int | None = None, *, apply_head: bool = True
    ) -> Tensor:
        """Compute the logits at the masked positions.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            mask: bool (B, h, w), True where masked.
            num_masked: M, if it is the same for all images, which avoids waiting for the device; None counts the mask.
            apply_head: False returns the input of the head, (number masked, D), for `tiled_cross_entropy`.

        Returns:
            (number masked, K), ordered by image, then by position in row-major order.
        """
        hidden = self._masked_hidden(images, mask, num_masked)
        return self.head(hidden) if apply_head else hidden

    def _masked_hidden(self, images: Tensor, mask: Tensor, num_masked: int | None) -> Tensor:
        """Return the last hidden vectors at the masked positions, (number masked, D)."""
        if num_masked is None:
            return self.hidden(images, mask)[mask.flatten(1)]
        if not self._last_block.is_supported:
            return at_positions(self.hidden(images, mask), masked_positions(mask, num_masked))  # (B M, D)
        self._last_block.positions = masked_positions(mask, num_masked) + self._num_prefix  # (B, M)
        try:
            hidden = self._run(images, mask)  # (B, M, D)
        finally:
            self._last_block.positions = None
        return hidden.flatten(0, 1)


class _LastBlock:
    """Replaces the last block's forward, and skips the outputs that the head does not read.

    The head reads the last block only at the masked positions, and the block's MLP processes each token separately. The
    MLP therefore runs on only M of N tokens, which saves 3 to 4% of a ViT-B's step. Attention needs all tokens.
    """

    def __init__(self, backbone: nn.Module) -> None:
        from timm.models import beit, vision_transformer

        self.positions: Tensor | None = None
        block: Any = backbone.blocks[-1]  # type: ignore[index]
        self.block = block
        self.is_beit = type(block) is beit.Block
        self.is_supported = self.is_beit or type(block) is vision_transformer.Block
        if self.is_supported:
            self._original_forward = block.forward
            block.forward = self._forward

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.positions is None:
            return self._original_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        block = self.block
        added = block.attn(block.norm1(x), *args, **kwargs)
        x = x + block.drop_path1(self._scaled(added, 1))
        x = x[torch.arange(len(x), device=x.device)[:, None], self.positions]  # (B, M, D)
        return x + block.drop_path2(self._scaled(block.mlp(block.norm2(x)), 2))  # type: ignore[no-any-return]

    def _scaled(self, added: Tensor, branch: int) -> Tensor:
        """Apply LayerScale, which is a module in a ViT and a weight in a BEiT."""
        if not self.is_beit:
            return getattr(self.block, f"ls{branch}")(added)  # type: ignore[no-any-return]
        gamma = getattr(self.block, f"gamma_{branch}")
        return added if gamma is None else gamma * added


class VisibleOnlyModel(nn.Module):
    """The model of the accelerated training: a timm ViT on visible patches, a light transformer on all, a K-way head.

    Args:
        backbone: a timm ViT with absolute positions and without a head. Relative positions (BEiT's) need the full grid.
        vocab_size: K, number of codewords of the tokenizer; for other targets, number of target values of one patch.
        config: settings of the decoder.

    Raises:
        WeightsError: the backbone has no absolute positions, or pools the patches with attention.
    """

    def __init__(self, backbone: nn.Module, vocab_size: int, config: DecoderConfig = DecoderConfig()) -> None:
        super().__init__()
        from timm.layers import build_sincos2d_pos_embed
        from timm.models.vision_transformer import Block

        absolute = getattr(backbone, "pos_embed", None) is not None and getattr(backbone, "rope", None) is None
        if not hasattr(backbone, "patch_drop") or not absolute:
            raise WeightsError(
                f"{type(backbone).__name__} cannot read visible patches alone, since its positions are relative: "
                "choose a plain ViT (vit_base_patch16_224)."
            )
        _check_no_attention_pool(backbone)
        self.backbone = backbone
        self._visible_filter = _VisibleFilter(int(backbone.num_prefix_tokens))  # type: ignore[arg-type]
        backbone.patch_drop = self._visible_filter
        width = config.width
        self.embed = nn.Linear(int(backbone.embed_dim), width)  # type: ignore[arg-type]
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder = nn.Sequential(*(Block(width, config.num_heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("positions", build_sincos2d_pos_embed(list(self.grid), dim=width), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    positions: Tensor  # (N, width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.backbone)

    def forward(
        self, images: Tensor, mask: Tensor, num_masked: int | None = None, *, apply_head: bool = True
    ) -> Tensor:
        """Compute the logits at the masked positions.

        Arguments and result as for `MaskedImageModel.forward`, except that every image must have M masked patches.
        """
        M = int(mask[0].sum()) if num_masked is None else num_masked
        masked, visible = masked_positions(mask, M), masked_positions(~mask, mask[0].numel() - M)  # (B, M), (B, N - M)
        self._visible_filter.visible = visible
        try:
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        finally:
            self._visible_filter.visible = None
        tokens = self.embed(_apply_final_norm(self.backbone, tokens))  # (B, prefix + N - M, width)
        num_prefix = tokens.shape[1] - visible.shape[1]
        visible_tokens = tokens[:, num_prefix:] + self.positions[visible]
        mask_tokens = self.mask_token + self.positions[masked]  # (B, M, width)
        # Attention does not depend on the order of tokens, so the tokens need not return to their places in the grid.
        decoded = self.decoder(torch.cat([tokens[:, :num_prefix], visible_tokens, mask_tokens.to(tokens.dtype)], 1))
        hidden: Tensor = self.norm(decoded[:, -M:]).flatten(0, 1)
        return self.head(hidden) if apply_head else hidden


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """Split images (B, C, H, W) into patches (B, N, C P^2), each normalised to mean 0, variance 1 (MAE, section 3)."""
    pixels = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, C P^2)
    variance, mean = torch.var_mean(pixels, 2, keepdim=True)
    return (pixels - mean) * torch.rsqrt(variance + 1e-6)


def tiled_cross_entropy(head: nn.Linear, hidden: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of a head with very many outputs, holding the logits of only `rows` vectors in memory.

    The backward pass recomputes them.

    Args:
        head: the head, D to K.
        hidden: (N, D), the input of the head.
        targets: int64 (N,).
        rows: number of vectors per tile.

    Returns:
        the mean cross-entropy, (), and the most probable outputs, int64 (N,).
    """
    total, predicted = hidden.new_zeros((), dtype=torch.float32), []
    for part, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        loss, best = checkpoint(_tile_loss, head, part, target, use_reentrant=False)
        total = total + loss
        predicted.append(best)
    return total / len(targets), torch.cat(predicted)


def _tile_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(1)


class _VisibleFilter(nn.Module):
    """Replaces timm's patch dropout: keeps the prefix tokens and the patches at `visible`, int64 (B, V)."""

    def __init__(self, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.visible: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Select tokens: (B, prefix + N, D) to (B, prefix + V, D); all tokens if `visible` is None."""
        if self.visible is None:
            return tokens
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return torch.cat([tokens[:, : self.num_prefix], tokens[rows, self.num_prefix + self.visible]], 1)


def patch_grid(backbone: nn.Module) -> tuple[int, int]:
    """Return the numbers of rows and columns of a transformer's patches."""
    rows, columns = backbone.patch_embed.grid_size  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def _apply_final_norm(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """Apply the final norm to the result of `forward_features` if timm postpones it until after pooling."""
    if isinstance(backbone.norm, nn.Identity):
        tokens = backbone.fc_norm(tokens)  # type: ignore[operator]
    return tokens


def check_has_patches(backbone: nn.Module) -> None:
    """Raise WeightsError unless the backbone is a transformer on patches."""
    if not has_patch_tokens(backbone):
        raise WeightsError(f"{type(backbone).__name__} has no patches to mask: choose a ViT or BEiT of timm.")


def _check_no_attention_pool(backbone: nn.Module) -> None:
    """Raise WeightsError if the backbone pools with attention.

    The weights of such a pooling would get no gradient, which breaks DDP and resuming the optimizer.
    """
    if getattr(backbone, "attn_pool", None) is not None:
        raise WeightsError(
            f"This {type(backbone).__name__} pools patches by attention, which masked modelling does not train: "
            'build it with --model.args \'{"global_pool": "avg"}\'.'
        )


def _init_beit_normal(weight: Tensor) -> None:
    """Initialise a weight as BEiT does: a normal with deviation 0.02, truncated at one deviation (then 0.0108)."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def initialise_beit(backbone: nn.Module) -> None:
    """Apply BEiT's initialisation: truncated normals for all weights except those of norms; biases are 0.

    The output projections of block i (from 1) are divided by sqrt(2 i).

    Raises:
        WeightsError: the backbone is not a transformer on patches.
    """
    check_has_patches(backbone)
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _init_beit_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "pos_embed"):
        token = getattr(backbone, name, None)
        if isinstance(token, nn.Parameter) and token.requires_grad:
            _init_beit_normal(token)
    for number, block in enumerate(backbone.blocks, start=1):  # type: ignore[arg-type]
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * number) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)


_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def unshare_positions(state: dict[str, Tensor], args: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Add a BEiT's shared table of relative positions to the table of every block.

    Fine-tuning learns a table for each block, as in BEiT; timm's BEiT also has one table per block by default.

    Args:
        state: weights of a timm network.
        args: arguments of timm.create_model.

    Returns:
        weights and arguments of the network without a shared table; unchanged for networks without such a table.
    """
    if _SHARED_TABLE not in state:
        return state, args
    table = state[_SHARED_TABLE]
    state = {name: value for name, value in state.items() if not name.startswith("rel_pos_bias.")}
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    for name in [f"blocks.{block}.attn.relative_position_bias_table" for block in sorted(blocks)]:
        state[name] = table + state[name] if name in state else table.clone()
    args = {name: value for name, value in args.items() if name not in ("use_rel_pos_bias", "use_shared_rel_pos_bias")}
    return state, args
