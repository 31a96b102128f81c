"""Attacks on a classifier: images changed by at most `eps` in every value so that its loss rises (paper, Table 11).

Both attacks take steps along the sign of the gradient, and clip the result to the allowed range after each:

- BIM, the basic iterative method (Kurakin et al., arXiv 1607.02533): the gradient at the current image;
- MI-FGSM, the momentum iterative method (Dong et al., arXiv 1710.06081), which the paper calls MIM: a running sum, with
  decay 1, of the gradients, each divided by its L1 norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM = {"bim": 0.0, "mi-fgsm": 1.0}
"""The decay of the running sum of gradients, by attack."""


def attack(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    momentum: float = 0.0,
) -> Tensor:
    """Attack a classifier whose gradient is known.

    Args:
        classifier: maps float images (B, C, H, W) in [0, 1] to logits (B, K), each image independently.
        images: float (B, C, H, W) in [0, 1].
        labels: int64 (B,), the true classes.
        eps: maximum change of a value.
        step: change of a value in one step.
        steps: number of steps.
        momentum: decay of the running sum of gradients; 0 is BIM.

    Returns:
        float (B, C, H, W) in [0, 1], within `eps` of `images` everywhere.
    """
    lowest, highest = (images - eps).clamp_min(0), (images + eps).clamp_max(1)
    attacked, accumulated = images, torch.zeros_like(images)
    for _ in range(steps):
        x = attacked.detach().requires_grad_()
        loss = F.cross_entropy(classifier(x).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        norm = gradient.abs().sum((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        accumulated = momentum * accumulated + gradient / norm
        attacked = (attacked + step * accumulated.sign()).clamp(lowest, highest)
    return attacked.detach()
