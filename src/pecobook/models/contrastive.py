"""Contrastive learning's parts (MoCo v3, arXiv 2104.02057): heads, and the loss over the keys of all ranks.

B images of this rank, G of all ranks.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.collectives import gather_rows


def mlp(widths: list[int], *, final_norm: bool) -> nn.Sequential:
    """Linear layers without bias, BatchNorm and ReLU between; the last BatchNorm has no weights."""
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
    """2 x temperature x InfoNCE of queries (B, D) against the keys (B, D) of all ranks; returns loss and accuracy."""
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        everyone, first = gather(keys)  # (G, D)
        logits = queries @ everyone.t() / temperature  # (B, G)
        labels = torch.arange(first, first + len(queries), device=queries.device)
        loss = F.cross_entropy(logits, labels) * (2 * temperature)
    return loss, (logits.argmax(1) == labels).float().mean()


def gather(keys: Tensor) -> tuple[Tensor, int]:
    """Keys of all ranks (G, D), without gradient, and the row where this rank's begin."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return gather_rows(keys.detach()), rank * len(keys)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move every parameter of `slow` to momentum x its own + (1 - momentum) x that of `fast`."""
    for own, other in zip(slow.parameters(), fast.parameters(), strict=True):
        own.lerp_(other, 1 - momentum)
