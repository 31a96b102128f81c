"""Settings of `pecobook codebook`: the tokenizer, its perceptual loss, and the paper's alternatives to that loss."""

from __future__ import annotations

from typing import Literal

from pecobook.errors import ConfigError
from pecobook.settings.initial import tokenizer_of
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.tokenizer import AutoencoderConfig, QuantizerConfig
from pecobook.settings.training import BaseOptimConfig, CropTrainConfig
from pecobook.settings.values import MAX_WIDTH, between, not_negative, positive, settings_class


@settings_class
class AdversarialConfig:
    """The patch discriminator, which learns to distinguish reconstructions from images (equation 8)."""

    weight: float = 0.0
    """Weight of the adversarial loss; Table 7 uses 0.4, and 0 disables it."""
    width: int = 64
    """Number of channels of the discriminator's first layer."""
    num_layers: int = 3
    """Number of strided layers of the discriminator; with 3 it classifies patches of 70 pixels."""
    start: int = 0
    """Step at which the adversarial loss is added to the autoencoder's loss, once the autoencoder has learned to
    reconstruct without it; the discriminator learns from step 0."""

    def __post_init__(self) -> None:
        not_negative(self, "weight", "start")
        positive(self, "width", "num_layers", most=MAX_WIDTH)


@settings_class
class ExplicitConfig:
    """The loss on the codewords themselves (Table 6), instead of or in addition to the perceptual loss on images."""

    kind: Literal["none", "classification", "contrastive"] = "none"
    """Type of loss on the codewords: classification needs labels; contrastive contrasts images by the mean codewords of
    two views, with a momentum encoder."""
    weight: float = 1.0
    """Weight of the loss on codewords."""
    temperature: float = 0.2
    """Temperature of the contrastive softmax."""
    momentum: float = 0.99
    """Momentum of the encoder's moving average, which computes the contrastive keys."""
    hidden_dim: int = 2048
    """Width of the hidden layers of the contrastive heads."""
    output_dim: int = 256
    """Dimension of the space in which the contrastive loss compares images."""

    def __post_init__(self) -> None:
        not_negative(self, "weight")
        between(self, 0.0, 1.0, "momentum")
        positive(self, "temperature")
        positive(self, "hidden_dim", "output_dim", most=MAX_WIDTH)


@settings_class
class TargetConfig:
    """The features that the decoder predicts with --target-features."""

    layer: str = "last"
    """Layer whose features are predicted, counted from 1 as in --perceptual.layers; last is the output of the last
    layer, after the network's final norm."""
    weights: str = ""
    """A local file of weights for the network, or random for the control. If empty, the network's own weights."""
    input_size: int = 0
    """Side to which images are resized for the network, in pixels; 0 keeps their size, or uses the size that the
    network requires."""

    def __post_init__(self) -> None:
        between(self, 0, 4096, "input_size")


@settings_class
class CodebookConfig(CropTrainConfig):
    """Train a perceptual codebook on your images."""

    model: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    explicit: ExplicitConfig = ExplicitConfig()
    target_features: str = ""
    """A frozen network, named as in --perceptual.network, whose features the decoder predicts instead of pixels, with a
    cosine loss (BEiT v2's VQ-KD). The tokenizer then has codes like any other, but no reconstructions."""
    target: TargetConfig = TargetConfig()
    pixel_weight: float = 1.0
    """Weight of the pixel loss, the mean squared error on [-1, 1]."""
    balance: bool = False
    """Divide the sum of the pixel, perceptual and adversarial losses by its current value, so that every run weighs the
    commitment loss against 1. Without --balance, a perceptual loss several times larger than the pixel loss outweighs
    the commitment loss, so runs with and without a perceptual network differ in two ways at once. With
    --micro-batch-size this costs an extra forward pass, since the value is that of the whole step."""
    optim: BaseOptimConfig = BaseOptimConfig(name="adam", lr=5e-5, betas=(0.5, 0.95), weight_decay=0.0, warmup="5000")
    implied = staticmethod(tokenizer_of)  # what follows from --init, for `replace`

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "pixel_weight")
        if self.image_size % self.model.stride:
            raise ConfigError(
                f"--image-size {self.image_size} must be a multiple of {self.model.stride}, "
                "the stride of a model with these --model.channels."
            )
        if self.model.in_channels not in (1, 3):
            raise ConfigError(
                f"--model.in-channels {self.model.in_channels}: images are read as 3 channels or 1 (grey)."
            )
        kind = self.quantizer.kind
        if kind in ("gradient", "simvq", "ibq") and self.strategy == "fsdp":
            raise ConfigError(f"--quantizer.kind {kind} needs unsharded codewords: use --strategy ddp.")
        if self.quantizer.factors not in (0, self.model.latent_dim):
            raise ConfigError(
                f"--quantizer.kind {kind} with these codewords needs --model.latent-dim {self.quantizer.factors}, "
                f"not {self.model.latent_dim}."
            )
        if self.adversarial.weight > 0 and self.image_size < 3 * 2**self.adversarial.num_layers:
            raise ConfigError(
                f"--adversarial.num-layers {self.adversarial.num_layers}: too many layers for {self.image_size}-pixel "
                "images."
            )
        if self.target_features:
            self._check_target()
        elif self.pixel_weight == 0 and (self.perceptual.network == "none" or self.perceptual.weight == 0):
            raise ConfigError("There is no loss: --pixel-weight is 0 and there is no perceptual network.")

    def _check_target(self) -> None:
        """Refuse losses on pixels when the decoder predicts features."""
        for name, here in (
            (f"--perceptual.network {self.perceptual.network}", self.perceptual.network not in ("", "none")),
            (f"--adversarial.weight {self.adversarial.weight:g}", self.adversarial.weight > 0),
        ):
            if here:
                raise ConfigError(
                    f"{name} compares images, but with --target-features the decoder predicts features, not images: "
                    "leave one of them out."
                )
