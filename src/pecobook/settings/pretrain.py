"""Settings of `pecobook pretrain`, masked image modelling."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pecobook.errors import ConfigError
from pecobook.settings.images import PhotometricConfig
from pecobook.settings.initial import network_of
from pecobook.settings.training import BackboneConfig, BaseOptimConfig, ProbedTrainConfig, ResidualConfig
from pecobook.settings.values import MAX_WIDTH, between, positive, settings_class


@settings_class
class MaskConfig:
    """The mask of the patches that are hidden from the ViT."""

    kind: Literal["block", "random"] = "block"
    """Shape of the mask: rectangular blocks as in BEiT, or single random patches."""
    num_masked: int = 75
    """Number of patches hidden in every image (the paper: 75 of 196)."""
    min_block: int = 16
    """Smallest area of a block of the mask, in patches."""

    def __post_init__(self) -> None:
        positive(self, "num_masked", "min_block")


@settings_class
class DecoderConfig:
    """The light decoder of the accelerated training (Table 8), as in MAE."""

    depth: int = 8
    """Number of blocks of the decoder."""
    width: int = 512
    """Width of the decoder, in channels."""
    num_heads: int = 16
    """Number of attention heads of the decoder."""

    def __post_init__(self) -> None:
        positive(self, "depth", "width", "num_heads", most=MAX_WIDTH)
        if self.width % (4 * self.num_heads):
            raise ConfigError(f"--decoder.width must be a multiple of {4 * self.num_heads} (4 x --decoder.num-heads).")


@settings_class
class PretrainConfig(ProbedTrainConfig, ResidualConfig):
    """Pre-train a ViT on the tokens of your images."""

    tokenizer: str = ""
    """The tokenizer: a codebook run, owner/name on the Hugging Face hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE or fourm:FILE."""
    tokens: str = ""
    """A token bank made by `pecobook tokenize`, whose views are replayed. Training then does not run the tokenizer."""
    target: Literal["tokens", "pixels"] = "tokens"
    """Target that is predicted for each hidden patch: its token, or its normalised pixels (MAE), which need no
    tokenizer."""
    tokenizer_size: int = 0
    """Side to which crops are resized for the tokenizer, in pixels. 0 keeps their size."""
    visible_only: bool = False
    """Use the accelerated training of Table 8: the ViT reads only the visible patches, and a light decoder predicts the
    hidden ones."""
    decoder: DecoderConfig = DecoderConfig()
    model: BackboneConfig = BackboneConfig(
        name="beit_base_patch16_224",
        args='{"init_values": 0.1, "use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
    )
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; earlier blocks are skipped less often."""
    mask: MaskConfig = MaskConfig()
    colour: PhotometricConfig = PhotometricConfig(saturation=0.4, hue=0.0, jitter=1.0, grey=0.0)
    """Colour augmentation of the crop, applied before the tokenizer and the ViT both see it (BEiT)."""
    optim: BaseOptimConfig = BaseOptimConfig(lr=1.5e-3, final_lr=1e-5, warmup="10 epochs", clip_grad=3.0)
    max_steps: str = "300 epochs"
    batch_size: int = 2048
    implied = staticmethod(partial(network_of, command="pretrain"))  # what follows from --init, for `replace`

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "drop_path")
        between(self, 0, 4096, "tokenizer_size")
        if self.tokens and self.target == "pixels":
            raise ConfigError("--tokens has no effect with --target pixels: leave one of them out.")
