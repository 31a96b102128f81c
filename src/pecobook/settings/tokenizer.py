"""Settings of the shape of a tokenizer and its codebook."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pecobook.errors import ConfigError
from pecobook.settings.values import MAX_WIDTH, below_one, not_negative, positive, refuse, settings_class

SearchPrecision = Literal["fp32", "tf32", "bf16"]
QuantizerKind = Literal["ema", "gradient", "fsq", "simvq", "lfq", "ibq"]
PaddingMode = Literal["zeros", "reflect", "replicate"]


@settings_class
class AutoencoderConfig:
    """The shape of the encoder and, mirrored, of the decoder."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Number of channels at each resolution, from the image to the latent grid; each further number halves the side."""
    latent_dim: int = 256
    """Dimension D of a codeword."""
    num_blocks: int = 2
    """Number of residual blocks at each resolution; for a transformer, the number of all blocks."""
    in_channels: int = 3
    """Number of channels of the images; training reads 3 or 1 (grey), the Python API takes any number."""
    kind: Literal["cnn", "vit"] = "cnn"
    """Kind of network: cnn for convolutions, or vit for a plain transformer as encoder and as decoder (Table 12's ViT-B
    row), for which --model.channels is WIDTH PATCH."""
    num_heads: int = 12
    """Number of attention heads of a transformer."""
    decoder_width: float = 1.0
    """Factor on the number of channels of the decoder (Table 12: 0.5)."""
    decoder_blocks: int = 0
    """Number of blocks of the decoder; 0 takes --model.num-blocks (Table 12's half depth: 1)."""
    group_size: int = 16
    """Minimum number of channels that a group of GroupNorm normalises together, in at most 32 groups; 0 always takes 32
    groups. Groups of one or two channels erase brightness and colour, and codes then learn positions."""
    padding: PaddingMode = "zeros"
    """Pixels that a convolution reads beyond the border. From zeros a network can tell how far the border is."""
    latent_norm: bool = False
    """Layer-normalise each latent vector, so that the scale of the vectors, and with it the commitment loss, cannot
    drift."""

    def __post_init__(self) -> None:
        positive(self, "channels", most=MAX_WIDTH)
        positive(self, "latent_dim", "num_blocks", "in_channels", "num_heads", "decoder_width", most=MAX_WIDTH)
        if not 1 <= len(self.channels) <= 12:
            refuse("channels", f"takes 1 to 12 numbers, not {len(self.channels)}.")
        not_negative(self, "decoder_blocks", "group_size")
        if self.kind == "vit" and len(self.channels) != 2:
            raise ConfigError(f"--model.kind vit reads --model.channels as WIDTH PATCH, not {self.channels}.")
        for width in (self.channels[0], self.decoder_side().channels[0]) if self.kind == "vit" else ():
            if width % (4 * self.num_heads):
                raise ConfigError(
                    f"--model.channels: a transformer's width, {width}, must be a multiple of "
                    f"{4 * self.num_heads} (4 x --model.num-heads)."
                )

    @property
    def stride(self) -> int:
        """Number of pixels between neighbouring positions of the latent grid."""
        return self.channels[1] if self.kind == "vit" else int(2 ** (len(self.channels) - 1))

    def decoder_side(self) -> AutoencoderConfig:
        """Return the shape that the decoder mirrors: this shape with the decoder's own width and depth."""
        if self.decoder_width == 1.0 and self.decoder_blocks == 0:
            return self
        widths = tuple(max(round(width * self.decoder_width), 1) for width in self.channels)
        if self.kind == "vit":
            widths = (widths[0], self.channels[1])  # the second number is the side of a patch
        blocks = self.decoder_blocks or self.num_blocks
        return dataclasses.replace(self, channels=widths, num_blocks=blocks, decoder_width=1.0, decoder_blocks=0)


@settings_class
class VectorQuantizerConfig:
    """The codewords and their learning rule: the settings of `VectorQuantizer`, and of the quantizers beside it."""

    kind: QuantizerKind = "ema"
    """Kind of quantizer: ema, a codebook by moving averages; gradient, by the middle term of equation 3 as printed; the
    controls fsq (finite scalar), simvq (a fixed codebook under a learned matrix), lfq (signs), ibq (index
    backpropagation)."""
    levels: tuple[int, ...] = ()
    """Number of levels of each channel for fsq; their product is the number of codewords."""
    entropy_weight: float = 0.1
    """Weight of the entropy loss of lfq and ibq."""
    entropy_temperature: float = 0.01
    """Temperature of the softmax of that loss."""
    num_codewords: int = 8192
    """Number of codewords K in the codebook."""
    decay: float = 0.99
    """Decay of the moving averages from which codewords are computed."""
    eps: float = 1e-5
    """Laplace smoothing of the counts of the codewords."""
    revive_after: int = 100
    """Number of steps without use after which a codeword is dead and is replaced; 0 never replaces a codeword."""
    start_after: int = 0
    """Number of steps during which latent vectors are not quantised, at most half of the training. k-means then
    initialises the codebook on trained features, from which a short training gains much."""
    normalise: bool = False
    """Scale latent vectors and codewords to unit length, usual with few dimensions (--model.latent-dim 8): the distance
    then depends on directions alone, and more of a large codebook is used."""
    precision: SearchPrecision = "fp32"
    """Precision of the search for the nearest codeword in training. fp32 is exact; tf32 and bf16 are faster on a GPU
    but may choose another codeword at nearly the same distance."""

    def __post_init__(self) -> None:
        positive(self, "eps")
        positive(self, "num_codewords", most=2**24)
        below_one(self, "decay")
        not_negative(self, "revive_after", "start_after", "entropy_weight")
        positive(self, "entropy_temperature")
        if self.kind == "fsq" and (min(self.levels, default=0) < 3 or math.prod(self.levels) != self.num_codewords):
            refuse(
                "levels",
                f"needs numbers of 3 or more whose product is --quantizer.num-codewords {self.num_codewords}, "
                f"not {' '.join(map(str, self.levels)) or 'none'}: for example 8 8 8 6 5 for 15360.",
            )
        if self.kind != "fsq" and self.levels:
            refuse("levels", "is for --quantizer.kind fsq alone.")
        if self.kind == "lfq" and self.num_codewords.bit_count() != 1:
            refuse("num_codewords", f"must be a power of 2 for lfq, not {self.num_codewords}.")
        if not self.revives and self.normalise:
            refuse("kind", f"{self.kind} has no --quantizer.normalise.")

    @property
    def revives(self) -> bool:
        """Whether codewords that are not used are replaced."""
        return self.kind in ("ema", "gradient")

    @property
    def has_loss(self) -> bool:
        """Whether the quantizer has a loss of its own, beside the commitment loss."""
        return self.kind != "ema"

    @property
    def factors(self) -> int:
        """Number of channels of a latent vector that the kind requires; 0 for any number."""
        return {"fsq": len(self.levels), "lfq": self.num_codewords.bit_length() - 1}.get(self.kind, 0)


@settings_class
class QuantizerConfig(VectorQuantizerConfig):
    """The codebook, its learning rule and the commitment loss."""

    commitment: float = 0.25
    """Weight of the commitment loss, beta in equation 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "commitment")


@settings_class
class TokenizerConfig:
    """The settings from which a tokenizer is built."""

    model: AutoencoderConfig = AutoencoderConfig()
    num_codewords: int = 8192
    """Number of codewords K in the codebook."""
    quantizer: QuantizerKind = "ema"
    """Kind of quantizer."""
    levels: tuple[int, ...] = ()
    """Number of levels of each channel, of fsq."""
    image_size: int = 224
    """Side of the images that the tokenizer was trained at, pixels."""
    features: int = 0
    """Number of channels of the features that the decoder predicts in place of pixels; 0 for a decoder of pixels."""
    teacher: str = ""
    """The network whose features the decoder predicts."""
