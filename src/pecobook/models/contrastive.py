"""Parts of contrastive learning (MoCo v3, arXiv 2104.02057): heads, and the loss over the keys of all ranks.

B is the number of images on this rank, G the number of keys on all ranks.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.utils.distributed import gather_rows
from pecobook.utils.vectors import unit_length


def mlp(widths: list[int], *, final_norm: bool) -> nn.Sequential:
    """Build a multi-layer perceptron: linear layers without bias, with BatchNorm and ReLU between them.

    Args:
        widths: number of input features, followed by each layer's number of output features.
        final_norm: whether a BatchNorm without weights follows the last layer.
    """
    layers: list[nn.Module] = []
    for number, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        layers.append(nn.Linear(width_in, width_out, bias=False))
        if not last:
            layers += [nn.BatchNorm1d(width_out), nn.ReLU(inplace=True)]
        elif final_norm:
            layers.append(nn.BatchNorm1d(width_out, affine=False))
    return nn.Sequential(*layers)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute 2 x temperature x InfoNCE of queries against the keys of all ranks.

    Args:
        queries: (B, D).
        keys: (N, D) of this rank; the first B keys are the positives of the queries, the others belong to other images
            of the same step.
        temperature: softmax temperature.

    Returns:
        loss and accuracy, () each.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = unit_length(queries.float()), unit_length(keys.float())
        all_keys, first = gather_keys(keys)  # (G, D)
        logits = queries @ all_keys.t() / temperature  # (B, G)
        labels = torch.arange(first, first + len(queries), device=queries.device)
        loss = F.cross_entropy(logits, labels) * (2 * temperature)
    return loss, (logits.argmax(1) == labels).float().mean()


def gather_keys(keys: Tensor) -> tuple[Tensor, int]:
    """Return the keys of all ranks (G, D), without gradient, and the row of this rank's first key."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return gather_rows(keys.detach()), rank * len(keys)


def can_initialise_moco(network: nn.Module) -> bool:
    """Return whether `initialise_moco` fits a network: one patch projection, and a position per patch or none."""
    projection = getattr(getattr(network, "patch_embed", None), "proj", None)
    table = getattr(network, "pos_embed", None)
    if not isinstance(projection, nn.Conv2d):
        return False
    if not isinstance(table, nn.Parameter):
        return True
    rows, columns = getattr(network.patch_embed, "grid_size", (0, 0))
    return bool(rows) and table.ndim == 3 and table.shape[1] >= rows * columns and projection.out_channels % 4 == 0


@torch.no_grad()
def initialise_moco(network: nn.Module) -> None:
    """Apply MoCo v3's ViT initialisation (section 4 and public code): fixed positions, Xavier-uniform weights.

    Positions are sines and cosines of row and column and are not trained. The query, key and value parts of a layer are
    initialised as three separate matrices, and the patch projection as a linear layer.
    """
    from timm.layers import build_sincos2d_pos_embed

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            fan_out = module.out_features // 3 if name.endswith("qkv") else module.out_features
            bound = math.sqrt(6 / (fan_out + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection: nn.Conv2d = network.patch_embed.proj  # type: ignore[union-attr, assignment]
    width = projection.out_channels
    bound = math.sqrt(6 / (projection.weight[0].numel() + width))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    if getattr(network, "cls_token", None) is not None:
        nn.init.normal_(network.cls_token, std=1e-6)  # type: ignore[arg-type]
    table = getattr(network, "pos_embed", None)
    if isinstance(table, nn.Parameter):
        rows, columns = network.patch_embed.grid_size  # type: ignore[union-attr, misc]
        table.zero_()[0, table.shape[1] - rows * columns :] = build_sincos2d_pos_embed([rows, columns], dim=width)
        table.requires_grad_(False)


@torch.no_grad()
def ema_update(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Set every parameter of `slow` to momentum x slow + (1 - momentum) x fast; on a GPU in a few fused kernels."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)
