"""Settings of a tokenizer's architecture and codebook."""

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
    """The architecture of the encoder and, mirrored, of the decoder."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Number of channels at each resolution, from image to latent grid; each number after the first halves the side."""
    latent_dim: int = 256
    """Dimension D of a codeword."""
    num_blocks: int = 2
    """Number of residual blocks at each resolution; for a transformer, the total number of blocks."""
    in_channels: int = 3
    """Number of image channels; training reads 3 or 1 (grey), the Python API takes any number."""
    kind: Literal["cnn", "vit"] = "cnn"
    """Type of network: cnn, convolutional; or vit, a plain transformer as encoder and as decoder (Table 12's ViT-B
    row), for which --model.channels is WIDTH PATCH."""
    num_heads: int = 12
    """Number of attention heads of a transformer."""
    decoder_width: float = 1.0
    """Multiplier on the decoder's number of channels (Table 12: 0.5)."""
    decoder_blocks: int = 0
    """Number of blocks of the decoder; 0 uses --model.num-blocks (Table 12's half depth: 1)."""
    group_size: int = 16
    """Minimum number of channels per GroupNorm group, of which there are at most 32; 0 always uses 32 groups. Groups of
    one or two channels erase brightness and colour, and codes then learn positions."""
    padding: PaddingMode = "zeros"
    """Padding mode of the convolutions. From zeros a network can tell how far away the border is."""
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
        """Return the architecture that the decoder mirrors: this one, with the decoder's own width and depth."""
        if self.decoder_width == 1.0 and self.decoder_blocks == 0:
            return self
        widths = tuple(max(round(width * self.decoder_width), 1) for width in self.channels)
        if self.kind == "vit":
            widths = (widths[0], self.channels[1])  # the second number is the side of a patch
        blocks = self.decoder_blocks or self.num_blocks
        return dataclasses.replace(self, channels=widths, num_blocks=blocks, decoder_width=1.0, decoder_blocks=0)


@settings_class
class VectorQuantizerConfig:
    """The codewords and how they are learned: the settings of `VectorQuantizer` and of the other quantizers."""

    kind: QuantizerKind = "ema"
    """Type of quantizer: ema, a codebook learned by moving averages; gradient, by the middle term of equation 3 as
    printed; or a control: fsq (finite scalar), simvq (a fixed codebook under a learned matrix), lfq (signs), ibq (index
    backpropagation)."""
    levels: tuple[int, ...] = ()
    """Number of levels of each channel for fsq; their product is the number of codewords."""
    entropy_weight: float = 0.1
    """Weight of the entropy loss of lfq and ibq."""
    entropy_temperature: float = 0.01
    """Temperature of the softmax in the entropy loss."""
    num_codewords: int = 8192
    """Number of codewords K in the codebook."""
    decay: float = 0.99
    """Decay of the moving averages from which the codewords are computed."""
    eps: float = 1e-5
    """Laplace smoothing of the codeword counts."""
    revive_after: int = 100
    """Number of steps without use after which a codeword is dead and is replaced; 0 never replaces codewords."""
    start_after: int = 0
    """Number of steps during which latent vectors are not quantised, at most half of the training. k-means then
    initialises the codebook on trained features, which helps short trainings a lot."""
    normalise: bool = False
    """Scale latent vectors and codewords to unit length, as is usual in few dimensions (--model.latent-dim 8):
    distances then depend on direction alone, and more of a large codebook is used."""
    precision: SearchPrecision = "fp32"
    """Precision of the nearest-codeword search in training. fp32 is exact; tf32 and bf16 are faster on a GPU but may
    choose another codeword at nearly the same distance."""

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
        """Whether unused codewords are replaced."""
        return self.kind in ("ema", "gradient")

    @property
    def has_loss(self) -> bool:
        """Whether the quantizer has a loss of its own in addition to the commitment loss."""
        return self.kind != "ema"

    @property
    def factors(self) -> int:
        """Number of latent channels that this kind requires; 0 for any number."""
        return {"fsq": len(self.levels), "lfq": self.num_codewords.bit_length() - 1}.get(self.kind, 0)


@settings_class
class QuantizerConfig(VectorQuantizerConfig):
    """The codebook, how it is learned, and the commitment loss."""

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
    """Type of quantizer."""
    levels: tuple[int, ...] = ()
    """Number of levels of each channel for fsq."""
    image_size: int = 224
    """Side of the images that the tokenizer was trained on, in pixels."""
    features: int = 0
    """Number of channels of the features that the decoder predicts instead of pixels; 0 if it predicts pixels."""
    teacher: str = ""
    """The network whose features the decoder predicts."""
