"""Settings of `pecobook bench`, which measures speed."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig
from pecobook.settings.values import not_negative, positive, settings_class


@settings_class
class BenchConfig(ImagesConfig):
    """Measure how fast pre-training runs on this machine."""

    recipe: str = "paper"
    """Recipe of `pecobook pretrain` that is measured. On the command line it may stand after `pretrain`, without the
    flag."""
    data: str = "photos"
    """Images that the data part reads. The other parts use random images that are on the device already."""
    tokenizer: str = ""
    """The tokenizer that encodes the images. Empty takes a tokenizer of the recipe's shape with random weights, which
    is equally fast."""
    batch_size: int = 0
    """Number of images in one step on one device. 0 takes 128 on a GPU and 8 on a CPU."""
    precision: str = "auto"
    """Precision of autocast: fp32, bf16 or fp16. auto is bf16 where the hardware is faster with it, else fp32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    steps: int = 10
    """Number of measured steps. Before them come as many warm-up steps on a GPU, and one warm-up step on a CPU."""
    data_steps: int = 4
    """Number of batches read to measure the data part. 0 leaves this part out."""
    out: str = ""
    """JSON file to write the results to; empty only prints the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "steps")
        not_negative(self, "batch_size", "data_steps")
