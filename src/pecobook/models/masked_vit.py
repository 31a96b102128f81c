"""Masked image modelling: a timm ViT that reads an image with patches hidden and names the hidden codes.

PeCo, equations 6 and 7: masked patches are replaced by one learnable mask token, and a K-way linear classifier reads
the last hidden vector at the masked positions. The transformer is timm's and stays timm's: the mask token takes its
place in the output of `patch_embed`, so a pre-trained backbone is a plain timm state dict.

`VisibleOnlyModel` is Table 8's accelerated form, after MAE: the transformer reads the visible patches alone, and a
light decoder puts the mask tokens in.

B batch, N = h w patches, M masked patches of each image, K codewords.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.settings.pretrain import DecoderConfig


def masked_positions(mask: Tensor, num_masked: int) -> Tensor:
    """Positions of the masked patches in row-major order: bool (B, h, w) with M True each, to int64 (B, M).

    Unlike indexing by the mask, this has a shape that is known beforehand, so no step waits for the device.
    """
    return mask.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_masked]


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Values (B, N, ...) at positions int64 (B, M): (B M, ...), images in order."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, positions].flatten(0, 1)


class MaskedImageModel(nn.Module):
    """A timm ViT with a mask token and a K-way head.

    Args:
        backbone: a timm vision transformer without head (`num_classes=0`), with `patch_embed`, `blocks` and
            `forward_features`.
        vocab_size: K, codewords of the tokenizer; for other targets, the numbers of one patch.

    Raises:
        WeightsError: the backbone is no transformer of patches, or pools them by attention.
    """

    def __init__(self, backbone: nn.Module, vocab_size: int) -> None:
        super().__init__()
        _require_patches(backbone)
        _refuse_attention_pool(backbone)
        width = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, vocab_size)
        _beit_normal(self.mask_token)
        _beit_normal(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._mask: Tensor | None = None
        backbone.patch_embed.register_forward_hook(self._hide)  # type: ignore[union-attr]
        self._last = _LastBlock(backbone)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.backbone)

    def _hide(self, _module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        """Put the mask token where the mask is True: (B, N, D) or (B, h, w, D) to the same."""
        if self._mask is None:
            return patches
        mask = self._mask.view(*patches.shape[:-1], 1)
        return torch.where(mask, self.mask_token.to(patches.dtype), patches)

    def hidden(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Last hidden vectors of all patches, (B, N, D); no patch is hidden when `mask` is None."""
        return self._run(images, mask)[:, self._num_prefix :]

    @property
    def _num_prefix(self) -> int:
        return int(self.backbone.num_prefix_tokens)  # type: ignore[arg-type]

    def _run(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Normed last hidden vectors (B, prefix + N, D), or (B, M, D) of those that the last block was asked for."""
        self._mask = mask
        try:
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        finally:
            self._mask = None
        return _normed(self.backbone, tokens)

    def forward(self, images: Tensor, mask: Tensor, num_masked: int | None = None) -> Tensor:
        """Logits at masked positions.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            mask: bool (B, h, w), True where masked.
            num_masked: M when it is the same for all images, which spares a wait for the device; None counts.

        Returns:
            (number masked, K), images in order, positions row by row.
        """
        if num_masked is None:
            return self.head(self.hidden(images, mask)[mask.flatten(1)])  # type: ignore[no-any-return]
        if not self._last.known:
            hidden = at_positions(self.hidden(images, mask), masked_positions(mask, num_masked))  # (B M, D)
            return self.head(hidden)  # type: ignore[no-any-return]
        self._last.positions = masked_positions(mask, num_masked) + self._num_prefix  # (B, M)
        try:
            hidden = self._run(images, mask)  # (B, M, D)
        finally:
            self._last.positions = None
        return self.head(hidden.flatten(0, 1))  # type: ignore[no-any-return]


class _LastBlock:
    """Takes the place of the last block's forward, and leaves out what nobody reads.

    Only masked positions are read of the last block, and its multi-layer perceptron works on each token by itself: so
    it runs on M of N tokens, which spares 3 to 4% of a ViT-B's step. Attention needs all of them.
    """

    def __init__(self, backbone: nn.Module) -> None:
        from timm.models import beit, vision_transformer

        self.positions: Tensor | None = None
        block: Any = backbone.blocks[-1]  # type: ignore[index]
        self.block = block
        kinds = {beit.Block: self._beit, vision_transformer.Block: self._vit}
        run = kinds.get(type(block))
        self.known = run is not None
        if run is not None:
            self._whole = block.forward
            block.forward = run

    def _rows(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) at the positions: (B, M, D)."""
        assert self.positions is not None
        rows = torch.arange(len(x), device=x.device)[:, None]
        return x[rows, self.positions]

    def _vit(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.positions is None:
            return self._whole(x, *args, **kwargs)  # type: ignore[no-any-return]
        own = self.block
        x = self._rows(x + own.drop_path1(own.ls1(own.attn(own.norm1(x), *args, **kwargs))))
        return x + own.drop_path2(own.ls2(own.mlp(own.norm2(x))))  # type: ignore[no-any-return]

    def _beit(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.positions is None:
            return self._whole(x, *args, **kwargs)  # type: ignore[no-any-return]
        own = self.block
        scale1, scale2 = (1.0, 1.0) if own.gamma_1 is None else (own.gamma_1, own.gamma_2)
        x = self._rows(x + own.drop_path1(scale1 * own.attn(own.norm1(x), *args, **kwargs)))
        return x + own.drop_path2(scale2 * own.mlp(own.norm2(x)))  # type: ignore[no-any-return]


class VisibleOnlyModel(nn.Module):
    """The accelerated form: a timm ViT over visible patches, a light transformer over all, a K-way head.

    Args:
        backbone: a timm ViT with absolute positions and without head. Relative positions (BEiT's) are of a full grid.
        vocab_size: K, or the numbers of one patch.
        config: the decoder.

    Raises:
        WeightsError: the backbone has no absolute positions, or pools by attention.
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
        _refuse_attention_pool(backbone)
        self.backbone = backbone
        self._keep = _Keep(int(backbone.num_prefix_tokens))  # type: ignore[arg-type]
        backbone.patch_drop = self._keep
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

    def forward(self, images: Tensor, mask: Tensor, num_masked: int | None = None) -> Tensor:
        """Logits at masked positions; arguments and result as `MaskedImageModel`'s, but every image hides M patches."""
        M = int(mask[0].sum()) if num_masked is None else num_masked
        hidden, visible = masked_positions(mask, M), masked_positions(~mask, mask[0].numel() - M)  # (B, M), (B, N - M)
        self._keep.visible = visible
        try:
            tokens = self.backbone.forward_features(images)  # type: ignore[operator]
        finally:
            self._keep.visible = None
        tokens = self.embed(_normed(self.backbone, tokens))  # (B, prefix + N - M, width)
        prefix = tokens.shape[1] - visible.shape[1]
        seen = tokens[:, prefix:] + self.positions[visible]
        guesses = self.mask_token + self.positions[hidden]  # (B, M, width)
        # Attention does not care for the order, so nothing needs to be put back in its place.
        decoded = self.decoder(torch.cat([tokens[:, :prefix], seen, guesses.to(tokens.dtype)], 1))
        return self.head(self.norm(decoded[:, -M:]).flatten(0, 1))  # type: ignore[no-any-return]


class _Keep(nn.Module):
    """In the place of timm's patch dropout: keeps the prefix tokens and the patches at `visible`, int64 (B, V)."""

    def __init__(self, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.visible: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, prefix + N, D) to (B, prefix + V, D)."""
        if self.visible is None:
            return tokens
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return torch.cat([tokens[:, : self.num_prefix], tokens[rows, self.num_prefix + self.visible]], 1)


def patch_grid(backbone: nn.Module) -> tuple[int, int]:
    """Rows and columns of a transformer's patches."""
    rows, columns = backbone.patch_embed.grid_size  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def _normed(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """What `forward_features` returned, through the last norm, which timm may keep for after the pooling."""
    if isinstance(backbone.norm, nn.Identity):
        tokens = backbone.fc_norm(tokens)  # type: ignore[operator]
    return tokens


def _require_patches(backbone: nn.Module) -> None:
    if not (hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks")):
        raise WeightsError(f"{type(backbone).__name__} has no patches to mask: choose a ViT or BEiT of timm.")


def _refuse_attention_pool(backbone: nn.Module) -> None:
    """Raise WeightsError for weights that no patch passes through: without gradients they end DDP, and a resume."""
    if getattr(backbone, "attn_pool", None) is not None:
        raise WeightsError(
            f"This {type(backbone).__name__} pools patches by attention, which masked modelling does not train: "
            'make it with --model.args \'{"global_pool": "avg"}\'.'
        )


def _beit_normal(weight: Tensor) -> None:
    """BEiT's start of a weight: a normal of deviation 0.02 cut at one deviation, so of 0.0108 in the end."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def initialise_beit(backbone: nn.Module) -> None:
    """BEiT's initialisation: its normals in all but norms, and block i's output projections divided by sqrt(2 i).

    Raises:
        WeightsError: the backbone is no transformer of patches.
    """
    _require_patches(backbone)
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _beit_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "pos_embed"):
        token = getattr(backbone, name, None)
        if isinstance(token, nn.Parameter) and token.requires_grad:
            _beit_normal(token)
    for number, block in enumerate(backbone.blocks, start=1):  # type: ignore[arg-type]
        with torch.no_grad():
            block.attn.proj.weight.div_((2.0 * number) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)


_SHARED = "rel_pos_bias.relative_position_bias_table"


def unshared(state: dict[str, Tensor], args: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A BEiT's weights with its one table of relative positions added to every block's, as timm's BEiT has them.

    Fine-tuning learns a table a block (BEiT does the same). Other networks pass unchanged.
    """
    if _SHARED not in state:
        return state, args
    table = state[_SHARED]
    state = {name: value for name, value in state.items() if not name.startswith("rel_pos_bias.")}
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    for name in [f"blocks.{block}.attn.relative_position_bias_table" for block in sorted(blocks)]:
        state[name] = table + state[name] if name in state else table.clone()
    plain = {name: value for name, value in args.items() if name not in ("use_rel_pos_bias", "use_shared_rel_pos_bias")}
    return state, plain
