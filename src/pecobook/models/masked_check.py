"""Checks that a network can be pre-trained by masked modelling, with as many patches as the tokenizer makes codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.dry_run import dry_run, leaks, refusing
from pecobook.models.masked_vit import MaskedImageModel, VisibleOnlyModel, patch_grid
from pecobook.models.network_traits import traits_of
from pecobook.settings.pretrain import PretrainConfig

PURPOSE = "be pre-trained by masked modelling"


def check_network(config: PretrainConfig, model: MaskedImageModel | VisibleOnlyModel) -> None:
    """Raise WeightsError if the network cannot be trained by masked modelling, or would see the hidden patches."""
    name, traits = config.model.name, traits_of(model.backbone)
    if int(model.backbone.num_prefix_tokens) and not traits.pools_mean:  # type: ignore[arg-type]
        raise WeightsError(
            f"'{name}' can only be used by its class token, which masked modelling does not train: choose a plain ViT "
            "(vit_base_patch16_224) or BEiT."
        )
    (rows, columns), num_masked = model.grid, config.mask.num_masked
    patch = _patch_side(config, model.backbone)
    mask = torch.zeros(2, rows * columns, dtype=torch.bool)
    mask[:, :num_masked] = True
    mask = mask.view(2, rows, columns)
    images = torch.zeros(2, 3, config.image_size, config.image_size)
    with refusing(name, PURPOSE):
        leak = leaks(model, images, mask, num_masked, patch=patch, whole=not traits.is_plain)
    if leak:
        raise WeightsError(
            f"'{name}' lets pixels of hidden patches reach visible patches, since its patches overlap or share their "
            "statistics: choose a network with separate patches, such as vit_base_patch16_224."
        )
    dry_run(model, (images, mask, num_masked), network=name, purpose=PURPOSE)


def check_grids(config: PretrainConfig, backbone: nn.Module, tokenizer: Any) -> None:
    """Raise ConfigError unless the ViT splits an image into as many patches as the tokenizer makes codes."""
    patch, (rows, columns) = _patch_side(config, backbone), patch_grid(backbone)
    f, side = tokenizer.stride, config.tokenizer_size or config.image_size
    if (rows * f, columns * f) == (side, side):
        return
    *remedies, last = _fitting(config, rows, patch, f)
    raise ConfigError(
        f"The ViT makes {rows} x {columns} patches of {patch} pixels out of {config.image_size}; "
        f"the tokenizer makes one code for {f} x {f}, {side / f:g} x {side / f:g} out of {side}.\n"
        f"Give {', '.join(remedies)}{' or ' if remedies else ''}{last}."
    )


def _patch_side(config: PretrainConfig, backbone: nn.Module) -> int:
    """Return the side of a patch, pixels. Raises ConfigError if whole patches do not cover the image.

    timm would leave out the edge, which pixel targets and the tokenizer do see.
    """
    embed: Any = backbone.patch_embed
    rows, _ = patch_grid(backbone)
    # The patches of a hybrid are those of the feature map of its convolutions.
    patch = config.image_size // rows if hasattr(embed, "backbone") else int(embed.patch_size[0])
    if patch * rows != config.image_size:
        raise ConfigError(
            f"--image-size {config.image_size} is no multiple of {patch}, the side of a patch, so targets would be "
            f"cut wrongly: give {patch * rows} or {patch * (rows + 1)}."
        )
    return patch


def _fitting(config: PretrainConfig, rows: int, patch: int, f: int) -> list[str]:
    """Return setting changes that each make both grids equal: `rows` patches per side, one code per f x f pixels."""
    size, resized_to = config.image_size, config.tokenizer_size
    remedies = [f"--tokenizer-size {rows * f}"]
    codes, remainder = divmod(resized_to or size, f)
    if not remainder and codes and size % codes == 0:
        remedies.append(f"a ViT with patches of {size // codes}")
    if resized_to and not remainder:  # the tokenizer keeps its grid at every image size
        remedies.append(f"--image-size {codes * patch}")
    if not resized_to and patch == f:
        remedies.append(f"--image-size {rows * f}")
    return remedies
