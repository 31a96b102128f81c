"""Settings of a backbone applied to large images, for segmentation and detection."""

from __future__ import annotations

from pecobook.settings.values import not_negative, settings_class


@settings_class
class PyramidConfig:
    """The backbone applied to images larger than those it was pre-trained on."""

    window: int = 0
    """Side of the attention windows, in patches, in all but four blocks; 0 uses global attention in all blocks."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass, which saves much memory and takes a third more time."""
    frozen: bool = False
    """Freeze the backbone and train only the pyramid and the heads."""

    def __post_init__(self) -> None:
        not_negative(self, "window")
