"""Settings of a backbone on large images, for segmentation and detection."""

from __future__ import annotations

from pecobook.settings.values import not_negative, settings_class


@settings_class
class PyramidConfig:
    """The backbone on images larger than those it was pre-trained on."""

    window: int = 0
    """Side of the attention windows in patches, in all blocks but four; 0 gives all blocks attention over the whole
    image."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass, which saves much memory and takes a third more time."""
    frozen: bool = False
    """Freeze the backbone and train only the pyramid and the heads after it."""

    def __post_init__(self) -> None:
        not_negative(self, "window")
