"""Settings of `pecobook bench`, which measures speed."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig
from pecobook.settings.values import not_negative, positive, settings_class


@settings_class
class BenchConfig(ImagesConfig):
    """Measure how fast pre-training runs on this machine."""

    recipe: str = "paper"
    """Recipe of `pecobook pretrain` to measure. On the command line it may follow `pretrain`, without the flag."""
    data: str = "photos"
    """Images for measuring data loading. The other parts use random images that are already on the device."""
    tokenizer: str = ""
    """The tokenizer that encodes the images. If empty, one of the recipe's shape with random weights, which is equally
    fast."""
    batch_size: int = 0
    """Number of images per step on one device. 0 means 128 on a GPU and 8 on a CPU."""
    precision: str = "auto"
    """Autocast precision: fp32, bf16 or fp16. auto is bf16 on hardware where it is faster, otherwise fp32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    steps: int = 10
    """Number of measured steps. As many warm-up steps precede them on a GPU, and one on a CPU."""
    data_steps: int = 4
    """Number of batches read to measure data loading. 0 skips it."""
    out: str = ""
    """JSON file to write the results to; if empty, they are only printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "steps")
        not_negative(self, "batch_size", "data_steps")
