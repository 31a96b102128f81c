"""How a backbone reads large images, for segmentation and detection."""

from __future__ import annotations

import dataclasses

from pecobook.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """How a backbone reads images larger than its own."""

    window: int = 0
    """Side of the attention windows in patches, in all blocks but four; 0 attends over the whole image everywhere."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: much less memory for a third more time."""
    frozen: bool = False
    """Freeze the backbone and train only the pyramid and the heads after it."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ConfigError(f"--pyramid.window must be 0 or more patches, not {self.window}.")
