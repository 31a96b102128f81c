"""Where models run outside of training."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
